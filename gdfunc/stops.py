"""Ends of a run that remember: early stopping, and the best carry so far.

`train(..., stop=)` takes a function `(carry, loss) -> 0-d bool`, or a stop of this namespace:

| gd.stops | Keras | Lightning |
|---|---|---|
| `patience` | `EarlyStopping(restore_best_weights=True)` | `EarlyStopping`, `ModelCheckpoint` |
| `any_of`, `all_of` | several callbacks | several callbacks |

A `Stop` is a pair of pure functions, whose memory the run carries along. It judges what it has `Seen`: the
loss of every step, and what `train(..., evaluate=)` measures. Under `vmap` every member has a memory of its
own. The memory of `patience` holds the `Best` carry, which the run returns as `trajectory.best`.

Example:
    >>> problem = gd.problems.stock_regression()
    >>> x, y = problem.data
    >>> train, held_out = (x[:300], y[:300]), (x[300:], y[300:])
    >>> def validation(params):
    ...     return problem.loss_fn(params, held_out)
    >>> index = gd.epoch_batches(gd.random.key(0), n=300, batch_size=30, epochs=100)
    >>> step = gd.make_step(problem.loss_fn)
    >>> stop = gd.stops.patience("validation", 5)
    >>> _, trajectory = gd.train(
    ...     step, problem.params, train, index, 0.05, evaluate=validation, evaluate_every=10, stop=stop
    ... )
    >>> params, value, taken = trajectory.best
    >>> bool(value == trajectory.validation.min()), bool(validation(params) == value)
    (True, True)
    >>> int(trajectory.steps - taken)  # five evaluations later
    50
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import reduce, wraps
from typing import Any, NamedTuple, ParamSpec

import torch
from torch import Tensor

from . import _tree
from ._errors import check_choice, check_int, check_scalar
from ._numerics import Scalar, like, precise
from ._shown import Call, shown
from ._tree import Tree

P = ParamSpec("P")


class Seen(NamedTuple):
    """Values that a run has measured, and where: what a `Stop` judges.

    After every step it is the loss, at the carry before the step. After every evaluation it is all that
    was evaluated, at the carry that `evaluate` was given.

    Attributes:
        values: `{"loss": loss}`, or the results of `evaluate` by name.
        carry: the carry at which they were measured.
        step: the number of steps that led to that carry, 0-d int64.
        after: the carry after the step; after an evaluation it is `carry`.

    Example:
        >>> w, count = torch.tensor(2.0), torch.tensor(0)
        >>> gd.stops.Seen({"loss": w**2}, w, count, after=w / 2).values
        {'loss': tensor(4.)}
    """

    values: Mapping[str, Tree]
    carry: Any
    step: Tensor
    after: Any


class Best(NamedTuple):
    """The best carry of a run: all of it, with buffers and the state of the optimizer.

    Attributes:
        carry: the carry at which the value was measured.
        value: the value, 0-d float64, or ±inf if nothing was an improvement.
        step: the number of steps that led to the carry, 0-d int64.

    Example:
        >>> gd.stops.Best(torch.tensor(0.5), torch.tensor(0.25), torch.tensor(3)).step
        tensor(3)
    """

    carry: Any
    value: Tensor
    step: Tensor


@dataclass(frozen=True)
class Stop:
    """An end of a run that remembers: two pure functions of its memory, a tree of tensors.

        memory₀ = init(carry₀);  memory, ends = update(memory, seen)

    `update` is called after every step with the loss, and after every evaluation with what was evaluated.
    The run does not call it for a member that has ended.

    Attributes:
        init: `carry -> memory`.
        update: `(memory, Seen) -> (memory, ends)`. The run ends where `ends`, 0-d bool, holds. It is None
            if these values were not judged.
        best: `memory -> Best`, for `trajectory.best`; or None if no carry is kept.
        quantities: the names that it judges, which the run must evaluate, but for `"loss"`.
        call: the call or the function that made the stop, by which it is printed.

    Example:
        >>> def update(largest, seen):
        ...     loss = seen.values.get("loss", largest)
        ...     return torch.maximum(loss, largest), loss < largest / 100
        >>> stop = gd.stops.Stop(lambda carry: torch.tensor(0.0), update)  # a hundredth of the largest loss
        >>> step, plan = gd.make_step(lambda w, batch: w**2), gd.full_batch(1, 100)
        >>> gd.train(step, torch.tensor(1.0), None, plan, 0.25, stop=stop)[1].loss
        tensor([1.0000, 0.2500, 0.0625, 0.0156, 0.0039])
    """

    init: Callable[[Any], Any]
    update: Callable[[Any, Seen], tuple[Any, Tensor | None]]
    best: Callable[[Any], Best | None] = lambda memory: None
    quantities: tuple[str, ...] = ()
    call: Any = None

    def __repr__(self) -> str:
        return shown(self.call) if self.call else f"Stop({shown(self.update)})"

    @classmethod
    def of(cls, stop: Any) -> "Stop":
        """Make a stop of a function `(carry, loss) -> 0-d bool`, which gets the carry after the step."""
        if isinstance(stop, cls):
            return stop
        if not callable(stop):
            raise TypeError(
                f"stop must be a function (carry, loss) -> 0-d bool, or one of gd.stops; got {stop!r}"
            )

        def update(memory: Any, seen: Seen) -> tuple[Any, Tensor | None]:
            is_step = "loss" in seen.values
            return memory, _flag(stop(seen.after, seen.values["loss"])) if is_step else None

        return cls(lambda carry: (), update, call=stop)

    def judge(self, memory: Any, seen: Seen) -> tuple[Any, Tensor | None]:
        """Call `update`, and check the flag that it returns."""
        memory, ends = self.update(memory, seen)
        return memory, None if ends is None else _flag(ends)


def _stop_maker(make: Callable[P, Stop]) -> Callable[P, Stop]:
    """Decorate a function that makes stops, which show how they were made."""

    @wraps(make)
    def made(*args: P.args, **kwargs: P.kwargs) -> Stop:
        return replace(make(*args, **kwargs), call=Call(make, args, kwargs))

    return made


class _Waited(NamedTuple):
    best: Best
    judgements: Tensor  # without an improvement, in a row


@_stop_maker
def patience(
    quantity: str, patience: int | None = None, *, mode: str = "min", min_delta: Scalar = 0.0
) -> Stop:
    """End a run that no longer improves, and keep its best carry.

    improved: value + min_delta < best,  or with mode="max" value − min_delta > best

    The run ends at the `patience`-th judgement in a row without an improvement, as in Keras and Lightning.
    (torch's `ReduceLROnPlateau` acts one judgement later.) NaN never is an improvement.

    `"loss"` is judged in every step. It is measured at the carry before the step, which is the one to keep.
    A quantity of `evaluate` is judged at every evaluation.

    Args:
        quantity: `"loss"`, or the name of a 0-d quantity of `train(..., evaluate=)`: the `__name__` of its
            function, or its key in a dict.
        patience: after how many judgements without an improvement to end, an int >= 1. None: the run never
            ends because of it, and only keeps the best carry.
        mode: `"min"` if less is better, `"max"` if more is.
        min_delta: the least change that counts as an improvement, a number >= 0 or a 0-d tensor.

    Returns:
        A `Stop`, for `train(..., stop=)`. The run returns `trajectory.best`, a `Best`.

    Raises:
        ValueError: patience, mode or min_delta is out of range.
        TypeError: (in the run) the quantity is no 0-d real tensor.

    Example:
        >>> step, plan = gd.make_step(lambda w, batch: (w - 1) ** 2), gd.full_batch(1, 100)
        >>> lrs = torch.where(torch.arange(100) < 2, 0.25, 1.25)  # diverges after two steps
        >>> stop = gd.stops.patience("loss", 3)
        >>> final, trajectory = gd.train(step, torch.tensor(0.0), None, plan, lrs, stop=stop)
        >>> trajectory.loss
        tensor([1.0000, 0.2500, 0.0625, 0.1406, 0.3164, 0.7119])
        >>> trajectory.best
        Best(carry=tensor(0.7500), value=tensor(0.0625, dtype=torch.float64), step=tensor(2))

    References:
        L. Prechelt, "Early stopping, but when?", 1998.
    """
    if not isinstance(quantity, str):
        raise TypeError(f"quantity must be 'loss' or the name of something evaluated; got {quantity!r}")
    most = None if patience is None else check_int("patience", patience, 1)
    is_least = check_choice("mode", mode, ("min", "max")) == "min"
    min_delta = check_scalar("min_delta", min_delta, "[0, inf)")

    def init(carry: Any) -> _Waited:
        leaf = _tree.leaves(carry)[0]
        worst = math.inf if is_least else -math.inf
        value = torch.full((), worst, dtype=precise(leaf), device=leaf.device)
        step, judgements = (torch.zeros((), dtype=torch.int64, device=leaf.device) for _ in range(2))
        return _Waited(Best(carry, value, step), judgements)

    def update(memory: _Waited, seen: Seen) -> tuple[_Waited, Tensor | None]:
        if quantity not in seen.values:
            return memory, None
        best, value = memory.best, _value(quantity, seen.values[quantity]).to(memory.best.value.dtype)
        delta = like(min_delta, value)
        improved = value + delta < best.value if is_least else value - delta > best.value
        judgements = torch.where(improved, 0, memory.judgements + 1)
        best = _tree.where(improved, Best(seen.carry, value, seen.step), best)
        return _Waited(best, judgements), None if most is None else judgements >= most

    return Stop(init, update, lambda memory: memory.best, (quantity,))


@_stop_maker
def any_of(*stops: Stop | Callable[[Any, Tensor], Tensor]) -> Stop:
    """End a run as soon as one of several stops would.

    Args:
        stops: stops, and functions `(carry, loss) -> 0-d bool`.

    Returns:
        A `Stop`. The best carry is that of the first stop that keeps one.

    Raises:
        TypeError: one of them is no stop, or there is none.

    Example:
        >>> stop = gd.stops.any_of(gd.stops.patience("loss", 10), lambda carry, loss: loss < 1e-3)
        >>> step, plan = gd.make_step(lambda w, batch: w**2), gd.full_batch(1, 100)
        >>> gd.train(step, torch.tensor(1.0), None, plan, 0.25, stop=stop)[1].steps
        tensor(6)
    """
    return _joined(stops, torch.logical_or)


@_stop_maker
def all_of(*stops: Stop | Callable[[Any, Tensor], Tensor]) -> Stop:
    """End a run as soon as all of several stops would, each by what it judged last.

    Args:
        stops: stops, and functions `(carry, loss) -> 0-d bool`.

    Returns:
        A `Stop`. The best carry is that of the first stop that keeps one.

    Raises:
        TypeError: one of them is no stop, or there is none.

    Example:
        >>> stop = gd.stops.all_of(lambda w, loss: loss < 0.1, lambda w, loss: w < 0.01)
        >>> step, plan = gd.make_step(lambda w, batch: w**2), gd.full_batch(1, 100)
        >>> gd.train(step, torch.tensor(1.0), None, plan, 0.25, stop=stop)[1].steps
        tensor(7)
    """
    return _joined(stops, torch.logical_and)


def _joined(given: tuple[Any, ...], join: Callable[[Tensor, Tensor], Tensor]) -> Stop:
    """Judge by several stops, whose last answers are part of the memory."""
    if not given:
        raise TypeError("any_of and all_of need at least one stop")
    stops = [Stop.of(stop) for stop in given]

    def init(carry: Any) -> list[tuple[Any, Tensor]]:
        device = _tree.leaves(carry)[0].device
        return [(stop.init(carry), torch.zeros((), dtype=torch.bool, device=device)) for stop in stops]

    def update(memory: list[tuple[Any, Tensor]], seen: Seen) -> tuple[Any, Tensor]:
        new = []
        for stop, (inner, last) in zip(stops, memory, strict=True):
            inner, flag = stop.judge(inner, seen)
            new.append((inner, last if flag is None else flag))
        return new, reduce(join, [flag for _, flag in new])

    def best(memory: list[tuple[Any, Tensor]]) -> Best | None:
        kept = [stop.best(inner) for stop, (inner, _) in zip(stops, memory, strict=True)]
        return next((each for each in kept if each is not None), None)

    names = [name for stop in stops for name in stop.quantities]
    return Stop(init, update, best, tuple(dict.fromkeys(names)))


def _flag(flag: Any) -> Tensor:
    """Refuse what is no 0-d bool tensor."""
    if isinstance(flag, Tensor) and flag.dtype == torch.bool and not flag.shape:
        return flag
    got = f"{flag.dtype} {tuple(flag.shape)}" if isinstance(flag, Tensor) else type(flag).__name__
    raise TypeError(f"stop must return a 0-d bool tensor, such as loss < 1e-3; got {got}")


def _value(quantity: str, value: Any) -> Tensor:
    """Refuse what cannot be compared."""
    if isinstance(value, Tensor) and not value.shape and not value.is_complex():
        return value
    got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    raise TypeError(f"{quantity!r} must be a 0-d real tensor to be judged by patience; got {got}")
