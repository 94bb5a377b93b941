"""Chosen gradients, and a subject's answers to them."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import _tree
from .._tree import Tree
from ._claims._base import Arrays, Claim, along
from ._subject import Subject, run_linear

LRS = (0.5, 0.25, 1.0, 0.125)  # repeated: a different lr at every step, exact in binary
ALL_LRS = (*LRS, 0.0, 0.3, 2.0, 2.0**-14)  # also zero, large, small, and one that float32 rounds
_OTHER_SHAPES = ((1,), (3, 4), (2, 2, 2))  # one entry, a matrix that is no claim's, a kernel
_LONG = 105  # steps


def feeds(claim: Claim, steps: int = 10) -> dict[str, Tree]:
    """Return gradients that each show something: leaves [T, ...] of the claim's shapes, in a dict."""
    generator = np.random.default_rng(0)

    def normal() -> dict[str, np.ndarray]:
        return {
            name: generator.standard_normal((steps, *shape))
            for name, shape in zip("abc", claim.shapes, strict=True)
        }

    t = np.arange(steps)
    eps = float(getattr(claim, "eps", 0.0)) or 1e-8
    few = np.arange(6)
    factors = {
        "random": np.ones(steps),
        "impulse": (t == 0) * 1.0,
        "late": (t == steps - 1) * 1.0,
        "growing": 4.0**t,
        "shrinking": 0.25**t,
        "alternating": (-1.0) ** t,
        "large": 1e6 * 1e3**few,
        "small": eps * 0.1**few,
        "zero": 0.0 * few,
        "resting": np.where(t % 3 == 0, 1.0, 0.0),
    }
    drawn = {
        name: {k: along(factor, g) * g[: len(factor)] for k, g in normal().items()}
        for name, factor in factors.items()
    }
    constant = {k: np.broadcast_to(g[:1], g.shape).copy() for k, g in normal().items()}
    long = {"a": generator.standard_normal((_LONG, *claim.shapes[0]))}
    other = _OTHER_SHAPES if claim.shapes == Claim.shapes else claim.shapes
    shaped = dict(zip("abc", (generator.standard_normal((4, *shape)) for shape in other), strict=True))
    own = {name: dict(zip("abc", feed, strict=False)) for name, feed in claim.own_feeds().items()}
    return {
        name: {k: torch.from_numpy(np.ascontiguousarray(g)) for k, g in tree.items()}
        for name, tree in {**drawn, "constant": constant, "long": long, "shaped": shaped, **own}.items()
    }


class Seen(NamedTuple):
    """The answer of a subject to chosen gradients: leaves [T, ...], in NumPy."""

    grads: Arrays
    points: Arrays  # before every step
    lrs: np.ndarray
    moves: Arrays


def observe(subject: Subject, grads: Tree, lr: Any = None, params: Tree = None) -> Seen:
    """Feed gradients to a subject, by default with another lr at every step, and away from zero."""
    arrays = [leaf.double().numpy() for leaf in _tree.leaves(grads)]
    lrs = np.resize(ALL_LRS, len(arrays[0])) if lr is None else lr
    start = _tree.map(away_from_zero, grads) if params is None else params
    done = run_linear(subject, grads, lrs, start)
    return Seen(arrays, [x[:-1] for x in done.points], done.lrs, done.moves)


def away_from_zero(grads: Tensor) -> Tensor:
    """Return parameters −1, 0, 1, 2, … for a leaf of gradients [T, ...]."""
    g = grads[0]
    return (torch.arange(g.numel(), dtype=g.dtype) % 4 - 1).reshape(g.shape)
