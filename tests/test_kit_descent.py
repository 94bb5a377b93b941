"""The kit's theorems on descent and momentum: our methods keep them, and a factor of lr breaks them."""

import itertools
import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gdfunc as gd
from gdfunc import _tree
from gdfunc import testing as gt

from .references import few, rare

DESCENT = gt.from_step(gd.make_step, "descent")
betas = st.floats(0.05, 0.95)


def of_position(make):
    return gt.from_step(make, result=lambda carry: carry.position)


SUBJECTS = {
    "descent": lambda data: (DESCENT, gt.GradientDescent()),
    "torch's descent": lambda data: (
        gt.from_torch(lambda params: torch.optim.SGD(params, lr=1.0)),
        gt.GradientDescent(),
    ),
    "sign": lambda data: (gt.from_transform(gd.sign()), gt.Sign()),
    "heavy ball": lambda data: heavy_ball(data.draw(betas)),
    "heavy ball with the best constants for quadratics": lambda data: heavy_ball(4 / 9),
    "nesterov": lambda data: (of_position(gd.methods.nesterov), gt.Nesterov()),
    "nesterov with a constant": lambda data: nesterov(data.draw(betas)),
    "nesterov with a table": lambda data: table(tuple(data.draw(st.lists(betas, min_size=1, max_size=4)))),
    "ogm": lambda data: ogm(data.draw(st.one_of(st.none(), st.integers(1, 9)))),
    "triple momentum": lambda data: triple_momentum(data.draw(st.floats(1.0, 100.0))),
}


def heavy_ball(beta):
    subject = gt.from_step(lambda loss_fn: gd.methods.heavy_ball(loss_fn, beta))
    return subject, gt.Momentum(beta, form="displacement")


def nesterov(beta):
    return of_position(lambda loss_fn: gd.methods.nesterov(loss_fn, beta)), gt.Nesterov(beta)


def table(values):
    def beta_of(t):
        return torch.tensor(values, dtype=torch.float64)[(t - 1) % len(values)]

    return of_position(lambda loss_fn: gd.methods.nesterov(loss_fn, beta_of)), gt.Nesterov(values)


def ogm(steps):
    return gt.from_step(lambda loss_fn: gd.methods.ogm(loss_fn, steps)), gt.OGM(steps)


def triple_momentum(kappa):
    return of_position(lambda loss_fn: gd.methods.triple_momentum(loss_fn, kappa)), gt.TripleMomentum(kappa)


@pytest.mark.long
@pytest.mark.parametrize("name", SUBJECTS)
@rare
@given(st.data())
def test_a_method_is_what_it_claims(name, data):
    subject, claim = SUBJECTS[name](data)
    gt.check_optimizer(subject, claim)
    if claim.is_linear:
        gt.check_optimizer(subject, gt.FixedCoefficients())


@pytest.mark.long
def test_the_method_of_1983_is_fista_with_its_table_of_momenta():
    thetas = [1.0]
    for _ in range(6):
        thetas.append((1 + math.sqrt(1 + 4 * thetas[-1] ** 2)) / 2)
    momenta = tuple((old - 1) / new for old, new in itertools.pairwise(thetas))
    subject, claim = table(momenta)
    # D under a unit gradient, from FISTA's own recursion.
    for steps, displacement in enumerate([1, 2, 3.2818, 4.8381, 6.6646], 1):
        moves = gt.run(subject, lambda x, _: x, torch.tensor(0.0), None, 1.0, steps).results[0]
        assert -moves[-1] == pytest.approx(displacement, abs=1e-4)
    gt.check_optimizer(subject, claim)


@pytest.mark.long
def test_torchs_nesterov_is_the_method_while_the_momentum_is_constant_and_not_else():
    gt.check_kernel(gt.from_transform(gd.momentum(0.5, nesterov=True)), gt.Nesterov(0.5), lr=0.25)

    def variant(loss_fn):
        """torch's update with t/(t + 3)."""

        def advance(carry, batch, lr):
            x, state, t = carry
            grads, loss = gd.batch_grad(loss_fn)(x, batch)
            u, state = gd.momentum(t / (t + 3), nesterov=True).update(grads, state, x)
            return Carry(gd.apply_updates(x, u, lr), state, t + 1), loss, grads

        return gd.Step(lambda x: Carry(x, gd.momentum(0.5).init(x), 0), advance, Carry)

    with pytest.raises(gt.LawBroken) as caught:
        gt.check_optimizer(gt.from_step(variant), gt.Nesterov())
    assert "one momentum for buffer and look-ahead" in caught.value.diagnosis


class Carry:
    def __init__(self, params, state, t):
        self.params, self.state, self.t = params, state, t

    def __iter__(self):
        return iter((self.params, self.state, self.t))


# ---------------------------------------------------------------- drawn problems


@pytest.mark.long
@given(gt.quadratics(), st.one_of(gt.rates(), gt.rates(inside=False)))
def test_descent_on_a_quadratic_is_the_closed_form(problem, h):
    gt.check_quadratic(DESCENT, gt.GradientDescent(), problem, lr=h / problem.L)


@few
@given(gt.quadratics(mu=0.25), gt.rates(), betas)
def test_momentum_on_a_quadratic_is_the_closed_form(problem, h, beta):
    for subject, claim in (heavy_ball(beta), nesterov(beta)):
        gt.check_quadratic(subject, claim, problem, lr=h / problem.L, steps=8)


@few
@given(st.one_of(gt.quadratics(dim=2, mu=0.25), gt.logistic_regressions(ridge=0.25)), gt.rates())
def test_descent_contracts(problem, h):
    gt.check_contraction(DESCENT, gt.GradientDescent(), problem, h)


@few
@given(
    st.one_of(gt.quadratics(dim=1, convex=False), gt.hubers(), gt.smooth_nonconvex(), gt.pl_problems()),
    gt.dyadics(-4, 4),
    gt.rates(),
)
def test_the_decrease_of_descent_is_between_its_bounds(problem, start, h):
    gt.check_descent_sandwich(DESCENT, gt.GradientDescent(), problem, (start,), h)


@few
@given(gt.smooth_nonconvex())
def test_descent_attains_the_bound_without_convexity(wave):
    gt.check_nonconvex(DESCENT, gt.GradientDescent(), wave.L, wave.h, wave.steps)


@few
@given(st.integers(1, 5), gt.dyadics(0.5, 4), gt.dyadics(0.5, 4))
def test_the_silver_schedule_attains_its_value(j, L, radius):
    gt.check_silver(DESCENT, gt.GradientDescent(), L, radius, j)


# ---------------------------------------------------------------- the laws are sharp

SHARP = [
    "check_contraction",
    "check_descent_sandwich",
    "check_nonconvex",
    "check_exact_line_search",
    "check_silver",
    "check_subgradient",
    "check_quadratic",
    "check_huber",
    "check_worst_case",
]


@pytest.mark.parametrize("factor", [-1.0, 0.5, 1 - 1e-6, 1 + 1e-6])
@pytest.mark.parametrize("law", SHARP)
def test_a_wrong_factor_of_lr_breaks_the_law(law, factor):
    wrong = gt.subject(lambda x: (), lambda g, state, x, lr: (x - factor * lr * g, state), "wrong")
    with pytest.raises(gt.LawBroken):
        gt.LAWS[law](wrong, gt.GradientDescent())


# ---------------------------------------------------------------- problems and strategies

PROBLEMS = {
    "quadratics": gt.quadratics(convex=False),
    "hubers": gt.hubers(),
    "waves": gt.smooth_nonconvex(),
    "pl": gt.pl_problems(),
    "logistic": gt.logistic_regressions(),
}


@pytest.mark.long
@pytest.mark.parametrize("name", PROBLEMS)
@given(st.data())
def test_a_problem_has_the_curvature_that_it_says_and_prints_as_its_code(name, data):
    problem = data.draw(PROBLEMS[name])
    assert eval(repr(problem), vars(gt)) == problem
    dim = {"quadratics": len(getattr(problem, "spectrum", "1")), "logistic": 2}.get(name, 1)
    ends = [np.array(data.draw(st.lists(gt.dyadics(-4, 4), min_size=dim, max_size=dim))) for _ in range(2)]
    away = ends[1] - ends[0]
    slopes = problem.gradients(np.stack(ends))
    curvature, square = float((slopes[1] - slopes[0]) @ away), float(away @ away)
    assert problem.mu * square - 1e-9 <= curvature <= problem.L * square + 1e-9
    # The mean value along the segment lies between the slopes of a convex function.
    nodes, weights = np.polynomial.legendre.leggauss(40)
    if name in ("quadratics", "logistic"):
        along = problem.gradients([ends[0] + (node + 1) / 2 * away for node in nodes]) @ away
        rise = float(problem.values(ends[1]) - problem.values(ends[0]))
        assert float(weights @ along) / 2 == pytest.approx(rise, abs=1e-6 * (1 + abs(rise)))


@given(gt.pl_problems(), gt.dyadics(-6, 6))
def test_the_sine_keeps_the_inequality_of_polyak_and_lojasiewicz(problem, x):
    slope = problem.gradients([x])[0]
    assert 0.5 * slope**2 >= problem.pl * problem.values([x]) - 1e-12


@pytest.mark.long
@given(gt.params_trees(), gt.keys(), gt.plans(n=5), gt.hostile_values(torch.float32))
def test_drawn_parameters_keys_and_plans_are_taken(params, key, plan, value):
    assert all(leaf.dtype == torch.float64 for leaf in _tree.leaves(params))
    assert gd.random.uniform(key, (2,)).shape == (2,)
    assert gd.take(torch.arange(5.0), plan).shape == plan.shape
    assert value.dtype == torch.float32
    for part in (params, plan):
        names = {"tensor": torch.tensor, "torch": torch, "nan": math.nan, "inf": math.inf}
        again = eval(repr(part), names)
        pairs = zip(_tree.leaves(part), _tree.leaves(again), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.long
def test_strategies_name_the_extra_that_they_need_and_laws_do_not_need_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "hypothesis.strategies", None)
    with pytest.raises(ImportError, match=r"gdfunc.testing needs hypothesis: pip install 'gdfunc\[test\]'"):
        gt.quadratics()
    gt.check_kernel(DESCENT, gt.GradientDescent())
