"""Methods that move their points by noise, with one fault each."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.func import grad

from ... import random
from .._claims._constrained import Langevin
from .._claims._linear import GradientDescent, Momentum
from .._subject import Subject
from ._base import Leaves, controls, follow, stepped, watching

_SIZES = {
    "lr left out": lambda lr, T: math.sqrt(2 * T),
    "temperature left out": lambda lr, T: math.sqrt(2 * lr),
    "two left out": lambda lr, T: math.sqrt(lr * T),
    "root left out": lambda lr, T: 2 * lr * T,
    "lr outside the root": lambda lr, T: lr * math.sqrt(2 * T),
    "temperature outside the root": lambda lr, T: T * math.sqrt(2 * lr),
}


def _draw(fault: str, t: int, xs: Leaves) -> Leaves:
    """Return the noise of step t, in units of its size."""
    key = random.fold_in(random.key(0), 0 if fault == "steps share the noise" else t)
    whole = random.normal(key, (sum(x.numel() for x in xs),), dtype=torch.float64)
    if fault == "uniform noise":
        whole = math.sqrt(3) * torch.erf(whole / math.sqrt(2))
    if fault == "sign of the noise lost":
        whole = whole.abs()
    if fault == "neighbours share the noise":
        whole = (whole + whole.roll(1)) / math.sqrt(2)
    if fault == "leaves share the noise":
        return [whole[: x.numel()].view(x.shape) for x in xs]
    if fault == "one number for a leaf":
        return [
            z.flatten()[:1].expand(x.numel()).view(x.shape)
            for z, x in zip(_split(whole, xs), xs, strict=True)
        ]
    return _split(whole, xs)


def _split(whole: Tensor, xs: Leaves) -> Leaves:
    parts = whole.split([x.numel() for x in xs])
    return [part.view(x.shape).to(x) for part, x in zip(parts, xs, strict=True)]


def langevin(claim: Langevin, fault: str) -> Subject:
    def rule(loss: Any, xs: Leaves, state: Any, lr: Any, t: int) -> Any:
        history, last = state
        size = _SIZES.get(fault, lambda lr, T: math.sqrt(2 * lr * T))
        noise = [size(lr, claim.temperature) * z for z in _draw(fault, t, xs)]
        if fault == "lr of the last step":
            noise = [size(last, claim.temperature) * z for z in _draw(fault, t, xs)]
        if fault == "first step without noise" and t == 1:
            noise = [0 * z for z in noise]
        ahead = [x + z for x, z in zip(xs, noise, strict=True)]
        gs = grad(loss)(ahead if fault == "gradient of the moved point" else xs)
        fed = gs
        if fault == "noise on the gradient":
            fed = [g + z for g, z in zip(gs, noise, strict=True)]
            noise = [0 * z for z in noise]
        if fault == "noise in the memory":
            fed = [g + z for g, z in zip(gs, noise, strict=True)]
        if fault == "noise as large as the gradient":
            noise = [g * z for g, z in zip(gs, noise, strict=True)]
        us, history = follow(claim.inner, history, fed, xs)
        new = stepped(xs, us, lr)
        return [x + z for x, z in zip(new, noise, strict=True)], (history, lr)

    return watching(((), 1.0), rule, f"langevin, {fault or 'right'}")


CONTROLS = [
    *controls(
        Langevin(Momentum(0.5), 0.75),
        langevin,
        *_SIZES,
        "lr of the last step",
        "first step without noise",
        "steps share the noise",
        "leaves share the noise",
        "neighbours share the noise",
        "one number for a leaf",
        "uniform noise",
        "sign of the noise lost",
        "noise on the gradient",
        "noise in the memory",
        "noise as large as the gradient",
    ),
    *controls(Langevin(GradientDescent(), 0.75), langevin, "gradient of the moved point"),
]
