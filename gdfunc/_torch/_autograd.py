"""Gradients by autograd, where torch.func would give the same at three times the cost."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ._modes import same_bytes
from ._transforms import is_transformed, is_transforming

_C: Any = torch._C
_AccumulateGrad = _C._functions.AccumulateGrad  # a leaf at the end of a graph
# Because torch.autograd.grad checks its arguments for a quarter of the time of a small gradient.
_run_backward: Any = torch.autograd.Variable._execution_engine.run_backward
_MARK = "_gradient_runs"  # an attribute of our leaves: whether their gradient is still running


def serves(leaves: Sequence[Tensor]) -> bool:
    """Tell whether autograd may take a gradient at these leaves, of params and batch.

    It may where no transformation, mode or subclass sees the operations, and nothing else follows a leaf.
    """
    return (
        not is_transforming()
        and not torch._C._len_torch_function_stack()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._is_any_autocast_enabled()
        and not torch.is_inference_mode_enabled()
        and all(type(leaf) is Tensor and not (leaf.requires_grad or leaf.is_inference()) for leaf in leaves)
    )


def gradient(
    f: Callable[[list[Tensor]], Tensor], leaves: list[Tensor]
) -> tuple[Tensor, list[Tensor]] | None:
    """Compute f, and its gradient at leaves that are made for it, or None where only torch.func can.

    The results have a graph only to tensors that require a gradient and that f closes over.
    """
    goes_on = torch.is_grad_enabled()
    for leaf in leaves:
        setattr(leaf.requires_grad_(), _MARK, True)
    try:
        with torch.enable_grad():
            value = f(leaves)
            ours = set(map(id, leaves))
            goes_on = goes_on and any(_counts(end) and id(end) not in ours for end in _ends(value))
            if goes_on and _has_no_second_derivative(value):
                return None
            slopes = _run_backward(
                (value,), (torch.ones_like(value),), goes_on, goes_on, tuple(leaves),
                allow_unreachable=True, accumulate_grad=False,
            )  # fmt: skip
    except RuntimeError as error:
        if "Inference tensor" in str(error):  # that f closes over
            return None
        raise
    finally:
        for leaf in leaves:
            setattr(leaf, _MARK, False)
    if all(slope is None for slope in slopes) and not any(id(end) in ours for end in _ends(value)):
        return None
    slopes = [
        torch.zeros_like(x) if slope is None else slope for x, slope in zip(leaves, slopes, strict=True)
    ]
    if goes_on:
        return value, slopes
    # Because a Function of the user's may return a leaf as its gradient.
    return value.detach(), [slope.detach() if slope.requires_grad else slope for slope in slopes]


def is_followed(leaf: Tensor) -> bool:
    """Tell whether a running transformation, or a running gradient by autograd, follows this tensor."""
    if is_transformed(leaf) or not leaf.requires_grad:
        return is_transformed(leaf)
    return any(getattr(end, _MARK, False) for end in _ends(leaf))


def is_written(copy: Tensor, original: Tensor) -> bool:
    """Tell whether a copy that was lent has been written to, as `.data` does without counting a version."""
    if copy._version:
        return True
    return not _C._is_cow_tensor(copy) and not same_bytes(copy, original)


def _counts(end: Tensor) -> bool:
    """Tell whether a leaf is the user's, or that of a gradient that is running."""
    return getattr(end, _MARK, True)


def _ends(tensor: Tensor) -> Iterator[Tensor]:
    """Find the leaves of a tensor's graph."""
    for node in _nodes(tensor):
        if type(node) is _AccumulateGrad:
            yield node.variable
    if tensor.is_leaf:
        yield tensor


def _nodes(tensor: Tensor) -> Iterator[Any]:
    waiting = [tensor.grad_fn]
    seen = {None, *waiting}
    while waiting:
        node = waiting.pop()
        if node is not None:
            yield node
            new = [other for other, _ in node.next_functions if other not in seen]
            seen.update(new)
            waiting += new


def _has_no_second_derivative(value: Tensor) -> bool:
    """Tell whether a fast kernel of attention was used."""
    return any("ScaledDotProduct" in node.name() for node in _nodes(value))
