"""Sums and other reductions: one accumulator, or a row of them where rows are what lies together."""

from collections.abc import Sequence
from copy import copy
from math import inf, nan, prod
from typing import Any, NamedTuple

import torch

from ._contraction import contract
from ._index import Index, Point, ravel, strides_of
from ._kernel import Kernel, NotFlat, over
from ._statement import HALVES, VALUE_TYPES, Access
from ._tensor import Block, Lazy, Map, Memory, Stored, View, cast, constant, fill, literal

LONG = 1024  # numbers whose sum in float32 would not be good enough


class Kind(NamedTuple):
    """How a reduction starts, and how it takes in a value v; NaN wins."""

    start: Any
    step: str
    clause: str = ""  # of OpenMP, where the order does not matter
    compares: bool = False  # so that NaN has to be looked for

    def first(self, dtype: torch.dtype) -> str:
        ends = {"low": -inf, "high": inf}
        if dtype is torch.bool:
            ends = {"low": 0, "high": 1}
        elif not dtype.is_floating_point:
            ends = {"low": torch.iinfo(dtype).min, "high": torch.iinfo(dtype).max}
        return literal(ends.get(self.start, self.start), dtype)


KINDS = {
    "sum": Kind(0, "{a} + {v}", "+:a"),
    "prod": Kind(1, "{a} * {v}", "*:a"),
    "max": Kind("low", "{v} > {a} ? {v} : {a}", compares=True),
    "min": Kind("high", "{v} < {a} ? {v} : {a}", compares=True),
    "any": Kind(0, "{a} | {v}", "|:a"),
    "all": Kind(1, "{a} & {v}", "&:a"),
}


class Reduced(Stored):
    """A tensor reduced over some axes, which are dropped.

    A sum of a sum, whatever views are between them, is one sum; a sum of products may be a contraction.
    """

    def __init__(self, block: Block, source: Lazy, dims: Sequence[int], kind: str) -> None:
        rest = [dim for dim in range(len(source.shape)) if dim not in dims]
        dtype = torch.int64 if kind.startswith("arg") else source.dtype
        super().__init__(block, [source.shape[dim] for dim in rest], dtype, self._fill)
        self.kind = kind
        self.extents = tuple(source.shape[dim] for dim in dims)
        order = [*rest, *dims]

        def place(point: Point, within: Point) -> Point:
            axes = dict(zip(order, (*point, *within), strict=True))
            return tuple(axes[dim] for dim in range(len(order)))

        self.place = place
        self.source = source
        while self._absorb():
            pass

    def _absorb(self) -> bool:
        """Take in the sum or the view that the source is; tell whether it was one."""
        place, source, own = self.place, self.source, len(self.extents)
        if isinstance(source, View):
            remap = source.remap
            self.place = lambda point, within: remap(place(point, within))
            self.source = source.source
            return True
        if isinstance(source, Reduced) and source.kind == self.kind == "sum" and not source.shared:
            inner = source.place
            self.place = lambda point, within: inner(place(point, within[:own]), within[own:])
            self.extents += source.extents
            self.source = source.source
            return True
        return False

    def emit(self) -> Memory:
        source = self.source
        done = None
        is_exact = self.kind == "sum" and self.dtype not in HALVES
        if is_exact and isinstance(source, Map) and source.template == PRODUCT:
            done = contract(
                self.block, source.args, self.place, self.shape, self.extents, self.dtype, self.target
            )
        return done or super().emit()

    def _fill(self, out: Memory) -> None:
        is_long = self.kind in ("sum", "prod") and prod(self.extents) > LONG
        if self.dtype in HALVES or (self.dtype is torch.float32 and is_long):
            wide = copy(self)  # in more precision, rounded at the end
            wide.dtype = _WIDER[self.dtype]
            wide.source = _widened(self.source, wide.dtype)
            wide.target, wide.write = None, wide._fill
            fill(self.block, out, cast(wide, self.dtype))
        elif self.kind.startswith("arg"):
            self._find(out)
        elif not prod(self.extents):
            fill(self.block, out, constant(KINDS[self.kind].start, self.shape, self.dtype))
        elif self._rows_lie_together():
            self._by_rows(out)
        else:
            self._one_by_one(out)

    def _rows_lie_together(self) -> bool:
        """Tell whether steps along the result's last axis are shorter than those along the reduced axes."""
        wide = [extent for extent in self.shape if extent != 1]
        if not wide or wide[-1] < 4:
            return False
        kernel, _, _, depth = self._nest()
        if depth == len(kernel.loops):
            return True
        rows, column = kernel.loops[depth - 1], kernel.loops[-1]
        score = {}  # reads of neighbours less reads that are far from each other
        for var in (rows, column):
            strides = [access.place.factor(var) for access in kernel.accesses if access.place]
            score[var] = sum(stride == 1 for stride in strides) - sum(stride > 1 for stride in strides)
        return score[rows] > score[column]

    def _nest(
        self, flat_out: bool = False, flat_in: bool = False, columns: int = 0
    ) -> tuple[Kernel, Point, str, int]:
        """Begin a kernel: an element of the result, a value in its sum, and the depth of the accumulator.

        The last loops of the result, `columns` in number, go inside those over the reduced axes.
        """
        outer, point = over(self.shape, flat_out, "i")
        inner, self.reduced_point = over(self.extents, flat_in, "k")
        depth = len(outer) - columns
        kernel = Kernel([*outer[:depth], *inner, *outer[depth:]], flat_out or flat_in)
        kernel.before[depth].append("")  # the place of the accumulator, before all that needs it
        return kernel, point, self.source.at(kernel, self.place(point, self.reduced_point)), depth

    def _one_by_one(self, out: Memory) -> None:
        kind, c_type = KINDS[self.kind], VALUE_TYPES[self.dtype]
        for flat in ((True, True), (False, True), (False, False)):
            try:
                kernel, point, value, depth = self._nest(*flat)
                kernel.store(out.buffer, out.place(point), "a", depth=depth)
            except NotFlat:
                continue
            kernel.before[depth][0] = f"{c_type} a = {kind.first(self.dtype)};"
            kernel.before[-1].append(f"a = {kind.step.format(a='a', v=value)};")
            if kind.compares and self.dtype.is_floating_point:
                # Beside the comparison: in one expression it becomes a branch.
                kernel.before[depth][0] += " int nan = 0;"
                kernel.before[-1].append(f"nan |= {value} != {value};")
                kernel.after[depth].insert(0, f"if (nan) a = {literal(nan, self.dtype)};")
            is_parallel = bool(kind.clause) and depth < len(kernel.loops)
            return self.block.add(kernel.code(is_parallel, kind.clause))

    def _by_rows(self, out: Memory) -> None:
        """Accumulate rows: in registers if they are short, else where the result is to be."""
        kind, c_type = KINDS[self.kind], VALUE_TYPES[self.dtype]
        kernel, point, value, depth = self._nest(columns=1)
        column, place = kernel.loops[-1], out.place(point)
        each = f"for (int64_t {column.name} = 0; {column.name} < {column.extent}; {column.name}++)"
        a = f"a[{column.name}]"
        if column.extent <= _SHORT_ROW:
            home = f"{c_type} a[{column.extent}];"
            kernel.after[depth].append(each)
            kernel.store(out.buffer, place, a, depth=depth)
        else:
            start = kernel.place(place + Index(0, ((column, -1),)))
            home = f"{c_type} *restrict a = {out.buffer.name} + {start};"
            kernel.accesses.append(Access(out.buffer, writes=True))
        kernel.before[depth][0] = f"{home}\n{each} {a} = {kind.first(self.dtype)};"
        step = kind.step.format(a=a, v=value)
        if kind.compares and self.dtype.is_floating_point:
            step = f"{value} != {value} ? {value} : {step}"
        kernel.before[-1].append(f"{a} = {step};")
        self.block.add(kernel.code())

    def _find(self, out: Memory) -> None:
        """Find where the first largest or smallest value is. NaN is both."""
        kernel, point, v, depth = self._nest()
        rank = kernel.place(ravel(self.reduced_point, strides_of(self.extents)))
        better = f"{v} {'>' if self.kind == 'argmax' else '<'} best || ({v} != {v} && best == best)"
        kernel.before[depth][0] = f"{VALUE_TYPES[self.source.dtype]} best = 0; int64_t at = -1;"
        kernel.before[-1].append(f"if (at < 0 || {better}) {{ best = {v}; at = {rank}; }}")
        kernel.store(out.buffer, out.place(point), "at", depth=depth)
        self.block.add(kernel.code(parallel=False))


_SHORT_ROW = 128
PRODUCT = "{0} * {1}"
_WIDER = {torch.float32: torch.float64} | dict.fromkeys(HALVES, torch.float32)


def _widened(tensor: Lazy, dtype: torch.dtype) -> Lazy:
    """Convert what is reduced: for 16 bits, the factors of a product, as torch does in `mm`."""
    if isinstance(tensor, View):
        return View(_widened(tensor.source, dtype), tensor.shape, tensor.remap)
    if isinstance(tensor, Map) and tensor.template == PRODUCT and tensor.dtype in HALVES:
        return Map(PRODUCT, [_widened(factor, dtype) for factor in tensor.args], dtype)
    return cast(tensor, dtype)


def cumulated(block: Block, source: Lazy, dim: int, name: str) -> Lazy:
    """Reduce all values up to each, along one axis. For `max` and `min`, find where the last best is."""
    finds, dtype = name in ("max", "min"), source.dtype
    wide = _WIDER.get(dtype, torch.float64 if dtype.is_floating_point else torch.int64)  # as torch does

    def write(out: Memory) -> None:
        loops, point = over(out.shape, flat=False)
        last = [var for var in loops if out.shape[dim] != 1 and point[dim].factor(var)]
        kernel = Kernel([*[var for var in loops if var not in last], *last])
        start = kernel.before[len(loops) - len(last)]
        v = source.at(kernel, point)
        if finds:
            start.append(f"{VALUE_TYPES[dtype]} best = 0; int64_t a = -1;")
            better = f"a < 0 || {v} != {v} || {v} {'>=' if name == 'max' else '<='} best"
            kernel.before[-1].append(f"if ({better}) {{ best = {v}; a = {kernel.place(point[dim])}; }}")
        else:
            start.append(f"{VALUE_TYPES[wide]} a = {KINDS[name].first(wide)};")
            kernel.before[-1].append(f"a = {KINDS[name].step.format(a='a', v=v)};")
        kernel.store(out.buffer, out.place(point), f"({VALUE_TYPES[out.dtype]})a")
        block.add(kernel.code(parallel=False))

    return Stored(block, source.shape, torch.int64 if finds else dtype, write)
