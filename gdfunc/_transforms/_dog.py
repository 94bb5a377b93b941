"""Distance over gradients: a learning rate from how far a run has come."""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _tree
from .._errors import check_scalar
from .._numerics import Scalar, like, widen
from .._tree import Tree
from ._base import GradientTransformation, each_leaf, needed, stateful, transformation


class DoGState(NamedTuple):
    """The first parameters, the largest distance from them, and the sum of squared gradient norms."""

    start: Tree
    distance: Tensor
    squares: Tensor


@transformation
def dog(reps_rel: Scalar = 1e-6, *, eps: Scalar = 1e-8) -> GradientTransformation:
    """Multiply the gradient by the largest distance from the start, over the root of summed squares.

    u = r̄/√(G + ε) · g;  r̄ = max(ρ·(1 + ‖θ₀‖), maxᵢ ‖θᵢ − θ₀‖),  G = Σᵢ ‖gᵢ‖²,  over all leaves together

    lr = 1 is the authors' step. There is nothing to tune: ρ must only be small. The result of a run should
    be an average, such as that of `gd.methods.ema`. An lr_decay is not needed.

    Args:
        reps_rel: ρ > 0, the length of the first step relative to the parameters. For networks with batch
            normalisation the authors take 1e-4.
        eps: ε > 0.

    Returns:
        A transformation that needs params in update. Its state has the fields `start`, `distance` and
        `squares`.

    Raises:
        ValueError: a number is out of range; (in update) params are not given.

    Example:
        >>> step = gd.make_step(lambda w, batch: (w - 3.0).abs(), gd.dog())
        >>> state, _ = gd.train(step, step.init(torch.tensor(0.0)), None, gd.full_batch(1, 200), 1.0)
        >>> bool((state.params - 3).abs() < 0.3)
        True

    References:
        M. Ivgi, O. Hinder, Y. Carmon, "DoG is SGD's best friend: a parameter-free dynamic step size
        schedule", 2023.
    """
    reps_rel, eps = check_scalar("reps_rel", reps_rel, "(0, inf)"), check_scalar("eps", eps, "(0, inf)")

    def init(params: Tree) -> DoGState:
        length = _tree.norm(params)
        return DoGState(
            _tree.clone(params), like(reps_rel, length) * (1.0 + length), torch.zeros_like(length)
        )

    def update(grads: Tree, state: DoGState, params: Tree = None) -> tuple[Tree, DoGState]:
        _tree.check_like(state.start, needed(params, "dog"), "opt_state.start", "params")
        away = _tree.map(lambda p, start: widen(p) - widen(start), params, state.start)
        distance = torch.maximum(state.distance, _tree.norm(away))
        squares = state.squares + _tree.norm(grads) ** 2
        factor = distance / (squares + like(eps, squares)).sqrt()
        updates, start = each_leaf(
            lambda g, x, factor: (g * factor, x), grads, state.start, scalars=(factor,)
        )
        return updates, DoGState(_tree.clone(start), distance, squares)

    return stateful(DoGState, init, update)
