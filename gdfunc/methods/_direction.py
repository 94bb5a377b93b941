"""Steps with a direction or a size of their own: SAM, line search and Polyak's."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _tree
from .._data import as_data
from .._errors import check_int, check_scalar, check_scalars
from .._gradients import LossFn, batch_grad
from .._numerics import Scalar, safe_ratio, widen
from .._scan import scan
from .._stateful import loss_of
from .._step import (
    Step,
    TrainState,
    apply_updates,
    copy_params,
    learning_rate,
    make_step,
    scalar,
    step_maker,
)
from .._transforms._base import PLAIN, GradientTransformation, check_transform
from .._tree import Tree


@step_maker
def sam(
    loss_fn: LossFn,
    transform: GradientTransformation = PLAIN,
    *,
    rho: Scalar = 0.05,
    adaptive: bool = False,
) -> Step:
    """Make the step of sharpness-aware minimisation, which takes its gradient a little uphill.

    ε = ρ·g/‖g‖ with g = ∇L(θ);  u, s' = update(∇L(θ + ε), s, θ);  θ' = θ − lr·u

    The adaptive form measures the distance uphill in units of each parameter: ε = ρ·θ²g/‖θg‖, entry by
    entry. Where the gradient is zero, ε = 0.

    Args:
        loss_fn: `(params, batch) -> loss`; see `batch_grad`. It is differentiated twice a step.
        transform: what to do with the gradient found uphill.
        rho: ρ, how far uphill, a number >= 0 or a 0-d tensor.
        adaptive: whether to use the adaptive form.

    Returns:
        A `Step`, whose state is a `TrainState`. The loss, and the gradient norm that `train` records, are
        those at θ.

    Raises:
        ValueError: rho is out of range; (in the step) as `make_step`.
        TypeError: (in the step) the state is that of another step.

    Example:
        >>> step = gd.methods.sam(lambda w, batch: 0.5 * w**2, rho=0.5)
        >>> step(step.init(torch.tensor(1.0)), None, 0.1)
        (TrainState(params=tensor(0.8500), opt_state=()), tensor(0.5000))

    References:
        P. Foret et al., "Sharpness-aware minimization for efficiently improving generalization", 2021.
        J. Kwon et al., "ASAM: adaptive sharpness-aware minimization for scale-invariant learning of deep
        neural networks", 2021.
    """
    rho = check_scalar("rho", rho, "[0, inf)")
    gradients = batch_grad(loss_fn)

    def advance(state: TrainState, batch: Tree, lr: Scalar) -> tuple[TrainState, Tensor, Tree]:
        params, opt_state = state
        grads, loss = gradients(params, batch)
        uphill, length = grads, _tree.norm(grads)
        if adaptive:
            uphill = _tree.map(lambda p, g: p**2 * g, params, grads)
            length = _tree.norm(_tree.map(lambda p, g: p * g, params, grads))
        away = safe_ratio(scalar(rho, params), length)
        uphill_grads, _ = gradients(apply_updates(params, uphill, -away), batch)
        updates, opt_state = transform.update(uphill_grads, opt_state, params)
        return TrainState(apply_updates(params, updates, lr), opt_state), loss, grads

    return Step(make_step(loss_fn, transform).init, advance, TrainState)


class LineSearchState(NamedTuple):
    """Parameters, the transformation's memory, and the step size that was accepted last."""

    params: Tree
    opt_state: Any
    step_size: Tensor


@step_maker
def line_search(
    loss_fn: LossFn,
    transform: GradientTransformation = PLAIN,
    *,
    decrease: Scalar = 1e-4,
    factor: Scalar = 0.5,
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
    decrease, factor = check_scalars("(0, 1)", decrease=decrease, factor=factor)
    max_steps = check_int("max_steps", max_steps, 0)
    gradients = batch_grad(loss_fn)

    def init(params: Tree) -> LineSearchState:
        params = copy_params(params)
        return LineSearchState(params, transform.init(params), scalar(0.0, params))

    def advance(state: LineSearchState, batch: Tree, lr: Scalar) -> tuple[LineSearchState, Tensor, Tree]:
        batch, params = as_data(batch, "batch"), state.params
        grads, value = gradients(params, batch)
        loss = loss_of(value)
        updates, opt_state = transform.update(grads, state.opt_state, params)
        longest = learning_rate(lr, params)
        slope = _tree.dot(_tree.map(widen, grads), _tree.map(widen, updates))

        def try_one(sizes: tuple[Tensor, Tensor], _: None) -> tuple[tuple[Tensor, Tensor], None]:
            accepted, size = sizes
            trial = loss_of(loss_fn(apply_updates(params, updates, size), batch))
            enough = (slope > 0) & (trial <= loss - scalar(decrease, params) * size * slope)
            accepted = torch.where((accepted == 0) & enough, size, accepted)
            return (accepted, size * scalar(factor, params)), None

        (size, _), _ = scan(try_one, (torch.zeros_like(longest), longest), length=max_steps + 1)
        # A selection, because θ − 0·u is NaN for an infinite u.
        params = _tree.where(size > 0, apply_updates(params, updates, size), params)
        return LineSearchState(params, opt_state, size), value, grads

    return Step(init, advance, LineSearchState, judges_params=True)


class PolyakState(NamedTuple):
    """Parameters, and the size of the last step."""

    params: Tree
    step_size: Tensor


@step_maker
def polyak(loss_fn: LossFn, minimum: Scalar = 0.0, *, max_step: Scalar | None = None) -> Step:
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

    def advance(state: PolyakState, batch: Tree, lr: Scalar) -> tuple[PolyakState, Tensor, Tree]:
        params = state.params
        grads, value = gradients(params, batch)
        norm = scalar(_tree.norm(grads), params)
        excess = (scalar(loss_of(value), params) - scalar(minimum, params)).clamp(min=0)
        # Two divisions, because the square of a small norm vanishes before the norm does.
        size = safe_ratio(safe_ratio(excess, norm), norm)
        if max_step is not None:
            size = torch.minimum(size, scalar(max_step, params))
        size = learning_rate(lr, params) * size
        return PolyakState(apply_updates(params, grads, size), size), value, grads

    return Step(init, advance, PolyakState)
