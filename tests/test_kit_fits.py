"""Claims of methods for least squares, and directions that residuals do not see."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import gdfunc as gd
from gdfunc import testing as gt

from .references import few, normal

LM, GN = gd.methods.levenberg_marquardt, gd.methods.gauss_newton
UNITS = {"qr": "columns", "cg": "gradient"}
OPTIONS = {"qr": {}, "cg": {"solver": "cg", "iterations": 5}}
each_solver = pytest.mark.parametrize("solver", UNITS)


def fit(make, **options):
    return gt.from_step(lambda residual_fn: make(residual_fn, **options))


@pytest.mark.long
@each_solver
def test_gauss_newton_keeps_the_claim(solver):
    assert "check_fit" in gt.check_optimizer(fit(GN, **OPTIONS[solver]), gt.GaussNewton()).passed


@pytest.mark.long
@each_solver
@given(st.floats(1e-4, 10.0))
@settings(max_examples=6)
def test_levenberg_marquardt_keeps_the_claim(solver, damping):
    gt.check_fit(fit(LM, damping=damping, **OPTIONS[solver]), gt.LevenbergMarquardt(damping, UNITS[solver]))


@pytest.mark.long
@each_solver
def test_every_law_holds_of_levenberg_marquardt(solver):
    claim = gt.LevenbergMarquardt(units=UNITS[solver])
    assert "check_fit" in gt.check_optimizer(fit(LM, **OPTIONS[solver]), claim).passed


def test_a_claim_of_another_damping_or_other_units_is_broken():
    for claim in (gt.LevenbergMarquardt(2e-3), gt.LevenbergMarquardt(units="gradient")):
        with pytest.raises(gt.LawBroken):
            gt.check_fit(fit(LM), claim)
    with pytest.raises(gt.NotApplicable):
        gt.check_fit(fit(LM), gt.GradientDescent())


def test_a_fit_is_its_formula_and_prints_as_its_code():
    curve, line = gt.Fit((3.0, 1.0, 0.5)), gt.Fit((3.0, 1.0, 0.5), is_linear=True)
    r, jacobian = curve.linearise([2.0, 0.5])
    t = torch.arange(3.0, dtype=torch.float64)
    decay = (-0.5 * t).exp()
    torch.testing.assert_close(torch.from_numpy(r), 2 * decay - torch.tensor([3.0, 1.0, 0.5]))
    torch.testing.assert_close(torch.from_numpy(jacobian), torch.stack([decay, -2 * t * decay], 1))
    assert line.linearise([0.0, 0.0])[0].tolist() == [-3.0, -1.0, -0.5]
    assert eval(repr(line), vars(gt)) == line


# ---------------------------------------------------------------- directions that residuals do not see

T = torch.linspace(0.3, 2.0, 9, dtype=torch.float64)
BLIND = {
    "a sum of two": lambda p, y: (p[0] + p[1]) * T + p[2] * T**2 - y,
    "a product of two": lambda p, y: p[0] * p[1] * T * torch.exp(-p[2] * T) - y,
    "one that is not used": lambda p, y: p[0] * T + p[2] - y,
}
INVARIANT = {  # with D of the columns, J·D⁻¹·w = 0 for the w along which u has no part
    "a sum of two": lambda p: p[0] - p[1],
    "a product of two": lambda p: p[0] / p[1],
    "one that is not used": lambda p: p[1],
}


@pytest.mark.long
@pytest.mark.parametrize("name", BLIND)
def test_levenberg_marquardt_rests_at_a_minimum_that_is_a_valley(name):
    y = 1.7 * T * torch.exp(-0.6 * T) + 0.3 * torch.cos(3 * T)
    step = LM(BLIND[name])
    start = torch.tensor([1.0, 3.0, 0.2], dtype=torch.float64)
    state, points = step.init(start), []
    for _ in range(150):
        state, loss = step(state, y, 1.0)
        points.append(state.params)
    assert loss < 0.03
    assert (points[-1] - points[40]).norm() < 1e-12
    # Columns in proportion give moves in proportion to 1/|column|, so the ratio or difference stays.
    torch.testing.assert_close(INVARIANT[name](points[-1]), INVARIANT[name](start), rtol=1e-9, atol=1e-12)


@given(st.integers(0, 2**16), st.integers(1, 6), st.integers(1, 6), st.integers(1, 5))
@example(116, 2, 6, 2)
@few
def test_gauss_newton_gives_the_solution_of_least_norm(seed, rows, columns, rank):
    matrix = normal(seed, rows, rank) @ normal(seed + 1, rank, columns)
    target = normal(seed + 2, rows)
    params, _ = GN(lambda p, y: matrix @ p - y)(torch.zeros(columns, dtype=torch.float64), target, 1.0)
    expected = torch.linalg.pinv(matrix, rtol=1e-10) @ target
    scale = float(torch.linalg.cond(matrix, p=2)) if min(rows, columns) <= rank else 1.0
    assert (params - expected).norm() <= 1e-9 * min(scale, 1e6) * (1 + expected.norm())
