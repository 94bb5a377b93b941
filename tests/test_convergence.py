"""Theory as an oracle: exact paths, exact divergence, and bounds that a wrong step would break.

Numbers T1 … are those of the table in the project's requirements; each names its source.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gdfunc as gd

from .references import normal

STEPS = torch.arange(21, dtype=torch.float64)
seeds = st.integers(0, 2**32)
spectra = st.lists(st.floats(0.05, 10.0), min_size=1, max_size=4).map(sorted)


def descend(problem, start, lr, steps):
    """The T+1 points of gradient descent."""
    step = gd.make_step(problem.loss_fn)
    final, trajectory = gd.train(step, start, None, gd.full_batch(1, steps), lr, record=("params", "loss"))
    return gd.plot.path(trajectory.params, final), trajectory.loss


def quadratic(seed, spectrum):
    minimizer = normal(seed, len(spectrum))
    problem = gd.problems.quadratic(spectrum, minimizer=minimizer, key=gd.random.key(seed))
    hessian = torch.func.hessian(lambda x: problem.loss_fn(x, None))(minimizer)
    return problem, minimizer, hessian, minimizer + normal(seed + 1, len(spectrum))


@given(seeds, spectra, st.one_of(st.floats(0.01, 2.1), st.sampled_from([2.0, 2.1])))
def test_descent_on_a_quadratic_is_the_closed_form(seed, spectrum, relative_lr):
    """T1: xₜ − x* = (I − lr·H)ᵗ (x₀ − x*). T8: with lr = 2.1/L the top component grows by 1.1 a step.
    At 2/L it oscillates. T4: ‖xₜ − x*‖ ≤ (1 − lr·μ)ᵗ ‖x₀ − x*‖, lr ≤ 1/L.
    """
    problem, minimizer, hessian, start = quadratic(seed, spectrum)
    lr = relative_lr / spectrum[-1]
    points, _ = descend(problem, start, lr, 12)
    error, shrink = start - minimizer, torch.eye(len(spectrum), dtype=torch.float64) - lr * hessian
    # Rounding is relative to the numbers that were added, not to what is left of them.
    scale = 1e-12 * (error.norm() + minimizer.norm()) * max(1.0, (relative_lr - 1) ** 12)
    for t, point in enumerate(points):
        assert (point - minimizer - torch.linalg.matrix_power(shrink, t) @ error).norm() <= scale
    top = (points - minimizer) @ torch.linalg.eigh(hessian).eigenvectors[:, -1]
    assert (top - top[0] * (1 - relative_lr) ** STEPS[:13]).abs().max() <= scale
    if relative_lr <= 1:
        distances = (points - minimizer).norm(dim=1)
        assert (distances <= distances[0] * (1 - lr * spectrum[0]) ** STEPS[:13] + scale).all()


@given(seeds, spectra)
def test_the_best_constant_lr_meets_its_rate(seed, spectrum):
    """T5: lr = 2/(μ+L) gives ‖xₜ − x*‖ ≤ ((κ−1)/(κ+1))ᵗ ‖x₀ − x*‖ (Nesterov 2004, theorem 2.1.15)."""
    problem, minimizer, hessian, start = quadratic(seed, spectrum)
    mu, L = spectrum[0], spectrum[-1]
    rates = ((L - mu) / (L + mu)) ** STEPS
    points, _ = descend(problem, start, 2 / (mu + L), 20)
    distances = (points - minimizer).norm(dim=1)
    assert (distances <= distances[0] * rates * (1 + 1e-9) + 1e-13).all()
    # Tight along the steepest direction: a wrong lr, or a wrong factor in the gradient, breaks it.
    top = minimizer + torch.linalg.eigh(hessian).eigenvectors[:, -1]
    points, _ = descend(problem, top, 2 / (mu + L), 5)
    torch.testing.assert_close((points - minimizer).norm(dim=1), rates[:6], rtol=1e-6, atol=1e-10)


@given(seeds, st.floats(0.05, 1.0))
def test_the_smallest_gradient_is_bounded_without_convexity(seed, relative_lr):
    """T7: min over s < t of ‖∇f(xₛ)‖² ≤ 2 (f(x₀) − inf f)/(lr·t), lr ≤ 1/L (Nesterov 2004, 1.2.15).

    f(x) = Σ cos(aᵢ·xᵢ) is smooth with L = max a², not convex, and no less than −n.
    """
    a = normal(seed, 3).abs() + 0.1
    start = 3 * normal(seed + 1, 3)

    def loss_fn(x, batch):
        return torch.cos(a * x).sum()

    lr = relative_lr / float(a.max() ** 2)
    step = gd.make_step(loss_fn)
    _, run = gd.train(step, start, None, gd.full_batch(1, 40), lr, record=("grad_norm", "loss"))
    smallest = run.grad_norm.square().cummin(0).values
    bound = 2 * (run.loss[0] + 3) / (lr * torch.arange(1, 41, dtype=torch.float64))
    assert (smallest <= bound * (1 + 1e-12)).all()


def test_the_stationary_variance_of_sgd_is_exact():
    """T10: x' = x − lr·λ(x − ξ), ξ ~ N(0, s²), ends with variance lr·λ·s²/(2 − lr·λ) in one dimension."""
    lr, curvature, noise, replicas = 0.3, 2.0, 1.5, 20_000
    targets = noise * gd.random.normal(gd.random.key(7), (replicas, 40), torch.float64)
    step = gd.make_step(lambda x, target: (0.5 * curvature * (x - target) ** 2).mean())
    start = torch.zeros((), dtype=torch.float64)
    final = torch.func.vmap(lambda xs: gd.scan(lambda x, xi: step(x, xi[None], lr), start, xs)[0])(targets)
    expected = lr * curvature * noise**2 / (2 - lr * curvature)
    standard_error = expected * (2 / replicas) ** 0.5
    assert abs(float(final.var()) - expected) < 5 * standard_error
    # The test can tell a wrong rule apart: without the −lr·λ in the denominator it is far off.
    assert abs(float(final.var()) - lr * curvature * noise**2 / 2) > 5 * standard_error


@pytest.mark.slow
def test_minibatch_sgd_meets_its_bound():
    """T9: E‖xₜ − x*‖² ≤ (1 − lr·μ)ᵗ‖x₀ − x*‖² + 2·lr·s_b²/μ (Garrigos and Gower 2023, theorem 5.8)."""
    problem = gd.problems.stock_regression()
    n, batch_size, steps, seeds_ = len(problem.data[1]), 16, 150, 2000
    x, y = problem.data
    features = torch.cat([x, torch.ones(n, 1, dtype=x.dtype)], 1)
    best = torch.cat([problem.minimizers[0]["w"], problem.minimizers[0]["b"].reshape(1)])
    sample_gradients = (features @ best - y)[:, None] * features
    largest = features.square().sum(1).max()
    share = n * (batch_size - 1) / (batch_size * (n - 1))
    expected_smoothness = share * problem.L + (n - batch_size) / (batch_size * (n - 1)) * largest
    noise = (n - batch_size) / (batch_size * (n - 1)) * sample_gradients.square().sum(1).mean()
    lr = float(1 / (2 * expected_smoothness))

    def run(key):
        index = gd.sample_batches(key, n, batch_size, steps, replacement=False)
        final, trajectory = gd.train(
            gd.make_step(problem.loss_fn), problem.params, problem.data, index, lr, record="params"
        )
        points = gd.plot.path(trajectory.params, final)
        return (points["w"] - best[:-1]).square().sum(1) + (points["b"] - best[-1]).square()

    keys = gd.random.split(gd.random.key(0), seeds_)
    squares = torch.func.vmap(run, chunk_size=200)(keys)
    mean, error = squares.mean(0), squares.std(0) / seeds_**0.5
    bound = (
        squares[0, 0] * (1 - lr * problem.mu) ** torch.arange(steps + 1, dtype=torch.float64)
        + 2 * lr * noise / problem.mu
    )
    assert (mean <= bound + 5 * error).all()
    # One step with twice the lr-scaled noise and half the contraction would not pass at its floor.
    assert mean[-1] > 0.01 * bound[-1]
