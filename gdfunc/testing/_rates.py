"""How fast errors fall, measured."""

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Rate:
    """A measured rate of convergence.

    Attributes:
        kind: "linear", eₜ ≈ c·rateᵗ, or "sublinear", eₜ ≈ c·t^rate.
        rate: the factor per step, or the power of t, which is negative.
        low, high: the band of the rate: two standard errors of the fit, or the extremes over a sweep.
        residual: the root mean square of the fit's error in log eₜ.
    """

    kind: str
    rate: float
    low: float
    high: float
    residual: float


def measure_rate(errors: Any, *, skip: float = 0.5) -> Rate:
    """Fit a linear and a sublinear rate to errors, and return the better one.

    linear:     log eₜ = log c + t·log ρ
    sublinear:  log eₜ = log c + p·log t

    Args:
        errors: positive errors of one path, [T + 1], e₀ first, or of a sweep, [N, T + 1].
        skip: the share of the steps to leave out at the start, where a rate is not yet reached.

    Returns:
        A `Rate`. Of a sweep, the rate is the median over the paths, and the band reaches from the smallest
        to the largest. A path ends where its error falls below 10⁻¹³ of its largest: the rest is rounding.

    Raises:
        ValueError: an error is negative or not finite, or fewer than four steps are left.

    Example:
        >>> from gdfunc import testing as gt
        >>> rate = gt.measure_rate([0.5**t for t in range(20)])
        >>> rate.kind, round(rate.rate, 6)
        ('linear', 0.5)
        >>> rate = gt.measure_rate([1 / (t + 1) ** 2 for t in range(1000)])
        >>> rate.kind, round(rate.rate, 2)
        ('sublinear', -2.0)
    """
    paths = np.asarray(errors, dtype=np.float64)
    if paths.ndim not in (1, 2):
        raise ValueError(f"errors must be [T + 1] or [N, T + 1]; got shape {paths.shape}")
    if not np.isfinite(paths).all() or (paths < 0).any():
        raise ValueError("errors must be finite and >= 0; a diverged run has no rate")
    if not 0 <= skip < 1:
        raise ValueError(f"skip must be in [0, 1); got {skip}")
    fits = [_fits(path, skip) for path in np.atleast_2d(paths)]
    kinds = ("linear", "sublinear")
    kind = min(kinds, key=lambda kind: float(np.median([fit[kind].residual for fit in fits])))
    chosen = [fit[kind] for fit in fits]
    if len(chosen) == 1:
        return chosen[0]
    rates = [fit.rate for fit in chosen]
    residual = float(np.median([fit.residual for fit in chosen]))
    return Rate(kind, float(np.median(rates)), min(rates), max(rates), residual)


def _fits(path: np.ndarray, skip: float) -> dict[str, Rate]:
    """Fit both kinds to one path."""
    lost = np.flatnonzero(path <= 1e-13 * path.max(initial=0.0))
    end = int(lost[0]) if len(lost) else len(path)
    t = np.arange(max(1, int(skip * end)), end)
    if len(t) < 4:
        raise ValueError(f"a rate needs four errors above rounding after the skipped steps; got {len(t)}")
    log_error = np.log(path[t])
    linear, sublinear = _fit(t.astype(float), log_error), _fit(np.log(t), log_error)
    slope, error, residual = linear
    low, rate, high = np.exp([slope - 2 * error, slope, slope + 2 * error])
    power, spread, rest = sublinear
    return {
        "linear": Rate("linear", float(rate), float(low), float(high), residual),
        "sublinear": Rate("sublinear", power, power - 2 * spread, power + 2 * spread, rest),
    }


def _fit(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Return slope, its standard error, and the residual's root mean square, of a straight line."""
    centered = x - x.mean()
    slope = float(centered @ y / (centered @ centered))
    left = y - y.mean() - slope * centered
    variance = float(left @ left) / max(1, len(x) - 2)
    return slope, float(np.sqrt(variance / (centered @ centered))), float(np.sqrt(left @ left / len(x)))
