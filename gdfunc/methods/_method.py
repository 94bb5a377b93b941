"""The face that all methods share: a step that knows how its state begins.

In every state `params` is where the next loss is measured, so that `Trajectory.params[t]` belongs to
`loss[t]`. What a method averages to is beside it, as `average`.
"""

from collections.abc import Callable
from functools import reduce
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from .. import _tree
from .._gradients import check_params
from .._step import _as_step, check_lr, params_of
from .._tree import Tree


class Method(Protocol):
    """A step with `init`, which makes its first state."""

    init: Callable[[Tree], Any]
    with_grads: Callable[[Any, Tree, Any], tuple[Any, Tensor, Tree]]

    def __call__(self, state: Any, batch: Tree, lr: float | Tensor, /) -> tuple[Any, Tensor]: ...


def as_method(
    kind: type,
    init: Callable[[Tree], Any],
    with_grads: Callable[[Any, Tree, Any], tuple[Any, Tensor, Tree]],
) -> Method:
    """Make a method of what its state is, how it begins, and a step that also returns the gradient."""

    def checked(state: Any, batch: Tree, lr: float | Tensor) -> tuple[Any, Tensor, Tree]:
        check_state(state, kind)
        return with_grads(state, batch, lr)

    step = cast(Method, _as_step(checked))
    step.init = lambda params: init(own(params))
    return step


def check_state(state: Any, kind: type) -> None:
    """Refuse the state of another method."""
    if not isinstance(state, kind):
        raise TypeError(
            f"state is {type(state).__name__}, not {kind.__name__}; make it with the step's own init"
        )


def own(carry: Any) -> Any:
    """Copy a carry whose parameters can be differentiated, and cut it from autograd."""
    check_params(params_of(carry))
    return _tree.clone(_tree.detach(carry))


def like(value: Any, leaf: Tensor) -> Tensor:
    """Give a hyperparameter the dtype and device of the leaf it meets, so that it promotes nothing."""
    return torch.as_tensor(value, dtype=leaf.dtype, device=leaf.device)


def scalar(value: Any, params: Tree) -> Tensor:
    """Make a 0-d tensor in the widest dtype of the parameters, at least float32."""
    leaves = _tree.leaves(params)
    dtype = reduce(torch.promote_types, (leaf.dtype for leaf in leaves), torch.float32)
    return torch.as_tensor(value, dtype=dtype, device=leaves[0].device)


def learning_rate(lr: Any, params: Tree) -> Tensor:
    """Check lr and make it such a scalar."""
    return scalar(check_lr(lr), params)


def blend(a: Tree, b: Tree, share: Any) -> Tree:
    """Go from a to b by a share of the way: (1 − share)·a + share·b."""
    return _tree.map(lambda x, y: torch.lerp(x, y, like(share, x)), a, b)


def safe_ratio(a: Tensor, b: Tensor) -> Tensor:
    """Divide by a number >= 0; where that is zero the ratio, and its derivatives, are zero."""
    # The inner where keeps the division's infinity out of the derivative.
    usable = b > 0
    return torch.where(usable, a / torch.where(usable, b, torch.ones_like(b)), torch.zeros_like(a))
