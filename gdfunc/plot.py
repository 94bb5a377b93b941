"""Pictures of runs: descent paths over a loss, curves over steps, and maps of a sweep.

Arrays and `ax` in, artists out. matplotlib is imported when something is drawn, and nothing global is
touched: no pyplot, no rcParams, no backend. `plot_curves(...).figure.savefig("run.png")` is a whole script.
"""

from __future__ import annotations

import functools
import math
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from . import _tree
from ._errors import check_int, missing_extra
from ._sweep import SweepResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Tree = Any
Array = np.ndarray

# Okabe and Ito's colours, without their yellow: it is lost on white. Seven colours and four dashes have
# no common divisor, so 28 lines go by before a pair returns, and neighbours differ without any colour.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_YELLOW = "#F0E442"
# matplotlib's limits, margins and ticks overflow somewhat above this, where a float64 run still is finite.
_HUGE = 1e200
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)))


def path(params: Tree, final: Tree) -> Tree:
    """Join the recorded parameters of a run and its final ones to the path that it walked.

        path = (θ₀, …, θ_{T−1}, θ_T)

    Args:
        params: tree of leaves [T, ...]: θ before each step, as in `Trajectory.params`.
        final: the same tree of leaves [...]: θ after the last step.

    Returns:
        The same tree of leaves [T+1, ...].

    Raises:
        ValueError: the trees differ in structure, or a leaf in the shape of its points.

    Example:
        >>> gd.plot.path({"w": torch.tensor([4.0, 2.0])}, {"w": torch.tensor(1.0)})
        {'w': tensor([4., 2., 1.])}
    """
    params, final = _tree.as_tensors(params), _tree.as_tensors(final)
    ends = _tree.check_structure(final, params, "final", "params")
    recorded, structure = _tree.flatten(params)
    for (name, steps), end in zip(_tree.named_leaves(params, ""), ends, strict=True):
        if steps.ndim == 0 or steps.shape[1:] != end.shape:
            raise ValueError(
                f"params{name} has shape {tuple(steps.shape)} and final{name} {tuple(end.shape)}; "
                "params must have one axis more, of steps, in front"
            )
    joined = [torch.cat([steps, end[None]]) for steps, end in zip(recorded, ends, strict=True)]
    return _tree.unflatten(structure, joined)


def plot_descent(
    loss: Callable[[Tree], Tensor],
    paths: Sequence[Tree],
    *,
    ax: Axes | None = None,
    labels: Sequence[Any] | None = None,
    levels: int | Sequence[float] = 20,
    minimum: float | Tensor | None = None,
    minimizers: Sequence[Tree] = (),
    limits: tuple[tuple[float, float], tuple[float, float]] | None = None,
    resolution: int = 200,
    chunk_size: int | None = None,
) -> Axes:
    """Draw paths of descent over the contours of a loss of two parameters.

        levels = minimum + geometric sequence

    The lowest level encloses a hundredth of the view and the highest leaves out a hundredth, so a
    narrow valley, a regression and an elevation map are all covered. The loss is evaluated in two
    batched calls: on the points of the paths, from which the view follows, and on the grid.

    A path is drawn through every one of its points, as long as any is still to come inside the view.
    Where it leaves the view for good, and where it stops being finite, it carries a cross, and its legend
    entry tells at which step, counted in points of the path.

    Args:
        loss: params -> 0-d real tensor, where params holds two scalars in all: a tensor [2],
            {"w": [1], "b": []}, …; called under `torch.func.vmap`, in the dtypes and on the device of
            the first path.
        paths: list or tuple of all paths, also around a single one, since a path may itself be a dict or a
            tuple. Each is a params tree with a leading axis of T+1 points, as `path` returns it.
        ax: where to draw; None for a new figure of 6 x 4 inches. The legend stands below the axes if the
            figure has a layout that makes room for it, such as "constrained", else inside.
        labels: one for each path, in their order.
        levels: how many contour levels, or the losses at which to draw them, increasing.
        minimum: the least value of the loss, where it is known; None takes the smallest finite value on
            the grid, the paths and the minimizers.
        minimizers: list or tuple of params trees, drawn as stars.
        limits: ((low, high), (low, high)) for the two parameters. None shows every start, every
            minimizer and every point whose loss is not above the largest loss at a start.
        resolution: the grid has resolution² points.
        chunk_size: how many points to evaluate at once; None for all.

    Returns:
        The Axes.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        TypeError: `paths` or `minimizers` is no list or tuple, or a path is not of floating point.
        ValueError: a path is empty, its points do not hold two scalars, trees or shapes differ,
            or `labels`, `levels`, `minimum`, `limits` or the value of `loss` is malformed.

    Example:
        >>> def loss(w):
        ...     return w[0] ** 2 + 10 * w[1] ** 2
        >>> def run(lr):
        ...     factors = 1 - lr * torch.tensor([2.0, 20.0])
        ...     return torch.tensor([4.0, 1.0]) * factors ** torch.arange(9)[:, None]
        >>> ax = gd.plot.plot_descent(loss, [run(0.05), run(0.11)], labels=["lr 0.05", "lr 0.11"])
        >>> for entry in ax.get_legend().get_texts():
        ...     print(entry.get_text())
        lr 0.05
        lr 0.11 (leaves the view at step 2)
        start
        end

    References:
        Masataka Okabe and Kei Ito, Color Universal Design, 2008 (the colours).
    """
    trees = [_tree.as_tensors(tree) for tree in _listed("paths", paths)]
    names = _labels(labels, len(trees), "paths")
    tracks = [_points(f"paths[{i}]", tree, trees[0]) for i, tree in enumerate(trees)]
    stars = [
        _points(f"minimizers[{i}]", _tree.map(lambda leaf: leaf[None], _tree.as_tensors(tree)), trees[0])
        for i, tree in enumerate(_listed("minimizers", minimizers))
    ]
    count = check_int("levels", levels, 2) if isinstance(levels, int) else 0
    shown = np.empty(0) if isinstance(levels, int) else _increasing("levels", levels)
    floor = None if minimum is None else _number("minimum", minimum)
    box = None if limits is None else _box(limits)
    check_int("resolution", resolution, 2)
    ax = _axes(ax)

    evaluate = functools.partial(_evaluate, loss, trees[0], chunk_size)
    visited = np.concatenate([*tracks, *stars])
    losses = evaluate(visited)
    if box is None:
        starts = np.concatenate([np.arange(len(track)) == 0 for track in [*tracks, *stars]])
        box = _view(visited, losses, starts)
    x, y = (np.linspace(low, high, resolution) for low, high in box.T)
    heights = evaluate(np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2))
    if count:
        known = np.append(heights, losses)
        lowest = known[np.isfinite(known)].min(initial=np.inf) if floor is None else floor
        shown = _log_levels(heights, lowest, count)

    entries = [_draw_path(ax, track, box, names[i], i) for i, track in enumerate(tracks)]
    entries += _draw_marks(ax, stars, any(_inside(track, box)[-1] for track in tracks))
    entries += _draw_contours(ax, x, y, heights.reshape(resolution, resolution), shown)
    xlabel, ylabel = _scalar_names(trees[0])
    ax.set(xlim=box[:, 0], ylim=box[:, 1], xlabel=xlabel, ylabel=ylabel)
    _draw_legend(ax, entries)
    return ax


def plot_curves(
    curves: Sequence[Any],
    *,
    x: Any = None,
    ax: Axes | None = None,
    labels: Sequence[Any] | None = None,
    band: tuple[float, float] = (0.1, 0.9),
    minimum: float | Tensor | None = None,
    xlabel: str = "step",
    ylabel: str = "loss",
    log_x: bool = False,
    log_y: bool = True,
) -> Axes:
    """Draw curves over steps: a line for one run, median and quantile band for several.

        line = median over runs,  band = [q_low, q_high] over runs,  a diverged run counting as +∞

    Nothing is smoothed, thinned or left out. A run that becomes NaN or infinite gets a cross at its last
    finite value, and the legend tells when, or how many of the runs did (these are drawn thin); a band
    whose upper quantile is infinite goes on through the top. On a logarithmic axis values ≤ 0 lie below
    any bottom: the line leaves there, triangles on the bottom mark where, and the legend counts.

    The view shows runs that stay finite whole. One that diverges it shows up to a thousand times the
    largest value of these and of all starts (on a linear axis, up to one more span): beyond, the line
    goes on through the top, the cross is at its last value in view, and the legend tells when it left.

    Args:
        curves: list or tuple of all curves, also around a single one. Each is an array or tensor [T] of one
            run, or [N, T] of N runs such as seeds.
        x: where the values belong; None for 0, …, T−1, an array or tensor [T] for all curves, or a list
            or tuple with one [T] for each (samples seen, seconds, …).
        ax: where to draw; None for a new figure of 6 x 4 inches. The legend stands below the axes if the
            figure has a layout that makes room for it, such as "constrained", else inside.
        labels: one for each curve, in their order.
        band: the two quantiles between which the band lies, interpolated linearly between runs.
        minimum: subtract this from every value; the axis is then labelled "loss − minimum".
        xlabel: name of x, also in the legend.
        ylabel: name of the values.
        log_x: logarithmic x; every x must be > 0.
        log_y: logarithmic y.

    Returns:
        The Axes.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        TypeError: `curves` is no list or tuple, or a curve is not of real numbers.
        ValueError: a curve is empty or neither [T] nor [N, T], or `x`, `labels`, `band` or `minimum`
            is malformed.

    Example:
        >>> losses = torch.tensor([[4.0, 2.0, 1.0], [4.0, 3.0, 2.0], [4.0, 40.0, torch.inf]])
        >>> ax = gd.plot.plot_curves([losses, losses[2]], labels=["SGD", "the third"])
        >>> for entry in ax.get_legend().get_texts():
        ...     print(entry.get_text())
        SGD: median of 3, 10–90 % (1 of 3 diverged)
        the third (not finite from step 2)

    References:
        Masataka Okabe and Kei Ito, Color Universal Design, 2008 (the colours).
    """
    runs = [_curve(f"curves[{i}]", curve) for i, curve in enumerate(_listed("curves", curves))]
    names = _labels(labels, len(runs), "curves")
    xs = _abscissae(x, [values.shape[1] for values in runs], log_x)
    low, high = (_number("band", quantile) for quantile in band)
    if not 0 <= low <= high <= 1:
        raise ValueError(f"band must be two quantiles with 0 <= low <= high <= 1; got {band!r}")
    if minimum is not None:
        runs = [values - _number("minimum", minimum) for values in runs]
        ylabel = f"{ylabel} − minimum"

    ax = _axes(ax)
    ax.set(xscale="log" if log_x else "linear", yscale="log" if log_y else "linear")
    ax.set(xlabel=xlabel, ylabel=ylabel, axisbelow=True)
    ax.grid(color="0.9", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    top = _top(runs, log_y)
    edges = [(_quantile(values, low), _quantile(values, high)) for values in runs]
    lines = [_draw_runs(ax, xs[i], values, edges[i], top, i) for i, values in enumerate(runs)]
    if log_y and not np.isfinite(ax.dataLim.minposy):
        # Without a positive value to go by, matplotlib would warn.
        ax.update_datalim([(xs[0][0], 0.1), (xs[0][0], 1.0)])
    # Only now are the limits known, and with them what left the view and how far up an infinite band goes.
    ax.autoscale_view()
    top = max(ax.get_ylim())
    entries: list[tuple[Any, str]] = []
    for steps, values, edge, line, name in zip(xs, runs, edges, lines, names, strict=True):
        handle: Any = line
        _draw_ends(ax, steps, values, top, line.get_color())
        if len(values) > 1:
            handle = (_draw_band(ax, steps, *edge, line.get_color()), line)
            name += f": median of {len(values)}, {100 * low:g}–{100 * high:g} %"
        entries.append((handle, _annotated(name, _curve_notes(steps, values, top, xlabel, log_y))))
    _draw_legend(ax, entries)
    return ax


def plot_grid(
    result: SweepResult,
    x: str,
    y: str,
    *,
    values: Any = None,
    ax: Axes | None = None,
    label: str = "output",
    limits: tuple[float, float] | None = None,
    cmap: Any = "viridis",
    log_x: bool = False,
    log_y: bool = False,
    log_color: bool = False,
) -> Axes:
    """Draw a sweep as a map: a colour for each point of two of its axes.

        colour = median over the other axes,  a diverged member counting as +∞

    A cell reaches halfway to its neighbours (on a logarithmic axis to the geometric mean). Where the median
    is not finite the cell is hatched; where fewer members diverged it carries a cross; the legend counts
    both. Values beyond `limits` have the colour of the end, and the colour bar, beside the axes, an arrow.

    Args:
        result: of `sweep`, on a grid that is not zipped.
        x: the axis of the grid to draw along x; its values are numbers, increasing or decreasing.
        y: the same along y.
        values: what to draw, an array or tensor [N] in the order of the grid's members; None for the
            outputs, which are then one number a member.
        ax: where to draw; None for a new figure of 6 x 4 inches.
        label: name of the values, at the colour bar.
        limits: the values at the two ends of the colours; None for the least and the largest drawn: give
            them where runs diverge without reaching infinity, and would take up all colours.
        cmap: matplotlib's name of a colour map, or one itself.
        log_x: logarithmic x; every x must be > 0.
        log_y: logarithmic y.
        log_color: logarithmic colours; values ≤ 0 have the colour of the lower end.

    Returns:
        The Axes.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        TypeError: result is no SweepResult, or its outputs or the values are no real numbers.
        ValueError: the grid is zipped or has no such axes, an axis is not monotonic, the values are not
            one a member, or `limits` is malformed.

    Example:
        >>> grid = gd.grid(momentum=[0.0, 0.5, 0.9], lr=[0.1, 1.0, 3.0])
        >>> result = gd.sweep(lambda momentum, lr: torch.where(lr < 2, lr * momentum, torch.inf), grid)
        >>> ax = gd.plot.plot_grid(result, "lr", "momentum", log_x=True)
        >>> ax.get_xlabel(), ax.get_ylabel(), ax.get_legend().get_texts()[0].get_text()
        ('lr', 'momentum', '3 of 9 cells: diverged')
    """
    if not isinstance(result, SweepResult):
        raise TypeError(f"result is {type(result).__name__}; pass what gd.sweep returns")
    if result.grid.zipped:
        raise ValueError("result is of a zipped grid, which has no cells; draw plot_curves")
    names = list(result.grid.axes)
    if x == y or x not in names or y not in names:
        raise ValueError(f"x and y must be two of the grid's axes, {', '.join(names)}; got {x!r} and {y!r}")
    xs, ys = (_ticks(name, result.grid.axes[name].labels, log) for name, log in ((x, log_x), (y, log_y)))
    heights, share = _cells(result, names.index(x), names.index(y), values)
    span = None if limits is None else _increasing("limits", limits)
    if span is not None and (len(span) != 2 or (log_color and span[0] <= 0)):
        kind = "two positive numbers" if log_color else "two numbers"
        raise ValueError(f"limits must be {kind}, increasing; got {limits!r}")
    ax = _axes(ax)

    from matplotlib.colors import LogNorm, Normalize

    lost = ~(np.abs(heights) <= _HUGE)
    known = heights[~lost & ((heights > 0) | (not log_color))]
    low, high = _span(known, log_color) if span is None else span
    norm = LogNorm(low, high) if log_color else Normalize(low, high)
    # A logarithm would hide what is ≤ 0 as if it were not finite.
    shown = np.ma.array(np.maximum(heights, low / 10) if log_color else heights, mask=lost)
    ax.set(xscale="log" if log_x else "linear", yscale="log" if log_y else "linear", xlabel=x, ylabel=y)
    mesh = ax.pcolormesh(_edges(xs, log_x), _edges(ys, log_y), shown, norm=norm, cmap=cmap, rasterized=True)
    beyond = (shown.min() < low, shown.max() > high) if not lost.all() else (False, False)
    extend = {(True, True): "both", (True, False): "min", (False, True): "max"}.get(beyond, "neither")
    figure: Any = ax.get_figure()
    figure.colorbar(mesh, ax=ax, label=label, extend=extend)
    entries = _draw_lost(ax, xs, ys, lost, share)
    if entries:
        _draw_legend(ax, entries)
    return ax


# At the door: what was given becomes float64 arrays of our own.


def _listed(name: str, value: Any) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)):
        kind = type(value).__name__
        raise TypeError(f"{name} must be a list or tuple, also around a single one; got {kind}")
    return value


def _labels(labels: Sequence[Any] | None, count: int, what: str) -> list[str]:
    if count == 0:
        raise ValueError(f"{what} is empty; give at least one")
    if labels is None:
        return [f"run {i}" for i in range(count)]
    if len(labels) != count:
        raise ValueError(f"labels has {len(labels)} entries but {what} has {count}; give one for each")
    return [str(label) for label in labels]


def _array(name: str, value: Any) -> Array:
    """Copy real numbers from any device, and from dtypes that NumPy does not know."""
    if isinstance(value, Tensor) and not value.is_complex():
        return value.detach().cpu().to(torch.float64, copy=True).numpy()
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name} must hold real numbers; got dtype {array.dtype}")
    return array.astype(np.float64)


def _number(name: str, value: Any) -> float:
    number = _array(name, value)
    if number.shape != () or not np.isfinite(number):
        raise ValueError(f"{name} must be a finite number; got {value!r}")
    return float(number)


def _increasing(name: str, value: Any) -> Array:
    numbers = _array(name, value)
    rising = numbers.ndim == 1 and len(numbers) >= 2 and (np.diff(numbers) > 0).all()
    if not rising or not np.isfinite(numbers).all():
        raise ValueError(f"{name} must be two or more finite numbers, increasing; got {value!r}")
    return numbers


def _box(limits: Any) -> Array:
    """Return the lower and the upper corner."""
    pairs = _array("limits", limits)
    if pairs.shape != (2, 2) or not np.isfinite(pairs).all() or not (pairs[:, 0] < pairs[:, 1]).all():
        raise ValueError(f"limits must be ((low, high), (low, high)) with low < high; got {limits!r}")
    return pairs.T


def _points(name: str, tree: Tree, first: Tree) -> Array:
    """Return the points [T+1, 2] of a path; the columns are in the order of the first path's leaves."""
    leaves = _tree.check_structure(tree, first, name, "paths[0]")
    named = _tree.named_leaves(tree, name)
    for where, leaf in named:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            kind = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
            raise TypeError(f"{where} must be a floating-point tensor or array; got {kind}")
    lengths = {leaf.shape[0] if leaf.ndim else 0 for leaf in leaves}
    if len(lengths) != 1 or lengths == {0}:
        got = ", ".join(f"{where} {tuple(leaf.shape)}" for where, leaf in named) or "no leaves"
        raise ValueError(f"{name} must have leaves [T+1, ...] of one length T+1 >= 1; got {got}")
    shapes = [leaf.shape[1:] for leaf in leaves]
    if sum(map(math.prod, shapes)) != 2 or shapes != [leaf.shape[1:] for leaf in _tree.leaves(first)]:
        got = ", ".join(f"{where} {tuple(leaf.shape[1:])}" for where, leaf in named)
        raise ValueError(
            f"{name} must have two scalars in all at each point, shaped as in paths[0]; "
            f"got points of shape {got}"
        )
    return np.concatenate([_array(name, leaf).reshape(len(leaf), -1) for leaf in leaves], axis=1)


def _curve(name: str, value: Any) -> Array:
    """Return the values [N, T] of a curve's runs."""
    values = _array(name, value)
    if values.ndim not in (1, 2) or values.size == 0:
        raise ValueError(f"{name} must be [T] or [N, T] with N, T >= 1; got shape {values.shape}")
    return np.atleast_2d(values)


def _abscissae(x: Any, lengths: list[int], log_x: bool) -> list[Array]:
    """Return x [T] of each curve."""
    if x is None:
        xs = [np.arange(length, dtype=np.float64) for length in lengths]
    else:
        each = x if isinstance(x, (list, tuple)) else [x] * len(lengths)
        if len(each) != len(lengths):
            raise ValueError(f"x has {len(each)} entries but curves has {len(lengths)}; give one for each")
        xs = [_array(f"x[{i}]", values) for i, values in enumerate(each)]
    for i, (values, length) in enumerate(zip(xs, lengths, strict=True)):
        if values.shape != (length,) or not np.isfinite(values).all():
            raise ValueError(f"x[{i}] must be {length} finite numbers, as curves[{i}]; got {values!r}")
        if log_x and (values <= 0).any():
            raise ValueError(
                f"x[{i}] has the value {values.min():g}, which no logarithmic axis can show; "
                "give x > 0, such as steps counted from 1"
            )
    return xs


def _ticks(name: str, labels: Sequence[Any], log: bool) -> Array:
    """Return the values of a grid's axis as numbers that increase or decrease."""
    numbers = np.asarray(labels)
    if numbers.dtype.kind not in "iuf":
        raise ValueError(f"axis {name} must have numbers as its values; got {list(labels)!r}")
    numbers = numbers.astype(np.float64)
    change = np.diff(numbers)
    if not np.isfinite(numbers).all() or not ((change > 0).all() or (change < 0).all()):
        raise ValueError(f"axis {name} must be finite and increasing or decreasing; got {list(labels)!r}")
    if log and (numbers <= 0).any():
        raise ValueError(f"axis {name} has the value {numbers.min():g}, which no logarithmic axis can show")
    return numbers


def _cells(result: SweepResult, x: int, y: int, values: Any) -> tuple[Array, Array]:
    """Return the medians [Y, X] over the other axes, and the shares of members that diverged."""
    if values is None and not isinstance(result.outputs, Tensor):
        raise TypeError("the outputs are a tree; pass one of its leaves, values=result.outputs['…']")
    drawn = _array("values", result.outputs if values is None else values)
    if drawn.shape != (len(result.grid),):
        raise ValueError(
            f"values must be one number for each of the {len(result.grid)} members; got shape {drawn.shape}"
        )
    shape = result.grid.shape

    def spread(members: Array) -> Array:
        """Lay members [N] out as [Y, X, others]."""
        return np.moveaxis(members.reshape(shape), (y, x), (0, 1)).reshape(shape[y], shape[x], -1)

    diverged = result.diverged.cpu().numpy() | ~np.isfinite(drawn)
    medians = _quantile(np.moveaxis(spread(np.where(diverged, np.inf, drawn)), -1, 0), 0.5)
    return medians, spread(diverged).mean(axis=-1)


def _scalar_names(first: Tree) -> list[str]:
    """Name the two scalars as in Python, but the keys of dicts like attributes: w, b[1], params[0]."""
    names = []
    for where, leaf in _tree.named_leaves(first, ""):
        name = where.replace("['", ".").replace("']", "").removeprefix(".")
        name = f"params{name}" if name[:1] in ("", "[") else name
        single = leaf[0].numel() == 1
        names += [name if single else f"{name}{list(index)}" for index in np.ndindex(*leaf.shape[1:])]
    return names


# The arithmetic.


def _evaluate(loss: Callable[[Tree], Tensor], first: Tree, chunk_size: int | None, points: Array) -> Array:
    """Return the losses [n] at points [n, 2] by one batched call; NaN where a point is not finite."""
    like, structure = _tree.flatten(first)

    def at(*leaves: Tensor) -> Tensor:
        value = loss(_tree.unflatten(structure, leaves))
        if not isinstance(value, Tensor):
            raise ValueError(f"loss must return a 0-d real tensor; got {type(value).__name__}")
        if value.shape != () or value.is_complex():
            got = f"shape {tuple(value.shape)}, {value.dtype}"
            raise ValueError(f"loss must return a 0-d real tensor; got {got}")
        return value

    finite = np.isfinite(points).all(axis=1)
    losses = np.full(len(points), np.nan)
    if finite.any():
        columns = torch.from_numpy(points[finite]).split([leaf[0].numel() for leaf in like], dim=1)
        leaves = [
            column.reshape(len(column), *leaf.shape[1:]).to(leaf)
            for column, leaf in zip(columns, like, strict=True)
        ]
        with torch.no_grad():
            losses[finite] = _array("loss", torch.func.vmap(at, chunk_size=chunk_size)(*leaves))
    return losses


def _view(points: Array, losses: Array, wanted: Array) -> Array:
    """Return the corners of a box round the wanted points and all that are no higher than these."""
    known = losses[wanted & np.isfinite(losses)]
    highest = known.max() if len(known) else np.inf
    inside = points[(wanted | (losses <= highest)) & np.isfinite(points).all(axis=1)]
    if len(inside) == 0:
        inside = np.zeros((1, 2))
    low, high = inside.min(axis=0), inside.max(axis=0)
    middle, half = (low + high) / 2, (high - low) / 2
    # An axis along which nothing moved gets the width of the other, or more if rounding swallows that.
    still = half <= 1e-9 * np.abs(middle)
    half[still] = np.maximum(half.max() or 1.0, 1e-3 * np.abs(middle))[still]
    return np.stack([middle - 1.15 * half, middle + 1.15 * half])


def _log_levels(heights: Array, minimum: float, count: int) -> Array:
    gaps = heights[np.isfinite(heights)] - minimum
    gaps = gaps[gaps > 0]
    if len(gaps) == 0:
        return gaps
    low, high = np.quantile(gaps, [0.01, 0.99])
    # Levels of an almost flat loss may round to the same number.
    return np.unique(minimum + np.geomspace(low if low < high else high / 2, high, count))


def _quantile(values: Array, q: float) -> Array:
    """Interpolate between sorted runs [N, T]; next to a diverged run that is infinite."""
    ordered = np.sort(np.where(np.isfinite(values), values, np.inf), axis=0)
    position = q * (len(ordered) - 1)
    below, above = ordered[math.floor(position)], ordered[math.ceil(position)]
    with np.errstate(invalid="ignore", over="ignore"):
        between = below + position % 1 * (above - below)
    return np.where(below == above, below, between)


def _top(runs: list[Array], log_y: bool) -> float:
    """Return the largest value to show: how far a diverging run is followed."""
    steady = [values[np.isfinite(values).all(axis=1)].ravel() for values in runs]
    known = np.concatenate([*steady, *(values[:, 0] for values in runs)])
    known = known[_in_view(known, _HUGE) & ((known > 0) | (not log_y))]
    if len(known) == 0:
        return _HUGE
    low, high = known.min(), known.max()
    return min(_HUGE, 1e3 * high if log_y else high + (high - low or abs(high) or 1.0))


def _span(known: Array, log: bool) -> tuple[float, float]:
    """Return the least and the largest value, apart from each other."""
    if len(known) == 0:
        return 1.0, 10.0
    low, high = float(known.min()), float(known.max())
    return low, high if low < high else (10 * low if log else low + (abs(low) or 1.0))


def _edges(centres: Array, log: bool) -> Array:
    """Return the n+1 edges of n cells, halfway between neighbours."""
    points = np.log(centres) if log else centres
    middles = (points[1:] + points[:-1]) / 2 if len(points) > 1 else points + 0.5
    edges = np.concatenate([[2 * points[0] - middles[0]], middles, [2 * points[-1] - middles[-1]]])
    edges = edges if len(points) > 1 else edges[:2]
    return np.exp(edges) if log else edges


def _in_view(values: Array, top: float) -> Array:
    return (np.abs(values) <= _HUGE) & (values <= top)


def _diverged(values: Array) -> Any:
    """Tell which of the runs [N, T] cannot be shown whole."""
    return ~_in_view(values, _HUGE).all(axis=1)


def _inside(points: Array, box: Array) -> Array:
    return ((points >= box[0]) & (points <= box[1])).all(axis=1)


def _crossing(inside: Array, outside: Array, box: Array) -> Array:
    """Return where the segment between two points meets the border, just inside it."""
    nearly = box + 0.015 * (box[::-1] - box)
    beyond = np.clip(outside, *nearly) != outside
    share = (np.clip(outside, *nearly) - inside)[beyond] / (outside - inside)[beyond]
    return inside + max(0.0, share.min()) * (outside - inside)


# What the legend tells.


def _annotated(name: str, notes: list[str]) -> str:
    return f"{name} ({', '.join(notes)})" if notes else name


def _not_finite(alive: Array, x: Array, xlabel: str) -> str:
    end = alive.argmin()
    return f"not finite {'at' if alive[end:].any() else 'from'} {xlabel} {x[end]:.12g}"


def _curve_notes(x: Array, values: Array, top: float, xlabel: str, log_y: bool) -> list[str]:
    notes, alive, diverged = [], np.isfinite(values), _diverged(values)
    if len(values) > 1:
        notes += [f"{diverged.sum()} of {len(values)} diverged"] if diverged.any() else []
    elif diverged[0]:
        end = _in_view(values[0], top).argmin()
        notes += [f"leaves the view at {xlabel} {x[end]:.12g}"] if alive[0, end] else []
        notes += [] if alive.all() else [_not_finite(alive[0], x, xlabel)]
    low = (values[alive] <= 0).sum()
    notes += [f"{low} of {values.size} values ≤ 0"] if log_y and low else []
    return notes


# The artists.


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise missing_extra("gdfunc.plot", "matplotlib", "plot") from error
    return Figure(figsize=(6, 4), layout="constrained").subplots()


def _draw_path(ax: Axes, points: Array, box: Array, name: str, i: int) -> tuple[Any, str]:
    from matplotlib.patheffects import Normal, Stroke

    color, dashes = _style(i)
    alive = np.isfinite(points).all(axis=1)
    inside = _inside(points, box)
    # A path that never comes into the view has nothing to be cut at.
    last = np.flatnonzero(inside)[-1] if inside.any() else len(points) - 1
    notes, crosses = [], []
    if away := (alive & ~inside)[: last + 1].sum():
        notes.append(f"{away} of {len(points)} points outside the view")
    if last + 1 < len(points) and alive[last + 1]:
        notes.append(f"leaves the view at step {last + 1}")
        crosses.append(_crossing(points[last], points[last + 1], box))
    if not alive.all():
        end = alive.argmin()
        notes.append(_not_finite(alive, np.arange(len(points)), "step"))
        crosses += [point for point in points[:end][-1:] if inside[end - 1]]
    label = _annotated(name, notes)
    (line,) = ax.plot(*points[: last + 2].T, marker=".", color=color, linestyle=dashes, label=label)
    line.set(linewidth=1.4, markersize=4, zorder=3)
    line.set_path_effects([Stroke(linewidth=2.6, foreground="white"), Normal()])
    marks: dict[str, Any] = {"linestyle": "", "markeredgecolor": color, "zorder": 4}
    ax.plot(*points[:1].T, "o", markersize=7, markerfacecolor="white", **marks)
    if inside[-1]:
        ax.plot(*points[-1:].T, "D", markersize=4, markerfacecolor=color, **marks)
    if crosses:
        ax.plot(*np.transpose(crosses), "x", markersize=8, markeredgewidth=2, **marks)
    return line, label


def _draw_marks(ax: Axes, stars: list[Array], ended: bool) -> list[tuple[Any, str]]:
    """Draw the minimizers; return the legend entries of all marks."""
    from matplotlib.lines import Line2D

    grey: dict[str, Any] = {"linestyle": "", "color": "0.35"}
    start = Line2D([], [], marker="o", markersize=7, markerfacecolor="white", **grey)
    end = Line2D([], [], marker="D", markersize=4, **grey)
    entries: list[tuple[Any, str]] = [(start, "start"), (end, "end")][: 1 + ended]
    if stars:
        (star,) = ax.plot(*np.concatenate(stars).T, "*", color=_YELLOW, markersize=12, zorder=2.5)
        star.set(linestyle="", markeredgecolor="black")
        entries.append((star, "minimizer"))
    return entries


def _draw_contours(ax: Axes, x: Array, y: Array, heights: Array, levels: Array) -> list[tuple[Any, str]]:
    """Draw the contours, lighter where the loss is higher; return the legend entry of what is blank."""
    from matplotlib import colormaps
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.patches import Patch

    defined = np.ma.masked_invalid(heights)
    if len(levels) >= 2:
        # Light greys, so that the paths stand out: only they have a colour.
        shades = ListedColormap(colormaps["Greys"](np.linspace(0.5, 0.0, len(levels) + 1)))
        norm = BoundaryNorm(levels, len(levels) + 1, extend="both")
        ax.contourf(x, y, defined, levels, cmap=shades, norm=norm, extend="both", zorder=0)
        ax.contour(x, y, defined, levels, colors="0.6", linewidths=0.4, linestyles="solid", zorder=1)
    if not np.ma.is_masked(defined):
        return []
    blank: dict[str, Any] = {"facecolor": "white", "edgecolor": "0.6", "hatch": "////"}
    ax.patch.set(**blank)
    return [(Patch(linewidth=0, **blank), "loss not finite")]


def _draw_runs(ax: Axes, x: Array, values: Array, edges: tuple[Array, Array], top: float, i: int) -> Any:
    """Draw a run, or the median of several and those that diverged; make room for what is to be seen."""
    from matplotlib.lines import Line2D

    color, dashes = _style(i)
    lost = values[_diverged(values)]
    middle = _quantile(values, 0.5) if len(values) > 1 else values[0]
    line = Line2D(x, middle, color=color, linestyle=dashes, linewidth=1.6, zorder=3)
    line.set_marker("o" if len(x) == 1 else "")
    ax.add_artist(line)  # unlike add_line, without making room for all of it
    if len(values) > 1 and len(lost):
        # One thin line for all of them: NaN parts the runs.
        parted = np.pad(lost, [(0, 0), (0, 1)], constant_values=np.nan).ravel()
        ax.add_artist(Line2D(np.tile(np.append(x, np.nan), len(lost)), parted, color=color, linewidth=0.6))
    ax.update_datalim(np.column_stack([x, x]), updatey=False)
    for shown in (middle, *edges, *lost):
        ax.update_datalim(np.column_stack([x, shown])[_in_view(shown, top)])
    if ax.get_yscale() == "log" and (middle <= 0).any():
        low, bottom = x[middle <= 0], ax.get_xaxis_transform()
        ax.plot(low, 0 * low + 0.012, "v", color=color, transform=bottom, markersize=3)
    return line


def _draw_ends(ax: Axes, x: Array, values: Array, top: float, color: Any) -> None:
    """Mark the last value in view of every run that diverges."""
    from matplotlib.lines import Line2D

    inside = _in_view(values, top)
    runs = np.flatnonzero(_diverged(values) & inside[:, 0])
    if len(runs):
        last = inside[runs].argmin(axis=1) - 1
        crosses = Line2D(x[last], values[runs, last], linestyle="", marker="x", color=color, zorder=4)
        crosses.set(markersize=7, markeredgewidth=1.8)
        ax.add_artist(crosses)


def _draw_band(ax: Axes, x: Array, lower: Array, upper: Array, color: Any) -> Any:
    """Fill between two quantiles without moving the limits."""
    from matplotlib.collections import PolyCollection

    edge = np.concatenate([np.column_stack([x, upper]), np.column_stack([x, lower])[::-1]])
    # A renderer fills no infinite polygon. A hundred heights of the axes up, the eye sees no difference.
    with np.errstate(over="ignore"):
        sky = (ax.transScale + ax.transLimits).inverted().transform((0.0, 100.0))[1]
    edge[:, 1] = np.minimum(edge[:, 1], np.nan_to_num(sky))
    band = PolyCollection([edge], facecolor=color, edgecolor="none", alpha=0.2, zorder=2)
    ax.add_collection(band, autolim=False)
    return band


def _draw_lost(ax: Axes, x: Array, y: Array, lost: Array, share: Array) -> list[tuple[Any, str]]:
    """Hatch the cells [Y, X] that are lost, and mark those of which some members are."""
    from matplotlib.patches import Patch

    entries: list[tuple[Any, str]] = []
    if lost.any():
        blank: dict[str, Any] = {"facecolor": "white", "edgecolor": "0.6", "hatch": "////"}
        ax.patch.set(**blank)
        label = f"{lost.sum()} of {lost.size} cells: diverged"
        entries.append((Patch(linewidth=0, **blank), label))
    some = (share > 0) & ~lost
    if some.any():
        rows, columns = np.nonzero(some)
        (mark,) = ax.plot(x[columns], y[rows], "x", color="black", markersize=3, linestyle="")
        entries.append((mark, f"{some.sum()} of {lost.size} cells: some of the runs diverged"))
    return entries


def _style(i: int) -> tuple[str, Any]:
    return _COLORS[i % len(_COLORS)], _DASHES[i % len(_DASHES)]


def _draw_legend(ax: Axes, entries: list[tuple[Any, str]]) -> None:
    """Put the legend below the axes, or inside them if the figure's layout makes no room below."""
    handles, labels = zip(*entries, strict=True)
    figure: Any = ax.get_figure()
    place: dict[str, Any] = {"loc": "best"}
    if figure.get_layout_engine() is not None:
        # Some 17 letters of this size fit an inch, and a handle takes as much as 6.
        room = max(20, int(17 * ax.bbox.width / figure.dpi))
        half = (len(labels) + 1) // 2
        width = sum(6 + max(map(len, column), default=0) for column in (labels[:half], labels[half:]))
        labels = tuple(textwrap.fill(label, room) for label in labels)
        # The padding clears the numbers and the name of the x axis.
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "borderaxespad": 4.5, "frameon": False}
        place["ncols"] = 2 if width <= room else 1
    ax.legend(handles, labels, fontsize="small", **place)
