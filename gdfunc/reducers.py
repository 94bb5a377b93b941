"""Reductions of per-sample gradients as they stream by, without the [B, P] numbers that hold them all.

`reduce_per_sample(loss_fn, reducers)` folds chunks of gradients into what these ask for: `mean`,
`weighted_sum`, `clipped_sum`, `second_moment`, `variance`, `norms`, `leaf_norms`, `dots` (with a
direction), `gram` and `histogram`. A `Reducer(init, add, finish)` of your own gets one `PerSample`
after the other.

Weights of linear maps, convolutions and embeddings get no gradients of their own where norms and sums
follow from the activations and errors, if those are smaller. `explain` tells which. A request that
would exceed `memory_limit` raises before allocating, and the message suggests a `chunk_size` that fits.

Example:
    >>> problem = gd.problems.stock_regression()
    >>> reducers = {"variance": gd.reducers.variance(), "clipped": gd.reducers.clipped_sum(1.0)}
    >>> reduced = gd.reduce_per_sample(problem.loss_fn, reducers)
    >>> results, losses = reduced(problem.params, problem.data)
    >>> results["variance"]["w"].shape, losses.shape
    (torch.Size([5]), torch.Size([389]))
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _tree
from ._errors import check_choice, check_int, check_scalar
from ._numerics import Scalar, like, shrink
from ._per_sample import Moments, degrees_of_freedom
from ._per_sample import PerSample as PerSample
from ._per_sample import Reducer as Reducer
from ._reductions._reduce import explain as explain
from ._tree import Tree


def mean() -> Reducer:
    """Average the gradients.

    1/B Σᵢ gᵢ

    Returns:
        A reducer to a tree like params.

    Example:
        >>> reduced = gd.reduce_per_sample(lambda w, x: (w * x).mean(), gd.reducers.mean())
        >>> reduced(torch.tensor(1.0), torch.tensor([1.0, 3.0]))
        (tensor(2.), tensor([1., 3.]))
    """
    return _summed(PerSample.weighted_sum, _Sum.average)


def weighted_sum(weights: Tensor) -> Reducer:
    """Add up the gradients with a weight for each sample.

    Σᵢ wᵢ gᵢ

    Args:
        weights: [B].

    Returns:
        A reducer to a tree like params.

    Raises:
        ValueError: weights is not of one axis, or (in the reduction) not of one entry a sample.

    Example:
        >>> third = gd.reducers.weighted_sum(torch.tensor([0.0, 2.0]))
        >>> reduced = gd.reduce_per_sample(lambda w, x: (w * x).mean(), third)
        >>> reduced(torch.tensor(1.0), torch.tensor([1.0, 3.0]))
        (tensor(6.), tensor([1., 3.]))
    """
    if not isinstance(weights, Tensor) or weights.ndim != 1:
        got = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(f"weights must be a tensor [B], one for each sample; got {got}")

    def terms(grads: PerSample) -> Tree:
        end = grads.start + len(grads.losses)
        check(end <= len(weights), f"at least {end}")
        return grads.weighted_sum(weights[grads.start : end])

    def finish(acc: _Sum) -> Tree:
        check(acc.count == len(weights), str(acc.count))
        return acc.rounded()

    def check(fits: bool, samples: str) -> None:
        if not fits:
            raise ValueError(f"weights has {len(weights)} entries, but the batch has {samples} samples")

    return _summed(terms, finish)


def clipped_sum(max_norm: Scalar, *, nonfinite: str = "propagate") -> Reducer:
    """Add up the gradients, each shrunk to a norm of at most `max_norm`.

    Σᵢ gᵢ·min(1, C/‖gᵢ‖),  ‖gᵢ‖ over all leaves together

    The norms may come from the factors of a gradient: equal within rounding of its terms, not of itself
    where those cancel. A bound that must hold, as for privacy, is that of `privacy.clipped_grad`.

    Args:
        max_norm: C > 0; the value of a tensor is not read.
        nonfinite: what a sample adds whose gradient has a NaN, an infinity, or a norm beyond its dtype:
            `"propagate"` lets it be seen; `"zero"`: nothing.

    Returns:
        A reducer to a tree like params. Divided by B it is the clipped mean.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> clipped = gd.reduce_per_sample(lambda w, x: (w * x).mean(), gd.reducers.clipped_sum(2.0))
        >>> clipped(torch.tensor(1.0), torch.tensor([1.0, 30.0]))
        (tensor(3.), tensor([ 1., 30.]))

    References:
        M. Abadi et al., "Deep learning with differential privacy", 2016.
    """
    max_norm = check_scalar("max_norm", max_norm, "(0, inf)")
    check_choice("nonfinite", nonfinite, ("propagate", "zero"))

    def terms(grads: PerSample) -> Tree:
        norms = grads.norms()
        if nonfinite == "zero":
            finite = norms.isfinite()
            grads, norms = grads.keep(finite), torch.where(finite, norms, torch.zeros_like(norms))
        return grads.weighted_sum(shrink(norms, like(max_norm, norms)))

    return _summed(terms, _Sum.rounded)


def second_moment() -> Reducer:
    """Average the squares of the gradients' entries.

    1/B Σᵢ gᵢ²

    Returns:
        A reducer to a tree like params.

    Example:
        >>> squared = gd.reduce_per_sample(lambda w, x: (w * x).mean(), gd.reducers.second_moment())
        >>> squared(torch.tensor(1.0), torch.tensor([1.0, 3.0]))
        (tensor(5.), tensor([1., 3.]))
    """
    return _summed(PerSample.sum_of_squares, _Sum.average)


def variance(*, correction: int = 1) -> Reducer:
    """Estimate the variance of the gradients, entry by entry.

    1/(B − c) Σᵢ (gᵢ − ḡ)²

    Args:
        correction: c; 1 for the unbiased estimate.

    Returns:
        A reducer to a tree like params. Of c samples or fewer it is NaN, with a UserWarning.

    Raises:
        ValueError: correction is negative or no int.

    Example:
        >>> spread = gd.reduce_per_sample(lambda w, x: (w * x).mean(), gd.reducers.variance())
        >>> spread(torch.tensor(1.0), torch.tensor([1.0, 3.0]))
        (tensor(2.), tensor([1., 3.]))

    References:
        T. Chan, G. Golub, R. LeVeque, "Algorithms for computing the sample variance", 1983.
    """
    check_int("correction", correction, 0)

    def finish(acc: Moments) -> Tree:
        freedom = degrees_of_freedom(acc.count, correction)
        return _tree.map(lambda s, p: (s / freedom).to(p.dtype), acc.squares, acc.params)

    return Reducer(Moments, Moments.plus, finish, entries=False)


def norms() -> Reducer:
    """List the norms of the gradients.

    ‖gᵢ‖ over all leaves together

    Returns:
        A reducer to [B].

    Example:
        >>> sizes = gd.reduce_per_sample(lambda w, x: (w * x).mean(), gd.reducers.norms())
        >>> sizes(torch.tensor(1.0), torch.tensor([1.0, -3.0]))
        (tensor([1., 3.]), tensor([ 1., -3.]))
    """
    return _listed(PerSample.norms)


def leaf_norms() -> Reducer:
    """List the norms of the gradients, leaf by leaf.

    ‖gᵢ‖ for each leaf alone

    Returns:
        A reducer to a tree like params of [B].

    Example:
        >>> sizes = gd.reduce_per_sample(lambda p, x: (p["w"] * x).mean(), gd.reducers.leaf_norms())
        >>> sizes({"w": torch.tensor(1.0)}, torch.tensor([1.0, -3.0]))
        ({'w': tensor([1., 3.])}, tensor([ 1., -3.]))
    """
    return _listed(PerSample.leaf_norms)


def dots(direction: Tree) -> Reducer:
    """List the inner products of the gradients with a direction.

    ⟨gᵢ, d⟩

    Args:
        direction: d, a tree like params.

    Returns:
        A reducer to [B].

    Raises:
        ValueError: (in the reduction) the direction is not like params.

    Example:
        >>> along = gd.reduce_per_sample(lambda w, x: (w * x).mean(), gd.reducers.dots(torch.tensor(2.0)))
        >>> along(torch.tensor(1.0), torch.tensor([1.0, 3.0]))
        (tensor([2., 6.]), tensor([1., 3.]))
    """

    def init(params: Tree) -> tuple[Tree, ...]:
        matched = _tree.check_like(direction, params, "direction", "params")
        return (_tree.unflatten(_tree.flatten(params)[1], matched),)

    def add(acc: tuple[Tree, ...], grads: PerSample) -> tuple[Tree, ...]:
        return (*acc, grads.dots(acc[0]))

    return Reducer(init, add, lambda acc: torch.cat(acc[1:]), entries=False)


def gram() -> Reducer:
    """Compute the inner products of all pairs of gradients.

    Kᵢⱼ = ⟨gᵢ, gⱼ⟩

    In several chunks each pair of chunks is computed again: k chunks cost about k/2 times one pass.

    Returns:
        A reducer to [B, B].

    Example:
        >>> pairs = gd.reduce_per_sample(lambda w, x: (w * x).mean(), gd.reducers.gram())
        >>> pairs(torch.tensor(1.0), torch.tensor([1.0, 3.0]))
        (tensor([[1., 3.],
                [3., 9.]]), tensor([1., 3.]))
    """

    def add(rows: tuple[Tensor, ...], grads: PerSample) -> tuple[Tensor, ...]:
        blocks = [grads.gram(again()) for again in grads.earlier]
        return (*rows, torch.cat([*blocks, grads.gram(grads)], 1))

    def finish(rows: tuple[Tensor, ...]) -> Tensor:
        size = rows[-1].shape[1]
        lower = torch.cat([torch.nn.functional.pad(row, (0, size - row.shape[1])) for row in rows])
        return lower.tril() + lower.tril(-1).mT

    return Reducer(lambda params: (), add, finish, entries=False)


def histogram(low: float, high: float, bins: int) -> Reducer:
    """Count the gradients' entries of all samples in equal bins, leaf by leaf.

    Args:
        low, high: the ends of the first and the last bin. Entries beyond count in these two bins, and NaN
            counts nowhere.
        bins: how many.

    Returns:
        A reducer to a tree like params of int64 [bins].

    Raises:
        ValueError: low is not below high, or bins not a positive int.

    Example:
        >>> counts = gd.reduce_per_sample(lambda w, x: (w * x).mean(), gd.reducers.histogram(0.0, 4.0, 2))
        >>> counts(torch.tensor(1.0), torch.tensor([1.0, 1.5, 3.0]))
        (tensor([2, 1]), tensor([1.0000, 1.5000, 3.0000]))

    References:
        F. Schneider, F. Dangel, P. Hennig, "Cockpit: a practical debugging tool for training deep neural
        networks", 2021.
    """
    low, high = check_scalar("low", low, "(-inf, inf)"), check_scalar("high", high, "(-inf, inf)")
    check_int("bins", bins, 1)
    if not isinstance(low, Tensor) and not isinstance(high, Tensor) and not low < high:
        raise ValueError(f"low must be below high; got {low} and {high}")

    def counts(entries: Tensor) -> Tensor:
        entries = entries.flatten()
        known = ~entries.isnan()
        place = (torch.where(known, entries, torch.zeros_like(entries)) - low) / (high - low) * bins
        bin_of = place.floor().clamp(0, bins - 1).long()
        return known.new_zeros(bins, dtype=torch.int64).scatter_add(0, bin_of, known.long())

    def init(params: Tree) -> Tree:
        return _tree.map(lambda p: torch.zeros(bins, dtype=torch.int64, device=p.device), params)

    def add(acc: Tree, grads: PerSample) -> Tree:
        return _tree.map(lambda total, entries: total + counts(entries), acc, grads.dense())

    return Reducer(init, add, lambda acc: acc)


@dataclass(frozen=True)
class _Sum:
    """A sum of trees like params, in at least float32, and over how many samples."""

    params: Tree
    terms: Tree = None
    count: int = 0

    def plus(self, grads: PerSample, terms: Tree) -> "_Sum":
        if self.terms is not None:
            terms = _tree.map(torch.add, self.terms, terms)
        return _Sum(self.params, terms, self.count + len(grads.losses))

    def rounded(self) -> Tree:
        return _tree.map(lambda total, p: total.to(p.dtype), self.terms, self.params)

    def average(self) -> Tree:
        return _tree.map(lambda total, p: (total / self.count).to(p.dtype), self.terms, self.params)


def _summed(terms: Callable[[PerSample], Tree], finish: Callable[[_Sum], Tree]) -> Reducer:
    """Reduce to a sum over the chunks."""
    return Reducer(_Sum, lambda acc, grads: acc.plus(grads, terms(grads)), finish, entries=False)


def _listed(quantity: Callable[[PerSample], Tree]) -> Reducer:
    """Reduce to a list of a quantity of each sample."""
    return Reducer(lambda params: (), lambda acc, grads: (*acc, quantity(grads)), _tree.cat, entries=False)
