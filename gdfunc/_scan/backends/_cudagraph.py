"""The backend that records some steps as one CUDA graph and replays it: one call for all their kernels."""

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..._errors import BackendError
from ..._lock import Lock
from .._body import Aval, Body, Leaves, nested_loops
from . import _replay

_ROW = 16  # steps in a graph, unless `unroll` says how many: with so many, the host has little to do
_LONGEST = 256  # steps of a nested loop in a graph, all of its rounds together: each kernel is a node

_recording = Lock()


def run(body: Body, consts: Leaves, init: Leaves, xs: Leaves, length: int, unroll: int = 1) -> list[Tensor]:
    """Replay a graph of `unroll` steps, or of 16 where that is 1. The steps left over run one by one."""
    if not torch.cuda.is_available():
        raise BackendError(
            "backend='cudagraph' needs a CUDA device, and torch finds none; use another backend"
        )
    devices = {aval.device for aval in (*body.carry, *body.x) or body.consts}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        found = ", ".join(sorted(map(str, devices))) or "none at all"
        raise BackendError(
            f"backend='cudagraph' needs init and xs on one CUDA device, and these are on {found}; "
            f"move them with .to(device), or use another backend"
        )
    if torch.cuda.is_current_stream_capturing():
        return _replay.run(body, consts, init, xs, length)
    return in_blocks(_Graph, body, consts, init, xs, length, unroll)


class _Graph:
    """A function of tensors that stay in place, as a CUDA graph. Only this part needs the device."""

    def __init__(self, function: Callable[[], None], device: torch.device) -> None:
        self.device, self.graph, self.last = device, torch.cuda.CUDAGraph(), torch.cuda.Event()
        with torch.cuda.device(device):
            here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
            aside.wait_stream(here)
            with torch.cuda.stream(aside):
                function()  # libraries set themselves up at the first call, which a capture forbids
            here.wait_stream(aside)
            # A capture that fails leaves its stream the current one; the outer context puts that right.
            with (
                torch.cuda.stream(here),
                torch.cuda.graph(self.graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"),
            ):
                function()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for the last use of these tensors, which may be on another stream."""
        with torch.cuda.device(self.device):
            self.last.wait()
            try:
                yield
            finally:
                self.last.record()

    def replay(self) -> None:
        self.graph.replay()


class _Block:
    """Some steps of a body over tensors that stay in place, recorded; one caller at a time may use them."""

    def __init__(
        self, record: type[_Graph], body: Body, steps: int, consts: Leaves, init: Leaves, xs: Leaves
    ) -> None:
        device = (*init, *xs, *consts)[0].device
        # In inference mode they would be tensors that nothing may write to outside of it.
        with torch.inference_mode(False):
            # Because a const may be on the CPU, such as a number that the body made a tensor of.
            self.consts = _empty(aval._replace(device=device) for aval in body.consts)
            self.carry = _empty(body.carry)
            self.x, self.y = (_empty(aval.with_axis(steps) for aval in avals) for avals in (body.x, body.y))
        self.steps, self.lock = steps, threading.Lock()

        def function() -> None:
            _copy([*self.carry, *self.y], _inlined(body, self.consts, self.carry, self.x, steps))

        # The first run is real: on other values an index may be out of range, which CUDA does not forgive.
        _copy([*self.consts, *self.carry, *self.x], [*consts, *init, *[x[:steps] for x in xs]])
        self.record = record(function, device)

    def __call__(self, consts: Leaves, init: Leaves, xs: Leaves, ys: Leaves, steps: int) -> list[Tensor]:
        """Run so many steps, a whole number of blocks. Fill ys, and return the carry."""
        with self.lock, self.record.turn():
            _copy([*self.consts, *self.carry], [*consts, *init])
            for start in range(0, steps, self.steps):
                rows = slice(start, start + self.steps)
                _copy(self.x, [x[rows] for x in xs])
                self.record.replay()
                _copy([y[rows] for y in ys], self.y)
            return [leaf.clone() for leaf in self.carry]


def in_blocks(
    record: type[_Graph], body: Body, consts: Leaves, init: Leaves, xs: Leaves, length: int, unroll: int = 1
) -> list[Tensor]:
    """Repeat the graph that `record` makes of some steps. Other steps have their nested loops recorded."""
    nested = partial(in_blocks, record)
    steps = unroll if unroll > 1 else _ROW
    blocks = (_recorded(record, body, number, consts, init, xs) for number in (steps, 1))
    block = next(filter(None, blocks), None) if steps <= length else None
    if block is None:
        return _replay.run(body, consts, init, xs, length, nested=nested)
    whole = length - length % block.steps
    ys = _empty(aval.with_axis(length) for aval in body.y)
    carry = block(consts, init, xs, ys, whole)
    if whole < length:
        rest = [x[whole:] for x in xs]
        last = _replay.run(body, consts, carry, rest, length - whole, nested=nested)
        carry = last[: len(init)]
        _copy([y[whole:] for y in ys], last[len(init) :])
    return [*carry, *ys]


def _recorded(
    record: type[_Graph], body: Body, steps: int, consts: Leaves, init: Leaves, xs: Leaves
) -> _Block | None:
    """Return the block of so many steps that the body holds, or None if its graph would be too long."""
    key = (record, steps, *_replay.settings())
    with _recording:
        if key not in body.cudagraph:
            before = sys.exception()
            try:
                is_long = steps * _rounds(body) > _LONGEST
                body.cudagraph[key] = None if is_long else _Block(record, body, steps, consts, init, xs)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                # Where a capture fails, its end fails too, and hides why.
                hidden = error.__context__
                text = str(error if hidden in (None, before) else hidden).partition("\n")[0]
                body.cudagraph[key] = f"a CUDA graph cannot record this loop ({text}); use another backend"
        block: Any = body.cudagraph[key]
    if isinstance(block, str):
        raise BackendError(block)
    return block


def _rounds(body: Body) -> int:
    """Count the steps of a nested loop, with those of the loops around it, in one step of the body."""
    return max((loop.length * (_rounds(loop.body) or 1) for loop in nested_loops(body.graph)), default=0)


def _inlined(body: Body, *loop: Any) -> list[Tensor]:
    """Go through the steps of a loop and of the loops inside it."""
    return partial(_replay.run, nested=_inlined)(body, *loop)


def _empty(avals: Iterable[Aval]) -> list[Tensor]:
    return [torch.empty(aval.shape, dtype=aval.dtype, device=aval.device) for aval in avals]


def _copy(into: Leaves, leaves: Leaves) -> None:
    for target, leaf in zip(into, leaves, strict=True):
        target.copy_(leaf)
