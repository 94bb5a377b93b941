"""A step that knows when to end: what follows the end changes nothing."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _tree
from .._scan._scan import like
from .._step import Step, params_of
from .._tree import Tree

Stop = Callable[[Any, Any], Tensor]


class Watched(NamedTuple):
    """A carry, how many steps it took, and whether it has ended."""

    carry: Any
    steps: Tensor
    ended: Tensor
    diverged: Tensor

    @property
    def params(self) -> Tree:
        return params_of(self.carry)


def watch(carry: Any) -> Watched:
    """Begin to watch a carry."""
    device = _tree.leaves(carry)[0].device
    steps = torch.zeros((), dtype=torch.int64, device=device)
    return Watched(carry, steps, steps.bool(), steps.bool())


def stopping(step: Step, stop: Stop) -> Step:
    """Make the step whose carry is frozen once `stop` held, or just before the loss is not finite."""

    def advance(state: Watched, batch: Tree, lr: Any) -> tuple[Watched, Any, Tree]:
        new, y, grads = step.advance(state.carry, batch, lr)
        new = like(state.carry)(new)
        finite = is_finite(y)
        diverged = ~state.ended & ~finite
        takes = ~state.ended & finite
        after = Watched(
            _tree.where(takes, new, state.carry),
            state.steps + takes,
            state.ended | diverged | _flag(stop(new, y)),
            state.diverged | diverged,
        )
        return after, y, grads

    return Step(watch, advance, Watched)


def is_finite(tree: Tree) -> Tensor:
    """Whether all entries of all leaves are finite, 0-d bool."""
    flags = [leaf.isfinite().all() for leaf in _tree.leaves(tree)]
    return torch.stack(flags).all() if flags else torch.tensor(True)


def _flag(value: Any) -> Tensor:
    if isinstance(value, Tensor) and value.dtype == torch.bool and not value.shape:
        return value
    got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    raise TypeError(f"stop must return a 0-d bool tensor, such as loss < 1e-3; got {got}")
