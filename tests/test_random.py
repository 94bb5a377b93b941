"""Threefry against Random123's and JAX's published answers, and the laws of keys."""

import itertools
import json
import math
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import gdfunc as gd
from gdfunc._torch._operators import threefry_by_operators

from .assertions import assert_pure, assert_refused, assert_same_bits
from .references import COMPILED, ks_statistic
from .tables import needs_cuda

JAX = json.loads((Path(__file__).parent / "jax_random_vectors.json").read_text())["cases"]
seeds = st.integers(0, 2**64 - 1)
SEED = r"seed must be an int in \[0, 18446744073709551615\]"

# Salmon et al. 2011: the known-answer test vectors of Random123 for threefry2x32, 20 rounds.
RANDOM123 = [
    ((0x00000000, 0x00000000), (0x00000000, 0x00000000), (0x6B200159, 0x99BA4EFE)),
    ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
    ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
]


@pytest.mark.parametrize(("key", "counter", "answer"), RANDOM123)
def test_threefry_gives_the_published_answers(key, counter, answer):
    words = [torch.tensor(word) for word in counter]
    assert tuple(int(word) % 2**32 for word in gd.random._threefry(torch.tensor(key), *words)) == answer


CIPHER = torch.ops.gdfunc.threefry.default
words = st.integers(0, 2**32 - 1)


@given(st.tuples(words, words), st.lists(st.tuples(words, words), min_size=1, max_size=5))
def test_the_operator_is_the_cipher_of_plain_tensors_in_torchs_operators_too(key, counters):
    key, (high, low) = torch.tensor(key), torch.tensor(counters).unbind(-1)
    first, second = gd.random._threefry(key, high, low)  # of plain tensors, by NumPy
    counter = (high << 32) | low
    packed = (first.long() << 32) | (second.long() & 0xFFFFFFFF)
    assert_same_bits(CIPHER(*key, counter), packed)
    assert_same_bits(threefry_by_operators(*key, counter), packed)


@pytest.mark.long
def test_the_operator_keeps_torchs_contract_of_operators():
    key = gd.random.split(gd.random.key(3), 2)
    results = torch.library.opcheck(CIPHER, (key[:, None, 0], key[:, None, 1], torch.arange(3) + 2**40))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("axes", list(itertools.product((None, 0, -1), repeat=3))[1:])
def test_the_operator_maps_over_any_of_its_arguments(axes):
    shapes = ((4, 2), (2,), (3, 4, 2))  # of one member: they broadcast

    def argument(axis, shape):
        numbers = (torch.arange(5 * math.prod(shape)) * 7_919).reshape(5, *shape)
        return numbers[0] if axis is None else numbers.movedim(0, axis)

    tensors = list(map(argument, axes, shapes))
    mapped = vmap(CIPHER, in_dims=axes)(*tensors)
    for i in range(5):
        member = [
            leaf if axis is None else leaf.select(axis, i) for leaf, axis in zip(tensors, axes, strict=True)
        ]
        assert_same_bits(mapped[i], CIPHER(*member))


def test_a_traced_draw_is_a_few_operations():
    """Because a loop that draws is traced, derived and compiled operation by operation."""
    graph = make_fx(lambda key: gd.random.normal(key, (3,)))(gd.random.key(0)).graph
    called = [node.target for node in graph.nodes if node.op == "call_function"]
    assert called.count(CIPHER) == 1
    assert len(called) < 50


@pytest.mark.parametrize("case", JAX, ids=lambda case: str(case["seed"]))
def test_draws_are_jax_draws(case):
    key = gd.random.key(case["seed"])
    assert key.tolist() == case["key"]
    assert gd.random.split(key, 3).tolist() == case["split3"]
    assert gd.random.fold_in(key, 7).tolist() == case["fold_in_7"]
    assert gd.random.fold_in(key, torch.tensor(7)).tolist() == case["fold_in_7"]
    assert gd.random.bits(key, (5,)).tolist() == case["bits_5"]
    assert gd.random.bits(key, (2, 3)).tolist() == case["bits_2x3"]
    assert gd.random.uniform(key, (4,)).tolist() == case["uniform_4"]
    assert gd.random.permutation(key, 10).tolist() == case["permutation_10"]
    assert gd.random.permutation(key, 1).tolist() == case["permutation_1"]
    assert gd.random.permutation(key, 100)[:10].tolist() == case["permutation_100_head"]
    assert gd.random.randint(key, (6,), 0, 10).tolist() == case["randint_0_10_6"]
    difference = gd.random.normal(key, (4,)).double() - torch.tensor(case["normal_4"], dtype=torch.float64)
    assert difference.abs().max() < 1e-6


# Computed with jax.random of jax 0.10.2 on CPU, as the file's: more than one round of sorting, wide ranges.
JAX_LARGE = [
    (0, [1571, 2451, 4994, 1518], [25507, 22822, 83409, 4660], [31327070, 89727305, 497208250]),
    (42, [3825, 3150, 2972, 2921], [38016, 96177, 32107, 32017], [1125294262, 1383865348, 780371120]),
]


@pytest.mark.parametrize(("seed", "order", "narrow", "wide"), JAX_LARGE)
def test_large_draws_are_jax_draws(seed, order, narrow, wide):
    key = gd.random.key(seed)
    assert gd.random.permutation(key, 5000)[:4].tolist() == order
    assert gd.random.randint(key, (4,), -5, 100_000).tolist() == narrow
    assert gd.random.randint(key, (4,), -7, 2_000_000_000)[:3].tolist() == wide


# Computed with jax.random.uniform(jax.random.key(42), (6,), dtype, minval, maxval) of jax 0.10.2 on CPU.
JAX_UNIFORM = [
    ("float16", 0, 1, [0.076171875, 0.1904296875, 0.9755859375, 0.7568359375, 0.44921875, 0.3076171875]),
    ("float16", 0.1, 0.7, [0.1456298828125, 0.2142333984375, 0.685546875, 0.55419921875, 0.36962890625]),
    ("float16", -3.3, 17.9, [-1.685546875, 0.73681640625, 17.390625, 12.75, 6.22265625, 3.220703125]),
    ("bfloat16", 0, 1, [0.6328125, 0.84375, 0.96875, 0.8359375, 0.078125, 0.84375]),
    ("bfloat16", 0.1, 0.7, [0.478515625, 0.60546875, 0.6796875, 0.6015625, 0.146484375, 0.60546875]),
    ("bfloat16", -3.3, 17.9, [10.0625, 14.5625, 17.25, 14.3125, -1.6484375, 14.5625]),
    ("float32", 0.1, 0.7, [0.3932257294654846, 0.507878303527832, 0.4697628915309906, 0.4366096258163452]),
    ("float32", -3.3, 17.9, [7.060642242431641, 11.111699104309082, 9.764955520629883, 8.59354019165039]),
]


@pytest.mark.parametrize(("dtype", "minval", "maxval", "values"), JAX_UNIFORM)
def test_uniform_has_the_bits_of_jax_in_every_narrow_dtype(dtype, minval, maxval, values):
    drawn = gd.random.uniform(gd.random.key(42), (6,), getattr(torch, dtype), minval, maxval)
    assert drawn[: len(values)].tolist() == values


def test_unbiased_integers_are_equally_likely_where_those_of_jax_are_not():
    span, count = 3 * 2**30, 30_000
    biased = gd.random.randint(gd.random.key(1), (count,), -5, span - 5)
    fair = gd.random.randint(gd.random.key(1), (count,), -5, span - 5, unbiased=True)
    shares = [torch.bincount((drawn + 5) // 2**30, minlength=3) / count for drawn in (biased, fair)]
    assert (shares[0] - torch.tensor([1 / 2, 1 / 4, 1 / 4])).abs().max() < 0.015  # five standard errors
    assert (shares[1] - 1 / 3).abs().max() < 0.014
    assert -5 <= int(fair.min()) <= int(fair.max()) < span - 5


@given(st.integers(0, 2**32 - 1), st.integers(1, 2**32), st.integers(0, 2**32 - 1))
def test_upper_word_of_a_product_is_exact(word, span, more):
    assert (
        int(gd.random._upper_word(torch.tensor(word), span, torch.tensor(more)))
        == (word * span + more) >> 32
    )


DRAWS = {
    "split": lambda key: gd.random.split(key, 3),
    "fold_in": lambda key: gd.random.fold_in(key, 5),
    "bits": lambda key: gd.random.bits(key, (2, 3)),
    "uniform": lambda key: gd.random.uniform(key, (4,), torch.float64, -2.0, 3.0),
    "normal": lambda key: gd.random.normal(key, (5,)),
    "randint": lambda key: gd.random.randint(key, (6,), -3, 4),
    "unbiased": lambda key: gd.random.randint(key, (6,), -3, 4, unbiased=True),
    "permutation": lambda key: gd.random.permutation(key, 17),
    "dropout": lambda key: gd.random.dropout(key, torch.ones(*np.shape(key)[:-1], 7), 0.25),
}


@pytest.mark.parametrize("name", DRAWS)
def test_vmap_over_keys_gives_the_single_draws(name):
    keys = gd.random.split(gd.random.key(1), 4)
    together = vmap(DRAWS[name])(keys)
    assert torch.equal(together, torch.stack([DRAWS[name](key) for key in keys]))


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("lead", [(4,), (2, 2), (1,), (0,)])
def test_many_keys_draw_as_each_does_alone(name, lead):
    keys = gd.random.split(gd.random.key(1), 4)[: math.prod(lead)].reshape(*lead, 2)
    together = assert_pure(DRAWS[name], keys)
    single = [DRAWS[name](key) for key in keys.reshape(-1, 2)]
    assert together.shape == (*lead, *DRAWS[name](gd.random.key(0)).shape)
    if single:
        assert_same_bits(together, torch.stack(single).reshape(together.shape))


@pytest.mark.parametrize("n", [0, 1, 2, 2**16 + 3])
def test_many_keys_draw_long_and_short_rows_as_each_does_alone(n):
    keys = gd.random.split(gd.random.key(2), 3)
    for draw in (gd.random.permutation, lambda key, n: gd.random.bits(key, (n,))):
        together = assert_pure(draw, keys, n)
        assert_same_bits(together, torch.stack([draw(key, n) for key in keys]))
        assert together.is_contiguous()  # so that no two entries share memory


def test_bounds_are_broadcast_to_the_draws_of_many_keys():
    keys, low = gd.random.split(gd.random.key(2), 3), torch.tensor([[0.0], [10.0], [20.0]])
    drawn = gd.random.uniform(keys, (4,), torch.float32, low, low + 1)
    for row, key, at in zip(drawn, keys, (0.0, 10.0, 20.0), strict=True):
        assert row.equal(gd.random.uniform(key, (4,), torch.float32, at, at + 1))


@pytest.mark.parametrize(
    ("keys", "numbers"),
    [((), (3, 2)), ((3,), ()), ((3,), (3,)), ((3, 1), (4,)), ((4,), (3, 1)), ((3,), (1,))],
)
def test_keys_and_numbers_are_folded_pair_by_pair(keys, numbers):
    key = gd.random.split(gd.random.key(4), math.prod(keys)).reshape(*keys, 2)
    data = torch.arange(math.prod(numbers)).reshape(numbers) + 5
    folded = gd.random.fold_in(key, data)
    shape = torch.broadcast_shapes(keys, numbers)
    pairs = zip(key.expand(*shape, 2).reshape(-1, 2), data.expand(shape).reshape(-1), strict=True)
    assert folded.shape == (*shape, 2)
    assert folded.reshape(-1, 2).equal(torch.stack([gd.random.fold_in(k, int(d)) for k, d in pairs]))


def test_a_0d_number_on_the_cpu_is_folded_into_a_key_on_any_device():
    """Because torch's own operators take it, and without values no kernel compares devices."""
    key = gd.random.key(0, device="meta")
    assert gd.random.fold_in(key, torch.tensor(3)).device == key.device
    with pytest.raises(RuntimeError, match="device"):
        CIPHER(*key, torch.arange(3))


@pytest.mark.parametrize("n", [0, 1, 2])
@pytest.mark.parametrize("axes", [(0, 1), (1, 0), (1, -1)])
def test_short_orders_are_mapped_along_any_axis(n, axes):
    keys = gd.random.split(gd.random.key(0), 12).reshape(3, 4, 2)
    wanted = gd.random.permutation(keys, n)
    mapped = vmap(vmap(lambda key: gd.random.permutation(key, n)), axes[0], axes[1])(keys)
    assert_same_bits(mapped.movedim(axes[1], axes[0]), wanted)


WIDE, UNIT = (torch.float64, torch.float32, torch.bfloat16), st.floats(0, 1)


@given(seeds, UNIT, st.sampled_from(WIDE))
def test_dropout_keeps_where_the_bits_are_not_below_p(seed, p, dtype):
    key, x = gd.random.key(seed), torch.arange(1, 13, dtype=dtype).reshape(3, 4)
    kept = gd.random.bits(key, (3, 4)) >= round(p * 2**32)
    expected = torch.where(kept, x * (1 / (1 - p)), 0) if p < 1 else torch.zeros_like(x)
    assert_same_bits(gd.random.dropout(key, x, p), expected.to(dtype))


def test_dropout_at_0_is_the_identity_and_near_1_keeps_what_it_must():
    key, x = gd.random.key(0), torch.ones(100, dtype=torch.float64)
    assert_same_bits(gd.random.dropout(key, x, 0.0), x)
    assert_same_bits(gd.random.dropout(key, x, 1), 0 * x)
    assert gd.random.dropout(key, x, 1 - 2**-53).isfinite().all()
    spoilt = gd.random.dropout(key, torch.full((100,), torch.nan), 0.5)
    assert spoilt.isnan().sum() + (spoilt == 0).sum() == 100
    assert 0 < spoilt.isnan().sum() < 100


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_a_share_and_the_mean(p):
    n = 200_000
    drawn = gd.random.dropout(gd.random.key(5), torch.ones(n, dtype=torch.float64), p)
    assert abs((drawn != 0).double().mean() - (1 - p)) < 6 * (p * (1 - p) / n) ** 0.5
    assert abs(drawn.mean() - 1) < 6 * (p / (1 - p) / n) ** 0.5
    assert set(drawn.unique().tolist()) == {0, 1 / (1 - p)}
    neighbours = ((drawn[1:] != 0) & (drawn[:-1] != 0)).double().mean()
    assert abs(neighbours - (1 - p) ** 2) < 6 / n**0.5


def test_row_i_of_a_mask_is_drawn_by_key_i():
    keys, x = gd.random.split(gd.random.key(6), 5), torch.ones(5, 2, 3)
    rows = torch.stack([gd.random.dropout(key, row, 0.5) for key, row in zip(keys, x, strict=True)])
    assert_same_bits(assert_pure(lambda *given: gd.random.dropout(*given, 0.5), keys, x), rows)
    assert_same_bits(vmap(lambda key, row: gd.random.dropout(key, row, 0.5))(keys, x), rows)
    both = gd.random.dropout(keys.reshape(5, 1, 2).expand(5, 2, 2), x, 0.5)
    assert_same_bits(both[:, 0], rows[:, 0])


def test_dropout_has_the_slope_of_its_mask():
    key, x = gd.random.key(7), torch.linspace(-1, 1, 20, dtype=torch.float64)
    slope = torch.func.grad(lambda x: gd.random.dropout(key, x, 0.25).sum())(x)
    assert_same_bits(slope, gd.random.dropout(key, torch.ones_like(x), 0.25))
    assert gd.random.dropout(key, x + 1j * x, 0.25).real.equal(gd.random.dropout(key, x, 0.25))


@pytest.mark.long
def test_a_compiled_loop_that_draws_has_the_derivatives_of_the_eager_one():
    def step(carry, count):
        key, w = carry
        key, now = gd.random.split(key)
        w = w - 0.1 * gd.random.dropout(now, w, 0.5) * gd.random.normal(key, (3,), torch.float64).sin()
        return (key, w[gd.random.permutation(gd.random.fold_in(now, count), 3)]), w.sum()

    def run(w, backend):
        (_, final), ys = gd.scan(step, (gd.random.key(2), w), torch.arange(9), backend=backend)
        return (final**2).sum() + ys.sum()

    def derivatives(backend):
        f = partial(run, backend=backend)
        return grad(f)(w), jvp(f, (w,), (w,))[1], vmap(grad(f))(torch.stack([w, 2 * w]))

    w = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    torch.testing.assert_close(derivatives("native"), derivatives("eager"), rtol=1e-12, atol=1e-12)


@pytest.mark.long
@pytest.mark.parametrize("backend", COMPILED)
def test_compiled_draws_have_the_same_bits(backend):
    keys, names = (
        gd.random.split(gd.random.key(1), 4),
        DRAWS if backend == "native" else ("bits", "normal", "dropout"),
    )
    draws = [DRAWS[name] for name in names]  # few for Inductor, which takes minutes for all
    _, drawn = gd.scan(lambda c, key: (c, [draw(key) for draw in draws]), None, keys, backend=backend)
    for got, draw in zip(drawn, draws, strict=True):
        assert torch.equal(got, torch.stack([draw(key) for key in keys]))


@needs_cuda
@pytest.mark.parametrize("name", DRAWS)
def test_draws_on_cuda_have_the_same_bits(name):
    key = gd.random.key(1)
    assert torch.equal(DRAWS[name](key.cuda()).cpu(), DRAWS[name](key))


@pytest.mark.parametrize("name", DRAWS)
def test_a_draw_leaves_its_key_alone(name):
    assert_pure(DRAWS[name], gd.random.key(1))


@pytest.mark.parametrize("size", [1, 2**16, 2**16 + 1, 200_003])
def test_bits_in_parts_are_those_of_their_counters(size):
    key, drawn = gd.random.key(3), gd.random.bits(gd.random.key(3), (size,))
    for at in {0, size // 2, 2**16 - 1, 2**16, size - 1} & set(range(size)):
        first, second = threefry(tuple(key.tolist()), (0, at))
        assert int(drawn[at]) == first ^ second


def threefry(key, counter):
    """Salmon et al. 2011, section 4.2, in Python's integers."""
    word, schedule = 2**32 - 1, (*key, key[0] ^ key[1] ^ 0x1BD11BDA)
    x, y = (counter[0] + key[0]) & word, (counter[1] + key[1]) & word
    for group in range(5):
        for rotation in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            x = (x + y) & word
            y = ((y << rotation) | (y >> (32 - rotation))) & word ^ x
        x = (x + schedule[(group + 1) % 3]) & word
        y = (y + schedule[(group + 2) % 3] + group + 1) & word
    return x, y


@given(seeds, st.integers(1, 2**17) | st.integers(1, 2**32))
def test_randint_is_the_64_bits_modulo_the_span_as_jax_folds_them(seed, span):
    key = gd.random.key(seed)
    high, low = (int(gd.random.bits(each)) for each in gd.random.split(key))
    factor = ((2**16 % span) ** 2 % 2**32) % span
    expected = (high % span * factor + low % span) % 2**32 % span
    assert int(gd.random.randint(key, (), 0, span)) == expected


def test_fold_in_maps_over_counts():
    key = gd.random.key(3)
    together = vmap(lambda count: gd.random.fold_in(key, count))(torch.arange(5))
    assert torch.equal(together, torch.stack([gd.random.fold_in(key, count) for count in range(5)]))
    assert torch.equal(gd.random.fold_in(key, torch.arange(5)), together)


def test_high_bits_of_the_seed_count():
    assert not torch.equal(gd.random.bits(gd.random.key(5)), gd.random.bits(gd.random.key(5 + 2**32)))


@given(seeds, st.integers(0, 60))
def test_permutation_is_one(seed, n):
    order = gd.random.permutation(gd.random.key(seed), n)
    assert order.dtype == torch.int64
    assert sorted(order.tolist()) == list(range(n))


@given(seeds, st.integers(-(2**62), 2**62), st.integers(1, 2**32))
def test_randint_stays_in_its_range(seed, minval, span):
    drawn = gd.random.randint(gd.random.key(seed), (20,), minval, minval + span)
    assert minval <= int(drawn.min())
    assert int(drawn.max()) < minval + span


@given(seeds, st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
def test_uniform_stays_in_the_unit_interval(seed, dtype):
    drawn = gd.random.uniform(gd.random.key(seed), (50,), dtype)
    assert drawn.dtype == dtype
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert gd.random.normal(gd.random.key(seed), (50,), dtype).isfinite().all()


@given(seeds)
def test_float64_uniform_uses_all_its_digits(seed):
    # 2⁵² u is an integer, and its low 20 bits are not all zero as they would be from 32 bits.
    scaled = (gd.random.uniform(gd.random.key(seed), (8,), torch.float64) * 2.0**52).to(torch.int64)
    assert (scaled % 2**20 != 0).any()


def test_uniform_draws_follow_their_distribution():
    """Normal draws, integers, permutations and plans: the kit's laws, in test_kit_draws."""
    sample = gd.random.uniform(gd.random.key(11), (100_000,))
    assert ks_statistic(sample, lambda u: u) < 2.8
    assert ks_statistic(sample * 1.04, lambda u: u) > 2.8  # the test can tell 4 per cent


def test_split_keys_do_not_collide():
    keys = gd.random.split(gd.random.key(0), 10**6)
    assert len(torch.unique(keys[:, 0] * 2**32 + keys[:, 1])) == 10**6


@pytest.mark.benchmark
def test_permutation_of_a_million_takes_under_a_second():
    key = gd.random.key(0)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        gd.random.permutation(key, 10**6)
        times.append(time.perf_counter() - started)
    assert sorted(times)[2] < 1


@pytest.mark.parametrize("name", DRAWS)
def test_what_is_no_key_is_refused(name):
    scalar = torch.tensor(2)
    for bad in (torch.zeros(2), torch.zeros(2, 3, dtype=torch.int64), scalar, 5, np.zeros(2)):
        assert_refused(
            lambda key=bad: DRAWS[name](key), r"TypeError: key must be .* \[2\] .* \[..., 2\]; got"
        )


ONE_KEY = {
    "epoch_batches": lambda key: gd.epoch_batches(key, n=4, batch_size=2, epochs=1),
    "sample_batches": lambda key: gd.sample_batches(key, n=4, batch_size=2, steps=1),
    "poisson_batches": lambda key: gd.privacy.poisson_batches(key, n=4, rate=0.5, steps=1),
    "random_like": lambda key: gd.tree.random_like(key, torch.ones(2)),
    "quadratic": lambda key: gd.problems.quadratic([1.0, 2.0], key=key),
}


@pytest.mark.parametrize("name", ONE_KEY)
def test_functions_of_one_key_refuse_many(name):
    ONE_KEY[name](gd.random.key(0))
    keys = gd.random.split(gd.random.key(0), 3)
    assert_refused(
        lambda: ONE_KEY[name](keys), r"TypeError: key must be an int64 tensor \[2\] .* shape \(3, 2\)"
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        *((lambda key, bad=bad: gd.random.key(bad), SEED) for bad in (-1, 2**64, 1.0, True, "0", None)),
        (lambda key: gd.random.split(key, -1), "num must be an int >= 0; got -1"),
        (lambda key: gd.random.fold_in(key, 2**32), "data must be an int in"),
        (
            lambda key: gd.random.fold_in(key, torch.ones(2)),
            "TypeError: data .* integers; got torch.float32",
        ),
        (
            lambda key: gd.random.fold_in(key, torch.ones(2, dtype=torch.int64, device="meta")),
            r"the key is on cpu, but data on meta: .* data.to\(key.device\)",
        ),
        (lambda key: gd.random.bits(key, (2, -1)), "a dimension of shape must be an int >= 0"),
        (lambda key: gd.random.normal(key, 3), r"TypeError: shape must be .* such as \(3,\); got 3"),
        (lambda key: gd.random.randint(key, (), 3, 3), "maxval must be an int in"),
        (lambda key: gd.random.randint(key, (), 0, 2**33), "maxval must be an int in"),
        (lambda key: gd.random.permutation(key, 2.0), "n must be an int >= 0; got 2.0"),
        (
            lambda key: gd.random.fold_in(gd.random.split(key, 3), torch.arange(2)),
            r"keys \[3, 2\] and data \[2\] do not broadcast: .* keys\[:, None\]",
        ),
        (
            lambda key: gd.random.dropout(gd.random.split(key, 3), torch.ones(2, 3), 0.5),
            r"keys \[3, 2\] need x \[3, ...\], a key for each row; got \[2, 3\]",
        ),
        (
            lambda key: gd.random.dropout(key, torch.arange(3), 0.5),
            "TypeError: x must be .*; got torch.int64",
        ),
        (lambda key: gd.random.dropout(key, 3.0, 0.5), "TypeError: x must be .*; got float"),
        *(
            (
                lambda key, p=p: gd.random.dropout(key, torch.ones(3), p),
                r"p must be a number in \[0, 1\]; got",
            )
            for p in (-0.1, 1.5, math.nan, True, "0.5", torch.tensor(0.5))
        ),
    ],
)
def test_bad_arguments_are_refused(call, message):
    assert_refused(lambda: call(gd.random.key(0)), message)
