"""Operators of torch, and the recording of a function as a graph of them."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload as OpOverload
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot, make_fx, track_tensor_tree
from torch.nn import functional

from ._modes import clean_room, no_function_modes, valueless
from ._repeats import KNOWN as KNOWN
from ._repeats import Repeats

Rewrites = dict[Any, Callable[..., Any]]

MULTILABEL_MARGIN_LOSSES = functional.multilabel_margin_loss, torch._C._nn.multilabel_margin_loss
ASSERT_ASYNC = torch._assert_async
_ZERO = "symbolic zero"
_LINEAR = ("alias", "detach", "t", "transpose", "permute", "view", "expand", "unsqueeze", "squeeze", "neg")
_BILINEAR = ("mul", "mm", "bmm", "mv", "dot")
_ZEROS_PASS = {**dict.fromkeys(_LINEAR, "linear"), **dict.fromkeys(_BILINEAR, "bilinear"), "add": "sum"}
_EXPAND = torch.ops.aten.expand.default


def recorder(function: Callable[..., Any], rewrites: Rewrites | None = None) -> Callable[..., Any]:
    """Make the function of the same tensors that returns the graph of its operations, detach included."""

    def repeating(*tensors: Tensor) -> Any:
        with no_function_modes(), Repeats():  # without torch's own, which count the calls of each function
            return function(*tensors)

    # Without a table, make_fx of torch 2.15 turns detach into an alias, which cuts no derivative.
    record = make_fx(repeating, {torch.ops.aten._efficientzerotensor.default: _zeros, **(rewrites or {})})

    def recorded(*tensors: Tensor) -> fx.GraphModule:
        with _use_lazy_graph_module(True):  # Because the code of most graphs is never read.
            return record(*tensors)

    return recorded


def _zeros(size: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
    """Give the symbolic zeros of forward mode a memory, and mark them in the graph."""
    zeros = torch.zeros(size, dtype=dtype, device=device)
    if is_recorded(zeros):
        node_of(zeros).meta[_ZERO] = True
    return zeros


def graph_of(
    function: Callable[..., Any], specs: Iterable[tuple[Any, ...]], rewrites: Rewrites | None = None
) -> fx.GraphModule:
    """Trace a function of flat tensors that closes over none.

    Args:
        specs: the shape, dtype and device of each tensor, and perhaps its strides.
    """
    with clean_room() as mode:
        graph = recorder(function, rewrites)(*[valueless(mode, *spec) for spec in specs])
        return without_dead_code(_without_zeros(graph))


def _without_zeros(graph: fx.GraphModule) -> fx.GraphModule:
    """Drop the products with symbolic zeros of forward mode, and the sums with them.

    These zeros are the tangents of what has none. So a factor that is infinite makes no NaN of them.
    """
    zeros: set[fx.Node] = set()
    for node in graph.graph.nodes:
        name = schema_name(node.target).removeprefix("aten::")
        is_zero = [isinstance(arg, fx.Node) and arg in zeros for arg in node.args[:2]]
        vanishes = {"linear": is_zero[:1] == [True], "bilinear": any(is_zero), "sum": all(is_zero)}
        if _ZERO in node.meta or vanishes.get(_ZEROS_PASS.get(name, "")):
            zeros.add(node)
        elif name == "add" and any(is_zero) and not node.kwargs:
            term, of_sum = node.args[is_zero.index(False)], node.meta["val"]
            if not isinstance(term, fx.Node) or term.meta["val"].dtype != of_sum.dtype:
                continue
            if term.meta["val"].shape != of_sum.shape:
                with graph.graph.inserting_before(node):
                    term = graph.graph.call_function(_EXPAND, (term, list(of_sum.shape)))
                term.meta["val"] = of_sum
            node.replace_all_uses_with(term)
    for node in zeros:
        if _ZERO not in node.meta:
            of_zeros = node.meta["val"]
            with graph.graph.inserting_before(node):
                new = graph.graph.call_function(
                    torch.ops.aten.full.default,
                    ([*of_zeros.shape], 0),
                    {"dtype": of_zeros.dtype, "device": of_zeros.device},
                )
            new.meta["val"] = of_zeros
            node.replace_all_uses_with(new)
    return graph


def without_dead_code(graph: fx.GraphModule) -> fx.GraphModule:
    """Drop the operations that no result needs, and return the same graph."""
    drop_dead_code(graph.graph)
    graph.recompile()
    return graph


def drop_dead_code(graph: fx.Graph) -> None:
    """Drop the operations that no result needs.

    torch's own function asks of each operation whether it may be dropped, which takes it ten times as long.
    """
    for node in reversed(graph.nodes):
        if not node.users and not node.is_impure():
            graph.erase_node(node)


Words = tuple[str, Any, str]


def words_of(graph: fx.Graph) -> list[Words]:
    """Write down each node of a graph, without its name: two graphs with equal words compute the same."""
    places = {node: place for place, node in enumerate(graph.nodes)}
    return [
        (node.op, node.target, repr(fx.map_arg((node.args, node.kwargs), lambda each: f"%{places[each]}")))
        for node in graph.nodes
    ]


def tracer() -> Any:
    """Return the tracer that records operations now, or None."""
    mode = get_proxy_mode() if torch._C._len_torch_dispatch_stack() else None
    return None if mode is None else mode.tracer


def is_recorded(leaf: Tensor) -> bool:
    """Tell whether the running tracer follows this tensor."""
    found = tracer()
    return found is not None and get_proxy_slot(leaf, found, None) is not None


def node_of(leaf: Tensor) -> fx.Node:
    """Return the node that stands for a tensor in the running tracer's graph."""
    return tracer().unwrap_proxy(leaf).node


def record_call(
    target: Callable[..., Any], tensors: Sequence[Tensor], results: list[Tensor]
) -> list[Tensor]:
    """Write a call into the running tracer's graph; return its results, which the tracer follows."""
    found = tracer()
    call = found.create_proxy("call_function", target, tuple(map(found.unwrap_proxy, tensors)), {})
    track_tensor_tree(results, call, constant=None, tracer=found)
    return results


def record_attribute(leaf: Tensor) -> None:
    """Enter a tensor into the running tracer's graph as an attribute, before it is taken for a constant."""
    found = tracer()
    if found is None:  # within an operation, of which nothing is recorded
        return
    name = f"outside_{len(vars(found.root))}"
    setattr(found.root, name, leaf)
    track_tensor_tree(leaf, found.create_proxy("get_attr", name, (), {}), constant=None, tracer=found)


def operators(graph: fx.GraphModule) -> list[OpOverload]:
    """List the operators of torch that a graph calls, in order."""
    return [node.target for node in graph.graph.nodes if isinstance(node.target, OpOverload)]


def writes(operator: OpOverload) -> bool:
    """Tell whether an operator writes into one of its arguments."""
    return operator._schema.is_mutable


def schema_name(target: Any) -> str:
    """Return an operator's name in its schema, such as aten::add; an empty text for other targets."""
    return target._schema.name if isinstance(target, OpOverload) else ""


def schema_arguments(operator: OpOverload) -> Sequence[Any]:
    """List the arguments of an operator's schema, each with its name and default."""
    return operator._schema.arguments


def decompositions() -> Rewrites:
    """Collect torch's decompositions of operators into simpler ones."""
    from torch._decomp import core_aten_decompositions, decomposition_table

    return {**decomposition_table, **core_aten_decompositions()}


def needs_a_value(error: BaseException) -> bool:
    """Tell whether an error says that a tensor without values was asked for its value."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    kinds = (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode)
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and ".numpy()" in str(error))
