"""Gradient descent and momentum with one fault each."""

from typing import Any

import torch
from torch import Tensor

from ... import _tree
from .._claims._linear import GradientDescent, Momentum
from .._subject import Subject, subject
from ._base import controls, leaf_by_leaf


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
    """Momentum with one scalar buffer for all leaves: the fault of a shared state."""

    def init(params: Any) -> Any:
        return [torch.zeros_like(leaf) for leaf in _tree.leaves(params)]

    def update(grads: Any, state: Any, params: Any, lr: Any) -> Any:
        leaves, structure = _tree.flatten(params)
        gs = _tree.leaves(grads)
        if fault == "first leaf left out":
            new = [
                b if i == 0 and len(gs) > 1 else claim.momentum * b + g
                for i, (b, g) in enumerate(zip(state, gs, strict=True))
            ]
        else:
            mean = (
                torch.stack([b.mean() for b in state]).mean()
                if fault == "buffers averaged over leaves"
                else None
            )
            new = [
                claim.momentum * (b if mean is None else mean) + g for b, g in zip(state, gs, strict=True)
            ]
        return _tree.unflatten(structure, [x - lr * b for x, b in zip(leaves, new, strict=True)]), new

    return subject(init, update, f"momentum, {fault or 'right'}", whole_tree=True)


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
