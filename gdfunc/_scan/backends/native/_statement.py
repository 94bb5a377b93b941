"""The statements of a program: each states what it reads and writes when it is made."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ._index import Index

C_TYPES = {torch.float32: "float", torch.float64: "double", torch.uint8: "uint8_t", torch.bool: "uint8_t"}
C_TYPES |= {getattr(torch, f"int{bits}"): f"int{bits}_t" for bits in (8, 16, 32, 64)}
HALVES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}  # in memory; a value of them is a float
C_TYPES |= HALVES
VALUE_TYPES = C_TYPES | dict.fromkeys(HALVES, "float")


class Tiles(NamedTuple):
    """The vectors of a processor, as they shape the tiles of a product."""

    width: int  # bytes of a vector
    accumulators: int  # vectors that a tile may sum up in registers


@dataclass(eq=False)
class Buffer:
    """Memory for numbers of one dtype, by its name in C."""

    name: str
    dtype: torch.dtype
    count: int = 1
    parent: "Buffer | None" = None  # the buffer that this one is a part of, or the same as

    @property
    def root(self) -> "Buffer":
        """Return the buffer whose memory this one lies in."""
        return self.parent.root if self.parent else self

    @property
    def c_type(self) -> str:
        return C_TYPES[self.dtype]


class Access(NamedTuple):
    """A read or a write of one element for each round of a statement's loops, or of any elements."""

    buffer: Buffer
    place: Index | None = None  # None: any elements
    writes: bool = False


@dataclass
class Code:
    """A statement of a program: a part that runs as a whole."""

    text: Sequence[str]
    accesses: Sequence[Access] = ()
    rounds: float = 0  # of its loops
    flop: float = 0  # of a product in tiles

    @property
    def size(self) -> tuple[float, float]:
        """Count FLOP, or the bytes of a statement that goes over memory once."""
        if self.flop:
            return self.flop, 0
        if self.rounds > 2 * max((access.buffer.count for access in self.accesses), default=0):
            return 16 * self.rounds, 0  # a product without tiles, at their speed for so many FLOP
        return 0, self.rounds * sum(access.buffer.dtype.itemsize for access in self.accesses)


class Repeat(Code):
    """Statements that run a number of times. Each can meet any element that another round has written."""

    def __init__(self, counter: str, length: int, statements: Sequence[Code]) -> None:
        self.length, self.statements = length, statements
        lines = [line for statement in statements for line in statement.text]
        every = [access for statement in statements for access in statement.accesses]
        super().__init__(
            [loop(counter, length), *lines, "}"],
            [Access(access.buffer, None, access.writes) for access in every],
            length * sum(statement.rounds for statement in statements),
        )


def loop(counter: str, extent: int) -> str:
    """Open a loop."""
    return f"for (int64_t {counter} = 0; {counter} < {extent}; {counter}++) {{"


def size_of(statements: Sequence[Code]) -> tuple[float, float]:
    """Count the FLOP of what a step computes from the cache, and the bytes that the rest reads and writes.

    In a step with a loop, such as training with a record of every k-th step, the larger counts: a round of
    the loop, or the rest divided by its rounds.
    """
    loops = [statement for statement in statements if isinstance(statement, Repeat)]
    rest = [statement.size for statement in statements if not isinstance(statement, Repeat)]
    sizes, rounds = [size_of(each.statements) for each in loops], max([1, *[each.length for each in loops]])
    sizes.append((sum(flop for flop, _ in rest) / rounds, sum(moved for _, moved in rest) / rounds))
    flop, moved = zip(*sizes, strict=True)
    return max(flop), max(moved)
