"""Methods that divide by the size of past gradients."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ._base import Choices, Claim, along, average, bias, powers, quotient, weighted


@dataclass(frozen=True)
class Adam(Claim):
    """Adam, AMSGrad, AdamW, and Adam with weight decay in the gradient.

    u = mean(g)/(√mean(g²) + ε) with weights β₁^(t−j) and β₂^(t−j), normalised. Bias correction is that
    normalisation.

    Attributes:
        betas: (β₁, β₂).
        eps: ε.
        amsgrad: None; "raw", the largest average before its correction, as in torch; or "corrected", the
            largest after it, as in Optax.
        weight_decay: λ.
        decoupled: whether λ·θ is added to u, as in AdamW, or to the gradient.
        eps_inside: whether the divisor is √(v̂ + ε).
        nesterov: whether the mean looks one step ahead, β₁·m/(1 − β₁^(t+1)) + (1 − β₁)·g/(1 − β₁ᵗ), as in
            Optax's nadam.
    """

    family: ClassVar[str] = "adam"
    formula: ClassVar[str] = (
        "u_t = mean_w(g) / (sqrt(mean_w'(g^2)) + eps), w_j ~ beta1^(t-j), w'_j ~ beta2^(t-j)"
    )
    source: ClassVar[str] = (
        "D. Kingma, J. Ba 2015; S. Reddi, S. Kale, S. Kumar 2018; I. Loshchilov, F. Hutter 2019"
    )

    choices: ClassVar[Choices] = {"amsgrad": (None, "raw", "corrected")}

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    amsgrad: str | None = None
    weight_decay: float = 0.0
    decoupled: bool = True
    eps_inside: bool = False
    nesterov: bool = False

    def direction(self, g: np.ndarray, x: np.ndarray) -> np.ndarray:
        beta1, beta2 = self.betas
        if not self.decoupled:
            g = g + self.weight_decay * x
        if self.amsgrad == "raw":
            v = np.maximum.accumulate(average(beta2, g**2, corrected=False)) / bias(beta2, g)
        else:
            v = average(beta2, g**2)
            v = np.maximum.accumulate(v) if self.amsgrad == "corrected" else v
        divisor = np.sqrt(v + self.eps) if self.eps_inside else np.sqrt(v) + self.eps
        mean = average(beta1, g)
        if self.nesterov:
            now, ahead = bias(beta1, g), 1 - beta1 * (1 - bias(beta1, g))
            mean = beta1 * mean * now / ahead + (1 - beta1) * g / now
        u = quotient(mean, divisor)
        return u + self.weight_decay * x if self.decoupled else u


@dataclass(frozen=True)
class Adamax(Claim):
    """Adam with a decaying maximum: u = mean(g) / maxⱼ β₂^(t−j)·(|gⱼ| + ε).

    Attributes:
        betas: (β₁, β₂).
        eps: ε.
        eps_outside: whether ε is added to the maximum of |gⱼ|, as in Optax.
    """

    family: ClassVar[str] = "adamax"
    formula: ClassVar[str] = "u_t = mean_w(g) / max_j beta2^(t-j) (|g_j| + eps)"
    source: ClassVar[str] = "D. Kingma, J. Ba 2015"

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    eps_outside: bool = False

    def direction(self, g: np.ndarray, x: np.ndarray) -> np.ndarray:
        beta1, beta2 = self.betas
        inside = 0.0 if self.eps_outside else self.eps
        decay = powers(beta2, len(g)).reshape(len(g), len(g), *[1] * (g.ndim - 1))
        largest = (decay * (np.abs(g) + inside)).max(axis=1)
        return quotient(average(beta1, g), largest + (self.eps if self.eps_outside else 0.0))


@dataclass(frozen=True)
class NAdam(Claim):
    """Adam with Nesterov's look-ahead and a schedule of its own.

    μₜ = β₁·(1 − ½·0.96^(t·ψ)), Πₜ = μ₁ ⋯ μₜ
    u = ((1 − μₜ)/(1 − Πₜ)·g + μₜ₊₁/(1 − Πₜ₊₁)·m) / (√v̂ + ε)

    Attributes:
        betas: (β₁, β₂).
        eps: ε.
        momentum_decay: ψ.
        product: the dtype of Π: "float64", or "float32", in which torch keeps it.
    """

    family: ClassVar[str] = "nadam"
    formula: ClassVar[str] = (
        "u_t = ((1-mu_t)/(1-P_t) g + mu_(t+1)/(1-P_(t+1)) m) / (sqrt(v^) + eps), P_t = mu_1 ... mu_t"
    )
    source: ClassVar[str] = "T. Dozat 2016; torch.optim.NAdam"

    choices: ClassVar[Choices] = {"product": ("float64", "float32")}

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum_decay: float = 4e-3
    product: str = "float64"

    def direction(self, g: np.ndarray, x: np.ndarray) -> np.ndarray:
        beta1, beta2 = self.betas
        t = np.arange(1, len(g) + 2)
        mu = beta1 * (1 - 0.5 * 0.96 ** (t * self.momentum_decay))
        products = np.multiply.accumulate(mu.astype(self.product), dtype=self.product).astype(float)
        # The factor of the next step is applied in double precision to the product that is kept.
        ahead = products[:-1] * mu[1:]
        m, v = average(beta1, g, corrected=False), average(beta2, g**2)
        now = (1 - mu[:-1]) / (1 - products[:-1])
        top = along(now, g) * g + along(mu[1:] / (1 - ahead), g) * m
        return quotient(top, np.sqrt(v) + self.eps)


@dataclass(frozen=True)
class RAdam(Claim):
    """Adam whose divisor is left out until its variance is bounded, and rectified from then on.

    ρ∞ = 2/(1 − β₂) − 1, ρₜ = ρ∞ − 2t·β₂ᵗ/(1 − β₂ᵗ)
    u = m̂·r·√(1 − β₂ᵗ)/(√v + ε) if ρₜ > 5, else m̂;  r² = (ρ−4)(ρ−2)ρ∞/((ρ∞−4)(ρ∞−2)ρ)

    Attributes:
        betas: (β₁, β₂).
        eps: ε.
        eps_corrected: whether ε is added to √v̂, after its correction, as in Optax.
    """

    family: ClassVar[str] = "radam"
    formula: ClassVar[str] = "u_t = m^ r sqrt(1-beta2^t) / (sqrt(v) + eps) if rho_t > 5, else m^"
    source: ClassVar[str] = "L. Liu et al. 2020; torch.optim.RAdam"

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    eps_corrected: bool = False

    def direction(self, g: np.ndarray, x: np.ndarray) -> np.ndarray:
        beta1, beta2 = self.betas
        t = np.arange(1.0, len(g) + 1)
        bias = 1 - beta2**t
        longest = 2 / (1 - beta2) - 1
        length = longest - 2 * t * beta2**t / bias
        rectified = length > 5
        ratio = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
        r = np.sqrt(np.where(rectified, ratio, 1.0))
        m, v = average(beta1, g), average(beta2, g**2, corrected=False)
        root = np.sqrt(along(bias, g))
        divisor = np.sqrt(v) / root + self.eps if self.eps_corrected else (np.sqrt(v) + self.eps) / root
        return np.where(along(rectified, g), quotient(m * along(r, g), divisor), m)


@dataclass(frozen=True)
class AdaBelief(Claim):
    """Adam that divides by the distance of gradients from their average.

    s = Σⱼ β₂^(t−j)·((1 − β₂)·(gⱼ − mⱼ)² + ε);  u = m̂/(√ŝ + ε)

    Attributes:
        betas: (β₁, β₂).
        eps: ε.
        eps_outside: the ε that is added to the root; None: ε again.
    """

    family: ClassVar[str] = "adabelief"
    formula: ClassVar[str] = (
        "s_t = sum_j beta2^(t-j) ((1-beta2)(g_j-m_j)^2 + eps); u_t = m^ / (sqrt(s^) + eps)"
    )
    source: ClassVar[str] = "J. Zhuang et al. 2020"

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-16
    eps_outside: float | None = None

    def direction(self, g: np.ndarray, x: np.ndarray) -> np.ndarray:
        beta1, beta2 = self.betas
        surprise = (g - average(beta1, g, corrected=False)) ** 2
        s = weighted(powers(beta2, len(g)), (1 - beta2) * surprise + self.eps)
        outside = self.eps if self.eps_outside is None else self.eps_outside
        return quotient(average(beta1, g), np.sqrt(s / bias(beta2, g)) + outside)


@dataclass(frozen=True)
class Yogi(Claim):
    """Adam whose second average changes by at most the newest square: v' = v − (1 − β₂)·sign(v − g²)·g².

    Attributes:
        betas: (β₁, β₂).
        eps: ε.
        initial_accumulator_value: v₀.
        corrected: whether m starts at v₀ too, and both are bias-corrected, as in Optax.
    """

    family: ClassVar[str] = "yogi"
    formula: ClassVar[str] = "v_t = v - (1-beta2) sign(v - g^2) g^2; u_t = m / (sqrt(v) + eps)"
    source: ClassVar[str] = "M. Zaheer et al. 2018"

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-3
    initial_accumulator_value: float = 1e-6
    corrected: bool = False

    def direction(self, g: np.ndarray, x: np.ndarray) -> np.ndarray:
        beta1, beta2 = self.betas
        v, rows = np.full(g.shape[1:], self.initial_accumulator_value), []
        for square in g**2:
            v = v - (1 - beta2) * np.sign(v - square) * square
            rows.append(v)
        m, v = average(beta1, g, corrected=False), np.stack(rows)
        if self.corrected:
            m = m / bias(beta1, g) + self.initial_accumulator_value * (1 / bias(beta1, g) - 1)
            v = v / bias(beta2, g)
        return quotient(m, np.sqrt(v) + self.eps)


@dataclass(frozen=True)
class RMSprop(Claim):
    """Divide by the root of a running average of squared gradients.

    v = Σⱼ (1 − α)·α^(t−j)·gⱼ²;  d = g/(√v + ε), or of v − mean² if centered;  u = Σⱼ β^(t−j)·dⱼ

    Attributes:
        alpha: α.
        eps: ε.
        momentum: β.
        centered: whether the square of the average gradient is taken off.
        eps_inside: whether the divisor is √(v + ε), as in Optax.
    """

    family: ClassVar[str] = "rmsprop"
    formula: ClassVar[str] = "v_t = (1-alpha) sum_j alpha^(t-j) g_j^2; u = g / (sqrt(v) + eps)"
    source: ClassVar[str] = "T. Tieleman, G. Hinton 2012; A. Graves 2013 (centered); torch.optim.RMSprop"

    alpha: float = 0.99
    eps: float = 1e-8
    momentum: float = 0.0
    centered: bool = False
    eps_inside: bool = False

    def direction(self, g: np.ndarray, x: np.ndarray) -> np.ndarray:
        v = average(self.alpha, g**2, corrected=False)
        if self.centered:
            v = np.maximum(v - average(self.alpha, g, corrected=False) ** 2, 0.0)
        d = quotient(g, np.sqrt(v + self.eps) if self.eps_inside else np.sqrt(v) + self.eps)
        return weighted(powers(self.momentum, len(g)), d) if self.momentum else d


@dataclass(frozen=True)
class Adagrad(Claim):
    """Divide by the root of all squared gradients: u = g/(√(s₀ + Σⱼ gⱼ²) + ε)/(1 + (t − 1)·d).

    Attributes:
        lr_decay: d.
        initial_accumulator_value: s₀.
        eps: ε.
        eps_inside: whether the divisor is √(s + ε), as in Optax.
    """

    family: ClassVar[str] = "adagrad"
    formula: ClassVar[str] = "u_t = g / (sqrt(s0 + sum_j g_j^2) + eps) / (1 + (t-1) d)"
    source: ClassVar[str] = "J. Duchi, E. Hazan, Y. Singer 2011; torch.optim.Adagrad"

    lr_decay: float = 0.0
    initial_accumulator_value: float = 0.0
    eps: float = 1e-10
    eps_inside: bool = False

    def direction(self, g: np.ndarray, x: np.ndarray) -> np.ndarray:
        s = self.initial_accumulator_value + np.cumsum(g**2, axis=0)
        divisor = np.sqrt(s + self.eps) if self.eps_inside else np.sqrt(s) + self.eps
        return quotient(g, divisor) / along(1 + self.lr_decay * np.arange(len(g)), g)


@dataclass(frozen=True)
class Adadelta(Claim):
    """Scale by past updates over past gradients: u = g·√(d + ε)/√(v + ε), d averages u².

    Attributes:
        rho: the factor of both averages.
        eps: ε.
    """

    family: ClassVar[str] = "adadelta"
    formula: ClassVar[str] = (
        "v' = rho v + (1-rho) g^2; u = g sqrt(d + eps) / sqrt(v' + eps); d' = rho d + (1-rho) u^2"
    )
    source: ClassVar[str] = "M. Zeiler 2012; torch.optim.Adadelta"

    rho: float = 0.9
    eps: float = 1e-6

    def direction(self, g: np.ndarray, x: np.ndarray) -> np.ndarray:
        v, d, rows = average(self.rho, g**2, corrected=False), np.zeros(g.shape[1:]), []
        for now, size in zip(g, v, strict=True):
            u = now * np.sqrt(d + self.eps) / np.sqrt(size + self.eps)
            d = self.rho * d + (1 - self.rho) * u**2
            rows.append(u)
        return np.stack(rows)
