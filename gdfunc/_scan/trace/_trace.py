"""From a user's function to a body: Python is left behind, closed-over tensors become inputs."""

import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.func import functionalize
from torch.nn.attention import SDPBackend, sdpa_kernel

from ... import _tree
from ..._errors import BackendError, check_tensor, is_ours, line_of, untraceable
from ..._torch._graphs import graph_of, needs_a_value, operators, recorder, without_dead_code, writes
from ..._torch._modes import (
    FakeTensor,
    active_modes,
    clean_room,
    is_tracing,
    plain_copy,
    tracing,
    valueless,
)
from ..._torch._patches import applied_functions, gradients_under_no_grad, no_log_of_fake_tensors
from ..._torch._transforms import depth, may_be_differentiated, neutral_levels
from ..._tree import Tree
from .._body import Aval, Avals, Body, nested_loops
from .._recent import Recent
from ._code import owner
from ._cuts import Cuts
from ._key import Key, Reading, key_of
from ._lift import Lift, check_plain, wrote
from ._purity import Recorded, record_twice, warn_of
from ._rewrites import OPERATIONS


class Traced(NamedTuple):
    """A body, the tensors that its function closed over, and how its y's are put together.

    Kept for all functions of one key, it has the places of these tensors in the key.
    """

    body: Body
    closed_over: list[Any]
    y_structure: _tree.Structure


_recipes, _bodies = Recent(), Recent()


def trace(
    f: Any,
    body: Callable[[Tree, Tree], tuple[Tree, Tree]],
    init: Tree,
    xs: Tree,
    seen: dict[Any, Any] | None = None,
    keeps_loops: bool = True,
) -> Traced:
    """Trace a scan's body, f with checks around it; or find the trace of an f with the same key.

    Args:
        seen: what was traced of f before, in the same run. It is filled, so that a run of many segments
            reads and traces f once.
        keeps_loops: whether a long scan inside f stays a loop, or all its steps are recorded.
    """
    carry, carry_structure = _tree.flatten(init)
    rows, x_structure = _tree.flatten(xs)
    for leaf in (*carry, *rows):
        check_plain(leaf)
    carry_avals = tuple([Aval.of(leaf) for leaf in carry])
    x_avals = tuple([Aval.of(leaf, 1) for leaf in rows])
    about = (keeps_loops, carry_structure, x_structure, carry_avals, x_avals)
    seen = {} if seen is None else seen
    if about in seen:
        return seen[about]

    nested = is_tracing()  # the trace that this loop is a part of has the key, and is made twice
    reading = _EMPTY if nested else seen.get("reading") or key_of(f)
    readings = reading, _key_of_nodes(carry_structure, x_structure)
    key = (*about, *[each.key for each in readings])
    lasting = not nested and all(each.key is not None for each in readings)
    recipe = _recipes.find(key) if lasting else None
    if recipe is None:
        record = partial(_record, init, xs, keeps_loops)
        recorded = record(body) if nested else record_twice(f, body, record)
        for each in readings:
            if each.key is None:
                warn_of(each)
        lasting = lasting and not recorded.lift.asks
        places = {id(leaf): place for place, leaf in enumerate(reading.tensors)}
        closed_over = [places.get(id(leaf), leaf) for leaf in recorded.closed_over]
        recipe = Traced(_shared(recorded, carry_avals, x_avals), closed_over, recorded.y_structure)
        constants = [leaf for leaf in closed_over if isinstance(leaf, Tensor)]
        if lasting and not any(id(leaf) in recorded.lift.known for leaf in constants):
            _recipes.keep(key, recipe, sum(leaf.nbytes for leaf in constants) + 64 * len(reading.key or ()))
    tensors = [reading.tensors[at] if isinstance(at, int) else at for at in recipe.closed_over]
    seen["reading"], seen[about] = reading, recipe._replace(closed_over=tensors)
    return seen[about]


def _key_of_nodes(*structures: _tree.Structure) -> Reading:
    """Read the classes of the user's that f is given instances of, and what these are made again from."""
    nodes = [node for structure in structures for node in _tree.nodes(structure)]
    theirs = [node for node in nodes if node[1:] or owner(node[0].__module__) != "frozen"]
    return key_of(theirs) if theirs else _EMPTY


_EMPTY = Reading(Key(), [], [], "")


def _record(init: Tree, xs: Tree, keeps_loops: bool, body: Callable[..., Any]) -> Recorded:
    """Run the body once on tensors without values, and write down its operations."""
    around, device = depth(), _default_device()
    (carry, carry_structure), (rows, x_structure) = _tree.flatten(init), _tree.flatten(xs)
    avals = [*map(Aval.of, carry), *[Aval.of(leaf, 1) for leaf in rows]]
    structures: list[_tree.Structure] = []
    with (
        tracing,
        applied_functions(_is_theirs) as opaque,
        clean_room() as mode,
        no_log_of_fake_tensors(),
        sdpa_kernel(SDPBackend.MATH),  # the only kernel of attention that has all derivatives
    ):
        lift = Lift(mode, around, Cuts(opaque, around), keeps_loops)

        def flat(*leaves: Tensor) -> list[Tensor]:
            given = _tree.unflatten(carry_structure, leaves[: len(carry)])
            row = _tree.unflatten(x_structure, leaves[len(carry) :])
            with lift, gradients_under_no_grad(lift.cuts.cut), device:
                new, y = body(given, row)
            for path, leaf in _tree.named_leaves(y, "y"):
                check_tensor(leaf, path)
            ys, structure = _tree.flatten(y)
            structures.append(structure)
            return [lift.plain(leaf) for leaf in (*_tree.leaves(new), *ys)]

        try:
            with neutral_levels(around):  # a wrapper made inside f lies above all those outside
                graph = recorder(flat, OPERATIONS)(*[valueless(mode, *aval) for aval in avals])
        except Exception as error:
            if not needs_a_value(error):
                raise
            raise BackendError(
                f"f decides on the value of a tensor at {_users_line(error)}; a compiled loop has none "
                f"when it is made: use torch.where, or backend='eager'"
            ) from error
    closed_over = _lift_attributes(graph, lift)
    given = (*carry, *rows, *[leaf for leaf, _ in lift.known.values()])
    if lift.asks and any(map(may_be_differentiated, given)):
        raise untraceable("f asks what autograd knows of a tensor, of which a compiled loop knows nothing")
    for leaf in closed_over:
        check_plain(leaf)
    return Recorded(graph, closed_over, lift, structures[0])


def _default_device() -> AbstractContextManager[Any]:
    """Give what makes new tensors in a trace where they are made now; refuse modes that it cannot see."""
    theirs = [mode for mode in active_modes() if _is_theirs(type(mode))]
    if theirs:
        raise untraceable(f"a {type(theirs[0]).__name__} is active, of which a compiled loop knows nothing")
    device = torch.get_default_device()
    return nullcontext() if device.type == "cpu" else device


def _is_theirs(cls: type) -> bool:
    return cls.__module__.partition(".")[0] not in ("torch", "gdfunc")


def _users_line(error: BaseException) -> str:
    """Name the last line outside of torch and gdfunc that an error went through."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    outside = [frame for frame in frames if not is_ours(frame.f_code.co_filename)]
    return line_of((outside or frames)[-1])


def _lift_attributes(graph: fx.GraphModule, lift: Lift) -> list[Tensor]:
    """Turn the tensors that a graph holds into inputs before the others; list the originals."""
    graph.graph.eliminate_dead_code()
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
                original = plain_copy(value)
            with graph.graph.inserting_before(first):
                placeholder = graph.graph.placeholder(f"const_{len(inputs)}")
            placeholder.meta["val"] = value
            inputs[id(value)] = placeholder, original
        node.replace_all_uses_with(inputs[id(value)][0])
        graph.graph.erase_node(node)
    return [leaf for _, leaf in inputs.values()]


def _checked(graph: fx.GraphModule, consts: int) -> fx.GraphModule:
    """Refuse what a graph cannot repeat, and write in-place operations as pure ones."""
    without_dead_code(graph)
    for target in operators(graph):
        if torch.Tag.nondeterministic_seeded in target.tags:
            raise untraceable(
                f"f draws from torch's generator ({target}), whose numbers a compiled loop would not "
                f"repeat; draw from gd.random with a key from the carry or the data"
            )
    if not any(map(writes, operators(graph))):
        return graph
    avals = [Aval.of(node.meta["val"]) for node in graph.graph.find_nodes(op="placeholder")]
    pure = graph_of(functionalize(graph, remove="mutations"), avals, _ASSIGNMENTS)
    inputs = pure.graph.find_nodes(op="placeholder")
    for node in pure.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default):
        if node.args[0] in inputs:
            is_const = inputs.index(node.args[0]) < consts
            raise wrote("a tensor it closes over" if is_const else "its carry or x")
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


# What functionalize makes of assignments, in forms that have derivatives and batching rules.
_ASSIGNMENTS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.copy.default: _copied,
    torch.ops.aten.slice_scatter.default: _clamped,
    torch.ops.aten.select_scatter.default: _selected,
}


def _shared(recorded: Recorded, carry: Avals, x: Avals) -> Body:
    """Give the body of a graph: that of an equal graph before, with what was compiled of it."""
    opaque = recorded.lift.cuts.opaque
    consts = tuple(map(Aval.of, recorded.closed_over))
    graph = _checked(recorded.graph, len(consts))
    # The derivative of an operation that is not torch's own may not be one of a graph.
    foreign = {str(each) for each in operators(graph) if each.namespace not in ("aten", "prims")}
    names, loops = frozenset(opaque | foreign), tuple(nested_loops(graph))  # whose code is one name
    key = (graph.code, loops, consts, carry, x, names, torch.get_default_dtype())
    body = _bodies.find(key)
    if body is None:
        body = Body(graph, consts, carry, x)
        body.opaque = names
        _bodies.keep(key, body)
    return body
