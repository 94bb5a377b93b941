"""Derivatives of runs: every adjoint against differences, closed forms, and the other adjoints."""

import gc
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch.func import grad, vmap

import gdfunc as gd
from gdfunc import _tree
from gdfunc import testing as gt
from gdfunc._sweep._memory import Memory
from gdfunc.adjoints import Checkpoint, Forward, Implicit, Reverse, Truncated

from .references import COMPILED, fingerprint, linear_data, linear_loss, normal, storages
from .runs import MODELS, T, assert_close, make_run, ridge_run

EXACT = [Reverse(), Checkpoint(5), Checkpoint(carries=2), Forward(), Forward(chunk_size=7)]


def differences(f, point, h=1e-3):
    """The derivatives of f(point) for each entry of a tree, by differences of sixth order."""
    leaves, structure = _tree.flatten(point)
    sizes = [leaf.numel() for leaf in leaves]
    flat = torch.cat([leaf.reshape(-1) for leaf in leaves])

    def tree(flat):
        parts = zip(flat.split(sizes), leaves, strict=True)
        return _tree.unflatten(structure, [part.reshape(leaf.shape) for part, leaf in parts])

    def at(flat):
        return f(tree(flat))

    moves = h * torch.eye(len(flat)).double()
    weights = {1: 45 / 60, 2: -9 / 60, 3: 1 / 60}
    pairs = {k: vmap(at)(flat + k * moves) - vmap(at)(flat - k * moves) for k in weights}
    return tree(sum(weights[k] * pair / h for k, pair in pairs.items()))


@pytest.fixture(scope="module")
def measured():
    """Derivatives by differences, for every model and argument."""
    return {
        (model, name): differences(lambda v, n=name: run(**point | {n: v}), point[name])  # noqa: B023
        for model in MODELS
        for run, point in [make_run(model)]
        for name in point
    }


NAMES = ["lr", "lrs", "momentum", "init", "weights", "decay"]
MODEL_CASES = [*((model, "eager") for model in MODELS), ("regression", "native")]
MODEL_CASES += [pytest.param("regression", "inductor", marks=pytest.mark.slow)]


@pytest.mark.long
@pytest.mark.parametrize("adjoint", [*EXACT, *map(Checkpoint, ("sqrt", 1, 100)), Truncated(T)], ids=str)
@pytest.mark.parametrize(("model", "backend"), MODEL_CASES)
def test_every_exact_adjoint_is_the_derivative(model, adjoint, backend, measured):
    run, point = make_run(model, backend=backend)
    result = gd.hypergrad(run, NAMES, adjoint=adjoint)(**point)
    for name in NAMES:
        assert max(float(leaf.abs().max()) for leaf in _tree.leaves(measured[model, name])) > 1e-6
        assert_close(result.grads[name], measured[model, name], 1e-9)
    torch.testing.assert_close(result.value, make_run(model)[0](**point), rtol=1e-13, atol=0)
    assert (result.aux, result.residual, result.remaining) == ((), (), ())


@pytest.mark.long
@pytest.mark.parametrize("backend", ["eager", "native"])
@pytest.mark.parametrize("adjoint", [*EXACT[:3], Truncated(5)], ids=str)
def test_torch_func_goes_through_a_run_in_either_nesting(adjoint, backend):
    run, point = make_run("regression", backend=backend, every=2)

    def value(lr, adjoint=adjoint):
        return run(**point | {"lr": lr}, adjoint=adjoint)

    lrs = torch.tensor([0.02, 0.05], dtype=torch.float64)
    one_by_one = torch.stack([gd.hypergrad(value, adjoint=adjoint)(lr).grads for lr in lrs])
    assert_close(vmap(grad(value))(lrs), one_by_one, 1e-11)
    assert_close(grad(lambda lrs: vmap(value)(lrs).sum())(lrs), one_by_one, 1e-11)
    assert_close(torch.func.jacrev(vmap(value))(lrs), one_by_one.diag(), 1e-11)
    leaf = lrs.clone().requires_grad_()
    vmap(value)(leaf).sum().backward()
    assert_close(leaf.grad, one_by_one, 1e-11)


def slopes(adjoint, loss_fn, start, lrs, backend="eager"):
    def last_loss(lrs, adjoint=Reverse()):
        step, plan = gd.make_step(loss_fn), gd.full_batch(1, len(lrs))
        return loss_fn(gd.train(step, start, None, plan, lrs, adjoint=adjoint, backend=backend)[0], None)

    return gd.hypergrad(last_loss, adjoint=adjoint)(lrs).grads


@pytest.mark.long
@pytest.mark.parametrize("backend", ["eager", "native"])
@pytest.mark.parametrize("adjoint", EXACT, ids=str)
def test_every_exact_adjoint_keeps_the_law_of_hypergradients(adjoint, backend):
    gt.check_hypergradient(partial(slopes, adjoint, backend=backend))
    with pytest.raises(gt.LawBroken, match="0 must equal"):
        gt.check_hypergradient(partial(slopes, Truncated(4), backend=backend))


# Truncated.


CASES = [(1, 1, "eager"), (1, 4, "eager"), (4, 1, "native"), (8, 1, "eager"), (8, 4, "native")]
CASES += [pytest.param(8, 4, "inductor", marks=pytest.mark.slow)]


@pytest.mark.long
@pytest.mark.parametrize(("last", "every", "backend"), CASES)
def test_truncated_is_the_derivative_of_the_last_steps_alone(last, backend, every):
    params, data, loss_fn = MODELS["regression"]()
    params = _tree.map(lambda leaf: leaf.double(), params)
    step, index = gd.make_step(loss_fn), gd.epoch_batches(gd.random.key(1), n=40, batch_size=10, epochs=3)

    def run(lr, init, plan=index, backend=backend, adjoint=Reverse()):
        how = {"every": every, "backend": backend, "adjoint": adjoint}
        final, trajectory = gd.train(step, init, data, plan, lr, **how)
        return loss_fn(final, data) + trajectory.loss.sum(), trajectory.loss

    got = gd.hypergrad(run, ("lr", "init"), adjoint=Truncated(last), has_aux=True)(0.05, params)
    sees = last if every == 1 else max(4, last)
    middle, head = gd.train(step, params, data, index[: T - sees], 0.05, every=every)
    tail = partial(run, init=middle, plan=index[T - sees :], backend="eager")
    expected = gd.hypergrad(tail, has_aux=True)(0.05)
    assert_close(got.grads["lr"], expected.grads, 1e-11)
    assert not any(leaf.any() for leaf in _tree.leaves(got.grads["init"]))
    assert_close(got.value, expected.value + head.loss.sum(), 1e-12)
    assert_close(got.aux, torch.cat([head.loss, expected.aux]), 1e-12)


# Implicit.


def ridge_gradient(penalty, aim):
    """By the normal equations, (XᵀX/n + diag(λ)) w = Xᵀy/n with a column of ones."""
    (x, y), (other_x, other_y) = linear_data(20, 30, 3), linear_data(30, 30, 3)

    def fit(penalty):
        full = torch.cat([x, torch.ones(30, 1).double()], dim=1)
        ridge = torch.cat([penalty, torch.zeros(1).double()]).diag()
        solution = torch.linalg.solve(full.T @ full / 30 + ridge, full.T @ y / 30)
        residual = other_x @ solution[:3] + solution[3] - other_y
        return residual.square().mean() + aim * penalty.sum() ** 2

    return grad(fit)(penalty)


@pytest.mark.long
@pytest.mark.parametrize("backend", ["eager", *COMPILED])
@pytest.mark.parametrize(
    ("transform", "adjoint"),
    [(None, Implicit()), (None, Implicit("neumann", 400)), (gd.momentum(0.5), Implicit("neumann", 400))],
    ids=["cg", "neumann", "momentum"],
)
def test_implicit_is_the_derivative_of_the_minimum(transform, adjoint, backend):
    run, (penalty, init, aim) = ridge_run(transform=transform, backend=backend)
    result = gd.hypergrad(run, (0, 1, 2), adjoint=adjoint)(penalty, init, aim)
    assert_close(result.grads[0], ridge_gradient(penalty, aim), 1e-9)
    assert not any(leaf.any() for leaf in _tree.leaves(result.grads[1]))
    assert_close(result.grads[2], penalty.sum() ** 2, 1e-12)
    torch.testing.assert_close(result.value, run(penalty, init, aim), rtol=1e-13, atol=0)
    assert result.residual < 1e-9
    assert abs(result.remaining) < 1e-12


@pytest.mark.long
@pytest.mark.parametrize("backend", ["eager", "native"])
@pytest.mark.parametrize("adjoint", [Implicit("cg", 5), Implicit("neumann", 300)], ids=str)
def test_implicit_solves_for_each_member_of_a_vmap_in_either_nesting(adjoint, backend):
    """Five iterations solve for four unknowns, but not one system of all twelve."""
    run, (penalty, init, aim) = ridge_run(backend=backend)
    penalties = penalty * torch.tensor([[0.5], [1.0], [4.0]]).double()
    exact = torch.stack([ridge_gradient(penalty, aim) for penalty in penalties])

    def value(penalty):
        return run(penalty, init, aim, adjoint)

    assert_close(vmap(grad(value))(penalties), exact, 1e-8)
    assert_close(grad(lambda penalties: vmap(value)(penalties).sum())(penalties), exact, 1e-8)
    offset = torch.zeros(3).double()  # one tensor that all members share
    shared = grad(lambda offset: vmap(value)(penalties + offset).sum())(offset)
    assert_close(shared, exact.sum(0), 1e-8)


@pytest.mark.long
def test_a_part_of_the_carry_that_members_share_has_one_cotangent():
    """a = s/2 and b = (a + x)/2 are fixed points; members differ in x alone. A counter does not move."""

    def total(s, x, adjoint):
        def one(x):
            def step(carry, _, lr):
                b = (carry["a"] + x) / 2 + 0 * carry["b"]
                return {"a": carry["a"] / 2 + s / 4, "b": b, "count": carry["count"] + 1}, s

            zero = torch.zeros((), dtype=torch.float64)
            init = {"a": zero, "b": zero, "count": zero.long()}
            final, _ = gd.train(step, init, None, gd.full_batch(1, 80), 0.1, adjoint=adjoint)
            return final["a"] * final["b"]

        return vmap(one)(x).sum()

    s, x = torch.tensor(2.0).double(), torch.tensor([1.0, 3.0]).double()
    for adjoint in (Reverse(), Implicit("neumann", 80)):
        got = grad(total, (0, 1))(s, x, adjoint)
        # Σ s/2 (s/2 + x)/2
        assert_close(got, ((s + x).sum() / 4 + 0 * s, torch.full((2,), 0.25).double() * s), 1e-12)


@pytest.mark.long
def test_the_error_of_implicit_is_within_its_residual():
    run, point = ridge_run()
    exact = ridge_gradient(point[0], point[2])
    errors, residuals = [], []
    told = partial(pytest.warns, UserWarning, match=r"left a residual of .*: take more iterations")
    for iterations in (3, 6, 12, 24, 48):
        with told() if iterations < 24 else nullcontext():
            got = gd.hypergrad(run, adjoint=Implicit("neumann", iterations))(*point)
        errors.append(float((got.grads - exact).norm() / exact.norm()))
        residuals.append(float(got.residual))
    assert residuals == sorted(residuals, reverse=True)
    assert all(error < 20 * residual for error, residual in zip(errors, residuals, strict=True))
    assert errors[0] > 1e-3


@pytest.mark.parametrize("solver", ["cg", "neumann"])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_system_that_is_solved_early_stays_solved(solver, weight):
    """Of one unknown, by conjugate gradients at once; or of none, where the number ignores the run."""

    def run(penalty, adjoint):
        step = gd.make_step(lambda x, batch: (x - 1) ** 2 + penalty * x**2)
        start, plan = torch.tensor(0.0).double(), gd.full_batch(1, 100)
        final, _ = gd.train(step, start, None, plan, 0.25, adjoint=adjoint)
        return weight * final + penalty**2

    result = gd.hypergrad(run, adjoint=Implicit(solver))(0.5)
    torch.testing.assert_close(float(result.grads), 1 - weight / 2.25, rtol=1e-12, atol=0)
    assert result.residual < 1e-12


@pytest.mark.long
def test_a_wrong_solver_warns_and_names_the_other():
    run, point = ridge_run(transform=gd.momentum(0.9))
    with pytest.warns(UserWarning, match=r"residual of .*solver='neumann'"):
        gd.hypergrad(run, adjoint=Implicit(iterations=50))(*point)


@pytest.mark.long
def test_an_unfinished_run_shows_by_what_remains():
    whole, point = ridge_run()
    run, _ = ridge_run(steps=1)
    with pytest.warns(UserWarning, match="has not converged: its number would still change by about"):
        result = gd.hypergrad(run, adjoint=Implicit())(*point)
    assert result.residual < 1e-9
    run, _ = ridge_run(steps=60)
    result = gd.hypergrad(run, adjoint=Implicit())(*point)
    torch.testing.assert_close(result.remaining, whole(*point) - result.value, rtol=0.01, atol=0)
    assert abs(result.remaining) > 1e-6


@pytest.mark.long
def test_plain_grad_warns_too_and_names_the_worst_member():
    run, (penalty, init, aim) = ridge_run(steps=1)
    for transform in (grad, lambda f: lambda penalty: vmap(grad(f))(penalty[None])):
        with pytest.warns(UserWarning, match="has not converged"):
            transform(lambda penalty: run(penalty, init, aim, Implicit()))(penalty)


def test_several_implicit_runs_add_up():
    run, point = ridge_run(steps=60)
    single = gd.hypergrad(run, adjoint=Implicit())(*point)
    double = gd.hypergrad(lambda *args, **how: run(*args, **how) * 2, adjoint=Implicit())(*point)
    two = lambda *args, **how: run(*args, **how) + run(*args, **how)  # noqa: E731
    both = gd.hypergrad(two, adjoint=Implicit())(*point)
    assert_close(both.grads, 2 * single.grads, 1e-12)
    assert_close(both.remaining, 2 * single.remaining, 1e-12)
    assert_close(double.remaining, 2 * single.remaining, 1e-12)


def test_a_number_that_misses_the_end_of_the_run_is_refused():
    run, point = ridge_run(steps=60)
    step = gd.make_step(lambda x, batch: (x - 1) ** 2)

    def last_loss(lr, adjoint):
        return gd.train(step, torch.tensor(0.0), None, gd.full_batch(1, 9), lr, adjoint=adjoint)[1].loss[-1]

    for f, args in ((last_loss, (0.25,)), (lambda *point, adjoint: run(*point), point)):
        with pytest.raises(ValueError, match="pass the keyword adjoint on to train or scan"):
            gd.hypergrad(f, adjoint=Implicit())(*args)
    with pytest.raises(ValueError, match="needs at least one step"):
        gd.hypergrad(ridge_run(steps=0)[0], adjoint=Implicit())(*point)


@pytest.mark.long
@pytest.mark.parametrize("wrap", [lambda f: f, partial(gd.jit, backend="native")], ids=["plain", "jit"])
def test_implicit_refuses_forward_mode_and_second_derivatives_in_words(wrap):
    run, (penalty, init, aim) = ridge_run(steps=60)
    value = wrap(lambda aim: run(penalty * aim, init, aim, Implicit("neumann", 60)))
    slope = wrap(grad(value))
    with pytest.raises(gd.BackendError, match="Implicit has no forward mode"):
        torch.func.jvp(value, (aim,), (aim,))
    with pytest.raises(gd.BackendError, match="Implicit has no second derivative"):
        grad(slope)(aim)
    with pytest.raises(gd.BackendError, match=r"Implicit has no (second derivative|forward mode)"):
        torch.func.jvp(slope, (aim,), (aim,))


# Adam where its second moment is zero.


@pytest.mark.parametrize("adjoint", [Reverse(), Forward(), Truncated(2)], ids=str)
@pytest.mark.parametrize("make", [gd.adam, gd.adamw, gd.rmsprop, gd.adagrad, gd.nadam, gd.adabelief])
def test_a_zero_second_moment_has_finite_derivatives(make, adjoint):
    """One of two coordinates never has a gradient."""
    transform, start = make(), torch.tensor([1.0, 1.0]).double()
    step = gd.make_step(lambda x, batch: x[0] ** 2 + 0 * x[1], transform)

    def run(lr, adjoint=Reverse()):
        state = step.init(start)
        final, _ = gd.train(step, state, None, gd.full_batch(1, 4), lr, adjoint=adjoint)
        return final.params.square().sum()

    result = gd.hypergrad(run, adjoint=adjoint)(0.07)
    assert result.grads.isfinite()
    if adjoint != Truncated(2):
        assert_close(result.grads, differences(run, torch.tensor(0.07).double(), h=1e-4), 1e-7)


# Composition.


@pytest.mark.long
@pytest.mark.parametrize("adjoint", EXACT[:-1], ids=str)
def test_second_derivatives(adjoint):
    run, point = make_run("logistic")

    def slope(lr):
        return gd.hypergrad(run, "lr", adjoint=adjoint)(**point | {"lr": lr}).grads

    expected = differences(slope, point["lr"])
    assert_close(grad(slope)(point["lr"]), expected, 1e-8)
    one = torch.ones_like(point["lr"])
    assert_close(torch.func.jvp(slope, (point["lr"],), (one,))[1], expected, 1e-8)


@pytest.mark.long
@pytest.mark.parametrize("compile", [lambda f: f, partial(gd.jit, backend="native")], ids=["plain", "jit"])
@pytest.mark.parametrize("backend", ["eager", "native"])
def test_a_hypergradient_has_derivatives_in_what_its_run_closes_over(backend, compile):
    run, point = make_run("regression", backend=backend)
    rest = {name: value for name, value in point.items() if name != "weights"}

    def slope(weights):
        gradient = gd.hypergrad(lambda lr: run(**rest | {"weights": weights, "lr": lr}))
        return compile(gradient)(rest["lr"]).grads

    expected = differences(slope, point["weights"])
    assert float(expected.abs().max()) > 1e-6
    assert_close(grad(slope)(point["weights"]), expected, 1e-8)
    weights = point["weights"].clone().requires_grad_()
    assert_close(torch.autograd.grad(slope(weights), weights)[0], expected, 1e-8)


@pytest.mark.long
@pytest.mark.parametrize("adjoint", [*EXACT, Truncated(7), Implicit()], ids=str)
def test_a_sweep_of_hypergradients_is_a_loop(adjoint):
    run, (penalty, init, aim) = ridge_run(steps=60)
    gradient = gd.hypergrad(run, "aim" if isinstance(adjoint, Forward) else "penalty", adjoint=adjoint)
    penalties = penalty * torch.tensor([[0.5], [1.0], [2.0]]).double()
    grid = gd.grid(penalty=penalties, aim=[aim, 2 * aim])
    swept = gd.sweep(partial(gradient, init=init), grid)
    for i, at in enumerate(grid):
        assert_close(_tree.map(lambda leaf: leaf[i], swept.outputs), gradient(init=init, **at), 1e-9)  # noqa: B023


def test_a_run_inside_a_scan_of_runs():
    """Gradient descent on the learning rate of gradient descent, by train itself."""
    run, point = make_run("regression")
    rest = {name: value for name, value in point.items() if name != "lr"}
    outer = gd.make_step(lambda lr, batch: run(lr=lr, **rest))
    final, trajectory = gd.train(outer, point["lr"], None, gd.full_batch(1, 5), 0.01)
    lr = point["lr"]
    for value in trajectory.loss:
        result = gd.hypergrad(run, "lr")(lr=lr, **rest)
        assert_close(result.value, value, 1e-12)
        lr = lr - 0.01 * result.grads
    assert_close(final, lr, 1e-12)


@pytest.mark.long
@pytest.mark.parametrize(
    "adjoint", [Reverse(), Checkpoint(3), Truncated(3), Implicit("neumann", 30)], ids=str
)
def test_a_run_inside_a_compiled_loop_keeps_its_adjoint(adjoint):
    run, point = make_run("regression", epochs=1)

    def inner(lr, adjoint):
        return run(**point | {"lr": lr}, adjoint=adjoint)

    def outer(lr, adjoint):
        return gd.scan(lambda c, x: (c, inner(lr, adjoint)), None, length=1, backend="native")[1][0]

    with pytest.warns(UserWarning, match="Implicit") if isinstance(adjoint, Implicit) else nullcontext():
        expected = gd.hypergrad(inner, adjoint=adjoint)(point["lr"])
    got = gd.hypergrad(outer, adjoint=adjoint)(point["lr"])
    assert_close(got[:2], expected[:2], 1e-9)


@pytest.mark.long
def test_loops_that_differ_in_their_adjoint_alone_are_told_apart():
    def slope(iterations):
        def run(decay):
            step = gd.make_step(lambda w, batch: (w - 1) ** 2 + decay * w**2)
            start, plan = torch.tensor(0.0).double(), gd.full_batch(1, 60)
            adjoint = Implicit("neumann", iterations)
            return gd.train(step, start, None, plan, 0.1, adjoint=adjoint)[0]

        return grad(gd.jit(run, backend="native"))(torch.tensor(1.0).double())

    few, many = slope(5), slope(60)  # of Σ 0.6ᵏ, k < iterations
    assert_close(few / many, torch.tensor((1 - 0.6**5) / (1 - 0.6**60), dtype=torch.float64), 1e-9)


# Memory.


def peak(adjoint, steps, derivative=lambda run, adjoint: gd.hypergrad(run, adjoint=adjoint)):
    start, target = torch.zeros(1000).double(), normal(0, 1000)
    step = gd.make_step(lambda x, batch: (0.5 * (x - target) ** 2 + 0.1 * (x - target).cos()).sum())

    def run(lr, adjoint=Reverse()):
        plan = gd.full_batch(1, steps)
        return (gd.train(step, start, None, plan, lr, record=(), adjoint=adjoint)[0] ** 2).sum()

    gradient, lr = derivative(run, adjoint), torch.tensor(0.1)
    gradient(lr)  # the traces, which are made once
    gc.collect()
    with Memory() as live:
        gradient(lr)
    return live.peak


@pytest.mark.long
def test_a_reverse_pass_keeps_nothing_for_a_derivative_that_nobody_takes():
    assert peak(Reverse(), 32) < 0.6 * peak(Reverse(), 32, lambda run, _: grad(run))


@pytest.mark.long
@pytest.mark.parametrize(
    ("adjoint", "low", "high"),
    [
        (Reverse(), 3.0, 4.5),
        (Checkpoint("sqrt"), 1.0, 2.4),
        (Forward(), 0.8, 1.2),
        (Truncated(5), 0.8, 1.2),
        (Implicit("cg", 5), 0.8, 1.2),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Implicit differentiates a run that has not converged")
def test_memory_grows_as_promised(adjoint, low, high):
    short, long = peak(adjoint, 16), peak(adjoint, 64)
    assert low < long / short < high


@pytest.mark.long
def test_memory_of_few_carries_is_a_multiple_of_theirs():
    """c between segments, c in a segment, and up to two copies of the latter while a loop runs."""
    few, more = (peak(Checkpoint(carries=carries), 60) for carries in (4, 12))
    assert 1.5 * 8 < (more - few) / 8000 < 4.5 * 8


# Arguments and results.


def test_arguments_are_chosen_by_position_and_by_name():
    def run(a, b, *, c):
        return a**2 * b["x"].sum() + c**3

    b, c = {"x": torch.tensor([2.0, 3.0])}, torch.tensor(2.0)
    assert gd.hypergrad(run)(a=2.0, b=b, c=c).grads == 20
    for argnums, expected in ((0, 20), ("a", 20), ("c", 12), (2, 12)):
        assert gd.hypergrad(run, argnums)(2.0, b, c=c).grads == expected
    first, second = gd.hypergrad(run, (0, 1))(2.0, b, c=c).grads
    assert (first, second["x"].tolist()) == (20, [4, 4])
    by_name = gd.hypergrad(run, ["c", "b"])(2.0, b=b, c=c).grads
    assert list(by_name) == ["c", "b"]
    assert by_name["c"] == 12
    assert gd.hypergrad(run, ("a",))(2.0, b, c=c).grads.keys() == {"a"}
    assert gd.hypergrad(lambda **point: point["lr"] ** 2, "lr")(lr=3.0).grads == 6


@pytest.mark.parametrize("adjoint", [None, *EXACT], ids=str)
def test_aux_comes_along(adjoint):
    def run(a, adjoint=None):
        return (a**2).sum(), {"twice": 2 * a, "count": torch.tensor(3)}

    result = gd.hypergrad(run, adjoint=adjoint, has_aux=True)(torch.tensor([1.0, 2.0]))
    assert result.grads.tolist() == [2, 4]
    assert result.aux["twice"].tolist() == [2, 4]
    assert result.aux["count"] == 3


@pytest.mark.long
def test_float32_parameters_keep_their_dtype():
    data = tuple(leaf.float() for leaf in linear_data(0, 20, 3))
    init = {"w": torch.zeros(3), "b": torch.zeros(())}
    step = gd.make_step(linear_loss)

    def run(lr, init, adjoint=Reverse()):
        return linear_loss(gd.train(step, init, data, gd.full_batch(20, 5), lr, adjoint=adjoint)[0], data)

    for adjoint in EXACT:
        result = gd.hypergrad(run, (0, 1), adjoint=adjoint)(0.1, init)
        assert result.grads[0].dtype == torch.float64
        assert {leaf.dtype for leaf in _tree.leaves(result.grads[1])} == {torch.float32}


@pytest.mark.parametrize("adjoint", [*EXACT, Truncated(3), Implicit()], ids=str)
def test_arguments_are_neither_written_into_nor_shared(adjoint):
    run, point = ridge_run(steps=20)
    given = _tree.leaves(point)
    before = fingerprint(given)
    result = gd.hypergrad(run, (0, 1, 2), adjoint=adjoint)(*point)
    assert fingerprint(given) == before
    found = [leaf for leaf in _tree.leaves(result) if isinstance(leaf, torch.Tensor)]
    assert not set(storages(found)) & set(storages(given))
    assert len(set(storages(found))) == len(found)


def test_bad_requests_are_refused():
    def run(a, b=1.0):
        return a**2 * b

    missing = "argnums names .* which the call did not pass; it passed 1 by position"
    for argnums in ("c", 3, -1):
        with pytest.raises(ValueError, match=missing):
            gd.hypergrad(run, argnums)(1.0)
    for argnums in ((), (None,), 1.5):
        with pytest.raises(ValueError, match="argnums must be"):
            gd.hypergrad(run, argnums)
    wanted = r"takes no such keyword. Write\n    def run\(a, b, adjoint=gd.adjoints.Reverse\(\)\):"
    with pytest.raises(ValueError, match=wanted):
        gd.hypergrad(run, adjoint=Reverse())
    with pytest.raises(TypeError, match=r"adjoint must be Reverse.* got 'forward'"):
        gd.hypergrad(run, adjoint="forward")


SEGMENTS = r"either every \(an int or 'sqrt'\) or carries="


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Truncated(0), "last must be an int >= 1"),
        (lambda: Truncated(True), "last must be an int >= 1"),
        (lambda: Implicit("gmres"), "solver must be 'cg' or 'neumann'"),
        (lambda: Implicit("cg", 0), "iterations must be an int >= 1"),
        (lambda: Forward(0), "chunk_size must be an int >= 1"),
        (lambda: Checkpoint(), SEGMENTS),
        (lambda: Checkpoint(4, carries=4), SEGMENTS),
        (lambda: Checkpoint(0), "every must be an int >= 1"),
        (lambda: Checkpoint("root"), "every, if it is no int, must be 'sqrt'"),
        (lambda: Checkpoint(carries=0), "carries must be an int >= 1"),
    ],
)
def test_bad_adjoints_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


BAD_CALLS = [
    (
        lambda a: a["n"].sum(),
        {"n": torch.tensor(3)},
        TypeError,
        r"argument 0\['n'\] is torch.int64; give what is",
    ),
    (lambda a: 0.0, "fast", TypeError, "argument 0 is str"),
    (lambda a: 0.0, (), ValueError, "argument 0 has no tensor leaves"),
    (lambda a: 1.0, 1.0, TypeError, r"0-d float tensor; got float; \.item\(\)"),
    (lambda a: (a, a), 1.0, TypeError, "got tuple; a pair needs has_aux=True"),
    (lambda a: a[None], 1.0, ValueError, r"got torch.float64 \(1,\)"),
    (lambda a: a.long(), 1.0, ValueError, r"got torch\.int64"),
    (lambda a: a.detach() * 2, 1.0, ValueError, "does not depend on the chosen arguments"),
]


@pytest.mark.parametrize(("run", "point", "kind", "message"), BAD_CALLS)
def test_bad_points_and_values_are_refused(run, point, kind, message):
    with pytest.raises(kind, match=message):
        gd.hypergrad(run)(point)


def test_a_result_without_aux_is_refused_where_aux_is_asked_for():
    with pytest.raises(TypeError, match=r"\(number, aux\) with has_aux=True; got Tensor"):
        gd.hypergrad(lambda a: a, has_aux=True)(1.0)


def test_a_run_that_takes_its_argument_apart_leaves_the_callers_whole():
    options = {"lr": torch.tensor(0.1).double(), "goal": torch.tensor(2.0).double()}

    def run(options):
        step = gd.make_step(lambda w, batch: (w - options["goal"]).square())
        w, plan = torch.tensor(0.0).double(), gd.full_batch(1, 60)
        return gd.train(step, w, None, plan, options.pop("lr"))[0] * 3

    found = gd.hypergrad(run)(options)
    assert abs(found.grads["goal"] - 3) < 1e-3
    assert set(options) == {"lr", "goal"}


def test_an_argument_that_is_named_twice_is_refused():
    for argnums in ((0, "lr"), (0, 0)):
        with pytest.raises(ValueError, match="argnums names an argument twice"):
            gd.hypergrad(lambda lr: lr**3, argnums)(2.0)


@pytest.mark.parametrize("adjoint", [None, Forward()])
def test_a_run_that_does_not_depend_on_its_argument_is_refused(adjoint):
    for run in (lambda lr: lr.detach() ** 2, lambda lr: torch.tensor(lr.item() ** 2)):
        with pytest.raises(ValueError, match="does not depend on the chosen arguments"):
            gd.hypergrad(run, adjoint=adjoint)(2.0)


@pytest.mark.parametrize("adjoint", [Truncated(3), Implicit()])
def test_adjoints_that_count_from_the_end_refuse_a_run_that_may_stop(adjoint):
    step, plan = gd.make_step(lambda w, batch: (w - 1) ** 2), gd.full_batch(1, 9)
    with pytest.raises(ValueError, match="counts from the planned end of a run"):
        gd.train(step, torch.zeros(()), None, plan, 0.1, stop=lambda w, loss: loss < 0, adjoint=adjoint)


@pytest.mark.long
@pytest.mark.parametrize("adjoint", [Checkpoint(carries=2), Checkpoint(2), Reverse()], ids=str)
def test_hessians_in_forward_mode_over_reverse_go_through_a_scan(adjoint):
    def total(w):
        return gd.scan(lambda c, x: (torch.sin(c), c.sum()), w, None, 4, adjoint=adjoint)[1].sum()

    def loop(w):
        total = torch.zeros((), dtype=w.dtype)
        for _ in range(4):
            total, w = total + w.sum(), torch.sin(w)
        return total

    w = normal(1, 3)
    torch.testing.assert_close(torch.func.hessian(total)(w), torch.func.hessian(loop)(w))
    if adjoint != Checkpoint(carries=2):  # which cannot be part of a trace
        twice = torch.func.jacfwd(torch.func.jacfwd(total))
        torch.testing.assert_close(gd.jit(twice, backend="native")(w), torch.func.hessian(loop)(w))
