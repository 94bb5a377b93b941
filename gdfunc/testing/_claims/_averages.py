"""Claims of methods that keep a second, slower copy of the parameters."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ._base import Arrays, Claim, along, powers, quotient, weighted
from ._linear import GradientDescent

_PLAIN = GradientDescent()


@dataclass(frozen=True)
class EMA(Claim):
    """An exponential moving average of the parameters, which leaves the inner method alone.

    aₜ = dᵗ·θ₀ + (1 − d)·Σⱼ d^(t−j)·θⱼ, or with debias the average of θ₁ … θₜ with weights d^(t−j)

    Attributes:
        inner: the claim about the parameters.
        decay: d.
        debias: whether θ₀ has no weight.
    """

    family: ClassVar[str] = "ema"
    formula: ClassVar[str] = (
        "a_t = d^t x_0 + (1 - d) sum_j d^(t-j) x_j, or sum_j d^(t-j) x_j / sum_j d^(t-j) with debias"
    )
    source: ClassVar[str] = "D. Ruppert 1988"

    inner: Claim = _PLAIN
    decay: float = 0.9
    debias: bool = False

    def moves(self, grads: Arrays, points: Arrays, lrs: np.ndarray) -> Arrays:
        return self.inner.moves(grads, points, lrs)

    def answers(self, grads: Arrays, points: Arrays, lrs: np.ndarray) -> Arrays:
        weights = powers(self.decay, len(lrs) + 1)
        weights[:, 1:] *= 1.0 - self.decay
        if self.debias:
            weights[1:, 0] = 0.0
            weights /= weights.sum(1, keepdims=True)
        return [weighted(weights, x) for x in points]


@dataclass(frozen=True)
class Lookahead(Claim):
    """k steps of an inner method, then a step back to between their start and their end.

    every k steps:  φ' = φ + α·(θ − φ),  θ' = φ'

    On linear losses the k-th move is its own plus (α − 1) times the sum of all k.

    Attributes:
        inner: the claim about the steps ahead.
        k: how many.
        alpha: α.
    """

    family: ClassVar[str] = "lookahead"
    formula: ClassVar[str] = "x_t - x_(t-1) = m_t, plus (alpha - 1)(m_(t-k+1) + .. + m_t) where k divides t"
    source: ClassVar[str] = "M. Zhang, J. Lucas, G. Hinton, J. Ba 2019"
    counts: ClassVar[tuple[str, ...]] = ("k",)

    inner: Claim = _PLAIN
    k: int = 5
    alpha: float = 0.5

    def moves(self, grads: Arrays, points: Arrays, lrs: np.ndarray) -> Arrays:
        result = [m.copy() for m in self.inner.moves(grads, points, lrs)]
        for m in result:
            for end in range(self.k, len(m) + 1, self.k):
                ahead = m[end - self.k : end]
                m[end - 1] = self.alpha * ahead.sum(0) - ahead[:-1].sum(0)
        return result

    def answers(self, grads: Arrays, points: Arrays, lrs: np.ndarray) -> Arrays:
        """Return the slow weights: the point at the last multiple of k."""
        t = np.arange(len(lrs) + 1)
        return [x[t - t % self.k] for x in points]


@dataclass(frozen=True)
class ScheduleFree(Claim):
    """Schedule-free learning: its parameters are y, and its answer is x.

    zₜ = θ₀ − Σⱼ lrⱼ·(uⱼ + λ·yⱼ);  xₜ = Σⱼ lrⱼ²·zⱼ / Σⱼ lrⱼ²;  yₜ₊₁ = (1 − β)·zₜ + β·xₜ

    Attributes:
        beta: β.
        weight_decay: λ.
        inner: the claim about the directions u; by default the gradients.
    """

    family: ClassVar[str] = "schedule-free"
    formula: ClassVar[str] = (
        "y = (1 - beta) z + beta x with z_t = x_0 - sum_j lr_j (u_j + lambda y_j), "
        "x_t = sum_j lr_j^2 z_j / sum_j lr_j^2"
    )
    source: ClassVar[str] = "A. Defazio et al. 2024"

    beta: float = 0.9
    weight_decay: float = 0.0
    inner: Claim = _PLAIN

    def moves(self, grads: Arrays, points: Arrays, lrs: np.ndarray) -> Arrays:
        pairs = self._sequences(grads, points, lrs)
        return [np.diff((1.0 - self.beta) * z + self.beta * x, axis=0) for z, x in pairs]

    def answers(self, grads: Arrays, points: Arrays, lrs: np.ndarray) -> Arrays:
        return [x for _, x in self._sequences(grads, [y[:-1] for y in points], lrs)]

    def _sequences(self, grads: Arrays, ys: Arrays, lrs: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return z and x of every leaf, [T + 1, ...]."""
        result = []
        for u, y in zip(self.inner.directions(grads, ys), ys, strict=True):
            z = y[0] - np.cumsum(along(lrs, u) * (u + self.weight_decay * y), axis=0)
            x = np.cumsum(along(lrs**2, z) * z, axis=0) / along(np.cumsum(lrs**2), z)
            result.append((np.concatenate([y[:1], z]), np.concatenate([y[:1], x])))
        return result


@dataclass(frozen=True)
class ASGD(Claim):
    """Averaged stochastic gradient descent, as torch has it.

    θₜ = θₜ₋₁ − ηₜ·(gₜ + (λ + wd)·θₜ₋₁);  η₁ = lr₁,  ηₜ₊₁ = lrₜ/(1 + λ·lrₜ·t)^α
    aₜ = Σⱼ wⱼ·θⱼ / Σⱼ wⱼ with wⱼ = j − 1 − t₀, at least 0 and at most 1; aₜ = θₜ while all are 0

    Attributes:
        lambd: λ, the decay of parameters and step size.
        alpha: α, the power of the step size's decay.
        t0: t₀, the step after which to average.
        weight_decay: wd.
    """

    family: ClassVar[str] = "asgd"
    formula: ClassVar[str] = (
        "x_t - x_(t-1) = -eta_t (g_t + (lambda + wd) x_(t-1)), "
        "eta_(t+1) = lr_t / (1 + lambda lr_t t)^alpha, "
        "a_t = sum_j w_j x_j / sum_j w_j with w_j = min(max(j - 1 - t0, 0), 1)"
    )
    source: ClassVar[str] = "B. T. Polyak, A. B. Juditsky 1992; torch.optim.ASGD"

    lambd: float = 1e-4
    alpha: float = 0.75
    t0: float = 1e6
    weight_decay: float = 0.0

    def moves(self, grads: Arrays, points: Arrays, lrs: np.ndarray) -> Arrays:
        t = np.arange(1.0, len(lrs))
        later = lrs[:-1] / (1.0 + self.lambd * lrs[:-1] * t) ** self.alpha
        eta, decay = np.concatenate([lrs[:1], later]), self.lambd + self.weight_decay
        return [-along(eta, g) * (g + decay * x) for g, x in zip(grads, points, strict=True)]

    def answers(self, grads: Arrays, points: Arrays, lrs: np.ndarray) -> Arrays:
        w = np.clip(np.arange(len(lrs) + 1.0) - 1.0 - self.t0, 0.0, 1.0)
        result = []
        for x in points:
            total = along(np.cumsum(w), x) + np.zeros_like(x)
            result.append(np.where(total > 0, quotient(np.cumsum(along(w, x) * x, axis=0), total), x))
        return result
