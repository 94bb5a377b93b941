"""Schedules that only fall, or stay."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._errors import check_int
from ._schedule import (
    Scalar,
    Schedule,
    check_callable,
    check_milestones,
    elapsed_share,
    int_power,
    make_schedule,
)


def constant(lr: Scalar, factor: Scalar = 1.0, total_iters: int = 0) -> Schedule:
    """Keep lr, after a first phase at another level.

    lr(t) = lr·factor for t < total_iters, then lr

    Two differences to torch's `ConstantLR`: `constant(lr)` is lr everywhere (torch's defaults are a
    factor of 1/3 for 5 steps), and with `total_iters=0` the factor is never applied (torch applies it for
    ever).

    Args:
        lr: a number >= 0 or a 0-d tensor.
        factor: of the first phase, >= 0 or a 0-d tensor.
        total_iters: how many steps that lasts, >= 0.

    Returns:
        `count -> lr`: an int or integer tensor [...] to a float tensor [...].

    Raises:
        ValueError: (here) an argument is out of range; (in the schedule) the count is a negative int.
        TypeError: (in the schedule) the count is a tensor, but not of integers.

    Example:
        >>> gd.schedules.constant(1.0, factor=0.5, total_iters=2)(torch.arange(4))
        tensor([0.5000, 0.5000, 1.0000, 1.0000], dtype=torch.float64)
    """
    total_iters = check_int("total_iters", total_iters, 0)
    return make_schedule(
        lambda n, lr, factor: lr * torch.where(n < total_iters, factor, 1.0), lr=lr, factor=factor
    )


def step(lr: Scalar, step_size: int, gamma: Scalar = 0.1) -> Schedule:
    """Multiply lr by gamma every `step_size` steps.

    lr(t) = lr·γ^⌊t/step_size⌋

    Args:
        lr: a number >= 0 or a 0-d tensor.
        step_size: the length of a stair, >= 1.
        gamma: the factor from one to the next, >= 0 or a 0-d tensor.

    Returns, Raises:
        As `constant`.

    Example:
        >>> gd.schedules.step(1.0, step_size=2, gamma=0.5)(torch.arange(6))
        tensor([1.0000, 1.0000, 0.5000, 0.5000, 0.2500, 0.2500], dtype=torch.float64)
    """
    step_size = check_int("step_size", step_size, 1)
    return make_schedule(lambda n, lr, gamma: lr * int_power(gamma, n // step_size), lr=lr, gamma=gamma)


def multi_step(lr: Scalar, milestones: Sequence[int], gamma: Scalar = 0.1) -> Schedule:
    """Multiply lr by gamma at each milestone.

    lr(t) = lr·γᵏ, with k milestones <= t

    Args:
        lr: a number >= 0 or a 0-d tensor.
        milestones: counts >= 0 in any order; one that stands there twice counts twice.
        gamma: the factor, >= 0 or a 0-d tensor.

    Returns, Raises:
        As `constant`; a TypeError too if milestones is no sequence.

    Example:
        >>> gd.schedules.multi_step(1.0, milestones=[2, 3], gamma=0.5)(torch.arange(5))
        tensor([1.0000, 1.0000, 0.5000, 0.2500, 0.2500], dtype=torch.float64)
    """
    milestones = check_milestones(milestones, 0)

    def passed(n: Tensor) -> Tensor:
        return (n[..., None] >= torch.tensor(milestones, dtype=n.dtype, device=n.device)).sum(-1)

    return make_schedule(lambda n, lr, gamma: lr * int_power(gamma, passed(n)), lr=lr, gamma=gamma)


def exponential(lr: Scalar, gamma: Scalar) -> Schedule:
    """Multiply lr by gamma every step.

    lr(t) = lr·γᵗ

    Args:
        lr: a number >= 0 or a 0-d tensor.
        gamma: the factor, >= 0 or a 0-d tensor.

    Returns, Raises:
        As `constant`.

    Example:
        >>> gd.schedules.exponential(1.0, gamma=0.5)(torch.arange(4))
        tensor([1.0000, 0.5000, 0.2500, 0.1250], dtype=torch.float64)
    """
    return make_schedule(lambda n, lr, gamma: lr * int_power(gamma, n), lr=lr, gamma=gamma)


def linear(
    lr: Scalar, start_factor: Scalar = 1 / 3, end_factor: Scalar = 1.0, total_iters: int = 5
) -> Schedule:
    """Go from one factor of lr to another on a straight line, and stay there.

    lr(t) = lr·(start + (end − start)·min(t, total_iters)/total_iters)

    A start of 0 is allowed, which torch's `LinearLR` refuses, for it divides by the factor before.

    Args:
        lr: a number >= 0 or a 0-d tensor.
        start_factor: the first factor, >= 0 or a 0-d tensor.
        end_factor: the last, >= 0 or a 0-d tensor.
        total_iters: the count at which the last is reached, >= 1.

    Returns, Raises:
        As `constant`.

    Example:
        >>> gd.schedules.linear(1.0, start_factor=0.0, total_iters=4)(torch.arange(6))
        tensor([0.0000, 0.2500, 0.5000, 0.7500, 1.0000, 1.0000], dtype=torch.float64)
    """
    total_iters = check_int("total_iters", total_iters, 1)
    return make_schedule(
        lambda n, lr, start, end: lr * torch.lerp(start, end, elapsed_share(n, total_iters)),
        lr=lr,
        start_factor=start_factor,
        end_factor=end_factor,
    )


def polynomial(lr: Scalar, total_iters: int = 5, power: Scalar = 1.0) -> Schedule:
    """Let lr fall to zero as a power of the steps that are left.

    lr(t) = lr·(1 − min(t, total_iters)/total_iters)^power

    Args:
        lr: a number >= 0 or a 0-d tensor.
        total_iters: the count at which lr is 0, >= 1.
        power: > 0 or a 0-d tensor. (torch's `PolynomialLR` takes 0 too, which is `constant`.)

    Returns, Raises:
        As `constant`.

    Example:
        >>> gd.schedules.polynomial(1.0, total_iters=4, power=2.0)(torch.arange(6))
        tensor([1.0000, 0.5625, 0.2500, 0.0625, 0.0000, 0.0000], dtype=torch.float64)
    """
    total_iters = check_int("total_iters", total_iters, 1)

    def formula(n: Tensor, lr: Tensor, power: Tensor) -> Tensor:
        left = 1 - elapsed_share(n, total_iters)
        # 0^power is kept away from the derivatives: its logarithm makes the second one NaN.
        return lr * torch.where(left > 0, torch.where(left > 0, left, 1.0) ** power, 0.0)

    return make_schedule(formula, lr=lr, power=power)


def inverse_time(lr: Scalar, decay: Scalar) -> Schedule:
    """Let lr fall as one over the step.

    lr(t) = lr/(1 + decay·t)

    Its sum is infinite and the sum of its squares is finite: the conditions of Robbins and Monro, under
    which SGD converges although its gradients stay noisy.

    Args:
        lr: the first value, a number >= 0 or a 0-d tensor.
        decay: per step, >= 0 or a 0-d tensor; with 1 it is lr, lr/2, lr/3, …

    Returns, Raises:
        As `constant`.

    Example:
        >>> gd.schedules.inverse_time(1.0, decay=1.0)(torch.arange(4))
        tensor([1.0000, 0.5000, 0.3333, 0.2500], dtype=torch.float64)

    References:
        H. Robbins, S. Monro, "A stochastic approximation method", 1951.
    """
    return make_schedule(lambda n, lr, decay: lr / (1 + decay * n.double()), lr=lr, decay=decay)


def lambda_(lr: Scalar, lr_lambda: Callable[[Tensor], Tensor]) -> Schedule:
    """Multiply lr by a function of the step.

    lr(t) = lr·lr_lambda(t)

    Unlike torch's `LambdaLR`, which calls it with one int, the function gets the whole tensor of counts,
    and in float64: in torch `0.95 ** n` of an int64 tensor is float32.

    Args:
        lr: a number >= 0 or a 0-d tensor.
        lr_lambda: float64 tensor of counts [...] -> tensor of factors [...].

    Returns, Raises:
        As `constant`; (in the schedule) a TypeError if `lr_lambda` returns no tensor, a ValueError if
        that tensor has another shape.

    Example:
        >>> gd.schedules.lambda_(1.0, lambda t: 1 / (1 + t).sqrt())(torch.arange(4))
        tensor([1.0000, 0.7071, 0.5774, 0.5000], dtype=torch.float64)
    """
    check_callable("lr_lambda", lr_lambda)

    def formula(n: Tensor, lr: Tensor) -> Tensor:
        factor = lr_lambda(n.double())
        if not isinstance(factor, Tensor):
            raise TypeError(
                f"lr_lambda must return a tensor, computed from the tensor of counts that it gets; "
                f"got {type(factor).__name__}"
            )
        if factor.shape != n.shape:
            raise ValueError(
                f"lr_lambda must return one factor a count: it got counts of shape {tuple(n.shape)} "
                f"and returned shape {tuple(factor.shape)}"
            )
        return lr * factor.to(lr)

    return make_schedule(formula, lr=lr)
