"""Laws of random numbers and of plans: what is drawn, and that draws are independent.

Every statistic is turned into a standard normal z. A law is broken where |z| exceeds the two-sided limit
of alpha = 1e-9, which is 6.11. The seeds are 0, 1, 2, …, so a law gives the same answer in every run.
"""

import itertools
import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._claims._base import Claim
from .._claims._linear import GradientDescent
from .._law import NotApplicable, law, require_at_most, require_equal
from .._subject import Subject, run


@law("K. Pearson 1900; E. Wilson, M. Hilferty 1931", of_optimizers=False)
def check_noise(draw: Callable[[int], Any], std: float = 1.0, *, alpha: float = 1e-9) -> None:
    """Check that draws are independent and normal, with mean 0 and the stated standard deviation.

    Σ(x/σ)² of all and of each half; mean, skewness and kurtosis; the counts of 64 equally likely cells;
    the correlation with itself and with the draws of another seed, at every lag. Equal seeds must give
    equal draws, and seeds must matter.

    The law judges 600,000 draws. A right generator fails with a chance of 1e-9 for each statistic (of 2e-9
    for the kurtosis), and a standard deviation that is wrong by a factor of 1.01 is found with a chance of
    1 − 1e-6.

    Args:
        draw: `seed -> numbers`, a tensor or an array of any size. The law calls it with 0, 1, 2, … until it
            has enough, so few at a time are slow.
        std: σ.
        alpha: the chance that a right generator fails, for each statistic.

    Raises:
        LawBroken: a statistic exceeds its limit.

    Example:
        >>> from gdfunc import testing as gt
        >>> gt.check_noise(lambda seed: gd.random.normal(gd.random.key(seed), (300_000,)))
        >>> generator = lambda seed: torch.Generator().manual_seed(seed)
        >>> gt.check_noise(lambda seed: 3 * torch.randn(300_000, generator=generator(seed)), std=3.0)
    """
    first, other, *more = _drawn(draw, 600_000)
    z = np.concatenate([first, other, *more]) / std
    require_normal(z, alpha, f"x/{std:.6g}")
    size = min(len(first), len(other))
    if size >= 1000:  # a sum of fewer products is not normal
        crossed = _correlations(first[:size] / std, other[:size] / std)
        require_small(crossed, "correlation of the draws of two seeds", alpha / size)


@law("K. Pearson 1900: every order is equally likely", of_optimizers=False)
def check_permutation(make_plan: Callable[[int], Any], *, alpha: float = 1e-9) -> None:
    """Check that shuffles of four samples are uniform over all 24 orders, and independent.

    The counts of the orders, and of the pairs of consecutive orders, have Pearson's χ². Equal seeds must
    give equal plans, and seeds must matter.

    The law judges 12,000 orders. A right shuffle fails with a chance of 1e-9 for each statistic, and one
    that keeps the given order in 3 % of the cases too many is found with a chance of 1 − 1e-6.

    Args:
        make_plan: `seed -> plan`, a tensor or an array of four numbers, or of several epochs, whose numbers
            make orders of four one after another. The law calls it with 0, 1, 2, … until it has enough.
        alpha: the chance that a right shuffle fails, for each statistic.

    Raises:
        LawBroken: a row is no permutation, or a statistic exceeds its limit.

    Example:
        >>> from gdfunc import testing as gt
        >>> gt.check_permutation(lambda seed: gd.epoch_batches(gd.random.key(seed), 4, 2, epochs=6_000))
        >>> generator = lambda seed: torch.Generator().manual_seed(seed)
        >>> gt.check_permutation(lambda seed: torch.randperm(4, generator=generator(seed)))
    """
    drawn = np.concatenate(_drawn(make_plan, 48_000))
    rows = drawn[: len(drawn) // 8 * 8].reshape(-1, 4)
    require_equal(np.sort(rows, 1), np.tile(np.arange(4), (len(rows), 1)), "an order of 0 to 3", slack=0.0)
    number = {order: i for i, order in enumerate(itertools.permutations(range(4)))}
    numbers = np.array([number[tuple(row)] for row in rows.tolist()])
    _require_uniform(numbers, 24, "all 24 orders", alpha)
    _require_uniform(numbers.reshape(-1, 2) @ [24, 1], 24**2, "pairs of consecutive orders", alpha)


@law("K. Pearson 1900: every sample is equally likely", of_optimizers=False)
def check_indices(draw: Callable[[int], Any], n: int, *, alpha: float = 1e-9) -> None:
    """Check that integers in [0, n) are drawn uniformly and independently, as with replacement.

    The counts of all n have Pearson's χ², and the correlation of the draws with themselves is small at
    every lag. Equal seeds must give equal draws, and seeds must matter.

    The law judges 120,000 draws. A right generator fails with a chance of 1e-9 for each statistic. For
    n = 10, an integer that is drawn 12 % too often is found with a chance of 1 − 1e-6.

    Args:
        draw: `seed -> integers`, a tensor or an array of any size, such as a plan. The law calls it with 0,
            1, 2, … until it has enough, so few at a time are slow.
        n: how many integers there are, 2 or more.
        alpha: the chance that a right generator fails, for each statistic.

    Raises:
        LawBroken: an integer is out of range, or a statistic exceeds its limit.

    Example:
        >>> from gdfunc import testing as gt
        >>> gt.check_indices(lambda seed: gd.sample_batches(gd.random.key(seed), 10, 4, 15_000), n=10)
    """
    drawn = np.concatenate(_drawn(draw, 120_000))
    require_equal(np.isin(drawn, np.arange(n)), np.ones(len(drawn)), f"integers in [0, {n})", slack=0.0)
    _require_uniform(drawn.astype(int), n, f"the counts of {n} integers", alpha)
    standard = (drawn - (n - 1) / 2) / math.sqrt((n * n - 1) / 12)
    own = _correlations(standard, standard)[1:]
    require_small(own, "correlation of the draws with themselves", alpha / len(own))


@law("an epoch is a pass over the data", of_optimizers=False)
def check_epochs(index: Any, n: int, *, remainder: str = "drop") -> None:
    """Check that every epoch of a plan visits each sample at most once, and all if nothing is left over.

    Args:
        index: [T, B], the numbers of the samples of every step.
        n: how many samples there are.
        remainder: "drop": an epoch is ⌊n/B⌋ batches. "carry": it is n numbers, and batches may straddle
            two epochs.

    Raises:
        LawBroken: an epoch visits a sample twice, or one that does not exist.

    Example:
        >>> from gdfunc import testing as gt
        >>> gt.check_epochs(gd.epoch_batches(gd.random.key(0), n=10, batch_size=3, epochs=4), n=10)
    """
    rows = np.asarray(index)
    size = n if remainder == "carry" else n // rows.shape[1] * rows.shape[1]
    drawn = rows.reshape(-1)
    in_range = (drawn >= 0) & (drawn < n)
    require_equal(in_range, np.ones(len(drawn)), f"sample numbers in [0, {n})", slack=0.0)
    for epoch, start in enumerate(range(0, len(drawn), size), 1):
        visited = np.bincount(drawn[start : start + size], minlength=n)
        where = f"visits of a sample in epoch {epoch}"
        require_at_most(visited.max(), 1, "every sample at most once", slack=0.0, where=where)


@law("the moments over all orders, enumerated; K. Mishchenko, A. Khaled, P. Richtarik 2020")
def check_reshuffling(subject: Subject, claim: Claim) -> None:
    """Check the exact variances of descent on fᵢ = a(x − bᵢ)²/2 over all orders of three samples.

    With q = 1 − lr·a, wⱼ = lr·a·q^(n−1−j) and the variance s² of b:

    one epoch:         s²·(Σw² − (Σw)²/n)·n/(n − 1)
    two epochs:        the same times 1 + q²ⁿ
    shuffled once:     the same times (1 + qⁿ)²
    with replacement:  s²·Σw²

    A plan is an entry of the parameters, so one run takes all of them. The bound of random reshuffling for
    the mean square error, q²ⁿᵉ·R² + lr²·n·s²/2 with e epochs and L = μ = a = 1, must hold as well.

    Example:
        >>> from gdfunc import testing as gt
        >>> gt.check_reshuffling(gt.from_step(gd.make_step), gt.GradientDescent())
    """
    if not isinstance(claim, GradientDescent):
        raise NotApplicable("it is about plain gradient descent")
    a, lr, start, b = 1.0, 0.25, 3.0, np.array([1.0, -2.0, 0.5])
    n, s2, q = len(b), b.var(), 1 - lr * a
    w = lr * a * q ** np.arange(n - 1, -1, -1)
    one_epoch = s2 * (w @ w - w.sum() ** 2 / n) * n / (n - 1)
    orders = np.array(list(itertools.permutations(range(n))))
    pairs = np.array([[*first, *second] for first in orders for second in orders])
    cases = {
        "one epoch": (orders, one_epoch),
        "two epochs": (pairs, one_epoch * (1 + q ** (2 * n))),
        "shuffled once": (np.tile(orders, 2), one_epoch * (1 + q**n) ** 2),
        "with replacement": (np.array(list(itertools.product(range(n), repeat=n))), s2 * w @ w),
    }

    def loss_fn(x: Tensor, target: Tensor) -> Tensor:
        return 0.5 * a * ((x - target) ** 2).sum()

    for name, (plans, variance) in cases.items():
        targets = torch.from_numpy(b[plans.T.copy()])[:, None]  # a batch of one sample for each plan
        x = torch.full(targets.shape[2:], start, dtype=torch.float64)
        ends = run(subject, loss_fn, x, targets, lr, len(targets)).points[0][-1]
        require_equal(ends.mean(), b.mean() + q ** len(targets) * (start - b.mean()), f"mean, {name}")
        require_equal(ends.var(), variance, f"variance over all plans, {name}, lr a = {lr * a:.6g}")
        if name in ("one epoch", "two epochs"):
            bound = q ** len(targets) * (start - b.mean()) ** 2 + lr**2 * n * s2 / 2
            require_at_most(((ends - b.mean()) ** 2).mean(), bound, f"mean square error, {name}")


def _drawn(draw: Callable[[int], Any], least: int) -> list[np.ndarray]:
    """Return the draws of seeds 0, 1, 2, …, in float64: at least two, and at least so many numbers.

    Raises:
        LawBroken: two draws of seed 0 differ, or those of all seeds are equal.
    """
    parts, count = [_numbers(draw(0))], 0
    require_equal(_numbers(draw(0)), parts[0], "two draws of seed 0", slack=0.0)
    while len(parts) < 2 or count < least:
        parts.append(_numbers(draw(len(parts))))
        count += len(parts[-1]) + (len(parts[0]) if len(parts) == 2 else 0)
    differ = any(not np.array_equal(part, parts[0]) for part in parts)
    require_equal(float(differ), 1.0, "the draws of some seeds differ", slack=0.0)
    return parts


def _numbers(drawn: Any) -> np.ndarray:
    """Return what was drawn as a vector of float64."""
    array = drawn.detach().cpu().numpy() if torch.is_tensor(drawn) else np.asarray(drawn)
    return array.astype(np.float64).reshape(-1)


def require_normal(z: np.ndarray, alpha: float, shown: str = "x") -> None:
    """Require independent standard normal numbers, [N]."""
    half = len(z) // 2
    for name, part in {"draws": z, "first half": z[:half], "second half": z[half:]}.items():
        require_small(score_of_chi2(float(part @ part), len(part)), f"sum ({shown})^2 of the {name}", alpha)
        require_small(part.sum() / math.sqrt(len(part)), f"mean of the {name}", alpha)
    cubes, fourths = (z**3 - 3 * z).sum(), (z**4 - 6 * z**2 + 3).sum()
    require_small(cubes / math.sqrt(6 * len(z)), "skewness, sum H_3(x)", alpha)
    require_small(fourths / math.sqrt(24 * len(z)), "kurtosis, sum H_4(x)", alpha)
    edges = [NormalDist().inv_cdf(i / 64) for i in range(1, 64)]
    _require_uniform(np.searchsorted(edges, z), 64, "64 equally likely cells", alpha)
    own = _correlations(z, z)[1:]  # because at lag 0 it is the sum of squares
    require_small(own, "correlation of the draws with themselves", alpha / len(own))


def require_small(z: Any, statistic: str, alpha: float) -> None:
    """Require that |z| does not exceed its two-sided limit, for the largest of several."""
    limit = NormalDist().inv_cdf(1 - alpha / 2)
    formula = f"{statistic}, in standard errors, with alpha = {alpha:.3g}"
    require_at_most(np.abs(z).max(initial=0.0), limit, formula, slack=0.0)


def score_of_chi2(chi2: float, degrees: int) -> float:
    """Return the z of Wilson and Hilferty: χ²'s cube root is nearly normal."""
    spread = 2 / (9 * degrees)
    return float((np.cbrt(chi2 / degrees) - (1 - spread)) / math.sqrt(spread))


def _require_uniform(cells: np.ndarray, count: int, name: str, alpha: float) -> None:
    """Require equally likely cells, by Pearson's χ²: too even is wrong too."""
    expected = len(cells) / count
    chi2 = ((np.bincount(cells, minlength=count) - expected) ** 2).sum() / expected
    require_small(score_of_chi2(chi2, count - 1), f"chi2 = {chi2:.6g} of {name}", alpha)


def _correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return Σᵢ aᵢ·bᵢ₊ₖ/√n for every lag k, around a circle."""
    spectrum = np.conj(np.fft.rfft(a)) * np.fft.rfft(b)
    return np.fft.irfft(spectrum, len(a)) / math.sqrt(len(a))
