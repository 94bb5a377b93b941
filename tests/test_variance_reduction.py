"""SVRG, SARAH, SAG and SAGA: what they record, refuse and cost, and the rates of their theorems.

`test_kit_sums` holds their formulas, and the means and second moments of their estimates. Small sums are
taken whole: an expectation is the mean over every plan there is, free of statistical errors.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, vmap

import gdfunc as gd
from gdfunc import _tree
from gdfunc import testing as gt

from .references import few, flat, linear_data, linear_loss, normal

seeds = st.integers(0, 2**32)


class Case(NamedTuple):
    make: Callable[..., Any]  # (loss_fn, data, size) -> step
    passes: bool  # whether a row holds many mini-batches


def passes(make, output):
    def build(loss_fn, data, size):
        return make(loss_fn, data, batch_size=size, output=output)

    return Case(build, True)


def single(make):
    return Case(lambda loss_fn, data, size: make(loss_fn, data), False)


METHODS = {
    "svrg": passes(gd.methods.svrg, "last"),
    "svrg_average": passes(gd.methods.svrg, "average"),
    "sarah": passes(gd.methods.sarah, "last"),
    "sarah_average": passes(gd.methods.sarah, "average"),
    "sag": single(gd.methods.sag),
    "saga": single(gd.methods.saga),
}
each = pytest.mark.parametrize("name", METHODS)
PARAMS = {"w": normal(0, 3), "b": normal(1, 1)[0]}
DATA = linear_data(3, 6, 3)
INDEX = torch.tensor([[4, 1, 1, 0], [5, 5, 2, 3], [0, 0, 0, 0], [3, 1, 4, 5]])  # some samples twice


def params_of(state):
    return getattr(state, "params", state)


def make(name, loss_fn=linear_loss, data=DATA, size=2):
    return METHODS[name].make(loss_fn, data, size)


def run(name, lr, index=INDEX, params=PARAMS, data=DATA, size=2, **options):
    step = make(name, data=data, size=size)
    final, trajectory = gd.train(step, step.init(params), torch.arange(6), index, lr, **options)
    return params_of(final), trajectory


# ---------------------------------------------------------------- laws of all of them


@each
def test_the_loss_is_that_of_the_old_parameters_and_the_mean_that_of_the_table(name):
    step = make(name)
    state = step.init(PARAMS)
    for row in INDEX:
        old = params_of(state)
        state, loss = step(state, row, 0.05)
        batch = DATA if METHODS[name].passes else gd.take(DATA, row)
        torch.testing.assert_close(loss, linear_loss(old, batch), rtol=1e-12, atol=0)
    if not METHODS[name].passes:
        for mean, table in zip(_tree.leaves(state.mean), _tree.leaves(state.table), strict=True):
            torch.testing.assert_close(mean, table.mean(0), rtol=1e-12, atol=1e-12)


@each
def test_vmap_over_rows_is_single_runs(name):
    index = torch.stack([INDEX, INDEX.flip(0), INDEX.flip(1)])
    final, trajectory = vmap(lambda rows: run(name, 0.05, rows))(index)
    for i, rows in enumerate(index):
        one, alone = run(name, 0.05, rows)
        torch.testing.assert_close(_tree.map(lambda leaf, i=i: leaf[i], final), one, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(trajectory.loss[i], alone.loss, rtol=1e-10, atol=1e-12)


@pytest.mark.long
@each
@pytest.mark.parametrize(
    "options",
    [{"adjoint": gd.adjoints.Checkpoint(2)}, pytest.param({"backend": "inductor"}, marks=pytest.mark.slow)],
)
def test_a_traced_run_and_its_derivative_are_those_in_python(name, options):
    index = INDEX.repeat(1, 9)  # 18 mini-batches: an inner loop that stays one

    def end(lr, **options):
        final, trajectory = run(name, lr, index, **options)
        return flat(final).sum() + trajectory.loss.sum()

    lr = torch.tensor(0.01, dtype=torch.float64)
    torch.testing.assert_close(end(lr, **options), end(lr), rtol=1e-10, atol=0)
    slopes = grad(lambda lr: end(lr, **options))(lr), grad(end)(lr)
    torch.testing.assert_close(*slopes, rtol=1e-9, atol=0)


def test_a_pass_takes_as_many_gradients_as_it_says():
    taken = []

    def loss_fn(params, batch):
        taken.append(len(batch[1]))
        return linear_loss(params, batch)

    for build in (gd.methods.svrg, gd.methods.sarah):
        taken.clear()
        build(loss_fn, DATA, batch_size=2)(PARAMS, INDEX[0], 0.1)
        assert taken == [6, 2, 2, 2, 2]


# ---------------------------------------------------------------- the rates of the theorems


def least_squares(seed, n, ridge):
    return gt.least_squares(normal(seed, n, 2).tolist(), normal(seed + 1, n).tolist(), ridge)


def best(problem):
    return torch.from_numpy(problem.minimizer)


def convexity(problem):
    """The strong convexity of the mean f, which is more than that of every sample."""
    return float(np.linalg.eigvalsh(problem.H.mean(0))[0])


def paths(step, init, plans, lr):
    """The points of a run for every plan, [plans, t + 1, P]."""

    def one(index):
        final, run = gd.train(step, init, torch.arange(1000), index, lr, record="params")
        return gd.plot.path(run.params, params_of(final))

    return vmap(one)(plans)


def minimum(problem):
    return problem.loss_fn(best(problem), problem.data)


def gap(problem, points):
    return vmap(vmap(lambda w: problem.loss_fn(w, problem.data)))(points) - minimum(problem)


small_sums = st.builds(least_squares, seeds, st.just(3), st.floats(0.3, 3.0))
K = torch.arange(7, dtype=torch.float64)


@pytest.mark.long
@given(small_sums, seeds)
@few
def test_saga_meets_its_theorem(problem, seed):
    """E‖xₖ − x*‖² ≤ (1 − min(1/4n, μ/3L))ᵏ [‖x₀ − x*‖² + 2n/3L·(f(x₀) − f*)] at lr = 1/3L, and
    E‖xₖ − x*‖² ≤ (1 − μ/2(μn + L))ᵏ [‖x₀ − x*‖² + n/(μn + L)·(f(x₀) − f*)] at lr = 1/2(μn + L)
    (Defazio, Bach and Lacoste-Julien 2014, theorem 1 and what follows it; there f'(x*) = 0).
    """
    n, L, mu = 3, problem.L, convexity(problem)
    step, start = gd.methods.saga(problem.loss_fn, problem.data), best(problem) + normal(seed, 2)
    for lr, rate, weight in (
        (1 / (3 * L), min(1 / (4 * n), mu / (3 * L)), 2 * n / (3 * L)),
        (1 / (2 * (mu * n + L)), mu / (2 * (mu * n + L)), n / (mu * n + L)),
    ):
        points = paths(step, step.init(start), gt.all_plans(n, 6), lr)
        expected = (points - best(problem)).square().sum(-1).mean(0)
        first = expected[0] + weight * gap(problem, points[:1, :1])[0, 0]
        assert (expected <= (1 - rate) ** K * first * (1 + 1e-9)).all()


@pytest.mark.long
@given(small_sums, seeds)
@few
def test_sag_meets_its_theorem(problem, seed):
    """E f(xₖ) − f* ≤ (1 − min(μ/16L, 1/8n))ᵏ [f(x₀) − f* + 4L/n·‖x₀ − x*‖² + σ²/16L] at lr = 1/16L, from
    a table of zeros; σ² is the mean of ‖fᵢ'(x*)‖² (Schmidt, Le Roux and Bach 2017, theorem 1).
    """
    n, L, mu = 3, problem.L, convexity(problem)
    step, start = gd.methods.sag(problem.loss_fn, problem.data), best(problem) + normal(seed, 2)
    state = step.init(start)
    at_best = step.init(best(problem)).table
    empty = state._replace(table=torch.zeros_like(state.table), mean=torch.zeros_like(state.mean))
    points = paths(step, empty, gt.all_plans(n, 6), 1 / (16 * L))
    expected = gap(problem, points).mean(0)
    distance, noise = (start - best(problem)).square().sum(), at_best.square().sum(1).mean()
    first = expected[0] + 4 * L / n * distance + noise / (16 * L)
    assert (expected <= (1 - min(mu / (16 * L), 1 / (8 * n))) ** K * first * (1 + 1e-9)).all()


@given(small_sums, seeds, st.floats(0.02, 0.6))
@few
def test_the_last_point_of_svrg_meets_its_bound(problem, seed, relative_lr):
    """E‖θ' − x*‖² ≤ [cᵐ + 2(lr·L)²·(1 − cᵐ)/(1 − c)]·‖θ − x*‖² with c = 1 − 2·lr·μ(1 − lr·L), from
    E‖v‖² ≤ 2·E‖fᵢ'(w) − fᵢ'(x*)‖² + 2·E‖fᵢ'(θ) − fᵢ'(x*)‖² ≤ 2L·⟨∇f(w), w − x*⟩ + 2L²·‖θ − x*‖²
    (in the way of Tan et al. 2016, on SVRG's option I).
    """
    L, mu, start = problem.L, convexity(problem), best(problem) + normal(seed, 2)
    lr, step = relative_lr / L, gd.methods.svrg(problem.loss_fn, problem.data)
    shrink = 1 - 2 * lr * mu * (1 - lr * L)
    for m in (1, 3, 6):
        ends = vmap(lambda rows: step(start, rows, lr)[0])(gt.all_plans(3, m).squeeze(-1))
        expected = (ends - best(problem)).square().sum(-1).mean()
        bound = shrink**m + 2 * (lr * L) ** 2 * (1 - shrink**m) / (1 - shrink)
        assert expected <= bound * (start - best(problem)).square().sum() * (1 + 1e-9)


@pytest.mark.long
@given(small_sums, seeds, st.floats(0.1, 1.0))
@few
def test_the_average_of_sarah_meets_its_theorem(problem, seed, relative_lr):
    """E‖∇f(θ')‖² ≤ [1/(μ·lr·(m + 1)) + lr·L/(2 − lr·L)]·‖∇f(θ)‖² (Nguyen et al. 2017, theorem 4, for one
    of the m + 1 points at random; for a quadratic also for their mean, by Jensen's inequality).
    """
    L, mu, start = problem.L, convexity(problem), best(problem) + normal(seed, 2)
    lr = relative_lr / L
    step = gd.methods.sarah(problem.loss_fn, problem.data, output="average")
    gradient = grad(lambda w: problem.loss_fn(w, problem.data))
    for m in (1, 3, 7):
        ends = vmap(lambda rows: step(start, rows, lr)[0])(gt.all_plans(3, m).squeeze(-1))
        expected = vmap(gradient)(ends).square().sum(-1).mean()
        factor = 1 / (mu * lr * (m + 1)) + lr * L / (2 - lr * L)
        assert expected <= factor * gradient(start).square().sum() * (1 + 1e-9)


@pytest.mark.long
def test_the_average_of_svrg_meets_its_theorem():
    """E f(θₛ) − f* ≤ αˢ (f(θ₀) − f*) with α = 1/(μ·lr·(1 − 2·lr·L)·m) + 2·lr·L/(1 − 2·lr·L)
    (Johnson and Zhang 2013, theorem 1, for a point at random; for their mean as f is convex).
    """
    problem, m, count = least_squares(3, 20, 10.0), 80, 20
    lr, start = 0.1 / problem.L, best(problem) + 1.0
    alpha = 1 / (convexity(problem) * lr * 0.8 * m) + 0.2 / 0.8
    step = gd.methods.svrg(problem.loss_fn, problem.data, output="average")
    keys = gd.random.split(gd.random.key(0), 20)
    plan = vmap(lambda key: gd.sample_batches(key, 20, 1, count * m))(keys)
    gaps = gap(problem, paths(step, start, plan.view(20, count, m), lr))
    bound = gaps[0, 0] * alpha ** torch.arange(count + 1, dtype=torch.float64)
    assert alpha < 0.5
    assert (gaps.mean(0) <= bound * (1 + 1e-9) + 5 * gaps.std(0) / 20**0.5).all()
    # The mean of the same points of SGD, with the same lr and samples, breaks it.
    step, rows = gd.make_step(problem.loss_fn), plan[0]
    _, sgd = gd.train(step, start, problem.data, rows, lr, record="params")
    means = sgd.params.view(count, m, 2).mean(1)[None]
    assert gap(problem, means)[0, -1] > 5 * bound[-1]


@pytest.mark.long
@pytest.mark.parametrize("name", ["svrg", "svrg_average", "sarah", "sag", "saga"])
def test_it_goes_on_at_a_linear_rate_where_sgd_stalls_at_its_noise(name):
    """The theorem of SAGA in the long run, and that SGD breaks it with the same lr and samples."""
    problem, n, steps = least_squares(5, 8, 0.5), 8, 640
    lr, start = 1 / (3 * problem.L), best(problem) + 1.0
    plan = gd.sample_batches(gd.random.key(0), n, 1, steps)
    rows = plan.view(-1, 2 * n) if METHODS[name].passes else plan
    step = METHODS[name].make(problem.loss_fn, problem.data, 1)
    final = params_of(gd.train(step, step.init(start), torch.arange(n), rows, lr)[0])
    sgd, _ = gd.train(gd.make_step(problem.loss_fn), start, problem.data, plan, lr)
    first = (start - best(problem)).square().sum()
    first = first + 2 * n / (3 * problem.L) * (problem.loss_fn(start, problem.data) - minimum(problem))
    bound = (1 - min(1 / (4 * n), convexity(problem) / (3 * problem.L))) ** steps * first
    assert (final - best(problem)).square().sum() < bound
    assert (sgd - best(problem)).square().sum() > 1e3 * bound


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("build", [gd.methods.svrg, gd.methods.sarah])
def test_bad_arguments_of_a_pass_are_named(build):
    for size in (0, -1, 2.0, True, "8"):
        with pytest.raises(ValueError, match="batch_size must be an int >= 1"):
            build(linear_loss, DATA, batch_size=size)
    with pytest.raises(ValueError, match="output must be 'last' or 'average'; got 'best'"):
        build(linear_loss, DATA, output="best")
    step = build(linear_loss, DATA, batch_size=3)
    with pytest.raises(
        ValueError, match=r"4 row numbers are not a whole number .* batch_size 3; .*\[T, m·3\]"
    ):
        step(PARAMS, INDEX[0], 0.1)


@pytest.mark.parametrize("build", [gd.methods.sag, gd.methods.saga])
def test_a_state_of_another_size_is_refused(build):
    step = build(linear_loss, DATA)
    other = build(linear_loss, tuple(leaf[:5] for leaf in DATA)).init(PARAMS)
    with pytest.raises(ValueError, match=r"state.table\['w'\] has 5 rows but data has 6 samples"):
        step(other, INDEX[0], 0.1)
    with pytest.raises(ValueError, match="chunk_size must be an int >= 1"):
        build(linear_loss, DATA, chunk_size=0)


@each
def test_what_is_no_row_numbers_is_refused_with_the_remedy(name):
    step = make(name)
    state = step.init(PARAMS)
    for batch, got in (
        (DATA, "tuple"),
        (DATA[1], r"torch.float64 \(6,\)"),
        (INDEX, r"torch.int64 \(4, 4\)"),
        (INDEX[0, 0], r"torch.int64 \(\)"),
        (INDEX[0, :0], r"torch.int64 \(0,\)"),
        (None, "NoneType"),
    ):
        with pytest.raises(
            TypeError, match=f"must be row numbers, int64 .*; got {got}. The data .*torch.arange"
        ):
            step(state, batch, 0.1)
    with pytest.raises(TypeError, match="must be row numbers"):
        gd.train(step, state, DATA, INDEX, 0.1)
    with pytest.raises(IndexError):
        step(state, torch.tensor([0, 6]), 0.1)


@each
def test_bad_data_is_refused(name):
    x, y = DATA

    def take_a_step(data):
        step = make(name, data=data)
        step(step.init(PARAMS), INDEX[0], 0.1)

    for data, message in (
        (None, "data has no leaves"),
        ((x, y[:4]), r"data leaves disagree .* data\[0\] has 6, data\[1\] has 4"),
        ((x[:0], y[:0]), "data is empty"),
        ((x.float(), y), r"data\[0\] is float32 but params\['w'\] is float64"),
    ):
        with pytest.raises(ValueError, match=message):
            take_a_step(data)
