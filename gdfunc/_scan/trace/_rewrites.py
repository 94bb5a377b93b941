"""Calls of torch in forms that a trace can follow: without values of indices or hidden writing."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def rewritten(func: Any, args: Any, plain: Callable[[Any], Any]) -> tuple[Any, Any]:
    """Return a call in a form that a trace can follow; `plain` gives the stand-in of a tensor."""
    if func in _COPIES:
        return _COPIES[func], args[:1]
    if func is Tensor.__getitem__:
        return func, _without_scalars(args[0], _index(args[1], plain))
    if func is Tensor.__setitem__:
        x, index, value = args
        index = index[0] if isinstance(index, tuple) and len(index) == 1 else index
        if _fills(x, index, value):
            mask = index.reshape(*index.shape, *[1] * (x.ndim - index.ndim))
            return Tensor.masked_fill_, (x, mask, value)
        return func, (x, _with_axes(_index(index, plain)), value)
    return (_one_hot if func is functional.one_hot else func), args


def getter(name: str) -> Any:
    return getattr(Tensor, name).__get__


_COPIES = {getter("data"): Tensor.detach, Tensor.__deepcopy__: lambda x: x.detach().clone()}


_INTEGERS = {torch.int8, torch.int16, torch.int32, torch.int64}


def _index(index: Any, plain: Callable[[Any], Any]) -> Any:
    """Put stand-ins into the slices of an index too: torch would read the values of tensors there."""
    if isinstance(index, tuple):
        return tuple(_index(entry, plain) for entry in index)
    if not isinstance(index, slice):
        return index
    return slice(*map(plain, (index.start, index.stop, index.step)))


def _is_scalar_index(entry: Any) -> bool:
    return isinstance(entry, Tensor) and not entry.ndim and entry.dtype in _INTEGERS


def _without_scalars(x: Tensor, index: Any) -> tuple[Tensor, Any]:
    """Pick with the 0-d integers among an index first: torch would read their values."""
    entries = list(index) if isinstance(index, tuple) else [index]
    for place, entry in enumerate(entries):
        if _is_scalar_index(entry):
            axis = sum(_axes_taken(before, entries, x) for before in entries[:place])
            x = torch.ops.aten.index.Tensor(x, [None] * axis + [entry.reshape(1)])
            entries[place] = 0
    return x, tuple(entries) if isinstance(index, tuple) else entries[0]


def _axes_taken(entry: Any, entries: list[Any], x: Tensor) -> int:
    if entry is None or isinstance(entry, bool):
        return 0
    if entry is Ellipsis:
        return x.ndim - sum(_axes_taken(other, entries, x) for other in entries if other is not Ellipsis)
    return entry.ndim if isinstance(entry, Tensor) and entry.dtype in (torch.bool, torch.uint8) else 1


def _with_axes(index: Any) -> Any:
    """Make the 0-d integers of an index 1-d, where the axis that this adds to the left is no matter."""
    entries = index if isinstance(index, tuple) else (index,)
    if all(_is_scalar_index(entry) or type(entry) is int for entry in entries):
        return tuple(entry.reshape(1) if isinstance(entry, Tensor) else entry for entry in entries)
    return index


def _fills(x: Tensor, mask: Any, value: Any) -> bool:
    """Tell whether an assignment by a mask needs no value of it: what is assigned is one number."""
    alike = isinstance(mask, Tensor) and mask.dtype == torch.bool and x.shape[: mask.ndim] == mask.shape
    if isinstance(value, Tensor):
        return alike and not value.ndim and value.dtype == x.dtype
    return alike and isinstance(value, (int, float)) and torch.result_type(x, value) == x.dtype


def _one_hot(input: Tensor, num_classes: int = -1) -> Tensor:
    """Place the ones by index, so that a class that is out of range is one."""
    if num_classes < 1 or input.dtype != torch.int64:  # as many as there are: a value; or a mistake
        return functional.one_hot(input, num_classes)
    return input.new_zeros((*input.shape, num_classes)).scatter(-1, input[..., None], 1)


def _showing(batch_norm: Any) -> Callable[..., Any]:
    """Let a batch norm update running statistics in sight: the operation does not say that it writes."""

    def shown(
        x: Tensor, weight: Any, bias: Any, mean: Any, variance: Any, training: bool, *rest: float
    ) -> Any:
        if not training or mean is None or variance is None:
            return NotImplemented
        momentum, eps = rest
        results = batch_norm(x, weight, bias, None, None, True, momentum, eps)
        axes = [axis for axis in range(x.ndim) if axis != 1]
        spread = x.detach().to(variance.dtype).var(axes, correction=1)
        for running, now in ((mean, results[1].detach()), (variance, spread)):
            running.copy_(momentum * now + (1 - momentum) * running)
        return results

    return shown


def _power(x: Tensor, exponent: Any) -> Any:
    """Keep a bool to the power of a bool a bool: without values, torch takes it for an integer."""
    if x.dtype != torch.bool or not isinstance(exponent, bool):
        return NotImplemented
    return x.clone() if exponent else torch.ones_like(x)


_NORMS = torch.ops.aten.native_batch_norm, torch.ops.aten.cudnn_batch_norm, torch.ops.aten.miopen_batch_norm
# For the table of a trace.
OPERATIONS = {norm.default: _showing(norm) for norm in _NORMS}
OPERATIONS[torch.ops.aten.pow.Tensor_Scalar] = _power
