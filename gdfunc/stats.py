"""What per-sample gradients tell: how noisy a step is, how large batches should be, which samples count.

`spread`, `gsnr` and `cosines` are reducers for `reduce_per_sample`. `spread` gives a few numbers, a
`Spread`, of which the other statistics are functions, entry by entry. So a run records it once, and all
of them follow for every step:

    noise = gd.reduce_per_sample(loss_fn, gd.stats.spread())
    record = {"loss": "loss", "spread": lambda params, loss: noise(params, data)[0]}
    final, trajectory = gd.train(step, params, data, index, lr, record=record)
    gd.stats.noise_scale(trajectory.spread)  # [T]

A single sample has no variance: whatever rests on one is NaN then, and a warning says so.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _tree, reducers
from ._errors import check_int, check_scalar
from ._gradients import LossFn, batch_grad
from ._per_sample import PerSample, degrees_of_freedom
from ._reductions import reduce_per_sample
from ._sampling import take
from ._scan import scan
from ._tree import Tree
from .reducers import Reducer


class Spread(NamedTuple):
    """How the gradients of B samples lie around their mean; see `spread`.

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
        length = _tree.norm(acc.mean)
        dots = acc.listed(lambda grads: grads.dots(_unit(acc.mean, length)))
        freedom = degrees_of_freedom(acc.count, 1)
        return Spread(
            size=torch.full_like(length, acc.count),
            loss=acc.losses.to(length.dtype) / acc.count,
            squared_norm=length.square(),
            variance=acc.squares.to(length.dtype) / freedom,
            along=(dots - dots.mean()).square().sum().to(length.dtype) / freedom,
        )

    return Reducer(lambda params: None, _Around.add, finish, entries=False)


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
        wide = _tree.map(lambda p: p.to(torch.promote_types(p.dtype, torch.float32)), params)
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
            unit = _unit(acc.mean, _tree.norm(acc.mean))
            return acc.listed(lambda grads: _ratio(grads.dots(unit), grads.norms()))

        return Reducer(lambda params: None, _Around.add, finish, entries=False)

    along, lengths = reducers.dots(_unit(direction, _tree.norm(direction))), reducers.norms()
    return Reducer(
        lambda params: (along.init(params), lengths.init(params)),
        lambda acc, grads: (along.add(acc[0], grads), lengths.add(acc[1], grads)),
        lambda acc: _ratio(along.finish(acc[0]), lengths.finish(acc[1])),
        entries=False,
    )


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


def two_batch(
    small: float | Tensor, big: float | Tensor, *, sizes: tuple[int, int]
) -> tuple[float | Tensor, float | Tensor]:
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
    """What a test of the batch size says.

    Attributes:
        passed: bool, whether the batch was large enough; not where that is NaN.
        batch_size: the smallest that would have been, not rounded.

    Example:
        >>> gd.stats.Verdict(torch.tensor(True), torch.tensor(12.5)).batch_size.ceil()
        tensor(13.)
    """

    passed: Tensor
    batch_size: Tensor


def norm_test(spread: Spread, theta: float | Tensor = 0.5) -> Verdict:
    """Test whether a batch's gradient has an error that is small beside it.

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


def inner_product_test(spread: Spread, theta: float | Tensor = 0.9) -> Verdict:
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


def orthogonality_test(spread: Spread, nu: float | Tensor = 5.84) -> Verdict:
    """Test whether the noise across a batch's gradient is small beside it.

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


def cabs(spread: Spread, lr: float | Tensor) -> Tensor:
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


def ranks(values: Tensor) -> Tensor:
    """Rank samples by their losses, gradient norms, or influence: 0 for the largest.

    Args:
        values: [..., n]; each row is ranked for itself. NaN comes first, equals in their order.

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
    lr: float | Tensor,
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
        TypeError, ValueError: as in `batch_grad`; the lengths of path, lr and index differ.

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
        return reduce_per_sample(loss_fn, reducers.dots(direction), chunk_size=chunk_size)(params, samples)[
            0
        ]

    return _traced(effects, path, lr, data, index)


def self_influence(
    loss_fn: LossFn,
    path: Tree,
    lr: float | Tensor,
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
    effects: Callable[[Tree, Tree], Tensor],
    path: Tree,
    lr: float | Tensor,
    data: Tree,
    index: Tensor | None,
) -> Tensor:
    """Σₜ lrₜ·effects(θₜ, data), of all samples or of those in the batches."""
    data = _tree.as_tensors(data)
    first = _tree.leaves(path)[0]
    size, steps = len(_tree.leaves(data)[0]), len(first)
    rates = torch.as_tensor(lr, device=first.device).to(torch.promote_types(first.dtype, torch.float32))
    total = torch.zeros(size, dtype=rates.dtype, device=first.device)

    def add(total: Tensor, now: tuple[Tree, Tensor, Tensor | None]) -> tuple[Tensor, None]:
        params, rate, row = now
        if row is None:
            return total + rate * effects(params, data), None
        return total.index_add(0, row, rate / len(row) * effects(params, take(data, row))), None

    return scan(add, total, (path, rates.expand(steps) if not rates.ndim else rates, index))[0]


def _verdict(spread: Spread, noise: Tensor, name: str, share: float | Tensor) -> Verdict:
    share = check_scalar(name, share, "(0, inf)")
    batch_size = noise / (share**2 * spread.squared_norm)
    return Verdict(spread.size >= batch_size, batch_size)


@dataclass(frozen=True)
class _Around:
    """What is known of gradients so far, to go on with or to finish: their mean, and Σᵢ ‖gᵢ − mean‖²."""

    count: int
    mean: Tree
    squares: Tensor
    losses: Tensor
    last: PerSample

    @staticmethod
    def add(acc: "_Around | None", grads: PerSample) -> "_Around":
        more = len(grads.losses)
        mean = grads.mean()
        squares = _total(grads.sum_of_squares(mean))
        losses = grads.losses.sum()
        if acc is None:
            return _Around(more, mean, squares, losses, grads)
        count = acc.count + more
        shift = _tree.map(torch.sub, mean, acc.mean)
        squares = acc.squares + squares + acc.count * more / count * _tree.dot(shift, shift)
        mean = _tree.map(lambda old, d: old + more / count * d, acc.mean, shift)
        return _Around(count, mean, squares, acc.losses + losses, grads)

    def listed(self, quantity: Callable[[PerSample], Tensor]) -> Tensor:
        """What there is one of for each sample, now that the mean is known."""
        chunks: Sequence[PerSample] = (*(again() for again in self.last.earlier), self.last)
        return torch.cat([quantity(chunk) for chunk in chunks])


def _total(tree: Tree) -> Tensor:
    """The sum of all entries, in the widest dtype of the leaves."""
    return torch.stack([leaf.sum() for leaf in _tree.leaves(tree)]).sum()


def _unit(tree: Tree, length: Tensor) -> Tree:
    """A tree over its norm; zeros stay zeros."""
    return _tree.map(
        lambda leaf: _ratio(leaf, length.to(torch.promote_types(leaf.dtype, torch.float32))), tree
    )


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a/b with b >= 0; zero where b is."""
    none = b == 0
    return torch.where(
        none, torch.zeros_like(a / torch.ones_like(b)), a / torch.where(none, torch.ones_like(b), b)
    )
