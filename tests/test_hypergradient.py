"""Hypergradients: every mode against differences, closed forms, and the other modes."""

import gc
import math
from contextlib import nullcontext
from functools import partial

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.func import grad, vmap

import gdfunc as gd
from gdfunc import _through, _tree
from gdfunc._scan.trace import _trace
from gdfunc._sweep._memory import Memory

from .references import COMPILED, fingerprint, linear_data, linear_loss, normal, storages

EXACT = ["reverse", "checkpoint", "forward"]


# Three models: their parameters, data, and losses.


def regression():
    return {"w": torch.zeros(1, 1), "b": torch.zeros(1)}, linear_data(0, 40, 1), linear_loss_of_matrix


def linear_loss_of_matrix(params, batch):
    x, y = batch
    return ((x @ params["w"].mT + params["b"])[:, 0] - y).square().mean()


def logistic():
    x = normal(3, 40, 4)
    labels = (x @ normal(4, 4) + 0.5 * normal(5, 40) > 0).double()

    def loss_fn(params, batch):
        x, y = batch
        return torch.nn.functional.binary_cross_entropy_with_logits(x @ params, y)

    return torch.zeros(4), (x, labels), loss_fn


def mlp():
    x = normal(6, 40, 3)
    params = {"w1": 0.5 * normal(7, 3, 5), "b1": 0.1 * normal(8, 5), "w2": 0.5 * normal(9, 5, 2)}

    def loss_fn(params, batch):
        x, y = batch
        return (torch.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] - y).square().mean()

    return params, (x, torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin()], dim=1)), loss_fn


MODELS = {"regression": regression, "logistic": logistic, "mlp": mlp}
T = 12


def make_run(model, **kwargs):
    """The loss on all data after T steps, as a function of everything that governs them."""
    params, data, loss_fn = MODELS[model]()
    params = _tree.map(lambda leaf: leaf.double(), params)
    index = gd.epoch_batches(gd.random.key(1), n=40, batch_size=10, epochs=3)

    def run(lr, lrs, momentum, init, weights, decay):
        def weighted(params, batch):
            x, y, weight = batch
            return weight.mean() * loss_fn(params, (x, y))

        transform = gd.chain(gd.weight_decay(decay), gd.momentum(momentum))
        step = gd.make_step(weighted, transform)
        state = gd.TrainState(init, transform.init(init))
        final, trajectory = gd.train(step, state, (*data, weights), index, lr * lrs, **kwargs)
        return loss_fn(final.params, data) + 0.1 * trajectory.loss.mean()

    point = {
        "lr": torch.tensor(0.05, dtype=torch.float64),
        "lrs": torch.linspace(2.0, 0.5, T, dtype=torch.float64),
        "momentum": torch.tensor(0.6, dtype=torch.float64),
        "init": params,
        "weights": 1 + 0.3 * normal(10, 40).tanh(),
        "decay": torch.tensor(0.02, dtype=torch.float64),
    }
    return run, point


def differences(f, point, h=1e-3):
    """The derivatives of f(point) for each entry of a tree, by differences of sixth order."""
    leaves, structure = _tree.flatten(point)
    sizes = [leaf.numel() for leaf in leaves]
    flat = torch.cat([leaf.reshape(-1) for leaf in leaves])

    def at(flat):
        parts = zip(flat.split(sizes), leaves, strict=True)
        return f(_tree.unflatten(structure, [part.reshape(leaf.shape) for part, leaf in parts]))

    moves = h * torch.eye(len(flat)).double()
    weights = {1: 45 / 60, 2: -9 / 60, 3: 1 / 60}
    slopes = sum(
        w * (vmap(at)(flat + k * moves) - vmap(at)(flat - k * moves)) / h for k, w in weights.items()
    )
    parts = zip(slopes.split(sizes), leaves, strict=True)
    return _tree.unflatten(structure, [part.reshape(leaf.shape) for part, leaf in parts])


def assert_close(got, expected, tolerance):
    got, expected = _tree.leaves(got), _tree.leaves(expected)
    scale = max(float(leaf.abs().max()) for leaf in expected)
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        assert float((a - b).abs().max()) <= tolerance * scale


@pytest.fixture(scope="module")
def measured():
    """By differences, for every model and argument."""
    found = {}
    for model in MODELS:
        run, point = make_run(model)
        for name in point:
            found[model, name] = differences(lambda v, n=name: run(**{**point, n: v}), point[name])  # noqa: B023
    return found


@pytest.mark.parametrize("name", ["lr", "lrs", "momentum", "init", "weights", "decay"])
@pytest.mark.parametrize("model", MODELS)
def test_every_exact_mode_is_the_derivative(model, name, measured):
    run, point = make_run(model)
    results = {mode: gd.hypergrad(run, name, mode=mode)(**point) for mode in EXACT}
    results["truncated"] = gd.hypergrad(run, name, mode="truncated", last=T)(**point)
    expected = measured[model, name]
    assert max(float(leaf.abs().max()) for leaf in _tree.leaves(expected)) > 1e-6
    for result in results.values():
        assert_close(result.grads, results["reverse"].grads, 1e-12)
        assert_close(result.grads, expected, 1e-9)
        torch.testing.assert_close(result.value, run(**point), rtol=1e-13, atol=0)
        assert (result.aux, result.residual, result.remaining) == ((), (), ())


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("mode", EXACT)
def test_a_compiled_run_has_the_same_derivatives(mode, backend):
    run, point = make_run("regression", backend=backend)
    eager, _ = make_run("regression")
    names = ["lr", "lrs", "weights"]
    compiled = gd.hypergrad(run, names, mode=mode)(**point)
    expected = gd.hypergrad(eager, names, mode=mode)(**point)
    assert_close(compiled.grads, expected.grads, 1e-9)


@settings(max_examples=30, deadline=None)
@given(
    steps=st.integers(1, 30),
    lr=st.floats(0.01, 1.2),
    seed=st.integers(0, 2**31),
    mode=st.sampled_from(EXACT),
)
def test_on_a_quadratic_it_is_the_derivative_of_a_matrix_power(steps, lr, seed, mode):
    """θ_T = (I − lr·H)^T θ₀, so d(c·θ_T)/d lr = −T c·H (I − lr·H)^{T−1} θ₀."""
    root, start, c = normal(seed, 4, 4) / 2, normal(seed + 1, 4), normal(seed + 2, 4)
    hessian = root @ root.T
    step = gd.make_step(lambda x, batch: 0.5 * x @ hessian @ x)

    def run(lr):
        final, _ = gd.train(step, start, None, gd.full_batch(1, steps), lr)
        return c @ final

    power = torch.linalg.matrix_power(torch.eye(4).double() - lr * hessian, steps - 1)
    expected = -steps * c @ hessian @ power @ start
    scale = steps * (hessian.norm() * start.norm() * c.norm()) * max(1.0, float(power.norm()))
    got = gd.hypergrad(run, mode=mode)(lr).grads
    assert float((got - expected).abs()) <= 1e-13 * steps * float(scale)


# Truncated.


@pytest.mark.parametrize(
    ("last", "every", "backend"),
    [
        *((last, every, "eager") for last in (1, 4, 8) for every in (1, 4)),
        *((last, every, "native") for last, every in ((4, 1), (8, 4))),
        *(pytest.param(*case, "inductor", marks=pytest.mark.slow) for case in ((4, 1), (8, 4))),
    ],
)
def test_truncated_is_the_derivative_of_the_last_steps_alone(last, backend, every):
    params, data, loss_fn = MODELS["regression"]()
    params = _tree.map(lambda leaf: leaf.double(), params)
    step, index = gd.make_step(loss_fn), gd.epoch_batches(gd.random.key(1), n=40, batch_size=10, epochs=3)

    def run(lr, init, plan=index, backend=backend):
        final, trajectory = gd.train(step, init, data, plan, lr, every=every, backend=backend)
        return loss_fn(final, data) + trajectory.loss.sum(), trajectory.loss

    got = gd.hypergrad(run, ("lr", "init"), mode="truncated", last=last, has_aux=True)(0.05, params)
    sees = last if every == 1 else max(4, last)
    middle, head = gd.train(step, params, data, index[: T - sees], 0.05, every=every)
    tail = partial(run, init=middle, plan=index[T - sees :], backend="eager")
    expected = gd.hypergrad(tail, has_aux=True)(0.05)
    assert_close(got.grads["lr"], expected.grads, 1e-11)
    assert not any(leaf.any() for leaf in _tree.leaves(got.grads["init"]))
    assert_close(got.value, expected.value + head.loss.sum(), 1e-12)
    assert_close(got.aux, torch.cat([head.loss, expected.aux]), 1e-12)


# Implicit.


def ridge_run(steps=400, transform=None, batches=None):
    """The fit of a ridge regression to other data, as a function of its penalties and of the start."""
    data, other = linear_data(20, 30, 3), linear_data(30, 30, 3)

    def run(penalty, init, aim):
        def loss_fn(params, batch):
            return linear_loss(params, batch) + penalty @ params["w"] ** 2

        index = gd.full_batch(30, steps) if batches is None else batches
        if transform is None:
            final, trajectory = gd.train(gd.make_step(loss_fn), init, data, index, 0.1, record="loss")
        else:
            step = gd.make_step(loss_fn, transform)
            state, trajectory = gd.train(step, step.init(init), data, index, 0.05)
            final = state.params
        return linear_loss(final, other) + aim * penalty.sum() ** 2 + 0 * trajectory.loss[-1]

    init = {"w": torch.zeros(3).double(), "b": torch.zeros(()).double()}
    return run, (torch.tensor([0.1, 0.2, 0.3]).double(), init, torch.tensor(0.5).double())


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


@pytest.mark.parametrize(
    ("transform", "options"),
    [
        (None, {}),
        (None, {"solver": "neumann", "iterations": 400}),
        (gd.momentum(0.5), {"solver": "neumann", "iterations": 400}),
    ],
    ids=["cg", "neumann", "momentum"],
)
def test_implicit_is_the_derivative_of_the_minimum(transform, options):
    run, (penalty, init, aim) = ridge_run(transform=transform)
    result = gd.hypergrad(run, (0, 1, 2), mode="implicit", **options)(penalty, init, aim)
    assert_close(result.grads[0], ridge_gradient(penalty, aim), 1e-9)
    assert_close(result.grads[0], gd.hypergrad(run)(penalty, init, aim).grads, 1e-9)
    assert not any(leaf.any() for leaf in _tree.leaves(result.grads[1]))
    assert_close(result.grads[2], penalty.sum() ** 2, 1e-12)
    torch.testing.assert_close(result.value, run(penalty, init, aim), rtol=1e-14, atol=0)
    assert result.residual < 1e-9
    assert abs(result.remaining) < 1e-12


def test_the_error_of_implicit_is_within_its_residual():
    run, point = ridge_run()
    exact = ridge_gradient(point[0], point[2])
    errors, residuals = [], []
    for iterations in (3, 6, 12, 24, 48):
        result = gd.hypergrad(run, mode="implicit", solver="neumann", iterations=iterations)
        with pytest.warns(UserWarning, match=r"residual of .* after") if iterations < 24 else nullcontext():
            got = result(*point)
        errors.append(float((got.grads - exact).norm() / exact.norm()))
        residuals.append(float(got.residual))
    assert residuals == sorted(residuals, reverse=True)
    assert all(error < 20 * residual for error, residual in zip(errors, residuals, strict=True))
    assert errors[0] > 1e-3


@pytest.mark.parametrize("solver", ["cg", "neumann"])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_system_that_is_solved_early_stays_solved(solver, weight):
    """Of one unknown, by conjugate gradients at once; or of none, where the number ignores the run."""

    def run(penalty):
        step = gd.make_step(lambda x, batch: (x - 1) ** 2 + penalty * x**2)
        final, _ = gd.train(step, torch.tensor(0.0).double(), None, gd.full_batch(1, 100), 0.25)
        return weight * final + penalty**2

    result = gd.hypergrad(run, mode="implicit", solver=solver)(0.5)
    torch.testing.assert_close(float(result.grads), 1 - weight / 2.25, rtol=1e-12, atol=0)
    assert result.residual < 1e-12


def test_a_wrong_solver_warns_and_names_the_other():
    run, point = ridge_run(transform=gd.momentum(0.9))
    with pytest.warns(UserWarning, match=r"residual of .*solver='neumann'"):
        gd.hypergrad(run, mode="implicit", iterations=50)(*point)


def test_an_unfinished_run_shows_by_what_remains():
    whole, point = ridge_run()
    run, _ = ridge_run(steps=1)
    with pytest.warns(UserWarning, match="has not converged: its number, .*, would still change by about"):
        result = gd.hypergrad(run, mode="implicit")(*point)
    assert result.residual < 1e-9
    run, _ = ridge_run(steps=60)
    result = gd.hypergrad(run, mode="implicit")(*point)
    torch.testing.assert_close(result.remaining, whole(*point) - result.value, rtol=0.01, atol=0)
    assert abs(result.remaining) > 1e-6


def test_a_trajectory_alone_is_refused_in_implicit_mode():
    step = gd.make_step(lambda x, batch: (x - 1) ** 2)

    def run(lr):
        return gd.train(step, torch.tensor(0.0), None, gd.full_batch(1, 9), lr)[1].loss[-1]

    with pytest.raises(ValueError, match="a trajectory is a constant: use the final parameters"):
        gd.hypergrad(run, mode="implicit")(0.25)


def test_implicit_wants_one_run():
    run, point = ridge_run(steps=3)
    with pytest.raises(ValueError, match="called it never"):
        gd.hypergrad(lambda x: x**2, mode="implicit")(1.0)
    with pytest.raises(ValueError, match="called it again"):
        gd.hypergrad(lambda *point: run(*point) + run(*point), mode="implicit")(*point)
    with pytest.raises(ValueError, match="at least one step"):
        gd.hypergrad(ridge_run(steps=0)[0], mode="implicit")(*point)
    assert _through.asked() == _through.Through()


# Adam where its second moment is zero.


@pytest.mark.parametrize("mode", [*EXACT, "truncated"])
@pytest.mark.parametrize("make", [gd.adam, gd.adamw, gd.rmsprop, gd.adagrad, gd.nadam, gd.adabelief])
def test_a_zero_second_moment_has_finite_derivatives(make, mode):
    """Of two coordinates, one never has a gradient."""
    transform, start = make(), torch.tensor([1.0, 1.0]).double()
    step = gd.make_step(lambda x, batch: x[0] ** 2 + 0 * x[1], transform)

    def run(lr):
        final, _ = gd.train(step, step.init(start), None, gd.full_batch(1, 4), lr)
        return final.params.square().sum()

    options = {"last": 2} if mode == "truncated" else {}
    result = gd.hypergrad(run, mode=mode, **options)(0.07)
    assert result.grads.isfinite()
    if mode != "truncated":
        assert_close(result.grads, differences(run, torch.tensor(0.07).double(), h=1e-4), 1e-7)


# Composition.


@pytest.mark.parametrize("mode", EXACT)
def test_second_derivatives(mode):
    run, point = make_run("logistic")
    rest = {name: value for name, value in point.items() if name != "lr"}

    def slope(lr):
        return gd.hypergrad(run, "lr", mode=mode)(lr=lr, **rest).grads

    got = grad(slope)(point["lr"])
    assert_close(got, differences(slope, point["lr"]), 1e-8)


@pytest.mark.parametrize("mode", [*EXACT, "truncated", "implicit"])
def test_a_sweep_of_hypergradients_is_a_loop(mode):
    run, (penalty, init, aim) = ridge_run(steps=60)
    options = {"last": 7} if mode == "truncated" else {}
    gradient = gd.hypergrad(run, "aim" if mode == "forward" else "penalty", mode=mode, **options)
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


# Traced.


@pytest.mark.parametrize(
    ("mode", "backend"), [*[(mode, "native") for mode in (*EXACT, "truncated")], ("reverse", "auto")]
)
def test_a_traced_run_has_the_same_derivatives(mode, backend):
    run, point = make_run("mlp", every=2, backend="native")
    options = {"last": 5} if mode == "truncated" else {}
    expected, got = (
        gd.hypergrad(with_aux(run), ["lr", "momentum"], mode=mode, has_aux=True, backend=name, **options)(
            **point
        )
        for name in ("eager", backend)
    )
    assert_close(got, expected, 1e-9)


def with_aux(run):
    def run_with_aux(**point):
        value = run(**point)
        return value, {"twice": 2 * value}

    return run_with_aux


def test_a_traced_run_is_called_again_after_a_change_of_python_and_sees_tensors_change(monkeypatch):
    records, record = [], _trace._record
    monkeypatch.setattr(_trace, "_record", lambda *args: records.append(None) or record(*args))
    scale, target, index = [1.0], torch.tensor(2.0), gd.full_batch(1, 40)

    def run(lr):
        step = gd.make_step(lambda w, _: scale[0] * (w - target) ** 2)
        return gd.train(step, torch.tensor(0.0), None, index, lr)[0] ** 2

    def repeat(*, is_new):
        del records[:]
        expected, got = (gd.hypergrad(run, backend=name)(0.01).grads for name in ("eager", "native"))
        assert_close(got, expected, 1e-4)
        assert bool(records) == is_new

    repeat(is_new=True)
    repeat(is_new=False)
    target.mul_(3)
    repeat(is_new=False)
    scale[0] = 2.0
    repeat(is_new=True)


def test_traced_hypergradients_are_swept_and_differentiated():
    run, point = make_run("regression")
    lrs = torch.tensor([0.01, 0.05], dtype=torch.float64)

    def slope(lr, backend):
        return gd.hypergrad(run, "lr", backend=backend)(**(point | {"lr": lr})).grads

    for transform in (vmap, grad, lambda f: vmap(grad(f))):
        at = lrs if transform is not grad else lrs[0]
        expected, got = (transform(partial(slope, backend=name))(at) for name in ("eager", "native"))
        assert_close(got, expected, 1e-8)


def test_a_run_inside_a_compiled_loop_goes_back_as_far_as_is_asked():
    """What a trace found of it without being asked is not what it does when asked."""
    run, point = make_run("regression")
    rest = {name: value for name, value in point.items() if name != "lr"}

    def once(lr):
        return gd.scan(lambda c, x: (c, run(lr=lr, **rest)), None, length=1, backend="native")[1][0]

    for mode, options in (("reverse", {}), ("truncated", {"last": 3}), ("checkpoint", {}), ("reverse", {})):
        got, expected = (
            gd.hypergrad(f, mode=mode, **options)(point["lr"])
            for f in (once, lambda lr: run(lr=lr, **rest))
        )
        assert_close(got, expected, 1e-9)


def test_implicit_is_not_traced():
    with pytest.raises(ValueError, match="mode='implicit' iterates in Python, with backend='eager'"):
        gd.hypergrad(lambda lr: lr, mode="implicit", backend="native")


# Memory.


def peak(mode, steps, **options):
    start, target = torch.zeros(1000).double(), normal(0, 1000)
    step = gd.make_step(lambda x, batch: (0.5 * (x - target) ** 2 + 0.1 * (x - target).cos()).sum())

    def run(lr):
        final, _ = gd.train(step, start, None, gd.full_batch(1, steps), lr, record=())
        return (final**2).sum()

    gc.collect()
    with Memory() as live:
        gd.hypergrad(run, mode=mode, **options)(0.1)
    return live.peak


@pytest.mark.parametrize(
    ("mode", "options", "low", "high"),
    [
        ("reverse", {}, 3.5, 4.5),
        ("checkpoint", {}, 1.0, 2.4),
        ("forward", {}, 0.8, 1.2),
        ("truncated", {"last": 5}, 0.8, 1.2),
    ],
)
def test_memory_grows_as_promised(mode, options, low, high, monkeypatch):
    monkeypatch.setattr("gdfunc._train._drive._SEGMENT_SECONDS", 0.0)  # what truncated holds is one segment
    short, long = peak(mode, 64, **options), peak(mode, 256, **options)
    assert low < long / short < high


# What is given and what comes back.


def test_arguments_by_position_and_by_name():
    def run(a, b, *, c):
        return a**2 * b["x"].sum() + c**3

    b, c = {"x": torch.tensor([2.0, 3.0])}, torch.tensor(2.0)
    assert gd.hypergrad(run)(2.0, b, c=c).grads == 20
    assert gd.hypergrad(run)(a=2.0, b=b, c=c).grads == 20
    assert gd.hypergrad(run, "a")(2.0, b, c=c).grads == 20
    assert gd.hypergrad(run, "c")(2.0, b, c=c).grads == 12
    assert gd.hypergrad(run, 2)(2.0, b, c=c).grads == 12
    a_and_b = gd.hypergrad(run, (0, 1))(2.0, b, c=c).grads
    assert isinstance(a_and_b, tuple)
    assert a_and_b[0] == 20
    assert a_and_b[1]["x"].tolist() == [4, 4]
    by_name = gd.hypergrad(run, ["c", "b"])(2.0, b=b, c=c).grads
    assert list(by_name) == ["c", "b"]
    assert by_name["c"] == 12
    assert gd.hypergrad(run, ("a",))(2.0, b, c=c).grads.keys() == {"a"}
    assert gd.hypergrad(lambda **point: point["lr"] ** 2, "lr")(lr=3.0).grads == 6


@pytest.mark.parametrize("mode", EXACT)
def test_aux_comes_along(mode):
    def run(a):
        return (a**2).sum(), {"twice": 2 * a, "count": torch.tensor(3)}

    result = gd.hypergrad(run, mode=mode, has_aux=True)(torch.tensor([1.0, 2.0]))
    assert result.grads.tolist() == [2, 4]
    assert result.aux["twice"].tolist() == [2, 4]
    assert result.aux["count"] == 3


def test_chunks_of_entries_agree():
    run, point = make_run("mlp")
    whole = gd.hypergrad(run, "lrs", mode="forward")(**point).grads
    for chunk_size in (1, 5, 12, 100):
        got = gd.hypergrad(run, "lrs", mode="forward", chunk_size=chunk_size)(**point).grads
        assert_close(got, whole, 1e-12)


def test_float32_parameters_keep_their_dtype():
    data = tuple(leaf.float() for leaf in linear_data(0, 20, 3))
    init = {"w": torch.zeros(3), "b": torch.zeros(())}
    step = gd.make_step(linear_loss)

    def run(lr, init):
        return linear_loss(gd.train(step, init, data, gd.full_batch(20, 5), lr)[0], data)

    for mode in EXACT:
        result = gd.hypergrad(run, (0, 1), mode=mode)(0.1, init)
        assert result.grads[0].dtype == torch.float64
        assert {leaf.dtype for leaf in _tree.leaves(result.grads[1])} == {torch.float32}


@pytest.mark.parametrize("mode", [*EXACT, "truncated", "implicit"])
def test_nothing_is_written_into_or_shared(mode):
    run, point = ridge_run(steps=20)
    given = _tree.leaves(point)
    before = fingerprint(given)
    options = {"last": 3} if mode == "truncated" else {}
    result = gd.hypergrad(run, (0, 1, 2), mode=mode, **options)(*point)
    assert fingerprint(given) == before
    found = [leaf for leaf in _tree.leaves(result) if isinstance(leaf, torch.Tensor)]
    assert not set(storages(found)) & set(storages(given))
    assert len(set(storages(found))) == len(found)


def test_bad_requests_are_refused():
    def run(a, b=1.0):
        return a**2 * b

    for argnums in ("c", 3, -1):
        with pytest.raises(
            ValueError, match=r"argnums names .* which the call did not pass; it passed 1 by position"
        ):
            gd.hypergrad(run, argnums)(1.0)
    for argnums in ((), (None,), 1.5):
        with pytest.raises(ValueError, match="argnums must be"):
            gd.hypergrad(run, argnums)
    for last in (0, -1, True, 2.0):
        with pytest.raises(ValueError, match="last must be an int >= 1"):
            gd.hypergrad(run, mode="truncated", last=last)
    with pytest.raises(ValueError, match="mode='truncated' needs last="):
        gd.hypergrad(run, mode="truncated")
    for option, mode in (("last", "truncated"), ("solver", "implicit"), ("iterations", "implicit")):
        with pytest.raises(ValueError, match=f"{option}= is for mode='{mode}'; got 3 in mode='forward'"):
            gd.hypergrad(run, mode="forward", **{option: 3})
    with pytest.raises(ValueError, match="chunk_size= is for mode='forward'; got 3 in mode='reverse'"):
        gd.hypergrad(run, chunk_size=3)
    with pytest.raises(ValueError, match="mode must be"):
        gd.hypergrad(run, mode="backward")
    with pytest.raises(ValueError, match="solver must be"):
        gd.hypergrad(run, mode="implicit", solver="gmres")
    with pytest.raises(ValueError, match="iterations must be"):
        gd.hypergrad(run, mode="implicit", iterations=0)
    with pytest.raises(ValueError, match="chunk_size must be"):
        gd.hypergrad(run, mode="forward", chunk_size=0)


def test_bad_points_and_values_are_refused():
    with pytest.raises(TypeError, match=r"argument 0\['n'\] is torch.int64; give what is"):
        gd.hypergrad(lambda a: a["n"].sum())({"n": torch.tensor(3)})
    with pytest.raises(TypeError, match="argument lr is str"):
        gd.hypergrad(lambda lr: 0.0, "lr")(lr="fast")
    with pytest.raises(ValueError, match="argument 0 has no tensor leaves"):
        gd.hypergrad(lambda a: 0.0)(())
    with pytest.raises(TypeError, match=r"0-d float tensor; got float; \.item\(\)"):
        gd.hypergrad(lambda a: 1.0)(1.0)
    with pytest.raises(TypeError, match="got tuple; a pair needs has_aux=True"):
        gd.hypergrad(lambda a: (a, a))(1.0)
    with pytest.raises(TypeError, match=r"\(number, aux\) with has_aux=True; got Tensor"):
        gd.hypergrad(lambda a: a, has_aux=True)(1.0)
    with pytest.raises(ValueError, match=r"got torch.float64 \(1,\)"):
        gd.hypergrad(lambda a: a[None])(1.0)
    with pytest.raises(ValueError, match=r"got torch\.int64"):
        gd.hypergrad(lambda a: a.long())(1.0)
    for mode in ("reverse", "checkpoint"):
        with pytest.raises(ValueError, match="does not depend on the chosen arguments"):
            gd.hypergrad(lambda a: a.detach() * 2, mode=mode)(1.0)


def test_an_error_leaves_nothing_behind():
    def run(lr):
        assert _through.asked() != _through.Through()
        raise RuntimeError("mine")

    for mode, options in (("checkpoint", {}), ("truncated", {"last": 2}), ("implicit", {})):
        with pytest.raises(RuntimeError, match="mine"):
            gd.hypergrad(run, mode=mode, **options)(1.0)
        assert _through.asked() == _through.Through()


def test_a_checkpoint_of_the_users_own_stands(monkeypatch):
    seen = []
    fold = gd._train._drive.fold
    monkeypatch.setattr(
        "gdfunc._train._drive.fold",
        lambda *args, **kwargs: seen.append(kwargs.get("checkpoint")) or fold(*args, **kwargs),
    )
    for checkpoint, expected in ((None, 4), (3, 3)):
        run, point = make_run("regression", checkpoint=checkpoint)
        gd.hypergrad(run, "lr", mode="checkpoint")(**point)
        assert set(seen) == {expected}
        seen.clear()
    assert math.isqrt(T - 1) + 1 == 4


def test_another_number_traces_nothing(monkeypatch):
    """It is an input, whether it is given as a float or as a tensor, by position or by name."""
    traced, record = [], _trace._record
    monkeypatch.setattr(_trace, "_record", lambda *args: traced.append(None) or record(*args))

    def run(lr, momentum=0.5):
        return (torch.full((2,), 3.0, dtype=torch.float64) * lr - momentum).square().sum()

    by_place = gd.hypergrad(run, backend="native")
    by_name = gd.hypergrad(run, ["momentum"], backend="native")
    for lr in (0.1, 0.2, 0.3):
        assert torch.allclose(by_place(lr).grads, torch.tensor(12 * (3 * lr - 0.5), dtype=torch.float64))
        slope = by_name(0.1, momentum=lr).grads["momentum"]
        assert torch.allclose(slope, torch.tensor(-4 * (0.3 - lr), dtype=torch.float64))
    assert len(traced) == 2


def test_a_run_that_takes_its_argument_apart_leaves_the_callers_whole():
    options = {"lr": torch.tensor(0.1, dtype=torch.float64), "goal": torch.tensor(2.0, dtype=torch.float64)}

    def run(options):
        step = gd.make_step(lambda w, batch: (w - options["goal"]).square())
        w, plan = torch.zeros((), dtype=torch.float64), torch.zeros(60, 0, dtype=torch.int64)
        return gd.train(step, w, None, plan, options.pop("lr"))[0] * 3

    found = gd.hypergrad(run)(options)
    assert torch.allclose(found.grads["goal"], torch.tensor(3.0, dtype=torch.float64), atol=1e-3)
    assert set(options) == {"lr", "goal"}
