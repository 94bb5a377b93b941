"""Transformations of transformations with one fault each."""

from typing import Any

import torch
from torch import Tensor

from .._claims._linear import Momentum
from .._claims._norms import ClipByGlobalNorm
from .._claims._signs import Sign
from .._claims._wrappers import Accumulate, ApplyIfFinite, Chain, Masked, Partition, WeightDecay
from .._subject import Subject
from ._base import Leaves, by_directions, controls, follow


def weight_decay(claim: WeightDecay, fault: str) -> Subject:
    rate = -claim.rate if fault == "sign of the decay" else claim.rate

    def rule(gs: Leaves, xs: Leaves, state: Any, t: int) -> Any:
        history, start = state
        start = xs if start is None else start
        decays = [rate * x for x in xs]
        if fault == "decay towards the start":
            decays = [rate * (x - x0) for x, x0 in zip(xs, start, strict=True)]
        if fault == "first leaf left out":
            decays[0] = torch.zeros_like(decays[0])
        if fault == "decay by the sign":
            decays = [rate * x.sign() for x in xs]
        if fault == "decay from the second step":
            decays = [(t > 1) * d for d in decays]
        if fault == "decay after the rest":
            us, history = follow(claim.then, history, gs, xs)
            return [u + d for u, d in zip(us, decays, strict=True)], (history, start)
        us, history = follow(claim.then, history, [g + d for g, d in zip(gs, decays, strict=True)], xs)
        if fault == "decay twice":
            us = [u + d for u, d in zip(us, decays, strict=True)]
        return us, (history, start)

    return by_directions(((), None), rule, f"weight decay, {fault or 'right'}")


def masked(claim: Masked, fault: str) -> Subject:
    def rule(gs: Leaves, xs: Leaves, history: Any, t: int) -> Any:
        mask = [own != (fault == "mask upside down") for own in claim.mask[: len(gs)]]
        if fault == "mask left out":
            mask = [True] * len(gs)
        if fault == "mask of the first leaf for all":
            mask = mask[:1] * len(gs)
        if fault == "mask in reverse order":
            mask.reverse()
        places = [i for i, own in enumerate(mask) if own]
        us = [torch.zeros_like(g) if fault == "other leaves frozen" else g for g in gs]
        if places:
            found, history = follow(claim.inner, history, [gs[i] for i in places], [xs[i] for i in places])
            for i, u in zip(places, found, strict=True):
                us[i] = u
        return us, history

    return by_directions((), rule, f"masked, {fault or 'right'}")


def partition(claim: Partition, fault: str) -> Subject:
    count = len(claim.claims)

    def rule(gs: Leaves, xs: Leaves, histories: Any, t: int) -> Any:
        labels = list(claim.labels[: len(gs)])
        if fault == "labels shifted by one":
            labels = [(label + 1) % count for label in labels]
        if fault == "the first rule for all":
            labels = [0] * len(labels)
        if fault == "labels in reverse order":
            labels.reverse()
        us, new = [torch.zeros_like(g) for g in gs], list(histories)
        for label, inner in enumerate(claim.claims):
            places = [i for i, own in enumerate(labels) if own == label]
            seen = list(range(len(gs))) if fault == "each rule sees all leaves" else places
            if not places or (fault == "last group left out" and label == count - 1):
                continue
            found, new[label] = follow(inner, new[label], [gs[i] for i in seen], [xs[i] for i in seen])
            for i in places:
                us[i] = found[seen.index(i)]
        return us, tuple(new)

    return by_directions(((),) * count, rule, f"partition, {fault or 'right'}")


def accumulate(claim: Accumulate, fault: str) -> Subject:
    k = claim.steps + (fault == "one step too many")

    def rule(gs: Leaves, xs: Leaves, state: Any, t: int) -> Any:
        sums, history = state
        sums = [g if s is None else s + g for s, g in zip(sums or [None] * len(gs), gs, strict=True)]
        if t % k != (1 % k if fault == "moves in the first step of k" else 0):
            us = gs if fault == "moves between by the gradient" else [torch.zeros_like(g) for g in gs]
            if fault == "zeros fed to the inner rule between":
                us, history = follow(claim.inner, history, us, xs)
            return us, (sums, history)
        mean = sums if fault == "sum in place of the mean" else [s / k for s in sums]
        if fault == "last gradient in place of the mean":
            mean = gs
        us, history = follow(claim.inner, history, mean, xs)
        return us, (sums if fault == "sum not cleared" else None, history)

    return by_directions((None, ()), rule, f"accumulate, {fault or 'right'}")


def apply_if_finite(claim: ApplyIfFinite, fault: str) -> Subject:
    def is_bad(g: Tensor) -> bool:
        bad = g.isnan() if fault == "infinity not skipped" else ~g.isfinite()
        if fault == "NaN not skipped":
            bad = g.isinf()
        return bool(bad.any())

    def rule(gs: Leaves, xs: Leaves, history: Any, t: int) -> Any:
        bad = [is_bad(g) for g in gs]
        if fault == "only the bad leaf skipped":
            gs = [torch.zeros_like(g) if own else g for g, own in zip(gs, bad, strict=True)]
            bad = [False]
        if fault == "bad entries set to zero":
            gs, bad = [g.nan_to_num(0.0, 0.0, 0.0) for g in gs], [False]
        if not any(bad[:1] if fault == "only the first leaf looked at" else bad):
            return follow(claim.inner, history, gs, xs)
        zeros = [torch.zeros_like(g) for g in gs]
        if fault == "zeros fed to the inner rule":
            return follow(claim.inner, history, zeros, xs)
        if fault == "last direction repeated" and history:
            return follow(claim.inner, history[:-1], *history[-1])
        return zeros, () if fault == "inner state cleared" else history

    return by_directions((), rule, f"apply if finite, {fault or 'right'}")


def chain(claim: Chain, fault: str) -> Subject:
    claims = claim.claims
    if fault == "order reversed":
        claims = claims[::-1]
    if fault == "first one left out":
        claims = claims[1:]
    if fault == "last one left out":
        claims = claims[:-1]
    if fault == "last one applied twice":
        claims = (*claims, claims[-1])

    def rule(gs: Leaves, xs: Leaves, histories: Any, t: int) -> Any:
        us, new = gs, []
        for inner, history in zip(claims, histories, strict=True):
            us, kept = follow(inner, history, gs if fault == "each one sees the gradient" else us, xs)
            new.append(kept)
        if fault == "directions added":
            us = [g - g for g in gs]
            for inner, history in zip(claims, histories, strict=True):
                us = [a + b for a, b in zip(us, follow(inner, history, gs, xs)[0], strict=True)]
        return us, tuple(new)

    return by_directions(((),) * len(claims), rule, f"chain, {fault or 'right'}")


CONTROLS = [
    *controls(
        WeightDecay(0.125, Momentum(0.5)),
        weight_decay,
        "sign of the decay",
        "decay towards the start",
        "first leaf left out",
        "decay by the sign",
        "decay from the second step",
        "decay after the rest",
        "decay twice",
    ),
    *controls(
        Masked(ClipByGlobalNorm(2.0)),
        masked,
        "mask upside down",
        "mask left out",
        "mask of the first leaf for all",
        "other leaves frozen",
    ),
    *controls(Masked(WeightDecay(0.125, Momentum(0.5))), masked, "mask in reverse order"),
    *controls(
        Partition((Sign(), ClipByGlobalNorm(2.0))),
        partition,
        "labels shifted by one",
        "the first rule for all",
        "labels in reverse order",
        "each rule sees all leaves",
        "last group left out",
    ),
    *controls(
        Accumulate(Momentum(0.5), 3),
        accumulate,
        "one step too many",
        "moves in the first step of k",
        "moves between by the gradient",
        "zeros fed to the inner rule between",
        "sum in place of the mean",
        "last gradient in place of the mean",
        "sum not cleared",
    ),
    *controls(
        ApplyIfFinite(Momentum(0.5)),
        apply_if_finite,
        "infinity not skipped",
        "NaN not skipped",
        "only the bad leaf skipped",
        "bad entries set to zero",
        "only the first leaf looked at",
        "zeros fed to the inner rule",
        "last direction repeated",
        "inner state cleared",
    ),
    *controls(
        Chain(ClipByGlobalNorm(2.0), Momentum(0.5), WeightDecay(0.125)),
        chain,
        "order reversed",
        "first one left out",
        "last one left out",
        "last one applied twice",
        "each one sees the gradient",
        "directions added",
    ),
]
