"""Projected methods with one fault each."""

from typing import Any

import torch

from .._claims._constrained import Projected
from .._claims._linear import Momentum
from .._subject import Subject
from ._base import Leaves, controls, counted, follow, stepped


def projected(claim: Projected, fault: str) -> Subject:
    r = claim.size

    def nearest(xs: Leaves) -> Leaves:
        if claim.onto == "box" and fault != "the other set":
            if fault == "upper bound left out":
                return [x.clamp(min=-r) for x in xs]
            if fault == "reflected at the bounds":
                return [x.clamp(-r, r) * 2 - x for x in xs]
            return [x.clamp(-r, r) for x in xs]
        if claim.onto == "ball" and fault == "the other set":
            return [x.clamp(-r, r) for x in xs]
        if fault == "each leaf by its own norm":
            return [x * (r / x.norm().clamp(min=r)) for x in xs]
        norm = torch.stack([x.norm() for x in xs]).norm()
        if fault == "points of the set pushed to its edge":
            return [x * (r / norm.clamp(min=1e-300)) for x in xs]
        return [x * (r / norm.clamp(min=r)) for x in xs]

    def rule(gs: Leaves, xs: Leaves, history: Any, lr: Any, t: int) -> Any:
        us, history = follow(claim.inner, history, gs, xs)
        if fault == "direction projected":
            return stepped(xs, nearest(us), lr), history
        if fault == "projected before the step":
            return stepped(nearest(xs), us, lr), history
        new = nearest(stepped(xs, us, lr))
        if fault == "first step not projected" and t == 1:
            new = stepped(xs, us, lr)
        if fault == "half the way to the set":
            new = [(a + b) / 2 for a, b in zip(new, stepped(xs, us, lr), strict=True)]
        return new, history

    return counted(lambda leaves: (), rule, f"projected, {fault or 'right'}")


CONTROLS = [
    *controls(
        Projected(Momentum(0.5), "ball", 2.0),
        projected,
        "direction projected",
        "projected before the step",
        "first step not projected",
        "half the way to the set",
        "the other set",
        "each leaf by its own norm",
        "points of the set pushed to its edge",
    ),
    *controls(
        Projected(Momentum(0.5), "box", 1.5),
        projected,
        "upper bound left out",
        "reflected at the bounds",
    ),
]
