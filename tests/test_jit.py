"""A function of tensors as one compiled call."""

import pytest
import torch
from torch.func import grad, vmap

import gdfunc as gd
from gdfunc import _tree
from gdfunc._scan import _derived
from gdfunc._scan._body import Body, nested_loops
from gdfunc._scan.backends import native
from gdfunc._torch._graphs import graph_of, schema_name
from gdfunc.adjoints import Checkpoint, Forward, Implicit, Reverse, Truncated

from .references import storages
from .runs import assert_close, make_run, ridge_run

ADJOINTS = [None, Reverse(), Checkpoint(5), Truncated(5), Forward()]


@pytest.mark.long
@pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
def test_a_compiled_hypergradient_is_the_hypergradient(adjoint):
    run, point = make_run("regression", every=2, backend="native")

    def with_aux(**point):
        value = run(**point)
        return value, {"twice": 2 * value}

    gradient = gd.hypergrad(with_aux, ["lr", "momentum"], adjoint=adjoint, has_aux=True)
    assert_close(gd.jit(gradient, backend="native")(**point), gradient(**point), 1e-9)


@pytest.mark.long
@pytest.mark.parametrize(
    ("adjoint", "kept"),
    [(Reverse(), [True, False]), (Checkpoint("sqrt"), [True, False]), (Forward(), [False])],
    ids=str,
)
def test_loops_of_a_compiled_hypergradient_run_once_and_keep_what_is_read(adjoint, kept, monkeypatch):
    """A pass in forward mode is one loop. The loops on the way back keep no carries."""
    written, write = [], native.write
    monkeypatch.setattr(native, "write", lambda body, tiles: [written.append(body), write(body, tiles)][1])
    x = torch.linspace(0, 1, 7)  # of a length that no other test compiles

    def run(lr, adjoint=Reverse()):
        step = gd.make_step(lambda w, batch: ((w * x - batch.mean()).cos() ** 2).mean())
        plan = gd.full_batch(3, 400)
        return gd.train(step, torch.ones(7), torch.ones(3), plan, lr, record=(), adjoint=adjoint)[0].sum()

    gradient = gd.hypergrad(run, adjoint=adjoint)
    got = gd.jit(gradient, backend="native")(torch.tensor(0.1)).grads
    (body,) = written
    assert [loop.keeps for loop in nested_loops(body.graph)] == kept
    assert_close(got, gradient(torch.tensor(0.1)).grads, 1e-5)


def test_a_tangent_that_does_not_exist_is_neither_multiplied_nor_added():
    specs = [((3, 4), torch.float32, torch.device("cpu")), ((4, 5), torch.float32, torch.device("cpu"))]
    graph = graph_of(lambda x, w: [(x @ w).tanh().T * 2 + 0 * x.sum()], specs)
    names = {}
    for inputs in ((False, True), (True, True)):
        body = _derived.pushed(Body(graph, specs, (), ()), inputs, (True,))
        names[inputs] = [schema_name(node.target) for node in body.graph.graph.nodes]
    assert [names[inputs].count("aten::mm") for inputs in names] == [2, 3]
    assert not {"aten::zeros", "aten::full"} & {*names[False, True]}


@pytest.mark.long
@pytest.mark.parametrize("adjoint", [Implicit(), Implicit("neumann", 400)], ids=str)
def test_a_compiled_fixed_point_reports_its_residual(adjoint):
    run, point = ridge_run(steps=60)
    gradient = gd.hypergrad(run, (0, 2), adjoint=adjoint)
    got, expected = gd.jit(gradient, backend="native")(*point), gradient(*point)
    assert_close(got[:2], expected[:2], 1e-9)
    assert 0 < got.residual < 1e-9


@pytest.mark.long
def test_a_compiled_run_is_swept_and_differentiated():
    step = gd.make_step(lambda w, batch: (w.cos() + (w - 1) ** 2).sum())
    start, plan = torch.tensor([0.0, 2.0], dtype=torch.float64), gd.full_batch(1, 3)

    def value(lr):
        return gd.train(step, start, None, plan, lr)[0].square().sum()

    lrs = torch.tensor([0.01, 0.05], dtype=torch.float64)
    for transform in (vmap, lambda f: grad(lambda lrs: vmap(f)(lrs).sum()), lambda f: vmap(grad(grad(f)))):
        assert_close(transform(gd.jit(value, backend="native"))(lrs), transform(value)(lrs), 1e-8)
    slope = gd.jit(grad(value), backend="native")
    assert_close(vmap(slope)(lrs), vmap(grad(value))(lrs), 1e-9)
    assert_close(grad(slope)(lrs[0]), grad(grad(value))(lrs[0]), 1e-8)


@pytest.mark.long
def test_a_loop_within_a_loop_closes_over_what_a_compiled_function_computed():
    def value(rate):
        half = rate / 2

        def step(w, _, lr):
            return w - lr * half * w, w

        plan = gd.full_batch(1, 8)
        return gd.train(step, torch.tensor(1.0), None, plan, 0.5, every=2, backend="native")[0]

    rate = torch.tensor(0.5)
    for f in (value, grad(value), lambda rate: vmap(value)(rate + torch.arange(3))):
        assert_close(gd.jit(f, backend="native")(rate), f(rate), 1e-6)


@pytest.mark.long
def test_another_number_traces_nothing_and_another_shape_or_int_does(traces):
    f = gd.jit(lambda x, rate, power=2: {"y": x**power * rate}, backend="native")

    def is_traced(*args, **kwargs):
        del traces[:]
        f(*args, **kwargs)
        return bool(traces)

    assert is_traced(torch.ones(3), 0.1)
    assert not is_traced(torch.zeros(3), 0.2)
    assert not is_traced(torch.ones(3), torch.tensor(0.3, dtype=torch.float64))
    assert is_traced(torch.ones(3), 2.0, power=3)
    assert is_traced(torch.ones(4), 2.0)
    assert f(2 * torch.ones(3), 2.0, power=3)["y"].tolist() == [16, 16, 16]


@pytest.mark.long
def test_a_compiled_run_sees_tensors_change_and_is_traced_again_after_a_change_of_python(traces):
    scale, target, index = [1.0], torch.tensor(2.0), gd.full_batch(1, 40)

    def run(lr):
        step = gd.make_step(lambda w, _: scale[0] * (w - target) ** 2)
        return gd.train(step, torch.tensor(0.0), None, index, lr)[0] ** 2

    def repeat(*, is_new):
        expected = gd.hypergrad(run)(0.01).grads
        del traces[:]
        assert_close(gd.jit(gd.hypergrad(run), backend="native")(0.01).grads, expected, 1e-4)
        assert bool(traces) == is_new

    repeat(is_new=True)
    repeat(is_new=False)
    target.mul_(3)
    repeat(is_new=False)
    scale[0] = 2.0
    repeat(is_new=True)


@pytest.mark.parametrize("backend", ["eager", "native", "auto"])
def test_results_share_no_storage_with_arguments(backend):
    x = torch.arange(3.0)
    result = gd.jit(lambda x: (x, x[1:], x + 1, {"same": x}), backend=backend)(x)
    leaves = _tree.leaves(result)
    assert [leaf.tolist() for leaf in leaves] == [[0, 1, 2], [1, 2], [1, 2, 3], [0, 1, 2]]
    assert len({*storages(leaves), *storages([x])}) == 5


def test_a_function_that_cannot_be_traced_warns_once_and_runs_from_python():
    def f(x):
        return x * 2 if x > 0 else x

    fast = gd.jit(f)
    with pytest.warns(UserWarning, match="needs the value of a tensor") as caught:
        assert [fast(1.0).item(), fast(-1.0).item()] == [2, -1]
    assert len(caught) == 1
    with pytest.raises(gd.BackendError, match="needs the value of a tensor"):
        gd.jit(f, backend="native")(1.0)
    with pytest.raises(ValueError, match="backend must be 'eager' or"):
        gd.jit(f, backend="gpu")


def test_few_carries_are_refused_inside_a_trace_by_name():
    run, point = make_run("regression", epochs=1)
    slope = grad(lambda lr: run(**point | {"lr": lr}, adjoint=Checkpoint(carries=3)))
    with pytest.raises(gd.BackendError, match=r"Checkpoint\(carries=3\) .* use Checkpoint\('sqrt'\)"):
        gd.jit(slope, backend="native")(point["lr"])
