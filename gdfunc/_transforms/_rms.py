"""Directions divided by a running average, or the sum, of squared gradients."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._errors import check_scalar
from .._numerics import safe_sqrt
from .._tree import Tree
from ._base import GradientTransformation, Scalar, ema, ema_of_squares, leafwise


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

    def of_step(t: Tensor) -> tuple[Scalar, ...]:
        return 1.0 / (1.0 + (t - 1.0) * lr_decay), eps

    def update(g: Tensor, s: Tensor, decay: Scalar, eps: Scalar) -> tuple[Tensor, ...]:
        s = s + g * g
        return decay * g / (safe_sqrt(s) + eps), s

    return leafwise(AdagradState, update, (start,), of_step)


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

    def update(g: Tensor, v: Tensor, d: Tensor, eps: Scalar) -> tuple[Tensor, ...]:
        v = ema_of_squares(v, g, rho)
        u = g * (d + eps).sqrt() / (v + eps).sqrt()
        return u, v, ema_of_squares(d, u, rho)

    return leafwise(AdadeltaState, update, (0.0, 0.0), lambda t: (eps,))


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

    def update(
        g: Tensor, v: Tensor, mean: Tensor | None, b: Tensor | None, beta: Scalar, eps: Scalar
    ) -> tuple[Tensor | None, ...]:
        v = spread = ema_of_squares(v, g, alpha)
        if mean is not None:
            mean = ema(mean, g, alpha)
            spread = torch.addcmul(v, mean, mean, value=-1.0)
        u = g / (safe_sqrt(spread) + eps)
        if b is not None:
            u = b = beta * b + u
        return u, v, mean, b

    starts = 0.0, 0.0 if centered else None, 0.0 if has_buffer else None
    return leafwise(RMSpropState, update, starts, lambda t: (momentum, eps))
