"""Measurements of a run at a carry that is on disk: they tell it from another run of the same names."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _tree
from .._shown import dotted, shown
from .._tree import Tree
from ._body import RECORDERS, carry_of
from ._plan import Plan

Measured = dict[str, Tensor]
_RTOL = 1e-3  # because another machine, torch or backend rounds differently


def measure(plan: Plan, state: Any) -> Measured:
    """Measure the loss, and what functions record, at a carry and on the batch of step 0.

    Nothing is measured where the batches cannot be asked for again, nor where several ranks take each step
    together, because one of them writes and the others would not take part.
    """
    if not plan.steps or not plan.batches.repeats or plan.ranks is not None:
        return {}
    carry, lr = carry_of(state), plan.lrs[0]
    _, loss, grads = plan.step(carry, 0)
    own = plan.body.recorders.items()
    records = {name: f(carry, loss, lr, grads) for name, f in own if f not in RECORDERS.values()}
    return _named({"loss": loss} | records)


def measure_all(plan: Plan, state: Any) -> Measured:
    """Measure the loss, what functions record, and what is evaluated."""
    if plan.ranks is not None:
        return {}
    return measure(plan, state) | _named(plan.body.values(carry_of(state)))


def last(plan: Plan, step: int, values: tuple[Tree, ...]) -> Measured:
    """Return what was evaluated at the carry after a step; nothing if no block ended there."""
    if not values or step % plan.block:
        return {}
    return _named(_tree.map(lambda leaf: leaf[-1], values[-1]))


def differences(measured: Measured, again: Callable[[], Measured]) -> list[str]:
    """Say where a run measures something else at the carry where another was measured.

    A run that draws its own numbers measures something else each time, and is not compared.
    """
    once, twice = again(), again()
    return [
        f"its {name} at the carry in the file was {_value(measured[name])}, but that of this run is "
        f"{_value(once[name])}"
        for name in measured
        if name in once and not _is_close(measured[name], once[name]) and _is_close(once[name], twice[name])
    ]


def _named(values: Tree) -> Measured:
    return {dotted(path): leaf.detach().clone() for path, leaf in _tree.named_leaves(values, "")}


def _is_close(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors are equal up to rounding, in proportion to their largest entry."""
    if a.shape != b.shape:
        return False
    a, b = (leaf.to("cpu", torch.complex128 if leaf.is_complex() else torch.float64) for leaf in (a, b))
    a, b = a.nan_to_num(), b.nan_to_num()  # because the difference of two infinities is NaN
    largest = _largest(torch.maximum(a.abs(), b.abs()))
    return _largest(a - b) <= _RTOL * largest + torch.finfo(torch.float32).eps


def _largest(leaf: Tensor) -> float:
    return float(leaf.abs().max()) if leaf.numel() else 0.0


def _value(leaf: Tensor) -> str:
    """Show a number, or the dtype, shape and largest entry of an array."""
    if not leaf.ndim:
        return f"{leaf.tolist():.6g}"
    return f"{shown(leaf)} with entries up to {_largest(leaf):.6g}"
