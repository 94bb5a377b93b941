"""One nest of loops: each value is computed where all that it depends on is known, and only once."""

import re
from collections.abc import Iterable, Sequence
from math import prod

import torch

from ._index import Index, Part, Point, Var, unravel
from ._statement import HALVES, VALUE_TYPES, Access, Buffer, Code, loop


class NotFlat(Exception):
    """The elements do not lie in a row: a single loop would have to divide for each."""


class Kernel:
    """A perfect nest of loops. A value is the name of a C variable, or a literal."""

    def __init__(self, loops: Iterable[Var], flat: bool = False) -> None:
        self.loops = list(loops)
        self.flat = flat  # refuse to divide
        self.before: list[list[str]] = [[] for _ in range(len(self.loops) + 1)]
        self.after: list[list[str]] = [[] for _ in range(len(self.loops) + 1)]
        self.accesses: list[Access] = []
        self._depth = {var.name: at + 1 for at, var in enumerate(self.loops)}
        self._names: dict[tuple[str, str], str] = {}
        self._checks_in_innermost = False

    def let(self, c_type: str, text: str) -> str:
        """Name the value of an expression."""
        key = c_type, text
        if key not in self._names:
            depth = max(self._depth.get(word, 0) for word in re.findall(r"\w+", text))
            name = self._names[key] = f"v{len(self._names)}"
            self._depth[name] = depth
            self.before[depth].append(f"const {c_type} {name} = {text};")
        return self._names[key]

    def place(self, index: Index) -> str:
        """Write an index."""
        summands = []
        for var, factor in index.terms:
            name = self._part(var) if isinstance(var, Part) else var.name
            summands.append(name if factor == 1 else f"{factor} * {name}")
        if index.constant or not summands:
            summands.append(str(index.constant))
        return " + ".join(summands)

    def _part(self, part: Part) -> str:
        if self.flat and any(var in self.loops for var, _ in part.of.terms):
            raise NotFlat
        operator = "/" if part.is_quotient else "%"
        return self.let("int64_t", f"({self.place(part.of)}) {operator} {part.divisor}")

    def read(self, buffer: Buffer, index: Index) -> str:
        """Read an element. Each byte of a bool but 0 is true, as in torch."""
        self.accesses.append(Access(buffer, index))
        start = buffer.name
        picked = tuple(filter(self._is_picked, index.terms))
        if picked:  # because in a long function, gcc gathers such a row element by element
            start = self.let(f"{buffer.c_type} *", f"{start} + {self.place(Index(0, picked))}")
            index = Index(index.constant, tuple(term for term in index.terms if term not in picked))
        text = f"{start}[{self.place(index)}]" + " != 0" * (buffer.dtype is torch.bool)
        if buffer.dtype in HALVES:
            text = f"from_{buffer.c_type}({text})"
        return self.let(VALUE_TYPES[buffer.dtype], text)

    def _is_picked(self, term: tuple[Var | Part, int]) -> bool:
        """Tell whether a term of an index is a number that was read before the innermost loop."""
        var, _ = term
        if isinstance(var, Part) or var in self.loops:
            return False
        return self._depth.get(var.name, 0) < len(self.loops)

    def store(
        self, buffer: Buffer, index: Index, value: str, operator: str = "=", depth: int | None = None
    ) -> None:
        """Write an element in the innermost loop, or after the loops that are deeper than `depth`."""
        element = f"{buffer.name}[{self.place(index)}]"
        self.accesses.append(Access(buffer, index, writes=True))
        lines = self.before[-1] if depth is None else self.after[depth]
        if buffer.dtype in HALVES:
            old = f"from_{buffer.c_type}({element}) + " if operator == "+=" else ""
            operator, value = "=", f"to_{buffer.c_type}({old}{value})"
        lines.append(f"{element} {operator} {value};")

    def checked(self, value: str, extent: int, wraps: bool) -> Index:
        """Use a value as an index. A bad value sets `bad` to 1, and 0 takes its place."""
        if wraps:
            value = self.let("int64_t", f"{value} + ({value} < 0 ? {extent} : 0)")
        inside = self.let("int64_t", f"(uint64_t){value} < {extent}")
        self._check(inside, f"bad |= !{inside};")
        name = self.let("int64_t", f"{inside} ? {value} : 0")
        return Index(0, ((Var(name, extent), 1),))

    def divisor(self, value: str, c_type: str) -> str:
        """Use a whole number as a divisor. Zero sets `bad` to 2, and 1 takes its place."""
        is_zero = self.let("int64_t", f"{value} == 0")
        self._check(is_zero, f"bad |= 2 * {is_zero};")
        return self.let(c_type, f"{value} + {is_zero}")

    def _check(self, name: str, check: str) -> None:
        depth = self._depth[name]
        if check not in self.before[depth]:
            self.before[depth].append(check)
            self._checks_in_innermost |= 0 < depth == len(self.loops)

    def code(self, parallel: bool = True, reduction: str = "") -> Code:
        """Finish the kernel. If it is parallel, its innermost loop may run in any order."""
        clauses = f" reduction({reduction})" if reduction else ""
        clauses += " reduction(|:bad)" if self._checks_in_innermost else ""
        text = ["{"]
        for at, var in enumerate(self.loops):
            text += self.before[at]
            if parallel and at == len(self.loops) - 1:
                text.append(f"#pragma omp simd{clauses}")
            text.append(loop(var.name, var.extent))
        text += self.before[-1]
        for lines in reversed(self.after[1:]):
            text += [*lines, "}"]
        return Code([*text, *self.after[0], "}"], self.accesses, prod(var.extent for var in self.loops))


def over(shape: Sequence[int], flat: bool, prefix: str = "i") -> tuple[list[Var], Point]:
    """Make loops over a shape, one for each dimension or a single one, and the point at which they are."""
    if flat:
        size = prod(shape)
        loops = [Var(f"{prefix}0", size)] if size != 1 else []
        return loops, unravel(Index(0, tuple((var, 1) for var in loops)), shape)
    counters = [Var(f"{prefix}{at}", extent) for at, extent in enumerate(shape)]
    return [var for var in counters if var.extent != 1], counters_of(counters)


def counters_of(loops: Iterable[Var]) -> Point:
    """Return the point at which loops are."""
    return tuple(Index() if var.extent == 1 else Index(0, ((var, 1),)) for var in loops)
