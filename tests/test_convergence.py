"""Theory as an oracle of whole runs; the theorems on single paths are the kit's, in `test_kit_descent`.

Numbers T9 … are those of the table in the project's requirements; each names its source.
"""

import pytest
import torch

import gdfunc as gd


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
