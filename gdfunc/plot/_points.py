"""Paths of parameters as points: from trees to points, and from points to losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import _tree
from .._inputs import kind
from .._tree import Tree
from . import _axes
from ._axes import Array


def path(params: Tree, final: Tree) -> Tree:
    """Join the recorded and the final parameters of a run to its path.

        path = (θ₀, …, θ_{T−1}, θ_T)

    Args:
        params: tree of leaves [T, ...]: θ before each step, as in `Trajectory.params`.
        final: the same tree of leaves [...]: θ after the last step.

    Returns:
        The same tree of leaves [T+1, ...].

    Raises:
        ValueError: the trees differ in structure, or a leaf in the shape of its points.

    Example:
        >>> gd.plot.path({"w": torch.tensor([4.0, 2.0])}, {"w": torch.tensor(1.0)})
        {'w': tensor([4., 2., 1.])}
    """
    params, final = _tree.as_tensors(params), _tree.as_tensors(final)
    ends = _tree.check_structure(final, params, "final", "params")
    for (name, steps), end in zip(_tree.named_leaves(params, ""), ends, strict=True):
        if steps.ndim == 0 or steps.shape[1:] != end.shape:
            raise ValueError(
                f"params{name} has shape {tuple(steps.shape)} and final{name} {tuple(end.shape)}; "
                "params must have one axis more, of steps, in front"
            )
    return _tree.map(lambda steps, end: torch.cat([steps, end[None]]), params, final)


class Paths(NamedTuple):
    """Paths as trees of tensors [T+1, ...] and as points [T+1, P], and their names, given or not."""

    trees: list[Tree]
    points: list[Array]
    names: list[str]
    labelled: bool

    @property
    def start(self) -> Tree:
        """The first point of the first path, as a tree."""
        return _tree.map(lambda leaf: leaf[0], self.trees[0])


def check_paths(paths: Any, labels: Sequence[Any] | None) -> Paths:
    """Check a list of paths, or a dict of label -> path."""
    if isinstance(paths, dict):
        if labels is not None:
            raise ValueError("labels and a dict of paths both name the paths; give one of them")
        labels, paths = list(paths), list(paths.values())
    if not isinstance(paths, (list, tuple)):
        raise TypeError(
            "paths must be a list or tuple, also around a single one, or a dict of label -> path; "
            f"got {type(paths).__name__}"
        )
    trees = [_tensors_of(f"paths[{i}]", tree) for i, tree in enumerate(paths)]
    names = _axes.check_labels(labels, len(trees), "paths")
    points = [points_of(f"paths[{i}]", tree, trees[0]) for i, tree in enumerate(trees)]
    return Paths(trees, points, names, labels is not None)


def single_points(name: str, trees: Any, first: Tree) -> list[Array]:
    """Return trees without an axis of steps as points [1, P]."""
    tensors = [_tensors_of(f"{name}[{i}]", tree) for i, tree in enumerate(_axes.check_list(name, trees))]
    lifted = [_tree.map(lambda leaf: leaf[None], tree) for tree in tensors]
    return [points_of(f"{name}[{i}]", tree, first) for i, tree in enumerate(lifted)]


def _tensors_of(name: str, tree: Tree) -> Tree:
    """Return a tree of dense floating-point tensors."""
    for where, leaf in _tree.named_leaves(tree, name):
        is_float = isinstance(leaf, np.ndarray) and leaf.dtype.kind == "f"
        if not is_float and not (isinstance(leaf, Tensor) and leaf.is_floating_point()):
            got = f"array of {leaf.dtype}" if isinstance(leaf, np.ndarray) else kind(leaf)
            raise TypeError(f"{where} must be a floating-point tensor or array; got {got}")
        if isinstance(leaf, Tensor) and leaf.layout != torch.strided:
            raise TypeError(f"{where} must be dense; got {leaf.layout}; pass its to_dense()")
    return _tree.as_tensors(tree)


def points_of(name: str, tree: Tree, first: Tree) -> Array:
    """Return the points [T+1, P] of a path, with columns in the order of the first path's leaves."""
    leaves = _tree.check_structure(tree, first, name, "paths[0]")
    named = _tree.named_leaves(tree, name)
    lengths = {leaf.shape[0] if leaf.ndim else 0 for leaf in leaves}
    if len(lengths) != 1 or lengths == {0}:
        got = ", ".join(f"{where} {tuple(leaf.shape)}" for where, leaf in named) or "no leaves"
        raise ValueError(f"{name} must have leaves [T+1, ...] of one length T+1 >= 1; got {got}")
    if [leaf.shape[1:] for leaf in leaves] != [leaf.shape[1:] for leaf in _tree.leaves(first)]:
        raise ValueError(f"{name} must have points shaped as in paths[0]; got {shapes(tree, name)}")
    if not any(leaf[0].numel() for leaf in leaves):
        raise ValueError(f"{name} must hold a number at each point; got {shapes(tree, name)}")
    return np.concatenate([_axes.to_array(name, leaf).reshape(len(leaf), -1) for leaf in leaves], axis=1)


def shapes(tree: Tree, name: str) -> str:
    """Write the shape of a point in each leaf of a path."""
    pairs = _tree.named_leaves(tree, name)
    return "points of shape " + ", ".join(f"{where} {tuple(leaf.shape[1:])}" for where, leaf in pairs)


def scalar_names(start: Tree) -> list[str]:
    """Name each scalar as in Python, but the keys of dicts like attributes: w, b[1], params[0]."""
    names = []
    for where, leaf in _tree.named_leaves(start, ""):
        name = where.replace("['", ".").replace("']", "").removeprefix(".")
        name = f"params{name}" if name[:1] in ("", "[") else name
        single = leaf.numel() == 1
        names += [name if single else f"{name}{list(index)}" for index in np.ndindex(*leaf.shape)]
    return names


Losses = Callable[[Array], Array]  # of points [n, ...] -> [n]


def evaluate(at: Callable[[Tensor], Tensor], points: Array, device: Any, chunk_size: int | None) -> Array:
    """Return the losses [n] at points [n, P] by one batched call; NaN where a point is not finite."""

    def checked(point: Tensor) -> Tensor:
        value = at(point)
        is_tensor = isinstance(value, Tensor)
        if not is_tensor or value.shape != () or value.is_complex():
            got = f"shape {tuple(value.shape)}, {value.dtype}" if is_tensor else type(value).__name__
            raise ValueError(f"loss must return a 0-d real tensor; got {got}")
        return value

    finite = np.isfinite(points).all(axis=1)
    losses = np.full(len(points), np.nan)
    if finite.any():
        places = torch.from_numpy(points[finite]).to(device)
        with torch.no_grad():
            losses[finite] = _axes.to_array("loss", torch.func.vmap(checked, chunk_size=chunk_size)(places))
    return losses


def box_around(inside: Array, padding: float) -> Array:
    """Return the lower and the upper corner of a box round points, padded by a share of its spans."""
    if len(inside) == 0:
        inside = np.zeros((1, inside.shape[1]))
    low, high = inside.min(axis=0), inside.max(axis=0)
    middle, half = (low + high) / 2, (high - low) / 2
    # An axis along which nothing moved gets the width of the other, or more if rounding swallows that.
    still = half <= 1e-9 * np.abs(middle)
    half[still] = np.maximum(half.max() or 1.0, 1e-3 * np.abs(middle))[still]
    half = (1 + 2 * padding) * half
    return np.stack([middle - half, middle + half])


def check_limits(limits: Any) -> Array:
    """Return the lower and the upper corner."""
    pairs = _axes.to_array("limits", limits)
    if pairs.shape != (2, 2) or not np.isfinite(pairs).all() or not (pairs[:, 0] < pairs[:, 1]).all():
        raise ValueError(f"limits must be ((low, high), (low, high)) with low < high; got {limits!r}")
    return pairs.T


def is_inside(points: Array, box: Array) -> Array:
    return ((points >= box[0]) & (points <= box[1])).all(axis=1)


def count_scalars(start: Tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in _tree.leaves(start))
