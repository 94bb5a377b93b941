"""The loss of every sample over one parameter, and where each of them pulls it."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _tree
from .._errors import check_int
from .._gradients import per_sample_grad
from .._inputs import check_samples
from .._tree import Tree
from . import _axes, _points
from ._axes import Array, Axes
from ._names import size_of, text_sizes
from ._style import background, faint, foreground, halo, line_style
from ._tracks import scaled

_REACH = 0.03  # of half a tangent, in widths of the view
_AT_ONCE = 2**20  # losses and gradients
_WIDER = 2.0 ** np.arange(6)  # tried half widths of the view, until the mean has its minimum inside


def plot_samples(
    loss_fn: Callable[[Tree, Tree], Tensor],
    params: Tree,
    data: Tree,
    at: Sequence[float] | None = None,
    *,
    ax: Axes | None = None,
    limits: tuple[tuple[float, float], tuple[float, float]] | None = None,
    resolution: int = 200,
    chunk_size: int | None = None,
) -> Axes:
    """Draw the loss of every sample over the one parameter, their mean, and how many pull the wrong way.

        gᵢ = dL(w, {sample i})/dw,  wrong: gᵢ·ḡ < 0

    A step of gradient descent on sample i alone moves w by −lr·gᵢ. At each place of `at`, tangents show
    all gᵢ, the arrow shows the way of the mean gradient, and the text counts the samples that pull against
    it, which are few far from the minimum and about half of all at the minimum. It also counts those whose
    tangents are above the view. The ticks below are the lowest points of the single samples.

    Args:
        loss_fn: (params, batch) -> 0-d real tensor, the mean over the batch, as for `per_sample_grad`,
            which computes all numbers of the picture.
        params: tree of one scalar in all: the place to look at, and the dtype and the device of all places.
        data: tree of leaves [B, ...].
        at: the values of the parameter at which to draw the pulls; None for the one in `params`.
        ax: where to draw; None for a new figure.
        limits: ((low, high), (low, high)) for the parameter and the loss. None shows all of `at` and the
            minimum of the mean if it is near them, up to the top of the mean.
        resolution: how many points each curve has, besides those of `at`.
        chunk_size: at how many points to evaluate all samples at once; None for as many as make a million
            losses.

    Returns:
        The Axes.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        TypeError, ValueError: as in `per_sample_grad`, or `params` does not hold one scalar, or `at`,
            `limits` or `resolution` is malformed.

    Example:
        >>> def loss_fn(w, batch):
        ...     x, y = batch
        ...     return 0.5 * ((w * x - y) ** 2).mean()
        >>> x, y = torch.tensor([1.0, -1.0, 2.0, 0.5]), torch.tensor([5.5, -4.0, 10.2, 3.0])
        >>> ax = gd.plot.plot_samples(loss_fn, torch.tensor(9.0), (x, y), at=[9.0, 5.5])
        >>> for text in filter(None, [text.get_text() for text in ax.texts]):
        ...     print(text)
        params = 9: 0 % (0 of 4) pull the wrong way (1 above)
        params = 5.5: 25 % (1 of 4) pull the wrong way
    """
    params = _tree.as_tensors(params)
    _, data, size = check_samples(params, data)
    if _points.count_scalars(params) != 1:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in _tree.named_leaves(params, "params"))
        raise ValueError(f"params must have one scalar in all; got {shapes}")
    places = _axes.to_array("at", _tree.ravel(params) if at is None else at)
    if at is None and not np.isfinite(places).all():
        raise ValueError(f"params must be finite; got {places[0]}; give at=, the places to look at")
    if places.ndim != 1 or not len(places) or not np.isfinite(places).all():
        raise ValueError(f"at must be one or more finite numbers; got {at!r}")
    box = None if limits is None else _points.check_limits(limits)
    check_int("resolution", resolution, 2)
    ax = _axes.axes_for(ax)

    pulls = partial(_pulls, loss_fn, params, data, chunk_size or max(1, _AT_ONCE // size))
    side = _side(pulls, places) if box is None else box[:, 0]
    x = np.unique(np.concatenate([np.linspace(side[0], side[1], resolution), places]))
    grads, losses = pulls(x)
    mean = losses.mean(axis=1)
    box = _view(side, losses, mean) if box is None else box
    ax.set(xlim=box[:, 0], ylim=box[:, 1])
    name = _points.scalar_names(params)[0]
    entries = _draw_curves(ax, x, losses, mean)
    chosen = [int(np.flatnonzero(x == place)[0]) for place in places]
    entries += _draw_pulls(ax, x[chosen], losses[chosen], grads[chosen], box)
    above = np.isfinite(losses) & (losses > box[1, 1])
    lines = 0
    for i in chosen:
        lines += _draw_share(ax, f"{name} = {x[i]:.4g}", x[i], mean[i], grads[i], above[i], lines)
    ax.set(xlim=box[:, 0], ylim=box[:, 1], xlabel=name, ylabel="loss")
    _axes.draw_legend(ax, entries)
    return ax


def _pulls(
    loss_fn: Callable[[Tree, Tree], Tensor], params: Tree, data: Tree, chunk_size: int, x: Array
) -> tuple[Array, Array]:
    """Return the gradients and the losses [n, B] of all samples at n places."""
    grad = per_sample_grad(loss_fn)

    def at(place: Tensor) -> tuple[Tensor, Tensor]:
        grads, losses = grad(_tree.unravel(place[None], params), data)
        return _tree.leaves(grads)[0].flatten(), losses

    places = torch.from_numpy(x).to(_tree.leaves(params)[0].device)
    grads, losses = torch.func.vmap(at, chunk_size=chunk_size)(places)
    return _axes.to_array("grads", grads), _axes.to_array("loss", losses)


def _side(pulls: Callable[[Array], tuple[Array, Array]], places: Array) -> Array:
    """Return the ends of a view of all places and, if it is near, of the minimum of the mean."""
    low, high = places.min(), places.max()
    half = (high - low) / 2 or max(1.0, abs(low) / 2)
    middle = (low + high) / 2
    for width in half * _WIDER:
        x = np.linspace(middle - width, middle + width, 101)
        mean = pulls(x)[1].mean(axis=1)
        lowest = np.where(np.isfinite(mean), mean, np.inf).argmin()
        if 0 < lowest < 100:
            # The valley is seen from both sides.
            reach = 1.2 * (np.abs(places - x[lowest]).max() or half)
            return np.array([x[lowest] - reach, x[lowest] + reach])
    return np.array([middle - 1.5 * half, middle + 1.5 * half])


def _view(side: Array, losses: Array, mean: Array) -> Array:
    """Return a view as high as the mean."""
    finite = losses[np.isfinite(losses)]
    # One infinite sample makes the mean infinite everywhere, and the others can be seen all the same.
    tops = mean[np.isfinite(mean)] if np.isfinite(mean).any() else finite
    if not len(tops):
        return np.column_stack([side, [0.0, 1.0]])
    top, low = tops.max(), min(tops.min(), finite.min())
    room = 0.06 * (top - low) or 0.1 * abs(top) or 1.0
    # Half a dozen lines of text stand above the mean.
    return np.column_stack([side, [low - room, top + 3 * room]])


def _draw_curves(ax: Axes, x: Array, losses: Array, mean: Array) -> list[tuple[Any, str]]:
    from matplotlib.collections import LineCollection

    size = losses.shape[1]
    curves = [np.column_stack([x, np.where(np.isfinite(curve), curve, np.nan)]) for curve in losses.T]
    thin = LineCollection(curves, colors=[faint(ax, 0.4)], linewidths=scaled(0.7), zorder=1)
    thin.set_rasterized(size > 200)
    ax.add_collection(thin, autolim=False)
    color = line_style(0, ax)[0]
    (thick,) = ax.plot(x, np.where(np.isfinite(mean), mean, np.nan), color=color, zorder=2)
    thick.set_linewidth(scaled(3))
    lowest = np.where(np.isfinite(losses), losses, np.inf).argmin(axis=0)
    # A lowest point at the border of the view is not a minimum.
    inner = x[lowest[(lowest > 0) & (lowest < len(x) - 1)]]
    (ticks,) = ax.plot(inner, np.full(len(inner), 0.025), "|", transform=ax.get_xaxis_transform(), zorder=3)
    ticks.set(color=foreground(ax), markersize=10, linestyle="")
    return [
        (thin, f"each of {size} samples"),
        (thick, "their mean"),
        (ticks, f"lowest points of samples, {len(inner)} in view"),
    ]


def _draw_pulls(ax: Axes, x: Array, losses: Array, grads: Array, box: Array) -> list[tuple[Any, str]]:
    """Draw a tangent to every sample's loss at every place, and return their legend entries."""
    from matplotlib.collections import LineCollection

    spans = box[1] - box[0]
    with np.errstate(over="ignore", invalid="ignore"):
        reach = _REACH * spans[0] / np.hypot(1.0, grads * spans[0] / spans[1])
        steps = np.stack([reach, grads * reach], axis=-1)
    points = np.stack([np.broadcast_to(x[:, None], losses.shape), losses], axis=-1)
    ends = np.stack([points - steps, points + steps], axis=-2)
    wrong = np.sign(grads) * np.array([[np.sign(_slope(row))] for row in grads]) < 0
    looks = [
        (~wrong, foreground(ax), scaled(0.8), "-", "pulls as the mean does"),
        (wrong, line_style(1, ax)[0], scaled(1.4), (0, (3, 1)), "pulls the wrong way"),
    ]
    entries = []
    for mask, color, width, dashes, label in looks:
        segments = ends[mask & np.isfinite(ends).all(axis=(-1, -2))]
        tangents = LineCollection(
            list(segments), colors=[color], linewidths=width, linestyles=[dashes], zorder=3
        )
        ax.add_collection(tangents, autolim=False)
        entries.append((tangents, label))
    return entries


def _slope(grads: Array) -> float:
    """Return the mean of the finite gradients."""
    finite = grads[np.isfinite(grads)]
    return float(finite.mean()) if len(finite) else 0.0


def _draw_share(ax: Axes, place: str, x: float, mean: float, grads: Array, above: Array, lines: int) -> int:
    """Mark a place, the way of the mean and how many pull against it. Return how many lines that takes."""
    ax.axvline(x, color=faint(ax, 0.5), linewidth=0.8, linestyle=":", zorder=0.5)
    (low, high), size = ax.get_xlim(), len(grads)
    finite = grads[np.isfinite(grads)]
    slope = _slope(grads)
    wrong = int((np.sign(finite) * np.sign(slope) < 0).sum())
    said = f"{place}: {100 * wrong / size:.0f} % ({wrong} of {size}) pull the wrong way"
    if slope == 0:
        up, down = int((finite < 0).sum()), int((finite > 0).sum())
        said = f"{place}: {up} of {size} pull up, {down} down"
    counts = {"above": int(above.sum()), "not finite": size - len(finite)}
    notes = [f"{n} {what}" for what, n in counts.items() if n]
    said = _axes.with_notes(said, notes)
    # The text stands on the right of the line if there is room, else on its left, but within the axes.
    room, (width, height) = size_of(ax)[0], text_sizes([said])[0]
    said = textwrap.fill(said, max(20, int(len(said) * (room - 8) / width)))
    width = text_sizes(said.split("\n"))[:, 0].max() + 4
    spot = (x - low) / (high - low) * room
    begin = spot + 4 if spot + width < room else spot - width
    begin = min(max(begin, 4.0), max(4.0, room - width))
    text = ax.annotate(
        said,
        (x, 1.0),
        (begin - spot, -0.5 * height - 1.2 * height * lines),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        va="top",
        fontsize="small",
        color=foreground(ax),
        zorder=6,
    )
    text.set_path_effects(halo(background(ax), 3))
    if slope and np.isfinite(mean):
        # The head is at the end of the text, which is empty and tells the distance.
        arrow = {"arrowstyle": "<|-", "color": line_style(0, ax)[0], "linewidth": scaled(2)}
        way = (-34 * float(np.sign(slope)), 0)
        ax.annotate("", (x, mean), way, textcoords="offset points", arrowprops=arrow, zorder=5)
    return 1 + said.count("\n")
