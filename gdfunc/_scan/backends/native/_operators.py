"""What each of torch's operators is, element by element. The names are those of aten's schemas.

A new pointwise operator is a line in POINTWISE or PREDICATES; any other is a function under `lowers`.
"""

import re
from collections.abc import Callable, Sequence
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from ._index import Index, Point
from ._kernel import C_TYPES, Kernel
from ._reduction import PRODUCT, Cumulated, Extremum, Reduced
from ._tensor import (
    Block,
    Formula,
    Kept,
    Lazy,
    Map,
    Memory,
    Scattered,
    Shape,
    Unsupported,
    View,
    Written,
    cast,
    constant,
    expand,
    literal,
    reshape,
)

# {0}, {1}, … are values of the result's dtype, {f} the suffix of C's functions for it, {t} its type.
POINTWISE = {
    "neg": "-{0}",
    "abs": "{0} < 0 ? -{0} : {0} + 0",
    "sign": "({0} > 0) - ({0} < 0)",
    "reciprocal": "1 / {0}",
    "sqrt": "sqrt{f}({0})",
    "rsqrt": "1 / sqrt{f}({0})",
    "exp": "exp{f}({0})",
    "exp2": "exp2{f}({0})",
    "expm1": "expm1{f}({0})",
    "log": "log{f}({0})",
    "log1p": "log1p{f}({0})",
    "log2": "log2{f}({0})",
    "log10": "log10{f}({0})",
    "sin": "sin{f}({0})",
    "cos": "cos{f}({0})",
    "tan": "tan{f}({0})",
    "asin": "asin{f}({0})",
    "acos": "acos{f}({0})",
    "atan": "atan{f}({0})",
    "sinh": "sinh{f}({0})",
    "cosh": "cosh{f}({0})",
    "tanh": "tanh{f}({0})",
    "asinh": "asinh{f}({0})",
    "acosh": "acosh{f}({0})",
    "atanh": "atanh{f}({0})",
    "lgamma": "lgamma{f}({0})",
    "erf": "erf{f}({0})",
    "erfc": "erfc{f}({0})",
    "atan2": "atan2{f}({0}, {1})",
    "hypot": "hypot{f}({0}, {1})",
    "copysign": "copysign{f}({0}, {1})",
    "nextafter": "nextafter{f}({0}, {1})",
    "fmod": "fmod{f}({0}, {1})",
    "pow": "pow{f}({0}, {1})",
    "floor": "floor{f}({0})",
    "ceil": "ceil{f}({0})",
    "trunc": "trunc{f}({0})",
    "round": "rint{f}({0})",
    "sigmoid": "1 / (1 + exp{f}(-{0}))",
    "relu": "{0} < 0 ? 0 : {0}",
    "mul": PRODUCT,
    "div": "{0} / {1}",
    "maximum": "({0} > {1}) | ({0} != {0}) ? {0} : {1}",
    "minimum": "({0} < {1}) | ({0} != {0}) ? {0} : {1}",
    "fmax": "({0} >= {1}) | ({1} != {1}) ? {0} : {1}",
    "fmin": "({0} <= {1}) | ({1} != {1}) ? {0} : {1}",
    "bitwise_and": "{0} & {1}",
    "bitwise_or": "{0} | {1}",
    "bitwise_xor": "{0} ^ {1}",
}
ROUNDING = {"floor", "ceil", "trunc", "round"}  # which leave integers as they are
ARITHMETIC = {"neg", "abs", "sign", "add", "sub", "relu"}  # which C does otherwise on bool

# The values are of the dtype that torch compares in; the result is bool.
PREDICATES = {
    "eq": "{0} == {1}",
    "ne": "{0} != {1}",
    "lt": "{0} < {1}",
    "le": "{0} <= {1}",
    "gt": "{0} > {1}",
    "ge": "{0} >= {1}",
    "isnan": "{0} != {0}",
    "isinf": "({0} == __builtin_inf()) | ({0} == -__builtin_inf())",
    "signbit": "__builtin_signbit((double){0}) != 0",
    "logical_not": "{0} == 0",
    "logical_and": "({0} != 0) & ({1} != 0)",
    "logical_or": "({0} != 0) | ({1} != 0)",
    "logical_xor": "({0} != 0) ^ ({1} != 0)",
}
QUICK = ("sqrt", "floor", "ceil", "trunc", "rint", "copysign")  # functions that are one instruction
LONGEST_TABLE = 4096  # elements of a constant that is written into the code


def name_of(target: Any) -> str:
    """An operator's name in its schema: add for aten's, prims::add for another's; else nothing."""
    return target._schema.name.removeprefix("aten::") if isinstance(target, torch._ops.OpOverload) else ""


def functions() -> dict[str, int]:
    """The functions of C that the table calls, and how many numbers each takes."""
    calls = [(re.search(r"(\w+)\{f\}\(", template), template) for template in POINTWISE.values()]
    return {call[1]: 1 + ("{1}" in template) for call, template in calls if call}


class Call:
    """A node of the graph with its arguments by their names in the schema, tensors as Lazy."""

    def __init__(self, block: Block, node: fx.Node, arguments: dict[str, Any]) -> None:
        self.block, self.node, self.arguments = block, node, arguments
        self.name = name_of(node.target)
        self.value = node.meta["val"]

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    @property
    def shape(self) -> Shape:
        return tuple(self.value.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.value.dtype

    def tensor(self, value: Any, dtype: torch.dtype | None = None, shape: Shape | None = None) -> Lazy:
        """An operand in that dtype and shape, those of the result unless said otherwise."""
        dtype, shape = dtype or self.dtype, self.shape if shape is None else shape
        if not isinstance(value, Lazy):
            return constant(value, shape, dtype)
        return expand(cast(value, dtype), shape)

    def refuse(self, why: str = "") -> Unsupported:
        return Unsupported(f"{self.node.target}{why and ' ' + why}")


Lowering = Callable[[Call], Any]
LOWERINGS: dict[str, Lowering] = {}


def lowers(*names: str) -> Callable[[Lowering], Lowering]:
    def register(function: Lowering) -> Lowering:
        LOWERINGS.update(dict.fromkeys(names, function))
        return function

    return register


def lower(call: Call) -> Any:
    """The result of a node: a tensor, or several."""
    if call.name in LOWERINGS:
        return LOWERINGS[call.name](call)
    name = call.name.removeprefix("prims::")  # whose pointwise operators are the same
    if name in POINTWISE:
        return pointwise(call, POINTWISE[name], *_operands(call))
    if name in PREDICATES:
        operands = _operands(call)
        values: list[Any] = [arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in call.node.args]
        dtype = torch.result_type(*values) if len(values) == 2 else values[0].dtype
        return Map(PREDICATES[name], [call.tensor(value, dtype) for value in operands], torch.bool)
    if isinstance(call.value, Tensor) and not call.node.all_input_nodes:
        return _table(call)
    raise call.refuse()


def _operands(call: Call) -> list[Any]:
    """The arguments of an operator that has nothing but operands."""
    if call.arguments.get("decimals"):
        raise call.refuse("with decimals")
    return [value for name, value in call.arguments.items() if name != "decimals"]


def pointwise(call: Call, template: str, *values: Any) -> Lazy:
    """An expression whose values and result have the result's dtype."""
    name = call.name.removeprefix("prims::")
    if name in ROUNDING and not call.dtype.is_floating_point:
        return call.tensor(values[0])
    if "{f}(" in template and not call.dtype.is_floating_point:
        raise call.refuse("of integers")
    if name in ARITHMETIC and call.dtype is torch.bool:
        raise call.refuse("of bool")
    operands = [call.tensor(value) for value in values]
    quick = "{f}(" not in template or any(f"{name}{{f}}" in template for name in QUICK)
    if quick or prod(call.shape) == 1:
        return Map(template, operands, call.dtype)
    # From memory to memory, so that nothing breaks the row of calls, and none is made twice.
    operands = [Kept(call.block, operand) if operand.cost else operand for operand in operands]
    return Kept(call.block, Map(template, operands, call.dtype))


def _table(call: Call) -> Lazy:
    """A tensor of constants: torch makes it, and it is written down."""
    if torch.Tag.nondeterministic_seeded in call.node.target.tags or prod(call.shape) > LONGEST_TABLE:  # type: ignore[union-attr]
        raise call.refuse()
    values = call.node.target(*call.node.args, **call.node.kwargs)  # type: ignore[operator]
    rows = ", ".join(literal(value, call.dtype) for value in values.flatten().tolist()) or "0"
    name = f"table_{len(call.block.functions)}"
    call.block.functions.append(f"static const {C_TYPES[call.dtype]} {name}[] = {{{rows}}};")
    return Memory(name, call.shape, call.dtype)


# Element by element, with an argument that is no tensor.


@lowers("add", "sub", "prims::add", "prims::sub")
def _add(call: Call) -> Lazy:
    left, right, alpha = call["self"], call["other"], call.arguments.get("alpha", 1)
    if call.dtype is torch.bool:
        raise call.refuse("of bool")
    if alpha != 1:
        right = Map(PRODUCT, [call.tensor(right), call.tensor(alpha)], call.dtype)
    return pointwise(call, "{0} + {1}" if "add" in call.name else "{0} - {1}", left, right)


@lowers("rsub")
def _rsub(call: Call) -> Lazy:
    if call["alpha"] != 1:
        raise call.refuse("with alpha")
    return pointwise(call, "{1} - {0}", call["self"], call["other"])


@lowers("where")
def _where(call: Call) -> Lazy:
    values = [call.tensor(call[name]) for name in ("self", "other")]
    return Map("{0} ? {1} : {2}", [call.tensor(call["condition"], torch.bool), *values], call.dtype)


@lowers("clamp", "clamp_min", "clamp_max")
def _clamp(call: Call) -> Lazy:
    result = call["self"]
    for bound, name in (("min", "maximum"), ("max", "minimum")):
        if call.arguments.get(bound) is not None:
            # Of equals, as 0 and -0, it takes the last.
            result = pointwise(call, POINTWISE[name], call[bound], result)
    return call.tensor(result)


@lowers("pow")
def _pow(call: Call) -> Lazy:
    base, exponent = call["self"], call["exponent"]
    squares = {0: "1", 1: "{0}", 2: "{0} * {0}", 3: "{0} * {0} * {0}"}
    roots = {0.5: "sqrt{f}({0})", -0.5: "1 / sqrt{f}({0})", -1: "1 / {0}", -2: "1 / ({0} * {0})"}
    if not isinstance(exponent, Lazy) and exponent in squares:
        return pointwise(call, squares[exponent], base)
    if not call.dtype.is_floating_point:
        raise call.refuse("of integers")
    if not isinstance(exponent, Lazy) and exponent in roots:
        return pointwise(call, roots[exponent], base)
    return pointwise(call, POINTWISE["pow"], base, exponent)


@lowers("remainder", "fmod", "floor_divide", "div")
def _divide(call: Call) -> Lazy:
    left, right = call["self"], call["other"]
    name = call.arguments.get("rounding_mode") or call.name
    if call.dtype.is_floating_point and name in ("div", "fmod"):
        return pointwise(call, POINTWISE[name], left, right)
    if call.dtype.is_floating_point and name == "remainder":
        rest = pointwise(call, POINTWISE["fmod"], left, right)
        return pointwise(call, "{0} != 0 && (({1} < 0) != ({0} < 0)) ? {0} + {1} : {0}", rest, right)
    is_whole = not call.dtype.is_floating_point and not isinstance(right, Lazy)
    if not is_whole or not 0 < right <= torch.iinfo(call.dtype).max:
        raise call.refuse("other than of integers by a positive number that the dtype has")
    floor = "{0} / {1} - ({0} % {1} < 0)"
    templates = {
        "remainder": "{0} % {1} + ({0} % {1} < 0 ? {1} : 0)",
        "fmod": "{0} % {1}",
        "trunc": "{0} / {1}",
    }
    return pointwise(call, templates.get(name, floor), left, right)


@lowers("bitwise_not")
def _bitwise_not(call: Call) -> Lazy:
    return pointwise(call, "{0} == 0" if call.dtype is torch.bool else "~{0}", call["self"])


@lowers("__lshift__", "__rshift__", "bitwise_left_shift", "bitwise_right_shift")
def _shift(call: Call) -> Lazy:
    by = call["other"]
    if isinstance(by, Lazy) or not 0 <= by < 8 * call.dtype.itemsize or call.dtype is torch.bool:
        raise call.refuse("unless it is by a number of bits that the dtype has")
    return pointwise(
        call,
        "{0} << {1}" if "left" in call.name or call.name == "__lshift__" else "{0} >> {1}",
        call["self"],
        by,
    )


@lowers(
    "_to_copy",
    "to",
    "clone",
    "alias",
    "detach",
    "lift_fresh",
    "lift_fresh_copy",
    "contiguous",
    "prims::convert_element_type",
    "copy",
)
def _copy(call: Call) -> Lazy:
    return call.tensor(call.arguments.get("src", next(iter(call.arguments.values()))))


# Made of numbers.

ZEROS = ("zeros", "zeros_like", "new_zeros", "_efficientzerotensor")
ANYTHING = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")
FILLED = dict.fromkeys((*ZEROS, *ANYTHING), 0) | dict.fromkeys(("ones", "ones_like", "new_ones"), 1)


@lowers(*FILLED)
def _filled(call: Call) -> Lazy:
    return constant(FILLED[call.name], call.shape, call.dtype)


@lowers("full", "full_like", "new_full", "scalar_tensor", "fill")
def _full(call: Call) -> Lazy:
    name = {"scalar_tensor": "s", "fill": "value"}.get(call.name, "fill_value")
    return call.tensor(call[name])


@lowers("arange")
def _arange(call: Call) -> Lazy:
    if call.dtype.is_floating_point:
        return _table(call)
    first, step = int(call.arguments.get("start", 0)), int(call.arguments.get("step", 1))

    def at(kernel: Kernel, point: Point) -> str:
        text, names = kernel.place(point[0] * step + first)
        return kernel.let(C_TYPES[call.dtype], text, names)

    return Formula(call.shape, call.dtype, at)


# The same elements elsewhere.

RESHAPES = ("view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "view_copy", "flatten", "unflatten")


@lowers(*RESHAPES)
def _reshape(call: Call) -> Lazy:
    if call["self"].dtype != call.dtype:
        raise call.refuse("to another dtype")
    return reshape(call["self"], call.shape)


@lowers("expand", "broadcast_to")
def _expand(call: Call) -> Lazy:
    return expand(call["self"], call.shape)


@lowers("permute", "transpose", "t")
def _permute(call: Call) -> Lazy:
    tensor, rank = call["self"], len(call.shape)
    order = list(range(rank))
    if call.name == "permute":
        order = [dim % rank for dim in call["dims"]]
    elif call.name == "transpose" and rank:
        first, second = call["dim0"] % rank, call["dim1"] % rank
        order[first], order[second] = second, first
    elif call.name == "t":
        order.reverse()
    back = [order.index(dim) for dim in range(rank)]
    return View(tensor, call.shape, lambda point: tuple(point[dim] for dim in back))


def _along(tensor: Lazy, dim: int, shape: Sequence[int], move: Callable[[Index], Index]) -> View:
    """A view that moves the index of one axis."""
    return View(tensor, shape, lambda point: (*point[:dim], move(point[dim]), *point[dim + 1 :]))


def _cut(tensor: Lazy, dim: int, start: int, extent: int) -> View:
    """Some of the elements along an axis."""
    shape = (*tensor.shape[:dim], extent, *tensor.shape[dim + 1 :])
    return _along(tensor, dim, shape, lambda index: index + start)


def _first(start: int | None, extent: int) -> int:
    start = start or 0
    return min(max(start + extent if start < 0 else start, 0), extent)


@lowers("slice")
def _slice(call: Call) -> Lazy:
    tensor, step = call["self"], call["step"]
    dim = call["dim"] % len(tensor.shape)
    start = _first(call["start"], tensor.shape[dim])
    return _along(tensor, dim, call.shape, lambda index: index * step + start)


@lowers("unfold")
def _unfold(call: Call) -> Lazy:
    tensor, step = call["self"], call["step"]
    dim = call["dimension"] % max(len(tensor.shape), 1)

    def remap(point: Point) -> Point:
        return (*point[:dim], point[dim] * step + point[-1], *point[dim + 1 : -1]) if tensor.shape else ()

    return View(tensor, call.shape, remap)


@lowers("select")
def _select(call: Call) -> Lazy:
    tensor = call["self"]
    dim = call["dim"] % len(tensor.shape)
    index = Index(call["index"] % tensor.shape[dim])
    return View(tensor, call.shape, lambda point: (*point[:dim], index, *point[dim:]))


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
    split = lambda point: tuple(i.split(extent)[1] for i, extent in zip(point, tensor.shape, strict=True))  # noqa: E731
    return View(tensor, call.shape, split)


@lowers("diagonal")
def _diagonal(call: Call) -> Lazy:
    tensor, offset = call["self"], call["offset"]
    first, second = call["dim1"] % len(tensor.shape), call["dim2"] % len(tensor.shape)

    def remap(point: Point) -> Point:
        rest, last = iter(point[:-1]), point[-1]
        moved = {first: last + max(-offset, 0), second: last + max(offset, 0)}
        return tuple(moved[dim] if dim in moved else next(rest) for dim in range(len(tensor.shape)))

    return View(tensor, call.shape, remap)


@lowers("split_with_sizes", "split", "unbind")
def _split(call: Call) -> list[Lazy]:
    tensor = call["self"]
    dim = call["dim"] % len(tensor.shape)
    ends = list(accumulate(1 if call.name == "unbind" else value.shape[dim] for value in call.value))

    def part(shape: Shape, start: int) -> Lazy:
        if call.name == "unbind":
            return View(tensor, shape, lambda point: (*point[:dim], Index(start), *point[dim:]))
        return _cut(tensor, dim, start, shape[dim])

    return [part(tuple(value.shape), start) for value, start in zip(call.value, [0, *ends], strict=False)]


# Put together from parts.


@lowers("cat")
def _cat(call: Call) -> Lazy:
    tensors = [tensor for tensor in call["tensors"] if tensor.shape != (0,) or call.shape == (0,)]
    dim = call["dim"] % len(call.shape)
    parts, start = [], 0
    for tensor in tensors:
        parts.append((dim, start, 1, cast(tensor, call.dtype)))
        start += tensor.shape[dim]
    return Written(call.block, call.shape, parts, None)


@lowers("slice_scatter")
def _slice_scatter(call: Call) -> Lazy:
    dim = call["dim"] % len(call.shape)
    start = _first(call["start"], call.shape[dim])
    part = dim, start, call["step"], cast(call["src"], call.dtype)
    return Written(call.block, call.shape, [part], call["self"])


@lowers("select_scatter")
def _select_scatter(call: Call) -> Lazy:
    dim = call["dim"] % len(call.shape)
    shape = (*call.shape[:dim], 1, *call.shape[dim + 1 :])
    part = dim, call["index"] % call.shape[dim], 1, reshape(cast(call["src"], call.dtype), shape)
    return Written(call.block, call.shape, [part], call["self"])


@lowers("constant_pad_nd")
def _pad(call: Call) -> Lazy:
    tensor, pads = call["self"], call["pad"]
    for at in range(len(pads) // 2):
        dim, before, after = len(tensor.shape) - 1 - at, pads[2 * at], pads[2 * at + 1]
        tensor = _cut(tensor, dim, max(-before, 0), tensor.shape[dim] + min(before, 0) + min(after, 0))
        if max(before, after) > 0:
            extent = max(before, 0) + tensor.shape[dim] + max(after, 0)
            shape = (*tensor.shape[:dim], extent, *tensor.shape[dim + 1 :])
            base = constant(call["value"], shape, call.dtype)
            tensor = Written(call.block, shape, [(dim, max(before, 0), 1, tensor)], base)
    return tensor


# Picked by an index.


def _picks(
    call: Call, indices: Sequence[Lazy | None], extents: Shape, wraps: bool
) -> tuple[Shape, int, Any]:
    """The shape that indices have together, where it starts, and the function to the point picked."""
    used = [dim for dim, index in enumerate(indices) if index is not None]
    for dim in used:
        if indices[dim].dtype not in (torch.int64, torch.int32):  # type: ignore[union-attr]
            raise call.refuse("by a mask")
    shape = tuple(torch.broadcast_shapes(*[indices[dim].shape for dim in used]))  # type: ignore[union-attr]
    if 0 not in shape and any(not extents[dim] for dim in used):
        raise call.refuse("of an empty axis")
    together = used == list(range(used[0], used[-1] + 1))
    start = used[0] if together else 0

    def where(kernel: Kernel, point: Point) -> Point:
        inner, rest = (
            point[start : start + len(shape)],
            iter((*point[:start], *point[start + len(shape) :])),
        )
        picked = []
        for dim, extent in enumerate(extents):
            index = indices[dim] if dim < len(indices) else None
            if index is None:
                picked.append(next(rest))
            else:
                value = expand(cast(index, torch.int64), shape).at(kernel, inner)
                picked.append(kernel.checked(value, extent, wraps))
        return tuple(picked)

    return shape, start, where


def _picked(call: Call, source: Lazy, where: Callable[[Kernel, Point], Point]) -> Lazy:
    return Formula(call.shape, call.dtype, lambda kernel, point: source.at(kernel, where(kernel, point)), 3)


@lowers("index")
def _index(call: Call) -> Lazy:
    _, _, where = _picks(call, call["indices"], call["self"].shape, True)
    return _picked(call, call["self"], where)


@lowers("index_select")
def _index_select(call: Call) -> Lazy:
    tensor = call["self"]
    if not tensor.shape:
        raise call.refuse("of a 0-d tensor")
    indices: list[Lazy | None] = [None] * len(tensor.shape)
    indices[call["dim"] % len(tensor.shape)] = reshape(call["index"], (prod(call["index"].shape),))
    _, _, where = _picks(call, indices, tensor.shape, False)
    return _picked(call, tensor, where)


@lowers("embedding")
def _embedding(call: Call) -> Lazy:
    _, _, where = _picks(call, [call["indices"]], call["weight"].shape, False)
    return _picked(call, call["weight"], where)


def _beside(call: Call, index: Lazy, dim: int, extent: int) -> Callable[[Kernel, Point], Point]:
    """The point with its index of one axis replaced by what is read there."""
    if index.dtype not in (torch.int64, torch.int32) or (0 not in index.shape and not extent):
        raise call.refuse()

    def where(kernel: Kernel, point: Point) -> Point:
        value = cast(index, torch.int64).at(kernel, point)
        return (*point[:dim], kernel.checked(value, extent, False), *point[dim + 1 :])

    return where


@lowers("gather")
def _gather(call: Call) -> Lazy:
    tensor = call["self"]
    if not tensor.shape:
        raise call.refuse("of a 0-d tensor")
    dim = call["dim"] % len(tensor.shape)
    return _picked(call, tensor, _beside(call, call["index"], dim, tensor.shape[dim]))


@lowers("scatter", "scatter_add")
def _scatter(call: Call) -> Lazy:
    tensor, index = call["self"], call["index"]
    if not tensor.shape or call.arguments.get("reduce") is not None:
        raise call.refuse("of a 0-d tensor, or with reduce")
    dim, adds = call["dim"] % len(tensor.shape), call.name == "scatter_add"
    if adds and call.dtype is torch.bool:
        raise call.refuse("of bool")
    where = _beside(call, index, dim, tensor.shape[dim])
    source = call.arguments.get("src", call.arguments.get("value"))
    if isinstance(source, Lazy):
        source = View(source, index.shape, lambda point: point)
    else:
        source = constant(source, index.shape, call.dtype)
    alone = (*tensor.shape[:dim], 1, *tensor.shape[dim + 1 :])
    if index.shape != alone or adds:
        return Scattered(call.block, tensor, source, where, adds)

    def at(kernel: Kernel, point: Point) -> str:
        """One index a row: each element knows whether it is meant."""
        row = (*point[:dim], Index(), *point[dim + 1 :])
        (var, _), *_ = where(kernel, row)[dim].terms
        text, names = kernel.place(point[dim])
        values = [var.name, *names, source.at(kernel, row), tensor.at(kernel, point)]
        return kernel.let(
            C_TYPES[call.dtype], f"{var.name} == {text} ? {values[-2]} : {values[-1]}", values
        )

    return Formula(call.shape, call.dtype, at, 2 + tensor.cost)


@lowers("index_put", "_unsafe_index_put", "_index_put_impl")
def _index_put(call: Call) -> Lazy:
    tensor, adds = call["self"], bool(call["accumulate"])
    if adds and call.dtype is torch.bool:
        raise call.refuse("of bool")
    shape, start, where = _picks(call, call["indices"], tensor.shape, True)
    used = {dim for dim, index in enumerate(call["indices"]) if index is not None}
    rest = [extent for dim, extent in enumerate(tensor.shape) if dim not in used]
    full = (*rest[:start], *shape, *rest[start:])
    return Scattered(call.block, tensor, call.tensor(call["values"], shape=full), where, adds)


@lowers("index_add")
def _index_add(call: Call) -> Lazy:
    tensor, source = call["self"], call["source"]
    if not tensor.shape or call["alpha"] != 1 or call.dtype is torch.bool:
        raise call.refuse()
    dim = call["dim"] % len(tensor.shape)
    indices: list[Lazy | None] = [None] * len(tensor.shape)
    indices[dim] = reshape(call["index"], (prod(call["index"].shape),))
    _, _, where = _picks(call, indices, tensor.shape, False)
    return Scattered(call.block, tensor, source, where, True)


# Reductions.


def _dims(tensor: Lazy, dims: Any) -> list[int]:
    """The axes that are meant: all, if none is given."""
    if dims is None or dims == []:
        return list(range(len(tensor.shape)))
    dims = [dims] if isinstance(dims, int) else dims
    return sorted({dim % max(len(tensor.shape), 1) for dim in dims if tensor.shape})


def reduce(call: Call, source: Lazy, dims: Any, kind: str, shape: Shape) -> Lazy:
    """A reduction with the shape of the result, in which reduced axes may be kept with extent 1."""
    dims = _dims(source, dims)
    if kind in ("max", "min") and not prod(source.shape[dim] for dim in dims):
        raise call.refuse("of nothing")
    if all(source.shape[dim] == 1 for dim in dims):
        if kind == "sum" and source.dtype.is_floating_point:  # which begins with 0: of -0 it is 0
            source = Map("{0} + 0", [source], source.dtype)
        return reshape(source, shape)
    return reshape(Reduced(call.block, source, dims, kind), shape)


@lowers("sum", "prod", "amax", "amin")
def _reduce(call: Call) -> Lazy:
    source = cast(call["self"], call.dtype)
    return reduce(call, source, call.arguments.get("dim"), call.name.removeprefix("a"), call.shape)


@lowers("any", "all")
def _any(call: Call) -> Lazy:
    flags, dim = cast(call["self"], torch.bool), call.arguments.get("dim")
    if dim != []:  # of no axes, which is not of all here
        flags = reduce(call, flags, dim, call.name, call.shape)
    return cast(flags, call.dtype)


@lowers("mean")
def _mean(call: Call) -> Lazy:
    tensor = cast(call["self"], call.dtype)
    dims = _dims(tensor, call.arguments.get("dim"))
    total = reduce(call, tensor, dims, "sum", call.shape)
    return pointwise(call, "{0} / {1}", total, prod(tensor.shape[dim] for dim in dims))


@lowers("max", "min")
def _max(call: Call) -> Any:
    tensor = call["self"]
    if "other" in call.arguments:
        return pointwise(call, POINTWISE[f"{call.name}imum"], tensor, call["other"])
    if "dim" not in call.arguments:
        return reduce(call, tensor, None, call.name, call.shape)
    values, indices = call.value
    if not tensor.shape:
        return [tensor, constant(0, (), torch.int64)]
    found = Extremum(call.block, tensor, _dims(tensor, call["dim"]), call.name == "max")
    return [
        reduce(call, tensor, call["dim"], call.name, tuple(values.shape)),
        reshape(found, tuple(indices.shape)),
    ]


@lowers("argmax", "argmin")
def _argmax(call: Call) -> Lazy:
    tensor = call["self"]
    if not prod(tensor.shape[dim] for dim in _dims(tensor, call["dim"])):
        raise call.refuse("of nothing")
    found = Extremum(call.block, tensor, _dims(tensor, call["dim"]), call.name == "argmax")
    return reshape(found, call.shape)


@lowers("cumsum", "cumprod")
def _cumulated(call: Call) -> Lazy:
    tensor, kind = cast(call["self"], call.dtype), call.name.removeprefix("cum")
    return Cumulated(call.block, tensor, call["dim"] % len(tensor.shape), kind) if tensor.shape else tensor


@lowers("mm", "bmm")
def _mm(call: Call) -> Lazy:
    """The sum of a product: if it is large enough, a contraction."""
    left, right = call["self"], call["mat2"]
    *batch, rows, columns = call.shape
    if left.shape[-1] == 1:
        return pointwise(call, PRODUCT, left, right)
    shape = (*batch, rows, columns, left.shape[-1])
    a = View(left, shape, lambda point: (*point[:-2], point[-1]))
    b = View(right, shape, lambda point: (*point[:-3], point[-1], point[-2]))
    return Reduced(call.block, Map(PRODUCT, [a, b], call.dtype), [len(shape) - 1], "sum")


TABLES = {"linspace", "logspace", "eye", "tril_indices", "triu_indices"}  # torch makes them more exactly
COVERED = {*POINTWISE, *PREDICATES, *LOWERINGS, *TABLES}
