"""Laws of hypergradients: derivatives of a run's result with respect to its learning rates."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._law import law, require_equal

_CURVATURES, _START = np.array([0.25, 1.0, 1.75]), np.array([2.0, -1.0, 0.5])
_LRS = {
    "another lr in every step": np.array([0.5, 0.125, 0.625, 0.25, 0.75]),
    "equal lrs": np.full(9, 0.25),
}


@law("the derivative of a product; central differences of sixth order", of_optimizers=False)
def check_hypergradient(derivative: Callable[[Callable[..., Tensor], Tensor, Tensor], Any]) -> None:
    """Check the derivatives of the last loss of gradient descent with respect to each learning rate.

    On a diagonal quadratic L = ½Σλx² the derivative is −Σ λ²x₀²·∏ₛ(1 − lrₛλ)²/(1 − lrₜλ), to 1e-9. On
    L = Σ√(1 + x²), whose gradient is not linear, it must agree with differences, to 1e-7. A derivative that
    is truncated, or that leaves a path out, fails.

    Args:
        derivative: `(loss_fn, start, lrs) -> slopes`. It runs T steps of gradient descent and returns the
            derivatives of loss_fn at the last point, [T]. loss_fn is `(params, batch) -> loss`; it ignores
            the batch, which may be left out. start is float64[3], and lrs float64[T].

    Raises:
        LawBroken: a slope is wrong.

    Example:
        >>> from gdfunc import testing as gt
        >>> def unrolled(loss_fn, start, lrs):
        ...     def last_loss(lrs):
        ...         x = start
        ...         for lr in lrs:
        ...             x = x - lr * torch.func.grad(loss_fn)(x)
        ...         return loss_fn(x)
        ...     return torch.func.grad(last_loss)(lrs)
        >>> gt.check_hypergradient(unrolled)
    """
    curvatures, start = torch.from_numpy(_CURVATURES), torch.from_numpy(_START)

    def quadratic(x: Tensor, batch: Any = None) -> Tensor:
        return 0.5 * (curvatures * x * x).sum()

    def hyperbola(x: Tensor, batch: Any = None) -> Tensor:
        return (1 + x * x).sqrt().sum()

    for name, lrs in _LRS.items():
        slopes = derivative(quadratic, start, torch.from_numpy(lrs.copy()))
        factors = 1 - lrs[:, None] * _CURVATURES
        exact = -(_CURVATURES**2 * _START**2 * (factors**2).prod(0) / factors).sum(1)
        formula = "dL/dlr_t = -sum lam^2 x_0^2 prod_s (1 - lr_s lam)^2 / (1 - lr_t lam)"
        require_equal(_array(slopes), exact, formula, scale=np.abs(exact).max(), where=name)
        slopes = derivative(hyperbola, start, torch.from_numpy(lrs.copy()))
        expected = _differences(lrs)
        formula = "dL/dlr_t by differences, L = sum sqrt(1 + x^2)"
        require_equal(
            _array(slopes), expected, formula, scale=np.abs(expected).max(), slack=1e-7, where=name
        )


def _array(slopes: Any) -> np.ndarray:
    return np.asarray(slopes.detach().cpu() if torch.is_tensor(slopes) else slopes, dtype=np.float64)


def _differences(lrs: np.ndarray, h: float = 2.0**-7) -> np.ndarray:
    """Return the slopes of the last loss on Σ√(1 + x²), in NumPy, by differences of sixth order."""

    def last_loss(lrs: np.ndarray) -> float:
        x = _START
        for lr in lrs:
            x = x - lr * x / np.sqrt(1 + x * x)
        return float(np.sqrt(1 + x * x).sum())

    weights = {1: 45 / 60, 2: -9 / 60, 3: 1 / 60}
    moves = h * np.eye(len(lrs))
    return np.array(
        [
            sum(w * (last_loss(lrs + k * move) - last_loss(lrs - k * move)) for k, w in weights.items()) / h
            for move in moves
        ]
    )
