"""Tensors as functions from a point to a value, and the moment when one gets memory of its own.

A tensor that is used once, or that is cheap, is never stored: its expression is written where it is used.
A stored tensor writes its kernels when its memory is first needed.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from math import prod
from typing import Any

import torch

from ...._errors import BackendError
from ._index import Index, Point, ravel, strides_of, unravel
from ._kernel import Kernel, NotFlat, over
from ._statement import HALVES, VALUE_TYPES, Buffer, Code, Tiles

Shape = tuple[int, ...]


class Unsupported(BackendError):
    """An operation that the native backend does not write."""

    def __init__(self, what: str) -> None:
        super().__init__(f"backend='native' does not cover {what}; use backend='inductor' or 'eager'")


class TorchIsFaster(Unsupported):
    """A step that is too large to be worth a loop of our own."""


@dataclass
class Block:
    """The statements of a step, with their intermediate results and functions."""

    tiles: Tiles
    statements: list[Code] = field(default_factory=list)
    buffers: list[Buffer] = field(default_factory=list)  # of intermediate results
    functions: list[str] = field(default_factory=list)
    names: Iterator[int] = field(default_factory=count)
    packed: dict[Any, Any] = field(default_factory=dict)  # copies of factors, made by these statements

    def scratch(self, shape: Sequence[int], dtype: torch.dtype) -> "Memory":
        """Take memory for a tensor, contiguous and aligned."""
        self.buffers.append(Buffer(f"s{next(self.names)}", dtype, max(prod(shape), 1)))
        return Memory(self.buffers[-1], shape)

    def add(self, code: Code) -> None:
        if code.rounds:  # else what it reads may not exist
            self.statements.append(code)


class Lazy(ABC):
    """A tensor that is known element by element."""

    shape: Shape
    dtype: torch.dtype
    cost = 0  # of an element: about how many instructions
    shared = False  # used more than once

    @abstractmethod
    def at(self, kernel: Kernel, point: Point) -> str:
        """Write the element at a point; give its name."""


class Formula(Lazy):
    """A tensor whose elements a function writes."""

    def __init__(
        self, shape: Sequence[int], dtype: torch.dtype, at: Callable[[Kernel, Point], str], cost: int = 1
    ) -> None:
        self.shape, self.dtype, self.cost, self._at = tuple(shape), dtype, cost, at

    def at(self, kernel: Kernel, point: Point) -> str:
        return self._at(kernel, point)


def constant(number: Any, shape: Sequence[int], dtype: torch.dtype) -> Lazy:
    """Make a tensor of equal elements."""
    text = literal(number, dtype)
    return Formula(shape, dtype, lambda kernel, point: text, 0)


def literal(number: Any, dtype: torch.dtype) -> str:
    """Write a number as the constant that torch would make of it."""
    c_type = VALUE_TYPES[dtype]
    if not dtype.is_floating_point:
        whole = int(bool(number)) if dtype is torch.bool else int(number)
        return "INT64_MIN" if whole == -(2**63) else f"(({c_type}){whole}LL)"
    names = {"nan": '__builtin_nan("")', "inf": "__builtin_inf()", "-inf": "-__builtin_inf()"}
    number, suffix = float(number), "f" if c_type == "float" else ""
    if dtype in HALVES:
        number = float(torch.tensor(number, dtype=dtype))
    return f"(({c_type}){names.get(str(number)) or number.hex() + suffix})"


class Map(Lazy):
    """An expression of tensors of the same shape, element by element."""

    def __init__(self, template: str, args: Sequence[Lazy], dtype: torch.dtype, cost: int = 1) -> None:
        self.template, self.args, self.dtype = template, tuple(args), dtype
        self.shape = args[0].shape
        self.cost = cost + sum(arg.cost for arg in args)

    def at(self, kernel: Kernel, point: Point) -> str:
        values = [arg.at(kernel, point) for arg in self.args]
        c_type = VALUE_TYPES[self.dtype]
        text = self.template.format(*values, f="f" if c_type == "float" else "", t=c_type)
        return kernel.let(c_type, f"round_{HALVES[self.dtype]}({text})" if self.dtype in HALVES else text)


def cast(tensor: Lazy, dtype: torch.dtype) -> Lazy:
    """Convert the elements."""
    if tensor.dtype == dtype:
        return tensor
    if dtype is torch.uint8 and tensor.dtype.is_floating_point:  # modulo 256, as in torch
        tensor = cast(tensor, torch.int64)
    return Map("{0} != 0" if dtype is torch.bool else "({t}){0}", [tensor], dtype)


class View(Lazy):
    """The elements of another tensor, in other places."""

    def __init__(self, source: Lazy, shape: Sequence[int], remap: Callable[[Point], Point]) -> None:
        self.source, self.shape, self.remap = source, tuple(shape), remap
        self.dtype, self.cost = source.dtype, source.cost

    def at(self, kernel: Kernel, point: Point) -> str:
        return self.source.at(kernel, self.remap(point))


def behind(tensor: Lazy, point: Point) -> tuple[Lazy, Point]:
    """Look through views: return the tensor that they show, and the point there."""
    while isinstance(tensor, View):
        point, tensor = tensor.remap(point), tensor.source
    return tensor, point


def strided(tensor: Lazy, shape: Sequence[int], strides: Sequence[int], start: int = 0) -> Lazy:
    """Show the elements that a view with these strides shows of a contiguous tensor."""
    if tuple(shape) == tensor.shape and tuple(strides) == strides_of(shape):
        return tensor
    return View(tensor, shape, lambda point: unravel(ravel(point, strides) + start, tensor.shape))


def expand(tensor: Lazy, shape: Sequence[int]) -> Lazy:
    """Repeat along axes of extent 1 and new ones at the left."""
    if tensor.shape == tuple(shape):
        return tensor
    pairs = zip(tensor.shape, strides_of(tensor.shape), strict=True)
    strides = [0 if extent == 1 else stride for extent, stride in pairs]
    return strided(tensor, shape, [0] * (len(shape) - len(strides)) + strides)


def reshape(tensor: Lazy, shape: Sequence[int]) -> Lazy:
    """Keep the elements and their order."""
    return strided(tensor, shape, strides_of(shape))


class Memory(Lazy):
    """A tensor that lies in memory."""

    def __init__(
        self, buffer: Buffer, shape: Sequence[int], strides: Sequence[int] | None = None, start: int = 0
    ) -> None:
        self.buffer, self.shape, self.dtype, self.start = buffer, tuple(shape), buffer.dtype, start
        self.strides = strides_of(shape) if strides is None else tuple(strides)

    def place(self, point: Point) -> Index:
        return ravel(point, self.strides) + self.start

    def at(self, kernel: Kernel, point: Point) -> str:
        return kernel.read(self.buffer, self.place(point))

    def part(self, dim: int, start: int, step: int, extent: int) -> "Memory":
        """Take some of its rows."""
        shape, strides = list(self.shape), list(self.strides)
        start = self.start + start * strides[dim]
        shape[dim], strides[dim] = extent, strides[dim] * step
        return Memory(self.buffer, shape, strides, start)


class Stored(Lazy):
    """A tensor that gets memory when that is first needed, which kernels in its block fill."""

    written: Memory | None = None
    target: Memory | None = None  # where a result goes

    def __init__(
        self, block: Block, shape: Sequence[int], dtype: torch.dtype, write: Callable[[Memory], None]
    ) -> None:
        self.block, self.shape, self.dtype, self.write = block, tuple(shape), dtype, write

    def memory(self) -> Memory:
        if self.written is None:
            self.written = self.emit()
        return self.written

    def emit(self) -> Memory:
        out = self.target or self.block.scratch(self.shape, self.dtype)
        self.write(out)
        return out

    def at(self, kernel: Kernel, point: Point) -> str:
        return self.memory().at(kernel, point)


def stored(block: Block, source: Lazy, target: Memory | None = None) -> Stored:
    """Store another tensor."""
    copy = Stored(block, source.shape, source.dtype, lambda out: fill(block, out, source))
    copy.target = target
    return copy


def fill(block: Block, target: Memory, source: Lazy) -> None:
    """Write a tensor into memory: in one loop if all that it reads lies in a row as well."""
    for flat in (True, False):
        loops, point = over(target.shape, flat)
        kernel = Kernel(loops, flat)
        try:
            value = source.at(kernel, point)
            kernel.store(target.buffer, target.place(point), value)
        except NotFlat:
            continue
        return block.add(kernel.code())


Part = tuple[int, int, int, Lazy]  # dim, start and step of where a tensor goes


def assembled(block: Block, shape: Sequence[int], parts: Sequence[Part], base: Lazy | None = None) -> Lazy:
    """Put a tensor together from parts, over a base."""

    def write(out: Memory) -> None:
        if base is not None:
            fill(block, out, base)
        for dim, start, step, tensor in parts:
            if prod(tensor.shape):
                fill(block, out.part(dim, start, step, tensor.shape[dim]), tensor)

    return Stored(block, shape, parts[0][-1].dtype, write)


Where = Callable[[Kernel, Point], Point]  # from a point to the one that an index says


def scattered(block: Block, base: Lazy, source: Lazy, where: Where, adds: bool) -> Lazy:
    """Replace some elements, or add to them, where an index says."""

    def write(out: Memory) -> None:
        fill(block, out, base)
        loops, point = over(source.shape, flat=False)
        kernel = Kernel(loops)
        value = source.at(kernel, point)
        kernel.store(out.buffer, out.place(where(kernel, point)), value, "+=" if adds else "=")
        block.add(kernel.code(parallel=False))

    return Stored(block, base.shape, base.dtype, write)


def address(block: Block, tensor: Lazy, point: Point) -> tuple[Buffer, Index]:
    """Find the element at a point in memory; a tensor without memory is stored, once."""
    tensor, point = behind(tensor, point)
    if isinstance(tensor, Memory):
        memory = tensor
    elif isinstance(tensor, Stored):
        memory = tensor.memory()
    else:
        memory = block.packed.setdefault(tensor, stored(block, tensor)).memory()
    return memory.buffer, memory.place(point)


def contiguous(block: Block, tensor: Lazy, free: int = 0) -> Memory:
    """Find the tensor where it lies, if it is contiguous but for its first axes; else copy it."""
    loops, point = over(tensor.shape, flat=False)
    if isinstance(behind(tensor, point)[0], (Memory, Stored)):
        buffer, place = address(block, tensor, point)
        strides = [sum(place.factor(var) for var, _ in index.terms) for index in point]
        shape = tensor.shape[free:]
        dense = zip(shape, strides[free:], strides_of(shape), strict=True)
        if {var for var, _ in place.terms} <= {*loops} and all(n == 1 or a == b for n, a, b in dense):
            return Memory(buffer, tensor.shape, strides, place.constant)
    return stored(block, tensor).memory()
