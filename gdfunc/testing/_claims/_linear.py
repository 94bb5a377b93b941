"""Methods that are linear in the gradients."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ._base import Arrays, Choices, Claim, along, powers, products, weighted


@dataclass(frozen=True)
class GradientDescent(Claim):
    """θ' = θ − lr·g."""

    family: ClassVar[str] = "gradient descent"
    formula: ClassVar[str] = "x_t - x_(t-1) = -lr_t g_t"
    is_linear: ClassVar[bool] = True

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
    is_linear: ClassVar[bool] = True
    choices: ClassVar[Choices] = {"form": ("buffer", "displacement")}

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


@dataclass(frozen=True)
class FixedCoefficients(Claim):
    """Any method whose moves are linear in the gradients, with coefficients that depend on t and lr alone.

    x_t = x₀ − Σₛ cₜₛ·gₛ. The coefficients are measured, and laws are about what follows from them.
    """

    family: ClassVar[str] = "fixed coefficients"
    formula: ClassVar[str] = "x_t = x_0 - sum_s c_ts g_s"
    is_linear: ClassVar[bool] = True


@dataclass(frozen=True)
class Nesterov(Claim):
    """Nesterov's method, seen at its look-ahead points y; its answer is x.

    xₜ = yₜ₋₁ − lr·gₜ;  yₜ = xₜ + βₜ·(xₜ − xₜ₋₁)

    Attributes:
        momentum: β, or (β₁, β₂, …), or None for βₜ = (t − 1)/(t + 2).
    """

    family: ClassVar[str] = "nesterov"
    formula: ClassVar[str] = (
        "y_t - y_(t-1) = beta_t v_t - lr_t g_t, v_t = -sum_j (beta_j ... beta_(t-1)) lr_j g_j"
    )
    source: ClassVar[str] = "Yu. Nesterov 1983"
    is_linear: ClassVar[bool] = True

    momentum: float | tuple[float, ...] | None = None

    def betas(self, steps: int) -> np.ndarray:
        """Return βₜ for t = 1 … T."""
        t = np.arange(1.0, steps + 1)
        return (t - 1) / (t + 2) if self.momentum is None else np.resize(self.momentum, steps)

    def moves(self, grads: Arrays, points: Arrays, lrs: np.ndarray) -> Arrays:
        betas, moves = self.betas(len(lrs)), []
        for g in grads:
            kick = -along(lrs, g) * g
            moves.append(along(betas, g) * weighted(products(betas), kick) + kick)
        return moves

    def answers(self, grads: Arrays, points: Arrays, lrs: np.ndarray) -> Arrays:
        steps = [y[:-1] - along(lrs, g) * g for g, y in zip(grads, points, strict=True)]
        return [np.concatenate([y[:1], x]) for y, x in zip(points, steps, strict=True)]


@dataclass(frozen=True)
class OGM(Claim):
    """The optimized gradient method.

    yₜ = xₜ₋₁ − lr·gₜ;  xₜ = yₜ + (θₜ₋₁ − 1)/θₜ·(yₜ − yₜ₋₁) + θₜ₋₁/θₜ·(yₜ − xₜ₋₁)

    Attributes:
        steps: N, after which θ is larger; None: no step is the last.
    """

    family: ClassVar[str] = "ogm"
    formula: ClassVar[str] = (
        "x_t - x_(t-1) = b_t v_t - (1 + c_t) lr_t g_t, b_t = (theta_(t-1) - 1)/theta_t, "
        "c_t = theta_(t-1)/theta_t, v_t = y_t - y_(t-1)"
    )
    source: ClassVar[str] = "D. Kim, J. A. Fessler 2016"
    is_linear: ClassVar[bool] = True

    steps: int | None = None

    def thetas(self, steps: int) -> np.ndarray:
        """Return θₜ for t = 0 … T."""
        thetas = [1.0]
        for t in range(1, steps + 1):
            thetas.append((1 + np.sqrt(1 + (8 if t == self.steps else 4) * thetas[-1] ** 2)) / 2)
        return np.array(thetas)

    def moves(self, grads: Arrays, points: Arrays, lrs: np.ndarray) -> Arrays:
        thetas, moves = self.thetas(len(lrs)), []
        b, c = (thetas[:-1] - 1) / thetas[1:], thetas[:-1] / thetas[1:]
        for g in grads:
            kick = -along(lrs, g) * g
            late = np.concatenate([0 * kick[:1], (along(c, g) * kick)[:-1]])
            moves.append(along(b, g) * weighted(products(b), kick + late) + along(1 + c, g) * kick)
        return moves


@dataclass(frozen=True)
class TripleMomentum(Claim):
    """The triple momentum method, seen at the points y of its gradients; its answer is x.

    dₜ = β·dₜ₋₁ − lr·gₜ;  ξₜ = ξₜ₋₁ + dₜ;  yₜ = ξₜ + γ·dₜ;  xₜ = ξₜ + δ·dₜ
    ρ = 1 − 1/√κ,  β = ρ²/(2 − ρ),  γ = ρ²/((1 + ρ)·(2 − ρ)),  δ = ρ²/(1 − ρ²)
    """

    family: ClassVar[str] = "triple momentum"
    formula: ClassVar[str] = (
        "y_t - y_(t-1) = (1 + gamma) d_t - gamma d_(t-1), d_t = -sum_j beta^(t-j) lr_j g_j"
    )
    source: ClassVar[str] = "B. Van Scoy, R. A. Freeman, K. M. Lynch 2018"
    is_linear: ClassVar[bool] = True

    condition_number: float

    @property
    def rho(self) -> float:
        """Return the factor by which the error falls in a step."""
        return 1 - self.condition_number**-0.5

    def _displacements(self, grads: Arrays, lrs: np.ndarray) -> Arrays:
        beta = self.rho**2 / (2 - self.rho)
        return [-weighted(powers(beta, len(lrs)), along(lrs, g) * g) for g in grads]

    def moves(self, grads: Arrays, points: Arrays, lrs: np.ndarray) -> Arrays:
        gamma = self.rho**2 / ((1 + self.rho) * (2 - self.rho))
        return [d + gamma * np.diff(d, axis=0, prepend=0 * d[:1]) for d in self._displacements(grads, lrs)]

    def answers(self, grads: Arrays, points: Arrays, lrs: np.ndarray) -> Arrays:
        delta = self.rho**2 / (1 - self.rho**2)
        ways = [d.cumsum(axis=0) + delta * d for d in self._displacements(grads, lrs)]
        return [y[:1] + np.concatenate([0 * y[:1], way]) for y, way in zip(points, ways, strict=True)]
