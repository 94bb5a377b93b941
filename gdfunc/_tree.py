"""Trees of tensors: nested dicts, lists, tuples and NamedTuples whose leaves are tensors.

The only module that knows torch's pytree. `None` is an empty node, as in JAX: every function here
keeps it and hands it to no callback.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as _pytree
from torch import Tensor

from . import _numerics
from ._errors import check_tensor
from ._torch._autograd import is_followed
from ._torch._modes import storage
from ._torch._transforms import is_transformed, unwrapped

Tree = Any
# A tree without its leaves: for a node its kind, the context that rebuilds it, and its parts. Plain tuples,
# because they are made, compared and hashed on every call of a compiled loop.
Structure = Any
_LEAF = "leaf"


def flatten(tree: Tree) -> tuple[list[Any], Structure]:
    """Split a tree into its leaves and its structure."""
    found: list[Any] = []
    return found, _split(tree, found)


def _split(tree: Tree, found: list[Any]) -> Structure:
    """Add the leaves to those found; return the rest."""
    if tree is None:
        return None
    node = _opened(tree)
    if node is None:
        found.append(tree)
        return _LEAF
    kind, context, children = node
    parts = []
    for child in children:
        if type(child) is Tensor:  # most are, and a call for each takes twice the time
            found.append(child)
            parts.append(_LEAF)
        else:
            parts.append(_split(child, found))
    return kind, context, tuple(parts)


def _opened(tree: Tree) -> tuple[type, Any, Iterable[Any]] | None:
    """Return a node's kind, the context that rebuilds it, and its children, or None for a leaf."""
    kind = type(tree)
    if kind is dict:
        return kind, tuple(tree), tree.values()
    if kind is tuple or kind is list or (issubclass(kind, tuple) and _is_named(kind)):
        return kind, None, tree
    registered = _pytree.SUPPORTED_NODES.get(kind)
    if registered is None:
        return None
    children, context = registered.flatten_fn(tree)
    return kind, _Context(context), children


class _Context:
    """The context from which a registered class rebuilds a node. It can be compared, but need not hash."""

    def __init__(self, it: Any) -> None:
        self.it = it

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Context) and bool(self.it == other.it)

    def __hash__(self) -> int:
        return 0


@lru_cache(4096)
def _is_named(kind: type) -> bool:
    return _pytree.is_namedtuple_class(kind)


def unflatten(structure: Structure, leaves: Iterable[Any]) -> Tree:
    """Put leaves back into a structure: the inverse of `flatten`."""
    return _joined(structure, iter(leaves))


def _joined(structure: Structure, leaves: Iterator[Any]) -> Tree:
    if structure is None:
        return None
    if structure is _LEAF:
        return next(leaves)
    kind, context, parts = structure
    children = [next(leaves) if part is _LEAF else _joined(part, leaves) for part in parts]
    if kind is dict:
        return dict(zip(context, children, strict=True))
    if context is None:
        return kind(children) if kind is tuple or kind is list else kind(*children)
    return _pytree.SUPPORTED_NODES[kind].unflatten_fn(children, context.it)


def nodes(structure: Structure) -> list[tuple[Any, ...]]:
    """List the nodes that are no plain tuples, lists or dicts of texts: each with its kind and context."""
    if structure is None or structure is _LEAF:
        return []
    kind, context, parts = structure
    found: list[tuple[Any, ...]] = [node for part in parts if part is not _LEAF for node in nodes(part)]
    if kind is tuple or kind is list:
        return found
    if isinstance(context, _Context):
        found.append((kind, context.it))
    elif context is not None and not {type(key) for key in context} <= {str}:
        found.append((kind, *context))
    elif kind is not dict:
        found.append((kind,))
    return found


def children(tree: Tree) -> list[Any] | None:
    """List the children of a node; None for a leaf."""
    node = _opened(tree)
    return None if node is None else list(node[2])


def leaves(tree: Tree) -> list[Any]:
    """List the leaves of a tree, in the order in which its containers hold them.

    Example:
        >>> gd.tree.leaves({"w": torch.tensor(1.0), "b": (torch.tensor(2.0), None)})
        [tensor(1.), tensor(2.)]
    """
    found: list[Any] = []
    _gather(tree, found)
    return found


def _gather(tree: Tree, found: list[Any]) -> None:
    """Add the leaves to those found."""
    if tree is None:
        return
    node = _opened(tree)
    if node is None:
        found.append(tree)
        return
    for child in node[2]:
        if type(child) is Tensor:
            found.append(child)
        else:
            _gather(child, found)


def tensors(tree: Tree) -> list[Tensor]:
    """List the leaves that are tensors."""
    return [leaf for leaf in leaves(tree) if isinstance(leaf, Tensor)]


def slots(tree: Tree) -> list[Any]:
    """List the leaves of a tree and the Nones among them."""
    node = None if tree is None else _opened(tree)
    if node is None:
        return [tree]
    found: list[Any] = []
    for child in node[2]:
        found += (child,) if type(child) is Tensor else slots(child)
    return found


def slot_path(tree: Tree, name: str, position: int) -> str:
    """Write the path of a slot as in Python: `params['layer1']['w']`."""
    return name + _pytree.keystr(_pytree.tree_flatten_with_path(tree)[0][position][0])


def named_leaves(tree: Tree, name: str) -> list[tuple[str, Any]]:
    """List the leaves, each with its path."""
    pairs, _ = _pytree.tree_flatten_with_path(tree)
    return [(name + _pytree.keystr(path), slot) for path, slot in pairs if slot is not None]


def match(structure: Structure, tree: Tree) -> list[Any] | None:
    """List the leaves of `tree` in the order of `structure`, or None if it has another structure.

    The keys of a dict may stand in another order.
    """
    found, own = flatten(tree)
    if own == structure:
        return found
    ordered: list[Any] = []
    return ordered if _follow(structure, tree, ordered) else None


def _follow(structure: Structure, tree: Tree, found: list[Any]) -> bool:
    """Add the leaves to those found, as long as the tree has this structure."""
    if tree is None or structure is None:
        return tree is structure
    node = _opened(tree)
    if node is None or structure is _LEAF:
        found.append(tree)
        return node is None and structure is _LEAF
    kind, context, parts = structure
    own_kind, own_context, children = node
    if {kind, own_kind} <= _DICTS:
        keys = _keys(kind, context)
        if set(keys) != set(tree):
            return False
        children = [tree[key] for key in keys]
    elif (own_kind, own_context) != (kind, context):
        return False
    children = list(children)
    same = len(children) == len(parts)
    return same and all(_follow(part, child, found) for part, child in zip(parts, children, strict=True))


_DICTS = {dict, OrderedDict, defaultdict}


def _keys(kind: type, context: Any) -> Sequence[Any]:
    if kind is dict:
        return context
    return context.it[1] if kind is defaultdict else context.it


def check_structure(tree: Tree, reference: Tree, name: str, reference_name: str) -> list[Any]:
    """Return the leaves of `tree` in the order of `reference`, whose structure it must have.

    Raises:
        ValueError: it has another; the message names the missing and the unexpected leaves.
    """
    matched = match(flatten(reference)[1], tree)
    if matched is None:
        detail = differences(tree, reference, name, reference_name)
        raise ValueError(f"{name} does not have the structure of {reference_name}: {detail}")
    return matched


def check_tensors(tree: Tree, name: str) -> None:
    """Refuse a tree with a leaf that is no tensor."""
    if not all(isinstance(leaf, Tensor) for leaf in leaves(tree)):
        for path, leaf in named_leaves(tree, name):
            check_tensor(leaf, path)


def check_like(tree: Tree, reference: Tree, name: str, reference_name: str) -> list[Tensor]:
    """Return the tensors of `tree` in the order of `reference`, whose structure and shapes it must have."""
    matched = check_structure(tree, reference, name, reference_name)
    pairs = zip(matched, leaves(reference), strict=True)
    if all(isinstance(leaf, Tensor) and leaf.shape == wanted.shape for leaf, wanted in pairs):
        return matched  # without the paths, which take most of the time
    for (path, wanted), leaf in zip(named_leaves(reference, ""), matched, strict=True):
        check_tensor(leaf, name + path)
        if leaf.shape != wanted.shape:
            got, shape = tuple(leaf.shape), tuple(wanted.shape)
            raise ValueError(f"{name}{path} has shape {got} but {reference_name}{path} has {shape}")
    return matched


def differences(tree: Tree, reference: Tree, name: str, reference_name: str) -> str:
    """Say which leaves of `reference` are missing in `tree`, unexpected in it, or of another shape."""
    wanted = dict(named_leaves(reference, ""))
    found = dict(named_leaves(tree, ""))
    missing = [reference_name + path for path in wanted if path not in found]
    unexpected = [name + path for path in found if path not in wanted]
    reshaped = [
        f"{name}{path} has shape {tuple(leaf.shape)} but {reference_name}{path} has {tuple(other.shape)}"
        for path, leaf in found.items()
        if isinstance(leaf, Tensor) and isinstance(other := wanted.get(path), Tensor)
        if leaf.shape != other.shape
    ]
    said = [f"missing {', '.join(missing)}"] if missing else []
    said += [f"unexpected {', '.join(unexpected)}"] if unexpected else []
    return "; ".join(said + reshaped) or "containers of other types"


def map(f: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Apply `f` leaf by leaf to trees of one structure, and build the tree of the results.

    Raises:
        ValueError: the trees differ in structure.

    Example:
        >>> params, grads = {"w": torch.tensor(1.0)}, {"w": torch.tensor(4.0)}
        >>> gd.tree.map(lambda p, g: p - 0.1 * g, params, grads)
        {'w': tensor(0.6000)}
    """
    first, structure = flatten(tree)
    if not rest:
        return unflatten(structure, [f(leaf) for leaf in first])
    others = [
        match(structure, other) or check_structure(other, tree, f"trees[{i}]", "trees[0]")
        for i, other in enumerate(rest, 1)
    ]
    return unflatten(structure, [f(*group) for group in zip(first, *others, strict=True)])


def lerp(a: Tree, b: Tree, share: Any) -> Tree:
    """Go from a to b by a share of the way: (1 − share)·a + share·b."""
    return map(lambda x, y: torch.lerp(x, y, _numerics.like(share, x)), a, b)


def where(condition: Tensor, yes: Tree, no: Tree) -> Tree:
    """Take one tree where a 0-d condition holds, the other where not."""
    return map(lambda a, b: torch.where(condition, a, b), yes, no)


def cat(trees: Sequence[Tree]) -> Tree:
    """Concatenate trees of one structure leaf by leaf along the leading axis; one alone stays as it is."""
    return map(lambda *group: torch.cat(group), *trees) if len(trees) > 1 else trees[0]


def clone(tree: Tree) -> Tree:
    """Copy every leaf into storage of its own."""
    return map(torch.clone, tree)


def unshare(tree: Tree, others: Sequence[Tensor]) -> Tree:
    """Copy those leaves whose storage another leaf before them, or one of `others`, holds too."""
    held = {storage(leaf) for leaf in others if not is_transformed(leaf)}

    def own(leaf: Tensor) -> Tensor:
        if is_transformed(leaf):
            return leaf
        if storage(leaf) in held:
            return leaf.clone()
        held.add(storage(leaf))
        return leaf

    return map(own, tree)


def as_tensors(tree: Tree) -> Tree:
    """Turn NumPy arrays among the leaves into tensors."""
    return map(lambda leaf: _numerics.from_numpy(leaf) if isinstance(leaf, np.ndarray) else leaf, tree)


def unwrap(tree: Tree) -> Tree:
    """Take the tensors out of all running transformations; a vmapped axis becomes a leading axis."""
    return map(lambda leaf: unwrapped(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def detach(tree: Tree) -> Tree:
    """Cut every leaf from autograd's graph, but not from a gradient or transformation that is running."""

    def outside(leaf: Any) -> Any:
        return leaf.detach() if isinstance(leaf, Tensor) and not is_followed(leaf) else leaf

    return map(outside, tree)


def cut(tree: Tree) -> Tree:
    """Make every leaf a constant to all derivatives, those of torch.func too."""
    return map(lambda leaf: leaf.detach(), tree)


def overlap(leaves: Sequence[Tensor]) -> tuple[int, int] | None:
    """Find two leaves that have memory in common; None if there are none.

    Disjoint views of one buffer have none. Tensors that a transformation or a gradient follows are not
    looked at.
    """
    storages = {i: storage(leaf) for i, leaf in enumerate(leaves) if not is_followed(leaf)}
    if len(set(storages.values())) == len(storages):
        return None
    owners: dict[int, list[int]] = {}
    for i, place in storages.items():
        owners.setdefault(place, []).append(i)
    for group in owners.values():
        spans = sorted(_span(leaves[i]) for i in group)
        if all(end <= start for (_, end), (start, _) in pairwise(spans)):
            continue
        for i, j in combinations(group, 2):
            if not _places(leaves[i]).isdisjoint(_places(leaves[j])):
                return i, j
    return None


def _span(leaf: Tensor) -> tuple[int, int]:
    """Return the first byte of a tensor in its storage, and the first after it."""
    steps = sum((size - 1) * stride for size, stride in zip(leaf.shape, leaf.stride(), strict=True))
    start = int(leaf.storage_offset()) * leaf.element_size()
    return start, start + (int(steps) + 1) * leaf.element_size()


def _places(leaf: Tensor) -> set[int]:
    """Return the bytes in the storage at which the entries of a tensor start."""
    entries = np.array(leaf.storage_offset())
    for size, stride in zip(leaf.shape, leaf.stride(), strict=True):
        entries = np.add.outer(entries, np.arange(size) * stride)
    return set((entries * leaf.element_size()).flatten().tolist())


def dot(a: Tree, b: Tree) -> Tensor:
    """Compute the inner product Σ aᵢ bᵢ over all leaves, 0-d.

    Raises:
        ValueError: the trees differ in structure.

    Example:
        >>> gd.tree.dot({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 4.0])})
        tensor(11.)
    """
    products = leaves(map(lambda x, y: (x * y).sum(), a, b))
    return torch.stack(products).sum() if products else torch.zeros(())


def norm(tree: Tree) -> Tensor:
    """Compute the Euclidean norm √Σ aᵢ² over all leaves, 0-d.

    It neither overflows nor underflows while the result is within range.

    Example:
        >>> gd.tree.norm({"w": torch.tensor([3.0]), "b": torch.tensor(4.0)})
        tensor(5.)
    """
    return _numerics.norm(leaves(tree))


def ravel(tree: Tree, dtype: torch.dtype | None = None) -> Tensor:
    """Join all leaves into a new vector [P], in a dtype, or the widest of theirs and at least float32."""
    parts = leaves(tree)
    dtype = dtype or _numerics.widest(parts)
    return torch.cat([leaf.flatten().to(dtype) for leaf in parts]) if parts else torch.zeros(0, dtype=dtype)


def unravel(vectors: Tensor, tree: Tree) -> Tree:
    """Put vectors [..., P] into trees like another, with leaves [..., *shape] of their own.

    jvp would write views into new tensors, in place, which a traced loop inside another cannot.
    """
    pieces = iter(vectors.split([leaf.numel() for leaf in leaves(tree)], dim=-1))
    lead = vectors.shape[:-1]
    return map(lambda leaf: next(pieces).reshape((*lead, *leaf.shape)).to(leaf.dtype, copy=True), tree)


def register(cls: type, flatten: Callable[[Any], Any], unflatten: Callable[..., Any]) -> None:
    """Make a class a node: `flatten(obj) -> dict of children`, `unflatten(dict) -> obj`."""
    _pytree.register_pytree_node(
        cls,
        lambda obj: (list(flatten(obj).values()), tuple(flatten(obj))),
        lambda children, names: unflatten(dict(zip(names, children, strict=True))),
        flatten_with_keys_fn=lambda obj: (
            [(_pytree.GetAttrKey(name), child) for name, child in flatten(obj).items()],
            tuple(flatten(obj)),
        ),
        serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
    )
