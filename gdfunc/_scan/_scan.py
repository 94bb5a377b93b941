"""`scan`: its meaning, and the checks that every backend shares."""

import logging
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import _tree
from .._data import as_data
from .._errors import BackendError, check_choice, check_int
from .._torch._modes import current_trace_mode, is_tracing, lent, versions
from .._tree import Tree
from . import _cost, _loop
from ._adjoint import Adjoint, Reverse, check_adjoint

Function = Callable[[Tree, Tree], tuple[Tree, Tree]]
BACKENDS = ("eager", "native", "inductor", "cudagraph", "auto")
_LAID_OUT = 16  # steps: a longer loop stays a loop where the body of another is traced
_log = logging.getLogger("gdfunc")


def scan(
    f: Function,
    init: Tree,
    xs: Tree = None,
    length: int | None = None,
    *,
    reverse: bool = False,
    unroll: int = 1,
    backend: str = "auto",
    adjoint: Adjoint = Reverse(),
) -> tuple[Tree, Tree]:
    """Fold a function over the leading axis of `xs`, carrying state along: `jax.lax.scan`.

    Its meaning is

        def scan(f, init, xs, length=None):
            carry, ys = init, []
            for t in range(length):
                carry, y = f(carry, take(xs, t))
                ys.append(y)
            return carry, stack(ys)

    and `torch.func.grad`, `jvp` and `vmap` go through it, in any nesting, on every backend.

    Short loops run in Python, longer ones outside it. Results agree up to rounding. See `backend`.

    **What is traced.** gdfunc runs f on tensors without values, and records its operations. Tensors that
    f closes over become inputs of the loop. A scan within f needs no backend of its own: it is
    compiled with the one around it. Printed text appears when f is traced, not in every step. A result
    computed under `torch.no_grad` is a constant to all derivatives (in eager, as in torch, not to forward
    mode).

    **What is refused.** f must be pure. Each new trace is made twice, to find an f that draws from any
    generator of numbers, counts, appends, reads a clock or advances an iterator. It is refused, and the
    error names what it does. `"auto"` runs it in Python. gdfunc first puts back whatever the trace
    changed. An iterator that advanced cannot be put back, which is an error under `"auto"` too. f may fill
    a cache.

    **What recompiles.** Values of tensors and the length may change without another compilation. Another
    number in f, another shape or another transformation around the scan makes another loop. So keep numbers
    that you vary in 0-d tensors.

    **What is cached.** A trace serves until something changes that f can reach. If f reaches an object that
    gdfunc cannot compare between calls, f is traced on every call, and a warning names the object: a lock,
    a DataFrame, a module of settings that is read by names made at run time. Compiled code is kept on disk,
    in `gdfunc` under `$XDG_CACHE_HOME` or `~/.cache`. A new process finds it there in about a second, a
    native loop in less.

    Args:
        f: `(carry, x) -> (carry, y)`, pure. The carry it returns has the structure, shapes, dtypes and
            devices of the one it was given; y has the same structure and shapes in every step.
        init: the first carry, a tree of tensors.
        xs: a tree of tensors or NumPy arrays [T, ...] whose slices f gets as x; None: f gets None.
        length: T; needed only without xs.
        reverse: go from the last x to the first; `ys[t]` still belongs to `xs[t]`.
        unroll: at least how many steps Inductor and CUDA graphs lay out in a row: more run faster, and
            take longer to compile.
        backend: who runs the loop. `"eager"`: Python, with no setup and any f. `"native"`: one C function,
            for the small steps of a CPU (up to 2e8 FLOP in products and 1e9 bytes beyond them; the variable
            GDFUNC_NATIVE_LIMIT multiplies both), compiled in about half a second; members of a vmap are
            shared among torch's threads, and `torch.set_flush_denormal(True)` beforehand holds in all of
            them (averages that decay, such as Adam's, become slow denormal numbers). `"inductor"`:
            compiled to C++ on a CPU, to GPU kernels on CUDA; takes seconds the first time. `"cudagraph"`:
            recorded and replayed on CUDA. `"auto"`: eager for fewer than 100 steps (more if the carry has
            more than ten leaves), and for an f that cannot be traced. Otherwise native on a CPU and
            cudagraph on CUDA, if they can run f and are faster than torch's operations. Otherwise Inductor,
            if the loop is long enough to pay for its compilation. Otherwise torch's operations are called
            without f, at about half of eager's cost. It decides by counts of steps and operations, so every
            repeat of a run is decided alike. The logger "gdfunc" reports each decision at level DEBUG (to
            see it: `logging.basicConfig()`, and `logging.getLogger("gdfunc").setLevel("DEBUG")`), where
            "replay" is the call of torch's operations without f. A `PerformanceWarning` says why, where one
            costs more than ten seconds.
        adjoint: how derivatives go back through the loop, one of `gd.adjoints`: how many carries are kept,
            and what is computed again. All but `Reverse()` trace f, in eager too.

    Returns:
        `(carry, ys)`: the last carry, and the tree of y's with leading [T]. With T = 0 the carry is
        init, and ys is found by calling f once on an x of zeros. No leaf shares storage with init.

    Raises:
        TypeError: a leaf of init, of xs or of what f returns is no tensor; f returns no pair.
        ValueError: leaves of xs differ in length, or from `length`; T is unknown or negative; the carry
            or y changes its structure, shape, dtype or device; f writes into what it is given.
        BackendError: (a RuntimeError) the backend cannot run f: f needs the value of a tensor, prints
            one or is not pure; f has an operation that native does not cover (which it names); or there is
            no compiler, no CUDA device, no safe cache directory. Also where a traced loop is differentiated
            whose f applies a `torch.autograd.Function` or an operator of yours, or writes into a tensor
            under `torch.no_grad` or by way of `detach`: a trace keeps their values, not their derivative
            (a gradient taken within f is right).
        IndexError: a step uses an index that is out of range (native also names the step; in eager, where
            some of torch's operators raise a RuntimeError, it is theirs).

    Example:
        >>> def f(total, x):
        ...     return total + x, total
        >>> gd.scan(f, torch.tensor(0), torch.tensor([1, 2, 3]))
        (tensor(6), tensor([0, 1, 3]))

    References:
        J. Bradbury et al., "JAX: composable transformations of Python+NumPy programs", 2018.
    """
    check_int("unroll", unroll, 1)
    xs = as_data(xs, "xs")
    _tree.check_tensors(init, "init")
    length = _length(xs, length)
    check_adjoint(adjoint).check_steps(length)
    run = partial(fold, f, init, xs, length, reverse=reverse, unroll=unroll, adjoint=adjoint)
    return with_fallback(run, backend, length, len(_tree.leaves(init)))


def fold(
    f: Function,
    init: Tree,
    xs: Tree,
    length: int,
    backend: str,
    reverse: bool = False,
    unroll: int = 1,
    adjoint: Adjoint = Reverse(),
    run_steps: int | None = None,
    seen: dict[Any, Any] | None = None,
) -> tuple[Tree, Tree]:
    """Run `scan` for one segment of a run, with arguments that have been checked.

    Args:
        run_steps: the number of steps of the whole run; None: this scan is the run.
        seen: the traces of f in earlier segments, to which this segment adds its own; see `trace`.

    Raises:
        BackendError: also for "auto", if f cannot be traced; see `with_fallback`.
    """
    trace, run_steps = current_trace_mode(), length if run_steps is None else run_steps
    needs_trace = not isinstance(adjoint, Reverse)
    checked = _with_checks(f, init)
    if length == 0:
        _, y = checked(_tree.map(lent, init), _tree.map(lambda leaf: leaf.new_zeros(leaf.shape[1:]), xs))
        return _tree.clone(init), _tree.map(lambda leaf: leaf[:0].clone(), _stack([y]))
    # Because all steps of a long loop inside a traced f would take minutes to compile, it stays a loop.
    stays_loop = trace is not None and trace.keeps_loops and length > _LAID_OUT
    if backend != "eager" or needs_trace or stays_loop:
        how = {
            "reverse": reverse,
            "unroll": unroll,
            "runner": _loop.runner_of(backend, run_steps, not seen),
        }
        through, falls_back = adjoint.run_loop, backend == "auto"
        try:
            return _loop.trace_and_run(
                f, checked, init, xs, seen, through, falls_back, length=length, **how
            )
        except BackendError as error:
            if needs_trace and not hasattr(error, "__notes__"):  # a refusal is kept, and raised again
                error.add_note(
                    f"gdfunc: {adjoint} traces f on every backend; adjoint=Reverse() does not in eager"
                )
            raise
    carry, ys, order = _tree.map(lent, init), [], range(length)
    leaves, structure = _tree.flatten(_tree.map(lent, xs))
    for t in reversed(order) if reverse else order:
        carry, y = checked(carry, _tree.unflatten(structure, [leaf[t] for leaf in leaves]))
        ys.append(y)
    return _tree.clone(carry), _stack(ys[::-1] if reverse else ys)


def with_fallback(run: Callable[..., Any], backend: str, steps: int, leaves: int) -> Any:
    """Run on a backend. Under "auto", a loop that cannot be traced runs in eager."""
    backend = settle(backend, steps, leaves)
    try:
        return run(backend=backend)
    except BackendError as error:
        if not falls_back(error, backend, steps):
            raise
    return run(backend="eager")


def falls_back(error: BackendError, backend: str, steps: int) -> bool:
    """Tell whether a loop that cannot be traced runs in eager, and say so where that costs much time."""
    if backend != "auto" or not error.untouched:
        return False
    if not error.is_expected:
        _cost.warn_of_loss(error, steps, steps * _cost.PYTHON_STEP)
    _log.debug("%s steps on eager: %s", steps, error)
    return True


def call(f: Callable[[], Tree], backend: str) -> Tree:
    """Call f, on a backend other than eager as the one step of a loop, which returns new tensors."""
    if backend == "eager":
        return f()
    # Because the function may be called often, its run counts as a long one.
    run = partial(fold, lambda carry, x: (carry, f()), (), None, 1, run_steps=sys.maxsize)
    _, y = with_fallback(run, backend, sys.maxsize, 0)
    return _tree.map(lambda leaf: leaf.squeeze(0), y)


def settle(backend: str, steps: int, leaves: int) -> str:
    """Make "auto" eager for a run of so few steps that no trace pays for itself, except inside a trace."""
    check_choice("backend", backend, BACKENDS)
    if backend != "auto" or is_tracing() or _cost.is_worth_tracing(steps, leaves):
        return backend
    _log.debug("%d steps on eager: too few to trace", steps)
    return "eager"


def _length(xs: Tree, length: int | None) -> int:
    """The number of steps, on which all leaves of xs and `length` must agree."""
    if length is not None:
        length = check_int("length", length, 0)
    _tree.check_tensors(xs, "xs")
    found = {(*leaf.shape, -1)[0] for leaf in _tree.leaves(xs)}
    if len(found) == 1 and min(found) >= 0 and length in (None, *found):
        return found.pop()
    sizes = [("length", length)] if length is not None else []
    for path, leaf in _tree.named_leaves(xs, "xs"):
        if not leaf.ndim:
            raise ValueError(f"{path} is 0-d; scan goes over dim 0 of every leaf of xs")
        sizes.append((path, len(leaf)))
        if len(leaf) != sizes[0][1]:
            raise ValueError(
                f"xs leaves and length disagree on the number of steps: "
                f"{sizes[0][0]} has {sizes[0][1]}, {path} has {len(leaf)}"
            )
    if length is None:
        raise ValueError("scan needs xs with at least one leaf, or length, to know how many steps")
    return length


def _with_checks(f: Function, init: Tree) -> Function:
    """Make f check at each call that it writes into no input and returns a pair with a carry like init."""

    check: Callable[[Tree], Tree] | None = None

    def checked(carry: Tree, x: Tree) -> tuple[Tree, Tree]:
        nonlocal check
        given = _tree.leaves((carry, x))
        before = versions(given)
        result = f(carry, x)
        if versions(given) != before:
            raise ValueError("f wrote into its carry or x; it must return new tensors instead")
        if not isinstance(result, tuple) or len(result) != 2:
            raise TypeError(f"f must return a pair (carry, y); got {type(result).__name__}")
        check = check or like(init)  # made at the first call: a loop with a kept trace never calls f
        return check(result[0]), result[1]

    return checked


def like(init: Tree) -> Callable[[Tree], Tree]:
    """Make the check that a carry has the structure, shapes, dtypes and devices of init."""
    leaves, structure = _tree.flatten(init)
    kinds, check = _kinds(leaves), _leaves_like(init, "init")

    def checked(carry: Tree) -> Tree:
        found, own = _tree.flatten(carry)
        if own == structure and _kinds(found) == kinds:  # the usual case, in a third of the time
            return carry
        return _tree.unflatten(structure, check(carry, "carry", "carry"))

    return checked


def _stack(ys: list[Tree]) -> Tree:
    """Stack the y's, which all have the structure, shapes, dtypes and devices of the first."""
    structure, check = _tree.flatten(ys[0])[1], _leaves_like(ys[0], "y of step 0")
    rows = [check(y, f"y of step {t}", f"y of step {t}: y") for t, y in enumerate(ys)]
    return _tree.unflatten(structure, [torch.stack(column) for column in zip(*rows, strict=True)])


def _leaves_like(reference: Tree, reference_name: str) -> Callable[[Tree, str, str], list[Tensor]]:
    """Make the check of a tree, its name and that of its leaves, which lists the leaves."""
    leaves, structure = _tree.flatten(reference)
    kinds = _kinds(leaves)

    def check(tree: Tree, name: str, leaf_name: str) -> list[Tensor]:
        matched = _tree.match(structure, tree)
        if matched is None:
            matched = _tree.check_structure(tree, reference, name, reference_name)
        if kinds is None or _kinds(matched) != kinds:
            for leaf, other, (path, _) in zip(
                matched, leaves, _tree.named_leaves(reference, leaf_name), strict=True
            ):
                if not isinstance(leaf, Tensor) or _kinds([leaf]) != _kinds([other]):
                    _refuse(leaf, other, path)
        return matched

    return check


def _kinds(leaves: list[Any]) -> tuple[list[Any], ...] | None:
    """List the shapes, dtypes and devices of tensors, or return None where one is no tensor."""
    if not all(isinstance(leaf, Tensor) for leaf in leaves):
        return None
    return [x.shape for x in leaves], [x.dtype for x in leaves], [x.device for x in leaves]


def _refuse(leaf: Any, reference: Any, path: str) -> NoReturn:
    if not isinstance(leaf, Tensor):
        raise TypeError(f"{path} is {type(leaf).__name__}, not a Tensor; return torch.tensor(...)")
    raise ValueError(
        f"{path} changed from {_describe(reference)} to {_describe(leaf)}; "
        f"it must keep its shape, dtype and device"
    )


def _describe(leaf: Tensor) -> str:
    dtype = str(leaf.dtype).removeprefix("torch.")
    return f"{dtype} {tuple(leaf.shape)} on {leaf.device}"
