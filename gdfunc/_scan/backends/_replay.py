"""The backend that replays the graph from Python: no compiler, and half the overhead of the user's code."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .._body import Body, Leaves, Loop, Runner


def run(
    body: Body,
    consts: Leaves,
    init: Leaves,
    xs: Leaves,
    length: int,
    unroll: int = 1,
    nested: Runner | None = None,
) -> list[Tensor]:
    """Call the graph once a step.

    Args:
        nested: the runner of loops inside the graph; None: they are replayed too, or recorded in a trace.
    """
    step = body.graph if nested is None else lower(body, lambda loop, given: loop.execute(nested, given))
    carry, rows = init, []
    for t in range(length):
        results = step(*consts, *carry, *[leaf[t] for leaf in xs])
        carry = results[: len(init)]
        rows.append(results[len(init) :])
    ys = [torch.stack(column) for column in zip(*rows, strict=True)]
    return [*[leaf.clone() for leaf in carry], *ys]


def settings() -> tuple[bool, str]:
    """List the settings of torch that are part of compiled code."""
    return torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()


def lower(body: Body, nested: Callable[[Loop, Leaves], list[Tensor]]) -> Callable[..., list[Tensor]]:
    """Make the function of a body's graph that leaves the loops inside it to `nested`."""
    return _Lowering(body.graph, nested).run if body.has_loops else body.graph


class _Lowering(fx.Interpreter):
    """Walks a graph; the one place where a backend meets loops inside a loop."""

    def __init__(self, graph: fx.GraphModule, nested: Callable[[Loop, Leaves], list[Tensor]]) -> None:
        super().__init__(graph)
        self.nested = nested

    def call_function(self, target: Any, args: Sequence[Any], kwargs: Any) -> Any:
        if isinstance(target, Loop):
            return self.nested(target, args)
        return super().call_function(target, tuple(args), kwargs)
