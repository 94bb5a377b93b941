"""The driver of a run: segments, each of them a scan, with progress and interruption in between."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .. import _tree
from .._errors import BackendError, NonFiniteError, TrainingInterrupted, check_function
from .._progress import Progress, reporter
from .._scan._cost import PYTHON_STEP
from .._scan._scan import falls_back, fold
from .._step import params_of
from .._torch._modes import is_tracing
from .._torch._transforms import is_transforming
from .._tree import Tree
from ..adjoints._truncated import Constant
from ._body import carry_of
from ._done import Done, interrupted
from ._keep import Keeper, Kept, found
from ._plan import Plan, Stage
from ._ranks import check_end, slowest, together, writes
from ._trajectory import Trajectory

Log = Callable[[int, dict[str, float]], Any]
_SEGMENTS = 64  # whose records are joined
_SEGMENT_SECONDS = 0.1  # how long segments should take: Ctrl-C, progress and stop wait for their end
# Cautious guesses for a first segment: seconds for each entry of the parameters times entry of the data,
# and seconds that a backend needs around every step.
_ENTRY_SECONDS = 1e-8
_STEP_SECONDS = {"eager": PYTHON_STEP, "native": 1e-7, "inductor": 6e-6, "cudagraph": 6e-6}
_STEP_SECONDS["auto"] = PYTHON_STEP / 10  # a replayed step of a small model


def check_log(log: Log | None) -> Log | None:
    """Refuse what cannot be called with numbers, and a place where there are none."""
    if log is None:
        return None
    check_function("log", log, ("step", "numbers"), "a function (step, numbers)", "such as writer.log_all")
    if is_transforming() or is_tracing():
        raise ValueError(
            "log reads values, which a run inside vmap, grad, jvp or jit has not; record= keeps them"
        )
    return log


def drive(
    plan: Plan, progress: Progress, log: Log | None, resume: TrainingInterrupted | None, where: Kept | None
) -> tuple[Any, Trajectory]:
    """Run a plan, or the rest of it, and after every segment report what is done, and write it."""
    try:
        resume = resume if where is None else found(where, plan, resume)
        start = Done(0, plan.state, plan.backend, source=plan.batches.state(0))
        first = start if resume is None else interrupted(plan, resume)
        with together(plan, first):
            keeper = None
            if where is not None and writes(plan):
                keeper = Keeper(where, plan, None if resume is None else first.step)
            with terminable(where is not None):
                result = _drive(plan, first, progress, log, keeper)
            check_end(plan, result[0])
            return result
    finally:
        plan.batches.close()


def _drive(
    plan: Plan, first: Done, progress: Progress, log: Log | None, keeper: Keeper | None
) -> tuple[Any, Trajectory]:
    done = first
    if progress is True and not writes(plan):  # one bar for all ranks
        progress = False
    try:
        with reporter(progress, plan.steps, "step", first.taken) as report:
            # The loop assigns whole segments, so that Ctrl-C finds each done or not begun.
            for done in segments(plan, first):
                told = done.floats(plan) if log or (progress is True and not is_transforming()) else {}
                report(done.taken, told)
                if log:
                    log(done.taken, told)
                if keeper:
                    keeper(done)
        if keeper:
            keeper.try_to_write(done)
        return carry_of(done.state), done.trajectory(plan)
    except KeyboardInterrupt as interrupt:
        # Under vmap the members become rows, because a wrapped tensor would not outlive this call.
        error = TrainingInterrupted(
            step=done.taken,
            state=_tree.clone(_tree.unwrap(carry_of(done.state))),
            trajectory=_tree.clone(_tree.unwrap(done.trajectory(plan))),
            done=None if is_transforming() else done,
        )
        if keeper:
            keeper.save_from(error, done)
        raise error from interrupt
    except BaseException as error:  # also the SystemExit of a handler of the user's own
        if keeper:
            keeper.save_from(error, done)
        raise


@contextmanager
def terminable(wanted: bool) -> Iterator[None]:
    """Let a request to terminate, such as a cluster's that takes a machine back, do what Ctrl-C does."""
    is_main = threading.current_thread() is threading.main_thread()
    if not wanted or not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def segments(plan: Plan, done: Done) -> Iterator[Done]:
    """Run the segments of a plan after what is done; give after each what is done so far.

    The first segment may trace and compile, so that its time never makes the next shorter. If it cannot
    be traced, all of the run is eager.
    """
    plan = plan.on(done.backend)
    blocks, is_first = first_blocks(plan), True
    while not done.records or (done.step < plan.steps and not done.ended):
        started, stage = time.perf_counter(), plan.stage(done.step, _goal(plan, done))
        last = segment_end(done.step, plan.at_most(blocks), stage.size, stage.end, plan.grain)
        try:
            new, finite = _advance(plan, done, last, stage)
        except BackendError as error:
            if not falls_back(error, plan.backend, plan.steps):
                raise
            yield from segments(plan, done._replace(backend="eager"))
            return
        if finite is not None and not _is_true(finite.all()):
            raise _non_finite(plan, done, finite)
        taken = -(-(last - done.step) // stage.size)
        paced = next_blocks(taken, slowest(plan, time.perf_counter() - started), plan.grain)
        blocks = max(blocks, paced) if is_first else paced
        done, is_first = new, False
        yield done


def first_blocks(plan: Plan) -> int:
    """Choose the length of the first segment: cautious, because nothing has been measured yet.

    A trace gets the whole run as one loop. A run from Python begins with one block, which costs no more
    there than in a longer segment.
    """
    if is_tracing():
        return max(plan.steps, 1)
    if plan.grain == 1:
        return 1
    seconds = max(plan.work * _ENTRY_SECONDS, plan.block * _STEP_SECONDS[plan.backend])
    return max(int(_SEGMENT_SECONDS / seconds) // plan.grain, 4) * plan.grain


def segment_end(first: int, blocks: int, every: int, total: int, grain: int) -> int:
    """Find where a segment of so many blocks of `every` steps ends.

    A last block of fewer steps is a segment of its own. Other segments have at least a grain of blocks,
    except one that is the whole run.
    """
    whole = total - total % every
    last = first + blocks * every
    if first >= whole:
        return total
    return whole if whole - last < grain * every else last


def next_blocks(blocks: int, seconds: float, grain: int) -> int:
    """Let segments grow or shrink to about 0.1 s. Where they end does not change the result."""
    growth = min(1024.0, _SEGMENT_SECONDS / max(seconds, 1e-9))
    return max(grain, int(blocks * growth) // grain * grain)


def _goal(plan: Plan, done: Done) -> int:
    """Find the step before which a segment must end: derivatives may end between two."""
    return plan.adjoint.constant if done.step < plan.adjoint.constant else plan.steps


def _advance(plan: Plan, done: Done, last: int, stage: Stage) -> tuple[Done, Tensor | None]:
    """Go on to step `last`, by a scan over its blocks; also tell for each step whether it was finite."""
    steps = last - done.step
    size, every = max(1, min(stage.size, steps)), max(1, min(plan.every, steps))
    rows = plan.rows(done.step, last)
    axes = [steps // size]
    body: Callable[[Any, Tree], tuple[Any, Any]] = plan.body.single if plan.every == 1 else plan.body
    if stage.evaluated:
        body, axes = plan.body.evaluated, [*axes, size // every]
    # Because to slice an axis of one step takes 8% of a small step in Python.
    if plan.every > 1:
        axes = [*axes, every]
    if len(axes) > 1:
        rows = _tree.map(lambda leaf: leaf.reshape(*axes, *leaf.shape[1:]), rows)
    state, told = fold(
        body,
        done.state,
        rows,
        steps // size,
        plan.backend,
        adjoint=plan.adjoint.adjoint if done.step >= plan.adjoint.constant else Constant(),
        run_steps=plan.steps,
        seen=plan.seen,
    )
    values = done.values
    if stage.evaluated:
        (records, finite), new = told
        records, values = _tree.map(lambda leaf: leaf.flatten(0, 1), records), (*values, new)
    else:
        records, finite = told
    source = plan.batches.state(last)
    records = _joined((*done.records, records))
    return Done(last, state, plan.backend, records, _joined(values), source), finite


def _joined(segments: tuple[Tree, ...]) -> tuple[Tree, ...]:
    """Join the records of many segments, because small tensors take more memory than their numbers."""
    return segments if len(segments) < _SEGMENTS else (_tree.cat(segments),)


def _non_finite(plan: Plan, done: Done, finite: Tensor) -> NonFiniteError:
    """Go on to the last good carry, and build the error that holds it."""
    bad = done.step + int(torch.nonzero(~finite.flatten())[0])
    while done.step < bad or not done.records:
        stage = plan.stage(done.step, bad)
        done, _ = _advance(plan, done, segment_end(done.step, bad, stage.size, stage.end, 1), stage)
    carry = carry_of(done.state)
    after, loss, _ = plan.step(carry, bad)
    trajectory = done.trajectory(plan)
    leaf, sample = _first_non_finite(loss, after), plan.non_finite_sample(bad)
    return NonFiniteError(step=bad, leaf=leaf, state=carry, trajectory=trajectory, sample=sample)


def _first_non_finite(loss: Any, carry: Any) -> str:
    name = "params" if params_of(carry) is carry else "state"
    for path, leaf in [*_tree.named_leaves(loss, "loss"), *_tree.named_leaves(carry, name)]:
        if not leaf.isfinite().all():
            return path
    return "loss"  # on a device that does not repeat itself, the value may be gone


def _is_true(flag: Tensor) -> bool:
    try:
        return bool(flag)
    except RuntimeError as error:
        error.add_note("gdfunc: check_finite reads values, which vmap does not allow")
        raise
