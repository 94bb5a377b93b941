"""A problem: a loss and all that is known about its minimum."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from .._tree import Tree


class Problem(NamedTuple):
    """A loss, a place to start, and what is known about the minimum.

    Attributes:
        loss_fn: `(params, batch) -> loss`, 0-d; for all of the data pass `data`.
        params: where to start; the customary point where there is one.
        data: tensors with samples on dim 0, or None.
        minimizers: every known global minimiser, each a tree like params.
        minimum: the loss at a minimiser, over all of the data.
        L: the largest eigenvalue that the Hessian has anywhere; None where it is unbounded.
        mu: the infimum of its smallest eigenvalue; 0 for a loss that is convex but not strongly,
            None for one that is not convex.

    Example:
        >>> problem = gd.problems.himmelblau()
        >>> [problem.loss_fn(x, problem.data).item() < 1e-29 for x in problem.minimizers]
        [True, True, True, True]
    """

    loss_fn: Callable[..., Tensor]
    params: Tree
    data: Tree | None
    minimizers: tuple[Tree, ...]
    minimum: float
    L: float | None = None
    mu: float | None = None
