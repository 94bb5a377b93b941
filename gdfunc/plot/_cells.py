"""The cells of a map: two axes of a sweep, numbers or names, and the members that share a cell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from .._sweep._result import SweepResult
from ._axes import Array, Axes, to_array
from ._style import font_size, halo

_TICKS = 12  # more values of an axis would crowd it


class Side(NamedTuple):
    """An axis of a map."""

    name: str
    centres: Array  # [n], the places of its values
    labels: list[str]  # its values, written short
    is_log: bool
    has_names: bool  # in place of numbers

    @property
    def edges(self) -> Array:
        """The n+1 edges of n cells, halfway between neighbours."""
        points = np.log(self.centres) if self.is_log else self.centres
        middles = (points[1:] + points[:-1]) / 2 if len(points) > 1 else points + 0.5
        edges = np.concatenate([[2 * points[0] - middles[0]], middles, [2 * points[-1] - middles[-1]]])
        edges = edges if len(points) > 1 else edges[:2]
        return np.exp(edges) if self.is_log else edges


def sides(result: Any, x: str, y: str, log_x: bool, log_y: bool) -> tuple[Side, Side]:
    """Return the two axes of a map of a sweep."""
    if not isinstance(result, SweepResult):
        raise TypeError(f"result is {type(result).__name__}; pass what gd.sweep returns")
    if result.grid.zipped:
        raise ValueError("result is of a zipped grid, which has no cells; draw plot_curves")
    names = list(result.grid.axes)
    if x == y or x not in names or y not in names:
        raise ValueError(f"x and y must be two of the grid's axes, {', '.join(names)}; got {x!r} and {y!r}")
    axes = result.grid.axes
    return _side(x, axes[x].labels, log_x), _side(y, axes[y].labels, log_y)


def _side(name: str, labels: Sequence[Any], log: bool) -> Side:
    if any(isinstance(label, bool) or not isinstance(label, int | float) for label in labels):
        if log:
            raise ValueError(f"axis {name} must have numbers to be logarithmic; got {list(labels)!r}")
        return Side(name, np.arange(float(len(labels))), [str(label) for label in labels], False, True)
    numbers = np.asarray(labels, dtype=np.float64)
    change = np.diff(numbers)
    if not np.isfinite(numbers).all() or not ((change > 0).all() or (change < 0).all()):
        raise ValueError(f"axis {name} must be finite and increasing or decreasing; got {list(labels)!r}")
    if log and (numbers <= 0).any():
        raise ValueError(f"axis {name} has the value {numbers.min():g}, which no logarithmic axis can show")
    return Side(name, numbers, _short(numbers), log, False)


def _short(numbers: Array) -> list[str]:
    """Write numbers with two digits if these tell them apart, and whole ones in full."""
    short = [f"{number:.2g}" if number % 1 else f"{number:.12g}" for number in numbers]
    return short if len({*short}) == len(numbers) else [f"{number:.6g}" for number in numbers]


def members_of(result: SweepResult, values: Any) -> tuple[Array, Array]:
    """Return the outputs or values [N] of the members, +∞ where they diverged, and whether they did."""
    if values is None and not isinstance(result.outputs, Tensor):
        raise TypeError("the outputs are a tree; pass one of its leaves, values=result.outputs['…']")
    drawn = to_array("values", result.outputs if values is None else values)
    if drawn.shape != (len(result.grid),):
        raise ValueError(
            f"values must be one number for each of the {len(result.grid)} members; got shape {drawn.shape}"
        )
    diverged = result.diverged.cpu().numpy() | ~np.isfinite(drawn)
    return np.where(diverged, np.inf, drawn), diverged


def by_cell(result: SweepResult, x: str, y: str, members: Array) -> Array:
    """Lay members [N] out as [others, Y, X]."""
    names, shape = list(result.grid.axes), result.grid.shape
    row, column = names.index(y), names.index(x)
    laid = np.moveaxis(members.reshape(shape), (row, column), (0, 1))
    return np.moveaxis(laid.reshape(shape[row], shape[column], -1), -1, 0)


def prepare_sides(ax: Axes, across: Side, upward: Side) -> None:
    """Set scales and names of the axes, and ticks at their own values if these have room."""
    ax.set(xscale="log" if across.is_log else "linear", yscale="log" if upward.is_log else "linear")
    ax.set(xlabel=across.name, ylabel=upward.name)
    figure: Any = ax.get_figure()
    width, height = (72 * length / figure.dpi for length in ax.bbox.size)
    if _has_room(across, width):
        ax.set_xticks([], minor=True)
        ax.set_xticks(across.centres, across.labels)
        letters = max(map(len, across.labels)) * len(across.labels)
        if letters > width / 7:
            ax.tick_params(axis="x", labelrotation=90)
    # A legend may take a third of the height.
    if _has_room(upward, height / 1.5):
        ax.set_yticks([], minor=True)
        ax.set_yticks(upward.centres, upward.labels)


def draw_marks(ax: Axes, x: Array, y: Array) -> Any:
    """Draw small black crosses on white, which both dark and bright cells show."""
    (mark,) = ax.plot(x, y, "x", color="black", markersize=3, linestyle="")
    mark.set_path_effects(halo("white", 3))
    return mark


def _has_room(side: Side, length: float) -> bool:
    """Tell whether a side of a length in points has room for a tick at each of its values."""
    points = np.sort(np.log(side.centres) if side.is_log else side.centres)
    if side.has_names or len(points) == 1:
        return True
    nearest = float(np.diff(points).min() / np.ptp(points)) * length
    return len(points) <= _TICKS and nearest > 1.1 * font_size()
