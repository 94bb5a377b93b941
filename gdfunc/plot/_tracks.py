"""Paths as lines on axes: marks of their ends, names beside these, and notes on what is out of view."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from . import _axes, _moving
from ._axes import Array, Axes
from ._contrast import FEW, is_crowd
from ._names import fits, write_names
from ._points import is_inside
from ._style import background, faint, foreground, line_style

_BEADS = 60  # points: more would hide the line


class Fate(NamedTuple):
    """The last point that is drawn, and how a path goes on beyond the view."""

    last: int
    ended: bool
    notes: list[str]
    crosses: list[Array]
    ends: list[int]  # the step of each cross


def fate_of(points: Array, box: Array) -> Fate:
    alive = np.isfinite(points).all(axis=1)
    inside = is_inside(points, box)
    # A path that never comes into the view has nothing to be cut at.
    last = int(np.flatnonzero(inside)[-1]) if inside.any() else len(points) - 1
    notes, crosses, ends = [], [], []
    if away := (alive & ~inside)[: last + 1].sum():
        notes.append(f"{away} of {len(points)} points outside the view")
    if last + 1 < len(points) and alive[last + 1]:
        notes.append(f"leaves the view at step {last + 1}")
        crosses.append(_crossing(points[last], points[last + 1], box))
        ends.append(last + 1)
    if not alive.all():
        end = alive.argmin()
        notes.append(_axes.not_finite_note(alive, np.arange(len(points)), "step"))
        if end > 0 and inside[end - 1]:
            crosses.append(points[end - 1])
            ends.append(int(end))
    return Fate(last, bool(inside[-1]), notes, crosses, ends)


def _crossing(inside: Array, outside: Array, box: Array) -> Array:
    """Return where the segment between two points meets the border, just inside it."""
    nearly = box + 0.015 * (box[::-1] - box)
    beyond = np.clip(outside, *nearly) != outside
    share = (np.clip(outside, *nearly) - inside)[beyond] / (outside - inside)[beyond]
    return inside + max(0.0, share.min()) * (outside - inside)


def draw_paths(
    ax: Axes,
    tracks: list[Array],
    box: Array,
    names: list[str],
    labelled: bool,
    colors: list[Any],
    *,
    on_curve: bool = False,
) -> list[tuple[Any, str]]:
    """Draw paths on axes that have their limits, and return the legend entries of those that need one.

    Up to seven paths are named at their ends, as far as the names fit. The legend then has only paths
    of which there is more to tell. Else their dashes differ, too, so that the legend serves in grey.
    More paths that have no labels share one entry. On a curve the points matter, and lines between them
    are thin.
    """
    crowd = is_crowd(len(tracks), labelled)
    fates = [fate_of(track, box) for track in tracks]
    anchors = [
        fate.crosses[:1] or [track[-1]] * fate.ended for track, fate in zip(tracks, fates, strict=True)
    ]
    texts = [name if anchor else "" for name, anchor in zip(names, anchors, strict=True)]
    direct = len(tracks) <= FEW and (labelled or len(tracks) > 1) and fits(ax, texts)
    looks = [(color, line_style(0 if crowd or direct else i)[1]) for i, color in enumerate(colors)]
    lines = [
        _draw_path(ax, track, fate, look, thin=len(tracks) > FEW, on_curve=on_curve)
        for track, fate, look in zip(tracks, fates, looks, strict=True)
    ]
    if crowd:
        return [(_entry(ax, lines[0]), _crowd_label(fates))]
    if direct:
        places = np.array([anchor[0] if anchor else box.mean(axis=0) for anchor in anchors])
        shown = [track[: fate.last + 2] for track, fate in zip(tracks, fates, strict=True)]
        write_names(ax, places, texts, colors, shown)
    silent = direct or (len(tracks) == 1 and not labelled)
    return [
        (line, _axes.with_notes(name, fate.notes))
        for line, name, fate, text in zip(lines, names, fates, texts, strict=True)
        if fate.notes or not silent or (direct and not text)
    ]


def _entry(ax: Axes, line: Any) -> Any:
    """Return a line for the legend, in no colour that means a loss."""
    from matplotlib.lines import Line2D

    return Line2D([], [], color=faint(ax, 0.6), linewidth=line.get_linewidth())


def _draw_path(
    ax: Axes, points: Array, fate: Fate, look: tuple[Any, Any], *, thin: bool, on_curve: bool
) -> Any:
    from matplotlib.patheffects import Normal, Stroke

    color, dashes = look
    page, width = background(ax), scaled(0.8 if on_curve else 0.9 if thin else 1.5)
    shown = points[: fate.last + 2]
    (line,) = ax.plot(*shown.T, color=color, linestyle=dashes, linewidth=width, zorder=3, marker="")
    _moving.grow(line, np.arange(len(shown)))
    # The halo is solid also under dashes, because gaps in both look like crossings.
    halo: dict[str, Any] = {
        "dashes": {"dash_offset": 0, "dash_list": None},
        "linewidth": width + 1.6,
        "foreground": page,
    }
    if not on_curve:
        line.set_path_effects([Stroke(**halo), Normal()])
    marks: dict[str, Any] = {"linestyle": "", "markeredgecolor": color, "zorder": 4}
    # Beads on dashes would be taken for dashes.
    if len(points) < _BEADS and not thin and dashes == "-":
        bead = scaled(8 if on_curve else 5)
        (beads,) = ax.plot(
            *shown.T, ".", markersize=bead, markerfacecolor=color, **{**marks, "zorder": 3.1}
        )
        _moving.grow(beads, np.arange(len(shown)))
    size = scaled(0.6 if thin else 1.0)
    ax.plot(*points[:1].T, "o", markersize=7 * size, markerfacecolor=page, **marks)
    if fate.ended:
        (end,) = ax.plot(*points[-1:].T, "D", markersize=5 * size, markerfacecolor=color, **marks)
        _moving.travel(end, points)
    if fate.crosses:
        places = np.transpose(fate.crosses)
        (crosses,) = ax.plot(*places, "x", markersize=8 * size, markeredgewidth=2 * size, **marks)
        _moving.grow(crosses, np.minimum(fate.ends, len(shown) - 1))
    return line


def _crowd_label(fates: list[Fate]) -> str:
    """Say how many paths there are, and how many of them leave the view or stop being finite."""
    said = {
        "with points outside the view": sum("outside" in " ".join(fate.notes) for fate in fates),
        "leave the view": sum("leaves" in " ".join(fate.notes) for fate in fates),
        "not finite": sum("not finite" in " ".join(fate.notes) for fate in fates),
    }
    return _axes.with_notes(f"{len(fates)} paths", [f"{n} {note}" for note, n in said.items() if n])


def scaled(size: float) -> float:
    """Return a size for lines or marks that is meant for lines of matplotlib's usual width."""
    from matplotlib import rcParams

    return size * rcParams["lines.linewidth"] / 1.5


def mark_entries(ax: Axes, ended: bool) -> list[tuple[Any, str]]:
    """Return the legend entries of starts and ends."""
    from matplotlib.lines import Line2D

    neutral: dict[str, Any] = {"linestyle": "", "color": foreground(ax)}
    page: dict[str, Any] = {"markerfacecolor": background(ax)}
    start = Line2D([], [], marker="o", markersize=scaled(7), **page, **neutral)
    end = Line2D([], [], marker="D", markersize=scaled(5), **neutral)
    return [(start, "start"), (end, "end")][: 1 + ended]
