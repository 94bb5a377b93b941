"""The few exceptions of gdfunc's own, and checks of single arguments at the door."""

import inspect
import linecache
import math
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable
from functools import wraps
from numbers import Integral, Real
from pathlib import Path
from types import FrameType, FunctionType
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")
LR_PLACE = (
    "lr is an argument of the step, step(carry, batch, lr), and of gd.train(step, init, data, index, lr)"
)


class Copyable(BaseException):
    """An exception that pickle and copy restore without calling `__init__`, whose arguments are others."""

    def __reduce__(self) -> tuple[Any, ...]:
        return BaseException.__new__, (type(self), *self.args), self.__dict__


class GdfuncError(Copyable, Exception):
    """Base class of the errors that are not a built-in type's alone.

    Example:
        >>> issubclass(gd.NonFiniteError, gd.GdfuncError)
        True
    """


class NonFiniteError(GdfuncError, ArithmeticError):
    """A run met NaN or infinity, and `train` was asked to stop there.

    Attributes:
        step: the first step whose result is not finite, counted from 0.
        leaf: the path of the first leaf that is not finite.
        state: the carry before that step: the last good one.
        trajectory: what was recorded before that step.
        sample: the path and row of the first sample of that step's batch that is not finite, such as
            `data['x'][17]`; None if the batch is finite.

    Example:
        >>> error = gd.NonFiniteError(step=3, leaf="params['w']", state=None, trajectory=None)
        >>> print(error)
        params['w'] is not finite after step 3; .state holds the carry before it
    """

    def __init__(
        self, *, step: int, leaf: str, state: Any, trajectory: Any, sample: str | None = None
    ) -> None:
        cause = "" if sample is None else f", and neither is {sample} in its batch"
        super().__init__(f"{leaf} is not finite after step {step}{cause}; .state holds the carry before it")
        self.step, self.leaf, self.sample = step, leaf, sample
        self.state, self.trajectory = state, trajectory


class BackendError(GdfuncError, RuntimeError):
    """A backend cannot run this loop; the message says why, and what can.

    Attributes:
        untouched: whether everything that f can reach is as it was before the call.
        is_expected: whether f was made to run from Python, so that `"auto"` needs no warning.

    Example:
        >>> issubclass(gd.BackendError, RuntimeError)
        True
    """

    untouched = True
    is_expected = False


class PerformanceWarning(UserWarning):
    """A loop costs much more time than it must; the message says why, and the remedy.

    Example:
        >>> import warnings
        >>> warnings.simplefilter("error", gd.PerformanceWarning)  # to be stopped by it
        >>> warnings.simplefilter("ignore", gd.PerformanceWarning)  # to be left alone
    """


class StuckWarning(UserWarning):
    """A run ended where its method cannot move, which need not be a minimum; the message says why.

    Example:
        >>> import warnings
        >>> warnings.simplefilter("error", gd.StuckWarning)  # to be stopped by it
        >>> warnings.simplefilter("ignore", gd.StuckWarning)  # to be left alone
    """


def untraceable(what: str) -> BackendError:
    """Build the error for something that a trace cannot follow."""
    return BackendError(f"{what}: use backend='eager'")


def check_tensor(leaf: Any, path: str) -> None:
    if not isinstance(leaf, torch.Tensor):
        raise TypeError(f"{path} is {type(leaf).__name__}, not a Tensor; wrap it in torch.tensor")


def check_type(name: str, value: Any, kind: type, remedy: str) -> None:
    """Refuse an object of another class."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} is {type(value).__name__}, not {kind.__name__}; {remedy}")


def check_function(name: str, f: Any, arguments: tuple[str, ...], kind: str, remedy: str) -> None:
    """Refuse an object that cannot be called with these arguments, or that has the first two swapped."""
    if not callable(f):
        raise TypeError(f"{name} is {type(f).__name__}, not {kind}; {remedy}")
    if type(f) is FunctionType and not f.__dict__ and _fits(f, len(arguments)):
        return
    try:
        signature = inspect.signature(f.forward if isinstance(f, torch.nn.Module) else f)
    except (TypeError, ValueError):  # a function in C may have none
        return
    taken, wanted = ", ".join(signature.parameters), ", ".join(arguments)
    try:
        signature.bind(*arguments)
    except TypeError:
        raise TypeError(f"{name} takes ({taken}), not ({wanted}); {remedy}") from None
    if re.match("(batch|data), (params|carry|state|weights|theta)(,|$)", taken):
        raise TypeError(f"{name} takes ({taken}), but is called with ({wanted}); swap the first two")


def _fits(f: FunctionType, count: int) -> bool:
    """Tell whether a plain function takes so many arguments, and batch is not its first.

    Because inspect.signature takes 40 µs, it reads only the functions that fail here.
    """
    code, defaults, options = f.__code__, f.__defaults__ or (), f.__kwdefaults__ or ()
    is_enough = code.co_argcount >= count or bool(code.co_flags & inspect.CO_VARARGS)
    return (
        is_enough
        and code.co_argcount - len(defaults) <= count
        and code.co_kwonlyargcount == len(options)
        and code.co_varnames[0] not in ("batch", "data")
    )


class TrainingInterrupted(Copyable, KeyboardInterrupt):
    """Ctrl-C stopped a run; nothing that was finished is lost.

    Attributes:
        step: how many steps were finished.
        state: the carry after them. `train(…, resume=error)` goes on to the same bits. So does
            `train(step, error.state, data, index[error.step:], …)` on one backend, with `lr[error.step:]`
            for a schedule, and a `trajectory.step` that begins at 0.
        trajectory: what was recorded in them. Members of a vmapped run with `trajectory.steps < step` had
            ended; a resumed run lets them go on.
        done: what `resume=` goes on from; None for a run under a transformation.

    Example:
        >>> error = gd.TrainingInterrupted(step=40, state=None, trajectory=None)
        >>> print(error)
        stopped after 40 steps; .state holds the carry, .trajectory the record
    """

    def __init__(self, *, step: int, state: Any, trajectory: Any, done: Any = None) -> None:
        super().__init__(f"stopped after {step} steps; .state holds the carry, .trajectory the record")
        self.step, self.state, self.trajectory, self.done = step, state, trajectory, done


class SweepInterrupted(Copyable, KeyboardInterrupt):
    """Ctrl-C stopped a sweep; nothing that was finished is lost.

    `sweep(run, grid, resume=error)` goes on to the same bits.

    Attributes:
        total: N, how many points the grid has.
        members: the numbers of those that are done.
        result: their `SweepResult`, on a zipped grid; None if there are none.

    Example:
        >>> print(gd.SweepInterrupted(total=8, members=[0, 1], result=None))
        stopped after 2 of 8 runs; .result holds them, and sweep(..., resume=error) goes on
    """

    def __init__(self, *, total: int, members: list[int], result: Any) -> None:
        rest = ".result holds them, and sweep(..., resume=error) goes on"
        none = "the first chunk was under way; a chunk_size makes chunks smaller"
        super().__init__(f"stopped after {len(members)} of {total} runs; {rest if members else none}")
        self.total, self.members, self.result = total, members, result


def check_int(name: str, value: Any, low: int, high: int | None = None) -> int:
    """Return `value` as an int in [low, high]; a bool, a float and a string are none."""
    is_int = isinstance(value, Integral) and not isinstance(value, bool)
    if is_int and low <= value and (high is None or value <= high):
        return int(value)
    allowed = f">= {low}" if high is None else f"in [{low}, {high}]"
    raise ValueError(f"{name} must be an int {allowed}; got {value!r}")


def check_scalar(name: str, value: Any, interval: str) -> Any:
    """Return a hyperparameter: a finite number in an interval such as `"[0, 1)"`, or a 0-d tensor.

    The value of a tensor is never read: it may be vmapped, differentiated, or on a GPU.
    """
    if isinstance(value, torch.Tensor):
        if value.shape == () and value.is_floating_point():
            return value
        got = f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
    else:
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        if is_number and math.isfinite(value) and _contains(interval, value):
            return float(value)
        got = repr(value)
    raise ValueError(f"{name} must be a finite number in {interval} or a 0-d float tensor; got {got}")


def check_scalars(interval: str, **values: Any) -> tuple[Any, ...]:
    """Return several hyperparameters as `check_scalar` does, each by its name."""
    return tuple(check_scalar(name, value, interval) for name, value in values.items())


def _contains(interval: str, value: Any) -> bool:
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = value > low if interval[0] == "(" else value >= low
    below = value < high if interval[-1] == ")" else value <= high
    return above and below


def without_lr(make: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function that makes a transformation or a step: an lr given to it has another place."""

    @wraps(make)
    def made(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in ("lr", "learning_rate"):
            if name in kwargs:
                raise TypeError(f"{make.__name__} takes no {name}: {LR_PLACE}; got {kwargs[name]!r}")
        return make(*args, **kwargs)

    return made


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """Return `value` if it is one of the choices."""
    if value in choices:
        return value
    raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}; got {value!r}")


def check_options(chunk_size: Any, randomness: str = "error", memory_limit: Any = None) -> None:
    """Check how many members to compute at once (None: all), their random operations, and their bytes."""
    for name, value in (("chunk_size", chunk_size), ("memory_limit", memory_limit)):
        if value is not None:
            check_int(name, value, 1)
    check_choice("randomness", randomness, ("error", "different", "same"))


def missing_extra(what: str, package: str, extra: str) -> ModuleNotFoundError:
    """Build the error that names the extra which brings a missing package."""
    return ModuleNotFoundError(f"{what} needs {package}: pip install 'gdfunc[{extra}]'")


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the user's line that led here."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and is_ours(frame.f_code.co_filename):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def is_ours(filename: str) -> bool:
    """Tell whether a file belongs to this library or to torch."""
    return filename.startswith(tuple(f"{Path(file).parent}{os.sep}" for file in (__file__, torch.__file__)))


def users_frame(frame: FrameType | None) -> FrameType | None:
    """Return the first frame outside of this library and torch, from a frame on to its callers."""
    while frame and is_ours(frame.f_code.co_filename):
        frame = frame.f_back
    return frame


def users_frame_of(error: BaseException) -> FrameType | None:
    """Return the last frame outside of this library and torch that an error went through."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return next((frame for frame in reversed(frames) if not is_ours(frame.f_code.co_filename)), None)


def line_of(frame: FrameType) -> str:
    """Name the line that a frame executes, and show it."""
    file, line = frame.f_code.co_filename, frame.f_lineno
    return f"{file}:{line}: `{linecache.getline(file, line).strip()}`"
