"""Elements that an index picks, and places where an index puts them."""

import torch

from .._index import Index, Point
from .._kernel import Kernel
from .._statement import VALUE_TYPES
from .._tensor import Formula, Lazy, Shape, View, Where, cast, constant, expand, scattered
from ._call import Call, lowers


def _picks(call: Call) -> tuple[Shape, Where]:
    """Return the shape of the elements that indices pick, and the function to the point of each."""
    extents = call["self"].shape
    used = {dim: index for dim, index in enumerate(call["indices"]) if index is not None}
    if any(index.dtype not in (torch.int64, torch.int32) for index in used.values()):
        raise call.refuse("by a mask")
    shape = tuple(torch.broadcast_shapes(*[index.shape for index in used.values()]))
    if 0 not in shape and any(not extents[dim] for dim in used):
        raise call.refuse("of an empty axis")
    start = min(used) if max(used) - min(used) < len(used) else 0  # where they stand side by side
    end = start + len(shape)
    rest = [extent for dim, extent in enumerate(extents) if dim not in used]

    def where(kernel: Kernel, point: Point) -> Point:
        others = iter((*point[:start], *point[end:]))
        picked = []
        for dim, extent in enumerate(extents):
            if dim in used:
                value = expand(cast(used[dim], torch.int64), shape).at(kernel, point[start:end])
                picked.append(kernel.checked(value, extent, wraps=True))
            else:
                picked.append(next(others))
        return tuple(picked)

    return (*rest[:start], *shape, *rest[start:]), where


def _along(call: Call) -> tuple[Shape, Where]:
    """Return the shape of `index`, and the function that puts its values into points, along one axis."""
    tensor, index, dim = call["self"], call["index"], call.axis()
    extent = tensor.shape[dim] if tensor.shape else 1
    if index.dtype not in (torch.int64, torch.int32) or (0 not in index.shape and not extent):
        raise call.refuse()

    def where(kernel: Kernel, point: Point) -> Point:
        picked = kernel.checked(cast(index, torch.int64).at(kernel, point), extent, wraps=False)
        return (*point[:dim], picked, *point[dim + 1 :])[: len(tensor.shape)]

    return index.shape, where


@lowers("index", "gather")
def _pick(call: Call) -> Lazy:
    source, (_, where) = call["self"], _picks(call) if call.name == "index" else _along(call)
    return Formula(call.shape, call.dtype, lambda kernel, point: source.at(kernel, where(kernel, point)), 3)


@lowers("index_put", "_unsafe_index_put", "_index_put_impl")
def _index_put(call: Call) -> Lazy:
    tensor, adds = call["self"], bool(call["accumulate"])
    if adds and call.dtype is torch.bool:
        raise call.refuse("of bool")
    shape, where = _picks(call)
    return scattered(call.block, tensor, call.tensor(call["values"], shape=shape), where, adds)


@lowers("scatter", "scatter_add")
def _scatter(call: Call) -> Lazy:
    tensor, (shape, where) = call["self"], _along(call)
    dim, adds = call.axis(), call.name == "scatter_add"
    if call.arguments.get("reduce") is not None or (adds and call.dtype is torch.bool):
        raise call.refuse("with reduce, or of bool")
    source = call.arguments.get("src", call.arguments.get("value"))
    if isinstance(source, Lazy):
        source = View(source, shape, lambda point: point)
    else:
        source = constant(source, shape, call.dtype)
    if adds or not tensor.shape or shape != (*tensor.shape[:dim], 1, *tensor.shape[dim + 1 :]):
        return scattered(call.block, tensor, source, where, adds)

    def at(kernel: Kernel, point: Point) -> str:
        """Let each element see whether it is the one that its row's index picks."""
        row = (*point[:dim], Index(), *point[dim + 1 :])
        picked, here = map(kernel.place, (where(kernel, row)[dim], point[dim]))
        new, old = source.at(kernel, row), tensor.at(kernel, point)
        return kernel.let(VALUE_TYPES[call.dtype], f"{picked} == {here} ? {new} : {old}")

    return Formula(call.shape, call.dtype, at, 2 + tensor.cost)
