"""Directions clipped, scaled by their norms, or made orthogonal."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _tree
from .._errors import check_int, check_scalar
from .._numerics import Scalar, like, norms, safe_ratio, shrink
from .._tree import Tree
from ._adam import adam
from ._averages import momentum as accumulate_momentum
from ._averages import weight_decay as add_decay
from ._base import (
    GradientTransformation,
    Leaves,
    chain,
    each_leaf,
    ema,
    leafwise,
    stateless,
    transformation,
)


@transformation
def clip_by_value(limit: Scalar) -> GradientTransformation:
    """Clip every entry.

    u = min(max(g, −c), c)

    An infinite entry becomes ±c, as in torch, and NaN stays NaN; see `apply_if_finite`.

    Args:
        limit: c > 0.

    Raises:
        ValueError: the limit is out of range.

    Example:
        >>> gd.clip_by_value(1.0).update(torch.tensor([3.0, -0.5]), ())
        (tensor([ 1.0000, -0.5000]), ())

    References:
        torch: `nn.utils.clip_grad_value_`.
    """
    limit = check_scalar("limit", limit, "(0, inf)")

    def update(g: Tensor) -> Tensor:
        bound = like(limit, g)
        return torch.clamp(g, -bound, bound)

    return stateless(update)


@transformation
def clip_by_global_norm(max_norm: Scalar) -> GradientTransformation:
    """Shrink the whole gradient to a norm of at most `max_norm`.

    u = g·min(1, C/‖g‖),  ‖g‖ over all leaves together

    The norm neither overflows nor underflows, and no 1e-6 is added to it, as torch does: a gradient of norm
    at most C keeps its bits. An infinite entry makes NaN, so that it is seen; see `apply_if_finite`.

    Args:
        max_norm: C > 0.

    Raises:
        ValueError: the norm is out of range.

    Example:
        >>> gd.clip_by_global_norm(1.0).update({"a": torch.tensor(3.0), "b": torch.tensor(4.0)}, ())
        ({'a': tensor(0.6000), 'b': tensor(0.8000)}, ())

    References:
        R. Pascanu, T. Mikolov, Y. Bengio, "On the difficulty of training recurrent neural networks", 2013.
        torch: `nn.utils.clip_grad_norm_`.
    """
    max_norm = check_scalar("max_norm", max_norm, "(0, inf)")

    def update(grads: Tree, state: tuple[()], params: Tree = None) -> tuple[Tree, tuple[()]]:
        norm = _tree.norm(grads)
        factor = shrink(norm, max_norm)
        return each_leaf(lambda g, factor: (g * factor,), grads, scalars=(factor,))[0], state

    return GradientTransformation(lambda params: (), update)


@transformation
def adaptive_clip(clipping: Scalar = 0.01, *, eps: Scalar = 1e-3) -> GradientTransformation:
    """Shrink the gradient of each unit to a share of the norm of its weights.

    u = Gᵢ·min(1, λ·max(‖Wᵢ‖, ε)/‖Gᵢ‖),  i over dim 0 of a leaf of two or more dims (its outputs)

    A leaf of fewer dims is one unit.

    Args:
        clipping: λ > 0.
        eps: ε > 0, the least norm that counts for weights.

    Raises:
        ValueError: a number is out of range; (in update) params are not given.

    Example:
        >>> w = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
        >>> gd.adaptive_clip(0.1).update(torch.ones(2, 2), (), w)
        (tensor([[3.5355e-01, 3.5355e-01],
                [7.0711e-05, 7.0711e-05]]), ())

    References:
        A. Brock, S. De, S. Smith, K. Simonyan, "High-performance large-scale image recognition without
        normalization", 2021.
    """
    clipping, eps = check_scalar("clipping", clipping, "(0, inf)"), check_scalar("eps", eps, "(0, inf)")

    def norm(x: Tensor) -> Tensor:
        return norms(x.flatten(1)).view(-1, *[1] * (x.ndim - 1)) if x.ndim > 1 else norms(x.flatten())

    def update(g: Tensor, p: Tensor, clipping: Scalar) -> Tensor:
        size = norm(p)
        return g * shrink(norm(g), clipping * torch.maximum(size, like(eps, size))).to(g.dtype)

    return stateless(update, clipping, with_params=True)


@transformation
def zero_nans() -> GradientTransformation:
    """Replace NaN by zero; infinities stay.

    u = 0 where g is NaN, else g

    Example:
        >>> gd.zero_nans().update(torch.tensor([float("nan"), 2.0]), ())
        (tensor([0., 2.]), ())
    """
    return stateless(lambda g: torch.where(g.isnan(), torch.zeros_like(g), g))


@transformation
def trust_ratio(*, coefficient: Scalar = 1.0) -> GradientTransformation:
    """Give the direction of each leaf a length in proportion to that of its parameters.

    u = c·‖θ‖/‖g‖·g for every leaf; g as it is where either norm is zero

    Args:
        coefficient: c > 0.

    Raises:
        ValueError: the coefficient is out of range; (in update) params are not given.

    Example:
        >>> gd.trust_ratio().update(torch.tensor([3.0, 4.0]), (), torch.tensor([1.0, 0.0]))
        (tensor([0.6000, 0.8000]), ())

    References:
        Y. You et al., "Large batch optimization for deep learning: training BERT in 76 minutes", 2020.
    """
    coefficient = check_scalar("coefficient", coefficient, "(0, inf)")
    return stateless(lambda g, p, c: g * _trust(_norm(p), _norm(g), c), coefficient, with_params=True)


@transformation
def lars(
    *, momentum: Scalar = 0.9, weight_decay: Scalar = 0.0, trust_coefficient: Scalar = 1e-3
) -> GradientTransformation:
    """Scale each leaf's gradient by the size of its parameters, then accumulate.

    d = η·‖θ‖/(‖g‖ + λ·‖θ‖)·(g + λ·θ) for every leaf;  u = β·b + d

    Where a norm is zero, d = g + λ·θ.

    Args:
        momentum: β in [0, 1).
        weight_decay: λ >= 0.
        trust_coefficient: η > 0.

    Raises:
        ValueError: a number is out of range; (in update) params are not given.

    Example:
        >>> transform, params = gd.lars(), torch.tensor([1.0, 0.0])
        >>> transform.update(torch.tensor([3.0, 4.0]), transform.init(params), params)[0]
        tensor([0.0006, 0.0008])

    References:
        Y. You, I. Gitman, B. Ginsburg, "Large batch training of convolutional networks", 2017.
    """
    decay = check_scalar("weight_decay", weight_decay, "[0, inf)")
    trust = check_scalar("trust_coefficient", trust_coefficient, "(0, inf)")

    def update(g: Tensor, p: Tensor, decay: Scalar, trust: Scalar) -> Tensor:
        size, slope = _norm(p), _norm(g)
        slope = torch.where(slope != 0, slope + decay * size, slope)
        return (g + decay * p) * _trust(size, slope, trust)

    return chain(stateless(update, decay, trust, with_params=True), accumulate_momentum(momentum))


@transformation
def lamb(
    betas: tuple[Scalar, Scalar] = (0.9, 0.999), *, eps: Scalar = 1e-6, weight_decay: Scalar = 1e-2
) -> GradientTransformation:
    """Scale the direction of `adamw` by the size of each leaf's parameters.

    r = m̂ / (√v̂ + ε) + λ·θ;  u = ‖θ‖/‖r‖·r for every leaf

    Args:
        betas: (β₁, β₂), each in [0, 1).
        eps: ε >= 0.
        weight_decay: λ >= 0.

    Returns:
        `chain(adam(betas, eps=eps), gd.weight_decay(weight_decay), trust_ratio())`.

    Raises:
        ValueError: a number is out of range; (in update) params are not given.

    Example:
        >>> transform, params = gd.lamb(), torch.tensor([1.0, 0.0])
        >>> transform.update(torch.tensor([3.0, 4.0]), transform.init(params), params)[0]
        tensor([0.7106, 0.7036])

    References:
        Y. You et al., "Large batch optimization for deep learning: training BERT in 76 minutes", 2020.
    """
    return chain(adam(betas, eps=eps), add_decay(weight_decay), trust_ratio())


class MuonState(NamedTuple):
    momentum_buffer: Tree


@transformation
def muon(
    momentum: Scalar = 0.95,
    *,
    nesterov: bool = True,
    ns_coefficients: tuple[Scalar, Scalar, Scalar] = (3.4445, -4.775, 2.0315),
    ns_steps: int = 5,
    eps: Scalar = 1e-7,
) -> GradientTransformation:
    """Accumulate gradients of matrices, and make their sum nearly orthogonal.

    B' = β·B + (1 − β)·G;  N = β·B' + (1 − β)·G with `nesterov`, else B';  X₀ = N/‖N‖
    Xᵢ₊₁ = a·Xᵢ + (b·A + c·A²)·Xᵢ with A = Xᵢ·Xᵢᵀ;  u = √max(1, rows/columns)·X

    In the parameters' own dtype, where torch iterates in bfloat16. Weight decay is a `weight_decay` after
    it. For matrices only: give vectors another rule with `partition`.

    Args:
        momentum: β in [0, 1).
        nesterov: look ahead.
        ns_coefficients: (a, b, c) of the Newton-Schulz iteration.
        ns_steps: how many iterations.
        eps: the least norm that is divided by, > 0.

    Raises:
        ValueError: a number is out of range; (in init) a leaf is no matrix.

    Example:
        >>> transform = gd.muon()
        >>> grad = torch.tensor([[2.0, 0.0], [0.0, 0.5]])
        >>> transform.update(grad, transform.init(grad))[0]
        tensor([[0.7374, 0.0000],
                [0.0000, 0.7429]])

    References:
        K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024. torch: `Muon`.
    """
    momentum = check_scalar("momentum", momentum, "[0, 1)")
    coefficients = [
        check_scalar(f"ns_coefficients[{i}]", c, "(-inf, inf)") for i, c in enumerate(ns_coefficients)
    ]
    check_int("ns_steps", ns_steps, 1)
    eps = check_scalar("eps", eps, "(0, inf)")

    def update(g: Tensor, buffer: Tensor, beta: Scalar, a: Scalar, b: Scalar, c: Scalar) -> Leaves:
        buffer = ema(buffer, g, momentum)
        x = ema(g, buffer, 1.0 - beta) if nesterov else buffer
        tall = x.shape[0] > x.shape[1]
        x = x.T if tall else x
        size = _norm(x)
        x = x / torch.maximum(size, like(eps, size)).to(x.dtype)
        for _ in range(ns_steps):
            gram = x @ x.T
            x = a * x + (b * gram + c * (gram @ gram)) @ x
        x = x.T if tall else x
        return math.sqrt(max(1.0, g.shape[0] / g.shape[1])) * x, buffer

    transform = leafwise(MuonState, update, (0.0,), lambda t: (momentum, *coefficients))

    def init(params: Tree) -> MuonState:
        for path, leaf in _tree.named_leaves(params, "params"):
            if leaf.ndim != 2:
                raise ValueError(
                    f"{path} has shape {tuple(leaf.shape)}, but muon is for matrices; give it another "
                    f"transformation with partition"
                )
        return transform.init(params)

    return transform._replace(init=init)


def _norm(x: Tensor) -> Tensor:
    return norms(x.flatten())


def _trust(size: Tensor, slope: Tensor, coefficient: Scalar) -> Tensor:
    """coefficient·size/slope, or 1 where either is zero, with finite derivatives."""
    both = (size != 0) & (slope != 0)
    return torch.where(both, coefficient * safe_ratio(size, slope), torch.ones_like(size))
