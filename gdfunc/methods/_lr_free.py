"""Steps that find their learning rate from the gradients: Prodigy and Mechanic."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _tree
from .._errors import check_scalar, check_scalars
from .._gradients import LossFn
from .._numerics import Scalar, like, safe_ratio, safe_sqrt, widen
from .._step import Step, apply_updates, gradient_step, learning_rate, scalar, step_maker
from .._transforms._base import (
    PLAIN,
    GradientTransformation,
    check_betas,
    check_transform,
    ema,
    ema_of_squares,
)
from .._tree import Tree


class ProdigyState(NamedTuple):
    """Parameters, where they began, Adam's averages, the two sums of whose ratio d is the maximum, and d.

    The paper multiplies gradients by d. Here averages and sums are in units of d or d², so that no power of
    a small d underflows.
    """

    params: Tree
    start: Tree
    exp_avg: Tree
    exp_avg_sq: Tree
    s: Tree
    r: Tensor
    d: Tensor


@step_maker
def prodigy(
    loss_fn: LossFn,
    betas: tuple[Scalar, Scalar] = (0.9, 0.999),
    *,
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 0.0,
    d0: Scalar = 1e-6,
    d_coef: Scalar = 1.0,
) -> Step:
    """Make the step of Prodigy: Adam with an estimate of the distance to the minimum for its step size.

    m' = β₁·m + (1 − β₁)·d·g;  v' = β₂·v + (1 − β₂)·d²·g²
    r' = √β₂·r + (1 − √β₂)·lr·d²·⟨g, θ₀ − θ⟩;  s' = √β₂·s + (1 − √β₂)·lr·d²·g
    d' = max(d, c·r'/‖s'‖₁);  θ' = θ − lr·d·(m'/(√v' + d·ε) + λ·θ)

    lr = 1 is the authors' step, and a schedule from one to zero, such as `cosine_annealing`, goes well with
    it. Nothing corrects the bias of the averages.

    Args:
        loss_fn: `(params, batch) -> loss`; see `batch_grad`.
        betas: (β₁, β₂), each in [0, 1).
        eps: ε >= 0.
        weight_decay: λ >= 0, decoupled.
        d0: the first d > 0, less than the distance to the minimum.
        d_coef: c > 0.

    Returns:
        A `Step`. The fields of its state are `params`, `start`, `exp_avg`, `exp_avg_sq`, `s`, `r` and `d`.

    Raises:
        ValueError: a hyperparameter is out of range; (in the step) as `make_step`.
        TypeError: (in the step) the state is that of another step.

    Example:
        >>> step = gd.methods.prodigy(lambda w, batch: (w - 3.0).abs())
        >>> state, _ = gd.train(step, step.init(torch.tensor(0.0)), None, gd.full_batch(1, 300), 1.0)
        >>> bool((state.params - 3).abs() < 0.5)
        True

    References:
        K. Mishchenko, A. Defazio, "Prodigy: an expeditiously adaptive parameter-free learner", 2024.
    """
    beta1, beta2 = check_betas(betas)
    eps, weight_decay = check_scalars("[0, inf)", eps=eps, weight_decay=weight_decay)
    d0, d_coef = check_scalars("(0, inf)", d0=d0, d_coef=d_coef)
    beta3 = beta2**0.5

    def begin(params: Tree) -> ProdigyState:
        start, m, v, s = _tree.clone(params), *(_tree.map(torch.zeros_like, params) for _ in range(3))
        return ProdigyState(params, start, m, v, s, scalar(0.0, params), scalar(d0, params))

    def move(state: ProdigyState, grads: Tree, lr: Scalar) -> ProdigyState:
        params, d, rate = state.params, state.d, learning_rate(lr, state.params)
        m = _tree.map(lambda m, g: ema(m, g, beta1), state.exp_avg, grads)
        v = _tree.map(lambda v, g: ema_of_squares(v, g, beta2), state.exp_avg_sq, grads)
        kept = scalar(beta3, params)
        added = (1.0 - kept) * rate
        s = _tree.map(lambda s, g: like(kept, s) * s + like(added, g) * g, state.s, grads)
        back = _tree.map(lambda a, p: widen(a) - widen(p), state.start, params)
        r = kept * state.r + added * _tree.dot(_tree.map(widen, grads), back).to(d.dtype)
        u = _tree.map(
            lambda m, v, p: m / (safe_sqrt(v) + like(eps, v)) + like(weight_decay, p) * p, m, v, params
        )
        moved = apply_updates(params, u, rate * d)
        size = sum((widen(leaf).abs().sum().to(d.dtype) for leaf in _tree.leaves(s)), torch.zeros_like(d))
        # r and s are in units of d², so their ratio is that of the paper.
        larger = torch.maximum(d, scalar(d_coef, params) * safe_ratio(r, size))
        q = d / larger
        m, v, s = (
            _tree.map(lambda leaf, power=power: like(power, leaf) * leaf, tree)
            for tree, power in ((m, q), (v, q**2), (s, q**2))
        )
        return ProdigyState(moved, _tree.clone(state.start), m, v, s, q**2 * r, larger)

    return gradient_step(loss_fn, ProdigyState, begin, move)


class MechanicState(NamedTuple):
    """Parameters, the transformation's memory, the start, the sum of updates, and the tuner's memory."""

    params: Tree
    opt_state: Any
    start: Tree
    delta: Tree
    s: Tensor  # [K], the scales, which add up to the one that is used
    m: Tensor  # [K]
    r: Tensor  # [K]
    v: Tensor  # [K]


@step_maker
def mechanic(
    loss_fn: LossFn,
    transform: GradientTransformation = PLAIN,
    betas: tuple[Scalar, ...] = (0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999),
    *,
    decay: Scalar = 0.01,
    s_init: Scalar = 1e-8,
    eps: Scalar = 1e-8,
) -> Step:
    """Make the step of Mechanic, which tunes the scale of another method's updates while it runs.

    Δ' = Δ − lr·u;  θ' = θ₀ + (Σₖ s'ₖ)·Δ', and for every k, with h = ⟨Δ, g + λ·(Σₖ sₖ)·‖g‖/‖θ‖·θ⟩
    m' = max(βₖ·m, |h|);  v' = βₖ²·v + h²;  r' = max(0, βₖ·r − s·h);  s' = (s₀/K·m' + r')/(√v' + ε)

    u is the transformed gradient. lr is the base method's: its schedule counts, and its scale hardly does.

    Args:
        loss_fn: `(params, batch) -> loss`; see `batch_grad`.
        transform: the method whose scale is tuned.
        betas: (β₁, …, β_K), each in [0, 1].
        decay: λ >= 0.
        s_init: s₀ > 0.
        eps: ε > 0.

    Returns:
        A `Step`. The fields of its state are `params`, `opt_state`, `start`, `delta` (Δ), and `s`, `m`, `r`
        and `v`, [K] each.

    Raises:
        ValueError: a hyperparameter is out of range; (in the step) as `make_step`.
        TypeError: transform is no transformation; (in the step) the state is that of another step.

    Example:
        >>> step = gd.methods.mechanic(lambda w, batch: (w - 3.0).abs(), gd.momentum(0.9))
        >>> state, _ = gd.train(step, step.init(torch.tensor(0.0)), None, gd.full_batch(1, 300), 1.0)
        >>> bool((state.params - 3).abs() < 0.5)
        True

    References:
        A. Cutkosky, A. Defazio, H. Mehta, "Mechanic: a learning rate tuner", 2023.
    """
    check_transform(transform)
    betas = tuple(check_scalar(f"betas[{k}]", beta, "[0, 1]") for k, beta in enumerate(betas))
    if not betas:
        raise ValueError("betas must have one number or more; got none")
    decay = check_scalar("decay", decay, "[0, inf)")
    s_init, eps = check_scalars("(0, inf)", s_init=s_init, eps=eps)

    def begin(params: Tree) -> MechanicState:
        start, delta = _tree.clone(params), _tree.map(torch.zeros_like, params)
        memory = [scalar(0.0, params).expand(len(betas)).clone() for _ in range(4)]
        return MechanicState(params, transform.init(params), start, delta, *memory)

    def move(state: MechanicState, grads: Tree, lr: Scalar) -> MechanicState:
        params, old = state.params, state.s.sum()
        updates, opt_state = transform.update(grads, state.opt_state, params)
        delta = apply_updates(state.delta, updates, lr)
        wide = [_tree.map(widen, tree) for tree in (state.delta, grads, params)]
        push = scalar(decay, params) * old * safe_ratio(_tree.norm(wide[1]), _tree.norm(wide[2]))
        h = _tree.dot(wide[0], wide[1]) + push * _tree.dot(wide[0], wide[2])
        beta = torch.stack([scalar(beta, params) for beta in betas])
        m = torch.maximum(beta * state.m, h.abs())
        v = beta**2 * state.v + h**2
        r = (beta * state.r - state.s * h).clamp(min=0)
        s = (scalar(s_init, params) / len(betas) * m + r) / (safe_sqrt(v) + scalar(eps, params))
        params = apply_updates(state.start, delta, -s.sum())
        return MechanicState(params, opt_state, _tree.clone(state.start), delta, s, m, r, v)

    return replace(gradient_step(loss_fn, MechanicState, begin, move), computes_params=True)
