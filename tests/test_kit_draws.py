"""Laws of random numbers and plans: right generators keep them, and each wrong one breaks a law by name."""

import itertools

import numpy as np
import pytest
import torch

import gdfunc as gd
from gdfunc import testing as gt

SIZE = 300_000


def rng(seed):
    return np.random.default_rng(seed)


def torchs(seed):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- noise

GENERATORS = {
    "gdfunc": lambda seed: gd.random.normal(gd.random.key(seed), (SIZE,)),
    "gdfunc, split": lambda seed: gd.random.normal(gd.random.split(gd.random.key(7), 2)[seed], (SIZE,)),
    "gdfunc, few at a time": lambda seed: gd.random.normal(
        gd.random.fold_in(gd.random.key(1), seed), (3, 10_000)
    ),
    "torch": lambda seed: torch.randn(SIZE, generator=torchs(seed)),
    "NumPy": lambda seed: rng(seed).standard_normal((2, SIZE // 2)),
}


@pytest.mark.parametrize("name", GENERATORS)
def test_right_generators_keep_the_law_of_noise(name):
    gt.check_noise(GENERATORS[name])


def normal(seed):
    return rng(seed).standard_normal(SIZE)


def correlated(seed):
    z = normal(seed)
    return (z + 0.02 * np.roll(z, 1)) / np.sqrt(1 + 0.02**2)


SOURCE = rng(0)  # of generators that forget their seed


WRONG_NOISE = {
    "std 1.01": (lambda seed: 1.01 * normal(seed), "sum"),
    "std 0.99": (lambda seed: 0.99 * normal(seed), "sum"),
    "std that grows with the seed": (lambda seed: normal(seed) * (0.985, 1.015)[seed], "half"),
    "mean 0.01": (lambda seed: normal(seed) + 0.01, "mean"),
    "uniform": (lambda seed: np.sqrt(12) * (rng(seed).random(SIZE) - 0.5), "kurtosis"),
    "Rademacher": (lambda seed: 2.0 * rng(seed).integers(0, 2, SIZE) - 1, "kurtosis"),
    "logistic": (lambda seed: rng(seed).logistic(size=SIZE) * np.sqrt(3) / np.pi, "kurtosis"),
    "skew": (lambda seed: (normal(seed) ** 2 - 1) / np.sqrt(2), "skewness"),
    "four moments right": (
        lambda seed: np.sqrt(3) * rng(seed).choice([-1.0, 0.0, 1.0], SIZE, p=[1 / 6, 2 / 3, 1 / 6]),
        "cells",
    ),
    "rounded": (lambda seed: normal(seed).round(1) / np.sqrt(1 + 0.01 / 12), "cells"),
    "correlated": (correlated, "with themselves"),
    "equal halves": (lambda seed: np.tile(normal(seed)[: SIZE // 2], 2), "with themselves"),
    "period of 1000": (lambda seed: np.tile(rng(0).standard_normal(1000), 600), "differ"),
    "seed ignored": (lambda seed: normal(0), "differ"),
    "one entry too late": (lambda seed: np.roll(normal(0), seed), "with themselves"),
    "seeds correlated": (lambda seed: np.sqrt(0.5) * (normal(0) + normal(9 + seed)), "with themselves"),
    "unseeded": (lambda seed: SOURCE.standard_normal(SIZE), "two draws of seed 0"),
    "not a number": (lambda seed: np.where(np.arange(SIZE) == 5, np.nan, normal(seed)), "sum"),
    "truncated": (lambda seed: np.clip(normal(seed), -3, 3), "kurtosis"),
}


@pytest.mark.parametrize("name", WRONG_NOISE)
def test_a_wrong_generator_breaks_the_law_of_noise(name):
    draw, words = WRONG_NOISE[name]
    with pytest.raises(gt.LawBroken) as caught:
        gt.check_noise(draw)
    assert words in caught.value.formula


def test_noise_of_another_std_needs_its_std():
    gt.check_noise(lambda seed: 0.25 * normal(seed), 0.25)
    with pytest.raises(gt.LawBroken, match=r"check_noise broken\n.*must be at most 6.109"):
        gt.check_noise(lambda seed: 0.25 * normal(seed), 0.2525)


def test_no_global_generator_is_read_or_written():
    torch_state, numpy_state = torch.get_rng_state(), repr(np.random.get_state())  # noqa: NPY002
    gt.check_noise(GENERATORS["gdfunc"])
    gt.check_permutation(SHUFFLES["gdfunc"])
    gt.check_reshuffling(PLAIN, gt.GradientDescent())
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert repr(np.random.get_state()) == numpy_state  # noqa: NPY002


# ---------------------------------------------------------------- orders

SHUFFLES = {
    "gdfunc": lambda seed: gd.epoch_batches(gd.random.key(seed), 4, 2, epochs=6_000),
    "gdfunc, batches that straddle epochs": lambda seed: gd.epoch_batches(
        gd.random.key(seed), 4, 3, epochs=6_000, remainder="carry"
    ),
    "gdfunc, permutation": lambda seed: torch.func.vmap(lambda key: gd.random.permutation(key, 4))(
        gd.random.split(gd.random.key(seed), 6_000)
    ),
    "gdfunc, samples without replacement": lambda seed: gd.sample_batches(
        gd.random.key(seed), 4, 4, 6_000, replacement=False
    ),
    "torch": lambda seed: torch.randperm(4, generator=torchs(seed)),
    "NumPy": lambda seed: rng(seed).permutation(4),
}


@pytest.mark.parametrize("name", SHUFFLES)
def test_right_shuffles_keep_the_law_of_orders(name):
    gt.check_permutation(SHUFFLES[name])


def uniform(seed, epochs=6_000):
    return rng(seed).permuted(np.tile(np.arange(4), (epochs, 1)), axis=1)


def swaps(seed, partner):
    """Shuffle by swapping entry i with a random partner."""
    orders, generator = np.tile(np.arange(4), (6_000, 1)), rng(seed)
    rows = np.arange(len(orders))
    for i in range(4):
        j = partner(generator, i, len(orders))
        orders[rows, i], orders[rows, j] = orders[rows, j], orders[rows, i]
    return orders


def riffle(seed):
    """One riffle shuffle: every card goes to the first or the second heap, and the heaps are stacked."""
    return np.argsort(rng(seed).integers(0, 2, (6_000, 4)), axis=1, kind="stable")


def alternating(seed):
    orders = uniform(seed)
    orders[1::2] = orders[::2, ::-1]
    return orders


def sometimes_kept(seed):
    orders = uniform(seed)
    return np.where(rng(seed + 9).random((6_000, 1)) < 0.03, np.arange(4), orders)


WRONG_SHUFFLES = {
    "swap with any": (lambda seed: swaps(seed, lambda g, i, n: g.integers(0, 4, n)), "24 orders"),
    "never stay": (lambda seed: swaps(seed, lambda g, i, n: g.integers(min(i + 1, 3), 4, n)), "24 orders"),
    "riffle": (riffle, "24 orders"),
    "rotation": (
        lambda seed: (np.arange(4) + rng(seed).integers(0, 4, (6_000, 1))) % 4,
        "24 orders",
    ),
    "keys that tie": (lambda seed: np.argsort(rng(seed).integers(0, 15, (6_000, 4)), axis=1), "24 orders"),
    "3 % in order": (sometimes_kept, "24 orders"),
    "same order in every epoch": (lambda seed: np.tile(np.arange(4), 6_000 + seed), "24 orders"),
    "shuffled once": (lambda seed: np.tile(uniform(seed, 1), (2, 1)), "pairs"),
    "back and forth": (alternating, "pairs"),
    "all orders in turn": (
        lambda seed: np.tile(list(itertools.permutations(range(4))), (250, 1))[seed:],
        "24 orders",
    ),
    "neighbouring seeds alike": (lambda seed: uniform(seed // 2, 1), "pairs"),
    "seed ignored": (lambda seed: uniform(0), "differ"),
    "unseeded": (lambda seed: SOURCE.permutation(4), "two draws of seed 0"),
    "with replacement": (lambda seed: rng(seed).integers(0, 4, (6_000, 4)), "an order of 0 to 3"),
    "counted from 1": (lambda seed: uniform(seed) + 1, "an order of 0 to 3"),
}


@pytest.mark.parametrize("name", WRONG_SHUFFLES)
def test_a_wrong_shuffle_breaks_the_law_of_orders(name):
    make_plan, words = WRONG_SHUFFLES[name]
    with pytest.raises(gt.LawBroken) as caught:
        gt.check_permutation(make_plan)
    assert words in caught.value.formula


# ---------------------------------------------------------------- epochs


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ([[0, 1], [2, 0]], "at most once"),
        ([[0, 1], [2, 4]], "sample numbers in"),
        ([[0, 1], [2, -1]], "sample numbers in"),
        ([[0, 1], [2, 3], [0, 1], [1, 2]], "at most once"),
    ],
)
def test_a_wrong_epoch_is_caught(index, words):
    with pytest.raises(gt.LawBroken, match=words):
        gt.check_epochs(torch.tensor(index), 4)


def test_a_batch_may_straddle_two_epochs():
    carried = [[0, 1, 2], [3, 0, 3], [1, 2, 0]]
    gt.check_epochs(np.array(carried), 4, remainder="carry")
    with pytest.raises(gt.LawBroken, match="in epoch 2"):
        gt.check_epochs(np.array(carried), 4)
    with pytest.raises(gt.LawBroken, match="in epoch 2"):
        gt.check_epochs(np.array([[0, 1, 2], [3, 0, 0], [1, 2, 3]]), 4, remainder="carry")


# ---------------------------------------------------------------- reshuffling

PLAIN = gt.from_transform(gd.chain())


@pytest.mark.parametrize(
    "subject",
    [PLAIN, gt.from_torch(lambda params: torch.optim.SGD(params, lr=1.0))],
    ids=["gdfunc", "torch"],
)
def test_reshuffling_has_its_moments(subject):
    gt.check_reshuffling(subject, gt.GradientDescent())


@pytest.mark.parametrize(
    ("transform", "words"),
    [(gd.momentum(0.5), "mean"), (gd.scale(1 + 1e-6), "mean"), (gd.chain(gd.weight_decay(1e-6)), "mean")],
)
def test_another_method_has_other_moments(transform, words):
    with pytest.raises(gt.LawBroken, match=words):
        gt.check_reshuffling(gt.from_transform(transform), gt.GradientDescent())
    with pytest.raises(gt.NotApplicable):
        gt.check_reshuffling(gt.from_transform(transform), gt.Momentum(0.5))
