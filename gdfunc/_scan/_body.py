"""A scan's body as a graph over plain tensors, and the loop over it: what a compiled backend receives."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import compress
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, fx

from .._torch._graphs import graph_of, without_dead_code
from .._torch._modes import no_autocast, uses_autocast

Flags = tuple[bool, ...]
Leaves = Sequence[Tensor]
Runner = Callable[["Body", Leaves, Leaves, Leaves, int, int], list[Tensor]]
# (body, consts, init, xs, length > 0, unroll) -> [*carry, *ys], which share no storage with the inputs


class Aval(NamedTuple):
    """The shape, dtype and device of a tensor, without its values."""

    shape: tuple[Any, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, leaf: Tensor, first: int = 0) -> "Aval":
        """Describe a tensor, or its slices over the axes before `first`."""
        return cls(tuple(leaf.shape)[first:], leaf.dtype, leaf.device)

    def with_axis(self, size: Any) -> "Aval":
        return self._replace(shape=(size, *self.shape))


Avals = tuple[Aval, ...]


class Active(NamedTuple):
    """Which inputs, leaves of the carry and y's of a body have a derivative."""

    inputs: Flags
    carry: Flags
    y: Flags


class Rule(Protocol):
    """A backward pass of a loop. Rules can be compared, because graphs that hold loops are."""

    def backward(
        self, loop: Any, active: Active, leaves: Leaves, cotangents: Sequence[Tensor | None]
    ) -> Sequence[Tensor | None]:
        """Return a cotangent, or None, for each tensor that the loop took."""

    def check_forward_mode(self) -> None:
        """Raise if the loop has no forward mode."""


@dataclass(frozen=True)
class Loop:
    """A body, the number of its steps and their order. A loop inside a graph is a node's target."""

    body: "Body"
    length: int
    reverse: bool = False
    unroll: int = 1
    keeps: bool = False  # the last y's are the carry before each step, for the backward pass
    rule: "Rule | None" = None  # the backward pass, where it is not the reversed loop over those carries

    __name__ = "nested_scan"  # torch.fx writes it into the graph's code

    def execute(self, runner: Runner, tensors: Leaves) -> list[Tensor]:
        """Run on plain tensors: a backend only goes forward, over contiguous ones."""
        consts, init, xs = self.body.split(
            [leaf.contiguous().resolve_conj().resolve_neg() for leaf in tensors]
        )
        if self.reverse:
            xs = tuple(leaf.flip(0) for leaf in xs)
        with self.body.as_traced():
            results = runner(self.body, consts, init, xs, self.length, self.unroll)
        if self.reverse:
            results[len(init) :] = [leaf.flip(0) for leaf in results[len(init) :]]
        return results

    @property
    def results(self) -> Avals:
        """Describe the results: the last carry, and each y with an axis for the steps."""
        return (*self.body.carry, *[aval.with_axis(self.length) for aval in self.body.y])


def nested_loops(graph: fx.GraphModule) -> list[Loop]:
    """List the loops inside a graph, in order."""
    return [target for target in _calls(graph) if isinstance(target, Loop)]


def _calls(graph: fx.GraphModule) -> list[Any]:
    return [node.target for node in graph.graph.nodes if node.op == "call_function"]


def merged(leaves: Sequence[Any], flags: Sequence[bool], new: Iterable[Any]) -> list[Any]:
    """Replace the flagged leaves by the next new ones."""
    remaining = iter(new)
    return [next(remaining) if flag else leaf for leaf, flag in zip(leaves, flags, strict=True)]


def spread(leaves: Iterable[Tensor], flags: Sequence[bool]) -> list[Tensor | None]:
    """Put the next leaves into the places that are flagged, None into the others."""
    return merged([None] * len(flags), flags, leaves)


def filled(moves: Sequence[Tensor | None], leaves: Leaves, flags: Sequence[bool]) -> list[Tensor]:
    """List the flagged tangents or cotangents, with zeros for those that are None."""
    pairs = compress(zip(moves, leaves, strict=True), flags)
    return [torch.zeros_like(leaf) if move is None else move for move, leaf in pairs]


class Members(NamedTuple):
    """The vmap that a `BatchedBody` stands for.

    Attributes:
        body: the body of one member.
        size: the number of members.
        inputs, results: which inputs and results have a member axis.
    """

    body: "Body"
    size: int
    inputs: tuple[bool, ...]
    results: tuple[bool, ...]


class Body:
    """A pure function of flat lists, `(*consts, *carry, *x) -> [*carry, *y]`, as a graph of operations.

    Bodies compare by identity. All that is made of a body is kept with it.

    Attributes:
        derived: the bodies of derived loops, by rule and arguments.
        layout, native: where tensors lie in C, and the compiled function or the reason that there is none.
        inductor: compiled loops, by the settings that they depend on.
        cudagraph: recorded blocks, or reasons that there are none, by number of steps and settings.
        taps: the graph for per-sample gradients, and how each leaf of params enters it.
    """

    members: Members | None = None
    opaque: frozenset[str] = frozenset()  # functions whose own derivatives are not in the graph

    def __init__(self, graph: fx.GraphModule, consts: Avals, carry: Avals, x: Avals) -> None:
        graph = without_unread_y(with_reshapes(graph))
        results = list(next(iter(reversed(graph.graph.nodes))).args[0])
        y = tuple(Aval.of(node.meta["val"]) for node in results[len(carry) :])
        self._set_signature(consts, carry, x, y, _sources(graph, results))
        self.graph = graph

    def _set_signature(self, consts: Avals, carry: Avals, x: Avals, y: Avals, sources: list[int]) -> None:
        self.consts, self.carry, self.x, self.y, self._sources = consts, carry, x, y, sources
        self.floats = torch.get_default_dtype()  # to which operations of integers go
        self.derived: dict[Hashable, Body] = {}
        self.layout: Any = None
        self.native: Callable[..., None] | Exception | None = None
        self.inductor: dict[Hashable, Callable[[list[Tensor]], Any]] = {}
        self.cudagraph: dict[Hashable, Callable[..., list[Tensor]] | str | None] = {}
        self.taps: tuple[fx.GraphModule, list[Any]] | None = None

    def as_traced(self) -> AbstractContextManager[None]:
        """Restore the default dtype of the trace, without autocast, whose casts are in the graph."""
        changed = torch.get_default_dtype() != self.floats
        return _settings(self.floats) if changed or uses_autocast() else nullcontext()

    @cached_property
    def has_loops(self) -> bool:
        """Tell whether a step of the body runs a loop."""
        return bool(nested_loops(self.graph))

    @cached_property
    def size(self) -> int:
        """Count the operations to compile; the members of a vmap share theirs."""
        if self.members is not None:
            return self.members.body.size
        return sum(each.body.size if isinstance(each, Loop) else 1 for each in _calls(self.graph))

    @cached_property
    def calls(self) -> int:
        """Count the calls of torch in a step."""
        if self.members is not None:
            return self.members.body.calls
        return sum(
            each.length * each.body.calls if isinstance(each, Loop) else 1 for each in _calls(self.graph)
        )

    def split(self, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
        """Split a list with an entry for each input into the entries of consts, carry and x."""
        first, second = len(self.consts), len(self.consts) + len(self.carry)
        return tuple(leaves[:first]), tuple(leaves[first:second]), tuple(leaves[second:])

    def returning(self, key: Hashable, choose: Callable[[list[Any], list[Any]], list[Any]]) -> "Body":
        """Make the body with other results, chosen from the nodes of its inputs and results."""
        if key not in self.derived:
            graph, copies = fx.Graph(), dict[fx.Node, Any]()
            results: Any = graph.graph_copy(self.graph.graph, copies)
            inputs = [copies[node] for node in self.graph.graph.find_nodes(op="placeholder")]
            graph.output(choose(inputs, [*results]))
            new = Body(
                without_dead_code(fx.GraphModule(self.graph, graph)), self.consts, self.carry, self.x
            )
            new.opaque, new.floats, self.derived[key] = self.opaque, self.floats, new
        return self.derived[key]

    def reading(self, y: Flags) -> "Body":
        """Make the body that returns the flagged y's alone."""
        flags = (*[True] * len(self.carry), *y)
        return self.returning(("reading", y), lambda _, results: [*compress(results, flags)])

    def derive(
        self, key: Hashable, function: Callable[..., Any], consts: Avals, carry: Avals, x: Avals
    ) -> "Body":
        """Trace a function of this body's graph into a body of its own, once for each key."""
        if key not in self.derived:
            with self.as_traced():
                self.derived[key] = Body(graph_of(function, (*consts, *carry, *x)), consts, carry, x)
        return self.derived[key]

    def dependent(self, inputs: Sequence[bool]) -> tuple[Flags, Flags]:
        """Flag the leaves of the carry and of y that depend, at some step, on the flagged inputs."""
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
        self._set_signature(*inputs, avals(base.y, members.results[len(base.carry) :]), base._sources)
        self.members, self._function = members, function
        self.opaque, self.floats = base.opaque, base.floats

    def reading(self, y: Flags) -> Body:
        base, size, inputs, results = self.members  # type: ignore[misc]
        flags = (*[True] * len(self.carry), *y)

        def function(*tensors: Tensor) -> list[Tensor]:
            return [*compress(self._function(*tensors), flags)]

        if ("reading", y) not in self.derived:
            members = Members(base.reading(y), size, inputs, (*compress(results, flags),))
            self.derived["reading", y] = BatchedBody(function, members)
        return self.derived["reading", y]

    @cached_property
    def graph(self) -> fx.GraphModule:  # type: ignore[override]
        with self.as_traced():
            graph = graph_of(self._function, (*self.consts, *self.carry, *self.x))
            return without_unread_y(with_reshapes(graph))


@contextmanager
def _settings(floats: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(floats)
    try:
        with no_autocast():
            yield
    finally:
        torch.set_default_dtype(before)


def with_reshapes(graph: fx.GraphModule) -> fx.GraphModule:
    """Reshape where the trace could take a view: under vmap the tensor may lie otherwise in memory."""
    for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        node.target = torch.ops.aten.reshape.default
    graph.recompile()
    return graph


def without_unread_y(graph: fx.GraphModule) -> fx.GraphModule:
    """Drop the y's of loops that nothing reads, such as carries kept for a derivative that nobody takes.

    A loop with a rule of its own for the way back keeps all of them.
    """
    for node in [node for node in graph.graph.nodes if isinstance(node.target, Loop)]:
        if node.target.rule is not None:
            continue
        loop, count = node.target, len(node.target.body.carry)
        places = {user: user.args[1] for user in node.users}
        read = [place in places.values() for place in range(count, len(loop.results))]
        keeps = loop.keeps and any(read[-count:])
        if keeps:
            read[-count:] = [True] * count
        if all(read):
            continue
        node.target = replace(loop, body=loop.body.reading(tuple(read)), keeps=keeps)
        kept = [*range(count), *compress(range(count, len(loop.results)), read)]
        node.meta["val"] = [node.meta["val"][place] for place in kept]
        for user, place in places.items():
            user.args = (node, kept.index(place))
    return without_dead_code(graph)


def _sources(graph: fx.GraphModule, results: list[fx.Node]) -> list[int]:
    """List, for each result, the inputs that it is computed from, as a bit mask."""
    masks: dict[fx.Node, int] = {}
    inputs = 0
    for node in graph.graph.nodes:
        masks[node] = 0
        if node.op == "placeholder":
            masks[node], inputs = 1 << inputs, inputs + 1
        for source in node.all_input_nodes:
            masks[node] |= masks[source]
    return [masks[node] for node in results]
