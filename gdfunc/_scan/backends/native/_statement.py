"""The statements of a program: each states what it reads and writes when it is made."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ._index import Index

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


@dataclass(eq=False)
class Buffer:
    """Memory for numbers of one dtype, by its name in C."""

    name: str
    dtype: torch.dtype
    count: int = 1
    parent: "Buffer | None" = None  # the buffer that this one is a part of, or the same as

    @property
    def root(self) -> "Buffer":
        """The buffer that has memory of its own."""
        return self.parent.root if self.parent else self

    @property
    def c_type(self) -> str:
        return C_TYPES[self.dtype]


class Access(NamedTuple):
    """A read or a write of one element for each round of a statement's loops, or of any elements."""

    buffer: Buffer
    place: Index | None = None  # None: any elements
    writes: bool = False


class Statement(ABC):
    """A part of a program that runs as a whole."""

    accesses: Sequence[Access]
    rounds: float  # of its loops

    @abstractmethod
    def lines(self) -> list[str]:
        """Write the statement in C."""


@dataclass
class Code(Statement):
    """A statement that is C already."""

    text: Sequence[str]
    accesses: Sequence[Access] = ()
    rounds: float = 0

    def lines(self) -> list[str]:
        return [*self.text]


@dataclass
class Repeat(Statement):
    """Statements that run a number of times. Each can meet any element that another round has written."""

    counter: str
    length: int
    statements: list[Statement] = field(default_factory=list)

    @property
    def accesses(self) -> Sequence[Access]:  # type: ignore[override]
        every = [access for statement in self.statements for access in statement.accesses]
        return [Access(access.buffer, None, access.writes) for access in every]

    @property
    def rounds(self) -> float:  # type: ignore[override]
        return self.length * sum(statement.rounds for statement in self.statements)

    def lines(self) -> list[str]:
        inner = [line for statement in self.statements for line in statement.lines()]
        return [loop(self.counter, self.length), *inner, "}"]


def loop(counter: str, extent: int) -> str:
    """Open a loop."""
    return f"for (int64_t {counter} = 0; {counter} < {extent}; {counter}++) {{"


def largest_step(statements: Iterable[Statement]) -> float:
    """Count the rounds of a step, or of a step of a loop within it if that has more."""
    rest = [statement for statement in statements if not isinstance(statement, Repeat)]
    inner = [largest_step(each.statements) for each in statements if isinstance(each, Repeat)]
    return max([sum(statement.rounds for statement in rest), *inner])
