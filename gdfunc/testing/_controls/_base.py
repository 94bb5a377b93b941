"""Negative controls: optimizers with one planted fault."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ... import _tree
from ..._step import Step
from .._claims._base import Claim
from .._subject import Subject, from_step, subject

Leaves = list[Tensor]


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
        return replace(self.build(self.claim, self.fault), name=f"WRONG[{self.name!r}].subject")

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


def whole_tree(slots: int, rule: Callable[..., Any], name: str) -> Subject:
    """Make a subject of a rule for all leaves at once.

    Args:
        slots: how many arrays like each leaf the rule remembers; they begin at zero.
        rule: `(grads, leaves, memories, lr, t) -> (leaves', memories')`: lists with one entry per leaf, of
            tensors and of lists of `slots` tensors. t counts from 1.
        name: of the subject.
    """
    return counted(lambda leaves: [[torch.zeros_like(leaf)] * slots for leaf in leaves], rule, name)


def by_directions(start: Any, rule: Callable[..., Any], name: str) -> Subject:
    """Make a subject of a rule for directions: `(grads, leaves, state, t) -> (directions, state')`."""

    def move(grads: Leaves, leaves: Leaves, state: Any, lr: Any, t: int) -> Any:
        us, state = rule(grads, leaves, state, t)
        return stepped(leaves, us, lr), state

    return counted(lambda leaves: start, move, name)


def counted(start: Callable[..., Any], rule: Callable[..., Any], name: str) -> Subject:
    """Make a subject of a rule for lists: `(grads, leaves, state, lr, t) -> (leaves', state')`."""

    def init(params: Any) -> Any:
        return 0, start(_tree.leaves(params))

    def update(grads: Any, state: Any, params: Any, lr: Any) -> Any:
        leaves, structure = _tree.flatten(params)
        leaves, kept = rule(_tree.leaves(grads), leaves, state[1], lr, state[0] + 1)
        return _tree.unflatten(structure, leaves), (state[0] + 1, kept)

    return subject(init, update, name, whole_tree=True)


class Watched(NamedTuple):
    """The carry of a control that looks at the loss."""

    params: Any
    state: Any


def watching(start: Any, rule: Callable[..., Any], name: str) -> Subject:
    """Make a subject of a rule that looks at the loss: `(loss, leaves, state, lr, t) -> (leaves', state')`.

    loss is a function of a list of leaves; it returns what the subject is made of, such as residuals.
    """

    def make(loss_fn: Callable[..., Tensor]) -> Step:
        def advance(carry: Watched, batch: Any, lr: Any) -> Any:
            leaves, structure = _tree.flatten(carry.params)
            count, state = carry.state

            def loss(xs: Leaves) -> Tensor:
                return loss_fn(_tree.unflatten(structure, xs), batch)

            leaves, state = rule(loss, leaves, state, lr, count + 1)
            after = Watched(_tree.unflatten(structure, leaves), (count + 1, state))
            return after, loss(_tree.leaves(carry.params)), None

        return Step(lambda params: Watched(params, (0, start)), advance, Watched)

    return from_step(make, name)


def stepped(xs: Leaves, us: Leaves, lr: Any) -> Leaves:
    """Return x − lr·u, leaf by leaf."""
    return [x - lr * u for x, u in zip(xs, us, strict=True)]


def follow(claim: Claim, history: tuple[Any, ...], grads: Leaves, leaves: Leaves) -> Any:
    """Return the newest direction of a claim, and the history of its gradients and points.

    The right inner optimizer of a wrapper's control, whatever it claims to be.
    """
    history = (*history, (grads, leaves))
    columns = [list(zip(*tensors, strict=True)) for tensors in zip(*history, strict=True)]
    arrays = [[np.stack([x.double().numpy() for x in leaf]) for leaf in column] for column in columns]
    with np.errstate(all="ignore"):
        directions = claim.directions(*arrays)
    return [torch.as_tensor(u[-1]).to(g) for u, g in zip(directions, grads, strict=True)], history
