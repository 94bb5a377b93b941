"""Descent paths over a loss of one or two parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from .. import _tree
from .._errors import check_int
from .._numerics import Scalar
from .._tree import Tree
from . import _axes, _contours, _points
from ._axes import Axes
from ._one import draw_curve
from ._plane import draw_plane
from ._points import Paths, check_paths, evaluate


def plot_descent(
    loss: Callable[[Tree], Tensor],
    paths: Sequence[Tree] | Mapping[str, Tree],
    *,
    ax: Axes | None = None,
    labels: Sequence[Any] | None = None,
    levels: Literal["log", "linear"] | int | Sequence[float] = "log",
    minimum: Scalar | None = None,
    minimizers: Sequence[Tree] = (),
    limits: tuple[tuple[float, float], tuple[float, float]] | None = None,
    resolution: int = 200,
    chunk_size: int | None = None,
) -> Axes:
    """Draw paths of descent over the contours of a loss of two parameters, or on the curve of one.

        levels = minimum + geometric sequence

    The lowest level encloses a hundredth of the view and the highest leaves out a hundredth, so a
    narrow valley, a regression and an elevation map are all covered. Both axes have one scale, so that
    steps of gradient descent are perpendicular to the contours, unless one span of the view is three
    times the other or `ax` has an aspect of its own.

    Of one parameter the loss is a curve. The iterates lie on it, with tangents at some of the first.

    A path is drawn through all its points, up to the last one inside the view. A cross marks the place at
    which the path leaves the view for good or stops being finite, and the legend tells the step, counted
    in points of the path. Up to seven paths are named at their ends if the names are short, and are dashed
    if they are not. Points are marked on solid paths of fewer than 60. More than seven paths without labels
    have the colours of their final losses, bright for low ones, and a bar tells these.

    Args:
        loss: params -> 0-d real tensor, where params holds one or two scalars in all: a tensor [2],
            {"w": [1], "b": []}, …; called under `torch.func.vmap`, in the dtypes and on the device of
            the first path.
        paths: list or tuple of all paths, also around a single one, since a path may itself be a tuple,
            or a dict of label -> path. Each is a params tree with a leading axis of T+1 points, as `path`
            returns it.
        ax: where to draw; None for a new figure. The legend stands below the axes if the figure has a
            layout that makes room for it, such as "constrained", else inside.
        labels: one for each path, in their order.
        levels: of contours: "log" for 20 in a geometric sequence above the minimum, an int for so many of
            them, "linear" for about 20 round numbers, or the losses at which to draw them, increasing.
        minimum: the least value of the loss, where it is known; None takes the smallest finite value on
            the grid, the paths and the minimizers.
        minimizers: list or tuple of params trees, drawn as stars. Without them the lowest point of the
            grid is marked, unless it lies on the border.
        limits: ((low, high), (low, high)) for the two parameters, or for the one and the loss. None
            shows every start, every minimizer and every point whose loss is not above the largest loss at
            a start, or on a curve up to four times as high, so that a run is seen to diverge. Without
            minimizers the view extends to a minimum of the loss if there is one near it, half its width
            away at most.
        resolution: the grid has resolution² points, or a curve that many.
        chunk_size: how many points to evaluate at once; None for all.

    Returns:
        The Axes.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        TypeError: `paths` or `minimizers` is no list or tuple, or a path is not of floating point.
        ValueError: a path is empty, its points do not hold one or two scalars, trees or shapes differ,
            or `labels`, `levels`, `minimum`, `limits` or the value of `loss` is malformed.

    Example:
        >>> def loss(w):
        ...     return w[0] ** 2 + 10 * w[1] ** 2
        >>> def run(lr):
        ...     factors = 1 - lr * torch.tensor([2.0, 20.0])
        ...     return torch.tensor([4.0, 1.0]) * factors ** torch.arange(9)[:, None]
        >>> ax = gd.plot.plot_descent(loss, {"lr 0.05": run(0.05), "lr 0.11": run(0.11)})
        >>> [text.get_text() for text in ax.texts]  # at the ends
        ['lr 0.05', 'lr 0.11']
        >>> for entry in ax.get_legend().get_texts()[:2]:
        ...     print(entry.get_text())
        lr 0.11 (leaves the view at step 2)
        start

    References:
        Masataka Okabe and Kei Ito, Color Universal Design, 2008 (the colours).
    """
    given = check_paths(paths, labels)
    count = _count(given)
    stars = _points.single_points("minimizers", minimizers, given.trees[0])
    wanted = _contours.check_levels(levels)
    if count == 1 and levels != "log":
        raise ValueError("levels are of contours, and a loss of one scalar has none; leave levels out")
    floor = None if minimum is None else _axes.to_number("minimum", minimum)
    box = None if limits is None else _points.check_limits(limits)
    check_int("resolution", resolution, 2)
    ax = _axes.axes_for(ax)

    start = given.start
    device = _tree.leaves(start)[0].device

    def at(point: Tensor) -> Tensor:
        return loss(_tree.unravel(point, start))

    losses = partial(evaluate, at, device=device, chunk_size=chunk_size)
    view: dict[str, Any] = {"stars": stars, "floor": floor, "box": box, "resolution": resolution}
    with _told_apart(paths):
        if count == 1:
            slopes = partial(evaluate, _slope(at), device=device, chunk_size=chunk_size)
            entries = draw_curve(ax, losses, slopes, given.points, given.names, given.labelled, **view)
        else:
            view["levels"] = wanted
            entries = draw_plane(ax, losses, given.points, given.names, given.labelled, **view)
    xlabel, ylabel = [*_points.scalar_names(start), "loss"][:2]
    ax.set(xlabel=xlabel, ylabel=ylabel)
    _axes.draw_legend(ax, entries)
    return ax


def _count(given: Paths) -> int:
    """Return how many scalars a point has, and refuse more than two."""
    count = given.points[0].shape[1]
    if count not in (1, 2):
        raise ValueError(
            f"paths[0] must have one or two scalars in all at each point; got {count}, in "
            f"{_points.shapes(given.trees[0], 'paths[0]')}; plot_landscape draws paths of any number"
        )
    return count


def _slope(at: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def slope(point: Tensor) -> Tensor:
        value = at(point)
        # A loss that is an integer, or the same everywhere, has no gradient to ask for.
        return torch.func.grad(at)(point)[0] if value.is_floating_point() else torch.zeros(())

    return slope


@contextmanager
def _told_apart(paths: Any) -> Iterator[None]:
    """Add to errors of a loss how a dict of paths was understood, since a single path may be a dict too."""
    try:
        yield
    except Exception as error:
        if isinstance(paths, dict):
            error.add_note(f"paths was read as {len(paths)} paths with labels; for one path, pass [path]")
        raise
