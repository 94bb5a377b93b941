"""Methods that find their own lr, or whose averages get longer, with one fault each."""

import math
from typing import Any

import torch
from torch import Tensor

from .._claims._linear import Momentum
from .._claims._lr_free import Adafactor, AdEMAMix, DoG, Mechanic, Prodigy
from .._subject import Subject
from ._base import Leaves, controls, counted, follow, leaf_by_leaf, stepped


def ademamix(claim: AdEMAMix, fault: str) -> Subject:
    beta1, beta2, beta3 = claim.betas
    if fault == "beta1 and beta3 exchanged":
        beta1, beta3 = beta3, beta1

    def rule(g: Tensor, x: Tensor, memory: list[Tensor], lr: Any, t: int) -> Any:
        done = min((t - (fault == "warmup one step late")) / claim.warmup, 1.0) if claim.warmup else 1.0
        slow = beta3
        if claim.warmup and fault != "beta3 not warmed up":
            slow = math.exp(1 / ((1 - done) / math.log(beta1) + done / math.log(beta3)))
            slow = beta1 + done * (beta3 - beta1) if fault == "beta3 warmed up linearly" else slow
        alpha = claim.alpha * (1.0 if fault == "alpha not warmed up" else done)
        m = beta1 * memory[0] + (1 - beta1) * g
        n = slow * memory[1] + (1.0 if fault == "n not scaled by 1 - beta3" else 1 - slow) * g
        v = beta2 * memory[2] + (1 - beta2) * g**2
        hat = m if fault == "bias correction of m missing" else m / (1 - beta1**t)
        late = n / (1 - beta3**t) if fault == "bias of n corrected" else n
        top = hat + alpha * (late if fault != "slow average left out" else 0.0)
        if fault == "alpha as a share":
            top = (1 - alpha) * hat + alpha * late
        return x - lr * top / ((v / (1 - beta2**t)).sqrt() + claim.eps), [m, n, v]

    return leaf_by_leaf(3, rule, f"ademamix, {fault or 'right'}")


def adafactor(claim: Adafactor, fault: str) -> Subject:
    def rms(x: Tensor) -> Tensor:
        return (x**2).sum().sqrt() if fault == "norm in place of RMS" else (x**2).mean().sqrt()

    def rule(g: Tensor, x: Tensor, memory: list[Tensor], lr: Any, t: int) -> Any:
        share = (t + (fault == "count one too high")) ** claim.beta2_decay
        share = 0.1 if fault == "share constant" else share
        v = memory[0] + share * (g**2 - memory[0])  # the means of rows and columns are linear in it
        used = v
        if g.ndim > 1 and fault != "not factored":
            rows, columns = v.mean(-1, keepdim=True), v.mean(-2, keepdim=True)
            rows = v.sum(-1, keepdim=True) if fault == "sum of rows" else rows
            used = rows * columns / rows.mean(-2, keepdim=True).clamp(min=claim.eps1)
            if fault == "product of rows and columns not divided":
                used = rows * columns
            if fault == "sum of rows":
                used = rows * columns / v.mean().clamp(min=claim.eps1)
        w = g / used.clamp(min=claim.eps1**2).sqrt()
        size = rms(w) / claim.d
        w = w if fault == "not clipped" else w / size.clamp(min=1.0)
        w = w / size.clamp(min=1e-300) if fault == "always of RMS d" else w
        scale = (
            torch.ones(()) if fault == "not relative to the parameters" else rms(x).clamp(min=claim.eps2)
        )
        return x - lr * scale * w, [v]

    return leaf_by_leaf(1, rule, f"adafactor, {fault or 'right'}")


def norm_of(leaves: Leaves) -> Tensor:
    return torch.stack([leaf.norm() for leaf in leaves]).norm()


def dog(claim: DoG, fault: str) -> Subject:
    def start(leaves: Leaves) -> Any:
        size = norm_of(leaves)
        return (
            leaves,
            claim.reps_rel * (size if fault == "1 left out of the first distance" else 1 + size),
            0.0,
        )

    def rule(gs: Leaves, xs: Leaves, state: Any, lr: Any, t: int) -> Any:
        first, far, total = state
        away = norm_of([x - x0 for x, x0 in zip(xs, first, strict=True)])
        far = torch.maximum(far, away)
        if fault == "distance, not the largest":
            far = away.clamp(min=claim.reps_rel)
        square = norm_of(gs) ** 2
        total = total + (norm_of(gs) if fault == "norms added, not squares" else square)
        seen = {"newest gradient alone": square, "this gradient left out": total - square}.get(fault, total)
        factor = far / ((seen + claim.eps) if fault == "root missing" else (seen + claim.eps) ** 0.5)
        if fault == "each leaf by its own distance":
            us = [
                g * torch.maximum((x - x0).norm(), far / 10) / (total + claim.eps) ** 0.5
                for g, x, x0 in zip(gs, xs, first, strict=True)
            ]
            return stepped(xs, us, lr), (first, far, total)
        kept = xs if fault == "distance of one step" else first
        return stepped(xs, [factor * g for g in gs], lr), (kept, far, total)

    return counted(start, rule, f"dog, {fault or 'right'}")


def prodigy(claim: Prodigy, fault: str) -> Subject:
    (beta1, beta2), root = claim.betas, claim.betas[1] ** 0.5
    root = beta2 if fault == "beta2 for its root" else root

    def start(leaves: Leaves) -> Any:
        zeros = [torch.zeros_like(leaf) for leaf in leaves]
        return leaves, zeros, zeros, zeros, 0.0, claim.d0

    def rule(gs: Leaves, xs: Leaves, state: Any, lr: Any, t: int) -> Any:
        first, ms, vs, ss, r, d = state
        inside = 1.0 if fault == "d left out of the averages" else d
        ms = [beta1 * m + (1 - beta1) * inside * g for m, g in zip(ms, gs, strict=True)]
        vs = [beta2 * v + (1 - beta2) * (inside * g) ** 2 for v, g in zip(vs, gs, strict=True)]
        weight = (1 - root) * d**2 * (1.0 if fault == "lr left out of the sums" else lr)
        sign = -1.0 if fault == "sign of the distance" else 1.0
        products = [(g * (x0 - x)).sum() for g, x0, x in zip(gs, first, xs, strict=True)]
        r = root * r + weight * sign * sum(products)
        ss = [root * s + weight * g for s, g in zip(ss, gs, strict=True)]
        size = sum(s.abs().sum() for s in ss) if fault != "2-norm of s" else norm_of(ss)
        hat = claim.d_coef * float(r / size) if size > 0 else 0.0
        used = max(d, hat)
        us = [m / (v.sqrt() + d * claim.eps).clamp(min=1e-300) for m, v in zip(ms, vs, strict=True)]
        us = [u + claim.weight_decay * x for u, x in zip(us, xs, strict=True)]
        scale = used if fault == "new d in this step" else d
        used = hat or d if fault == "d may shrink" else used
        return stepped(xs, us, lr * scale), (first, ms, vs, ss, r, used)

    return counted(start, rule, f"prodigy, {fault or 'right'}")


def mechanic(claim: Mechanic, fault: str) -> Subject:
    betas = torch.tensor(claim.betas).double()

    def start(leaves: Leaves) -> Any:
        memory = [torch.zeros(len(betas)).double() for _ in range(4)]
        return leaves, [torch.zeros_like(leaf) for leaf in leaves], memory, ()

    def rule(gs: Leaves, xs: Leaves, state: Any, lr: Any, t: int) -> Any:
        first, deltas, (s, m, v, r), history = state
        us, history = follow(claim.inner, history, gs, xs)
        after = stepped(deltas, us, lr)
        size = norm_of(xs)
        push = claim.decay * s.sum() * (norm_of(gs) / size if size > 0 else 0.0)
        push = 0.0 if fault == "decay left out" else push
        used = after if fault == "h with this update" else deltas
        h = sum((a * (g + push * x)).sum() for a, g, x in zip(used, gs, xs, strict=True))
        m = torch.maximum(betas * m, h if fault == "maximum of h, not of its size" else abs(h))
        v = (betas if fault == "v decays by beta" else betas**2) * v + h**2
        r = betas * r + (s * h if fault == "sign of the reward" else -s * h)
        r = r if fault == "reward may be negative" else r.clamp(min=0)
        s = (claim.s_init / (1 if fault == "s0 not divided" else len(betas)) * m + r) / (
            v.sqrt() + claim.eps
        )
        total = s.mean() if fault == "mean of the scales" else s.sum()
        if fault == "update scaled, not the sum":
            moves = [b - a for a, b in zip(deltas, after, strict=True)]
            new = [x + total.to(x.dtype) * move for x, move in zip(xs, moves, strict=True)]
        else:
            new = [x + total.to(x.dtype) * b for x, b in zip(first, after, strict=True)]
        return new, (first, after, (s, m, v, r), history)

    return counted(start, rule, f"mechanic, {fault or 'right'}")


CONTROLS = [
    *controls(
        AdEMAMix((0.5, 0.875, 0.75), 2.0),
        ademamix,
        "beta1 and beta3 exchanged",
        "n not scaled by 1 - beta3",
        "bias correction of m missing",
        "bias of n corrected",
        "slow average left out",
        "alpha as a share",
    ),
    *controls(
        AdEMAMix((0.5, 0.875, 0.9375), 2.0, warmup=5),
        ademamix,
        "warmup one step late",
        "beta3 not warmed up",
        "beta3 warmed up linearly",
        "alpha not warmed up",
    ),
    *controls(
        Adafactor(-0.5, d=0.75),
        adafactor,
        "count one too high",
        "share constant",
        "norm in place of RMS",
        "not factored",
        "sum of rows",
        "product of rows and columns not divided",
        "not clipped",
        "always of RMS d",
        "not relative to the parameters",
    ),
    *controls(
        DoG(0.125),
        dog,
        "1 left out of the first distance",
        "distance, not the largest",
        "norms added, not squares",
        "newest gradient alone",
        "this gradient left out",
        "root missing",
        "each leaf by its own distance",
        "distance of one step",
    ),
    *controls(
        Prodigy((0.5, 0.75), weight_decay=0.125, d0=0.125),
        prodigy,
        "beta2 for its root",
        "d left out of the averages",
        "lr left out of the sums",
        "sign of the distance",
        "2-norm of s",
        "new d in this step",
        "d may shrink",
    ),
    *controls(
        Mechanic(Momentum(0.5), (0.5, 0.875), 0.125, 0.5, 1e-3),
        mechanic,
        "decay left out",
        "h with this update",
        "maximum of h, not of its size",
        "v decays by beta",
        "sign of the reward",
        "reward may be negative",
        "s0 not divided",
        "mean of the scales",
        "update scaled, not the sum",
    ),
]
