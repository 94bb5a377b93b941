"""Methods that move by signs, with one fault each."""

from typing import Any

import torch
from torch import Tensor

from .._claims._signs import Lion, Rprop, Sign
from .._subject import Subject
from ._base import Leaves, controls, leaf_by_leaf, stepped, whole_tree


def sign(claim: Sign, fault: str) -> Subject:
    def rule(gs: Leaves, xs: Leaves, memories: Any, lr: Any, t: int) -> Any:
        us = [g.sign() for g in gs]
        if fault == "divided by |g| + 1e-8":
            us = [g / (g.abs() + 1e-8) for g in gs]
        if fault == "zero counts as positive":
            us = [torch.where(g >= 0, 1.0, -1.0).to(g) for g in gs]
        if fault == "scaled by the mean of |g|":
            us = [g.sign() * g.abs().mean() for g in gs]
        if fault == "sign of the gradient before":
            us, memories = [b.sign() for (b,) in memories], [[g] for g in gs]
        if fault == "sign of the sum of gradients":
            memories = [[b + g] for (b,), g in zip(memories, gs, strict=True)]
            us = [b.sign() for (b,) in memories]
        if fault == "first leaf keeps its gradient":
            us = [gs[0], *us[1:]]
        return stepped(xs, us, 1.0 if fault == "lr left out" else lr), memories

    return whole_tree(1, rule, f"sign, {fault or 'right'}")


def lion(claim: Lion, fault: str) -> Subject:
    beta1, beta2 = claim.betas[::-1] if fault == "betas swapped" else claim.betas

    def rule(gs: Leaves, xs: Leaves, memories: Any, lr: Any, t: int) -> Any:
        averages = [m for (m,) in memories]
        if fault == "one average shared by all leaves":
            mean = torch.stack([m.mean() for m in averages]).mean()
            averages = [torch.zeros_like(m) + mean for m in averages]
        new = [beta2 * m + (1 - beta2) * g for m, g in zip(averages, gs, strict=True)]
        before = averages
        if fault == "average updated before the sign":
            before = new
        if fault == "average bias-corrected":
            before = [m / (1 - beta2 ** (t - 1)) if t > 1 else m for m in before]
        cs = [beta1 * m + (1 - beta1) * g for m, g in zip(before, gs, strict=True)]
        if fault == "newest gradient not weighted":
            cs = [beta1 * m + g for m, g in zip(before, gs, strict=True)]
        if fault == "sign of the average alone":
            cs = new
        if fault == "average of signs":
            new = [beta2 * m + (1 - beta2) * g.sign() for m, g in zip(averages, gs, strict=True)]
        if fault == "average kept with beta1":
            new = [beta1 * m + (1 - beta1) * g for m, g in zip(averages, gs, strict=True)]
        us = cs if fault == "sign left out" else [c.sign() for c in cs]
        return stepped(xs, us, lr), [[m] for m in new]

    return whole_tree(1, rule, f"lion, {fault or 'right'}")


def rprop(claim: Rprop, fault: str) -> Subject:
    minus, plus = claim.etas[::-1] if fault == "etas swapped" else claim.etas
    low, high = claim.step_sizes

    def rule(g: Tensor, x: Tensor, memory: list[Tensor], lr: Any, t: int) -> Any:
        before, size = memory
        absolute = claim.unit == "first lr"
        if t == 1:
            size = torch.full_like(x, lr if absolute else 1.0)
        turn = g.sign() * before
        if t == 1 and fault == "sizes grow in the first step":
            turn = g.sign() ** 2
        ones = torch.ones_like(g)
        factor = torch.where(turn > 0, plus * ones, torch.where(turn < 0, minus * ones, ones))
        size = size * factor
        if fault != "no smallest size":
            size = size.clamp(min=low)
        if fault != "no largest size":
            size = size.clamp(max=high)
        kept = torch.where(turn < 0, torch.zeros_like(g), g.sign())
        u = size * (g.sign() if fault == "moves at a turn" else kept)
        if fault == "gradient multiplies the size":
            u = size * kept * g.abs()
        if fault == "sizes start at lr" and t == 1:
            size = size * lr
        if fault == "turn not forgotten":
            kept = g.sign()
        return x - (1.0 if absolute else lr) * u, [kept, size]

    return leaf_by_leaf(2, rule, f"rprop, {fault or 'right'}")


CONTROLS = [
    *controls(
        Sign(),
        sign,
        "divided by |g| + 1e-8",
        "zero counts as positive",
        "scaled by the mean of |g|",
        "sign of the gradient before",
        "sign of the sum of gradients",
        "first leaf keeps its gradient",
        "lr left out",
    ),
    *controls(
        Lion(),
        lion,
        "betas swapped",
        "average updated before the sign",
        "average bias-corrected",
        "newest gradient not weighted",
        "sign of the average alone",
        "average of signs",
        "average kept with beta1",
        "sign left out",
        "one average shared by all leaves",
    ),
    *controls(
        Rprop(),
        rprop,
        "etas swapped",
        "sizes grow in the first step",
        "no smallest size",
        "no largest size",
        "moves at a turn",
        "gradient multiplies the size",
        "sizes start at lr",
        "turn not forgotten",
    ),
]
