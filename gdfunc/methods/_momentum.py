"""Steps with momentum of the position: heavy ball, Nesterov's method, OGM and triple momentum."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _tree
from .._errors import check_int, check_scalar
from .._gradients import LossFn
from .._numerics import Scalar, like
from .._step import Step, apply_updates, gradient_step, scalar, step_maker
from .._transforms._base import no_steps, zeros
from .._tree import Tree


class HeavyBallState(NamedTuple):
    """The position of the ball, and its last displacement."""

    params: Tree
    displacement: Tree  # θₜ − θₜ₋₁


@step_maker
def heavy_ball(loss_fn: LossFn, momentum: Scalar) -> Step:
    """Make the step of Polyak's heavy ball, which repeats a share of its last displacement.

    θₜ₊₁ = θₜ − lr·∇L(θₜ) + β·(θₜ − θₜ₋₁)

    For a constant lr this equals torch's momentum, θ − lr·v with v = β·v + g. They differ when lr
    changes: torch's memory is rescaled by the new lr, whereas a displacement stays what it was.

    Args:
        loss_fn: `(params, batch) -> loss`; see `batch_grad`.
        momentum: β, a number in [0, 1) or a 0-d tensor.

    Returns:
        A `Step`. The fields of its state are `params` and `displacement`.

    Raises:
        ValueError: momentum is out of range; (in the step) as `make_step`.
        TypeError: (in the step) the state is that of another step.

    Example:
        >>> step = gd.methods.heavy_ball(lambda w, batch: 0.5 * w**2, 0.5)
        >>> state = step.init(torch.tensor(1.0))
        >>> for _ in range(2):
        ...     state, loss = step(state, None, 0.5)
        >>> state
        HeavyBallState(params=tensor(0.), displacement=tensor(-0.5000))

    References:
        B. T. Polyak, "Some methods of speeding up the convergence of iteration methods", 1964.
    """
    momentum = check_scalar("momentum", momentum, "[0, 1)")

    def begin(params: Tree) -> HeavyBallState:
        return HeavyBallState(params, zeros(params))

    def move(state: HeavyBallState, grads: Tree, lr: Scalar) -> HeavyBallState:
        kept = _tree.map(lambda d: like(momentum, d) * d, state.displacement)
        displacement = apply_updates(kept, grads, lr)
        params = _tree.map(lambda p, d: p + d, state.params, displacement)
        return HeavyBallState(params, displacement)

    return gradient_step(loss_fn, HeavyBallState, begin, move)


class NesterovState(NamedTuple):
    """The look-ahead point, the position behind it, and the number of steps."""

    params: Tree  # y, where the gradient is taken
    position: Tree  # x
    count: Tensor  # type: ignore[assignment]  # hides a method that tuples have


@step_maker
def nesterov(loss_fn: LossFn, momentum: Scalar | Callable[[Tensor], Scalar] | None = None) -> Step:
    """Make the step of Nesterov's accelerated gradient method.

    xₜ = yₜ₋₁ − lr·∇L(yₜ₋₁);  yₜ = xₜ + βₜ·(xₜ − xₜ₋₁)

    The position moves with βₜ₋₁ and the look-ahead with βₜ. `gd.momentum(nesterov=True)` is torch's
    variant, which uses one β for both. The two are equal while β is constant.

    For convex losses with lr = 1/L, the default momentum gives
    f(x_N) − f* ≤ 2·L·‖x₀ − x*‖²/(N² + 5·N + 6). For μ-strongly convex losses use
    β = (1 − q)/(1 + q) with q = √(μ/L).

    Args:
        loss_fn: `(params, batch) -> loss`; see `batch_grad`.
        momentum: β, a number in [0, 1) or a 0-d tensor; or a function of t = 1, 2, …, a 0-d int64 tensor;
            None: βₜ = (t − 1)/(t + 2).

    Returns:
        A `Step`. The fields of its state are `params` (y, where the loss is measured), `position` (x) and
        `count`. The result of a run is `position`.

    Raises:
        ValueError: momentum is out of range; (in the step) as `make_step`.
        TypeError: (in the step) the state is that of another step.

    Example:
        >>> step = gd.methods.nesterov(lambda w, batch: 0.5 * w**2, 0.5)
        >>> state = step.init(torch.tensor(1.0))
        >>> for _ in range(2):
        ...     state, loss = step(state, None, 0.5)
        >>> state.params, state.position
        (tensor(-0.0625), tensor(0.1250))

    References:
        Yu. Nesterov, "A method for solving the convex programming problem with convergence rate O(1/k²)",
        1983. W. Su, S. Boyd, E. Candès, "A differential equation for modeling Nesterov's accelerated
        gradient method", 2016.
    """
    if momentum is not None and not callable(momentum):
        momentum = check_scalar("momentum", momentum, "[0, 1)")

    def beta_of(count: Tensor, params: Tree) -> Tensor:
        if momentum is None:
            t = scalar(count, params)
            return (t - 1) / (t + 2)
        return scalar(momentum(count) if callable(momentum) else momentum, params)

    def begin(params: Tree) -> NesterovState:
        return NesterovState(params, _tree.clone(params), no_steps(params))

    def move(state: NesterovState, grads: Tree, lr: Scalar) -> NesterovState:
        count = state.count + 1
        position = apply_updates(state.params, grads, lr)
        params = _beyond(state.position, position, beta_of(count, position))
        return NesterovState(params, position, count)

    return gradient_step(loss_fn, NesterovState, begin, move)


class OGMState(NamedTuple):
    """The point where the gradient is taken, the last gradient step, θ, and the number of steps."""

    params: Tree  # x
    position: Tree  # y
    theta: Tensor
    count: Tensor  # type: ignore[assignment]  # hides a method that tuples have


@step_maker
def ogm(loss_fn: LossFn, steps: int | None = None) -> Step:
    """Make the step of the optimized gradient method, the best that there is for N steps on convex losses.

    yₜ = xₜ₋₁ − lr·∇L(xₜ₋₁);  xₜ = yₜ + (θₜ₋₁ − 1)/θₜ·(yₜ − yₜ₋₁) + θₜ₋₁/θₜ·(yₜ − xₜ₋₁)
    θₜ = (1 + √(1 + 4·θₜ₋₁²))/2 with θ₀ = 1, but in the last step θ_N = (1 + √(1 + 8·θ_{N−1}²))/2

    With lr = 1/L,  f(x_N) − f* ≤ L·‖x₀ − x*‖²/(2·θ_N²), about half of Nesterov's bound. No first-order
    method has a smaller one in high dimensions.

    Args:
        loss_fn: `(params, batch) -> loss`; see `batch_grad`.
        steps: N, an int >= 1, for which x_N has the bound; None: no step is the last, and y has one.

    Returns:
        A `Step`. The fields of its state are `params` (x, where the loss is measured), `position` (y),
        `theta` and `count`. The result of a run of N steps is `params`.

    Raises:
        ValueError: steps is out of range; (in the step) as `make_step`.
        TypeError: (in the step) the state is that of another step.

    Example:
        >>> step = gd.methods.ogm(lambda w, batch: 0.5 * w**2, steps=1)
        >>> state, loss = step(step.init(torch.tensor(1.0)), None, 0.5)
        >>> state.params, state.theta
        (tensor(0.2500), tensor(2.))

    References:
        D. Kim, J. A. Fessler, "Optimized first-order methods for smooth convex minimization", 2016.
        Y. Drori, "The exact information-based complexity of smooth convex minimization", 2017.
    """
    last = None if steps is None else check_int("steps", steps, 1)

    def begin(params: Tree) -> OGMState:
        return OGMState(params, _tree.clone(params), scalar(1.0, params), no_steps(params))

    def move(state: OGMState, grads: Tree, lr: Scalar) -> OGMState:
        count, old = state.count + 1, state.theta
        factor = torch.where(count == last, 8.0, 4.0) if last else 4.0
        theta = (1 + (1 + factor * old**2).sqrt()) / 2
        theta = theta.to(old.dtype)
        position = apply_updates(state.params, grads, lr)
        params = _beyond(state.position, position, (old - 1) / theta)
        params = apply_updates(params, grads, old / theta * scalar(lr, params))
        return OGMState(params, position, theta, count)

    return gradient_step(loss_fn, OGMState, begin, move)


class TripleMomentumState(NamedTuple):
    """The point where the gradient is taken, the answer, and the sequence that both are read from."""

    params: Tree  # y
    position: Tree  # x
    base: Tree  # ξ
    displacement: Tree  # ξₜ − ξₜ₋₁


@step_maker
def triple_momentum(loss_fn: LossFn, condition_number: Scalar) -> Step:
    """Make the step of the triple momentum method, for μ-strongly convex losses.

    ξₜ = ξₜ₋₁ + β·(ξₜ₋₁ − ξₜ₋₂) − lr·∇L(yₜ₋₁)
    yₜ = ξₜ + γ·(ξₜ − ξₜ₋₁);  xₜ = ξₜ + δ·(ξₜ − ξₜ₋₁)
    ρ = 1 − 1/√κ,  β = ρ²/(2 − ρ),  γ = ρ²/((1 + ρ)·(2 − ρ)),  δ = ρ²/(1 − ρ²)

    With lr = (1 + ρ)/L the error falls by ρ a step, where Nesterov's method has √(1 − 1/√κ):
    f(x_N) − f* ≤ ρ^(2·N)·L·κ/2·‖x₀ − x*‖².

    Args:
        loss_fn: `(params, batch) -> loss`; see `batch_grad`.
        condition_number: κ = L/μ, a number in [1, inf) or a 0-d tensor.

    Returns:
        A `Step`. The fields of its state are `params` (y, where the loss is measured), `position` (x),
        `base` (ξ) and `displacement` (of ξ). The result of a run is `position`.

    Raises:
        ValueError: condition_number is out of range; (in the step) as `make_step`.
        TypeError: (in the step) the state is that of another step.

    Example:
        >>> step = gd.methods.triple_momentum(lambda w, batch: 0.5 * w**2, 4.0)  # ρ = ½, δ = ⅓
        >>> state, loss = step(step.init(torch.tensor(1.0)), None, 1.5)
        >>> state.base, state.position
        (tensor(-0.5000), tensor(-1.))

    References:
        B. Van Scoy, R. A. Freeman, K. M. Lynch, "The fastest known globally convergent first-order method
        for minimizing strongly convex functions", 2018.
    """
    condition_number = check_scalar("condition_number", condition_number, "[1, inf)")

    def begin(params: Tree) -> TripleMomentumState:
        return TripleMomentumState(params, _tree.clone(params), _tree.clone(params), zeros(params))

    def move(state: TripleMomentumState, grads: Tree, lr: Scalar) -> TripleMomentumState:
        rho = 1 - scalar(condition_number, state.params) ** -0.5
        beta, gamma = rho**2 / (2 - rho), rho**2 / ((1 + rho) * (2 - rho))
        kept = _tree.map(lambda d: like(beta, d) * d, state.displacement)
        displacement = apply_updates(kept, grads, lr)
        base = _tree.map(lambda x, d: x + d, state.base, displacement)
        params, position = (
            _tree.map(lambda x, d, share=share: x + like(share, d) * d, base, displacement)
            for share in (gamma, rho**2 / (1 - rho**2))
        )
        return TripleMomentumState(params, position, base, displacement)

    return gradient_step(loss_fn, TripleMomentumState, begin, move)


def _beyond(start: Tree, end: Tree, share: Tensor) -> Tree:
    """Go on past `end` by a share of the way from `start`."""
    return _tree.map(lambda a, b: b + like(share, b) * (b - a), start, end)
