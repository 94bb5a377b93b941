"""Polyak's heavy ball."""

from typing import NamedTuple

from torch import Tensor

from .. import _tree
from .._errors import check_scalar
from .._gradients import LossFn, batch_grad
from .._numerics import like
from .._step import Step, apply_updates, copy_params
from .._transforms._base import zeros
from .._tree import Tree


class HeavyBallState(NamedTuple):
    """Where the ball is, and how it got there."""

    params: Tree
    displacement: Tree  # θₜ − θₜ₋₁


def heavy_ball(loss_fn: LossFn, momentum: float | Tensor) -> Step:
    """Make the step of Polyak's heavy ball, which repeats a share of its last displacement.

    θₜ₊₁ = θₜ − lr·∇L(θₜ) + β·(θₜ − θₜ₋₁)

    For a constant lr this equals torch's momentum, θ − lr·v with v = β·v + g. They differ when lr
    changes: torch's memory is rescaled by the new lr, whereas a displacement stays what it was.

    Args:
        loss_fn: `(params, batch) -> loss`; see `batch_grad`.
        momentum: β, a number in [0, 1) or a 0-d tensor.

    Returns:
        A `Step`. The fields of its state are `params` and `displacement`.

    Raises:
        ValueError: momentum is out of range; (in the step) as `make_step`.
        TypeError: (in the step) the state is that of another step.

    Example:
        >>> step = gd.methods.heavy_ball(lambda w, batch: 0.5 * w**2, 0.5)
        >>> state = step.init(torch.tensor(1.0))
        >>> for _ in range(2):
        ...     state, loss = step(state, None, 0.5)
        >>> state
        HeavyBallState(params=tensor(0.), displacement=tensor(-0.5000))

    References:
        B. T. Polyak, "Some methods of speeding up the convergence of iteration methods", 1964.
    """
    momentum = check_scalar("momentum", momentum, "[0, 1)")
    gradients = batch_grad(loss_fn)

    def init(params: Tree) -> HeavyBallState:
        return HeavyBallState(copy_params(params), zeros(params))

    def advance(
        state: HeavyBallState, batch: Tree, lr: float | Tensor
    ) -> tuple[HeavyBallState, Tensor, Tree]:
        grads, loss = gradients(state.params, batch)
        kept = _tree.map(lambda d: like(momentum, d) * d, state.displacement)
        displacement = apply_updates(kept, grads, lr)
        params = _tree.map(lambda p, d: p + d, state.params, displacement)
        return HeavyBallState(params, displacement), loss, grads

    return Step(init, advance, HeavyBallState)
