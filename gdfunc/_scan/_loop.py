"""The loop over a body as one primitive operation, whose rules are loops again.

    vmap(scan(f)) = scan(vmap(f))
    jvp(scan(f))  = scan(jvp(f))
    vjp(scan(f))  = the reversed scan of vjp(f) over the carries before each step

So a backend only ever runs a loop forward, on plain tensors; it is never differentiated through.

f is traced without the transformations that run around the scan: f sees the shapes of one member of a vmap,
and no derivative. `Bound.__call__` then gives the loop to the innermost of these transformations. Its rule
makes another loop and calls it one level further out, and so on until no level is left. There a backend
runs the last loop.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import compress, islice
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import make_dual, unpack_dual
from torch.func import vmap

from .. import _tree
from .._errors import BackendError, untraceable
from .._torch._graphs import is_recorded, record_call, tracer
from .._torch._modes import lent, mode_of, no_dispatch_modes, valueless
from .._torch._transforms import (
    functionalization,
    innermost_vmap,
    is_innermost_forward,
    is_pushing_tangents,
    is_transforming,
    layers,
    may_be_differentiated,
    with_members,
    without_members,
)
from .._tree import Tree
from . import _derived
from ._body import Active, Avals, Body, Flags, Leaves, Loop, Runner, filled, spread
from .backends import replay
from .backends import runner_of as runner_of  # for _scan, which reaches backends through here alone
from .trace._purity import put_back
from .trace._trace import trace


def trace_and_run(
    f: Callable[..., tuple[Tree, Tree]],
    checked: Callable[..., tuple[Tree, Tree]],
    init: Tree,
    xs: Tree,
    seen: dict[Any, Any] | None,
    through: Callable[..., list[Tensor]],
    falls_back: bool,
    **fields: Any,
) -> tuple[Tree, Tree]:
    """Trace a user's function, with the checks around it, and run the loop over its body.

    gdfunc's own errors read well already. After any other error, f is called on real tensors, where a
    mistake in f raises a clearer error.

    Args:
        falls_back: whether an error makes the caller run f in eager. A loop that might be differentiated,
            and cannot be, then raises before it runs.
    """
    try:
        traced = trace(f, checked, init, xs, seen)
    except (BackendError, Warning):
        raise
    except Exception as error:
        if falls_back:  # eager raises what is wrong in f, and what only a trace meets is no error there
            raise untraceable(f"f cannot be traced ({type(error).__name__}: {error})") from error
        if isinstance(error, ValueError):
            raise
        with put_back(f):
            _, y = checked(*_tree.map(lent, (init, _tree.map(lambda leaf: leaf[0], xs))))
            _tree.check_tensors(y, "y")
            line = [*str(error).splitlines(), ""][0]
            raise untraceable(f"f cannot be traced ({type(error).__name__}: {line})") from error
    carry, structure = _tree.flatten(init)
    loop = Bound(traced.body, **fields)
    tensors = _visible(traced.closed_over, carry, _tree.leaves(xs))
    if (
        falls_back
        and traced.body.opaque
        and any(map(_in_derivative, (*tensors[0], *tensors[1], *tensors[2])))
    ):
        _check_derivatives(traced.body)
    results = through(loop, *tensors)
    ys = results[len(carry) :]
    return _tree.unflatten(structure, results[: len(carry)]), _tree.unflatten(traced.y_structure, ys)


def _in_derivative(leaf: Tensor) -> bool:
    """Tell whether a derivative may go through a tensor."""
    return is_pushing_tangents() or (torch.is_grad_enabled() and may_be_differentiated(leaf))


def _visible(*tensors: list[Tensor]) -> Sequence[list[Tensor]]:
    """Make a running tracer see tensors from outside, such as those of a trace around it.

    It sees the arguments of operations.
    """
    if tracer() is None:
        return tensors
    return [
        [leaf if is_recorded(layers(leaf)[-1]) else leaf.view_as(leaf) for leaf in leaves]
        for leaves in tensors
    ]


@dataclass(frozen=True)
class Bound(Loop):
    """A loop with its runner: the function `(*consts, *init, *xs) -> [*carry, *ys]` with its rules."""

    # Not compared, because a loop in a graph is run by the backend of the loop around it.
    runner: Runner = field(default=replay, compare=False)

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        has_grad = torch.is_grad_enabled() and any(map(may_be_differentiated, tensors))
        if not has_grad and not is_transforming():  # no rule applies
            return list(_Scan.forward(self, *tensors))
        vmapped = innermost_vmap()
        if vmapped is not None:
            return self._vmapped(vmapped, tensors)
        level: Any = functionalization()
        if level is not None:  # autograd.Function has no rule for it, and needs none: a loop is pure
            given = level.unwrap_tensors(tensors)
            with level.redispatch_to_next():
                results = self(*given)
            return list(level.wrap_tensors(results))
        if is_innermost_forward():
            primals, tangents = zip(*map(unpack_dual, tensors), strict=True)
            if any(tangent is not None for tangent in tangents):
                pairs = zip(*_push(self, primals, tangents, with_y=True), strict=True)
                return [leaf if move is None else make_dual(leaf, move) for leaf, move in pairs]
        loop = self
        if has_grad and not self.keeps and self.rule is None:
            loop = replace(self, body=_derived.keeping(self.body), keeps=True)
        return list(_Scan.apply(loop, *tensors)[: len(self.results)])

    def _vmapped(self, vmapped: Any, tensors: Leaves) -> list[Tensor]:
        """Apply the rule of the innermost vmap directly, because `_Scan.apply` takes 0.3 ms for it."""
        level = vmapped.level()
        pairs = [without_members(leaf, level) for leaf in tensors]
        given, dims = [leaf for leaf, _ in pairs], tuple([dim for _, dim in pairs])
        with vmapped.lower():
            if all(dim is None for dim in dims):
                return self(*given)
            results, of_results = self.of_members(vmapped.batch_size(), dims, given)
        return [with_members(leaf, dim, level) for leaf, dim in zip(results, of_results, strict=True)]

    def of_members(
        self, size: int, of_tensors: Sequence[int | None], tensors: Leaves
    ) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        """Run the loop of many members, whose axis is given for each tensor, and told for each result."""
        body = self.body
        given = tuple(dim is not None for dim in of_tensors)
        carry, y = body.dependent(given)
        pairs = zip(tensors, of_tensors, strict=True)
        at_front = [leaf.movedim(dim, 0) if dim else leaf for leaf, dim in pairs]
        consts, init, xs = body.split(at_front)
        of_consts, of_init, of_xs = body.split(given)
        # pytorch#195324: a carry that is to become batched must be so from the start.
        init = tuple(
            leaf.expand(size, *leaf.shape) if will_be and not is_now else leaf
            for leaf, will_be, is_now in zip(init, carry, of_init, strict=True)
        )
        xs = tuple(leaf.movedim(0, 1) if flag else leaf for leaf, flag in zip(xs, of_xs, strict=True))
        new = _derived.batched(body, size, (*of_consts, *carry, *of_xs), (*carry, *y))
        dims = (*[0 if flag else None for flag in carry], *[1 if flag else None for flag in y])
        return tuple(replace(self, body=new)(*consts, *init, *xs)), dims

    def repeated(self, steps: int) -> Body:
        """Make the body whose step is this loop of so many steps."""
        inner, body = replace(self, length=steps), self.body
        x = tuple(aval.with_axis(steps) for aval in body.x)
        return body.derive(("repeated", inner), inner, body.consts, body.carry, x)


class _Scan(torch.autograd.Function):
    """The primitive; its inputs are a loop and the tensors that its body takes."""

    @staticmethod
    def forward(loop: Bound, *tensors: Tensor) -> tuple[Tensor, ...]:
        recorded = any(map(is_recorded, tensors))
        return tuple(_as_node(loop, tensors) if recorded else loop.execute(loop.runner, tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.loop, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*[leaf for leaf in output if not leaf.is_floating_point()])
        carries = output[len(output) - len(ctx.loop.body.carry) :] if ctx.loop.keeps else ()
        ctx.save_for_backward(*tensors, *carries)
        ctx.save_for_forward(*tensors, *carries)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], loop: Bound, *tensors: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        return loop.of_members(info.batch_size, in_dims[1:], tensors)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        moved = _push(ctx.loop, ctx.saved_tensors[: len(tangents)], tangents, with_y=False)[1]
        # Under a gradient, torch 2.13 fails at the next function if a floating result has no tangent.
        return tuple(
            torch.zeros(aval.shape, dtype=aval.dtype, device=aval.device)
            if tangent is None and aval.dtype.is_floating_point
            else tangent
            for tangent, aval in zip(moved, ctx.loop.results, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        loop, active = ctx.loop, _active(ctx.loop.body, ctx.needs_input_grad[1:])
        pull = _pull if loop.rule is None else loop.rule.backward
        pull = pull if loop.body.members is None else partial(_pull_members, pull)
        # The saved tensors are read once: who checkpoints lets them be read once.
        return None, *pull(loop, active, ctx.saved_tensors, cotangents)


def _push(
    loop: Bound, leaves: Leaves, tangents: Sequence[Tensor | None], with_y: bool
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Run the pushed loop: return the last carry and perhaps the y's, and the tangents of all results."""
    if loop.rule is not None:
        loop.rule.check_forward_mode()
    body, (inputs, carry, y) = loop.body, _active(loop.body, [move is not None for move in tangents])
    consts, init, xs = body.split(leaves)
    given = iter(filled(tangents, leaves, inputs))
    of_consts, of_init, of_xs = (list(islice(given, sum(part))) for part in body.split(inputs))
    new = _derived.pushed(body, inputs, y)
    if not with_y:
        new = new.reading((*[False] * len(y), *[True] * sum(y)))
    pushed = replace(loop, body=new, keeps=False)
    results = iter(pushed(*consts, *of_consts, *init, *of_init, *xs, *of_xs))
    last, of_carry = list(islice(results, len(carry))), list(islice(results, sum(carry)))
    ys = list(islice(results, len(y))) if with_y else []
    return [*last, *ys], spread([*of_carry, *results], (*carry, *y))


def _pull(
    loop: Bound, active: Active, saved: Leaves, cotangents: Sequence[Tensor | None]
) -> Sequence[Tensor | None]:
    """Take the backward pass: the reversed loop of the pulled body over the saved carries."""
    body, (inputs, carry, y) = loop.body, active
    tensors, carries = saved[: len(inputs)], saved[len(inputs) :]
    consts, init, xs = body.split(tensors)
    of_consts, _, of_xs = body.split(inputs)
    of_carry, of_y = cotangents[: len(init)], cotangents[len(init) :]
    given = tuple(pull is not None and flag for pull, flag in zip(of_y, y, strict=True))
    sums = [torch.zeros_like(leaf) for leaf in compress(consts, of_consts)]
    new = _derived.pulled(body, inputs, given)
    pulled = replace(loop, body=new, reverse=not loop.reverse, keeps=False)
    first = [*filled(of_carry, init, carry), *sums]
    moves = [move for move in compress(of_y, y) if move is not None]
    results = iter(pulled(*consts, *first, *carries, *xs, *moves))
    to_init, to_consts = spread(results, carry), spread(results, of_consts)
    return [*to_consts, *to_init, *spread(results, of_xs)]


def _pull_members(
    pull: Callable[..., Sequence[Tensor | None]],
    loop: Bound,
    active: Active,
    saved: Leaves,
    cotangents: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Take the backward pass of a vmapped loop: vmap of the backward pass of one member.

    A result that the members share has one cotangent, of which each member takes its share. What the
    members give to a shared input is a sum.
    """
    members: Any = loop.body.members
    (consts, carry, xs), count = loop.body.split(members.inputs), len(loop.body.carry)
    of_results = [*[0] * count, *[1] * (len(members.results) - count)]
    axes = [0 if flag else None for flag in (*consts, *carry)] + [1 if flag else None for flag in xs]
    of_saved = [*axes, *[1 if flag else None for flag in carry]][: len(saved)]
    flags = [move is not None for move in cotangents]
    moves = [
        (move, axis) if is_each else (move / members.size, None)
        for move, axis, is_each in zip(cotangents, of_results, members.results, strict=True)
        if move is not None
    ]
    given: list[bool] = []

    def of_member(saved: Leaves, moves: Leaves) -> list[Tensor]:
        pulled = pull(replace(loop, body=members.body), active, saved, spread(moves, flags))
        given[:] = [leaf is not None for leaf in pulled]
        return [leaf for leaf in pulled if leaf is not None]

    in_dims = list(of_saved), [axis for _, axis in moves]
    found = vmap(of_member, in_dims)(list(saved), [move for move, _ in moves])
    summed = [
        leaf.sum(0) if axis is None else leaf.movedim(0, axis)
        for leaf, axis in zip(found, compress(axes, given), strict=True)
    ]
    return spread(summed, given)


def _as_node(loop: Bound, tensors: Leaves) -> list[Tensor]:
    """Write a loop into the graph of a running trace, as a call of this primitive.

    The tensors of a trace have no values, except in that of `make_fx`, which runs what it records.
    """
    mode = mode_of(tensors)
    if mode is None:
        with no_dispatch_modes():
            results = loop.execute(loop.runner, tensors)
    else:
        results = [valueless(mode, *aval) for aval in loop.results]
    return record_call(replace(loop, runner=replay), tensors, results)


def _active(body: Body, given: Sequence[bool]) -> Active:
    """Flag the inputs, carries and y's that have a derivative, if the flagged inputs have one."""
    _check_derivatives(body)

    def floating(flags: Sequence[bool], avals: Avals) -> Flags:
        return tuple(flag and aval.dtype.is_floating_point for flag, aval in zip(flags, avals, strict=True))

    given = floating(given, (*body.consts, *body.carry, *body.x))
    consts, _, x = body.split(given)
    carry, y = body.dependent(given)
    carry = floating(carry, body.carry)
    return Active((*consts, *carry, *x), carry, floating(y, body.y))


def _check_derivatives(body: Body) -> None:
    """Refuse to differentiate a body that has not all its derivatives."""
    if body.opaque:
        names = ", ".join(sorted(body.opaque))
        raise untraceable(
            f"f applies {names}, whose own derivative is lost where a traced loop is differentiated (not "
            f"within f)"
        )
