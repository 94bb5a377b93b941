"""Negative controls: optimizers with one planted fault."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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


def leaf_by_leaf(slots: int, rule: Callable[..., Any], name: str) -> Subject:
    """Make a subject of a rule for one leaf.

    Args:
        slots: how many arrays like the leaf the rule remembers; they begin at zero.
        rule: `(g, x, memory, lr, t) -> (x', memory')`, where memory is a list of `slots` tensors and t
            counts from 1.
        name: of the subject.
    """

    def init(x: Tensor) -> Any:
        return 0, [torch.zeros_like(x)] * slots

    def update(g: Tensor, state: Any, x: Tensor, lr: Any) -> Any:
        count, memory = state
        x, memory = rule(g, x, memory, lr, count + 1)
        return x, (count + 1, memory)

    return subject(init, update, name)
