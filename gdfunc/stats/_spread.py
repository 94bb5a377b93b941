"""Spread of the gradients of a batch around their mean."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _tree, reducers
from .._numerics import safe_ratio, wide, widen
from .._per_sample import Moments, PerSample, degrees_of_freedom
from .._tree import Tree
from ..reducers import Reducer


class Spread(NamedTuple):
    """The spread of B samples' gradients around their mean; see `spread`.

    All are tensors 0-d, or [T] when recorded along a run, in at least float32.

    Attributes:
        size: B.
        loss: the mean loss.
        squared_norm: ‖ḡ‖², of the mean gradient.
        variance: tr Σ̂ = 1/(B−1) Σᵢ ‖gᵢ − ḡ‖², over all leaves together.
        along: how much of it lies along ḡ: 1/(B−1) Σᵢ ⟨gᵢ − ḡ, ḡ/‖ḡ‖⟩².

    Example:
        >>> reduced = gd.reduce_per_sample(lambda w, x: (w @ x[0]), gd.stats.spread())
        >>> spread, losses = reduced(torch.ones(2), torch.tensor([[2.0, 1.0], [2.0, -1.0]]))
        >>> spread.squared_norm, spread.variance, spread.along
        (tensor(4.), tensor(2.), tensor(0.))
    """

    size: Tensor
    loss: Tensor
    squared_norm: Tensor
    variance: Tensor
    along: Tensor


def spread() -> Reducer:
    """Reduce gradients to how they lie around their mean.

    ḡ = 1/B Σᵢ gᵢ,  tr Σ̂ = 1/(B−1) Σᵢ ‖gᵢ − ḡ‖²,  of which along ḡ: 1/(B−1) Σᵢ ⟨gᵢ − ḡ, ḡ/‖ḡ‖⟩²

    The last needs ḡ first: all chunks but the last are computed a second time.

    Returns:
        A reducer to a `Spread`. Of a single sample the variances are NaN, with a UserWarning.

    Example:
        >>> reduced = gd.reduce_per_sample(lambda w, x: (w * x).mean(), gd.stats.spread())
        >>> reduced(torch.tensor(1.0), torch.tensor([1.0, 3.0]))[0].variance
        tensor(2.)

    References:
        T. Chan, G. Golub, R. LeVeque, "Algorithms for computing the sample variance", 1983.
    """

    def finish(acc: _Around) -> Spread:
        mean, count = acc.moments.mean, acc.moments.count
        length = _tree.norm(mean)
        dots = acc.listed(lambda grads: grads.dots(_unit(mean, length)))
        squares = torch.stack([leaf.sum() for leaf in _tree.leaves(acc.moments.squares)]).sum()
        freedom = degrees_of_freedom(count, 1)
        return Spread(
            size=torch.full_like(length, count),
            loss=acc.losses.to(length.dtype) / count,
            squared_norm=length.square(),
            variance=squares.to(length.dtype) / freedom,
            along=(dots - dots.mean()).square().sum().to(length.dtype) / freedom,
        )

    return Reducer(_Around.init, _Around.add, finish, entries=False)


def gsnr() -> Reducer:
    """Compare each parameter's mean gradient with its noise: the gradient signal-to-noise ratio.

    rⱼ = ḡⱼ² / Var(gⱼ),  Var with the divisor B − 1

    Returns:
        A reducer to a tree like params, in at least float32. Where all gradients are equal r is infinite,
        where all are zero NaN; of a single sample all is NaN, with a UserWarning.

    Example:
        >>> reduced = gd.reduce_per_sample(lambda w, x: (w * x).mean(), gd.stats.gsnr())
        >>> reduced(torch.tensor(1.0), torch.tensor([1.0, 3.0]))[0]
        tensor(2.)

    References:
        J. Liu et al., "Understanding why neural networks generalize well through GSNR of parameters", 2020.
    """
    mean, variance = reducers.mean(), reducers.variance()

    def init(params: Tree) -> tuple[Any, Any]:
        wide = _tree.map(widen, params)
        return mean.init(wide), variance.init(wide)

    def add(acc: tuple[Any, Any], grads: PerSample) -> tuple[Any, Any]:
        return mean.add(acc[0], grads), variance.add(acc[1], grads)

    def finish(acc: tuple[Any, Any]) -> Tree:
        return _tree.map(lambda m, v: m.square() / v, mean.finish(acc[0]), variance.finish(acc[1]))

    return Reducer(init, add, finish, entries=False)


def cosines(direction: Tree = None) -> Reducer:
    """List the cosines of the angles between the gradients and a direction.

    cᵢ = ⟨gᵢ, d⟩ / (‖gᵢ‖ ‖d‖)

    Args:
        direction: d, a tree like params; None: the mean gradient, for which all chunks but the last are
            computed a second time.

    Returns:
        A reducer to [B]; a gradient of zero has cosine 0.

    Raises:
        ValueError: (in the reduction) the direction is not like params.

    Example:
        >>> reduced = gd.reduce_per_sample(lambda w, x: (w @ x[0]), gd.stats.cosines())
        >>> reduced(torch.ones(2), torch.tensor([[2.0, 0.0], [0.0, 2.0]]))[0]
        tensor([0.7071, 0.7071])
    """
    if direction is None:

        def finish(acc: _Around) -> Tensor:
            unit = _unit(acc.moments.mean, _tree.norm(acc.moments.mean))
            return acc.listed(lambda grads: safe_ratio(grads.dots(unit), grads.norms()))

        return Reducer(_Around.init, _Around.add, finish, entries=False)

    along, lengths = reducers.dots(_unit(direction, _tree.norm(direction))), reducers.norms()
    return Reducer(
        lambda params: (along.init(params), lengths.init(params)),
        lambda acc, grads: (along.add(acc[0], grads), lengths.add(acc[1], grads)),
        lambda acc: safe_ratio(along.finish(acc[0]), lengths.finish(acc[1])),
        entries=False,
    )


@dataclass(frozen=True)
class _Around:
    """The moments of the gradients so far, the sum of the losses, and the last chunk."""

    moments: Moments
    losses: Any = 0.0
    last: PerSample | None = None

    @staticmethod
    def init(params: Tree) -> "_Around":
        return _Around(Moments(params))

    def add(self, grads: PerSample) -> "_Around":
        return _Around(self.moments.plus(grads), self.losses + grads.losses.sum(), grads)

    def listed(self, quantity: Callable[[PerSample], Tensor]) -> Tensor:
        """List a quantity of each sample, now that the mean is known."""
        chunks: Any = (*(again() for again in self.last.earlier), self.last) if self.last else ()
        return torch.cat([quantity(chunk) for chunk in chunks])


def _unit(tree: Tree, length: Tensor) -> Tree:
    """Divide a tree by its norm; zeros stay zeros."""
    return _tree.map(lambda leaf: safe_ratio(leaf, length.to(wide(leaf.dtype))), tree)
