"""L-BFGS with a search for Wolfe's conditions, one evaluation a step."""

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _tree
from .._errors import check_int, check_scalar, check_scalars
from .._gradients import LossFn, unchecked_grad
from .._inputs import check_inputs
from .._numerics import Scalar, norms, root, safe_ratio
from .._stateful import Evaluated, loss_of
from .._step import Step, apply_updates, check_lr, copy_params, learning_rate, scalar, step_maker
from .._transforms._lbfgs import LBFGSState, direction, remember
from .._transforms._lbfgs import lbfgs as lbfgs_transform
from .._tree import Tree

# How a search ended: the values of `status`.
UNFINISHED, WOLFE, LOWER, AT_REST, STUCK = range(5)
_UNRESOLVED = 64  # roundings of the loss: a smaller difference may have either sign
_NONE = -1.0  # the size of the bracket's far end while there is none
_INSIDE, _BEYOND = (0.1, 0.9), (-4.0, -1.1)  # shares of the bracket, or of the last stretch, to go


class Trial(NamedTuple):
    """A point θ − a·u of a line search: a, the loss there, and its derivative with respect to a."""

    size: Tensor
    loss: Tensor
    slope: Tensor


class Search(NamedTuple):
    """A line search under way.

    Attributes:
        size: the a to be tried next.
        low: the best trial so far; its size is 0 while that is the start.
        high: the other end of the bracket; its size is −1 while there is none.
        trials: how many there were, int64.
    """

    size: Tensor
    low: Trial
    high: Trial
    trials: Tensor


class WolfeState(NamedTuple):
    """The carry of `lbfgs`.

    Attributes:
        params: the last point that a search accepted.
        opt_state: the pairs, and the gradient at `params`; see `gd.lbfgs`.
        loss: at `params`.
        search: the line search under way.
        step_size: the a that was accepted last.
        evaluations: how many values and gradients were computed, int64.
        status: how the last search ended, int64. 0: none has ended yet; 1: at Wolfe's conditions; 2: after
            `max_trials`, with a lower loss; 3: what is left to gain is below the loss's rounding; 4: no
            trial had a lower loss, not even along the gradient.
    """

    params: Tree
    opt_state: LBFGSState
    loss: Tensor
    search: Search
    step_size: Tensor
    evaluations: Tensor
    status: Tensor


@step_maker
def lbfgs(
    loss_fn: LossFn,
    history: int = 10,
    *,
    eps: Scalar = 0.0,
    decrease: Scalar = 1e-4,
    curvature: Scalar = 0.9,
    max_trials: int = 20,
) -> Step:
    """Make the step of L-BFGS with a line search that ends at Wolfe's strong conditions.

    θ' = θ − a·u,  u = H·g as in `gd.lbfgs`, or g/‖g‖ without pairs, with an a for which
    L(θ − a·u) <= L(θ) − c₁·a·⟨g, u⟩  and  |⟨∇L(θ − a·u), u⟩| <= c₂·⟨g, u⟩

    A step is one evaluation of the loss and its gradient, in whatever state the search is. The first looks
    at the start. Each one after that tries a point, and `params` moves there if it is good. So T steps cost
    T gradients, no trial is computed in vain, and thousands of problems under vmap each search at their own
    pace. A search begins with a = lr, where 1 is the natural size. It grows until a bracket is found, and
    then shrinks that by cubic interpolation, safeguarded at a tenth from its ends. A trial whose loss or
    slope is not finite counts as too far. Where the decrease is below the rounding of the loss, its sign is
    judged by the slopes (Hager and Zhang), so that the last digits are found too.

    After `max_trials` a search ends at its best trial. If there is none, the pairs are forgotten, and the
    next search goes along the gradient. If that fails, the run is stuck: `status` is 4, and `train` warns.

    Every batch must be the same, as in `gd.full_batch`: a search compares losses of several steps.
    Buffers of a loss with state are those of every evaluation, of points that are not accepted too.

    Args:
        loss_fn: `(params, batch) -> loss`; see `batch_grad`.
        history: how many pairs to keep, an int >= 1.
        eps: the curvature sᵀy that a pair must exceed, a number >= 0 or a 0-d tensor.
        decrease: c₁, a number in (0, 1) or a 0-d tensor.
        curvature: c₂, greater than c₁, a number in (0, 1) or a 0-d tensor.
        max_trials: how many points a search may try, an int >= 1.

    Returns:
        A `Step`, whose state is a `WolfeState`. The loss and the gradient that `train` records are those at
        `params`.

    Raises:
        ValueError: a hyperparameter is out of range, or both are numbers and c₁ >= c₂; (in the step) as
            `make_step`.
        TypeError: (in the step) the state is that of another step.

    Example:
        >>> problem = gd.problems.rosenbrock()
        >>> step = gd.methods.lbfgs(problem.loss_fn)
        >>> state, _ = gd.train(step, step.init(problem.params), None, gd.full_batch(1, 60), 1.0)
        >>> state.params, int(state.evaluations), int(state.status)
        (tensor([1., 1.], dtype=torch.float64), 60, 3)

    References:
        D. C. Liu, J. Nocedal, "On the limited memory BFGS method for large scale optimization", 1989.
        J. Nocedal, S. J. Wright, "Numerical optimization", 2nd ed., 2006, algorithms 3.5 and 3.6.
        W. W. Hager, H. Zhang, "A new conjugate gradient method with guaranteed descent and an efficient
        line search", 2005: the conditions where rounding decides.
    """
    decrease, curvature = check_scalars("(0, 1)", decrease=decrease, curvature=curvature)
    if isinstance(decrease, float) and isinstance(curvature, float) and decrease >= curvature:
        raise ValueError(f"curvature must exceed decrease; got {curvature} and {decrease}")
    max_trials = check_int("max_trials", max_trials, 1)
    eps = check_scalar("eps", eps, "[0, inf)")
    transform, gradients = lbfgs_transform(history, eps=eps), unchecked_grad(loss_fn)

    def init(params: Tree) -> WolfeState:
        params = copy_params(params)
        numbers = [scalar(0.0, params) for _ in range(9)]
        counts = [torch.zeros_like(numbers[0], dtype=torch.int64) for _ in range(3)]
        search = Search(numbers[0], Trial(*numbers[1:4]), Trial(*numbers[4:7]), counts[0])
        return WolfeState(params, transform.init(params), numbers[7], search, numbers[8], *counts[1:])

    def accept(state: WolfeState, batch: Tree, lr: Scalar) -> Tree:
        check_lr(lr)
        return check_inputs(state.params, batch)[1]

    def advance(state: WolfeState, batch: Tree, lr: Scalar) -> tuple[WolfeState, Any, Tree]:
        params, memory = state.params, state.opt_state
        u, promise = _descent(memory)
        looks = (state.search.size == 0) | (promise == 0)  # at θ itself
        size = torch.where(looks, 0.0, state.search.size)
        trial = apply_updates(params, _tree.unravel(u, params), size)
        grads, value = gradients(trial, batch)
        point, gradient = _tree.ravel(trial), _tree.ravel(grads)
        seen = Trial(size, scalar(loss_of(value), params), -(gradient @ u))
        start = Trial(torch.zeros_like(size), torch.where(looks, seen.loss, state.loss), -promise)
        search, end = _judge(state.search, seen, start, decrease, curvature, max_trials)

        length = gradient.abs().sum() + 0 * seen.loss
        still = torch.where(length == 0, AT_REST, torch.where(length.isfinite(), state.status, STUCK))
        found = ~looks & ((end == WOLFE) | (end == LOWER))
        moves, forgets = looks | found, ~looks & (end == STUCK) & (memory.rho[-1] > 0)
        status = torch.where((end == UNFINISHED) | forgets, state.status, end)
        new = _tree.where(moves, remember(memory, point, gradient, eps), memory)
        pairs = {name: torch.where(forgets, 0.0, getattr(new, name)) for name in ("s", "y", "rho")}
        following = WolfeState(
            _tree.where(moves, trial, params),
            new._replace(**pairs),
            torch.where(moves, seen.loss, state.loss),
            _tree.where(moves | (end != UNFINISHED), _fresh(learning_rate(lr, params)), search),
            torch.where(found, size, state.step_size),
            state.evaluations + 1,
            torch.where(looks, still, status),
        )
        grads = _tree.unravel(torch.where(looks, gradient, memory.grads), params)
        loss = start.loss.to(loss_of(value).dtype)
        return following, value._replace(loss=loss) if isinstance(value, Evaluated) else loss, grads

    return Step(
        init, advance, WolfeState, accept, trouble=partial(_trouble, max_trials), computes_params=True
    )


def _trouble(max_trials: int, state: WolfeState) -> str | None:
    """Tell why a search cannot move, if it cannot."""
    if state.status != STUCK:
        return None
    loss, slope = float(state.loss), float(norms(state.opt_state.grads))
    if not math.isfinite(loss):
        return (
            f"the line search of lbfgs is stuck at loss {loss}, where it began: begin where the loss is "
            f"finite, or let train(..., check_finite='loss') name the sample whose data are not"
        )
    return (
        f"the line search of lbfgs is stuck at loss {loss:.6g}, where the gradient has norm "
        f"{slope:.3g}: none of {max_trials} trials along it had a lower loss; give every step all of "
        f"the data, compute in float64, scale the parameters alike, or begin elsewhere"
    )


def _descent(memory: LBFGSState) -> tuple[Tensor, Tensor]:
    """Return a direction u and the rate ⟨g, u⟩ > 0 at which the loss falls along −u; zeros for no way down.

    Without pairs, or where rounding spoils H·g, it is the gradient's unit vector.
    """
    gradient, u = memory.grads, direction(memory)
    unit = safe_ratio(gradient, norms(gradient))

    def descends(u: Tensor) -> Tensor:
        promise = gradient @ u
        return (promise > 0) & promise.isfinite()

    u = torch.where((memory.rho[-1] > 0) & descends(u), u, unit)
    u = torch.where(descends(u), u, 0.0)
    return u, torch.where(descends(u), gradient, 0.0) @ u


def _fresh(size: Tensor) -> Search:
    """Begin a search."""
    zero = torch.zeros_like(size)
    return Search(size, Trial(zero, zero, zero), Trial(zero + _NONE, zero, zero), zero.to(torch.int64))


def _judge(
    search: Search, seen: Trial, start: Trial, decrease: Scalar, curvature: Scalar, max_trials: int
) -> tuple[Search, Tensor]:
    """Put a trial into a search, choose the next one, and tell how the search has ended, if it has."""
    numbers = torch.finfo(seen.loss.dtype)
    low = _tree.where(search.low.size > 0, search.low, start)
    unresolved = _UNRESOLVED * numbers.eps * start.loss.abs()
    is_lower = (seen.loss <= start.loss + decrease * seen.size * start.slope) & (seen.loss <= low.loss)
    # Armijo's condition for the parabola with the two slopes.
    is_level = (seen.loss - start.loss).abs() <= unresolved
    is_level = is_level & (seen.slope <= (2 * decrease - 1) * start.slope)
    is_finite = seen.loss.isfinite() & seen.slope.isfinite()
    is_good = is_finite & (is_lower | is_level)
    is_flat = seen.slope.abs() <= -curvature * start.slope

    wall = torch.full_like(seen.loss, numbers.max / 16)  # for the loss where it is not finite
    seen = Trial(
        seen.size, torch.where(is_finite, seen.loss, wall), torch.where(is_finite, seen.slope, 0.0)
    )
    is_before = (search.high.size < 0) | (search.high.size > low.size)
    turns = is_good & torch.where(is_before, seen.slope >= 0, seen.slope <= 0)
    high = _tree.where(is_good, _tree.where(turns, low, search.high), seen)
    low, last = _tree.where(is_good, seen, low), low
    is_bounded = high.size >= 0
    other = _tree.where(is_bounded, high, last)
    share = torch.where(
        is_bounded, _share(low, other, _INSIDE[0], _INSIDE), _share(low, other, _BEYOND[0], _BEYOND)
    )
    trials = search.trials + 1
    is_spent = trials >= max_trials
    # After its last trial, a search goes back to the best one.
    size = torch.where(is_spent, low.size, low.size + share * (other.size - low.size))

    found = torch.where(is_good & is_flat, WOLFE, LOWER)
    is_better = low.loss < start.loss
    is_found = (is_good & (is_flat | (is_spent & is_better))) | (trials > max_trials)
    failure = torch.where(-start.slope <= unresolved, AT_REST, STUCK)
    is_failed = is_spent & ~is_better
    end = torch.where(is_found, found, torch.where(is_failed, failure, UNFINISHED))
    return Search(size, low, high, trials), end


def _share(low: Trial, other: Trial, otherwise: float, limits: tuple[float, float]) -> Tensor:
    """Find the minimum of the cubic with two values and slopes, as a share of the stretch from low on.

    Where it has none on that side, such as where the loss bends down ahead, the share is `otherwise`.
    """
    width = other.size - low.size
    first, second = low.slope * width, other.slope * width
    bend = first + second + 3 * (low.loss - other.loss)
    square = bend * bend - first * second
    has_minimum = (square >= 0) & square.isfinite()
    length = root(torch.where(has_minimum, square, 0.0))
    share = 1 - safe_ratio(second + length - bend, second - first + 2 * length, 1 - otherwise)
    return torch.where(has_minimum & (share * otherwise > 0), share, otherwise).clamp(*limits)
