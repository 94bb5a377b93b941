"""Methods that clip or scale by norms, or make matrices orthogonal, with one fault each."""

import math
from typing import Any

import torch
from torch import Tensor

from ... import _tree
from .._claims._norms import LAMB, LARS, AdaptiveClip, ClipByGlobalNorm, ClipByValue, Muon, TrustRatio
from .._subject import Subject
from ._base import Leaves, by_directions, controls, leaf_by_leaf, whole_tree


def _ratio(size: Tensor, slope: Tensor, coefficient: float = 1.0) -> Tensor:
    """Return coefficient·size/slope, or 1 where either is zero."""
    return coefficient * size / slope if size > 0 and slope > 0 else torch.ones_like(size)


def clip_by_value(claim: ClipByValue, fault: str) -> Subject:
    c = claim.limit

    def rule(g: Tensor, x: Tensor, memory: list[Tensor], lr: Any, t: int) -> Any:
        u = g.clamp(-c, c)
        if fault == "only large entries clipped, not small ones":
            u = g.clamp(max=c)
        if fault == "whole leaf scaled by its largest entry":
            u = g * (c / g.abs().max().clamp(min=c))
        if fault == "clipped entries set to zero":
            u = torch.where(g.abs() > c, torch.zeros_like(g), g)
        if fault == "entries inside scaled up to the limit":
            u = c * g.sign()
        if fault == "tanh in place of a clip":
            u = c * torch.tanh(g / c)
        if fault == "update clipped after lr":
            return x - (lr * g).clamp(-c, c), memory
        return x - lr * u, memory

    return leaf_by_leaf(0, rule, f"clip by value, {fault or 'right'}")


def clip_by_global_norm(claim: ClipByGlobalNorm, fault: str) -> Subject:
    limit = claim.max_norm

    def rule(gs: Leaves, xs: Leaves, state: Any, t: int) -> Any:
        norms = [_tree.norm(gs)] * len(gs)
        if fault == "a norm for each leaf":
            norms = [_tree.norm([g]) for g in gs]
        if fault == "norm of the first leaf":
            norms = [_tree.norm(gs[:1])] * len(gs)
        if fault == "squared norm":
            norms = [norm**2 for norm in norms]
        if fault == "sum of the leaves' norms":
            norms = [torch.stack([_tree.norm([g]) for g in gs]).sum()] * len(gs)
        if fault == "largest entry in place of the norm":
            norms = [torch.cat([g.flatten() for g in gs]).abs().max()] * len(gs)
        if fault == "1e-6 added to the norm":
            norms = [norm + 1e-6 for norm in norms]
        factors = [limit / norm.clamp(min=limit) for norm in norms]
        if fault == "gradients inside scaled up":
            factors = [limit / norm.clamp(min=1e-300) for norm in norms]
        return [g * factor for g, factor in zip(gs, factors, strict=True)], state

    return by_directions((), rule, f"clip by global norm, {fault or 'right'}")


def adaptive_clip(claim: AdaptiveClip, fault: str) -> Subject:
    def norm(x: Tensor) -> Tensor:
        if x.ndim < 2 or fault == "a norm for each leaf":
            return x.abs() if fault == "a norm for each entry of a vector" else x.norm()
        if fault == "norms over rows, not columns":
            return x.flatten(1).norm(dim=0).reshape(1, *x.shape[1:])
        return x.flatten(1).norm(dim=1).reshape(-1, *[1] * (x.ndim - 1))

    def rule(g: Tensor, x: Tensor, memory: list[Tensor], lr: Any, t: int) -> Any:
        size = norm(x)
        if fault == "eps added, not the least norm":
            size = size + claim.eps
        elif fault != "eps left out":
            size = size.clamp(min=claim.eps)
        allowed, slope = claim.clipping * size, norm(g)
        if fault == "weights left out":
            allowed = torch.full_like(size, claim.clipping)
        if fault == "gradients inside scaled up":
            return x - lr * g * (allowed / slope.clamp(min=1e-300)), memory
        return x - lr * g * (allowed / torch.maximum(slope, allowed)).nan_to_num(1.0), memory

    return leaf_by_leaf(0, rule, f"adaptive clip, {fault or 'right'}")


def trust_ratio(claim: TrustRatio, fault: str) -> Subject:
    c = claim.coefficient

    def rule(gs: Leaves, xs: Leaves, state: Any, t: int) -> Any:
        us = []
        for g, x in zip(gs, xs, strict=True):
            size, slope = x.norm(), g.norm()
            if fault == "norms over all leaves":
                size, slope = _tree.norm(xs), _tree.norm(gs)
            if fault == "root mean square of the parameters":
                size = size / math.sqrt(x.numel())
            if fault == "ratio upside down":
                size, slope = slope, size
            factor = _ratio(size, slope, c)
            if fault == "1e-6 added to the gradient's norm" and slope > 0:
                factor = c * size / (slope + 1e-6)
            if fault == "ratio at most 1":
                factor = factor.clamp(max=1.0)
            if fault == "gradients of norm zero not guarded":
                factor = c * size / slope
            if fault == "coefficient left out":
                factor = _ratio(size, slope)
            us.append(g * factor)
        return us, state

    return by_directions((), rule, f"trust ratio, {fault or 'right'}")


def lars(claim: LARS, fault: str) -> Subject:
    beta, decay, eta = claim.momentum, claim.weight_decay, claim.trust_coefficient
    together = (claim.norms == "together") != (fault == "norm of the decayed gradient")

    def rule(gs: Leaves, xs: Leaves, memories: Any, lr: Any, t: int) -> Any:
        moved, new = [], []
        for g, x, (b,) in zip(gs, xs, memories, strict=True):
            size, slope = x.norm(), g.norm()
            if fault == "norms over all leaves":
                size, slope = _tree.norm(xs), _tree.norm(gs)
            if fault == "decay left out of the denominator":
                below = slope
            elif together:
                below = (g + decay * x).norm()
            else:
                below = slope + decay * size if slope > 0 else slope
            trust = _ratio(size, below, eta)
            d = (
                g * trust + decay * x
                if fault == "decay outside the trust ratio"
                else (g + decay * x) * trust
            )
            if fault == "decay left out of the gradient":
                d = g * trust
            if fault == "trust ratio after the momentum":
                d = g + decay * x
            inside = claim.form == "displacement" or fault == "lr inside the buffer"
            b = beta * b + (lr * d if inside else d)
            if fault == "buffer scaled by 1 - momentum":
                b = b - beta * d
            u = b * trust if fault == "trust ratio after the momentum" else b
            moved.append(x - u if inside else x - lr * u)
            new.append([b])
        return moved, new

    return whole_tree(1, rule, f"lars, {fault or 'right'}")


def lamb(claim: LAMB, fault: str) -> Subject:
    (beta1, beta2), eps, decay = claim.betas, claim.eps, claim.weight_decay

    def rule(gs: Leaves, xs: Leaves, memories: Any, lr: Any, t: int) -> Any:
        moved, new, directions = [], [], []
        for g, x, (m, v) in zip(gs, xs, memories, strict=True):
            m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
            first = m if fault == "bias correction of m missing" else m / (1 - beta1**t)
            second = v if fault == "bias correction of v missing" else v / (1 - beta2**t)
            u = first / (second.sqrt() + eps)
            if fault == "eps inside the root":
                u = first / (second + eps).sqrt()
            new.append([m, v])
            directions.append(u if fault.startswith("decay") else u + decay * x)
        for g, x, r in zip(gs, xs, directions, strict=True):
            size, slope = x.norm(), r.norm()
            if fault == "norms over all leaves":
                size, slope = _tree.norm(xs), _tree.norm(directions)
            if fault == "ratio of the gradient, not of the direction":
                slope = g.norm()
            u = r if fault == "trust ratio left out" else r * _ratio(size, slope)
            moved.append(x - lr * (u + decay * x if fault == "decay after the trust ratio" else u))
        return moved, new

    return whole_tree(2, rule, f"lamb, {fault or 'right'}")


def muon(claim: Muon, fault: str) -> Subject:
    beta, (a, b, c) = claim.momentum, claim.ns_coefficients
    nesterov = claim.nesterov != (fault == "Nesterov's step the other way round")
    iterations = claim.ns_steps - (fault == "one iteration too few")

    def rule(g: Tensor, x: Tensor, memory: list[Tensor], lr: Any, t: int) -> Any:
        buffer = g if fault == "buffer forgotten" else beta * memory[0] + (1 - beta) * g
        n = beta * buffer + (1 - beta) * g if nesterov else buffer
        if fault == "newest gradient not weighted":
            n = beta * buffer + g
        if fault == "largest entry in place of the norm":
            n = n / n.abs().max().clamp(min=claim.eps)
        elif fault == "eps added to the norm":
            n = n / (n.norm() + claim.eps)
        elif fault != "not divided by the norm":
            n = n / n.norm().clamp(min=claim.eps)
        for _ in range(iterations):
            gram = n @ n.T
            n = a * n + (b * gram + c * gram @ gram) @ n
        if fault == "fifth power left out":
            n = buffer / buffer.norm().clamp(min=claim.eps)
            for _ in range(iterations):
                n = a * n + b * (n @ n.T) @ n
        rows, columns = g.shape
        scale = math.sqrt(max(1.0, rows / columns))
        if fault == "scale of the shape left out":
            scale = 1.0
        if fault == "columns over rows":
            scale = math.sqrt(max(1.0, columns / rows))
        return x - lr * scale * n, [buffer]

    return leaf_by_leaf(1, rule, f"muon, {fault or 'right'}")


CONTROLS = [
    *controls(
        ClipByValue(0.5),
        clip_by_value,
        "only large entries clipped, not small ones",
        "whole leaf scaled by its largest entry",
        "clipped entries set to zero",
        "entries inside scaled up to the limit",
        "tanh in place of a clip",
        "update clipped after lr",
    ),
    *controls(
        ClipByGlobalNorm(2.0),
        clip_by_global_norm,
        "a norm for each leaf",
        "norm of the first leaf",
        "squared norm",
        "sum of the leaves' norms",
        "largest entry in place of the norm",
        "1e-6 added to the norm",
        "gradients inside scaled up",
    ),
    *controls(
        AdaptiveClip(0.25, eps=2.0),
        adaptive_clip,
        "a norm for each leaf",
        "a norm for each entry of a vector",
        "norms over rows, not columns",
        "eps added, not the least norm",
        "eps left out",
        "weights left out",
        "gradients inside scaled up",
    ),
    *controls(
        TrustRatio(0.5),
        trust_ratio,
        "norms over all leaves",
        "root mean square of the parameters",
        "ratio upside down",
        "1e-6 added to the gradient's norm",
        "ratio at most 1",
        "gradients of norm zero not guarded",
        "coefficient left out",
    ),
    *controls(
        LARS(0.9, weight_decay=0.125, trust_coefficient=0.5),
        lars,
        "norms over all leaves",
        "norm of the decayed gradient",
        "decay left out of the denominator",
        "decay outside the trust ratio",
        "decay left out of the gradient",
        "trust ratio after the momentum",
        "lr inside the buffer",
        "buffer scaled by 1 - momentum",
    ),
    *controls(
        LAMB(eps=1e-3, weight_decay=0.125),
        lamb,
        "bias correction of m missing",
        "bias correction of v missing",
        "eps inside the root",
        "decay left out",
        "decay after the trust ratio",
        "norms over all leaves",
        "ratio of the gradient, not of the direction",
        "trust ratio left out",
    ),
    *controls(
        Muon(),
        muon,
        "Nesterov's step the other way round",
        "one iteration too few",
        "buffer forgotten",
        "newest gradient not weighted",
        "largest entry in place of the norm",
        "eps added to the norm",
        "not divided by the norm",
        "fifth power left out",
        "scale of the shape left out",
        "columns over rows",
    ),
]
