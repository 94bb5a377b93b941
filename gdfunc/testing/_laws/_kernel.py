"""The strongest law of every family: chosen gradients in, known moves out."""

import numpy as np
import torch

from ... import _tree
from ..._tree import Tree
from .._claims._base import Claim
from .._law import NotApplicable, law, require_equal
from .._subject import Subject, linear_loss, run

LRS = (0.5, 0.25, 1.0, 0.125)  # repeated: a different lr at every step, exact in binary


def feeds(claim: Claim, steps: int = 12) -> dict[str, Tree]:
    """Return gradients that each show something: leaves [T], [T, 3] and [T, 2, 3] in a dict."""
    generator = np.random.default_rng(0)

    def normal() -> dict[str, np.ndarray]:
        shapes = {"a": (), "b": (3,), "c": (2, 3)}
        return {name: generator.standard_normal((steps, *shape)) for name, shape in shapes.items()}

    t = np.arange(steps)
    eps = float(getattr(claim, "eps", 0.0)) or 1e-8
    shapes = {
        "random": np.ones(steps),
        "impulse": (t == 0) * 1.0,
        "late": (t == steps - 1) * 1.0,
        "growing": 4.0**t,
        "shrinking": 0.25**t,
        "alternating": (-1.0) ** t,
        "large": np.full(steps, 1e6),
        "small": np.full(steps, eps),
        "zero": np.zeros(steps),
        "resting": np.where(t % 3 == 0, 1.0, 0.0),
    }
    drawn = {
        name: {k: factor.reshape(-1, *[1] * (g.ndim - 1)) * g for k, g in normal().items()}
        for name, factor in shapes.items()
    }
    constant = {k: np.broadcast_to(g[:1], g.shape).copy() for k, g in normal().items()}
    long = {"a": generator.standard_normal(steps * 5)}
    return {
        name: {k: torch.from_numpy(np.ascontiguousarray(g)) for k, g in tree.items()}
        for name, tree in {**drawn, "constant": constant, "long": long}.items()
    }


@law("linear losses as system identification; the rule's closed form")
def check_kernel(
    subject: Subject, claim: Claim, grads: Tree = None, lr: object = None, params: Tree = None
) -> None:
    """Check the moves on linear losses against the claim's closed form.

    fₜ(θ) = ⟨gₜ, θ⟩: the gradient does not depend on θ, so the moves are the optimizer's whole answer to
    g₁ … g_T. A wrong factor, sign, order, count, correction or leaf shows here.

    Args:
        subject: the subject.
        claim: what it says that it is.
        grads: leaves [T, ...]; None: a dozen sequences, each of which shows something.
        lr: a number or one per step; None: another one at every step.
        params: where to start; None: a point away from zero.
    """
    if type(claim).moves is Claim.moves and type(claim).directions is Claim.directions:
        if type(claim).direction is Claim.direction:
            raise NotApplicable("its moves depend on more than gradients")
    for name, tree in ({"given": grads} if grads is not None else feeds(claim)).items():
        names, leaves = zip(*_tree.named_leaves(tree, "params"), strict=True)
        steps = len(leaves[0])
        rates = np.resize(LRS, steps) if lr is None else np.broadcast_to(np.asarray(lr, float), steps)
        start = params
        if start is None:
            start = _tree.map(
                lambda g: torch.linspace(-1.0, 2.0, max(g[0].numel(), 1), dtype=g.dtype).reshape(
                    g[0].shape
                ),
                tree,
            )
        done = run(subject, linear_loss, start, _tree.map(lambda g: g[:, None], tree), rates, steps)
        g = [leaf.double().numpy() for leaf in leaves]
        expected = claim.moves(g, [x[:-1] for x in done.points], rates)
        for path, move, wanted, x in zip(names, done.moves, expected, done.points, strict=True):
            scale = np.maximum(np.abs(x[:-1]), np.abs(wanted).max(initial=0.0))
            require_equal(
                move,
                wanted,
                f"{claim.formula}, {claim!r}, {name} gradients",
                scale=scale,
                slack=claim.slack,
                where=f"move of {path}",
            )
