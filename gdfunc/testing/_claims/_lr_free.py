"""Claims of methods that find their own lr, and of those whose averages get longer."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ._base import Arrays, Claim, along, average, join, powers, products, quotient, split, weighted
from ._linear import GradientDescent

_PLAIN = GradientDescent()


def _varying(shares: np.ndarray, g: np.ndarray) -> np.ndarray:
    """Return the average of g for every t in which gₜ has the share wₜ: Σⱼ wⱼ·Πᵢ₌ⱼ₊₁…ₜ(1 − wᵢ)·gⱼ."""
    return weighted(products(np.append(1 - shares[1:], 1.0)) * shares, g)


@dataclass(frozen=True)
class AdEMAMix(Claim):
    """Adam with a second, slower average of gradients: u = (m̂ + α·n)/(√v̂ + ε).

    Attributes:
        betas: (β₁, β₂, β₃).
        alpha: α.
        eps: ε.
        warmup: T, the steps over which α grows from zero, and the half-life of n from that of m.
    """

    family: ClassVar[str] = "ademamix"
    formula: ClassVar[str] = (
        "u_t = (mean_w(g) + alpha sum_j (1 - beta3) beta3^(t-j) g_j) / (sqrt(mean_w'(g^2)) + eps)"
    )
    source: ClassVar[str] = "M. Pagliardini, P. Ablin, D. Grangier 2025"

    betas: tuple[float, float, float] = (0.9, 0.999, 0.9999)
    alpha: float = 5.0
    eps: float = 1e-8
    warmup: int = 0

    def direction(self, g: np.ndarray, x: np.ndarray) -> np.ndarray:
        beta1, beta2, beta3 = self.betas
        done = np.ones(len(g)) if not self.warmup else np.minimum(np.arange(1, len(g) + 1) / self.warmup, 1)
        if self.warmup:
            half_lives = (1 - done) / np.log(beta1) + done / np.log(beta3)
            slow = _varying(1 - np.exp(1 / half_lives), g)
        else:
            slow = average(beta3, g, corrected=False)
        top = average(beta1, g) + self.alpha * along(done, g) * slow
        return quotient(top, np.sqrt(average(beta2, g**2)) + self.eps)


@dataclass(frozen=True)
class Adafactor(Claim):
    """Division by the root of squared gradients that only their rows and columns keep.

    w = g/√max(v, ε₁²) with v = r·cᵀ/mean(r) for matrices;  u = max(ε₂, RMS(θ))·w/max(1, RMS(w)/d)

    Attributes:
        beta2_decay: b: the newest square has the share tᵇ in the averages.
        eps1: ε₁.
        eps2: ε₂.
        d: d.
    """

    family: ClassVar[str] = "adafactor"
    formula: ClassVar[str] = (
        "u_t = max(eps2, RMS(x)) w / max(1, RMS(w)/d), w = g / sqrt(max(r c / mean(r), eps1^2))"
    )
    source: ClassVar[str] = "N. Shazeer, M. Stern 2018; torch.optim.Adafactor"

    beta2_decay: float = -0.8
    eps1: float = 1e-8
    eps2: float = 1e-3
    d: float = 1.0

    def direction(self, g: np.ndarray, x: np.ndarray) -> np.ndarray:
        shares = np.arange(1.0, len(g) + 1) ** self.beta2_decay
        v = _varying(shares, g**2)
        if g.ndim > 2:
            rows, columns = v.mean(-1, keepdims=True), v.mean(-2, keepdims=True)
            v = rows * columns / np.maximum(rows.mean(-2, keepdims=True), self.eps1)
        w = g / np.sqrt(np.maximum(v, self.eps1**2))
        scale = np.maximum(self.eps2, _rms(x)) / np.maximum(1.0, _rms(w) / self.d)
        return along(scale, w) * w


def _rms(x: np.ndarray) -> np.ndarray:
    return np.sqrt((x.reshape(len(x), -1) ** 2).mean(1))


@dataclass(frozen=True)
class DoG(Claim):
    """Distance over gradients: u = max(ρ·(1 + ‖θ₀‖), maxⱼ ‖θⱼ − θ₀‖)/√(Σⱼ ‖gⱼ‖² + ε)·g, over all leaves.

    Attributes:
        reps_rel: ρ.
        eps: ε.
    """

    family: ClassVar[str] = "dog"
    formula: ClassVar[str] = "u_t = max(rho (1 + |x_0|), max_j |x_j - x_0|) / sqrt(sum_j |g_j|^2 + eps) g_t"
    source: ClassVar[str] = "M. Ivgi, O. Hinder, Y. Carmon 2023"

    reps_rel: float = 1e-6
    eps: float = 1e-8

    def directions(self, grads: Arrays, points: Arrays) -> Arrays:
        x = join(points)
        far = np.maximum.accumulate(np.linalg.norm(x - x[0], axis=1))
        far = np.maximum(far, self.reps_rel * (1 + np.linalg.norm(x[0])))
        factor = far / np.sqrt(np.cumsum((join(grads) ** 2).sum(1)) + self.eps)
        return [along(factor, g) * g for g in grads]


@dataclass(frozen=True)
class Prodigy(Claim):
    """Adam whose step size is an estimate of the distance to the minimum.

    d' = max(d, c·Σⱼ aⱼ·⟨gⱼ, θ₀ − θⱼ⟩/‖Σⱼ aⱼ·gⱼ‖₁) with aⱼ = lrⱼ·dⱼ²·√β₂^(t−j)
    θ' = θ − lr·d·(m/(√v + d·ε) + λ·θ)

    Attributes:
        betas: (β₁, β₂).
        eps: ε.
        weight_decay: λ.
        d0: the first d.
        d_coef: c.
    """

    family: ClassVar[str] = "prodigy"
    formula: ClassVar[str] = (
        "x' - x = -lr d_t (m/(sqrt(v) + d_t eps) + lambda x), m and v averages of d_j g_j and its square, "
        "d_(t+1) = max(d_t, c sum_j a_j g_j(x_0 - x_j) / |sum_j a_j g_j|_1), "
        "a_j = lr_j d_j^2 beta2^((t-j)/2)"
    )
    source: ClassVar[str] = "K. Mishchenko, A. Defazio 2024"

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    d0: float = 1e-6
    d_coef: float = 1.0

    def moves(self, grads: Arrays, points: Arrays, lrs: np.ndarray) -> Arrays:
        g, x = join(grads), join(points)
        d, decay = [self.d0], powers(np.sqrt(self.betas[1]), len(g))
        inner = (g * (x[:1] - x)).sum(1)
        for t in range(len(g)):
            weights = decay[t, : t + 1] * lrs[: t + 1] * np.square(d)
            size = np.abs(weights @ g[: t + 1]).sum()
            d.append(max(d[-1], self.d_coef * (weights @ inner[: t + 1]) / size if size else 0.0))
        ds = along(np.array(d[:-1]), g)
        m = average(self.betas[0], ds * g, corrected=False)
        v = average(self.betas[1], (ds * g) ** 2, corrected=False)
        u = quotient(m, np.sqrt(v) + ds * self.eps) + self.weight_decay * x
        return split(-along(lrs, g) * ds * u, grads)


@dataclass(frozen=True)
class Mechanic(Claim):
    """A method whose moves are scaled by a tuner: θₜ = θ₀ − (Σₖ sₖ)·Σⱼ lrⱼ·uⱼ.

    hₜ = ⟨Δₜ, g + λ·(Σ s)·‖g‖/‖θ‖·θ⟩;  s = (s₀/K·maxⱼ β^(t−j)·|hⱼ| + r)/(√Σⱼ β^(2(t−j))·hⱼ² + ε) for each β

    Attributes:
        inner: the claim about the directions u.
        betas: (β₁, …, β_K).
        decay: λ.
        s_init: s₀.
        eps: ε.
    """

    family: ClassVar[str] = "mechanic"
    formula: ClassVar[str] = (
        "x_t = x_0 + sum_k s_k D_t with D_t = -sum_j lr_j u_j, "
        "s = (s0/K max_j beta^(t-j) |h_j| + r) / (sqrt(sum_j beta^(2(t-j)) h_j^2) + eps)"
    )
    source: ClassVar[str] = "A. Cutkosky, A. Defazio, H. Mehta 2023"

    inner: Claim = _PLAIN
    betas: tuple[float, ...] = (0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999)
    decay: float = 0.01
    s_init: float = 1e-8
    eps: float = 1e-8

    def moves(self, grads: Arrays, points: Arrays, lrs: np.ndarray) -> Arrays:
        g, x, u = join(grads), join(points), join(self.inner.directions(grads, points))
        delta = np.concatenate([np.zeros_like(g[:1]), np.cumsum(-along(lrs, u) * u, axis=0)])
        betas, total = np.array(self.betas), 0.0
        s, r, h = np.zeros(len(betas)), np.zeros(len(betas)), np.zeros(len(g))
        ends = [x[0]]
        for t in range(len(g)):
            size = np.linalg.norm(x[t])
            push = self.decay * total * np.linalg.norm(g[t]) / size if size else 0.0
            h[t] = delta[t] @ (g[t] + push * x[t])
            lags = betas[:, None] ** np.arange(t, -1, -1.0)
            largest = (lags * np.abs(h[: t + 1])).max(1)
            r = np.maximum(0.0, betas * r - s * h[t])
            s = self.s_init / len(betas) * largest + r
            s = s / (np.sqrt((lags**2 * h[: t + 1] ** 2).sum(1)) + self.eps)
            total = s.sum()
            ends.append(x[0] + total * delta[t + 1])
        return split(np.array(ends[1:]) - x, grads)
