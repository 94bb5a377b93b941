"""Tensors that are made of numbers."""

from math import prod

import torch

from .._index import Point
from .._kernel import Kernel
from .._statement import C_TYPES, HALVES, Buffer
from .._tensor import Formula, Lazy, Memory, literal
from ._call import Call, lowers

_LONGEST_TABLE = 4096  # elements of a constant that is written into the code


@lowers("full", "full_like", "scalar_tensor", "fill")
@lowers("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")
def _full(call: Call) -> Lazy:
    names = ("fill_value", "value", "s")
    return call.tensor(next((call[name] for name in names if name in call.arguments), 0))


@lowers("arange")
def _arange(call: Call) -> Lazy:
    if call.dtype.is_floating_point:
        return table(call)
    first, step = int(call.arguments.get("start", 0)), int(call.arguments.get("step", 1))

    def at(kernel: Kernel, point: Point) -> str:
        return kernel.let(C_TYPES[call.dtype], kernel.place(point[0] * step + first))

    return Formula(call.shape, call.dtype, at)


def table(call: Call) -> Lazy:
    """Let torch make a tensor of constants, and write it down."""
    if torch.Tag.nondeterministic_seeded in call.node.target.tags or prod(call.shape) > _LONGEST_TABLE:  # type: ignore[union-attr]
        raise call.refuse()
    values = call.node.target(*call.node.args, **call.node.kwargs)  # type: ignore[operator]
    dtype = call.dtype
    if dtype in HALVES:
        values, dtype = values.view(torch.int16), torch.int16
    rows = ", ".join(literal(value, dtype) for value in values.flatten().tolist()) or "0"
    buffer = Buffer(f"table_{len(call.block.functions)}", call.dtype)
    call.block.functions.append(f"static const {buffer.c_type} {buffer.name}[] = {{{rows}}};")
    return Memory(buffer, call.shape)
