"""The backend that writes the whole loop as one C function.

Its stages, in the order in which they run:

    _trace           the body in few and simple operations
    _decompositions  what compound ones are made of, where torch does not say: convolutions, pooling
    _operators       each operation as an expression of elements; a pointwise one is a line in a table
    _index           where elements lie: linear in loop counters, through views
    _kernel          one nest of loops, with each statement where what it needs is known
    _tensor          tensors as functions of a point, and the moment when one is stored
    _reduction       sums and other reductions
    _contraction     sums of products, by tiles that stay in registers
    _program         the step, the loop around it, and where all tensors lie
    _build           the compiler

Nothing is fused across stored tensors, and nothing is approximated: the same operations as torch's, in
another order only where a sum has one. Denormal numbers are kept, or flushed to zero where the calling
thread does so (`torch.set_flush_denormal`), by all threads of the loop alike. What is not covered is
refused before anything is compiled.

gcc and clang on x86-64 are tested, zig's clang too; AArch64 and macOS are written for, and untested.

To add a pointwise operator, write its line in `_operators.POINTWISE` (`PREDICATES` if its result is bool)
and its row in a table of `tests/test_native.py`, which compares it with torch's: one line each, as

    "hypot": "hypot{f}({0}, {1})",

does, which calls the C library's function for the dtype. The name is that of aten's or prims' operator, and
a refusal says it.
"""

import ctypes
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from math import prod
from threading import RLock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._body import Avals, Body, Members
from .._primitive import Flags, Leaves
from ._build import build
from ._program import LONG, write
from ._tensor import Unsupported as Unsupported

_SEGMENT_SECONDS = 0.05  # Ctrl-C waits for so long
_compiling = RLock()


def run(body: Body, consts: Leaves, init: Leaves, xs: Leaves, length: int, unroll: int = 1) -> list[Tensor]:
    """Run the loop, member by member if it is one of many. Compiled is once for each body.

    Raises:
        BackendError: the body has an operation that is not covered, or it cannot be compiled.
        IndexError: a step uses an index that is out of range.
    """
    members = body.members or Members(body, 1, (False,) * (len(consts) + len(init) + len(xs)), ())
    base, size = members.body, members.size
    of_consts, of_carry, of_xs = base.split(members.inputs)
    of_y = members.results[len(init) :] or (False,) * len(base.y)
    loop = _compiled(base)

    def each(leaf: Tensor, is_each: bool) -> Tensor:
        """A copy for each member."""
        leaf = leaf if is_each else leaf.expand(size, *leaf.shape)
        return leaf.clone(memory_format=torch.contiguous_format)

    def places(leaves: Leaves, avals: Avals, flags: Flags, moves: bool) -> Iterator[_Place]:
        for leaf, aval, is_each in zip(leaves, avals, flags, strict=True):
            alone = prod(aval.shape) * aval.dtype.itemsize
            step = alone * (size if is_each else 1) if moves else 0
            yield _Place(leaf.data_ptr(), alone if is_each else 0, step)

    def one(leaf: Tensor, is_each: bool, dim: int) -> Tensor:
        """The result of the first member, where all members have the same."""
        if is_each:
            return leaf
        return leaf.squeeze(dim) if size == 1 else leaf.select(dim, 0).clone()

    consts, xs = ([leaf.resolve_neg() for leaf in leaves] for leaves in (consts, xs))
    carry = [each(leaf.resolve_neg(), is_each) for leaf, is_each in zip(init, of_carry, strict=True)]
    ys = [torch.empty((length, size, *aval.shape), dtype=aval.dtype) for aval in base.y]
    table = [
        *places(consts, base.consts, of_consts, False),
        *places(carry, base.carry, (True,) * len(carry), False),
        *places(xs, base.x, of_xs, True),
        *places(ys, base.y, (True,) * len(ys), True),
    ]
    loop(table, size, length)
    last = [one(leaf, is_each, 0) for leaf, is_each in zip(carry, of_carry, strict=True)]
    return [*last, *[one(leaf, is_each, 1) for leaf, is_each in zip(ys, of_y, strict=True)]]


class _Place(NamedTuple):
    """Where a tensor begins, and how many bytes on it is for the next member and in the next step."""

    start: int
    member: int
    step: int


class _Function:
    """The compiled loop."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.scratch = ctypes.c_int64.in_dll(library, "scratch_size").value
        self.rounds = ctypes.c_int64.in_dll(library, "step_rounds").value
        number = ctypes.c_int64
        library.run.argtypes = [number] * 4 + [ctypes.c_void_p] * 5
        library.run.restype = number

    def __call__(self, table: list[_Place], size: int, length: int) -> None:
        """Run all members, a share of them on each thread; all stop when one does.

        Only a thread that waits hears of Ctrl-C: a step that may take long has another thread run it.
        """
        columns = [[getattr(place, name) for place in table] for name in _Place._fields]
        tables = [(ctypes.c_int64 * len(table))(*column) for column in columns]
        shares, stop = min(size, torch.get_num_threads()), ctypes.c_int()
        bounds = [size * share // shares for share in range(shares + 1)]
        if shares == 1 and self.rounds * size < LONG:
            return self._share(tables, 0, size, length, stop)
        with ThreadPoolExecutor(
            shares, initializer=torch.set_flush_denormal, initargs=(_flushes(),)
        ) as threads:
            try:
                done = [
                    threads.submit(self._share, tables, *ends, length, stop) for ends in pairwise(bounds)
                ]
                for share in done:
                    share.result()
            except BaseException:
                stop.value = 1
                raise

    def _share(self, tables: list[Any], first: int, last: int, length: int, stop: ctypes.c_int) -> None:
        """Run some members, segment after segment: between two of them Python hears of Ctrl-C."""
        scratch = torch.zeros(self.scratch, dtype=torch.uint8)
        start, steps = 0, 1
        while start < length and not stop.value:
            end, began = min(start + steps, length), time.perf_counter()
            bad = self.library.run(first, last, start, end, *tables, scratch.data_ptr(), ctypes.byref(stop))
            if bad >= 0:
                raise IndexError(f"an index is out of range in step {bad} of the loop")
            seconds = max(time.perf_counter() - began, 1e-9)
            start, steps = end, max(1, int(steps * min(8.0, _SEGMENT_SECONDS / seconds)))


def _flushes() -> bool:
    """Whether this thread has 0 for all denormal numbers, as `torch.set_flush_denormal` asks for."""
    return sys.float_info.min * 0.5 == 0


def _compiled(body: Body) -> _Function:
    with _compiling:
        if "native" not in body.kept:
            try:
                body.kept["native"] = _Function(build(write(body)))
            except Unsupported as error:
                body.kept["native"] = error
        found = body.kept["native"]
    if isinstance(found, Unsupported):
        raise found.with_traceback(None)
    return found
