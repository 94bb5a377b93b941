"""Sophia: the average of gradients, divided by an average of the Hessian's diagonal."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _tree, random
from .._data import as_data
from .._errors import check_int, check_scalar, check_scalars
from .._gradients import LossFn, batch_grad
from .._numerics import Scalar, like
from .._step import Step, apply_updates, copy_params, step_maker
from .._transforms._base import check_betas, ema, no_steps
from .._tree import Tree
from ..curvature import hvp
from ._constrained import noise_like


class SophiaState(NamedTuple):
    """Parameters, the averages, the steps taken, and the key of the next estimate."""

    params: Tree
    exp_avg: Tree
    hessian: Tree
    steps: Tensor
    noise_key: Tensor


@step_maker
def sophia(
    loss_fn: LossFn,
    betas: tuple[Scalar, Scalar] = (0.96, 0.99),
    *,
    key: Tensor,
    gamma: Scalar = 0.01,
    eps: Scalar = 1e-12,
    weight_decay: Scalar = 0.0,
    every: int = 10,
    product: Callable[[Tree, Tree, Tree], Tree] | None = None,
) -> Step:
    """Make the step of Sophia, a clipped quasi-Newton step with a diagonal Hessian.

    m' = β₁·m + (1 − β₁)·g;  h' = β₂·h + (1 − β₂)·z∘(Hz) with z ~ N(0, I), in every k-th step from the first
    θ' = θ − lr·(min(max(m'/max(γ·h', ε), −1), 1) + λ·θ), entry by entry

    So no entry moves by more than lr, apart from its decay. Where the curvature is negative, an entry moves
    by the sign of m'. Because vmap and scan cannot skip it, every step computes the product Hz, and with
    `every=1` all are used. The vector of step t is drawn from `fold_in(key, t)`.

    Args:
        loss_fn: `(params, batch) -> loss`; see `batch_grad`. It is differentiated twice.
        betas: (β₁, β₂), each in [0, 1).
        key: int64 [2], from `gd.random.key`; not the one of the plan.
        gamma: γ > 0. The smaller, the more entries are clipped.
        eps: ε > 0.
        weight_decay: λ >= 0.
        every: k, an int >= 1.
        product: `(params, batch, vector) -> H·vector`, such as `gd.curvature.ggn_vp(model_fn, loss_fn)`;
            None: `gd.curvature.hvp(loss_fn)`.

    Returns:
        A `Step`. The fields of its state are `params`, `exp_avg`, `hessian`, `steps` and `noise_key`.

    Raises:
        ValueError: a hyperparameter is out of range; (in the step) as `make_step`.
        TypeError: key is no key; (in the step) the state is that of another step.

    Example:
        >>> loss_fn = lambda w, batch: (torch.tensor([1.0, 100.0]) * (w - 1) ** 2).sum()
        >>> step = gd.methods.sophia(loss_fn, (0.5, 0.5), key=gd.random.key(0), gamma=2.0, every=1)
        >>> state, _ = gd.train(step, step.init(torch.zeros(2)), None, gd.full_batch(1, 40), 0.5)
        >>> bool(((state.params - 1).abs() < 1e-3).all())
        True

    References:
        H. Liu, Z. Li, D. Hall, P. Liang, T. Ma, "Sophia: a scalable stochastic second-order optimizer for
        language model pre-training", 2024.
    """
    beta1, beta2 = check_betas(betas)
    gamma, eps = check_scalars("(0, inf)", gamma=gamma, eps=eps)
    weight_decay, every = (
        check_scalar("weight_decay", weight_decay, "[0, inf)"),
        check_int("every", every, 1),
    )
    random._check_key(key)
    gradients, times = batch_grad(loss_fn), hvp(loss_fn) if product is None else product

    def init(params: Tree) -> SophiaState:
        params = copy_params(params)
        steps, m, h = no_steps(params), *(_tree.map(torch.zeros_like, params) for _ in range(2))
        return SophiaState(params, m, h, steps, random.fold_in(key.to(steps.device), 0))

    def advance(state: SophiaState, batch: Tree, lr: Scalar) -> tuple[SophiaState, Tensor, Tree]:
        batch, params = as_data(batch, "batch"), state.params
        grads, loss = gradients(params, batch)
        m = _tree.map(lambda m, g: ema(m, g, beta1), state.exp_avg, grads)
        z = noise_like(state.noise_key, params)
        curved = times(params, batch, z)
        h = _tree.map(lambda h, z, c: ema(h, z * c, beta2), state.hessian, z, curved)
        h = _tree.where(state.steps % every == 0, h, state.hessian)

        def direction(m: Tensor, h: Tensor, p: Tensor) -> Tensor:
            divisor = torch.maximum(like(gamma, h) * h, like(eps, h).clamp(min=torch.finfo(h.dtype).tiny))
            return (m / divisor).clamp(-1, 1) + like(weight_decay, p) * p

        moved = apply_updates(params, _tree.map(direction, m, h, params), lr)
        steps = state.steps + 1
        # The next key is carried, because a compiler would inline its computation into every draw.
        return SophiaState(moved, m, h, steps, random.fold_in(key.to(steps.device), steps)), loss, grads

    return Step(init, advance, SophiaState)
