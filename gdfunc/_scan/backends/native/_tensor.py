"""Tensors as functions from a point to a value, and the moment when one gets memory of its own.

A tensor that is used once, or that is cheap, is never stored: its expression is written where it is used.
Those that are stored write a kernel, the first time that somebody asks for their memory.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from math import isfinite, isnan, prod
from typing import Any

import torch

from ...._errors import BackendError
from ._index import Index, Point, ravel, strides_of, unravel
from ._kernel import C_TYPES, Kernel, NotFlat, over

Shape = tuple[int, ...]


class Unsupported(BackendError):
    """An operation that the native backend does not write."""

    def __init__(self, what: str) -> None:
        super().__init__(f"backend='native' does not cover {what}; use backend='inductor' or 'eager'")


@dataclass
class Block:
    """The statements of a loop's step, and the memory that they need beside their inputs and results."""

    lines: list[str] = field(default_factory=list)
    fields: dict[str, tuple[str, int]] = field(default_factory=dict)  # of the struct w: type and size
    functions: list[str] = field(default_factory=list)
    names: Iterator[int] = field(default_factory=count)
    work: float = 0  # rounds of all loops
    nested: float = 0  # rounds of all that loops within the step go through

    def scratch(self, shape: Sequence[int], dtype: torch.dtype) -> "Memory":
        """Memory for a tensor, contiguous and aligned."""
        name = f"s{next(self.names)}"
        self.fields[name] = C_TYPES[dtype], max(prod(shape), 1)
        return Memory(f"w->{name}", tuple(shape), dtype)

    def add(self, kernel: Kernel, **how: Any) -> None:
        if any(not var.extent for var in kernel.loops):
            return  # what it reads may not exist
        self.lines += kernel.lines(**how)
        self.work += prod(var.extent for var in kernel.loops)


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
    """A tensor of equal elements."""
    text = literal(number, dtype)
    return Formula(shape, dtype, lambda kernel, point: text, 0)


def literal(number: Any, dtype: torch.dtype) -> str:
    """Write a number as the constant that torch would make of it."""
    if not dtype.is_floating_point:
        whole = int(bool(number)) if dtype is torch.bool else int(number)
        return "INT64_MIN" if whole == -(2**63) else f"(({C_TYPES[dtype]}){whole}LL)"
    number = float(number)
    if isnan(number):
        text = '__builtin_nan("")'
    elif isfinite(number):
        text = number.hex() + ("f" if dtype is torch.float32 else "")
    else:
        text = "__builtin_inf()" if number > 0 else "-__builtin_inf()"
    return f"(({C_TYPES[dtype]}){text})"


class Map(Lazy):
    """An expression of tensors of the same shape, element by element."""

    def __init__(self, template: str, args: Sequence[Lazy], dtype: torch.dtype, cost: int = 1) -> None:
        self.template, self.args, self.dtype = template, tuple(args), dtype
        self.shape = args[0].shape
        self.cost = cost + sum(arg.cost for arg in args)

    def at(self, kernel: Kernel, point: Point) -> str:
        values = [arg.at(kernel, point) for arg in self.args]
        suffix = "f" if self.dtype is torch.float32 else ""
        c_type = C_TYPES[self.dtype]
        return kernel.let(c_type, self.template.format(*values, f=suffix, t=c_type), values)


def cast(tensor: Lazy, dtype: torch.dtype) -> Lazy:
    """The tensor with its elements converted."""
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


def expand(tensor: Lazy, shape: Sequence[int]) -> Lazy:
    """Repeat along axes of extent 1 and new ones at the left."""
    if tensor.shape == tuple(shape):
        return tensor
    added, old = len(shape) - len(tensor.shape), tensor.shape

    def remap(point: Point) -> Point:
        return tuple(
            Index() if extent == 1 else index for index, extent in zip(point[added:], old, strict=True)
        )

    return View(tensor, shape, remap)


def reshape(tensor: Lazy, shape: Sequence[int]) -> Lazy:
    """The same elements in the same order."""
    if tensor.shape == tuple(shape):
        return tensor
    old, strides = tensor.shape, strides_of(shape)
    return View(tensor, shape, lambda point: unravel(ravel(point, strides), old))


class Memory(Lazy):
    """A tensor that lies in memory."""

    def __init__(
        self,
        pointer: str,
        shape: Sequence[int],
        dtype: torch.dtype,
        strides: Sequence[int] | None = None,
        start: int = 0,
    ) -> None:
        self.pointer, self.shape, self.dtype, self.start = pointer, tuple(shape), dtype, start
        self.strides = strides_of(shape) if strides is None else tuple(strides)

    def place(self, point: Point) -> Index:
        return ravel(point, self.strides) + self.start

    def at(self, kernel: Kernel, point: Point) -> str:
        return kernel.read(self.pointer, self.place(point), self.dtype)

    def part(self, dim: int, start: int, step: int, extent: int) -> "Memory":
        """Some of its rows."""
        shape, strides = list(self.shape), list(self.strides)
        start = self.start + start * strides[dim]
        shape[dim], strides[dim] = extent, strides[dim] * step
        return Memory(self.pointer, shape, self.dtype, strides, start)


class Stored(Lazy):
    """A tensor that gets memory when it is first asked for; its kernels are in its own block."""

    def __init__(self, block: Block, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.block, self.shape, self.dtype = block, tuple(shape), dtype
        self.target: Memory | None = None  # where to, if it is a result
        self._memory: Memory | None = None

    def memory(self) -> Memory:
        if self._memory is None:
            self._memory = self.emit()
        return self._memory

    @abstractmethod
    def emit(self) -> Memory:
        """Write the kernels that fill its memory."""

    def out(self) -> Memory:
        return self.target or self.block.scratch(self.shape, self.dtype)

    def at(self, kernel: Kernel, point: Point) -> str:
        return self.memory().at(kernel, point)


class Kept(Stored):
    """Another tensor, stored."""

    def __init__(self, block: Block, source: Lazy) -> None:
        super().__init__(block, source.shape, source.dtype)
        self.source = source

    def emit(self) -> Memory:
        out = self.out()
        fill(self.block, out, self.source)
        return out


def fill(block: Block, target: Memory, source: Lazy) -> None:
    """Write a tensor into memory: in one loop if all that is read lies in a row as well."""
    for flat in (True, False):
        loops, point = over(target.shape, flat)
        kernel = Kernel(loops, flat)
        try:
            value = source.at(kernel, point)
            kernel.store(target.pointer, target.place(point), value)
        except NotFlat:
            continue
        return block.add(kernel)


class Written(Stored):
    """A tensor that is put together from parts: each part is (dim, start, step, tensor), or a whole."""

    def __init__(
        self,
        block: Block,
        shape: Sequence[int],
        parts: Sequence[tuple[int, int, int, Lazy]],
        base: Lazy | None,
    ) -> None:
        super().__init__(block, shape, parts[0][-1].dtype)
        self.parts, self.base = parts, base

    def emit(self) -> Memory:
        out = self.out()
        if self.base is not None:
            fill(self.block, out, self.base)
        for dim, start, step, tensor in self.parts:
            if prod(tensor.shape):
                fill(self.block, out.part(dim, start, step, tensor.shape[dim]), tensor)
        return out


class Scattered(Stored):
    """A tensor of which some elements are replaced, or added to, where an index says."""

    def __init__(
        self, block: Block, base: Lazy, source: Lazy, where: Callable[[Kernel, Point], Point], adds: bool
    ) -> None:
        super().__init__(block, base.shape, base.dtype)
        self.base, self.source, self.where, self.adds = base, source, where, adds

    def emit(self) -> Memory:
        out = self.out()
        fill(self.block, out, self.base)
        loops, point = over(self.source.shape, flat=False)
        kernel = Kernel(loops)
        value = self.source.at(kernel, point)
        place = out.place(self.where(kernel, point))
        kernel.store(out.pointer, place, value, "+=" if self.adds else "=")
        self.block.add(kernel, parallel=False)
        return out


def address(block: Block, tensor: Lazy, point: Point) -> tuple[Memory, Index]:
    """Where in memory the element at a point is; a tensor that has none is stored."""
    while isinstance(tensor, View):
        point, tensor = tensor.remap(point), tensor.source
    if isinstance(tensor, Memory):
        memory = tensor
    elif isinstance(tensor, Stored):
        memory = tensor.memory()
    else:
        memory = Kept(block, tensor).memory()
    return memory, memory.place(point)
