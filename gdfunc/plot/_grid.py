"""Maps of a sweep."""

from __future__ import annotations

from typing import Any

import numpy as np

from .._sweep._result import SweepResult
from . import _axes, _cells
from ._axes import HUGE, Array, Axes
from ._cells import Side


def plot_grid(
    result: SweepResult,
    x: str,
    y: str,
    *,
    values: Any = None,
    ax: Axes | None = None,
    label: str = "output",
    start: Any = None,
    limits: tuple[float, float] | None = None,
    best: str | None = "low",
    cmap: Any = None,
    log_x: bool = False,
    log_y: bool = False,
    log_color: bool | None = None,
) -> Axes:
    """Draw a sweep as a map: a colour for each point of two of its axes.

        colour = median over the other axes,  a diverged member counting as +∞

    A cell reaches halfway to its neighbours (on a logarithmic axis to the geometric mean). A cell is
    hatched if its median is not finite or above `start`, and has a cross if fewer members diverged. A star
    marks the best cell. The legend tells all this. Values beyond the limits of the colours have the colour
    of the end, and the colour bar has an arrow there.

    Args:
        result: of `sweep`, on a grid that is not zipped.
        x: the axis of the grid to draw along x. Its values are numbers, increasing or decreasing, or are
            drawn side by side under their names, such as those of optimizers.
        y: the same along y.
        values: what to draw, an array or tensor [N] in the order of the grid's members; None for the
            outputs, which are then one number a member.
        ax: where to draw; None for a new figure of the size in rcParams.
        label: name of the values, at the colour bar.
        start: the value before the first step: what ends above it counts as diverged.
        limits: the values at the two ends of the colours; None for the least and the largest drawn, but
            at most a thousand times the median, since runs diverge without reaching infinity.
        best: "low" or "high", the side on which values are good, and colours bright; None marks no cell.
        cmap: matplotlib's name of a colour map, or one itself; None for viridis, with dark as bad.
        log_x: logarithmic x. Every x must be a number > 0.
        log_y: logarithmic y.
        log_color: logarithmic colours. Values ≤ 0 have the colour of the lower end. None for logarithmic
            if the values are > 0 and the limits more than a factor of 100 apart.

    Returns:
        The Axes.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        TypeError: result is no SweepResult, or its outputs or the values are no real numbers.
        ValueError: the grid is zipped or has no such axes, an axis is not monotonic, the values are not
            one a member, or `limits`, `start` or `best` is malformed.

    Example:
        >>> grid = gd.grid(momentum=[0.0, 0.5, 0.9], lr=[0.1, 1.0, 3.0])
        >>> result = gd.sweep(lambda momentum, lr: torch.where(lr < 2, lr - momentum, torch.inf), grid)
        >>> ax = gd.plot.plot_grid(result, "lr", "momentum", log_x=True)
        >>> for entry in ax.get_legend().get_texts():
        ...     print(entry.get_text())
        3 of 9 cells: diverged
        best: -0.8 at lr 0.1, momentum 0.9
    """
    across, upward = _cells.sides(result, x, y, log_x, log_y)
    heights, share = _heights(result, x, y, values)
    span = None if limits is None else _axes.to_increasing("limits", limits)
    if span is not None and (len(span) != 2 or (log_color and span[0] <= 0)):
        kind = "two positive numbers" if log_color else "two numbers"
        raise ValueError(f"limits must be {kind}, increasing; got {limits!r}")
    if best not in ("low", "high", None):
        raise ValueError(f"best must be 'low', 'high' or None; got {best!r}")
    bound = np.inf if start is None else _axes.to_number("start", start)
    ax = _axes.axes_for(ax)

    from matplotlib.colors import LogNorm, Normalize

    lost = ~(np.abs(heights) <= HUGE) | (heights > bound)
    if log_color is None:
        log_color = _is_wide(heights[~lost], span)
    known = heights[~lost & ((heights >= 1 / HUGE) | (not log_color))]
    low, high = _span(known, log_color) if span is None else span
    norm = LogNorm(low, high) if log_color else Normalize(low, high)
    # A logarithm would hide what is ≤ 0 as if it were not finite.
    shown = np.ma.array(np.maximum(heights, low / 10) if log_color else heights, mask=lost)
    _cells.prepare_sides(ax, across, upward)
    cmap = cmap or ("viridis" if best == "high" else "viridis_r")
    mesh = ax.pcolormesh(across.edges, upward.edges, shown, norm=norm, cmap=cmap, rasterized=True)
    beyond = (shown.min() < low, shown.max() > high) if not lost.all() else (False, False)
    extend = {(True, True): "both", (True, False): "min", (False, True): "max"}.get(beyond, "neither")
    figure: Any = ax.get_figure()
    figure.colorbar(mesh, ax=ax, label=label, extend=extend)
    name = "diverged" if start is None else f"diverged or above the start, {bound:.4g}"
    entries = _draw_lost(ax, across, upward, lost, share, name)
    if best is not None:
        entries += _draw_best(ax, across, upward, np.where(lost, np.nan, heights), best)
    if entries:
        _axes.draw_legend(ax, entries)
    return ax


def _heights(result: SweepResult, x: str, y: str, values: Any) -> tuple[Array, Array]:
    """Return the medians [Y, X] over the other axes, and the shares of members that diverged."""
    members, diverged = _cells.members_of(result, values)
    medians = _axes.run_quantile(_cells.by_cell(result, x, y, members), 0.5)
    return medians, _cells.by_cell(result, x, y, diverged).mean(axis=0)


def _is_wide(known: Array, span: Array | None) -> bool:
    """Tell whether values are positive and the ends of their colours more than a factor of 100 apart."""
    if len(known) == 0 or (known <= 0).any():
        return False
    low, high = _span(known, True) if span is None else span
    return bool(low > 0 and high > 100 * low)


def _span(known: Array, log: bool) -> tuple[float, float]:
    """Return the least and the largest value, apart from each other, without those far above the median."""
    if len(known) == 0:
        return 1.0, 10.0
    median = float(np.median(known))
    usual = known[known <= 1e3 * median] if median > 0 else known
    low, high = float(usual.min()), float(usual.max())
    return low, high if low < high else (10 * low if log else low + (abs(low) or 1.0))


def _draw_lost(
    ax: Axes, across: Side, upward: Side, lost: Array, share: Array, name: str
) -> list[tuple[Any, str]]:
    """Hatch the lost cells [Y, X], mark the cells with some diverged members, and return legend entries."""
    entries: list[tuple[Any, str]] = []
    if lost.any():
        entries.append(_axes.hatch_background(ax, f"{lost.sum()} of {lost.size} cells: {name}"))
    some = (share > 0) & ~lost
    if some.any():
        rows, columns = np.nonzero(some)
        mark = _cells.draw_marks(ax, across.centres[columns], upward.centres[rows])
        entries.append((mark, f"{some.sum()} of {lost.size} cells: some of the runs diverged"))
    return entries


def _draw_best(ax: Axes, across: Side, upward: Side, heights: Array, best: str) -> list[tuple[Any, str]]:
    """Mark the best cell, if not all are alike, and return its legend entry."""
    known = heights[np.isfinite(heights)]
    if len(known) == 0 or (len(known) > 1 and known.min() == known.max()):
        return []
    value = known.min() if best == "low" else known.max()
    row, column = (int(places[0]) for places in np.nonzero(heights == value))
    (star,) = ax.plot(across.centres[column], upward.centres[row], "*", markersize=11, linestyle="")
    star.set(color="white", markeredgecolor="black", markeredgewidth=0.8)
    place = f"{across.name} {across.labels[column]}, {upward.name} {upward.labels[row]}"
    return [(star, f"best: {value:.4g} at {place}")]
