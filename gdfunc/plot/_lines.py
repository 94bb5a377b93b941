"""Lines, bands, crosses and strips of curves."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from . import _axes, _moving
from ._axes import HUGE, Array, Axes
from ._style import background, font_size

_STRIPS = 3  # have room for their notes
_FAR = 1e9  # times the usual: a run that is finite and has diverged
_ROWS = 7  # more strips would take too much of the axes


class Curve(NamedTuple):
    """Some runs, and their line and band."""

    name: str
    x: Array  # [T]
    values: Array  # [N, T]
    places: Array  # [K], where the line and the band have their points
    middle: Array  # [K]
    band: tuple[Array, Array] | None  # [K] each
    limit: float = HUGE  # above it, a run has diverged

    @property
    def edges(self) -> tuple[Array, ...]:
        return self.band or ()


class Strip(NamedTuple):
    """A part of x at which something diverges."""

    start: float
    stop: float
    note: str


def summarize(
    name: str, x: Array, values: Array, window: int | None, band: tuple[float, float] | None, over: bool
) -> Curve:
    """Take the median and the quantiles over runs, or over runs and the steps of each window."""
    if over:
        order = np.argsort(x, kind="stable")
        x, values = x[order], values[:, order]
    places, pools = x, [values]
    if window is not None:
        count = max(1, values.shape[1] // window)
        whole = min(count * window, values.shape[1])
        pools = [values[:, :whole].reshape(len(values), count, -1).swapaxes(1, 2).reshape(-1, count)]
        places = x[:whole].reshape(count, -1).mean(axis=1)
        if whole < values.shape[1]:
            pools.append(values[:, whole:].reshape(-1, 1))
            places = np.append(places, x[whole:].mean())
    if window is None and len(values) == 1:
        return Curve(
            name, x, values, x, np.where(np.isfinite(values) | (not over), values, np.inf)[0], None
        )

    def quantile(q: float) -> Array:
        return np.concatenate([_axes.run_quantile(pool, q) for pool in pools])

    edges = None if band is None else (quantile(band[0]), quantile(band[1]))
    return Curve(name, x, values, places, quantile(0.5), edges)


def with_limit(curves: list[Curve]) -> list[Curve]:
    """Set the limit above which a run has diverged: far above the peaks of a quarter of the runs."""
    peaks = np.concatenate([np.abs(curve.values).max(axis=1, initial=0.0) for curve in curves])
    peaks = np.sort(peaks[(peaks > 0) & (peaks <= HUGE)])
    limit = min(HUGE, _FAR * peaks[len(peaks) // 4]) if len(peaks) else HUGE
    return [curve._replace(limit=float(limit)) for curve in curves]


def diverged(curve: Curve) -> Any:
    """Tell which of the runs [N] cannot be shown whole."""
    return ~_axes.in_view(curve.values, curve.limit).all(axis=1)


def top_of_runs(curves: list[Curve], log_y: bool) -> float:
    """Return the largest value to show: how far a diverging run is followed."""
    steady = [curve.values[~diverged(curve)].ravel() for curve in curves]
    known = np.concatenate([*steady, *(curve.values[:, 0] for curve in curves)])
    known = known[_axes.in_view(known, HUGE) & ((known > 0) | (not log_y))]
    if len(known) == 0:
        return HUGE
    low, high = known.min(), known.max()
    return min(HUGE, 1e3 * high if log_y else high + (high - low or abs(high) or 1.0))


def top_of_medians(curves: list[Curve], log_y: bool) -> float:
    """Return the largest median to show: near a divergence, medians are finite and without meaning."""
    medians = np.concatenate([curve.middle for curve in curves])
    shown = medians[_axes.in_view(medians, HUGE) & ((medians > 0) | (not log_y))]
    if len(shown) == len(medians) or len(shown) == 0:
        return HUGE
    firsts = np.array([curve.middle[0] for curve in curves])
    usual = max(firsts[_axes.in_view(firsts, HUGE)].max(initial=-HUGE), np.median(shown))
    limit = 10 * usual if log_y else usual + (usual - shown.min())
    return float(shown[shown <= limit].max(initial=usual))


def draw_lines(ax: Axes, curve: Curve, look: tuple[Any, Any], top: float, over: bool, window: Any) -> Any:
    """Draw a curve's line and its diverged runs, and fit the limits to their view."""
    from matplotlib import rcParams
    from matplotlib.lines import Line2D

    (color, dashes), width = look, rcParams["lines.linewidth"]
    x, middle = curve.places, curve.middle
    lost = curve.values[diverged(curve)]
    line = Line2D(x, middle, color=color, linestyle=dashes, linewidth=width, zorder=3)
    line.set(marker="o" if len(x) == 1 or (over and len(x) <= 12) else "", markersize=3 * width)
    ax.add_artist(line)  # unlike add_line, without making room for all of it
    _moving.grow(line, x)
    ax.update_datalim(np.column_stack([x, x]), updatey=False)
    for shown in (middle, *curve.edges):
        ax.update_datalim(np.column_stack([x, shown])[_axes.in_view(shown, top)])
    if len(curve.values) > 1 and len(lost) and not over and window is None:
        # One thin line for all of them: NaN parts the runs.
        parted = np.pad(lost, [(0, 0), (0, 1)], constant_values=np.nan).ravel()
        places = np.tile(np.append(x, np.nan), len(lost))
        thin = ax.add_artist(Line2D(places, parted, color=color, linewidth=0.4 * width))
        _moving.grow(thin, np.nan_to_num(places, nan=-np.inf))  # what parts the runs is always there
    if not over and window is None:
        for run in lost:
            ax.update_datalim(np.column_stack([x, run])[_axes.in_view(run, top)])
    if ax.get_yscale() == "log" and (middle <= 0).any():
        low, bottom = x[middle <= 0], ax.get_xaxis_transform()
        (triangles,) = ax.plot(low, 0 * low + 0.012, "v", color=color, transform=bottom, markersize=3)
        _moving.grow(triangles, low)
    return line


def draw_ends(ax: Axes, curve: Curve, top: float, color: Any) -> None:
    """Mark the last value in view of every run that diverges."""
    from matplotlib.lines import Line2D

    inside = _axes.in_view(curve.values, top)
    runs = np.flatnonzero(diverged(curve) & inside[:, 0])
    if len(runs):
        last = inside[runs].argmin(axis=1) - 1
        ends = curve.x[last], curve.values[runs, last]
        crosses = Line2D(*ends, linestyle="", marker="x", color=color, zorder=4)
        crosses.set(markersize=7, markeredgewidth=1.8)
        ax.add_artist(crosses)
        _moving.grow(crosses, ends[0])


def draw_band(ax: Axes, curve: Curve, color: Any) -> Any:
    """Fill between two quantiles where both are finite, and draw the lower one alone elsewhere."""
    from matplotlib.collections import PolyCollection
    from matplotlib.lines import Line2D

    x, (lower, upper) = curve.places, curve.band or (curve.middle, curve.middle)
    # A renderer fills no infinite polygon. A hundred heights of the axes up, the eye sees no difference.
    with np.errstate(over="ignore"):
        sky = np.nan_to_num((ax.transScale + ax.transLimits).inverted().transform((0.0, 100.0))[1])
    closed = np.abs(upper) <= curve.limit
    polygons = [
        np.column_stack([np.append(x[part], x[part][::-1]), np.append(upper[part], lower[part][::-1])])
        for part in _axes.stretches(closed)
    ]
    polygons = [np.column_stack([points[:, 0], np.minimum(points[:, 1], sky)]) for points in polygons]
    band = PolyCollection(polygons, facecolor=color, edgecolor="none", alpha=0.2, zorder=2)
    ax.add_collection(band, autolim=False)
    _moving.fill(band, polygons, [np.append(x[part], x[part][::-1]) for part in _axes.stretches(closed)])
    if not closed.all():
        beside = ~closed | np.append(~closed[1:], False) | np.append(False, ~closed[:-1])
        rest = np.where(beside & (np.abs(lower) <= HUGE), lower, np.nan)
        edge = ax.add_artist(Line2D(x, rest, color=color, linewidth=0.6, alpha=0.6, zorder=2))
        _moving.grow(edge, x)
    return band


def draw_strips(ax: Axes, curves: list[Curve], colors: list[Any], over: str | None) -> list[list[str]]:
    """Hatch the parts of x at which curves diverge, and return the notes for which there is no room.

    Each curve has a row of its own below the top, in room made for it. Up to three have their notes there.
    """
    (left, right), top = sorted(ax.get_xlim()), max(ax.get_ylim())
    strips = [
        _strips_of_runs(curve, right, top) if over is None else _strips_of_medians(curve, left, right, over)
        for curve in curves
    ]
    rows = [i for i, several in enumerate(strips) if several]
    said = [", ".join(strip.note for strip in several) for several in strips]
    if len(curves) > 1:
        said = [f"{curve.name}: {note}" for curve, note in zip(curves, said, strict=True)]
    has_room = len(rows) <= _STRIPS and all(_width(ax, said[i]) < 0.9 for i in rows)
    notes = [[strip.note for strip in several if not has_room] for several in strips]
    if not rows or len(curves) > _ROWS:
        return notes
    figure: Any = ax.get_figure()
    points = 1.25 * font_size() if has_room else 5.0
    height = min(0.5 / len(rows), points * figure.dpi / 72 / ax.bbox.height)
    _make_room(ax, height * len(rows))
    for row, i in enumerate(rows, start=1):
        for strip in strips[i]:
            _hatch(ax, strip, 1 - row * height, 0.85 * height, colors[i])
        if has_room:
            _write(ax, said[i], strips[i], row, height)
    return notes


def _width(ax: Axes, note: str) -> float:
    """Return the share of the axes' width that a note in small letters takes."""
    figure: Any = ax.get_figure()
    return 0.5 * font_size() * len(note) * figure.dpi / 72 / float(ax.bbox.width)


def _write(ax: Axes, note: str, strips: list[Strip], row: int, height: float) -> None:
    """Write a note to the left of its strips, or upon them if there is no room."""
    corner = ax.transData.transform((strips[0].start, ax.get_ylim()[0]))
    start = np.clip(ax.transAxes.inverted().transform(corner)[0], 0, 1)  # of a strip out of view too
    end = start - 0.01 if start > _width(ax, note) + 0.01 else 0.995
    text = ax.text(end, 1 - (row - 0.425) * height, note, transform=ax.transAxes)
    text.set(fontsize="small", zorder=5, ha="right", va="center_baseline")
    text.set_bbox({"facecolor": background(ax), "edgecolor": "none", "pad": 0.8})


def _hatch(ax: Axes, strip: Strip, bottom: float, height: float, color: Any) -> None:
    from matplotlib.patches import Rectangle

    box = Rectangle((strip.start, bottom), strip.stop - strip.start, height)
    box.set(facecolor="none", edgecolor=color, hatch="/////", linewidth=0, zorder=2.5)
    box.set_transform(ax.get_xaxis_transform())
    ax.add_artist(box)


def _strips_of_runs(curve: Curve, right: float, top: float) -> list[Strip]:
    """Return the strip from the first place at which one of several runs that diverge is out of view."""
    gone = diverged(curve)
    if len(gone) == 1 or not gone.any():
        return []
    first = _axes.in_view(curve.values[gone], top).all(axis=0).argmin()
    return [Strip(curve.x[first], right, f"{gone.sum()} of {len(gone)} diverged")]


def _strips_of_medians(curve: Curve, left: float, right: float, name: str) -> list[Strip]:
    """Return the strips between finite medians, or from one to the end of the axes."""
    x, found = curve.places, []
    for part in _axes.stretches(~(np.abs(curve.middle) <= HUGE)):
        start = x[part.start - 1] if part.start else left
        stop = x[part.stop] if part.stop < len(x) else right
        at = "from" if part.stop == len(x) else "at"
        found.append(Strip(start, stop, f"diverges {at} {name} {x[part.start]:.4g}"))
    return found


def _make_room(ax: Axes, share: float) -> None:
    """Raise the top so that everything stays below a share of the axes, unless the user has set it."""
    if not ax.get_autoscaley_on():
        return
    scale, margin = ax.yaxis.get_transform(), float(ax.get_ymargin())
    low, high = (float(scale.transform(end)) for end in ax.get_ylim())
    wanted = low + (high - low) / (1 - share)
    data = (wanted + margin * low) / (1 + margin)
    top = float(scale.inverted().transform(data))
    ax.update_datalim([(ax.get_xlim()[0], top)], updatex=False)
    ax.autoscale_view()
