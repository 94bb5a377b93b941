"""torch.func's stack of transformations and the tensors that they wrap."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from math import prod

import torch
from torch import Tensor
from torch._C import _functorch
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import (
    FunctionalizeInterpreter,
    VmapInterpreter,
    retrieve_all_functorch_interpreters,
    temporarily_clear_interpreter_stack,
)
from torch._subclasses.functional_tensor import FunctorchFunctionalizeAPI
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

_FINISHED = -2  # the level of a wrapper whose transformation has returned


is_transformed = _functorch.is_functorch_wrapped_tensor  # by a grad, jvp or vmap that is running
# Because only the math kernel of attention has all derivatives, and rules for batches of them.
differentiable_attention = partial(sdpa_kernel, SDPBackend.MATH)
no_transforms = temporarily_clear_interpreter_stack  # suspends all running transformations of torch.func


def layers(leaf: Tensor) -> list[Tensor]:
    """List a tensor and the tensors that transformations have wrapped in it, the innermost last."""
    found = [leaf]
    while is_transformed(found[-1]):
        found.append(_functorch.get_unwrapped(found[-1]))
    return found


def may_be_differentiated(leaf: Tensor) -> bool:
    """Tell whether autograd, or a grad of torch.func at any level, follows this tensor."""
    if not is_transformed(leaf):
        return leaf.requires_grad
    return any(layer.requires_grad for layer in layers(leaf))


def unwrapped(leaf: Tensor) -> Tensor:
    """Take a tensor out of all running transformations; a vmapped axis becomes a leading axis."""
    while is_transformed(leaf):
        axis = _functorch.maybe_get_bdim(leaf)
        leaf = _functorch.get_unwrapped(leaf)
        leaf = leaf if axis < 0 else leaf.movedim(axis, 0)
    return leaf


def rewrapped(leaf: Tensor, inner: Callable[[Tensor], Tensor], depth: int) -> Tensor | None:
    """Replace the tensor inside a wrapper by `inner` of it, and wrap the result alike.

    A wrapper whose transformation has returned, as vjp leaves them for later gradients, is dropped.

    Returns:
        The new wrapper; `leaf` where `inner` changes nothing; None for a tensor that no transformation
        above level `depth` has wrapped.
    """
    level = _functorch.maybe_get_level(leaf) if is_transformed(leaf) else 0
    if level != _FINISHED and level <= depth:
        return None
    old = _functorch.get_unwrapped(leaf)
    new = inner(old)
    if new is old:
        return leaf
    if level == _FINISHED:
        return new
    axis = _functorch.maybe_get_bdim(leaf)
    return (
        _functorch._wrap_for_grad(new, level) if axis < 0 else _functorch._add_batch_dim(new, axis, level)
    )


def members() -> int:
    """Multiply the batch sizes of all running vmaps."""
    levels = _functorch.get_interpreter_stack() or ()
    vmaps = [level for level in levels if level.key() == TransformType.Vmap]
    return prod([VmapInterpreter(level).batch_size() for level in vmaps])


def depth() -> int:
    """Count the running transformations of torch.func."""
    innermost = _functorch.peek_interpreter_stack()
    return 0 if innermost is None else innermost.level()


def is_transforming() -> bool:
    """Tell whether a transformation of torch.func or a level of forward mode is running."""
    return _functorch.peek_interpreter_stack() is not None or is_pushing_tangents()


def is_pushing_tangents() -> bool:
    """Tell whether a level of forward mode is running, that of a jvp of torch.func included."""
    return forward_ad._current_level >= 0  # forward_ad has no public way to ask for it


def is_innermost_forward() -> bool:
    """Tell whether forward mode is the innermost running transformation."""
    levels = retrieve_all_functorch_interpreters()
    is_jvp = levels[-1].key() == TransformType.Jvp if levels else is_pushing_tangents()
    return is_jvp and torch._C._is_fwd_grad_enabled()


def has_forward_mode(above: int) -> bool:
    """Tell whether a jvp runs above level `above`."""
    levels = retrieve_all_functorch_interpreters()[above:]
    return any(level.key() == TransformType.Jvp for level in levels)


def functionalization() -> FunctorchFunctionalizeAPI | None:
    """Return the innermost running transformation if it is `torch.func.functionalize`."""
    innermost = _functorch.peek_interpreter_stack()
    if innermost is not None and innermost.key() == TransformType.Functionalize:
        return FunctorchFunctionalizeAPI(FunctionalizeInterpreter(innermost))
    return None


def innermost_vmap() -> VmapInterpreter | None:
    """Return the innermost running transformation if it is a vmap."""
    innermost = _functorch.peek_interpreter_stack()
    is_vmap = innermost is not None and innermost.key() == TransformType.Vmap
    return VmapInterpreter(innermost) if is_vmap else None


def without_members(leaf: Tensor, level: int) -> tuple[Tensor, int | None]:
    """Take a tensor out of the vmap at a level; also tell which axis is that of the members, if any."""
    return _functorch._unwrap_batched(_functorch.unwrap_if_dead(leaf), level)


def with_members(leaf: Tensor, axis: int | None, level: int) -> Tensor:
    """Let the vmap at a level take an axis for that of its members."""
    return leaf if axis is None else _functorch._add_batch_dim(leaf, axis, level)


@contextmanager
def neutral_levels(number: int) -> Iterator[None]:
    """Add levels that change nothing, so that wrappers made within lie above `number`."""
    for _ in range(number):
        _functorch._vmap_increment_nesting(1, "same")
    try:
        yield
    finally:
        for _ in range(number):
            _functorch._vmap_decrement_nesting()


@contextmanager
def no_wrapping() -> Iterator[None]:
    """Let operations pass all transformations by: their results are plain tensors."""
    with torch._C._DisableFuncTorch():
        yield
