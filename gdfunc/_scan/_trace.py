"""From a user's function to a body: Python is left behind, closed-over tensors become inputs."""

import linecache
import logging
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.autograd.function import FunctionMeta
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import get_proxy_mode, track_tensor_tree
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from .. import _tree
from .._errors import BackendError, is_ours
from .._through import asked
from .._tree import Tree
from ._body import Aval, Avals, Body, clean_room, prune, record, stand_in, trace_flat, tracing
from ._fingerprint import Fingerprint, fingerprint
from ._scan import check_tensor, within

_REMEMBERED = 512  # traces and bodies, before the least recently used is forgotten


class Traced(NamedTuple):
    """A body, the tensors that its function closed over, and how its y's are put together."""

    body: Body
    closed_over: list[Tensor]
    y_structure: _tree.Structure


class _Recipe(NamedTuple):
    """A trace for all functions of one fingerprint: closed-over tensors are their places in it."""

    body: Body
    closed_over: list[int | Tensor]
    y_structure: _tree.Structure


class _Recent(OrderedDict[Any, Any]):
    """A dict that forgets what was not used for longest."""

    def find(self, key: Any) -> Any:
        try:
            self.move_to_end(key)
            return self[key]
        except KeyError:
            return None

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        while len(self) > _REMEMBERED:
            self.popitem(last=False)


_recipes, _bodies = _Recent(), _Recent()


def trace(
    f: Any,
    body: Callable[[Tree, Tree], tuple[Tree, Tree]],
    init: Tree,
    xs: Tree,
    print_of_f: Fingerprint | None = None,
) -> Traced:
    """Trace a scan's body, f with checks around it; or find the trace of an f that computes the same."""
    carry, carry_structure = _tree.flatten(init)
    rows, x_structure = _tree.flatten(xs)
    carry_avals = tuple(Aval.of(leaf) for leaf in carry)
    x_avals = tuple(Aval.of(leaf)._replace(shape=tuple(leaf.shape[1:])) for leaf in rows)
    print_of_f, through = print_of_f or fingerprint(f), asked()
    key = (within.get(), through, print_of_f.key, carry_structure, x_structure, carry_avals, x_avals)
    lasting = print_of_f.key is not None and through.fixed_point is None
    recipe = _recipes.find(key) if lasting else None
    if recipe is None:
        with _noted() as opaque:
            graph, lift, y_structure = _record(body, carry_structure, carry_avals, x_structure, x_avals)
        originals = _lift_attributes(graph, lift)
        consts = tuple(Aval.of(leaf) for leaf in originals)
        shared = _shared(_checked(graph, len(consts)), consts, carry_avals, x_avals, frozenset(opaque))
        places = {id(leaf): place for place, leaf in enumerate(print_of_f.tensors)}
        closed_over = [places.get(id(leaf), leaf) for leaf in originals]
        recipe = _Recipe(shared, closed_over, y_structure)
        hidden = [leaf for leaf in closed_over if isinstance(leaf, Tensor) and id(leaf) in lift.known]
        if lasting and not hidden:
            _recipes[key] = recipe
    tensors = [print_of_f.tensors[at] if isinstance(at, int) else at for at in recipe.closed_over]
    return Traced(recipe.body, tensors, recipe.y_structure)


def _record(
    body: Callable[..., Any],
    carry_structure: _tree.Structure,
    carry: Avals,
    x_structure: _tree.Structure,
    x: Avals,
) -> tuple[fx.GraphModule, "_Lift", _tree.Structure]:
    """Run the body once on tensors without values, and write down its operations."""
    depth = _depth()
    structures: list[_tree.Structure] = []
    with clean_room() as mode, _silence(), sdpa_kernel(SDPBackend.MATH):  # which has all derivatives
        lift = _Lift(mode, depth)

        def flat(*leaves: Tensor) -> list[Tensor]:
            given = _tree.unflatten(carry_structure, leaves[: len(carry)])
            row = _tree.unflatten(x_structure, leaves[len(carry) :])
            with lift:
                new, y = body(given, row)
            for path, leaf in _tree.named_leaves(y, "y"):
                check_tensor(leaf, path)
            ys, structure = _tree.flatten(y)
            structures.append(structure)
            return [lift.plain(leaf) for leaf in (*_tree.leaves(new), *ys)]

        # Levels that change nothing, so that a wrapper made inside f has a higher one than those outside.
        for _ in range(depth):
            torch._C._functorch._vmap_increment_nesting(1, "same")
        try:
            graph = record(flat)(*[stand_in(mode, aval) for aval in (*carry, *x)])
        except (*_NO_VALUES, RuntimeError) as error:
            if not isinstance(error, _NO_VALUES) and ".numpy()" not in str(error):
                raise
            raise BackendError(
                f"f decides on the value of a tensor at {_users_line(error)}; a compiled loop has none "
                f"when it is made: use torch.where, or backend='eager' without checkpoint"
            ) from error
        finally:
            for _ in range(depth):
                torch._C._functorch._vmap_decrement_nesting()
    return graph, lift, structures[0]


@contextmanager
def _silence() -> Iterator[None]:
    """Keep the tracer's log of a mistake in f from the terminal: it is raised anyway."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


_NO_VALUES = (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode)


def _depth() -> int:
    """How many transformations of torch.func are under way."""
    innermost = torch._C._functorch.peek_interpreter_stack()
    return 0 if innermost is None else innermost.level()


def _users_line(error: BaseException) -> str:
    """The last line outside of torch and gdfunc that an error went through."""
    frames = traceback.extract_tb(error.__traceback__)
    outside = [frame for frame in frames if not is_ours(frame.filename)]
    frame = (outside or frames)[-1]
    text = linecache.getline(frame.filename, frame.lineno or 0).strip()
    return f"{frame.filename}:{frame.lineno}: `{text}`"


class _Lift(TorchFunctionMode):
    """Put a stand-in for every tensor that f uses but was neither given nor made.

    A transformation inside f may have wrapped such a tensor before an operation shows it. Then the
    stand-in is wrapped alike, and takes the wrapper's place in all that follows.
    """

    def __init__(self, mode: FakeTensorMode, depth: int) -> None:
        super().__init__()
        self.mode, self.depth = mode, depth
        self.known: dict[int, tuple[Tensor, Tensor]] = {}  # keeps the tensors, so that ids stay theirs

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _OF_THE_ORIGINAL:
            return func(*args, **(kwargs or {}))
        if func in _REFUSED:
            raise BackendError(f"f {_REFUSED[func]}, which a compiled loop has not; use backend='eager'")
        args, kwargs = _tree.map(self.plain, (args, kwargs or {}))
        if func in _COPIES:
            func, args = _COPIES[func], args[:1]
        elif func is Tensor.__getitem__:
            args = _without_scalars(args[0], self.index(args[1]))
        elif func is Tensor.__setitem__:
            args = args[0], _with_axes(self.index(args[1])), args[2]
        result = func(*args, **kwargs)
        if any(_tree.versions([found for _, found in self.known.values()])):
            raise _wrote("a tensor it closes over")  # at once, lest f puts the stand-in into its place
        # A graph has no grad mode: what no_grad cut must be cut in it.
        return result if torch.is_grad_enabled() else _tree.map(_cut, result)

    def plain(self, leaf: Any) -> Any:
        """Give the stand-in of a leaf that needs one."""
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in self.known:
            found = self._find(leaf)
            if found is leaf:
                return leaf
            self.known[id(leaf)] = leaf, found
        return self.known[id(leaf)][1]

    def index(self, index: Any) -> Any:
        """Put stand-ins into the slices of an index too: torch would read the values of tensors there."""
        if isinstance(index, tuple):
            return tuple(map(self.index, index))
        if not isinstance(index, slice):
            return index
        return slice(*map(self.plain, (index.start, index.stop, index.step)))

    def _find(self, leaf: Tensor) -> Tensor:
        level = torch._C._functorch.maybe_get_level(leaf) if _tree.is_transformed(leaf) else 0
        if level == _DEAD:  # what vjp leaves for the gradients that are asked of it later
            inner = torch._C._functorch.get_unwrapped(leaf)
            found = self.plain(inner)
            return leaf if found is inner else found
        if level > self.depth:
            inner = torch._C._functorch.get_unwrapped(leaf)
            found = self.plain(inner)
            if found is inner:
                return leaf
            axis = torch._C._functorch.maybe_get_bdim(leaf)
            if axis < 0:
                return torch._C._functorch._wrap_for_grad(found, level)
            return torch._C._functorch._add_batch_dim(found, axis, level)
        if isinstance(leaf, FakeTensor) and leaf.fake_mode is self.mode:
            return leaf
        found = stand_in(self.mode, Aval.of(leaf))
        _show(found)
        return found


_DEAD = -2  # the level of a wrapper whose transformation is over


def _getter(name: str) -> Any:
    return getattr(Tensor, name).__get__


# What a stand-in has not, or otherwise.
_OF_THE_ORIGINAL = {_getter("requires_grad"), _getter("is_leaf"), Tensor.stride, Tensor.is_contiguous}
_COPIES = {_getter("data"): Tensor.detach, Tensor.__deepcopy__: Tensor.clone}
_REFUSED = {_getter("grad"): "reads .grad of a tensor", Tensor.__dlpack__: "gives a tensor's memory away"}


def _show(leaf: Tensor) -> None:
    """Let the trace know that a tensor has no value, before it takes it for a constant."""
    mode = get_proxy_mode()
    if mode is None:  # within an operation, of which nothing is written down
        return
    tracer: Any = mode.tracer
    name = f"outside_{len(vars(tracer.root))}"
    setattr(tracer.root, name, leaf)
    track_tensor_tree(leaf, tracer.create_proxy("get_attr", name, (), {}), constant=None, tracer=tracer)


def _is_scalar_index(entry: Any) -> bool:
    whole = isinstance(entry, Tensor) and not entry.is_floating_point() and entry.dtype != torch.bool
    return whole and not entry.ndim


def _without_scalars(x: Tensor, index: Any) -> tuple[Tensor, Any]:
    """Pick with the 0-d integers among an index first: torch would read their values."""
    entries = list(index) if isinstance(index, tuple) else [index]
    for place, entry in enumerate(entries):
        if _is_scalar_index(entry):
            axis = sum(_axes_taken(before, entries, x) for before in entries[:place])
            x = torch.ops.aten.index.Tensor(x, [None] * axis + [entry.reshape(1)])
            entries[place] = 0
    return x, tuple(entries) if isinstance(index, tuple) else entries[0]


def _axes_taken(entry: Any, entries: list[Any], x: Tensor) -> int:
    if entry is None or isinstance(entry, bool):
        return 0
    if entry is Ellipsis:
        return x.ndim - sum(_axes_taken(other, entries, x) for other in entries if other is not Ellipsis)
    return entry.ndim if isinstance(entry, Tensor) and entry.dtype in (torch.bool, torch.uint8) else 1


def _with_axes(index: Any) -> Any:
    """Make the 0-d integers of an index 1-d, where the axis that this adds to the left is no matter."""
    entries = index if isinstance(index, tuple) else (index,)
    if all(_is_scalar_index(entry) or type(entry) is int for entry in entries):
        return tuple(entry.reshape(1) if isinstance(entry, Tensor) else entry for entry in entries)
    return index


def _cut(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _lift_attributes(graph: fx.GraphModule, lift: _Lift) -> list[Tensor]:
    """Turn the tensors that a graph holds into inputs before the others; list the originals."""
    graph.graph.eliminate_dead_code()
    originals = {id(found): leaf for leaf, found in lift.known.values()}
    inputs: dict[int, tuple[fx.Node, Tensor]] = {}
    first = next(node for node in graph.graph.nodes if node.op != "get_attr")
    for node in list(graph.graph.nodes):
        if node.op != "get_attr":
            continue
        value = getattr(graph, node.target)
        if id(value) not in inputs:
            original = originals.get(id(value), value)
            if original is value:  # a constant, whose memory may be that of an array of the user's
                if isinstance(value, FakeTensor) or not isinstance(value, Tensor):
                    raise BackendError(
                        f"f makes a tensor in a way that a trace cannot follow, of a tensor or a generator "
                        f"from outside ({type(value).__name__}); use backend='eager' without checkpoint"
                    )
                original = _own(value)
            with graph.graph.inserting_before(first):
                placeholder = graph.graph.placeholder(f"const_{len(inputs)}")
            placeholder.meta["val"] = value
            inputs[id(value)] = placeholder, original
        node.replace_all_uses_with(inputs[id(value)][0])
        graph.graph.erase_node(node)
    return [leaf for _, leaf in inputs.values()]


def _own(constant: Tensor) -> Tensor:
    """Copy a tensor out of sight of all that is under way."""
    with torch._C.DisableTorchFunction(), torch._C._DisableFuncTorch(), _disable_current_modes():
        return constant.detach().clone()


def _checked(graph: fx.GraphModule, consts: int) -> fx.GraphModule:
    """Refuse what a graph cannot repeat, and write in-place operations as pure ones."""
    prune(graph)
    targets = [node.target for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    for target in targets:
        if torch.Tag.nondeterministic_seeded in target.tags:
            raise BackendError(
                f"f draws from torch's generator ({target}), whose numbers a compiled loop would not "
                f"repeat: draw from gd.random with a key in xs, or use backend='eager' without checkpoint"
            )
    if not any(target._schema.is_mutable for target in targets):
        return graph
    avals = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    pure = trace_flat(functionalize(graph, remove="mutations"), tuple(map(Aval.of, avals)), _ASSIGNMENTS)
    inputs = [node for node in pure.graph.nodes if node.op == "placeholder"]
    for node in pure.graph.nodes:
        if node.target is torch.ops.aten.copy_.default and node.args[0] in inputs:
            what = "a tensor it closes over" if inputs.index(node.args[0]) < consts else "its carry or x"
            raise _wrote(what)
    return pure


def _wrote(what: str) -> ValueError:
    return ValueError(f"f wrote into {what}; it must return new tensors instead")


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


def _shared(graph: fx.GraphModule, consts: Avals, carry: Avals, x: Avals, opaque: frozenset[str]) -> Body:
    """The body of this graph: the one that an equal graph had before, with what was compiled of it."""
    key = (graph.code, consts, carry, x, opaque)
    body = _bodies.find(key)
    if body is None:
        body = _bodies[key] = Body(graph, consts, carry, x)
        body.opaque = opaque
    return body


@contextmanager
def _noted() -> Iterator[set[str]]:
    """List the functions applied that have a derivative of their own: a graph has their values alone."""
    applied: set[str] = set()
    thread = get_ident()

    def noting(cls: Any, name: str) -> Any:
        applies = name == "forward" and get_ident() == thread
        if applies and cls.__module__.partition(".")[0] not in ("torch", "gdfunc"):
            applied.add(cls.__qualname__)
        return type.__getattribute__(cls, name)

    with tracing:
        around = vars(FunctionMeta).get("__getattribute__")  # that of a trace around this one
        FunctionMeta.__getattribute__ = noting  # type: ignore[method-assign]
        try:
            yield applied
        finally:
            if around:
                FunctionMeta.__getattribute__ = around  # type: ignore[method-assign]
            else:
                del FunctionMeta.__getattribute__
