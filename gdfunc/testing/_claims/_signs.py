"""Methods that move by signs."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ._base import Arrays, Choices, Claim, average


@dataclass(frozen=True)
class Sign(Claim):
    """u = sign(g), and 0 where g is 0."""

    family: ClassVar[str] = "sign"
    formula: ClassVar[str] = "u_t = sign(g_t)"
    source: ClassVar[str] = "J. Bernstein, Y.-X. Wang, K. Azizzadenesheli, A. Anandkumar 2018"

    def direction(self, g: np.ndarray, x: np.ndarray) -> np.ndarray:
        return np.sign(g)


@dataclass(frozen=True)
class Lion(Claim):
    """Lion: the sign of an average that leans towards the newest gradient.

    u = sign(β₁·m + (1 − β₁)·g),  m' = β₂·m + (1 − β₂)·g
    """

    family: ClassVar[str] = "lion"
    formula: ClassVar[str] = (
        "u_t = sign(beta1 m_(t-1) + (1 - beta1) g_t), m_t = (1 - beta2) sum_j beta2^(t-j) g_j"
    )
    source: ClassVar[str] = "X. Chen et al., Symbolic discovery of optimization algorithms, 2023"

    betas: tuple[float, float] = (0.9, 0.99)

    def direction(self, g: np.ndarray, x: np.ndarray) -> np.ndarray:
        beta1, beta2 = self.betas
        m = average(beta2, g, corrected=False)
        before = np.concatenate([np.zeros_like(m[:1]), m[:-1]])
        return np.sign(beta1 * before + (1 - beta1) * g)


@dataclass(frozen=True)
class Rprop(Claim):
    """Rprop: a step size for every entry, which grows while the gradient keeps its sign.

    s' = clip(s·η₊ if g·g₋₁ > 0, s·η₋ if g·g₋₁ < 0, else s);  u = s'·sign(g), or 0 where the sign turned,
    and then g counts as 0 in the next step

    Attributes:
        etas: (η₋, η₊).
        step_sizes: the smallest and the largest.
        unit: "lr": step sizes are multiples of lr and start at 1. "first lr": they are absolute, start at
            the first lr and never see another, as in torch.
    """

    family: ClassVar[str] = "rprop"
    formula: ClassVar[str] = "s_t = clip(s_(t-1) eta, step_sizes), u_t = s_t sign(g_t), 0 at a turn"
    source: ClassVar[str] = "M. Riedmiller, H. Braun 1993; torch.optim.Rprop"
    choices: ClassVar[Choices] = {"unit": ("lr", "first lr")}

    etas: tuple[float, float] = (0.5, 1.2)
    step_sizes: tuple[float, float] = (1e-6, 50.0)
    unit: str = "lr"

    def own_feeds(self) -> dict[str, Arrays]:
        """Return one sign for so long that sizes reach the largest; turns until they reach the smallest."""
        steady, turning = np.ones(40), (-1.0) ** np.arange(60)
        signs = np.concatenate([steady, turning])
        return {"steady, then turning": [np.outer(signs, np.array([1.0, -0.5])), -2 * signs]}

    def moves(self, grads: Arrays, points: Arrays, lrs: np.ndarray) -> Arrays:
        if self.unit == "lr":
            return super().moves(grads, points, lrs)
        return [-self._walk(g, float(lrs[0])) for g in grads]

    def direction(self, g: np.ndarray, x: np.ndarray) -> np.ndarray:
        return self._walk(g, 1.0)

    def _walk(self, g: np.ndarray, start: float) -> np.ndarray:
        """Return s·sign(g) of every step, with 0 at turns."""
        low, high = self.step_sizes
        size, before = np.full(g.shape[1:], start), np.zeros(g.shape[1:])
        rows = []
        for now in np.sign(g):
            agreement = now * before
            size = np.clip(
                size * np.select([agreement > 0, agreement < 0], self.etas[::-1], 1.0), low, high
            )
            before = np.where(agreement < 0, 0.0, now)
            rows.append(size * before)
        return np.stack(rows)


def flip_step(betas: tuple[float, float], ones: int) -> int:
    """Return how many of Lion's steps keep their sign after it turns, from k ones to minus ones.

    The first j with β₁·mⱼ < 1 − β₁, where mⱼ = (1 − β₂ᵏ)·β₂ʲ − (1 − β₂ʲ).
    """
    beta1, beta2 = betas
    j = np.arange(4000)
    m = (1 - beta2**ones) * beta2**j - (1 - beta2**j)
    return int(np.argmax(beta1 * m < 1 - beta1))
