"""Steps that find their size from the loss: a line search, and Polyak's."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _tree
from .._errors import check_int, check_scalar
from .._gradients import LossFn, batch_grad
from .._numerics import safe_ratio, widen
from .._scan import scan
from .._step import Step, apply_updates, copy_params
from .._transforms._base import GradientTransformation, chain, check_transform
from .._tree import Tree
from ._scalars import learning_rate, scalar

_PLAIN = chain()


class LineSearchState(NamedTuple):
    """Parameters, the transformation's memory, and the step size that was accepted last."""

    params: Tree
    opt_state: Any
    step_size: Tensor


def line_search(
    loss_fn: LossFn,
    transform: GradientTransformation = _PLAIN,
    *,
    decrease: float | Tensor = 1e-4,
    factor: float | Tensor = 0.5,
    max_steps: int = 10,
) -> Step:
    """Make a step that backtracks from lr until the loss has decreased enough.

    θ' = θ − a·u with the first a in lr, lr·q, lr·q², … such that  L(θ − a·u) <= L(θ) − c·a·⟨g, u⟩

    u is the transformed gradient. If no trial is good enough, or u leads uphill (⟨g, u⟩ <= 0), then
    a = 0 and the parameters stay. So the loss of a batch never grows. Every step makes all
    `max_steps + 1` trials and selects among them, because vmap and scan cannot stop early.

    Args:
        loss_fn: `(params, batch) -> loss`; see `batch_grad`.
        transform: what to do with the gradient; with `gd.lbfgs()` and lr = 1 this is the classical
            quasi-Newton method.
        decrease: c, a number in (0, 1) or a 0-d tensor.
        factor: q, by which a trial is shorter than the one before, a number in (0, 1) or a 0-d tensor.
        max_steps: how often to backtrack, an int >= 0.

    Returns:
        A `Step`, whose lr is the longest step tried. The fields of its state are `params`, `opt_state` and
        `step_size`, the a of the last step.

    Raises:
        ValueError: a hyperparameter is out of range; (in the step) as `make_step`.
        TypeError: (in the step) the state is that of another step.

    Example:
        >>> step = gd.methods.line_search(lambda w, batch: 2 * w**2)
        >>> step(step.init(torch.tensor(1.0)), None, 1.0)
        (LineSearchState(params=tensor(0.), opt_state=(), step_size=tensor(0.2500)), tensor(2.))

    References:
        L. Armijo, "Minimization of functions having Lipschitz continuous first partial derivatives", 1966.
        J. Nocedal, S. J. Wright, "Numerical optimization", 2nd ed., 2006, algorithm 3.1.
    """
    check_transform(transform)
    decrease = check_scalar("decrease", decrease, "(0, 1)")
    factor = check_scalar("factor", factor, "(0, 1)")
    max_steps = check_int("max_steps", max_steps, 0)
    gradients = batch_grad(loss_fn)

    def init(params: Tree) -> LineSearchState:
        params = copy_params(params)
        return LineSearchState(params, transform.init(params), scalar(0.0, params))

    def advance(
        state: LineSearchState, batch: Tree, lr: float | Tensor
    ) -> tuple[LineSearchState, Tensor, Tree]:
        batch, params = _tree.as_tensors(batch), state.params
        grads, loss = gradients(params, batch)
        updates, opt_state = transform.update(grads, state.opt_state, params)
        longest = learning_rate(lr, params)
        slope = _tree.dot(_tree.map(widen, grads), _tree.map(widen, updates))

        def try_one(sizes: tuple[Tensor, Tensor], _: None) -> tuple[tuple[Tensor, Tensor], None]:
            accepted, size = sizes
            trial = loss_fn(apply_updates(params, updates, size), batch)
            enough = (slope > 0) & (trial <= loss - scalar(decrease, params) * size * slope)
            accepted = torch.where((accepted == 0) & enough, size, accepted)
            return (accepted, size * scalar(factor, params)), None

        (size, _), _ = scan(try_one, (torch.zeros_like(longest), longest), length=max_steps + 1)
        # A selection, because θ − 0·u is NaN for an infinite u.
        params = _tree.where(size > 0, apply_updates(params, updates, size), params)
        return LineSearchState(params, opt_state, size), loss, grads

    return Step(init, advance, LineSearchState)


class PolyakState(NamedTuple):
    """Parameters, and the size of the last step."""

    params: Tree
    step_size: Tensor


def polyak(
    loss_fn: LossFn, minimum: float | Tensor = 0.0, *, max_step: float | Tensor | None = None
) -> Step:
    """Make the step of Polyak's size, which needs no tuning where the minimum of the loss is known.

    θ' = θ − a·g with a = lr·(L(θ) − L*)/‖g‖²

    lr = 1 is Polyak's step, which goes to where the tangent reaches L*. For a convex loss with minimum L*
    and lr <= 2 the distance to every minimiser never grows. Where the gradient is zero, or the loss is
    below L*, the parameters stay.

    Args:
        loss_fn: `(params, batch) -> loss`; see `batch_grad`.
        minimum: L*, the loss at the minimum (of every batch, for mini-batches), a number or a 0-d tensor.
        max_step: an upper bound of (L − L*)/‖g‖², a number > 0 or a 0-d tensor; None: no bound.

    Returns:
        A `Step`. The fields of its state are `params` and `step_size`, the a of the last step.

    Raises:
        ValueError: a hyperparameter is out of range; (in the step) as `make_step`.
        TypeError: (in the step) the state is that of another step.

    Example:
        >>> step = gd.methods.polyak(lambda w, batch: 2 * w**2)
        >>> step(step.init(torch.tensor(1.0)), None, 1.0)
        (PolyakState(params=tensor(0.5000), step_size=tensor(0.1250)), tensor(2.))

    References:
        B. T. Polyak, "Introduction to optimization", 1987, section 5.3.
        N. Loizou et al., "Stochastic Polyak step-size for SGD: an adaptive learning rate for fast
        convergence", 2021.
    """
    minimum = check_scalar("minimum", minimum, "(-inf, inf)")
    if max_step is not None:
        max_step = check_scalar("max_step", max_step, "(0, inf)")
    gradients = batch_grad(loss_fn)

    def init(params: Tree) -> PolyakState:
        params = copy_params(params)
        return PolyakState(params, scalar(0.0, params))

    def advance(state: PolyakState, batch: Tree, lr: float | Tensor) -> tuple[PolyakState, Tensor, Tree]:
        params = state.params
        grads, loss = gradients(params, batch)
        norm = scalar(_tree.norm(grads), params)
        excess = (scalar(loss, params) - scalar(minimum, params)).clamp(min=0)
        # Two divisions, because the square of a small norm vanishes before the norm does.
        size = safe_ratio(safe_ratio(excess, norm), norm)
        if max_step is not None:
            size = torch.minimum(size, scalar(max_step, params))
        size = learning_rate(lr, params) * size
        return PolyakState(apply_updates(params, grads, size), size), loss, grads

    return Step(init, advance, PolyakState)
