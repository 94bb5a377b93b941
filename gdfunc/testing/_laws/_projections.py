"""The law of projections."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ... import _tree
from ..._tree import Tree
from .._claims._base import Arrays, join, split
from .._law import law, require_at_most, require_equal

_SCALES = (0.0, 2.0**-8, 0.25, 1.0, 4.0, 2.0**8)
_SHAPES = {"a": (3,), "b": (2, 4)}


@law("H. H. Bauschke, P. L. Combettes 2011, theorem 3.16", of_optimizers=False)
def check_projection(
    projection: Callable[[Tree], Tree], params: Tree = None, *, inside: Tree = None
) -> None:
    """Check that a function gives the nearest point of a convex set.

    ⟨x − P(x), P(y) − P(x)⟩ <= 0 for all x and y

    A function with this property is the projection onto the set of its values. So it changes none of them,
    and brings no two points further apart. The law tries all pairs among 48 points: some of several sizes,
    their projections, and points close to those.

    Args:
        projection: `params -> params`.
        params: a tree with the shapes to try; None: a vector and a matrix.
        inside: a point of the set, which must stay what it is.

    Raises:
        LawBroken: two points break the inequality, or the point of the set moves.

    Example:
        >>> from gdfunc import testing as gt
        >>> gt.check_projection(gd.projections.box(-1.0, 1.0))
        >>> try:
        ...     gt.check_projection(lambda params: gd.tree.map(torch.tanh, params))
        ... except gt.LawBroken as broken:
        ...     print(broken.formula)
        <x - P(x), P(y) - P(x)> <= 0 for all x and y, as a share of the product of their lengths
    """
    if params is None:
        params = (
            inside if inside is not None else {key: torch.zeros(shape) for key, shape in _SHAPES.items()}
        )
    like = [np.zeros((1, *leaf.shape)) for leaf in _tree.leaves(params)]
    structure = _tree.flatten(params)[1]

    def apply(vectors: np.ndarray) -> np.ndarray:
        return np.concatenate([_of_one(row, like) for row in vectors])

    def _of_one(vector: np.ndarray, like: Arrays) -> np.ndarray:
        leaves = [torch.from_numpy(leaf[0].copy()) for leaf in split(vector[None], like)]
        found: Any = projection(_tree.unflatten(structure, leaves))
        return join([leaf.detach().double().numpy()[None] for leaf in _tree.leaves(found)])

    generator = np.random.default_rng(0)
    size = join(like).shape[1]
    first = np.concatenate([scale * generator.standard_normal((2, size)) for scale in _SCALES])
    on = apply(first)
    near = [on + scale * generator.standard_normal(on.shape) for scale in (2.0**-10, 0.25)]
    x = np.concatenate([first, on, *near])
    nearest = apply(x)
    away, between = x - nearest, nearest[None] - nearest[:, None]
    products = np.einsum("ik,ijk->ij", away, between)
    lengths = np.linalg.norm(away, axis=1)[:, None] * np.linalg.norm(between, axis=2)
    # Rounding moves x, its projection and that of y.
    sizes, distance = 1 + np.linalg.norm(x, axis=1), np.linalg.norm(between, axis=2)
    far = np.linalg.norm(away, axis=1)[:, None]
    rounding = 1e-13 * (sizes[:, None] * (far + distance) + sizes[None] * far)
    shares = np.divide(products - rounding, lengths, out=np.zeros_like(products), where=lengths > 0)
    formula = "<x - P(x), P(y) - P(x)> <= 0 for all x and y, as a share of the product of their lengths"
    require_at_most(shares.max(), 0.0, formula, scale=1.0)
    if inside is not None:
        point = join([leaf.detach().double().numpy()[None] for leaf in _tree.leaves(inside)])
        require_equal(apply(point)[0], point[0], "P(x) = x for a point of the set", scale=1.0, where="P(x)")
