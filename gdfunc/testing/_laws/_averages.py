"""Laws about the answer of a run that is not its last point."""

import numpy as np
import torch

from ... import _tree
from .._claims._averages import Averaging
from .._claims._base import Claim
from .._feeds import LRS, away_from_zero, feeds
from .._law import NotApplicable, law, require_equal
from .._subject import Subject, run_linear


@law("the closed form of the average")
def check_average(subject: Subject, claim: Claim) -> None:
    """Check the answers of a subject against the claim's average of its own points.

    Two runs on linear losses: random gradients with another lr at every step; and gradients of −1 with
    lr = 1 from zero, under which gradient descent walks along xⱼ = j.
    """
    if not isinstance(claim, Averaging):
        raise NotApplicable("its answer is its last point")
    random = feeds(claim)["random"]
    unit = _tree.map(lambda g: torch.full_like(g, -1.0), random)
    zero = _tree.map(lambda g: torch.zeros_like(g[0]), random)
    lrs = np.resize(LRS, len(random["a"]))
    runs = {
        "random gradients": (random, lrs, _tree.map(away_from_zero, random)),
        "gradients of -1, lr = 1": (unit, 1.0, zero),
    }
    for name, (grads, rates, start) in runs.items():
        done = run_linear(subject, grads, rates, start)
        arrays = [leaf.numpy() for leaf in _tree.leaves(grads)]
        expected = claim.average(arrays, done.points, done.lrs)
        paths = [path for path, _ in _tree.named_leaves(grads, "params")]
        for path, answer, wanted, x in zip(paths, done.results, expected, done.points, strict=True):
            formula = f"{claim.formula}, {claim!r}, {name}"
            scale = np.abs(x).max(initial=0.0)
            require_equal(answer, wanted, formula, scale=scale, where=f"answer for {path}", first=0)
