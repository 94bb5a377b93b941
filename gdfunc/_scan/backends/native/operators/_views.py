"""The same elements in other places, and tensors that are put together from parts of others."""

from itertools import accumulate
from typing import Any

import torch

from .._index import strides_of
from .._tensor import Lazy, assembled, cast, strided
from ._call import Call, lowers

RESHAPES = ("view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "view_copy", "flatten", "unflatten")


@lowers(*RESHAPES, "expand", "broadcast_to", "permute", "transpose", "t", "slice", "select")
@lowers("unfold", "diagonal", "split", "split_with_sizes", "unbind")
def _view(call: Call) -> Any:
    """Ask torch where the elements lie, in a tensor that is contiguous and has no values."""
    tensor, (_, *rest) = call["self"], call.node.args
    source = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    views = call.node.target(source, *rest, **call.node.kwargs)  # type: ignore[operator]

    def shown(view: torch.Tensor) -> Lazy:
        if view.dtype != source.dtype:
            raise call.refuse("to another dtype")
        return strided(tensor, view.shape, view.stride(), int(view.storage_offset()))

    return shown(views) if isinstance(views, torch.Tensor) else [shown(view) for view in views]


@lowers("flip")
def _flip(call: Call) -> Lazy:
    shape, strides = call.shape, strides_of(call.shape)
    dims = {dim % len(shape) for dim in call["dims"]}
    start = sum((shape[dim] - 1) * strides[dim] for dim in dims)
    signed = [-stride if dim in dims else stride for dim, stride in enumerate(strides)]
    return strided(call["self"], shape, signed, start)


# Put together from parts.


@lowers("cat")
def _cat(call: Call) -> Lazy:
    tensors = [tensor for tensor in call["tensors"] if tensor.shape != (0,) or call.shape == (0,)]
    dim = call.axis(shape=call.shape)
    starts = accumulate((tensor.shape[dim] for tensor in tensors), initial=0)
    parts = [
        (dim, start, 1, cast(tensor, call.dtype)) for start, tensor in zip(starts, tensors, strict=False)
    ]
    return assembled(call.block, call.shape, parts)


@lowers("slice_scatter")
def _slice_scatter(call: Call) -> Lazy:
    dim, start = call.axis(), call["start"] or 0
    extent = call.shape[dim]
    start = min(max(start + extent if start < 0 else start, 0), extent)
    part = dim, start, call["step"], cast(call["src"], call.dtype)
    return assembled(call.block, call.shape, [part], call["self"])
