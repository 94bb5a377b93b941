"""Claims of methods whose points lie in a set."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ._base import Arrays, Choices, Claim, along, join, split
from ._linear import GradientDescent

_PLAIN = GradientDescent()


@dataclass(frozen=True)
class Projected(Claim):
    """A method whose new point is the nearest one in a set: θ' = P(θ + move).

    Attributes:
        inner: the claim about the move.
        onto: "box", |θᵢ| <= r for every entry, or "ball", ‖θ‖ <= r over all leaves.
        size: r.
    """

    family: ClassVar[str] = "projected"
    formula: ClassVar[str] = "x' = P(x + m), P the nearest point with |x_i| <= r (box), or |x| <= r (ball)"
    source: ClassVar[str] = "A. A. Goldstein 1964"
    choices: ClassVar[Choices] = {"onto": ("box", "ball")}

    inner: Claim = _PLAIN
    onto: str = "ball"
    size: float = 1.0

    def moves(self, grads: Arrays, points: Arrays, lrs: np.ndarray) -> Arrays:
        x = join(points)
        ahead = x + join(self.inner.moves(grads, points, lrs))
        if self.onto == "box":
            nearest = np.clip(ahead, -self.size, self.size)
        else:
            length = np.maximum(np.linalg.norm(ahead, axis=1), self.size)
            nearest = along(self.size / length, ahead) * ahead
        return split(nearest - x, grads)


@dataclass(frozen=True)
class Langevin(Claim):
    """A method whose new point is moved by noise: θ' = θ + move + √(2·lr·T)·ξ with ξ ~ N(0, I).

    Attributes:
        inner: the claim about the move.
        temperature: T.
    """

    family: ClassVar[str] = "langevin"
    formula: ClassVar[str] = "x' = x + m + sqrt(2 lr T) xi, xi ~ N(0, I)"
    source: ClassVar[str] = "M. Welling, Y. W. Teh 2011"

    inner: Claim = _PLAIN
    temperature: float = 1.0
