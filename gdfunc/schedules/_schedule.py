"""The parts that every schedule is made of, and schedules made of schedules."""

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .._errors import check_int, check_scalar
from .._numerics import Scalar

Schedule = Callable[[Any], Tensor]

_INTERVALS = {
    "power": "(0, inf)",
    "pct_start": "[0, 1]",
    "div_factor": "(0, inf)",
    "final_div_factor": "(0, inf)",
}


def warmup(schedule: Schedule, steps: int, start_factor: Scalar = 0.0) -> Schedule:
    """Let a schedule begin with a linear rise to its first value.

    lr(t) = schedule(0)·(start_factor + (1 − start_factor)·t/steps) for t < steps, then schedule(t − steps)

    In torch: `SequentialLR([LinearLR(start_factor, 1, steps), …], [steps])`, whose start must be above 0.

    Args:
        schedule: what follows; its count starts when the rise is over.
        steps: the length of the rise, >= 0.
        start_factor: the share of schedule(0) to begin with, >= 0 or a 0-d tensor.

    Returns, Raises:
        As `constant`; a TypeError too if schedule is no function.

    Example:
        >>> gd.schedules.warmup(gd.schedules.exponential(1.0, gamma=0.5), steps=2)(torch.arange(5))
        tensor([0.0000, 0.5000, 1.0000, 0.5000, 0.2500], dtype=torch.float64)

    References:
        P. Goyal et al., "Accurate, large minibatch SGD: training ImageNet in 1 hour", 2017.
    """
    check_callable("schedule", schedule)
    steps = check_int("steps", steps, 0)
    start_factor = check_scalar("start_factor", start_factor, "[0, inf)")

    def warm(count: int | Tensor) -> Tensor:
        n = as_count(count)
        lrs = schedule((n - steps).clamp(min=0))
        n = n.to(lrs.device)
        start = torch.as_tensor(start_factor, dtype=torch.float64, device=lrs.device)
        # The share of no steps is 1: then nothing is left of the rise.
        share = elapsed_share(n, steps) if steps else torch.ones_like(n, dtype=torch.float64)
        return (lrs * torch.lerp(start, torch.ones_like(start), share)).to(lrs.dtype)

    return warm


def sequential(schedules: Sequence[Schedule], milestones: Sequence[int]) -> Schedule:
    """Follow one schedule after another.

    lr(t) = schedulesᵢ(t − mᵢ₋₁) for mᵢ₋₁ <= t < mᵢ, with m₋₁ = 0

    Args:
        schedules: at least one; each counts from its own beginning.
        milestones: the counts at which the second, third, … begins: rising, >= 1.

    Returns, Raises:
        As `constant`; a ValueError too if there is not one milestone between each two schedules, or if
        they do not rise, a TypeError if schedules are no functions.

    Example:
        >>> first, then = gd.schedules.constant(0.1), gd.schedules.exponential(1.0, gamma=0.5)
        >>> gd.schedules.sequential([first, then], milestones=[2])(torch.arange(5))
        tensor([0.1000, 0.1000, 1.0000, 0.5000, 0.2500], dtype=torch.float64)
    """
    schedules = items("schedules", schedules)
    for i, schedule in enumerate(schedules):
        check_callable(f"schedules[{i}]", schedule)
    milestones = check_milestones(milestones, 1)
    if not schedules or len(milestones) != len(schedules) - 1:
        raise ValueError(
            f"milestones must be one fewer than the schedules, of which there is at least one; "
            f"got {len(milestones)} milestones and {len(schedules)} schedules"
        )
    if any(later <= earlier for earlier, later in pairwise(milestones)):
        raise ValueError(f"milestones must rise; got {list(milestones)}")
    begins, lasts = [0, *milestones], [*(m - 1 for m in milestones), None]

    def joined(count: int | Tensor) -> Tensor:
        n = as_count(count)
        # No schedule sees a count outside its part: one that overflows there would spoil derivatives.
        parts = [
            schedule(n.clamp(begin, last) - begin)
            for schedule, begin, last in zip(schedules, begins, lasts, strict=True)
        ]
        lrs = parts[0]
        for begin, part in zip(milestones, parts[1:], strict=True):
            lrs = torch.where(n.to(part.device) >= begin, part, lrs)
        return lrs

    return joined


def make_schedule(formula: Callable[..., Tensor], **scalars: Scalar) -> Schedule:
    """Make `count -> formula(count, *scalars)` in float64, rounded to the dtype of lr, the first scalar."""
    values = [
        check_scalar(name, value, _INTERVALS.get(name, "[0, inf)")) for name, value in scalars.items()
    ]
    lr = values[0]

    def schedule(count: int | Tensor) -> Tensor:
        n = as_count(count)
        if isinstance(lr, Tensor):
            n = n.to(lr.device)
        lrs = formula(n, *(torch.as_tensor(v, dtype=torch.float64, device=n.device) for v in values))
        return lrs.to(lr.dtype) if isinstance(lr, Tensor) else lrs

    return schedule


def as_count(count: Any) -> Tensor:
    """Return the count as an int64 tensor."""
    if not isinstance(count, Tensor):
        return torch.tensor(check_int("count", count, 0))
    if count.is_floating_point() or count.is_complex() or count.dtype == torch.bool:
        raise TypeError(
            f"count must be an int or an integer tensor, as torch.arange(T); got a tensor of {count.dtype}"
        )
    return count.long()


def elapsed_share(n: Tensor, total: int) -> Tensor:
    """Compute min(n, total)/total."""
    return n.clamp(max=total).double() / total


def int_power(base: Tensor, exponent: Tensor) -> Tensor:
    """Compute base^exponent for integers >= 0, with finite first and second derivatives at base 0."""
    positive = torch.where(exponent > 0, exponent, 1).to(base)
    return torch.where(exponent > 0, base**positive, 1.0)


def half_cosine(share: Tensor) -> Tensor:
    """Compute (1 − cos(π·share))/2, which goes from 0 to 1 and is level at both ends."""
    return (1 - torch.cos(torch.pi * share)) / 2


def items(name: str, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a sequence; got {value!r}")
    return tuple(value)


def check_milestones(milestones: Any, low: int) -> tuple[int, ...]:
    listed = items("milestones", milestones)
    return tuple(check_int(f"milestones[{i}]", value, low) for i, value in enumerate(listed))


def check_callable(name: str, value: Any) -> None:
    if not callable(value):
        raise TypeError(f"{name} must be a function of the count; got {value!r}")
