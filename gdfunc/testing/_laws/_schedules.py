"""Laws of schedules."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .._law import LawBroken, law, require_at_most, require_equal


@law("gdfunc's contract of a schedule: a function of the count", of_optimizers=False)
def check_schedule(
    schedule: Callable[[Any], Any], formula: Callable[[np.ndarray], Any] | None = None, *, steps: int = 64
) -> None:
    """Check that a schedule equals its formula, gives many counts as it gives each alone, and is >= 0.

    Args:
        schedule: `count -> lr`, of an int or an integer tensor.
        formula: `t -> lr` in NumPy, of float64[T]; None: any.
        steps: T; the counts are 0 … T − 1.

    Raises:
        LawBroken: at the first count at which one of these fails; the step is the count plus one.

    Example:
        >>> from gdfunc import testing as gt
        >>> gt.check_schedule(gd.schedules.exponential(0.5, gamma=0.9), lambda t: 0.5 * 0.9**t)
    """
    counts = torch.arange(steps)
    lrs = torch.as_tensor(schedule(counts)).detach().cpu()
    if lrs.shape != counts.shape:
        raise LawBroken(formula="one lr for every count", value=lrs.numel(), bound=steps)
    if not lrs.is_floating_point():
        raise LawBroken(formula=f"an lr is a float, not {lrs.dtype}", value=0, bound=1)
    values, slack = lrs.double().numpy(), 16 * torch.finfo(lrs.dtype).eps
    require_at_most(-values, np.zeros(steps), "-lr_t <= 0, and not NaN", slack=0.0)
    require_at_most(values, np.full(steps, np.finfo(float).max), "lr_t is finite", slack=0.0)
    scale = values.max(initial=0.0)
    alone = np.array([float(schedule(t)) for t in range(steps)])
    require_equal(alone, values, "schedule(t) = schedule(arange(T))[t]", scale=scale, slack=slack)
    if formula is not None:
        expected = np.broadcast_to(formula(np.arange(float(steps))), (steps,))
        require_equal(values, expected, "lr_t is that of the formula", scale=scale, slack=slack)
