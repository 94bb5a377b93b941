"""Schedules that are a formula of the count."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .._errors import check_choice, check_int
from .._numerics import Scalar
from ._schedule import (
    Schedule,
    check_callable,
    check_milestones,
    elapsed_share,
    half_cosine,
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

    def formula(n: Tensor, lr: Tensor, start: Tensor, end: Tensor) -> Tensor:
        return lr * torch.lerp(start, end, elapsed_share(n, total_iters))

    return make_schedule(formula, lr=lr, start_factor=start_factor, end_factor=end_factor)


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


def cosine_annealing(lr: Scalar, T_max: int, eta_min: Scalar = 0.0) -> Schedule:
    """Go from lr to `eta_min` along half a cosine.

    lr(t) = eta_min + (lr − eta_min)·(1 + cos(π t/T_max))/2

    As in torch, lr rises again after T_max and is back at its start at 2·T_max: this is the closed form,
    which torch's recursion follows up to rounding. For a curve that stays down:
    `sequential([cosine_annealing(lr, T_max, eta_min), constant(eta_min)], [T_max])`.

    Args:
        lr: the first value, a number >= 0 or a 0-d tensor.
        T_max: the count at which `eta_min` is reached, >= 1.
        eta_min: the lowest value, >= 0 or a 0-d tensor.

    Returns, Raises:
        As `constant`.

    Example:
        >>> gd.schedules.cosine_annealing(1.0, T_max=2)(torch.arange(5))
        tensor([1.0000, 0.5000, 0.0000, 0.5000, 1.0000], dtype=torch.float64)

    References:
        I. Loshchilov, F. Hutter, "SGDR: stochastic gradient descent with warm restarts", 2017.
    """
    T_max = check_int("T_max", T_max, 1)

    def formula(n: Tensor, lr: Tensor, eta_min: Tensor) -> Tensor:
        return torch.lerp(lr, eta_min, half_cosine((n % (2 * T_max)).double() / T_max))

    return make_schedule(formula, lr=lr, eta_min=eta_min)


def cosine_with_restarts(lr: Scalar, T_0: int, T_mult: int = 1, eta_min: Scalar = 0.0) -> Schedule:
    """Anneal along half a cosine again and again, each time more slowly.

    lr(t) = eta_min + (lr − eta_min)·(1 + cos(π (t − sᵢ)/Tᵢ))/2,  Tᵢ = T_0·T_multⁱ,  sᵢ = T₀ + … + Tᵢ₋₁

    The cycle of a count is found among integers, so that each restart falls on its own count. In torch
    that holds of `CosineAnnealingWarmRestarts.step()`; `.step(epoch)` takes a logarithm, which misses some.

    Args:
        lr: the value at each start, a number >= 0 or a 0-d tensor.
        T_0: the length of the first cycle, >= 1.
        T_mult: how many times longer each next cycle is, >= 1.
        eta_min: what the cycles end at, >= 0 or a 0-d tensor.

    Returns, Raises:
        As `constant`.

    Example:
        >>> gd.schedules.cosine_with_restarts(1.0, T_0=2, T_mult=2)(torch.arange(7))
        tensor([1.0000, 0.5000, 1.0000, 0.8536, 0.5000, 0.1464, 1.0000], dtype=torch.float64)

    References:
        I. Loshchilov, F. Hutter, "SGDR: stochastic gradient descent with warm restarts", 2017.
    """
    T_0, T_mult = check_int("T_0", T_0, 1), check_int("T_mult", T_mult, 1)

    def progress(n: Tensor) -> Tensor:
        """Return the share of its cycle that lies before a count, in [0, 1)."""
        if T_mult == 1:
            return (n % T_0).double() / T_0
        lengths, starts = [T_0], [0]
        while starts[-1] + lengths[-1] <= torch.iinfo(torch.int64).max:
            starts.append(starts[-1] + lengths[-1])
            lengths.append(lengths[-1] * T_mult)
        begin = torch.tensor(starts, device=n.device)
        cycle = (n[..., None] >= begin).sum(-1) - 1
        # Lengths are at most int64's largest or unreachable: as floats they do not overflow.
        length = torch.tensor(lengths, dtype=torch.float64, device=n.device)
        return (n - begin[cycle]).double() / length[cycle]

    return make_schedule(
        lambda n, lr, eta_min: torch.lerp(lr, eta_min, half_cosine(progress(n))), lr=lr, eta_min=eta_min
    )


def one_cycle(
    max_lr: Scalar,
    total_steps: int,
    pct_start: Scalar = 0.3,
    anneal_strategy: str = "cos",
    div_factor: Scalar = 25.0,
    final_div_factor: Scalar = 1e4,
    three_phase: bool = False,
) -> Schedule:
    """Rise to `max_lr` and fall far below the start, in one run.

    max_lr/div_factor → max_lr → max_lr/(div_factor·final_div_factor); with three phases the fall goes to
    the first value as fast as the rise, and from there to the last.

    Phase ends are those of torch's `OneCycleLR`: pct_start·total_steps − 1, twice that, total_steps − 1.
    Differences to it: lr alone is scheduled, no momentum; from the last step on the value stays (torch
    runs past the end for one step, then raises); a rise of no length, pct_start·total_steps = 1, starts
    at `max_lr` (torch divides by zero).

    Args:
        max_lr: the largest value, a number >= 0 or a 0-d tensor.
        total_steps: the length of the run, >= 1.
        pct_start: the share of it that rises, in [0, 1] or a 0-d tensor.
        anneal_strategy: `"cos"` or `"linear"`.
        div_factor: max_lr over the first value, > 0 or a 0-d tensor.
        final_div_factor: the first value over the last, > 0 or a 0-d tensor.
        three_phase: whether to come back to the first value before the last.

    Returns, Raises:
        As `constant`.

    Example:
        >>> schedule = gd.schedules.one_cycle(1.0, 8, 0.5, anneal_strategy="linear", div_factor=4.0)
        >>> schedule(torch.arange(8))
        tensor([2.5000e-01, 5.0000e-01, 7.5000e-01, 1.0000e+00, 7.5001e-01, 5.0001e-01,
                2.5002e-01, 2.5000e-05], dtype=torch.float64)

    References:
        L. N. Smith, N. Topin, "Super-convergence: very fast training of neural networks using large
        learning rates", 2019.
    """
    total_steps = check_int("total_steps", total_steps, 1)
    shapes = {"cos": half_cosine, "linear": lambda share: share}
    shape = shapes[check_choice("anneal_strategy", anneal_strategy, tuple(shapes))]

    def formula(n: Tensor, max_lr: Tensor, pct_start: Tensor, div: Tensor, final_div: Tensor) -> Tensor:
        t = n.clamp(max=total_steps - 1).double()
        peak, last = pct_start * total_steps - 1, torch.full_like(pct_start, total_steps - 1)
        ends = [torch.zeros_like(peak), peak, *([2 * peak] if three_phase else []), last]
        initial = max_lr / div
        levels = [initial, max_lr, *([initial] if three_phase else []), initial / final_div]
        phases = [
            (end, torch.lerp(low, high, shape(_progress(t, begin, end))))
            for (begin, end), (low, high) in zip(pairwise(ends), pairwise(levels), strict=True)
        ]
        lrs = phases.pop()[1]
        for end, values in reversed(phases):
            lrs = torch.where(t <= end, values, lrs)
        return lrs

    shares = {"pct_start": pct_start, "div_factor": div_factor, "final_div_factor": final_div_factor}
    return make_schedule(formula, max_lr=max_lr, **shares)


def _progress(t: Tensor, begin: Tensor, end: Tensor) -> Tensor:
    """Return the share of [begin, end] that lies before t, or 1 if the interval has no length."""
    length = end - begin
    is_long = length > 0
    return torch.where(is_long, (t - begin) / torch.where(is_long, length, 1.0), 1.0)
