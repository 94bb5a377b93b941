"""Methods that keep a second copy of the parameters, with one fault each."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from ... import _tree
from .._claims._averages import ASGD, EMA, Lookahead, ScheduleFree
from .._claims._linear import Momentum
from .._subject import HandState, Subject
from ._base import Leaves, controls, counted, follow, stepped


def answering(start: Callable[[Leaves], Any], rule: Callable[..., Any], name: str) -> Subject:
    """Make a subject whose answer is the first field of its state; see `counted`."""

    def result(carry: HandState) -> Any:
        return _tree.unflatten(_tree.flatten(carry.params)[1], carry.state[1][0])

    return dataclasses.replace(counted(start, rule, name), result=result)


def ema(claim: EMA, fault: str) -> Subject:
    d = 1 - claim.decay if fault == "decay and 1 - decay exchanged" else claim.decay

    def rule(gs: Leaves, xs: Leaves, state: Any, lr: Any, t: int) -> Any:
        average, history = state
        us, history = follow(claim.inner, history, gs, xs)
        new = stepped(xs, us, lr)
        share = 1 - d
        if claim.debias and fault != "bias correction missing":
            share = share / (1 - d ** (t + (fault == "bias correction one step late")))
        if fault == "start forgotten" and t == 1:
            average = [torch.zeros_like(a) for a in average]
        if fault == "uniform weights":
            share = 1 / t
        average = _tree.lerp(average, xs if fault == "average of the old point" else new, share)
        return average if fault == "parameters moved to the average" else new, (average, history)

    return answering(lambda leaves: (leaves, ()), rule, f"ema, {fault or 'right'}")


def lookahead(claim: Lookahead, fault: str) -> Subject:
    alpha = 1 - claim.alpha if fault == "alpha and 1 - alpha exchanged" else claim.alpha
    k = claim.k + (fault == "one step too many")

    def rule(gs: Leaves, xs: Leaves, state: Any, lr: Any, t: int) -> Any:
        slow, history = state
        us, history = follow(claim.inner, history, gs, xs)
        fast = stepped(xs, us, lr)
        if t % k != (1 % k if fault == "synchronised after the first step" else 0):
            return fast, (slow, history)
        meet = _tree.lerp(slow, fast, alpha)
        if fault == "slow weights moved to the fast ones":
            meet = fast
        if fault == "inner memory cleared":
            history = ()
        if fault == "fast weights not reset":
            return fast, (meet, history)
        return meet, (slow if fault == "slow weights not updated" else meet, history)

    return answering(lambda leaves: (leaves, ()), rule, f"lookahead, {fault or 'right'}")


def schedule_free(claim: ScheduleFree, fault: str) -> Subject:
    beta = 1 - claim.beta if fault == "beta and 1 - beta exchanged" else claim.beta

    def rule(gs: Leaves, ys: Leaves, state: Any, lr: Any, t: int) -> Any:
        _, average, z, total, history = state
        us, history = follow(claim.inner, history, gs, ys)
        decayed = z if fault == "decay of z" else ys
        us = [u + claim.weight_decay * y for u, y in zip(us, decayed, strict=True)]
        if fault == "decay left out":
            us = [u - claim.weight_decay * y for u, y in zip(us, decayed, strict=True)]
        old, z = z, stepped(ys if fault == "step from y" else z, us, lr)
        weight = lr if fault == "weights lr" else 1.0 if fault == "uniform weights" else lr**2
        total = weight + (0.0 if fault == "weights not added up" else total)
        average = _tree.lerp(
            average, old if fault == "average of the old z" else z, weight / total if total else 0.0
        )
        answer = z if fault == "z in place of the average" else average
        return _tree.lerp(z, average, beta), (answer, average, z, total, history)

    def start(leaves: Leaves) -> Any:
        return leaves, leaves, leaves, 0.0, ()

    return answering(start, rule, f"schedule-free, {fault or 'right'}")


def asgd(claim: ASGD, fault: str) -> Subject:
    lambd, alpha = claim.lambd, 1.0 if fault == "power left out" else claim.alpha

    def rule(gs: Leaves, xs: Leaves, state: Any, lr: Any, t: int) -> Any:
        average, eta, mu = state
        count = t + (fault == "count one step early")
        decayed = lr / (1 + lambd * lr * count) ** alpha
        eta = lr if t == 1 else eta
        if fault == "step size of this step":
            eta = lr / (1 + lambd * lr * (t - 1)) ** alpha
        decay = claim.weight_decay * (fault != "weight decay left out")
        decay += lambd * (fault != "decay left out")
        new = stepped(xs, [g + decay * x for x, g in zip(xs, gs, strict=True)], eta)
        average = _tree.lerp(average, xs if fault == "average of the old point" else new, mu)
        ahead = t - claim.t0 + (fault == "share of the average one step early")
        mu = 1 / max(1.0, t if fault == "average from the first step" else ahead)
        return new, (average, decayed, mu)

    return answering(lambda leaves: (leaves, 0.0, 1.0), rule, f"asgd, {fault or 'right'}")


CONTROLS = [
    *controls(
        EMA(Momentum(0.5), 0.75),
        ema,
        "decay and 1 - decay exchanged",
        "average of the old point",
        "start forgotten",
        "uniform weights",
        "parameters moved to the average",
    ),
    *controls(
        EMA(Momentum(0.5), 0.75, debias=True),
        ema,
        "bias correction missing",
        "bias correction one step late",
    ),
    *controls(
        Lookahead(Momentum(0.5), 3, 0.75),
        lookahead,
        "alpha and 1 - alpha exchanged",
        "one step too many",
        "synchronised after the first step",
        "slow weights moved to the fast ones",
        "inner memory cleared",
        "fast weights not reset",
        "slow weights not updated",
    ),
    *controls(
        ScheduleFree(0.75, 0.125),
        schedule_free,
        "beta and 1 - beta exchanged",
        "decay of z",
        "decay left out",
        "step from y",
        "weights lr",
        "uniform weights",
        "weights not added up",
        "average of the old z",
        "z in place of the average",
    ),
    *controls(
        ASGD(0.125, 0.5, 2.5, 0.0625),
        asgd,
        "power left out",
        "count one step early",
        "step size of this step",
        "weight decay left out",
        "decay left out",
        "average of the old point",
        "share of the average one step early",
        "average from the first step",
    ),
]
