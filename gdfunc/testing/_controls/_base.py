"""Negative controls: optimizers with one planted fault."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import _tree
from .._claims._base import Claim
from .._subject import Subject, subject


@dataclass(frozen=True)
class Control:
    """An optimizer that claims to be right and has one planted fault.

    Attributes:
        fault: what is wrong, in words that a diagnosis can quote.
        claim: what it says that it is.
        build: `(claim, fault) -> Subject`; with an empty fault the right optimizer.
    """

    fault: str
    claim: Claim
    build: Callable[[Any, str], Subject]

    @property
    def subject(self) -> Subject:
        """Return the optimizer with its fault."""
        return self.build(self.claim, self.fault)

    @property
    def name(self) -> str:
        """Return the family and the fault."""
        return f"{self.claim.family}: {self.fault}"


def controls(claim: Claim, build: Callable[[Any, str], Subject], *faults: str) -> list[Control]:
    """List the controls of one family, each with a fault that `build` knows by name."""
    return [Control(fault, claim, build) for fault in faults]


Rule = Callable[[Tensor, Tensor, Tensor, list[Tensor], Any, int], tuple[Tensor, list[Tensor]]]


def leaf_by_leaf(slots: int, rule: Callable[..., Any], name: str) -> Subject:
    """Make a subject of a rule for one leaf.

    Args:
        slots: how many arrays like the leaf the rule remembers; they begin at zero.
        rule: `(g, x, memory, lr, t) -> (x', memory')`, where memory is a list of `slots` tensors and t
            counts from 1.
        name: of the subject.
    """

    def init(params: Any) -> Any:
        return 0, [[torch.zeros_like(leaf)] * slots for leaf in _tree.leaves(params)]

    def update(grads: Any, state: Any, params: Any, lr: Any) -> Any:
        count, memories = state
        leaves, structure = _tree.flatten(params)
        done = [
            rule(g, x, memory, lr, count + 1)
            for g, x, memory in zip(_tree.leaves(grads), leaves, memories, strict=True)
        ]
        return _tree.unflatten(structure, [x for x, _ in done]), (count + 1, [memory for _, memory in done])

    return subject(init, update, name)
