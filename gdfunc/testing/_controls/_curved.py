"""Methods that look at the loss, and L-BFGS, with one fault each."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import grad

from ... import _tree
from .._claims._curved import LBFGS, SAM, LineSearch, Polyak
from .._subject import Subject
from ._base import Leaves, controls, counted, stepped, watching


def of_loss(rule: Callable[..., Leaves], name: str) -> Subject:
    """Make a subject of a rule that looks at the loss: `(loss, leaves, lr) -> leaves'`.

    loss is a function of a list of leaves.
    """

    return watching((), lambda loss, xs, state, lr, t: (rule(loss, xs, lr), state), name)


def polyak(claim: Polyak, fault: str) -> Subject:
    def rule(loss: Any, xs: Leaves, lr: Any) -> Leaves:
        gs = grad(loss)(xs)
        norm = _tree.norm(gs[:1] if fault == "norm of the first leaf" else gs)
        excess = loss(xs) - (0.0 if fault == "minimum ignored" else claim.minimum)
        if fault != "steps uphill below the minimum":
            excess = excess.clamp(min=0)
        power = 1 if fault == "norm in place of its square" else 2
        size = excess / norm**power if norm > 0 else 0 * excess
        if fault == "half the size":
            size = size / 2
        if fault == "bound on the whole step":
            return stepped(xs, gs, (lr * size).clamp(max=claim.max_step))
        if claim.max_step is not None and fault != "bound ignored":
            size = size.clamp(max=claim.max_step)
        return stepped(xs, gs, size if fault == "lr ignored" else lr * size)

    return of_loss(rule, f"polyak's step, {fault or 'right'}")


def line_search(claim: LineSearch, fault: str) -> Subject:
    factor = claim.factor**2 if fault == "factor applied twice" else claim.factor
    trials = claim.max_steps + 1 + (fault == "one trial too many") - (fault == "one trial too few")
    decrease = 0.0 if fault == "decrease ignored" else claim.decrease
    decrease = -decrease if fault == "sign of the slope" else decrease

    def rule(loss: Any, xs: Leaves, lr: Any) -> Leaves:
        gs, before = grad(loss)(xs), loss(xs)
        slope = _tree.norm(gs) if fault == "norm in place of its square" else sum((g**2).sum() for g in gs)
        size = lr * factor if fault == "first trial left out" else lr
        for _ in range(trials):
            length = 1.0 if fault == "slope without the step" else size
            gain = before - decrease * length * slope - loss(stepped(xs, gs, size))
            if gain > 0 or (gain == 0 and fault != "equality refused"):
                return stepped(xs, gs, size)
            size = size * factor
        return stepped(xs, gs, size / factor) if fault == "last trial kept where none is good" else xs

    return of_loss(rule, f"line search, {fault or 'right'}")


def sam(claim: SAM, fault: str) -> Subject:
    rho = claim.rho**2 if fault == "rho squared" else claim.rho
    rho = -rho if fault == "sign of the ascent" else rho

    def rule(loss: Any, xs: Leaves, lr: Any) -> Leaves:
        gs = grad(loss)(xs)
        is_adaptive = claim.adaptive and fault != "units left out"
        units = [x.abs() if is_adaptive else torch.ones_like(x) for x in xs]
        measured = gs if fault == "norm without units" else [u * g for u, g in zip(units, gs, strict=True)]
        lengths = [_tree.norm(measured)] * len(gs)
        if fault == "norm of each leaf alone":
            lengths = [_tree.norm([g]) for g in measured]
        if fault == "gradient not normalised":
            lengths = [torch.ones_like(lengths[0])] * len(gs)
        power = 1 if fault == "units without the square" else 2
        uphill = [
            x + (rho * u**power * g / n if n > 0 else 0 * g)
            for x, u, g, n in zip(xs, units, gs, lengths, strict=True)
        ]
        found = gs if fault == "gradient of the old point" else grad(loss)(uphill)
        return stepped(uphill if fault == "step from the point uphill" else xs, found, lr)

    return of_loss(rule, f"sam, {fault or 'right'}")


def two_loops(pairs: list[tuple[Tensor, Tensor]], g: Tensor, fault: str) -> Tensor:
    """Return H·g by the two loops over the pairs (s, y)."""
    s, y = pairs[0 if fault == "gamma of the oldest pair" else -1]
    gamma = s @ y / (y @ y)
    if fault == "gamma of s in place of y":
        gamma = s @ s / (s @ y)
    if fault == "gamma left out":
        gamma = torch.ones_like(gamma)
    if fault == "pairs in reverse order":
        pairs = pairs[::-1]
    weights: list[Tensor] = []
    for s, y in reversed(pairs):
        weights.append(s @ g / (s @ y))
        g = g - weights[-1] * y
    g = gamma * g
    if fault != "weights in reverse order":
        weights.reverse()
    for (s, y), weight in zip(pairs, weights, strict=True):
        g = g + (weight - y @ g / (s @ y)) * s
    return g


def lbfgs(claim: LBFGS, fault: str) -> Subject:
    history = claim.history + (fault == "one pair too many")

    def rule(gs: Leaves, xs: Leaves, state: Any, lr: Any, t: int) -> Any:
        last, pairs = state
        g, x = _tree.ravel(gs), _tree.ravel(xs)
        s, y = (x - last[0], g - last[1]) if last else (0 * x, g)
        if s @ y > claim.eps or (t > 1 and fault == "pairs without curvature kept" and s @ y != 0):
            pairs = [*pairs, (s, y)][-history:]
        used = pairs[:-1] if fault == "newest pair left out" else pairs
        short = 1.0 if fault == "first step not shortened" else g.abs().sum().clamp(min=1)
        if fault == "first step shortened by the norm":
            short = g.norm().clamp(min=1)
        u = two_loops(used, g, fault) if used else g / short
        return stepped(xs, _tree.unravel(u, xs), lr), ((x, g), pairs)

    return counted(lambda leaves: ((), []), rule, f"l-bfgs, {fault or 'right'}")


CONTROLS = [
    *controls(
        Polyak(0.5, 0.75),
        polyak,
        "half the size",
        "norm in place of its square",
        "norm of the first leaf",
        "minimum ignored",
        "steps uphill below the minimum",
        "bound ignored",
        "bound on the whole step",
        "lr ignored",
    ),
    *controls(
        LineSearch(0.875, 0.5, 1),
        line_search,
        "sign of the slope",
        "decrease ignored",
        "factor applied twice",
        "one trial too many",
        "one trial too few",
        "norm in place of its square",
        "first trial left out",
        "slope without the step",
        "equality refused",
        "last trial kept where none is good",
    ),
    *controls(
        SAM(0.25),
        sam,
        "rho squared",
        "sign of the ascent",
        "norm of each leaf alone",
        "gradient not normalised",
        "gradient of the old point",
        "step from the point uphill",
    ),
    *controls(
        SAM(0.25, adaptive=True),
        sam,
        "units left out",
        "norm without units",
        "units without the square",
    ),
    *controls(
        LBFGS(3),
        lbfgs,
        "gamma of the oldest pair",
        "gamma of s in place of y",
        "gamma left out",
        "pairs in reverse order",
        "weights in reverse order",
        "one pair too many",
        "pairs without curvature kept",
        "newest pair left out",
        "first step not shortened",
        "first step shortened by the norm",
    ),
]
