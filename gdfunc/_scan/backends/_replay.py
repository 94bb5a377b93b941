"""The backend that replays the graph from Python: no compiler, and half the overhead of the user's code."""

import torch
from torch import Tensor

from .._body import Body
from .._loop import Leaves


def run(body: Body, consts: Leaves, init: Leaves, xs: Leaves, length: int, unroll: int = 1) -> list[Tensor]:
    """Call the graph once a step."""
    carry, rows = init, []
    for t in range(length):
        results = body.graph(*consts, *carry, *[leaf[t] for leaf in xs])
        carry = results[: len(init)]
        rows.append(results[len(init) :])
    ys = [torch.stack(column) for column in zip(*rows, strict=True)]
    return [*[leaf.clone() for leaf in carry], *ys]
