"""The adjoint that keeps few carries, and computes the others again on the way back."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress, islice
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vjp

from .. import _tree
from .._errors import BackendError, check_choice, check_int
from .._scan._adjoint import Adjoint, Segments
from .._scan._body import Active, Leaves, filled, merged, spread
from .._scan._derived import pullback
from .._scan._loop import Bound
from .._torch._modes import is_tracing
from ._truncated import then


@dataclass(frozen=True)
class Checkpoint(Adjoint):
    """Keep few of the carries, and compute those between again on the way back.

    The derivative is that of `Reverse`, up to rounding.

    - `Checkpoint(k)` keeps every k-th carry: memory O(T/k + k), for one more run. It is a loop of loops of
      k steps. Inductor compiles them again for each k and each remainder of T.
    - `Checkpoint("sqrt")` takes k = √T: memory O(√T).
    - `Checkpoint(carries=c)` keeps about 2c carries for any T: c of them between segments of c steps, and
      the c of the segment that is differentiated. The segments are visited as in Griewank's treeverse:
      binomial(c + r, c) of them cost r more runs. So c = 16 goes back through a million steps for 6 more
      runs. Two compiled loops serve all segments and all T. They are called from Python: the adjoint cannot
      be part of a trace (`jit`, a loop within a loop). In `train` the run is one segment, so that Ctrl-C,
      progress and `stop=` wait for its end.

    Args:
        every: k, at least 1, or `"sqrt"`.
        carries: c, at least 1, in place of `every`.

    Raises:
        ValueError: neither or both are given, or one is out of range.

    Example:
        >>> def run(lr, adjoint):
        ...     step = gd.make_step(lambda w, batch: (w - 1) ** 2)
        ...     return gd.train(step, torch.tensor(0.0), None, gd.full_batch(1, 8), lr, adjoint=adjoint)[0]
        >>> for adjoint in (gd.adjoints.Checkpoint("sqrt"), gd.adjoints.Checkpoint(carries=2)):
        ...     torch.func.grad(run)(torch.tensor(0.125), adjoint)
        tensor(2.1357)
        tensor(2.1357)

    References:
        A. Griewank, "Achieving logarithmic growth of temporal and spatial complexity in reverse automatic
        differentiation", 1992.
    """

    every: int | str | None = None
    carries: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if (self.every is None) == (self.carries is None):
            raise ValueError(f"Checkpoint takes either every (an int or 'sqrt') or carries=; got {self!r}")
        if isinstance(self.every, str):
            check_choice("every, if it is no int,", self.every, ("sqrt",))
        else:
            name, number = ("every", self.every) if self.carries is None else ("carries", self.carries)
            check_int(name, number, 1)

    def run_forward(self, loop: Bound, consts: Leaves, init: Leaves, xs: Leaves) -> list[Tensor]:
        if self.carries is not None:
            if is_tracing():
                raise BackendError(
                    f"Checkpoint(carries={self.carries}) goes back from Python, segment by segment, and "
                    f"cannot be part of a trace (jit, or a loop within a loop): use Checkpoint('sqrt')"
                )
            return replace(loop, rule=_Treeverse(self.carries))(*consts, *init, *xs)
        every = self._every(loop.length)
        blocks, rest = divmod(loop.length, every)
        outer = replace(loop, body=loop.repeated(every), length=blocks, unroll=1)
        done = outer(*consts, *init, *[x[: blocks * every].unflatten(0, (blocks, every)) for x in xs])
        carry, ys = done[: len(init)], [y.flatten(0, 1) for y in done[len(init) :]]
        return then(replace(loop, length=rest), consts, carry, xs, ys) if rest else [*carry, *ys]

    def segments(self, steps: int, every: int) -> Segments:
        blocks = max(math.ceil(steps / every), 1)
        if self.carries is not None:
            return Segments(0, self, blocks)
        kept = math.ceil(self._every(steps) / every)
        return Segments(0, Checkpoint(kept), kept)

    def _every(self, steps: int) -> int:
        if isinstance(self.every, str):
            return math.isqrt(max(steps - 1, 0)) + 1
        return min(self.every or 1, max(steps, 1))


@dataclass(frozen=True)
class _Treeverse:
    """The backward pass, of a loop that goes forward, that keeps about 2c carries."""

    carries: int

    def check_forward_mode(self) -> None:
        """Forward mode keeps no carry."""

    def backward(
        self, loop: Bound, active: Active, leaves: Leaves, cotangents: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        of_carry, of_y = cotangents[: len(active.carry)], cotangents[len(active.carry) :]
        init = loop.body.split(leaves)[1]
        given = tuple(flag and move is not None for flag, move in zip(active.y, of_y, strict=True))
        moves = filled(of_carry, init, active.carry)
        how = _How(self.carries, loop, active._replace(y=given))
        pulled = _Recomputed.apply(how, *leaves, *moves, *compress(of_y, given))
        return spread(pulled, active.inputs)


def _behind_the_next_carry(segments: int, free: int) -> int:
    """Count the segments behind the next carry to keep, with room for `free` carries.

    binomial(free + r, free) segments can be reversed with r more runs. Of these, binomial(free − 1 + r, r)
    lie behind the carry (Griewank 1992).
    """
    runs = 0
    while math.comb(free + runs, free) < segments and free:
        runs += 1
    return min(math.comb(free - 1 + runs, runs), segments - 1) if free else 1


@dataclass(frozen=True)
class _How:
    """The arguments of `_Recomputed` that are no tensors, in an object that torch takes for a leaf."""

    carries: int
    loop: Bound
    active: Active


class _Recomputed(torch.autograd.Function):
    """The pullback of a loop, whose own derivative keeps all carries.

    Below it there is no graph: `torch.func.grad` would otherwise keep one of the backward pass itself.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(how: _How, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Go through segments of c steps from the last to the first, with c carries between them."""
        carries, loop, active = how.carries, how.loop, how.active
        tensors = _tree.cut(tensors)  # because outside of torch.func they require grad
        leaves, moves = tensors[: len(active.inputs)], tensors[len(active.inputs) :]
        plain, results = replace(loop, rule=None), (*active.carry, *active.y)
        consts, init, xs = loop.body.split(leaves)
        of_consts = loop.body.split(active.inputs)[0]
        of_carry, of_y = list(moves[: sum(active.carry)]), moves[sum(active.carry) :]
        sums = [torch.zeros_like(leaf) for leaf in compress(consts, of_consts)]
        rows: list[list[Tensor]] = []
        ends = [*range(0, loop.length, carries), loop.length]
        known, last = [(0, list(init))], len(ends) - 1  # carries before segments, and the segments left
        while known:
            first, carry = known[-1]
            if last - first > 1:
                free = carries + 1 - len(known)
                middle = last - _behind_the_next_carry(last - first, max(free, 0))
                at, to = ends[first], ends[middle]
                further = replace(plain, length=to - at)(*consts, *carry, *[x[at:to] for x in xs])
                known.append((middle, further[: len(init)]))
                continue
            at, to = ends[first], ends[last]
            segment = (*consts, *carry, *[x[at:to] for x in xs])
            _, pull = pullback(replace(plain, length=to - at), segment, active.inputs, results)
            pulled = iter(pull((*of_carry, *[y[at:to] for y in of_y])))
            sums = [so_far + more for so_far, more in zip(sums, islice(pulled, len(sums)), strict=True)]
            of_carry = list(islice(pulled, len(of_carry)))
            rows.append(list(pulled))
            known.pop()
            last = first
        of_xs = [torch.cat(column) for column in zip(*reversed(rows), strict=True)]
        return (*sums, *of_carry, *of_xs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.how, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        f, flags = _at_once(ctx.how, tensors)
        pull = vjp(f, *compress(tensors, flags))[1]
        return None, *spread(pull(cotangents), flags)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, ...]:
        tensors = ctx.saved_tensors
        f, flags = _at_once(ctx.how, tensors)
        # Copies, because torch makes no dual number of an expanded tensor.
        at = tuple(leaf.clone() for leaf in compress(tensors, flags))
        return jvp(f, at, tuple(move.clone() for move in filled(tangents[1:], tensors, flags)))[1]


def _at_once(how: _How, tensors: Leaves) -> tuple[Callable[..., tuple[Tensor, ...]], list[bool]]:
    """Make the same pullback by way of all carries, a function of the floating tensors; flag these."""
    loop, active = replace(how.loop, rule=None), how.active
    flags = [leaf.is_floating_point() for leaf in tensors]

    def f(*moved: Tensor) -> tuple[Tensor, ...]:
        given, inputs = merged(tensors, flags, moved), len(active.inputs)
        _, pull = pullback(loop, given[:inputs], active.inputs, (*active.carry, *active.y))
        return pull(tuple(given[inputs:]))

    return f, flags
