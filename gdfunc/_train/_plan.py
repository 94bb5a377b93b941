"""The plan of a run: everything that is checked before its first step."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import _tree
from .._data import as_data, remedy_for
from .._errors import BackendError, check_choice, check_function, check_int, warn
from .._inputs import check_batch, check_params
from .._lazy import LazyBatches
from .._scan._adjoint import Adjoint, Segments, check_adjoint
from .._scan._scan import fold, settle
from .._step import Step, StepLike, as_step, check_lr, params_of
from .._torch._autograd import is_readable
from .._torch._modes import is_tracing
from .._torch._transforms import is_transforming, members
from .._tree import Tree
from ..stops import Stop
from ._batches import Batches, from_function, from_memory, part
from ._body import RECORDERS, Body, Evaluator, Recorder, first_state
from ._stream import from_dataset, from_iterable, is_indexed, is_source

_GRAIN = 4  # blocks: segments of a compiled loop are whole multiples, so that each block always runs alike


class Stage(NamedTuple):
    """Blocks of one kind.

    Attributes:
        size: the number of steps in each, but for a shorter last one.
        end: the step before which they end.
        evaluated: whether the carry after each is evaluated.
    """

    size: int
    end: int
    evaluated: bool


@dataclass(frozen=True)
class Plan:
    """A run that has been checked.

    Attributes:
        given: its step, as it was given.
        ranks: how many ranks take each step together; None if this one takes it alone.
        body: the body of its scan.
        state: the first state of its scan.
        batches: the source of its batches.
        lrs: the learning rates [T].
        every: of so many steps the first is recorded.
        block: the number of steps in a block: `evaluate_every`, or without an evaluation `every`.
        grain: segments are whole multiples of so many blocks.
        work: entries of the parameters times entries of the data that a block reads.
        backend: who runs the loop.
        seen: what was traced of the body, once for all segments.
        adjoint: how derivatives go back through its segments.
    """

    given: StepLike
    ranks: int | None
    body: Body
    state: Any
    batches: Batches
    lrs: Tensor
    every: int
    block: int
    grain: int
    work: int
    backend: str
    seen: dict[Any, Any]
    adjoint: Segments

    @property
    def steps(self) -> int:
        return int(self.lrs.shape[0])

    def stage(self, first: int, end: int) -> Stage:
        """Find the blocks that come at a step on the way to an end: those that are evaluated come first."""
        whole = end - end % self.block
        if first < whole:
            return Stage(self.block, whole, bool(self.body.evaluators))
        return Stage(self.every, end, False)

    def at_most(self, blocks: int) -> int:
        """Shorten a segment whose rows would take too much memory."""
        if self.batches.most is None:
            return blocks
        return min(blocks, max(self.batches.most // self.block // self.grain, 1) * self.grain)

    def on(self, backend: str) -> "Plan":
        """Give the plan of the same run on another backend."""
        if backend == self.backend:
            return self
        body, grain = replace(self.body, backend=backend), _grain(backend, self.adjoint)
        return replace(self, body=body, backend=backend, grain=grain)

    def rows(self, first: int, last: int) -> Tree:
        """Give the rows and learning rates of the steps first … last−1."""
        return self.batches.rows(first, last), part(self.lrs, first, last)

    def step(self, carry: Any, t: int) -> tuple[Any, Any, Tree]:
        """Take step t alone."""
        return self.body.step(carry, _tree.map(lambda leaf: leaf[0], self.rows(t, t + 1)))

    def non_finite_sample(self, t: int) -> str | None:
        """Name the first sample of step t that is not finite; None if there is none."""
        row = _tree.map(lambda leaf: leaf[0], self.batches.rows(t, t + 1))
        for path, leaf in _tree.named_leaves(self.batches.batch(row), "data"):
            bad = torch.nonzero(~leaf.isfinite().flatten())
            if len(bad):
                i = int(bad[0] // leaf[0].numel())
                is_plan = isinstance(row, Tensor) and row.ndim == 1
                return f"{path}[{int(row[i]) if is_plan else i}]"
        return None

    def last_step(self, carry: Any, adjoint: Adjoint) -> Any:
        """Take the last step from a carry, as a loop whose derivative is an adjoint's."""
        rows = self.rows(self.steps - 1, self.steps)
        loop = {"backend": self.backend, "run_steps": self.steps, "adjoint": adjoint}
        return fold(self.body.alone, carry, rows, 1, **loop)[0]  # type: ignore[arg-type]


def make_plan(
    step: StepLike,
    init: Any,
    data: Tree,
    index: Tensor | LazyBatches,
    lr: float | Tensor,
    record: Any,
    every: int,
    evaluate: Any,
    evaluate_every: int,
    backend: str,
    check_finite: str,
    stop: Any,
    adjoint: Adjoint,
) -> Plan:
    """Check the arguments of `train`."""
    taken = as_step(step)
    leaves = _check_init(step, init)
    init = _tree.detach(init)
    params = params_of(init)
    _warn_of_half(params)
    batches, size = _batches(data, index, leaves, params)
    steps = size.steps
    lrs = _check_lrs(lr, steps, leaves)
    every = check_int("every", every, 1)
    recorders, evaluators = _recorders(record), _evaluators(evaluate)
    block = _block(every, evaluate_every, recorders, evaluators) if evaluators else every
    backend = settle(backend, steps, len(_tree.leaves(init)))
    stop = _check_end(check_finite, stop, evaluators)
    if stop is not None and 0 < steps < block and any(name in evaluators for name in stop.quantities):
        raise ValueError(
            f"stop judges what is evaluated every {block} steps, but the run has {steps}; use a smaller "
            f"evaluate_every"
        )
    if size.is_empty:
        taken.accept(init, batches.batch(batches.rows(0, 1)[0]), lrs[0])  # most steps refuse it
    body = Body(taken.advance, batches.batch, recorders, evaluators, stop, check_finite, backend)
    check_adjoint(adjoint).check_steps(steps)
    if stop is not None and adjoint.counts_from_end:
        raise ValueError(
            f"{adjoint} counts from the planned end of a run, which stop= moves: use Reverse() or "
            f"Checkpoint()"
        )
    segments = adjoint.segments(steps, block)
    work = sum([leaf.numel() for leaf in leaves]) * max(size.entries, 1) * members() * block
    return Plan(
        given=step,
        ranks=taken.ranks,
        body=body,
        state=first_state(init, stop),
        batches=batches,
        lrs=lrs,
        every=every,
        block=block,
        grain=_grain(backend, segments),
        work=work,
        backend=backend,
        seen={},
        adjoint=segments,
    )


class _Size(NamedTuple):
    """The size of a run: its steps, the entries of a batch, and whether its batches have no samples."""

    steps: int
    entries: int
    is_empty: bool = False


def _batches(data: Any, index: Any, leaves: list[Tensor], params: Tree) -> tuple[Batches, _Size]:
    """Check the data and the plan of a run, or the number of its steps."""
    device = leaves[0].device
    if isinstance(index, int) or is_source(data):
        return _stream(data, index, leaves, params)
    if is_indexed(data):
        _check_place("a data set that computes its samples")
        index = _check_index(index, None, len(data), device)
        batches, first = from_dataset(data, index, device)
        check_batch(first, leaves, params, "data")
        return batches, _Size(len(index), sum([leaf.numel() for leaf in _tree.leaves(first)]))
    data = as_data(data, "data", is_read=True)
    samples = check_batch(data, leaves, params, "data")
    index = _check_index(index, data, samples, device)
    steps, batch_size = index.shape
    entries = sum([math.prod(leaf.shape[1:]) for leaf in _tree.leaves(data)]) * batch_size
    return from_memory(data, index), _Size(steps, entries, bool(steps) and not batch_size)


def _stream(data: Any, index: Any, leaves: list[Tensor], params: Tree) -> tuple[Batches, _Size]:
    """Check a source of batches and the number of steps."""
    if not isinstance(index, int):
        raise TypeError(
            f"data is {type(data).__name__}, which gives batches one after another: let index be their "
            f"number, or {remedy_for(data)}"
        )
    steps, device = check_int("index", index, 0), leaves[0].device
    if is_source(data):
        _check_place("a source of batches")
        batches, first = from_iterable(data, steps, device)
    elif callable(data):
        check_function(
            "data", data, ("step",), "a function (step) -> batch", "it is given the step, 0-d int64"
        )
        batches, first = (
            from_function(data, device),
            data(torch.zeros((), dtype=torch.int64, device=device)),
        )
        _tree.check_tensors(first, "data")
    else:
        raise TypeError(
            f"index is {index}, a number of steps, which goes with a source of batches (an iterable, or a "
            f"function of the step), but data is {type(data).__name__}; pass a plan int64 [T, B], as "
            f"epoch_batches makes it"
        )
    check_batch(first, leaves, params, "data")
    return batches, _Size(steps, sum([leaf.numel() for leaf in _tree.leaves(first)]))


def _check_place(what: str) -> None:
    """Refuse what gives each batch once where a run may be called many times."""
    if is_transforming() or is_tracing():
        raise ValueError(
            f"data is {what}, which is read outside of vmap, grad, jvp and jit only; inside, pass tensors, "
            f"or a function (step) -> batch with the number of steps as the index"
        )


def _grain(backend: str, adjoint: Segments) -> int:
    """Choose how many blocks segments are multiples of, each of which keeps a carry."""
    grain = 1 if backend == "eager" else _GRAIN
    return -(-adjoint.grain // grain) * grain


def _check_init(step: StepLike, init: Any) -> list[Tensor]:
    """Refuse what the step cannot start from; return the leaves of its parameters."""
    if isinstance(step, Step):
        step.check(init)
        return check_params(params_of(init))
    _tree.check_tensors(init, "init")
    leaves = _tree.leaves(params_of(init)) or _tree.leaves(init)
    if not leaves:
        raise ValueError("init has no tensor leaves")
    return leaves


def _check_end(check_finite: str, stop: Any, evaluators: Mapping[str, Evaluator]) -> Stop | None:
    """Refuse what cannot end a run; make a `Stop` of a function."""
    check_choice("check_finite", check_finite, ("off", "loss", "all"))
    if is_tracing() and (stop is not None or check_finite != "off"):
        raise BackendError(
            "the values of a run with stop= or check_finite= decide where it ends, so it cannot be traced "
            "as a whole; give the backend to train, which then traces only its loop"
        )
    if stop is None:
        return None
    stop = Stop.of(stop)
    for name in stop.quantities:
        if name != "loss" and name not in evaluators:
            raise ValueError(
                f"stop judges {name!r}, but the run evaluates {[*evaluators] or 'nothing'}; pass "
                f"evaluate={{{name!r}: function}}, of the carry"
            )
    return stop


_RESERVED = ("step", "steps", "diverged", "evaluated", "best")


def _named(argument: str, given: Any) -> dict[str, Any]:
    """Give a name to each of the functions, or names of records, that are to be kept of a run."""
    if isinstance(given, str) or callable(given):
        given = (given,)
    if not isinstance(given, Mapping):
        given = {entry if isinstance(entry, str) else _name(entry): entry for entry in given}
    for name in given:
        if name in _RESERVED or not name.isidentifier():
            raise ValueError(
                f"{name!r} cannot name a record: it becomes an attribute beside `step`; pass "
                f"{argument}={{'name': ...}}"
            )
    return dict(given)


def _recorders(record: Any) -> dict[str, Recorder]:
    """Give every record a name and a recorder."""
    recorders: dict[str, Recorder] = {}
    for name, entry in _named("record", record).items():
        if callable(entry):
            recorders[name] = _users(entry)
        elif entry in RECORDERS:
            recorders[name] = RECORDERS[entry]
        else:
            raise ValueError(
                f"record must name {', '.join(RECORDERS)} or be a function (carry, loss) -> tree; "
                f"got {entry!r}"
            )
    return recorders


def _users(record: Callable[[Any, Any], Tree]) -> Recorder:
    return lambda carry, loss, lr, grads: record(carry, loss)


def _evaluators(evaluate: Any) -> dict[str, Evaluator]:
    """Give everything that is evaluated a name."""
    evaluators = {} if evaluate is None else _named("evaluate", evaluate)
    for name, entry in evaluators.items():
        check_function(
            f"evaluate of {name!r}", entry, ("carry",), "a function (carry) -> tree", _CLOSE_OVER
        )
    return evaluators


_CLOSE_OVER = "let it close over its data: lambda params: accuracy(params, held_out)"


def _block(every: int, evaluate_every: int, recorders: Any, evaluators: Any) -> int:
    """Refuse evaluations that do not fit the records; return how many steps lie between them."""
    block = check_int("evaluate_every", evaluate_every, 1)
    if block % every:
        raise ValueError(
            f"evaluate_every must be a multiple of every, because a block of steps begins with a record; "
            f"got evaluate_every={block} and every={every}; use evaluate_every={-(-block // every) * every}"
        )
    for name in evaluators:
        if name == "loss" or name in recorders:
            raise ValueError(
                f"evaluate has the name {name!r}, which is that of "
                f"{'a record' if name in recorders else 'the loss of a step'}; pass {{'another': function}}"
            )
    return block


def _name(entry: Any) -> str:
    name = getattr(entry, "__name__", "")
    if not name.isidentifier():
        raise ValueError(f"{entry!r} has no name to record it under; pass {{'name': function}}")
    return name


def _check_index(index: Any, data: Tree, samples: int | None, device: torch.device) -> Tensor | LazyBatches:
    """Return the plan int64 [T, B], on the parameters' device."""
    if isinstance(index, LazyBatches):
        if samples is not None and index.n > samples:
            raise IndexError(
                f"index is a plan of n = {index.n} samples, but data has {samples}{_if_list(data)}"
            )
        return index.to(device)
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        got = index.dtype if isinstance(index, Tensor) else type(index).__name__
        inside = "; pass its .index" if isinstance(getattr(index, "index", None), Tensor) else ""
        raise TypeError(
            f"index must be an int64 tensor [T, B], as epoch_batches makes it; got {got}{inside}"
        )
    if index.ndim != 2:
        raise ValueError(f"index must be [T, B], a batch a row; got shape {tuple(index.shape)}")
    # Read only where it costs nothing; elsewhere torch finds what is too large.
    if is_readable(index) and index.numel() and samples is not None:
        low, high = (int(end) for end in torch.aminmax(index))
        if low < 0 or high >= samples:
            raise IndexError(
                f"index goes from {low} to {high}, but data has samples 0 to {samples - 1}{_if_list(data)}"
            )
    return index.to(device)


def _if_list(data: Tree) -> str:
    """Tell what a list is taken for, because it may be meant as one of samples."""
    if type(data) is not list:
        return ""
    line = "torch.utils.data.default_collate(data)"
    return (
        f"; the {len(data)} entries of a list are arrays with all samples; if they are samples, pass {line}"
    )


def _check_lrs(lr: Any, steps: int, leaves: list[Tensor]) -> Tensor:
    """Return one lr a step, [T], in the widest dtype of the parameters."""
    dtypes = {leaf.dtype for leaf in leaves if leaf.is_floating_point()} or {torch.get_default_dtype()}
    dtype, device = reduce(torch.promote_types, dtypes), leaves[0].device
    if callable(lr):
        raise TypeError(f"lr is a function; pass its values, one a step: schedule(torch.arange({steps}))")
    if isinstance(lr, np.ndarray | list | tuple):  # torch would round the numbers of a list to float32
        lr = torch.as_tensor(lr, dtype=None if isinstance(lr, np.ndarray) else torch.float64)
    readable = isinstance(lr, Tensor) and is_readable(lr) and not lr.is_complex()
    if readable and not (lr.isfinite() & (lr >= 0)).all():
        raise ValueError(f"lr must be finite and >= 0 in every step; got {lr}")
    if isinstance(lr, Tensor) and lr.ndim:
        if lr.shape != (steps,) or lr.is_complex():
            raise ValueError(
                f"lr must be a number, a 0-d tensor, or a tensor [T] with T = {steps} as in index; "
                f"got shape {tuple(lr.shape)}"
            )
    else:
        lr = check_lr(lr)
        if not isinstance(lr, Tensor):
            return torch.full((steps,), lr, dtype=dtype, device=device)
    return torch.as_tensor(lr, dtype=dtype, device=device).expand(steps)


def _warn_of_half(params: Tree) -> None:
    for position, leaf in enumerate(_tree.leaves(params)):
        if leaf.dtype.itemsize < 4 and leaf.is_floating_point():
            path = _tree.named_leaves(params, "params")[position][0]
            digits = -math.log2(torch.finfo(leaf.dtype).eps)
            warn(
                f"{path} is {str(leaf.dtype).removeprefix('torch.')}: a step below 2^-{digits + 1:.0f} "
                f"of a weight is rounded away, and training stalls; keep the parameters in float32 and "
                f"evaluate the loss narrowly: gd.low_precision(loss_fn, {leaf.dtype})"
            )
            return
