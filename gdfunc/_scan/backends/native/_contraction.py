"""Sums of products of two tensors: tiles of the result that stay in registers, a whole vector a column.

    out[u, v] = Σ_k a[u, k] · b[k, v]          for each value of the other axes of the result

One factor is read number by number, the other vector by vector; if its columns do not lie side by side, it
is copied so. In a tile each vector of b meets several rows u, and each number of a several vectors.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

import torch

from ._index import Index, Part, Point, Var, ravel, strides_of
from ._kernel import C_TYPES, Kernel
from ._tensor import Block, Formula, Lazy, Memory, View, address, fill

_WORTH_IT = 256  # multiplications
_NARROWEST = 4  # columns
_VECTORS = {"AVX512": (64, 24), "AVX2": (32, 12)}  # bytes of a vector, accumulators that stay in registers
_MOST_ACROSS = 4  # vectors of a tile, side by side
_PART = 256  # products that one number takes in before it is added to the sum of such parts


def vector() -> tuple[int, int]:
    """The bytes of a vector, and how many accumulators a tile may have."""
    return _VECTORS.get(torch.backends.cpu.get_cpu_capability(), (16, 12))


@dataclass
class Factor:
    """What is multiplied: where in memory, as an index in the counters of the loops."""

    memory: Memory
    index: Index

    def at(self, *without: Var) -> str:
        """Its place in C, where the counters that are left out are 0."""
        terms = [(var, factor) for var, factor in self.index.terms if isinstance(var, Var)]
        summands = [f"{factor} * {var.name}" for var, factor in terms if var not in without]
        return " + ".join([*summands, str(self.index.constant)])


def contract(
    block: Block,
    factors: Sequence[Lazy],
    place: Callable[[Point, Point], Point],
    shape: Sequence[int],
    extents: Sequence[int],
    dtype: torch.dtype,
) -> Memory | None:
    """Write the contraction, or decline: it is small, or has no axis to take vectors along."""
    if not dtype.is_floating_point or prod(shape) * prod(extents) < _WORTH_IT:
        return None
    axes = [Var(f"i{at}", extent) for at, extent in enumerate(shape)]
    sums = [Var(f"k{at}", extent) for at, extent in enumerate(extents)]
    point = place(_counters(axes), _counters(sums))
    axes, sums = ([var for var in group if var.extent != 1] for group in (axes, sums))
    chosen = _roles(axes, [_layout(factor, point) for factor in factors])
    if chosen is None or not sums:
        return None
    swapped, column = chosen
    a, b = (Factor(*address(block, factor, point)) for factor in factors[:: -1 if swapped else 1])
    lanes = vector()[0] // dtype.itemsize
    if b.index.factor(column) != 1 or column.extent % lanes:
        b = _packed(block, b, column, lanes)
    rows = [var for var in axes if a.index.factor(var) and not b.index.factor(var)]
    row = max(rows, key=lambda var: var.extent, default=Var("u", 1))
    outer = [var for var in axes if var not in (row, column)]
    sizes = [*[var.extent for var in (*outer, row)], _whole(column.extent, lanes)]
    strides = dict(zip((*outer, row, column), strides_of(sizes), strict=True))
    out = block.scratch(sizes, dtype)
    _write(block, a, b, out, strides, outer, row, column, sums)
    by_name = {var.name: stride for var, stride in strides.items()}
    return Memory(out.pointer, shape, dtype, [by_name.get(f"i{at}", 0) for at in range(len(shape))])


def _counters(loops: Iterable[Var]) -> Point:
    return tuple(Index() if var.extent == 1 else Index(0, ((var, 1),)) for var in loops)


def _whole(extent: int, lanes: int) -> int:
    return -(-extent // lanes) * lanes


Layout = tuple[set[Var], Var | None]


def _layout(tensor: Lazy, point: Point) -> Layout | None:
    """Which counters a factor depends on, and along which it lies densely; None if it is not linear."""
    while isinstance(tensor, View):
        point, tensor = tensor.remap(point), tensor.source
    terms = [term for index in point for term in index.terms]
    used = {var for var, _ in terms if isinstance(var, Var)}
    if any(isinstance(var, Part) for var, _ in terms):
        return None
    strides = tensor.strides if isinstance(tensor, Memory) else strides_of(tensor.shape)
    return used, next((var for var in used if ravel(point, strides).factor(var) == 1), None)


def _roles(axes: Sequence[Var], layouts: Sequence[Layout | None]) -> tuple[bool, Var] | None:
    """Whether the factors swap, and which axis is the columns.

    Best is one that b lies along already; next the last one of the result, which is how others read it.
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
    """Copy a factor so that its columns lie side by side, each row filled up to whole vectors."""
    memory, index = b.memory, b.index
    used = [var for var, _ in index.terms if isinstance(var, Var) and var != column]
    dense = next((var for var in used if index.factor(var) == 1), None)
    order = [*[var for var in used if var != dense], *([dense] if dense else []), column]
    shape = [var.extent for var in order]
    packed = block.scratch([*shape[:-1], _whole(column.extent, lanes)], memory.dtype)
    copy = Factor(packed, packed.place(_counters(order)))
    if dense and dense.extent >= lanes:
        c_type, others = C_TYPES[memory.dtype], order[:-2]
        start, to = b.at(dense, column), copy.at(dense, column)
        block.lines += [
            *[_loop(var.name, var.extent) for var in others],
            f"transpose_{c_type}({memory.pointer} + {start}, {index.factor(column)}, "
            f"{packed.pointer} + {to}, {packed.strides[-2]}, {column.extent}, {dense.extent});",
            *["}"] * len(others),
        ]
        return copy

    def at(kernel: Kernel, point: Point) -> str:
        known = dict(zip(order, point, strict=True))
        moved = sum((known[var] * index.factor(var) for var in order), Index(index.constant))
        return kernel.read(memory.pointer, moved, memory.dtype)

    fill(block, packed.part(len(shape) - 1, 0, 1, column.extent), Formula(shape, memory.dtype, at))
    return copy


def _write(
    block: Block,
    a: Factor,
    b: Factor,
    out: Memory,
    strides: dict[Var, int],
    outer: Sequence[Var],
    row: Var,
    column: Var,
    sums: Sequence[Var],
) -> None:
    """Write a function of the three places in memory, with loops over its tiles, and the call of it."""
    width, most = vector()
    lanes, scalar = width // out.dtype.itemsize, C_TYPES[out.dtype]
    kind = f"vector_{scalar}"
    vectors = -(-column.extent // lanes)
    across = max(n for n in range(1, min(vectors, _MOST_ACROSS) + 1) if not vectors % n or n == 1)
    down = _even(row.extent, most // across)
    to = " + ".join(f"{stride} * {var.name}" for var, stride in strides.items())
    tiles: list[str] = []
    u, v = row.name, column.name
    in_parts = prod(var.extent for var in sums) > 2 * _PART
    total = "s" if in_parts else "c"
    for first, last, rows in _blocks(row.extent, down):
        grid = list(product(range(rows), range(across)))
        parts = [f"s{i}_{j} += c{i}_{j}; c{i}_{j} = ({kind}){{0}};" for i, j in grid] if in_parts else []
        tiles += [
            f"for (int64_t {u} = {first}; {u} < {last}; {u} += {rows})",
            f"for (int64_t {v} = 0; {v} < {vectors * lanes}; {v} += {across * lanes}) {{",
            *[f"{kind} c{i}_{j} = {{0}};" for i, j in grid],
            *([f"{kind} s{i}_{j} = {{0}};" for i, j in grid] if in_parts else []),
            "int count = 0;" if in_parts else "",
            *[_loop(var.name, var.extent) for var in sums],
            *[f"const {kind} b{j} = *(const {kind} *)(b + {b.at()} + {j * lanes});" for j in range(across)],
            *[f"const {scalar} a{i} = a[{a.at()} + {i * a.index.factor(row)}];" for i in range(rows)],
            *[f"c{i}_{j} += a{i} * b{j};" for i, j in grid],
            *([f"if (++count == {_PART}) {{ count = 0;", *parts, "}"] if in_parts else []),
            *["}"] * len(sums),
            *parts,
            *[
                f"*({kind} *)(out + {to} + {i * strides[row] + j * lanes}) = {total}{i}_{j};"
                for i, j in grid
            ],
            "}",
        ]
    name = f"contract_{len(block.functions)}"
    block.functions += [
        f"static TILES void {name}(const {scalar} *restrict a, const {scalar} *restrict b,",
        f"                         {scalar} *restrict out) {{",
        "#pragma clang fp contract(fast)",
        *[_loop(var.name, var.extent) for var in outer],
        *tiles,
        *["}"] * len(outer),
        "}",
    ]
    block.lines.append(f"{name}({a.memory.pointer}, {b.memory.pointer}, {out.pointer});")
    block.work += 2 * prod(var.extent for var in [*outer, row, column, *sums]) / 16


def _even(total: int, most: int) -> int:
    """How many rows a tile has: at most so many, and few left over."""
    largest = min(total, most)
    return max(range(-(-largest // 2), largest + 1), key=lambda rows: (-(total % rows), rows))


def _blocks(total: int, size: int) -> list[tuple[int, int, int]]:
    """The tiles along an axis as (first, last, size): those of full size, and one of the rest."""
    whole = total - total % size
    return [(0, whole, size), *([(whole, total, total - whole)] if total > whole else [])]


def _loop(name: str, extent: int) -> str:
    return f"for (int64_t {name} = 0; {name} < {extent}; {name}++) {{"


def transposition(c_type: str, bits: int) -> list[str]:
    """A C function that transposes rows × columns numbers, square by square.

    A square of L × L is L vectors. For d = 1, 2, 4, … L/2, rows that are d apart swap numbers that are d
    apart; after the last, each row is what was a column. What it writes is filled up to whole vectors.
    """
    lanes, kind = vector()[0] * 8 // bits, f"vector_{c_type}"
    row = "*(const {kind} *)(from + (i + {i}) * step + j)"
    square = [
        f"{kind} r{i} = i + {i} < rows ? {row.format(kind=kind, i=i)} : ({kind}){{0}};"
        for i in range(lanes)
    ]
    for distance in (2**n for n in range(lanes.bit_length() - 1)):
        low = [p if not p & distance else lanes + p - distance for p in range(lanes)]
        high = [p + distance if not p & distance else lanes + p for p in range(lanes)]
        for i, j in ((i, i + distance) for i in range(lanes) if not i & distance):
            square += [
                f"{{ const {kind} low = SHUFFLE(int{bits}_t, r{i}, r{j}, {_list(low)});",
                f"r{j} = SHUFFLE(int{bits}_t, r{i}, r{j}, {_list(high)}); r{i} = low; }}",
            ]
    square += [f"*({kind} *)(to + (j + {i}) * over + i) = r{i};" for i in range(lanes)]
    return [
        f"static __attribute__((noinline)) void transpose_{c_type}(",
        f"        const {c_type} *restrict from, int64_t step, {c_type} *restrict to, int64_t over,",
        "        int64_t rows, int64_t columns) {",
        f"for (int64_t i = 0; i < rows; i += {lanes})",
        f"for (int64_t j = 0; j + {lanes} <= columns; j += {lanes}) {{",
        *square,
        "}",
        "for (int64_t i = 0; i < rows; i++)",
        f"for (int64_t j = columns - columns % {lanes}; j < columns; j++)",
        "to[j * over + i] = from[i * step + j];",
        "}",
    ]


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
