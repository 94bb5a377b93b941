"""The program of one sample: the loss's graph with a tap behind each weight that enters a product.

A tap is a zero added to an operation's result. The derivative with respect to it is the error of
back-propagation at that operation. Each sample is a vmapped program of its own, so the method assumes
nothing about the loss.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.func import grad_and_value, vmap

from .. import _tree
from .._gradients import LossFn, check_dependence, check_loss, checked, sample_loss
from .._per_sample import Dense, Leaf, Outer, Rows, at_once
from .._scan._recent import Recent
from .._scan.trace._key import key_of
from .._scan.trace._trace import trace
from .._tree import Tree
from ._patterns import Use, find_uses

Leaves = Sequence[Tensor]


class Uses(NamedTuple):
    """The uses of a weight, and whether the factors they give are kept, or only their products."""

    uses: list[Use]
    kept: bool

    def __str__(self) -> str:
        names = ", ".join(use.name for use in self.uses)
        return f"{'factors' if self.kept else 'products'}: {names}"


Way = Uses | str  # or why a leaf is differentiated as it is


class Program(NamedTuple):
    """The per-sample gradients of a loss, with each leaf in the form that its way gives.

    Attributes:
        ways: for each leaf of params.
        run: (params, samples, randomness) -> (losses, gradients), leaf by leaf.
    """

    ways: list[Way]
    run: Callable[[Leaves, Leaves, str], tuple[Tensor, list[Leaf]]]

    def sample_bytes(self, leaves: Leaves) -> int:
        """Return the bytes of one sample's gradients in this form."""
        return sum(
            leaf.element_size() * (_entries(way) if isinstance(way, Uses) and way.kept else leaf.numel())
            for leaf, way in zip(leaves, self.ways, strict=True)
        )


def direct(loss_fn: LossFn, params: Tree, batch: Tree, why: str) -> Program:
    """Differentiate each sample's loss as it is."""
    structure, batch_structure = _tree.flatten(params)[1], _tree.flatten(batch)[1]
    of_sample = checked(sample_loss(loss_fn))

    def program(leaves: Leaves, sample: Leaves, taps: Leaves) -> tuple[Tensor, list[Tensor]]:
        return of_sample(_tree.unflatten(structure, leaves), _tree.unflatten(batch_structure, sample)), []

    ways: list[Way] = [why] * len(_tree.leaves(params))
    return Program(ways, _runner(program, ways))


def tapped(loss_fn: LossFn, params: Tree, batch: Tree) -> Program:
    """Find the weights whose gradients are products of factors. Without any, differentiate directly."""
    f = "one sample", loss_fn  # not to be taken for the same function as a scan's body
    reading = key_of(f)
    if reading.key is None:
        return direct(loss_fn, params, batch, "the loss reaches what cannot be compared from call to call")
    key = (reading.key, *_kinds(params), *_kinds(_tree.map(lambda leaf: leaf[0], batch)))
    refused = _refused.find(key)
    if refused is not None:
        return direct(loss_fn, params, batch, refused)

    of_sample = sample_loss(loss_fn)

    def body(params: Tree, sample: Tree) -> tuple[Tree, Tensor]:
        return params, check_loss(of_sample(params, sample))

    try:
        traced = trace(f, body, params, batch, reading=reading, keeps_loops=False)
    except Exception as error:  # it occurs again, with a better message, on real tensors
        if not getattr(error, "untouched", True):
            raise
        refused = f"the loss cannot be traced ({type(error).__name__})"
        _refused.keep(key, refused, 64 * len(reading.key))
        return direct(loss_fn, params, batch, refused)
    body_of = traced.body
    if body_of.taps is None:
        body_of.taps = _tap(body_of.graph, len(body_of.consts), len(body_of.carry))
    graph, ways = body_of.taps
    if not any(isinstance(way, Uses) for way in ways):
        return direct(loss_fn, params, batch, "")._replace(ways=ways)

    def program(leaves: Leaves, sample: Leaves, taps: Leaves) -> tuple[Tensor, list[Tensor]]:
        return graph(*traced.closed_over, *leaves, *sample, *taps)

    return Program(ways, _runner(program, ways))


_refused = Recent()


def _kinds(tree: Tree) -> tuple[Any, ...]:
    leaves, structure = _tree.flatten(tree)
    return structure, *[(leaf.shape, leaf.dtype) for leaf in leaves]


def _tap(traced: fx.GraphModule, consts: int, leaves: int) -> tuple[fx.GraphModule, list[Way]]:
    """Build the graph (*consts, *params, *sample, *taps) -> (loss, activations), and each leaf's way."""
    graph = fx.Graph()
    *_, loss = graph.graph_copy(traced.graph, {})  # type: ignore[misc]
    output = graph.output((loss, []))
    graph.eliminate_dead_code()
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    ways = [_way(leaf) for leaf in inputs[consts : consts + leaves]]
    uses = _uses(ways)
    body = next(node for node in graph.nodes if node.op != "placeholder")
    for number, use in enumerate(uses):
        with graph.inserting_before(body):
            tap = graph.placeholder(f"tap_{number}")
        with graph.inserting_after(use.output):
            added = graph.call_function(torch.ops.aten.add.Tensor, (use.output, tap))
        use.output.replace_all_uses_with(added)
        added.args = (use.output, tap)
    output.args = ((loss, [use.activation for use in uses]),)
    return fx.GraphModule(traced, graph), ways


def _way(leaf: fx.Node) -> Way:
    """Return the uses of a leaf, and keep their factors if these are smaller than the leaf."""
    uses = find_uses(leaf)
    if isinstance(uses, str):
        return f"enters through {uses}"
    positions, (_, rows, columns) = sum(use.positions for use in uses), uses[0].shape
    size = 2 * positions  # products of factors are taken in float64
    smaller = size < rows if uses[0].rows else size * (rows + columns) < rows * columns
    return Uses(uses, smaller)


def _entries(way: Uses) -> int:
    """Count the entries of one sample's factors."""
    groups, rows, columns = way.uses[0].shape
    return groups * sum(use.positions for use in way.uses) * (columns + (1 if way.uses[0].rows else rows))


def _runner(program: Callable[..., Any], ways: list[Way]) -> Callable[..., Any]:
    """Differentiate `(params, sample, taps) -> (loss, activations)` for each sample."""
    tapped = [isinstance(way, Uses) for way in ways]
    outputs = [use.output.meta["val"] for use in _uses(ways)]

    def run(leaves: Leaves, samples: Leaves, randomness: str) -> tuple[Tensor, list[Leaf]]:
        def one(*sample: Tensor) -> tuple[Tensor, list[Tensor], list[tuple[Tensor, Tensor]]]:
            # A function under grad must not write into tensors other than its arguments.
            def loss(moving: Leaves, taps: Leaves, sample: Leaves) -> tuple[Tensor, list[Tensor]]:
                rest = iter(moving)
                params = [leaf if way else next(rest) for leaf, way in zip(leaves, tapped, strict=True)]
                value, activations = program(params, sample, taps)
                return check_dependence(value), activations

            moving = [leaf for leaf, way in zip(leaves, tapped, strict=True) if not way]
            taps = [torch.zeros((), dtype=y.dtype, device=y.device).expand(y.shape) for y in outputs]
            differentiated = grad_and_value(loss, (0, 1), has_aux=True)
            (grads, errors), (value, activations) = differentiated(moving, taps, sample)
            return value, grads, list(zip(activations, errors, strict=True))

        losses, grads, pairs = vmap(one, randomness=randomness)(*samples)
        dense, met = iter(grads), iter(pairs)
        return losses, [
            _met(way, [next(met) for _ in way.uses], leaf.shape)
            if isinstance(way, Uses)
            else Dense(next(dense))
            for way, leaf in zip(ways, leaves, strict=True)
        ]

    return run


def _uses(ways: list[Way]) -> list[Use]:
    return [use for way in ways if isinstance(way, Uses) for use in way.uses]


def _met(way: Uses, pairs: list[tuple[Tensor, Tensor]], shape: torch.Size) -> Leaf:
    """Return the gradients of a leaf from the activations and errors at its uses."""
    if way.kept:
        return _factored(way.uses, pairs, shape)
    few = at_once(_entries(way), len(pairs[0][0]))
    parts = zip(*[zip(a.split(few), e.split(few), strict=True) for a, e in pairs], strict=True)
    return Dense(_tree.cat([_factored(way.uses, list(part), shape).dense() for part in parts]))


def _factored(uses: list[Use], pairs: list[tuple[Tensor, Tensor]], shape: torch.Size) -> Outer | Rows:
    """Join the terms of all uses in one sum."""
    use = uses[0]
    terms = [use.terms(*pair) for use, pair in zip(uses, pairs, strict=True)]
    axis = 1 if use.rows else 2
    left, right = (torch.cat(side, axis) if len(uses) > 1 else side[0] for side in zip(*terms, strict=True))
    return Rows(left, right, shape) if use.rows else Outer(left, right, use.layout)
