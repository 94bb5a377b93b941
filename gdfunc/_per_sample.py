"""Per-sample gradients as factors, and the sums and norms that follow from them without [B, P].

A leaf's gradients are kept as `Dense` [B, ...], or as sums of outer products. The latter is what
back-propagation makes of a weight: with inputs aₜ and errors eₜ at its positions t, gᵢ = Σₜ aₜ eₜᵀ. Norms,
weighted sums and inner products follow from the factors alone.

References:
    I. Goodfellow, "Efficient per-example gradient computations", 2015.
    X. Li et al., "Large language models can be strong differentially private learners", 2022.
    Z. Bu et al., "Differentially private optimization on large model at small cost", 2022.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial, reduce
from math import nan
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _tree
from ._errors import warn
from ._numerics import norms, precise, root, usable_scale, widen
from ._tree import Tree

_MANY = 2**21  # entries: little compared with the rest of a chunk
_PARTS = 16  # to take a chunk in, at most: a compiler writes all of them out


@dataclass(frozen=True)
class Dense:
    """The gradients [B, *shape] of B samples with respect to one leaf of the parameters, as they are.

    `Outer` and `Rows` hold factors of such gradients, and have the same methods. Sums come in the leaf's
    shape, and in its dtype but at least float32.
    """

    grads: Tensor

    def norms(self) -> Tensor:
        """Compute ‖gᵢ‖, [B]."""
        return norms(_rows(self.grads))

    def weighted_sum(self, weights: Tensor | None) -> Tensor:
        """Compute Σᵢ wᵢ gᵢ. None: all weights are one."""
        grads = widen(self.grads)
        if weights is None:
            return grads.sum(0)
        return torch.mv(_rows(grads).mT, weights.to(grads.dtype)).view(grads.shape[1:])

    def sum_of_squares(self, mean: Tensor | None) -> Tensor:
        """Compute Σᵢ gᵢ², or Σᵢ (gᵢ − mean)² around their own mean."""
        grads = widen(self.grads)
        return (grads if mean is None else grads - mean).square().sum(0)

    def dots(self, direction: Tensor) -> Tensor:
        grads = _rows(widen(self.grads))
        return grads @ direction.to(grads.dtype).flatten()

    def gram(self, other: Any) -> Tensor:
        """Compute inner products [B, B'] with another chunk's gradients of this leaf."""
        return _rows(widen(self.grads)) @ _rows(widen(other.grads)).mT

    def dense(self) -> Tensor:
        """Return the gradients themselves."""
        return self.grads

    def keep(self, mask: Tensor) -> "Dense":
        """Replace the gradients of the samples that are not masked by zeros."""
        return Dense(_kept(mask, self.grads))

    def single(self) -> "Dense":
        """Remove the sums in a sample in which terms could cancel."""
        return self


class Layout(NamedTuple):
    """The place of a weight's entries, as an operation sees them, in the leaf that it is a view of."""

    leaf: torch.Size
    operand: tuple[int, ...]
    order: tuple[int, ...]  # the operand's axes as they follow one another in the leaf

    def to_leaf(self, x: Tensor) -> Tensor:
        """[..., G, I, O] -> [..., *leaf]"""
        lead = x.shape[:-3]
        axes = [*range(len(lead)), *[len(lead) + axis for axis in self.order]]
        return x.reshape(*lead, *self.operand).permute(axes).reshape(*lead, *self.leaf)

    def from_leaf(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """[*leaf] -> [G, I, O]"""
        inverse = [self.order.index(axis) for axis in range(len(self.order))]
        return x.reshape([self.operand[axis] for axis in self.order]).permute(inverse).reshape(shape)


@dataclass(frozen=True)
class Outer:
    """gᵢ = Σₜ leftᵢₜ rightᵢₜᵀ, of left [B, G, T, I] and right [B, G, T, O], for each of G groups."""

    left: Tensor
    right: Tensor
    layout: Layout

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.left.shape[1], self.left.shape[3], self.right.shape[3]

    def norms(self) -> Tensor:
        left, right = widen(self.left), widen(self.right)
        return _norm_of_sum(norms(left), norms(right), lambda a: a @ a.mT, left, right)

    def weighted_sum(self, weights: Tensor | None) -> Tensor:
        left, right = widen(self.left), widen(self.right)
        if weights is not None:
            weights = weights.to(left.dtype)[:, None, None, None]
            if left.numel() < right.numel():
                left = left * weights
            else:
                right = right * weights
        return self.layout.to_leaf(_by_group(left).mT @ _by_group(right))

    def sum_of_squares(self, mean: Tensor | None) -> Tensor:
        if self.left.shape[2] > 1:
            # Squares of sums need all entries, but of a few samples at a time.
            few = at_once(self.layout.leaf.numel(), len(self.left))
            parts = zip(self.left.split(few), self.right.split(few), strict=True)
            dense = (Dense(Outer(*part, self.layout).dense()) for part in parts)
            return reduce(torch.add, (part.sum_of_squares(mean) for part in dense))
        left, right = widen(self.left), widen(self.right)
        squares = self.layout.to_leaf(_by_group(left.square()).mT @ _by_group(right.square()))
        return squares if mean is None else _around(squares, mean, len(left))

    def dots(self, direction: Tensor) -> Tensor:
        left = widen(self.left)
        at = self.layout.from_leaf(direction.to(left.dtype), self.shape)
        return ((left @ at) * self.right).sum((1, 2, 3))

    def gram(self, other: Any) -> Tensor:
        pairs = _products(self.left, other.left) * _products(self.right, other.right)
        return pairs.sum((0, 2, 4))

    def dense(self) -> Tensor:
        return self.layout.to_leaf(self.left.mT @ self.right)

    def keep(self, mask: Tensor) -> "Outer":
        return replace(self, left=_kept(mask, self.left), right=_kept(mask, self.right))

    def single(self) -> "Outer | Dense":
        return self if self.left.shape[2] == 1 else Dense(self.dense())


@dataclass(frozen=True)
class Rows:
    """gᵢ has in row index[i, t] the sum of the right[i, t] with that index: of [B, T] and [B, T, D]."""

    index: Tensor
    right: Tensor
    leaf: torch.Size
    distinct: bool = False  # whether indices that a sample repeats have rows of zeros

    def norms(self) -> Tensor:
        if self.distinct:
            return norms(_rows(self.right))
        right = widen(self.right)[:, None]
        sizes = norms(right)
        # The left factors are unit vectors, equal where the index is.
        same = self._same(self)[:, None]
        return _norm_of_sum(torch.ones_like(sizes), sizes, lambda _: same, right, right)

    def _same(self, other: "Rows") -> Tensor:
        return self.index[:, :, None] == other.index[:, None, :]

    def weighted_sum(self, weights: Tensor | None) -> Tensor:
        right = widen(self.right)
        if weights is not None:
            right = right * weights.to(right.dtype)[:, None, None]
        table = right.new_zeros(self.leaf[0], right.shape[2])
        return table.index_add(0, self.index.flatten(), right.flatten(0, 1)).view(self.leaf)

    def sum_of_squares(self, mean: Tensor | None) -> Tensor:
        squares = replace(self, right=self.single().right.square()).weighted_sum(None)
        return squares if mean is None else _around(squares, mean, len(self.right))

    def dots(self, direction: Tensor) -> Tensor:
        right = widen(self.right)
        rows = direction.to(right.dtype).reshape(self.leaf[0], -1)[self.index]
        return (rows * right).sum((1, 2))

    def gram(self, other: Any) -> Tensor:
        same = self.index[:, :, None, None] == other.index
        return (same * _products(self.right[:, None], other.right[:, None])[0]).sum((1, 3))

    def dense(self) -> Tensor:
        table = self.right.new_zeros(len(self.right), self.leaf[0], self.right.shape[2])
        rows = self.index[:, :, None].expand_as(self.right)
        return table.scatter_add(1, rows, self.right).view(-1, *self.leaf)

    def keep(self, mask: Tensor) -> "Rows":
        return replace(self, right=_kept(mask, self.right))

    def single(self) -> "Rows":
        # An infinite sample may spread NaN over its own rows, because infinity times zero is NaN.
        right, same = widen(self.right), self._same(self)
        first = ~same.tril(-1).any(2, keepdim=True)
        added = torch.where(first, same.to(right.dtype) @ right, torch.zeros_like(right))
        return replace(self, right=added, distinct=True)


Leaf = Dense | Outer | Rows


@dataclass(frozen=True)
class PerSample:
    """The gradients of some consecutive samples of a batch, as a reducer is given them.

    gᵢ = ∇θ L(θ, {sample i}),  i = start … start + B − 1

    Attributes:
        losses: [B].
        start: the position of the first of them in the batch.
        leaves: the gradients with respect to each leaf, in some form that the methods here understand.
        earlier: functions that compute the chunks before this one again, for reductions over pairs.

    Sums are in each leaf's dtype, but at least in float32.

    Example:
        >>> norms = gd.reducers.Reducer(
        ...     init=lambda params: (),
        ...     add=lambda so_far, grads: (*so_far, grads.norms()),
        ...     finish=torch.cat,
        ... )
        >>> loss_fn = lambda w, x: ((x @ w) ** 2).mean()
        >>> w, x = torch.ones(2), torch.tensor([[3.0, 4.0], [0.0, 1.0]])
        >>> gd.reduce_per_sample(loss_fn, norms, chunk_size=1)(w, x)
        (tensor([70.,  2.]), tensor([49.,  1.]))
    """

    losses: Tensor
    start: int
    leaves: Sequence[Leaf]
    structure: Any
    earlier: Sequence[Callable[[], "PerSample"]] = field(default=(), repr=False)

    @cached_property
    def _leaf_norms(self) -> list[Tensor]:
        return [leaf.norms() for leaf in self.leaves]

    def norms(self) -> Tensor:
        """Compute ‖gᵢ‖ over all leaves, [B], which overflows or underflows only if the norm itself does."""
        return norms(torch.stack(self._leaf_norms, -1))

    def leaf_norms(self) -> Tree:
        """Compute ‖gᵢ‖ for each leaf alone, a tree like params of [B]."""
        return self._tree(self._leaf_norms)

    def weighted_sum(self, weights: Tensor | None = None) -> Tree:
        """Compute Σᵢ wᵢ gᵢ for weights [B], or the plain sum: a tree like params."""
        return self._tree([leaf.weighted_sum(weights) for leaf in self.leaves])

    def mean(self) -> Tree:
        """Compute 1/B Σᵢ gᵢ, a tree like params."""
        size = len(self.losses)
        # Dividing a factor takes far fewer divisions than dividing the sum of products.
        return self.weighted_sum(self.losses.new_full((size,), 1 / size, dtype=precise(self.losses)))

    def sum_of_squares(self, mean: Tree = None) -> Tree:
        """Compute Σᵢ gᵢ², entry by entry, or with their own mean Σᵢ (gᵢ − mean)²."""
        means = [None] * len(self.leaves) if mean is None else _tree.leaves(mean)
        return self._tree([leaf.sum_of_squares(m) for leaf, m in zip(self.leaves, means, strict=True)])

    def dots(self, direction: Tree) -> Tensor:
        """Compute ⟨gᵢ, d⟩ with a tree like params, [B]."""
        pairs = zip(self.leaves, _tree.leaves(direction), strict=True)
        return torch.stack([leaf.dots(d) for leaf, d in pairs]).sum(0)

    def gram(self, other: "PerSample") -> Tensor:
        """Compute ⟨gᵢ, hⱼ⟩ with another chunk's gradients, [B, B']."""
        pairs = zip(self.leaves, other.leaves, strict=True)
        return torch.stack([leaf.gram(its) for leaf, its in pairs]).sum(0)

    def single(self) -> "PerSample":
        """Remove the sums in a sample in which terms could cancel."""
        return replace(self, leaves=[leaf.single() for leaf in self.leaves])

    def dense(self) -> Tree:
        """Return the gradients themselves, a tree like params with leaves [B, ...]."""
        return self._tree([leaf.dense() for leaf in self.leaves])

    def keep(self, mask: Tensor) -> "PerSample":
        """Replace all gradients by exact zeros where mask [B] is False."""
        return replace(self, leaves=[leaf.keep(mask) for leaf in self.leaves])

    def _tree(self, leaves: Sequence[Tensor]) -> Tree:
        return _tree.unflatten(self.structure, list(leaves))


@dataclass(frozen=True)
class Reducer:
    """A fold over chunks of per-sample gradients, of three pure functions.

    result = finish(add(… add(init(θ), g₁ … gₖ) …, … g_B))

    Attributes:
        init: `params -> accumulator`.
        add: `(accumulator, grads) -> accumulator`, with `grads` a `PerSample`: the next few samples.
        finish: `accumulator -> result`, a tree of tensors.
        entries: whether `add` reads the gradients' entries (`grads.dense()`), so that whole chunks of them
            must fit into memory.

    Example:
        >>> largest = gd.reducers.Reducer(
        ...     init=lambda params: torch.tensor(0.0),
        ...     add=lambda so_far, grads: torch.maximum(so_far, grads.norms().max()),
        ...     finish=lambda so_far: so_far,
        ...     entries=False,
        ... )
        >>> gd.reduce_per_sample(lambda w, x: (w * x).mean(), largest)(torch.tensor(1.0), torch.arange(3.0))
        (tensor(2.), tensor([0., 1., 2.]))
    """

    init: Callable[[Tree], Any]
    add: Callable[[Any, PerSample], Any]
    finish: Callable[[Any], Tree]
    entries: bool = True


def together(first: Reducer, second: Reducer, finish: Callable[[Any, Any], Tree]) -> Reducer:
    """Reduce to a function of the results of two reducers."""
    return Reducer(
        lambda params: (first.init(params), second.init(params)),
        lambda acc, grads: (first.add(acc[0], grads), second.add(acc[1], grads)),
        lambda acc: finish(first.finish(acc[0]), second.finish(acc[1])),
        first.entries or second.entries,
    )


@dataclass(frozen=True)
class Moments:
    """The mean of `count` gradients, and the sum of the squares of their distances to it.

    References:
        T. Chan, G. Golub, R. LeVeque, "Algorithms for computing the sample variance", 1983.
    """

    params: Tree
    count: int = 0
    mean: Tree = None
    squares: Tree = None

    def plus(self, grads: PerSample) -> "Moments":
        """Take in the next few samples."""
        more, mean = len(grads.losses), grads.mean()
        squares = grads.sum_of_squares(mean)
        if not self.count:
            return replace(self, count=more, mean=mean, squares=squares)
        count = self.count + more
        share = more / count

        def spread(old: Tensor, new: Tensor, old_mean: Tensor, new_mean: Tensor) -> Tensor:
            shift = new_mean - old_mean
            return torch.addcmul(old + new, shift, shift, value=self.count * share)

        squares = _tree.map(spread, self.squares, squares, self.mean, mean)
        mean = _tree.map(partial(torch.lerp, weight=share), self.mean, mean)
        return replace(self, count=count, mean=mean, squares=squares)


def at_once(entries: int, size: int) -> int:
    """Return how many of `size` samples to take at a time, if each needs `entries` temporary entries."""
    return max(_MANY // entries, -(-size // _PARTS))


def degrees_of_freedom(count: int, correction: int) -> float:
    """Return B − c, or NaN with a warning if the variance is undefined."""
    if count > correction:
        return count - correction
    warn(
        f"the batch has {'one sample' if count == 1 else f'{count} samples'}, too few for a variance: "
        f"statistics of it are NaN; take at least {correction + 1}"
    )
    return nan


def _around(squares: Tensor, mean: Tensor, count: int) -> Tensor:
    """Compute Σ (xᵢ − mean)² from Σ xᵢ², up to the rounding of the latter."""
    return torch.addcmul(squares, mean, mean, value=-count).clamp_min(0)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(len(x), -1)


def _kept(mask: Tensor, x: Tensor) -> Tensor:
    return x.masked_fill(~mask.view(-1, *[1] * (x.ndim - 1)), 0)


def _norm_of_sum(
    lefts: Tensor, rights: Tensor, left_gram: Callable[[Tensor], Tensor], left: Tensor, right: Tensor
) -> Tensor:
    """Compute ‖Σₜ leftₜ rightₜᵀ‖ from the norms [B, G, T] of the factors and their inner products.

    = √Σₜₛ (leftₜ·leftₛ)(rightₜ·rightₛ), in which much may cancel: so in float64.
    """
    sizes = lefts * rights
    if sizes.shape[2] > 1:
        dtype = precise(sizes)
        lefts, rights, left, right = (x.to(dtype) for x in (lefts, rights, left, right))
        terms = lefts * rights
        scale = usable_scale(terms.detach().amax(2))
        left = left / usable_scale(lefts)[..., None]
        right = right * (terms / usable_scale(rights) / scale[..., None])[..., None]
        squared = (left_gram(left) * (right @ right.mT)).sum((2, 3))
        sizes = (scale * root(squared)).to(sizes.dtype)
    return norms(_rows(sizes))


def _by_group(x: Tensor) -> Tensor:
    """[B, G, T, D] -> [G, B·T, D]"""
    return x.transpose(0, 1).flatten(1, 2)


def _products(x: Tensor, y: Tensor) -> Tensor:
    """Compute inner products of vectors in [B, G, T, D] with those in [B', G, T', D]: [G, B, T, B', T']."""
    x, y = widen(x), widen(y)
    sizes = x.shape[0], x.shape[2], y.shape[0], y.shape[2]
    return (_by_group(x) @ _by_group(y).mT).view(x.shape[1], *sizes)
