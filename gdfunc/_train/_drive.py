"""The driver of a run: segments, each of them a scan, with progress and interruption in between."""

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _tree
from .._errors import BackendError, NonFiniteError, TrainingInterrupted, check_type
from .._progress import Progress, reporter
from .._scan._cost import PYTHON_STEP
from .._scan._scan import falls_back, fold
from .._step import params_of
from .._torch._modes import is_tracing
from .._torch._transforms import is_transforming
from .._tree import Tree
from ..adjoints._truncated import Constant
from ._body import Stoppable, carry_of
from ._plan import Plan
from ._trajectory import Trajectory

_SEGMENT_SECONDS = 0.1  # how long segments should take: Ctrl-C, progress and stop wait for their end
# Cautious guesses for a first segment: seconds for each entry of the parameters times entry of the data,
# and seconds that a backend needs around every step.
_ENTRY_SECONDS = 1e-8
_STEP_SECONDS = {"eager": PYTHON_STEP, "native": 1e-7, "inductor": 6e-6, "cudagraph": 6e-6}
_STEP_SECONDS["auto"] = PYTHON_STEP / 10  # a replayed step of a small model


class Done(NamedTuple):
    """The part of a run that is done."""

    step: int
    state: Any
    backend: str
    records: tuple[Tree, ...] = ()  # of each segment

    @property
    def taken(self) -> int:
        """The number of steps that were taken, by the longest member: fewer than `step` if it has ended."""
        return int(_tree.unwrap(self.state.steps).max()) if isinstance(self.state, Stoppable) else self.step

    @property
    def ended(self) -> bool:
        """Whether all members have ended before the last step."""
        return isinstance(self.state, Stoppable) and bool(_tree.unwrap(self.state.ended).all())

    def trajectory(self, every: int) -> Trajectory:
        records = _tree.cat(self.records) if self.records else {}
        step = torch.arange(0, self.taken, every)
        if not isinstance(self.state, Stoppable):
            return Trajectory(step=step, **records)
        records = _tree.map(lambda leaf: leaf[: len(step)].clone(), records)
        return Trajectory(step=step, **records, steps=self.state.steps, diverged=self.state.diverged)


def drive(plan: Plan, progress: Progress, resume: TrainingInterrupted | None) -> tuple[Any, Trajectory]:
    """Run a plan, or the rest of it, and report after every segment."""
    first = done = Done(0, plan.state, plan.backend) if resume is None else _interrupted(plan, resume)
    try:
        with reporter(progress, plan.steps, "step") as report:
            # The loop assigns whole segments, so that Ctrl-C finds each done or not begun.
            for done in segments(plan, first):
                report(done.taken)
        return carry_of(done.state), done.trajectory(plan.every)
    except KeyboardInterrupt as interrupt:
        # Under vmap the members become rows, because a wrapped tensor would not outlive this call.
        raise TrainingInterrupted(
            step=done.taken,
            state=_tree.clone(_tree.unwrap(carry_of(done.state))),
            trajectory=_tree.clone(_tree.unwrap(done.trajectory(plan.every))),
            done=None if is_transforming() else done,
        ) from interrupt


def _interrupted(plan: Plan, resume: Any) -> Done:
    """Check that a plan can go on where another run of it was interrupted."""
    check_type("resume", resume, TrainingInterrupted, "pass the one that was raised")
    done = resume.done
    if done is None or is_transforming():
        raise ValueError(
            "resume goes on with a run outside of vmap, grad and jvp; inside, begin with the state of the "
            "interruption: train(step, error.state, data, index[error.step:], ...)"
        )
    _tree.check_like(done.state, plan.state, "resume.state", "init")
    kept = [_tree.leaves(records) for records in done.records]
    rows = sum(len(leaves[0]) for leaves in kept if leaves)
    ends = done.step <= plan.steps and (done.step % plan.every == 0 or done.step == plan.steps)
    if not ends or (rows and rows != -(-done.step // plan.every)):
        raise ValueError(
            f"resume is of another run: it was stopped after {done.step} steps with {rows} records, where "
            f"one of {plan.steps} steps with every={plan.every} has no segment's end"
        )
    if plan.backend not in ("auto", done.backend):
        raise ValueError(f"resume is of a run on backend={done.backend!r}; got backend={plan.backend!r}")
    if any({*records} != {*plan.body.recorders} for records in done.records):
        raise ValueError(f"resume has the records {[*done.records[0]]}, but record= names others")
    return done


def segments(plan: Plan, done: Done) -> Iterator[Done]:
    """Run the segments of a plan after what is done; give after each what is done so far.

    The first segment may trace and compile, so that its time never makes the next
    shorter. If it cannot be traced, all of
    the run is eager.
    """
    plan = plan.on(done.backend)
    blocks, is_first = first_blocks(plan), True
    while not done.records or (done.step < plan.steps and not done.ended):
        started = time.perf_counter()
        last = segment_end(done.step, blocks, plan.every, _goal(plan, done), plan.grain)
        try:
            new, finite = _advance(plan, done, last)
        except BackendError as error:
            if not falls_back(error, plan.backend, plan.steps):
                raise
            yield from segments(plan, done._replace(backend="eager"))
            return
        if finite is not None and not _is_true(finite.all()):
            raise _non_finite(plan, done, finite)
        taken = -(-(last - done.step) // plan.every)
        paced = next_blocks(taken, time.perf_counter() - started, plan.grain)
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
    seconds = max(plan.work * _ENTRY_SECONDS, plan.every * _STEP_SECONDS[plan.backend])
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


def _advance(plan: Plan, done: Done, last: int) -> tuple[Done, Tensor | None]:
    """Go on to step `last`, by a scan over its blocks; also tell for each step whether it was finite."""
    steps = last - done.step
    size = max(1, min(plan.every, steps))
    rows = plan.rows(done.step, last)
    # Because to slice an axis of one step takes 8% of a small step in Python.
    without_axis = plan.every == 1
    if not without_axis:
        rows = _tree.map(lambda leaf: leaf.reshape(steps // size, size, *leaf.shape[1:]), rows)
    state, (records, finite) = fold(
        plan.body.single if without_axis else plan.body,
        done.state,
        rows,
        steps // size,
        plan.backend,
        adjoint=plan.adjoint.adjoint if done.step >= plan.adjoint.constant else Constant(),
        run_steps=plan.steps,
        seen=plan.seen,
    )
    return Done(last, state, plan.backend, (*done.records, records)), finite


def _non_finite(plan: Plan, done: Done, finite: Tensor) -> NonFiniteError:
    """Go on to the last good carry, and build the error that holds it."""
    bad = done.step + int(torch.nonzero(~finite.flatten())[0])
    while done.step < bad or not done.records:
        done, _ = _advance(plan, done, segment_end(done.step, bad, plan.every, bad, 1))
    carry = carry_of(done.state)
    after, loss, _ = plan.step(carry, bad)
    trajectory = done.trajectory(plan.every)
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
