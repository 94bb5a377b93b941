"""The mode in which f runs in a trace: every call of torch goes through it, on stand-ins."""

import sys
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from ... import _tree
from ..._errors import BackendError, is_ours, line_of, untraceable
from ..._torch._graphs import ASSERT_ASYNC, MULTILABEL_MARGIN_LOSSES, record_attribute
from ..._torch._modes import FakeTensor, FakeTensorMode, TraceMode, is_over, storage, valueless
from ..._torch._transforms import is_transformed, rewrapped
from .._body import Aval
from ._cuts import Cuts
from ._rewrites import getter, rewritten


class Lift(TraceMode):
    """Put a stand-in for every tensor that f uses but was neither given nor made.

    A transformation inside f may have wrapped such a tensor before an operation shows it. Then the
    stand-in is wrapped alike, and takes the wrapper's place in all that follows.
    """

    def __init__(self, mode: FakeTensorMode, depth: int, cuts: Cuts, keeps_loops: bool) -> None:
        super().__init__()
        self.keeps_loops = keeps_loops
        self.mode, self.depth, self.cuts = mode, depth, cuts
        self.error: RuntimeError | None = None  # the first of an operation, which f may not have noticed
        self.asks = False  # whether f reads requires_grad, is_leaf or grad_fn of a tensor
        self.outside: set[int] = set()  # the memory of the stand-ins
        self.known: dict[int, tuple[Tensor, Tensor]] = {}  # keeps the tensors, so that ids stay theirs

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return self._call(func, args, kwargs)
        except RuntimeError as error:
            self.error = self.error or error
            raise

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func in _OF_THE_ORIGINAL:
            if func in _OF_AUTOGRAD and isinstance(args[0], FakeTensor) and not args[0].requires_grad:
                # torch's modules ask for the sake of speed.
                self.asks |= not is_ours(_caller().f_code.co_filename)
            return func(*args, **(kwargs or {}))
        if func in _METADATA:
            return func(*args)
        if func in _REFUSED:
            raise untraceable(f"f {_REFUSED[func]}, which a compiled loop cannot")
        if func in _FORMATS and (line := _users_line()):
            raise untraceable(f"f formats or prints a tensor at {line}, but in a trace it has no value")
        args, kwargs = _tree.map(self.plain, (args, kwargs or {}))
        func, args = rewritten(func, args, self.plain)
        result, written = self.cuts.call(func, args, kwargs)
        if any(storage(leaf) in self.outside for leaf in written if not is_transformed(leaf)):
            raise wrote_outside()  # at once, before f keeps the stand-in
        return result

    def plain(self, leaf: Any) -> Any:
        """Return the stand-in of a leaf, or the leaf if it needs none."""
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) in self.known:
            return self.known[id(leaf)][1]
        found = self._find(leaf)
        if found is not leaf:
            self.known[id(leaf)] = leaf, found
        return found

    def _find(self, leaf: Tensor) -> Tensor:
        wrapper = rewrapped(leaf, self.plain, self.depth)
        if wrapper is not None:
            return wrapper
        if isinstance(leaf, FakeTensor) and leaf.fake_mode is self.mode:
            return leaf
        found = valueless(self.mode, *Aval.of(leaf))
        self.outside.add(storage(found))
        record_attribute(found)
        return found


def check_plain(leaf: Tensor) -> None:
    """Refuse tensors of other classes or layouts, and those left behind by a trace."""
    if type(leaf) not in (Tensor, Parameter, FakeTensor):
        raise untraceable(f"a {type(leaf).__name__} may have operations of its own")
    if isinstance(leaf, FakeTensor) and is_over(leaf):
        raise BackendError(
            "a tensor has no value: it was made while a loop was traced, and kept where no pure function "
            "would keep it; make a new one"
        )
    if leaf.layout is not torch.strided:
        raise untraceable(f"a tensor of layout {leaf.layout} is not covered")


def wrote_outside() -> BackendError:
    return BackendError(
        "f wrote into a tensor it closes over; let it return new tensors instead, or use backend='eager'"
    )


_OF_AUTOGRAD = {getter("requires_grad"), getter("is_leaf"), getter("grad_fn")}
# Attributes that a stand-in lacks, or that differ from the original's.
_OF_THE_ORIGINAL = {*_OF_AUTOGRAD, Tensor.stride, Tensor.is_contiguous}
_METADATA = {*map(getter, ("shape", "dtype", "device", "ndim", "layout"))}  # the same of both
_MODES = {"_users_line", Lift._call.__name__, Lift.__torch_function__.__name__}  # functions of calls
_FORMATS = {Tensor.__format__, Tensor.__repr__}
_REFUSED = {
    getter("grad"): "reads .grad of a tensor",
    **dict.fromkeys(
        (Tensor.__dlpack__, Tensor.data_ptr, Tensor.untyped_storage, Tensor.apply_, Tensor.map_),
        "takes a tensor's values out of torch",
    ),
    **dict.fromkeys(
        (Tensor.detach_, torch.detach_, Tensor.data.__set__),  # type: ignore[attr-defined]
        "detaches a tensor in place, or replaces its data",
    ),
    # torch's decomposition is wrong: it counts what comes after the first -1.
    **dict.fromkeys(MULTILABEL_MARGIN_LOSSES, "applies multilabel_margin_loss"),
    ASSERT_ASYNC: "applies _assert_async",
}


def _caller() -> FrameType:
    """Return the frame that called torch, beyond the modes that the call went through."""
    frame = sys._getframe(1)
    while frame.f_back and (
        frame.f_code.co_name in _MODES or frame.f_code.co_filename.endswith(("_tensor.py", "overrides.py"))
    ):
        frame = frame.f_back
    return frame


def _users_line() -> str:
    """Name the user's line that formats a tensor, or nothing where torch does so for a message."""
    frame = _caller()
    return "" if is_ours(frame.f_code.co_filename) else line_of(frame)
