"""Sums of products of two tensors: tiles of the result that stay in registers, a whole vector a column.

    out[u, v] = Σ_k a[u, k] · b[k, v]          for each value of the other axes of the result

Factor a is read number by number, and factor b vector by vector. If the columns of b do not lie side by
side, b is copied so. In a tile, each vector of b meets several rows u, and each number of a meets several
vectors.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import NamedTuple

import torch

from ._index import Index, Part, Point, Var, ravel, strides_of
from ._kernel import Kernel, counters_of
from ._statement import Access, Buffer, Code, loop
from ._tensor import Block, Formula, Lazy, Memory, address, behind, fill

_WORTH_IT = 256  # multiplications
_NARROWEST = 4  # columns
_MOST_ACROSS = 4  # vectors of a tile, side by side
_PART = 256  # products that an accumulator takes in before it is added to the sum of such parts


@dataclass
class Factor:
    """One of the two tensors: its memory, and an index there in the counters of the loops."""

    buffer: Buffer
    index: Index

    def at(self, *without: Var) -> str:
        """Write the index in C, with 0 for the counters that are left out."""
        terms = [(var, factor) for var, factor in self.index.terms if isinstance(var, Var)]
        summands = [f"{factor} * {var.name}" for var, factor in terms if var not in without]
        return " + ".join([*summands, str(self.index.constant)])


class Axes(NamedTuple):
    """The loops of a contraction."""

    outer: list[Var]
    row: Var
    column: Var
    sums: list[Var]


def contract(
    block: Block,
    factors: Sequence[Lazy],
    at: Callable[[Point, Point], Point],
    shape: Sequence[int],
    extents: Sequence[int],
    dtype: torch.dtype,
    target: Memory | None = None,
) -> Memory | None:
    """Write the contraction, or decline: it is small, or has no axis to take vectors along.

    Args:
        target: where the result goes, if it lies there as the contraction writes it.
    """
    if not dtype.is_floating_point or prod(shape) * prod(extents) < _WORTH_IT:
        return None
    counters = [Var(f"i{n}", extent) for n, extent in enumerate(shape)]
    sums = [Var(f"k{n}", extent) for n, extent in enumerate(extents)]
    point = at(counters_of(counters), counters_of(sums))
    axes, sums = ([var for var in group if var.extent != 1] for group in (counters, sums))
    chosen = _roles(axes, [_layout(factor, point) for factor in factors])
    if chosen is None or not sums:
        return None
    swapped, column = chosen
    a, b = (Factor(*address(block, factor, point)) for factor in factors[:: -1 if swapped else 1])
    lanes = block.tiles.width // dtype.itemsize
    if b.index.factor(column) != 1 or column.extent % lanes:
        b = _packed(block, b, column, lanes)
    rows = [var for var in axes if a.index.factor(var) and not b.index.factor(var)]
    row = max(rows, key=lambda var: var.extent, default=Var("u", 1))
    outer = [var for var in axes if var not in (row, column)]
    sizes = [*[var.extent for var in (*outer, row)], _whole(column.extent, lanes)]
    strides = dict(zip((*outer, row, column), strides_of(sizes), strict=True))
    steps = [strides.get(var, 0) for var in counters]
    out = target
    if out is None or sizes[-1] != column.extent or _differ(steps, out.strides, shape):
        out = Memory(block.scratch(sizes, dtype).buffer, shape, steps)
    place = Index(out.start, tuple(strides.items()))
    _write(block, a, b, Factor(out.buffer, place), Axes(outer, row, column, sums))
    return out


def _differ(strides: Sequence[int], others: Sequence[int], shape: Sequence[int]) -> bool:
    return any(a != b and extent != 1 for a, b, extent in zip(strides, others, shape, strict=True))


def _whole(extent: int, lanes: int) -> int:
    return -(-extent // lanes) * lanes


Layout = tuple[set[Var], Var | None]


def _layout(tensor: Lazy, point: Point) -> Layout | None:
    """Find the counters of a factor, and the one along which it lies densely; None if it is not linear."""
    tensor, point = behind(tensor, point)
    terms = [term for index in point for term in index.terms]
    used = {var for var, _ in terms if isinstance(var, Var)}
    if any(isinstance(var, Part) for var, _ in terms):
        return None
    strides = tensor.strides if isinstance(tensor, Memory) else strides_of(tensor.shape)
    return used, next((var for var in used if ravel(point, strides).factor(var) == 1), None)


def _roles(axes: Sequence[Var], layouts: Sequence[Layout | None]) -> tuple[bool, Var] | None:
    """Choose whether the factors swap, and which axis is the columns.

    The best axis is one that b lies along already. The next best is the last one of the result, because
    others read the result along it.
    """
    choices = []
    for swapped in (False, True):
        a, b = layouts[:: -1 if swapped else 1]
        if a is None or b is None:
            return None
        for axis in axes:
            if axis in b[0] and axis not in a[0] and axis.extent >= _NARROWEST:
                copied = 0 if axis == b[1] else prod(var.extent for var in b[0])
                choices.append(((bool(copied), axis != axes[-1], copied, -axis.extent), swapped, axis))
    return min(choices, key=lambda choice: choice[0])[1:] if choices else None


def _packed(block: Block, b: Factor, column: Var, lanes: int) -> Factor:
    """Copy a factor so that its columns lie side by side, each row filled up to whole vectors.

    A tensor that several contractions read in the same way is copied once.
    """
    used = [var for var, _ in b.index.terms if isinstance(var, Var) and var != column]
    dense = next((var for var in used if b.index.factor(var) == 1), None)
    order = [*[var for var in used if var != dense], *([dense] if dense else []), column]
    shape = [var.extent for var in order]
    key = b.buffer, b.index.constant, *[(var.extent, b.index.factor(var)) for var in order]
    if key in block.packed:
        return Factor(block.packed[key].buffer, block.packed[key].place(counters_of(order)))
    packed = block.packed[key] = block.scratch([*shape[:-1], _whole(column.extent, lanes)], b.buffer.dtype)
    copy = Factor(packed.buffer, packed.place(counters_of(order)))
    if dense and dense.extent >= lanes:
        _transpose(block, b, copy, order, lanes)
        return copy

    def at(kernel: Kernel, point: Point) -> str:
        return kernel.read(b.buffer, b.index.where(dict(zip(order, point, strict=True))))

    fill(block, packed.part(len(shape) - 1, 0, 1, column.extent), Formula(shape, b.buffer.dtype, at))
    return copy


def _transpose(block: Block, b: Factor, copy: Factor, order: Sequence[Var], lanes: int) -> None:
    """Copy b, which lies densely along the last axis but one, so that it does along the last."""
    *others, dense, column = order
    start, to, scalar = b.at(dense, column), copy.at(dense, column), b.buffer.c_type
    if (function := "\n".join(_transposition(scalar, lanes))) not in block.functions:
        block.functions.append(function)
    call = (
        f"transpose_{scalar}({b.buffer.name} + {start}, {b.index.factor(column)}, "
        f"{copy.buffer.name} + {to}, {copy.index.factor(dense)}, {column.extent}, {dense.extent});"
    )
    text = [*[loop(var.name, var.extent) for var in others], call, *["}"] * len(others)]
    block.statements.append(Code(text, [Access(b.buffer), Access(copy.buffer, writes=True)]))


def _transposition(scalar: str, lanes: int) -> list[str]:
    """Write the function that transposes rows x columns numbers, square by square.

    A square of L x L numbers is L vectors. For d = 1, 2, 4, ... L / 2, rows that are d apart swap numbers
    that are d apart. After the last swap, each row is what was a column. Rows of the result are filled up
    to whole vectors.
    """
    kind, integer = f"vector_{scalar}", "int32_t" if scalar == "float" else "int64_t"
    swaps = []
    for d in (2**power for power in range(lanes.bit_length() - 1)):
        low = [lanes + q - d if q & d else q for q in range(lanes)]
        high = [lanes + q if q & d else q + d for q in range(lanes)]
        first, second = (
            f"SHUFFLE({integer}, r[p], r[p + {d}], {', '.join(map(str, mask))})" for mask in (low, high)
        )
        swaps += [
            f"for (int p = 0; p < {lanes}; p++) if (!(p & {d})) {{",
            f"const {kind} low = {first}; r[p + {d}] = {second}; r[p] = low; }}",
        ]
    return [
        f"static __attribute__((noinline)) void transpose_{scalar}(const {scalar} *restrict from, "
        f"int64_t step, {scalar} *restrict to, int64_t over, int64_t rows, int64_t columns) {{",
        f"for (int64_t i = 0; i < rows; i += {lanes})",
        f"for (int64_t j = 0; j + {lanes} <= columns; j += {lanes}) {{",
        f"{kind} r[{lanes}];",
        f"for (int p = 0; p < {lanes}; p++)",
        f"r[p] = i + p < rows ? *(const {kind} *)(from + (i + p) * step + j) : ({kind}){{0}};",
        *swaps,
        f"for (int p = 0; p < {lanes}; p++) *({kind} *)(to + (j + p) * over + i) = r[p];",
        "}",
        "for (int64_t i = 0; i < rows; i++)",
        f"for (int64_t j = columns - columns % {lanes}; j < columns; j++)",
        "to[j * over + i] = from[i * step + j];",
        "}",
    ]


def _write(block: Block, a: Factor, b: Factor, out: Factor, axes: Axes) -> None:
    """Write a function of the three places in memory, with loops over its tiles, and the call of it."""
    width, most = block.tiles
    lanes, scalar = width // out.buffer.dtype.itemsize, out.buffer.c_type
    vectors = -(-axes.column.extent // lanes)
    across = max(n for n in range(1, min(vectors, _MOST_ACROSS) + 1) if not vectors % n or n == 1)
    name = f"contract_{len(block.functions)}"
    block.functions += [
        f"static TILES void {name}(const {scalar} *restrict a, const {scalar} *restrict b, "
        f"{scalar} *restrict out) {{",
        "#pragma clang fp contract(fast)",
        *[loop(var.name, var.extent) for var in axes.outer],
    ]
    for first, last, rows in _blocks(axes.row.extent, _even(axes.row.extent, most // across)):
        block.functions += [
            f"for (int64_t {axes.row.name} = {first}; {axes.row.name} < {last}; {axes.row.name} += {rows})",
            f"for (int64_t {axes.column.name} = 0; {axes.column.name} < {vectors * lanes}; "
            f"{axes.column.name} += {across * lanes}) {{",
            *_tile(a, b, out, axes, [*product(range(rows), range(across))], lanes),
            "}",
        ]
    block.functions += [*["}"] * len(axes.outer), "}"]
    flop = 2 * prod(var.extent for var in [*axes.outer, axes.row, axes.column, *axes.sums])
    accesses = [Access(a.buffer), Access(b.buffer), Access(out.buffer, writes=True)]
    call = f"{name}({a.buffer.name}, {b.buffer.name}, {out.buffer.name});"
    block.statements.append(Code([call], accesses, flop / 16, flop))


def _tile(
    a: Factor, b: Factor, out: Factor, axes: Axes, grid: Sequence[tuple[int, int]], lanes: int
) -> list[str]:
    """Write one tile: c[i][j] = Σ a[i] · b[j], in parts if the sum is long."""
    scalar, down = out.buffer.c_type, out.index.factor(axes.row)
    kind = f"vector_{scalar}"
    rows, columns = (sorted({*each}) for each in zip(*grid, strict=True))
    in_parts = prod(var.extent for var in axes.sums) > 2 * _PART
    total = "s" if in_parts else "c"
    parts = [f"s{i}_{j} += c{i}_{j}; c{i}_{j} = ({kind}){{0}};" for i, j in grid] if in_parts else []
    return [
        *[f"{kind} {each}{i}_{j} = {{0}};" for each in sorted({"c", total}) for i, j in grid],
        "int count = 0;" if in_parts else "",
        *[loop(var.name, var.extent) for var in axes.sums],
        *[f"const {kind} b{j} = *(const {kind} *)(b + {b.at()} + {j * lanes});" for j in columns],
        *[f"const {scalar} a{i} = a[{a.at()} + {i * a.index.factor(axes.row)}];" for i in rows],
        *[f"c{i}_{j} += a{i} * b{j};" for i, j in grid],
        *([f"if (++count == {_PART}) {{ count = 0;", *parts, "}"] if in_parts else []),
        *["}"] * len(axes.sums),
        *parts,
        *[f"*({kind} *)(out + {out.at()} + {i * down + j * lanes}) = {total}{i}_{j};" for i, j in grid],
    ]


def _even(total: int, most: int) -> int:
    """Choose how many rows a tile has: at most so many, and few left over."""
    largest = min(total, most)
    return max(range(-(-largest // 2), largest + 1), key=lambda rows: (-(total % rows), rows))


def _blocks(total: int, size: int) -> list[tuple[int, int, int]]:
    """Divide an axis into tiles as (first, last, size): those of full size, and one of the rest."""
    whole = total - total % size
    return [(0, whole, size), *([(whole, total, total - whole)] if total > whole else [])]
