"""Directions kept in bounds."""

import torch
from torch import Tensor

from .. import _tree
from .._errors import check_scalar
from .._numerics import like, norms, shrink
from .._tree import Tree
from ._base import GradientTransformation, Scalar, each_leaf, stateless


def clip_by_value(limit: Scalar) -> GradientTransformation:
    """Clip every entry.

    u = min(max(g, −c), c)

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
        factor = shrink(norm, like(max_norm, norm))
        return each_leaf(lambda g, factor: (g * factor,), grads, scalars=(factor,))[0], state

    return GradientTransformation(lambda params: (), update)


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


def zero_nans() -> GradientTransformation:
    """Replace NaN by zero; infinities stay.

    u = 0 where g is NaN, else g

    Example:
        >>> gd.zero_nans().update(torch.tensor([float("nan"), 2.0]), ())
        (tensor([0., 2.]), ())
    """
    return stateless(lambda g: torch.where(g.isnan(), torch.zeros_like(g), g))
