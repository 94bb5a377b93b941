"""Claims: rules in closed form."""

import math
from dataclasses import dataclass, fields
from numbers import Integral
from typing import ClassVar

import numpy as np

Arrays = list[np.ndarray]  # one array per leaf of the parameters
Choices = dict[str, tuple[str | None, ...]]  # all values of a field


@dataclass(frozen=True)
class Claim:
    """A rule that a subject says it follows.

    A claim knows the answer to any gradients in closed form, in NumPy and float64. Sums over the past
    stand in for recursions wherever there is one, so that a claim shares no code with an optimizer.

    Attributes:
        family: the name under which `WRONG` lists its negative controls.
        formula: the rule.
        source: where the rule comes from.
    """

    family: ClassVar[str] = ""
    formula: ClassVar[str] = ""
    source: ClassVar[str] = ""
    is_linear: ClassVar[bool] = False  # in the gradients, with fixed coefficients
    slack: ClassVar[float] = 1e-9  # of kernels: the tolerance relative to the size of the moves
    shapes: ClassVar[tuple[tuple[int, ...], ...]] = ((), (3,), (2, 3))  # of the leaves that laws try

    choices: ClassVar[Choices] = {}
    counts: ClassVar[tuple[str, ...]] = ()  # fields that are whole numbers >= 1

    def __post_init__(self) -> None:
        name = type(self).__name__
        for field, allowed in self.choices.items():
            value = getattr(self, field)
            if not any(value is choice or value == choice for choice in allowed):
                raise ValueError(f"{field} of {name} must be one of {allowed}; got {value!r}")
        for field in self.counts:
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
                raise ValueError(f"{field} of {name} must be a whole number >= 1; got {value!r}")
        for inner in fields(self):
            if inner.type is Claim and not isinstance(getattr(self, inner.name), Claim):
                got = getattr(self, inner.name)
                raise TypeError(f"{inner.name} of {name} must be a claim, such as gt.Adam(); got {got!r}")

    @classmethod
    def is_of_gradients(cls) -> bool:
        """Tell whether gradients alone decide the moves, so that a closed form can be given for any."""
        names = ("moves", "directions", "direction")
        return any(getattr(cls, name) is not getattr(Claim, name) for name in names)

    def own_feeds(self) -> dict[str, Arrays]:
        """Return gradients that show something about this claim alone: leaves [T, ...], by name."""
        return {}

    def moves(self, grads: Arrays, points: Arrays, lrs: np.ndarray) -> Arrays:
        """Return the displacements of T steps.

        Args:
            grads: [T, ...] for each leaf, the gradient of every step.
            points: [T, ...] for each leaf, the parameters before every step.
            lrs: [T].

        Returns:
            [T, ...] for each leaf: −lrₜ·uₜ, where uₜ is the direction.
        """
        directions = self.directions(grads, points)
        return [-u * along(lrs, u) for u in directions]

    def answers(self, grads: Arrays, points: Arrays, lrs: np.ndarray) -> Arrays:
        """Return the answers before every step and after the last: by default the points.

        Args:
            grads: [T, ...] for each leaf, the gradient of every step.
            points: [T + 1, ...] for each leaf, the parameters before every step and after the last.
            lrs: [T].

        Returns:
            [T + 1, ...] for each leaf.
        """
        return points

    def directions(self, grads: Arrays, points: Arrays) -> Arrays:
        """Return uₜ of every step, [T, ...] for each leaf: by default leaf by leaf."""
        return [self.direction(g, x) for g, x in zip(grads, points, strict=True)]

    def direction(self, g: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Return uₜ of every step for one leaf, [T, ...]."""
        raise NotImplementedError


def join(leaves: Arrays) -> np.ndarray:
    """Make vectors [T, d] of leaves [T, ...]."""
    return np.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], 1)


def split(vectors: np.ndarray, like: Arrays) -> Arrays:
    """Cut vectors [T, d] into leaves, [T, ...] of the shapes of like: the inverse of `join`."""
    sizes = [math.prod(leaf.shape[1:]) for leaf in like]
    parts = np.split(vectors, np.cumsum(sizes)[:-1], axis=1)
    return [part.reshape(-1, *leaf.shape[1:]) for part, leaf in zip(parts, like, strict=True)]


def along(values: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Shape one value per step, [T], so that it broadcasts along the leading axis of an array."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def weighted(weights: np.ndarray, g: np.ndarray) -> np.ndarray:
    """Return Σⱼ wₜⱼ·gⱼ for every t, [T, ...], from weights [T, T] and g [T, ...]."""
    return np.tensordot(weights, g, axes=1)


def powers(beta: float, steps: int) -> np.ndarray:
    """Return the lower triangle [T, T] of β^(t−j), and zero above it."""
    t = np.arange(steps)
    lag = t[:, None] - t
    return np.where(lag >= 0, float(beta) ** np.maximum(lag, 0), 0.0)


def products(factors: np.ndarray) -> np.ndarray:
    """Return the lower triangle [T, T] of Π fᵢ over i = j … t − 1, and zero above it."""
    t = np.arange(len(factors))
    between = (t[None, None] >= t[None, :, None]) & (t[None, None] < t[:, None, None])
    return np.tril(np.where(between, factors, 1.0).prod(axis=2))


def average(beta: float, g: np.ndarray, *, corrected: bool = True) -> np.ndarray:
    """Return the moving average of g for every t, [T, ...].

    Σⱼ (1 − β)·β^(t−j)·gⱼ, divided by the sum of the weights, 1 − βᵗ, if corrected
    """
    weights = (1.0 - beta) * powers(beta, len(g))
    return weighted(weights / bias(beta, weights) if corrected else weights, g)


def bias(beta: float, like: np.ndarray) -> np.ndarray:
    """Return 1 − βᵗ for t = 1 … T, shaped to broadcast along the leading axis of an array."""
    return along(1.0 - beta ** np.arange(1.0, len(like) + 1), like)


def quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return a/b, and 0 where b is 0."""
    return np.divide(a, b, out=np.zeros_like(a), where=b != 0)
