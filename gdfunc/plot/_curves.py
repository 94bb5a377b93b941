"""Curves over steps, or over a hyperparameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .._errors import check_int
from .._numerics import Scalar
from .._train._trajectory import Trajectory
from . import _axes, _labels, _lines, _names, _style
from ._axes import Array, Axes
from ._lines import Curve

_NAMED = 7  # curves: more of them get a bar of colours if their labels are numbers


def plot_curves(
    curves: Sequence[Any] | Mapping[Any, Any],
    *,
    x: Any = None,
    ax: Axes | None = None,
    labels: Sequence[Any] | None = None,
    colors: Sequence[Any] | Mapping[Any, Any] | None = None,
    by: str = "",
    label_lines: bool | None = None,
    band: tuple[float, float] | None = (0.1, 0.9),
    window: int | None = None,
    over: str | None = None,
    minimum: Scalar | None = None,
    xlabel: str | None = None,
    ylabel: str = "loss",
    log_x: bool = False,
    log_y: bool = True,
) -> Axes:
    """Draw curves over steps or a hyperparameter: a line for one run, median and quantile band for several.

        line = median over runs,  band = [q_low, q_high] over runs,  a diverged run counting as +∞

    Nothing is smoothed, thinned or left out. A run that becomes NaN or infinite gets a cross at its last
    finite value. The legend tells its step. Among several runs these are drawn thin, a hatched strip at the
    top begins where the first of them is lost, and tells their number. A band ends where its upper quantile
    is infinite, and its lower edge goes on. On a logarithmic axis the line leaves through the bottom at
    values ≤ 0. Triangles on the bottom mark these places, and the legend counts them.

    The view shows all of each run that stays finite, but one that grows to a billion times the largest
    values of a quarter of the runs counts as diverging. It shows a diverging run up to a thousand times the
    largest value of the finite runs and of all starts (on a linear axis, up to one more span). Beyond that
    the line continues through the top, the cross is at the last value in view, and the legend tells the
    step.

    Colours follow the labels: by rank from dark to bright if all of them are numbers, else one for each
    curve, which differs from its neighbours in its dashes, too.

    Args:
        curves: list or tuple of all curves, also around a single one, or a dict of them by label. Each is
            an array or tensor [T] of one run, or [N, T] of N runs such as seeds.
        x: where the values belong; None for 0, …, T−1 (with `log_x` for 1, …, T, as the axis says), T
            numbers for all curves, or a list or tuple with T numbers for each (samples seen, seconds, …).
        ax: where to draw; None for a new figure of the size in rcParams. The legend stands
            below the axes if the figure has a layout that makes room for it, such as "constrained", else
            inside.
        labels: one for each curve, in their order.
        colors: one of matplotlib's colours for each curve, in their order, or a dict of them by label, so
            that one thing has one colour over several axes: the dict may know other labels, too. Lines are
            then solid, and differ in their dashes where a colour comes again.
        by: name of labels that are numbers, such as "lr": it stands before them. More than seven are named
            at a bar of colours.
        label_lines: write the labels at the ends of their lines; the legend then holds only notes. None
            does so in a new figure, for up to seven labelled curves whose names are short.
        band: the two quantiles between which the band lies, interpolated linearly between runs; None for
            no band.
        window: pool this many successive steps of all runs of a curve, for losses of mini-batches. Line and
            band are the median and quantiles of each window, at the mean of its x. The last window may be
            shorter.
        over: the name of a hyperparameter, such as "lr", of which `x` are the values. Each value is then a
            run of its own: there are no crosses, up to twelve values are marked, and a strip at the top
            begins at the last value whose median is finite. Near it, the view shows medians up to ten
            times the usual ones.
        minimum: subtract this from every value, and label the axis "loss − minimum".
        xlabel: name of x, also in the legend; None for `over`, or "step".
        ylabel: name of the values.
        log_x: logarithmic x. Every x must be >= 0. Where one is 0, the axis is linear up to a power of
            ten near the least positive x, as its name says.
        log_y: logarithmic y.

    Returns:
        The Axes.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        TypeError: `curves` is no list, tuple or dict, or a curve is not of real numbers.
        ValueError: a curve is empty or neither [T] nor [N, T], or `x`, `labels`, `colors`, `band`, `window`
            or `minimum` is malformed.

    Example:
        >>> losses = torch.tensor([[4.0, 2.0, 1.0], [4.0, 3.0, 2.0], [4.0, 40.0, torch.inf]])
        >>> ax = gd.plot.plot_curves({"SGD": losses, "the third": losses[2]}, label_lines=False)
        >>> for entry in ax.get_legend().get_texts() + ax.texts:
        ...     print(entry.get_text())
        SGD: median of 3, 10–90 %
        the third (not finite from step 2)
        SGD: 1 of 3 diverged

    References:
        Masataka Okabe and Kei Ito, Color Universal Design, 2008 (the colours).
    """
    runs, labels = _runs(curves, labels)
    names, numbers = _axes.check_labels(labels, len(runs), "curves"), _labels.as_numbers(labels)
    if numbers is not None:
        names = [f"{by} {number:.6g}".strip() for number in numbers]
    if minimum is not None:
        runs = [values - _axes.to_number("minimum", minimum) for values in runs]
        ylabel = f"{ylabel} − minimum"
    if over is not None and x is None:
        raise ValueError(f"over={over!r} needs x, the values of {over}")
    xs, xlabel = _abscissae(x, [values.shape[1] for values in runs], log_x), xlabel or over or "step"
    band = None if band is None else _quantiles(band)
    if window is not None:
        check_int("window", window, 1)
    given = [] if colors is None else _style.check_colors(colors, labels, len(runs))
    drawn = [
        _lines.summarize(name, places, values, window, band, over is not None)
        for name, places, values in zip(names, xs, runs, strict=True)
    ]
    drawn = drawn if over else _lines.with_limit(drawn)
    is_new, ax = ax is None, _axes.axes_for(ax)
    if label_lines is None:
        label_lines = is_new and labels is not None and len(drawn) <= _NAMED and _names.fits(ax, names)
    note = _set_x_scale(ax, np.concatenate(xs), log_x)
    note = ", counted from 1" if log_x and x is None else note
    _prepare(ax, np.concatenate(xs), whole=over is None and not log_x)
    ax.set(yscale="log" if log_y else "linear", xlabel=f"{xlabel}{note}", ylabel=ylabel)
    looks = _looks(ax, len(drawn), given, numbers)
    handles, notes, top = _draw(ax, drawn, looks, window, over or xlabel, over is not None)
    abouts = [_about(curve, window, band) for curve in drawn]
    if label_lines:
        _labels.label_ends(ax, drawn, [color for color, _ in looks], top)
    if len(drawn) > _NAMED and not label_lines and (labels is None or numbers is not None):
        if numbers is not None:
            _labels.draw_color_bar(ax, numbers, [color for color, _ in looks], by)
        entries = _labels.summary(ax, drawn, handles, notes, abouts)
    else:
        entries = _labels.legend_entries(ax, drawn, handles, notes, abouts, label_lines)
    if entries:
        _axes.draw_legend(ax, entries)
    return ax


def _runs(
    curves: Sequence[Any] | Mapping[Any, Any], labels: Sequence[Any] | None
) -> tuple[list[Any], Sequence[Any] | None]:
    """Read the curves as arrays [N, T], and their labels."""
    if isinstance(curves, Mapping):
        if labels is not None:
            raise ValueError("labels must be None where curves is a dict: its keys are the labels")
        curves, labels = list(curves.values()), list(curves)
    return [
        _values(f"curves[{i}]", curve) for i, curve in enumerate(_axes.check_list("curves", curves))
    ], labels


def _looks(ax: Axes, count: int, colors: list[Any], numbers: Any) -> list[Any]:
    """Choose a colour and a dash for each curve: those given, by the numbers, or one after another."""
    if colors:
        return _style.chosen_looks(colors)
    if numbers is not None:
        return [(color, "-") for color in _style.ordered_colors(ax, numbers)]
    return [_style.line_style(i, ax) for i in range(count)]


def _prepare(ax: Axes, x: Array, whole: bool) -> None:
    """Set grid and spines, and ticks at whole numbers if x has no others."""
    from matplotlib.ticker import FixedLocator, MaxNLocator

    ax.grid(color=_style.faint(ax, 0.1), linewidth=0.6)
    ax.set_axisbelow(True)
    # Axes of `twinx` have their numbers on the right.
    unused = "left" if ax.yaxis.get_label_position() == "right" else "right"
    ax.spines[["top", unused]].set_visible(False)
    if whole and (x % 1 == 0).all():
        several = MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10])
        places = np.unique(x)
        ax.xaxis.set_major_locator(several if len(places) > 1 else FixedLocator(places.tolist()))


def _about(curve: Curve, window: int | None, band: tuple[float, float] | None) -> str:
    """Say what the line and the band are."""
    count = len(curve.values)
    if count == 1 and window is None:
        return ""
    parts = [f"median of {count}" if count > 1 else "median"]
    parts += [] if band is None else [f"{100 * band[0]:g}–{100 * band[1]:g} %"]
    return ", ".join(parts) + ("" if window is None else f" in windows of {window}")


def _draw(
    ax: Axes, curves: list[Curve], looks: list[tuple[Any, Any]], window: int | None, name: str, over: bool
) -> tuple[list[Any], list[list[str]], float]:
    """Draw the curves, and return a legend's handle and the notes of each, and the top below the strips."""
    log_y = ax.get_yscale() == "log"
    top = (_lines.top_of_medians if over else _lines.top_of_runs)(curves, log_y)
    colors = [color for color, _ in looks]
    pairs = list(zip(curves, looks, strict=True))
    handles = [_lines.draw_lines(ax, curve, look, top, over, window) for curve, look in pairs]
    if log_y and not np.isfinite(ax.dataLim.minposy):
        # Without a positive value to go by, matplotlib would warn.
        ax.update_datalim([(curves[0].x[0], 0.1), (curves[0].x[0], 1.0)])
    # Only now are the limits known, and with them what left the view and how far up an infinite band goes.
    ax.autoscale_view()
    top = max(ax.get_ylim())
    notes = _lines.draw_strips(ax, curves, colors, name if over else None)
    for i, (curve, color) in enumerate(zip(curves, colors, strict=True)):
        if not over:
            _lines.draw_ends(ax, curve, top, color)
        if curve.band:
            handles[i] = (_lines.draw_band(ax, curve, color), handles[i])
        notes[i] += _notes(curve, top, name, log_y, over)
    return handles, notes, top


def _values(name: str, value: Any) -> Array:
    """Return the values [N, T] of a curve's runs."""
    if isinstance(value, Trajectory):
        raise TypeError(f"{name} is a Trajectory; pass one of its records, such as trajectory.loss")
    values = _axes.to_array(name, value)
    if values.ndim not in (1, 2) or values.size == 0:
        raise ValueError(f"{name} must be [T] or [N, T] with N, T >= 1; got shape {values.shape}")
    return np.atleast_2d(values)


def _quantiles(band: Any) -> tuple[float, float]:
    low, high = (_axes.to_number("band", quantile) for quantile in band)
    if not 0 <= low <= high <= 1:
        raise ValueError(f"band must be two quantiles with 0 <= low <= high <= 1; got {band!r}")
    return low, high


def _abscissae(x: Any, lengths: list[int], log_x: bool) -> list[Array]:
    """Return x [T] of each curve."""
    is_each = isinstance(x, (list, tuple)) and not all(np.ndim(value) == 0 for value in x)
    each = x if is_each else [x] * len(lengths)
    if x is None:
        each = [np.arange(length) + log_x for length in lengths]
    if len(each) != len(lengths):
        raise ValueError(f"x has {len(each)} entries but curves has {len(lengths)}; give one for each")
    xs = [_axes.to_array(f"x[{i}]", values) for i, values in enumerate(each)]
    for i, (values, length) in enumerate(zip(xs, lengths, strict=True)):
        if values.shape != (length,) or not np.isfinite(values).all():
            raise ValueError(f"x[{i}] must be {length} finite numbers, as curves[{i}]; got {values!r}")
        if log_x and (values < 0).any():
            raise ValueError(
                f"x[{i}] has the value {values.min():g}, which no logarithmic axis can show; give x >= 0"
            )
    return xs


def _set_x_scale(ax: Axes, x: Array, log: bool) -> str:
    """Set the scale of x, and return what its name must say about it."""
    positive = x[x > 1 / _axes.HUGE]
    if not log or not len(positive):
        ax.set_xscale("linear")
        return ""
    if len(positive) == len(x):
        ax.set_xscale("log")
        return ""
    # Ticks are powers of ten. One below the first would be too near to 0.
    first = np.ceil(np.log10(positive.min()))
    # The linear part is wider than the margin, which it holds, however many decades there are.
    decades = np.log10(positive.max()) - first
    ax.set_xscale("symlog", linthresh=10**first, linscale=max(0.5, decades / 8))
    return f", linear up to {10**first:g}"


def _notes(curve: Curve, top: float, name: str, log_y: bool, over: bool) -> list[str]:
    """Say what of a curve is not in the picture, but for what a strip says."""
    notes, values, x = [], curve.values, curve.x
    alive, lost = np.isfinite(values), _lines.diverged(curve)
    if over:
        beyond = np.isfinite(curve.middle) & (curve.middle > top)
        notes += [f"leaves the view at {name} {curve.places[beyond.argmax()]:.4g}"] if beyond.any() else []
        if len(values) > 1 and not alive.all():
            notes.append(f"{(~alive).sum()} of {alive.size} runs diverged")
    elif len(values) == 1 and lost[0]:
        end = _axes.in_view(values[0], top).argmin()
        notes += [f"leaves the view at {name} {x[end]:.12g}"] if alive[0, end] else []
        notes += [] if alive.all() else [_axes.not_finite_note(alive[0], x, name)]
    low = (values[alive] <= 0).sum()
    return notes + ([f"{low} of {values.size} values ≤ 0"] if log_y and low else [])
