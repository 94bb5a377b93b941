"""One step of gradient descent: the body of every training loop.

A step is a scan body, `step(carry, batch, lr) -> (carry, loss)`. It is pure: it mutates nothing, and
`torch.func.grad`, `jvp` and `vmap` go through it with respect to the parameters, the data and lr.
"""

import math
from collections.abc import Callable
from functools import cache
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _tree
from ._gradients import LossFn, batch_grad, check_params
from ._transforms import GradientTransformation, check_transform
from ._tree import Tree

Step = Callable[[Any, Tree, Any], tuple[Any, Any]]


def apply_updates(params: Tree, updates: Tree, lr: float | Tensor) -> Tree:
    """Move the parameters against the updates.

    θ' = θ − lr·u

    Args:
        params: tree of float tensors.
        updates: a tree of the same structure and shapes.
        lr: the learning rate, a finite number >= 0, or a 0-d tensor, whose value is not read. It is rounded
            to each leaf's dtype, so that a float64 lr promotes nothing.

    Returns:
        New parameters; each leaf keeps its shape, dtype and device.

    Raises:
        ValueError: the trees differ in structure or shape, or lr is out of range or no scalar.

    Example:
        >>> gd.apply_updates({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([1.0, -1.0])}, 0.5)
        {'w': tensor([0.5000, 2.5000])}
    """
    leaves, structure = _tree.flatten(params)
    directions = _tree.match(structure, updates)
    if directions is None:
        directions = _tree.check_structure(updates, params, "updates", "params")
    lr = check_lr(lr)

    @cache
    def rate(dtype: torch.dtype, device: torch.device) -> Tensor:
        return -torch.as_tensor(lr, dtype=dtype, device=device)

    moved = []
    for i, (p, u) in enumerate(zip(leaves, directions, strict=True)):
        if u.shape != p.shape:
            path, _ = _tree.named_leaves(params, "")[i]
            raise ValueError(
                f"updates{path} has shape {tuple(u.shape)} but params{path} has {tuple(p.shape)}"
            )
        u = u if u.dtype == p.dtype else u.to(p.dtype)
        moved.append(torch.addcmul(p, u, rate(p.dtype, p.device)))
    return _tree.unflatten(structure, moved)


def make_step(loss_fn: LossFn) -> Step:
    """Make the step of mini-batch gradient descent.

    θ' = θ − lr·∇L(θ, batch)

    Args:
        loss_fn: `(params, batch) -> loss`, the mean over the batch as a 0-d tensor; see `batch_grad`.

    Returns:
        `step(params, batch, lr) -> (params, loss)`; loss is that of the old parameters.

    Raises:
        TypeError, ValueError: (in the step) as `batch_grad` and `apply_updates` do.

    Example:
        >>> def loss_fn(params, batch):
        ...     x, y = batch
        ...     return ((x * params["w"] - y) ** 2).mean()
        >>> step = gd.make_step(loss_fn)
        >>> batch = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])
        >>> step({"w": torch.tensor(1.0)}, batch, 0.1)
        ({'w': tensor(2.)}, tensor(10.))
    """
    gradients = batch_grad(loss_fn)

    def step(params: Tree, batch: Tree, lr: float | Tensor) -> tuple[Tree, Tensor, Tree]:
        if isinstance(params, TrainState):
            raise TypeError("params is a TrainState; its step is one of make_transform_step")
        grads, loss = gradients(params, batch)
        return apply_updates(params, grads, lr), loss, grads

    return _as_step(step)


class TrainState(NamedTuple):
    """The carry of a run with a transformation: parameters, and the transformation's memory.

    Example:
        >>> gd.init_state(gd.chain(), torch.tensor([1.0]))
        TrainState(params=tensor([1.]), opt_state=())
    """

    params: Tree
    opt_state: Any


def init_state(transform: GradientTransformation, params: Tree) -> TrainState:
    """Pair parameters with a fresh state of a transformation.

    Returns:
        `TrainState(params, transform.init(params))`, with parameters detached and copied.

    Raises:
        TypeError, ValueError: the parameters are none; see `batch_grad`.

    Example:
        >>> gd.init_state(gd.scale(2.0), torch.tensor([1.0]))
        TrainState(params=tensor([1.]), opt_state=())
    """
    check_transform(transform)
    check_params(params)
    params = _tree.clone(_tree.detach(params))
    return TrainState(params, transform.init(params))


def make_transform_step(loss_fn: LossFn, transform: GradientTransformation) -> Step:
    """Make the step of gradient descent with a transformed gradient.

    u, s' = update(∇L(θ, batch), s, θ);  θ' = θ − lr·u

    Args:
        loss_fn: as in `make_step`.
        transform: what to do with the gradient.

    Returns:
        `step(state, batch, lr) -> (state, loss)`, with `state` from `init_state(transform, params)`.

    Raises:
        TypeError, ValueError: (in the step) as `make_step`; the state is not a `TrainState`.

    Example:
        >>> def loss_fn(params, batch):
        ...     return ((batch * params) ** 2).mean()
        >>> transform = gd.scale(0.5)
        >>> step = gd.make_transform_step(loss_fn, transform)
        >>> state = gd.init_state(transform, torch.tensor(1.0))
        >>> step(state, torch.tensor([1.0]), 0.1)
        (TrainState(params=tensor(0.9000), opt_state=()), tensor(1.))
    """
    check_transform(transform)
    gradients = batch_grad(loss_fn)

    def step(state: TrainState, batch: Tree, lr: float | Tensor) -> tuple[TrainState, Tensor, Tree]:
        if not isinstance(state, TrainState):
            raise TypeError(
                f"state is {type(state).__name__}, not a TrainState; "
                f"make it with init_state(transform, params)"
            )
        grads, loss = gradients(state.params, batch)
        result = transform.update(grads, state.opt_state, state.params)
        if not isinstance(result, tuple) or len(result) != 2:
            got = type(result).__name__
            raise TypeError(f"transform.update must return (updates, opt_state); got {got}")
        updates, opt_state = result
        return TrainState(apply_updates(state.params, updates, lr), opt_state), loss, grads

    return _as_step(step)


def params_of(carry: Any) -> Tree:
    """The parameters in a step's carry: its field of that name, or the carry itself."""
    return getattr(carry, "params", carry)


def check_pair(result: Any) -> tuple[Any, Any]:
    """Return what a step returned, if it can be a carry and a loss."""
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(f"step must return (carry, loss); got {type(result).__name__}")
    return result


def check_lr(lr: Any) -> float | Tensor:
    """Return lr if it is a finite number >= 0 or a 0-d real tensor, whose value is not read."""
    if isinstance(lr, Tensor):
        if not lr.shape and not lr.is_complex():
            return lr
        got = f"shape {tuple(lr.shape)}" if lr.shape else str(lr.dtype)
    else:
        is_number = isinstance(lr, Real) and not isinstance(lr, bool)
        if is_number and math.isfinite(lr) and lr >= 0:
            return float(lr)
        got = repr(lr)
    raise ValueError(f"lr must be a finite number >= 0 (0-d); got {got}")


def _as_step(with_grads: Callable[[Any, Tree, Any], tuple[Any, Tensor, Tree]]) -> Step:
    """Make a step of a function that also returns the gradient, and keep that one at hand."""

    def step(carry: Any, batch: Tree, lr: float | Tensor) -> tuple[Any, Tensor]:
        carry, loss, _ = with_grads(carry, batch, lr)
        return carry, loss

    step.with_grads = with_grads  # type: ignore[attr-defined]
    return step
