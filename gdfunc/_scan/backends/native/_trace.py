"""A body in few and simple operations: what the operators' table knows."""

from collections.abc import Callable, Hashable, Sequence
from functools import cache, partial
from itertools import islice
from operator import getitem
from typing import Any

from torch import Tensor, fx
from torch.func import functionalize

from ...._torch._graphs import (
    OpOverload,
    decompositions,
    drop_dead_code,
    graph_of,
    needs_a_value,
    operators,
    writes,
)
from ..._body import Aval, Body
from ._decompositions import OWN, of_floats
from ._rows import hand_on
from .operators import COVERED, name_of


def operations(body: Body) -> fx.Graph:
    """Write the body's graph with compound operations taken apart and in-place ones made pure.

    Compound operations on tensors of the same metadata are traced once for all of them.
    """
    if any(map(writes, operators(body.graph))):
        return _traced(body.graph, (*body.consts, *body.carry, *body.x)).graph
    first: dict[Hashable, fx.Node] = {}
    keys: dict[fx.Node, Hashable] = {}
    for node in body.graph.graph.nodes:
        if node.target in _rewrites():
            keys[node] = key = _key(node)
            first.setdefault(key, node)
    parts = _taken_apart([*first.values()])
    graph, copies = fx.Graph(), dict[fx.Node, Any]()
    for node in body.graph.graph.nodes:
        if node in keys:
            inputs, result = parts[first[keys[node]]]
            new = dict(zip(inputs, [copies[each] for each in node.all_input_nodes], strict=True))
            copies[node] = fx.map_arg(result, partial(_copied, graph, new))
        elif node.target is getitem and not isinstance(copies[node.args[0]], fx.Node):
            copies[node] = copies[node.args[0]][node.args[1]]
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    drop_dead_code(graph)
    hand_on(graph)
    return graph


def _copied(graph: fx.Graph, copies: dict[fx.Node, fx.Node], node: fx.Node) -> fx.Node:
    """Copy a node with all that it needs."""
    if node not in copies:
        copies[node] = graph.node_copy(node, partial(_copied, graph, copies))
    return copies[node]


def _key(node: fx.Node) -> Hashable:
    inputs = node.all_input_nodes
    args = fx.map_arg((node.args, node.kwargs), lambda each: f"input {inputs.index(each)}")
    return node.target, repr(args), *[_spec(each) for each in inputs]


def _spec(node: fx.Node) -> tuple[Any, ...]:
    leaf = node.meta["val"]
    return (*Aval.of(leaf), leaf.stride())


def _taken_apart(nodes: list[fx.Node]) -> dict[fx.Node, tuple[list[fx.Node], Any]]:
    """Trace operations, each for itself. Give the inputs of each and its result, in one graph."""
    each = [node.all_input_nodes for node in nodes]

    def function(*tensors: Tensor) -> list[Any]:
        given, results = iter(tensors), []
        for node, inputs in zip(nodes, each, strict=True):
            values = dict(zip(inputs, islice(given, len(inputs)), strict=True))
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            operation: Any = node.target
            results.append(operation(*args, **kwargs))
        return results

    graph = _traced(function, [_spec(source) for inputs in each for source in inputs]).graph
    *inputs, output = [node for node in graph.nodes if node.op in ("placeholder", "output")]
    given = iter(inputs)
    pairs = zip(nodes, each, output.args[0], strict=True)
    return {node: (list(islice(given, len(of_node))), result) for node, of_node, result in pairs}


def _traced(function: Callable[..., Any], specs: Sequence[tuple[Any, ...]]) -> fx.GraphModule:
    graph = graph_of(function, specs, _rewrites())
    if any(map(writes, operators(graph))):
        graph = graph_of(functionalize(graph, remove="mutations"), specs, _rewrites())
    return graph


@cache
def _rewrites() -> dict[Any, Callable[..., Any]]:
    rewrites = {
        operator: _if_possible(rewrite)
        for operator, rewrite in decompositions().items()
        if isinstance(operator, OpOverload) and name_of(operator) not in COVERED
    }
    for operator, rewrite in rewrites.items():
        if name_of(operator).startswith("upsample_") and "nearest" not in name_of(operator):
            rewrites[operator] = of_floats(rewrite)  # torch rounds bytes in another way
    return rewrites | OWN


def _if_possible(rewrite: Callable[..., Any]) -> Callable[..., Any]:
    """Leave an operator as it is, to be refused by its name, if its rewriting asks for a tensor's value."""

    def rewritten(*args: Any, **kwargs: Any) -> Any:
        try:
            return rewrite(*args, **kwargs)
        except Exception as error:
            if needs_a_value(error):
                return NotImplemented
            raise

    return rewritten
