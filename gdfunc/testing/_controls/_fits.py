"""Methods for least squares with one fault each."""

from typing import Any

import torch
from torch import Tensor
from torch.func import hessian, jacrev

from ... import _tree
from .._claims._fits import GaussNewton, LevenbergMarquardt
from .._subject import Subject
from ._base import Leaves, controls, watching


def linearised(residuals: Any, xs: Leaves) -> tuple[Any, Tensor, Tensor, Tensor]:
    """Return residuals of a vector, the vector x [D], r [m] and J [m, D]."""
    x = _tree.ravel(xs)

    def at(v: Tensor) -> Tensor:
        return residuals(_tree.unravel(v, xs)).reshape(-1)

    return at, x, at(x), jacrev(at)(x)


def least_norm(matrix: Tensor, target: Tensor) -> Tensor:
    return torch.linalg.pinv(matrix, rtol=1e-13) @ target


def gauss_newton(claim: GaussNewton, fault: str) -> Subject:
    def rule(residuals: Any, xs: Leaves, state: Any, lr: Any, t: int) -> Any:
        at, x, r, J = linearised(residuals, xs)
        lr = 1.0 if fault == "lr ignored" else lr
        matrix = J.mT @ J
        if fault == "diagonal alone":
            matrix = matrix.diagonal().diag()
        if fault == "newton's matrix":
            matrix = hessian(lambda v: 0.5 * at(v).square().sum())(x)
        if fault == "identity added":
            matrix = matrix + 1e-3 * torch.eye(len(x)).to(x)
        slope = J.mT @ r
        if fault == "slope of the mean":
            slope = 2 * slope / len(r)
        if fault == "last residual left out" and len(r) > 1:
            matrix, slope = J[:-1].mT @ J[:-1], J[:-1].mT @ r[:-1]
        if fault == "signs of the residuals":
            slope = J.mT @ r.sign()
        u = least_norm(J, r) if not fault or fault == "lr ignored" else least_norm(matrix, slope)
        if fault == "solution of the first columns":
            u = torch.cat([least_norm(J[:, : len(r)], r), 0 * x[len(r) :]])
        if fault == "direction of the last step":
            u, state = (u if state is None else state), u
        return _tree.unravel(x - lr * u, xs), state

    return watching(None, rule, f"gauss-newton, {fault or 'right'}")


def levenberg_marquardt(claim: LevenbergMarquardt, fault: str) -> Subject:
    def units(J: Tensor, r: Tensor) -> Tensor:
        if fault == "units of the gradient" or (claim.units == "gradient" and fault != "units of columns"):
            g = J.mT @ r
            size = g.norm()
            return (J @ g).norm() / size * torch.ones_like(g) if size > 0 else 0 * g
        return torch.ones_like(J[0]) if fault == "units left out" else J.norm(dim=0)

    def rule(residuals: Any, xs: Leaves, state: Any, lr: Any, t: int) -> Any:
        at, x, r, J = linearised(residuals, xs)
        mu, nu, scale = state or (claim.damping, 2.0, 0 * x)
        if fault == "units of the first step" and t > 1:
            pass
        elif fault == "units of this step":
            scale = units(J, r)
        else:
            scale = torch.maximum(scale, units(J, r))
        weights = scale if fault == "units without the square" else scale**2
        weight = {"damping left out": 0.0, "damping squared": mu**2}.get(fault, mu)
        rows = torch.cat([J, (weight * weights).sqrt().diag()])
        u = least_norm(rows, torch.cat([r, 0 * x]))
        new, ahead = at(x - lr * u), r - lr * (J @ u)
        old = r.square().sum()
        predicted = old - ahead.square().sum()
        if fault == "prediction without lr":
            predicted = old - (r - J @ u).square().sum()
        if fault == "prediction of half the decrease":
            predicted = predicted / 2
        gain = float((old - new.square().sum()) / predicted) if predicted != 0 else -1.0
        if fault == "no step rejected":
            return _tree.unravel(x - lr * u, xs), (mu * max(1 / 3, 1 - (2 * gain - 1) ** 3), 2.0, scale)
        if gain > (0.25 if fault == "steps with little gain rejected" else 0):
            least = {"damping shrunk by two at most": 1 / 2, "damping kept after a good step": 1.0}
            power = 1 if fault == "gain without the cube" else 3
            factor = max(least.get(fault, 1 / 3), 1 - (2 * gain - 1) ** power)
            back = nu if fault == "growth not reset" else 2.0
            return _tree.unravel(x - lr * u, xs), (mu * factor, back, scale)
        if fault == "damping kept after a bad step":
            nu = 1.0
        growth = nu if fault == "growth not doubled" else 2 * nu
        return xs, (mu * nu, growth, scale)

    return watching(None, rule, f"levenberg-marquardt, {fault or 'right'}")


_OF_DAMPING = (
    "units left out",
    "units of the first step",
    "units of this step",
    "units without the square",
    "damping left out",
    "damping squared",
    "prediction without lr",
    "prediction of half the decrease",
    "no step rejected",
    "steps with little gain rejected",
    "damping shrunk by two at most",
    "damping kept after a good step",
    "gain without the cube",
    "growth not reset",
    "damping kept after a bad step",
    "growth not doubled",
    "units of the gradient",
)
CONTROLS = [
    *controls(
        GaussNewton(),
        gauss_newton,
        "lr ignored",
        "diagonal alone",
        "newton's matrix",
        "identity added",
        "slope of the mean",
        "last residual left out",
        "signs of the residuals",
        "solution of the first columns",
        "direction of the last step",
    ),
    *controls(LevenbergMarquardt(1e-3), levenberg_marquardt, *_OF_DAMPING),
    *controls(LevenbergMarquardt(1e-3, "gradient"), levenberg_marquardt, "units of columns"),
]
