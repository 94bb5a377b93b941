"""Laws of differentially private steps: what is summed, what is added, and how a threshold follows."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import _tree
from ..._step import as_step, params_of
from ..._tree import Tree
from .._law import law, require_equal
from ._draws import check_noise, require_small, score_of_chi2

_LR = 0.5


@law("M. Abadi et al. 2016", of_optimizers=False)
def check_private_step(make: Callable[..., Any], *, alpha: float = 1e-9) -> None:
    """Check that a step is the sum of clipped gradients over a constant, and noise of the stated size.

    θ' = θ − lr/D·(Σᵢ gᵢ·min(1, C/‖gᵢ‖) + N(0, σ²C²))

    σ = 0: the sum of 3, 4 and 6 samples, shorter and longer than C, with norms over two leaves. σ > 0: the
    noise is proportional to σ, to C and to 1/D, and the same for other data and another number of samples.
    It keeps `check_noise` over all entries of two leaves and of two steps, so that neither shares it. A
    wrong σC/D is found as there, at a factor of 1.01 with a chance of 1 − 1e-6.

    Args:
        make: `(loss_fn, max_norm, noise_multiplier, divisor, seed) -> step`, where loss_fn is
            `(params, batch) -> mean loss`.
        alpha: as in `check_noise`.

    Raises:
        LawBroken: one of these fails.

    Example:
        >>> from gdfunc import testing as gt
        >>> def make(loss_fn, max_norm, noise_multiplier, divisor, seed):
        ...     settings = {"max_norm": max_norm, "noise_multiplier": noise_multiplier, "divisor": divisor}
        ...     return gd.privacy.make_private_step(loss_fn, key=gd.random.key(seed), **settings)
        >>> gt.check_private_step(make)
    """

    def mean(x: np.ndarray, max_norm: float, noise: float, divisor: float) -> np.ndarray:
        """Return the noisy mean of one step from seed 0, [7]."""
        return _walk(make(_linear, max_norm, noise, divisor, 0), x)[0][0]

    for n in (3, 4, 6):
        for max_norm, divisor in ((2.0, 4.0), (0.75, 3.0)):
            x = _samples(n)
            expected = _clipped(x, max_norm).sum(0) / divisor
            formula = (
                f"(x - x') / lr = sum_i g_i min(1, C/|g_i|) / D, n = {n}, C = {max_norm}, D = {divisor}"
            )
            require_equal(mean(x, max_norm, 0.0, divisor), expected, formula, scale=max_norm)
    x, other = _samples(4), -2.0 * _samples(6)[1:]
    noise = mean(x, 2.0, 1.0, 4.0) - mean(x, 2.0, 0.0, 4.0)
    changes = {
        "with sigma": (x, (2.0, 3.0, 4.0), 3.0),
        "with C": (x, (0.5, 1.0, 4.0), 0.25),
        "with 1/D": (x, (2.0, 1.0, 16.0), 0.25),
        "and does not depend on the data": (other, (2.0, 1.0, 4.0), 1.0),
    }
    for name, (data, (max_norm, sigma, divisor), factor) in changes.items():
        changed = mean(data, max_norm, sigma, divisor) - mean(data, max_norm, 0.0, divisor)
        require_equal(changed, factor * noise, f"the noise of a seed grows {name}", scale=1.0)

    def draw(seed: int) -> np.ndarray:
        step = make(_linear, 2.0, 1.5, 4.0, seed)
        return _walk(step, np.zeros((1, 150_000)), steps=2, width=75_000)[0]

    check_noise(draw, 1.5 * 2.0 / 4.0, alpha=alpha)


@law("G. Andrew, O. Thakkar, H. McMahan, S. Ramaswamy 2021", of_optimizers=False)
def check_quantile(
    make: Callable[..., Any], threshold: Callable[[Any], Any], *, alpha: float = 1e-9
) -> None:
    """Check that a clipping norm follows a quantile of the gradients' norms by its rule.

    C' = C·exp(−η(b − γ)),  b = 1/D (Σᵢ 1[‖gᵢ‖ ≤ C] + N(0, σ_b²)),  D the number of samples

    σ_b ≈ 0: twelve steps, of which each clips with the norm before its update; a norm equal to C is not
    clipped. σ_b > 0: the noise is proportional to σ_b and differs between steps and seeds. Its size is
    judged by χ² over 40 steps: a factor of 3 is found with a chance of 1 − 2e-5.

    Args:
        make: `(loss_fn, start, quantile, lr, count_noise, divisor, seed) -> step`, without noise on the
            gradients.
        threshold: `carry -> C`.
        alpha: the chance that a right step fails.

    Raises:
        LawBroken: a threshold or a step is wrong.

    Example:
        >>> from gdfunc import testing as gt
        >>> def make(loss_fn, start, quantile, lr, count_noise, divisor, seed):
        ...     norm = gd.privacy.Quantile(start, quantile, lr, count_noise)
        ...     settings = {"max_norm": norm, "noise_multiplier": 0.0, "divisor": divisor}
        ...     return gd.privacy.make_private_step(loss_fn, key=gd.random.key(seed), **settings)
        >>> gt.check_quantile(make, lambda state: state.max_norm)
    """
    # Norms 5·2ᵏ are exact, so that one can be equal to C.
    x, steps, scales = np.zeros((6, 7)), 12, 2.0 ** np.arange(-4, 2)
    for i, scale in enumerate(scales):
        x[i, i % 3], x[i, 3 + i % 4] = 3 * scale, 4 * scale
    sizes = 5 * scales
    for start, quantile, lr in ((0.25, 0.75, 0.5), (8.0, 0.25, 0.25), (float(sizes[2]), 0.3, 1.0)):
        c, limits, sums = start, [], []
        for _ in range(steps):
            limits.append(c)
            sums.append(_clipped(x, c).sum(0) / len(x))
            c = c * np.exp(-lr * ((sizes <= c).mean() - quantile))
        step = make(_linear, start, quantile, lr, 1e-13, float(len(x)), 0)
        means, carries = _walk(step, x, steps=steps)
        seen = [float(threshold(carry)) for carry in carries]
        formula = f"C' = C exp(-lr (b - quantile)), lr = {lr}, quantile = {quantile}, first C = {start:.6g}"
        require_equal(seen, [*limits, c], formula, first=0)
        require_equal(means, sums, "each step clips with the C before its update", scale=c)

    def noises(seed: int, count_noise: float, steps: int) -> np.ndarray:
        """Return the noise on the share b of every step, and σ_b/D = 1/6 if count_noise is 1."""
        # At lr 1e-6 the threshold hardly moves, so the same samples are clipped in every step.
        step = make(_linear, 2.1, 0.5, 1e-6, count_noise, float(len(x)), seed)
        limits = [float(threshold(carry)) for carry in _walk(step, x, steps=steps)[1]]
        return -1e6 * np.diff(np.log(limits)) - ((sizes <= 2.1).mean() - 0.5)

    once, twice, other = noises(0, 1.0, 40), noises(0, 2.0, 2), noises(1, 1.0, 2)
    require_equal(twice, 2 * once[:2], "the noise of a seed grows with sigma_b", scale=1.0, slack=1e-6)
    differ = [abs(once[1] - once[0]) > 1e-6, abs(other[0] - once[0]) > 1e-6]
    require_equal(differ, [1.0, 1.0], "the noise differs between steps, and between seeds", slack=0.0)
    scaled = once * len(x)
    score = score_of_chi2(float(scaled @ scaled), len(scaled))
    require_small(score, "sum (D noise / sigma_b)^2 of 40 steps", alpha)


def _linear(params: Tree, batch: Tensor) -> Tensor:
    """Return a mean loss whose gradient of sample i is row i of the batch, in two leaves."""
    vector, matrix = params["vector"], params["matrix"]
    size = vector.shape[0]
    return ((vector * batch[:, :size]).sum(1) + (matrix.flatten() * batch[:, size:]).sum(1)).mean()


def _walk(step: Any, x: np.ndarray, *, steps: int = 1, width: int = 3) -> tuple[np.ndarray, list[Any]]:
    """Return (θ − θ')/lr of every step on one batch, [T, entries], and all carries, T + 1."""
    step, batch = as_step(step), torch.from_numpy(x)
    zeros = torch.zeros(x.shape[1], dtype=torch.float64)
    carries, rows = [step.init({"vector": zeros[:width], "matrix": zeros[width:].view(2, -1)})], []
    for _ in range(steps):
        carry, _ = step(carries[-1], batch, _LR)
        before, after = params_of(carries[-1]), params_of(carry)
        moved = _tree.map(lambda a, b: ((a - b) / _LR).flatten(), before, after)
        rows.append(torch.cat([moved["vector"], moved["matrix"]]).numpy())
        carries.append(carry)
    return np.stack(rows), carries


def _samples(n: int) -> np.ndarray:
    """Return gradients of n samples, [n, 7], with norms from 1/2 to beyond 4."""
    x = np.random.default_rng(n).standard_normal((n, 7))
    return x / np.linalg.norm(x, axis=1, keepdims=True) * np.geomspace(0.5, 5.0, n)[:, None]


def _clipped(x: np.ndarray, max_norm: float) -> np.ndarray:
    return x * np.minimum(1.0, max_norm / np.linalg.norm(x, axis=1, keepdims=True))
