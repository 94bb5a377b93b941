"""The same elements in other places, and tensors that are put together from parts of others."""

from itertools import accumulate
from math import prod
from typing import Any

import torch

from .._index import Point, Var, ravel, unravel
from .._kernel import counters_of
from .._tensor import Lazy, Shape, View, assembled, cast, constant, expand, reshape
from ._call import Call, lowers

RESHAPES = ("view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "view_copy", "flatten", "unflatten")


@lowers(*RESHAPES)
def _reshape(call: Call) -> Lazy:
    if call["self"].dtype != call.dtype:
        raise call.refuse("to another dtype")
    return reshape(call["self"], call.shape)


@lowers("expand", "broadcast_to")
def _expand(call: Call) -> Lazy:
    return expand(call["self"], call.shape)


@lowers("permute", "transpose", "t", "slice", "select", "unfold", "diagonal")
@lowers("split", "split_with_sizes", "unbind")
def _view(call: Call) -> Any:
    """Ask torch where the elements lie, in a tensor that is contiguous and has no values."""
    source = torch.empty(call["self"].shape, device="meta")
    _, *rest = call.node.args
    parts = call.node.target(source, *rest, **call.node.kwargs)  # type: ignore[operator]
    if isinstance(parts, torch.Tensor):
        return _strided(call["self"], parts)
    return [_strided(call["self"], part) for part in parts]


def _strided(tensor: Lazy, view: torch.Tensor) -> Lazy:
    """Show the elements of a tensor that a view of its twin shows."""
    axes = [Var(f"i{at}", extent) for at, extent in enumerate(view.shape)]
    place = ravel(counters_of(axes), view.stride()) + int(view.storage_offset())
    indices = unravel(place, tensor.shape)

    def remap(point: Point) -> Point:
        return tuple(index.where(dict(zip(axes, point, strict=True))) for index in indices)

    return View(tensor, view.shape, remap)


@lowers("flip")
def _flip(call: Call) -> Lazy:
    tensor = call["self"]
    dims = {dim % len(tensor.shape) for dim in call["dims"]}

    def remap(point: Point) -> Point:
        pairs = enumerate(zip(point, tensor.shape, strict=True))
        return tuple(index * -1 + (extent - 1) if dim in dims else index for dim, (index, extent) in pairs)

    return View(tensor, call.shape, remap)


@lowers("repeat")
def _repeat(call: Call) -> Lazy:
    tensor = expand(call["self"], (1,) * (len(call.shape) - len(call["self"].shape)) + call["self"].shape)
    if not prod(call.shape):
        return constant(0, call.shape, call.dtype)

    def remap(point: Point) -> Point:
        return tuple(index.split(extent)[1] for index, extent in zip(point, tensor.shape, strict=True))

    return View(tensor, call.shape, remap)


# Put together from parts.


def _with_extent(shape: Shape, dim: int, extent: int) -> Shape:
    return (*shape[:dim], extent, *shape[dim + 1 :])


@lowers("cat")
def _cat(call: Call) -> Lazy:
    tensors = [tensor for tensor in call["tensors"] if tensor.shape != (0,) or call.shape == (0,)]
    dim = call.axis(shape=call.shape)
    starts = accumulate((tensor.shape[dim] for tensor in tensors), initial=0)
    parts = [
        (dim, start, 1, cast(tensor, call.dtype)) for start, tensor in zip(starts, tensors, strict=False)
    ]
    return assembled(call.block, call.shape, parts)


@lowers("slice_scatter")
def _slice_scatter(call: Call) -> Lazy:
    dim, start = call.axis(), call["start"] or 0
    extent = call.shape[dim]
    start = min(max(start + extent if start < 0 else start, 0), extent)
    part = dim, start, call["step"], cast(call["src"], call.dtype)
    return assembled(call.block, call.shape, [part], call["self"])


@lowers("select_scatter")
def _select_scatter(call: Call) -> Lazy:
    dim = call.axis()
    row = reshape(cast(call["src"], call.dtype), _with_extent(call.shape, dim, 1))
    return assembled(call.block, call.shape, [(dim, call["index"] % call.shape[dim], 1, row)], call["self"])


@lowers("constant_pad_nd")
def _pad(call: Call) -> Lazy:
    tensor, pads = call["self"], call["pad"]
    for at in range(len(pads) // 2):
        dim, before, after = len(tensor.shape) - 1 - at, pads[2 * at], pads[2 * at + 1]
        extent = tensor.shape[dim] + min(before, 0) + min(after, 0)
        tensor = _cut(tensor, dim, max(-before, 0), extent)
        if max(before, after) > 0:
            shape = _with_extent(tensor.shape, dim, max(before, 0) + extent + max(after, 0))
            base = constant(call["value"], shape, call.dtype)
            tensor = assembled(call.block, shape, [(dim, max(before, 0), 1, tensor)], base)
    return tensor


def _cut(tensor: Lazy, dim: int, start: int, extent: int) -> View:
    """Take some of the elements along an axis."""
    shape = _with_extent(tensor.shape, dim, extent)
    return View(tensor, shape, lambda point: (*point[:dim], point[dim] + start, *point[dim + 1 :]))
