"""Descent paths over the contours of a loss of two parameters."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _tree
from .._errors import check_int
from .._inputs import kind
from .._numerics import Scalar
from .._tree import Tree
from . import _axes
from ._axes import Array, Axes

_YELLOW = "#F0E442"


def path(params: Tree, final: Tree) -> Tree:
    """Join the recorded and the final parameters of a run to its path.

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
    for (name, steps), end in zip(_tree.named_leaves(params, ""), ends, strict=True):
        if steps.ndim == 0 or steps.shape[1:] != end.shape:
            raise ValueError(
                f"params{name} has shape {tuple(steps.shape)} and final{name} {tuple(end.shape)}; "
                "params must have one axis more, of steps, in front"
            )
    return _tree.map(lambda steps, end: torch.cat([steps, end[None]]), params, final)


def plot_descent(
    loss: Callable[[Tree], Tensor],
    paths: Sequence[Tree],
    *,
    ax: Axes | None = None,
    labels: Sequence[Any] | None = None,
    levels: int | Sequence[float] = 20,
    minimum: Scalar | None = None,
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

    A path is drawn through all its points, up to the last one inside the view. A cross marks the place at
    which the path leaves the view for good or stops being finite, and the legend entry tells the step,
    counted in points of the path.

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
    trees = [_tree.as_tensors(tree) for tree in _axes.check_list("paths", paths)]
    names = _axes.check_labels(labels, len(trees), "paths")
    tracks = [_points(f"paths[{i}]", tree, trees[0]) for i, tree in enumerate(trees)]
    ends = [_tree.as_tensors(tree) for tree in _axes.check_list("minimizers", minimizers)]
    ends = [_tree.map(lambda leaf: leaf[None], tree) for tree in ends]
    stars = [_points(f"minimizers[{i}]", tree, trees[0]) for i, tree in enumerate(ends)]
    count = check_int("levels", levels, 2) if isinstance(levels, int) else 0
    shown = np.empty(0) if isinstance(levels, int) else _axes.to_increasing("levels", levels)
    floor = None if minimum is None else _axes.to_number("minimum", minimum)
    box = None if limits is None else _box(limits)
    check_int("resolution", resolution, 2)
    ax = _axes.axes_for(ax)

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
    _axes.draw_legend(ax, entries)
    return ax


def _box(limits: Any) -> Array:
    """Return the lower and the upper corner."""
    pairs = _axes.to_array("limits", limits)
    if pairs.shape != (2, 2) or not np.isfinite(pairs).all() or not (pairs[:, 0] < pairs[:, 1]).all():
        raise ValueError(f"limits must be ((low, high), (low, high)) with low < high; got {limits!r}")
    return pairs.T


def _points(name: str, tree: Tree, first: Tree) -> Array:
    """Return the points [T+1, 2] of a path, with columns in the order of the first path's leaves."""
    leaves = _tree.check_structure(tree, first, name, "paths[0]")
    named = _tree.named_leaves(tree, name)
    for where, leaf in named:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            raise TypeError(f"{where} must be a floating-point tensor or array; got {kind(leaf)}")
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
    return np.concatenate([_axes.to_array(name, leaf).reshape(len(leaf), -1) for leaf in leaves], axis=1)


def _scalar_names(first: Tree) -> list[str]:
    """Name the two scalars as in Python, but the keys of dicts like attributes: w, b[1], params[0]."""
    names = []
    for where, leaf in _tree.named_leaves(first, ""):
        name = where.replace("['", ".").replace("']", "").removeprefix(".")
        name = f"params{name}" if name[:1] in ("", "[") else name
        single = leaf[0].numel() == 1
        names += [name if single else f"{name}{list(index)}" for index in np.ndindex(*leaf.shape[1:])]
    return names


def _evaluate(loss: Callable[[Tree], Tensor], first: Tree, chunk_size: int | None, points: Array) -> Array:
    """Return the losses [n] at points [n, 2] by one batched call; NaN where a point is not finite."""
    start = _tree.map(lambda leaf: leaf[0], first)

    def at(point: Tensor) -> Tensor:
        value = loss(_tree.unravel(point, start))
        is_tensor = isinstance(value, Tensor)
        if not is_tensor or value.shape != () or value.is_complex():
            got = f"shape {tuple(value.shape)}, {value.dtype}" if is_tensor else type(value).__name__
            raise ValueError(f"loss must return a 0-d real tensor; got {got}")
        return value

    finite = np.isfinite(points).all(axis=1)
    losses = np.full(len(points), np.nan)
    if finite.any():
        places = torch.from_numpy(points[finite]).to(_tree.leaves(first)[0].device)
        with torch.no_grad():
            losses[finite] = _axes.to_array("loss", torch.func.vmap(at, chunk_size=chunk_size)(places))
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


def _inside(points: Array, box: Array) -> Array:
    return ((points >= box[0]) & (points <= box[1])).all(axis=1)


def _crossing(inside: Array, outside: Array, box: Array) -> Array:
    """Return where the segment between two points meets the border, just inside it."""
    nearly = box + 0.015 * (box[::-1] - box)
    beyond = np.clip(outside, *nearly) != outside
    share = (np.clip(outside, *nearly) - inside)[beyond] / (outside - inside)[beyond]
    return inside + max(0.0, share.min()) * (outside - inside)


def _draw_path(ax: Axes, points: Array, box: Array, name: str, i: int) -> tuple[Any, str]:
    from matplotlib.patheffects import Normal, Stroke

    color, dashes = _axes.line_style(i)
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
        notes.append(_axes.not_finite_note(alive, np.arange(len(points)), "step"))
        crosses += [point for point in points[:end][-1:] if inside[end - 1]]
    label = _axes.with_notes(name, notes)
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
    """Draw the minimizers, and return the legend entries of all marks."""
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
    """Draw the contours, lighter where the loss is higher, and return the entry of the blank area."""
    from matplotlib import colormaps
    from matplotlib.colors import BoundaryNorm, ListedColormap

    defined = np.ma.masked_invalid(heights)
    if len(levels) >= 2:
        # Light greys, so that the paths stand out: only they have a colour.
        shades = ListedColormap(colormaps["Greys"](np.linspace(0.5, 0.0, len(levels) + 1)))
        norm = BoundaryNorm(levels, len(levels) + 1, extend="both")
        ax.contourf(x, y, defined, levels, cmap=shades, norm=norm, extend="both", zorder=0)
        ax.contour(x, y, defined, levels, colors="0.6", linewidths=0.4, linestyles="solid", zorder=1)
    return [_axes.hatch_background(ax, "loss not finite")] if np.ma.is_masked(defined) else []
