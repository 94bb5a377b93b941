"""Names written next to points of a picture, where they cover as little as possible."""

from __future__ import annotations

from typing import Any

import numpy as np

from ._axes import Array, Axes
from ._style import background, halo, ink

# All lengths are in points, 1/72 inch.
_DISTANCES = (9.0, 20.0, 34.0, 50.0)
_ANGLES = np.deg2rad(np.arange(0, 360, 30))
_SAMPLES = 500  # of each line, to see where it runs
_OUT, _OVER, _ON_MARK = 1e6, 1e3, 40.0  # costs of leaving the axes, covering a name, and covering a mark


def size_of(ax: Axes) -> Array:
    """Return the width and the height of the axes, before the figure's layout moves them."""
    figure: Any = ax.get_figure()
    place = ax.get_position(original=True)
    width, height = place.size * figure.bbox.size * 72 / figure.dpi  # of a subfigure too
    if ax.get_aspect() != "auto":
        ratio = ax.get_data_ratio() * float(ax.get_aspect())
        width, height = min(width, height / ratio), min(height, width * ratio)
    return np.array([width, height])


def text_sizes(texts: list[str]) -> Array:
    """Return the widths and heights [n, 2] of texts in small letters."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    size = FontProperties(size="small").get_size_in_points()
    # A text without letters has no outline.
    widths = [
        TextPath((0, 0), text, size=size).vertices[:, 0].max() if text.strip() else 0.0 for text in texts
    ]
    return np.column_stack([widths, np.full(len(texts), 1.25 * size)])


def fits(ax: Axes, texts: list[str]) -> bool:
    return bool(text_sizes(texts)[:, 0].max(initial=0.0) <= 0.5 * size_of(ax)[0])


def write_names(ax: Axes, places: Array, texts: list[str], colors: list[Any], lines: list[Array]) -> None:
    """Write each text near its place on axes that have their limits, with a line to it if it is far.

    Each text gets, one after the other, the position that covers least of the lines and of other places.
    """
    corner, span = np.array([ax.get_xlim(), ax.get_ylim()]).T
    scale = size_of(ax) / (span - corner)
    marks = (places - corner) * scale
    inked = np.concatenate([_along((line - corner) * scale) for line in lines] or [np.empty((0, 2))])
    written: list[tuple[Array, Array]] = []
    for i, size in enumerate(text_sizes(texts)):
        if not texts[i]:
            continue
        shift, middle = _best(marks, i, size, inked, written, size_of(ax))
        written.append((middle, size))
        far = np.hypot(*shift) > _DISTANCES[0]
        inked = np.concatenate([inked, _between(marks[i], middle)]) if far else inked
        leader = {"arrowstyle": "-", "color": colors[i], "linewidth": 0.7, "shrinkA": 0, "shrinkB": 4}
        note = ax.annotate(
            texts[i],
            places[i],
            tuple(middle - marks[i]),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize="small",
            color=ink(ax, colors[i]),
            arrowprops=leader if far else None,
            zorder=6,
        )
        note.set_path_effects(halo(background(ax)))


def _between(one: Array, two: Array) -> Array:
    """Return points from one to the other, along the line that leads to a name."""
    return one + np.linspace(0.0, 1.0, 20)[:, None] * (two - one)


def _along(line: Array) -> Array:
    """Return points along a line, as far apart from each other as makes them few."""
    finite = line[np.isfinite(line).all(axis=1)]
    # Positions far out of the view would take all of the points.
    finite = np.clip(finite, -100.0, 3000.0)
    lengths = np.append(0.0, np.hypot(*np.diff(finite, axis=0).T).cumsum()) if len(finite) else np.empty(0)
    if len(finite) < 2:
        return finite
    at = np.linspace(0.0, lengths[-1], _SAMPLES)
    return np.column_stack([np.interp(at, lengths, finite[:, k]) for k in range(2)])


def _best(
    marks: Array, i: int, size: Array, inked: Array, written: list[tuple[Array, Array]], room: Array
) -> tuple[Array, Array]:
    """Return how far the nearest edge of text i is best moved from its place, and its middle there."""
    best, least = (np.zeros(2), marks[i]), np.inf
    others = np.delete(marks, i, axis=0)
    for distance in _DISTANCES:
        for angle in _ANGLES:
            toward = np.array([np.cos(angle), np.sin(angle)])
            middle = marks[i] + distance * toward + 0.5 * size * np.sign(toward.round(9))
            middle[1] -= 0.5 * size[1] * np.sign(toward.round(9))[1] * (abs(toward[0]) > 0.7)
            low, high = middle - 0.5 * size - 1, middle + 0.5 * size + 1
            out = (low < 0).any() or (high > room).any()
            over = sum((abs(middle - at) < 0.5 * (size + other) + 1).all() for at, other in written)
            leader = _between(marks[i], middle)
            over += 0.2 * sum((abs(leader - at) < 0.5 * other).all(axis=1).any() for at, other in written)
            cost = _OUT * out + _OVER * over + distance / 4
            cost += ((inked > low) & (inked < high)).all(axis=1).sum()
            cost += _ON_MARK * ((others > low - 3) & (others < high + 3)).all(axis=1).sum()
            if cost < least:
                best, least = (distance * toward, middle), cost
    return best
