"""A measured rate of convergence beside its theorem."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from . import _axes
from ._axes import Array, Axes
from ._curves import plot_curves
from ._style import foreground


class _Rate(Protocol):
    """The result of `gdfunc.testing.measure_rate`."""

    kind: str
    rate: float
    low: float
    high: float


def plot_rate(
    errors: Any,
    rate: _Rate,
    theorem: float | Callable[[Array], Any] | None = None,
    *,
    skip: float = 0.5,
    ax: Axes | None = None,
    label: str = "error",
) -> Axes:
    """Draw errors over steps, the rate measured on them, and the rate or bound of a theorem.

        linear: eₜ = c · rateᵗ, a straight line in log e over t
        sublinear: eₜ = c · t^rate, a straight line in log e over log t, from step 1 on

    The measured line covers the steps on which the rate was measured. Its constant is the mean of log e
    there. A rate of a theorem starts from the same point, so that the slopes can be compared. A bound of a
    theorem is drawn where it is, over all steps.

    Args:
        errors: positive errors of one path, [T + 1], e₀ first, or of N paths, [N, T + 1], as
            `gdfunc.testing.measure_rate` takes them.
        rate: what it returned: `kind`, "linear" or "sublinear", `rate`, `low` and `high`.
        theorem: the rate that a theorem promises, of the same kind; or its bound, a function of the steps
            [T + 1] (an array) that returns as many errors; None for none.
        skip: the share of the steps that were left out, as in `measure_rate`.
        ax: where to draw; None for a new figure of the size in rcParams.
        label: name of the errors.

    Returns:
        The Axes.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: the errors are neither [T + 1] nor [N, T + 1], or have too few positive ones, or the
            kind is unknown, or the bound has another shape.

    Example:
        >>> from gdfunc import testing
        >>> errors = [0.5**t for t in range(20)]
        >>> ax = gd.plot.plot_rate(errors, testing.measure_rate(errors), theorem=0.6)
        >>> for entry in ax.get_legend().get_texts():
        ...     print(entry.get_text())
        error
        measured: × 0.5 a step
        theorem: × 0.6 a step
    """
    paths = np.atleast_2d(_axes.to_array("errors", errors))
    if paths.ndim != 2 or not paths.size:
        raise ValueError(f"errors must be [T + 1] or [N, T + 1]; got shape {paths.shape}")
    if not np.isfinite(paths).all() or (paths < 0).any():
        raise ValueError("errors must be finite and >= 0; a diverged run has no rate, draw plot_curves")
    if rate.kind not in ("linear", "sublinear"):
        raise ValueError(f"rate.kind must be 'linear' or 'sublinear'; got {rate.kind!r}")
    is_linear, steps = rate.kind == "linear", np.arange(paths.shape[1])
    fitted, level = _fitted(paths, rate, skip)
    first = 0 if is_linear else 1
    xlabel = "step" if is_linear else "step, from 1"
    before = 0 if ax is None else len(ax.lines)
    ax = plot_curves(
        [paths[:, first:]],
        x=steps[first:],
        ax=ax,
        labels=[label],
        label_lines=False,
        xlabel=xlabel,
        ylabel=label,
        log_x=not is_linear,
    )
    line, band = ax.lines[before], ax.collections[-1:] if len(paths) > 1 else []
    name = f"{label}: median of {len(paths)}, 10–90 %" if len(paths) > 1 else label
    entries: list[tuple[Any, str]] = [((*band, line), name)]

    color = foreground(ax)
    measured = level * _shape(fitted, rate.kind, rate.rate)
    (line,) = ax.plot(fitted, _shown(measured), "-", color=color, linewidth=1.0, zorder=5)
    spread = f" ({rate.low:.4g} to {rate.high:.4g})" if f"{rate.low:.4g}" != f"{rate.high:.4g}" else ""
    entries.append((line, f"measured: {_say(rate.kind, rate.rate)}{spread}"))
    if callable(theorem):
        bound = _axes.to_array("theorem", theorem(steps[first:]))
        if bound.shape != steps[first:].shape:
            raise ValueError(f"theorem must return {len(steps) - first} errors; got shape {bound.shape}")
        (line,) = ax.plot(steps[first:], _shown(bound), ":", color=color, linewidth=1.4, zorder=4)
        entries.append((line, "theorem: the bound"))
    elif theorem is not None:
        promised = _axes.to_number("theorem", theorem)
        shape = _shape(fitted, rate.kind, promised)
        expected = _shown(measured[0] * shape / shape[0])
        (line,) = ax.plot(fitted, expected, ":", color=color, linewidth=1.4, zorder=4)
        entries.append((line, f"theorem: {_say(rate.kind, promised)}"))
    _axes.draw_legend(ax, entries)
    return ax


def _fitted(paths: Array, rate: _Rate, skip: float) -> tuple[Array, float]:
    """Return the steps on which the rate was measured, and the constant of its line."""
    alive = (paths > 1e-13 * paths.max(axis=1, keepdims=True)).all(axis=0)
    end = len(alive) if alive.all() else int(alive.argmin())
    fitted = np.arange(max(1, int(skip * end)), end)
    if len(fitted) < 2:
        raise ValueError(f"errors must have two above rounding after the skipped steps; got {len(fitted)}")
    rest = np.log(paths[:, fitted]) - np.log(_shape(fitted, rate.kind, rate.rate))
    return fitted, float(np.exp(np.median(rest.mean(axis=1))))


def _shape(steps: Array, kind: str, rate: float) -> Array:
    return rate ** steps.astype(float) if kind == "linear" else steps.astype(float) ** rate


def _shown(values: Array) -> Array:
    """Leave out what would overflow the limits of the axes."""
    return np.where(np.abs(values) <= _axes.HUGE, values, np.nan)


def _say(kind: str, rate: float) -> str:
    return f"× {rate:.4g} a step" if kind == "linear" else f"∝ 1 / step^{-rate:.4g}"
