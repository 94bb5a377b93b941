"""Statistics of gradients against their definitions, from gradients one by one and of known noise."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import vmap

import gdfunc as gd

from .assertions import assert_derivatives, assert_pure, assert_refused
from .references import COMPILED, flat, gradients_one_by_one, linear_data, linear_loss, normal

S = gd.stats
PARAMS = {"w": normal(0, 3), "b": normal(1, 1)[0]}


def center_loss(w, x):
    """½‖w − x‖²: the gradient of sample x is w − x, so the noise is that of the data."""
    return 0.5 * (w - x).square().sum(1).mean()


def matrix(loss_fn, params, batch):
    return torch.stack([flat(gradient) for gradient in gradients_one_by_one(loss_fn, params, batch)])


def spread_of(loss_fn, params, batch, **options):
    return gd.reduce_per_sample(loss_fn, S.spread(), **options)(params, batch)[0]


def close(got, expected, rtol=1e-10):
    torch.testing.assert_close(got, torch.as_tensor(expected, dtype=got.dtype), rtol=rtol, atol=1e-12)


@pytest.mark.long
@given(seed=st.integers(0, 2**20), n=st.integers(2, 9), chunk_size=st.sampled_from([None, 1, 2, "auto"]))
def test_every_statistic_is_its_definition(seed, n, chunk_size):
    batch = linear_data(seed, n, 3)
    g = matrix(linear_loss, PARAMS, batch)
    mean = g.mean(0)
    total = sum((row - mean) @ (row - mean) for row in g)
    spread = spread_of(linear_loss, PARAMS, batch, chunk_size=chunk_size)
    close(spread.size, n)
    close(spread.loss, linear_loss(PARAMS, batch))
    close(spread.squared_norm, mean @ mean)
    close(spread.variance, total / (n - 1))
    close(S.noise_scale(spread), total / (n - 1) / (mean @ mean))
    close(S.cabs(spread, 0.3), 0.3 * total / (n - 1) / linear_loss(PARAMS, batch))
    close(S.diversity(spread), sum(row @ row for row in g) / (g.sum(0) @ g.sum(0)))
    theta, nu = 0.7, 1.3
    inner = sum((row @ mean - mean @ mean) ** 2 for row in g) / (n - 1) / n
    across = sum((row - row @ mean / (mean @ mean) * mean).square().sum() for row in g) / (n - 1) / n
    for verdict, side, bound in [
        (S.norm_test(spread, theta), total / (n - 1) / n, theta**2 * mean @ mean),
        (S.inner_product_test(spread, theta), inner, theta**2 * (mean @ mean) ** 2),
        (S.orthogonality_test(spread, nu), across, nu**2 * mean @ mean),
    ]:
        assert verdict.passed == (side <= bound)
        close(verdict.batch_size, n * side / bound, rtol=1e-8)


@pytest.mark.long
@given(seed=st.integers(0, 2**20), n=st.integers(2, 9), chunk_size=st.sampled_from([None, 1, 2]))
def test_listed_statistics_are_their_definitions(seed, n, chunk_size):
    batch = linear_data(seed, n, 3)
    g = matrix(linear_loss, PARAMS, batch)
    direction = {"w": normal(7, 3), "b": normal(8, 1)[0]}
    flat = torch.cat([direction["w"], direction["b"][None]])
    reduced = gd.reduce_per_sample(
        linear_loss,
        {"gsnr": S.gsnr(), "mean": S.cosines(), "given": S.cosines(direction)},
        chunk_size=chunk_size,
    )
    results, _ = reduced(PARAMS, batch)
    ratio = g.mean(0) ** 2 / g.var(0)
    close(torch.cat([results["gsnr"]["w"], results["gsnr"]["b"][None]]), ratio, rtol=1e-8)
    for name, d in [("mean", g.mean(0)), ("given", flat)]:
        close(results[name], torch.stack([row @ d / (row.norm() * d.norm()) for row in g]))


def test_unbiased_estimates_are_exact_on_average_over_all_batches():
    data, w = normal(4, 3, 2), torch.zeros(2, dtype=torch.float64)
    signal, noise = data.mean(0).square().sum(), (data - data.mean(0)).square().sum() / 3
    spreads = [spread_of(center_loss, w, data[list(rows)]) for rows in product(range(3), repeat=2)]
    squared_norms, variances = (
        torch.stack([getattr(s, k) for s in spreads]) for k in ("squared_norm", "variance")
    )
    close(variances.mean(), noise)
    close((squared_norms - variances / 2).mean(), signal)
    close(S.noise_scale(spreads[1], unbiased=True), variances[1] / (squared_norms[1] - variances[1] / 2))
    small = data.square().sum(1).mean()
    estimates = S.two_batch(small, squared_norms.mean(), sizes=(1, 2))
    close(torch.stack(estimates), torch.stack([signal, noise]))


def test_two_batches_of_a_sample_each_and_the_whole_give_the_spread():
    batch = linear_data(5, 6, 3)
    spread = spread_of(linear_loss, PARAMS, batch)
    small = matrix(linear_loss, PARAMS, batch).square().sum(1).mean()
    signal, noise = S.two_batch(small, spread.squared_norm, sizes=(1, 6))
    close(noise, spread.variance)
    close(noise / signal, S.noise_scale(spread, unbiased=True))


def test_sizes_and_shares_out_of_range_are_refused():
    for sizes in ((2, 2), (0, 3), (2.0, 3), (1, True)):
        assert_refused(lambda s=sizes: S.two_batch(1.0, 1.0, sizes=s), r"sizes\[[01]\] must be an int")
    spread = spread_of(linear_loss, PARAMS, linear_data(0, 4, 3))
    assert_refused(lambda: S.norm_test(spread, 0.0), "theta must be a finite number")
    assert_refused(lambda: S.orthogonality_test(spread, 0.0), "nu must be a finite number")


def test_one_sample_gives_nan_and_a_warning():
    batch = linear_data(6, 1, 3)
    with pytest.warns(UserWarning, match="one sample, too few for a variance") as caught:
        spread = spread_of(linear_loss, PARAMS, batch)
    assert [warning.filename for warning in caught] == [__file__]
    values = [spread.variance, spread.along, S.noise_scale(spread), S.noise_scale(spread, unbiased=True)]
    values += [S.cabs(spread, 0.1), S.diversity(spread), S.norm_test(spread).batch_size]
    assert torch.stack(values).isnan().all()
    assert spread.squared_norm > 0
    assert not any(f(spread).passed for f in (S.norm_test, S.inner_product_test, S.orthogonality_test))
    with pytest.warns(UserWarning, match="one sample") as caught:
        ratios, _ = gd.reduce_per_sample(linear_loss, S.gsnr())(PARAMS, batch)
    assert [warning.filename for warning in caught] == [__file__]
    assert ratios["w"].isnan().all()
    cosines, _ = gd.reduce_per_sample(linear_loss, S.cosines())(PARAMS, batch)
    close(cosines, [1.0])


def test_gradients_of_zero_have_neither_direction_nor_a_crash():
    data = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]])
    w = torch.zeros(2)
    results, _ = gd.reduce_per_sample(center_loss, (S.spread(), S.cosines(), S.cosines(torch.ones(2))))(
        w, data
    )
    spread, to_mean, to_ones = results
    assert spread.squared_norm == 0
    assert spread.along == 0
    assert S.noise_scale(spread) == float("inf")
    assert to_mean.tolist() == [0, 0, 0]
    close(to_ones, [-(0.5**0.5), 0.5**0.5, 0.0], rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_reduced_in_float32(dtype):
    """Variances of 1e-8 and of 1e6 lie outside what float16 can tell."""
    for size in (1e-4, 1e3):
        data = (size * torch.tensor([[1.0, 2.0], [3.0, -2.0]])).to(dtype)
        results, _ = gd.reduce_per_sample(center_loss, (S.spread(), S.gsnr()))(
            torch.zeros(2, dtype=dtype), data
        )
        spread, gsnr = results
        rows = data.double()
        assert spread.variance.dtype == gsnr.dtype == torch.float32
        close(spread.variance.double(), rows.var(0).sum(), rtol=1e-3)
        close(gsnr.double(), rows.mean(0) ** 2 / rows.var(0), rtol=1e-3)


@given(seed=st.integers(0, 2**20), n=st.integers(1, 8), rows=st.integers(1, 3))
def test_ranks_place_every_sample(seed, n, rows):
    values = (normal(seed, rows, n) * 2).round()  # with ties
    for row, ranked in zip(values.tolist(), S.ranks(values).tolist(), strict=True):
        ordered = sorted(range(n), key=lambda i: (-row[i], i))
        assert [ordered.index(i) for i in range(n)] == ranked


def test_nan_ranks_first():
    assert S.ranks(torch.tensor([1.0, torch.nan, 2.0])).tolist() == [2, 0, 1]


def run(data, index, lr, params=PARAMS):
    step = gd.make_step(linear_loss)
    return gd.train(step, params, data, index, lr, record=("params", "lr"))


@pytest.mark.parametrize("chunk_size", ["auto", 1, 2])
def test_influence_is_its_definition(chunk_size):
    data, target = linear_data(7, 5, 3), linear_data(8, 2, 3)
    index = gd.sample_batches(gd.random.key(0), 5, 2, 4)
    lrs = torch.tensor([0.1, 0.2, 0.05, 0.1], dtype=torch.float64)
    _, trajectory = run(data, index, lrs)
    everywhere, met, on_itself, itself_met = torch.zeros(4, 5, dtype=torch.float64)
    for t, (row, lr) in enumerate(zip(index.tolist(), lrs.tolist(), strict=True)):
        params = {name: leaf[t] for name, leaf in trajectory.params.items()}
        g, h = matrix(linear_loss, params, data), matrix(linear_loss, params, target).mean(0)
        for i in range(5):
            everywhere[i] += lr * g[i] @ h
            on_itself[i] += lr * g[i] @ g[i]
        for i in row:
            met[i] += lr / 2 * g[i] @ h
            itself_met[i] += lr / 2 * g[i] @ g[i]
    options = {"chunk_size": chunk_size}
    close(S.influence(linear_loss, trajectory.params, lrs, data, target, **options), everywhere)
    close(S.influence(linear_loss, trajectory.params, lrs, data, target, index=index, **options), met)
    close(S.self_influence(linear_loss, trajectory.params, lrs, data, **options), on_itself)
    close(S.self_influence(linear_loss, trajectory.params, lrs, data, index=index, **options), itself_met)


def test_influence_adds_up_to_what_the_run_gained():
    data, target = linear_data(9, 12, 3), linear_data(9, 40, 3)
    index = gd.epoch_batches(gd.random.key(1), 12, 4, 5)
    start = linear_loss(PARAMS, target)
    errors = []
    for lr in (1e-3, 1e-4):
        final, trajectory = run(data, index, lr)
        gained = start - linear_loss(final, target)
        traced = S.influence(linear_loss, trajectory.params, lr, data, target, index=index).sum()
        errors.append(float((traced - gained).abs() / gained))
    assert errors[0] < 0.02
    assert errors[1] < errors[0] / 8  # of first order in lr


def test_influence_is_vmapped_over_targets():
    data, targets = linear_data(10, 5, 3), linear_data(11, 3, 3)
    _, trajectory = run(data, gd.full_batch(5, 3), 0.1)

    def on(target):
        alone = tuple(leaf[None] for leaf in target)
        return S.influence(linear_loss, trajectory.params, 0.1, data, alone)

    table = vmap(on)(targets)
    assert table.shape == (3, 5)
    close(table.mean(0), S.influence(linear_loss, trajectory.params, 0.1, data, targets))


def test_influence_needs_a_learning_rate_for_every_point_of_the_path():
    data = linear_data(10, 5, 3)
    _, trajectory = run(data, gd.full_batch(5, 3), 0.1)
    with pytest.raises(ValueError, match="3"):
        S.self_influence(linear_loss, trajectory.params, torch.full((2,), 0.1), data)


CLOUD = normal(12, 8, 2)
AWAY = torch.tensor([3.0, 1.0], dtype=torch.float64)


def recorded(backend="eager", lr=0.1):
    noise = gd.reduce_per_sample(center_loss, S.spread())
    step = gd.make_step(center_loss, gd.momentum(0.5))
    return gd.train(
        step,
        step.init(AWAY),
        CLOUD,
        gd.epoch_batches(gd.random.key(2), 8, 4, 3),
        lr,
        record={"params": "params", "spread": lambda state, loss: noise(state.params, CLOUD)[0]},
        every=2,
        backend=backend,
    )[1]


@pytest.mark.long
@pytest.mark.parametrize("backend", ["eager", *COMPILED])
def test_a_run_records_its_spread(backend):
    trajectory = recorded(backend)
    spread = trajectory.spread
    assert {leaf.shape for leaf in spread} == {(3,)}
    for t in range(3):
        alone = spread_of(center_loss, trajectory.params[t], CLOUD)
        close(S.noise_scale(spread)[t], S.noise_scale(alone))
        close(S.inner_product_test(spread).batch_size[t], S.inner_product_test(alone).batch_size)
    assert S.norm_test(spread).passed.shape == (3,)


def test_a_sweep_records_the_spread_of_its_members():
    lrs = torch.tensor([0.05, 0.1], dtype=torch.float64)
    swept = vmap(lambda lr: recorded(lr=lr).spread)(lrs)
    for i, lr in enumerate(lrs.tolist()):
        close(S.noise_scale(swept)[i], S.noise_scale(recorded(lr=lr).spread))


def test_the_noise_scale_can_be_differentiated():
    batch = linear_data(13, 6, 3)

    def scale(w):
        return S.noise_scale(spread_of(linear_loss, {**PARAMS, "w": w}, batch))

    assert_derivatives(scale, PARAMS["w"])


def test_nothing_is_written_and_nothing_shared():
    batch = linear_data(15, 4, 3)
    assert_pure(gd.reduce_per_sample(linear_loss, (S.spread(), S.gsnr(), S.cosines())), PARAMS, batch)


def test_one_sample_has_no_variance_also_by_factors():
    """Where rounding leaves a little of what is to be zero."""
    params, batch = {"w": normal(0, 40, 30).float()}, normal(1, 1, 40).float()

    def loss_fn(params, batch):
        return torch.tanh(batch @ params["w"]).square().mean()

    with pytest.warns(UserWarning, match="one sample"):
        spread, _ = gd.reduce_per_sample(loss_fn, gd.stats.spread())(params, batch)
    assert spread.variance.isnan()
    assert spread.along.isnan()
    assert gd.stats.noise_scale(spread).isnan()
