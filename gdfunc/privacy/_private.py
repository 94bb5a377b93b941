"""Sums of gradients that are clipped one by one, and the step of differentially private descent."""

from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _tree, random
from .._errors import check_scalar
from .._gradients import GradFn, LossFn, SharedLoss
from .._numerics import Scalar, like, norms, shrink, wide
from .._per_sample import PerSample
from .._reductions._reduce import reduce_per_sample
from .._step import Step, apply_updates, copy_params, step_maker
from .._transforms._base import PLAIN, GradientTransformation, check_transform, no_steps
from .._tree import Tree
from ..reducers import Reducer
from ._poisson import Padded


def clipped_grad(
    loss_fn: LossFn,
    max_norm: Any,
    *,
    divisor: Scalar,
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
    """Compute Σᵢ gᵢ·min(1, C/‖gᵢ‖), Σᵢ (1[gᵢ is not clipped] − ½) in float64, and Σᵢ L(θ, {i})."""
    if isinstance(loss_fn, SharedLoss):
        given = batch, params, max_norm
        return loss_fn.sums(
            lambda loss_fn, batch, params, max_norm: clipped_sums(
                loss_fn, params, batch, max_norm, options
            ),
            *given,
        )
    samples, real = batch if isinstance(batch, Padded) else (batch, None)
    size = next((len(leaf) for leaf in _tree.leaves(samples) if leaf.ndim), None)
    if size == 0:
        nothing = _tree.map(lambda p: torch.zeros_like(p, dtype=wide(p.dtype)), params)
        leaf = _tree.leaves(params)[0]
        return nothing, leaf.new_zeros((), dtype=torch.float64), leaf.new_zeros(())
    reduced = reduce_per_sample(loss_fn, _clipped(max_norm, real), **options)
    (total, unclipped), losses = reduced(params, samples)
    if real is not None:
        losses = torch.where(real, losses, torch.zeros_like(losses))
    return total, unclipped, losses.sum()


def _clipped(max_norm: Tree, real: Tensor | None) -> Reducer:
    """Reduce to the sum of clipped gradients, and the count of those left unclipped, less half of all."""
    leaf_by_leaf = not isinstance(max_norm, Real | Tensor)

    def init(params: Tree) -> tuple[list[Any], None, float]:
        if not leaf_by_leaf:
            return [max_norm] * len(_tree.leaves(params)), None, 0.0
        return _tree.check_structure(max_norm, params, "max_norm", "params"), None, 0.0

    def add(acc: tuple[list[Any], Any, Any], grads: PerSample) -> tuple[list[Any], Any, Any]:
        limits, total, unclipped = acc
        # A norm of factors may lose what cancels in it, while the sum keeps it.
        grads = grads.single()
        lengths = torch.stack(_tree.leaves(grads.leaf_norms()), -1)
        if not leaf_by_leaf:
            lengths = norms(lengths)[:, None].expand_as(lengths)
        finite = lengths.isfinite().all(1)
        here = torch.ones_like(finite) if real is None else real[grads.start : grads.start + len(finite)]
        usable = finite & here
        bounds = torch.stack([like(limit, lengths) for limit in limits])
        factors = shrink(torch.where(usable[:, None], lengths, torch.zeros_like(lengths)), bounds)
        # Below the smallest normal number a factor is too coarse to keep the bound.
        factors = torch.where(factors < torch.finfo(factors.dtype).tiny, torch.zeros_like(factors), factors)
        columns = zip(grads.keep(usable).leaves, factors.unbind(1), strict=True)
        terms = _tree.unflatten(grads.structure, [leaf.weighted_sum(factor) for leaf, factor in columns])
        counted = (usable & (lengths <= bounds).all(1)).to(torch.float64) - 0.5
        unclipped = unclipped + torch.where(here, counted, torch.zeros_like(counted)).sum()
        return limits, terms if total is None else _tree.map(torch.add, total, terms), unclipped

    return Reducer(init, add, lambda acc: acc[1:])


def check_max_norm(max_norm: Any) -> Tree:
    """Return C, or the tree of them."""
    pairs = _tree.named_leaves(max_norm, "max_norm")
    checked = [check_scalar(path, value, "(0, inf)") for path, value in pairs]
    if not checked:
        raise ValueError(
            f"max_norm must be a finite number in (0, inf) or a tree of them; got {max_norm!r}"
        )
    return _tree.unflatten(_tree.flatten(max_norm)[1], checked)


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

    start: Scalar
    quantile: Scalar = 0.5
    lr: Scalar = 0.2
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


@step_maker
def make_private_step(
    loss_fn: LossFn,
    transform: GradientTransformation = PLAIN,
    *,
    key: Tensor,
    max_norm: Any,
    noise_multiplier: Scalar,
    divisor: Scalar,
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
    random._check_key(key)
    sigma = check_scalar("noise_multiplier", noise_multiplier, "[0, inf)")
    divisor = check_scalar("divisor", divisor, "(0, inf)")
    adaptive = _checked_quantile(max_norm, sigma, divisor) if isinstance(max_norm, Quantile) else None
    first_norm = check_max_norm(max_norm.start if adaptive else max_norm)
    options = {"chunk_size": chunk_size, "randomness": randomness, "memory_limit": memory_limit}
    reduce_per_sample(loss_fn, (), **options)  # type: ignore[arg-type]  # refuses bad options at once

    def init(params: Tree) -> PrivateState:
        params = copy_params(params)
        steps = no_steps(params)
        limits = _tree.map(lambda c: like(c, steps.double()).clone(), first_norm)
        noise_key = random.fold_in(key.to(steps.device), 0)
        return PrivateState(params, transform.init(params), steps, limits, noise_key)

    def advance(state: PrivateState, batch: Tree, lr: Scalar) -> tuple[PrivateState, Tensor, Tree]:
        params, opt_state, steps, limits, noise_key = state
        total, unclipped, loss = clipped_sums(loss_fn, params, batch, limits, options)
        leaves, structure = _tree.flatten(total)
        sizes = [leaf.numel() for leaf in leaves]
        *noise, count_noise = random._normals(noise_key, [*sizes, 1])
        std = _sigma_of_sum(sigma, adaptive) * torch.stack(_tree.leaves(limits)).square().sum().sqrt()
        noisy = [(leaf + std * z.view(leaf.shape)) / divisor for leaf, z in zip(leaves, noise, strict=True)]
        grads = _tree.map(lambda g, p: g.to(p.dtype), _tree.unflatten(structure, noisy), params)
        if adaptive:
            share = 0.5 + (unclipped + adaptive.noise * count_noise[0]) / divisor
            limits = limits * torch.exp(-adaptive.lr * (share - adaptive.quantile))
        else:
            limits = _tree.clone(limits)  # no output shares storage with an input
        updates, opt_state = transform.update(grads, opt_state, params)
        moved = apply_updates(params, updates, lr)
        steps = steps + 1
        # The next key is carried, because a compiler would inline its computation into every draw.
        next_key = random.fold_in(key.to(steps.device), steps)
        return PrivateState(moved, opt_state, steps, limits, next_key), loss / like(divisor, loss), grads

    return Step(init, advance, PrivateState)


def _sigma_of_sum(sigma: Any, adaptive: Quantile | None) -> Any:
    """Return the noise left to the gradients, in units of C, if the count of unclipped ones has its own."""
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
