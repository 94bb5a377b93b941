"""Gradient transformations: what stands between a gradient and the step along it.

A transformation is a pair of pure functions. It gives the direction u only: no learning rate and no
sign, for the step does θ − lr·u.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from . import _tree
from ._errors import check_scalar
from ._tree import Tree


class GradientTransformation(NamedTuple):
    """A pair of pure functions that turn gradients into updates.

    uₜ, sₜ₊₁ = update(gₜ, sₜ, θₜ)

    Attributes:
        init: `params -> opt_state`, a tree of tensors.
        update: `(grads, opt_state, params=None) -> (updates, opt_state)`; updates is a tree like grads.
            The step that follows is θ − lr·u.

    Example:
        >>> halve = gd.GradientTransformation(
        ...     init=lambda params: (),
        ...     update=lambda grads, state, params=None: (grads / 2, state),
        ... )
        >>> halve.update(torch.tensor(3.0), halve.init(torch.tensor(1.0)))
        (tensor(1.5000), ())
    """

    init: Callable[[Tree], Any]
    update: Callable[..., tuple[Tree, Any]]


def identity() -> GradientTransformation:
    """Leave the gradient as it is: plain gradient descent.

    u = g

    Example:
        >>> gd.identity().update(torch.tensor(3.0), ())
        (tensor(3.), ())
    """
    return chain()


def scale(factor: float | Tensor) -> GradientTransformation:
    """Multiply the gradient by a constant.

    u = c·g

    Args:
        factor: c, a finite number or a 0-d tensor; −1 climbs.

    Raises:
        ValueError: the factor is neither.

    Example:
        >>> gd.scale(0.5).update(torch.tensor(3.0), ())
        (tensor(1.5000), ())
    """
    factor = check_scalar("factor", factor, "(-inf, inf)")

    def init(params: Tree) -> tuple[()]:
        del params
        return ()

    def update(grads: Tree, state: tuple[()], params: Tree = None) -> tuple[Tree, tuple[()]]:
        del params
        return _tree.map(lambda g: g * factor, grads), state

    return GradientTransformation(init, update)


def chain(*transforms: GradientTransformation) -> GradientTransformation:
    """Apply transformations one after the other, the first one to the gradient.

    u = uₖ(… u₂(u₁(g)))

    Args:
        transforms: any number; none at all is the identity.

    Returns:
        A transformation whose state is the tuple of theirs.

    Raises:
        TypeError: an argument is no `GradientTransformation`.
        ValueError: (in update) the state is that of another chain.

    Example:
        >>> gd.chain(gd.scale(0.5), gd.scale(3.0)).update(torch.tensor(2.0), ((), ()))
        (tensor(3.), ((), ()))
    """
    for position, transform in enumerate(transforms):
        if not isinstance(transform, GradientTransformation):
            raise TypeError(
                f"chain's argument {position} is {type(transform).__name__}, "
                f"not a GradientTransformation; call the function that makes it, as in gd.scale(2.0)"
            )

    def init(params: Tree) -> tuple[Any, ...]:
        return tuple(transform.init(params) for transform in transforms)

    def update(grads: Tree, state: tuple[Any, ...], params: Tree = None) -> tuple[Tree, tuple[Any, ...]]:
        if not isinstance(state, tuple) or len(state) != len(transforms):
            raise ValueError(
                f"opt_state was made for another chain: it should be a tuple of {len(transforms)} "
                f"states; got {state!r}; make it with init_state(transform, params)"
            )
        new_state = []
        for transform, own_state in zip(transforms, state, strict=True):
            grads, own_state = transform.update(grads, own_state, params)
            new_state.append(own_state)
        return grads, tuple(new_state)

    return GradientTransformation(init, update)
