"""Polyak's heavy ball."""

from typing import NamedTuple

from torch import Tensor

from .. import _tree
from .._errors import check_scalar
from .._gradients import LossFn, batch_grad
from .._step import apply_updates
from .._transforms import zeros
from .._tree import Tree
from ._method import Method, as_method, like


class HeavyBallState(NamedTuple):
    """Where the ball is, and how it got there."""

    params: Tree
    displacement: Tree  # θₜ − θₜ₋₁


def make_heavy_ball_step(loss_fn: LossFn, momentum: float | Tensor) -> Method:
    """Make the step of Polyak's heavy ball, which repeats a share of its last displacement.

    θₜ₊₁ = θₜ − lr·∇L(θₜ) + β·(θₜ − θₜ₋₁)

    torch's momentum, θ − lr·v with v = β·v + g, is the same for a constant lr. When lr changes it is
    not: there the memory is rescaled by the new lr, here it is a displacement and stays what it was.

    Args:
        loss_fn: `(params, batch) -> loss`; see `batch_grad`.
        momentum: β, a number in [0, 1) or a 0-d tensor.

    Returns:
        `step(state, batch, lr) -> (state, loss)`, with `step.init(params)` for the first state; its
        fields are `params` and `displacement`.

    Raises:
        ValueError: momentum is out of range; (in the step) as `make_step`.
        TypeError: (in the step) the state is that of another method.

    Example:
        >>> step = gd.make_heavy_ball_step(lambda w, batch: 0.5 * w**2, 0.5)
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
        return HeavyBallState(params, zeros(params))

    def step(state: HeavyBallState, batch: Tree, lr: float | Tensor) -> tuple[HeavyBallState, Tensor, Tree]:
        grads, loss = gradients(state.params, batch)
        kept = _tree.map(lambda d: like(momentum, d) * d, state.displacement)
        displacement = apply_updates(kept, grads, lr)
        params = _tree.map(lambda p, d: p + d, state.params, displacement)
        return HeavyBallState(params, displacement), loss, grads

    return as_method(HeavyBallState, init, step)
