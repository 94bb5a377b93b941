"""The body of a run: what every step does, what is recorded of it, and when the run ends."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _tree
from .._scan._scan import fold, like
from .._step import params_of
from .._tree import Tree
from ..stops import Seen, Stop

Recorder = Callable[[Any, Any, Tensor, Tree], Tree]  # of the carry before a step, its loss, lr and gradient
Evaluator = Callable[[Any], Tree]  # of the carry after a step


class Stoppable(NamedTuple):
    """The state of a run with `stop=`: a carry that no longer changes once the run has ended."""

    carry: Any
    steps: Tensor  # 0-d int64, the number of steps taken
    ended: Tensor  # 0-d bool
    diverged: Tensor  # 0-d bool, whether a loss that is not finite ended the run
    memory: Any  # of the stop


@dataclass(frozen=True)
class Body:
    """The body of the scan that a run is: everything that a compiled loop is made from.

    Attributes:
        advance: `(carry, batch, lr) -> (carry, loss, grads)`, of the step.
        batch: makes the batch of a step from its row of the plan.
        recorders: the records by name.
        evaluators: what is evaluated, by name.
        stop: the condition that ends the run, or None.
        check_finite: `"off"`, `"loss"`, or `"all"` for the carry too.
        backend: who runs the loop within a block.
    """

    advance: Callable[[Any, Tree, Tensor], tuple[Any, Any, Tree]]
    batch: Callable[[Tree], Tree]
    recorders: Mapping[str, Recorder]
    evaluators: Mapping[str, Evaluator]
    stop: Stop | None
    check_finite: str
    backend: str

    def __call__(self, state: Any, rows: Tree) -> tuple[Any, tuple[Tree, Tensor | None]]:
        """Take the steps of a block, record the first, and tell for each whether it was finite."""
        first = _tree.map(lambda leaf: leaf[0], rows)
        state, (records, finite) = self._record(state, first, self.recorders)
        finite = None if finite is None else finite[None]
        _, lrs = rows
        if len(lrs) > 1:
            rest = _tree.map(lambda leaf: leaf[1:], rows)
            state, (_, others) = fold(self._unrecorded, state, rest, len(lrs) - 1, self.backend)
            finite = None if finite is None else torch.cat([finite, others])
        return state, (records, finite)

    def evaluated(self, state: Any, rows: Tree) -> tuple[Any, tuple[tuple[Tree, Tensor | None], Tree]]:
        """Take the steps of several blocks, [n, every] or [n] if the blocks have one step, and evaluate."""
        _, lrs = rows
        take = self if lrs.ndim == 2 else self.single
        if len(lrs) == 1:  # a loop of one block would double the cost of a small step in Python
            after, recorded = take(state, _tree.map(lambda leaf: leaf[0], rows))
            recorded = _tree.map(lambda leaf: leaf[None], recorded)
        else:
            after, recorded = fold(take, state, rows, len(lrs), self.backend)
        values = self.values(carry_of(after))
        if self.stop is not None:
            after = _judged(self.stop, after, values, after.steps - state.steps == lrs.numel())
        return after, (recorded, values)

    def values(self, carry: Any) -> dict[str, Tree]:
        """Evaluate a carry."""
        return {name: evaluate(carry) for name, evaluate in self.evaluators.items()}

    def single(self, state: Any, row: Tree) -> tuple[Any, tuple[Tree, Tensor | None]]:
        """Take the step of a block of one, whose row has no axis of steps."""
        return self._record(state, row, self.recorders)

    def _unrecorded(self, state: Any, row: Tree) -> tuple[Any, tuple[Tree, Tensor | None]]:
        return self._record(state, row, {})

    def alone(self, carry: Any, row: Tree) -> tuple[Any, Any]:
        """Take one step, without records or an end, as the body of a scan."""
        return self.step(carry, row)[:2]

    def step(self, carry: Any, row: Tree) -> tuple[Any, Any, Tree]:
        """Take one step."""
        samples, lr = row
        return self.advance(carry, self.batch(samples), lr)

    def _record(
        self, state: Any, row: Tree, recorders: Mapping[str, Recorder]
    ) -> tuple[Any, tuple[Tree, Tensor | None]]:
        carry = carry_of(state)
        new, loss, grads = self.step(carry, row)
        records = {name: recorder(carry, loss, row[1], grads) for name, recorder in recorders.items()}
        after = new if self.stop is None else _stopped(self.stop, state, new, loss)
        if self.check_finite == "off":
            return after, (records, None)
        finite = is_finite(loss if self.check_finite == "loss" else (loss, new))
        return after, (records, finite if self.stop is None else finite | state.ended)


def first_state(carry: Any, stop: Stop | None) -> Any:
    """Make the state that the loop carries along: the carry, and with `stop` whether the run has ended."""
    if stop is None:
        return carry
    steps = torch.zeros((), dtype=torch.int64, device=_tree.leaves(carry)[0].device)
    return Stoppable(carry, steps, steps.bool(), steps.bool(), stop.init(carry))


def carry_of(state: Any) -> Any:
    """Find the carry of the step in the state of the loop."""
    return state.carry if isinstance(state, Stoppable) else state


def is_finite(tree: Tree) -> Tensor:
    """Tell whether all entries of all leaves are finite, 0-d bool."""
    flags = [leaf.isfinite().all() for leaf in _tree.leaves(tree)]
    return torch.stack(flags).all() if flags else torch.tensor(True)


def _stopped(stop: Stop, state: Stoppable, new: Any, loss: Any) -> Stoppable:
    """Go on to a new carry, or keep the old one if the run has ended or the loss is not finite."""
    new = like(state.carry)(new)
    finite = is_finite(loss)
    goes_on, diverged = ~state.ended & finite, ~state.ended & ~finite
    memory, flag = stop.judge(state.memory, Seen({"loss": loss}, state.carry, state.steps, new))
    ended = state.ended | diverged
    return Stoppable(
        _tree.where(goes_on, new, state.carry),
        state.steps + goes_on,
        ended if flag is None else ended | flag,
        state.diverged | diverged,
        _changed(goes_on, memory, state.memory),
    )


def _judged(stop: Stop, state: Stoppable, values: dict[str, Tree], has_all: Tensor) -> Stoppable:
    """Let the stop see what was evaluated, unless the run had ended before the last step of the block."""
    memory, flag = stop.judge(state.memory, Seen(values, state.carry, state.steps, state.carry))
    ended = state.ended if flag is None else state.ended | flag
    return state._replace(ended=ended, memory=_changed(has_all, memory, state.memory))


def _changed(condition: Tensor, new: Any, old: Any) -> Any:
    """Take the new memory where a condition holds; a leaf that is passed on costs nothing."""
    return _tree.map(lambda a, b: b if a is b else torch.where(condition, a, b), new, old)


def _grad_norm(carry: Any, loss: Any, lr: Tensor, grads: Tree) -> Tensor:
    if grads is None:
        raise ValueError(
            "record='grad_norm' needs a gdfunc Step, such as make_step(loss_fn), but this step is a plain "
            "function, which tells no gradient; let it return (loss, norm) in place of the loss"
        )
    return _tree.norm(grads)


RECORDERS: dict[str, Recorder] = {
    "loss": lambda carry, loss, lr, grads: loss,
    "params": lambda carry, loss, lr, grads: params_of(carry),
    "lr": lambda carry, loss, lr, grads: lr,
    "grad_norm": _grad_norm,
    "state": lambda carry, loss, lr, grads: carry,
}
