"""A body in few and simple operations: what the operators' table knows."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import functionalize

from .._body import Aval, Body, trace_flat

aten = torch.ops.aten


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
    from torch._decomp import core_aten_decompositions, get_decompositions

    more = get_decompositions(
        [
            aten._log_softmax,
            aten._softmax,
            aten.addmv,
            aten.baddbmm,
            aten.native_layer_norm,
            aten.native_layer_norm_backward,
            aten.var,
            aten.var_mean,
            aten.embedding_dense_backward,
        ]
    )
    return {**core_aten_decompositions(), **more, aten.addmm.default: _addmm}


def _addmm(bias: Tensor, a: Tensor, b: Tensor, beta: Any = 1, alpha: Any = 1) -> Tensor:
    total = a @ b if alpha == 1 else alpha * (a @ b)
    return total + bias if beta == 1 else total + beta * bias
