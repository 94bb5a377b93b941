"""What a subject says that it is: a rule in closed form."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

Arrays = list[np.ndarray]  # one array per leaf of the parameters


@dataclass(frozen=True)
class Claim:
    """What a subject says that it is.

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
    slack: ClassVar[float] = 1e-9  # of kernels: the tolerance relative to the size of the moves
    shapes: ClassVar[tuple[tuple[int, ...], ...]] = ((), (3,), (2, 3))  # of the leaves that laws try

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

    def directions(self, grads: Arrays, points: Arrays) -> Arrays:
        """Return uₜ of every step, [T, ...] for each leaf: by default leaf by leaf."""
        return [self.direction(g, x) for g, x in zip(grads, points, strict=True)]

    def direction(self, g: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Return uₜ of every step for one leaf, [T, ...]."""
        raise NotImplementedError


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
