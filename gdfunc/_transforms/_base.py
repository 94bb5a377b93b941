"""The contract of gradient transformations, and the parts that they are built of.

A transformation is a pair of pure functions. It gives the direction u only: no learning rate and no
sign, for the step does θ − lr·u. To add one, write a function of its hyperparameters that returns the
pair: `init` builds the state with `zeros`, `update` hands a rule for one leaf to `each_leaf`, which takes
care of trees, dtypes and states that do not fit. `sign` in `_momentum.py` is the smallest, `adam` in
`_adaptive.py` the usual shape. Then add its line to the table in `tests/test_conformance.py`.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _tree
from .._errors import check_scalar
from .._tree import Tree

Scalar = float | Tensor


class GradientTransformation(NamedTuple):
    """A pair of pure functions that turn gradients into updates.

    uₜ, sₜ₊₁ = update(gₜ, sₜ, θₜ)

    Attributes:
        init: `params -> opt_state`, a tree of tensors.
        update: `(grads, opt_state, params=None) -> (updates, opt_state)`; updates is a tree like grads, and
            the new state like the old one, all of tensors. The step that follows is θ − lr·u. A step
            always passes params.

    The hyperparameters of gdfunc's own are numbers, whose range is checked, or 0-d tensors, whose value is
    never read: they may be vmapped and differentiated.

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

    def __repr__(self) -> str:
        return f"GradientTransformation({self.update.__qualname__.partition('.')[0]})"


def scale(factor: float | Tensor) -> GradientTransformation:
    """Multiply the gradient by a constant.

    u = c·g

    Args:
        factor: c, a finite number or a 0-d tensor. `scale(-1.0)` first in a chain climbs, as torch's
            `maximize=True` does.

    Raises:
        ValueError: the factor is neither.

    Example:
        >>> gd.scale(0.5).update(torch.tensor(3.0), ())
        (tensor(1.5000), ())
    """
    factor = check_scalar("factor", factor, "(-inf, inf)")
    return stateless(lambda g: g * in_dtype(g.dtype, factor)[0])


def chain(*transforms: GradientTransformation) -> GradientTransformation:
    """Apply transformations one after the other, the first one to the gradient.

    u = uₖ(… u₂(u₁(g)))

    Args:
        transforms: any number. `chain()` leaves the gradient as it is: plain gradient descent.

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
        check_transform(transform, f"chain's argument {position}")

    def init(params: Tree) -> tuple[Any, ...]:
        return tuple(transform.init(params) for transform in transforms)

    def update(grads: Tree, state: tuple[Any, ...], params: Tree = None) -> tuple[Tree, tuple[Any, ...]]:
        if not isinstance(state, tuple) or len(state) != len(transforms):
            raise ValueError(
                f"opt_state was made for another chain: it should be a tuple of {len(transforms)} "
                f"states; got {state!r}; make it with transform.init(params)"
            )
        new_state = []
        for transform, own_state in zip(transforms, state, strict=True):
            grads, own_state = transform.update(grads, own_state, params)
            new_state.append(own_state)
        return grads, tuple(new_state)

    return GradientTransformation(init, update)


def check_transform(transform: Any, name: str = "transform") -> None:
    """Refuse what is no transformation, and say what it takes to make it one."""
    if isinstance(transform, GradientTransformation):
        return
    kind = type(transform).__name__
    remedy = "; call the function that makes it, as in gd.momentum(0.9)" if callable(transform) else ""
    raise TypeError(f"{name} is {kind}, not a GradientTransformation{remedy}")


def stateful(kind: type, init: Callable[[Tree], Any], update: Callable[..., Any]) -> GradientTransformation:
    """Make a transformation whose update refuses the state of another kind."""

    @wraps(update)
    def checked(grads: Tree, state: Any, params: Tree = None) -> tuple[Tree, Any]:
        if not isinstance(state, kind):
            raise TypeError(
                f"opt_state is {type(state).__name__}, not {kind.__name__}; "
                f"make it with transform.init(params)"
            )
        return update(grads, state, params)

    return GradientTransformation(init, checked)


def stateless(rule: Callable[..., Tensor], *, with_params: bool = False) -> GradientTransformation:
    """Make a transformation without memory of a rule for one leaf: `g -> u`, or `(g, p) -> u`."""

    def init(params: Tree) -> tuple[()]:
        del params
        return ()

    def update(grads: Tree, state: tuple[()], params: Tree = None) -> tuple[Tree, tuple[()]]:
        others = (needed(params),) if with_params else ()
        (updates,) = each_leaf(lambda *leaves: (rule(*leaves),), grads, *others)
        return updates, state

    return GradientTransformation(init, update)


def each_leaf(rule: Callable[..., tuple[Tensor, ...]], grads: Tree, *others: Tree) -> tuple[Tree, ...]:
    """Apply a rule to corresponding leaves; return as many trees as it gives results for a leaf.

    Every result is rounded to the dtype of its gradient, so that no scalar promotes a state.

    Raises:
        ValueError: a tree of the state is not like grads, in structure or in a leaf's shape.
    """
    leaves, structure = _tree.flatten(grads)
    columns = [leaves]
    for other in others:
        matched = _tree.match(structure, other)
        if matched is None or any(o.shape != g.shape for o, g in zip(matched, leaves, strict=True)):
            raise ValueError(
                f"optimizer state was made for a different parameter tree, or with other options: "
                f"{_tree.differences(other, grads, 'state', 'params')}; "
                f"make it with transform.init(params)"
            )
        columns.append(matched)
    results = [
        [r if r.dtype == group[0].dtype else r.to(group[0].dtype) for r in rule(*group)]
        for group in zip(*columns, strict=True)
    ]
    return tuple(_tree.unflatten(structure, list(column)) for column in zip(*results, strict=True))


def zeros(params: Tree) -> Tree:
    """A tree of zeros like params: the usual first state."""
    return _tree.map(torch.zeros_like, params)


def no_steps(params: Tree) -> Tensor:
    """A count of steps, 0-d int64, on the parameters' device."""
    return torch.zeros((), dtype=torch.int64, device=_tree.leaves(params)[0].device)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the scalars of a leaf are computed: its own, but at least float32."""
    return torch.promote_types(dtype, torch.float32)


def in_dtype(dtype: torch.dtype, *scalars: Scalar) -> list[Scalar]:
    """Bring 0-d tensors to the dtype of a leaf's scalars, so that they promote nothing."""
    return [scalar.to(wide(dtype)) if isinstance(scalar, Tensor) else scalar for scalar in scalars]


def lerp(start: Tensor, end: Tensor, weight: Scalar) -> Tensor:
    """start + weight·(end − start), in the dtype of the leaf."""
    return torch.lerp(start, end, weight.to(start.dtype) if isinstance(weight, Tensor) else weight)


def select(condition: Tensor, yes: Scalar, no: Scalar, dtype: torch.dtype) -> Tensor:
    """`torch.where` for scalars, in the dtype of a leaf's scalars: torch makes numbers float32 there."""
    device, dtype = condition.device, wide(dtype)
    yes, no = (torch.as_tensor(scalar, dtype=dtype, device=device) for scalar in (yes, no))
    return torch.where(condition, yes, no)


def safe_sqrt(x: Tensor) -> Tensor:
    """√x with a finite derivative at zero: x counts as no less than the smallest normal number."""
    return x.clamp_min(torch.finfo(x.dtype).tiny).sqrt()


def needed(params: Tree, name: str = "this transformation") -> Tree:
    """Return params, which a transformation that reads them must be given."""
    if params is None:
        raise ValueError(f"{name} needs params: update(grads, opt_state, params)")
    return params
