"""Reductions, and products of matrices, which are sums of products."""

from math import prod
from typing import Any

import torch

from .._index import Index, Point, Var
from .._kernel import Kernel
from .._reduction import PRODUCT, Reduced, cumulated
from .._tensor import Formula, Lazy, Map, Shape, View, cast, constant, reshape
from ._call import Call, lowers
from ._pointwise import POINTWISE, pointwise


def _dims(tensor: Lazy, dims: Any) -> list[int]:
    """List the axes that are meant: all, if none is given."""
    if dims is None or dims == []:
        return list(range(len(tensor.shape)))
    dims = [dims] if isinstance(dims, int) else dims
    return sorted({dim % max(len(tensor.shape), 1) for dim in dims if tensor.shape})


def _reduced(call: Call, source: Lazy, dims: Any, kind: str, shape: Shape) -> Lazy:
    """Reduce to the shape of the result, which may keep reduced axes with extent 1."""
    dims = _dims(source, dims)
    if kind.endswith(("max", "min")) and not prod(source.shape[dim] for dim in dims):
        raise call.refuse("of nothing")
    if all(source.shape[dim] == 1 for dim in dims):
        if kind.startswith("arg"):
            return constant(0, shape, torch.int64)
        if kind == "sum" and source.dtype.is_floating_point:  # which begins with 0: of -0 it is 0
            source = Map("{0} + 0", [source], source.dtype)
        return reshape(source, shape)
    return reshape(Reduced(call.block, source, dims, kind), shape)


@lowers("sum", "prod", "amax", "amin")
def _reduce(call: Call) -> Lazy:
    source = cast(call["self"], call.dtype)
    return _reduced(call, source, call.arguments.get("dim"), call.name.removeprefix("a"), call.shape)


@lowers("any", "all")
def _any(call: Call) -> Lazy:
    flags, dim = cast(call["self"], torch.bool), call.arguments.get("dim")
    if dim != []:  # an empty list means no axis here
        flags = _reduced(call, flags, dim, call.name, call.shape)
    return cast(flags, call.dtype)


@lowers("mean")
def _mean(call: Call) -> Lazy:
    tensor, dim = cast(call["self"], call.dtype), call.arguments.get("dim")
    total = _reduced(call, tensor, dim, "sum", call.shape)
    return pointwise(call, "{0} / {1}", total, prod(tensor.shape[dim] for dim in _dims(tensor, dim)))


@lowers("max", "min", "argmax", "argmin")
def _max(call: Call) -> Any:
    tensor, dim = call["self"], call.arguments.get("dim")
    if "other" in call.arguments:
        return pointwise(call, POINTWISE[f"{call.name}imum"], tensor, call["other"])
    if isinstance(call.value, torch.Tensor):
        return _reduced(call, tensor, dim, call.name, call.shape)
    kinds = zip((call.name, f"arg{call.name}"), call.value, strict=True)
    return [_reduced(call, tensor, dim, kind, tuple(result.shape)) for kind, result in kinds]


@lowers("cumsum", "cumprod")
def _cumulated(call: Call) -> Lazy:
    tensor, kind = cast(call["self"], call.dtype), call.name.removeprefix("cum")
    return cumulated(call.block, tensor, call.axis(), kind) if tensor.shape else tensor


@lowers("cummax", "cummin")
def _running(call: Call) -> list[Lazy]:
    """Find where each best value is, and pick it there."""
    tensor, dim = call["self"], call.axis()
    if not tensor.shape:
        return [tensor, constant(0, (), torch.int64)]
    at = cumulated(call.block, tensor, dim, call.name.removeprefix("cum"))

    def best(kernel: Kernel, point: Point) -> str:
        place = Index(0, ((Var(at.at(kernel, point), tensor.shape[dim]), 1),))
        return tensor.at(kernel, (*point[:dim], place, *point[dim + 1 :]))

    return [Formula(tensor.shape, tensor.dtype, best, 2), at]


@lowers("mm", "bmm")
def _mm(call: Call) -> Lazy:
    """Sum a product over its last axis; a large sum becomes a contraction."""
    left, right = call["self"], call["mat2"]
    if left.shape[-1] == 1:
        return pointwise(call, PRODUCT, left, right)
    shape = (*call.shape, left.shape[-1])
    a = View(left, shape, lambda point: (*point[:-2], point[-1]))
    b = View(right, shape, lambda point: (*point[:-3], point[-1], point[-2]))
    return Reduced(call.block, Map(PRODUCT, [a, b], call.dtype), [len(shape) - 1], "sum")
