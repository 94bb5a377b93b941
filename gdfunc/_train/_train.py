"""A training run: a scan of steps over batches, in segments that can be watched and stopped."""

import math
import time
from collections.abc import Callable, Mapping
from functools import partial, reduce
from types import SimpleNamespace
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from .. import _tree
from .._errors import BackendError, NonFiniteError, TrainingInterrupted, check_choice, check_int, warn
from .._gradients import check_batch, check_params
from .._progress import Progress, reporter
from .._sampling import take
from .._scan._recent import Recent
from .._scan._scan import check_checkpoint, check_tensors, fold, is_readable, read_once, settle, within
from .._step import Step, StepLike, as_step, check_lr, params_of
from .._through import asked
from .._tree import Tree
from ._stopping import Stop, Watched, is_finite, stopping, watch

_SEGMENT_SECONDS = 0.1  # how long segments should take: Ctrl-C, progress and stop wait for their end
_CAUTIOUS = 1e8  # entries of the parameters times entries of a batch that a compiled loop does in a second
_paces = Recent()  # how many blocks a segment of the same run had at last
_GRAIN = 4  # blocks: segments of a compiled loop are whole multiples, so that each block always runs alike


class Trajectory(SimpleNamespace):
    """What a run recorded: one attribute a record, each a tree with leading [T].

    `step` [T] holds the numbers of the recorded steps. Record t is taken before step t: `params[t]` is
    where `loss[t]` was measured. A drawn path is `params` followed by the run's final parameters.
    A run with `stop=` adds `steps`, how many it took (int64), and `diverged`, whether the loss of the next
    was not finite (bool).
    A Trajectory is a tree, so `torch.func.vmap` returns and `grad` sees its leaves.

    Example:
        >>> trajectory = gd.Trajectory(step=torch.arange(2), loss=torch.tensor([4.0, 1.0]))
        >>> trajectory.loss
        tensor([4., 1.])
        >>> trajectory
        Trajectory(step=int64[2], loss=float32[2])
    """

    def __repr__(self) -> str:
        shapes = _tree.map(_Shape, vars(self))
        return f"Trajectory({', '.join(f'{name}={shape}' for name, shape in shapes.items())})"

    def __getattr__(self, name: str) -> NoReturn:
        recorded = ", ".join(vars(self))
        raise AttributeError(f"{name} was not recorded: train(..., record=) kept {recorded}")


_tree.register(Trajectory, flatten=vars, unflatten=lambda records: Trajectory(**records))


class _Shape:
    """A leaf's dtype and shape, for show."""

    def __init__(self, leaf: Tensor) -> None:
        self.text = f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}"

    def __repr__(self) -> str:
        return self.text


class Moment(NamedTuple):
    """One step as a recorder sees it."""

    carry: Any  # before the step
    y: Any
    lr: Tensor
    grads: Tree


Recorder = Callable[[Moment], Tree]

RECORDERS: dict[str, Recorder] = {
    "loss": lambda now: now.y,
    "params": lambda now: params_of(now.carry),
    "lr": lambda now: now.lr,
    "grad_norm": lambda now: _grad_norm(now),
    "state": lambda now: now.carry,
}


def train(
    step: StepLike,
    init: Any,
    data: Tree,
    index: Tensor,
    lr: float | Tensor,
    *,
    record: Any = ("loss",),
    every: int = 1,
    backend: str = "eager",
    progress: Progress = False,
    check_finite: str = "off",
    stop: Stop | None = None,
    checkpoint: int | str | None = None,
) -> tuple[Any, Trajectory]:
    """Run a step over the batches of a plan.

        for t in range(T):
            carry, loss[t] = step(carry, take(data, index[t]), lr[t])

    It is a `scan`, so `torch.func.grad`, `jvp` and `vmap` go through a whole run, with respect to lr,
    the initial parameters and the data.

    Args:
        step: a `Step`, or a function `(carry, batch, lr) -> (carry, loss)` with any tree of tensors as its
            carry.
        init: the first carry, from `step.init(params)`; for a plain `make_step(loss_fn)` the parameters.
            It is detached from autograd's graph, so differentiate with `torch.func.grad`, not with
            `backward`.
        data: tree of tensors or NumPy arrays [n, ...], of which the loss gets tensors; None for a loss
            without data. `check_mean_loss` tells whether the loss is a mean over it.
        index: the plan int64 [T, B], from `epoch_batches`, `sample_batches` or `full_batch`.
        lr: a number or 0-d tensor for all steps, or [T], one a step: a schedule. Values are checked unless
            they are on a GPU or under a transformation.
        record: what to keep of each step: names among `loss` (what the step returns), `params`, `lr`,
            `grad_norm`, `state` (the whole carry), and functions `(carry, loss) -> tree` of the carry
            before the step, kept under their `__name__`. A dict gives names of its own.
        every: keep only the steps 0, k, 2k, …
        backend: who runs the loop, `"eager"`, `"native"`, `"inductor"`, `"cudagraph"` or `"auto"`;
            see `scan`.
        progress: True for a bar (tqdm if installed, else a line on stderr), or a function that is called
            with the finished steps and T after every segment, about ten times a second. A compiled loop
            sees no change that it makes to what the step reads.
        check_finite: `"loss"`, or `"all"` for the carry too, stops at the first NaN or infinity;
            `"off"` lets it spread. Reads values, so not under vmap, grad or jvp.
        stop: `(carry, loss) -> 0-d bool`, called with the carry after a step and the loss that the step
            returned. The step for which it holds is the last. A loss that is not finite ends the run too,
            with the carry before its step; reverse-mode derivatives of such a run are NaN. Under vmap each
            member ends for itself, and its later records are those of its frozen carry, until all have
            ended.
        checkpoint: for derivatives through the run: how many steps lie between two carries that are kept,
            or `"sqrt"`; see `scan`.

    Returns:
        `(final, trajectory)`: the carry after the last step, and the records, [⌈T/every⌉, ...] each, of the
        T steps that were taken. With stop, `trajectory.steps` says how many a run took and
        `trajectory.diverged` whether a loss that is not finite ended it; member i of a vmapped run ended
        with `loss[i, steps[i] - 1]`.

    Raises:
        TypeError: index is not int64; a leaf of data is no tensor; stop gives no 0-d bool tensor; see
            `batch_grad`.
        ValueError: data, index and lr do not fit; an unknown record.
        IndexError: index points outside the data.
        BackendError: (a RuntimeError) the backend cannot run this step; see `scan`.
        NonFiniteError: (a GdfuncError) `check_finite` found NaN or infinity; it holds the last good carry.
        TrainingInterrupted: (a KeyboardInterrupt) Ctrl-C; it holds the carry and the records so far, of
            all members of a vmapped run along leading axes.

    Example:
        >>> x = torch.linspace(-1, 1, 50)
        >>> data = x, 3 * x
        >>> def loss_fn(w, batch):
        ...     x, y = batch
        ...     return ((x * w - y) ** 2).mean()
        >>> index = gd.epoch_batches(gd.random.key(0), n=50, batch_size=10, epochs=20)
        >>> final, trajectory = gd.train(gd.make_step(loss_fn), torch.tensor(0.0), data, index, lr=0.5)
        >>> final
        tensor(3.)
        >>> trajectory.loss.shape
        torch.Size([100])

    References:
        H. Robbins, S. Monro, "A stochastic approximation method", 1951.
    """
    leaves = _check_carry(step, init)
    step, init = as_step(step), _tree.detach(init)
    params = params_of(init)
    _warn_of_half(params)
    data = _tree.as_tensors(data)
    samples = check_batch(data, leaves, params, "data")
    plan = (_check_index(index, samples, params), _check_lrs(lr, len(index), params))
    every = check_int("every", every, 1)
    check_choice("check_finite", check_finite, ("off", "loss", "all"))
    recorders = _recorders(record)
    through = asked()
    kept_every = check_checkpoint(through.checkpoint if checkpoint is None else checkpoint, len(index))
    kept_blocks = None if kept_every is None else -(-kept_every // every)
    cut = 0 if through.last is None else max(len(index) - through.last, 0) // every * every
    backend = settle(backend, len(index))
    fold_settled = partial(fold, backend=backend, settled=True)
    if stop is not None and not callable(stop):
        raise TypeError(f"stop must be a function (carry, loss) -> 0-d bool; got {stop!r}")
    if within.get() is not None and (stop is not None or check_finite != "off"):
        raise BackendError(
            "a run whose end its values decide (stop=, check_finite=) cannot be traced as a whole: give "
            "the backend to train, so that its loop alone is traced"
        )
    run_step, first_carry = (step, init) if stop is None else (stopping(step, stop), watch(init))

    def last_step(carry: Any) -> Any:
        return step.advance(carry, take(data, plan[0][-1]), plan[1][-1])[0]

    if through.fixed_point is not None and (end := through.fixed_point.enter(len(index), last_step)):
        return end

    def advance(
        carry: Any, row: Tensor, lr_now: Tensor, recorders: dict[str, Recorder]
    ) -> tuple[Any, tuple[Tree, Tensor | None]]:
        batch = take(data, row)
        new, y, grads = run_step.advance(carry, batch, lr_now)
        now = Moment(_unwatched(carry), y, lr_now, grads)
        watched = {"off": None, "loss": y, "all": (y, new)}[check_finite]
        finite = None if watched is None else is_finite(watched)
        if finite is not None and isinstance(carry, Watched):
            finite = finite | carry.ended
        return new, ({name: recorder(now) for name, recorder in recorders.items()}, finite)

    def block(carry: Any, rows: tuple[Tensor, Tensor]) -> tuple[Any, tuple[Tree, Tree]]:
        """Take `every` steps and record the first."""
        carry, (records, finite) = advance(carry, rows[0][0], rows[1][0], recorders)
        finite = _tree.map(lambda flag: flag[None], finite)
        if len(rows[0]) > 1:
            rest = _tree.map(lambda leaf: leaf[1:], rows)
            carry, (_, others) = fold_settled(lambda carry, x: advance(carry, x[0], x[1], {}), carry, rest)
            finite = _tree.map(lambda *flags: torch.cat(flags), finite, others)
        return carry, (records, finite)

    read = read_once(block)  # here, and not in each segment

    def run(carry: Any, first: int, last: int) -> tuple[Any, tuple[Tree, Tree]]:
        """Run the steps first … last−1: a scan over their blocks."""
        size = max(1, min(every, last - first))
        count = (last - first) // size
        rows = tuple(leaf[first:last].reshape(count, size, *leaf.shape[1:]) for leaf in plan)
        return fold_settled(block, carry, rows, checkpoint=kept_blocks, read=read)

    def extend(finished: _Finished, last: int) -> tuple[_Finished, Tensor | None]:
        """Go on to step `last`; also tell, step by step, what was finite."""
        carry, (records, finite) = run(finished.carry, finished.step, last)
        return _Finished(last, carry, (*finished.records, records)), finite

    grain = 1 if backend == "eager" else _GRAIN
    grain = -(-(kept_blocks or 1) // grain) * grain  # every segment keeps a carry
    row = sum(math.prod(leaf.shape[1:]) for leaf in _tree.leaves(data))
    work = sum(leaf.numel() for leaf in leaves) * max(index.shape[1] * row, 1) * _tree.members()
    finished, blocks, same_run = _Finished(0, first_carry, ()), _first_blocks(work * every, grain), None
    if within.get() is not None:  # a trace has one loop, whatever the clock says
        blocks = max(len(index), 1)
    elif backend != "eager" and read().key is not None:
        same_run = read().key, backend, work, every, grain
        blocks = _paces.find(same_run) or blocks
    with reporter(progress, len(index), "step") as report:
        try:
            while finished.step < len(index) or not finished.records:
                goal = cut if finished.step < cut else len(index)
                last = _segment_end(finished.step, blocks, every, goal, grain)
                started = time.perf_counter()
                new, finite = extend(finished, last)
                taken = -(-(last - finished.step) // every)
                blocks = _next_blocks(taken, time.perf_counter() - started, grain)
                if same_run is not None:
                    _paces.keep(same_run, blocks, read().size)
                if finite is not None and not _read(finite.all()):
                    bad = finished.step + int(torch.nonzero(~finite.flatten())[0])
                    while finished.step < bad or not finished.records:
                        finished, _ = extend(finished, _segment_end(finished.step, bad, every, bad, 1))
                    state = _unwatched(finished.carry)
                    after, y, _ = step.advance(state, take(data, plan[0][bad]), plan[1][bad])
                    raise NonFiniteError(
                        step=bad,
                        leaf=_first_non_finite(y, after),
                        state=state,
                        trajectory=finished.trajectory(every),
                    )
                # One assignment, so that Ctrl-C finds a whole segment or none of it.
                finished = new if last > cut else new.detached()
                report(finished.taken)
                if isinstance(new.carry, Watched) and _tree.unwrap(new.carry.ended).all():
                    break
        except KeyboardInterrupt as interrupt:
            # Under vmap the members are kept as rows: a wrapped tensor would not outlive this call.
            raise TrainingInterrupted(
                step=finished.taken,
                state=_tree.unwrap(_unwatched(finished.carry)),
                trajectory=_tree.unwrap(finished.trajectory(every)),
            ) from interrupt
    final, trajectory = _unwatched(finished.carry), finished.trajectory(every)
    if through.fixed_point is not None:
        through.fixed_point.leave(final, trajectory)
    return final, trajectory


class _Finished(NamedTuple):
    """The segments of a run that are done."""

    step: int
    carry: Any
    records: tuple[dict[str, Tree], ...]

    @property
    def taken(self) -> int:
        """How many steps the run took, or its longest member: fewer than `step` if it has ended."""
        return int(_tree.unwrap(self.carry.steps).max()) if isinstance(self.carry, Watched) else self.step

    def detached(self) -> "_Finished":
        return self._replace(carry=_tree.cut(self.carry), records=_tree.cut(self.records))

    def trajectory(self, every: int) -> Trajectory:
        records = _tree.cat(self.records) if self.records else {}
        step = torch.arange(0, self.taken, every)
        if not isinstance(self.carry, Watched):
            return Trajectory(step=step, **records)
        records = _tree.map(lambda leaf: leaf[: len(step)].clone(), records)
        return Trajectory(step=step, **records, steps=self.carry.steps, diverged=self.carry.diverged)


def _unwatched(carry: Any) -> Any:
    return carry.carry if isinstance(carry, Watched) else carry


def _segment_end(first: int, blocks: int, every: int, total: int, grain: int) -> int:
    """Where a segment of so many blocks of `every` steps ends.

    A last block of fewer steps is a segment of its own; none but the only one is shorter than a grain.
    """
    whole = total - total % every
    last = first + blocks * every
    if first >= whole:
        return total
    return whole if whole - last < grain * every else last


def _first_blocks(work: int, grain: int) -> int:
    """Guess from the size of a block how many take no longer than a segment may, and be cautious."""
    if grain == 1:
        return 1
    guess = int(_SEGMENT_SECONDS * _CAUTIOUS / work)
    return min(max(guess // grain, 4), 256) * grain


def _next_blocks(blocks: int, seconds: float, grain: int) -> int:
    """Let segments grow to about 0.1 s. Where they end is of no matter to the result."""
    growth = min(1024.0, _SEGMENT_SECONDS / max(seconds, 1e-9))
    return max(grain, int(blocks * growth) // grain * grain)


def _recorders(record: Any) -> dict[str, Recorder]:
    """Give every record a name and a function of the moment."""
    if isinstance(record, str) or callable(record):
        record = (record,)
    if not isinstance(record, Mapping):
        record = {entry if isinstance(entry, str) else _name(entry): entry for entry in record}
    recorders: dict[str, Recorder] = {}
    for name, entry in record.items():
        if name == "step" or not name.isidentifier():
            raise ValueError(f"{name!r} cannot name a record: it becomes an attribute beside `step`")
        if callable(entry):
            recorders[name] = partial(_call, entry)
        elif entry in RECORDERS:
            recorders[name] = RECORDERS[entry]
        else:
            raise ValueError(
                f"record must name {', '.join(RECORDERS)} or be a function (carry, loss) -> tree; "
                f"got {entry!r}"
            )
    return recorders


def _grad_norm(now: Moment) -> Tensor:
    if now.grads is None:
        raise ValueError(
            "record='grad_norm' needs a gdfunc Step, such as make_step(loss_fn), but this step is a plain "
            "function, which tells no gradient; let it return (loss, norm) in place of the loss"
        )
    return _tree.norm(now.grads)


def _check_carry(step: StepLike, init: Any) -> list[Tensor]:
    """Refuse what the step cannot start from; return the leaves of its parameters."""
    if isinstance(step, Step):
        step.check(init)
        return check_params(params_of(init))
    check_tensors(init, "init")
    leaves = _tree.leaves(params_of(init)) or _tree.leaves(init)
    if not leaves:
        raise ValueError("init has no tensor leaves")
    return leaves


def _call(function: Callable[[Any, Any], Tree], now: Moment) -> Tree:
    return function(now.carry, now.y)


def _name(entry: Any) -> str:
    name = getattr(entry, "__name__", "")
    if not name.isidentifier():
        raise ValueError(f"{entry!r} has no name to record it under; pass {{'name': function}}")
    return name


def _check_index(index: Any, samples: int | None, params: Tree) -> Tensor:
    """Return the plan int64 [T, B], on the parameters' device."""
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
            raise IndexError(f"index goes from {low} to {high}, but data has samples 0 to {samples - 1}")
    return index.to(_tree.leaves(params)[0].device)


def _check_lrs(lr: Any, steps: int, params: Tree) -> Tensor:
    """Return one lr a step, [T], in the widest dtype of the parameters."""
    leaves = _tree.leaves(params)
    dtypes = [leaf.dtype for leaf in leaves if leaf.is_floating_point()] or [torch.get_default_dtype()]
    dtype = reduce(torch.promote_types, dtypes)
    if callable(lr):
        raise TypeError(f"lr is a function; pass its values, one a step: schedule(torch.arange({steps}))")
    lr = torch.as_tensor(lr) if isinstance(lr, np.ndarray | list | tuple) else lr
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
    return torch.as_tensor(lr, dtype=dtype, device=leaves[0].device).expand(steps)


def _warn_of_half(params: Tree) -> None:
    for position, leaf in enumerate(_tree.leaves(params)):
        if leaf.is_floating_point() and torch.finfo(leaf.dtype).bits < 32:
            path = _tree.named_leaves(params, "params")[position][0]
            digits = -math.log2(torch.finfo(leaf.dtype).eps)
            warn(
                f"{path} is {str(leaf.dtype).removeprefix('torch.')}: a step below 2^-{digits + 1:.0f} "
                f"of a weight is rounded away, and training stalls; keep the parameters in float32 and "
                f"evaluate the loss narrowly: gd.low_precision(loss_fn, {leaf.dtype})"
            )
            return


def _read(flag: Tensor) -> bool:
    try:
        return bool(flag)
    except RuntimeError as error:
        error.add_note("gdfunc: check_finite reads values, which vmap does not allow")
        raise


def _first_non_finite(y: Any, carry: Any) -> str:
    name = "params" if params_of(carry) is carry else "state"
    for path, leaf in [*_tree.named_leaves(y, "loss"), *_tree.named_leaves(carry, name)]:
        if not leaf.isfinite().all():
            return path
    return "loss"  # a device that does not repeat itself: the value was seen, but is gone
