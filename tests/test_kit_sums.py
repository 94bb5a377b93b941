"""Stochastic gradients and finite sums: gdfunc and torch keep their claims, and the closed forms agree."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gdfunc as gd
from gdfunc import testing as gt

from .references import few


def of_rows(method, **options):
    return gt.from_step(
        lambda loss_fn, data: method(loss_fn, data, **options), method.__name__, of_rows=True
    )


SGD = gt.from_transform(gd.chain())
TORCH = gt.from_torch(lambda params: torch.optim.SGD(params, lr=1.0))
PASSES = [
    (of_rows(method, batch_size=size, output=output), claim(size, output))
    for method, claim in ((gd.methods.svrg, gt.SVRG), (gd.methods.sarah, gt.SARAH))
    for size, output in itertools.product((1, 2), ("last", "average"))
]
TABLES = [(of_rows(gd.methods.saga), gt.SAGA()), (of_rows(gd.methods.sag), gt.SAG())]
PAIRS = [(SGD, gt.GradientDescent()), (TORCH, gt.GradientDescent()), *PASSES, *TABLES]
names = [f"{subject} {claim}" for subject, claim in PAIRS]

dyadic = st.integers(-8, 8).map(lambda k: k / 8)
three = st.just(3)


@st.composite
def sums(draw, samples=three):
    n = draw(samples)
    features = draw(st.lists(st.tuples(dyadic, dyadic), min_size=n, max_size=n))
    return gt.least_squares(features, draw(st.lists(dyadic, min_size=n, max_size=n)), ridge=0.25)


@pytest.mark.long
@pytest.mark.parametrize(("subject", "claim"), PAIRS, ids=names)
def test_the_claim_is_kept(subject, claim):
    passed = gt.check_optimizer(subject, claim).passed
    assert {"check_batches", "check_full_batch", "check_dtype"} <= set(passed)


@pytest.mark.parametrize(("subject", "claim"), PAIRS, ids=names)
@given(sums(st.integers(1, 5)), st.integers(1, 3), st.integers(0, 2**16))
@few
def test_moves_on_drawn_sums_are_the_formulas(subject, claim, problem, many, seed):
    size = many * getattr(claim, "batch_size", 1)
    plan = np.random.default_rng(seed).integers(len(problem.b), size=(5, size))
    gt.check_batches(subject, claim, problem, plan, lrs=(0.5, 0.125, 0.25))


@pytest.mark.long
@pytest.mark.parametrize(("subject", "claim"), [(SGD, gt.GradientDescent()), PASSES[0], PASSES[4], *TABLES])
@given(sums(), st.sampled_from([0.125, 0.5]))
@few
def test_moments_on_drawn_sums_are_the_recursions(subject, claim, problem, lr):
    gt.check_second_moment(subject, claim, problem, (lr, 0.1))
    gt.check_unbiased(subject, claim, problem, lr)


@pytest.mark.long
@pytest.mark.parametrize(("subject", "claim"), [(SGD, gt.GradientDescent()), TABLES[0]])
def test_batches_of_two_have_the_moments_of_all_plans(subject, claim):
    gt.check_second_moment(subject, claim, batch_size=2)
    gt.check_second_moment(subject, claim, lrs=(0.3, 0.1), batch_size=2, replace=True)


@pytest.mark.long
def test_an_optimizer_that_looks_at_values_keeps_the_laws():
    def update(g, state, x, lr):
        return (x - lr * g if float(g.sum()) > 0 else x + (-lr) * g), state

    gt.check_optimizer(gt.subject(lambda x: (), update), gt.GradientDescent())


@pytest.mark.long
def test_a_wrong_batch_mean_of_any_optimizer_is_seen():
    def make(loss_fn):
        def summed(params, batch):
            size = 1 if batch is None else len(gd._tree.leaves(batch)[0])
            return size * loss_fn(params, batch)

        return gd.make_step(summed, gd.momentum(0.5))

    with pytest.raises(gt.LawBroken, match=r"check_batches broken at step 1, .*\n.*ratio 3"):
        gt.check_optimizer(gt.from_step(make), gt.Momentum(0.5))


# ---------------------------------------------------------------- the closed forms agree with one another


@pytest.mark.long
@given(st.floats(0.1, 0.9), dyadic, dyadic, st.integers(1, 4))
@few
def test_sgd_on_equal_curvatures_has_the_variance_of_independent_noise(shrink, b0, b1, steps):
    """Var x_T = s² Σⱼ wⱼ² with wⱼ = lr·a·(1 − lr·a)ʲ, for fᵢ = ½ a (x − bᵢ)²."""
    problem = gt.least_squares([[1.0], [1.0], [1.0]], [b0, b1, 1.0])
    plans = gt.all_plans(3, steps)
    step, lr = gd.make_step(problem.loss_fn), 1 - shrink
    ends = []
    for plan in plans:
        run = gd.train(step, torch.zeros(1, dtype=torch.float64), problem.data, plan, lr)
        ends.append(float(run[0]))
    weights = lr * shrink ** np.arange(steps)
    expected = np.var([b0, b1, 1.0]) * np.square(weights).sum()
    np.testing.assert_allclose(np.var(ends), expected, rtol=1e-9, atol=1e-12)


@given(st.floats(0.1, 4), st.floats(0, 1), st.floats(0.05, 3), st.floats(0, 2), st.floats(0, 2))
def test_the_sharp_pair_attains_the_bound_and_has_the_constants_it_claims(L, kappa, relative, R, v):
    mu, lr = kappa * L, relative / L
    problem = gt.sharp_pair(L, mu, lr, R, v)
    eigenvalues = np.linalg.eigvalsh(problem.H)
    assert eigenvalues.min() >= mu - 1e-9 * L
    assert eigenvalues.max() <= L * (1 + 1e-9)
    start = np.array([R, 0.0])
    ends = start - lr * problem.gradients(start)
    bound = (lr * (L - mu) / 2 * R + np.hypot((1 - lr * (L + mu) / 2) * R, lr * v)) ** 2
    np.testing.assert_allclose(np.square(ends).sum(1).mean(), bound, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(problem.gradients(np.zeros(2)).mean(0), 0, atol=1e-12)


@given(st.floats(0, 0.9), st.floats(0.5, 4.0), st.floats(0.2, 1.5))
@few
def test_the_noise_floor_of_momentum_is_lyapunovs(beta, curvature, relative):
    gt.check_noise_floor(
        gt.from_transform(gd.momentum(beta)), gt.Momentum(beta), curvature, relative / curvature
    )


# ---------------------------------------------------------------- problems, plans and messages


@given(sums(st.integers(1, 4)))
def test_a_sum_is_rebuilt_from_its_repr_and_its_loss_has_its_gradients(problem):
    again = eval(repr(problem), {"FiniteSum": gt.FiniteSum})
    assert again == problem
    assert hash(again) == hash(problem)
    x = torch.tensor([0.5, -2.0], dtype=torch.float64)
    gradient = torch.func.grad(problem.loss_fn)({"a": x[0], "b": x[1:]}, problem.data)
    np.testing.assert_allclose(
        [gradient["a"], *gradient["b"]], problem.gradients(x.numpy()).mean(0), rtol=1e-12, atol=1e-14
    )
    np.testing.assert_allclose(problem.gradients(problem.minimizer).mean(0), 0, atol=1e-12)
    assert 0.25 - 1e-12 <= problem.mu <= problem.L


@pytest.mark.parametrize(
    ("hessians", "offsets", "message"),
    [
        ((((1.0,),),), ((1.0, 2.0),), r"offsets \[n, d\]; got \(1, 1, 1\) and \(1, 2\)"),
        ((), (), "got"),
        ((((1.0, 2.0), (0.0, 1.0)),), ((1.0, 2.0),), "symmetric"),
    ],
)
def test_what_is_no_sum_is_refused(hessians, offsets, message):
    with pytest.raises(ValueError, match=message):
        gt.FiniteSum(hessians, offsets)


def test_all_plans_are_all_there_are():
    for n, steps, size, replace in ((3, 3, 1, False), (3, 3, 2, False), (4, 2, 2, True), (2, 1, 2, False)):
        plans = gt.all_plans(n, steps, size, replace=replace)
        batches = n**size if replace else len(list(itertools.combinations(range(n), size)))
        assert len({tuple(plan.flatten().tolist()) for plan in plans}) == len(plans) == batches**steps
        assert plans.dtype == torch.int64
        assert plans.shape[1:] == (steps, size)


@pytest.mark.long
def test_a_broken_law_names_the_fault_and_repeats_itself():
    control = gt.WRONG["saga: repeated samples counted twice in the mean"]
    with pytest.raises(gt.LawBroken) as caught:
        gt.check_optimizer(control.subject, control.claim)
    assert caught.value.diagnosis == f"agrees with: {control.fault}"
    assert "check_batches broken at step 3, entry" in str(caught.value)


@pytest.mark.parametrize(
    "check",
    [
        gt.check_unbiased,
        gt.check_second_moment,
        gt.check_batch_variance,
        gt.check_sgd_bound,
        gt.check_variance_identity,
        gt.check_full_batch,
        gt.check_minimum,
        gt.check_noise_floor,
    ],
)
def test_laws_of_sums_say_what_they_are_not_about(check):
    with pytest.raises(gt.NotApplicable):
        check(gt.from_transform(gd.adam()), gt.Adam())


def test_a_momentum_that_forgets_too_slowly_has_no_noise_floor_to_measure():
    for claim in (gt.Momentum(0.99), gt.Momentum(0.5, nesterov=True)):
        with pytest.raises(gt.NotApplicable):
            gt.check_noise_floor(SGD, claim)
