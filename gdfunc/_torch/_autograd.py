"""Gradients by autograd, where torch.func would give the same at three times the cost."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ._modes import has_no_value, is_tracing, lent, same_bytes
from ._transforms import is_transformed, is_transforming, layers

_C: Any = torch._C
_AccumulateGrad = _C._functions.AccumulateGrad  # a leaf at the end of a graph
# Because torch.autograd.grad checks its arguments for a quarter of the time of a small gradient.
_run_backward: Any = torch.autograd.Variable._execution_engine.run_backward
_MARK = "_gradient_runs"  # an attribute of our leaves: whether their gradient is still running


def is_watched() -> bool:
    """Tell whether a transformation or a mode, of a trace or of inference, sees operations."""
    return (
        is_transforming()
        or _C._len_torch_function_stack() > 0
        or _C._len_torch_dispatch_stack() > 0
        or torch.is_inference_mode_enabled()
    )


def serves(leaves: Sequence[Tensor]) -> bool:
    """Tell whether autograd may take a gradient at these leaves, of params and batch.

    It may where no transformation, mode or subclass sees the operations, and nothing else follows a leaf.
    """
    if is_watched() or _C._is_any_autocast_enabled():
        return False
    for leaf in leaves:
        if type(leaf) is not Tensor or leaf.requires_grad or leaf.is_inference():
            return False
    return True


def copies(leaves: Sequence[Tensor]) -> list[Tensor]:
    """Lend tensors that `serves` accepts: `lent` in a third of the time."""
    try:
        return [torch._lazy_clone(leaf) for leaf in leaves]
    except RuntimeError:
        return [lent(leaf) for leaf in leaves]


def gradient(
    f: Callable[[list[Tensor]], tuple[Tensor, list[Tensor]]], leaves: list[Tensor]
) -> tuple[Tensor, list[Tensor], list[Tensor]] | None:
    """Compute f, and the gradient of its value at leaves that are made for it.

    f returns its value and other tensors. The result is `(value, others, slopes)`, or None where only
    torch.func can compute it. Value and slopes have a graph only to tensors that require a gradient and
    that f closes over.
    """
    goes_on = torch.is_grad_enabled()
    for leaf in leaves:
        leaf.requires_grad_().__dict__[_MARK] = True
    try:
        with torch.enable_grad():
            value, others = f(leaves)
            ours = set(map(id, leaves))

            def is_outside(end: Tensor) -> bool:  # leaves of a finished gradient do not count
                return id(end) not in ours and getattr(end, _MARK, True)

            if goes_on and any(other.requires_grad and _has_end(other, is_outside) for other in others):
                return None
            goes_on = goes_on and _has_end(value, is_outside)
            if goes_on and _has_no_second_derivative(value):
                return None
            start = (torch.ones_like(value),)
            slopes = _run_backward(
                (value,),
                start,
                goes_on,
                goes_on,
                tuple(leaves),
                allow_unreachable=True,
                accumulate_grad=False,
            )
    except RuntimeError as error:
        if "Inference tensor" in str(error):  # that f closes over
            return None
        raise
    finally:
        for leaf in leaves:
            leaf.__dict__[_MARK] = False
    used = [slope is not None for slope in slopes]
    if not any(used) and not _has_end(value, lambda end: id(end) in ours):
        return None
    if not all(used):
        slopes = [
            torch.zeros_like(x) if slope is None else slope for x, slope in zip(leaves, slopes, strict=True)
        ]
    others = [other.detach() if other.requires_grad else other for other in others]
    if goes_on:
        return value, others, slopes
    # Because a Function of the user's may return a leaf as its gradient.
    return value.detach(), others, [slope.detach() if slope.requires_grad else slope for slope in slopes]


def is_followed(leaf: Tensor) -> bool:
    """Tell whether a running transformation, or a running gradient by autograd, follows this tensor."""
    if is_transformed(leaf) or not leaf.requires_grad:
        return is_transformed(leaf)
    return _has_end(leaf, lambda end: getattr(end, _MARK, False))


def has_values(leaf: Tensor) -> bool:
    """Tell whether a tensor has a value that may be read, if by waiting for a GPU."""
    return not (is_followed(leaf) or is_tracing() or has_no_value(leaf))


def is_readable(leaf: Tensor) -> bool:
    """Tell whether a tensor's value is at hand: no transformation or gradient, no trace, no GPU."""
    return leaf.is_cpu and has_values(leaf)


def written(copies: Sequence[Tensor], originals: Sequence[Tensor]) -> list[bool]:
    """Tell which lent copies were written to, also by way of `.data`, which counts no version."""
    return [
        bool(copy._version) or not is_unwritten(copy, original)
        for copy, original in zip(copies, originals, strict=True)
    ]


def is_unwritten(copy: Tensor, original: Tensor) -> bool:
    """Tell whether a lent copy, which counts no version, still has the bits of the original."""
    return _C._is_cow_tensor(copy) or same_bytes(copy, original)


def share_storage(leaves: Sequence[Tensor]) -> bool:
    """Tell whether two plain tensors share storage."""
    return len({leaf.untyped_storage()._cdata for leaf in leaves}) < len(leaves)


def _has_end(tensor: Tensor, wanted: Callable[[Tensor], bool]) -> bool:
    """Tell whether a tensor's graph has such a leaf."""
    if tensor.grad_fn is None:
        return wanted(tensor)
    return any(type(node) is _AccumulateGrad and wanted(node.variable) for node in _nodes(tensor.grad_fn))


def leads_to(tensor: Tensor, ends: tuple[str, ...], not_through: str) -> bool:
    """Tell whether a graph of a tensor reaches a leaf, or a Function of these names, but through another.

    The graphs of all running gradients are walked, each back to the Functions named `not_through`.
    """
    for layer in layers(tensor):
        if layer.requires_grad and layer.grad_fn is None:
            return True
        for node in _nodes(layer.grad_fn, lambda node: node.name().startswith(not_through)):
            is_end = type(node) is _AccumulateGrad or node.name().startswith(ends)
            if is_end and not node.name().startswith(not_through):
                return True
    return False


def _has_no_second_derivative(value: Tensor) -> bool:
    """Tell whether a fast kernel of attention was used."""
    return value.grad_fn is not None and any(
        "ScaledDotProduct" in node.name() for node in _nodes(value.grad_fn)
    )


def _nodes(root: Any, ends: Callable[[Any], bool] = lambda node: False) -> Iterator[Any]:
    """Walk the nodes of a graph, and not beyond those at which it ends."""
    waiting, seen = [root] if root is not None else [], {None, root}
    while waiting:
        node = waiting.pop()
        yield node
        if ends(node):
            continue
        for other, _ in node.next_functions:
            if other not in seen:
                seen.add(other)
                waiting.append(other)
