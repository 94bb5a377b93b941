"""The outer products through which a weight enters the graph of a loss, found operation by operation.

For y = x·W the gradient of W is Σₜ xₜ eₜᵀ, with e the derivative with respect to y. So a use of a weight
is known by the node y, the activation x, and how the two terms of the sum are made of x and e.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from .._per_sample import Layout

aten = torch.ops.aten
Terms = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Use(NamedTuple):
    """One use of a weight: gradient = Σₜ leftₜ rightₜᵀ, `left, right = terms(activation, error)`.

    Given those of B samples, the terms are [B, G, T, I] and [B, G, T, O]; for rows of a table they are
    indices [B, T] and [B, T, D].
    """

    output: fx.Node
    activation: fx.Node
    terms: Terms
    positions: int  # T
    shape: tuple[int, int, int]  # G, I, O
    layout: Layout
    rows: bool = False

    @property
    def name(self) -> str:
        return _name(self.output)


def find_uses(leaf: fx.Node) -> list[Use] | str:
    """List all uses of a leaf if they are outer products of one kind, else name the other operation."""
    uses = []
    for node, operand in _met(leaf):
        use = _use(node, operand, leaf)
        if use is None:
            return _name(node)
        uses.append(use)
    if not uses:
        return "nothing"
    kinds = {(use.rows, use.shape, use.layout) for use in uses}
    return uses if len(kinds) == 1 else "uses of several kinds"


def _met(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Iterate over the operations on a leaf or a view of it, each with the view."""
    for user in node.users:
        if user.target in _VIEWS and user.args[0] is node:
            yield from _met(user)
        else:
            yield user, node


_VIEWS = {
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.expand.default,
    aten.alias.default,
}


def _name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", str(node.target)).partition(".")[0]


def _use(node: fx.Node, operand: fx.Node, leaf: fx.Node) -> Use | None:
    match = _MATCHES.get(node.target)
    if match is None or sum(argument is operand for argument in node.args) != 1:
        return None
    layout = _layout(operand.meta["val"], leaf.meta["val"])
    return None if layout is None else match(node, operand, layout)


def _layout(operand: Tensor, leaf: Tensor) -> Layout | None:
    """Describe a view that rearranges all entries of a contiguous leaf."""
    if operand.numel() != leaf.numel():
        return None
    strides = operand.stride()
    order = sorted(range(operand.ndim), key=lambda axis: (operand.shape[axis] > 1, -strides[axis]))
    return Layout(leaf.shape, tuple(operand.shape), tuple(order))


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    return node.args


def _product(node: fx.Node, operand: fx.Node, layout: Layout) -> Use | None:
    """mm, bmm and mv, with a matrix added or not: y = c + x·W, or y = c + W·x."""
    if node.kwargs:  # c and x·W are scaled
        return None
    *added, first, second = _arguments(node)
    if operand in added:
        return None
    other = second if operand is first else first
    if operand.meta["val"].ndim < 2:
        return None
    groups, rows, columns = (1, *operand.meta["val"].shape)[-3:]
    positions = math.prod(other.meta["val"].shape) // groups // (rows if operand is second else columns)
    swap = layout.order[-1] != len(layout.order) - 1

    def terms(x: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        if operand is first:
            x, e = (e[:, None], x[:, None]) if x.ndim == 2 else (e.mT, x.mT)
        left, right = (term if term.ndim == 4 else term[:, None] for term in (x, e))
        return (right, left) if swap else (left, right)

    shape = (groups, columns, rows) if swap else (groups, rows, columns)
    return Use(node, other, terms, positions, shape, _transposed(layout) if swap else layout)


def _transposed(layout: Layout) -> Layout:
    """Exchange the last two axes in a layout, so that equal uses of a weight compare equal."""
    *lead, rows, columns = layout.operand
    names = {len(lead): len(lead) + 1, len(lead) + 1: len(lead)}
    order = tuple(names.get(axis, axis) for axis in layout.order)
    return Layout(layout.leaf, (*lead, columns, rows), order)


def _convolution(node: fx.Node, operand: fx.Node, layout: Layout) -> Use | None:
    x, weight, _, stride, padding, dilation, transposed, _, groups = _arguments(node)
    if operand is not weight:
        return None
    kernel = tuple(operand.meta["val"].shape[2:])
    # The transposed convolution is the derivative of the plain one, so input and error change places.
    narrow = x.meta["val"] if transposed else node.meta["val"]
    spatial = tuple(narrow.shape[2:])

    def terms(x: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        windowed, plain = (e, x) if transposed else (x, e)
        plain = plain.unflatten(2, (groups, -1)).movedim(2, 1).movedim(3, -1)  # [B, g, N, *S, O]
        right = _windows(windowed, kernel, stride, padding, dilation, spatial, groups)
        return plain.flatten(2, -2), right

    channels = operand.meta["val"].shape
    shape = groups, channels[0] // groups, math.prod(channels[1:])
    return Use(node, x, terms, narrow.shape[0] * math.prod(spatial), shape, layout)


def _windows(
    x: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any, spatial: Any, groups: int
) -> Tensor:
    """Unfold the inputs of a convolution at each place: [B, N, C, *] -> [B, g, N·places, C/g·kernel]."""
    x = torch.nn.functional.pad(x, [size for side in reversed(padding) for size in (side, side)])
    for axis, (k, step, d, places) in enumerate(zip(kernel, stride, dilation, spatial, strict=True), 3):
        x = x.unfold(axis, d * (k - 1) + 1, step).narrow(axis, 0, places)[..., ::d]
    n, dims = len(spatial), range(4, 4 + len(spatial))
    # Long rows of places copy faster than short ones of kernels.
    x = x.unflatten(2, (groups, -1)).permute(0, 2, 3, *[axis + n for axis in dims], 1, *dims)
    return x.flatten(3 + n).flatten(2, 2 + n).mT


def _embedding(node: fx.Node, operand: fx.Node, layout: Layout) -> Use | None:
    _, index, *options = _arguments(node)
    defaults: tuple[Any, ...] = (-1, False)
    padding, by_frequency, *_ = (*options, *defaults[len(options) :])
    if by_frequency:
        return None
    return _rows(node, operand, layout, index, lambda flat, e: e * (flat != padding)[..., None])


def _indexed(node: fx.Node, operand: fx.Node, layout: Layout) -> Use | None:
    _, indices, *_ = _arguments(node)
    return _rows(node, operand, layout, indices[0], lambda flat, e: e) if len(indices) == 1 else None


def _selected(node: fx.Node, operand: fx.Node, layout: Layout) -> Use | None:
    _, axis, index = _arguments(node)
    return _rows(node, operand, layout, index, lambda flat, e: e) if axis == 0 else None


def _rows(
    node: fx.Node, operand: fx.Node, layout: Layout, index: fx.Node, masked: Callable[..., Tensor]
) -> Use | None:
    """Describe rows taken from a table, whose left factors are unit vectors."""
    table = operand.meta["val"]
    if index is operand or table.shape != layout.leaf or list(layout.order) != sorted(layout.order):
        return None

    def terms(index: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        flat = index.flatten(1)
        return flat.remainder(table.shape[0]), masked(flat, e.reshape(*flat.shape, -1))

    shape = 1, table.shape[0], table[0].numel()
    return Use(node, index, terms, index.meta["val"].numel(), shape, layout, rows=True)


_MATCHES: dict[Any, Callable[[fx.Node, fx.Node, Layout], Use | None]] = {
    **dict.fromkeys((aten.mm.default, aten.bmm.default, aten.mv.default), _product),
    **dict.fromkeys((aten.addmm.default, aten.baddbmm.default), _product),
    aten.convolution.default: _convolution,
    aten.embedding.default: _embedding,
    aten.index.Tensor: _indexed,
    aten.index_select.default: _selected,
}
