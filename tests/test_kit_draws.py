"""Laws of random numbers, plans and private steps: each wrong one breaks one of them by name."""

import itertools
from functools import partial
from typing import NamedTuple

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


@pytest.mark.long
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


@pytest.mark.long
def test_noise_of_another_std_needs_its_std():
    gt.check_noise(lambda seed: 0.25 * normal(seed), 0.25)
    with pytest.raises(gt.LawBroken, match=r"check_noise broken\n.*must be at most 6.109"):
        gt.check_noise(lambda seed: 0.25 * normal(seed), 0.2525)


@pytest.mark.long
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


@pytest.mark.long
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


# ---------------------------------------------------------------- integers

INTEGERS = {
    "gdfunc": lambda seed: gd.sample_batches(gd.random.key(seed), 10, 4, 15_000),
    "gdfunc, randint": lambda seed: gd.random.randint(gd.random.key(seed), (60_000,), 0, 10),
    "gdfunc, unbiased": lambda seed: gd.random.randint(
        gd.random.key(seed), (60_000,), 0, 10, unbiased=True
    ),
    "torch": lambda seed: torch.randint(10, (60_000,), generator=torchs(seed)),
    "NumPy": lambda seed: rng(seed).integers(0, 10, 60_000),
}


@pytest.mark.parametrize("name", INTEGERS)
def test_right_integers_keep_their_law(name):
    gt.check_indices(INTEGERS[name], 10)


@pytest.mark.parametrize(
    ("draw", "words"),
    [
        (lambda seed: rng(seed).integers(0, 128, 60_000) % 10, "counts of 10"),
        (lambda seed: np.minimum(rng(seed).random(60_000) * 10.15, 9).astype(int), "counts of 10"),
        (lambda seed: rng(seed).integers(0, 10, 60_000) + 1, "integers in"),
        (lambda seed: rng(seed).random(60_000) * 10, "integers in"),
        (lambda seed: np.sort(rng(seed).integers(0, 10, (15_000, 4)), axis=1), "with themselves"),
        (lambda seed: gd.sample_batches(gd.random.key(seed), 10, 4, 15_000, replacement=False), "with th"),
        (lambda seed: gd.epoch_batches(gd.random.key(seed), 10, 5, 6_000), "counts of 10"),
        (lambda seed: rng(0).integers(0, 10, 60_000), "differ"),
    ],
)
def test_wrong_integers_are_caught(draw, words):
    with pytest.raises(gt.LawBroken) as caught:
        gt.check_indices(draw, 10)
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


@pytest.mark.long
@pytest.mark.parametrize(
    ("transform", "words"),
    [(gd.momentum(0.5), "mean"), (gd.scale(1 + 1e-6), "mean"), (gd.chain(gd.weight_decay(1e-6)), "mean")],
)
def test_another_method_has_other_moments(transform, words):
    with pytest.raises(gt.LawBroken, match=words):
        gt.LAWS["check_reshuffling"](gt.from_transform(transform), gt.GradientDescent())
    with pytest.raises(gt.NotApplicable):
        gt.check_reshuffling(gt.from_transform(transform), gt.Momentum(0.5))


# ---------------------------------------------------------------- private steps


def private(fault, loss_fn, max_norm, noise_multiplier, divisor, seed):
    """Make a private step by hand, with one fault."""
    source = torchs(0 if fault == "seed ignored" else seed)

    def step(params, batch, lr):
        rows = torch.func.vmap(torch.func.grad(loss_fn), (None, 0))(params, batch[:, None])
        sizes = {name: g.flatten(1).norm(dim=1) for name, g in rows.items()}
        whole = torch.stack(list(sizes.values())).norm(dim=0)
        new = {}
        kept = source.get_state()
        for name, g in rows.items():
            size = sizes[name] if fault == "clips leaf by leaf" else whole
            if fault == "norm squared":
                size = size**2
            factor = max_norm / size.clamp(min=1e-30)
            factor = factor if fault == "scales up to C" else factor.clamp(max=1.0)
            factor = torch.where(size > 0, factor, torch.zeros_like(factor))
            if fault == "clips the mean":
                factor = torch.ones_like(factor) * (max_norm / sum(whole)).clamp(max=1.0)
            total = torch.tensordot(factor, g, dims=1)
            if fault == "one noise for all leaves":
                source.set_state(kept)
            noise = torch.randn(total.shape, generator=source, dtype=torch.float64)
            if fault == "uniform noise":
                noise = 12**0.5 * (torch.rand(total.shape, generator=source, dtype=torch.float64) - 0.5)
            noise = noise * noise_multiplier * (1.0 if fault == "noise without C" else max_norm)
            noise = noise * {"noise squared": noise_multiplier, "noise 1.02": 1.02}.get(fault, 1.0)
            noise = noise * (len(batch) if fault == "noise for each sample" else 1)
            count = len(batch) if fault == "divides by n" else divisor
            mean = total / count + noise if fault == "noise after the division" else (total + noise) / count
            new[name] = params[name] - lr * mean
        if fault == "one noise for all steps":
            source.set_state(kept)
        return new, torch.zeros(())

    return step


PRIVATE_FAULTS = {
    "clips leaf by leaf": "sum_i",
    "scales up to C": "sum_i",
    "clips the mean": "sum_i",
    "norm squared": "sum_i",
    "divides by n": "sum_i",
    "noise without C": "grows with C",
    "noise squared": "grows with sigma",
    "noise after the division": "grows with 1/D",
    "noise for each sample": "does not depend on the data",
    "noise 1.02": "sum (x/0.75)^2",
    "uniform noise": "kurtosis",
    "one noise for all leaves": "with themselves",
    "one noise for all steps": "with themselves",
    "seed ignored": "the draws of some seeds differ",
}


def ours(loss_fn, max_norm, noise_multiplier, divisor, seed):
    options = {"max_norm": max_norm, "noise_multiplier": noise_multiplier, "divisor": divisor}
    return gd.privacy.make_private_step(loss_fn, key=gd.random.key(seed), **options)


@pytest.mark.parametrize("make", [ours, partial(private, "")], ids=["gdfunc", "by hand"])
def test_right_private_steps_keep_their_law(make):
    gt.check_private_step(make)


@pytest.mark.parametrize("fault", PRIVATE_FAULTS)
def test_a_wrong_private_step_is_caught(fault):
    with pytest.raises(gt.LawBroken) as caught:
        gt.check_private_step(partial(private, fault))
    assert PRIVATE_FAULTS[fault] in caught.value.formula


def follower(fault, loss_fn, start, quantile, lr, count_noise, divisor, seed):
    """Make a step whose clipping norm follows a quantile, with one fault."""
    source = torchs(0 if fault == "seed ignored" else seed)

    def step(carry, batch, step_lr):
        (params, c), kept = carry, source.get_state()
        sizes = batch.norm(dim=1)
        below = sizes < c if fault == "strict" else sizes <= c
        noise = count_noise * float(torch.randn((), generator=source, dtype=torch.float64))
        noise = noise * {"noise not divided": divisor, "noise missing": 0.0}.get(fault, 1.0)
        share = (float(below.sum()) + noise) / divisor
        if fault == "one noise for all steps":
            source.set_state(kept)
        change = -lr * (share - quantile) * (-1 if fault == "sign" else 1)
        moved = c * (1 + change if fault == "linear" else np.exp(change))
        used = moved if fault == "clips with the next" else c
        rows = torch.func.vmap(torch.func.grad(loss_fn), (None, 0))(params, batch[:, None])
        factor = (used / sizes).clamp(max=1.0)
        sums = {name: torch.tensordot(factor, g, dims=1) / divisor for name, g in rows.items()}
        return Following({name: params[name] - step_lr * sums[name] for name in params}, moved), share

    return gd.Step(lambda params: Following(params, start), lambda *args: (*step(*args), None), Following)


class Following(NamedTuple):
    params: dict
    max_norm: float


def our_follower(loss_fn, start, quantile, lr, count_noise, divisor, seed):
    norm = gd.privacy.Quantile(start, quantile, lr, count_noise)
    options = {"max_norm": norm, "noise_multiplier": 0.0, "divisor": divisor}
    return gd.privacy.make_private_step(loss_fn, key=gd.random.key(seed), **options)


def norm_of(carry):
    return carry.max_norm


@pytest.mark.parametrize("make", [our_follower, partial(follower, "")], ids=["gdfunc", "by hand"])
def test_right_clipping_norms_keep_their_law(make):
    gt.check_quantile(make, norm_of)


FOLLOWER_FAULTS = {
    "sign": "C exp",
    "linear": "C exp",
    "strict": "C exp",
    "clips with the next": "before its update",
    "noise not divided": "sum (D noise",
    "noise missing": "differs between steps",
    "one noise for all steps": "differs between steps",
    "seed ignored": "differs between steps",
}


@pytest.mark.parametrize("fault", FOLLOWER_FAULTS)
def test_a_wrong_clipping_norm_is_caught(fault):
    with pytest.raises(gt.LawBroken) as caught:
        gt.check_quantile(partial(follower, fault), norm_of)
    assert FOLLOWER_FAULTS[fault] in caught.value.formula
