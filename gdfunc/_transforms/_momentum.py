"""Directions from a running average of gradients, and from their signs."""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _tree
from .._errors import check_scalar
from .._tree import Tree
from ._base import (
    GradientTransformation,
    Scalar,
    each_leaf,
    in_dtype,
    lerp,
    no_steps,
    select,
    stateful,
    stateless,
    zeros,
)


class MomentumState(NamedTuple):
    step: Tensor
    momentum_buffer: Tree


def momentum(
    momentum: Scalar = 0.9, *, dampening: Scalar = 0.0, nesterov: bool = False
) -> GradientTransformation:
    """Accumulate gradients as `torch.optim.SGD(momentum=)` does.

    b₁ = g₁,  bₜ = β·bₜ₋₁ + (1 − d)·gₜ;  u = b, or g + β·b with `nesterov`

    At a constant lr this is Polyak's heavy ball; when lr changes it is not: see `methods.heavy_ball`.

    Args:
        momentum: β in [0, 1).
        dampening: d in [0, 1].
        nesterov: take the look-ahead direction.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> transform = gd.momentum(0.9)
        >>> state = transform.init(torch.tensor(0.0))
        >>> for _ in range(3):
        ...     u, state = transform.update(torch.tensor(1.0), state)
        >>> u
        tensor(2.7100)

    References:
        I. Sutskever, J. Martens, G. Dahl, G. Hinton, "On the importance of initialization and momentum in
        deep learning", 2013. torch: `SGD(momentum=, dampening=, nesterov=)`.
    """
    momentum = check_scalar("momentum", momentum, "[0, 1)")
    dampening = check_scalar("dampening", dampening, "[0, 1]")

    def init(params: Tree) -> MomentumState:
        return MomentumState(no_steps(params), zeros(params))

    def update(grads: Tree, state: MomentumState, params: Tree = None) -> tuple[Tree, MomentumState]:
        del params

        @cache
        def weights(dtype: torch.dtype) -> tuple[Scalar, Scalar]:
            beta, damp = in_dtype(dtype, momentum, dampening)
            return beta, select(state.step == 0, 1.0, 1.0 - damp, dtype)

        def rule(g: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            beta, weight = weights(g.dtype)
            b = beta * b + weight * g
            return (g + beta * b if nesterov else b), b

        updates, buffer = each_leaf(rule, grads, state.momentum_buffer)
        return updates, MomentumState(state.step + 1, buffer)

    return stateful(MomentumState, init, update)


def sign() -> GradientTransformation:
    """Take the sign of every entry of the gradient.

    u = sign(g)

    Example:
        >>> gd.sign().update(torch.tensor([3.0, -0.1, 0.0]), ())
        (tensor([ 1., -1.,  0.]), ())

    References:
        J. Bernstein, Y.-X. Wang, K. Azizzadenesheli, A. Anandkumar, "signSGD: compressed optimisation for
        non-convex problems", 2018.
    """
    return stateless(torch.sign)


class LionState(NamedTuple):
    exp_avg: Tree


def lion(betas: tuple[Scalar, Scalar] = (0.9, 0.99)) -> GradientTransformation:
    """Take the sign of an average that leans towards the newest gradient.

    u = sign(β₁·m + (1 − β₁)·g),  m' = β₂·m + (1 − β₂)·g

    Args:
        betas: (β₁, β₂), each in [0, 1).

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> transform = gd.lion()
        >>> transform.update(torch.tensor([2.0, -0.5]), transform.init(torch.zeros(2)))
        (tensor([ 1., -1.]), LionState(exp_avg=tensor([ 0.0200, -0.0050])))

    References:
        X. Chen et al., "Symbolic discovery of optimization algorithms", 2023.
    """
    betas = check_betas(betas)

    def init(params: Tree) -> LionState:
        return LionState(zeros(params))

    def update(grads: Tree, state: LionState, params: Tree = None) -> tuple[Tree, LionState]:
        del params

        def rule(g: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
            beta1, beta2 = in_dtype(g.dtype, *betas)
            return torch.sign(lerp(m, g, 1.0 - beta1)), lerp(m, g, 1.0 - beta2)

        updates, exp_avg = each_leaf(rule, grads, state.exp_avg)
        return updates, LionState(exp_avg)

    return stateful(LionState, init, update)


class RpropState(NamedTuple):
    prev: Tree
    step_size: Tree


def rprop(
    etas: tuple[Scalar, Scalar] = (0.5, 1.2), step_sizes: tuple[Scalar, Scalar] = (1e-6, 50.0)
) -> GradientTransformation:
    """Give every entry a step size of its own, which grows while its gradient keeps its sign.

    s' = clip(s·η₊ if g·g₋₁ > 0, s·η₋ if g·g₋₁ < 0, else s);  u = s'·sign(g), or 0 where the sign turned

    Step sizes are in units of lr, so that lr stays a factor of the whole step: they start at 1, where
    torch's start at its lr and never see it again. `torch.optim.Rprop(lr=c, step_sizes=(a, b))` is
    `rprop(step_sizes=(a/c, b/c))` stepped with lr = c. For full batches only.

    Args:
        etas: (η₋, η₊), with η₋ in (0, 1) and η₊ > 1.
        step_sizes: the smallest and the largest, > 0.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> transform = gd.rprop()
        >>> state = transform.init(torch.zeros(2))
        >>> _, state = transform.update(torch.tensor([2.0, -0.5]), state)
        >>> transform.update(torch.tensor([1.0, 0.5]), state)[0]
        tensor([1.2000, 0.0000])

    References:
        M. Riedmiller, H. Braun, "A direct adaptive method for faster backpropagation learning: the RPROP
        algorithm", 1993. torch: `Rprop`, in another unit.
    """
    factors = check_scalar("etas[0]", etas[0], "(0, 1)"), check_scalar("etas[1]", etas[1], "(1, inf)")
    bounds = [check_scalar(f"step_sizes[{i}]", size, "(0, inf)") for i, size in enumerate(step_sizes)]
    low, high = bounds
    if not isinstance(low, Tensor) and not isinstance(high, Tensor) and low > high:
        raise ValueError(f"step_sizes must be (smallest, largest); got {step_sizes!r}")

    def init(params: Tree) -> RpropState:
        return RpropState(zeros(params), _tree.map(torch.ones_like, params))

    def update(grads: Tree, state: RpropState, params: Tree = None) -> tuple[Tree, RpropState]:
        del params

        def rule(g: Tensor, prev: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            minus, plus, low, high = (
                torch.as_tensor(h, dtype=g.dtype, device=g.device) for h in (*factors, *bounds)
            )
            turn = torch.sign(g) * torch.sign(prev)
            size = size * torch.where(turn > 0, plus, torch.where(turn < 0, minus, torch.ones_like(g)))
            size = torch.clamp(size, low, high)
            kept = torch.where(turn < 0, torch.zeros_like(g), g)
            return torch.sign(kept) * size, kept, size

        updates, prev, step_size = each_leaf(rule, grads, state.prev, state.step_size)
        return updates, RpropState(prev, step_size)

    return stateful(RpropState, init, update)


def weight_decay(rate: Scalar) -> GradientTransformation:
    """Add a multiple of the parameters.

    u = g + λ·θ

    First in a chain it is coupled, an L2 penalty that the others transform as part of the gradient (torch's
    `weight_decay=` of SGD or Adam); last it is decoupled (that of AdamW).

    Args:
        rate: λ >= 0.

    Raises:
        ValueError: the rate is out of range; (in update) params are not given.

    Example:
        >>> gd.weight_decay(0.1).update(torch.tensor(3.0), (), torch.tensor(10.0))
        (tensor(4.), ())

    References:
        I. Loshchilov, F. Hutter, "Decoupled weight decay regularization", 2019.
    """
    rate = check_scalar("rate", rate, "[0, inf)")
    return stateless(lambda g, p: g + in_dtype(g.dtype, rate)[0] * p, with_params=True)


def check_betas(betas: tuple[Scalar, Scalar]) -> tuple[Scalar, Scalar]:
    """Return two decay rates, each in [0, 1)."""
    if isinstance(betas, float | int) or len(betas) != 2:
        raise TypeError(f"betas must be a pair (β₁, β₂); got {betas!r}")
    beta1, beta2 = betas
    return check_scalar("betas[0]", beta1, "[0, 1)"), check_scalar("betas[1]", beta2, "[0, 1)")
