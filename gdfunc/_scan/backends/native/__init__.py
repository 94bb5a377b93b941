"""Run a whole loop as one C function, which is written for its body and compiled.

Its stages, in the order in which they run:

    _trace           the body in few and simple operations
    _decompositions  compound operations in simple ones, where torch does not say: convolutions, pooling
    _rows            products that a loop hands on to the loop that goes back over its carries
    operators/       each operation as an expression of elements; a pointwise one is a line in a table
    _index           where elements lie: linear in loop counters, through views
    _statement       statements, each of which states what it reads and writes
    _kernel          one nest of loops, in which each value is computed where its operands are known
    _tensor          tensors as functions of a point, and the moment when one is stored
    _reduction       sums and other reductions
    _contraction     sums of products, by tiles that stay in registers
    _memory          where the tensors of a step lie, and which of them can share memory
    _sharing         a large step as tables of calls of functions, which equal statements share
    _program         the statements of a step, put into program.c, the C text around them
    _target          the C compiler, and the kind of machine it writes for: both are asked
    _process         one run of a compiler
    _build           the commands for a library, and the directory of libraries

Nothing is fused across stored tensors, and nothing is approximated: the same operations as torch's, in
another order only where a sum has one. Denormal numbers are kept, or flushed to zero where the calling
thread does so (`torch.set_flush_denormal`), by all threads of the loop alike.

Covered are tensors of bool, uint8, int8 to int64, bfloat16, float16, float32 and float64. Numbers of 16
bits are computed in float32 and rounded after each operation, as in torch. Covered operators are pointwise
functions, division, reductions, running sums and extrema, sorting, products of matrices, convolutions,
pooling, views, picking and placing by integers, and loops within a step. Not covered are complex numbers,
masks as indices, powers of integers, polygamma beyond order 1, the rest of linear algebra, and torch's
random numbers. An operation that is not covered is refused by its name before anything is compiled.

A step whose products take more than 2e8 FLOP, or whose other operations read and write more than 1e9 bytes,
is refused as well, because torch's own kernels are faster. The environment variable GDFUNC_NATIVE_LIMIT
multiplies both numbers: 0.5 halves them, and inf refuses no size. It is read once, before the first loop.

Machines on which loops run, as far as is known (tests/test_platforms.py, tests/test_windows.py):

    x86-64 Linux: gcc, clang, zig    tested
    AArch64 Linux: gcc, zig          tested by emulation: the C alone, under qemu
    x86-64 Windows: zig              tested by emulation: the C alone, under wine; loading, renaming and
                                     Ctrl-C by injected failures; untested on Windows itself
    arm64 macOS: Apple clang, zig    compiled by zig; untested
    MSVC, MinGW's gcc                refused

On Windows, zig (`pip install "gdfunc[native]"`) alone is tried, unless CC names another compiler. CC may
choose the processor, as in CC="gcc -march=x86-64-v2"; else it is this one. On macOS, functions of whole
vectors are the system's, if a test at their first use finds them accurate. On AArch64 Linux, functions are
those of single numbers. A float beyond the range of an integer that it is cast to is undefined in C: x86-64
makes it the least integer, AArch64 the nearest.

CUDA is not written. `_trace`, `operators/`, `_index` and `_tensor` would serve it as they are. A block of
threads would take the place of a member, and the whole loop over time would stay inside one launch. In
`_kernel`, the outer loops of a nest would become one that the threads of a block share, with a barrier
between a statement and one that reads what it writes. `_reduction` would end in shuffles, `_contraction` in
tiles of shared memory. `_memory` would put carry and scratch there if they fit, and `_build` would give the
text to NVRTC through torch. It would pay for sweeps of a hundred members and more: a single run would wait
at barriers.

To add a pointwise operator, write its line in `operators._pointwise.POINTWISE` (`PREDICATES` if its result
is bool),

    "rsqrt": "1 / sqrt{f}({0})",

under the name that aten has for it, or prims, without the prefix: a refusal says it. An operator that C's
library has under the same name is a word in `FUNCTIONS` there. It is tested by its name in a table of
`tests/test_native.py`: `FUNCTIONS` where the C library computes, to a few units in the last place, `EXACT`
where all bits are torch's. Where the library has the function for whole vectors, its name in program.c
makes it fast.
"""

import ctypes
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor

from ...._errors import BackendError
from ...._lock import Lock
from ...._torch._modes import FakeTensor, without_collections
from ..._body import Body, Leaves, Members
from ._build import Library, build
from ._build import has_vector_math as has_vector_math
from ._program import LONG, write
from ._target import INSTALL as INSTALL
from ._target import NoCompiler as NoCompiler
from ._target import find as find
from ._tensor import TorchIsFaster as TorchIsFaster
from ._tensor import Unsupported as Unsupported

_SEGMENT_SECONDS = 0.05  # Ctrl-C waits for so long
_WORTH_THREADS = 1e6  # rounds of loops, about a millisecond; to start two threads takes about 0.2
_ALIGNED = 64  # bytes: what C is told of the start of its memory
_compiling = Lock()


def run(body: Body, consts: Leaves, init: Leaves, xs: Leaves, length: int, unroll: int = 1) -> list[Tensor]:
    """Run the loop, member by member if it is one of many. Each body is compiled once.

    Raises:
        BackendError: the body has an operation that is not covered, or it cannot be compiled.
        IndexError: a step uses an index that is out of range.
        RuntimeError: a step divides an integer by zero.
    """
    if body.layout is None:
        body.layout = _Layout(body)
    layout = body.layout
    members, size = layout.members, layout.members.size
    carry = [
        (leaf if leaf.shape == shape else leaf.expand(shape)).clone(memory_format=torch.contiguous_format)
        for leaf, shape in zip(init, layout.carry, strict=True)
    ]
    ys = [torch.empty((length, *shape), dtype=dtype, device="cpu") for shape, dtype in layout.ys]
    tensors = (*consts, *carry, *xs, *ys)
    if FakeTensor in map(type, tensors):
        raise BackendError("the native loop needs data but was given a FakeTensor")
    layout.loop([leaf.data_ptr() for leaf in tensors], layout.strides, size, length)
    if body.members is None:
        return [*carry, *ys]
    results = zip([*carry, *ys], layout.dims, members.results, strict=True)
    # Members that all have the same result share that of the first.
    return [leaf if is_each else leaf.select(dim, 0).clone() for leaf, dim, is_each in results]


class _Layout:
    """The layout of members and steps in the tensors of a loop, the same in each of its runs."""

    def __init__(self, body: Body) -> None:
        inputs = len(body.consts) + len(body.carry) + len(body.x)
        self.members = body.members or Members(body, 1, (False,) * inputs, ())
        if not self.members.size:
            raise Unsupported("a vmap of no members")
        base, size = self.members.body, self.members.size
        self.loop = _compiled(base)
        each = () if body.members is None else (size,)
        self.carry = [(*each, *aval.shape) for aval in base.carry]
        self.ys = [((*each, *aval.shape), aval.dtype) for aval in base.y]
        self.dims = [0] * len(base.carry) + [1] * len(base.y)
        of_consts, _, of_xs = base.split(self.members.inputs)
        is_each = (*of_consts, *[True] * len(base.carry), *of_xs, *[True] * len(base.y))
        avals = (*base.consts, *base.carry, *base.x, *base.y)
        sizes = [prod(aval.shape) * aval.dtype.itemsize for aval in avals]
        member = [alone if flag else 0 for alone, flag in zip(sizes, is_each, strict=True)]
        step = [alone * (size if flag else 1) for alone, flag in zip(sizes, is_each, strict=True)]
        fixed = len(base.consts) + len(base.carry)  # these do not move from step to step
        step[:fixed] = [0] * fixed
        self.strides = _column(member), _column(step)


def _column(numbers: Sequence[int]) -> Any:
    return (ctypes.c_int64 * len(numbers))(*numbers)


class _Function:
    """The compiled loop."""

    def __init__(self, library: Library) -> None:
        self.scratch = ctypes.c_int64.in_dll(library, "scratch_size").value + _ALIGNED
        self.rounds = ctypes.c_int64.in_dll(library, "step_rounds").value
        self.pace = 0.0  # steps of a member in a second, as last measured: at least so many
        number = ctypes.c_int64
        self.run = library.run
        self.run.argtypes = [number] * 4 + [ctypes.c_void_p] * 5
        self.run.restype = number

    def __call__(self, starts: list[int], strides: tuple[Any, Any], size: int, length: int) -> None:
        """Run all members, a share of them on each thread. All threads stop when one does.

        Only a thread that waits hears of Ctrl-C, so another thread runs a step that may take long.
        """
        tables, stop = (_column(starts), *strides), ctypes.c_int()
        is_short = self.rounds * size * length < _WORTH_THREADS
        shares = 1 if is_short else min(size, torch.get_num_threads())
        if shares == 1 and self.rounds * size < LONG:
            return self._share(tables, 0, size, length, stop)
        bounds = [size * share // shares for share in range(shares + 1)]
        # Whether this thread has 0 for all denormal numbers, as `torch.set_flush_denormal` asks for.
        flushes = sys.float_info.min * 0.5 == 0
        with ThreadPoolExecutor(
            shares, initializer=torch.set_flush_denormal, initargs=(flushes,)
        ) as threads:
            try:
                done = []
                for ends in pairwise(bounds):
                    try:
                        done.append(threads.submit(self._share, tables, *ends, length, stop))
                    except RuntimeError:  # no thread can start while the interpreter exits
                        self._share(tables, *ends, length, stop)
                for share in done:
                    while not share.done():  # on Windows, Ctrl-C is heard between two waits alone
                        wait([share], _SEGMENT_SECONDS)
                    share.result()
            except BaseException:
                stop.value = 1
                raise

    def _share(
        self, tables: tuple[Any, ...], first: int, last: int, length: int, stop: ctypes.c_int
    ) -> None:
        """Run some members, segment after segment. Between two segments, Python hears of Ctrl-C."""
        memory = torch.empty(self.scratch, dtype=torch.uint8, device="cpu")
        scratch = -(-memory.data_ptr() // _ALIGNED) * _ALIGNED
        start, members = 0, last - first
        while start < length and not stop.value:
            end = min(start + max(1, int(self.pace * _SEGMENT_SECONDS / members)), length)
            began = time.perf_counter()
            bad = self.run(first, last, start, end, *tables, scratch, ctypes.byref(stop))
            if bad >= 0:
                step, divides = divmod(bad, 2)
                if divides:  # torch's exception
                    raise RuntimeError(
                        f"ZeroDivisionError: an integer is divided by 0 in step {step} of the loop"
                    )
                raise IndexError(f"an index is out of range in step {step} of the loop")
            self.pace = (end - start) * members / max(time.perf_counter() - began, 1e-9)
            start = end


def _compiled(body: Body) -> _Function:
    with _compiling:
        if body.native is None:
            try:
                target = find()
                with without_collections():
                    text = write(body, target.tiles)
                body.native = _Function(build(text, target))
            except Unsupported as error:
                body.native = error
        found: Any = body.native
    if isinstance(found, Unsupported):
        raise found.with_traceback(None)
    return found
