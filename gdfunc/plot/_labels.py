"""Names of curves: at the ends of their lines, in a legend, or at a bar of colours."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np
from torch import Tensor

from ._axes import Array, Axes, in_view, with_notes
from ._lines import Curve
from ._style import background, faint, font_size, halo, ink


def as_numbers(labels: Sequence[Any] | None) -> list[float] | None:
    """Return the labels if all are finite numbers, and not all the same."""
    if labels is None:
        return None
    plain = [label.tolist() if isinstance(label, np.generic) else label for label in labels]
    plain = [label.tolist() if isinstance(label, Tensor) and not label.ndim else label for label in plain]
    if any(isinstance(label, bool) or not isinstance(label, Real) for label in plain):
        return None
    numbers = [float(label) for label in plain]
    return numbers if np.isfinite(numbers).all() and len({*numbers}) > 1 else None


def label_ends(ax: Axes, curves: list[Curve], colors: list[Any], top: float) -> None:
    """Write each name at the last point in view of its line, and push the names apart."""
    figure: Any = ax.get_figure()
    pixels = figure.dpi / 72
    ends = [_end(curve, min(ax.get_ylim()), top) for curve in curves]
    places = ax.transData.transform(ends)
    gap = 1.15 * font_size() * pixels
    # Names stay inside the view, in whichever direction the axis goes.
    border = ax.transData.transform([(ends[0][0], end) for end in (min(ax.get_ylim()), top)])[:, 1]
    low, high = min(border) + 0.6 * gap, max(border) - 0.6 * gap
    shifts = np.zeros(len(ends))
    for column in _columns(places[:, 0], 6 * font_size() * pixels):
        heights = places[column, 1]
        moved = spread(np.clip(heights, low, high), gap)
        moved -= max(0.0, moved.max() - high)
        shifts[column] = moved + max(0.0, low - moved.min()) - heights
    for curve, end, shift, color in zip(curves, ends, shifts / pixels, colors, strict=True):
        place: dict[str, Any] = {"xytext": (6, shift), "textcoords": "offset points", "va": "center"}
        text = ax.annotate(curve.name, end, **place, color=ink(ax, color), fontsize="small", zorder=5)
        text.set_path_effects(halo(background(ax)))


def _end(curve: Curve, bottom: float, top: float) -> tuple[float, float]:
    """Return the last point of a line in view, or one on the border if there is none."""
    inside = np.flatnonzero(in_view(curve.middle, top) & (curve.middle >= bottom))
    if len(inside):
        return curve.places[inside[-1]], curve.middle[inside[-1]]
    return curve.places[-1], bottom if curve.middle[-1] <= bottom else top


def _columns(x: Array, width: float) -> list[Array]:
    """Return the places whose neighbours in x are nearer than a width, column by column."""
    order = np.argsort(x, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(x[order]) > width) + 1)


def spread(heights: Array, gap: float) -> Array:
    """Return the nearest heights, in least squares, that are a gap apart and in the same order."""
    order = np.argsort(heights, kind="stable")
    steps = gap * np.arange(len(heights))
    blocks: list[list[float]] = []  # of neighbours that touch: their sum and their number
    for height in heights[order] - steps:
        blocks.append([height, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1] = [blocks[-1][0] + total, blocks[-1][1] + count]
    moved = np.empty(len(heights))
    moved[order] = np.concatenate([np.full(int(n), total / n) for total, n in blocks]) + steps
    return moved


def draw_color_bar(ax: Axes, numbers: Sequence[float], colors: list[Any], name: str) -> None:
    """Draw a bar with a field of equal size for each number, and name up to eight of them."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    levels, where = np.unique(np.asarray(numbers, dtype=np.float64), return_index=True)
    count = len(levels)
    norm = BoundaryNorm(np.arange(count + 1) - 0.5, count)
    fields = ScalarMappable(norm, ListedColormap([colors[i] for i in where]))
    figure: Any = ax.get_figure()
    bar = figure.colorbar(fields, ax=ax, label=name)
    named = np.unique(np.linspace(0, count - 1, min(count, 8)).round().astype(int))
    bar.set_ticks(named, labels=[f"{levels[i]:.4g}" for i in named])
    bar.minorticks_off()


def legend_entries(
    ax: Axes,
    curves: list[Curve],
    handles: list[Any],
    notes: list[list[str]],
    abouts: list[str],
    are_named: bool,
) -> list[tuple[Any, str]]:
    """Return an entry for each curve, or for those with notes if the lines carry their names.

    Several curves of equally many runs say only once that they are medians.
    """
    said = [about for about in abouts if about]
    shared = said[0] if len(said) > 1 and len({*said}) == 1 else ""
    entries = []
    for curve, handle, told, about in zip(curves, handles, notes, abouts, strict=True):
        name = f"{curve.name}: {about}" if about and not shared else curve.name
        if told or not are_named or (about and not shared):
            entries.append((handle, with_notes(name, told)))
    return entries + _shared_entry(ax, curves, shared)


def summary(
    ax: Axes, curves: list[Curve], handles: list[Any], notes: list[list[str]], abouts: list[str]
) -> list[tuple[Any, str]]:
    """Return entries that count the curves, for more of them than a legend can name."""
    noted = sum(map(bool, notes))
    counted = [f"{noted} of them diverge, leave the view or have values ≤ 0"] if noted else []
    entries = [(handles[0], with_notes(f"{len(curves)} curves", counted))]
    said = list(dict.fromkeys(about for about in abouts if about))
    return entries + [entry for about in said for entry in _shared_entry(ax, curves, about)]


def _shared_entry(ax: Axes, curves: list[Curve], about: str) -> list[tuple[Any, str]]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    if not about:
        return []
    grey = faint(ax, 0.6)
    line = Line2D([], [], color=grey)
    has_band = any(curve.band for curve in curves)
    return [((Patch(facecolor=grey, alpha=0.35, linewidth=0), line) if has_band else line, about)]
