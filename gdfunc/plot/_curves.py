"""Curves over steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .._numerics import Scalar
from . import _axes
from ._axes import HUGE, Array, Axes
from ._style import faint


def plot_curves(
    curves: Sequence[Any],
    *,
    x: Any = None,
    ax: Axes | None = None,
    labels: Sequence[Any] | None = None,
    band: tuple[float, float] = (0.1, 0.9),
    minimum: Scalar | None = None,
    xlabel: str = "step",
    ylabel: str = "loss",
    log_x: bool = False,
    log_y: bool = True,
) -> Axes:
    """Draw curves over steps: a line for one run, median and quantile band for several.

        line = median over runs,  band = [q_low, q_high] over runs,  a diverged run counting as +∞

    Nothing is smoothed, thinned or left out. A run that becomes NaN or infinite gets a cross at its last
    finite value. The legend tells its step, or among several runs their number, and these are drawn thin.
    A band whose upper quantile is infinite continues through the top. On a logarithmic axis the line leaves
    through the bottom at values ≤ 0. Triangles on the bottom mark these places, and the legend counts them.

    The view shows all of each run that stays finite. It shows a diverging run up to a thousand times the
    largest value of the finite runs and of all starts (on a linear axis, up to one more span). Beyond that
    the line continues through the top, the cross is at the last value in view, and the legend tells the
    step.

    Args:
        curves: list or tuple of all curves, also around a single one. Each is an array or tensor [T] of one
            run, or [N, T] of N runs such as seeds.
        x: where the values belong; None for 0, …, T−1, an array or tensor [T] for all curves, or a list
            or tuple with one [T] for each (samples seen, seconds, …).
        ax: where to draw; None for a new figure of the size in rcParams. The legend stands
            below the axes if the figure has a layout that makes room for it, such as "constrained", else
            inside.
        labels: one for each curve, in their order.
        band: the two quantiles between which the band lies, interpolated linearly between runs.
        minimum: subtract this from every value, and label the axis "loss − minimum".
        xlabel: name of x, also in the legend.
        ylabel: name of the values.
        log_x: logarithmic x. Every x must be > 0.
        log_y: logarithmic y.

    Returns:
        The Axes.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        TypeError: `curves` is no list or tuple, or a curve is not of real numbers.
        ValueError: a curve is empty or neither [T] nor [N, T], or `x`, `labels`, `band` or `minimum`
            is malformed.

    Example:
        >>> losses = torch.tensor([[4.0, 2.0, 1.0], [4.0, 3.0, 2.0], [4.0, 40.0, torch.inf]])
        >>> ax = gd.plot.plot_curves([losses, losses[2]], labels=["SGD", "the third"])
        >>> for entry in ax.get_legend().get_texts():
        ...     print(entry.get_text())
        SGD: median of 3, 10–90 % (1 of 3 diverged)
        the third (not finite from step 2)

    References:
        Masataka Okabe and Kei Ito, Color Universal Design, 2008 (the colours).
    """
    runs = [_curve(f"curves[{i}]", curve) for i, curve in enumerate(_axes.check_list("curves", curves))]
    names = _axes.check_labels(labels, len(runs), "curves")
    xs = _abscissae(x, [values.shape[1] for values in runs], log_x)
    low, high = (_axes.to_number("band", quantile) for quantile in band)
    if not 0 <= low <= high <= 1:
        raise ValueError(f"band must be two quantiles with 0 <= low <= high <= 1; got {band!r}")
    if minimum is not None:
        runs = [values - _axes.to_number("minimum", minimum) for values in runs]
        ylabel = f"{ylabel} − minimum"

    ax = _axes.axes_for(ax)
    ax.set(xscale="log" if log_x else "linear", yscale="log" if log_y else "linear")
    ax.set(xlabel=xlabel, ylabel=ylabel, axisbelow=True)
    ax.grid(color=faint(ax, 0.1), linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    top = _top(runs, log_y)
    edges = [(_axes.run_quantile(values, low), _axes.run_quantile(values, high)) for values in runs]
    lines = [_draw_runs(ax, xs[i], values, edges[i], top, i) for i, values in enumerate(runs)]
    if log_y and not np.isfinite(ax.dataLim.minposy):
        # Without a positive value to go by, matplotlib would warn.
        ax.update_datalim([(xs[0][0], 0.1), (xs[0][0], 1.0)])
    # Only now are the limits known, and with them what left the view and how far up an infinite band goes.
    ax.autoscale_view()
    top = max(ax.get_ylim())
    entries: list[tuple[Any, str]] = []
    for steps, values, edge, line, name in zip(xs, runs, edges, lines, names, strict=True):
        handle: Any = line
        _draw_ends(ax, steps, values, top, line.get_color())
        if len(values) > 1:
            handle = (_draw_band(ax, steps, *edge, line.get_color()), line)
            name += f": median of {len(values)}, {100 * low:g}–{100 * high:g} %"
        entries.append((handle, _axes.with_notes(name, _curve_notes(steps, values, top, xlabel, log_y))))
    _axes.draw_legend(ax, entries)
    return ax


def _curve(name: str, value: Any) -> Array:
    """Return the values [N, T] of a curve's runs."""
    values = _axes.to_array(name, value)
    if values.ndim not in (1, 2) or values.size == 0:
        raise ValueError(f"{name} must be [T] or [N, T] with N, T >= 1; got shape {values.shape}")
    return np.atleast_2d(values)


def _abscissae(x: Any, lengths: list[int], log_x: bool) -> list[Array]:
    """Return x [T] of each curve."""
    each = x if isinstance(x, (list, tuple)) else [x] * len(lengths)
    if x is None:
        each = [np.arange(length) for length in lengths]
    if len(each) != len(lengths):
        raise ValueError(f"x has {len(each)} entries but curves has {len(lengths)}; give one for each")
    xs = [_axes.to_array(f"x[{i}]", values) for i, values in enumerate(each)]
    for i, (values, length) in enumerate(zip(xs, lengths, strict=True)):
        if values.shape != (length,) or not np.isfinite(values).all():
            raise ValueError(f"x[{i}] must be {length} finite numbers, as curves[{i}]; got {values!r}")
        if log_x and (values <= 0).any():
            raise ValueError(
                f"x[{i}] has the value {values.min():g}, which no logarithmic axis can show; "
                "give x > 0, such as steps counted from 1"
            )
    return xs


def _top(runs: list[Array], log_y: bool) -> float:
    """Return the largest value to show: how far a diverging run is followed."""
    steady = [values[np.isfinite(values).all(axis=1)].ravel() for values in runs]
    known = np.concatenate([*steady, *(values[:, 0] for values in runs)])
    known = known[_axes.in_view(known, HUGE) & ((known > 0) | (not log_y))]
    if len(known) == 0:
        return HUGE
    low, high = known.min(), known.max()
    return min(HUGE, 1e3 * high if log_y else high + (high - low or abs(high) or 1.0))


def _diverged(values: Array) -> Any:
    """Tell which of the runs [N, T] cannot be shown whole."""
    return ~_axes.in_view(values, HUGE).all(axis=1)


def _curve_notes(x: Array, values: Array, top: float, xlabel: str, log_y: bool) -> list[str]:
    notes, alive, diverged = [], np.isfinite(values), _diverged(values)
    if len(values) > 1:
        notes += [f"{diverged.sum()} of {len(values)} diverged"] if diverged.any() else []
    elif diverged[0]:
        end = _axes.in_view(values[0], top).argmin()
        notes += [f"leaves the view at {xlabel} {x[end]:.12g}"] if alive[0, end] else []
        notes += [] if alive.all() else [_axes.not_finite_note(alive[0], x, xlabel)]
    low = (values[alive] <= 0).sum()
    notes += [f"{low} of {values.size} values ≤ 0"] if log_y and low else []
    return notes


def _draw_runs(ax: Axes, x: Array, values: Array, edges: tuple[Array, Array], top: float, i: int) -> Any:
    """Draw a run, or the median of several and the diverged ones, and fit the limits to their view."""
    from matplotlib import rcParams
    from matplotlib.lines import Line2D

    color, dashes = _axes.line_style(i, ax)
    width = rcParams["lines.linewidth"]
    lost = values[_diverged(values)]
    middle = _axes.run_quantile(values, 0.5) if len(values) > 1 else values[0]
    line = Line2D(x, middle, color=color, linestyle=dashes, linewidth=width, zorder=3)
    line.set_marker("o" if len(x) == 1 else "")
    ax.add_artist(line)  # unlike add_line, without making room for all of it
    if len(values) > 1 and len(lost):
        # One thin line for all of them: NaN parts the runs.
        parted = np.pad(lost, [(0, 0), (0, 1)], constant_values=np.nan).ravel()
        places = np.tile(np.append(x, np.nan), len(lost))
        ax.add_artist(Line2D(places, parted, color=color, linewidth=0.4 * width))
    ax.update_datalim(np.column_stack([x, x]), updatey=False)
    for shown in (middle, *edges, *lost):
        ax.update_datalim(np.column_stack([x, shown])[_axes.in_view(shown, top)])
    if ax.get_yscale() == "log" and (middle <= 0).any():
        low, bottom = x[middle <= 0], ax.get_xaxis_transform()
        ax.plot(low, 0 * low + 0.012, "v", color=color, transform=bottom, markersize=3)
    return line


def _draw_ends(ax: Axes, x: Array, values: Array, top: float, color: Any) -> None:
    """Mark the last value in view of every run that diverges."""
    from matplotlib.lines import Line2D

    inside = _axes.in_view(values, top)
    runs = np.flatnonzero(_diverged(values) & inside[:, 0])
    if len(runs):
        last = inside[runs].argmin(axis=1) - 1
        crosses = Line2D(x[last], values[runs, last], linestyle="", marker="x", color=color, zorder=4)
        crosses.set(markersize=7, markeredgewidth=1.8)
        ax.add_artist(crosses)


def _draw_band(ax: Axes, x: Array, lower: Array, upper: Array, color: Any) -> Any:
    """Fill between two quantiles without moving the limits."""
    from matplotlib.collections import PolyCollection

    edge = np.concatenate([np.column_stack([x, upper]), np.column_stack([x, lower])[::-1]])
    # A renderer fills no infinite polygon. A hundred heights of the axes up, the eye sees no difference.
    with np.errstate(over="ignore"):
        sky = (ax.transScale + ax.transLimits).inverted().transform((0.0, 100.0))[1]
    edge[:, 1] = np.minimum(edge[:, 1], np.nan_to_num(sky))
    band = PolyCollection([edge], facecolor=color, edgecolor="none", alpha=0.2, zorder=2)
    ax.add_collection(band, autolim=False)
    return band
