"""Claims of methods that look at the loss, or estimate its curvature."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .._problems import Problem
from ._base import Arrays, Choices, Claim, join, split


@dataclass(frozen=True)
class Pointwise(Claim):
    """A claim whose steps are decided by the loss around the point, without any memory."""

    def displacement(self, problem: Problem, x: np.ndarray, lr: float) -> np.ndarray:
        """Return the move from a point [D] of a problem, [D]."""
        raise NotImplementedError


@dataclass(frozen=True)
class Polyak(Pointwise):
    """Polyak's step size, for a loss whose minimum is known.

    θ' = θ − lr·a·g with a = (f(θ) − f*)/‖g‖², at least 0 and at most max_step

    Attributes:
        minimum: f*.
        max_step: the bound; None: no bound.
    """

    family: ClassVar[str] = "polyak's step"
    formula: ClassVar[str] = "x' - x = -lr a g with a = min(max(f(x) - f*, 0) / |g|^2, max_step)"
    source: ClassVar[str] = "B. T. Polyak 1987"

    minimum: float = 0.0
    max_step: float | None = None

    def displacement(self, problem: Problem, x: np.ndarray, lr: float) -> np.ndarray:
        g = problem.gradients(x)
        excess, square = max(float(problem.values(x)) - self.minimum, 0.0), float(g @ g)
        size = excess / square if square else 0.0
        return -lr * (size if self.max_step is None else min(size, self.max_step)) * g


@dataclass(frozen=True)
class LineSearch(Pointwise):
    """Gradient descent with a line search by backtracking.

    θ' = θ − a·g with the first a in lr, lr·q, lr·q², … with  f(θ − a·g) <= f(θ) − c·a·‖g‖²

    If none of the m + 1 trials is good, the point stays.

    Attributes:
        decrease: c.
        factor: q.
        max_steps: m.
    """

    family: ClassVar[str] = "line search"
    formula: ClassVar[str] = (
        "x' - x = -a g with the first a in lr q^j, j <= m, with f(x - a g) <= f(x) - c a |g|^2"
    )
    source: ClassVar[str] = "L. Armijo 1966"

    decrease: float = 1e-4
    factor: float = 0.5
    max_steps: int = 10

    def displacement(self, problem: Problem, x: np.ndarray, lr: float) -> np.ndarray:
        g, before = problem.gradients(x), problem.values(x)
        for a in lr * self.factor ** np.arange(self.max_steps + 1.0):
            if problem.values(x - a * g) <= before - self.decrease * a * (g @ g):
                return -a * g
        return 0.0 * g


@dataclass(frozen=True)
class SAM(Pointwise):
    """Sharpness-aware minimisation: the gradient of a point a little uphill.

    θ' = θ − lr·∇f(θ + ε) with ε = ρ·g/‖g‖, or with adaptive ε = ρ·θ²g/‖θg‖, entry by entry

    Attributes:
        rho: ρ.
        adaptive: whether distances are in units of each parameter.
    """

    family: ClassVar[str] = "sam"
    formula: ClassVar[str] = (
        "x' - x = -lr grad f(x + e) with e = rho g/|g|, or rho x^2 g/|x g| if it is adaptive"
    )
    source: ClassVar[str] = "P. Foret et al. 2021; J. Kwon et al. 2021"

    rho: float = 0.05
    adaptive: bool = False

    def displacement(self, problem: Problem, x: np.ndarray, lr: float) -> np.ndarray:
        g = problem.gradients(x)
        units = np.abs(x) if self.adaptive else np.ones_like(x)
        length = float(np.linalg.norm(units * g))
        uphill = self.rho * units**2 * g / length if length else 0.0 * g
        return -lr * problem.gradients(x + uphill)


@dataclass(frozen=True)
class LBFGS(Claim):
    """L-BFGS without a line search: BFGS from γ·I over the last m pairs, with dense matrices.

    u = H·g;  H ← (I − ρ·syᵀ)·H·(I − ρ·ysᵀ) + ρ·ssᵀ with ρ = 1/sᵀy, for every pair s = θ − θ₋₁, y = g − g₋₁

    γ = sᵀy/yᵀy of the newest pair, and pairs with sᵀy <= eps are not kept. Without a pair the direction is
    g·min(1, 1/‖g‖₁).

    Attributes:
        history: m.
        eps: the curvature that a pair must exceed.
        shortens: "until a pair", or as in torch "first step": later steps without a pair go along g.
    """

    family: ClassVar[str] = "l-bfgs"
    formula: ClassVar[str] = (
        "u = H g, H = gamma I changed by (I - rho s y') H (I - rho y s') + rho s s' for the last m pairs"
    )
    source: ClassVar[str] = "D. C. Liu, J. Nocedal 1989; J. Nocedal, S. J. Wright 2006"
    choices: ClassVar[Choices] = {"shortens": ("until a pair", "first step")}
    counts: ClassVar[tuple[str, ...]] = ("history",)

    history: int = 10
    eps: float = 1e-10
    shortens: str = "until a pair"

    def directions(self, grads: Arrays, points: Arrays) -> Arrays:
        g, x = join(grads), join(points)
        u, pairs = np.empty_like(g), []
        for t in range(len(g)):
            if t and (x[t] - x[t - 1]) @ (g[t] - g[t - 1]) > self.eps:
                pairs.append((x[t] - x[t - 1], g[t] - g[t - 1]))
            if pairs:
                u[t] = dense_bfgs(pairs[-self.history :]) @ g[t]
            else:
                is_short = t == 0 or self.shortens == "until a pair"
                u[t] = g[t] / max(1.0, np.abs(g[t]).sum()) if is_short else g[t]
        return split(u, grads)


def dense_bfgs(pairs: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Return the inverse Hessian of BFGS, [D, D], from pairs (s, y) in order."""
    s, y = pairs[-1]
    identity = np.eye(len(s))
    inverse = (s @ y) / (y @ y) * identity
    for s, y in pairs:
        left = identity - np.outer(s, y) / (s @ y)
        inverse = left @ inverse @ left.T + np.outer(s, s) / (s @ y)
    return inverse


@dataclass(frozen=True)
class Wolfe(Claim):
    """L-BFGS with a line search, whose every move ends at Wolfe's strong conditions.

    θ' = θ − a·u with u = H·g as `LBFGS` has it, whatever its length, and an a > 0 for which
    f(θ') <= f(θ) − c₁·a·⟨g, u⟩  and  |⟨∇f(θ'), u⟩| <= c₂·⟨g, u⟩

    The first trial of the first search moves by lr along the unit vector, and is accepted where it keeps
    both. Steps that move nothing are part of a search.

    Attributes:
        decrease: c₁.
        curvature: c₂.
        history: how many pairs H is made of.
    """

    family: ClassVar[str] = "strong wolfe"
    formula: ClassVar[str] = "x' = x - a H g with f(x') <= f(x) - c1 a <g, Hg>, |<g', Hg>| <= c2 <g, Hg>"
    source: ClassVar[str] = "J. Nocedal, S. J. Wright 2006, algorithms 3.5, 3.6 and 7.5"
    counts: ClassVar[tuple[str, ...]] = ("history",)

    decrease: float = 1e-4
    curvature: float = 0.9
    history: int = 10
