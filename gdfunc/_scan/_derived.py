"""The bodies of derived loops: each is made once of another body, and kept with it."""

from collections.abc import Callable, Sequence
from itertools import compress, islice

from torch import Tensor
from torch.func import jvp, vjp, vmap

from ._body import BatchedBody, Body, Flags, Leaves, Members, merged


def keeping(body: Body) -> Body:
    """Make the body that also returns the carry it was given, as the last of its y's."""
    if body.members is not None:
        base, size, flags, of_results = body.members
        return batched(keeping(base), size, flags, (*of_results, *of_results[: len(body.carry)]))
    return body.returning("keeping", lambda inputs, results: [*results, *body.split(inputs)[1]])


def batched(body: Body, size: int, inputs: Flags, results: Flags) -> Body:
    """Make vmap of a body; results that are the same for all members have no member axis."""
    key = "batched", size, inputs
    if key in body.derived:
        return body.derived[key]
    in_dims, out_dims = (tuple(0 if flag else None for flag in flags) for flags in (inputs, results))

    def function(*tensors: Tensor) -> list[Tensor]:
        members = vmap(lambda *leaves: tuple(body.graph(*leaves)), in_dims, out_dims)  # type: ignore[arg-type]
        return list(members(*tensors))

    body.derived[key] = BatchedBody(function, Members(body, size, inputs, results))
    return body.derived[key]


def pushed(body: Body, inputs: Flags, y: Flags) -> Body:
    """Make jvp of a body: tangents come after the carry, and tangents after the y's."""
    consts, carry, x = body.split(inputs)
    if body.members is not None:
        base, size, given, results = body.members
        parts = zip(body.split(given), (consts, carry, x), strict=True)
        of_inputs = [flag for part, active in parts for flag in (*part, *compress(part, active))]
        of_carry, of_y = results[: len(carry)], results[len(carry) :]
        of_results = (*of_carry, *compress(of_carry, carry), *of_y, *compress(of_y, y))
        return batched(pushed(base, inputs, y), size, tuple(of_inputs), of_results)

    def function(*tensors: Tensor) -> list[Tensor]:
        rest = iter(tensors)
        primals: list[Tensor] = []
        tangents: list[Tensor] = []
        for flags in (consts, carry, x):
            primals += islice(rest, len(flags))
            tangents += islice(rest, sum(flags))

        def f(*moved: Tensor) -> tuple[tuple[Tensor, ...], list[Tensor]]:
            results = body.graph(*merged(primals, inputs, moved))
            return tuple(compress(results, (*carry, *y))), results

        moving = tuple(compress(primals, inputs))
        _, pushed, new = jvp(f, moving, tuple(tangents), has_aux=True)  # type: ignore[misc]
        moves = iter(pushed)
        return [*new[: len(carry)], *islice(moves, sum(carry)), *new[len(carry) :], *moves]

    return body.derive(
        ("pushed", inputs, y),
        function,
        (*body.consts, *compress(body.consts, consts)),
        (*body.carry, *compress(body.carry, carry)),
        (*body.x, *compress(body.x, x)),
    )


def pulled(body: Body, inputs: Flags, y: Flags) -> Body:
    """Make vjp of a body: it carries the cotangents of the carry, and sums those of the consts."""
    consts, carry, x = body.split(inputs)

    def function(*tensors: Tensor) -> list[Tensor]:
        rest = iter(tensors)
        of_consts = list(islice(rest, len(consts)))
        of_carry, sums = list(islice(rest, sum(carry))), list(islice(rest, sum(consts)))
        primals = [*of_consts, *islice(rest, len(carry) + len(x))]

        _, pull = pullback(body.graph, primals, inputs, (*carry, *y))
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


def pullback(
    function: Callable[..., Sequence[Tensor]],
    leaves: Leaves,
    inputs: Sequence[bool],
    results: Sequence[bool],
) -> tuple[tuple[Tensor, ...], Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]]:
    """Call a function; return its flagged results, and their pullback to the flagged inputs."""

    def f(*moved: Tensor) -> tuple[Tensor, ...]:
        return tuple(compress(function(*merged(leaves, inputs, moved)), results))

    return vjp(f, *compress(leaves, inputs))[:2]
