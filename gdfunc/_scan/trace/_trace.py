"""From a user's function to a body: Python is left behind, closed-over tensors become inputs."""

import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.func import functionalize

from ... import _tree
from ..._errors import BackendError, line_of, untraceable, users_frame_of
from ..._torch._graphs import (
    KNOWN,
    drop_dead_code,
    graph_of,
    needs_a_value,
    operators,
    recorder,
    words_of,
    writes,
)
from ..._torch._modes import (
    FakeTensor,
    active_modes,
    clean_room,
    has_global_hooks,
    is_tracing,
    plain_copy,
    tracing,
    valueless,
)
from ..._torch._patches import applied_functions, gradients_under_no_grad, no_log_of_fake_tensors
from ..._torch._transforms import depth, differentiable_attention, may_be_differentiated, neutral_levels
from ..._tree import Tree
from .._body import Aval, Avals, Body, Leaves, with_reshapes
from .._recent import Recent
from ._code import owner
from ._cuts import Cuts
from ._key import Key, Reading, key_of
from ._lift import Lift, check_plain, wrote_outside
from ._purity import Recorded, record_twice, warn_of
from ._reach import ALL, FAR
from ._rewrites import OPERATIONS


class Traced(NamedTuple):
    """A body, the tensors that its function closed over, and the structure of its y's.

    In `_recipes`, which functions of equal keys share, a tensor in f's reach is replaced by its position in
    `Reading.tensors`. `_found_or_made` puts the tensor of the present f back.
    """

    body: Body
    closed_over: list[Any]
    y_structure: _tree.Structure


Signature = tuple[Any, ...]  # keeps_loops, the structures of carry and x, the Avals of carry and x
_recipes, _bodies, _NOTHING = Recent(), Recent(), Reading(Key(), [], [], "")


def trace(
    f: Any,
    checked: Callable[[Tree, Tree], tuple[Tree, Tree]],
    init: Tree,
    xs: Tree,
    seen: dict[Any, Traced] | None = None,
    reading: Reading | None = None,
    keeps_loops: bool = True,
) -> Traced:
    """Trace f with the checks around it, or find the trace of an f with the same key.

    Args:
        seen: the traces of f in the same run, by signature. It is filled, so that a run of many segments
            reads and traces f once for each signature.
        reading: what `key_of` read of f; None: it is read here.
        keeps_loops: whether a long scan inside f stays a loop, or all its steps are recorded.
    """
    carry, carry_structure = _tree.flatten(init)
    rows, x_structure = _tree.flatten(xs)
    for leaf in (*carry, *rows):
        check_plain(leaf)
    avals = tuple(map(Aval.of, carry)), tuple([Aval.of(leaf, 1) for leaf in rows])
    signature: Signature = (keeps_loops, carry_structure, x_structure, *avals)
    seen = {} if seen is None else seen
    if signature not in seen:
        if has_global_hooks():  # which our own graphs would call too
            raise untraceable("a hook on all modules is registered, of which a compiled loop knows nothing")
        record = partial(_record, carry, rows, signature)
        if is_tracing():  # the key and the second recording of the outer trace cover this loop
            seen[signature] = _with_shared_body(record(checked), *avals)
        else:
            reading = reading or key_of(f)
            make = partial(record_twice, f, checked, record, FAR if reading.key is None else ALL)
            seen[signature] = _found_or_made(make, signature, reading)
    return seen[signature]


def _found_or_made(make: Callable[[], Recorded], signature: Signature, reading: Reading) -> Traced:
    """Find the trace of an f with the same key and signature, or make and keep it."""
    _, carry_structure, x_structure, *avals = signature
    of_nodes = _key_of_nodes(carry_structure, x_structure)
    keyless = [each for each in (reading, of_nodes) if each.key is None]
    key = Key((*signature, reading.key, of_nodes.key))
    recipe = None if keyless else _recipes.find(key)
    if recipe is not None:
        tensors = [reading.tensors[at] if isinstance(at, int) else at for at in recipe.closed_over]
        return recipe._replace(closed_over=tensors)
    recorded = make()
    for each in keyless:
        warn_of(each)
    traced = _with_shared_body(recorded, *avals)
    places = {id(leaf): place for place, leaf in enumerate(reading.tensors)}
    closed_over = [places.get(id(leaf), leaf) for leaf in traced.closed_over]
    constants = [leaf for leaf in closed_over if isinstance(leaf, Tensor)]
    # Because f may meet another tensor next time where the reading lists none, such a trace does not last.
    is_complete = not any(id(leaf) in recorded.lift.known for leaf in constants)
    if not keyless and is_complete and not recorded.lift.asks:
        size = sum(leaf.nbytes for leaf in constants) + 64 * len(reading.key or ())
        _recipes.keep(key, traced._replace(closed_over=closed_over), size)
    return traced


def _key_of_nodes(*structures: _tree.Structure) -> Reading:
    """Read the nodes of trees that are of a user's class, or that are made again from data of their own."""
    nodes = [node for structure in structures for node in _tree.nodes(structure)]
    theirs = [node for node in nodes if node[1:] or owner(node[0].__module__) != "frozen"]
    return key_of(theirs) if theirs else _NOTHING


def _record(carry: Leaves, rows: Leaves, signature: Signature, checked: Callable[..., Any]) -> Recorded:
    """Run f, with its checks, once on tensors without values, and write down its operations."""
    around, device = depth(), _default_device()
    keeps_loops, carry_structure, x_structure, of_carry, of_x = signature
    structures: list[_tree.Structure] = []
    with (
        tracing,
        applied_functions(_is_theirs) as opaque,
        clean_room() as mode,
        no_log_of_fake_tensors(),
        differentiable_attention(),
    ):
        lift = Lift(mode, around, Cuts(opaque, around), keeps_loops)

        def flat(*leaves: Tensor) -> list[Tensor]:
            given = _tree.unflatten(carry_structure, leaves[: len(carry)])
            row = _tree.unflatten(x_structure, leaves[len(carry) :])
            with lift, gradients_under_no_grad(lift.cuts.cut), device:
                new, y = checked(given, row)
            _tree.check_tensors(y, "y")
            ys, structure = _tree.flatten(y)
            structures.append(structure)
            return [lift.plain(leaf).resolve_conj() for leaf in (*_tree.leaves(new), *ys)]

        try:
            # Because the outer levels are suspended, and a wrapper made inside f would get one of their
            # numbers. Lift knows such a wrapper by a level above `around`.
            with neutral_levels(around):
                graph = recorder(flat, OPERATIONS)(*[valueless(mode, *aval) for aval in of_carry + of_x])
        except Exception as error:
            if not needs_a_value(error):
                raise
            raise BackendError(
                f"f needs the value of a tensor at {_users_line(error)}; a compiled loop has none "
                f"when it is made: use torch.where, both of whose branches need finite gradients, or "
                f"backend='eager'"
            ) from error
    if lift.error is not None:
        raise untraceable(f"f goes on after an error that it meets only in a trace ({lift.error})")
    closed_over = _lift_attributes(graph, lift)
    given = (*carry, *rows, *[leaf for leaf, _ in lift.known.values()])
    if lift.asks and any(map(may_be_differentiated, given)):
        raise untraceable("f asks what autograd knows of a tensor, of which a compiled loop knows nothing")
    for leaf in closed_over:
        check_plain(leaf)
    return Recorded(graph, closed_over, lift, structures[0])


def _default_device() -> AbstractContextManager[Any]:
    """Return the default device as a context, for new tensors in a trace; refuse the user's modes."""
    theirs = [mode for mode in active_modes() if _is_theirs(type(mode))]
    if theirs:
        raise untraceable(f"a {type(theirs[0]).__name__} is active, of which a compiled loop knows nothing")
    device = torch.get_default_device()
    return nullcontext() if device.type == "cpu" else device


def _is_theirs(cls: type) -> bool:
    return cls.__module__.partition(".")[0] not in ("torch", "gdfunc")


def _users_line(error: BaseException) -> str:
    """Name the last line outside of torch and gdfunc that an error went through."""
    return line_of(users_frame_of(error) or [*traceback.walk_tb(error.__traceback__)][-1][0])


def _lift_attributes(graph: fx.GraphModule, lift: Lift) -> list[Tensor]:
    """Turn the tensors that a graph holds into inputs before the others; list the originals."""
    drop_dead_code(graph.graph)
    originals = {id(found): leaf for leaf, found in lift.known.values()}
    inputs: dict[int, tuple[fx.Node, Tensor]] = {}
    first = next(node for node in graph.graph.nodes if node.op != "get_attr")
    for node in graph.graph.find_nodes(op="get_attr"):
        value = getattr(graph, node.target)
        if id(value) not in inputs:
            original = originals.get(id(value), value)
            if original is value:  # a constant, whose memory may be that of an array of the user's
                if isinstance(value, FakeTensor) or not isinstance(value, Tensor):
                    raise untraceable(
                        f"f makes a tensor in a way that a trace cannot follow, of a tensor or a generator "
                        f"from outside ({type(value).__name__})"
                    )
                if value.requires_grad:
                    raise untraceable(
                        "f uses a parameter that a trace cannot follow, as a ScriptModule does"
                    )
                original = plain_copy(value)
            with graph.graph.inserting_before(first):
                placeholder = graph.graph.placeholder(f"const_{len(inputs)}")
            placeholder.meta["val"] = value
            inputs[id(value)] = placeholder, original
        node.replace_all_uses_with(inputs[id(value)][0])
        graph.graph.erase_node(node)
    return [leaf for _, leaf in inputs.values()]


def _pure(graph: fx.GraphModule, consts: int) -> fx.GraphModule:
    """Refuse what a graph cannot repeat, and write in-place operations as pure ones."""
    graph.recompile()
    for target in operators(graph):
        if torch.Tag.nondeterministic_seeded in target.tags:
            raise BackendError(
                f"f draws from torch's generator ({target}), as dropout does, but a compiled loop would "
                f"not repeat its numbers: draw from gd.random with a key in the carry, or use "
                f"backend='eager'"
            )
    if not any(map(writes, operators(graph))):
        return graph
    avals = [Aval.of(node.meta["val"]) for node in graph.graph.find_nodes(op="placeholder")]
    pure = graph_of(functionalize(with_reshapes(graph), remove="mutations"), avals, _ASSIGNMENTS)
    inputs = pure.graph.find_nodes(op="placeholder")
    for node in pure.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default):
        if node.args[0] in inputs:
            if inputs.index(node.args[0]) < consts:
                raise wrote_outside()
            raise ValueError("f wrote into its carry or x; it must return new tensors instead")
    return pure


def _copied(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    return source.to(target.dtype).expand(target.shape).clone()


def _clamped(
    target: Tensor, source: Tensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Tensor:
    if end is None or end <= target.shape[dim]:
        return NotImplemented
    return torch.slice_scatter(target, source, dim, start, target.shape[dim], step)


def _selected(target: Tensor, source: Tensor, dim: int, index: int) -> Tensor:
    # vmap makes of select_scatter a scatter with repeated indices, whose derivative is too large.
    start = index % target.shape[dim]
    return torch.slice_scatter(target, source.unsqueeze(dim), dim, start, start + 1)


def _strided(source: Tensor, size: Any, stride: Any, storage_offset: int | None = None) -> Tensor:
    if not source.is_contiguous():
        return NotImplemented
    places = _places(size, stride, storage_offset, source.device)
    return source.flatten().index_select(0, places.flatten()).reshape(places.shape)


def _strided_scatter(
    target: Tensor, source: Tensor, size: Any, stride: Any, storage_offset: int | None = None
) -> Tensor:
    if not target.is_contiguous():
        return NotImplemented
    places = _places(size, stride, storage_offset, target.device).flatten()
    return target.flatten().scatter(0, places, source.flatten()).reshape(target.shape)


def _places(size: Any, stride: Any, start: int | None, device: torch.device) -> Tensor:
    """List where the entries of a strided view lie in memory."""
    places = torch.full((), start or 0, device=device)
    for extent, step in zip(size, stride, strict=True):
        places = places[..., None] + torch.arange(extent, device=device) * step
    return places


# The operators that functionalize makes of assignments, in forms with derivatives and batching rules.
_ASSIGNMENTS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.copy.default: _copied,
    torch.ops.aten.as_strided.default: _strided,
    torch.ops.aten.as_strided_scatter.default: _strided_scatter,
    torch.ops.aten.slice_scatter.default: _clamped,
    torch.ops.aten.select_scatter.default: _selected,
}


def _with_shared_body(recorded: Recorded, carry: Avals, x: Avals) -> Traced:
    """Take the body of an equal graph before, with all that was compiled of it, or make a body."""
    consts = tuple(map(Aval.of, recorded.closed_over))
    graph = _pure(recorded.graph, len(consts))
    # The derivative of an operation that is neither torch's nor gdfunc's may not be one of a graph.
    foreign = {str(each) for each in operators(graph) if each.namespace not in KNOWN}
    opaque = frozenset(recorded.lift.cuts.opaque | foreign)
    key = (*words_of(graph.graph), consts, carry, x, opaque, torch.get_default_dtype())
    body = _bodies.find(key)
    if body is None:
        body = Body(graph, consts, carry, x)
        body.opaque = opaque
        _bodies.keep(key, body)
    return Traced(body, recorded.closed_over, recorded.y_structure)
