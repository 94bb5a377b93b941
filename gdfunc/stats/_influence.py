"""Which samples drive a run."""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import _tree, reducers
from .._data import as_data
from .._gradients import LossFn, batch_grad
from .._numerics import Scalar, wide
from .._reductions._reduce import reduce_per_sample
from .._sampling import take
from .._scan import scan
from .._tree import Tree


def ranks(values: Tensor) -> Tensor:
    """Rank samples by their losses, gradient norms, or influence: 0 for the largest.

    Args:
        values: [..., n]; each row is ranked separately. NaN comes first. Equal values keep their order.

    Returns:
        int64 [..., n].

    Example:
        >>> gd.stats.ranks(torch.tensor([0.5, 3.0, 1.0]))
        tensor([2, 0, 1])
    """
    return values.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)


def influence(
    loss_fn: LossFn,
    path: Tree,
    lr: Scalar,
    data: Tree,
    target: Tree,
    *,
    index: Tensor | None = None,
    chunk_size: int | str | None = "auto",
) -> Tensor:
    """Trace how much each sample did along a recorded path for the loss on a target.

    Iᵢ = Σₜ lrₜ ⟨∇L(θₜ, {i}), ∇L(θₜ, target)⟩

    To first order that is how far steps on sample i alone would have lowered L(θ, target): negative for
    samples that harm it. With the plan of a run only the steps that met the sample count, with its share in
    the batch, lrₜ/B; then Σᵢ Iᵢ is, to first order in lr, by how much plain descent lowered L(θ, target).

    Args:
        loss_fn: as in `batch_grad`.
        path: parameters [T, ...] at some or all steps, as `record="params"` keeps them.
        lr: the learning rate at these, a number, 0-d, or [T].
        data: the samples to trace, tensors or arrays [n, ...].
        target: what the effect is measured on: one sample or more, [m, ...]; the loss is their mean.
        index: the plan int64 [T, B] of the steps on the path; None: every sample counts everywhere. A
            Poisson plan is none: private steps clip, and divide by a constant.
        chunk_size: as in `reduce_per_sample`.

    Returns:
        [n].

    Raises:
        TypeError, ValueError: as in `batch_grad`, or the lengths of path, lr and index differ.

    Example:
        >>> loss_fn, path = lambda w, x: (w * x).mean(), torch.tensor([1.0, 0.5])
        >>> gd.stats.influence(loss_fn, path, 0.1, torch.tensor([1.0, -3.0]), torch.ones(1))
        tensor([ 0.2000, -0.6000])

    References:
        G. Pruthi, F. Liu, S. Kale, M. Sundararajan, "Estimating training data influence by tracing gradient
        descent", 2020.
    """
    of_target = batch_grad(loss_fn)

    def effects(params: Tree, samples: Tree) -> Tensor:
        direction, _ = of_target(params, target)
        along = reduce_per_sample(loss_fn, reducers.dots(direction), chunk_size=chunk_size)
        return along(params, samples)[0]

    return _traced(effects, path, lr, data, index)


def self_influence(
    loss_fn: LossFn,
    path: Tree,
    lr: Scalar,
    data: Tree,
    *,
    index: Tensor | None = None,
    chunk_size: int | str | None = "auto",
) -> Tensor:
    """Trace how much each sample did along a recorded path for the loss on itself.

    Iᵢ = Σₜ lrₜ ‖∇L(θₜ, {i})‖²

    It is largest for samples that have to be learned by heart: outliers and wrong labels.

    Args:
        loss_fn, path, lr, data, index, chunk_size: as in `influence`.

    Returns:
        [n].

    Raises:
        TypeError, ValueError: as in `influence`.

    Example:
        >>> path = torch.tensor([1.0, 0.5])
        >>> gd.stats.self_influence(lambda w, x: (w * x).mean(), path, 0.1, torch.tensor([1.0, -3.0]))
        tensor([0.2000, 1.8000])

    References:
        G. Pruthi, F. Liu, S. Kale, M. Sundararajan, "Estimating training data influence by tracing gradient
        descent", 2020.
    """
    norms = reduce_per_sample(loss_fn, reducers.norms(), chunk_size=chunk_size)
    return _traced(lambda params, samples: norms(params, samples)[0].square(), path, lr, data, index)


def _traced(
    effects: Callable[[Tree, Tree], Tensor], path: Tree, lr: Scalar, data: Tree, index: Tensor | None
) -> Tensor:
    """Compute Σₜ lrₜ·effects(θₜ, data), of all samples or of those in the batches."""
    data = as_data(data, "data")
    first = _tree.leaves(path)[0]
    size, steps = len(_tree.leaves(data)[0]), len(first)
    rates = torch.as_tensor(lr, dtype=wide(first.dtype), device=first.device)
    total = torch.zeros(size, dtype=rates.dtype, device=first.device)

    def add(total: Tensor, now: tuple[Tree, Tensor, Tensor | None]) -> tuple[Tensor, None]:
        params, rate, row = now
        if row is None:
            return total + rate * effects(params, data), None
        return total.index_add(0, row, rate / len(row) * effects(params, take(data, row))), None

    return scan(add, total, (path, rates.expand(steps) if not rates.ndim else rates, index))[0]
