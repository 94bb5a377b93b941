"""Descent on a loss of one scalar: its curve, the iterates on it, and tangents at a few of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import _axes, _plane
from ._axes import Array, Axes
from ._contrast import FEW, path_colors
from ._names import write_names
from ._points import Losses, box_around
from ._style import foreground
from ._tracks import draw_paths, fate_of, mark_entries, scaled

_TANGENTS = 4  # of each path, at most
_HALF = 0.09  # length of half a tangent, in widths of the view
_APART = 0.12  # distance between tangents
_SIDE = 0.3  # of the width of the way down is seen beyond the lowest point
_TOP = 4.0  # times the start's height above the lowest point: so high the view follows a run that diverges


def draw_curve(
    ax: Axes,
    losses: Losses,
    slopes: Losses,
    tracks: list[Array],
    names: list[str],
    labelled: bool,
    *,
    stars: list[Array],
    floor: float | None,
    box: Array | None,
    resolution: int,
) -> list[tuple[Any, str]]:
    """Draw the curve and all paths on it, and return the legend entries."""
    lifted = [_lift(losses, track) for track in tracks]
    raised = [_lift(losses, star) for star in stars]
    if box is None:
        box = _view(losses, lifted, raised, floor)
    visited = np.concatenate([*lifted, *raised])[:, 0]
    within = visited[(visited >= box[0, 0]) & (visited <= box[1, 0])]
    # The places of the iterates are among the curve's, so that they lie on it.
    x = np.unique(np.concatenate([np.linspace(box[0, 0], box[1, 0], resolution), within]))
    curve = losses(x[:, None])

    ax.set(xlim=box[:, 0], ylim=box[:, 1])
    (line,) = ax.plot(x, np.where(np.isfinite(curve), curve, np.nan), color=foreground(ax), zorder=2)
    line.set_linewidth(scaled(1.2))
    colors = path_colors(ax, len(tracks), labelled)
    entries = draw_paths(ax, lifted, box, names, labelled, colors, on_curve=True)
    ended = [fate_of(track, box).ended for track in lifted]
    few = lifted if len(lifted) <= FEW else []
    touched = [_draw_tangents(ax, slopes, track, box, i) for i, track in enumerate(few)]
    if any(touched):
        entries.append((next(filter(None, touched)), "tangents: slopes of the loss"))
    if len(tracks) == 1:
        _name_both(ax, lifted[0], np.column_stack([x, curve]), ended[0])
    else:
        entries += mark_entries(ax, any(ended))
    if raised:
        entries.append(_plane.draw_stars(ax, np.concatenate(raised), box))
    holes = ~np.isfinite(curve)
    note = [f"not finite on {100 * holes.mean():.0f} % of the view"] if holes.any() else []
    entries.append((line, _axes.with_notes("loss", note)))
    ax.set(xlim=box[:, 0], ylim=box[:, 1])
    return entries


def _lift(losses: Losses, track: Array) -> Array:
    return np.column_stack([track, losses(track)])


def _view(losses: Losses, lifted: list[Array], raised: list[Array], floor: float | None) -> Array:
    """Show the starts, the minimizers, the way down, and the first steps of a run that diverges."""
    visited = np.concatenate([*lifted, *raised])
    wanted = np.concatenate([np.arange(len(track)) == 0 for track in [*lifted, *raised]])
    known = visited[np.isfinite(visited).all(axis=1)]
    if len(known) == 0:
        return box_around(np.zeros((1, 2)), 0.1)
    early = np.concatenate([track[:2] for track in lifted])
    early = early[np.isfinite(early).all(axis=1)]
    between = known[:, 1]
    if len(early):
        between = losses(np.linspace(early.min(axis=0), early.max(axis=0), 201)[:, :1])
    heights = np.append(between[np.isfinite(between)], known[:, 1])
    lowest = heights.min() if floor is None else floor
    starts = visited[wanted & np.isfinite(visited).all(axis=1), 1]
    top = lowest + _TOP * (starts.max(initial=lowest) - lowest)
    seen = known[(known[:, 1] <= top) | np.isin(known[:, 1], starts)]
    box = box_around(np.vstack([seen, [seen[0, 0], min(lowest, seen[:, 1].min())]]), 0.1)
    # The valley is seen from both sides, also when it is lower than all iterates, which jumped over it.
    width = box[1, 0] - box[0, 0]
    wide = np.linspace(box[0, 0] - width / 2, box[1, 0] + width / 2, 401)
    valley = losses(wide[:, None])
    valley = np.where(np.isfinite(valley), valley, np.inf)
    if (valley == valley[0]).all():
        return box
    deepest = valley.argmin()
    if deepest in (0, len(wide) - 1):
        # The minimum is still far, so the lowest point between the iterates has to do.
        deepest = 100 + valley[100:301].argmin()
    sides = wide[deepest] + _SIDE * width * np.array([-1, 1])
    low = min(box[0, 1], valley[deepest] - 0.08 * (box[1, 1] - valley[deepest]))
    return np.array([[min(box[0, 0], sides[0]), low], [max(box[1, 0], sides[1]), box[1, 1]]])


def _draw_tangents(ax: Axes, slopes: Losses, track: Array, box: Array, i: int) -> Any:
    """Draw tangents at the first iterates that lie apart from each other, and return one of them."""
    from matplotlib.collections import LineCollection

    spans = box[1] - box[0]
    chosen: list[Array] = []
    for point in track[np.isfinite(track).all(axis=1)]:
        inside = ((point >= box[0]) & (point <= box[1])).all()
        if inside and all(np.hypot(*((point - other) / spans)) >= _APART for other in chosen):
            chosen.append(point)
    chosen = chosen[:_TANGENTS]
    if not chosen:
        return None
    points = np.array(chosen)
    slope = slopes(points[:, :1])
    reach = _HALF / np.hypot(1.0, slope * spans[0] / spans[1]) * spans[0]
    steps = np.stack([reach, slope * reach], axis=1)
    finite = np.isfinite(steps).all(axis=1)
    color = _axes.line_style(i, ax)[0]
    ends = np.stack([points - steps, points + steps], axis=1)[finite]
    tangents = LineCollection(list(ends), colors=[color], linewidths=scaled(1.8), zorder=2.5)
    return ax.add_collection(tangents, autolim=False)


def _name_both(ax: Axes, track: Array, curve: Array, ended: bool) -> None:
    """Write the parameter's value next to the start and to the end."""
    places = [track[0], *[track[-1]] * (ended and len(track) > 1)]
    texts = [f"{name} at {place[0]:.4g}" for name, place in zip(("start", "end"), places, strict=False)]
    if np.isfinite(places).all():
        write_names(ax, np.array(places), texts, [foreground(ax)] * len(places), [curve, track])
