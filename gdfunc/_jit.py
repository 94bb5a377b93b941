"""A function of tensors as one compiled call."""

from collections.abc import Callable
from functools import wraps
from numbers import Integral, Real
from typing import Any

import torch

from . import _tree
from ._errors import check_choice
from ._scan._scan import BACKENDS, call
from ._tree import Tree


def jit(f: Callable[..., Tree], *, backend: str = "auto") -> Callable[..., Tree]:
    """Compile a function of tensors: a run, its hypergradient, `torch.func.grad` of it.

        jit(f)(x) = f(x)

    f is traced: it is called once on tensors without values, and its operations, loops included, are
    written down and compiled. Later calls repeat them without Python, for as long as shapes and all that f
    can reach stay the same, the values of tensors excepted. See `scan` for what may be traced.

    Args:
        f: takes trees and returns a tree of tensors. A float, or a NumPy array, becomes a tensor (0-d
            float64 for a float), so that another learning rate traces nothing. Other arguments, such as an
            int, a string or a function, are part of f: another one is another trace.
        backend: who runs the trace, as in `scan`; `"eager"` calls f itself. Under `"auto"`, a function that
            cannot be traced warns once, and is called from Python.

    Returns:
        A function of the same arguments. Its results share no storage with the arguments.
        `torch.func.grad`, `jvp` and `vmap` go through it as through f.

    Raises:
        TypeError: f returns a leaf that is no tensor.
        ValueError: f writes into a tensor that it was given; an unknown backend.
        BackendError: (a RuntimeError) f needs the value of a tensor, or has what the backend does not
            cover; see `scan`.

    Example:
        >>> step = gd.make_step(lambda w, batch: (w - 1) ** 2)
        >>> def run(lr):
        ...     return gd.train(step, torch.tensor(0.0), None, gd.full_batch(1, 8), lr)[0]
        >>> fast = gd.jit(gd.hypergrad(run, "lr"))
        >>> print(f"{fast(lr=0.125).grads:.4f}")
        2.1357

    References:
        R. Frostig, M. J. Johnson, C. Leary, "Compiling machine learning programs via high-level
        tracing", 2018.
    """
    check_choice("backend", backend, BACKENDS)

    @wraps(f)
    def compiled(*args: Any, **kwargs: Any) -> Tree:
        args, kwargs = _tree.map(_as_tensor, _tree.as_tensors((args, kwargs)))
        result = call(lambda: f(*args, **kwargs), backend)
        return _tree.unshare(result, _tree.tensors((args, kwargs)))

    return compiled


def _as_tensor(leaf: Any) -> Any:
    is_float = isinstance(leaf, Real) and not isinstance(leaf, Integral)
    return torch.tensor(float(leaf), dtype=torch.float64) if is_float else leaf
