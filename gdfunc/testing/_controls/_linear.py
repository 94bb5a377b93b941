"""Gradient descent and momentum with one fault each."""

from typing import Any

import torch
from torch import Tensor

from .._claims._linear import GradientDescent, Momentum
from .._subject import Subject
from ._base import controls, leaf_by_leaf, whole_tree


def gradient_descent(claim: GradientDescent, fault: str) -> Subject:
    def rule(g: Tensor, x: Tensor, memory: list[Tensor], lr: Any, t: int) -> Any:
        if fault == "gradient normalised":
            g = g / g.norm().clamp(min=1e-12)
        if fault == "sign of the update":
            lr = -lr
        if fault == "lr squared":
            lr = lr * lr
        if fault == "lr of the first step kept":
            memory = [torch.full_like(x, lr)] if t == 1 else memory
            lr = memory[0]
        if fault == "update rounded to float32":
            g = g.float().to(g.dtype)
        return x - lr * g, memory

    return leaf_by_leaf(1, rule, f"gradient descent, {fault or 'right'}")


def momentum(claim: Momentum, fault: str) -> Subject:
    beta, dampening = claim.momentum, claim.dampening

    def rule(g: Tensor, x: Tensor, memory: list[Tensor], lr: Any, t: int) -> Any:
        b = memory[0]
        weight = 1 - dampening if t > 1 or fault == "first gradient dampened" else 1.0
        if fault == "buffer scaled by 1 - momentum":
            weight = weight * (1 - beta)
        new = beta * b + weight * g
        if fault == "lr inside the buffer":
            new = beta * b + lr * g
        if fault == "momentum applied to the gradient":
            new = b + beta * g
        if fault == "buffer forgotten":
            new = g
        if fault == "old buffer used":
            return x - lr * b, [new]
        u = g + beta * new if claim.nesterov else new
        if fault == "Nesterov's step":
            u = g + beta * new
        if fault == "sign of the buffer":
            new = weight * g - beta * b
            u = new
        return x - (1.0 if fault == "lr inside the buffer" else lr) * u, [new]

    return leaf_by_leaf(1, rule, f"momentum, {fault or 'right'}")


def one_buffer(claim: Momentum, fault: str) -> Subject:
    """Momentum whose leaves share a buffer, or whose first leaf is left out."""

    def rule(gs: list[Tensor], xs: list[Tensor], memories: Any, lr: Any, t: int) -> Any:
        buffers = [b for (b,) in memories]
        if fault == "buffers averaged over leaves":
            buffers = [torch.stack([b.mean() for b in buffers]).mean()] * len(gs)
        new = [claim.momentum * b + g for b, g in zip(buffers, gs, strict=True)]
        if fault == "first leaf left out" and len(gs) > 1:
            new[0] = buffers[0]
        return [x - lr * b for x, b in zip(xs, new, strict=True)], [[b] for b in new]

    return whole_tree(1, rule, f"momentum, {fault or 'right'}")


CONTROLS = [
    *controls(
        GradientDescent(),
        gradient_descent,
        "gradient normalised",
        "sign of the update",
        "lr squared",
        "lr of the first step kept",
        "update rounded to float32",
    ),
    *controls(
        Momentum(0.9),
        momentum,
        "buffer scaled by 1 - momentum",
        "lr inside the buffer",
        "momentum applied to the gradient",
        "buffer forgotten",
        "old buffer used",
        "Nesterov's step",
        "sign of the buffer",
    ),
    *controls(Momentum(0.9, dampening=0.5), momentum, "first gradient dampened"),
    *controls(Momentum(0.9), one_buffer, "first leaf left out", "buffers averaged over leaves"),
]
