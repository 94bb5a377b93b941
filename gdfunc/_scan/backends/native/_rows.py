"""Products that two loops of a step would both compute: the first loop hands them on to the second.

The backward pass of a loop goes over its carries, and computes each step again for its derivative. The
products among these operations become results of the first loop, row by row, if they fit into a cache.
"""

from collections.abc import Callable, Hashable
from dataclasses import replace
from operator import getitem
from typing import Any

from torch import fx

from ...._torch._graphs import operators, writes
from ..._body import Aval, Body, Loop
from .operators import name_of

# Because rows in farther memory cost more than the products: for the digits MLP of the benchmarks, 4 MB
# saved a sixth of the time of a checkpointed derivative, 7 MB a twelfth, and 37 MB took 1.7 times as long.
_MOST_BYTES = 8e6
_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "convolution"}
Row = Callable[[Any], Hashable]


def hand_on(graph: fx.Graph) -> None:
    """Let the loops of a graph hand on products to later loops of as many steps, which read their rows."""
    for second in [node for node in graph.nodes if isinstance(node.target, Loop)]:
        read: Any = map(_origin, second.args)
        for first in dict.fromkeys(arg.args[0] for arg in read if arg.target is getitem):
            if isinstance(first.target, Loop) and first.target.length == second.target.length:
                _hand_on(graph, first, second)


def _hand_on(graph: fx.Graph, first: Any, second: Any) -> None:
    outer, inner = first.target.body, second.target.body
    if any(map(writes, (*operators(outer.graph), *operators(inner.graph)))):
        return
    numbers: dict[Hashable, int] = {}
    of_first = _numbered(first, numbers, lambda arg: ("row", arg))
    results = _results(outer)

    def row(arg: Any) -> Hashable:
        is_row = arg.target is getitem and arg.args[0] is first and arg.args[1] >= len(outer.carry)
        return of_first[results[arg.args[1]]] if is_row else ("row", arg)

    of_second = _numbered(second, numbers, row)
    values = {number: node for node, number in reversed(of_first.items())}
    shared = _needed(inner, lambda node: _is_product(node) and of_second[node] in values)
    row_bytes = sum(node.meta["val"].numel() * node.meta["val"].itemsize for node in shared)
    if not 0 < row_bytes * first.target.length <= _MOST_BYTES:
        return
    count = len(first.target.results)
    given = _returning(outer, [values[of_second[node]] for node in shared])
    first.target = replace(first.target, body=given, keeps=False)
    second.target = replace(second.target, body=_taking(inner, shared))
    with graph.inserting_before(second):
        rows = [graph.call_function(getitem, (first, count + at)) for at in range(len(shared))]
    second.args = (*second.args, *rows)


def _origin(node: Any) -> Any:
    """Look through the detached aliases of a tensor."""
    while name_of(node.target) in ("detach", "alias"):
        node = node.args[0]
    return node


def _numbered(call: Any, numbers: dict[Hashable, int], row: Row) -> dict[fx.Node, int]:
    """Number the values in a step of a loop, so that equal numbers mean equal values.

    Args:
        row: tells what a row of a tensor is: the number of a value, or another key.
    """
    body = call.target.body
    consts, carry, x = body.split([_origin(arg) for arg in call.args])
    keys = iter(
        [*[("const", arg) for arg in consts], *[(call, at) for at in range(len(carry))], *map(row, x)]
    )
    found: dict[fx.Node, int] = {}
    for node in body.graph.graph.nodes:
        key: Hashable = node
        if node.op == "placeholder":
            key = next(keys)
        elif _origin(node) is not node:
            key = found[_origin(node)]
        elif node.op == "call_function":
            key = (
                node.target,
                repr(fx.map_arg((node.args, node.kwargs), lambda arg: f"number {found[arg]}")),
            )
        found[node] = key if isinstance(key, int) else numbers.setdefault(key, len(numbers))
    return found


def _is_product(node: fx.Node) -> bool:
    return name_of(node.target) in _PRODUCTS and node.meta["val"].is_contiguous()


def _results(body: Body) -> list[Any]:
    return list(next(iter(reversed(body.graph.graph.nodes))).args[0])


def _needed(body: Body, is_given: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """List the given values that the results are computed from."""
    waiting, seen = _results(body), dict[fx.Node, bool]()
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen[node] = is_given(node)
            waiting += () if seen[node] else node.all_input_nodes
    return [node for node, given in seen.items() if given]


def _returning(body: Body, values: list[fx.Node]) -> Body:
    """Make the body that also returns these of its values."""
    graph, copies = fx.Graph(), dict[fx.Node, Any]()
    results: Any = graph.graph_copy(body.graph.graph, copies)
    graph.output([*results, *[copies[value] for value in values]])
    return Body(fx.GraphModule(body.graph, graph), body.consts, body.carry, body.x)


def _taking(body: Body, values: list[fx.Node]) -> Body:
    """Make the body that is given these of its values, as the last of its x's."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in body.graph.graph.find_nodes(op="placeholder"):
        copies[node] = graph.node_copy(node)
    for at, value in enumerate(values):
        copies[value] = graph.placeholder(f"row_{len(body.x) + at}")
        copies[value].meta |= value.meta
    for node in body.graph.graph.nodes:
        if node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    x = (*body.x, *[Aval.of(value.meta["val"]) for value in values])
    return Body(fx.GraphModule(body.graph, graph), body.consts, body.carry, x)
