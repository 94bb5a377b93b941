"""Differentially private descent: clip every sample's gradient, add noise to the sum, sample by Poisson.

What a step reveals of one sample is bounded by the clipping and hidden by the noise. How much that adds up
to over a run, an accountant computes, of Opacus or of Google's dp-accounting, from what `history` gives; it
holds for Poisson sampling alone, so there is no history of shuffled batches:

    plan = gd.privacy.poisson_batches(key, n, rate, steps)
    step = gd.privacy.make_private_step(
        loss_fn, gd.adam(), key=noise_key, max_norm=1.0, noise_multiplier=1.1, divisor=rate * n
    )
    final, trajectory = gd.train(step, step.init(params), gd.privacy.pad(data, plan), plan.index, lr)

    accountant = opacus.accountants.RDPAccountant()
    accountant.history = gd.privacy.history(plan, noise_multiplier=1.1)
    epsilon = accountant.get_epsilon(delta=1e-5)

Two data sets count as neighbours if one has one sample more. The number of samples, the rate and the
divisor are taken as public. Losses and whatever else a run records of its batches are not private: do not
publish them. Noise and batches come from `gdfunc.random`, which is not a cryptographic generator, and sums
are floating-point: this is for research on private learning, not for releasing models trained on secrets.

References:
    M. Abadi et al., "Deep learning with differential privacy", 2016.
    I. Mironov, "On significance of the least significant bits for differential privacy", 2012.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _tree, random
from ._errors import check_int, check_scalar
from ._gradients import GradFn, LossFn
from ._numerics import like, norms, wide, widen
from ._per_sample import Dense, Leaf, Outer, PerSample, Rows
from ._reductions import reduce_per_sample
from ._sampling import _as_range
from ._step import Step, apply_updates, copy_params
from ._torch._transforms import is_transformed
from ._transforms import GradientTransformation, chain, check_transform
from ._transforms._base import no_steps
from ._tree import Tree
from .reducers import Reducer

_PLAIN = chain()
_NEVER = 1e-12  # the chance that we take for none


@dataclass(frozen=True)
class PoissonPlan:
    """Which samples, when, and with which chance; see `poisson_batches`.

    Attributes:
        index: int64 [T, max_batch]; n, one past the last sample, stands for nobody.
        rate: the chance of every sample to be in a batch.
        n: of how many samples.

    Example:
        >>> gd.privacy.poisson_batches(gd.random.key(0), n=4, rate=0.5, steps=2).rate
        0.5
    """

    index: Tensor
    rate: float
    n: int


def poisson_batches(
    key: Tensor, n: int, rate: float, steps: int | range, *, max_batch: int | None = None
) -> PoissonPlan:
    """Plan batches that every sample enters with the same chance, independently of all others.

    i ∈ batch t  with probability q, for every i and t

    Batches differ in size, and may be empty: what is left of a row is filled up with n, which stands for
    nobody. Train on `pad(data, plan)`, which has a place for nobody. Step t is drawn from `fold_in(key, t)`
    alone, so a range of steps gives those rows of the whole plan.

    Args:
        key: int64 [2].
        n: number of samples.
        rate: q in (0, 1]; the chance is a multiple of 2⁻⁵².
        steps: how many, or a range of which.
        max_batch: how many samples a row holds; None: so many that the chance of more is below 1e-12 a
            step, by Chernoff's bound.

    Returns:
        The `PoissonPlan`.

    Raises:
        ValueError: an argument is out of range; a batch has more than max_batch samples. Under vmap, where
            that cannot be seen, the last ones of such a batch are left out, which adds the chance that it
            happens to δ.

    Example:
        >>> gd.privacy.poisson_batches(gd.random.key(0), n=4, rate=0.5, steps=3, max_batch=4).index
        tensor([[1, 4, 4, 4],
                [0, 4, 4, 4],
                [2, 3, 4, 4]])

    References:
        M. Abadi et al., "Deep learning with differential privacy", 2016.
    """
    n = check_int("n", n, 1)
    if isinstance(rate, Tensor):
        raise ValueError(f"rate must be a number in (0, 1], for the accountant to know it; got {rate}")
    rate = check_scalar("rate", rate, "(0, 1]")
    width = _ample(n, rate) if max_batch is None else check_int("max_batch", max_batch, 1)
    steps = _as_range("steps", steps)
    if not steps:
        return PoissonPlan(torch.empty((0, width), dtype=torch.int64, device=key.device), rate, n)

    def draw(step: Tensor) -> tuple[Tensor, Tensor]:
        chosen = random.uniform(random.fold_in(key, step), (n,), torch.float64) < rate
        place = chosen.cumsum(0) - 1
        # One place more, for those that were not chosen.
        place = torch.where(chosen & (place < width), place, width)
        row = torch.full((width + 1,), n, device=key.device)
        return row.scatter(0, place, torch.arange(n, device=key.device))[:width], chosen.sum()

    counts = torch.arange(steps.start, steps.stop, device=key.device)
    index, sizes = torch.func.vmap(draw, chunk_size=max(1, 2**20 // n))(counts)
    if not is_transformed(sizes) and int(sizes.max()) > width:
        late = int(sizes.argmax())
        raise ValueError(
            f"the batch of step {steps[late]} has {int(sizes[late])} samples, over max_batch = {width}; "
            f"raise max_batch (drawing with other keys until all fit is no longer Poisson sampling)"
        )
    return PoissonPlan(index, rate, n)


def history(plan: PoissonPlan, noise_multiplier: float) -> list[tuple[float, float, int]]:
    """Tell an accountant what a run on a Poisson plan did: noise, sampling rate, steps.

    gdfunc computes no ε itself. Set it as the `history` of one of Opacus' accountants; dp-accounting
    composes `PoissonSampledDpEvent(rate, GaussianDpEvent(noise_multiplier))` with itself, `steps` times.
    Neighbours differ by one sample more or less.

    Args:
        plan: from `poisson_batches`, all of whose steps were taken, or fewer.
        noise_multiplier: of the step, a number.

    Returns:
        `[(noise_multiplier, rate, steps)]`.

    Raises:
        TypeError: the plan is not a `PoissonPlan`: the guarantee does not hold for shuffled batches.
        ValueError: the noise multiplier is no positive number.

    Example:
        >>> plan = gd.privacy.poisson_batches(gd.random.key(0), n=50, rate=0.04, steps=10)
        >>> gd.privacy.history(plan, noise_multiplier=1.5)
        [(1.5, 0.04, 10)]

    References:
        I. Mironov, K. Talwar, L. Zhang, "Rényi differential privacy of the sampled Gaussian mechanism",
        2019.
    """
    if not isinstance(plan, PoissonPlan):
        raise TypeError(
            f"plan is {type(plan).__name__}, not a PoissonPlan: accountants bound what Poisson sampling "
            f"reveals, not shuffled or hand-made batches; make it with poisson_batches"
        )
    if isinstance(noise_multiplier, Tensor):
        raise ValueError(
            f"noise_multiplier must be a number, for an accountant to read; got {noise_multiplier}"
        )
    return [(check_scalar("noise_multiplier", noise_multiplier, "(0, inf)"), plan.rate, len(plan.index))]


class Padded(NamedTuple):
    """Samples of which some stand for nobody; see `pad`.

    Attributes:
        samples: tree of tensors [n, ...].
        real: bool [n], False for nobody, whatever stands there.

    Example:
        >>> gd.take(gd.privacy.pad(torch.tensor([5.0, 7.0])), torch.tensor([1, 2]))
        Padded(samples=tensor([7., 5.]), real=tensor([ True, False]))
    """

    samples: Tree
    real: Tensor


def pad(data: Tree, plan: PoissonPlan | None = None) -> Padded:
    """Give data a place for nobody: entry n, to which a Poisson plan points.

    Args:
        data: tree of tensors or NumPy arrays [n, ...].
        plan: what is to be trained on it; checked to be of as many samples, or else a real one would stand
            for nobody, and no accountant's bound hold.

    Returns:
        `Padded`, of n + 1 entries. Nobody looks like sample 0, and adds nothing.

    Raises:
        ValueError: the data is empty, ragged, without leaves, or padded already; the plan has another n.

    Example:
        >>> gd.privacy.pad(torch.tensor([5.0, 7.0]))
        Padded(samples=tensor([5., 7., 5.]), real=tensor([ True,  True, False]))
    """
    if isinstance(data, Padded):
        raise ValueError("data is padded already: nobody would become a sample; pad the data itself")
    data = _tree.as_tensors(data)
    leaves = _tree.named_leaves(data, "data")
    sizes = {path: len(leaf) if leaf.ndim else 0 for path, leaf in leaves}
    if len(set(sizes.values())) != 1 or 0 in sizes.values():
        raise ValueError(f"data must have leaves [n, ...] with one n of at least 1; got {sizes}")
    if plan is not None and plan.n != len(leaves[0][1]):
        raise ValueError(f"plan is of {plan.n} samples, but data has {len(leaves[0][1])}; plan with that n")
    real = torch.arange(len(leaves[0][1]) + 1, device=leaves[0][1].device) < len(leaves[0][1])
    return Padded(_tree.map(lambda leaf: torch.cat([leaf, leaf[:1]]), data), real)


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
    _check_max_norm(max_norm)
    divisor = check_scalar("divisor", divisor, "(0, inf)")
    options = {"chunk_size": chunk_size, "randomness": randomness, "memory_limit": memory_limit}
    reduce_per_sample(loss_fn, (), **options)  # type: ignore[arg-type]  # refuses bad options at once

    def gradients(params: Tree, batch: Tree) -> tuple[Tree, Tensor]:
        total, _, loss = _clipped_sums(loss_fn, params, batch, max_norm, options)
        mean = _tree.map(lambda s, p: (s / like(divisor, s)).to(p.dtype), total, params)
        return mean, loss / like(divisor, loss)

    return gradients


class Quantile(NamedTuple):
    """A clipping norm that follows a quantile of the gradients' norms, privately.

    C' = C·exp(−η(b − γ)),  b = ½ + 1/D (Σᵢ (1[‖gᵢ‖ <= C] − ½) + N(0, σ_b²))

    Give it as the `max_norm` of `make_private_step`. b is a noisy share of the samples left unclipped: it
    costs privacy too, and a step of noise multiplier z pays for both by adding the noise
    z' = (z⁻² − (2σ_b)⁻²)^(−½) to the gradients, so that an accountant is given z all the same.

    Attributes:
        start: the first C > 0.
        quantile: γ in [0, 1], the share of samples to be left unclipped.
        lr: η >= 0, how fast C follows.
        noise: σ_b, more than z/2; None: D/20.

    Example:
        >>> gd.privacy.Quantile(start=0.1).quantile
        0.5

    References:
        G. Andrew, O. Thakkar, H. McMahan, S. Ramaswamy, "Differentially private learning with adaptive
        clipping", 2021.
    """

    start: float | Tensor
    quantile: float | Tensor = 0.5
    lr: float | Tensor = 0.2
    noise: Any = None


class PrivateState(NamedTuple):
    """The carry of a private run.

    Attributes:
        params, opt_state: as in `TrainState`.
        steps: how many were taken, t, 0-d int64.
        max_norm: C, 0-d or a tree like params of them.
        noise_key: `fold_in(key, t)`, of the next noise.

    Example:
        >>> loss_fn = lambda w, x: (w * x).mean()
        >>> settings = {"max_norm": 1.0, "noise_multiplier": 1.0, "divisor": 2.0}
        >>> step = gd.privacy.make_private_step(loss_fn, key=gd.random.key(0), **settings)
        >>> step.init(torch.tensor(1.0)).steps
        tensor(0)
    """

    params: Tree
    opt_state: Any
    steps: Tensor
    max_norm: Tree
    noise_key: Tensor


def make_private_step(
    loss_fn: LossFn,
    transform: GradientTransformation = _PLAIN,
    *,
    key: Tensor,
    max_norm: Any,
    noise_multiplier: float | Tensor,
    divisor: float | Tensor,
    chunk_size: int | str | None = "auto",
    randomness: str = "error",
    memory_limit: int | None = None,
) -> Step:
    """Make the step of differentially private descent (DP-SGD, and DP whatever the transformation is).

    g = 1/D (Σᵢ gᵢ·min(1, C/‖gᵢ‖) + N(0, σ²C²)),  u, s' = update(g, s, θ),  θ' = θ − lr·u

    Noise of step t is drawn from `fold_in(key, t)`, for all entries at once: use a key for one run only,
    and keep it secret. The generator is not a cryptographic one. What `loss` and other records tell of the
    data is not private; `grad_norm` is that of g, which is.

    Args:
        loss_fn: as in `batch_grad`; it meets each sample as a batch of one.
        transform: what to do with the noisy gradient.
        key: int64 [2], of the noise; not the one of the plan.
        max_norm: C > 0; a tree like params of them, to clip leaf by leaf: then C² = Σ Cₗ² in the noise; or
            a `Quantile`, which adapts it.
        noise_multiplier: σ >= 0, the noise on the sum in units of C.
        divisor: D > 0, a public constant such as rate·n.
        chunk_size, randomness, memory_limit: as in `reduce_per_sample`.

    Returns:
        A `Step`, whose state is a `PrivateState`. The batch may be `Padded` and may be empty. The loss is
        1/D Σᵢ L(θ, {i}).

    Raises:
        ValueError: an argument is out of range; (in the step) as `clipped_grad`.
        TypeError: (in the step) as `clipped_grad`; the state is that of another step.

    Example:
        >>> loss_fn = lambda w, x: (w * x).mean()
        >>> settings = {"max_norm": 1.0, "noise_multiplier": 1.0, "divisor": 2.0}
        >>> step = gd.privacy.make_private_step(loss_fn, key=gd.random.key(0), **settings)
        >>> state, loss = step(step.init(torch.tensor(1.0)), torch.tensor([1.0, 30.0]), 0.1)
        >>> state.params
        tensor(0.8060)

    References:
        M. Abadi et al., "Deep learning with differential privacy", 2016.
        G. Andrew, O. Thakkar, H. McMahan, S. Ramaswamy, "Differentially private learning with adaptive
        clipping", 2021.
    """
    check_transform(transform)
    random.fold_in(key, 0)  # refuses what is no key
    sigma = check_scalar("noise_multiplier", noise_multiplier, "[0, inf)")
    divisor = check_scalar("divisor", divisor, "(0, inf)")
    adaptive = _checked_quantile(max_norm, sigma, divisor) if isinstance(max_norm, Quantile) else None
    first_norm = _check_max_norm(max_norm.start if adaptive else max_norm)
    options = {"chunk_size": chunk_size, "randomness": randomness, "memory_limit": memory_limit}
    reduce_per_sample(loss_fn, (), **options)  # type: ignore[arg-type]  # refuses bad options at once

    def init(params: Tree) -> PrivateState:
        params = copy_params(params)
        device = _tree.leaves(params)[0].device
        limits = _tree.map(
            lambda c: torch.as_tensor(c, dtype=torch.float64, device=device).clone(), first_norm
        )
        return PrivateState(
            params, transform.init(params), no_steps(params), limits, random.fold_in(key.to(device), 0)
        )

    def advance(state: PrivateState, batch: Tree, lr: float | Tensor) -> tuple[PrivateState, Tensor, Tree]:
        params, opt_state, steps, limits, noise_key = state
        total, unclipped, loss = _clipped_sums(loss_fn, params, batch, limits, options)
        leaves, structure = _tree.flatten(total)
        *noise, count_noise = _noise(noise_key, leaves)
        std = _sigma_of_sum(sigma, adaptive) * torch.stack(_tree.leaves(limits)).square().sum().sqrt()
        noisy = [(leaf + std * z.view(leaf.shape)) / divisor for leaf, z in zip(leaves, noise, strict=True)]
        grads = _tree.map(lambda g, p: g.to(p.dtype), _tree.unflatten(structure, noisy), params)
        if adaptive:
            share = 0.5 + (unclipped + adaptive.noise * count_noise[0]) / divisor
            limits = limits * torch.exp(-adaptive.lr * (share - adaptive.quantile))
        updates, opt_state = transform.update(grads, opt_state, params)
        moved = apply_updates(params, updates, lr)
        steps = steps + 1
        # The next key is carried, not made where it is used: a compiler would inline it into every draw.
        next_key = random.fold_in(key.to(steps.device), steps)
        return PrivateState(moved, opt_state, steps, limits, next_key), loss / like(divisor, loss), grads

    return Step(init, advance, PrivateState)


def _clipped_sums(
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
        above = lengths > bounds
        factors = torch.where(above, bounds / torch.where(above, lengths, bounds), torch.ones_like(lengths))
        # Below the smallest normal number a factor is too coarse to keep the bound.
        factors = torch.where(factors < torch.finfo(factors.dtype).tiny, torch.zeros_like(factors), factors)
        terms = [
            leaf.keep(usable).weighted_sum(factor)
            for leaf, factor in zip(leaves, factors.unbind(1), strict=True)
        ]
        counted = (usable & ~above.any(1)).to(torch.float64) - 0.5
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
        # Products with zero would spread one sample's infinity over its own rows only: it is dropped whole.
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


def _noise(key: Tensor, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Standard normal numbers for every entry of the leaves, and one more: all of one draw."""
    sizes = [*(leaf.numel() for leaf in leaves), 1]
    return random.normal(key, (sum(sizes),), torch.float64).split(sizes)


def _sigma_of_sum(sigma: Any, adaptive: Quantile | None) -> Any:
    """The noise left to the gradients, in units of C, where the count of unclipped ones has its own."""
    if adaptive is None:
        return sigma
    share = sigma / (2 * adaptive.noise)
    return sigma / (1 - share * share) ** 0.5


def _checked_quantile(adaptive: Quantile, sigma: Any, divisor: Any) -> Quantile:
    noise = divisor / 20 if adaptive.noise is None else adaptive.noise
    noise = check_scalar("max_norm.noise", noise, "(0, inf)")
    if not isinstance(sigma, Tensor) and not isinstance(noise, Tensor) and sigma >= 2 * noise:
        raise ValueError(
            f"max_norm.noise must be more than half of noise_multiplier, {sigma}; got {noise}; with less, "
            f"the count alone reveals more than that"
        )
    return Quantile(
        check_scalar("max_norm.start", adaptive.start, "(0, inf)"),
        check_scalar("max_norm.quantile", adaptive.quantile, "[0, 1]"),
        check_scalar("max_norm.lr", adaptive.lr, "[0, inf)"),
        noise,
    )


def _check_max_norm(max_norm: Any) -> Tree:
    """Return C, or the tree of them."""
    pairs = _tree.named_leaves(max_norm, "max_norm")
    checked = [check_scalar(path, value, "(0, inf)") for path, value in pairs]
    if not checked:
        raise ValueError(
            f"max_norm must be a finite number in (0, inf) or a tree of them; got {max_norm!r}"
        )
    return _tree.unflatten(_tree.flatten(max_norm)[1], checked)


def _ample(n: int, rate: float) -> int:
    """The smallest B for which Chernoff's bound on P(more than B of n) is 1e-12 or less."""

    def log_bound(count: int) -> float:
        share = count / n
        rest = (1 - share) * math.log((1 - share) / (1 - rate)) if count < n else 0.0
        return -n * (share * math.log(share / rate) + rest)

    size = max(1, math.ceil(n * rate))
    while size < n and log_bound(size + 1) > math.log(_NEVER):
        size += 1
    return size
