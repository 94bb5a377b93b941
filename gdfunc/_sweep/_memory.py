"""The memory that a call takes, counted tensor by tensor."""

import weakref
from typing import Any

import torch
from torch import Tensor

from .. import _tree
from .._torch._modes import TorchDispatchMode, is_symbolic_zero, storage
from .._tree import Tree


class Memory(TorchDispatchMode):
    """Count the bytes of the tensors that are made, and are alive, while the mode is on.

    Storages are counted as they are made and freed, so that the result is the same on every machine.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = _tree.map(_material, (args, kwargs or {}))
        self.meet((args, kwargs), made=False)
        result = func(*args, **kwargs)
        self.meet(result, made=True)
        return result

    def meet(self, tree: Tree, made: bool) -> None:
        for leaf in _tree.tensors(tree):
            if leaf.layout == torch.strided:
                memory, place = leaf.untyped_storage(), storage(leaf)
                if place not in self.sizes:
                    self.sizes[place] = memory.nbytes() if made else 0
                    self.now += self.sizes[place]
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(memory, self.forget, place)

    def forget(self, storage: int) -> None:
        self.now -= self.sizes.pop(storage)


def _material(leaf: Any) -> Any:
    """Forward mode's symbolic zeros have no storage, and crash torch when a mode hands them on."""
    return torch.zeros_like(leaf) if isinstance(leaf, Tensor) and is_symbolic_zero(leaf) else leaf
