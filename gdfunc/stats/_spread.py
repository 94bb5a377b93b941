"""The spread of the gradients of a batch around their mean, and the batch sizes that follow from it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _tree, reducers
from .._errors import check_int, check_scalar
from .._numerics import Scalar, safe_ratio, wide, widen
from .._per_sample import Moments, PerSample, degrees_of_freedom, together
from .._tree import Tree
from ..reducers import Reducer


class Spread(NamedTuple):
    """The spread of B samples' gradients around their mean, as `spread` returns it.

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
        A reducer to a tree like params, in at least float32. r is infinite if all gradients are equal, and
        NaN if all are zero. For a single sample every r is NaN, with a UserWarning.

    Example:
        >>> reduced = gd.reduce_per_sample(lambda w, x: (w * x).mean(), gd.stats.gsnr())
        >>> reduced(torch.tensor(1.0), torch.tensor([1.0, 3.0]))[0]
        tensor(2.)

    References:
        J. Liu et al., "Understanding why neural networks generalize well through GSNR of parameters", 2020.
    """

    def ratio(mean: Tree, variance: Tree) -> Tree:
        return _tree.map(lambda m, v: m.square() / v, mean, variance)

    both = together(reducers.mean(), reducers.variance(), ratio)
    return replace(both, init=lambda params: both.init(_tree.map(widen, params)))


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

    along = reducers.dots(_unit(direction, _tree.norm(direction)))
    return together(along, reducers.norms(), safe_ratio)


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
    """Divide a tree by its norm. Zeros stay zeros."""
    return _tree.map(lambda leaf: safe_ratio(leaf, length.to(wide(leaf.dtype))), tree)


def noise_scale(spread: Spread, *, unbiased: bool = False) -> Tensor:
    """Compute the simple noise scale: the batch size at which noise is as large as the gradient.

    B_simple = tr Σ / ‖G‖²

    Much smaller batches waste steps, much larger ones waste samples.

    Args:
        spread: of a batch, or [T] of them.
        unbiased: take ‖ḡ‖² − tr Σ̂/B for ‖G‖², which ‖ḡ‖² overestimates by the noise of a batch that is not
            all of the data. The estimate is negative where the noise hides the gradient: then average both
            over several batches before the division.

    Returns:
        0-d, or [T], in samples.

    Example:
        >>> reduced = gd.reduce_per_sample(lambda w, x: (w * x).mean(), gd.stats.spread())
        >>> spread, _ = reduced(torch.tensor(1.0), torch.tensor([1.0, 3.0]))
        >>> gd.stats.noise_scale(spread), gd.stats.noise_scale(spread, unbiased=True)
        (tensor(0.5000), tensor(0.6667))

    References:
        S. McCandlish, J. Kaplan, D. Amodei, OpenAI Dota team, "An empirical model of large-batch training",
        2018.
    """
    signal = spread.squared_norm
    if unbiased:
        signal = signal - spread.variance / spread.size
    return spread.variance / signal


def two_batch(small: Scalar, big: Scalar, *, sizes: tuple[int, int]) -> tuple[Scalar, Scalar]:
    """Estimate signal and noise from the gradients of two batches alone, without bias.

    ‖G‖² ≈ (B‖g_B‖² − b‖g_b‖²)/(B − b),  tr Σ ≈ (‖g_b‖² − ‖g_B‖²)/(1/b − 1/B)

    For where there are no per-sample gradients, only those of workers and their mean. One pair is very
    noisy, and the ratio of the two is biased: average each over many steps, then divide, and
    tr Σ / ‖G‖² is the noise scale.

    Args:
        small: ‖g_b‖², the squared norm of the smaller batch's gradient, of any shape.
        big: ‖g_B‖² of the larger batch's.
        sizes: (b, B), b < B.

    Returns:
        ‖G‖² and tr Σ.

    Raises:
        ValueError: the sizes are no ints with 1 <= b < B.

    Example:
        >>> gd.stats.two_batch(torch.tensor(5.0), torch.tensor(4.0), sizes=(1, 2))
        (tensor(3.), tensor(2.))

    References:
        S. McCandlish, J. Kaplan, D. Amodei, OpenAI Dota team, "An empirical model of large-batch training",
        2018, appendix A.1.
    """
    few = check_int("sizes[0]", sizes[0], 1)
    many = check_int("sizes[1]", sizes[1], few + 1)
    return (many * big - few * small) / (many - few), (small - big) / (1 / few - 1 / many)


class Verdict(NamedTuple):
    """The result of a test of the batch size.

    Attributes:
        passed: bool, whether the batch was large enough; False where the batch size is NaN.
        batch_size: the smallest that would have been, not rounded.

    Example:
        >>> gd.stats.Verdict(torch.tensor(True), torch.tensor(12.5)).batch_size.ceil()
        tensor(13.)
    """

    passed: Tensor
    batch_size: Tensor


def norm_test(spread: Spread, theta: Scalar = 0.5) -> Verdict:
    """Test whether a batch's gradient has an error that is small compared with it.

    tr Σ̂ / B <= θ²‖ḡ‖²

    Args:
        spread: of a batch, or [T] of them.
        theta: θ > 0, the error allowed as a share of the gradient.

    Returns:
        The `Verdict`, with the batch size tr Σ̂ / (θ²‖ḡ‖²).

    Raises:
        ValueError: theta is out of range.

    Example:
        >>> reduced = gd.reduce_per_sample(lambda w, x: (w * x).mean(), gd.stats.spread())
        >>> spread, _ = reduced(torch.tensor(1.0), torch.tensor([1.0, 3.0]))
        >>> gd.stats.norm_test(spread)
        Verdict(passed=tensor(True), batch_size=tensor(2.))

    References:
        R. Byrd, G. Chin, J. Nocedal, Y. Wu, "Sample size selection in optimization methods for machine
        learning", 2012.
    """
    return _verdict(spread, spread.variance, "theta", theta)


def inner_product_test(spread: Spread, theta: Scalar = 0.9) -> Verdict:
    """Test whether a batch's gradient is a descent direction with a good chance.

    1/(B−1) Σᵢ (⟨gᵢ, ḡ⟩ − ‖ḡ‖²)² / B <= θ²‖ḡ‖⁴

    It is the norm test for the noise along ḡ alone; `orthogonality_test` bounds the rest.

    Args:
        spread: of a batch, or [T] of them.
        theta: θ > 0.

    Returns:
        The `Verdict`.

    Raises:
        ValueError: theta is out of range.

    Example:
        >>> reduced = gd.reduce_per_sample(lambda w, x: (w @ x[0]), gd.stats.spread())
        >>> spread, _ = reduced(torch.ones(2), torch.tensor([[2.0, 1.0], [2.0, -1.0]]))
        >>> gd.stats.inner_product_test(spread)
        Verdict(passed=tensor(True), batch_size=tensor(0.))

    References:
        R. Bollapragada, R. Byrd, J. Nocedal, "Adaptive sampling strategies for stochastic optimization",
        2018.
    """
    return _verdict(spread, spread.along, "theta", theta)


def orthogonality_test(spread: Spread, nu: Scalar = 5.84) -> Verdict:
    """Test whether the noise across a batch's gradient is small compared with it.

    1/(B−1) Σᵢ ‖gᵢ − (⟨gᵢ, ḡ⟩/‖ḡ‖²) ḡ‖² / B <= ν²‖ḡ‖²

    Args:
        spread: of a batch, or [T] of them.
        nu: ν > 0; 5.84 is the tangent of 80°.

    Returns:
        The `Verdict`.

    Raises:
        ValueError: nu is out of range.

    Example:
        >>> reduced = gd.reduce_per_sample(lambda w, x: (w @ x[0]), gd.stats.spread())
        >>> spread, _ = reduced(torch.ones(2), torch.tensor([[2.0, 1.0], [2.0, -1.0]]))
        >>> gd.stats.orthogonality_test(spread, nu=0.5)
        Verdict(passed=tensor(True), batch_size=tensor(2.))

    References:
        R. Bollapragada, R. Byrd, J. Nocedal, "Adaptive sampling strategies for stochastic optimization",
        2018.
    """
    return _verdict(spread, (spread.variance - spread.along).clamp_min(0), "nu", nu)


def cabs(spread: Spread, lr: Scalar) -> Tensor:
    """Couple the batch size to the learning rate.

    B = lr·tr Σ̂ / L

    Args:
        spread: of a batch, or [T] of them. Its loss counts from its infimum: one that cannot reach zero
            makes the batches too small.
        lr: a number, or a tensor 0-d or [T].

    Returns:
        0-d, or [T], in samples, not rounded.

    Example:
        >>> reduced = gd.reduce_per_sample(lambda w, x: (w * x).mean(), gd.stats.spread())
        >>> spread, _ = reduced(torch.tensor(1.0), torch.tensor([1.0, 3.0]))
        >>> gd.stats.cabs(spread, 2.0)
        tensor(2.)

    References:
        L. Balles, J. Romero, P. Hennig, "Coupling adaptive batch sizes with learning rates", 2017.
    """
    return lr * spread.variance / spread.loss


def diversity(spread: Spread) -> Tensor:
    """Compute the gradient diversity: how much gradients differ, or cancel.

    Δ = Σᵢ ‖gᵢ‖² / ‖Σᵢ gᵢ‖²

    It is 1/B for equal gradients, 1 for orthogonal ones. Over all n samples n·Δ bounds the batch size up to
    which B steps of one sample and one step of B (with B times the lr) are about equally good.

    Args:
        spread: of a batch, or [T] of them.

    Returns:
        0-d, or [T].

    Example:
        >>> reduced = gd.reduce_per_sample(lambda w, x: (w * x).mean(), gd.stats.spread())
        >>> spread, _ = reduced(torch.tensor(1.0), torch.tensor([1.0, 3.0]))
        >>> gd.stats.diversity(spread)  # (1 + 9) / 4²
        tensor(0.6250)

    References:
        D. Yin et al., "Gradient diversity: a key ingredient for scalable distributed learning", 2018.
    """
    mean_square = spread.squared_norm + spread.variance * (spread.size - 1) / spread.size
    return mean_square / (spread.size * spread.squared_norm)


def _verdict(spread: Spread, noise: Tensor, name: str, share: Scalar) -> Verdict:
    share = check_scalar(name, share, "(0, inf)")
    batch_size = noise / (share**2 * spread.squared_norm)
    return Verdict(spread.size >= batch_size, batch_size)
