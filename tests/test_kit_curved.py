"""Claims of methods that look at the loss, and of L-BFGS: gdfunc and torch keep them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gdfunc as gd
from gdfunc import testing as gt
from gdfunc.testing._claims._curved import dense_bfgs
from gdfunc.testing._problems import Cone, Hermite, Quadratic, Raised, Rosenbrock, Waves, walk

from .references import few, normal


def method(make, **options):
    return gt.from_step(lambda loss_fn: make(loss_fn, **options))


OURS = {
    gt.Polyak(): method(gd.methods.polyak),
    gt.LineSearch(): method(gd.methods.line_search),
    gt.SAM(): method(gd.methods.sam),
    gt.SAM(adaptive=True): method(gd.methods.sam, adaptive=True),
    gt.LBFGS(): gt.from_transform(gd.lbfgs()),
    gt.Wolfe(): method(gd.methods.lbfgs),
}


@pytest.mark.long
@pytest.mark.parametrize("claim", OURS, ids=repr)
def test_every_law_holds_at_the_defaults(claim):
    report = gt.check_optimizer(OURS[claim], claim)
    assert {"check_step", "check_kernel", "check_wolfe"} & set(report.passed)
    assert {"check_polyak", "check_armijo", "check_sam", "check_lbfgs", "check_wolfe"} & set(report.passed)


@pytest.mark.long
@given(st.floats(-2, 2), st.none() | st.floats(0.05, 2))
@few
def test_polyak_keeps_the_claim(minimum, max_step):
    options = {"minimum": minimum, "max_step": max_step}
    for check in (gt.check_step, gt.check_polyak):
        check(method(gd.methods.polyak, **options), gt.Polyak(**options))


@pytest.mark.long
@given(st.floats(1e-4, 0.99), st.floats(0.1, 0.9), st.integers(0, 6))
@few
def test_line_search_keeps_the_claim(decrease, factor, max_steps):
    options = {"decrease": decrease, "factor": factor, "max_steps": max_steps}
    for check in (gt.check_step, gt.check_armijo):
        check(method(gd.methods.line_search, **options), gt.LineSearch(**options))


@pytest.mark.parametrize("decrease", [1 / 1024, 1 / 4, 1 / 2, 3 / 4])
@pytest.mark.parametrize("factor", [1 / 2, 1 / 4])
def test_line_search_accepts_equality(decrease, factor):
    options = {"decrease": decrease, "factor": factor, "max_steps": 3}
    gt.check_armijo(method(gd.methods.line_search, **options), gt.LineSearch(**options))


@pytest.mark.long
@given(st.floats(0, 2), st.booleans())
@few
def test_sam_keeps_the_claim(rho, adaptive):
    options = {"rho": rho, "adaptive": adaptive}
    for check in (gt.check_step, gt.check_sam):
        check(method(gd.methods.sam, **options), gt.SAM(**options))


@pytest.mark.long
@given(st.integers(1, 6), st.sampled_from([0.0, 1e-10, 1e-3]))
@settings(max_examples=6)
def test_lbfgs_keeps_the_claim(history, eps):
    for check in (gt.check_kernel, gt.check_lbfgs):
        check(gt.from_transform(gd.lbfgs(history, eps=eps)), gt.LBFGS(history, eps))


@pytest.mark.parametrize("history", [1, 3])
def test_torchs_lbfgs_keeps_the_claim(history):
    def make(params):
        return torch.optim.LBFGS(
            params, max_iter=1, history_size=history, tolerance_grad=0.0, tolerance_change=0.0
        )

    subject, claim = gt.from_torch(make), gt.LBFGS(history, shortens="first step")
    gt.check_lbfgs(subject, claim)
    grads = {"a": normal(0, 8), "b": normal(1, 8, 2, 2)}
    gt.check_kernel(subject, claim, grads)
    uncurved = {"a": normal(2, 1).expand(4), "b": normal(3, 1, 2, 2).expand(4, 2, 2)}
    gt.check_kernel(subject, claim, uncurved)
    with pytest.raises(gt.LawBroken):  # without its diagnosis, which takes a second
        gt.LAWS["check_kernel"](subject, gt.LBFGS(history), uncurved)


@given(st.integers(0, 2**16), st.integers(1, 4))
def test_dense_bfgs_is_symmetric_positive_and_maps_y_to_s(seed, count):
    generator = np.random.default_rng(seed)
    root = generator.standard_normal((4, 4))
    pairs = [(s, (root @ root.T + np.eye(4)) @ s) for s in generator.standard_normal((count, 4))]
    inverse, (s, y) = dense_bfgs(pairs), pairs[-1]
    np.testing.assert_allclose(inverse @ y, s, atol=1e-9)
    np.testing.assert_allclose(inverse, inverse.T, atol=1e-9)
    assert np.linalg.eigvalsh(inverse).min() > 0


@pytest.mark.long
@given(st.sampled_from([1e-4, 0.125, 0.25]), st.sampled_from([0.5, 0.75, 0.9]), st.integers(1, 5))
@settings(max_examples=3)
def test_lbfgs_with_a_search_keeps_the_claim(decrease, curvature, history):
    options = {"decrease": decrease, "curvature": curvature, "history": history}
    gt.check_wolfe(method(gd.methods.lbfgs, **options), gt.Wolfe(**options))


@pytest.mark.parametrize("claim", [gt.Wolfe(2e-4), gt.Wolfe(curvature=0.8), gt.Wolfe(history=2)], ids=repr)
def test_a_search_for_other_conditions_is_found(claim):
    with pytest.raises(gt.LawBroken):
        gt.check_wolfe(method(gd.methods.lbfgs), claim)


@pytest.mark.parametrize(
    "check", [gt.check_wolfe, gt.check_step, gt.check_polyak, gt.check_armijo, gt.check_sam, gt.check_lbfgs]
)
def test_laws_say_what_they_are_not_about(check):
    with pytest.raises(gt.NotApplicable):
        check(gt.from_transform(gd.chain()), gt.GradientDescent())


@pytest.mark.long
def test_a_claim_of_another_value_is_broken():
    subjects = {
        gt.Polyak(0.25): method(gd.methods.polyak),
        gt.LineSearch(0.5): method(gd.methods.line_search),
        gt.SAM(0.25): method(gd.methods.sam),
        gt.LBFGS(2): gt.from_transform(gd.lbfgs(3)),
    }
    for claim, subject in subjects.items():
        with pytest.raises(gt.LawBroken):
            gt.check_optimizer(subject, claim)


@pytest.mark.parametrize(
    "problem", [Waves((0.5, 2.0)), Rosenbrock(), Hermite(-0.5, 0.25), Raised(Quadratic((1.0, 3.0)), 2.0)]
)
def test_the_gradients_of_a_problem_are_those_of_its_loss(problem):
    x, h = np.array([0.7, -1.1]), 1e-6 * np.eye(2)
    slopes = (problem.values(x + h) - problem.values(x - h)) / 2e-6
    np.testing.assert_allclose(problem.gradients(x), slopes, rtol=1e-7)
    assert eval(repr(problem)) == problem
    assert problem.mu <= problem.L


def test_a_cone_has_one_slope():
    points, _ = walk(gt.from_transform(gd.chain()), Cone(2.0), [3.0], 0.5, 3)
    assert points.ravel().tolist() == [3.0, 2.0, 1.0, 0.0]
    assert Raised(Cone(2.0), 1.0).mu == 0.0
