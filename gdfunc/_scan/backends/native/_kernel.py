"""One nest of loops: statements are put where what they need is known, and written once."""

from collections.abc import Iterable, Sequence
from math import prod

import torch

from ._index import Index, Part, Point, Var, unravel

C_TYPES = {
    torch.float32: "float",
    torch.float64: "double",
    torch.uint8: "uint8_t",
    torch.int8: "int8_t",
    torch.int16: "int16_t",
    torch.int32: "int32_t",
    torch.int64: "int64_t",
    torch.bool: "uint8_t",
}


class NotFlat(Exception):
    """The elements do not lie in a row: a single loop would have to divide for each."""


class Kernel:
    """A perfect nest of loops. A value is the name of a C variable, or a literal.

    A value is computed in the outermost loop in which all that it depends on is known, and only once.
    """

    def __init__(self, loops: Iterable[Var], flat: bool = False) -> None:
        self.loops = list(loops)
        self.flat = flat  # refuse to divide
        self.before: list[list[str]] = [[] for _ in range(len(self.loops) + 1)]
        self.after: list[list[str]] = [[] for _ in range(len(self.loops) + 1)]
        self.accesses: list[Index] = []
        self._depth = {var.name: at + 1 for at, var in enumerate(self.loops)}
        self._names: dict[tuple[str, str], str] = {}
        self._checks_in_innermost = False

    def depth(self, value: str) -> int:
        """How many loops are around the value."""
        return self._depth.get(value, 0)

    def let(self, c_type: str, text: str, operands: Iterable[str]) -> str:
        """Name the value of an expression."""
        key = c_type, text
        if key not in self._names:
            depth = max(map(self.depth, operands), default=0)
            name = self._names[key] = f"v{len(self._names)}"
            self._depth[name] = depth
            self.before[depth].append(f"const {c_type} {name} = {text};")
        return self._names[key]

    def place(self, index: Index) -> tuple[str, list[str]]:
        """Write an index; tell which variables are in it."""
        summands, names = [], []
        for var, factor in index.terms:
            name = self._part(var) if isinstance(var, Part) else var.name
            names.append(name)
            summands.append(name if factor == 1 else f"{factor} * {name}")
        if index.constant or not summands:
            summands.append(str(index.constant))
        return " + ".join(summands), names

    def _part(self, part: Part) -> str:
        if self.flat and any(var in self.loops for var, _ in part.of.terms):
            raise NotFlat
        text, names = self.place(part.of)
        return self.let("int64_t", f"({text}) {'/' if part.is_quotient else '%'} {part.divisor}", names)

    def read(self, pointer: str, index: Index, dtype: torch.dtype) -> str:
        """Read an element."""
        text, names = self.place(index)
        self.accesses.append(index)
        return self.let(C_TYPES[dtype], f"{pointer}[{text}]", names)

    def store(self, pointer: str, index: Index, value: str, operator: str = "=") -> None:
        """Write an element, in the innermost loop."""
        text, _ = self.place(index)
        self.accesses.append(index)
        self.before[-1].append(f"{pointer}[{text}] {operator} {value};")

    def checked(self, value: str, extent: int, wraps: bool) -> Index:
        """Use a value as an index: a bad one is noted, and 0 stands in for it."""
        if wraps:
            value = self.let("int64_t", f"{value} + ({value} < 0 ? {extent} : 0)", [value])
        inside = self.let("int64_t", f"(uint64_t){value} < {extent}", [value])
        depth = self.depth(inside)
        note = f"bad |= !{inside};"
        if note not in self.before[depth]:
            self.before[depth].append(note)
            self._checks_in_innermost |= 0 < depth == len(self.loops)
        name = self.let("int64_t", f"{inside} ? {value} : 0", [inside, value])
        return Index(0, ((Var(name, extent), 1),))

    def lines(self, reduced: str = "", parallel: bool = True) -> list[str]:
        """Write the nest. `parallel`: the innermost loop's rounds may be taken in any order."""
        clauses = f" reduction({reduced})" if reduced else ""
        clauses += " reduction(|:bad)" if self._checks_in_innermost else ""
        text = ["{"]
        for at, var in enumerate(self.loops):
            text += self.before[at]
            if parallel and at == len(self.loops) - 1:
                text.append(f"#pragma omp simd{clauses}")
            text.append(f"for (int64_t {var.name} = 0; {var.name} < {var.extent}; {var.name}++) {{")
        text += self.before[-1]
        for lines in reversed(self.after[1:]):
            text += [*lines, "}"]
        return [*text, *self.after[0], "}"]


def over(shape: Sequence[int], flat: bool, prefix: str = "i") -> tuple[list[Var], Point]:
    """Loops over a shape, one for each dimension or a single one, and the point at which they are."""
    if flat:
        size = prod(shape)
        loops = [Var(f"{prefix}0", size)] if size != 1 else []
        return loops, unravel(Index(0, tuple((var, 1) for var in loops)), shape)
    loops = [Var(f"{prefix}{at}", extent) for at, extent in enumerate(shape) if extent != 1]
    counters = {var.name: Index(0, ((var, 1),)) for var in loops}
    return loops, tuple(counters.get(f"{prefix}{at}", Index()) for at in range(len(shape)))
