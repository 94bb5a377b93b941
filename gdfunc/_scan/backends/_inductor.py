"""The backend that compiles a whole loop with Inductor, through torch's scan operator."""

import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..._errors import BackendError
from ..._lock import Lock
from ..._torch._graphs import node_of, recorder
from ..._torch._inductor import (
    compiled,
    inductor_decompositions,
    scan_operator,
    shape_environment,
    symbolic_length,
)
from ..._torch._modes import clean_room, storage, valueless
from ..._torch._operators import threefry_by_operators
from ..._torch._patches import inductor_cache
from .._body import Body, Leaves
from . import _replay
from ._cache import guarded, private_directory

_SMALL_BODY = 64  # operations: the steps of a smaller body are laid out in a row …
_ROW = 4  # … so many, because the loop around them costs as much as they do
_SMALL_MATMUL = 4096  # multiplications: a call of a BLAS costs more than these, and cannot be fused

_compiling = Lock()


def run(body: Body, consts: Leaves, init: Leaves, xs: Leaves, length: int, unroll: int = 1) -> list[Tensor]:
    """Run the compiled loop. A body is compiled once for all lengths, and once for a single step."""
    if unroll == 1 and len(body.graph.graph.nodes) < _SMALL_BODY and not body.has_loops:
        unroll = _ROW
    blocks, rest = divmod(length, unroll)
    if unroll == 1 or not blocks:
        return _loop(body, consts, init, xs, length, once=length == 1)
    row = _in_a_row(body, unroll)
    done = _loop(
        row, consts, init, [x[: blocks * unroll].unflatten(0, (blocks, unroll)) for x in xs], blocks
    )
    carry, ys = done[: len(init)], [y.flatten(0, 1) for y in done[len(init) :]]
    if not rest:
        return [*carry, *ys]
    last = _replay.run(body, consts, carry, [x[blocks * unroll :] for x in xs], rest, nested=run)
    pairs = zip(ys, last[len(init) :], strict=True)
    return [*last[: len(init)], *[torch.cat(pair) for pair in pairs]]


def _in_a_row(body: Body, steps: int) -> Body:
    """Derive the body that takes so many steps at once."""

    def function(*inputs: Tensor) -> list[Tensor]:
        consts, carry, x = body.split(inputs)
        return _replay.run(body, consts, carry, x, steps)

    x = tuple(aval.with_axis(steps) for aval in body.x)
    return body.derive(("in a row", steps), function, body.consts, body.carry, x)


def _loop(
    body: Body, consts: Leaves, init: Leaves, xs: Leaves, length: int, once: bool = False
) -> list[Tensor]:
    key = (once, torch.get_num_threads(), *_replay.settings())
    with _compiling, warnings.catch_warnings():
        if key not in body.inductor:
            warnings.simplefilter("ignore")  # torch's, about its own modules
            body.inductor[key] = _compile(body, once)
    return list(body.inductor[key]([*consts, *init, *(xs or [torch.empty(length)])]))


def _compile(body: Body, once: bool) -> Callable[[list[Tensor]], Any]:
    """Compile the loop, for any length, or a single step."""
    shapes = shape_environment()
    with clean_room(shapes) as mode:
        length = 1 if once else symbolic_length(shapes)
        xs = [valueless(mode, *aval.with_axis(length)) for aval in body.x] or [torch.empty(length)]
        inputs = [*[valueless(mode, *aval) for aval in (*body.consts, *body.carry)], *xs]

        def function(*tensors: Tensor) -> list[Tensor]:
            return _lowered(body, *body.split(tensors), 1 if once else 2)

        graph = recorder(function, _decompositions())(*inputs)
    operations = sum(node.op == "call_function" for node in body.graph.graph.nodes)
    directory = private_directory() / "inductor"
    with inductor_cache(directory), guarded(directory):
        said = f"gdfunc: compiling a loop of {operations} operations with Inductor …"
        print(said, end="", file=sys.stderr, flush=True)
        started = time.perf_counter()
        try:
            return compiled(graph, inputs, mode)
        except Exception as error:
            raise BackendError(_reason(error)) from error
        finally:
            print(f" {time.perf_counter() - started:.1f} s", file=sys.stderr)


def _lowered(
    body: Body, consts: Leaves, init: Leaves, xs: Leaves, length: int, unroll: int = 1
) -> list[Tensor]:
    """Write the loop in torch's terms, for Inductor."""
    # The operator wants a carry, an x and two results. Its body must return memory that nothing else holds.
    extra = [torch.zeros(())] if not init or len(init) + len(body.y) < 2 else []
    # It also writes into its carry in place, which other operations may read in a loop within a loop.
    carry, xs = _unshared([*extra, *init], [*consts, *xs]), list(xs) or [torch.zeros(length)]

    graph = _replay.lower(body, lambda loop, given: loop.execute(_lowered, given))

    def step(*leaves: Tensor) -> list[Tensor]:
        now, rest = leaves[: len(carry)], leaves[len(carry) :]
        x, given = rest[: len(xs)], rest[len(xs) :]
        inputs = (*given, *now[len(extra) :], *x[: len(body.x)])
        return _unshared([*now[: len(extra)], *graph(*inputs)], leaves)

    if length == 1:
        results = step(*carry, *[x[0] for x in xs], *consts)
        results[len(carry) :] = [y[None] for y in results[len(carry) :]]
    else:
        # Because the code for a loop within a loop frees a view after its first step.
        given = [const if node_of(const).op == "placeholder" else const.clone() for const in consts]
        results = scan_operator(step, carry, xs, given)
    return results[len(extra) :]


def _unshared(results: Leaves, others: Leaves) -> list[Tensor]:
    """Copy those results whose memory others hold, or that are not contiguous."""
    held, unshared = {storage(leaf) for leaf in others}, []
    for leaf in results:
        if storage(leaf) in held or not leaf.is_contiguous():
            leaf = leaf.clone(memory_format=torch.contiguous_format)
        held.add(storage(leaf))
        unshared.append(leaf)
    return unshared


def _decompositions() -> dict[Any, Callable[..., Any]]:
    def mm(a: Tensor, b: Tensor) -> Tensor:
        if a.numel() * b.shape[1] > _SMALL_MATMUL:
            return NotImplemented
        return (a[:, :, None] * b).sum(1)

    def bmm(a: Tensor, b: Tensor) -> Tensor:
        # vmap expands what its members share; one large product of it is faster than many small ones.
        if not b.stride(0):
            return (a.flatten(0, 1) @ b[0]).unflatten(0, a.shape[:2])
        if not a.stride(0):
            return bmm(b.mT, a.mT).mT
        return NotImplemented

    return {
        **inductor_decompositions(),
        torch.ops.aten.mm.default: mm,
        torch.ops.aten.bmm.default: bmm,
        torch.ops.gdfunc.threefry.default: threefry_by_operators,
    }


def _reason(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}"
    if "InvalidCxxCompiler" in text or "No working C++ compiler" in text:
        return "backend='inductor' needs a C++ compiler, and none was found: install g++ or clang++"
    lines = text.splitlines()  # of the compiler the first error, such as a header that is missing
    told = next((line.strip() for line in lines if "error: " in line), lines[0])
    return f"Inductor cannot compile this loop ({told}); use backend='eager'"
