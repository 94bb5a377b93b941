"""Trees as tensors by name and JSON, and trees made from these.

The name of a tensor is its path, `params.layer1.w`. A full stop or backslash in a key has a backslash
before it, and a key that is empty or no text is written as `\\#1`, so that no two leaves have one name. The
key `__metadata__`, which safetensors has for itself, has a backslash before it too.
JSON holds the rest, a list for each node: its kind, and its value, its layout in memory, or its children
by label.

    ["none"]   ["value", 0.5]   ["tensor", {}]   ["TrainState", [["params", ["tensor", {}]], …]]
"""

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .. import _tree
from .._shown import shown
from .._torch._modes import storage
from .._torch._transforms import is_transformed
from .._tree import Tree
from ._file import CheckpointError

Node = Any  # what JSON holds
_PLAIN = (bool, int, float, str)
_WHOLE = "tensor"  # the name of a tensor that is the whole tree
_SHOWN = 5  # differences
_LEAVES = ("none", "value", "tensor")
_CONTAINERS: dict[str, Callable[[dict[Any, Any]], Any]] = {
    "list": lambda children: [*children.values()],
    "tuple": lambda children: (*children.values(),),
    "dict": dict,
    "OrderedDict": OrderedDict,
}

# Classes that are made of trees: by name, what one is made of, and how.
_classes: dict[str, tuple[type, Callable[[Any], dict[str, Any]], Callable[..., Any]]] = {}


def _attributes(obj: Any) -> dict[str, Any]:
    return {name: part for name, part in vars(obj).items() if not name.startswith("__")}  # as __notes__


def register(
    cls: type, parts: Callable[[Any], dict[str, Any]] = _attributes, make: Callable[..., Any] | None = None
) -> None:
    """Let files hold a class: `parts(obj) -> dict of trees`, `make(**dict) -> obj`."""
    _classes[cls.__name__] = cls, parts, make or cls


def describe(tree: Tree, name: str = "") -> tuple[Node, dict[str, Tensor]]:
    """Split a tree, or the part of one that has a name, into JSON and tensors by name.

    Raises:
        CheckpointError: a leaf is no tensor with values, number, text or bool; the tree has no end.
    """
    tensors: dict[str, Tensor] = {}
    try:
        return _described(tree, name, tensors), tensors
    except RecursionError:
        place = name or "the tree"
        raise CheckpointError(f"{place} is nested too deeply for a file, or contains itself") from None


def _described(tree: Any, name: str, tensors: dict[str, Tensor]) -> Node:
    if tree is None:
        return ["none"]
    if isinstance(tree, Tensor):
        tensors[name or _WHOLE], layout = _stored(tree, name or "the tree")
        return ["tensor", layout]
    if type(tree) in _PLAIN:
        return ["value", tree]
    kind, children = _opened(tree, name)
    nodes = [
        [label, _described(child, _name(name, kind, label), tensors)] for label, child in children.items()
    ]
    return [kind, nodes]


def _name(parent: str, kind: str, label: Any) -> str:
    """Write the name of a child."""
    text = str(label)
    if kind in ("dict", "OrderedDict", "defaultdict"):
        text = text.replace("\\", "\\\\") if label and type(label) is str else f"\\#{label!r}"
        text = text.replace(".", "\\.")
        text = f"\\{text}" if text == "__metadata__" else text
    return f"{parent}.{text}" if parent else text


def _opened(tree: Any, name: str) -> tuple[str, dict[Any, Any]]:
    """Return the kind of a node, and its children by label."""
    kind, place = type(tree).__name__, name or "the tree"
    if kind in _classes and type(tree) is _classes[kind][0]:
        return kind, _classes[kind][1](tree)
    if isinstance(tree, Mapping):
        for key in tree:
            if type(key) not in _PLAIN:
                raise CheckpointError(
                    f"{place} has the key {key!r}, but the keys in a file are texts and numbers"
                )
        return kind, dict(tree)
    children = _tree.children(tree)
    if children is None:
        raise CheckpointError(
            f"{place} is {shown(tree)}, but a file holds tensors, numbers, texts and None, in dicts, "
            f"lists, tuples and NamedTuples{_remedy_for(tree)}"
        )
    if kind in _classes or type(tree) is not _own_classes().get(kind, type(tree)):
        kind = f"user's {kind}"  # which has the name of a class of this package
    return kind, dict(zip(getattr(tree, "_fields", range(len(children))), children, strict=True))


def _remedy_for(leaf: Any) -> str:
    """Tell how a leaf gets into a file."""
    if isinstance(leaf, np.ndarray | np.generic):
        return "; make it a tensor with torch.as_tensor"
    if isinstance(leaf, nn.Module):
        return "; its tensors are module.state_dict(), which module.load_state_dict takes back"
    return ""


def _stored(leaf: Tensor, place: str) -> tuple[Tensor, dict[str, Any]]:
    """Return a tensor as a file holds it, and what it has to know to give it back."""
    is_plain = leaf.layout is torch.strided and not leaf.is_quantized and not leaf.is_nested
    if is_transformed(leaf) or leaf.is_meta or not is_plain:
        raise CheckpointError(
            f"{place} is {shown(leaf)} without values of its own; save it outside of vmap and grad"
        )
    layout: dict[str, Any] = {}
    leaf = leaf.detach().resolve_conj().resolve_neg()
    order = sorted(range(leaf.ndim), key=leaf.stride().__getitem__, reverse=True)
    if not leaf.is_contiguous() and leaf.permute(order).is_contiguous():
        layout["order"] = order  # of the dims in memory
    if leaf.is_complex():
        layout["complex"], leaf = True, torch.view_as_real(leaf)
    return leaf, layout


def owned(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[list[str]]]:
    """Give every tensor memory of its own on the CPU; list the names of those that are one tensor."""
    held: set[Any] = set()
    same: dict[Any, list[str]] = {}
    copies = {}
    for name, leaf in tensors.items():
        if leaf.numel():
            place = storage(leaf), leaf.storage_offset(), leaf.shape, leaf.stride(), leaf.dtype
            same.setdefault(place, []).append(name)
        copy = leaf.cpu().contiguous()
        if storage(copy) in held or copy.untyped_storage().nbytes() > copy.nbytes:
            copy = copy.clone()
        held.add(storage(copy))
        copies[name] = copy
    return copies, [names for names in same.values() if len(names) > 1]


class Part(NamedTuple):
    """A tree in a file, or a part of one with its name."""

    node: Node
    name: str
    tensors: Mapping[str, Tensor]

    def parts(self) -> dict[Any, "Part"]:
        """Return what a dict holds."""
        kind, children = self.node
        return {
            label: Part(child, _name(self.name, kind, label), self.tensors) for label, child in children
        }

    def build(self, like: Tree = None) -> Tree:
        """Make the tree, or one like another, on its devices.

        Raises:
            CheckpointError: it has a class that nobody here knows; it differs from `like`.
        """
        return _built(*self) if like is None else _filled(like, *self)


def _built(node: Node, name: str, tensors: Mapping[str, Tensor]) -> Tree:
    kind, *rest = node
    if kind == "none":
        return None
    if kind == "value":
        return rest[0]
    if kind == "tensor":
        return tensors[name or _WHOLE]
    children = {label: _built(child, _name(name, kind, label), tensors) for label, child in rest[0]}
    if kind in _CONTAINERS:
        return _CONTAINERS[kind](children)
    make = _maker(kind)
    if make is None:
        raise _unknown(name, kind)
    return make(**children)


def _maker(kind: str) -> Callable[..., Any] | None:
    """Return what makes a container from its children by label; None for a class that is not ours."""
    return _classes[kind][2] if kind in _classes else _own_classes().get(kind)


def _own_classes() -> dict[str, type]:
    """Return the NamedTuples of this package by name."""
    return _named_tuples(len(sys.modules))


@lru_cache(1)
def _named_tuples(imported: int) -> dict[str, type]:
    """Look for the NamedTuples of this package, again whenever more modules are imported."""
    package = __name__.partition(".")[0]
    modules = [
        module
        for name, module in sys.modules.items()
        if name.startswith(f"{package}.") and not name.startswith(f"{package}.testing")  # no part of a run
    ]
    members = (member for module in modules for member in list(vars(module).values()))
    return {
        member.__name__: member
        for member in members
        if isinstance(member, type) and issubclass(member, tuple) and hasattr(member, "_fields")
    }


def _nodes(node: Node, name: str) -> Iterator[tuple[str, Node]]:
    """List a node and all below it, each with its name."""
    yield name, node
    kind, *rest = node
    if kind not in _LEAVES:
        for label, child in rest[0]:
            yield from _nodes(child, _name(name, kind, label))


def restored(
    node: Node, tensors: Mapping[str, Tensor], ties: Iterable[Iterable[str]], name: str = ""
) -> dict[str, Tensor]:
    """Return the tensors of a file as they were, complex and in their order in memory."""
    layouts = {
        of_leaf or _WHOLE: rest[0] for of_leaf, (kind, *rest) in _nodes(node, name) if kind == "tensor"
    }
    given = {of_leaf: _restored(tensors[of_leaf], layout) for of_leaf, layout in layouts.items()}
    return given | {other: given[first] for first, *others in ties for other in others}


def _restored(tensor: Tensor, layout: Mapping[str, Any]) -> Tensor:
    if layout.get("complex"):
        tensor = torch.view_as_complex(tensor)
    if order := layout.get("order"):
        back = sorted(range(len(order)), key=order.__getitem__)
        tensor = tensor.permute(order).contiguous().permute(back)
    return tensor


def _filled(like: Tree, node: Node, name: str, tensors: Mapping[str, Tensor]) -> Tree:
    """Put the leaves of a file into a tree like another, on its devices."""
    wanted_node, stored = describe(like, name)
    given = _leaves(node, name, tensors)
    asked = _leaves(wanted_node, name, restored(wanted_node, stored, (), name))
    found, wanted = _texts(node, name, given), _texts(wanted_node, name, asked)
    if found != wanted:
        raise CheckpointError(f"it differs from like: {_differences(found, wanted)}")
    leaves, structure = _tree.flatten(like)
    pairs = zip((given[of_leaf] for of_leaf in asked), leaves, strict=True)
    placed = [new.to(old.device) if isinstance(new, Tensor) else new for new, old in pairs]
    return _tree.unflatten(structure, placed)


def check_known(tree: Tree) -> None:
    """Refuse a tree that a file could not give back without another like it.

    Raises:
        CheckpointError: it has a class of the user's own.
    """
    for name, (kind, *_) in _nodes(describe(tree)[0], ""):
        if kind not in (*_LEAVES, *_CONTAINERS) and _maker(kind) is None:
            raise _unknown(name, kind)


def _unknown(name: str, kind: str) -> CheckpointError:
    return CheckpointError(
        f"{name or 'the tree'} is a {kind}, a class that is not known here: pass like=, a tree with one"
    )


def _leaves(node: Node, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the leaves of a file by name."""
    nodes = _nodes(node, name)
    return {of: _built(each, of, tensors) for of, each in nodes if each[0] in ("tensor", "value")}


def _texts(node: Node, name: str, leaves: Mapping[str, Any]) -> dict[str, str]:
    """Say of every node what it is: the dtype and shape of a tensor, the type of a container."""
    texts = {}
    for of, (kind, *_) in _nodes(node, name):
        if kind in ("tensor", "value"):
            leaf = leaves[of]
            texts[of] = shown(leaf) if kind == "tensor" else type(leaf).__name__
        else:
            texts[of] = {"none": "None", "OrderedDict": "dict", "defaultdict": "dict"}.get(kind, kind)
    return texts


def _differences(found: Mapping[str, str], wanted: Mapping[str, str]) -> str:
    """Say where two trees differ."""
    said = [f"{name or 'the tree'} is missing in it" for name in wanted if name not in found]
    said += [f"{name or 'the tree'} is in it, not in like" for name in found if name not in wanted]
    said += [
        f"{name or 'the tree'} is {text} in it, {wanted[name]} in like"
        for name, text in found.items()
        if name in wanted and text != wanted[name]
    ]
    more = f"; and {len(said) - _SHOWN} more" if len(said) > _SHOWN else ""
    return "; ".join(said[:_SHOWN]) + more
