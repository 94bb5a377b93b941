"""Ranked ranges of good learning rates."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from .._sweep._result import SweepResult
from . import _axes, _cells
from ._axes import HUGE, Array, Axes
from ._style import background, faint, font_size, foreground, halo, ink

_GOOD, _DEFAULT = "#009E73", "#D55E00"


class Row(NamedTuple):
    """The good values of one setting."""

    name: str
    tried: Array  # [n], increasing
    losses: Array  # [n], medians
    ranges: list[tuple[float, float]]  # the good ones, in order
    best: int  # the place of the least loss, or -1

    @property
    def width(self) -> float:
        """The factor between the ends of the good range with the best value; 0 if all diverged."""
        return max((high / low for low, high in self.ranges if self._has(low, high)), default=0.0)

    @property
    def is_open(self) -> bool:
        """Whether that range reaches the first or the last value tried."""
        ends = [(low, high) for low, high in self.ranges if self._has(low, high)]
        return any(low <= self.tried[0] or high >= self.tried[-1] for low, high in ends)

    def _has(self, low: float, high: float) -> bool:
        return bool(low <= self.tried[self.best] <= high)


def plot_sensitivity(
    losses: SweepResult | Mapping[str, tuple[Any, Any]],
    x: str = "lr",
    by: str | None = None,
    *,
    factor: float = 2.0,
    bound: float | str = "shared",
    values: Any = None,
    minimum: float = 0.0,
    defaults: Mapping[str, float] | None = None,
    ax: Axes | None = None,
    label: str = "loss",
) -> Axes:
    """Rank optimizers or other settings by the range of learning rates that are good.

        good = {lr : loss(lr) − minimum ≤ bound},  loss = median over the runs
        bound = factor · median over settings of min (loss − minimum)

    The bound is the same for all settings, because a ranking is fair only if all have to come equally far.
    It is `factor` times the loss that half of the settings reach at their best, so that neither the best
    setting nor the worst decides it. With `bound="own"` each setting is measured by its own best loss: a
    setting that nowhere does well then ranks high if it does equally badly everywhere.

    A bar spans the good learning rates of a setting, between those tried by a straight line in log loss
    over log lr, but never towards one that diverged. Thin ticks are the learning rates tried, and a star is
    the best, whose loss stands beside the name. The number beside a bar is the ratio of its ends. It has a
    ≥ where the bar reaches the end of the learning rates tried, since the range may then go on.

    Args:
        losses: of `sweep`, on a grid that is not zipped, or a dict name -> (lrs, losses) with losses [n] of
            one run, or [N, n] of N runs.
        x: the axis of the grid along the bars, whose values are > 0; or its name.
        by: the axis of the grid with a bar for each value; None for the only other one that has names, or
            the only other one.
        factor: how much worse than the best a good loss may be.
        bound: the largest loss that is good, for all settings; "shared" for the bound above, which is the
            fair default; "own" for `factor` times the best loss of each setting.
        values: what the losses are, [N] in the order of the grid's members; None for the outputs.
        minimum: the least loss possible. The factor is of the loss above it.
        defaults: a dict name -> the default learning rate of that setting, marked on its bar.
        ax: where to draw; None for a new figure of the size in rcParams, but as high as the bars need.
        label: name of the losses, in the legend.

    Returns:
        The Axes. The widest range is on top. Below are settings that never come to the bound, the least
        loss first, and at the bottom those that always diverge.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        TypeError: the losses are neither a SweepResult nor a dict.
        ValueError: the grid has no such axes, a learning rate is not > 0 or occurs twice, shapes differ, a
            best loss is not above `minimum`, `factor` is below 1, or `bound` is not above `minimum`.

    Example:
        >>> lrs = [0.01, 0.1, 1.0, 10.0]
        >>> losses = {"SGD": (lrs, [9.0, 2.0, 1.0, torch.inf]), "Adam": (lrs, [1.0, 2.0, 9.0, 9.0])}
        >>> ax = gd.plot.plot_sensitivity(losses, bound=2.0)
        >>> for text in ax.get_yticklabels() + ax.texts:
        ...     print(text.get_text())
        SGD (1)
        Adam (1)
        × 10
        ≥ × 10
    """
    if _axes.to_number("factor", factor) < 1:
        raise ValueError(f"factor must be >= 1; got {factor!r}")
    minimum = _axes.to_number("minimum", minimum)
    tables = _tables(losses, x, by, values)
    if not tables:
        raise ValueError("losses is empty; give at least one setting")
    medians = {name: _median(name, runs - minimum) for name, (_, runs) in tables.items()}
    bounds, rule = _bounds(bound, factor, minimum, medians)
    rows = [_row(name, lrs, medians[name], bounds[name]) for name, (lrs, _) in tables.items()]
    marks = dict(defaults or {})
    if unknown := [name for name in marks if name not in tables]:
        raise ValueError(f"defaults has {unknown[0]!r}, but losses has only {', '.join(tables)}")
    rows = sorted(rows, key=lambda row: (-row.width, row.losses.min()))
    is_new, ax = ax is None, _axes.axes_for(ax)
    figure: Any = ax.get_figure()
    if is_new:
        # Each bar takes two lines of text, and the axis, its name and the legend take eight.
        needed = font_size() * (2 * len(rows) + 8) / 72
        figure.set_figheight(max(figure.get_figheight(), needed))
    _draw(ax, rows, x, {name: _axes.to_number(f"defaults[{name!r}]", lr) for name, lr in marks.items()})
    above = "" if minimum == 0 else " above the minimum"
    counts = {len(runs) for _, runs in tables.values()} - {1}
    runs = f", median of {counts.pop()}" if len(counts) == 1 else ", medians" if counts else ""
    _axes.draw_legend(ax, _entries(ax, f"{label}{above} {rule}{runs}", x, bool(marks)))
    return ax


def _tables(losses: Any, x: str, by: str | None, values: Any) -> dict[str, tuple[Array, Array]]:
    """Return the learning rates [n], increasing, and the losses [N, n] of each setting."""
    if isinstance(losses, Mapping):
        return {str(name): _table(str(name), *_pair(name, pair)) for name, pair in losses.items()}
    if not isinstance(losses, SweepResult):
        kind = type(losses).__name__
        raise TypeError(f"losses is {kind}; pass what gd.sweep returns, or a dict name -> (lrs, losses)")
    by = _other(losses, x) if by is None else by
    across, settings = _cells.sides(losses, x, by, False, False)
    if across.has_names:
        raise ValueError(f"axis {x} must have numbers as its values; got {across.labels}")
    members, _ = _cells.members_of(losses, values)
    cells = _cells.by_cell(losses, x, by, members)
    rows = zip(settings.labels, np.moveaxis(cells, 1, 0), strict=True)
    return {
        name if settings.has_names else f"{by} {name}": _table(name, across.centres, runs)
        for name, runs in rows
    }


def _pair(name: Any, pair: Any) -> tuple[Any, Any]:
    if not isinstance(pair, (list, tuple)) or len(pair) != 2:
        raise ValueError(f"losses[{name!r}] must be (lrs, losses); got {type(pair).__name__}")
    return pair[0], pair[1]


def _other(result: SweepResult, x: str) -> str:
    """Return the only other axis with names, or the only other one."""
    others = {name: axis.labels for name, axis in result.grid.axes.items() if name != x}
    named = [name for name, labels in others.items() if any(isinstance(label, str) for label in labels)]
    found = named or list(others)
    if len(found) != 1:
        raise ValueError(f"by must be one of the axes {', '.join(others) or '(none)'}")
    return found[0]


def _table(name: str, lrs: Any, losses: Any) -> tuple[Array, Array]:
    tried, runs = (
        _axes.to_array(f"lrs of {name}", lrs),
        np.atleast_2d(_axes.to_array(f"losses of {name}", losses)),
    )
    if tried.ndim != 1 or runs.ndim != 2 or runs.shape[1:] != tried.shape or runs.size == 0:
        raise ValueError(
            f"{name} must have lrs [n] and losses [n] or [N, n]; got {tried.shape} and {runs.shape}"
        )
    order = np.argsort(tried)
    tried = tried[order]
    if not np.isfinite(tried).all() or (tried <= 0).any() or (np.diff(tried) == 0).any():
        raise ValueError(f"{name} must have different, finite lrs > 0; got {tried.tolist()}")
    return tried, runs[:, order]


def _median(name: str, runs: Array) -> Array:
    """Return the median [n] of the losses above the minimum, which are infinite where runs diverge."""
    medians = _axes.run_quantile(runs, 0.5)
    medians = np.where(np.abs(medians) <= HUGE, medians, np.inf)
    if medians.min() <= 0:
        raise ValueError(
            f"{name} has the best loss {medians.min():g} above the minimum, of which a factor makes no "
            "sense; give minimum= below all losses"
        )
    return medians


def _bounds(
    bound: Any, factor: float, minimum: float, medians: dict[str, Array]
) -> tuple[dict[str, float], str]:
    """Return the largest good loss above the minimum of each setting, and the rule in words."""
    best = {name: float(losses.min()) for name, losses in medians.items()}
    if isinstance(bound, str) and bound == "own":
        own = {name: factor * least if least < np.inf else 0.0 for name, least in best.items()}
        return own, f"within × {factor:g} of its own best"
    if isinstance(bound, str) and bound == "shared":
        finite = [least for least in best.values() if least < np.inf]
        shared = factor * statistics.median(finite) if finite else 0.0
        return dict.fromkeys(best, shared), f"≤ {shared:.3g} (× {factor:g} the median best)"
    if isinstance(bound, str):
        raise ValueError(f"bound must be 'shared', 'own' or a loss; got {bound!r}")
    given = _axes.to_number("bound", bound)
    if given <= minimum:
        raise ValueError(f"bound must be above the minimum, {minimum:g}; got {given:g}")
    return dict.fromkeys(best, given - minimum), f"≤ {given - minimum:.3g}"


def _row(name: str, tried: Array, medians: Array, bound: float) -> Row:
    """Find the good ranges of a setting."""
    if np.isinf(medians).all():
        return Row(name, tried, medians, [], -1)
    best, found = int(medians.argmin()), []
    for part in _axes.stretches(medians <= bound):
        low = _crossing(tried, medians, part.start, part.start - 1, bound)
        found.append((low, _crossing(tried, medians, part.stop - 1, part.stop, bound)))
    return Row(name, tried, medians, found, best)


def _crossing(tried: Array, losses: Array, good: int, bad: int, bound: float) -> float:
    """Return where the loss passes the bound between two neighbours, on a straight line in logarithms."""
    if not 0 <= bad < len(tried):
        return float(tried[good])
    # Towards a loss of +∞ the share is 0, so that the range ends at the good neighbour.
    share = np.log(bound / losses[good]) / np.log(losses[bad] / losses[good])
    return float(tried[good] * (tried[bad] / tried[good]) ** share)


def _draw(ax: Axes, rows: list[Row], x: str, defaults: dict[str, float]) -> None:
    ax.set(xscale="log", xlabel=x, axisbelow=True, ylim=(len(rows) - 0.4, -0.6))
    ax.set_yticks(range(len(rows)), [_name(row) for row in rows])
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", color=faint(ax, 0.1), linewidth=0.6)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.use_sticky_edges = False  # of bars, which would end at the border
    for y, row in enumerate(rows):
        # Ticks are below the bar, where no number covers them.
        below = np.full(len(row.tried), y + 0.37)
        ax.plot(row.tried, below, "|", color=faint(ax, 0.35), markersize=4, zorder=1)
        for low, high in row.ranges:
            ax.barh(y, high - low, 0.42, low, color=_GOOD, alpha=0.45, linewidth=0, zorder=2)
        text: dict[str, Any] = {
            "path_effects": halo(background(ax)),
            "zorder": 5,
            "ha": "left",
            "va": "center",
            "fontsize": "small",
        }
        if row.name in defaults:
            ax.plot([defaults[row.name]] * 2, [y - 0.35, y + 0.35], color=_DEFAULT, linewidth=2.5, zorder=3)
        if row.best < 0:
            ax.text(row.tried[0], y, "diverged everywhere", color=faint(ax, 0.6), **text)
            continue
        star = (row.tried[row.best], y)
        ax.plot(*star, "*", color=foreground(ax), markersize=8, zorder=4)
        if not row.ranges:
            note = "never so low"
            ax.annotate(note, star, (7, 0), textcoords="offset points", color=faint(ax, 0.6), **text)
            continue
        number = f"{row.width:.0f}" if row.width >= 9.95 else f"{row.width:.2g}"
        note = f"≥ × {number}" if row.is_open else f"× {number}"
        end = (row.ranges[-1][1], y)
        ax.annotate(note, end, (7, 0), textcoords="offset points", color=ink(ax, _GOOD), **text)


def _name(row: Row) -> str:
    return row.name if row.best < 0 else f"{row.name} ({row.losses[row.best]:.3g})"


def _entries(ax: Axes, good: str, x: str, has_defaults: bool) -> list[tuple[Any, str]]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    star = Line2D([], [], marker="*", color=foreground(ax), linestyle="", markersize=8)
    entries: list[tuple[Any, str]] = [
        (Patch(facecolor=_GOOD, alpha=0.45, linewidth=0), good),
        (star, f"best {x}, its loss in brackets"),
        (Line2D([], [], marker="|", color=faint(ax, 0.35), linestyle="", markersize=5), f"{x} tried"),
    ]
    default = Line2D([], [], marker="|", color=_DEFAULT, linestyle="", markersize=9, markeredgewidth=2.5)
    return entries + [(default, f"default {x}")] * has_defaults
