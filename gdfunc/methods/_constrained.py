"""Steps whose new parameters are changed once more: projected onto a set, or moved by noise."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _tree, random
from .._errors import check_function, check_scalar
from .._inputs import kind
from .._numerics import Scalar, like, root
from .._step import Step, StepLike, learning_rate, params_of, scalar, step_around, step_maker
from .._transforms._base import no_steps
from .._tree import Tree
from ._averaging import as_movable, replace_params


@step_maker
def projected(step: StepLike, projection: Callable[[Tree], Tree]) -> Step:
    """Project the parameters onto a set after every step of another: projected gradient descent.

    θ' = P(θ − lr·u)

    The rest of the step's carry, such as a transformation's memory, stays what it is. For gradient descent
    on a convex loss with curvature at most L, a convex set and lr <= 2/L, the distance to every minimiser
    in the set never grows. A step that multiplies the gradient by a matrix, such as `gauss_newton`, may end
    at a point of the set that is not its minimum. So may one that divides each entry by a scale of its own,
    such as Adam, RMSprop or sign descent, unless the set is a box.

    Args:
        step: a `Step`, or a function `(carry, batch, lr) -> (carry, loss)`, whose carry is the parameters
            or a NamedTuple with a field `params`.
        projection: `params -> params`, one of `gd.projections` or a function of one's own.

    Returns:
        A `Step` with the same carry. Its `init` projects the parameters too.

    Raises:
        ValueError: (in the step) the projection changes a shape or a dtype; as the step inside.
        TypeError: projection is no function; the step computes its parameters from other fields of its
            state, as `schedule_free`, `mechanic` and the search of `lbfgs` do, or judges them, as
            `line_search` and `levenberg_marquardt` do; (in the step) the carry's params cannot be replaced.

    Example:
        >>> loss_fn = lambda w, batch: ((w - torch.tensor([3.0, -1.0])) ** 2).sum()
        >>> step = gd.methods.projected(gd.make_step(loss_fn), gd.projections.box(0.0, 1.0))
        >>> gd.train(step, step.init(torch.zeros(2)), None, gd.full_batch(1, 10), 0.1)[0]
        tensor([1., 0.])

    References:
        A. A. Goldstein, "Convex programming in Hilbert space", 1964.
    """
    inner = as_movable(step, "projected")
    if inner.judges_params:
        raise TypeError(
            f"projected moves the parameters after {inner!r} has judged them, which may then never descend "
            f"in the set; use projected with a step of a given lr, such as gd.make_step(loss_fn)"
        )
    remedy = "such as gd.projections.ball(1.0)"
    check_function("projection", projection, ("params",), "a function (params) -> params", remedy)

    def within(carry: Any) -> Any:
        params = params_of(carry)
        nearest = projection(params)
        found = _tree.check_like(nearest, params, "projection(params)", "params")
        for (path, leaf), new in zip(_tree.named_leaves(params, ""), found, strict=True):
            if new.dtype != leaf.dtype:
                raise ValueError(
                    f"projection(params){path} is {kind(new)} but params{path} is {kind(leaf)}; keep "
                    f"the dtype"
                )
        return replace_params(carry, nearest)

    def advance(carry: Any, batch: Tree, lr: Scalar) -> tuple[Any, Any, Tree]:
        carry, loss, grads = inner.advance(carry, batch, lr)
        return within(carry), loss, grads

    def init(*first: Any, **state_of_loss: Any) -> Any:
        return within(inner.init(*first, **state_of_loss))

    return replace(inner, init=init, advance=advance)


class NoiseState(NamedTuple):
    """The carry of a step, how many steps were taken, and the key of the next noise."""

    carry: Any
    steps: Tensor
    noise_key: Tensor

    @property
    def params(self) -> Tree:
        """Return the parameters in the carry."""
        return params_of(self.carry)


@step_maker
def add_noise(step: StepLike, temperature: Scalar = 1.0, *, key: Tensor) -> Step:
    """Add noise to the parameters after every step of another: stochastic gradient Langevin dynamics.

    θ' = θ − lr·u + √(2·lr·T)·ξ,  ξ ~ N(0, I)

    For small lr the parameters of a long run are drawn from the density exp(−L(θ)/T). With the mean loss
    over n samples, the negative logarithm of a posterior density over n, T = 1/n gives the posterior. Noise
    of step t is drawn from `fold_in(key, t)`, so use a key for one run only.

    Args:
        step: a `Step`, or a function `(carry, batch, lr) -> (carry, loss)`, whose carry is the parameters
            or a NamedTuple with a field `params`.
        temperature: T >= 0, a number or a 0-d tensor.
        key: int64 [2], from `gd.random.key`; not the one of the plan.

    Returns:
        A `Step`. The fields of its state are `carry`, `steps` and `noise_key`, and its `params` are the
        carry's.

    Raises:
        ValueError: the temperature is out of range; (in the step) as the step inside.
        TypeError: key is no key; the step computes its parameters from other fields of its state, as
            `mechanic` does; (in the step) the carry's params cannot be replaced.

    Example:
        >>> step = gd.methods.add_noise(
        ...     gd.make_step(lambda w, batch: 0.5 * (w**2).sum()), 0.95, key=gd.random.key(0)
        ... )
        >>> state = step.init(torch.zeros(10000))
        >>> state, _ = gd.train(step, state, None, gd.full_batch(1, 50), 0.1)
        >>> print(f"{state.params.var():.1f}")  # 0.95/(1 − 0.1/2)
        1.0

    References:
        M. Welling, Y. W. Teh, "Bayesian learning via stochastic gradient Langevin dynamics", 2011.
    """
    inner = as_movable(step, "add_noise")
    temperature = check_scalar("temperature", temperature, "[0, inf)")
    random._check_key(key)

    def init(*first: Any, **state_of_loss: Any) -> NoiseState:
        carry = inner.init(*first, **state_of_loss)
        steps = no_steps(params_of(carry))
        return NoiseState(carry, steps, random.fold_in(key.to(steps.device), 0))

    def advance(state: NoiseState, batch: Tree, lr: Scalar) -> tuple[NoiseState, Any, Tree]:
        inner.check(state.carry)
        carry, loss, grads = inner.advance(state.carry, batch, lr)
        params, steps = params_of(carry), state.steps + 1
        size = root(2.0 * learning_rate(lr, params) * scalar(temperature, params))
        noise = noise_like(state.noise_key, params)
        moved = _tree.map(lambda p, z: torch.addcmul(p, like(size, p), z), params, noise)
        # The next key is carried, because a compiler would inline its computation into every draw.
        next_key = random.fold_in(key.to(steps.device), steps)
        return (
            NoiseState(replace_params(carry, moved), steps, next_key),
            loss,
            grads,
        )

    return step_around(inner, init, advance, NoiseState)


def noise_like(key: Tensor, params: Tree) -> Tree:
    """Draw a standard normal number for every entry of the parameters, the same in every dtype."""
    leaves, structure = _tree.flatten(params)
    parts = random._normals(key, [leaf.numel() for leaf in leaves])
    return _tree.unflatten(
        structure, [like(part, leaf).view(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
    )
