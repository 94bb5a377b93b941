"""Plans that are never held: their laws, and runs by them."""

import itertools
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import vmap

import gdfunc as gd
from gdfunc import _lazy, random
from gdfunc import testing as gt

from .assertions import assert_refused, assert_same
from .references import linear_data, linear_loss, normal

KEY = gd.random.key(0)
seeds = st.integers(0, 2**64 - 1)
counts = st.integers(1, 3000)


def network(monkeypatch, rounds=_lazy._ROUNDS):
    """Let networks make all orders, also of few entries."""
    monkeypatch.setattr(_lazy, "_SORTED", 0)
    monkeypatch.setattr(_lazy, "_ROUNDS", rounds)


def entries(key, n, first, last):
    return _lazy._entries(n, first, last, key)


@given(seeds, counts)
def test_a_network_is_a_permutation_of_every_n(seed, n):
    with pytest.MonkeyPatch.context() as patch:
        network(patch)
        order = entries(gd.random.key(seed), n, 0, n)
        assert torch.equal(order.sort().values, torch.arange(n))
        half = n // 2
        assert torch.equal(entries(gd.random.key(seed), n, half, n), order[half:])


def backwards(key, n, x):
    """Send entries back through the network of a key: rounds in reverse, with differences for sums."""
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)

    def moved(at, read, size):
        words = random._threefry(key[None], torch.full_like(read, at), read)
        high, low = (word.numpy().astype(np.uint32).astype(object) for word in words)
        return torch.from_numpy(((high * 2**32 + low) * size // 2**64).astype(np.int64))

    def back(x):
        first, second = x // b, x % b
        for at in (7, 5, 3, 1):
            second = (second - moved(at, first, b)) % b
            first = (first - moved(at - 1, second, a)) % a
        return first * b + second

    x = back(x)
    while (x >= n).any():
        x = torch.where(x < n, x, back(x))
    return x


@pytest.mark.parametrize("n", [65_537, 10**8, 10**8 + 7, 2**33, 2**40 + 1, 2**48])
def test_entries_of_large_orders_lead_back_to_their_positions(n):
    for first in (0, n // 3, n - 500):
        order = entries(KEY, n, first, first + 500)
        assert order.min() >= 0
        assert order.max() < n
        assert order.max() > n // 2
        assert torch.equal(backwards(KEY, n, order), torch.arange(first, first + 500))


@pytest.mark.long
def test_a_walk_of_fixed_length_ends_where_the_other_does(monkeypatch):
    network(monkeypatch)
    orders = {n: entries(KEY, n, 0, n) for n in (2, 3, 5, 7, 11, 1000, 2999)}
    monkeypatch.setattr(_lazy, "has_values", lambda leaf: False)
    for n, order in orders.items():
        assert torch.equal(entries(KEY, n, 0, n), order)


def p_value(counted, expected):
    """The chance of a larger χ² if the expected counts are right, by Wilson and Hilferty's normal."""
    counted, expected = torch.as_tensor(counted).double(), torch.as_tensor(expected).double()
    square = ((counted - expected) ** 2 / expected).sum().item()
    freedom = expected.numel() - 1
    spread = 2 / (9 * freedom)
    z = ((square / freedom) ** (1 / 3) - 1 + spread) / math.sqrt(spread)
    return 0.5 * math.erfc(z / math.sqrt(2))


def test_all_orders_of_four_are_equally_likely_to_1e_9_if_the_words_are(monkeypatch):
    """Every pattern of ties among four words of 32 bits, with the exact chance of each."""
    chances = Counter()
    for ranks in itertools.product(range(4), repeat=4):
        distinct = len(set(ranks))
        if set(ranks) == set(range(distinct)):
            words = torch.tensor(ranks, dtype=torch.int32) + random._SIGN
            monkeypatch.setattr(random, "_words", lambda key, shape, words=words: (words, 0 * words))
            monkeypatch.setattr(random, "_split", lambda key, num: torch.stack([key, key]))
            order = tuple(entries(KEY, 4, 0, 4).tolist())
            chances[order] += Fraction(math.comb(2**32, distinct), 2**128)
    assert len(chances) == 24
    assert sum(chances.values()) == 1
    assert max(abs(chance - Fraction(1, 24)) for chance in chances.values()) < 1e-9


def orders_of(rows):
    """How often each order of four comes among rows [T, 4]."""
    places = {order: i for i, order in enumerate(itertools.permutations(range(4)))}
    code = torch.full((256,), -1)
    for order, i in places.items():
        code[sum(entry * 4**at for at, entry in enumerate(order))] = i
    return torch.bincount(code[(rows * 4 ** torch.arange(4)).sum(dim=1)], minlength=24)


@pytest.mark.long
def test_a_million_epochs_of_four_samples_have_all_orders_equally_often():
    plan = gd.lazy_batches(KEY, 4, 4, 10**6)
    assert p_value(orders_of(plan[:]), [10**6 / 24] * 24) > 1e-3


@pytest.mark.long
def test_a_network_on_four_entries_would_not(monkeypatch):
    """Exactly: 8 ideal rounds on ℤ₂ × ℤ₂ miss 1/24 by up to 1/1536."""
    chances = {(0, 1, 2, 3): Fraction(1)}
    for at in range(_lazy._ROUNDS):
        after = Counter()
        for order, chance in chances.items():
            for f in itertools.product((0, 1), repeat=2):
                moved = [x ^ 2 * f[x % 2] if at % 2 == 0 else x ^ f[x // 2] for x in order]
                after[tuple(moved)] += chance / 4
        chances = after
    assert max(abs(chance - Fraction(1, 24)) for chance in chances.values()) == Fraction(1, 1536)
    network(monkeypatch)
    rows = entries(gd.random.split(KEY, 10**6), 4, 0, 4)
    expected = [10**6 * float(chances[order]) for order in itertools.permutations(range(4))]
    assert p_value(orders_of(rows), expected) > 1e-3
    assert p_value(orders_of(rows), [10**6 / 24] * 24) < 1e-9


def shares(n, lag, rounds_key):
    """Counts of (sixteenth of the entry at p, sixteenth of that at p + lag), over many p, [256]."""
    size = 100_000
    first = entries(rounds_key, n, 0, size)
    second = entries(rounds_key, n, lag, lag + size)
    return torch.bincount((first * 16 // n) * 16 + second * 16 // n, minlength=256)


LAGS = {"next": 1, "next first digit": 3163, "far": 4_000_001}


@pytest.mark.long
@pytest.mark.parametrize("lag", LAGS)
def test_entries_at_two_places_are_as_good_as_independent(lag):
    n = 10**7
    for seed in range(3):
        counted = shares(n, LAGS[lag], gd.random.key(seed))
        assert p_value(counted, [100_000 / 256] * 256) > 1e-4


def test_two_rounds_would_show(monkeypatch):
    assert -(-(10**7) // (math.isqrt(10**7 - 1) + 1)) == LAGS["next first digit"] - 1 == 3162
    monkeypatch.setattr(_lazy, "_ROUNDS", 2)
    counted = shares(10**7, 3162, KEY)
    assert p_value(counted, [100_000 / 256] * 256) < 1e-12


sizes = st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n)))


@given(seeds, sizes, st.integers(0, 5), st.booleans(), st.sampled_from(["drop", "carry"]))
def test_rows_of_few_samples_are_those_of_epoch_batches(seed, size, epochs, shuffle, remainder):
    options = {"shuffle": shuffle, "remainder": remainder}
    plan = gd.lazy_batches(gd.random.key(seed), *size, epochs, **options)
    whole = gd.epoch_batches(gd.random.key(seed), *size, epochs, **options)
    assert plan.shape == whole.shape
    assert len(plan) == len(whole)
    assert torch.equal(plan[:], whole)


@pytest.mark.long
@given(
    seeds, sizes, st.sampled_from(["drop", "carry"]), st.sampled_from([True, False, "blocks"]), st.data()
)
def test_rows_are_the_same_however_they_are_read(seed, size, remainder, shuffle, draw):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_lazy, "_SORTED", draw.draw(st.sampled_from([60, 20, 7])))
        plan = gd.lazy_batches(gd.random.key(seed), *size, 4, remainder=remainder, shuffle=shuffle)
        whole = plan[:]
        assert whole.dtype == torch.int64
        assert whole.shape == plan.shape
        gt.check_epochs(whole, size[0], remainder=remainder)
        first = draw.draw(st.integers(0, len(plan)))
        last = draw.draw(st.integers(first, len(plan)))
        assert torch.equal(plan[first:last], whole[first:last])
        if first < len(plan):
            assert torch.equal(plan[first], whole[first])
            assert torch.equal(plan[first - len(plan)], whole[first])


def test_a_plan_is_a_sequence():
    plan = gd.lazy_batches(KEY, 10, 3, 2)
    assert [row.tolist() for row in plan] == plan[:].tolist()
    assert plan[4:2].shape == (0, 3)
    assert plan[torch.tensor(1)].tolist() == plan[1].tolist()
    with pytest.raises(IndexError):
        plan[6]
    assert eval(
        repr(plan).replace("[0, 0]", "KEY"), {"lazy_batches": gd.lazy_batches, "KEY": KEY}
    ).shape == (plan.shape)
    assert repr(gd.lazy_batches(KEY, 10, 3, 2, shuffle="blocks")).endswith(
        "shuffle='blocks', remainder='drop', block_size=10)"
    )
    assert torch.equal(plan.to("cpu")[:], plan[:])


PLANS = {
    "sorted": (70, 3, True),
    "network": (70_001, 30_000, True),
    "blocks": (70, 3, "blocks"),
    "many blocks": (70_001, 30_000, "blocks"),
}


@pytest.mark.parametrize("name", PLANS)
def test_plans_map_over_keys(name):
    n, batch_size, shuffle = PLANS[name]

    def rows(key):
        return gd.lazy_batches(key, n, batch_size, 3, shuffle=shuffle, remainder="carry")[1:4]

    keys = gd.random.split(KEY, 2)[torch.tensor([1, 0, 1, 1])]
    alone = torch.stack([rows(key) for key in keys])
    assert not torch.equal(alone[0], alone[1])
    assert torch.equal(vmap(rows)(keys), alone)
    assert torch.equal(vmap(vmap(rows))(keys.view(2, 2, 2)).flatten(0, 1), alone)
    if name == "sorted":
        assert torch.equal(torch.func.functionalize(vmap(rows))(keys), alone)
        assert torch.equal(gd.jit(vmap(rows))(keys), alone)


def outcomes_by_block(n, size):
    """The chance of each order by blocks of few rows."""
    chances, whole = Counter(), n // size
    inside = [*itertools.permutations(range(size))]
    cases = [
        [(start + row) % n for row in [*itertools.chain(*cut), *(whole * size + at for at in tail)]]
        for start in range(n)
        for blocks in itertools.permutations(range(whole))
        for within in itertools.product(inside, repeat=whole)
        for tail in itertools.permutations(range(n % size))
        for cut in [
            [[block * size + at for at in order] for block, order in zip(blocks, within, strict=True)]
        ]
    ]
    for case in cases:
        chances[tuple(case)] += Fraction(1, len(cases))
    return chances


@pytest.mark.long
@pytest.mark.parametrize(("n", "size"), [(4, 2), (5, 2), (4, 4), (7, 3)])
def test_orders_by_block_have_the_chances_of_random_starts_blocks_and_rows(n, size):
    chances, epochs = outcomes_by_block(n, size), 200_000
    rows = gd.lazy_batches(KEY, n, n, epochs, shuffle="blocks", block_size=size)[:]
    counted = Counter(map(tuple, rows.tolist()))
    assert counted.keys() <= chances.keys()
    expected = [epochs * float(chance) for chance in chances.values()]
    assert p_value([counted[order] for order in chances], expected) > 1e-3
    for place in range(n):
        at = Counter()
        for order, chance in chances.items():
            at[order[place]] += chance
        assert set(at.values()) == {Fraction(1, n)}


@pytest.mark.parametrize(("n", "size", "batch_size"), [(1000, 64, 100), (3001, 50, 70), (50, 50, 7)])
def test_two_rows_of_a_block_are_seen_fewer_than_a_block_apart(n, size, batch_size):
    plan = gd.lazy_batches(KEY, n, batch_size, 2, shuffle="blocks", block_size=size, remainder="carry")
    for order in plan[:].flatten()[: n * (len(plan) * batch_size // n)].view(-1, n):
        place = torch.empty_like(order)
        place[order] = torch.arange(n)
        # The block at the end of the epoch may be shorter; it begins where the other blocks end.
        cuts = [
            start
            for start in range(n)
            if (spread(place.roll(-start)[: n // size * size].view(-1, size)) < size).all()
        ]
        assert cuts
        starts = (order - cuts[0]) % n // size
        batches = starts[: n - n % batch_size].view(-1, batch_size)
        assert max(len(batch.unique()) for batch in batches) <= 1 + -(-(batch_size - 1) // size)


def spread(places):
    return places.max(dim=1).values - places.min(dim=1).values


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gd.lazy_batches(0, 4, 2, 1), "TypeError: key must be an int64 tensor"),
        (lambda: gd.lazy_batches(KEY, 0, 1, 1), r"n must be an int in \[1, 2814"),
        (lambda: gd.lazy_batches(KEY, 2**48 + 1, 1, 1), r"n must be an int in \[1, 2814"),
        (lambda: gd.lazy_batches(KEY, 4, 5, 1), r"batch_size must be an int in \[1, 4\]"),
        (lambda: gd.lazy_batches(KEY, 4, 2, range(2)), "epochs must be an int"),
        (lambda: gd.lazy_batches(KEY, 2**40, 2, 2**22), r"epochs · n must be below 2\^62"),
        (lambda: gd.lazy_batches(KEY, 4, 2, 1, remainder="keep"), "remainder must be"),
        (lambda: gd.lazy_batches(KEY, 4, 3, 1, remainder="error"), "3 does not divide n = 4: 1 samples"),
        (lambda: gd.lazy_batches(KEY, 4, 2, 1, shuffle="block"), "shuffle must be 'blocks'; got 'block'"),
        (lambda: gd.lazy_batches(KEY, 4, 2, 1, block_size=2), "block_size is for shuffle=.blocks."),
        (
            lambda: gd.lazy_batches(KEY, 4, 2, 1, shuffle="blocks", block_size=5),
            r"block_size must be an int in \[1, 4\]",
        ),
        (
            lambda: gd.lazy_batches(KEY, 2**40, 2, 1, shuffle="blocks", block_size=2),
            r"block_size 2 makes 549755813888 blocks, more than 2\^32",
        ),
        (lambda: gd.lazy_batches(KEY, 4, 2, 1)[::2], "a plan is read in steps of 1; got a step of 2"),
    ],
)
def test_plans_that_do_not_fit_are_refused(call, message):
    assert_refused(call, message)


PARAMS = {"w": normal(0, 3), "b": normal(1, 1)[0]}
DATA = linear_data(3, 40, 3)
each_backend = pytest.mark.parametrize("backend", ["eager", "native"])


def plan_of(shuffle=True, epochs=9, key=KEY, **options):
    return gd.lazy_batches(key, 40, 6, epochs, shuffle=shuffle, remainder="carry", **options)


def run(index, data=DATA, **options):
    step = gd.make_step(linear_loss, gd.adam())
    return gd.train(step, step.init(PARAMS), data, index, 0.05, **options)


BOUND = 0.9 * PARAMS["w"].norm()
OPTIONS = {
    "plain": {},
    "every": {"every": 4, "record": ("loss", "params")},
    "evaluate": {
        "evaluate": {"size": lambda carry: carry.params["w"].norm()},
        "evaluate_every": 8,
        "every": 2,
    },
    "stop": {"stop": lambda carry, loss: carry.params["w"].norm() < BOUND},
    "patience": {"stop": gd.stops.patience("loss", 4)},
    "finite": {"check_finite": "all"},
}


@pytest.mark.long
@each_backend
@pytest.mark.parametrize("name", OPTIONS)
def test_a_run_by_a_plan_that_is_not_held_is_that_by_its_rows(name, backend):
    for shuffle in (True, False, "blocks"):
        plan = plan_of(shuffle)
        by_plan, by_rows = (run(index, backend=backend, **OPTIONS[name]) for index in (plan, plan[:]))
        assert_same(by_plan, by_rows)
        if name == "stop":
            assert 1 < by_plan[1].steps < len(plan)


@each_backend
def test_a_run_asks_for_the_rows_of_its_segments_only(backend, monkeypatch):
    asked, rows = [], _lazy.LazyBatches._rows
    monkeypatch.setattr(
        _lazy.LazyBatches, "_rows", lambda self, *ends: asked.append(ends) or rows(self, *ends)
    )
    monkeypatch.setattr(gd._train._drive, "_SEGMENT_SECONDS", 0.0)
    run(plan_of(epochs=20), backend=backend)
    taken = [0, *(last for _, last in asked)]
    assert [first for first, _ in asked] == taken[:-1]
    assert taken[-1] == 20 * 40 // 6
    assert max(last - first for first, last in asked) <= 16


def test_a_plan_of_more_samples_than_the_data_is_refused():
    with pytest.raises(IndexError, match="index is a plan of n = 40 samples, but data has 39"):
        run(plan_of(), tuple(leaf[:39] for leaf in DATA))
    assert_same(run(plan_of(), tuple(torch.cat([leaf, leaf]) for leaf in DATA)), run(plan_of()))


@pytest.mark.long
@each_backend
def test_a_stopped_run_goes_on_to_the_same_bits_and_may_be_made_longer(backend, tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    monkeypatch.setattr(gd._train._drive, "_SEGMENT_SECONDS", 0.0)

    def end(done, total):
        if done >= 20:
            raise KeyboardInterrupt

    path, whole = tmp_path / "run", run(plan_of(), backend=backend)
    with pytest.raises(gd.TrainingInterrupted) as caught:
        run(plan_of(), backend=backend, progress=end, checkpoint_to=path)
    assert 0 < caught.value.step < len(plan_of())
    for other in (plan_of(key=gd.random.key(1)), plan_of("blocks"), plan_of("blocks", block_size=8)):
        with pytest.raises(gd.CheckpointError, match="its index is not that of this run"):
            run(other, backend=backend, checkpoint_to=path)
    assert_same(run(plan_of(), backend=backend, resume=caught.value), whole)
    assert_same(run(plan_of(), backend=backend, checkpoint_to=path), whole)
    longer = run(plan_of(epochs=12), backend=backend)
    assert_same(run(plan_of(epochs=12), backend=backend, checkpoint_to=path), longer)


@pytest.mark.long
def test_runs_map_over_the_keys_of_their_plans():
    def final(key):
        return run(plan_of(key=key))[0].params

    keys = gd.random.split(KEY, 3)
    mapped = vmap(final)(keys)
    for i, key in enumerate(keys):
        alone = final(key)
        assert all(torch.allclose(mapped[name][i], alone[name]) for name in alone)
