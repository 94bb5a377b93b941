"""Sums and other reductions: one accumulator, or a row of them where rows are what lies together."""

from collections.abc import Sequence
from copy import copy
from math import inf, nan, prod
from typing import Any, NamedTuple

import torch

from . import _contraction
from ._index import Index, Point, ravel, strides_of
from ._kernel import C_TYPES, Kernel, NotFlat, over
from ._tensor import Block, Formula, Lazy, Map, Memory, Stored, View, cast, fill, literal

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
        kept = [dim for dim in range(len(source.shape)) if dim not in dims]
        super().__init__(block, [source.shape[dim] for dim in kept], source.dtype)
        self.kind = kind
        self.extents = tuple(source.shape[dim] for dim in dims)
        order = [*kept, *dims]

        def place(point: Point, within: Point) -> Point:
            known = dict(zip(order, (*point, *within), strict=True))
            return tuple(known[dim] for dim in range(len(order)))

        self.place = place
        self.source = source
        while self._absorb():
            pass

    def _absorb(self) -> bool:
        """Look through what the source is made of."""
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

    @property
    def _looks_for_nan(self) -> bool:
        return KINDS[self.kind].compares and self.dtype.is_floating_point

    def emit(self) -> Memory:
        source = self.source
        if self.kind == "sum" and isinstance(source, Map) and source.template == PRODUCT:
            done = _contraction.contract(
                self.block, source.args, self.place, self.shape, self.extents, self.dtype
            )
            if done is not None:
                return done
        if self.dtype is torch.float32 and self.kind in ("sum", "prod") and prod(self.extents) > LONG:
            return self._wide()
        out = self.out()
        if not prod(self.extents):
            first = KINDS[self.kind].first(self.dtype)
            fill(self.block, out, Formula(out.shape, out.dtype, lambda kernel, point: first))
        elif self._rows_lie_together():
            self._by_rows(out)
        else:
            self._one_by_one(out)
        return out

    def _wide(self) -> Memory:
        """The same in double precision, rounded at the end."""
        wide = copy(self)
        wide.dtype, wide.target, wide.source = torch.float64, None, cast(self.source, torch.float64)
        out = self.out()
        fill(self.block, out, cast(wide, self.dtype))
        return out

    def _rows_lie_together(self) -> bool:
        """Whether steps along the last axis of the result are shorter than those along what is reduced."""
        wide = [extent for extent in self.shape if extent != 1]
        if not wide or wide[-1] < 4:
            return False
        kernel, _, outer = self._nest(False, False)
        if len(outer) == len(kernel.loops):
            return True
        rows, column = outer[-1], kernel.loops[-1]
        near = {row: sum(index.factor(row) == 1 for index in kernel.accesses) for row in (rows, column)}
        far = {row: sum(index.factor(row) > 1 for index in kernel.accesses) for row in (rows, column)}
        return near[rows] - far[rows] > near[column] - far[column]

    def _nest(self, flat_out: bool, flat_in: bool) -> tuple[Kernel, tuple[Point, str], list]:
        outer, point = over(self.shape, flat_out, "i")
        inner, within = over(self.extents, flat_in, "k")
        kernel = Kernel([*outer, *inner], flat_out or flat_in)
        kernel.before[len(outer)].append("")  # the accumulator's place, before all that needs it
        value = self.source.at(kernel, self.place(point, within))
        return kernel, (point, value), outer

    def _one_by_one(self, out: Memory) -> None:
        kind, c_type = KINDS[self.kind], C_TYPES[self.dtype]
        for flat in ((True, True), (False, True), (False, False)):
            try:
                kernel, (point, value), outer = self._nest(*flat)
                place, _ = kernel.place(out.place(point))
            except NotFlat:
                continue
            depth = len(outer)
            kernel.before[depth][0] = f"{c_type} a = {kind.first(self.dtype)};"
            kernel.before[-1].append(f"a = {kind.step.format(a='a', v=value)};")
            if self._looks_for_nan:  # beside the comparison: in one expression it becomes a branch
                kernel.before[depth][0] += " int nan = 0;"
                kernel.before[-1].append(f"nan |= {value} != {value};")
                kernel.after[depth].append(f"if (nan) a = {literal(nan, self.dtype)};")
            kernel.after[depth].append(f"{out.pointer}[{place}] = a;")
            is_sum = bool(kind.clause) and depth < len(kernel.loops)
            return self.block.add(kernel, reduced=kind.clause if is_sum else "", parallel=is_sum)

    def _by_rows(self, out: Memory) -> None:
        """A row of accumulators: in registers if it is short, else where the result is to be."""
        kind, c_type = KINDS[self.kind], C_TYPES[self.dtype]
        outer, point = over(self.shape, flat=False)
        inner, within = over(self.extents, flat=False, prefix="k")
        *rows, column = outer
        kernel = Kernel([*rows, *inner, column])
        start, _ = kernel.place(out.place(point) + Index(0, ((column, -1),)))
        short, at = column.extent <= _SHORT_ROW, len(rows)
        home = (
            f"{c_type} a[{column.extent}];" if short else f"{c_type} *restrict a = {out.pointer} + {start};"
        )
        each = f"for (int64_t {column.name} = 0; {column.name} < {column.extent}; {column.name}++)"
        a = f"a[{column.name}]"
        kernel.before[at] += [home, f"{each} {a} = {kind.first(self.dtype)};"]
        value = self.source.at(kernel, self.place(point, within))
        step = kind.step.format(a=a, v=value)
        if self._looks_for_nan:
            step = f"{value} != {value} ? {value} : {step}"
        kernel.before[-1].append(f"{a} = {step};")
        if short:
            kernel.after[at].append(f"{each} {out.pointer}[{start} + {column.name}] = {a};")
        self.block.add(kernel)


_SHORT_ROW = 128
PRODUCT = "{0} * {1}"


class Extremum(Stored):
    """Where along an axis the first largest or smallest value is; NaN is both."""

    def __init__(self, block: Block, source: Lazy, dims: Sequence[int], is_max: bool) -> None:
        kept = [dim for dim in range(len(source.shape)) if dim not in dims]
        super().__init__(block, [source.shape[dim] for dim in kept], torch.int64)
        self.source, self.kept, self.dims, self.is_max = source, kept, list(dims), is_max

    def emit(self) -> Memory:
        out = self.out()
        extents = [self.source.shape[dim] for dim in self.dims]
        outer, point = over(self.shape, flat=False)
        inner, within = over(extents, flat=False, prefix="k")
        kernel = Kernel([*outer, *inner])
        c_type, depth = C_TYPES[self.source.dtype], len(outer)
        kernel.before[depth].append(f"{c_type} best = 0; int64_t at = -1;")
        known = dict(zip([*self.kept, *self.dims], (*point, *within), strict=True))
        v = self.source.at(kernel, tuple(known[dim] for dim in range(len(known))))
        rank, _ = kernel.place(ravel(within, strides_of(extents)))
        better = f"{v} {'>' if self.is_max else '<'} best || ({v} != {v} && best == best)"
        kernel.before[-1].append(f"if (at < 0 || {better}) {{ best = {v}; at = {rank}; }}")
        place, _ = kernel.place(out.place(point))
        kernel.after[depth].append(f"{out.pointer}[{place}] = at;")
        self.block.add(kernel, parallel=False)
        return out


class Cumulated(Stored):
    """The reductions of all values up to each, along one axis."""

    def __init__(self, block: Block, source: Lazy, dim: int, kind: str) -> None:
        super().__init__(block, source.shape, source.dtype)
        self.source, self.dim, self.kind = source, dim, KINDS[kind]

    def emit(self) -> Memory:
        out = self.out()
        loops, point = over(self.shape, flat=False)
        last = [var for var in loops if self.shape[self.dim] != 1 and point[self.dim].factor(var)]
        kernel = Kernel([*[var for var in loops if var not in last], *last])
        wide = torch.float64 if self.dtype.is_floating_point else torch.int64  # as torch does
        kernel.before[len(loops) - len(last)].append(f"{C_TYPES[wide]} a = {self.kind.first(wide)};")
        value = self.source.at(kernel, point)
        kernel.before[-1].append(f"a = {self.kind.step.format(a='a', v=value)};")
        kernel.store(out.pointer, out.place(point), f"({C_TYPES[self.dtype]})a")
        self.block.add(kernel, parallel=False)
        return out
