"""The driver of a run: segments, each of them a scan, with progress and interruption in between."""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _tree, checkpoint
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
from ._plan import Plan, Stage
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
    values: tuple[Tree, ...] = ()  # of each segment that was evaluated

    @property
    def taken(self) -> int:
        """The number of steps that were taken, by the longest member: fewer than `step` if it has ended."""
        return int(_tree.unwrap(self.state.steps).max()) if isinstance(self.state, Stoppable) else self.step

    @property
    def ended(self) -> bool:
        """Whether all members have ended before the last step."""
        return isinstance(self.state, Stoppable) and bool(_tree.unwrap(self.state.ended).all())

    def trajectory(self, plan: Plan) -> Trajectory:
        """Join the records of the segments, and leave out those of steps that no member took."""
        records = _tree.cat(self.records) if self.records else {}
        step, values = torch.arange(0, self.taken, plan.every), {}
        if plan.body.evaluators:
            evaluated = plan.block * torch.arange(1, self.taken // plan.block + 1)
            values = {"evaluated": evaluated, **self._values(plan)}
        if plan.body.stop is None:
            return Trajectory(step=step, **records, **values)
        records = _tree.map(lambda leaf: leaf[: len(step)].clone(), records)
        values = _tree.map(lambda leaf: leaf[: self.taken // plan.block].clone(), values)
        best = plan.body.stop.best(self.state.memory)
        kept = {} if best is None else {"best": best}
        steps, diverged = self.state.steps, self.state.diverged
        return Trajectory(step=step, **records, **values, steps=steps, diverged=diverged, **kept)

    def _values(self, plan: Plan) -> dict[str, Tree]:
        """Join what was evaluated; a run that is too short for that tells the shapes."""
        if self.values or not self.records:
            return _tree.cat(self.values) if self.values else {}
        return _tree.map(lambda leaf: leaf[None][:0], plan.body.values(carry_of(self.state)))


checkpoint.register(TrainingInterrupted)


def drive(plan: Plan, progress: Progress, resume: TrainingInterrupted | None) -> tuple[Any, Trajectory]:
    """Run a plan, or the rest of it, and report after every segment."""
    first = done = Done(0, plan.state, plan.backend) if resume is None else _interrupted(plan, resume)
    try:
        with reporter(progress, plan.steps, "step") as report:
            # The loop assigns whole segments, so that Ctrl-C finds each done or not begun.
            for done in segments(plan, first):
                report(done.taken)
        return carry_of(done.state), done.trajectory(plan)
    except KeyboardInterrupt as interrupt:
        # Under vmap the members become rows, because a wrapped tensor would not outlive this call.
        raise TrainingInterrupted(
            step=done.taken,
            state=_tree.clone(_tree.unwrap(carry_of(done.state))),
            trajectory=_tree.clone(_tree.unwrap(done.trajectory(plan))),
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
    size = plan.stage(max(done.step - 1, 0), plan.steps).size  # of the block before
    ends = done.step <= plan.steps and (done.step % size == 0 or done.step == plan.steps)
    if not ends or (rows and rows != -(-done.step // plan.every)):
        blocks = f"every={plan.every}" + f" and evaluate_every={plan.block}" * bool(plan.body.evaluators)
        raise ValueError(
            f"resume is of another run: it was stopped after {done.step} steps with {rows} records, where "
            f"one of {plan.steps} steps with {blocks} has no segment's end"
        )
    if plan.backend not in ("auto", done.backend):
        raise ValueError(f"resume is of a run on backend={done.backend!r}; got backend={plan.backend!r}")
    if any({*records} != {*plan.body.recorders} for records in done.records):
        raise ValueError(f"resume has the records {[*done.records[0]]}, but record= names others")
    evaluators = plan.body.evaluators
    values = [_tree.leaves(values) for values in done.values]
    is_whole = sum(len(leaves[0]) for leaves in values if leaves) == done.step // plan.block
    if any({*each} != {*evaluators} for each in done.values) or (evaluators and not is_whole):
        raise ValueError(
            f"resume has {[*done.values[0]] if values else 'nothing'} evaluated, but evaluate= and "
            f"evaluate_every= of this run are others"
        )
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
        started, stage = time.perf_counter(), plan.stage(done.step, _goal(plan, done))
        last = segment_end(done.step, blocks, stage.size, stage.end, plan.grain)
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
    return Done(last, state, plan.backend, (*done.records, records), values), finite


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
