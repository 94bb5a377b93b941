"""Adafactor: the sizes of a matrix's gradients, kept as those of its rows and columns."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _tree
from .._errors import check_scalar
from .._numerics import Scalar, like, norms, precise, widen
from .._tree import Tree
from ._base import GradientTransformation, in_dtype, needed, no_steps, stateful, transformation


class AdafactorState(NamedTuple):
    """The averages of squared gradients; where a leaf has none of one kind, there is one zero, [1]."""

    step: Tensor
    row_var: Tree  # [..., R, 1] for a leaf [..., R, C]
    col_var: Tree  # [..., 1, C]
    variance: Tree  # of leaves with less than two dimensions


@transformation
def adafactor(
    beta2_decay: Scalar = -0.8, *, eps: tuple[Scalar | None, Scalar] = (None, 1e-3), d: Scalar = 1.0
) -> GradientTransformation:
    """Divide by the root of squared gradients, averaged over the rows and the columns of each matrix.

    r' = r + tᵇ·(mean of rows of g² − r);  c' = c + tᵇ·(mean of columns of g² − c);  v = r'·c'ᵀ / mean(r')
    w = g / √max(v, ε₁²);  u = max(ε₂, RMS(θ)) · w / max(1, RMS(w)/d)

    A leaf of less than two dimensions keeps v' = v + tᵇ·(g² − v) itself. RMS is the root of the mean of
    squares over a leaf, so lr is the size of a step relative to that of the parameters. The authors take
    min(0.01, 1/√t), a schedule. torch's optimizer takes min(lr, 1/√t), which is lr for lr <= 1/√T. For its
    weight decay, chain `gd.weight_decay`.

    Args:
        beta2_decay: b <= 0, the power of t by which averages get longer.
        eps: (ε₁, ε₂), each >= 0. None for ε₁ stands for the rounding error of each leaf's dtype.
        d: d > 0, the largest RMS of w.

    Raises:
        ValueError: a number is out of range; (in update) params are not given.

    Example:
        >>> transform, params = gd.adafactor(), torch.full((2, 2), 3.0)
        >>> grads = torch.tensor([[1.0, 2.0], [2.0, 4.0]])
        >>> transform.update(grads, transform.init(params), params)[0]
        tensor([[3., 3.],
                [3., 3.]])

    References:
        N. Shazeer, M. Stern, "Adafactor: adaptive learning rates with sublinear memory cost", 2018.
        torch: `Adafactor`.
    """
    beta2_decay = check_scalar("beta2_decay", beta2_decay, "(-inf, 0]")
    floor = None if eps[0] is None else check_scalar("eps[0]", eps[0], "[0, inf)")
    least, d = check_scalar("eps[1]", eps[1], "[0, inf)"), check_scalar("d", d, "(0, inf)")

    def init(params: Tree) -> AdafactorState:
        return AdafactorState(
            no_steps(params), *(_tree.map(part, params) for part in (_rows, _columns, _whole))
        )

    def update(grads: Tree, state: AdafactorState, params: Tree = None) -> tuple[Tree, AdafactorState]:
        fresh = init(grads)
        columns = [
            _tree.check_like(tree, shape, f"opt_state.{name}", "that of a different parameter tree")
            for name, tree, shape in zip(state._fields[1:], state[1:], fresh[1:], strict=True)
        ]
        leaves, structure = _tree.flatten(grads)
        points = _tree.check_like(needed(params, "adafactor"), grads, "params", "grads")
        step = state.step + 1
        share = step.to(precise(step)) ** beta2_decay
        scalars = share, floor, least, d
        results = [
            _of_leaf(g, p, averages, scalars)
            for g, p, *averages in zip(leaves, points, *columns, strict=True)
        ]
        updates, *averages = (_tree.unflatten(structure, [row[i] for row in results]) for i in range(4))
        return updates, AdafactorState(step, *averages)

    return stateful(AdafactorState, init, update)


def _rows(p: Tensor) -> Tensor:
    return p.new_zeros((*p.shape[:-1], 1) if p.ndim > 1 else 1)


def _columns(p: Tensor) -> Tensor:
    return p.new_zeros((*p.shape[:-2], 1, p.shape[-1]) if p.ndim > 1 else 1)


def _whole(p: Tensor) -> Tensor:
    return p.new_zeros(1 if p.ndim > 1 else p.shape)


def _of_leaf(g: Tensor, p: Tensor, averages: list[Tensor], scalars: tuple[Any, ...]) -> list[Tensor]:
    """Return the update and the averages of one leaf."""
    (row, column, variance), (share, floor, least, d) = averages, scalars
    x, share = widen(g), in_dtype(share, g.dtype)
    floor = torch.finfo(g.dtype).eps if floor is None else floor
    squares = x * x
    if g.ndim > 1:
        row = torch.lerp(widen(row), squares.mean(-1, keepdim=True), share)
        column = torch.lerp(widen(column), squares.mean(-2, keepdim=True), share)
        mean = row.mean(-2, keepdim=True)
        estimate = row * column / torch.maximum(mean, like(floor, mean))
    else:
        estimate = variance = torch.lerp(widen(variance), squares, share)
    w = x * torch.maximum(estimate, like(floor, estimate) ** 2).rsqrt()
    size, of_params = _rms(w), _rms(widen(p))
    w = w / torch.maximum(size / like(d, size), torch.ones_like(size))
    u = torch.maximum(of_params, like(least, of_params)) * w
    unused = [g.new_zeros(1), g.new_zeros(1)]
    return [
        leaf.to(g.dtype) for leaf in ([u, row, column, unused[0]] if g.ndim > 1 else [u, *unused, variance])
    ]


def _rms(x: Tensor) -> Tensor:
    return norms(x.flatten()) / math.sqrt(x.numel())
