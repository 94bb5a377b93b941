"""Directions scaled entry by entry with running averages of squared gradients."""

from collections.abc import Callable
from functools import cache, reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _tree
from .._errors import check_scalar
from .._tree import Tree
from ._base import (
    GradientTransformation,
    Scalar,
    chain,
    each_leaf,
    in_dtype,
    lerp,
    no_steps,
    safe_sqrt,
    stateful,
    wide,
    zeros,
)
from ._momentum import check_betas
from ._momentum import weight_decay as add_decay


class AdagradState(NamedTuple):
    step: Tensor
    sum: Tree


def adagrad(
    *, lr_decay: Scalar = 0.0, initial_accumulator_value: Scalar = 0.0, eps: Scalar = 1e-10
) -> GradientTransformation:
    """Divide by the root of all squared gradients so far.

    sₜ = sₜ₋₁ + gₜ²;  u = gₜ / (√sₜ + ε) / (1 + (t − 1)·d)

    Args:
        lr_decay: d >= 0.
        initial_accumulator_value: s₀ >= 0.
        eps: ε >= 0.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> transform = gd.adagrad()
        >>> transform.update(torch.tensor([2.0, -0.5]), transform.init(torch.zeros(2)))[0]
        tensor([ 1., -1.])

    References:
        J. Duchi, E. Hazan, Y. Singer, "Adaptive subgradient methods for online learning and stochastic
        optimization", 2011. torch: `Adagrad`.
    """
    lr_decay = check_scalar("lr_decay", lr_decay, "[0, inf)")
    start = check_scalar("initial_accumulator_value", initial_accumulator_value, "[0, inf)")
    eps = check_scalar("eps", eps, "[0, inf)")

    def init(params: Tree) -> AdagradState:
        return AdagradState(
            no_steps(params), _tree.map(lambda p: (torch.zeros_like(p) + start).to(p), params)
        )

    def update(grads: Tree, state: AdagradState, params: Tree = None) -> tuple[Tree, AdagradState]:
        del params

        @cache
        def constants(dtype: torch.dtype) -> tuple[Scalar, Scalar]:
            decay, e = in_dtype(dtype, lr_decay, eps)
            return 1.0 / (1.0 + state.step.to(wide(dtype)) * decay), e

        def rule(g: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
            factor, e = constants(g.dtype)
            s = s + g * g
            return factor * g / (safe_sqrt(s) + e), s

        updates, sums = each_leaf(rule, grads, state.sum)
        return updates, AdagradState(state.step + 1, sums)

    return stateful(AdagradState, init, update)


class AdadeltaState(NamedTuple):
    square_avg: Tree
    acc_delta: Tree


def adadelta(*, rho: Scalar = 0.9, eps: Scalar = 1e-6) -> GradientTransformation:
    """Scale by the ratio of the sizes of past updates and past gradients.

    v' = ρ·v + (1 − ρ)·g²;  u = g·√(d + ε) / √(v' + ε);  d' = ρ·d + (1 − ρ)·u²

    Args:
        rho: ρ in [0, 1).
        eps: ε > 0.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> transform = gd.adadelta()
        >>> transform.update(torch.tensor([2.0, -0.5]), transform.init(torch.zeros(2)))[0]
        tensor([ 0.0032, -0.0032])

    References:
        M. Zeiler, "ADADELTA: an adaptive learning rate method", 2012. torch: `Adadelta`.
    """
    rho, eps = check_scalar("rho", rho, "[0, 1)"), check_scalar("eps", eps, "(0, inf)")

    def init(params: Tree) -> AdadeltaState:
        return AdadeltaState(zeros(params), zeros(params))

    def update(grads: Tree, state: AdadeltaState, params: Tree = None) -> tuple[Tree, AdadeltaState]:
        del params

        def rule(g: Tensor, v: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            r, e = in_dtype(g.dtype, rho, eps)
            v = lerp(v, g * g, 1.0 - r)
            u = (g * (d + e).sqrt() / (v + e).sqrt()).to(g.dtype)
            return u, v, lerp(d, u * u, 1.0 - r)

        updates, square_avg, acc_delta = each_leaf(rule, grads, state.square_avg, state.acc_delta)
        return updates, AdadeltaState(square_avg, acc_delta)

    return stateful(AdadeltaState, init, update)


class RMSpropState(NamedTuple):
    square_avg: Tree
    grad_avg: Tree  # () unless centered
    momentum_buffer: Tree  # () without momentum


def rmsprop(
    *, alpha: Scalar = 0.99, eps: Scalar = 1e-8, momentum: Scalar = 0.0, centered: bool = False
) -> GradientTransformation:
    """Divide by the root of a running average of squared gradients.

    v' = α·v + (1 − α)·g²;  d = g / (√v' + ε), or g / (√(v' − ḡ'²) + ε) if `centered`;  u = β·b + d

    Where rounding makes v' − ḡ'² negative it counts as zero; torch makes it NaN.

    Args:
        alpha: α in [0, 1).
        eps: ε >= 0.
        momentum: β in [0, 1).
        centered: divide by the standard deviation instead, with ḡ the running average of gradients.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> transform = gd.rmsprop()
        >>> transform.update(torch.tensor([2.0, -0.5]), transform.init(torch.zeros(2)))[0]
        tensor([ 10.0000, -10.0000])

    References:
        T. Tieleman, G. Hinton, "Lecture 6.5: RMSProp", Coursera, 2012. A. Graves, "Generating sequences
        with recurrent neural networks", 2013 (centered). torch: `RMSprop`.
    """
    alpha, eps = check_scalar("alpha", alpha, "[0, 1)"), check_scalar("eps", eps, "[0, inf)")
    momentum = check_scalar("momentum", momentum, "[0, 1)")
    has_buffer = isinstance(momentum, Tensor) or momentum > 0

    def init(params: Tree) -> RMSpropState:
        return RMSpropState(
            zeros(params), zeros(params) if centered else (), zeros(params) if has_buffer else ()
        )

    def update(grads: Tree, state: RMSpropState, params: Tree = None) -> tuple[Tree, RMSpropState]:
        del params

        def rule(g: Tensor, v: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            a, e, beta = in_dtype(g.dtype, alpha, eps, momentum)
            averages = list(rest)
            v = lerp(v, g * g, 1.0 - a)
            spread = v
            if centered:
                averages[0] = lerp(averages[0], g, 1.0 - a)
                spread = v - averages[0] * averages[0]
            u = g / (safe_sqrt(spread) + e)
            if has_buffer:
                u = averages[-1] = beta * averages[-1] + u
            return u, v, *averages

        optional = [tree for tree in state[1:] if tree != ()]
        updates, square_avg, *averages = each_leaf(rule, grads, state.square_avg, *optional)
        remaining = iter(averages)
        grad_avg = next(remaining) if centered else ()
        return updates, RMSpropState(square_avg, grad_avg, next(remaining) if has_buffer else ())

    return stateful(RMSpropState, init, update)


class MomentsState(NamedTuple):
    """The memory of Adam and its kin; each has a class of its own, so that none takes another's."""

    step: Tensor
    exp_avg: Tree
    exp_avg_sq: Tree
    max_exp_avg_sq: Tree = ()  # with amsgrad


class AdamState(MomentsState): ...


class AdamaxState(MomentsState): ...


class RAdamState(MomentsState): ...


class AdaBeliefState(MomentsState): ...


class YogiState(MomentsState): ...


def _moments(
    kind: type[MomentsState],
    betas: tuple[Scalar, Scalar],
    eps: Scalar,
    *,
    second: Callable[..., Tensor],
    constants: Callable[..., Any],
    direction: Callable[..., Tensor],
    start: float = 0.0,
    keep_largest: bool = False,
) -> GradientTransformation:
    """The family of Adam: averages m of gradients and v of their sizes, and a direction of the two.

    m' = β₁·m + (1 − β₁)·g;  v' = second(v, g, m', β₂, ε);  u = direction(m', v', g, constants)

    `constants(t, β₁, β₂, ε)` is all that depends on the step alone, computed once for each dtype.
    """
    betas = check_betas(betas)
    eps = check_scalar("eps", eps, "[0, inf)")

    def init(params: Tree) -> MomentsState:
        sizes = _tree.map(lambda p: torch.full_like(p, start), params)
        return kind(no_steps(params), zeros(params), sizes, zeros(params) if keep_largest else ())

    def update(grads: Tree, state: MomentsState, params: Tree = None) -> tuple[Tree, MomentsState]:
        del params
        count = state.step + 1

        @cache
        def of_step(dtype: torch.dtype) -> tuple[Any, ...]:
            beta1, beta2, e = in_dtype(dtype, *betas, eps)
            return 1.0 - beta1, beta2, e, constants(count.to(wide(dtype)), beta1, beta2, e)

        def rule(g: Tensor, m: Tensor, v: Tensor, *largest: Tensor) -> tuple[Tensor, ...]:
            weight, beta2, e, known = of_step(g.dtype)
            m = lerp(m, g, weight)
            v = second(v, g, m, beta2, e)
            largest = tuple(torch.maximum(old, v) for old in largest)
            return direction(m, largest[0] if largest else v, g, known), m, v, *largest

        kept = (state.max_exp_avg_sq,) if keep_largest else ()
        updates, *trees = each_leaf(rule, grads, state.exp_avg, state.exp_avg_sq, *kept)
        return updates, kind(count, *trees)

    return stateful(kind, init, update)


def _mean_square(v: Tensor, g: Tensor, m: Tensor, beta2: Scalar, eps: Scalar) -> Tensor:
    return lerp(v, g * g, 1.0 - beta2)


def _unbiased(t: Tensor, beta1: Scalar, beta2: Scalar, eps: Scalar) -> tuple[Tensor, Tensor]:
    """m̂/(√v̂ + ε) is m/(scale·√v + floor): the bias corrections move to two scalars."""
    unbiased = 1.0 - beta1**t
    return unbiased / (1.0 - beta2**t).sqrt(), eps * unbiased


def _ratio(m: Tensor, v: Tensor, g: Tensor, constants: tuple[Tensor, Tensor]) -> Tensor:
    scale, floor = constants
    return m / torch.addcmul(floor, safe_sqrt(v), scale)


def adam(
    betas: tuple[Scalar, Scalar] = (0.9, 0.999), *, eps: Scalar = 1e-8, amsgrad: bool = False
) -> GradientTransformation:
    """Divide the running average of gradients by the root of that of their squares.

    m' = β₁·m + (1 − β₁)·g;  v' = β₂·v + (1 − β₂)·g²;  u = m̂ / (√v̂ + ε)
    with m̂ = m'/(1 − β₁ᵗ) and v̂ = v'/(1 − β₂ᵗ); with `amsgrad`, the largest v so far instead of v'

    The first step is g/(|g| + ε). With ε = 0 an entry whose gradients are all zero does not move. lr is no
    argument here: it goes to the step, or to `train`.

    Args:
        betas: (β₁, β₂), each in [0, 1).
        eps: ε >= 0.
        amsgrad: never let the divisor shrink.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> transform = gd.adam()
        >>> transform.update(torch.tensor([2.0, -0.5]), transform.init(torch.zeros(2)))[0]
        tensor([ 1.0000, -1.0000])

    References:
        D. Kingma, J. Ba, "Adam: a method for stochastic optimization", 2015. S. Reddi, S. Kale, S. Kumar,
        "On the convergence of Adam and beyond", 2018 (amsgrad). torch: `Adam`.
    """
    return _moments(
        AdamState,
        betas,
        eps,
        second=_mean_square,
        constants=_unbiased,
        direction=_ratio,
        keep_largest=amsgrad,
    )


def adamw(
    betas: tuple[Scalar, Scalar] = (0.9, 0.999),
    *,
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 1e-2,
    amsgrad: bool = False,
) -> GradientTransformation:
    """Add decoupled weight decay to `adam`.

    u = m̂ / (√v̂ + ε) + λ·θ

    Args:
        betas: (β₁, β₂), each in [0, 1).
        eps: ε >= 0.
        weight_decay: λ >= 0.
        amsgrad: as in `adam`.

    Returns:
        `chain(adam(betas, eps=eps, amsgrad=amsgrad), gd.weight_decay(weight_decay))`.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> transform, params = gd.adamw(), torch.tensor([1.0, 1.0])
        >>> transform.update(torch.tensor([2.0, -0.5]), transform.init(params), params)[0]
        tensor([ 1.0100, -0.9900])

    References:
        I. Loshchilov, F. Hutter, "Decoupled weight decay regularization", 2019. torch: `AdamW`.
    """
    return chain(adam(betas, eps=eps, amsgrad=amsgrad), add_decay(weight_decay))


def adamax(betas: tuple[Scalar, Scalar] = (0.9, 0.999), *, eps: Scalar = 1e-8) -> GradientTransformation:
    """Divide the running average of gradients by a decaying maximum of their sizes.

    m' = β₁·m + (1 − β₁)·g;  v' = max(β₂·v, |g| + ε);  u = m' / (1 − β₁ᵗ) / v'

    Args:
        betas: (β₁, β₂), each in [0, 1).
        eps: ε >= 0.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> transform = gd.adamax()
        >>> transform.update(torch.tensor([2.0, -0.5]), transform.init(torch.zeros(2)))[0]
        tensor([ 1.0000, -1.0000])

    References:
        D. Kingma, J. Ba, "Adam: a method for stochastic optimization", 2015, section 7.1. torch: `Adamax`,
        whose `exp_inf` is `exp_avg_sq` here.
    """
    return _moments(
        AdamaxState,
        betas,
        eps,
        second=lambda v, g, m, beta2, e: torch.maximum(beta2 * v, g.abs() + e),
        constants=lambda t, beta1, beta2, e: 1.0 / (1.0 - beta1**t),
        direction=lambda m, v, g, factor: factor * m / v.clamp_min(torch.finfo(v.dtype).tiny),
    )


def radam(betas: tuple[Scalar, Scalar] = (0.9, 0.999), *, eps: Scalar = 1e-8) -> GradientTransformation:
    """Rectify `adam` in its first steps, while the variance of its divisor is still unbounded.

    ρ∞ = 2/(1 − β₂) − 1;  ρ = ρ∞ − 2t·β₂ᵗ/(1 − β₂ᵗ)
    u = m̂·√(1 − β₂ᵗ)/(√v' + ε)·√((ρ−4)(ρ−2)ρ∞ / ((ρ∞−4)(ρ∞−2)ρ)) if ρ > 5, else m̂

    Args:
        betas: (β₁, β₂), each in [0, 1).
        eps: ε >= 0.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> transform = gd.radam()
        >>> transform.update(torch.tensor([2.0, -0.5]), transform.init(torch.zeros(2)))[0]
        tensor([ 2.0000, -0.5000])

    References:
        L. Liu et al., "On the variance of the adaptive learning rate and beyond", 2020. torch: `RAdam`.
    """

    def constants(t: Tensor, beta1: Scalar, beta2: Scalar, e: Scalar) -> tuple[Any, ...]:
        unbiased = 1.0 - beta2**t
        longest = 2.0 / (1.0 - beta2) - 1.0
        length = longest - 2.0 * t * beta2**t / unbiased
        rectified = length > 5.0
        # Where it is not rectified, any length > 4 keeps the root and its derivative finite.
        length = torch.where(rectified, length, torch.full_like(length, 6.0))
        ratio = (length - 4.0) * (length - 2.0) * longest / ((longest - 4.0) * (longest - 2.0) * length)
        ratio = torch.where(rectified, ratio, torch.ones_like(ratio))
        return rectified, (unbiased * ratio).sqrt() / (1.0 - beta1**t), 1.0 / (1.0 - beta1**t), e

    def direction(m: Tensor, v: Tensor, g: Tensor, known: tuple[Any, ...]) -> Tensor:
        rectified, factor, plain, e = known
        return torch.where(rectified, m / (safe_sqrt(v) + e) * factor, m * plain)

    return _moments(RAdamState, betas, eps, second=_mean_square, constants=constants, direction=direction)


def adabelief(
    betas: tuple[Scalar, Scalar] = (0.9, 0.999), *, eps: Scalar = 1e-16
) -> GradientTransformation:
    """Divide by how far gradients are from their running average, instead of by their size.

    m' = β₁·m + (1 − β₁)·g;  v' = β₂·v + (1 − β₂)·(g − m')² + ε;  u = m̂ / (√v̂ + ε)

    Args:
        betas: (β₁, β₂), each in [0, 1).
        eps: ε >= 0.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> transform = gd.adabelief()
        >>> transform.update(torch.tensor([2.0, -0.5]), transform.init(torch.zeros(2)))[0]
        tensor([ 1.1111, -1.1111])

    References:
        J. Zhuang et al., "AdaBelief optimizer: adapting stepsizes by the belief in observed gradients",
        2020.
    """
    return _moments(
        AdaBeliefState,
        betas,
        eps,
        second=lambda v, g, m, beta2, e: lerp(v, (g - m) * (g - m), 1.0 - beta2) + e,
        constants=_unbiased,
        direction=_ratio,
    )


def yogi(
    betas: tuple[Scalar, Scalar] = (0.9, 0.999),
    *,
    eps: Scalar = 1e-3,
    initial_accumulator_value: float = 1e-6,
) -> GradientTransformation:
    """Let the average of squared gradients change by no more than the newest of them.

    m' = β₁·m + (1 − β₁)·g;  v' = v − (1 − β₂)·sign(v − g²)·g²;  u = m' / (√v' + ε)

    As in the paper, nothing corrects the bias of the averages.

    Args:
        betas: (β₁, β₂), each in [0, 1).
        eps: ε >= 0.
        initial_accumulator_value: v₀ >= 0, a number.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> transform = gd.yogi()
        >>> transform.update(torch.tensor([2.0, -0.5]), transform.init(torch.zeros(2)))[0]
        tensor([ 3.1127, -2.9686])

    References:
        M. Zaheer, S. Reddi, D. Sachan, S. Kale, S. Kumar, "Adaptive methods for nonconvex optimization",
        2018.
    """

    def second(v: Tensor, g: Tensor, m: Tensor, beta2: Scalar, e: Scalar) -> Tensor:
        return v - (1.0 - beta2) * torch.sign(v - g * g) * g * g

    return _moments(
        YogiState,
        betas,
        eps,
        second=second,
        constants=lambda t, beta1, beta2, e: (torch.ones_like(t), e * torch.ones_like(t)),
        direction=_ratio,
        start=check_scalar("initial_accumulator_value", initial_accumulator_value, "[0, inf)"),
    )


class NAdamState(NamedTuple):
    step: Tensor
    mu_product: Tensor
    exp_avg: Tree
    exp_avg_sq: Tree


def nadam(
    betas: tuple[Scalar, Scalar] = (0.9, 0.999), *, eps: Scalar = 1e-8, momentum_decay: Scalar = 4e-3
) -> GradientTransformation:
    """Give `adam` Nesterov's look-ahead momentum, with a schedule of its own.

    μₜ = β₁·(1 − ½·0.96^(t·ψ));  Πₜ = μ₁ ⋯ μₜ
    u = ((1 − μₜ)/(1 − Πₜ)·g + μₜ₊₁/(1 − Πₜ₊₁)·m') / (√v̂ + ε)

    The product Π is kept in the parameters' dtype; torch keeps it in its default dtype.

    Args:
        betas: (β₁, β₂), each in [0, 1).
        eps: ε >= 0.
        momentum_decay: ψ >= 0.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> transform = gd.nadam()
        >>> transform.update(torch.tensor([2.0, -0.5]), transform.init(torch.zeros(2)))[0]
        tensor([ 1.0564, -1.0564])

    References:
        T. Dozat, "Incorporating Nesterov momentum into Adam", 2016. torch: `NAdam`.
    """
    betas, eps = check_betas(betas), check_scalar("eps", eps, "[0, inf)")
    decay = check_scalar("momentum_decay", momentum_decay, "[0, inf)")

    def init(params: Tree) -> NAdamState:
        widest = reduce(torch.promote_types, (leaf.dtype for leaf in _tree.leaves(params)), torch.float32)
        count = no_steps(params)
        return NAdamState(count, torch.ones_like(count, dtype=widest), zeros(params), zeros(params))

    def update(grads: Tree, state: NAdamState, params: Tree = None) -> tuple[Tree, NAdamState]:
        del params
        count = state.step + 1

        def mu(t: Tensor) -> Tensor:
            beta1, psi = in_dtype(t.dtype, betas[0], decay)
            return beta1 * (1.0 - 0.5 * 0.96 ** (t * psi))

        steps = count.to(state.mu_product.dtype)
        now, following = mu(steps), mu(steps + 1)
        product = state.mu_product * now

        @cache
        def constants(dtype: torch.dtype) -> tuple[Any, ...]:
            beta1, beta2, e = in_dtype(dtype, *betas, eps)
            unbiased = 1.0 - beta2 ** count.to(wide(dtype))
            weights = in_dtype(
                dtype, (1.0 - now) / (1.0 - product), following / (1.0 - product * following)
            )
            return 1.0 - beta1, 1.0 - beta2, *weights, unbiased.sqrt(), e

        def rule(g: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            weight1, weight2, of_g, of_m, root, e = constants(g.dtype)
            m, v = lerp(m, g, weight1), lerp(v, g * g, weight2)
            return (of_g * g + of_m * m) / (safe_sqrt(v) / root + e), m, v

        updates, exp_avg, exp_avg_sq = each_leaf(rule, grads, state.exp_avg, state.exp_avg_sq)
        return updates, NAdamState(count, product.to(state.mu_product.dtype), exp_avg, exp_avg_sq)

    return stateful(NAdamState, init, update)
