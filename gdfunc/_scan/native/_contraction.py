"""Sums of products of two tensors: tiles of the result that stay in registers, a whole vector a column.

    out[u, v] = Σ_k a[u, k] · b[k, v]          for each value of the other axes of the result

One operand is read number by number, the other vector by vector; if that one's rows do not lie in memory
as they are needed, it is copied so. Each vector of it meets several rows u, each number several vectors.
"""

from collections.abc import Callable, Sequence
from itertools import product
from math import prod

import torch
from torch import dtype as Dtype

from ._index import Index, Part, Point, Var, ravel, strides_of
from ._kernel import C_TYPES, Kernel
from ._tensor import Block, Formula, Lazy, Memory, View, address, fill

_WORTH_IT = 256  # multiplications
_NARROWEST = 4  # columns
_VECTORS = {"AVX512": (64, 24), "AVX2": (32, 12)}  # bytes of a vector, accumulators that stay in registers
_MOST_ACROSS = 4  # vectors of a tile

Place = Callable[[Point, Point], Point]


def vector() -> tuple[int, int]:
    """The bytes of a vector, and how many accumulators a tile may have."""
    return _VECTORS.get(torch.backends.cpu.get_cpu_capability(), (16, 12))


def contract(
    block: Block,
    factors: Sequence[Lazy],
    place: Place,
    shape: Sequence[int],
    extents: Sequence[int],
    dtype: Dtype,
) -> Memory | None:
    """Write the contraction, or decline: it is small, or has no axis to take vectors along."""
    if not dtype.is_floating_point or prod(shape) * prod(extents) < _WORTH_IT:
        return None
    axes = [Var(f"i{at}", extent) for at, extent in enumerate(shape)]
    sums = [Var(f"k{at}", extent) for at, extent in enumerate(extents) if extent != 1]
    within = [Var(f"k{at}", extent) for at, extent in enumerate(extents)]
    point = place(*(tuple(_at(var) for var in group) for group in (axes, within)))
    axes = [var for var in axes if var.extent != 1]
    if not sums:
        return None
    found = [_affine(factor, point) for factor in factors]
    if None in found:
        return None
    chosen = _roles(axes, found)  # type: ignore[arg-type]
    if chosen is None:
        return None
    swap, column = chosen
    a, b = reversed(factors) if swap else factors
    lanes = vector()[0] // dtype.itemsize
    memory_a, index_a = address(block, a, point)
    memory_b, index_b = address(block, b, point)
    if index_b.factor(column) != 1 or column.extent % lanes:
        memory_b, index_b = _packed(block, (memory_b, index_b), column, lanes)
    across = [var for var in axes if index_a.factor(var) and not index_b.factor(var)]
    row = max(across, key=lambda var: var.extent, default=None)
    padded = _padded(column.extent, lanes)
    outer = [var for var in axes if var not in (row, column)]
    order = [*outer, *([row] if row else []), column]
    strides, step = {}, 1
    for var in reversed(order):
        strides[var] = step
        step *= padded if var is column else var.extent
    out = block.scratch([step], dtype)
    _write(block, (memory_a, index_a), (memory_b, index_b), (out, strides), outer, row, column, sums, dtype)
    by_name = {var.name: stride for var, stride in strides.items()}
    return Memory(out.pointer, shape, dtype, [by_name.get(f"i{at}", 0) for at in range(len(shape))])


def _at(var: Var) -> Index:
    return Index() if var.extent == 1 else Index(0, ((var, 1),))


def _padded(extent: int, lanes: int) -> int:
    return -(-extent // lanes) * lanes


def _affine(tensor: Lazy, point: Point) -> tuple[set[Var], Var | None] | None:
    """Which variables a factor depends on, and along which it lies densely; None if it is not linear."""
    while isinstance(tensor, View):
        point, tensor = tensor.remap(point), tensor.source
    if any(isinstance(var, Part) for index in point for var, _ in index.terms):
        return None
    used = {var for index in point for var, _ in index.terms}
    strides = tensor.strides if isinstance(tensor, Memory) else None
    place = ravel(point, strides or strides_of(tensor.shape))
    dense = next((var for var, factor in place.terms if factor == 1), None)
    return used, dense  # type: ignore[return-value]


def _roles(axes: Sequence[Var], found: Sequence[tuple[set[Var], Var | None]]) -> tuple[bool, Var] | None:
    """Which factor is taken by vectors, and along which axis: best one that it lies along
    already, then the last one of the result, which is how others read it."""
    choices = []
    for swap in (False, True):
        (of_a, _), (of_b, dense) = reversed(found) if swap else found
        for axis in axes:
            if axis in of_b and axis not in of_a and axis.extent >= _NARROWEST:
                size = prod(var.extent for var in of_b)
                copied = 0 if axis == dense else size
                choices.append(((bool(copied), axis != axes[-1], copied, -axis.extent), swap, axis))
    return min(choices, key=lambda choice: choice[0])[1:] if choices else None


def _packed(block: Block, b: tuple[Memory, Index], column: Var, lanes: int) -> tuple[Memory, Index]:
    """Copy a factor so that its columns lie side by side, each row filled up to whole vectors."""
    memory, index = b
    stride, dense = index.factor(column), next((var for var, factor in index.terms if factor == 1), None)
    others = [var for var, _ in index.terms if var not in (column, dense)]
    order = [*others, *([dense] if dense else []), column]
    shape = [var.extent for var in order]
    packed = block.scratch([*shape[:-1], _padded(column.extent, lanes)], memory.dtype)
    place = packed.place(tuple(_at(var) for var in order))
    if dense and dense is not column and dense.extent >= lanes <= column.extent:
        c_type = C_TYPES[memory.dtype]
        start = Index(index.constant, tuple(term for term in index.terms if term[0] in others))
        to = Index(0, tuple(term for term in place.terms if term[0] in others))
        block.lines += [_loop(var.name, var.extent) for var in others]  # type: ignore[union-attr]
        block.lines.append(
            f"transpose_{c_type}({memory.pointer} + {_text(start)}, {stride}, {packed.pointer} + {_text(to)}, "
            f"{packed.strides[-2]}, {column.extent}, {dense.extent});"
        )
        block.lines += ["}"] * len(others)
        return packed, place

    def at(kernel: Kernel, point: Point) -> str:
        known = dict(zip(order, point, strict=True))
        moved = sum((known[var] * factor for var, factor in index.terms), Index(index.constant))
        return kernel.read(memory.pointer, moved, memory.dtype)

    rows = Formula(shape, memory.dtype, at)
    fill(block, packed.part(len(shape) - 1, 0, 1, column.extent), rows)
    return packed, place


def transposition(c_type: str, bits: int) -> list[str]:
    """A C function that transposes rows × columns numbers, square by square.

    A square of L × L is L vectors; with a distance d = 1, 2, 4, … L/2, rows that are d apart swap the
    numbers that are: after the last, each row is what was a column.
    """
    lanes = vector()[0] * 8 // bits
    square = [
        f"vector_{c_type} r{i} = *(const vector_{c_type} *)(from + (i + {i}) * step + j);"
        for i in range(lanes)
    ]
    distance = 1
    while distance < lanes:
        for i in range(lanes):
            if not i & distance:
                low = [p if not p & distance else lanes + p - distance for p in range(lanes)]
                high = [p + distance if not p & distance else lanes + p for p in range(lanes)]
                square.append(
                    f"{{ vector_{c_type} low = SHUFFLE(int{bits}_t, r{i}, r{i + distance}, {_list(low)});"
                )
                square.append(
                    f"r{i + distance} = SHUFFLE(int{bits}_t, r{i}, r{i + distance}, {_list(high)});"
                )
                square.append(f"r{i} = low; }}")
        distance *= 2
    square += [f"*(vector_{c_type} *)(to + (j + {i}) * over + i) = r{i};" for i in range(lanes)]
    return [
        f"static __attribute__((noinline)) void transpose_{c_type}(const {c_type} *restrict from, int64_t step,",
        f"        {c_type} *restrict to, int64_t over, int64_t rows, int64_t columns) {{",
        f"for (int64_t i = 0; i + {lanes} <= rows; i += {lanes})",
        f"for (int64_t j = 0; j + {lanes} <= columns; j += {lanes}) {{",
        *square,
        "}",
        f"const int64_t whole_i = rows - rows % {lanes}, whole_j = columns - columns % {lanes};",
        "for (int64_t i = 0; i < rows; i++)",
        "for (int64_t j = i < whole_i ? whole_j : 0; j < columns; j++) to[j * over + i] = from[i * step + j];",
        "}",
    ]


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _write(
    block: Block,
    a: tuple[Memory, Index],
    b: tuple[Memory, Index],
    out: tuple[Memory, dict[Var, int]],
    outer: Sequence[Var],
    row: Var | None,
    column: Var,
    sums: Sequence[Var],
    dtype: Dtype,
) -> None:
    """Write a function of the three places in memory, with a loop over its tiles, and the call of it."""
    width, most = vector()
    lanes = width // dtype.itemsize
    vectors = -(-column.extent // lanes)
    rows = row.extent if row else 1
    across = max(range(1, _MOST_ACROSS + 1), key=lambda n: (n <= vectors and not vectors % n, n))
    across = min(across, vectors)
    down = _even(rows, most // across)
    scalar, packed = C_TYPES[dtype], f"vector_{C_TYPES[dtype]}"
    index_a, index_b, strides = a[1], b[1], out[1]
    text = [_loop(var.name, var.extent) for var in outer]
    tiles = []
    for (first_row, last_row, down_now), (first, last, across_now) in product(
        _blocks(rows, down), _blocks(vectors, across)
    ):
        u, v = row.name if row else "u", "v"
        tiles.append(f"for (int64_t {u} = {first_row}; {u} < {last_row}; {u} += {down_now})")
        tiles.append(f"for (int64_t v = {first * lanes}; v < {last * lanes}; v += {across_now * lanes}) {{")
        grid = list(product(range(down_now), range(across_now)))
        tiles += [f"{packed} c{i}_{j} = {{0}};" for i, j in grid]
        tiles += [_loop(var.name, var.extent) for var in sums]
        of_b = _text(index_b, {column.name: v})
        tiles += [
            f"const {packed} b{j} = *(const {packed} *)(b + {of_b} + {j * lanes});"
            for j in range(across_now)
        ]
        for i in range(down_now):
            of_a = _text(index_a) + (f" + {i * index_a.factor(row)}" if row else "")
            tiles.append(f"const {scalar} a{i} = a[{of_a}];")
        tiles += [f"c{i}_{j} += a{i} * b{j};" for i, j in grid]
        tiles += ["}"] * len(sums)
        of_out = " + ".join(
            f"{strides[var]} * {v if var is column else var.name}"
            for var in [*outer, *([row] if row else []), column]
        )
        for i, j in grid:
            move = i * strides[row] if row else 0
            tiles.append(f"*({packed} *)(out + {of_out} + {move + j * lanes}) = c{i}_{j};")
        tiles.append("}")
    name = f"contract_{len(block.functions)}"
    block.functions += [
        f"static TILES void {name}(const {scalar} *restrict a, const {scalar} *restrict b, {scalar} *restrict out) {{",
        *text,
        *tiles,
        *["}"] * len(outer),
        "}",
    ]
    block.lines.append(f"{name}({a[0].pointer}, {b[0].pointer}, {out[0].pointer});")
    block.work += 2 * prod(var.extent for var in [*outer, *sums, column]) * rows / 16


def _even(total: int, most: int) -> int:
    """How many rows a tile has: at most so many, and few left over."""
    return max(range(1, min(total, most) + 1), key=lambda n: (-(total % n) if n > most // 3 else -total, n))


def _blocks(total: int, size: int) -> list[tuple[int, int, int]]:
    """The tiles along an axis as (first, last, size): those of full size, and one of the rest."""
    whole = total - total % size
    return [(0, whole, size), *([(whole, total, total - whole)] if total > whole else [])]


def _loop(name: str, extent: int) -> str:
    return f"for (int64_t {name} = 0; {name} < {extent}; {name}++) {{"


def _text(index: Index, renamed: dict[str, str] | None = None) -> str:
    terms = [f"{factor} * {(renamed or {}).get(var.name, var.name)}" for var, factor in index.terms]  # type: ignore[union-attr]
    return " + ".join([*terms, str(index.constant)])
