"""The loop over a body as one primitive operation, whose rules are loops again.

    vmap(scan(f)) = scan(vmap(f))
    jvp(scan(f))  = scan(jvp(f))
    vjp(scan(f))  = the reversed scan of vjp(f) over the carries before each step

So a backend only ever runs a loop forward, on plain tensors; it is never differentiated through.
"""

from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from itertools import compress, islice
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import jvp, vjp, vmap

from .._errors import untraceable
from .._torch._graphs import is_recorded, record_call
from .._torch._modes import mode_of, no_dispatch_modes, valueless
from .._torch._transforms import functionalization, is_transforming, may_be_differentiated
from ._body import Avals, BatchedBody, Body, Members

Flags = tuple[bool, ...]
Leaves = Sequence[Tensor]
Runner = Callable[[Body, Leaves, Leaves, Leaves, int, int], list[Tensor]]
# (body, consts, init, xs, length > 0, unroll) -> [*carry, *ys], which share no storage with the inputs


@dataclass(frozen=True)
class Loop:
    """A body, how often and in which direction to run it, and by whom."""

    body: Body
    length: int
    runner: Runner
    reverse: bool = False
    unroll: int = 1
    keeps: bool = False  # the last y's are the carry before each step, for the backward pass

    def __call__(self, consts: Leaves, init: Leaves, xs: Leaves) -> list[Tensor]:
        """Run the loop: `[*carry, *ys]`."""
        loop, tensors = self, (*consts, *init, *xs)
        if _is_plain(tensors):
            return list(_Scan.forward(self, *tensors))
        level = functionalization()
        if level is not None:
            return self._below(level, consts, init, xs)
        if not self.keeps and any(map(may_be_differentiated, tensors)):
            loop = replace(self, body=_keeping(self.body), keeps=True)
        return list(_Scan.apply(loop, *tensors)[: len(init) + len(self.body.y)])

    def _below(self, level: Any, *tensors: Leaves) -> list[Tensor]:
        """Run under a level of `functionalize`, for which autograd.Function has no rule: a loop is pure."""
        given: Any = level.unwrap_tensors(tensors)
        with level.redispatch_to_next():
            results: Any = self(*given)
        return list(level.wrap_tensors(results))


def checkpointed(loop: Loop, every: int, consts: Leaves, init: Leaves, xs: Leaves) -> list[Tensor]:
    """Run a loop of which the backward pass keeps every k-th carry: it is a loop of loops of k steps."""
    blocks, rest = divmod(loop.length, every)
    if loop.reverse:
        results = checkpointed(replace(loop, reverse=False), every, consts, init, [x.flip(0) for x in xs])
        return [*results[: len(init)], *[y.flip(0) for y in results[len(init) :]]]
    outer = replace(loop, body=_repeated(loop, every), length=blocks, unroll=1)
    done = outer(consts, init, [x[: blocks * every].unflatten(0, (blocks, every)) for x in xs])
    carry, ys = done[: len(init)], [y.flatten(0, 1) for y in done[len(init) :]]
    if not rest:
        return [*carry, *ys]
    last = replace(loop, length=rest)(consts, carry, [x[blocks * every :] for x in xs])
    pairs = zip(ys, last[len(init) :], strict=True)
    return [*last[: len(init)], *[torch.cat(pair) for pair in pairs]]


class _Scan(torch.autograd.Function):
    """The primitive; its inputs are a Loop and the tensors that its body takes."""

    @staticmethod
    def forward(loop: Loop, *tensors: Tensor) -> tuple[Tensor, ...]:
        recorded = any(map(is_recorded, tensors))
        return tuple((in_trace.get() if recorded else run)(loop, tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.loop, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*[leaf for leaf in output if not leaf.is_floating_point()])
        kept = output[len(output) - len(ctx.loop.body.carry) :] if ctx.loop.keeps else ()
        ctx.save_for_backward(*tensors, *kept)
        ctx.save_for_forward(*tensors, *kept)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], loop: Loop, *tensors: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        body, size = loop.body, info.batch_size
        given = tuple(dim is not None for dim in in_dims[1:])
        carry, y = body.reached(given)
        at_front = [
            leaf.movedim(dim, 0) if dim else leaf for leaf, dim in zip(tensors, in_dims[1:], strict=True)
        ]
        consts, init, xs = body.split(at_front)
        of_consts, of_init, of_xs = body.split(given)
        # pytorch#195324: a carry that is to become batched must be so from the start.
        init = tuple(
            leaf.expand(size, *leaf.shape) if will_be and not is_now else leaf
            for leaf, will_be, is_now in zip(init, carry, of_init, strict=True)
        )
        xs = tuple(leaf.movedim(0, 1) if flag else leaf for leaf, flag in zip(xs, of_xs, strict=True))
        batched = replace(loop, body=_batched(body, size, (*of_consts, *carry, *of_xs), (*carry, *y)))
        dims = (*[0 if flag else None for flag in carry], *[1 if flag else None for flag in y])
        return tuple(batched(consts, init, xs)), dims

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        loop, body = ctx.loop, ctx.loop.body
        inputs, carry, y = _active(body, [tangent is not None for tangent in tangents])
        leaves = ctx.saved_tensors[: len(tangents)]
        consts, init, xs = body.split(leaves)
        given = iter(_filled(tangents, leaves, inputs))
        of_consts, of_init, of_xs = (list(islice(given, sum(part))) for part in body.split(inputs))
        pushed = replace(loop, body=_pushed(body, inputs, y), keeps=False)
        moved = pushed([*consts, *of_consts], [*init, *of_init], [*xs, *of_xs])[len(init) :]
        results = (*body.carry, *[aval.with_axis(loop.length) for aval in body.y])
        # Under a gradient, torch 2.13 fails at the next function if a floating result has no tangent.
        return tuple(
            torch.zeros(aval.shape, dtype=aval.dtype, device=aval.device)
            if tangent is None and aval.dtype.is_floating_point
            else tangent
            for tangent, aval in zip(_spread(moved, (*carry, *y)), results, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        loop, body = ctx.loop, ctx.loop.body
        inputs, carry, y = _active(body, ctx.needs_input_grad[1:])
        saved = ctx.saved_tensors  # once: who checkpoints lets them be read once
        tensors, kept = saved[: len(inputs)], saved[len(inputs) :]
        consts, init, xs = body.split(tensors)
        of_consts, _, of_xs = body.split(inputs)
        of_carry, of_y = cotangents[: len(init)], cotangents[len(init) :]
        given = tuple(pull is not None and flag for pull, flag in zip(of_y, y, strict=True))
        first = [
            *_filled(of_carry, init, carry),
            *[torch.zeros_like(leaf) for leaf in compress(consts, of_consts)],
        ]
        pulled = replace(loop, body=_pulled(body, inputs, given), reverse=not loop.reverse, keeps=False)
        results = iter(pulled(consts, first, [*kept, *xs, *compress(of_y, given)]))
        to_init = _spread(results, carry)
        to_consts = _spread(results, of_consts)
        return None, *to_consts, *to_init, *_spread(results, of_xs)


def run(loop: Loop, tensors: Leaves) -> list[Tensor]:
    """Run a loop on plain tensors: what remains for a backend goes forward over contiguous ones."""
    consts, init, xs = loop.body.split([leaf.contiguous().resolve_neg() for leaf in tensors])
    if loop.reverse:
        xs = tuple(leaf.flip(0) for leaf in xs)
    with loop.body.as_traced():
        results = loop.runner(loop.body, consts, init, xs, loop.length, loop.unroll)
    if loop.reverse:
        results[len(init) :] = [leaf.flip(0) for leaf in results[len(init) :]]
    return results


def _as_node(loop: Loop, tensors: Leaves) -> list[Tensor]:
    """Write a loop that is met in a trace into the graph, as a call of this primitive.

    The tensors of a trace have no values, but in that of `make_fx`, which runs what it writes down.
    """

    def nested_scan(*tensors: Tensor) -> list[Tensor]:
        return loop(*loop.body.split(tensors))

    # The name stands for the loop where graphs are compared.
    backend = loop.runner.__module__.rpartition(".")[2]
    numbers = loop.body.number, loop.length, loop.unroll, int(loop.reverse), int(loop.keeps)
    nested_scan.loop = loop  # type: ignore[attr-defined]
    nested_scan.__name__ = "_".join(["scan", backend, *map(str, numbers)])
    mode = mode_of(tensors)
    if mode is None:
        with no_dispatch_modes():
            results = run(loop, tensors)
    else:
        avals = (*loop.body.carry, *[aval.with_axis(loop.length) for aval in loop.body.y])
        results = [valueless(mode, *aval) for aval in avals]
    return record_call(nested_scan, tensors, results)


in_trace: ContextVar[Callable[[Loop, Leaves], list[Tensor]]] = ContextVar("in_trace", default=_as_node)


def _is_plain(tensors: Leaves) -> bool:
    """Tell that no derivative is asked for, and no transformation under way: no rule applies."""
    return not is_transforming() and True not in [leaf.requires_grad for leaf in tensors]


def _active(body: Body, given: Sequence[bool]) -> tuple[Flags, Flags, Flags]:
    """Which inputs, carries and y's have a derivative, if the flagged inputs have one."""
    if body.opaque:
        names = ", ".join(sorted(body.opaque))
        raise untraceable(
            f"f applies {names}, whose own derivative is lost where a traced loop is differentiated (not "
            f"within f)"
        )

    def floating(flags: Sequence[bool], avals: Avals) -> Flags:
        return tuple(flag and aval.dtype.is_floating_point for flag, aval in zip(flags, avals, strict=True))

    given = floating(given, (*body.consts, *body.carry, *body.x))
    consts, _, x = body.split(given)
    carry, y = body.reached(given)
    carry = floating(carry, body.carry)
    return (*consts, *carry, *x), carry, floating(y, body.y)


def _filled(moves: Sequence[Tensor | None], leaves: Leaves, flags: Flags) -> list[Tensor]:
    """List the flagged tangents or cotangents, with zeros for those that are None."""
    pairs = compress(zip(moves, leaves, strict=True), flags)
    return [torch.zeros_like(leaf) if move is None else move for move, leaf in pairs]


def _spread(leaves: Iterable[Tensor], flags: Sequence[bool]) -> list[Tensor | None]:
    """Put the next leaves into the places that are flagged, None into the others."""
    remaining = iter(leaves)
    return [next(remaining) if flag else None for flag in flags]


def _keeping(body: Body) -> Body:
    """The body that also gives the carry it was given, as the last of its y's: nothing new to trace."""
    if "keeping" not in body.kept:
        graph, copies = fx.Graph(), dict[fx.Node, Any]()
        results: Any = graph.graph_copy(body.graph.graph, copies)
        inputs = [copies[node] for node in body.graph.graph.nodes if node.op == "placeholder"]
        graph.output([*results, *body.split(inputs)[1]])
        kept = Body(fx.GraphModule(body.graph, graph), body.consts, body.carry, body.x)
        kept.opaque, kept.floats, body.kept["keeping"] = body.opaque, body.floats, kept
    return body.kept["keeping"]


def _repeated(loop: Loop, steps: int) -> Body:
    """The body whose step is a loop of so many steps."""
    body, inner = loop.body, replace(loop, length=steps)

    def function(*inputs: Tensor) -> list[Tensor]:
        return inner(*body.split(inputs))

    x = tuple(aval.with_axis(steps) for aval in body.x)
    return body.derive(("repeated", inner), function, body.consts, body.carry, x)


def _batched(body: Body, size: int, inputs: Flags, results: Flags) -> Body:
    """vmap of a body; results that are the same for all members stay single."""
    in_dims, out_dims = (tuple(0 if flag else None for flag in flags) for flags in (inputs, results))

    def function(*tensors: Tensor) -> list[Tensor]:
        members = vmap(lambda *leaves: tuple(body.graph(*leaves)), in_dims, out_dims)  # type: ignore[arg-type]
        return list(members(*tensors))

    key = "batched", size, inputs
    if key not in body.kept:
        body.kept[key] = BatchedBody(function, Members(body, size, inputs, results))
    return body.kept[key]


def _pushed(body: Body, inputs: Flags, y: Flags) -> Body:
    """jvp of a body: it carries tangents beside the carry, and its y's are tangents."""
    consts, carry, x = body.split(inputs)

    def function(*tensors: Tensor) -> list[Tensor]:
        rest = iter(tensors)
        primals: list[Tensor] = []
        tangents: list[Tensor] = []
        for flags in (consts, carry, x):
            primals += islice(rest, len(flags))
            tangents += islice(rest, sum(flags))

        def f(*moved: Tensor) -> tuple[tuple[Tensor, ...], list[Tensor]]:
            results = body.graph(*_merged(primals, inputs, moved))
            return tuple(compress(results, (*carry, *y))), results[: len(carry)]

        moving = tuple(compress(primals, inputs))
        _, pushed, new = jvp(f, moving, tuple(tangents), has_aux=True)  # type: ignore[misc]
        return [*new, *pushed]

    return body.derive(
        ("pushed", inputs, y),
        function,
        (*body.consts, *compress(body.consts, consts)),
        (*body.carry, *compress(body.carry, carry)),
        (*body.x, *compress(body.x, x)),
    )


def _pulled(body: Body, inputs: Flags, y: Flags) -> Body:
    """vjp of a body: it carries the cotangents of the carry, and the sums of those of the consts."""
    consts, carry, x = body.split(inputs)

    def function(*tensors: Tensor) -> list[Tensor]:
        rest = iter(tensors)
        of_consts = list(islice(rest, len(consts)))
        of_carry, sums = list(islice(rest, sum(carry))), list(islice(rest, sum(consts)))
        primals = [*of_consts, *islice(rest, len(carry) + len(x))]

        def f(*moved: Tensor) -> tuple[Tensor, ...]:
            return tuple(compress(body.graph(*_merged(primals, inputs, moved)), (*carry, *y)))

        pull = vjp(f, *compress(primals, inputs))[1]
        pulled = iter(pull((*of_carry, *rest)))
        new_sums = [so_far + more for so_far, more in zip(sums, islice(pulled, len(sums)), strict=True)]
        return [*islice(pulled, len(of_carry)), *new_sums, *pulled]

    return body.derive(
        ("pulled", inputs, y),
        function,
        body.consts,
        (*compress(body.carry, carry), *compress(body.consts, consts)),
        (*body.carry, *body.x, *compress(body.y, y)),
    )


def _merged(leaves: Leaves, flags: Flags, new: Iterable[Tensor]) -> list[Tensor]:
    """Replace the leaves that are flagged."""
    remaining = iter(new)
    return [next(remaining) if flag else leaf for leaf, flag in zip(leaves, flags, strict=True)]
