"""The strongest law of every family: chosen gradients in, known moves out."""

from typing import Any

import numpy as np
import torch

from ... import _tree
from ..._tree import Tree
from .._claims._base import Arrays, Claim
from .._feeds import feeds, observe
from .._law import NotApplicable, law, require_equal
from .._subject import Subject


@law("linear losses as system identification; the rule's closed form")
def check_kernel(
    subject: Subject, claim: Claim, grads: Tree = None, lr: object = None, params: Tree = None
) -> None:
    """Check the moves on linear losses against the claim's closed form.

    fₜ(θ) = ⟨gₜ, θ⟩: the gradient does not depend on θ, so the moves are the optimizer's whole answer to
    g₁ … g_T. A wrong factor, sign, order, count, correction or leaf shows here. With eps = 0 a quotient
    0/0 counts as 0, so that parameters stay finite.

    Args:
        subject: the subject.
        claim: what it says that it is.
        grads: leaves [T, ...], used in float64; None: a dozen sequences, each of which shows something.
        lr: a number or one per step; None: another one at every step.
        params: where to start, leaves [...], used in float64; None: a point away from zero.

    Example:
        >>> from gdfunc import testing as gt
        >>> adam = gt.from_torch(lambda params: torch.optim.Adam(params, betas=(0.5, 0.9)))
        >>> gt.check_kernel(adam, gt.Adam(betas=(0.5, 0.9)))
        >>> gt.check_kernel(adam, gt.Adam(betas=(0.5, 0.9)), grads=torch.tensor([1.0, -2.0, 0.5]), lr=0.1)
    """
    if not claim.is_of_gradients():
        raise NotApplicable("it has no closed form of the gradients alone")
    grads, params = (None if tree is None else _tree.map(_doubled, tree) for tree in (grads, params))
    for name, tree in ({"given": grads} if grads is not None else feeds(claim)).items():
        paths = [path for path, _ in _tree.named_leaves(tree, "params")]
        seen = observe(subject, tree, lr, params)
        expected = claim.moves(seen.grads, seen.points, seen.lrs)
        if not _is_finite(expected) and _is_finite([*seen.grads, *seen.points]):
            raise ValueError(
                f"{claim!r} has no finite answer to {name} gradients; is a hyperparameter out of range?"
            )
        for path, move, wanted, x in zip(paths, seen.moves, expected, seen.points, strict=True):
            scale = np.maximum(np.abs(x), np.abs(wanted).max(initial=0.0))
            formula = f"{claim.formula}, {claim!r}, {name} gradients"
            require_equal(move, wanted, formula, scale=scale, slack=claim.slack, where=f"move of {path}")


def _doubled(leaf: Any) -> torch.Tensor:
    return torch.as_tensor(leaf, dtype=torch.float64)


def _is_finite(arrays: Arrays) -> bool:
    return all(np.isfinite(array).all() for array in arrays)
