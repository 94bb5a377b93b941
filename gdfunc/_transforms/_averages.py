"""Directions from running averages of gradients, of their squares, and of their signs."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._errors import check_scalar, check_scalars
from .._numerics import Scalar, like, safe_sqrt
from .._numerics import sign as sign_of
from .._tree import Tree
from ._base import (
    GradientTransformation,
    Leaves,
    check_betas,
    ema,
    ema_of_squares,
    leafwise,
    stateless,
    transformation,
)


class MomentumState(NamedTuple):
    step: Tensor
    momentum_buffer: Tree


@transformation
def momentum(
    momentum: Scalar = 0.9, *, dampening: Scalar = 0.0, nesterov: bool = False
) -> GradientTransformation:
    """Accumulate gradients as `torch.optim.SGD(momentum=)` does.

    b₁ = g₁,  bₜ = β·bₜ₋₁ + (1 − d)·gₜ;  u = b, or g + β·b with `nesterov`

    At a constant lr this is Polyak's heavy ball; when lr changes it is not: see `methods.heavy_ball`.
    `nesterov=True` is torch's variant, with one β for the buffer and the look-ahead. While β and lr are
    constant it is Nesterov's method, seen at its look-ahead points. With a β that changes, such as
    t/(t + 3), it is not: see `methods.nesterov`.

    Args:
        momentum: β in [0, 1).
        dampening: d in [0, 1].
        nesterov: take the look-ahead direction, as torch does.

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
    beta = check_scalar("momentum", momentum, "[0, 1)")
    dampening = check_scalar("dampening", dampening, "[0, 1]")

    def of_step(t: Tensor) -> tuple[Scalar, ...]:
        one = torch.ones_like(t)
        return beta, torch.where(t == 1, one, one - dampening)

    def update(g: Tensor, b: Tensor, beta: Scalar, weight: Tensor) -> Leaves:
        b = beta * b + weight * g
        return (g + beta * b if nesterov else b), b

    return leafwise(MomentumState, update, (0.0,), of_step)


@transformation
def sign() -> GradientTransformation:
    """Take the sign of every entry of the gradient.

    u = sign(g); NaN where g is NaN or infinite

    Example:
        >>> gd.sign().update(torch.tensor([3.0, -0.1, 0.0]), ())
        (tensor([ 1., -1.,  0.]), ())

    References:
        J. Bernstein, Y.-X. Wang, K. Azizzadenesheli, A. Anandkumar, "signSGD: compressed optimisation for
        non-convex problems", 2018.
    """
    return stateless(sign_of)


class LionState(NamedTuple):
    exp_avg: Tree


@transformation
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
    beta1, beta2 = check_betas(betas)

    def update(g: Tensor, m: Tensor) -> Leaves:
        return sign_of(ema(m, g, beta1)), ema(m, g, beta2)

    return leafwise(LionState, update, (0.0,))


class RpropState(NamedTuple):
    prev: Tree
    step_size: Tree


@transformation
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
    low, high = (check_scalar(f"step_sizes[{i}]", size, "(0, inf)") for i, size in enumerate(step_sizes))
    if not isinstance(low, Tensor) and not isinstance(high, Tensor) and low > high:
        raise ValueError(f"step_sizes must be (smallest, largest); got {step_sizes!r}")

    def update(g: Tensor, prev: Tensor, size: Tensor) -> Leaves:
        minus, plus, least, most = (like(scalar, g) for scalar in (*factors, low, high))
        turn = sign_of(g) * sign_of(prev)
        size = size * torch.where(turn > 0, plus, torch.where(turn < 0, minus, torch.ones_like(g)))
        size = torch.clamp(size, least, most)
        kept = torch.where(turn < 0, torch.zeros_like(g), g)
        return sign_of(kept) * size, kept, size

    return leafwise(RpropState, update, (0.0, 1.0))


@transformation
def weight_decay(rate: Scalar) -> GradientTransformation:
    """Add a multiple of the parameters.

    u = g + λ·θ

    First in a chain it is coupled, an L2 penalty that the others transform as part of the gradient (torch's
    `weight_decay=` of SGD or Adam); last it is decoupled (that of AdamW). `masked` with `gd.tree.matrices`
    leaves biases and the scales of norms out.

    Args:
        rate: λ >= 0.

    Raises:
        ValueError: the rate is out of range; (in update) params are not given.

    Example:
        >>> gd.weight_decay(0.1).update(torch.tensor(3.0), (), torch.tensor(10.0))
        (tensor(4.), ())
        >>> transform = gd.chain(gd.adam(), gd.masked(gd.weight_decay(0.1), gd.tree.matrices))
        >>> params = {"weight": torch.ones(1, 2), "bias": torch.ones(1)}
        >>> zeros = {"weight": torch.zeros(1, 2), "bias": torch.zeros(1)}
        >>> transform.update(zeros, transform.init(params), params)[0]
        {'weight': tensor([[0.1000, 0.1000]]), 'bias': tensor([0.])}

    References:
        I. Loshchilov, F. Hutter, "Decoupled weight decay regularization", 2019.
    """
    rate = check_scalar("rate", rate, "[0, inf)")
    return stateless(lambda g, p, rate: g + rate * p, rate, with_params=True)


class AdagradState(NamedTuple):
    step: Tensor
    sum: Tree


@transformation
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
    scalars = {"lr_decay": lr_decay, "initial_accumulator_value": initial_accumulator_value, "eps": eps}
    lr_decay, start, eps = check_scalars("[0, inf)", **scalars)

    def of_step(t: Tensor) -> tuple[Scalar, ...]:
        return 1.0 / (1.0 + (t - 1.0) * lr_decay), eps

    def update(g: Tensor, s: Tensor, decay: Scalar, eps: Scalar) -> Leaves:
        s = s + g * g
        return decay * g / (safe_sqrt(s) + eps), s

    return leafwise(AdagradState, update, (start,), of_step)


class AdadeltaState(NamedTuple):
    square_avg: Tree
    acc_delta: Tree


@transformation
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

    def update(g: Tensor, v: Tensor, d: Tensor, eps: Scalar) -> Leaves:
        v = ema_of_squares(v, g, rho)
        u = g * (d + eps).sqrt() / (v + eps).sqrt()
        return u, v, ema_of_squares(d, u, rho)

    return leafwise(AdadeltaState, update, (0.0, 0.0), lambda t: (eps,))


class RMSpropState(NamedTuple):
    square_avg: Tree
    grad_avg: Tree  # () unless centered
    momentum_buffer: Tree  # () without momentum


@transformation
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
    ) -> Leaves:
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
