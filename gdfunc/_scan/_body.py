"""A scan's body as a graph over plain tensors: the one thing that a compiled backend receives."""

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cached_property
from itertools import count
from types import FrameType
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, fx
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import _disable_current_modes

from ._lock import Lock


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
        return _settings(self.floats) if changed or torch._C._is_any_autocast_enabled() else _AS_IT_IS

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
                self.kept[key] = Body(trace_flat(function, (*consts, *carry, *x)), consts, carry, x)
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
            return _with_reshapes(trace_flat(self._function, (*self.consts, *self.carry, *self.x)))


@contextmanager
def _settings(floats: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(floats)
    try:
        with torch._C._DisableAutocast():
            yield
    finally:
        torch.set_default_dtype(before)


_AS_IT_IS = nullcontext()
_numbers = count()
tracing = Lock(waits=True)  # torch.fx patches what all threads share


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


def trace_flat(
    function: Callable[..., Any], avals: Avals, rewrites: dict[Any, Callable[..., Any]] | None = None
) -> fx.GraphModule:
    """Trace a function of flat tensors that closes over none."""
    with clean_room() as mode:
        return prune(record(function, rewrites)(*[stand_in(mode, aval) for aval in avals]))


def record(function: Callable[..., Any], rewrites: dict[Any, Callable[..., Any]] | None = None) -> Any:
    """Give what runs a function and writes down its operations, the cut of a gradient included."""
    # Without a table, make_fx of torch 2.15 makes of detach an alias, which cuts nothing.
    return make_fx(function, {torch.ops.aten._efficientzerotensor.default: _zeros, **(rewrites or {})})


def proxy_mode() -> Any:
    """Find the trace under way, if there is one."""
    return get_proxy_mode() if torch._C._len_torch_dispatch_stack() else None


def _zeros(size: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> torch.Tensor:
    """Give the zeros of forward mode a memory."""
    return torch.zeros(size, dtype=dtype, device=device)


def prune(graph: fx.GraphModule) -> fx.GraphModule:
    """Drop what no result needs."""
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


@contextmanager
def clean_room(shapes: ShapeEnv | None = None) -> Iterator[FakeTensorMode]:
    """Leave all transformations and modes under way, for one in which tensors have no values."""
    with _uninterrupted(), tracing, ExitStack() as stack:
        stack.enter_context(_no_function_modes())
        stack.enter_context(_disable_current_modes())
        stack.enter_context(temporarily_clear_interpreter_stack())
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autograd.set_detect_anomaly(False))
        mode = stack.enter_context(FakeTensorMode(shape_env=shapes))
        stack.callback(_over.add, mode)
        yield mode


_over: WeakSet[FakeTensorMode] = WeakSet()


def is_over(leaf: FakeTensor) -> bool:
    """Tell whether a tensor without a value is left from a trace that is over."""
    return leaf.fake_mode in _over


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let a first Ctrl-C wait for the end: torch's modes may not survive it. A second one does not wait."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    caught: list[tuple[int, FrameType | None]] = []

    def wait(*what: Any) -> None:
        if caught:
            handler(*what)
        caught.append(what)

    signal.signal(signal.SIGINT, wait)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is wait:  # and not one that f has put there
            signal.signal(signal.SIGINT, handler)
        if caught:
            handler(*caught[0])


@contextmanager
def _no_function_modes() -> Iterator[None]:
    modes = [torch._C._pop_torch_function_stack() for _ in range(torch._C._len_torch_function_stack())]
    try:
        yield
    finally:
        for mode in reversed(modes):
            torch._C._push_on_torch_function_stack(mode)


def stand_in(mode: FakeTensorMode, aval: Aval) -> Tensor:
    """A tensor without values that no transformation or trace under way knows of."""
    with torch._C._DisableFuncTorch(), _disable_current_modes(), mode:
        return torch.empty(aval.shape, dtype=aval.dtype, device=aval.device)
