"""Methods for finite sums, and gradient descent on mini-batches, with one fault each."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad, vmap

from ... import _tree
from ..._sampling import take
from ..._step import Step, gradient_step
from ..._tree import Tree
from .._claims._linear import GradientDescent
from .._claims._sums import SAG, SAGA, SARAH, SVRG
from .._subject import Subject
from ._base import controls


def batches(claim: GradientDescent, fault: str) -> Subject:
    def make(loss_fn: Callable[..., Tensor]) -> Step:
        def wrong_loss(params: Tree, batch: Tree) -> Tensor:
            size = 1 if batch is None else len(_tree.leaves(batch)[0])
            if fault == "sum over the batch":
                return size * loss_fn(params, batch)
            if fault == "batch mean divided by the batch size":
                return loss_fn(params, batch) / size
            if fault == "first sample of the batch alone":
                batch = _tree.map(lambda leaf: leaf[:1], batch)
            if fault == "last sample of the batch left out":
                batch = _tree.map(lambda leaf: leaf[: max(1, size - 1)], batch)
            if fault == "divided by the root of the batch size":
                return loss_fn(params, batch) / size**0.5
            return loss_fn(params, batch)

        def move(carry: Moving, grads: Tree, lr: Any) -> Moving:
            return Moving(_tree.map(lambda x, g: x - lr * g, carry.params, grads), None)

        return gradient_step(wrong_loss, Moving, lambda params: Moving(params, None), move)

    return Subject(make, f"sgd, {fault or 'right'}")


class Moving(NamedTuple):
    """Parameters, and what a method remembers of its gradients."""

    params: Tree
    memory: Any


def by_rows(begin: Callable[..., Any], rule: Callable[..., tuple[Tensor, Any]], name: str) -> Subject:
    """Make a subject of a rule for vectors.

    Args:
        begin: `table -> memory`, from the gradients at the start, [n, d].
        rule: `(gradients, x, memory, rows, lr) -> (x', memory')`, where gradients(x) are those of all
            samples, [n, d].
        name: of the subject.
    """

    def make(loss_fn: Callable[..., Tensor], data: Tree) -> Step:
        def gradients_for(params: Tree) -> Callable[[Tensor], Tensor]:
            def of_sample(x: Tensor, i: Tensor) -> Tensor:
                return loss_fn(_tree.unravel(x, params), take(data, i[None]))

            rows = torch.arange(len(_tree.leaves(data)[0]))
            return lambda x: vmap(lambda i: grad(of_sample)(x, i))(rows)

        def init(params: Tree) -> Moving:
            return Moving(params, begin(gradients_for(params)(_tree.ravel(params))))

        def advance(carry: Moving, rows: Tensor, lr: Any) -> tuple[Moving, Tensor, None]:
            gradients, x = gradients_for(carry.params), _tree.ravel(carry.params)
            x, memory = rule(gradients, x, carry.memory, rows, lr)
            return Moving(_tree.unravel(x, carry.params), memory), x.new_zeros(()), None

        return Step(init, advance, Moving)

    return Subject(make, name, of_rows=True)


def svrg(claim: SVRG, fault: str) -> Subject:
    def rule(gradients: Any, x: Tensor, memory: Any, rows: Tensor, lr: Any) -> tuple[Tensor, Any]:
        start = gradients(x)
        if fault == "snapshot of the first pass kept":
            memory = start if memory is None else memory
            start = memory
        w, points = x, [x]
        for batch in rows.reshape(-1, claim.batch_size):
            here, there, full = gradients(w)[batch].mean(0), start[batch].mean(0), start.mean(0)
            v = {
                "gradient of the snapshot left out": here + full,
                "full gradient left out": here - there,
                "sign of the correction": here + there - full,
                "plain SGD": here,
                "correction halved": here - 0.5 * (there - full),
                "other samples for the snapshot": here - start[(batch + 1) % len(start)].mean(0) + full,
                "sum over the batch for the snapshot": here - start[batch].sum(0) + full,
            }.get(fault, here - there + full)
            w = w - (lr / len(start) if fault == "lr divided by the number of samples" else lr) * v
            points.append(w)
            if fault == "snapshot renewed in every step":
                start = gradients(w)
        average = (claim.output == "average") != (fault == "the other output")
        if fault == "average with the last point":
            return torch.stack(points[1:]).mean(0), memory
        if fault == "first batch left out":
            w = x
            for batch in rows.reshape(-1, claim.batch_size)[1:]:
                w = w - lr * (gradients(w)[batch].mean(0) - start[batch].mean(0) + start.mean(0))
        return (torch.stack(points[:-1]).mean(0) if average else w), memory

    return by_rows(lambda table: None, rule, f"svrg, {fault or 'right'}")


def sarah(claim: SARAH, fault: str) -> Subject:
    def rule(gradients: Any, x: Tensor, memory: Any, rows: Tensor, lr: Any) -> tuple[Tensor, Any]:
        v = gradients(x).mean(0)
        if fault == "no full gradient at the start":
            v = gradients(x)[rows[: claim.batch_size]].mean(0)
        full, points = v, [x, x if fault == "first step left out" else x - lr * v]
        for batch in rows.reshape(-1, claim.batch_size):
            here, before = gradients(points[-1])[batch].mean(0), gradients(points[-2])[batch].mean(0)
            at_start = gradients(x)[batch].mean(0)
            v = {
                "compared with the start": here - at_start + v,
                "SVRG's estimate": here - at_start + full,
                "sign of the change": before - here + v,
                "change added to the full gradient": here - before + full,
                "estimate forgotten": here,
                "estimate averaged": 0.5 * (here - before + v) + 0.5 * here,
            }.get(fault, here - before + v)
            points.append(points[-1] - lr * v)
        average = (claim.output == "average") != (fault == "the other output")
        return (torch.stack(points[:-1]).mean(0) if average else points[-1]), memory

    return by_rows(lambda table: None, rule, f"sarah, {fault or 'right'}")


def renewed(table: Tensor, now: Tensor, rows: Tensor) -> Tensor:
    """Return a table in which some rows are those of today."""
    table = table.clone()
    table[rows] = now[rows]
    return table


def saga(claim: SAGA, fault: str) -> Subject:
    def begin(table: Tensor) -> Any:
        table = torch.zeros_like(table) if fault == "table begins with zeros" else table
        return table, table.mean(0)

    def rule(gradients: Any, x: Tensor, memory: Any, rows: Tensor, lr: Any) -> tuple[Tensor, Any]:
        (table, mean), now = memory, gradients(x)
        after = renewed(table, now, rows)
        change = (now - table)[rows]
        n, size = len(table), len(rows)
        v = {
            "table renewed before its use": (now - after)[rows].mean(0) + after.mean(0),
            "mean of the new table": change.mean(0) + after.mean(0),
            "mean of the table left out": change.mean(0),
            "correction left out": now[rows].mean(0),
            "sign of the correction": now[rows].mean(0) + table[rows].mean(0) - mean,
            "SAG's weight": change.sum(0) / n + mean,
            "sum over the batch": change.sum(0) + mean,
        }.get(fault, change.mean(0) + mean)
        mean = {
            "mean never renewed": mean,
            "mean renewed with the batch size": mean + change.sum(0) / size,
            "repeated samples counted twice in the mean": mean + change.sum(0) / n,
        }.get(fault, after.mean(0))
        if fault == "one sample of the batch renewed":
            after = renewed(table, now, rows[:1])
            mean = after.mean(0)
        if fault == "table never renewed":
            after, mean = table, table.mean(0)
        x = x - lr * v
        if fault == "table of the new point":
            after = renewed(table, gradients(x), rows)
            mean = after.mean(0)
        return x, (after, mean)

    return by_rows(begin, rule, f"saga, {fault or 'right'}")


def sag(claim: SAG, fault: str) -> Subject:
    def begin(table: Tensor) -> Any:
        return torch.zeros_like(table) if fault == "table begins with zeros" else table

    def rule(gradients: Any, x: Tensor, table: Any, rows: Tensor, lr: Any) -> tuple[Tensor, Any]:
        now = gradients(x)
        after = renewed(table, now, rows[:1] if fault == "one sample of the batch renewed" else rows)
        change = (now - table)[rows]
        v = {
            "mean of the old table": table.mean(0),
            "SAGA's weight": change.mean(0) + table.mean(0),
            "repeated samples counted twice": table.mean(0) + change.sum(0) / len(table),
            "sum of the table": after.sum(0),
            "mean over the batch alone": after[rows].mean(0),
        }.get(fault, after.mean(0))
        if fault == "table never renewed":
            after = table
        return x - lr * v, after

    return by_rows(begin, rule, f"sag, {fault or 'right'}")


CONTROLS = [
    *controls(
        GradientDescent(),
        batches,
        "sum over the batch",
        "batch mean divided by the batch size",
        "first sample of the batch alone",
        "last sample of the batch left out",
        "divided by the root of the batch size",
    ),
    *controls(
        SVRG(),
        svrg,
        "snapshot of the first pass kept",
        "gradient of the snapshot left out",
        "full gradient left out",
        "sign of the correction",
        "plain SGD",
        "correction halved",
        "other samples for the snapshot",
        "snapshot renewed in every step",
        "lr divided by the number of samples",
        "the other output",
        "first batch left out",
    ),
    *controls(SVRG(2), svrg, "sum over the batch for the snapshot"),
    *controls(SVRG(output="average"), svrg, "average with the last point"),
    *controls(
        SARAH(),
        sarah,
        "no full gradient at the start",
        "first step left out",
        "compared with the start",
        "SVRG's estimate",
        "sign of the change",
        "change added to the full gradient",
        "estimate forgotten",
        "estimate averaged",
        "the other output",
    ),
    *controls(
        SAGA(),
        saga,
        "table begins with zeros",
        "table renewed before its use",
        "mean of the new table",
        "mean of the table left out",
        "correction left out",
        "sign of the correction",
        "SAG's weight",
        "sum over the batch",
        "mean never renewed",
        "mean renewed with the batch size",
        "repeated samples counted twice in the mean",
        "one sample of the batch renewed",
        "table never renewed",
        "table of the new point",
    ),
    *controls(
        SAG(),
        sag,
        "table begins with zeros",
        "one sample of the batch renewed",
        "mean of the old table",
        "SAGA's weight",
        "repeated samples counted twice",
        "sum of the table",
        "mean over the batch alone",
        "table never renewed",
    ),
]
