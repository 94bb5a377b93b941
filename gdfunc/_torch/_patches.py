"""Attributes of other modules that gdfunc replaces for a while, each with its reason."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from threading import get_ident
from typing import Any

import torch
from torch._functorch import eager_transforms
from torch.autograd.function import FunctionMeta


@contextmanager
def _replaced(owner: Any, name: str, new: Any) -> Iterator[None]:
    """Give an attribute another value for a while."""
    before = vars(owner).get(name)
    setattr(owner, name, new)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


@contextmanager
def gradients_under_no_grad(change: Callable[[Any], Any]) -> Iterator[None]:
    """Pass the results of `torch.func.grad` and `vjp` through `change` where grad mode is off.

    Because `torch.no_grad` around such a call stops outer derivatives, but a graph has no grad mode, and
    these functions switch grad mode on again before any operation that a mode sees.
    """

    def changed(function: Callable[..., Any]) -> Callable[..., Any]:
        def impl(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            return result if torch.is_grad_enabled() else change(result)

        return impl

    owner: Any = eager_transforms
    with (
        _replaced(owner, "grad_and_value_impl", changed(owner.grad_and_value_impl)),
        _replaced(owner, "_vjp_with_argnums", changed(owner._vjp_with_argnums)),
    ):
        yield


@contextmanager
def applied_functions(is_counted: Callable[[type], bool]) -> Iterator[set[str]]:
    """Yield the names of the autograd Functions that this thread applies meanwhile, if they count.

    Because a graph holds the operations of such a Function but not its own derivative, and torch tells
    neither function modes nor dispatch modes of the call. `Function.apply` looks up `forward` on the
    class, which the metaclass sees. The caller holds the lock `_modes.tracing`.
    """
    applied: set[str] = set()
    thread = get_ident()

    def looked_up(cls: Any, name: str) -> Any:
        if name == "forward" and get_ident() == thread and is_counted(cls):
            applied.add(cls.__qualname__)
        return type.__getattribute__(cls, name)

    with _replaced(FunctionMeta, "__getattribute__", looked_up):
        yield applied


def no_log_of_fake_tensors() -> AbstractContextManager[None]:
    """Silence the tracer's log of a mistake in f, because the mistake is raised as well."""
    return _replaced(logging.getLogger("torch._subclasses.fake_tensor"), "disabled", True)


@contextmanager
def inductor_cache(directory: Path) -> Iterator[None]:
    """Let Inductor keep what it compiles in this directory.

    Because its default is a predictable path in the shared temporary directory, made without a check of
    owner and mode, whose libraries and pickles are loaded: whoever makes it first runs code in this
    process. pytorch#121122 asks for a directory of the user's.
    """
    name = "TORCHINDUCTOR_CACHE_DIR"
    before, os.environ[name] = os.environ.get(name), str(directory)
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def vectors_of_torch() -> AbstractContextManager[None]:
    """Let Inductor use the vector instructions that torch's own kernels use.

    Because Inductor compiles a test program for each instruction set, which takes 9 s on a new machine.
    """
    from torch._inductor import cpu_vec_isa

    known = {"AVX512": cpu_vec_isa.VecAVX512, "AVX2": cpu_vec_isa.VecAVX2}
    kind = known.get(torch.backends.cpu.get_cpu_capability())
    return _replaced(cpu_vec_isa, "valid_vec_isa_list", lambda: [kind()]) if kind else nullcontext()
