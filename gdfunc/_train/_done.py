"""The part of a run that is done."""

from typing import Any, NamedTuple

import torch

from .. import _tree, checkpoint
from .._errors import TrainingInterrupted, check_type
from .._shown import dotted
from .._torch._transforms import is_transforming
from .._tree import Tree
from ._body import Stoppable, carry_of
from ._plan import Plan
from ._trajectory import Trajectory

NO_WAY_BACK = (
    "{} needs a source that can go on from a step: data with a plan, a function of the step, or an "
    "iterable with state_dict and load_state_dict, such as torchdata's StatefulDataLoader"
)


class Done(NamedTuple):
    """The part of a run that is done."""

    step: int
    state: Any
    backend: str
    records: tuple[Tree, ...] = ()  # of each segment
    values: tuple[Tree, ...] = ()  # of each segment that was evaluated
    source: Any = None  # what the source of batches goes on from

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

    def floats(self, plan: Plan) -> dict[str, float]:
        """Return the last number of every record and evaluation of the last segment, and its lr."""
        latest = {"lr": plan.lrs[: self.step]} if self.step else {}
        for segment in (*self.records[-1:], *self.values[-1:]):
            latest |= {dotted(path): leaf for path, leaf in _tree.named_leaves(segment, "")}
        numbers = {name: leaf for name, leaf in latest.items() if leaf.ndim == 1 and leaf.numel()}
        return {name: float(leaf[-1]) for name, leaf in numbers.items() if not leaf.is_complex()}

    def _values(self, plan: Plan) -> dict[str, Tree]:
        """Join what was evaluated; a run that is too short for that tells the shapes."""
        if self.values or not self.records:
            return _tree.cat(self.values) if self.values else {}
        return _tree.map(lambda leaf: leaf[None][:0], plan.body.values(carry_of(self.state)))


def interrupted(plan: Plan, resume: Any) -> Done:
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
    if plan.batches.go_on is None:
        raise ValueError(NO_WAY_BACK.format("resume"))
    evaluators = plan.body.evaluators
    values = [_tree.leaves(values) for values in done.values]
    is_whole = sum(len(leaves[0]) for leaves in values if leaves) == done.step // plan.block
    if any({*each} != {*evaluators} for each in done.values) or (evaluators and not is_whole):
        raise ValueError(
            f"resume has {[*done.values[0]] if values else 'nothing'} evaluated, but evaluate= and "
            f"evaluate_every= of this run are others"
        )
    plan.batches.go_on(done.step, done.source)
    return done


checkpoint.register(TrainingInterrupted)
