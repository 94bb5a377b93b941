"""Maps of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from .._sweep._result import SweepResult
from . import _axes
from ._axes import HUGE, Array, Axes


def plot_grid(
    result: SweepResult,
    x: str,
    y: str,
    *,
    values: Any = None,
    ax: Axes | None = None,
    label: str = "output",
    limits: tuple[float, float] | None = None,
    cmap: Any = "viridis",
    log_x: bool = False,
    log_y: bool = False,
    log_color: bool = False,
) -> Axes:
    """Draw a sweep as a map: a colour for each point of two of its axes.

        colour = median over the other axes,  a diverged member counting as +∞

    A cell reaches halfway to its neighbours (on a logarithmic axis to the geometric mean). A cell is
    hatched if its median is not finite, and has a cross if fewer members diverged. The legend counts
    both. Values beyond `limits` have the colour of the end, and the colour bar has an arrow there.

    Args:
        result: of `sweep`, on a grid that is not zipped.
        x: the axis of the grid to draw along x, whose values are numbers, increasing or decreasing.
        y: the same along y.
        values: what to draw, an array or tensor [N] in the order of the grid's members; None for the
            outputs, which are then one number a member.
        ax: where to draw; None for a new figure of the size in rcParams.
        label: name of the values, at the colour bar.
        limits: the values at the two ends of the colours; None for the least and the largest drawn: give
            them where runs diverge without reaching infinity, and would take up all colours.
        cmap: matplotlib's name of a colour map, or one itself.
        log_x: logarithmic x. Every x must be > 0.
        log_y: logarithmic y.
        log_color: logarithmic colours. Values ≤ 0 have the colour of the lower end.

    Returns:
        The Axes.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        TypeError: result is no SweepResult, or its outputs or the values are no real numbers.
        ValueError: the grid is zipped or has no such axes, an axis is not monotonic, the values are not
            one a member, or `limits` is malformed.

    Example:
        >>> grid = gd.grid(momentum=[0.0, 0.5, 0.9], lr=[0.1, 1.0, 3.0])
        >>> result = gd.sweep(lambda momentum, lr: torch.where(lr < 2, lr * momentum, torch.inf), grid)
        >>> ax = gd.plot.plot_grid(result, "lr", "momentum", log_x=True)
        >>> ax.get_xlabel(), ax.get_ylabel(), ax.get_legend().get_texts()[0].get_text()
        ('lr', 'momentum', '3 of 9 cells: diverged')
    """
    if not isinstance(result, SweepResult):
        raise TypeError(f"result is {type(result).__name__}; pass what gd.sweep returns")
    if result.grid.zipped:
        raise ValueError("result is of a zipped grid, which has no cells; draw plot_curves")
    names = list(result.grid.axes)
    if x == y or x not in names or y not in names:
        raise ValueError(f"x and y must be two of the grid's axes, {', '.join(names)}; got {x!r} and {y!r}")
    xs, ys = (_ticks(name, result.grid.axes[name].labels, log) for name, log in ((x, log_x), (y, log_y)))
    heights, share = _cells(result, names.index(x), names.index(y), values)
    span = None if limits is None else _axes.to_increasing("limits", limits)
    if span is not None and (len(span) != 2 or (log_color and span[0] <= 0)):
        kind = "two positive numbers" if log_color else "two numbers"
        raise ValueError(f"limits must be {kind}, increasing; got {limits!r}")
    ax = _axes.axes_for(ax)

    from matplotlib.colors import LogNorm, Normalize

    lost = ~(np.abs(heights) <= HUGE)
    known = heights[~lost & ((heights > 0) | (not log_color))]
    low, high = _span(known, log_color) if span is None else span
    norm = LogNorm(low, high) if log_color else Normalize(low, high)
    # A logarithm would hide what is ≤ 0 as if it were not finite.
    shown = np.ma.array(np.maximum(heights, low / 10) if log_color else heights, mask=lost)
    ax.set(xscale="log" if log_x else "linear", yscale="log" if log_y else "linear", xlabel=x, ylabel=y)
    mesh = ax.pcolormesh(_edges(xs, log_x), _edges(ys, log_y), shown, norm=norm, cmap=cmap, rasterized=True)
    beyond = (shown.min() < low, shown.max() > high) if not lost.all() else (False, False)
    extend = {(True, True): "both", (True, False): "min", (False, True): "max"}.get(beyond, "neither")
    figure: Any = ax.get_figure()
    figure.colorbar(mesh, ax=ax, label=label, extend=extend)
    entries = _draw_lost(ax, xs, ys, lost, share)
    if entries:
        _axes.draw_legend(ax, entries)
    return ax


def _ticks(name: str, labels: Sequence[Any], log: bool) -> Array:
    """Return the values of a grid's axis as numbers that increase or decrease."""
    numbers = np.asarray(labels)
    if numbers.dtype.kind not in "iuf":
        raise ValueError(f"axis {name} must have numbers as its values; got {list(labels)!r}")
    numbers = numbers.astype(np.float64)
    change = np.diff(numbers)
    if not np.isfinite(numbers).all() or not ((change > 0).all() or (change < 0).all()):
        raise ValueError(f"axis {name} must be finite and increasing or decreasing; got {list(labels)!r}")
    if log and (numbers <= 0).any():
        raise ValueError(f"axis {name} has the value {numbers.min():g}, which no logarithmic axis can show")
    return numbers


def _cells(result: SweepResult, x: int, y: int, values: Any) -> tuple[Array, Array]:
    """Return the medians [Y, X] over the other axes, and the shares of members that diverged."""
    if values is None and not isinstance(result.outputs, Tensor):
        raise TypeError("the outputs are a tree; pass one of its leaves, values=result.outputs['…']")
    drawn = _axes.to_array("values", result.outputs if values is None else values)
    if drawn.shape != (len(result.grid),):
        raise ValueError(
            f"values must be one number for each of the {len(result.grid)} members; got shape {drawn.shape}"
        )
    shape = result.grid.shape

    def spread(members: Array) -> Array:
        """Lay members [N] out as [Y, X, others]."""
        return np.moveaxis(members.reshape(shape), (y, x), (0, 1)).reshape(shape[y], shape[x], -1)

    diverged = result.diverged.cpu().numpy() | ~np.isfinite(drawn)
    medians = _axes.run_quantile(np.moveaxis(spread(np.where(diverged, np.inf, drawn)), -1, 0), 0.5)
    return medians, spread(diverged).mean(axis=-1)


def _span(known: Array, log: bool) -> tuple[float, float]:
    """Return the least and the largest value, apart from each other."""
    if len(known) == 0:
        return 1.0, 10.0
    low, high = float(known.min()), float(known.max())
    return low, high if low < high else (10 * low if log else low + (abs(low) or 1.0))


def _edges(centres: Array, log: bool) -> Array:
    """Return the n+1 edges of n cells, halfway between neighbours."""
    points = np.log(centres) if log else centres
    middles = (points[1:] + points[:-1]) / 2 if len(points) > 1 else points + 0.5
    edges = np.concatenate([[2 * points[0] - middles[0]], middles, [2 * points[-1] - middles[-1]]])
    edges = edges if len(points) > 1 else edges[:2]
    return np.exp(edges) if log else edges


def _draw_lost(ax: Axes, x: Array, y: Array, lost: Array, share: Array) -> list[tuple[Any, str]]:
    """Hatch the lost cells [Y, X], mark the cells with some diverged members, and return legend entries."""
    entries: list[tuple[Any, str]] = []
    if lost.any():
        entries.append(_axes.hatch_background(ax, f"{lost.sum()} of {lost.size} cells: diverged"))
    some = (share > 0) & ~lost
    if some.any():
        rows, columns = np.nonzero(some)
        (mark,) = ax.plot(x[columns], y[rows], "x", color="black", markersize=3, linestyle="")
        entries.append((mark, f"{some.sum()} of {lost.size} cells: some of the runs diverged"))
    return entries
