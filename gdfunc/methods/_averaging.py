"""Steps that keep a second, slower copy of the parameters."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _tree
from .._errors import check_int, check_scalar, check_scalars
from .._gradients import LossFn
from .._inputs import kind
from .._numerics import Scalar, like, safe_ratio
from .._step import (
    Step,
    StepLike,
    apply_updates,
    as_step,
    gradient_step,
    learning_rate,
    params_of,
    scalar,
    step_around,
    step_maker,
)
from .._transforms._base import PLAIN, GradientTransformation, check_transform, no_steps
from .._tree import Tree


class ASGDState(NamedTuple):
    """The iterate, its average, and what the next step will use."""

    params: Tree
    average: Tree
    eta: Tensor  # the step size
    mu: Tensor  # the share of the new iterate in the average
    count: Tensor  # type: ignore[assignment]  # hides a method that tuples have


@step_maker
def asgd(
    loss_fn: LossFn,
    lambd: Scalar = 1e-4,
    alpha: Scalar = 0.75,
    t0: Scalar = 1e6,
    weight_decay: Scalar = 0.0,
) -> Step:
    """Make the step of averaged stochastic gradient descent, as `torch.optim.ASGD` does it.

    θₜ = (1 − λ·ηₜ)·θₜ₋₁ − ηₜ·(∇L(θₜ₋₁) + wd·θₜ₋₁);  aₜ = aₜ₋₁ + μₜ·(θₜ − aₜ₋₁)
    ηₜ₊₁ = lrₜ / (1 + λ·lrₜ·t)^α;  μₜ₊₁ = 1 / max(1, t − t₀);  η₁ = lr₁, μ₁ = 1

    Each step sets the size of the next, as in torch, so that a change of lr acts one step late.

    Args:
        loss_fn: `(params, batch) -> loss`; see `batch_grad`.
        lambd: λ, the decay of parameters and step size, a number >= 0 or a 0-d tensor.
        alpha: α, the power of the step size's decay, a number >= 0 or a 0-d tensor.
        t0: t₀, the step after which to average, a number >= 0 or a 0-d tensor. Under the default, which is
            torch's, the average of a shorter run is its last iterate.
        weight_decay: wd, a number >= 0 or a 0-d tensor.

    Returns:
        A `Step`. The fields of its state are `params`, `average`, `eta`, `mu` and `count`. The result of a
        run is `average`.

    Raises:
        ValueError: a hyperparameter is out of range; (in the step) as `make_step`.
        TypeError: (in the step) the state is that of another step.

    Example:
        >>> step = gd.methods.asgd(lambda w, batch: 0.5 * w**2, lambd=0.0, t0=0.0)
        >>> state = step.init(torch.tensor(4.0))
        >>> for _ in range(3):
        ...     state, loss = step(state, None, 0.5)
        >>> state.params, state.average
        (tensor(0.5000), tensor(0.7500))

    References:
        B. T. Polyak, A. B. Juditsky, "Acceleration of stochastic approximation by averaging", 1992.
    """
    scalars = {"lambd": lambd, "alpha": alpha, "t0": t0, "weight_decay": weight_decay}
    lambd, alpha, t0, weight_decay = check_scalars("[0, inf)", **scalars)

    def begin(params: Tree) -> ASGDState:
        eta, mu = scalar(0.0, params), scalar(1.0, params)
        return ASGDState(params, _tree.clone(params), eta, mu, no_steps(params))

    def move(state: ASGDState, grads: Tree, lr: Scalar) -> ASGDState:
        lr = learning_rate(lr, state.params)
        eta = torch.where(state.count == 0, lr, state.eta)
        updates = _tree.map(lambda g, p: g + like(weight_decay, p) * p, grads, state.params)
        shrink = 1 - scalar(lambd, lr) * eta
        params = apply_updates(_tree.map(lambda p: like(shrink, p) * p, state.params), updates, eta)
        average = _tree.lerp(state.average, params, state.mu)
        count = state.count + 1
        t = count.to(lr.dtype)
        eta = lr / (1 + scalar(lambd, lr) * lr * t) ** scalar(alpha, lr)
        mu = 1 / (t - scalar(t0, lr)).clamp(min=1)
        return ASGDState(params, average, eta, mu, count)

    return gradient_step(loss_fn, ASGDState, begin, move)


class ScheduleFreeState(NamedTuple):
    """The three sequences of schedule-free learning: y, z and x."""

    params: Tree  # y, where the gradient is taken
    z: Tree
    average: Tree  # x
    weight: Tensor  # Σ lr²
    opt_state: Any


@step_maker
def schedule_free(
    loss_fn: LossFn,
    transform: GradientTransformation = PLAIN,
    *,
    beta: Scalar = 0.9,
    weight_decay: Scalar = 0.0,
) -> Step:
    """Make the step of schedule-free learning, whose averaging stands in for a decay of lr.

    yₜ = (1 − β)·zₜ + β·xₜ;  uₜ, sₜ₊₁ = update(∇L(yₜ), sₜ, yₜ)
    zₜ₊₁ = zₜ − lrₜ·(uₜ + wd·yₜ);  xₜ₊₁ = (1 − c)·xₜ + c·zₜ₊₁ with c = lrₜ²/Σ lr²

    With β = 0 this is the plain step and its running average. With β = 1 the gradient is taken at the
    average.

    Args:
        loss_fn: `(params, batch) -> loss`; see `batch_grad`.
        transform: what to do with the gradient.
        beta: β, a number in [0, 1] or a 0-d tensor.
        weight_decay: wd, a number >= 0 or a 0-d tensor.

    Returns:
        A `Step`. The fields of its state are `params` (y, where the loss is measured), `z`, `average` (x),
        `weight` and `opt_state`. The result of a run is `average`.

    Raises:
        ValueError: a hyperparameter is out of range; (in the step) as `make_step`.
        TypeError: (in the step) the state is that of another step.

    Example:
        >>> step = gd.methods.schedule_free(lambda w, batch: 0.5 * w**2, beta=0.5)
        >>> state = step.init(torch.tensor(4.0))
        >>> for _ in range(2):
        ...     state, loss = step(state, None, 0.5)
        >>> state.params, state.z, state.average
        (tensor(1.2500), tensor(1.), tensor(1.5000))

    References:
        A. Defazio et al., "The road less scheduled", 2024.
    """
    check_transform(transform)
    beta = check_scalar("beta", beta, "[0, 1]")
    weight_decay = check_scalar("weight_decay", weight_decay, "[0, inf)")

    def begin(params: Tree) -> ScheduleFreeState:
        z, average = _tree.clone(params), _tree.clone(params)
        return ScheduleFreeState(params, z, average, scalar(0.0, params), transform.init(params))

    def move(state: ScheduleFreeState, grads: Tree, lr: Scalar) -> ScheduleFreeState:
        updates, opt_state = transform.update(grads, state.opt_state, state.params)
        updates = _tree.map(lambda u, y: u + like(weight_decay, y) * y, updates, state.params)
        z = apply_updates(state.z, updates, lr)
        squared_lr = learning_rate(lr, state.params) ** 2
        weight = state.weight + squared_lr
        average = _tree.lerp(state.average, z, safe_ratio(squared_lr, weight))
        return ScheduleFreeState(_tree.lerp(z, average, beta), z, average, weight, opt_state)

    return replace(gradient_step(loss_fn, ScheduleFreeState, begin, move), computes_params=True)


class EMAState(NamedTuple):
    """The carry of a step, and the moving average of its parameters."""

    carry: Any
    average: Tree
    count: Tensor  # type: ignore[assignment]  # hides a method that tuples have

    @property
    def params(self) -> Tree:
        """Return the parameters in the carry."""
        return params_of(self.carry)


@step_maker
def ema(step: StepLike, decay: Scalar, *, debias: bool = False) -> Step:
    """Keep an exponential moving average of the parameters of a step, without changing the step.

    aₜ = d·aₜ₋₁ + (1 − d)·θₜ with a₀ = θ₀

    With `debias` the weights of θ₁ … θₜ add up to one and θ₀ has none:
    aₜ = aₜ₋₁ + (1 − d)/(1 − dᵗ)·(θₜ − aₜ₋₁).

    Args:
        step: a `Step`, or a function `(carry, batch, lr) -> (carry, loss)`.
        decay: d, a number in [0, 1) or a 0-d tensor.
        debias: whether to forget θ₀.

    Returns:
        A `Step`, whose `init` takes parameters, or for a function its first carry. The fields of its state
        are `carry`, `average` and `count`; its `params` are the carry's. The result of a run is `average`.

    Raises:
        ValueError: decay is out of range; (in the step) as the step inside.
        TypeError: (in the step) the state is that of another step; (in init) the carry of a function has
            neither a field params nor float leaves alone.

    Example:
        >>> step = gd.methods.ema(gd.make_step(lambda w, batch: 0.5 * w**2), 0.5)
        >>> state = step.init(torch.tensor(4.0))
        >>> for _ in range(2):
        ...     state, loss = step(state, None, 0.5)
        >>> state.params, state.average
        (tensor(1.), tensor(2.))

    References:
        D. Ruppert, "Efficient estimations from a slowly convergent Robbins-Monro process", 1988.
    """
    decay = check_scalar("decay", decay, "[0, 1)")

    def follow(state: EMAState, carry: Any) -> EMAState:
        params, count = params_of(carry), state.count + 1
        d = scalar(decay, params)
        share = (1 - d) / (1 - d ** count.to(d.dtype)) if debias else 1 - d
        return EMAState(carry, _tree.lerp(state.average, params, share), count)

    return _around(step, EMAState, follow)


class LookaheadState(NamedTuple):
    """The carry of a step, with the fast weights, and the slow weights."""

    carry: Any
    slow: Tree
    count: Tensor  # type: ignore[assignment]  # hides a method that tuples have

    @property
    def params(self) -> Tree:
        """Return the parameters in the carry: the fast weights."""
        return params_of(self.carry)


@step_maker
def lookahead(step: StepLike, k: int, alpha: Scalar = 0.5) -> Step:
    """Let a step run ahead for k steps, then go part of the way and start again from there.

    every k steps:  φ' = φ + α·(θ − φ),  θ' = φ'

    The rest of the step's carry, such as a transformation's memory, stays what it is.

    Args:
        step: a `Step`, or a function `(carry, batch, lr) -> (carry, loss)`, whose carry is the parameters
            or a NamedTuple with a field `params`.
        k: how many steps ahead, an int >= 1.
        alpha: α, a number in [0, 1] or a 0-d tensor.

    Returns:
        A `Step`, whose `init` takes parameters, or for a function its first carry. The fields of its state
        are `carry`, `slow` and `count`; its `params` are the carry's, the fast weights θ. The result of a
        run is `slow`.

    Raises:
        ValueError: k or alpha is out of range; (in the step) as the step inside.
        TypeError: the step computes its parameters from other fields of its state, as `schedule_free` does;
            (in the step) the state is that of another step, or the carry has no field `params` that could
            be replaced.

    Example:
        >>> step = gd.methods.lookahead(gd.make_step(lambda w, batch: 0.5 * w**2), k=2)
        >>> state = step.init(torch.tensor(4.0))
        >>> for _ in range(2):
        ...     state, loss = step(state, None, 0.5)
        >>> state.params, state.slow
        (tensor(2.5000), tensor(2.5000))

    References:
        M. Zhang, J. Lucas, G. Hinton, J. Ba, "Lookahead optimizer: k steps forward, 1 step back", 2019.
    """
    k = check_int("k", k, 1)
    alpha = check_scalar("alpha", alpha, "[0, 1]")

    def follow(state: LookaheadState, carry: Any) -> LookaheadState:
        fast, count = params_of(carry), state.count + 1
        meet = count % k == 0
        slow = _tree.where(meet, _tree.lerp(state.slow, fast, alpha), state.slow)
        return LookaheadState(replace_params(carry, _tree.where(meet, slow, fast)), slow, count)

    return _around(as_movable(step, "lookahead"), LookaheadState, follow)


def as_movable(step: StepLike, name: str) -> Step:
    """Make a step of a function, and refuse one whose parameters another step cannot change."""
    inner = as_step(step)
    if inner.computes_params:
        raise TypeError(
            f"{name} changes the parameters, but {inner!r} computes them from other fields of its state, "
            f"which would forget the change; use {name} with another step, such as gd.make_step(loss_fn)"
        )
    return inner


def replace_params(carry: Any, params: Tree) -> Any:
    """Replace the parameters in a step's carry, and leave the rest of it."""
    fields = getattr(carry, "_fields", ())
    if not hasattr(carry, "params"):
        return params
    if "params" in fields:
        return carry._replace(params=params)
    if "carry" in fields:  # of a step inside, whose params these are
        return carry._replace(carry=replace_params(carry.carry, params))
    raise TypeError(
        f"the carry is {type(carry).__name__}, whose params cannot be replaced; make it a NamedTuple "
        f"with a field params"
    )


def _around(step: StepLike, state: type, follow: Callable[[Any, Any], Any]) -> Step:
    """Wrap a step: its carry, a slower copy of the parameters, and a count are the state.

    `follow(state, carry)` makes the next state from the step's new carry.
    """
    inner = as_step(step)

    def init(*first: Any, **state_of_loss: Any) -> Any:
        carry = inner.init(*first, **state_of_loss)
        averaged = _averaged(carry)
        return state(carry, _tree.clone(averaged), no_steps(averaged))

    def advance(state: Any, batch: Tree, lr: Scalar) -> tuple[Any, Any, Tree]:
        inner.check(state.carry)
        carry, loss, grads = inner.advance(state.carry, batch, lr)
        return follow(state, carry), loss, grads

    return step_around(inner, init, advance, state)


def _averaged(carry: Any) -> Tree:
    """Find the parameters in a carry, of which an average can be taken."""
    params = params_of(carry)
    for path, leaf in _tree.named_leaves(params, "carry"):
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            raise TypeError(
                f"{path} is {kind(leaf)}, which has no average; make the carry a NamedTuple with the "
                f"parameters in its field params"
            )
    return params
