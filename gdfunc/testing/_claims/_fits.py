"""Claims of methods for least squares, which are given residuals in place of a loss."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .._problems import Fit
from ._base import Choices, Claim


@dataclass(frozen=True)
class FitClaim(Claim):
    """A claim about a method that is made of residuals: `make(residual_fn)`."""

    def path(self, problem: Fit, points: np.ndarray, lrs: np.ndarray) -> np.ndarray:
        """Return the point after each step, [T, D], from the subject's own points before it, [T, D]."""
        raise NotImplementedError


@dataclass(frozen=True)
class GaussNewton(FitClaim):
    """Gauss and Newton's method: the residuals are replaced by their tangent.

    θ' = θ − lr·u, where u is the solution of least norm of min ‖J·u − r‖
    """

    family: ClassVar[str] = "gauss-newton"
    formula: ClassVar[str] = "x' = x - lr u, u = argmin |J u - r|, of least norm"
    source: ClassVar[str] = "A. Björck 1996"

    def path(self, problem: Fit, points: np.ndarray, lrs: np.ndarray) -> np.ndarray:
        tangents = [problem.linearise(x) for x in points]
        directions = [np.linalg.lstsq(J, r, rcond=None)[0] for r, J in tangents]
        return points - lrs[:, None] * np.stack(directions)


@dataclass(frozen=True)
class LevenbergMarquardt(FitClaim):
    """Levenberg and Marquardt's method: damped least squares, with Nielsen's rule for the damping.

    θ' = θ − lr·u,  u = argmin ‖J·u − r‖² + μ·‖D·u‖²
    ρ = (‖r(θ)‖² − ‖r(θ')‖²) / (‖r‖² − ‖r − lr·J·u‖²)
    ρ > 0:  μ' = μ·max(⅓, 1 − (2ρ − 1)³), ν' = 2;  otherwise θ' = θ, μ' = μ·ν, ν' = 2ν

    Attributes:
        damping: the first μ.
        units: of D. "columns": the largest norm of each column of J so far. "gradient": for all parameters
            the largest ‖J·g‖/‖g‖ so far, with the gradient g = Jᵀr.
    """

    family: ClassVar[str] = "levenberg-marquardt"
    formula: ClassVar[str] = (
        "x' = x - lr u if it lowers |r|, u = argmin |J u - r|^2 + mu |D u|^2, mu by Nielsen's rule"
    )
    source: ClassVar[str] = "D. Marquardt 1963; J. Moré 1978; H. B. Nielsen 1999"
    choices: ClassVar[Choices] = {"units": ("columns", "gradient")}

    damping: float = 1e-3
    units: str = "columns"

    def path(self, problem: Fit, points: np.ndarray, lrs: np.ndarray) -> np.ndarray:
        mu, nu, scale, ends = self.damping, 2.0, np.zeros(points.shape[1]), []
        for x, lr in zip(points, lrs, strict=True):
            r, J = problem.linearise(x)
            scale = np.maximum(scale, self._scale(r, J))
            damped = np.vstack([J, np.sqrt(mu) * np.diag(scale)])
            u = np.linalg.lstsq(damped, np.append(r, 0 * x), rcond=None)[0]
            new = problem.linearise(x - lr * u)[0]
            predicted = r @ r - np.sum((r - lr * J @ u) ** 2)
            gain: Any = (r @ r - new @ new) / predicted if predicted else -1.0
            ends.append(x - lr * u if gain > 0 else x)
            if gain > 0:
                mu, nu = mu * max(1 / 3, 1 - (2 * gain - 1) ** 3), 2.0
            else:
                mu, nu = mu * nu, 2 * nu
        return np.stack(ends)

    def _scale(self, r: np.ndarray, J: np.ndarray) -> np.ndarray:
        if self.units == "columns":
            return np.linalg.norm(J, axis=0)
        g = J.T @ r
        return np.full(len(g), np.linalg.norm(J @ g) / np.linalg.norm(g) if g.any() else 0.0)
