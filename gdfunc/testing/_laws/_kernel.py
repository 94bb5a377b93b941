"""The strongest law of every family: chosen gradients in, known moves out."""

import numpy as np

from ... import _tree
from ..._tree import Tree
from .._claims._base import Claim
from .._feeds import feeds, observe
from .._law import NotApplicable, law, require_equal
from .._subject import Subject


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
    if not claim.is_of_gradients():
        raise NotApplicable("its moves depend on more than gradients")
    for name, tree in ({"given": grads} if grads is not None else feeds(claim)).items():
        paths = [path for path, _ in _tree.named_leaves(tree, "params")]
        seen = observe(subject, tree, lr, params)
        expected = claim.moves(seen.grads, seen.points, seen.lrs)
        for path, move, wanted, x in zip(paths, seen.moves, expected, seen.points, strict=True):
            scale = np.maximum(np.abs(x), np.abs(wanted).max(initial=0.0))
            formula = f"{claim.formula}, {claim!r}, {name} gradients"
            require_equal(move, wanted, formula, scale=scale, slack=claim.slack, where=f"move of {path}")
