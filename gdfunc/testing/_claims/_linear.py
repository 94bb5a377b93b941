"""Methods that are linear in the gradients."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ._base import Arrays, Claim, along, powers, weighted


@dataclass(frozen=True)
class GradientDescent(Claim):
    """θ' = θ − lr·g."""

    family: ClassVar[str] = "gradient descent"
    formula: ClassVar[str] = "x_t - x_(t-1) = -lr_t g_t"

    def direction(self, g: np.ndarray, x: np.ndarray) -> np.ndarray:
        return g


@dataclass(frozen=True)
class Momentum(Claim):
    """Momentum: of a buffer, as torch has it, or of the displacement, as Polyak wrote it.

    "buffer":        bₜ = β·bₜ₋₁ + (1 − d)·gₜ, b₁ = g₁;  θ' = θ − lr·b, or θ − lr·(g + β·b) with nesterov
    "displacement":  θ' − θ = β·(θ − θ₋₁) − lr·g

    The two are equal while lr does not change.
    """

    family: ClassVar[str] = "momentum"
    formula: ClassVar[str] = (
        "b_t = sum_j beta^(t-j) w_j g_j with w_1 = 1, w_j = 1 - d; u = b, or g + beta b"
    )
    source: ClassVar[str] = "B. T. Polyak 1964; I. Sutskever et al. 2013; torch.optim.SGD"

    momentum: float
    dampening: float = 0.0
    nesterov: bool = False
    form: str = "buffer"

    def moves(self, grads: Arrays, points: Arrays, lrs: np.ndarray) -> Arrays:
        if self.form == "buffer":
            return super().moves(grads, points, lrs)
        return [-weighted(powers(self.momentum, len(g)), along(lrs, g) * g) for g in grads]

    def direction(self, g: np.ndarray, x: np.ndarray) -> np.ndarray:
        weights = np.where(np.arange(len(g)) == 0, 1.0, 1.0 - self.dampening)
        b = weighted(powers(self.momentum, len(g)) * weights, g)
        return g + self.momentum * b if self.nesterov else b
