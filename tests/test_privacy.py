"""Clipping that holds for hostile data, noise of the stated size, Poisson plans, what accountants get."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import vmap

import gdfunc as gd
from gdfunc import testing as gt
from gdfunc.privacy import _private

from .assertions import assert_refused
from .references import (
    COMPILED,
    flat,
    gradients_one_by_one,
    linear_data,
    linear_loss,
    normal,
)

P = gd.privacy
PARAMS = {"w": normal(0, 3), "b": normal(1, 1)[0]}
KEY = gd.random.key(0)


def dot_loss(params, batch):
    """The gradient of sample i is batch[i], in two leaves."""
    a, b = batch
    return ((params["a"] * a).sum(1) + (params["b"] * b).sum((1, 2))).mean()


def zeros(dtype, wide=3):
    return {"a": torch.zeros(wide, dtype=dtype), "b": torch.zeros(2, 2, dtype=dtype)}


def bound(max_norm, dtype):
    return max_norm * (1 + 8 * torch.finfo(dtype).eps)


def clipped(params, batch, max_norm=1.0, loss_fn=dot_loss):
    return P.clipped_grad(loss_fn, max_norm, divisor=1.0)(params, batch)[0]


HOSTILE = [0.0, -0.0, 1.0, -3.0, 1e-40, 1e-30, 1e-8, 65504.0, 1e30, -1e30, 1e38]
WILD = [*HOSTILE, float("nan"), float("inf"), -float("inf")]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def rows(values, count):
    return st.lists(st.lists(st.sampled_from(values), min_size=7, max_size=7), min_size=count, max_size=4)


def as_batch(entries, dtype):
    x = torch.tensor(entries, dtype=torch.float64).reshape(-1, 7).to(dtype)
    return x[:, :3], x[:, 3:].reshape(-1, 2, 2)


@pytest.mark.long
@given(entries=rows(HOSTILE, 1), dtype=st.sampled_from(DTYPES), max_norm=st.sampled_from([1e-3, 1.0, 7.0]))
def test_every_sample_is_clipped_to_its_bound(entries, dtype, max_norm):
    for entry in entries:
        batch = as_batch([entry], dtype)
        got = flat(clipped(zeros(dtype), batch, max_norm))
        assert got.norm() <= bound(max_norm, dtype)
        x = torch.cat([leaf.double().flatten() for leaf in batch])
        if x.isfinite().all() and x.norm() < 1e37 * max_norm:
            expected = x * min(1.0, max_norm / max(float(x.norm()), 1e-300))
            assert (got - expected).abs().max() <= 8 * torch.finfo(dtype).eps * max_norm


def test_a_factor_that_would_round_up_is_zero():
    """1e-6/2.8e38 lies between two subnormal numbers, the nearer a sixth above."""
    got = clipped(zeros(torch.float32), as_batch([[2.8e38, 0, 0, 0, 0, 0, 0]], torch.float32), 1e-6)
    assert flat(got).norm() <= bound(1e-6, torch.float32)


@pytest.mark.long
@given(entries=rows(WILD, 2), dtype=st.sampled_from(DTYPES))
def test_one_sample_more_moves_the_sum_by_its_bound_at_most(entries, dtype):
    batch = as_batch(entries, dtype)
    fewer = tuple(leaf[:-1] for leaf in batch)
    reduced = [_private.clipped_sums(dot_loss, zeros(dtype), b, 1.0, {})[0] for b in (batch, fewer)]
    moved = flat(reduced[0]) - flat(reduced[1])
    wide = torch.promote_types(dtype, torch.float32)
    assert moved.norm() <= bound(1.0, wide) + len(entries) * torch.finfo(wide).eps


@pytest.mark.long
@given(entries=rows(WILD, 2), dtype=st.sampled_from(DTYPES), chunk_size=st.sampled_from([None, 1]))
def test_what_is_not_finite_adds_exactly_zero(entries, dtype, chunk_size):
    batch = as_batch(entries, dtype)
    finite = torch.cat([leaf.flatten(1) for leaf in batch], 1).isfinite().all(1)
    zeroed = tuple(
        torch.where(finite.view(-1, *[1] * (leaf.ndim - 1)), leaf, torch.zeros_like(leaf)) for leaf in batch
    )
    gradients = P.clipped_grad(dot_loss, 1.0, divisor=1.0, chunk_size=chunk_size)
    got, expected = gradients(zeros(dtype), batch)[0], gradients(zeros(dtype), zeroed)[0]
    assert torch.equal(flat(got), flat(expected))
    assert flat(got).isfinite().all()


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_long_gradient_keeps_its_bound(dtype):
    """torch's own norm is off by hundreds of roundings here."""
    size = 5_000_000
    batch = (0.5 + normal(0, 1, size, dtype=dtype).abs(), torch.zeros(1, 2, 2, dtype=dtype))
    got = clipped(zeros(dtype, size), batch)["a"]
    squares = got.double().square()
    assert math.sqrt(math.fsum(squares.tolist())) == pytest.approx(1, rel=8 * torch.finfo(dtype).eps)


def cancelling(seed, features):
    """Three terms whose sum is rounding: x·e₁ + x·e₂ − x·(e₁ + e₂)."""
    first, second = 1e15 * normal(seed, 2, features, dtype=torch.float32)
    return torch.stack([first, second, -(first + second)])[None]


def words(params, batch):
    index, e = batch
    return (params["w"][index] * e).sum((1, 2)).mean()


def positions(params, batch):
    x, e = batch
    return ((x @ params["w"]) * e).sum((1, 2)).mean()


def twice(params, batch):
    x, e = batch
    return sum(((x[:, t] @ params["w"]) * e[:, t]).sum(1) for t in range(3)).mean()


@pytest.mark.parametrize("loss_fn", [positions, twice, words])
def test_what_cancels_within_a_sample_is_clipped_as_it_is_summed(loss_fn):
    params = {"w": torch.zeros(40, 40)}
    x = 1e15 * normal(0, 40, dtype=torch.float32).expand(1, 3, 40)
    batch = (torch.full((1, 3), 7) if loss_fn is words else x, cancelling(1, 40))
    assert gd.reducers.explain(loss_fn)(params, batch)["params['w']"].startswith("factors")
    got = flat(clipped(params, batch, 1.0, loss_fn))
    assert got.norm() <= bound(1.0, torch.float32)


MODULES = {
    "linear": (lambda: nn.Linear(9, 8), (9,)),
    "several positions": (lambda: nn.Linear(16, 12), (2, 16)),
    "convolution": (lambda: nn.Conv2d(6, 8, 3, padding=1), (6, 3, 3)),
    "two layers": (lambda: nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 7)), (9,)),
}


def module_case(name):
    build, shape = MODULES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        apply, params, _ = gd.modules.functional(build().double())
    return lambda p, x: (torch.sin(apply(p, x)) ** 2).flatten(1).sum(1).mean(), params, normal(3, 5, *shape)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("chunk_size", ["auto", 2])
def test_clipped_sums_are_those_of_gradients_one_by_one(name, chunk_size):
    loss_fn, params, batch = module_case(name)
    each = gradients_one_by_one(loss_fn, params, batch)
    limits = {key: 0.1 * (i + 1) for i, key in enumerate(params)}
    total, by_leaf = torch.zeros(()), torch.zeros(())
    for g in each:
        total = total + flat(g) * min(1, 0.3 / float(flat(g).norm()))
        shrunk = {key: leaf * min(1, limits[key] / float(leaf.norm())) for key, leaf in g.items()}
        by_leaf = by_leaf + flat(shrunk)
    for max_norm, expected in [(0.3, total), (limits, by_leaf)]:
        gradients = P.clipped_grad(loss_fn, max_norm, divisor=4.0, chunk_size=chunk_size)
        got, loss = gradients(params, batch)
        torch.testing.assert_close(flat(got), expected / 4, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(loss, loss_fn(params, batch) * 5 / 4)


def test_a_gradient_within_the_bound_keeps_its_bits():
    batch = as_batch([[0.1, -0.2, 0.3, 0.0, 0.1, 0.0, 0.2]], torch.float32)
    got = clipped(zeros(torch.float32), batch)
    assert torch.equal(got["a"], batch[0][0])
    assert torch.equal(got["b"], batch[1][0])


@pytest.mark.parametrize("padded", [False, True])
def test_an_empty_batch_succeeds(padded):
    batch = linear_data(0, 4, 3)
    empty = gd.take(P.pad(batch), torch.tensor([4, 4, 4])) if padded else tuple(leaf[:0] for leaf in batch)
    grads, loss = P.clipped_grad(linear_loss, 1.0, divisor=2.0)(PARAMS, empty)
    assert not flat(grads).any()
    assert loss == 0
    step = private_step(noise_multiplier=1.0)
    state, loss = step(step.init(PARAMS), empty, 0.1)
    assert flat(state.params).isfinite().all()
    assert not torch.equal(flat(state.params), flat(PARAMS))  # noise is added all the same


def test_nobody_adds_nothing_and_changes_no_divisor():
    data = linear_data(0, 6, 3)
    gradients = P.clipped_grad(linear_loss, 0.5, divisor=8.0)
    padded = gd.take(P.pad(data), torch.tensor([1, 3, 4, 6, 6]))
    got, loss = gradients(PARAMS, padded)
    expected, expected_loss = gradients(PARAMS, gd.take(data, torch.tensor([1, 3, 4])))
    torch.testing.assert_close(flat(got), flat(expected), rtol=1e-12, atol=0)
    torch.testing.assert_close(loss, expected_loss)
    double = P.clipped_grad(linear_loss, 0.5, divisor=16.0)(PARAMS, padded)[0]
    torch.testing.assert_close(flat(double), flat(got) / 2, rtol=1e-15, atol=0)


# Noise.


def private_step(loss_fn=linear_loss, transform=None, **options):
    settings = {"key": KEY, "max_norm": 0.5, "noise_multiplier": 0.0, "divisor": 2.0} | options
    return P.make_private_step(loss_fn, *([transform] if transform else []), **settings)


def sum_loss(params, x):
    return sum((leaf.flatten()[0] * x).sum() for leaf in params.values())


MANY = {"a": torch.zeros(200_000, dtype=torch.float64), "b": torch.zeros(400, 250, dtype=torch.float64)}


@pytest.mark.long
@pytest.mark.parametrize("max_norm", [{"a": 0.3, "b": 0.4}, P.Quantile(start=0.5)])
def test_the_noise_has_its_size_and_no_other(max_norm):
    """With one number for max_norm: the kit's law, in test_kit_draws."""
    nobody = gd.take(P.pad(torch.zeros(1, 2, dtype=torch.float64)), torch.tensor([1]))

    def draw(seed):
        options = {"max_norm": max_norm, "noise_multiplier": 1.3, "divisor": 40.0}
        step = private_step(sum_loss, key=gd.random.key(seed), **options)
        return flat(step(step.init(MANY), nobody, 1.0)[0].params)

    share = 1.3 / (2 * 40 / 20) if isinstance(max_norm, P.Quantile) else 0.0
    gt.check_noise(draw, 1.3 * 0.5 / 40 / math.sqrt(1 - share**2))


def test_a_step_is_the_clipped_gradient_and_noise_through_its_transformation():
    batch, transform = linear_data(2, 6, 3), gd.adam()
    step = private_step(transform=transform, noise_multiplier=0.7)
    quiet = private_step(transform=transform)
    state = step.init(PARAMS)
    grads, _ = P.clipped_grad(linear_loss, 0.5, divisor=2.0)(PARAMS, batch)
    updates, _ = transform.update(grads, transform.init(PARAMS), PARAMS)
    expected = gd.apply_updates(PARAMS, updates, 0.1)
    torch.testing.assert_close(quiet(state, batch, 0.1)[0].params, expected, rtol=1e-12, atol=0)
    _, _, noisy = step.advance(state, batch, 0.1)
    nobody = tuple(leaf[:0] for leaf in batch)
    _, _, noise = step.advance(state, nobody, 0.1)
    torch.testing.assert_close(flat(noisy), flat(grads) + flat(noise), rtol=1e-12, atol=1e-15)


def test_a_plan_shows_its_gap_to_unpadded_data():
    data, step = linear_data(3, 5, 3), private_step()
    plan = P.poisson_batches(gd.random.key(5), 5, 0.3, 6)
    with pytest.raises(IndexError, match="samples 0 to 4"):
        gd.train(step, step.init(PARAMS), data, plan.index, 0.1)


DATA = P.pad(linear_data(3, 20, 3))


def run(key, backend="eager", noise_multiplier=0.5):
    step = private_step(key=key, noise_multiplier=noise_multiplier)
    index = P.poisson_batches(gd.random.fold_in(key, 9), 20, 0.3, 6).index
    final, _ = gd.train(step, step.init(PARAMS), DATA, index, 0.1, backend=backend, record=("grad_norm",))
    return flat(final.params)


def test_runs_are_vmapped_over_keys_and_noise():
    keys, sigmas = gd.random.split(KEY, 2), torch.tensor([0.5, 1.0], dtype=torch.float64)
    swept = vmap(lambda key, sigma: run(key, noise_multiplier=sigma))(keys, sigmas)
    for got, key, sigma in zip(swept, keys, sigmas.tolist(), strict=True):
        torch.testing.assert_close(got, run(key, noise_multiplier=sigma), rtol=1e-12, atol=1e-14)


@pytest.mark.long
@pytest.mark.parametrize("backend", COMPILED)
def test_a_compiled_run_is_the_run(backend):
    torch.testing.assert_close(run(KEY, backend), run(KEY), rtol=1e-9, atol=1e-12)


# The clipping norm that follows a quantile.


@given(seed=st.integers(0, 2**20), quantile=st.floats(0, 1), lr=st.floats(0, 1))
def test_the_norm_moves_by_its_formula(seed, quantile, lr):
    x = normal(seed, 6, 2)
    x[4] = torch.nan  # counts as clipped
    step = private_step(
        lambda w, x: (w * x).sum(1).mean(), max_norm=P.Quantile(1.2, quantile, lr), divisor=5.0
    )
    state, _ = step(step.init(torch.zeros(2, dtype=torch.float64)), x, 0.1)
    noise = gd.random.normal(gd.random.fold_in(KEY, 0), (3,), torch.float64)[-1]
    counted = sum((0.5 if row.norm() <= 1.2 else -0.5) for row in x) + 5.0 / 20 * noise
    share = 0.5 + counted / 5.0
    torch.testing.assert_close(state.max_norm, 1.2 * torch.exp(-lr * (share - quantile)))


@pytest.mark.long
def test_the_norm_finds_the_quantile():
    x = normal(0, 500, 2)
    step = private_step(
        lambda w, x: (w * x).sum(1).mean(),
        max_norm=P.Quantile(0.01, 0.8),
        noise_multiplier=1.0,
        divisor=0.5 * 500,
    )
    index = P.poisson_batches(gd.random.key(1), 500, 0.5, 150).index
    state = step.init(torch.zeros(2, dtype=torch.float64))
    final, _ = gd.train(step, state, P.pad(x), index, 0.01)
    share = (x.norm(dim=1) <= final.max_norm).double().mean()
    assert 0.72 < share < 0.88


def test_the_count_of_the_unclipped_takes_its_share_of_the_privacy():
    adaptive = _private._checked_quantile(P.Quantile(1.0, noise=3.0), 1.1, 50.0)
    own = _private._sigma_of_sum(1.1, adaptive)
    assert own**-2 + (2 * 3.0) ** -2 == pytest.approx(1.1**-2)
    with pytest.raises(ValueError, match=r"max_norm.noise must be more than half of noise_multiplier"):
        private_step(max_norm=P.Quantile(1.0, noise=0.5), noise_multiplier=1.0)


# Plans.


@given(
    seed=st.integers(0, 2**20),
    n=st.integers(1, 40),
    rate=st.floats(0.01, 1.0),
    first=st.integers(0, 3),
    steps=st.integers(0, 5),
)
def test_a_plan_draws_everyone_or_nobody(seed, n, rate, first, steps):
    key = gd.random.key(seed)
    whole = P.poisson_batches(key, n, rate, first + steps)
    part = P.poisson_batches(key, n, rate, range(first, first + steps))
    assert torch.equal(whole.index[first:], part.index)
    assert part.rate == rate
    for row in part.index.tolist():
        drawn = [i for i in row if i < n]
        assert drawn == sorted(set(drawn))
        assert row == drawn + [n] * (len(row) - len(drawn))
    if rate == 1.0:
        assert all(row == list(range(n)) for row in whole.index.tolist())


def test_the_chance_is_the_rate_to_the_last_digit():
    """Draws in float32 would be off by a tenth at a rate of 1e-6."""
    u = gd.random.uniform(gd.random.fold_in(KEY, 0), (100,), torch.float64)
    for rate in (float(u[3]), float(u[3]) + 2**-52):
        row = P.poisson_batches(KEY, 100, rate, 1, max_batch=100).index[0]
        assert [i for i in row.tolist() if i < 100] == [i for i in range(100) if u[i] < rate]


@pytest.mark.parametrize("rate", [0.003, 0.04, 0.5])
def test_everyone_is_drawn_with_the_rate_and_independently(rate):
    n, steps = 200, 4000
    index = P.poisson_batches(gd.random.key(3), n, rate, steps).index
    present = torch.zeros(steps, n + 1, dtype=torch.float64).scatter_(1, index, 1.0)[:, :n]
    error = 6 * math.sqrt(rate * (1 - rate) / (n * steps))
    assert abs(float(present.mean()) - rate) < error
    sizes, expected = present.sum(1), n * rate * (1 - rate)
    assert abs(float(sizes.var()) / expected - 1) < 6 * math.sqrt((2 + 1 / expected) / steps)
    per_sample = present.sum(0)
    assert abs(float(per_sample.var()) / (steps * rate * (1 - rate)) - 1) < 6 * math.sqrt(2.2 / n)
    between = (present[1:] * present[:-1]).mean()
    assert abs(float(between) - rate**2) < 6 * math.sqrt(3 * rate**2 / (n * steps))


def tail(n, rate, size):
    """P(more than size of n), by its definition."""
    logs = [
        math.lgamma(n + 1)
        - math.lgamma(k + 1)
        - math.lgamma(n - k + 1)
        + k * math.log(rate)
        + (n - k) * math.log1p(-rate)
        for k in range(size + 1, n + 1)
    ]
    return math.fsum(math.exp(log) for log in logs)


@given(n=st.integers(1, 2000), rate=st.floats(1e-4, 0.999))
def test_a_row_is_wide_enough_but_not_much_wider(n, rate):
    size = P.poisson_batches(KEY, n, rate, 0).index.shape[1]
    assert tail(n, rate, size) <= 1e-12
    assert size == 1 or tail(n, rate, size - 2) > 1e-16


def test_a_batch_that_does_not_fit_is_refused():
    sizes = (P.poisson_batches(KEY, 100, 0.03, range(10, 60)).index < 100).sum(1)
    late, most = int(sizes.argmax()) + 10, int(sizes.max())
    assert most > 5
    with pytest.raises(
        ValueError, match=f"the batch of step {late} has {most} samples, over max_batch = 5; raise"
    ):
        P.poisson_batches(KEY, 100, 0.03, range(10, 60), max_batch=5)
    assert P.poisson_batches(KEY, 100, 0.03, range(10, 60), max_batch=most).index.shape == (50, most)
    index = vmap(lambda key: P.poisson_batches(key, 10, 0.9, 3, max_batch=2).index)(gd.random.split(KEY, 2))
    assert index.shape == (2, 3, 2)
    assert (index < 10).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: P.poisson_batches(KEY, 0, 0.1, 3), "n must be an int"),
        (lambda: P.poisson_batches(KEY, 5, 0.0, 3), r"rate must be a finite number in \(0, 1\]"),
        (lambda: P.poisson_batches(KEY, 5, 1.5, 3), "rate must be"),
        (lambda: P.poisson_batches(KEY, 5, float("nan"), 3), "rate must be"),
        (lambda: P.poisson_batches(KEY, 5, torch.tensor(0.5), 3), "rate must be a number"),
        (lambda: P.poisson_batches(KEY, 5, 0.1, -1), "steps must be"),
        (lambda: private_step(max_norm=0.0), "max_norm must be"),
        (lambda: private_step(max_norm={"w": 1.0, "b": -1.0}), r"max_norm\['b'\] must be"),
        (lambda: private_step(max_norm={}), "max_norm must be"),
        (lambda: private_step(max_norm=P.Quantile(0.0)), "must be a finite number"),
        (lambda: private_step(max_norm=P.Quantile(1.0, 1.5)), "max_norm.quantile must be"),
        (lambda: private_step(max_norm=P.Quantile(1.0, 0.5, -1.0)), "max_norm.lr must be"),
        (lambda: private_step(noise_multiplier=-1.0), "noise_multiplier must be"),
        (lambda: private_step(noise_multiplier=float("inf")), "noise_multiplier must be"),
        (lambda: private_step(divisor=0.0), "divisor must be"),
        (lambda: private_step(chunk_size=0), "chunk_size must be"),
        (lambda: private_step(key=3), "TypeError: key must be an int64 tensor"),
        (lambda: P.pad(torch.ones(0, 3)), "data must have leaves"),
        (lambda: P.pad((torch.ones(2), torch.ones(3))), "data must have leaves"),
        (lambda: P.pad(None), "data must have leaves"),
        (lambda: P.pad(torch.tensor(1.0)), "data must have leaves"),
        (lambda: P.pad(P.pad(torch.zeros(4))), "padded already"),
    ],
)
def test_plans_steps_and_pads_refuse_what_is_out_of_range(call, message):
    assert_refused(call, message)


def test_a_step_refuses_norms_of_another_tree():
    step = private_step(max_norm={"w": 1.0})
    with pytest.raises(ValueError, match="max_norm does not have the structure of params"):
        step(step.init(PARAMS), linear_data(0, 4, 3), 0.1)


# Accounting.


def test_a_history_is_of_poisson_plans_alone():
    plan = P.poisson_batches(KEY, 50, 0.04, 2)
    assert P.history(plan, 1.5) == [(1.5, 0.04, 2)]
    for other in (gd.epoch_batches(KEY, 50, 2, 1), plan.index, None):
        with pytest.raises(TypeError, match="not shuffled or hand-made batches"):
            P.history(other, 1.5)
    for sigma in (0.0, float("nan"), torch.tensor(1.5)):
        with pytest.raises(ValueError, match="noise_multiplier must be"):
            P.history(plan, sigma)


def test_no_epsilon_is_reported():
    names = {*vars(gd), *(name for room in (gd.privacy, gd.stats) for name in vars(room))}
    assert not [name for name in names if "epsilon" in name.lower() or name.lower() == "eps"]
    assert "not a cryptographic generator" in " ".join(P.__doc__.split())


@pytest.mark.filterwarnings("ignore")
def test_the_published_epsilon_follows_from_the_history():
    accountants = pytest.importorskip("opacus.accountants")
    accountant = accountants.RDPAccountant()
    accountant.history = P.history(P.poisson_batches(KEY, 50, 0.04, 2250), 1.5)
    assert accountant.get_epsilon(delta=1e-5) == pytest.approx(7.32911, abs=5e-6)


@pytest.mark.filterwarnings("ignore")
def test_dp_accounting_reads_the_history_alike():
    dp = pytest.importorskip("dp_accounting")
    rdp = pytest.importorskip("dp_accounting.rdp")
    ((sigma, rate, steps),) = P.history(P.poisson_batches(KEY, 50, 0.04, 2250), 1.5)
    taken = dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(sigma))
    accountant = rdp.RdpAccountant().compose(dp.SelfComposedDpEvent(taken, steps))
    # Its bound at orders that are no whole numbers is another one, by 2e-4 here.
    assert accountant.get_epsilon(1e-5) == pytest.approx(7.32911, abs=5e-4)


@pytest.mark.filterwarnings("ignore")
def test_clipped_gradients_are_those_of_opacus():
    grad_sample = pytest.importorskip("opacus.grad_sample")
    optimizers = pytest.importorskip("opacus.optimizers")
    for name in MODULES:
        small, params, batch = module_case(name)

        def loss_fn(params, batch, small=small):
            return 1e6 * small(params, batch)  # for Opacus adds 1e-6 to norms

        with torch.random.fork_rng():
            module = MODULES[name][0]().double()
        module.load_state_dict(params)
        wrapped = grad_sample.GradSampleModule(module, loss_reduction="sum")
        (1e6 * torch.sin(wrapped(batch)) ** 2).sum().backward()
        max_norm = float(
            torch.stack([flat(g).norm() for g in gradients_one_by_one(loss_fn, params, batch)]).median()
        )
        optimizer = optimizers.DPOptimizer(
            torch.optim.SGD(wrapped.parameters(), lr=1.0),
            noise_multiplier=0.0,
            max_grad_norm=max_norm,
            expected_batch_size=4,
            loss_reduction="mean",
        )
        optimizer.pre_step()
        got, _ = P.clipped_grad(loss_fn, max_norm, divisor=4.0)(params, batch)
        for key, parameter in module.named_parameters():
            torch.testing.assert_close(got[key], parameter.grad, rtol=1e-10, atol=1e-10 * max_norm)


def test_a_plan_of_another_size_is_refused():
    """Its nobody would be a real sample."""
    plan = P.poisson_batches(KEY, n=4, rate=0.5, steps=3)
    assert len(P.pad(torch.zeros(4), plan).real) == 5
    for n in (3, 5):
        with pytest.raises(ValueError, match=f"plan is of 4 samples, but data has {n}"):
            P.pad(torch.zeros(n), plan)
    step = private_step(sum_loss)
    with pytest.raises(TypeError, match=r"got PoissonPlan; pass its \.index"):
        gd.train(step, step.init(MANY), P.pad(torch.zeros(4).double(), plan), plan, 0.1)
