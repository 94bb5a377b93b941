"""Adam and its kin with one fault each."""

from typing import Any

import torch
from torch import Tensor

from .._claims._adaptive import AdaBelief, Adadelta, Adagrad, Adam, Adamax, NAdam, RAdam, RMSprop, Yogi
from .._subject import Subject
from ._base import Leaves, controls, leaf_by_leaf, whole_tree


def adam(claim: Adam, fault: str) -> Subject:
    beta1, beta2 = claim.betas[::-1] if fault == "betas exchanged" else claim.betas
    decay = 0.0 if fault == "weight decay missing" else claim.weight_decay

    def rule(g: Tensor, x: Tensor, memory: list[Tensor], lr: Any, t: int) -> Any:
        old_m, old_v, largest = memory
        raw = g
        if not claim.decoupled or fault == "weight decay in the gradient":
            g = g + decay * x
        m = beta1 * old_m + (1.0 if fault == "m not scaled by 1 - beta1" else 1 - beta1) * g
        size = {"v averages |g|": g.abs(), "v averages (g - m)²": (g - m) ** 2, "v averages m²": m**2}.get(
            fault, g**2
        )
        if fault == "v averages over the leaf":
            size = (g**2).mean().expand_as(g)
        v = beta2 * old_v + (1.0 if fault == "v not scaled by 1 - beta2" else 1 - beta2) * size
        count = {
            "count one too high": t + 1,
            "count ends at 100": min(t, 100),
            "count of the first step kept": 1,
        }.get(fault, t)
        bias1, bias2 = 1 - beta1**count, 1 - beta2**count
        if fault == "bias corrections exchanged":
            bias1, bias2 = bias2, bias1
        bias1 = 1.0 if fault in ("bias correction of m missing", "bias corrections missing") else bias1
        bias2 = 1.0 if fault in ("bias correction of v missing", "bias corrections missing") else bias2
        used = old_v if fault == "old v used" and t > 1 else v
        convention = claim.amsgrad
        if fault == "largest v after the correction, not before" and claim.amsgrad == "raw":
            convention = "corrected"
        if fault == "largest v before the correction, not after" and claim.amsgrad == "corrected":
            convention = "raw"
        if convention == "raw":
            used = largest = torch.maximum(largest, used)
        hat = used / bias2
        if convention == "corrected":
            hat = largest = torch.maximum(largest, hat)
        if fault == "largest v forgotten":
            hat = v / bias2
        inside = (claim.eps_inside or fault == "eps inside the root") and fault != "eps outside the root"
        root = hat if fault == "root missing" else hat.sqrt()
        divisor = (hat + claim.eps).sqrt() if inside else root + claim.eps
        if fault == "eps before the bias correction":
            divisor = (used.sqrt() + claim.eps) / bias2**0.5
        if fault == "eps missing":
            divisor = hat.sqrt().clamp(min=1e-300)
        top = old_m if fault == "old m used" else raw if fault == "gradient for m" else m
        u = top / (1.0 if fault == "gradient for m" else bias1) / divisor
        if claim.decoupled and fault != "weight decay in the gradient":
            if fault == "weight decay not scaled by lr":
                x = x - decay * x
            elif fault == "weight decay after the step":
                x = x - lr * u
                return x - lr * decay * x, [m, v, largest]
            elif fault == "sign of the weight decay":
                u = u - decay * x
            else:
                u = u + decay * x
        return x + lr * u if fault == "sign of the update" else x - lr * u, [m, v, largest]

    return leaf_by_leaf(3, rule, f"adam, {fault or 'right'}")


def count_per_leaf(claim: Adam, fault: str) -> Subject:
    """Adam whose one count goes on with every leaf: the fault of a count that all leaves share."""
    beta1, beta2 = claim.betas

    def rule(gs: Leaves, xs: Leaves, memories: Any, lr: Any, t: int) -> Any:
        moved, kept = [], []
        for i, (g, x, (m, v)) in enumerate(zip(gs, xs, memories, strict=True)):
            count = (t - 1) * len(gs) + i + 1 if fault else t
            m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
            moved.append(x - lr * m / (1 - beta1**count) / ((v / (1 - beta2**count)).sqrt() + claim.eps))
            kept.append([m, v])
        return moved, kept

    return whole_tree(2, rule, f"adam, {fault or 'right'}")


def adamax(claim: Adamax, fault: str) -> Subject:
    beta1, beta2 = claim.betas

    def rule(g: Tensor, x: Tensor, memory: list[Tensor], lr: Any, t: int) -> Any:
        m = beta1 * memory[0] + (1 - beta1) * g
        inside = 0.0 if claim.eps_outside or fault == "eps missing" else claim.eps
        size = g.abs() + inside if fault != "|g| for m" else m.abs() + inside
        decayed = memory[1] if fault == "maximum does not decay" else beta2 * memory[1]
        v = torch.maximum(decayed, size)
        if fault == "sum for the maximum":
            v = beta2 * memory[1] + (1 - beta2) * size
        if fault == "maximum before the decay":
            v = beta2 * torch.maximum(memory[1], size)
        bias = 1.0 if fault == "bias correction of m missing" else 1 - beta1**t
        if fault == "v corrected too":
            bias = bias / (1 - beta2**t)
        return x - lr * m / bias / (v + (claim.eps if claim.eps_outside else 0.0)).clamp(min=1e-300), [m, v]

    return leaf_by_leaf(2, rule, f"adamax, {fault or 'right'}")


def nadam(claim: NAdam, fault: str) -> Subject:
    beta1, beta2 = claim.betas

    def factor(t: int) -> float:
        half = 1.0 if fault == "half missing in mu" else 0.5
        decay = 0.0 if fault == "mu constant" else claim.momentum_decay
        return float(beta1 * (1 - half * 0.96 ** ((t - 1 if fault == "mu one step late" else t) * decay)))

    def rule(g: Tensor, x: Tensor, memory: list[Tensor], lr: Any, t: int) -> Any:
        m = beta1 * memory[0] + (1 - beta1) * g
        v = beta2 * memory[1] + (1 - beta2) * g**2
        product = torch.ones((), dtype=getattr(torch, claim.product))
        for i in range(1, t + 1):
            product = product * factor(i)
        before, after = float(product), float(product) * factor(t + 1)
        if fault == "product replaced by a power":
            before, after = beta1**t, beta1 ** (t + 1)
        if fault == "product of the next step missing":
            after = before
        top = (1 - factor(t)) / (1 - before) * g + factor(t + 1) / (1 - after) * m
        if fault == "look-ahead missing":
            top = m / (1 - beta1**t)
        bias = 1.0 if fault == "bias correction of v missing" else 1 - beta2**t
        return x - lr * top / ((v / bias).sqrt() + claim.eps), [m, v]

    return leaf_by_leaf(2, rule, f"nadam, {fault or 'right'}")


def radam(claim: RAdam, fault: str) -> Subject:
    beta1, beta2 = claim.betas

    def rule(g: Tensor, x: Tensor, memory: list[Tensor], lr: Any, t: int) -> Any:
        m = beta1 * memory[0] + (1 - beta1) * g
        v = beta2 * memory[1] + (1 - beta2) * g**2
        bias1, bias2 = 1 - beta1**t, 1 - beta2**t
        longest = 2 / (1 - beta2) - 1
        length = longest - (1 if fault == "factor 2 missing in rho" else 2) * t * beta2**t / bias2
        threshold = {"threshold 4": 4.0, "threshold 6": 6.0}.get(fault, 5.0)
        if length <= threshold or fault == "never rectified":
            plain = m if fault == "bias correction missing before" else m / bias1
            return x - lr * (0.0 if fault == "no move before" else 1.0) * plain, [m, v]
        r = ((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)) ** 0.5
        r = {"root of the rectifier missing": r**2, "rectifier missing": 1.0}.get(fault, r)
        root = 1.0 if fault == "bias correction of v missing" else bias2**0.5
        corrected = claim.eps_corrected != (fault == "eps after the bias correction")
        divisor = v.sqrt() / root + claim.eps if corrected else (v.sqrt() + claim.eps) / root
        return x - lr * m / bias1 * r / divisor, [m, v]

    return leaf_by_leaf(2, rule, f"radam, {fault or 'right'}")


def adabelief(claim: AdaBelief, fault: str) -> Subject:
    beta1, beta2 = claim.betas
    outside = claim.eps if claim.eps_outside is None else claim.eps_outside

    def rule(g: Tensor, x: Tensor, memory: list[Tensor], lr: Any, t: int) -> Any:
        m = beta1 * memory[0] + (1 - beta1) * g
        center = memory[0] if fault == "old mean used" else m
        if fault == "corrected mean used":
            center = m / (1 - beta1**t)
        surprise = g**2 if fault == "mean missing" else (g - center) ** 2
        inside = 0.0 if fault == "eps missing in the average" else claim.eps
        if fault == "eps averaged":
            inside = (1 - beta2) * claim.eps
        s = beta2 * memory[1] + (1 - beta2) * surprise + inside
        bias1 = 1.0 if fault == "bias correction of m missing" else 1 - beta1**t
        bias2 = 1.0 if fault == "bias correction of s missing" else 1 - beta2**t
        added = 0.0 if fault == "eps missing in the divisor" else outside
        return x - lr * m / bias1 / ((s / bias2).sqrt() + added).clamp(min=1e-300), [m, s]

    return leaf_by_leaf(2, rule, f"adabelief, {fault or 'right'}")


def yogi(claim: Yogi, fault: str) -> Subject:
    beta1, beta2 = claim.betas

    def rule(g: Tensor, x: Tensor, memory: list[Tensor], lr: Any, t: int) -> Any:
        start = 0.0 if fault == "starts at zero" else claim.initial_accumulator_value
        old = memory[1] + start if t == 1 else memory[1]
        m = beta1 * memory[0] + (1 - beta1) * g
        square = g**2
        v = old - (1 - beta2) * torch.sign(old - square) * square
        if fault == "sign turned":
            v = (old + (1 - beta2) * torch.sign(old - square) * square).clamp(min=0)
        if fault == "Adam's average":
            v = beta2 * old + (1 - beta2) * square
        bias = 1 - beta1**t if fault == "m corrected" else 1.0
        return x - lr * m / bias / (v.sqrt() + (0.0 if fault == "eps missing" else claim.eps)).clamp(
            min=1e-300
        ), [m, v]

    return leaf_by_leaf(2, rule, f"yogi, {fault or 'right'}")


def rmsprop(claim: RMSprop, fault: str) -> Subject:
    alpha = claim.alpha

    def rule(g: Tensor, x: Tensor, memory: list[Tensor], lr: Any, t: int) -> Any:
        old, center, buffer = memory
        v = alpha * old + (1.0 if fault == "v not scaled by 1 - alpha" else 1 - alpha) * g**2
        if fault == "alpha and 1 - alpha exchanged":
            v = (1 - alpha) * old + alpha * g**2
        center = alpha * center + (1 - alpha) * g
        used = old if fault == "old v used" and t > 1 else v
        if fault == "bias corrected":
            used = v / (1 - alpha**t)
        if claim.centered and fault != "not centered":
            used = (used - (center.abs() if fault == "center not squared" else center**2)).clamp(min=0)
        inside = claim.eps_inside or fault == "eps inside the root"
        d = g / ((used + claim.eps).sqrt() if inside else used.sqrt() + claim.eps)
        if fault == "root missing":
            d = g / (used + claim.eps)
        buffer = claim.momentum * buffer + d
        if fault == "lr inside the buffer":
            buffer = claim.momentum * memory[2] + lr * d
            return x - buffer, [v, center, buffer]
        return x - lr * (d if fault == "momentum missing" else buffer), [v, center, buffer]

    return leaf_by_leaf(3, rule, f"rmsprop, {fault or 'right'}")


def adagrad(claim: Adagrad, fault: str) -> Subject:
    def rule(g: Tensor, x: Tensor, memory: list[Tensor], lr: Any, t: int) -> Any:
        old = memory[0]
        if t == 1 and fault != "starts at zero":
            old = old + claim.initial_accumulator_value
        s = old + (g.abs() if fault == "sum of |g|" else g**2)
        if fault == "average for the sum":
            s = old + (g**2 - old) / t
        used = old if fault == "old sum used" and t > 1 else s
        inside = claim.eps_inside or fault == "eps inside the root"
        divisor = (used + claim.eps).sqrt() if inside else used.sqrt() + claim.eps
        if fault == "root missing":
            divisor = used + claim.eps
        count = t if fault == "lr decay one step early" else t - 1
        decay = 0.0 if fault == "lr decay missing" else claim.lr_decay
        return x - lr * g / divisor / (1 + count * decay), [s]

    return leaf_by_leaf(1, rule, f"adagrad, {fault or 'right'}")


def adadelta(claim: Adadelta, fault: str) -> Subject:
    rho, eps = claim.rho, claim.eps

    def rule(g: Tensor, x: Tensor, memory: list[Tensor], lr: Any, t: int) -> Any:
        v = rho * memory[0] + (1 - rho) * g**2
        d = memory[1]
        top = d + (0.0 if fault == "eps missing above" and t > 1 else eps)
        u = g * top.sqrt() / ((v.sqrt() + eps) if fault == "eps outside the root" else (v + eps).sqrt())
        if fault == "ratio turned":
            u = g * (v + eps).sqrt() / (d + eps).sqrt()
        if fault == "roots missing":
            u = g * (d + eps) / (v + eps)
        stored = {"lr in the average of updates": (lr * u) ** 2, "average of |u|": u.abs()}.get(fault, u**2)
        d = d if fault == "average of updates not kept" else rho * d + (1 - rho) * stored
        return x - lr * u, [v, d]

    return leaf_by_leaf(2, rule, f"adadelta, {fault or 'right'}")


_DECAYED = Adam((0.9, 0.99), 1e-8, None, 0.25)
CONTROLS = [
    *controls(
        Adam(),
        adam,
        "bias correction of m missing",
        "bias correction of v missing",
        "bias corrections missing",
        "bias corrections exchanged",
        "betas exchanged",
        "eps inside the root",
        "eps before the bias correction",
        "eps missing",
        "root missing",
        "v averages |g|",
        "v averages (g - m)²",
        "v averages m²",
        "v averages over the leaf",
        "m not scaled by 1 - beta1",
        "v not scaled by 1 - beta2",
        "count one too high",
        "count of the first step kept",
        "count ends at 100",
        "old m used",
        "old v used",
        "gradient for m",
        "sign of the update",
    ),
    *controls(Adam(), count_per_leaf, "count shared by all leaves"),
    *controls(
        _DECAYED,
        adam,
        "weight decay missing",
        "weight decay in the gradient",
        "weight decay not scaled by lr",
        "weight decay after the step",
        "sign of the weight decay",
    ),
    *controls(
        Adam((0.9, 0.99), 1e-8, "raw"),
        adam,
        "largest v after the correction, not before",
        "largest v forgotten",
    ),
    *controls(Adam((0.9, 0.99), 1e-8, "corrected"), adam, "largest v before the correction, not after"),
    *controls(Adam(eps_inside=True), adam, "eps outside the root"),
    *controls(
        Adamax(),
        adamax,
        "bias correction of m missing",
        "maximum does not decay",
        "maximum before the decay",
        "sum for the maximum",
        "|g| for m",
        "v corrected too",
        "eps missing",
    ),
    *controls(
        NAdam(momentum_decay=0.25),
        nadam,
        "half missing in mu",
        "mu constant",
        "mu one step late",
        "product replaced by a power",
        "product of the next step missing",
        "look-ahead missing",
        "bias correction of v missing",
    ),
    *controls(
        RAdam((0.9, 0.95)),
        radam,
        "factor 2 missing in rho",
        "threshold 4",
        "threshold 6",
        "never rectified",
        "no move before",
        "bias correction missing before",
        "root of the rectifier missing",
        "rectifier missing",
        "bias correction of v missing",
        "eps after the bias correction",
    ),
    *controls(
        AdaBelief(eps=1e-3),
        adabelief,
        "old mean used",
        "corrected mean used",
        "mean missing",
        "eps missing in the average",
        "eps averaged",
        "eps missing in the divisor",
        "bias correction of m missing",
        "bias correction of s missing",
    ),
    *controls(
        Yogi(),
        yogi,
        "starts at zero",
        "sign turned",
        "Adam's average",
        "m corrected",
        "eps missing",
    ),
    *controls(
        RMSprop(0.9, momentum=0.5),
        rmsprop,
        "v not scaled by 1 - alpha",
        "alpha and 1 - alpha exchanged",
        "old v used",
        "bias corrected",
        "eps inside the root",
        "root missing",
        "lr inside the buffer",
        "momentum missing",
    ),
    *controls(RMSprop(0.9, 1e-2, centered=True), rmsprop, "not centered", "center not squared"),
    *controls(
        Adagrad(0.25, 0.5),
        adagrad,
        "starts at zero",
        "sum of |g|",
        "average for the sum",
        "old sum used",
        "root missing",
        "lr decay one step early",
        "lr decay missing",
    ),
    *controls(Adagrad(eps=1e-3), adagrad, "eps inside the root"),
    *controls(
        Adadelta(),
        adadelta,
        "eps missing above",
        "eps outside the root",
        "ratio turned",
        "roots missing",
        "lr in the average of updates",
        "average of |u|",
        "average of updates not kept",
    ),
]
