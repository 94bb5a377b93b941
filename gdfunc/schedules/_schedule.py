"""The shape of every schedule: checked scalars, and counts as int64 tensors."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .._errors import check_int, check_scalar

Scalar = float | Tensor

Schedule = Callable[[Any], Tensor]

_INTERVALS = {
    "power": "(0, inf)",
    "pct_start": "[0, 1]",
    "div_factor": "(0, inf)",
    "final_div_factor": "(0, inf)",
}


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
        lrs = formula(
            n, *(torch.as_tensor(value, dtype=torch.float64, device=n.device) for value in values)
        )
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
    """min(n, total)/total."""
    return n.clamp(max=total).double() / total


def int_power(base: Tensor, exponent: Tensor) -> Tensor:
    """base^exponent for integers >= 0; at base 0 the derivatives, the second too, are finite."""
    positive = torch.where(exponent > 0, exponent, 1).to(base)
    return torch.where(exponent > 0, base**positive, 1.0)


def half_cosine(share: Tensor) -> Tensor:
    """(1 − cos(π·share))/2: from 0 to 1, level at both ends."""
    return (1 - torch.cos(torch.pi * share)) / 2


def items(name: str, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a sequence; got {value!r}")
    return tuple(value)


def check_milestones(milestones: Any, low: int) -> tuple[int, ...]:
    return tuple(
        check_int(f"milestones[{i}]", value, low) for i, value in enumerate(items("milestones", milestones))
    )


def check_callable(name: str, value: Any) -> None:
    if not callable(value):
        raise TypeError(f"{name} must be a function of the count; got {value!r}")
