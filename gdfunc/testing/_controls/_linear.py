"""Gradient descent and momentum with one fault each."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import _tree
from .._claims._linear import OGM, FixedCoefficients, GradientDescent, Momentum, Nesterov, TripleMomentum
from .._subject import Subject
from ._base import Leaves, controls, leaf_by_leaf, stepped, whole_tree


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


def rarely_wrong(claim: GradientDescent, fault: str) -> Subject:
    """Gradient descent that is wrong only at certain learning rates, gradients, points or leaves."""

    def rule(g: Tensor, x: Tensor, memory: list[Tensor], lr: Any, t: int) -> Any:
        if fault == "lr at least 1e-3":
            lr = max(lr, 1e-3)
        if fault == "lr at most 1":
            lr = min(lr, 1.0)
        if fault == "lr rounded to float32":
            lr = float(np.float32(lr))
        if fault == "gradients clipped at 1e8":
            g = g.clamp(-1e8, 1e8)
        if fault == "gradients below 1e-8 dropped":
            g = g * (g.abs() >= 1e-8)
        if fault == "entries at zero left out":
            g = g * (x != 0)
        if fault == "leaves of three dimensions halved" and g.ndim == 3:
            g = g / 2
        if fault == "vectors of one entry left out" and g.shape == (1,):
            g = 0 * g
        if fault == "lr halved after step 100" and t > 100:
            lr = lr / 2
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

    def rule(gs: Leaves, xs: Leaves, memories: Any, lr: Any, t: int) -> Any:
        buffers = [b for (b,) in memories]
        if fault == "buffers averaged over leaves":
            buffers = [torch.stack([b.mean() for b in buffers]).mean()] * len(gs)
        new = [claim.momentum * b + g for b, g in zip(buffers, gs, strict=True)]
        if fault == "first leaf left out" and len(gs) > 1:
            new[0] = buffers[0]
        return stepped(xs, new, lr), [[b] for b in new]

    return whole_tree(1, rule, f"momentum, {fault or 'right'}")


def displacement(claim: Momentum, fault: str) -> Subject:
    """Heavy ball, which remembers its displacement."""
    beta = claim.momentum

    def rule(g: Tensor, x: Tensor, memory: list[Tensor], lr: Any, t: int) -> Any:
        old, last = memory
        d = beta * old - lr * g
        if fault == "displacement scaled by today's lr":
            d = beta * old - g
            return x + lr * d, [d, x]
        if fault == "gradient and displacement averaged":
            d = beta * old - (1 - beta) * lr * g
        if fault == "displacement added":
            d = -beta * old - lr * g
        if fault == "displacement of two steps ago":
            return x + beta * last - lr * g, [d, old]
        return x + d, [d, old]

    return leaf_by_leaf(2, rule, f"heavy ball, {fault or 'right'}")


def fixed_coefficients(claim: FixedCoefficients, fault: str) -> Subject:
    """Momentum, which is linear in the gradients unless something is done to them."""

    def rule(gs: Leaves, xs: Leaves, memories: Any, lr: Any, t: int) -> Any:
        if fault == "gradient normalised":
            size = torch.stack([g.norm() for g in gs]).norm().clamp(min=1e-12)
            gs = [g / size for g in gs]
        if fault == "gradient clipped":
            gs = [g.clamp(-1, 1) for g in gs]
        if fault == "weight decay":
            gs = [g + 0.1 * x for g, x in zip(gs, xs, strict=True)]
        if fault == "first leaf left out" and len(gs) > 1:
            gs = [0 * gs[0], *gs[1:]]
        new = [0.5 * b + g for (b,), g in zip(memories, gs, strict=True)]
        return stepped(xs, new, lr), [[b] for b in new]

    return whole_tree(1, rule, f"fixed coefficients, {fault or 'right'}")


def _answering(subject: Subject, slot: int) -> Subject:
    """Let the answer of a rule for one leaf be one of its memories, once there was a step."""

    def answer(carry: Any) -> Any:
        leaves, structure = _tree.flatten(carry.params)
        columns = zip(leaves, carry.state, strict=True)
        return _tree.unflatten(structure, [memory[slot] if t else x for x, (t, memory) in columns])

    return replace(subject, result=answer)


def nesterov(claim: Nesterov, fault: str) -> Subject:
    def rule(g: Tensor, y: Tensor, memory: list[Tensor], lr: Any, t: int) -> Any:
        x, v, _ = memory
        if t == 1:
            x = y
        betas = claim.betas(t + 1)
        beta, last = float(betas[t - 1]), float(betas[t - 2]) if t > 1 else 0.0
        if fault == "momentum of the next step":
            beta = float(betas[t])
        if fault == "one momentum for buffer and look-ahead":
            v = beta * v + g  # torch's variant: a buffer of gradients
            y = y - lr * (g + beta * v)
            return y, [y, v, y]
        new = y - lr * g
        step = new - x
        if fault == "gradient at the position":
            new = x + last * v - lr * g
            return new, [new, new - x, new]
        if fault == "look-ahead from the old position":
            return x + (1 + beta) * step, [x, step, x]
        if fault == "sign of the momentum":
            beta = -beta
        if fault == "step counted from zero":
            beta = last
        if fault == "answer is the look-ahead":
            return new + beta * step, [new, step, new + beta * step]
        return new + beta * step, [new, step, new]

    return _answering(leaf_by_leaf(3, rule, f"nesterov, {fault or 'right'}"), 2)


def ogm(claim: OGM, fault: str) -> Subject:
    def rule(g: Tensor, x: Tensor, memory: list[Tensor], lr: Any, t: int) -> Any:
        y = x if t == 1 else memory[0]
        thetas = claim.thetas(t + 1)
        if fault == "last theta like the others":
            thetas = replace(claim, steps=None).thetas(t + 1)
        if fault == "theta of the next step":
            thetas = thetas[1:]
        old, theta = float(thetas[t - 1]), float(thetas[t])
        b, c = (old - 1) / theta, old / theta
        if fault == "gradient correction missing":
            c = 0.0
        if fault == "correction by the new theta":
            c = theta / old
        if fault == "momentum by the new theta":
            b = (theta - 1) / theta
        new = x - lr * g
        return new + b * (new - y) + c * (new - x), [new]

    return leaf_by_leaf(1, rule, f"ogm, {fault or 'right'}")


def triple_momentum(claim: TripleMomentum, fault: str) -> Subject:
    rho = claim.rho
    beta, gamma, delta = rho**2 / (2 - rho), rho**2 / ((1 + rho) * (2 - rho)), rho**2 / (1 - rho**2)
    if fault == "beta without its denominator":
        beta = rho**2
    if fault == "gamma like beta":
        gamma = beta
    if fault == "no look-ahead":
        gamma = 0.0
    if fault == "answer without delta":
        delta = 0.0
    if fault == "delta like gamma":
        delta = gamma

    def rule(g: Tensor, y: Tensor, memory: list[Tensor], lr: Any, t: int) -> Any:
        xi, d, _ = memory
        d = beta * d - lr * g
        xi = (y if t == 1 else xi) + d
        return xi + gamma * d, [xi, d, xi + delta * d]

    return _answering(leaf_by_leaf(3, rule, f"triple momentum, {fault or 'right'}"), 2)


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
        GradientDescent(),
        rarely_wrong,
        "lr at least 1e-3",
        "lr at most 1",
        "lr rounded to float32",
        "gradients clipped at 1e8",
        "gradients below 1e-8 dropped",
        "entries at zero left out",
        "leaves of three dimensions halved",
        "vectors of one entry left out",
        "lr halved after step 100",
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
    *controls(
        Momentum(0.9, form="displacement"),
        displacement,
        "displacement scaled by today's lr",
        "gradient and displacement averaged",
        "displacement added",
        "displacement of two steps ago",
    ),
    *controls(
        FixedCoefficients(),
        fixed_coefficients,
        "gradient normalised",
        "gradient clipped",
        "weight decay",
        "first leaf left out",
    ),
    *controls(
        Nesterov(),
        nesterov,
        "momentum of the next step",
        "one momentum for buffer and look-ahead",
        "gradient at the position",
        "look-ahead from the old position",
        "sign of the momentum",
        "step counted from zero",
        "answer is the look-ahead",
    ),
    *controls(
        OGM(5),
        ogm,
        "last theta like the others",
        "theta of the next step",
        "gradient correction missing",
        "correction by the new theta",
        "momentum by the new theta",
    ),
    *controls(
        TripleMomentum(9.0),
        triple_momentum,
        "beta without its denominator",
        "gamma like beta",
        "no look-ahead",
        "answer without delta",
        "delta like gamma",
    ),
]
