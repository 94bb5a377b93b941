"""The loss of a model on a plane through its parameters, and how far the paths lie from that plane."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import _tree, random, tree
from .._data import as_data
from .._errors import check_int
from .._numerics import Scalar
from .._tree import Tree
from . import _axes, _contours, _moving, _plane, _points
from ._axes import Array, Axes
from ._contrast import FEW, path_colors
from ._points import Paths, check_paths, evaluate
from ._style import foreground, ink
from ._tracks import scaled

_AT_ONCE = 2**23  # numbers in the parameters and the data of all points of a chunk
_LARGE = 1e100  # a coordinate whose square is as good as infinite
_FLAT = 1e-9  # of the first direction: a second one that is rounding
_WIDTHS = (3, 2)  # of the plane, and of the losses on its right


class Plane(NamedTuple):
    """origin + a·first + b·second, of vectors [P], the names of a and b, and three points to mark."""

    origin: Array
    basis: Array  # [P, 2]
    names: tuple[str, str]
    corners: Array

    def coordinates(self, points: Array) -> Array:
        """Return (a, b) [n, 2] of the points of the plane nearest to n points."""
        with np.errstate(over="ignore", invalid="ignore"):
            return (points - self.origin) @ self.basis @ np.linalg.inv(self.basis.T @ self.basis)


def plot_landscape(
    loss_fn: Callable[[Tree, Tree], Tensor],
    paths: Sequence[Tree] | Mapping[str, Tree],
    data: Tree = None,
    *,
    directions: Literal["pca", "random"] | Sequence[Tree] = "pca",
    key: Tensor | None = None,
    ax: Axes | None = None,
    labels: Sequence[Any] | None = None,
    levels: Literal["log", "linear"] | int | Sequence[float] = "log",
    minimum: Scalar | None = None,
    limits: tuple[tuple[float, float], tuple[float, float]] | None = None,
    resolution: int = 51,
    chunk_size: int | None = None,
) -> Axes:
    """Draw the loss of many parameters on a plane, with paths projected on it and their true losses.

        L(a, b) = loss_fn(θ* + a·u + b·v, data),  θ* the end of the first path

    A path does not lie in the plane, so the loss that the plane shows under a point of it is not the
    point's. The second axes, on the right, draw both over the steps, and the legend tells their ratio.
    They are `ax.figure.axes[-1]`.

    Args:
        loss_fn: (params, data) -> 0-d real tensor; called under `torch.func.vmap`.
        paths: list or tuple of all paths, or a dict of label -> path. Each is a params tree with a leading
            axis of T+1 points, as `path` returns it.
        data: passed on to `loss_fn`; arrays become tensors.
        directions: "pca" for the two directions in which the points of the paths vary most, with their
            shares of the variance on the axes; "random" for two normal draws from `key`, of which every
            filter (a row of a leaf of two or more dimensions, or a whole smaller leaf) has the norm of
            θ*'s; a pair of params trees u and v; or three params trees, through which the plane runs.
        key: of the random directions, from `gd.random.key`.
        ax: where to draw; None for a new figure. The second axes take the right two fifths of its place.
        labels, levels, minimum: as in `plot_descent`.
        limits: ((low, high), (low, high)) for a and b. None shows the paths, but no points whose true loss
            is above the largest loss at a start; the three points; and of other directions −1 to 1.
        resolution: the grid has resolution² points.
        chunk_size: how many points to evaluate at once; None for as many as have 8 million parameters and
            numbers of data.

    Returns:
        The Axes of the plane.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        TypeError, ValueError: as in `plot_descent`, but for any number of scalars; or `directions` are none
            of the above, are parallel, or differ in structure from the points of the paths; or `key` is
            missing for "random", or the paths run along a line, which leaves "pca" no second direction.

    Example:
        >>> def loss_fn(params, data):
        ...     return ((params["w"] - data) ** 2).mean()
        >>> points = torch.tensor([[3.0, 2.0, 1.0], [2.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
        >>> ax = gd.plot.plot_landscape(loss_fn, [{"w": points}], torch.ones(3))
        >>> ax.get_xlabel(), ax.get_ylabel()
        ('PC 1 (75 %)', 'PC 2 (25 %)')

    References:
        Hao Li et al., Visualizing the Loss Landscape of Neural Nets, 2018 (PCA of the path, filter norms).
        Timur Garipov et al., Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs, 2018 (planes
        through three points).
    """
    given = check_paths(paths, labels)
    data = as_data(data, "data")
    wanted = _contours.check_levels(levels)
    floor = None if minimum is None else _axes.to_number("minimum", minimum)
    box = None if limits is None else _points.check_limits(limits)
    check_int("resolution", resolution, 2)

    start = given.start
    device = _tree.leaves(start)[0].device
    numbers = given.points[0].shape[1] + sum(leaf.numel() for leaf in _tree.tensors(data))
    chunk_size = chunk_size or max(1, _AT_ONCE // numbers)

    def at(point: Tensor) -> Tensor:
        return loss_fn(_tree.unravel(point, start), data)

    losses = partial(evaluate, at, device=device, chunk_size=chunk_size)
    true = [losses(points) for points in given.points]
    seen = _worth_seeing(given, true)
    plane = _plane_of(directions, given, seen, key)
    origin, basis = (torch.from_numpy(array).to(device) for array in (plane.origin, plane.basis))

    def on_plane(place: Tensor) -> Tensor:
        return at(origin + basis @ place)

    flat_losses = partial(evaluate, on_plane, device=device, chunk_size=chunk_size)
    tracks = [plane.coordinates(points) for points in given.points]
    if box is None:
        box = _view(plane, plane.coordinates(seen), directions)
    ax = _axes.axes_for(ax)
    ends = np.array([(losses[0], losses[-1]) for losses in true])
    colors = path_colors(ax, len(tracks), given.labelled, ends)
    side = _split(ax)
    entries = _plane.draw_plane(
        ax, flat_losses, tracks, given.names, given.labelled,
        stars=[], levels=wanted, floor=floor, box=box, resolution=resolution, colors=colors,
    )  # fmt: skip
    entries += _draw_corners(ax, plane.corners)
    entries += _draw_beside(ax, side, true, [flat_losses(track) for track in tracks], colors)
    ax.set(xlabel=plane.names[0], ylabel=plane.names[1])
    _axes.draw_legend(ax, entries)
    return ax


def _worth_seeing(given: Paths, true: list[Array]) -> Array:
    """Return the points [n, P] of all paths whose true loss is not above the largest loss at a start.

    Where these are fewer than a plane needs, return all that are finite.
    """
    points, losses = np.concatenate(given.points), np.concatenate(true)
    starts = np.concatenate([np.arange(len(track)) == 0 for track in given.points])
    seen = points[_plane.worth_seeing(points, losses, starts)]
    return _usual(seen) if len(seen) > 2 else _usual(points)


def _usual(points: Array) -> Array:
    """Return the points that are finite, and whose distances are."""
    return points[(np.abs(points) <= _LARGE).all(axis=1)]


def _plane_of(directions: Any, given: Paths, seen: Array, key: Tensor | None) -> Plane:
    ends = _usual(given.points[0])
    if not len(ends):
        raise ValueError(
            f"paths[0] has no point below {_LARGE:g} through which to lay a plane; leave that path out"
        )
    origin = ends[-1]
    nowhere = np.empty((0, 2))
    if isinstance(directions, str) and directions == "pca":
        basis, shares = _principal(seen, origin - given.points[0][0])
        return Plane(
            origin, basis, (f"PC 1 ({_percent(shares[0])})", f"PC 2 ({_percent(shares[1])})"), nowhere
        )
    if isinstance(directions, str) and directions == "random":
        if key is None:
            raise ValueError('directions="random" needs key=gd.random.key(seed)')
        basis = _random(origin, given.start, key)
        return _checked(Plane(origin, basis, ("random direction 1", "random direction 2"), nowhere))
    if not isinstance(directions, (list, tuple)) or len(directions) not in (2, 3):
        raise ValueError(
            'directions must be "pca", "random", a pair of params trees, or three of them as points; '
            f"got {directions!r:.80}"
        )
    trees = np.concatenate(_points.single_points("directions", directions, given.trees[0]))
    if len(trees) == 2:
        return _checked(Plane(origin, trees.T, ("direction 1", "direction 2"), nowhere))
    return _through(trees)


def _percent(share: float) -> str:
    return f"{100 * share:.{0 if share < 0.99 else 2}f} %"


def _principal(points: Array, way: Array) -> tuple[Array, Array]:
    """Return the two orthonormal directions [P, 2] of most variance, and the share of each direction."""
    if points.shape[1] < 2:
        raise ValueError("a plane needs two parameters or more, and params has one; use plot_descent")
    centered = points - points.mean(axis=0) if len(points) else points
    _, scales, rows = np.linalg.svd(centered, full_matrices=False)
    if len(scales) < 2 or not scales[1] > _FLAT * scales[0]:
        raise ValueError(
            "the points of the paths lie on a line, so there is no second principal direction; "
            'use directions="random", a pair of params trees or three points'
        )
    basis, sizes = rows[:2].T, scales / scales[0]
    # An eigenvector has no sign of its own. This sign lets the first path run to the right and upward.
    return basis * np.where(np.where(np.abs(way) <= _LARGE, way, 0.0) @ basis < 0, -1.0, 1.0), sizes**2 / (
        sizes**2
    ).sum()


def _random(origin: Array, start: Tree, key: Tensor) -> Array:
    """Return two random directions [P, 2] whose filters have the norms of the origin's."""
    center = _tree.unravel(torch.from_numpy(origin), _tree.map(lambda leaf: leaf.double().cpu(), start))

    def normalised(draw: Tensor, leaf: Tensor) -> Tensor:
        rows = (leaf.shape[0], -1) if leaf.ndim > 1 else (1, -1)
        norms = [x.reshape(rows).norm(dim=1, keepdim=True) for x in (leaf, draw)]
        return (draw.reshape(rows) * norms[0] / norms[1]).reshape(leaf.shape)

    draws = [_tree.map(normalised, tree.random_like(one, center), center) for one in random.split(key)]
    return np.stack([_tree.ravel(draw).numpy() for draw in draws], axis=1)


def _checked(plane: Plane) -> Plane:
    """Refuse directions that span no plane."""
    (uu, uv), (_, vv) = plane.basis.T @ plane.basis
    if not uu * vv - uv * uv > _FLAT * uu * vv:
        raise ValueError("the two directions are parallel or zero, so they span no plane")
    return plane


def _through(points: Array) -> Plane:
    """Return the plane through three points, with distances along the first two and at right angles."""
    first, second = points[1] - points[0], points[2] - points[0]
    length = np.linalg.norm(first)
    unit = first / (length or 1.0)
    rest = second - (second @ unit) * unit
    height = np.linalg.norm(rest)
    if not length > 0 or not height > _FLAT * np.linalg.norm(second):
        raise ValueError("the three points lie on a line, so no plane is theirs alone")
    basis = np.stack([unit, rest / height], axis=1)
    corners = np.array([[0.0, 0.0], [length, 0.0], [second @ unit, height]])
    return Plane(points[0], basis, ("distance along A → B", "distance from A → B"), corners)


def _view(plane: Plane, seen: Array, directions: Any) -> Array:
    free = len(plane.corners) == 0 and not (isinstance(directions, str) and directions == "pca")
    square = np.array([[-1.0, -1.0], [1.0, 1.0]]) if free else np.empty((0, 2))
    return _points.box_around(np.concatenate([seen, plane.corners, square]), 0.1)


def _split(ax: Axes) -> Axes:
    """Leave a part of the axes' place to second axes on the right, and return these."""
    figure: Any = ax.get_figure()
    place = ax.get_subplotspec()
    if place is not None:
        grid = place.subgridspec(1, 2, width_ratios=_WIDTHS)
        ax.set_subplotspec(grid[0])
        return figure.add_subplot(grid[1])
    x, y, width, height = ax.get_position().bounds
    share = _WIDTHS[0] / sum(_WIDTHS)
    ax.set_position((x, y, share * width, height))
    return figure.add_axes((x + (share + 0.1) * width, y, (0.9 - share) * width, height))


def _draw_corners(ax: Axes, corners: Array) -> list[tuple[Any, str]]:
    """Mark and name the three points of a plane."""
    if not len(corners):
        return []
    (marks,) = ax.plot(*corners.T, "s", color=foreground(ax), markersize=scaled(6), zorder=4, linestyle="")
    for name, corner in zip("ABC", corners, strict=True):
        ax.annotate(
            name, corner, (-12, -12), textcoords="offset points", weight="bold", color=foreground(ax)
        )
    return [(marks, "the three points of the plane")]


def _draw_beside(
    ax: Axes, side: Axes, true: list[Array], flat: list[Array], colors: list[Any]
) -> list[tuple[Any, str]]:
    """Draw the losses of the points and those of the plane below them over the steps."""
    from matplotlib.lines import Line2D

    width = scaled(0.9 if len(true) > FEW else 1.5)
    for own, shown, color in zip(true, flat, colors, strict=True):
        # The plane's losses are often close to the true ones: dark dashes on them can be seen.
        for values, tint, dashes in ((own, color, "-"), (shown, ink(ax, color), (0, (4, 2)))):
            height = np.where(np.abs(values) <= _axes.HUGE, values, np.nan)
            (line,) = side.plot(height, color=tint, linestyle=dashes, linewidth=width)
            _moving.grow(line, np.arange(len(height)))
    side.set(xlabel="step", ylabel="loss")
    values = np.concatenate([*true, *flat])
    values = values[np.abs(values) <= _axes.HUGE]
    if len(values) and values.min() > 0 and values.max() > 10 * values.min():
        side.set_yscale("log")
    key: dict[str, Any] = {"color": foreground(ax), "linewidth": scaled(1.5)}
    solid, dashed = Line2D([], [], **key), Line2D([], [], linestyle=(0, (4, 2)), **key)
    return [(solid, "true loss of the points"), (dashed, f"loss of the plane there: {_ratio(true, flat)}")]


def _ratio(true: list[Array], flat: list[Array]) -> str:
    """Say how the plane's losses compare with the true ones."""
    own, shown = np.concatenate(true), np.concatenate(flat)
    both = np.isfinite(own) & np.isfinite(shown)
    own, shown = own[both], shown[both]
    if not len(own):
        return "none is finite"
    if (own > 0).all() and (shown > 0).all():
        ratios = shown / own
        return f"{ratios.min():.3g}–{ratios.max():.3g} of it"
    return f"off by {np.abs(shown - own).max():.3g} at most"
