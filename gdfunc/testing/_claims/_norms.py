"""Methods that clip or scale by norms, or make matrices orthogonal."""

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from ._adaptive import Adam
from ._base import Arrays, Choices, Claim, along, average, join
from ._linear import Momentum


@dataclass(frozen=True)
class ClipByValue(Claim):
    """u = min(max(g, −c), c), entry by entry."""

    family: ClassVar[str] = "clip by value"
    formula: ClassVar[str] = "u_t = min(max(g_t, -c), c)"
    source: ClassVar[str] = "torch.nn.utils.clip_grad_value_"

    limit: float

    def own_feeds(self) -> dict[str, Arrays]:
        return {"at the limit": boundary(self.limit, whole=False)}

    def direction(self, g: np.ndarray, x: np.ndarray) -> np.ndarray:
        return np.clip(g, -self.limit, self.limit)


@dataclass(frozen=True)
class ClipByGlobalNorm(Claim):
    """u = g·min(1, C/‖g‖), with ‖g‖ over all leaves together."""

    family: ClassVar[str] = "clip by global norm"
    formula: ClassVar[str] = "u_t = g_t min(1, C/|g_t|), |g_t| over all leaves"
    source: ClassVar[str] = "R. Pascanu, T. Mikolov, Y. Bengio 2013"

    max_norm: float

    def own_feeds(self) -> dict[str, Arrays]:
        return {"at the limit": boundary(self.max_norm, whole=True)}

    def directions(self, grads: Arrays, points: Arrays) -> Arrays:
        norm = norm_of(grads)
        factor = np.minimum(1.0, self.max_norm / np.where(norm == 0, self.max_norm, norm))
        return [g * along(factor, g) for g in grads]


@dataclass(frozen=True)
class AdaptiveClip(Claim):
    """u = Gᵢ·min(1, λ·max(‖Wᵢ‖, ε)/‖Gᵢ‖), i over dim 0 of a leaf of two or more dims; else one unit."""

    family: ClassVar[str] = "adaptive clip"
    formula: ClassVar[str] = "u_i = G_i min(1, lambda max(|W_i|, eps)/|G_i|), i over rows"
    source: ClassVar[str] = "A. Brock, S. De, S. Smith, K. Simonyan 2021"

    clipping: float = 0.01
    eps: float = 1e-3

    def direction(self, g: np.ndarray, x: np.ndarray) -> np.ndarray:
        units = (*g.shape[:2], -1) if g.ndim > 2 else (len(g), 1, -1)
        rows = g.reshape(units)
        allowed = self.clipping * np.maximum(np.linalg.norm(x.reshape(units), axis=-1), self.eps)
        size = np.linalg.norm(rows, axis=-1)
        factor = np.minimum(1.0, allowed / np.where(size == 0, allowed, size))
        return (rows * factor[..., None]).reshape(g.shape)


@dataclass(frozen=True)
class TrustRatio(Claim):
    """u = c·‖θ‖/‖g‖·g for every leaf; g as it is where either norm is zero."""

    family: ClassVar[str] = "trust ratio"
    formula: ClassVar[str] = "u_t = c |x|/|g_t| g_t leaf by leaf, g_t where a norm is 0"
    source: ClassVar[str] = "Y. You et al. 2020"

    coefficient: float = 1.0

    def direction(self, g: np.ndarray, x: np.ndarray) -> np.ndarray:
        return g * along(trust(norm_of([x]), norm_of([g]), self.coefficient), g)


@dataclass(frozen=True)
class LARS(Claim):
    """LARS: the trust ratio of each leaf's decayed gradient, then momentum.

    d = η·‖θ‖/(‖g‖ + λ·‖θ‖)·(g + λ·θ), or g + λ·θ where a norm is zero;  u = β·b + d

    Attributes:
        momentum, weight_decay, trust_coefficient: β, λ and η.
        norms: "apart" divides by ‖g‖ + λ·‖θ‖, as the paper; "together" by ‖g + λ·θ‖, as Optax.
        form: "buffer" or "displacement", as `Momentum`'s. Optax has the displacement, like the paper.
    """

    family: ClassVar[str] = "lars"
    formula: ClassVar[str] = (
        "d = eta |x|/(|g| + lambda |x|) (g + lambda x) leaf by leaf, u_t = sum_j beta^(t-j) d_j"
    )
    source: ClassVar[str] = "Y. You, I. Gitman, B. Ginsburg 2017"
    choices: ClassVar[Choices] = {
        "norms": ("apart", "together"),
        "form": ("buffer", "displacement"),
    }

    momentum: float = 0.9
    weight_decay: float = 0.0
    trust_coefficient: float = 1e-3
    norms: str = "apart"
    form: str = "buffer"

    def moves(self, grads: Arrays, points: Arrays, lrs: np.ndarray) -> Arrays:
        scaled = [self._scaled(g, x) for g, x in zip(grads, points, strict=True)]
        return Momentum(self.momentum, form=self.form).moves(scaled, points, lrs)

    def direction(self, g: np.ndarray, x: np.ndarray) -> np.ndarray:
        return Momentum(self.momentum).direction(self._scaled(g, x), x)

    def _scaled(self, g: np.ndarray, x: np.ndarray) -> np.ndarray:
        decayed, size = g + self.weight_decay * x, norm_of([x])
        slope = norm_of([g])
        below = np.where(slope == 0, 0.0, slope + self.weight_decay * size)
        if self.norms == "together":
            below = norm_of([decayed])
        return decayed * along(trust(size, below, self.trust_coefficient), g)


@dataclass(frozen=True)
class LAMB(Claim):
    """LAMB: r = m̂/(√v̂ + ε) + λ·θ;  u = ‖θ‖/‖r‖·r for every leaf, r where a norm is zero."""

    family: ClassVar[str] = "lamb"
    formula: ClassVar[str] = "r = mean(g)/(sqrt(mean(g^2)) + eps) + lambda x, u = |x|/|r| r leaf by leaf"
    source: ClassVar[str] = "Y. You et al. 2020"

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    weight_decay: float = 1e-2

    def direction(self, g: np.ndarray, x: np.ndarray) -> np.ndarray:
        r = Adam(self.betas, self.eps, weight_decay=self.weight_decay).direction(g, x)
        return TrustRatio().direction(r, x)


@dataclass(frozen=True)
class Muon(Claim):
    """Muon: momentum of matrices, whose singular values all come near one.

    B' = β·B + (1 − β)·G;  N = β·B' + (1 − β)·G with `nesterov`, else B'
    N/max(‖N‖, ε) = U·diag(σ)·Vᵀ;  u = √max(1, rows/columns)·U·diag(p(… p(σ)))·Vᵀ, p(σ) = aσ + bσ³ + cσ⁵

    Newton-Schulz applies the odd polynomial p to each singular value, so the closed form takes an SVD.

    Attributes:
        momentum, nesterov, ns_coefficients, ns_steps, eps: as `gd.muon`.
        slack: the tolerance; about 0.05 for one that iterates in bfloat16, as torch does.
    """

    family: ClassVar[str] = "muon"
    formula: ClassVar[str] = "u = sqrt(max(1, rows/columns)) U p(..p(sigma)) V' of N/|N|"
    source: ClassVar[str] = "K. Jordan et al. 2024; torch.optim.Muon"
    shapes: ClassVar[tuple[tuple[int, ...], ...]] = ((4, 2), (2, 3), (3, 3))

    momentum: float = 0.95
    nesterov: bool = True
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315)
    ns_steps: int = 5
    eps: float = 1e-7
    slack: float = field(default=1e-9, kw_only=True)  # type: ignore[misc]

    def direction(self, g: np.ndarray, x: np.ndarray) -> np.ndarray:
        beta, (a, b, c) = self.momentum, self.ns_coefficients
        n = average(beta, g, corrected=False)
        if self.nesterov:
            n = beta * n + (1 - beta) * g
        is_finite = np.isfinite(n).all((1, 2))[:, None, None]
        left, s, right = np.linalg.svd(np.where(is_finite, n, 0.0), full_matrices=False)
        s = s / np.maximum(norm_of([n]), self.eps)[:, None]
        for _ in range(self.ns_steps):
            s = a * s + b * s**3 + c * s**5
        rows, columns = g.shape[1:]
        u = np.sqrt(max(1.0, rows / columns)) * (left * s[:, None]) @ right
        return np.where(is_finite, u, np.nan)


def norm_of(leaves: Arrays) -> np.ndarray:
    """Return the norm over all leaves in every step, [T]."""
    return np.linalg.norm(join(leaves), axis=1)


def trust(size: np.ndarray, slope: np.ndarray, coefficient: float) -> np.ndarray:
    """Return coefficient·size/slope, or 1 where either is zero."""
    both = (size > 0) & (slope > 0)
    return np.where(both, coefficient * size / np.where(both, slope, 1.0), 1.0)


def boundary(limit: float, whole: bool) -> Arrays:
    """Return gradients just inside, on and just outside a limit: of the whole norm, or of each entry."""
    factors = limit * np.array([0.25, 1 - 2.0**-10, 1.0, 1 + 2.0**-10, 1.5, 4.0])
    parts = np.array([0.6, 0.8]) if whole else np.array([1.0, -1.0])
    return [np.outer(factors, parts[:1]), factors * parts[1]]
