"""How derivatives go through the runs in a function: what `hypergrad` asks of `train`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any


class FixedPoint:
    """Where a run ends: found by the run itself, or given in its place.

    Given a carry, `train` returns it, and leaves the carry after one more step as `image`.
    """

    def __init__(self, carry: Any = None, trajectory: Any = None) -> None:
        self.carry, self.trajectory, self.image = carry, trajectory, None
        self.given, self.runs = carry is not None, 0

    def enter(self, steps: int, step: Callable[[Any], Any]) -> tuple[Any, Any] | None:
        """Begin a run; return what it is to return, if that is given."""
        self.runs += 1
        if self.runs > 1:
            raise ValueError("mode='implicit' needs a function that calls train once; it called it again")
        if not steps:
            raise ValueError("mode='implicit' needs a run of at least one step; got a plan of none")
        if not self.given:
            return None
        self.image = step(self.carry)
        return self.carry, self.trajectory

    def leave(self, carry: Any, trajectory: Any) -> None:
        self.carry, self.trajectory = carry, trajectory


@dataclass(frozen=True)
class Through:
    """What is asked; nothing, by default."""

    checkpoint: int | str | None = None  # for runs that do not say
    last: int | None = None  # how many steps derivatives go back
    fixed_point: FixedPoint | None = None


_NOTHING = Through()
_asked: ContextVar[Through] = ContextVar("_asked", default=_NOTHING)
asked = _asked.get


@contextmanager
def ask(through: Through) -> Iterator[None]:
    token = _asked.set(through)
    try:
        yield
    finally:
        _asked.reset(token)
