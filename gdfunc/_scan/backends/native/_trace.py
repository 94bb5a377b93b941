"""A body in few and simple operations: what the operators' table knows."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.func import functionalize

from ..._body import Aval, Body, trace_flat
from ._decompositions import OWN, of_floats
from .operators import COVERED, name_of


def operations(body: Body) -> fx.GraphModule:
    """Trace the body once more, with compound operations taken apart and in-place ones made pure."""
    avals = (*body.consts, *body.carry, *body.x)
    graph = trace_flat(body.graph, avals, _rewrites())
    targets = [node.target for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    if any(target._schema.is_mutable for target in targets):
        inputs = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
        pure = functionalize(graph, remove="mutations")
        graph = trace_flat(pure, tuple(map(Aval.of, inputs)), _rewrites())
    return graph


@cache
def _rewrites() -> dict[Any, Callable[..., Any]]:
    # Imported where used: torch's decompositions take seconds.
    from torch._decomp import core_aten_decompositions, decomposition_table

    known = {**decomposition_table, **core_aten_decompositions()}
    rewrites = {
        operator: _if_possible(rewrite)
        for operator, rewrite in known.items()
        if isinstance(operator, torch._ops.OpOverload) and name_of(operator) not in COVERED
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
        except DataDependentOutputException:
            return NotImplemented

    return rewritten
