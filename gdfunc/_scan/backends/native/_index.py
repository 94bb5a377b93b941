"""The place of an element: integers that are linear in loop counters, and what views do to them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Var:
    """An integer in [0, extent): the counter of a loop, or an index that was read from memory."""

    name: str
    extent: int


@dataclass(frozen=True)
class Part:
    """The quotient or the remainder of an index, where it is not linear in its variables."""

    of: "Index"
    divisor: int
    is_quotient: bool

    @property
    def extent(self) -> int:
        return self.of.high // self.divisor + 1 if self.is_quotient else self.divisor


Term = tuple[Var | Part, int]


@dataclass(frozen=True)
class Index:
    """constant + Σ factor · variable."""

    constant: int = 0
    terms: tuple[Term, ...] = ()

    @property
    def low(self) -> int:
        return self.constant + sum(min(0, factor * (var.extent - 1)) for var, factor in self.terms)

    @property
    def high(self) -> int:
        return self.constant + sum(max(0, factor * (var.extent - 1)) for var, factor in self.terms)

    def factor(self, var: Var | Part) -> int:
        return dict(self.terms).get(var, 0)

    def __add__(self, other: "Index | int") -> "Index":
        if isinstance(other, int):
            return Index(self.constant + other, self.terms)
        factors: dict[Var | Part, int] = dict(self.terms)
        for var, factor in other.terms:
            factors[var] = factors.get(var, 0) + factor
        return _joined(self.constant + other.constant, factors)

    def __mul__(self, factor: int) -> "Index":
        return Index(
            self.constant * factor, tuple((var, old * factor) for var, old in self.terms if factor)
        )

    def where(self, values: "Mapping[Var | Part, Index]") -> "Index":
        """Put indices in the place of the variables."""
        return sum((values[var] * factor for var, factor in self.terms), Index(self.constant))

    def split(self, divisor: int) -> tuple["Index", "Index"]:
        """Return the quotient and the remainder of an index that is never negative."""
        if divisor == 1:
            return self, Index()
        parts = [(var, factor, int(factor / divisor)) for var, factor in self.terms]
        whole = tuple((var, times) for var, _, times in parts if times)
        left = tuple((var, factor - times * divisor) for var, factor, times in parts if factor % divisor)
        over, constant = divmod(self.constant, divisor)
        remainder = Index(constant, left)
        if remainder.low < 0:
            over, whole, remainder = 0, (), self
        if remainder.high < divisor:
            return Index(over, whole), remainder
        quotient, rest = (Index(0, ((Part(remainder, divisor, first), 1),)) for first in (True, False))
        return Index(over, whole) + quotient, rest


def _joined(constant: int, factors: dict[Var | Part, int]) -> Index:
    """Put quotients and remainders of the same division together again: q · d + r is the dividend."""
    for part, factor in list(factors.items()):
        if isinstance(part, Part) and not part.is_quotient:
            quotient = Part(part.of, part.divisor, True)
            if factor and factors.get(quotient) == factor * part.divisor:
                del factors[part], factors[quotient]
                return Index(constant, _terms(factors)) + part.of * factor
    return Index(constant, _terms(factors))


def _terms(factors: dict[Var | Part, int]) -> tuple[Term, ...]:
    return tuple((var, factor) for var, factor in sorted(factors.items(), key=repr) if factor)


Point = tuple[Index, ...]  # one index for each dimension


def strides_of(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor."""
    strides = [1]
    for extent in reversed(shape[1:]):
        strides.append(strides[-1] * extent)
    return tuple(reversed(strides[: len(shape)]))


def ravel(point: Point, strides: Sequence[int]) -> Index:
    """Return the place in memory of a point."""
    return sum((index * stride for index, stride in zip(point, strides, strict=True)), Index())


def unravel(place: Index, shape: Sequence[int]) -> Point:
    """Return the point of a contiguous tensor at a place in memory."""
    if 0 in shape:
        return (Index(),) * len(shape)
    point = []
    for extent in reversed(shape[1:]):
        place, index = place.split(extent)
        point.append(index)
    return tuple(reversed([*point, place][: len(shape)]))
