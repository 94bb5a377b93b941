"""Results without a derivative, in a graph, which has no grad mode.

Under `torch.no_grad` an operation has a value and no derivative: in a graph its result is detached. A graph
cannot say that a tensor got other values and kept its derivative. This happens to a tensor that is written
into under no_grad, or by way of a detached alias. The body is then opaque: it cannot be differentiated.
"""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from ... import _tree
from ..._torch._modes import storage, versions
from ..._torch._transforms import has_forward_mode, layers

_WRITES = "an in-place operation under no_grad or on a detached tensor"
_FORWARD = "a forward-mode derivative under no_grad"
_DETACHES = {torch.detach, Tensor.detach, torch.ops.aten.detach, torch.ops.aten.detach.default}


class Cuts:
    """Call torch's functions in a trace, and keep account of the tensors without a derivative."""

    def __init__(self, opaque: set[str], depth: int) -> None:
        self.opaque, self._depth = opaque, depth
        # These keep the tensors, so that no other one gets their ids.
        self._constants: dict[int, Tensor] = {}  # by memory: tensors without a derivative
        self._aliases: dict[int, Tensor] = {}  # by id: detached views of tensors that may have one

    def call(self, func: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, list[Tensor]]:
        """Return the result, and the tensors that the function wrote into."""
        given = _tree.tensors((args, kwargs))
        plain = [layers(leaf)[-1] for leaf in given]
        before = versions(plain)
        result = func(*args, **kwargs)
        quiet = not torch.is_grad_enabled() or getattr(func, "__module__", None) == "torch.nn.init"
        counts = zip(given, before, versions(plain), strict=True)
        written = [leaf for leaf, old, new in counts if old != new]
        first = _tree.tensors(args[:1]) or given[:1]
        targets = {id(leaf) for leaf in (*first, *_tree.tensors(kwargs.get("out")))}
        for leaf in written:
            if id(leaf) in targets:
                self._write(leaf, quiet, [other for other in given if other is not leaf])
        known = {id(leaf) for leaf in given}
        if quiet or (func is torch.autograd.grad and not _creates_graph(*args[4:5], **kwargs)):
            result = self.cut(result, known)
        inert = quiet or _is_factory(func) or all(map(self._is_inert, given))
        memories = {_memory(leaf): self._is_alias(leaf) for leaf in given}
        for leaf in _tree.tensors(result):
            at = _memory(leaf)
            if id(leaf) in known:
                continue
            if at not in memories and inert:
                self._constants[at] = leaf
            elif at in memories and (quiet or func in _DETACHES or memories[at]):
                self._aliases[id(leaf)] = leaf
        return result, written

    def _write(self, leaf: Tensor, quiet: bool, others: list[Tensor]) -> None:
        if _memory(leaf) not in self._constants:
            if quiet or self._is_alias(leaf):
                self.opaque.add(_WRITES)
        elif not quiet and not all(map(self._is_inert, others)):
            del self._constants[_memory(leaf)]

    def cut(self, result: Any, known: Collection[int] = ()) -> Any:
        """Detach the new tensors of a result, but none that the function was given."""
        if has_forward_mode(above=self._depth):  # because no_grad does not stop forward mode
            self.opaque.add(_FORWARD)
            return result
        return _tree.map(lambda leaf: leaf if id(leaf) in known else _constant(leaf), result)

    def _is_inert(self, leaf: Tensor) -> bool:
        return self._is_alias(leaf) or _memory(leaf) in self._constants

    def _is_alias(self, leaf: Tensor) -> bool:
        return any(id(inner) in self._aliases for inner in layers(leaf))


def _creates_graph(positional: bool = False, *, create_graph: bool = False, **_: Any) -> bool:
    return positional or create_graph


def _is_factory(func: Any) -> bool:
    """Tell whether a function takes no more of a tensor than its shape."""
    name = getattr(func, "__name__", "")
    return name.endswith("_like") or name.startswith("new_")


def _memory(leaf: Tensor) -> int:
    return storage(layers(leaf)[-1])


def _constant(leaf: Any) -> Any:
    differentiable = isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())
    return leaf.detach() if differentiable else leaf
