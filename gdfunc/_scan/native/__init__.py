"""The backend that writes the whole loop as one C function.

Its stages, in the order in which they run:

    _trace        the body in few and simple operations
    _operators    each operation as an expression of elements; a pointwise one is a line in a table
    _index        where elements lie: linear in loop counters, through views
    _kernel       one nest of loops, with each statement where what it needs is known
    _tensor       tensors as functions of a point, and the moment when one is stored
    _reduction    sums and other reductions
    _contraction  sums of products, by tiles that stay in registers
    _program      the step, the loop around it, and where all tensors lie
    _build        the compiler

Nothing is fused across stored tensors, and nothing is approximated: the same operations as torch's, in
another order only where a sum has one.
"""

import ctypes
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from math import prod
from threading import RLock
from typing import Any

import torch
from torch import Tensor

from .._body import Body
from .._primitive import Leaves
from ._build import build
from ._program import write
from ._tensor import Unsupported as Unsupported

_SEGMENT_SECONDS = 0.05  # Ctrl-C waits for so long
_compiling = RLock()


def run(body: Body, consts: Leaves, init: Leaves, xs: Leaves, length: int, unroll: int = 1) -> list[Tensor]:
    """Run the loop, member by member if it is one of many. Compiled is once for each body.

    Raises:
        BackendError: the body has an operation that is not covered, or it cannot be compiled.
        IndexError: a step uses an index that is out of range.
    """
    members = body.members
    base, size = (members.body, members.size) if members else (body, 1)
    of_inputs = members.inputs if members else (False,) * (len(consts) + len(init) + len(xs))
    of_y = members.results[len(init) :] if members else (False,) * len(body.y)
    loop = _compiled(base)
    of_consts, of_carry, of_xs = base.split(of_inputs)

    carry = [
        leaf.clone()
        if flag
        else leaf.expand(size, *leaf.shape).clone(memory_format=torch.contiguous_format)
        for leaf, flag in zip(init, of_carry, strict=True)
    ]
    ys = [torch.empty((length, size, *aval.shape), dtype=aval.dtype) for aval in base.y]
    leaves = [leaf.resolve_neg() for leaf in (*consts, *carry, *xs, *ys)]
    avals = (*base.consts, *base.carry, *base.x, *base.y)
    alone = [prod(aval.shape) * aval.dtype.itemsize for aval in avals]
    flags = (*of_consts, *(True for _ in carry), *of_xs, *(True for _ in ys))
    moves = [*(False for _ in (*consts, *carry)), *(True for _ in (*xs, *ys))]
    member = [number if flag else 0 for number, flag in zip(alone, flags, strict=True)]
    step = [
        number * (size if flag else 1) if move else 0
        for number, flag, move in zip(alone, flags, moves, strict=True)
    ]
    loop(leaves, member, step, size, length)

    def own(results: Iterable[Tensor], flags: Iterable[bool], dim: int) -> list[Tensor]:
        pairs = zip(results, flags, strict=True)
        if size == 1:
            return [leaf if flag else leaf.squeeze(dim) for leaf, flag in pairs]
        return [leaf if flag else leaf.select(dim, 0).clone() for leaf, flag in pairs]

    return [*own(carry, of_carry, 0), *own(ys, of_y, 1)]


class _Function:
    """The compiled loop."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.scratch = ctypes.c_int64.in_dll(library, "scratch_size").value
        number = ctypes.c_int64
        library.run.argtypes = [number] * 4 + [ctypes.c_void_p] * 4
        library.run.restype = number

    def __call__(
        self, leaves: list[Tensor], member: list[int], step: list[int], size: int, length: int
    ) -> None:
        """Run all members, a share of them on each thread, and stop at the first bad index."""
        numbers = ctypes.c_int64 * len(leaves)
        tables = numbers(*[leaf.data_ptr() for leaf in leaves]), numbers(*member), numbers(*step)
        shares = min(size, torch.get_num_threads())
        bounds = [size * share // shares for share in range(shares + 1)]
        if shares == 1:
            return self._share(tables, 0, size, length)
        with ThreadPoolExecutor(shares) as threads:
            firsts, lasts = zip(*pairwise(bounds), strict=True)
            list(threads.map(lambda first, last: self._share(tables, first, last, length), firsts, lasts))

    def _share(self, tables: tuple[Any, ...], first: int, last: int, length: int) -> None:
        """Run some members, segment after segment: between two of them Python hears of Ctrl-C."""
        scratch = torch.zeros(self.scratch, dtype=torch.uint8)
        start, steps = 0, 64
        while start < length:
            end, began = min(start + steps, length), time.perf_counter()
            bad = self.library.run(first, last, start, end, *tables, scratch.data_ptr())
            if bad >= 0:
                raise IndexError(f"an index is out of range in step {bad} of the loop")
            seconds = max(time.perf_counter() - began, 1e-9)
            start, steps = end, max(1, int(steps * min(8.0, _SEGMENT_SECONDS / seconds)))


def _compiled(body: Body) -> _Function:
    with _compiling:
        if "native" not in body.kept:
            try:
                body.kept["native"] = _Function(build(write(body).text))
            except Unsupported as error:
                body.kept["native"] = error
        found = body.kept["native"]
    if isinstance(found, Unsupported):
        raise found.with_traceback(None)
    return found
