"""A step whose learning rate shrinks when the loss no longer improves."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _tree
from .._errors import check_choice, check_int, check_scalars
from .._numerics import Scalar, safe_ratio
from .._step import Step, StepLike, as_step, learning_rate, params_of, scalar, step_around, step_maker
from .._transforms._base import no_steps
from .._tree import Tree


class _Judged(NamedTuple):
    """The part of the state that a judgement changes."""

    scale: Tensor  # of lr
    best: Tensor  # the best loss so far
    bad: Tensor  # judgements without an improvement, in a row
    cooldown: Tensor  # judgements for which none counts as bad
    total: Tensor  # the sum of the losses since the last judgement


class PlateauState(NamedTuple):
    """The carry of a step, the factor of its learning rate, and the losses so far."""

    carry: Any
    scale: Tensor
    best: Tensor
    bad: Tensor
    cooldown: Tensor
    total: Tensor
    count: Tensor  # type: ignore[assignment]  # hides a method that tuples have

    @property
    def params(self) -> Tree:
        """Return the parameters in the carry."""
        return params_of(self.carry)


@step_maker
def reduce_on_plateau(
    step: StepLike,
    *,
    mode: str = "min",
    factor: Scalar = 0.1,
    patience: int = 10,
    threshold: Scalar = 1e-4,
    threshold_mode: str = "rel",
    cooldown: int = 0,
    min_lr: Scalar = 0.0,
    eps: Scalar = 1e-8,
    every: int = 1,
) -> Step:
    """Shrink the learning rate of a step when its loss no longer improves, as `ReduceLROnPlateau` does.

    carry', loss = step(carry, batch, s·lr)
    s' = max(f·s, min_lr/lr) once more than `patience` losses in a row are bad, else s;  s₀ = 1

    A loss is bad if it is not below best·(1 − threshold), or with threshold_mode="abs" best − threshold
    (mode="max": not above best·(1 + threshold), or best + threshold). A schedule is multiplied too.
    The loss is that of the step: what `train` evaluates on the way is not seen.

    Args:
        step: a `Step`, or a function `(carry, batch, lr) -> (carry, loss)` with a 0-d loss.
        mode: `"min"` if a lower loss is better, `"max"` if a higher one is.
        factor: f, a number in [0, 1) or a 0-d tensor.
        patience: how many bad losses in a row change nothing, an int >= 0.
        threshold: the least improvement that counts, a number >= 0 or a 0-d tensor.
        threshold_mode: `"rel"` or `"abs"`.
        cooldown: after a change, how many losses are not counted as bad, an int >= 0.
        min_lr: the least learning rate, a number >= 0 or a 0-d tensor.
        eps: a change of the learning rate by no more than this is not made, a number >= 0 or a 0-d tensor.
        every: how many steps' losses are averaged before they are judged as one, such as those of an epoch,
            an int >= 1.

    Returns:
        A `Step`, whose `init` takes parameters, or for a function its first carry. The fields of its state
        are `carry`, `scale` (s), `best`, `bad`, `cooldown`, `total` and `count`; its `params` are the
        carry's. `train(..., record={"scale": lambda state, loss: state.scale})` shows the changes.

    Raises:
        ValueError: a hyperparameter is out of range; (in the step) as the step inside.
        TypeError: (in the step) the state is that of another step, or the loss is no 0-d tensor.

    Example:
        >>> step = gd.make_step(lambda w, batch: w.abs())  # jumps to and fro, with steps as long as lr
        >>> step = gd.methods.reduce_on_plateau(step, factor=0.5, patience=2)
        >>> record = {"scale": lambda state, loss: state.scale}
        >>> state = step.init(torch.tensor(0.25))
        >>> final, trajectory = gd.train(step, state, None, gd.full_batch(1, 9), 0.5, record=record)
        >>> trajectory.scale
        tensor([1.0000, 1.0000, 1.0000, 1.0000, 0.5000, 0.5000, 0.5000, 0.5000, 0.5000])
        >>> final.params
        tensor(0.)

    References:
        `torch.optim.lr_scheduler.ReduceLROnPlateau`, whose metric is usually a validation loss.
    """
    is_least = check_choice("mode", mode, ("min", "max")) == "min"
    is_relative = check_choice("threshold_mode", threshold_mode, ("rel", "abs")) == "rel"
    (factor,) = check_scalars("[0, 1)", factor=factor)
    threshold, min_lr, eps = check_scalars("[0, inf)", threshold=threshold, min_lr=min_lr, eps=eps)
    patience, cooldown = check_int("patience", patience, 0), check_int("cooldown", cooldown, 0)
    every, sign = check_int("every", every, 1), 1.0 if is_least else -1.0
    inner = as_step(step)

    def init(*first: Any, **state_of_loss: Any) -> PlateauState:
        carry = inner.init(*first, **state_of_loss)
        params = params_of(carry)
        one, none = scalar(1.0, params), scalar(0.0, params)
        worst = scalar(sign * torch.finfo(one.dtype).max, params)  # finite, as check_finite="all" wants it
        counts = no_steps(params), no_steps(params)
        return PlateauState(carry, one, worst, *counts, none, no_steps(params))

    def judge(state: PlateauState, loss: Tensor, lr: Tensor) -> _Judged:
        better = _is_better(loss, state.best, scalar(threshold, loss), sign, is_relative)
        cooling = state.cooldown > 0
        bad = torch.where(better | cooling, 0, state.bad + 1)
        shrinks = bad > patience
        least = safe_ratio(scalar(min_lr, lr), lr)
        scale = torch.maximum(state.scale * scalar(factor, lr), least)
        changes = shrinks & (lr * state.scale - lr * scale > scalar(eps, lr))
        return _Judged(
            torch.where(changes, scale, state.scale),
            torch.where(better, loss, state.best),
            torch.where(shrinks, 0, bad),
            torch.where(shrinks, cooldown, state.cooldown - cooling.to(torch.int64)),
            torch.zeros_like(state.total),
        )

    def advance(state: PlateauState, batch: Tree, lr: Scalar) -> tuple[PlateauState, Tensor, Tree]:
        inner.check(state.carry)
        lr = learning_rate(lr, state.params)
        carry, loss, grads = inner.advance(state.carry, batch, lr * state.scale)
        if not isinstance(loss, Tensor) or loss.shape:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(
                f"reduce_on_plateau judges the step's loss, which must be a 0-d tensor; got {got}"
            )
        total, count = state.total + loss.to(state.total.dtype), state.count + 1
        judged = judge(state, total / every, lr)
        if every > 1:
            waiting = _Judged(state.scale, state.best, state.bad, state.cooldown, total)
            judged = _tree.where(count % every == 0, judged, waiting)
        return PlateauState(carry, *judged, count), loss, grads

    return step_around(inner, init, advance, PlateauState)


def _is_better(loss: Tensor, best: Tensor, threshold: Tensor, sign: float, is_relative: bool) -> Tensor:
    """Tell whether a loss is below the best by more than the threshold; with sign −1, above it."""
    worst = sign * torch.finfo(best.dtype).max  # stands for an infinity, with which torch compares
    best = torch.where(best == worst, sign * math.inf, best)
    bound = best * (1 - sign * threshold) if is_relative else best - sign * threshold
    return loss < bound if sign > 0 else loss > bound
