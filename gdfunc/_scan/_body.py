"""A scan's body as a graph over plain tensors: the one thing that a compiled backend receives."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from .._torch._graphs import graph_of
from .._torch._modes import no_autocast, uses_autocast


class Aval(NamedTuple):
    """What is known of a tensor before it has a value."""

    shape: tuple[Any, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, leaf: Tensor, first: int = 0) -> "Aval":
        """Tell of a tensor, from some axis on."""
        return cls(tuple(leaf.shape[first:]), leaf.dtype, leaf.device)

    def with_axis(self, size: Any) -> "Aval":
        return self._replace(shape=(size, *self.shape))


Avals = tuple[Aval, ...]


class Members(NamedTuple):
    """What a body is vmap of: another body, how often, and which inputs and results have a member axis."""

    body: "Body"
    size: int
    inputs: tuple[bool, ...]
    results: tuple[bool, ...]


class Body:
    """A pure function of flat lists, `(*consts, *carry, *x) -> [*carry, *y]`, as a graph of operations.

    Bodies compare by identity. What was derived from one, and what a backend made of it, is kept with it.
    """

    members: Members | None = None
    opaque: frozenset[str] = frozenset()  # functions whose own derivatives are not in the graph

    def __init__(self, graph: fx.GraphModule, consts: Avals, carry: Avals, x: Avals) -> None:
        graph = _with_reshapes(graph)
        results = list(next(iter(reversed(graph.graph.nodes))).args[0])
        y = tuple(Aval.of(node.meta["val"]) for node in results[len(carry) :])
        self._enter(consts, carry, x, y, _sources(graph, results))
        self.graph = graph

    def _enter(self, consts: Avals, carry: Avals, x: Avals, y: Avals, sources: list[int]) -> None:
        self.consts, self.carry, self.x, self.y, self._sources = consts, carry, x, y, sources
        self.number = next(_numbers)
        self.floats = torch.get_default_dtype()  # to which operations of integers go
        self.kept: dict[Any, Any] = {}

    def as_traced(self) -> AbstractContextManager[None]:
        """Let operations mean what they meant in the trace: its casts are in it, and its default dtype."""
        changed = torch.get_default_dtype() != self.floats
        return _settings(self.floats) if changed or uses_autocast() else _AS_IT_IS

    @property
    def has_loops(self) -> bool:
        """Whether a step of it runs a loop of its own."""
        return any(hasattr(node.target, "loop") for node in self.graph.graph.nodes)

    def split(self, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
        """Split what there is one of for each input into that of consts, carry and x."""
        first, second = len(self.consts), len(self.consts) + len(self.carry)
        return tuple(leaves[:first]), tuple(leaves[first:second]), tuple(leaves[second:])

    def derive(
        self, key: Any, function: Callable[..., Any], consts: Avals, carry: Avals, x: Avals
    ) -> "Body":
        """Trace a function of this body's graph into a body of its own, once for each key."""
        if key not in self.kept:
            with self.as_traced():
                self.kept[key] = Body(graph_of(function, (*consts, *carry, *x)), consts, carry, x)
        return self.kept[key]

    def reached(self, inputs: Sequence[bool]) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
        """Tell which leaves of the carry and of y depend, at some step, on the inputs that are flagged."""
        consts, carry, x = self.split(inputs)
        while True:
            flagged = sum(1 << i for i, flag in enumerate((*consts, *carry, *x)) if flag)
            results = [bool(source & flagged) for source in self._sources]
            new = tuple(old or result for old, result in zip(carry, results, strict=False))
            if new == carry:
                return carry, tuple(results[len(carry) :])
            carry = new


class BatchedBody(Body):
    """vmap of a body; it is not traced for a backend that takes the members one by one."""

    def __init__(self, function: Callable[..., Any], members: Members) -> None:
        def avals(leaves: Avals, flags: Sequence[bool]) -> Avals:
            pairs = zip(leaves, flags, strict=True)
            return tuple(aval.with_axis(members.size) if flag else aval for aval, flag in pairs)

        base = members.body
        inputs = base.split(avals((*base.consts, *base.carry, *base.x), members.inputs))
        self._enter(*inputs, avals(base.y, members.results[len(base.carry) :]), base._sources)
        self.members, self._function = members, function
        self.opaque, self.floats = base.opaque, base.floats

    @cached_property
    def graph(self) -> fx.GraphModule:  # type: ignore[override]
        with self.as_traced():
            return _with_reshapes(graph_of(self._function, (*self.consts, *self.carry, *self.x)))


@contextmanager
def _settings(floats: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(floats)
    try:
        with no_autocast():
            yield
    finally:
        torch.set_default_dtype(before)


_AS_IT_IS = nullcontext()
_numbers = count()


def _with_reshapes(graph: fx.GraphModule) -> fx.GraphModule:
    """Reshape where the trace could take a view: under vmap the tensor may lie otherwise in memory."""
    for node in graph.graph.nodes:
        if node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default
    graph.recompile()
    return graph


def _sources(graph: fx.GraphModule, results: list[fx.Node]) -> list[int]:
    """The inputs that each result is computed from, as a bit mask."""
    masks: dict[fx.Node, int] = {}
    inputs = 0
    for node in graph.graph.nodes:
        masks[node] = 0
        if node.op == "placeholder":
            masks[node], inputs = 1 << inputs, inputs + 1
        for source in node.all_input_nodes:
            masks[node] |= masks[source]
    return [masks[node] for node in results]
