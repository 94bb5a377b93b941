"""One operation of a body with its arguments, and the table of functions that write operations."""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ....._torch._graphs import schema_name
from .._tensor import Block, Lazy, Shape, Unsupported, cast, constant, expand


def name_of(target: Any) -> str:
    """Return an operator's name in its schema, without aten's prefix; an empty text for other targets."""
    return schema_name(target).removeprefix("aten::")


class Call:
    """A node of the graph with its arguments by their names in the schema, tensors as Lazy."""

    def __init__(self, block: Block, node: fx.Node, arguments: dict[str, Any]) -> None:
        self.block, self.node, self.arguments = block, node, arguments
        self.name = name_of(node.target)
        self.value = node.meta["val"]

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    @property
    def shape(self) -> Shape:
        return tuple(self.value.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.value.dtype

    def axis(self, name: str = "dim", shape: Shape | None = None) -> int:
        """Read an axis of `self`, or of a shape, counted from the left."""
        return self[name] % max(len(self["self"].shape if shape is None else shape), 1)

    def tensor(self, value: Any, dtype: torch.dtype | None = None, shape: Shape | None = None) -> Lazy:
        """Give an operand a dtype and a shape: those of the result, by default."""
        dtype, shape = dtype or self.dtype, self.shape if shape is None else shape
        if not isinstance(value, Lazy):
            return constant(value, shape, dtype)
        return expand(cast(value, dtype), shape)

    def refuse(self, why: str = "") -> Unsupported:
        return Unsupported(f"{self.node.target}{why and ' ' + why}")


Lowering = Callable[[Call], Any]
LOWERINGS: dict[str, Lowering] = {}


def lowers(*names: str) -> Callable[[Lowering], Lowering]:
    """Enter a function into the table, for the operators of these names."""

    def register(function: Lowering) -> Lowering:
        LOWERINGS.update(dict.fromkeys(names, function))
        return function

    return register
