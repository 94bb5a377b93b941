"""Elements that an index picks, and places where an index puts them."""

from collections.abc import Sequence
from math import prod

import torch

from .._index import Index, Point
from .._kernel import Kernel
from .._statement import C_TYPES
from .._tensor import Formula, Lazy, Shape, View, Where, cast, constant, expand, reshape, scattered
from ._call import Call, lowers


def _picks(
    call: Call, indices: Sequence[Lazy | None], extents: Shape, wraps: bool = False
) -> tuple[Shape, int, Where]:
    """The shape that indices have together, where it starts, and the function to the point picked."""
    used = {dim: index for dim, index in enumerate(indices) if index is not None}
    if any(index.dtype not in (torch.int64, torch.int32) for index in used.values()):
        raise call.refuse("by a mask")
    shape = tuple(torch.broadcast_shapes(*[index.shape for index in used.values()]))
    if 0 not in shape and any(not extents[dim] for dim in used):
        raise call.refuse("of an empty axis")
    start = min(used) if max(used) - min(used) < len(used) else 0  # where they stand side by side
    end = start + len(shape)

    def where(kernel: Kernel, point: Point) -> Point:
        rest = iter((*point[:start], *point[end:]))
        picked = []
        for dim, extent in enumerate(extents):
            if dim in used:
                value = expand(cast(used[dim], torch.int64), shape).at(kernel, point[start:end])
                picked.append(kernel.checked(value, extent, wraps))
            else:
                picked.append(next(rest))
        return tuple(picked)

    return shape, start, where


def _picked(call: Call, source: Lazy, where: Where) -> Lazy:
    return Formula(call.shape, call.dtype, lambda kernel, point: source.at(kernel, where(kernel, point)), 3)


@lowers("index")
def _index(call: Call) -> Lazy:
    *_, where = _picks(call, call["indices"], call["self"].shape, wraps=True)
    return _picked(call, call["self"], where)


@lowers("embedding")
def _embedding(call: Call) -> Lazy:
    *_, where = _picks(call, [call["indices"]], call["weight"].shape)
    return _picked(call, call["weight"], where)


def _rows(call: Call) -> Where:
    """The function to the row of `self` that an index of rows picks."""
    tensor = call["self"]
    if not tensor.shape:
        raise call.refuse("of a 0-d tensor")
    index = reshape(call["index"], (prod(call["index"].shape),))
    *_, where = _picks(call, [*[None] * call.axis(), index], tensor.shape)
    return where


@lowers("index_select")
def _index_select(call: Call) -> Lazy:
    return _picked(call, call["self"], _rows(call))


@lowers("index_add")
def _index_add(call: Call) -> Lazy:
    if call["alpha"] != 1 or call.dtype is torch.bool:
        raise call.refuse("with alpha, or of bool")
    return scattered(call.block, call["self"], call["source"], _rows(call), True)


@lowers("index_put", "_unsafe_index_put", "_index_put_impl")
def _index_put(call: Call) -> Lazy:
    tensor, adds = call["self"], bool(call["accumulate"])
    if adds and call.dtype is torch.bool:
        raise call.refuse("of bool")
    shape, start, where = _picks(call, call["indices"], tensor.shape, wraps=True)
    used = {dim for dim, index in enumerate(call["indices"]) if index is not None}
    rest = [extent for dim, extent in enumerate(tensor.shape) if dim not in used]
    full = (*rest[:start], *shape, *rest[start:])
    return scattered(call.block, tensor, call.tensor(call["values"], shape=full), where, adds)


def _along(call: Call) -> Where:
    """The point with its index of one axis replaced by what `index` holds there."""
    tensor, index, dim = call["self"], call["index"], call.axis()
    if not tensor.shape:
        raise call.refuse("of a 0-d tensor")
    if index.dtype not in (torch.int64, torch.int32) or (0 not in index.shape and not tensor.shape[dim]):
        raise call.refuse()

    def where(kernel: Kernel, point: Point) -> Point:
        value = cast(index, torch.int64).at(kernel, point)
        return (*point[:dim], kernel.checked(value, tensor.shape[dim], False), *point[dim + 1 :])

    return where


@lowers("gather")
def _gather(call: Call) -> Lazy:
    return _picked(call, call["self"], _along(call))


@lowers("scatter", "scatter_add")
def _scatter(call: Call) -> Lazy:
    tensor, index, where = call["self"], call["index"], _along(call)
    dim, adds = call.axis(), call.name == "scatter_add"
    if call.arguments.get("reduce") is not None or (adds and call.dtype is torch.bool):
        raise call.refuse("with reduce, or of bool")
    source = call.arguments.get("src", call.arguments.get("value"))
    if isinstance(source, Lazy):
        source = View(source, index.shape, lambda point: point)
    else:
        source = constant(source, index.shape, call.dtype)
    if adds or index.shape != (*tensor.shape[:dim], 1, *tensor.shape[dim + 1 :]):
        return scattered(call.block, tensor, source, where, adds)

    def at(kernel: Kernel, point: Point) -> str:
        """With one index a row, each element knows whether it is meant."""
        row = (*point[:dim], Index(), *point[dim + 1 :])
        (picked, operands), (here, names) = map(kernel.place, (where(kernel, row)[dim], point[dim]))
        new, old = source.at(kernel, row), tensor.at(kernel, point)
        choice = f"{picked} == {here} ? {new} : {old}"
        return kernel.let(C_TYPES[call.dtype], choice, [*operands, *names, new, old])

    return Formula(call.shape, call.dtype, at, 2 + tensor.cost)
