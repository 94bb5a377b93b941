"""A loss of two numbers: its contours on a view that shows the way down, and paths on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from . import _contours
from ._axes import Array, Axes, with_notes
from ._contrast import path_colors
from ._names import size_of
from ._points import Losses, box_around, is_inside
from ._tracks import draw_paths, fate_of, mark_entries, scaled

_YELLOW = "#F0E442"
_PADDING = 0.1  # of the view around what it must show
_SEARCH = 41  # points along each side of the grid on which a minimum near the paths is looked for


def draw_plane(
    ax: Axes,
    losses: Losses,
    tracks: list[Array],
    names: list[str],
    labelled: bool,
    *,
    stars: Sequence[Array],
    levels: Array | str | int,
    floor: float | None,
    box: Array | None,
    resolution: int,
    colors: list[Any] | None = None,
) -> list[tuple[Any, str]]:
    """Draw contours, paths and marks on a view, and return the legend entries.

    Colours of a crowd that are not given are those of its final losses.
    """
    visited = np.concatenate([*tracks, *stars])
    known = losses(visited)
    if colors is None:
        first = np.cumsum([0, *map(len, tracks)])
        ends = known[np.stack([first[:-1], first[1:] - 1], axis=1)]
        colors = path_colors(ax, len(tracks), labelled, ends)
    if box is None:
        wanted = np.concatenate([np.arange(len(track)) == 0 for track in [*tracks, *stars]])
        box = box_around(visited[worth_seeing(visited, known, wanted)], _PADDING)
        box = box if stars else _with_lowest(losses, box)
    x, y = (np.linspace(low, high, resolution) for low, high in box.T)
    heights = losses(_grid(x, y)).reshape(resolution, resolution)
    known = np.append(heights, known)
    lowest = known[np.isfinite(known)].min(initial=np.inf) if floor is None else floor

    ax.set(xlim=box[:, 0], ylim=box[:, 1])
    set_aspect(ax, box)
    entries = draw_paths(ax, tracks, box, names, labelled, colors)
    entries += mark_entries(ax, any(fate_of(track, box).ended for track in tracks))
    if stars:
        entries.append(draw_stars(ax, np.concatenate(stars), box))
    else:
        entries += _contours.draw_lowest(ax, _contours.lowest_inside(x, y, heights))
    entries += _contours.draw_contours(ax, x, y, heights, _contours.levels_for(levels, heights, lowest))
    ax.set(xlim=box[:, 0], ylim=box[:, 1])
    return entries


def worth_seeing(points: Array, losses: Array, wanted: Array) -> Array:
    """Mask the wanted points and all that are no higher than these."""
    known = losses[wanted & np.isfinite(losses)]
    highest = known.max() if len(known) else np.inf
    return (wanted | (losses <= highest)) & np.isfinite(points).all(axis=1)


def _grid(x: Array, y: Array) -> Array:
    return np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)


def _with_lowest(losses: Losses, box: Array) -> Array:
    """Extend a view to the lowest point near it: half its width away at most, and a minimum on a grid."""
    span = box[1] - box[0]
    if not np.isfinite(span).all():
        return box
    wide = box + 0.5 * np.outer([-1, 1], span)
    x, y = (np.linspace(low, high, _SEARCH) for low, high in wide.T)
    lowest = _contours.lowest_inside(x, y, losses(_grid(x, y)).reshape(_SEARCH, _SEARCH))
    if lowest is None or is_inside(lowest[None, :2], box)[0]:
        return box
    padding = _PADDING * span
    return np.stack([np.minimum(box[0], lowest[:2] - padding), np.maximum(box[1], lowest[:2] + padding)])


def set_aspect(ax: Axes, box: Array) -> None:
    """Give both axes one scale, so that steps cross contours at right angles, if the view is no strip."""
    spans = box[1] - box[0]
    if ax.get_aspect() == "auto" and spans.max() < 3 * spans.min():
        ax.set_aspect("equal", adjustable="box")
        # Numbers of five digits need the room, and a narrow view has less of it than its axes tell.
        ax.locator_params(axis="x", nbins=max(3, int(size_of(ax)[0] / 50)))


def draw_stars(ax: Axes, points: Array, box: Array) -> tuple[Any, str]:
    (star,) = ax.plot(*points.T, "*", color=_YELLOW, markersize=scaled(12), zorder=2.5)
    star.set(linestyle="", markeredgecolor="black")
    away = int((~is_inside(points, box)).sum())
    note = [f"{away} of {len(points)} outside the view"] if away else []
    return star, with_notes("minimizer", note)
