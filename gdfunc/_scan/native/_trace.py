"""A body in few and simple operations: what the operators' table knows."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import functionalize

from .._body import Aval, Body, trace_flat
from ._operators import COVERED, name_of

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
    from torch._decomp import core_aten_decompositions, decomposition_table

    known = {**decomposition_table, **core_aten_decompositions()}
    own = {aten.addmm.default: _addmm, aten.var.correction: _var, aten.var_mean.correction: _var_mean}
    return own | {
        operator: rewrite
        for operator, rewrite in known.items()
        if isinstance(operator, torch._ops.OpOverload)
        and name_of(operator) not in COVERED
        and operator not in own
    }


def _addmm(bias: Tensor, a: Tensor, b: Tensor, beta: Any = 1, alpha: Any = 1) -> Tensor:
    total = a @ b if alpha == 1 else alpha * (a @ b)
    return total + bias if beta == 1 else total + beta * bias


def _var(x: Tensor, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> Tensor:
    return _var_mean(x, dim, correction=correction, keepdim=keepdim)[0]


def _var_mean(
    x: Tensor, dim: Any = None, *, correction: Any = None, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    dims = list(range(x.ndim)) if dim is None or dim == [] else dim
    mean = x.mean(dims, keepdim=True)
    count = x.numel() // max(mean.numel(), 1)
    rest = max(count - (1 if correction is None else correction), 0)
    total = (x - mean).square().sum(dims, keepdim=keepdim)
    return total / rest, mean if keepdim else x.mean(dims)
