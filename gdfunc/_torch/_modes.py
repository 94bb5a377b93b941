"""torch's stacks of modes, tensors without values, and the memory and versions of tensors."""

import gc
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch._subclasses.fake_tensor import is_fake
from torch.nn.modules import module
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

from .._lock import Lock
from ._transforms import is_transformed, is_transforming, layers, no_transforms, no_wrapping

has_no_value = is_fake  # a FakeTensor, also inside the wrapper of a transformation

tracing = Lock(waits=True)  # Because torch.fx patches attributes that all threads share while it traces.


class TraceMode(TorchFunctionMode):
    """The mode in which a user's function runs while gdfunc traces it.

    Attributes:
        keeps_loops: whether a long scan inside the function stays a loop, or all its steps are recorded.
    """

    keeps_loops = True


def current_trace_mode() -> TraceMode | None:
    """Find the mode of the trace that the caller runs in on torch's stack of function modes, or None."""
    if not torch._C._len_torch_function_stack():  # faster than the list, and most often 0
        return None
    modes = _get_current_function_mode_stack()
    return next((mode for mode in reversed(modes) if isinstance(mode, TraceMode)), None)


def is_tracing() -> bool:
    """Tell whether the caller runs inside a trace of gdfunc."""
    return current_trace_mode() is not None


@contextmanager
def without_collections() -> Iterator[None]:
    """Hold the lock `tracing`, and keep Python from searching for garbage meanwhile.

    Because a large trace makes a million objects that stay: Python would visit all of them again and again,
    which takes a third of the time.
    """
    with tracing:
        collects = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if collects:
                gc.enable()


@contextmanager
def clean_room(shapes: Any = None) -> Iterator[FakeTensorMode]:
    """Suspend all running transformations and modes; yield a mode in which tensors have no values.

    Args:
        shapes: torch's ShapeEnv, for sizes that are symbols; see `_inductor.symbolic_length`.
    """
    with _uninterrupted(), without_collections(), ExitStack() as stack:
        stack.enter_context(no_function_modes())
        stack.enter_context(_disable_current_modes())
        stack.enter_context(no_transforms())
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autograd.set_detect_anomaly(False))
        # Not a subclass with an attribute, because torch's scan knows this class alone.
        mode: Any = stack.enter_context(FakeTensorMode(shape_env=shapes))
        mode.is_over = False
        stack.callback(setattr, mode, "is_over", True)
        yield mode


def is_over(leaf: FakeTensor) -> bool:
    """Tell whether a tensor without a value was left behind by a trace that is over."""
    return getattr(leaf.fake_mode, "is_over", False)


def is_from_a_trace(leaf: Tensor) -> bool:
    """Tell whether a tensor without a value was made in a trace of gdfunc, running or over."""
    return isinstance(leaf, FakeTensor) and hasattr(leaf.fake_mode, "is_over")


def valueless(
    mode: FakeTensorMode, shape: Any, dtype: torch.dtype, device: torch.device, stride: Any = None
) -> Tensor:
    """Make a tensor without values that no running transformation or trace knows of."""
    with no_wrapping(), _disable_current_modes(), mode:
        if stride is None:
            return torch.empty(shape, dtype=dtype, device=device)
        return torch.empty_strided(shape, stride, dtype=dtype, device=device)


def mode_of(tensors: Sequence[Tensor]) -> FakeTensorMode | None:
    """Return the mode of the first tensor that has no value."""
    return next((leaf.fake_mode for leaf in tensors if isinstance(leaf, FakeTensor)), None)


def plain_copy(constant: Tensor) -> Tensor:
    """Copy a tensor without any running mode or transformation seeing it."""
    with unwatched():
        return constant.detach().clone()


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Tell whether two plain tensors have the same metadata and the same bits."""
    with unwatched():
        kinds = [(leaf.shape, leaf.dtype, leaf.device) for leaf in (a, b) if not has_no_value(leaf)]
        bits = [leaf.detach().contiguous().flatten().view(torch.uint8) for leaf in (a, b)]
        return len(kinds) == 2 and kinds[0] == kinds[1] and torch.equal(*bits)


_HOOKS = (
    "_global_backward_pre_hooks",
    "_global_backward_hooks",
    "_global_forward_pre_hooks",
    "_global_forward_hooks",
    "_global_buffer_registration_hooks",
    "_global_module_registration_hooks",
    "_global_parameter_registration_hooks",
)
no_dispatch_modes = _disable_current_modes
unseen = torch._C.DisableTorchFunction  # keeps operations from function modes and tensor subclasses
uses_autocast = torch._C._is_any_autocast_enabled  # for any device
no_autocast = torch._C._DisableAutocast  # for all devices


@contextmanager
def unwatched() -> Iterator[None]:
    """Keep operations from all modes, transformations and tensor subclasses."""
    with unseen(), no_wrapping(), _disable_current_modes():
        yield


def active_modes() -> list[Any]:
    """List the running modes of torch, on calls of functions and on operators."""
    return [*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()]


def has_global_hooks() -> bool:
    """Tell whether a hook is registered that all modules call."""
    return any(getattr(module, name) for name in _HOOKS)


def default_device() -> torch.device | None:
    """Return the default device, or None for torch's own."""
    # A default device is a function mode. Without one, torch asks for it in vain, but slowly.
    return torch.get_default_device() if torch._C._len_torch_function_stack() else None


@contextmanager
def no_function_modes() -> Iterator[None]:
    """Suspend the modes on calls of functions."""
    modes = [torch._C._pop_torch_function_stack() for _ in range(torch._C._len_torch_function_stack())]
    try:
        yield
    finally:
        for mode in reversed(modes):
            torch._C._push_on_torch_function_stack(mode)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Delay a first Ctrl-C, because torch's modes may not survive it. A second Ctrl-C is not delayed."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    caught: list[tuple[int, FrameType | None]] = []

    def delay(*what: Any) -> None:
        if caught:
            handler(*what)
        caught.append(what)

    signal.signal(signal.SIGINT, delay)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is delay:  # f may have installed a handler of its own
            signal.signal(signal.SIGINT, handler)
        if caught:
            handler(*caught[0])


def storage(leaf: Tensor) -> int:
    """Identify the memory that a tensor is a view of."""
    with unseen():
        return leaf.untyped_storage()._cdata


def lent(leaf: Tensor) -> Tensor:
    """Give an equal tensor to a user's function, so that nothing that it writes reaches the original.

    The memory is shared until one of the two is written to: `torch._lazy_clone` copies on write. It has no
    batching rule, and does not know memory that others own, such as NumPy's: a copy serves there.
    """
    if is_tracing():  # a trace sees what is written
        return leaf
    if not is_transformed(leaf):
        with suppress(RuntimeError), unseen():
            return torch._lazy_clone(leaf)
    return leaf.clone()


def versions(leaves: Sequence[Any]) -> list[int]:
    """Count how often each tensor was written to; 0 where torch does not count."""
    with unseen():
        if not is_transforming():
            with suppress(RuntimeError):  # of an inference tensor
                return [leaf._version for leaf in leaves]
        bare = [layers(leaf)[-1] if is_transformed(leaf) else leaf for leaf in leaves]
        return [0 if leaf.is_inference() else leaf._version for leaf in bare]


def is_symbolic_zero(leaf: Tensor) -> bool:
    """Tell whether a tensor is a zero of forward mode, which has no storage."""
    return leaf._is_zerotensor()
