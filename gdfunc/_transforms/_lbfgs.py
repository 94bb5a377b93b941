"""L-BFGS: curvature from the last few displacements and changes of the gradient."""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _tree
from .._errors import check_int, check_scalar
from .._numerics import Scalar, like
from .._tree import Tree
from ._base import GradientTransformation, needed, stateful, transformation


class LBFGSState(NamedTuple):
    """The last point and gradient, and up to m pairs, the newest last; the parameters as one vector."""

    params: Tensor  # [P]
    grads: Tensor  # [P]
    s: Tensor  # [m, P], displacements
    y: Tensor  # [m, P], changes of the gradient
    rho: Tensor  # [m], 1/sᵀy; 0 where there is no pair yet


@transformation
def lbfgs(history: int = 10, *, eps: Scalar = 1e-10) -> GradientTransformation:
    """Multiply the gradient by an inverse Hessian estimated from the last few steps.

    u = H·g,  H = γ·I changed by the BFGS formula for every kept pair sᵢ = θᵢ₊₁ − θᵢ, yᵢ = gᵢ₊₁ − gᵢ

    γ = sᵀy/yᵀy of the newest pair; without any pair γ = min(1, 1/‖g‖₁), as in `torch.optim.LBFGS`. A
    pair with sᵀy <= eps, along which the loss does not curve upwards, is dropped.

    All gradients should be those of one loss: with mini-batches, the difference of two batches would count
    as curvature. lr = 1 is the natural step. `gd.methods.lbfgs` is safe far from the minimum too: it
    searches along u.

    Args:
        history: m, how many pairs to keep, an int >= 1.
        eps: the curvature that a pair must exceed, a number >= 0 or a 0-d tensor.

    Returns:
        A transformation that needs params in update. Its state has the fields `params` [P], `grads` [P],
        `s` [m, P], `y` [m, P] and `rho` [m], for P parameters in total.

    Raises:
        ValueError: a hyperparameter is out of range; (in update) params is missing.

    Example:
        >>> transform = gd.lbfgs(history=1)
        >>> state = transform.init(torch.tensor([4.0]))
        >>> updates, state = transform.update(torch.tensor([8.0]), state, torch.tensor([4.0]))
        >>> updates, state = transform.update(torch.tensor([6.0]), state, torch.tensor([3.0]))
        >>> updates  # a parabola: the step of length 1 ends at its minimum
        tensor([3.])

    References:
        J. Nocedal, "Updating quasi-Newton matrices with limited storage", 1980.
        J. Nocedal, S. J. Wright, "Numerical optimization", 2nd ed., 2006, algorithms 7.4 and 7.5.
    """
    history = check_int("history", history, 1)
    eps = check_scalar("eps", eps, "[0, inf)")

    def init(params: Tree) -> LBFGSState:
        start = _tree.ravel(params)
        pairs = start.new_zeros(history, len(start))
        # The first displacement is zero, so the first pair is never kept.
        return LBFGSState(start, torch.zeros_like(start), pairs, pairs.clone(), start.new_zeros(history))

    def update(grads: Tree, state: LBFGSState, params: Tree = None) -> tuple[Tree, LBFGSState]:
        point, gradient = _tree.ravel(needed(params, "lbfgs")), _tree.ravel(grads)
        if len(point) != len(state.params):
            raise ValueError(
                f"optimizer state was made for a different parameter tree: it has {len(state.params)} "
                f"parameters but params has {len(point)}; make it with transform.init(params)"
            )
        state = remember(state, point, gradient, eps)
        return _tree.unravel(direction(state), grads), state

    return stateful(LBFGSState, init, update)


def remember(state: LBFGSState, point: Tensor, gradient: Tensor, eps: Scalar) -> LBFGSState:
    """Move to a point, and keep the pair of the way there if it curves upwards by more than eps."""
    s, y = point - state.params, gradient - state.grads
    curvature = s @ y
    keep = curvature > like(eps, point)
    inverse = 1 / torch.where(keep, curvature, torch.ones_like(curvature))

    def push(rows: Tensor, row: Tensor) -> Tensor:
        return torch.where(keep, torch.cat([rows[1:], row[None]]), rows)

    return LBFGSState(point, gradient, push(state.s, s), push(state.y, y), push(state.rho, inverse))


def direction(state: LBFGSState) -> Tensor:
    """Compute H·g in two passes over the pairs; a row of zeros with rho = 0 changes nothing."""
    gradient, s, y, rho = state.grads, state.s, state.y, state.rho
    found = rho[-1] > 0
    norm = torch.where(found, y[-1] @ y[-1], gradient.abs().sum().clamp(min=1))
    gamma = torch.where(found, s[-1] @ y[-1], torch.ones_like(norm)) / norm
    u, weights = gradient, []
    for i in reversed(range(len(rho))):
        weights.append(rho[i] * (s[i] @ u))
        u = u - weights[-1] * y[i]
    u = gamma * u
    for i, weight in enumerate(reversed(weights)):
        u = u + (weight - rho[i] * (y[i] @ u)) * s[i]
    return u
