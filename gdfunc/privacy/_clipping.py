"""Sums of gradients that are clipped one by one."""

from dataclasses import replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .. import _tree
from .._errors import check_scalar
from .._gradients import GradFn, LossFn
from .._numerics import like, norms, shrink, wide, widen
from .._per_sample import Dense, Leaf, Outer, PerSample, Rows
from .._reductions._reduce import reduce_per_sample
from .._tree import Tree
from ..reducers import Reducer
from ._poisson import Padded


def clipped_grad(
    loss_fn: LossFn,
    max_norm: Any,
    *,
    divisor: float | Tensor,
    chunk_size: int | str | None = "auto",
    randomness: str = "error",
    memory_limit: int | None = None,
) -> GradFn:
    """Turn a loss into the function that gives the sum of clipped gradients over a constant: no noise yet.

    g = 1/D Σᵢ gᵢ·min(1, C/‖gᵢ‖)

    Each sample adds a vector of norm at most C(1 + 8ε), ε the precision of its dtype. One whose gradient
    has a NaN or an infinity, or is too long for a norm or for C/‖gᵢ‖ in its dtype, adds exactly zero. The
    norm is taken of the same numbers that are summed up: of weights that a sample meets more than once the
    gradient is made, since what cancels in a norm computed from factors may not cancel in the sum.

    Args:
        loss_fn: as in `batch_grad`; it meets each sample as a batch of one.
        max_norm: C > 0, of all leaves together; or a tree like params of them, to clip leaf by leaf.
        divisor: D > 0, a public constant such as rate·n; never the size of the batch at hand, nor of the
            data if that is secret.
        chunk_size, randomness, memory_limit: as in `reduce_per_sample`.

    Returns:
        `(params, batch) -> (grads, loss)` with a batch as for `batch_grad`, or `Padded`; it may be empty.
        The loss is 1/D Σᵢ L(θ, {i}), as it is: not clipped, not private.

    Raises:
        TypeError, MemoryError, RuntimeError: as in `reduce_per_sample`.
        ValueError: an argument is out of range; max_norm is a tree unlike params.

    Example:
        >>> gradients = gd.privacy.clipped_grad(lambda w, x: (w * x).mean(), max_norm=2.0, divisor=2.0)
        >>> gradients(torch.tensor(1.0), torch.tensor([1.0, 30.0, torch.inf]))[0]
        tensor(1.5000)

    References:
        M. Abadi et al., "Deep learning with differential privacy", 2016.
        H. McMahan et al., "Learning differentially private recurrent language models", 2018: leaf by leaf.
    """
    check_max_norm(max_norm)
    divisor = check_scalar("divisor", divisor, "(0, inf)")
    options = {"chunk_size": chunk_size, "randomness": randomness, "memory_limit": memory_limit}
    reduce_per_sample(loss_fn, (), **options)  # type: ignore[arg-type]  # refuses bad options at once

    def gradients(params: Tree, batch: Tree) -> tuple[Tree, Tensor]:
        total, _, loss = clipped_sums(loss_fn, params, batch, max_norm, options)
        mean = _tree.map(lambda s, p: (s / like(divisor, s)).to(p.dtype), total, params)
        return mean, loss / like(divisor, loss)

    return gradients


def clipped_sums(
    loss_fn: LossFn, params: Tree, batch: Tree, max_norm: Tree, options: dict[str, Any]
) -> tuple[Tree, Tensor, Tensor]:
    """Σᵢ gᵢ·min(1, C/‖gᵢ‖); Σᵢ (1[gᵢ is not clipped] − ½), in float64; and Σᵢ L(θ, {i})."""
    samples, real = batch if isinstance(batch, Padded) else (batch, None)
    size = next((len(leaf) for leaf in _tree.leaves(samples) if leaf.ndim), None)
    if size == 0:
        nothing = _tree.map(lambda p: torch.zeros_like(p, dtype=wide(p.dtype)), params)
        leaf = _tree.leaves(params)[0]
        return nothing, leaf.new_zeros((), dtype=torch.float64), leaf.new_zeros(())
    (total, unclipped), losses = reduce_per_sample(loss_fn, _clipped(max_norm, real), **options)(
        params, samples
    )
    if real is not None:
        losses = torch.where(real, losses, torch.zeros_like(losses))
    return total, unclipped, losses.sum()


def _clipped(max_norm: Tree, real: Tensor | None) -> Reducer:
    """Reduce to the sum of clipped gradients, and the count of those left unclipped, less half of all."""
    leaf_by_leaf = not isinstance(max_norm, Real | Tensor)

    def init(params: Tree) -> tuple[list[Any], None, None]:
        if not leaf_by_leaf:
            return [max_norm] * len(_tree.leaves(params)), None, None
        return _tree.check_structure(max_norm, params, "max_norm", "params"), None, None

    def add(acc: tuple[list[Any], Any, Any], grads: PerSample) -> tuple[list[Any], Any, Any]:
        limits, total, unclipped = acc
        leaves = [_single(leaf) for leaf in grads.leaves]
        lengths = torch.stack([_leaf_norms(leaf) for leaf in leaves], -1)
        if not leaf_by_leaf:
            lengths = norms(lengths)[:, None].expand_as(lengths)
        usable = lengths.isfinite().all(1)
        if real is not None:
            here = real[grads.start : grads.start + len(grads.losses)]
            usable = usable & here
        bounds = torch.stack([like(limit, lengths) for limit in limits])
        factors = shrink(torch.where(usable[:, None], lengths, torch.zeros_like(lengths)), bounds)
        # Below the smallest normal number a factor is too coarse to keep the bound.
        factors = torch.where(factors < torch.finfo(factors.dtype).tiny, torch.zeros_like(factors), factors)
        terms = [
            leaf.keep(usable).weighted_sum(factor)
            for leaf, factor in zip(leaves, factors.unbind(1), strict=True)
        ]
        counted = (usable & (lengths <= bounds).all(1)).to(torch.float64) - 0.5
        counted = (
            counted.sum() if real is None else torch.where(here, counted, torch.zeros_like(counted)).sum()
        )
        if total is None:
            return limits, grads._tree(terms), counted
        return limits, _tree.map(torch.add, total, grads._tree(terms)), unclipped + counted

    return Reducer(init, add, lambda acc: acc[1:])


def _single(leaf: Leaf) -> Leaf:
    """Add up what a sample contributes more than once, so that nothing is left in it to cancel."""
    if isinstance(leaf, Outer) and leaf.left.shape[2] > 1:
        return Dense(leaf.dense())
    if isinstance(leaf, Rows) and leaf.index.shape[1] > 1:
        same = leaf.index[:, :, None] == leaf.index[:, None, :]
        right = widen(leaf.right)
        first = ~same.tril(-1).any(2, keepdim=True)
        # An infinite sample is dropped whole, so products with zero may spread its NaN over its own rows.
        return replace(
            leaf, right=torch.where(first, same.to(right.dtype) @ right, torch.zeros_like(right))
        )
    return leaf


def _leaf_norms(leaf: Leaf) -> Tensor:
    """Norms [B] of gradients without anything to cancel."""
    if isinstance(leaf, Outer):
        return norms((norms(leaf.left) * norms(leaf.right)).flatten(1))
    entries = leaf.right if isinstance(leaf, Rows) else leaf.dense()
    return norms(entries.reshape(len(entries), -1))


def check_max_norm(max_norm: Any) -> Tree:
    """Return C, or the tree of them."""
    pairs = _tree.named_leaves(max_norm, "max_norm")
    checked = [check_scalar(path, value, "(0, inf)") for path, value in pairs]
    if not checked:
        raise ValueError(
            f"max_norm must be a finite number in (0, inf) or a tree of them; got {max_norm!r}"
        )
    return _tree.unflatten(_tree.flatten(max_norm)[1], checked)
