"""Arguments, axes, colours, quantiles and legends: the parts that every kind of picture needs."""

from __future__ import annotations

import functools
import io
import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .._errors import missing_extra
from ._style import background, faint, font_size
from ._style import line_style as line_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
else:
    Axes = Any  # so that matplotlib is imported only when something is drawn


Array = np.ndarray

# matplotlib's limits, margins and ticks overflow somewhat above this, where a float64 run still is finite.
HUGE = 1e200

_LETTERS = 26  # across a legend, at least


def check_list(name: str, value: Any) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)):
        kind = type(value).__name__
        raise TypeError(f"{name} must be a list or tuple, also around a single one; got {kind}")
    return value


def check_labels(labels: Sequence[Any] | None, count: int, what: str) -> list[str]:
    if count == 0:
        raise ValueError(f"{what} is empty; give at least one")
    if labels is None:
        return [f"run {i}" for i in range(count)]
    if len(labels) != count:
        raise ValueError(f"labels has {len(labels)} entries but {what} has {count}; give one for each")
    return [str(label) for label in labels]


def to_array(name: str, value: Any) -> Array:
    """Copy real numbers from any device, and from dtypes that NumPy does not know."""
    if isinstance(value, Tensor) and not value.is_complex():
        if value.layout != torch.strided:
            raise TypeError(f"{name} must be dense; got {value.layout}; pass its to_dense()")
        return value.detach().cpu().to(torch.float64, copy=True).numpy()
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name} must hold real numbers; got dtype {array.dtype}")
    return array.astype(np.float64)


def to_number(name: str, value: Any) -> float:
    number = to_array(name, value)
    if number.shape != () or not np.isfinite(number):
        raise ValueError(f"{name} must be a finite number; got {value!r}")
    return float(number)


def to_increasing(name: str, value: Any) -> Array:
    numbers = to_array(name, value)
    rising = numbers.ndim == 1 and len(numbers) >= 2 and (np.diff(numbers) > 0).all()
    if not rising or not np.isfinite(numbers).all():
        raise ValueError(f"{name} must be two or more finite numbers, increasing; got {value!r}")
    return numbers


def run_quantile(values: Array, q: float) -> Array:
    """Interpolate between sorted runs [N, T]; next to a diverged run that is infinite."""
    ordered = np.sort(np.where(np.isfinite(values), values, np.inf), axis=0)
    position = q * (len(ordered) - 1)
    below, above = ordered[math.floor(position)], ordered[math.ceil(position)]
    with np.errstate(invalid="ignore", over="ignore"):
        between = below + position % 1 * (above - below)
    return np.where(below == above, below, between)


def in_view(values: Array, top: float) -> Array:
    return (np.abs(values) <= HUGE) & (values <= top)


def stretches(flags: Array) -> list[slice]:
    """Return the stretches of neighbours for which a flag is true."""
    steps = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(int)))
    return [slice(int(a), int(b)) for a, b in zip(steps[::2], steps[1::2], strict=True)]


def with_notes(name: str, notes: list[str]) -> str:
    return f"{name} ({', '.join(notes)})" if notes else name


def not_finite_note(alive: Array, x: Array, xlabel: str) -> str:
    end = alive.argmin()
    return f"not finite {'at' if alive[end:].any() else 'from'} {xlabel} {x[end]:.12g}"


def axes_for(ax: Axes | None) -> Axes:
    """Return the axes, or those of a new figure that shows itself in a notebook, as they do."""
    if ax is not None:
        return ax
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise missing_extra("gdfunc.plot", "matplotlib", "plot") from error
    figure: Any = Figure(layout="constrained")
    made = figure.subplots()
    for shown in (figure, made):
        shown._repr_png_ = functools.partial(_repr_png_, figure)
    return made


def _repr_png_(figure: Any) -> bytes:
    """Draw a figure for a notebook, which asks an object for its method of this name."""
    page = io.BytesIO()
    figure.savefig(page, format="png", dpi=figure.dpi)
    return page.getvalue()


def hatch_background(ax: Axes, label: str) -> tuple[Any, str]:
    """Hatch the background of the axes, and return its legend entry."""
    from matplotlib.patches import Patch

    blank: dict[str, Any] = {"facecolor": background(ax), "edgecolor": faint(ax, 0.4), "hatch": "////"}
    ax.patch.set(**blank)
    return Patch(linewidth=0, **blank), label


def draw_legend(ax: Axes, entries: list[tuple[Any, str]]) -> None:
    """Put the legend below the axes, or inside them if the figure's layout makes no room below.

    Axes at the same place, such as those of `twinx`, share the legend of the last ones.
    """
    figure: Any = ax.get_figure()
    entries = [entry for other in figure.axes for entry in _taken_legend(ax, other)] + entries
    from matplotlib.font_manager import FontProperties

    handles, labels = zip(*entries, strict=True)
    # Some 17 letters of a size of 8.3 points fit an inch, and a handle takes as much as 6.
    room = int(170 * ax.bbox.width / figure.dpi / font_size())
    # In a small figure the letters are smaller, too.
    size = FontProperties(size="small").get_size_in_points() * min(1.0, max(0.5, room / _LETTERS))
    room = max(_LETTERS, room)
    place: dict[str, Any] = {"loc": "best"}
    columns, width = 1, room - 10  # of a handle and a frame
    if figure.get_layout_engine() is not None:
        most = max(1, -(-len(labels) // 4))
        fitting = (count for count in range(min(5, max(2, most)), 1, -1) if _width(labels, count) <= room)
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "frameon": False}
        # The padding clears the numbers and the name of the x axis. It counts in letters of the legend.
        written: Any = ax.xaxis.get_tightbbox()  # None where the axis is off
        below = 72 * (ax.bbox.y0 - written.y0) / figure.dpi if written else 0
        place["borderaxespad"] = max(4.5, 1.2 * below / font_size() + 0.6)
        columns, width = next(fitting, 1), room
    labels = tuple(textwrap.fill(label, width) for label in labels)
    ax.legend(handles, labels, fontsize=size, ncols=columns, **place)


def _taken_legend(ax: Axes, other: Axes) -> list[tuple[Any, str]]:
    """Remove the legend of other axes at the same place, and return its entries."""
    legend: Any = other.get_legend()
    if other is ax or legend is None or not np.allclose(other.bbox.bounds, ax.bbox.bounds):
        return []
    legend.remove()
    texts = [text.get_text().replace("\n", " ") for text in legend.get_texts()]
    return list(zip(legend.legend_handles, texts, strict=True))


def _width(labels: Sequence[str], columns: int) -> int:
    """Return the letters that a legend of some columns is wide."""
    rows = -(-len(labels) // columns)
    parts = (labels[i : i + rows] for i in range(0, len(labels), rows))
    return sum(6 + max(map(len, part)) for part in parts)
