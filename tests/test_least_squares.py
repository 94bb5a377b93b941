"""Gauss-Newton and Levenberg-Marquardt: their formulas, and the digits that NIST has certified."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, jacfwd, vmap

import gdfunc as gd
from gdfunc import _tree
from gdfunc.methods._least_squares import least_squares

from .assertions import assert_refused
from .references import few, normal

LM = gd.methods.levenberg_marquardt
EPS = torch.finfo(torch.float64).eps


def walk(step, params, batch, steps, lr=1.0):
    states = [step.init(params)]
    for _ in range(steps):
        states.append(step(states[-1], batch, lr)[0])
    return states


def line(params, batch):
    """The residuals of a straight line, as a tree."""
    x, y = batch
    return {"all": params["a"] * x + params["b"] - y}


X = torch.tensor([0.0, 1.0, 2.0, 4.0], dtype=torch.float64)
ZEROS = {"a": torch.zeros((), dtype=torch.float64), "b": torch.zeros((), dtype=torch.float64)}
each_solver = pytest.mark.parametrize("solver", ["qr", "cg"])


def curve(params, batch):
    x, y = batch
    return params[0] * torch.exp(-params[1] * x) - y


CURVE = torch.tensor([1.5, 0.3], dtype=torch.float64), (X, 3 * torch.exp(-0.7 * X) + 0.1 * X.cos())


# ---------------------------------------------------------------- the linear solver


@given(st.integers(0, 2**16), st.integers(1, 5), st.integers(0, 10))
@few
def test_least_squares_is_as_accurate_as_householders(seed, size, exponent):
    """The forward error is that of the condition number, not of its square."""
    left = torch.linalg.qr(normal(seed, 9, size))[0]
    right = torch.linalg.qr(normal(seed + 1, size, size))[0]
    matrix = left * torch.logspace(0, -exponent, size, dtype=torch.float64) @ right.T
    solution = normal(seed + 2, size)
    found = least_squares(matrix, matrix @ solution)
    condition = float(torch.linalg.cond(matrix))
    assert (found - solution).norm() <= 200 * EPS * condition * solution.norm()


def test_dependent_columns_share_the_solution_of_least_norm():
    matrix = normal(0, 6, 3)
    matrix[:, 2] = matrix[:, 0] - 2 * matrix[:, 1]
    target = normal(1, 6)
    expected = torch.linalg.pinv(matrix, rtol=1e-12) @ target
    torch.testing.assert_close(least_squares(matrix, target), expected, rtol=1e-10, atol=0)
    slightly = least_squares(matrix, target, torch.tensor(1e-28, dtype=torch.float64))
    torch.testing.assert_close(slightly, expected, rtol=1e-10, atol=0)
    assert least_squares(torch.zeros(4, 2), torch.ones(4)).tolist() == [0.0, 0.0]


# ---------------------------------------------------------------- formulas


@each_solver
def test_gauss_newton_solves_a_linear_problem_in_one_step(solver):
    step = gd.methods.gauss_newton(line, solver=solver, iterations=2)
    y = torch.tensor([1.0, 2.0, 6.0, 8.0], dtype=torch.float64)
    params, loss = step(ZEROS, (X, y), 1.0)
    a, b = torch.linalg.lstsq(torch.stack([X, torch.ones_like(X)], 1), y[:, None]).solution[:, 0]
    torch.testing.assert_close(params, {"a": a, "b": b}, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(loss, y.square().mean())
    half, _ = step(ZEROS, (X, y), 0.5)
    torch.testing.assert_close(half, {"a": a / 2, "b": b / 2}, rtol=1e-12, atol=1e-12)


@each_solver
def test_gauss_newton_is_newtons_method_with_the_gauss_newton_matrix(solver):
    """u = G⁻¹·∇L with the matrix of `curvature.ggn_vp`."""
    params, batch = CURVE
    x, y = batch
    product = gd.curvature.ggn_vp(lambda p, x: curve(p, (x, 0 * x)), gd.losses.mse)
    matrix = torch.stack([product(params, (x, y), row) for row in torch.eye(2, dtype=torch.float64)])
    slope = grad(lambda p: curve(p, batch).square().mean())(params)
    step = gd.methods.gauss_newton(curve, solver=solver, iterations=4)
    moved, _ = step(params, batch, 1.0)
    torch.testing.assert_close(params - moved, torch.linalg.solve(matrix, slope), rtol=1e-10, atol=0)


def test_cg_approaches_the_solution_of_least_norm():
    matrix, target = normal(0, 3, 6), normal(1, 3)
    step = gd.methods.gauss_newton(lambda p, y: matrix @ p - y, solver="cg", iterations=3)
    params, _ = step(torch.zeros(6, dtype=torch.float64), target, 1.0)
    torch.testing.assert_close(params, torch.linalg.pinv(matrix) @ target, rtol=1e-10, atol=1e-12)


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("iterations", [20, 200])
def test_cg_stays_at_the_solution_when_it_goes_on(iterations, dtype):
    """The slopes are rounding there, and steps along them leave the solution if they are too long."""
    start, batch = _tree.map(lambda leaf: leaf.to(dtype), CURVE)
    rows = [
        walk(gd.methods.gauss_newton(curve, solver="cg", iterations=count), start, batch, 4)
        for count in (2, iterations)
    ]
    torch.testing.assert_close(rows[1], rows[0], rtol=1e-5, atol=0)


@pytest.mark.long
@pytest.mark.parametrize("make", [gd.methods.gauss_newton, LM])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each_solver
def test_the_unit_of_the_residuals_does_not_matter(make, dtype, solver):
    """Also where their squares overflow or vanish in a product of both factors of the normal equations."""
    x, y = (leaf.to(dtype) for leaf in CURVE[1])
    exponent = {torch.float32: 45, torch.float64: 400}[dtype]

    def ends(unit):
        step = make(lambda p, batch: unit * curve(p, batch), solver=solver)
        start = CURVE[0].to(dtype)
        return gd.train(step, step.init(start), (x, y), gd.full_batch(4, 3), 1.0, record="params")[1].params

    for unit in (2.0**exponent, 2.0**-exponent):
        torch.testing.assert_close(ends(unit), ends(1.0))
    assert (ends(1.0)[-1] - CURVE[0].to(dtype)).norm() > 0.1


@pytest.mark.parametrize("damping", [1e-3, 1.0, 100.0])
@each_solver
def test_a_damped_step_is_the_formula_in_dense_matrices(solver, damping):
    params, batch = CURVE
    jacobian, r = jacfwd(lambda p: curve(p, batch))(params), curve(params, batch)
    scale = jacobian.norm(dim=0)
    if solver == "cg":
        g = jacobian.T @ r
        scale = (jacobian @ g).norm() / g.norm() * torch.ones(2, dtype=torch.float64)
    normal_matrix = jacobian.T @ jacobian + damping * torch.diag(scale**2)
    u = torch.linalg.solve(normal_matrix, jacobian.T @ r)
    step = LM(curve, damping=damping, solver=solver, iterations=4)
    state, loss = step(step.init(params), batch, 1.0)
    torch.testing.assert_close(params - state.params, u, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(loss, r.square().mean())
    new = curve(params - u, batch)
    gain = (r @ r - new @ new) / (r @ r - (r - jacobian @ u).square().sum())
    torch.testing.assert_close(state.gain, gain, rtol=1e-7, atol=0)
    assert gain > 0
    shrunk = damping * (1 - (2 * gain - 1) ** 3).clamp(min=1 / 3)
    torch.testing.assert_close(state.damping, shrunk, rtol=1e-7, atol=0)
    assert state.growth == 2


def test_a_step_uphill_is_rejected_and_the_damping_grows_ever_faster():
    """From 2 Newton's step for atan leads ever farther away."""
    step = LM(lambda p, batch: torch.atan(p), damping=1e-12)
    states = walk(step, torch.tensor([2.0], dtype=torch.float64), None, 60)
    rejected = [s for s in states[1:] if s.gain <= 0]
    assert len(rejected) > 3
    assert [float(s.params) for s in rejected[:4]] == [2.0] * 4
    dampings = [float(s.damping) / 1e-12 for s in states[:5]]
    assert dampings == pytest.approx([1, 2, 8, 64, 1024])
    assert states[-1].params.abs() < 1e-12
    assert step.trouble(rejected[0]) is None  # the damping has far to go


def test_the_damping_stays_within_what_its_dtype_resolves():
    limits = torch.finfo(torch.float32).eps
    start = torch.tensor([1.0])
    assert walk(LM(lambda p, batch: p - 3), start, None, 60)[-1].damping == limits**2
    assert walk(LM(lambda p, batch: (p - 2).sqrt()), start, None, 60)[-1].damping == limits**-2


def test_the_scale_is_the_largest_column_so_far_and_units_do_not_matter():
    params, batch = CURVE
    units = torch.tensor([1e3, 1e-6], dtype=torch.float64)
    plain = walk(LM(curve), params, batch, 12)
    scaled = walk(LM(lambda p, b: curve(p * units, b)), params / units, batch, 12)
    for a, b in zip(plain, scaled, strict=True):
        torch.testing.assert_close(a.params, b.params * units, rtol=1e-9, atol=0)
    scales = torch.stack([s.scale for s in plain])
    assert (scales.diff(dim=0) >= 0).all()
    columns = jacfwd(lambda p: curve(p, batch))(params).norm(dim=0)
    torch.testing.assert_close(scales[1], columns, rtol=1e-12, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_residuals_that_are_not_finite_are_too_far(bad):
    def residuals(p, batch):
        return torch.where(p.abs() < 10, p**3 - 8, bad)

    states = walk(LM(residuals, damping=1e-9), torch.tensor([0.5], dtype=torch.float64), None, 40)
    assert any(s.gain == -1 for s in states)
    assert all(leaf.isfinite().all() for s in states for leaf in s)
    assert float(states[-1].params) == pytest.approx(2)


@pytest.mark.long
def test_a_run_that_cannot_move_is_stuck_and_train_says_so_once():
    start = torch.tensor([1.0], dtype=torch.float64)
    index = gd.full_batch(1, 40)
    step = LM(lambda p, batch: (p - 2).sqrt())
    with pytest.warns(gd.StuckWarning, match="levenberg_marquardt is stuck") as told:
        state, _ = gd.train(step, step.init(start), None, index, 1.0)
    assert len(told) == 1
    assert state.params == 1
    step = LM(lambda p, batch: p - 3)  # converged, not stuck
    state, _ = gd.train(step, step.init(start), None, index, 1.0)
    assert state.params == 3


@pytest.mark.parametrize(("solver", "expected"), [("qr", 0.5), ("cg", math.nan)])
def test_a_derivative_from_a_solution_is_right_or_nan(solver, expected):
    """Half a step of Newton's from y, which is the solution for y = 1: (1 − ½)·y₀ + ½·y by y₀."""
    step = gd.methods.gauss_newton(lambda p, y: p - y, solver=solver, iterations=1)
    target = torch.ones(1, dtype=torch.float64)

    def end(start):
        return step(start, target, 0.5)[0].sum()

    torch.testing.assert_close(end(target), target[0])
    slope = grad(end)(target)
    torch.testing.assert_close(slope, torch.full_like(slope, expected), equal_nan=True)
    if solver == "cg":
        torch.testing.assert_close(grad(end)(2 * target), torch.full_like(slope, 0.5))


def test_a_network_is_fitted_without_a_matrix():
    x = torch.linspace(-2, 2, 30, dtype=torch.float64)[:, None]
    params = {"a": normal(0, 1, 8), "b": normal(1, 8), "c": normal(2, 8)}

    def residuals(p, batch):
        x, y = batch
        return torch.tanh(x * p["a"] + p["b"]) @ p["c"] - y

    batch = x, torch.sin(2 * x[:, 0])
    states = walk(LM(residuals, solver="cg", iterations=6), params, batch, 8)
    losses = [residuals(s.params, batch).square().mean() for s in (states[0], states[-1])]
    assert losses[1] < 0.02 * losses[0]


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: LM(curve, damping=0.0), ValueError, "^damping must be"),
        (lambda: LM(curve, solver="lu"), ValueError, "^solver must be 'qr' or 'cg'; got 'lu'"),
        (lambda: LM(curve, solver="cg", iterations=0), ValueError, "^iterations must be an int >= 1"),
        (lambda: gd.methods.gauss_newton(lambda p: p), TypeError, r"^residual_fn takes \(p\)"),
        (lambda: gd.methods.gauss_newton(curve, lr=1.0), TypeError, "gauss_newton takes no lr"),
    ],
)
def test_bad_arguments_are_named(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_what_residual_fn_returns_is_checked():
    for made, message in [
        ({"r": torch.arange(3)}, r"residuals\['r'\] is int64"),
        (None, "it returned none"),
        (torch.ones(0), "it returned no numbers"),
        ([1.0], r"residuals\[0\] is float"),
    ]:
        step = gd.methods.gauss_newton(lambda p, batch, made=made: made)
        with pytest.raises(TypeError, match=f"residual_fn must return float tensors; {message}"):
            step(torch.ones(2), None, 1.0)
    step = LM(lambda p, batch: p.mul_(2))
    assert_refused(lambda: step(step.init(torch.ones(2)), None, 1.0), r"wrote into params")
    assert_refused(lambda: LM(line)(LM(line).init(ZEROS), None, -1.0), "^lr must be")


# ---------------------------------------------------------------- NIST

# How many steps Levenberg-Marquardt is given from both starts; the others need at most 25.
STEPS = {"Hahn1": 25, "Kirby2": 20, "Roszman1": 25, "Rat43": 30, "Gauss1": 15, "Gauss2": 15, "Gauss3": 15}
STEPS |= {"Lanczos1": 110, "Lanczos2": 110, "Lanczos3": 110, "Nelson": 90, "MGH09": 120}
STEPS |= {"ENSO": 60, "Thurber": 50, "MGH17": 600, "MGH10": 160, "Eckerle4": 60, "Bennett5": 320}
# From a start that NIST made hard, it ends elsewhere: at a minimum at infinity, with digits 0.
ELSEWHERE = {("BoxBOD", 0), ("MGH10", 0)}


def solved(fit, step, steps):
    def run(start):
        state = step.init(start)
        for _ in range(steps):
            state, _, _ = step.advance(state, fit.data, 1.0)
        return state

    return vmap(run)(fit.starts)


QUICK = ("Misra1a", "DanWood", "BoxBOD", "Rat42", "Kirby2")
EVERY = [pytest.param(n, marks=[pytest.mark.long] * (n not in QUICK)) for n in gd.problems.nist_names()]


@pytest.mark.parametrize("name", EVERY)
def test_levenberg_marquardt_reaches_the_certified_digits_from_both_starts(name):
    fit = gd.problems.nist(name)
    state = solved(fit, LM(fit.residual_fn), STEPS.get(name, 25))
    digits = fit.digits(state.params)
    for i in range(2):
        if (name, i) in ELSEWHERE:
            assert fit.level == "higher"
            assert i == 0
            assert digits[i] < 1
        else:
            assert digits[i] > 7, (name, i, digits)


@pytest.mark.parametrize("name", ["Gauss1", "Chwirut2", "Rat42"])
def test_gauss_newton_reaches_the_certified_digits_from_the_near_start(name):
    fit = gd.problems.nist(name)
    step, params = gd.methods.gauss_newton(fit.residual_fn), fit.starts[1]
    for _ in range(15):
        params, _ = step(params, fit.data, 1.0)
    assert fit.digits(params) > 9


@pytest.mark.parametrize("name", ["DanWood", pytest.param("Misra1a", marks=pytest.mark.long)])
def test_cg_reaches_the_certified_digits_too(name):
    fit = gd.problems.nist(name)
    state = solved(fit, LM(fit.residual_fn, solver="cg", iterations=2 * len(fit.minimizer)), 30)
    assert fit.digits(state.params[1]) > 6, fit.digits(state.params)


@pytest.mark.long
def test_a_native_run_is_the_eager_run():
    fit = gd.problems.nist("Misra1a")
    step, index = LM(fit.residual_fn), gd.full_batch(len(fit.data[1]), 20)
    rows = [
        gd.train(step, step.init(fit.starts[0]), fit.data, index, 1.0, backend=backend, record="params")[1]
        for backend in ("eager", "native")
    ]
    torch.testing.assert_close(rows[0].params, rows[1].params, rtol=1e-6, atol=0)
    assert _tree.leaves(rows[1].params)
