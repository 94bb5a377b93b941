"""A body in few and simple operations: what the operators' table knows."""

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import fx
from torch.func import functionalize

from ...._torch._graphs import OpOverload, decompositions, graph_of, needs_a_value, operators, writes
from ..._body import Aval, Body
from ._decompositions import OWN, of_floats
from .operators import COVERED, name_of


def operations(body: Body) -> fx.GraphModule:
    """Trace the body once more, with compound operations taken apart and in-place ones made pure."""
    avals = (*body.consts, *body.carry, *body.x)
    graph = graph_of(body.graph, avals, _rewrites())
    if any(map(writes, operators(graph))):
        inputs = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
        pure = functionalize(graph, remove="mutations")
        graph = graph_of(pure, tuple(map(Aval.of, inputs)), _rewrites())
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
