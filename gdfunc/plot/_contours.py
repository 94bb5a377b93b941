"""Contours of a loss on a plane, in greys on which every path can be seen."""

from __future__ import annotations

from typing import Any

import numpy as np

from .._errors import check_int
from . import _axes
from ._axes import Array, Axes
from ._contrast import shades
from ._style import background, faint, foreground
from ._tracks import scaled

COUNT = 20


def check_levels(levels: Any) -> Array | str | int:
    if isinstance(levels, str):
        if levels not in ("log", "linear"):
            raise ValueError(f"levels must be 'log', 'linear', an int or increasing losses; got {levels!r}")
        return levels
    if isinstance(levels, int):
        return check_int("levels", levels, 2)
    return _axes.to_increasing("levels", levels)


def levels_for(levels: Array | str | int, heights: Array, lowest: float) -> Array:
    """Return the losses at which to draw contours."""
    if isinstance(levels, np.ndarray):
        return levels
    if levels == "linear":
        return _linear_levels(heights)
    return _log_levels(heights, lowest, COUNT if isinstance(levels, str) else levels)


def _log_levels(heights: Array, lowest: float, count: int) -> Array:
    gaps = heights[np.isfinite(heights)] - lowest
    gaps = gaps[gaps > 0]
    if len(gaps) == 0:
        return gaps
    low, high = np.quantile(gaps, [0.01, 0.99])
    # Levels of an almost flat loss may round to the same number.
    return np.unique(lowest + np.geomspace(low if low < high else high / 2, high, count))


def _linear_levels(heights: Array) -> Array:
    """Return round numbers, so that a level runs through a saddle of height 0."""
    from matplotlib.ticker import MaxNLocator

    finite = heights[np.isfinite(heights)]
    if len(finite) == 0 or finite.min() == finite.max():
        return finite[:0]
    return np.unique(MaxNLocator(COUNT).tick_values(*np.quantile(finite, [0.0, 0.99])))


def draw_contours(ax: Axes, x: Array, y: Array, heights: Array, levels: Array) -> list[tuple[Any, str]]:
    """Draw the contours, paler where the loss is higher, and return the entry of the blank area."""
    from matplotlib.colors import BoundaryNorm, ListedColormap

    defined = np.ma.masked_invalid(heights)
    if len(levels) >= 2:
        greys = ListedColormap(shades(ax, len(levels) + 1))
        norm = BoundaryNorm(levels, len(levels) + 1, extend="both")
        filled = ax.contourf(x, y, defined, levels, cmap=greys, norm=norm, extend="both", zorder=0)
        line = faint(ax, 0.3)
        lines = ax.contour(
            x, y, defined, levels, colors=[line], linewidths=0.5, linestyles="solid", zorder=1
        )
        for artist in (filled, lines):
            artist.set_rasterized(True)
    return [_axes.hatch_background(ax, "loss not finite")] if np.ma.is_masked(defined) else []


def lowest_inside(x: Array, y: Array, heights: Array) -> Array | None:
    """Return (x, y, height) of the lowest point of a grid, unless it is at the border or one of equals."""
    defined = np.where(np.isfinite(heights), heights, np.inf)
    row, column = np.unravel_index(defined.argmin(), defined.shape)
    inner = 0 < row < len(y) - 1 and 0 < column < len(x) - 1
    alone = inner and (defined == defined[row, column]).sum() == 1
    return np.array([x[column], y[row], defined[row, column]]) if alone else None


def draw_lowest(ax: Axes, lowest: Array | None) -> list[tuple[Any, str]]:
    """Mark the lowest point of the grid, and return its legend entry."""
    if lowest is None:
        return []
    (mark,) = ax.plot(*lowest[:2], "P", markersize=scaled(8), zorder=2.5, color=foreground(ax))
    mark.set(linestyle="", markeredgecolor=background(ax))
    return [(mark, f"lowest point of the grid, {lowest[2]:.3g}")]
