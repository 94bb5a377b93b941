"""Adam and its kin: averages of gradients over averages of their sizes."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._errors import check_int, check_scalar
from .._numerics import Scalar, precise, safe_sqrt
from .._torch import _foreach
from .._tree import Tree
from ._averages import weight_decay as add_decay
from ._base import (
    GradientTransformation,
    Leaves,
    chain,
    check_moments,
    each_leaf,
    ema,
    ema_of_squares,
    leafwise,
    no_steps,
    stateful,
    transformation,
    zeros,
)


class MomentsState(NamedTuple):
    """The memory of Adam and its kin. Each has a class of its own, so that none takes another's state."""

    step: Tensor
    exp_avg: Tree
    exp_avg_sq: Tree


class AdamState(NamedTuple):
    step: Tensor
    exp_avg: Tree
    exp_avg_sq: Tree
    max_exp_avg_sq: Tree  # () without amsgrad


class AdamaxState(MomentsState): ...


class RAdamState(MomentsState): ...


class AdaBeliefState(MomentsState): ...


class YogiState(MomentsState): ...


def _unbiased(t: Tensor, beta1: Scalar, beta2: Scalar, eps: Scalar) -> tuple[Scalar, Scalar]:
    """Return scale and floor of m̂/(√v̂ + ε) = m/(scale·√v + floor), which saves two passes over a leaf."""
    bias1, bias2 = 1.0 - torch.pow(beta1, t), 1.0 - torch.pow(beta2, t)
    return bias1 / bias2.sqrt(), bias1 * eps


@transformation
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
    beta1, beta2, eps = check_moments(betas, eps)

    def update(
        g: Tensor, m: Tensor, v: Tensor, largest: Tensor | None, scale: Tensor, floor: Tensor
    ) -> Leaves:
        m = ema(m, g, beta1)
        v = ema_of_squares(v, g, beta2)
        if largest is not None:
            largest = torch.maximum(largest, v)
        u = m / torch.addcmul(floor, scale, safe_sqrt(v if largest is None else largest))
        return u, m, v, largest

    def update_many(gs: Any, ms: Any, vs: Any, _: Any, scale: Tensor, floor: Tensor) -> tuple[Any, ...]:
        ms = _foreach.lerp(ms, gs, 1.0 - beta1)
        vs = _foreach.mul(vs, beta2)
        _foreach.addcmul_(vs, gs, gs, 1.0 - beta2)
        roots = _foreach.clamp_min(vs, torch.finfo(gs[0].dtype).tiny)
        _foreach.sqrt_(roots)
        divisors = _foreach.addcmul([floor] * len(gs), [scale] * len(gs), roots)
        return _foreach.div(ms, divisors), ms, vs, None

    are_numbers = not isinstance(beta1, Tensor) and not isinstance(beta2, Tensor)
    return leafwise(
        AdamState,
        update,
        (0.0, 0.0, 0.0 if amsgrad else None),
        lambda t: _unbiased(t, beta1, beta2, eps),
        update_many if are_numbers and not amsgrad else None,
    )


@transformation
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


@transformation
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
        tensor([ 1., -1.])

    References:
        D. Kingma, J. Ba, "Adam: a method for stochastic optimization", 2015, section 7.1. torch: `Adamax`,
        whose `exp_inf` is `exp_avg_sq` here.
    """
    beta1, beta2, eps = check_moments(betas, eps)

    def update(g: Tensor, m: Tensor, v: Tensor, beta2: Scalar, eps: Scalar, bias1: Tensor) -> Leaves:
        m = ema(m, g, beta1)
        v = torch.maximum(beta2 * v, g.abs() + eps)
        return m / bias1 / v.clamp_min(torch.finfo(v.dtype).tiny), m, v

    return leafwise(AdamaxState, update, (0.0, 0.0), lambda t: (beta2, eps, 1.0 - beta1**t))


@transformation
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
    beta1, beta2, eps = check_moments(betas, eps)

    def of_step(t: Tensor) -> tuple[Scalar, ...]:
        bias1, bias2 = 1.0 - beta1**t, 1.0 - beta2**t
        longest = 2.0 / (1.0 - beta2) - 1.0
        length = longest - 2.0 * t * beta2**t / bias2
        rectified = length > 5.0
        # Any length > 4 keeps the root and its derivative finite where nothing is rectified.
        length = torch.where(rectified, length, torch.full_like(length, 6.0))
        ratio = (length - 4.0) * (length - 2.0) * longest / ((longest - 4.0) * (longest - 2.0) * length)
        ratio = torch.where(rectified, ratio, torch.ones_like(ratio))
        return rectified, (bias2 * ratio).sqrt() / bias1, bias1, eps

    def update(
        g: Tensor, m: Tensor, v: Tensor, rectified: Tensor, factor: Tensor, bias1: Tensor, eps: Scalar
    ) -> Leaves:
        m = ema(m, g, beta1)
        v = ema_of_squares(v, g, beta2)
        return torch.where(rectified, m / (safe_sqrt(v) + eps) * factor, m / bias1), m, v

    return leafwise(RAdamState, update, (0.0, 0.0), of_step)


@transformation
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
    beta1, beta2, eps = check_moments(betas, eps)

    def update(g: Tensor, m: Tensor, v: Tensor, eps: Scalar, scale: Tensor, floor: Tensor) -> Leaves:
        m = ema(m, g, beta1)
        v = ema_of_squares(v, g - m, beta2) + eps
        return m / torch.addcmul(floor, scale, safe_sqrt(v)), m, v

    return leafwise(AdaBeliefState, update, (0.0, 0.0), lambda t: (eps, *_unbiased(t, beta1, beta2, eps)))


@transformation
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
    beta1, beta2, eps = check_moments(betas, eps)
    start = check_scalar("initial_accumulator_value", initial_accumulator_value, "[0, inf)")

    def update(g: Tensor, m: Tensor, v: Tensor, weight: Scalar, eps: Scalar) -> Leaves:
        m = ema(m, g, beta1)
        v = v - weight * torch.sign(v - g * g) * g * g
        return m / (safe_sqrt(v) + eps), m, v

    return leafwise(YogiState, update, (0.0, start), lambda t: (1.0 - beta2, eps))


class AdEMAMixState(NamedTuple):
    step: Tensor
    exp_avg: Tree
    exp_avg_slow: Tree
    exp_avg_sq: Tree


@transformation
def ademamix(
    betas: tuple[Scalar, Scalar, Scalar] = (0.9, 0.999, 0.9999),
    alpha: Scalar = 5.0,
    *,
    eps: Scalar = 1e-8,
    warmup: int = 0,
) -> GradientTransformation:
    """Add a second, much slower average of gradients to that of `adam`.

    m' = β₁·m + (1 − β₁)·g;  n' = β₃·n + (1 − β₃)·g;  v' = β₂·v + (1 − β₂)·g²;  u = (m̂ + α·n') / (√v̂ + ε)

    The bias of the slow average n is not corrected. With a warmup of T steps, step t = 1, 2, … has
    αₜ = α·min(t/T, 1), and a β₃ that goes from β₁ to β₃ so that the half-life of n grows linearly:
    ln β₃ₜ = ln β₁·ln β₃ / ((1 − s)·ln β₃ + s·ln β₁) with s = min(t/T, 1).

    Args:
        betas: (β₁, β₂, β₃), each in [0, 1); with a warmup 0 < β₁ <= β₃.
        alpha: α >= 0, the weight of the slow average.
        eps: ε >= 0.
        warmup: T, an int >= 0; the authors take the length of the run.

    Raises:
        ValueError: a number is out of range.
        TypeError: betas are not three numbers.

    Example:
        >>> transform = gd.ademamix(alpha=1000.0)
        >>> transform.update(torch.tensor([2.0, -0.5]), transform.init(torch.zeros(2)))[0]
        tensor([ 1.1000, -1.1000])

    References:
        M. Pagliardini, P. Ablin, D. Grangier, "The AdEMAMix optimizer: better, faster, older", 2025.
    """
    if not isinstance(betas, tuple | list) or len(betas) != 3:
        raise TypeError(f"betas must be three numbers (β₁, β₂, β₃); got {betas!r}")
    warmup = check_int("warmup", warmup, 0)
    beta1, beta2, eps = check_moments(betas[:2], eps)
    beta3 = check_scalar("betas[2]", betas[2], "(0, 1)" if warmup else "[0, 1)")
    alpha = check_scalar("alpha", alpha, "[0, inf)")
    if warmup:
        beta1 = check_scalar("betas[0]", beta1, "(0, 1)")

    def of_step(t: Tensor) -> tuple[Scalar, ...]:
        scale, floor = _unbiased(t, beta1, beta2, eps)
        if not warmup:
            return alpha * (1.0 - beta1**t), 1.0 - beta3, scale, floor
        share = (t / warmup).clamp(max=1.0)
        fast, slow = (
            torch.log(torch.as_tensor(beta, dtype=t.dtype, device=t.device)) for beta in (beta1, beta3)
        )
        now = torch.exp(fast * slow / ((1.0 - share) * slow + share * fast))
        return alpha * share * (1.0 - beta1**t), 1.0 - now, scale, floor

    def update(
        g: Tensor,
        m: Tensor,
        n: Tensor,
        v: Tensor,
        weight: Tensor,
        share: Scalar,
        scale: Tensor,
        floor: Tensor,
    ) -> Leaves:
        m, n = ema(m, g, beta1), torch.lerp(n, g, share if isinstance(share, float) else share.to(g.dtype))
        v = ema_of_squares(v, g, beta2)
        return (m + weight * n) / torch.addcmul(floor, scale, safe_sqrt(v)), m, n, v

    return leafwise(AdEMAMixState, update, (0.0, 0.0, 0.0), of_step)


class NAdamState(NamedTuple):
    step: Tensor
    mu_product: Tensor
    exp_avg: Tree
    exp_avg_sq: Tree


@transformation
def nadam(
    betas: tuple[Scalar, Scalar] = (0.9, 0.999), *, eps: Scalar = 1e-8, momentum_decay: Scalar = 4e-3
) -> GradientTransformation:
    """Give `adam` Nesterov's look-ahead momentum, with a schedule of its own.

    μₜ = β₁·(1 − ½·0.96^(t·ψ));  Πₜ = μ₁ ⋯ μₜ
    u = ((1 − μₜ)/(1 − Πₜ)·g + μₜ₊₁/(1 − Πₜ₊₁)·m') / (√v̂ + ε)

    The product Π is kept in float64. torch keeps it in its default dtype.

    Args:
        betas: (β₁, β₂), each in [0, 1).
        eps: ε >= 0.
        momentum_decay: ψ >= 0.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> transform = gd.nadam()
        >>> transform.update(torch.tensor([2.0, -0.5]), transform.init(torch.zeros(2)))[0]
        tensor([ 1.0565, -1.0565])

    References:
        T. Dozat, "Incorporating Nesterov momentum into Adam", 2016. torch: `NAdam`.
    """
    beta1, beta2, eps = check_moments(betas, eps)
    decay = check_scalar("momentum_decay", momentum_decay, "[0, inf)")

    def init(params: Tree) -> NAdamState:
        count = no_steps(params)
        return NAdamState(count, torch.ones_like(count, dtype=precise(count)), zeros(params), zeros(params))

    def update(grads: Tree, state: NAdamState, params: Tree = None) -> tuple[Tree, NAdamState]:
        t = (state.step + 1).to(precise(state.step))
        now, following = (beta1 * (1.0 - 0.5 * 0.96 ** (k * decay)) for k in (t, t + 1))
        product = (state.mu_product * now).to(state.mu_product.dtype)
        of_g, of_m = (1.0 - now) / (1.0 - product), following / (1.0 - product * following)

        def rule(
            g: Tensor, m: Tensor, v: Tensor, of_g: Tensor, of_m: Tensor, root: Tensor, eps: Scalar
        ) -> Leaves:
            m = ema(m, g, beta1)
            v = ema_of_squares(v, g, beta2)
            return (of_g * g + of_m * m) / (safe_sqrt(v) / root + eps), m, v

        scalars = of_g, of_m, (1.0 - beta2**t).sqrt(), eps
        updates, m, v = each_leaf(rule, grads, state.exp_avg, state.exp_avg_sq, scalars=scalars)
        return updates, NAdamState(state.step + 1, product, m, v)

    return stateful(NAdamState, init, update)
