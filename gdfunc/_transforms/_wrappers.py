"""Transformations of transformations: where they apply, and when."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _tree
from .._errors import check_int, warn
from .._tree import Tree
from ._base import (
    PLAIN,
    GradientTransformation,
    check_transform,
    each_leaf,
    no_steps,
    stateful,
    stateless,
    transformation,
    zeros,
)

Labels = Tree | Callable[[Tree], Tree]


@transformation
def masked(transform: GradientTransformation, mask: Labels) -> GradientTransformation:
    """Apply a transformation to some leaves; the gradients of the others pass as they are.

    Args:
        transform: what to apply.
        mask: a tree of bools like params, or a function that makes it of params.

    Raises:
        ValueError: the mask is not like params.
        TypeError: an entry of the mask is no bool.

    Example:
        >>> transform = gd.masked(gd.scale(0.0), {"w": True, "b": False})
        >>> grads = {"w": torch.tensor(1.0), "b": torch.tensor(2.0)}
        >>> transform.update(grads, transform.init(grads), grads)[0]
        {'w': tensor(0.), 'b': tensor(2.)}
    """
    check_transform(transform)
    return _split({True: transform, False: PLAIN}, mask, "mask")


@transformation
def freeze(mask: Labels) -> GradientTransformation:
    """Keep some parameters where they are.

    u = 0 for what is frozen, else g

    It must come last in a chain: weight decay after it would move the parameters all the same.

    Args:
        mask: a tree of bools like params, True for what is frozen, or a function that makes it of params.

    Raises:
        TypeError, ValueError: as `masked`.

    Example:
        >>> transform = gd.freeze({"w": True, "b": False})
        >>> grads = {"w": torch.tensor(1.0), "b": torch.tensor(2.0)}
        >>> transform.update(grads, transform.init(grads), grads)[0]
        {'w': tensor(0.), 'b': tensor(2.)}
    """
    return masked(stateless(torch.zeros_like), mask)


@transformation
def partition(transforms: Mapping[Any, GradientTransformation], labels: Labels) -> GradientTransformation:
    """Give groups of parameters a transformation each, and with `scale` in it a learning-rate factor.

    Args:
        transforms: label -> transformation.
        labels: a tree of labels like params, or a function that makes it of params.

    Returns:
        A transformation whose state is a dict of theirs. Each sees its own leaves alone, so a global norm
        is that of the group.

    A label that no leaf has is warned of in `init`: it is often misspelt.

    Raises:
        TypeError: `transforms` is no dict of transformations.
        ValueError: the labels are not like params, or a leaf has a label without a transformation.

    Example:
        >>> rules = {"body": gd.momentum(0.9), "head": gd.scale(10.0)}
        >>> transform = gd.partition(rules, {"w": "body", "b": "head"})
        >>> grads = {"w": torch.tensor(1.0), "b": torch.tensor(2.0)}
        >>> transform.update(grads, transform.init(grads), grads)[0]
        {'w': tensor(1.), 'b': tensor(20.)}
    """
    if not isinstance(transforms, Mapping):
        raise TypeError(
            f"transforms must be a dict label -> transformation; got {type(transforms).__name__}"
        )
    for label, transform in transforms.items():
        check_transform(transform, f"transforms[{label!r}]")
    return _split(dict(transforms), labels, "labels")


def _split(
    transforms: dict[Any, GradientTransformation], labels: Labels, name: str
) -> GradientTransformation:
    """Route each leaf to the transformation of its label."""

    def labels_of(tree: Tree) -> list[Any]:
        # A NamedTuple with a `__call__` is a tree of labels all the same.
        is_function = callable(labels) and _tree.leaves(labels) == [labels]
        made = labels(tree) if is_function else labels
        listed = _tree.check_structure(made, tree, name, "params")
        for (path, _), label in zip(_tree.named_leaves(tree, name), listed, strict=True):
            if name == "mask" and not isinstance(label, bool):
                raise TypeError(f"{path} is {label!r}; it must be True or False")
            if label not in transforms:
                known = ", ".join(map(repr, transforms))
                raise ValueError(f"{path} is {label!r}, but there are transformations for {known} only")
        return listed

    def group(tree: Tree, listed: list[Any], label: Any) -> Tree:
        """Replace all other leaves by None."""
        leaves, structure = _tree.flatten(tree)
        pairs = zip(leaves, listed, strict=True)
        return _tree.unflatten(structure, [leaf if own == label else None for leaf, own in pairs])

    def init(params: Tree) -> dict[Any, Any]:
        listed = labels_of(params)
        used = [label for label in transforms if label in listed]
        idle = [label for label in transforms if label not in listed]
        if idle and name == "labels":
            warn(
                f"no leaf of params is labelled {' or '.join(map(repr, idle))}, so a transformation of "
                f"partition does nothing; the labels met are {', '.join(map(repr, used))}"
            )
        return {label: transforms[label].init(group(params, listed, label)) for label in used}

    def update(grads: Tree, state: dict[Any, Any], params: Tree = None) -> tuple[Tree, dict[Any, Any]]:
        listed = labels_of(grads if params is None else params)
        updates, new_state = {}, {}
        for label, memory in state.items():
            own = None if params is None else group(params, listed, label)
            moved, new_state[label] = transforms[label].update(group(grads, listed, label), memory, own)
            updates[label] = iter(_tree.leaves(moved))
        structure = _tree.flatten(grads)[1]
        return _tree.unflatten(structure, [next(updates[label]) for label in listed]), new_state

    return GradientTransformation(init, update)


class ApplyIfFiniteState(NamedTuple):
    inner: Any
    consecutive: Tensor
    total: Tensor


@transformation
def apply_if_finite(transform: GradientTransformation) -> GradientTransformation:
    """Skip a step whose gradient holds NaN or infinity, and count it.

    u = update(g) if all of g is finite, else 0 and the state of the transformation stays

    Parameters and state keep their bits in a skipped step; only the counts change: `consecutive`, how many
    steps in a row were skipped up to now, and `total`. Buffers of a `stateful` loss belong to no
    transformation: a batch with NaN spoils the running statistics of batch normalisation, as in torch.

    Args:
        transform: what to apply.

    Example:
        >>> transform = gd.apply_if_finite(gd.momentum(0.9))
        >>> state = transform.init(torch.tensor(0.0))
        >>> u, state = transform.update(torch.tensor(float("nan")), state)
        >>> u, state.total
        (tensor(0.), tensor(1))
    """

    check_transform(transform)

    def init(params: Tree) -> ApplyIfFiniteState:
        return ApplyIfFiniteState(transform.init(params), no_steps(params), no_steps(params))

    def update(
        grads: Tree, state: ApplyIfFiniteState, params: Tree = None
    ) -> tuple[Tree, ApplyIfFiniteState]:
        finite = torch.ones_like(state.total, dtype=torch.bool)
        for leaf in _tree.leaves(grads):
            finite = finite & leaf.isfinite().all()
        # Because NaN in the branch not taken would make the derivative NaN, it gets zeros.
        safe = _tree.where(finite, grads, zeros(grads))
        updates, inner = _update_where(finite, transform, safe, state.inner, params)
        counts = (state.consecutive + 1) * ~finite, state.total + ~finite
        return updates, ApplyIfFiniteState(inner, *counts)

    return GradientTransformation(init, update)


class AccumulateState(NamedTuple):
    inner: Any
    sum: Tree
    accumulated: Tensor


@transformation
def accumulate(transform: GradientTransformation, steps: int) -> GradientTransformation:
    """Apply a transformation to the mean of every k gradients: a k times larger batch in the same memory.

    u = update((g₁ + … + gₖ)/k) in every k-th step, else 0

    Transformations after it in a chain still act in every step, so put the whole chain inside. Batch
    normalisation sees each of the k batches alone, as in a torch loop that accumulates: it normalises by
    the statistics of one, and updates its running statistics k times.

    Args:
        transform: what to apply.
        steps: k.

    Raises:
        ValueError: k is no int >= 1.

    Example:
        >>> transform = gd.accumulate(gd.chain(), 2)
        >>> state = transform.init(torch.tensor(0.0))
        >>> first, state = transform.update(torch.tensor(1.0), state)
        >>> second, state = transform.update(torch.tensor(3.0), state)
        >>> first, second
        (tensor(0.), tensor(2.))
    """
    check_transform(transform)
    steps = check_int("steps", steps, 1)

    def init(params: Tree) -> AccumulateState:
        return AccumulateState(transform.init(params), zeros(params), no_steps(params))

    def update(grads: Tree, state: AccumulateState, params: Tree = None) -> tuple[Tree, AccumulateState]:
        _, total = each_leaf(lambda g, s: (g, s + g), grads, state.sum)
        complete = state.accumulated + 1 == steps
        mean = _tree.map(lambda s: s / steps, total)
        updates, inner = _update_where(complete, transform, mean, state.inner, params)
        rest = _tree.where(complete, zeros(total), total)
        return updates, AccumulateState(inner, rest, (state.accumulated + 1) % steps)

    return stateful(AccumulateState, init, update)


def _update_where(
    condition: Tensor, transform: GradientTransformation, grads: Tree, state: Any, params: Tree
) -> tuple[Tree, Any]:
    """Update where a condition holds. Elsewhere the updates are zero and the state stays."""
    updates, new_state = transform.update(grads, state, params)
    return _tree.where(condition, updates, zeros(updates)), _tree.where(condition, new_state, state)
