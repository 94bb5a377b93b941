"""Projections: functions from parameters to the nearest parameters in a convex set.

P(θ) = the point of C with the least ‖x − θ‖

`box`, `ball` and `simplex` make them, and `gd.methods.projected(step, projection)` applies one after every
step. A projection takes any tree of tensors. To keep a part of the parameters in a set, write a function of
the tree:

Example:
    >>> positive = gd.projections.box(0.0, None)
    >>> def of_weights(params):
    ...     return {**params, "w": positive(params["w"])}
    >>> of_weights({"w": torch.tensor([-1.0, 2.0]), "b": torch.tensor(-3.0)})
    {'w': tensor([0., 2.]), 'b': tensor(-3.)}
"""

from collections.abc import Callable

import torch
from torch import Tensor

from . import _tree
from ._errors import check_scalar
from ._numerics import Scalar, like, shrink, widen
from ._tree import Tree

Projection = Callable[[Tree], Tree]


def box(low: Scalar | None, high: Scalar | None) -> Projection:
    """Make the projection onto a box: every entry is clipped.

    P(θ)ᵢ = min(max(θᵢ, a), b)

    NaN stays NaN.

    Args:
        low: a, a number or a 0-d tensor; None: no bound.
        high: b >= a, as low.

    Raises:
        ValueError: a bound is no finite number, or low > high.

    Example:
        >>> gd.projections.box(0.0, 1.0)(torch.tensor([-1.0, 0.5, 3.0]))
        tensor([0.0000, 0.5000, 1.0000])
    """
    low = None if low is None else check_scalar("low", low, "(-inf, inf)")
    high = None if high is None else check_scalar("high", high, "(-inf, inf)")
    if isinstance(low, float) and isinstance(high, float) and low > high:
        raise ValueError(f"low must be at most high; got low={low} and high={high}")

    def clipped(x: Tensor) -> Tensor:
        x = x if low is None else torch.maximum(x, like(low, x))
        return x if high is None else torch.minimum(x, like(high, x))

    return lambda params: _tree.map(clipped, params)


def ball(radius: Scalar = 1.0) -> Projection:
    """Make the projection onto a ball around zero: all leaves together are one vector.

    P(θ) = θ·min(1, r/‖θ‖)

    Args:
        radius: r > 0, a number or a 0-d tensor.

    Raises:
        ValueError: the radius is out of range.

    Example:
        >>> gd.projections.ball(1.0)({"a": torch.tensor(3.0), "b": torch.tensor(4.0)})
        {'a': tensor(0.6000), 'b': tensor(0.8000)}
    """
    radius = check_scalar("radius", radius, "(0, inf)")

    def project(params: Tree) -> Tree:
        norm = _tree.norm(params)
        factor = shrink(norm, like(radius, norm))
        return _tree.map(lambda x: x * like(factor, x), params)

    return project


def simplex(total: Scalar = 1.0) -> Projection:
    """Make the projection of every row onto a simplex: entries >= 0 that add up to a total.

    P(x)ᵢ = max(xᵢ − τ, 0) with the τ for which Σᵢ P(x)ᵢ = s,  for every vector along the last dim of a leaf

    So a matrix keeps a distribution in each row, such as the transitions of a Markov chain.

    Args:
        total: s > 0, a number or a 0-d tensor.

    Raises:
        ValueError: the total is out of range; (in a call) a leaf is 0-d, or has empty rows.

    Example:
        >>> gd.projections.simplex()(torch.tensor([[0.5, 0.7, -1.0], [2.0, 0.0, 0.0]]))
        tensor([[0.4000, 0.6000, 0.0000],
                [1.0000, 0.0000, 0.0000]])

    References:
        J. Duchi, S. Shalev-Shwartz, Y. Singer, T. Chandra, "Efficient projections onto the ℓ₁-ball for
        learning in high dimensions", 2008.
    """
    total = check_scalar("total", total, "(0, inf)")

    def threshold(falling: Tensor) -> Tensor:
        excess = falling.cumsum(-1) - like(total, falling)
        counts = torch.arange(1, falling.shape[-1] + 1, dtype=falling.dtype, device=falling.device)
        # As many of the largest entries stay above zero as lie above the mean excess up to them.
        size = (falling * counts > excess).sum(-1, keepdim=True).clamp(min=1)
        return excess.gather(-1, size - 1) / size

    def of_rows(x: Tensor) -> Tensor:
        if not x.ndim or not x.shape[-1]:
            raise ValueError(
                f"simplex needs leaves with one dim or more, and entries along the last one; got shape "
                f"{tuple(x.shape)}"
            )
        wide = widen(x)
        falling = wide.sort(-1, descending=True).values
        tau = threshold(falling)
        # Because the sums of large or many entries lose the total, the moved row is looked at again.
        rest = threshold(falling - tau)
        return (wide - tau - rest).clamp(min=0).to(x.dtype)

    return lambda params: _tree.map(of_rows, params)
