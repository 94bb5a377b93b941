"""Methods that keep a second, slower copy of the parameters."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .. import _tree
from .._errors import check_int, check_scalar
from .._gradients import LossFn, batch_grad
from .._step import Step, apply_updates, params_of
from .._transforms import GradientTransformation, chain, check_transform, no_steps
from .._tree import Tree
from ._method import (
    Method,
    as_method,
    blend,
    check_state,
    learning_rate,
    like,
    own,
    safe_ratio,
    scalar,
)

_IDENTITY = chain()


class ASGDState(NamedTuple):
    """The iterate, its average, and what the next step will use."""

    params: Tree
    average: Tree
    eta: Tensor  # the step size
    mu: Tensor  # the share of the new iterate in the average
    count: Tensor  # type: ignore[assignment]  # hides a method that tuples have


def make_asgd_step(
    loss_fn: LossFn,
    lambd: float | Tensor = 1e-4,
    alpha: float | Tensor = 0.75,
    t0: float | Tensor = 1e6,
    weight_decay: float | Tensor = 0.0,
) -> Method:
    """Make the step of averaged stochastic gradient descent, as `torch.optim.ASGD` does it.

    θₜ = (1 − λ·ηₜ)·θₜ₋₁ − ηₜ·(∇L(θₜ₋₁) + wd·θₜ₋₁);  aₜ = aₜ₋₁ + μₜ·(θₜ − aₜ₋₁)
    ηₜ₊₁ = lrₜ / (1 + λ·lrₜ·t)^α;  μₜ₊₁ = 1 / max(1, t − t₀);  η₁ = lr₁, μ₁ = 1

    A step sets the step size of the next, so that a change of lr acts one step late. That is torch's
    rule; for a constant lr it is of no matter.

    Args:
        loss_fn: `(params, batch) -> loss`; see `batch_grad`.
        lambd: λ, the decay of parameters and step size, a number >= 0 or a 0-d tensor.
        alpha: α, the power of the step size's decay, a number >= 0 or a 0-d tensor.
        t0: t₀, the step after which to average, a number >= 0 or a 0-d tensor; the default is torch's,
            under which a shorter run has no average but the last iterate.
        weight_decay: wd, a number >= 0 or a 0-d tensor.

    Returns:
        `step(state, batch, lr) -> (state, loss)`, with `step.init(params)` for the first state; its
        fields are `params`, `average`, `eta`, `mu` and `count`. The result of a run is `average`.

    Raises:
        ValueError: a hyperparameter is out of range; (in the step) as `make_step`.
        TypeError: (in the step) the state is that of another method.

    Example:
        >>> step = gd.make_asgd_step(lambda w, batch: 0.5 * w**2, lambd=0.0, t0=0.0)
        >>> state = step.init(torch.tensor(4.0))
        >>> for _ in range(3):
        ...     state, loss = step(state, None, 0.5)
        >>> state.params, state.average
        (tensor(0.5000), tensor(0.7500))

    References:
        B. T. Polyak, A. B. Juditsky, "Acceleration of stochastic approximation by averaging", 1992.
    """
    lambd = check_scalar("lambd", lambd, "[0, inf)")
    alpha = check_scalar("alpha", alpha, "[0, inf)")
    t0 = check_scalar("t0", t0, "[0, inf)")
    weight_decay = check_scalar("weight_decay", weight_decay, "[0, inf)")
    gradients = batch_grad(loss_fn)

    def init(params: Tree) -> ASGDState:
        eta, mu = scalar(0.0, params), scalar(1.0, params)
        return ASGDState(params, _tree.clone(params), eta, mu, no_steps(params))

    def step(state: ASGDState, batch: Tree, lr: float | Tensor) -> tuple[ASGDState, Tensor, Tree]:
        grads, loss = gradients(state.params, batch)
        lr = learning_rate(lr, state.params)
        eta = torch.where(state.count == 0, lr, state.eta)
        updates = _tree.map(lambda g, p: g + like(weight_decay, p) * p, grads, state.params)
        shrink = 1 - scalar(lambd, lr) * eta
        params = apply_updates(_tree.map(lambda p: like(shrink, p) * p, state.params), updates, eta)
        average = blend(state.average, params, state.mu)
        count = state.count + 1
        t = count.to(lr.dtype)
        eta = lr / (1 + scalar(lambd, lr) * lr * t) ** scalar(alpha, lr)
        mu = 1 / (t - scalar(t0, lr)).clamp(min=1)
        return ASGDState(params, average, eta, mu, count), loss, grads

    return as_method(ASGDState, init, step)


class ScheduleFreeState(NamedTuple):
    """The three sequences of schedule-free learning: y, z and x."""

    params: Tree  # y, where the gradient is taken
    z: Tree
    average: Tree  # x
    weight: Tensor  # Σ lr²
    opt_state: Any


def make_schedule_free_step(
    loss_fn: LossFn,
    transform: GradientTransformation = _IDENTITY,
    *,
    beta: float | Tensor = 0.9,
    weight_decay: float | Tensor = 0.0,
) -> Method:
    """Make the step of schedule-free learning, whose averaging stands in for a decay of lr.

    yₜ = (1 − β)·zₜ + β·xₜ;  uₜ, sₜ₊₁ = update(∇L(yₜ), sₜ, yₜ)
    zₜ₊₁ = zₜ − lrₜ·(uₜ + wd·yₜ);  xₜ₊₁ = (1 − c)·xₜ + c·zₜ₊₁ with c = lrₜ²/Σ lr²

    With β = 0 this is the plain step and its running average, with β = 1 the gradient is taken at the
    average itself.

    Args:
        loss_fn: `(params, batch) -> loss`; see `batch_grad`.
        transform: what to do with the gradient.
        beta: β, a number in [0, 1] or a 0-d tensor.
        weight_decay: wd, a number >= 0 or a 0-d tensor.

    Returns:
        `step(state, batch, lr) -> (state, loss)`, with `step.init(params)` for the first state; its
        fields are `params` (y, where the loss is measured), `z`, `average` (x), `weight` and
        `opt_state`. The result of a run is `average`.

    Raises:
        ValueError: a hyperparameter is out of range; (in the step) as `make_step`.
        TypeError: (in the step) the state is that of another method.

    Example:
        >>> step = gd.make_schedule_free_step(lambda w, batch: 0.5 * w**2, beta=0.5)
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
    gradients = batch_grad(loss_fn)

    def init(params: Tree) -> ScheduleFreeState:
        z, average = _tree.clone(params), _tree.clone(params)
        return ScheduleFreeState(params, z, average, scalar(0.0, params), transform.init(params))

    def step(
        state: ScheduleFreeState, batch: Tree, lr: float | Tensor
    ) -> tuple[ScheduleFreeState, Tensor, Tree]:
        grads, loss = gradients(state.params, batch)
        updates, opt_state = transform.update(grads, state.opt_state, state.params)
        updates = _tree.map(lambda u, y: u + like(weight_decay, y) * y, updates, state.params)
        z = apply_updates(state.z, updates, lr)
        own_weight = learning_rate(lr, state.params) ** 2
        weight = state.weight + own_weight
        average = blend(state.average, z, safe_ratio(own_weight, weight))
        return ScheduleFreeState(blend(z, average, beta), z, average, weight, opt_state), loss, grads

    return as_method(ScheduleFreeState, init, step)


class EMAState(NamedTuple):
    """The carry of a step, and the moving average of its parameters."""

    carry: Any
    average: Tree
    count: Tensor  # type: ignore[assignment]  # hides a method that tuples have

    @property
    def params(self) -> Tree:
        """The parameters in the carry."""
        return params_of(self.carry)


def ema(step: Step, decay: float | Tensor, *, debias: bool = False) -> Method:
    """Keep an exponential moving average of the parameters beside a step, which goes on as it would.

    aₜ = d·aₜ₋₁ + (1 − d)·θₜ with a₀ = θ₀

    Without bias the weights of θ₁ … θₜ add up to one and θ₀ is forgotten:
    aₜ = aₜ₋₁ + (1 − d)/(1 − dᵗ)·(θₜ − aₜ₋₁).

    Args:
        step: any step, `(carry, batch, lr) -> (carry, loss)`.
        decay: d, a number in [0, 1) or a 0-d tensor.
        debias: whether to forget θ₀.

    Returns:
        `step(state, batch, lr) -> (state, loss)`, with `step.init(carry)` for the first state, where
        carry is what the step inside starts from. The state's fields are `carry`, `average` and
        `count`; its `params` are the carry's. The result of a run is `average`.

    Raises:
        ValueError: decay is out of range; (in the step) as the step inside.
        TypeError: (in the step) the state is that of another method.

    Example:
        >>> step = gd.ema(gd.make_step(lambda w, batch: 0.5 * w**2), 0.5)
        >>> state = step.init(torch.tensor(4.0))
        >>> for _ in range(2):
        ...     state, loss = step(state, None, 0.5)
        >>> state.params, state.average
        (tensor(1.), tensor(2.))

    References:
        D. Ruppert, "Efficient estimations from a slowly convergent Robbins-Monro process", 1988.
    """
    decay = check_scalar("decay", decay, "[0, 1)")

    def init(carry: Any) -> EMAState:
        params = params_of(carry)
        return EMAState(carry, _tree.clone(params), no_steps(params))

    def follow(state: EMAState, carry: Any) -> EMAState:
        params, count = params_of(carry), state.count + 1
        d = scalar(decay, params)
        share = (1 - d) / (1 - d ** count.to(d.dtype)) if debias else 1 - d
        return EMAState(carry, blend(state.average, params, share), count)

    return _around(step, EMAState, init, follow)


class LookaheadState(NamedTuple):
    """The carry of a step, with the fast weights, and the slow weights."""

    carry: Any
    slow: Tree
    count: Tensor  # type: ignore[assignment]  # hides a method that tuples have

    @property
    def params(self) -> Tree:
        """The parameters in the carry: the fast weights."""
        return params_of(self.carry)


def lookahead(step: Step, k: int, alpha: float | Tensor = 0.5) -> Method:
    """Let a step run ahead for k steps, then go a part of the way and start again from there.

    every k steps:  φ' = φ + α·(θ − φ),  θ' = φ'

    The rest of the step's carry, a transformation's memory for one, stays what it is. A step that
    computes its parameters from other fields (`make_schedule_free_step`) is not to be wrapped.

    Args:
        step: any step, `(carry, batch, lr) -> (carry, loss)`, whose carry is the parameters or a
            NamedTuple with a field `params`.
        k: how many steps ahead, an int >= 1.
        alpha: α, a number in [0, 1] or a 0-d tensor.

    Returns:
        `step(state, batch, lr) -> (state, loss)`, with `step.init(carry)` for the first state, where
        carry is what the step inside starts from. The state's fields are `carry`, `slow` and `count`;
        its `params` are the carry's, the fast weights θ. The result of a run is `slow`.

    Raises:
        ValueError: k or alpha is out of range; (in the step) as the step inside.
        TypeError: (in the step) the state is that of another method, or the carry has no field `params`
            that could be replaced.

    Example:
        >>> step = gd.lookahead(gd.make_step(lambda w, batch: 0.5 * w**2), k=2)
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

    def init(carry: Any) -> LookaheadState:
        params = params_of(carry)
        return LookaheadState(carry, _tree.clone(params), no_steps(params))

    def follow(state: LookaheadState, carry: Any) -> LookaheadState:
        fast, count = params_of(carry), state.count + 1
        meet = count % k == 0
        slow = _tree.where(meet, blend(state.slow, fast, alpha), state.slow)
        return LookaheadState(replace_params(carry, _tree.where(meet, slow, fast)), slow, count)

    return _around(step, LookaheadState, init, follow)


def replace_params(carry: Any, params: Tree) -> Any:
    """Put other parameters into a step's carry; the rest of it stays."""
    if not hasattr(carry, "params"):
        return params
    if isinstance(carry, EMAState | LookaheadState):
        return carry._replace(carry=replace_params(carry.carry, params))
    if "params" not in getattr(carry, "_fields", ()):
        raise TypeError(f"the carry {type(carry).__name__} is no NamedTuple with a field params to replace")
    return carry._replace(params=params)


def _around(
    step: Step, kind: type, init: Callable[[Any], Any], follow: Callable[[Any, Any], Any]
) -> Method:
    """Wrap a step: what follows it makes the new state of the old one and of the step's new carry."""

    def with_grads(state: Any, batch: Tree, lr: float | Tensor) -> tuple[Any, Tensor, Tree]:
        carry, loss, grads = step.with_grads(state.carry, batch, lr)  # type: ignore[attr-defined]
        return follow(state, carry), loss, grads

    if hasattr(step, "with_grads"):
        return as_method(kind, init, with_grads)

    def outer(state: Any, batch: Tree, lr: float | Tensor) -> tuple[Any, Any]:
        check_state(state, kind)
        carry, loss = step(state.carry, batch, lr)
        return follow(state, carry), loss

    method = cast(Method, outer)
    method.init = lambda carry: init(own(carry))
    return method
