"""The contract of gradient transformations, and the parts that they are built of.

A transformation is a pair of pure functions. It gives the direction u without learning rate and sign,
because the step does θ − lr·u. To add one, copy the shape of `adam` in `_adam.py`: a NamedTuple for the
state, the scalars of a step, and the formula for one leaf in `update`. `leafwise` makes the pair of them,
and takes care of trees, dtypes and states that do not fit. Then add its line to the table in
`tests/test_conformance.py` and its name to `__init__.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from importlib import import_module
from typing import Any, NamedTuple, ParamSpec

import torch
from torch import Tensor

from .. import _tree
from .._errors import LR_PLACE, check_scalar, check_type, without_lr
from .._numerics import Scalar, like, precise, wide
from .._shown import Call
from .._torch._autograd import is_watched
from .._tree import Tree

P = ParamSpec("P")
Leaves = tuple[Tensor | None, ...]  # an update and the new states, of one leaf


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

    Parameters and state agree with torch.optim's to 1e-12 of the movement, step by step in float64:

    | gdfunc | torch.optim | optax |
    |---|---|---|
    | `chain()`, `chain(a, b)` | `SGD()` | `identity`, `chain` |
    | `scale(c)`; `scale(-1.0)` climbs | `maximize=True` | `scale` |
    | `momentum(β, dampening=, nesterov=)` | `SGD(momentum=…)` | `trace` |
    | `weight_decay` first in a chain | `weight_decay=` of `SGD`, `Adam` | `add_decayed_weights` |
    | `weight_decay` last in a chain | `weight_decay=` of `AdamW` | `add_decayed_weights` |
    | `adagrad`, `adadelta` | `Adagrad`, `Adadelta` | `scale_by_rss`, `scale_by_adadelta` |
    | `rmsprop` | `RMSprop` | `scale_by_rms` |
    | `adam` (`amsgrad=`), `adamw` | `Adam`, `AdamW` | `scale_by_adam`, `adamw` |
    | `adamax`, `radam` | `Adamax`, `RAdam` | `scale_by_adamax`, `scale_by_radam` |
    | `nadam` | `NAdam` | `nadam` |
    | `adabelief`, `yogi` | | `scale_by_belief`, `scale_by_yogi` |
    | `adafactor` (in units of RMS(θ)) | `Adafactor` | `adafactor` |
    | `ademamix`, `dog` | | `contrib.ademamix`, `contrib.dog` |
    | `lion`, `sign` | | `scale_by_lion`, `scale_by_sign` |
    | `rprop` (in units of lr), `lbfgs` | `Rprop`, `LBFGS` | `scale_by_rprop`, `scale_by_lbfgs` |
    | `muon` (for matrices) | `Muon` | `contrib.muon` |
    | `trust_ratio`, `lars`, `lamb` | | `scale_by_trust_ratio`, `lars`, `lamb` |
    | `clip_by_value` | `clip_grad_value_` | `clip` |
    | `clip_by_global_norm` | `clip_grad_norm_` | `clip_by_global_norm` |
    | `adaptive_clip` | | `adaptive_grad_clip` |
    | `zero_nans`, `apply_if_finite`, `accumulate` | | `zero_nans`, `apply_if_finite`, `MultiSteps` |
    | `masked`, `freeze`, `partition` | parameter groups | `masked`, `set_to_zero`, `partition` |

    The order matters: clip after `freeze` to measure only the leaves that move. An `apply_if_finite` around
    `accumulate` drops one mini-batch, and inside it the whole update.

    Example:
        >>> halve = gd.GradientTransformation(
        ...     init=lambda params: (),
        ...     update=lambda grads, state, params=None: (grads / 2, state),
        ... )
        >>> halve.update(torch.tensor(3.0), halve.init(torch.tensor(1.0)))
        (tensor(1.5000), ())
        >>> gd.chain(gd.clip_by_global_norm(1.0), gd.adam())
        chain(clip_by_global_norm(max_norm=1.0), adam(betas=(0.9, 0.999), eps=1e-08))
    """

    init: Callable[[Tree], Any]
    update: Callable[..., tuple[Tree, Any]]

    def __repr__(self) -> str:
        if isinstance(self.update, Update):
            return repr(self.update.call)
        return f"GradientTransformation({self.update.__qualname__.partition('.')[0]})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the call that made it, because its functions are local ones."""
        if not isinstance(self.update, Update):
            return GradientTransformation, tuple(self)
        call = self.update.call
        return _made_again, (call.make.__module__, call.make.__qualname__, call.args, call.kwargs)


def _made_again(module: str, name: str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    return getattr(import_module(module), name)(*args, **options)


@dataclass(frozen=True)
class Update:
    """The update of a transformation of gdfunc's own, and the call that made it."""

    function: Callable[..., tuple[Tree, Any]]
    call: Call

    def __call__(self, grads: Tree, state: Any, params: Tree = None) -> tuple[Tree, Any]:
        return self.function(grads, state, params)


def transformation(make: Callable[P, GradientTransformation]) -> Callable[P, GradientTransformation]:
    """Decorate a function that makes transformations: it refuses an lr, and they show their parameters."""
    checked = without_lr(make)

    @wraps(make)
    def made(*args: P.args, **kwargs: P.kwargs) -> GradientTransformation:
        init, update = checked(*args, **kwargs)
        function = update.function if isinstance(update, Update) else update
        return GradientTransformation(init, Update(function, Call(make, args, kwargs)))

    return made


@transformation
def scale(factor: Scalar) -> GradientTransformation:
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
    return stateless(lambda g, factor: g * factor, factor)


@transformation
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


PLAIN = chain()  # the default of steps that take a transformation


def check_transform(transform: Any, name: str = "transform") -> None:
    """Refuse an object that is no transformation."""
    if isinstance(transform, GradientTransformation):
        return
    kind = type(transform).__name__
    remedy = "; call the function that makes it, as in gd.momentum(0.9)" if callable(transform) else ""
    raise TypeError(f"{name} is {kind}, not a GradientTransformation{remedy}")


def stateful(kind: type, init: Callable[[Tree], Any], update: Callable[..., Any]) -> GradientTransformation:
    """Make a transformation whose update refuses the state of another kind."""

    @wraps(update)
    def checked(grads: Tree, state: Any, params: Tree = None) -> tuple[Tree, Any]:
        check_type("opt_state", state, kind, "make it with transform.init(params)")
        return update(grads, state, params)

    return GradientTransformation(init, checked)


def leafwise(
    kind: Any,
    update: Callable[..., Leaves],
    starts: Sequence[Scalar | None],
    of_step: Callable[[Any], tuple[Scalar, ...]] = lambda t: (),
    update_many: Callable[..., Any] | None = None,
) -> GradientTransformation:
    """Make a transformation of its formula for one leaf.

    Args:
        kind: the NamedTuple of the state: its trees, after a `step` if steps are counted.
        update: `(g, *states, *scalars) -> (u, *new states)`.
        starts: the first value of each tree of the state. None stands for a tree that is not used: it is
            `()` in the state and None in `update`.
        of_step: `t -> scalars` of step t = 1, 2, … in float64, or of None without a `step`. The scalars are
            rounded once, to the dtype of each leaf.
        update_many: `update` with lists of leaves in place of leaves, and the same bits: many small leaves
            take two thirds of the time.
    """
    counted = kind._fields[0] == "step"

    def init(params: Tree) -> Any:
        trees = [() if start is None else filled(params, start) for start in starts]
        return kind(no_steps(params), *trees) if counted else kind(*trees)

    @wraps(update)
    def update_trees(grads: Tree, state: Any, params: Tree = None) -> tuple[Tree, Any]:
        step, trees = (state.step + 1, state[1:]) if counted else (None, state)
        trees = [None if start is None else tree for tree, start in zip(trees, starts, strict=True)]
        scalars = of_step(None if step is None else step.to(precise(step)))
        updates, *trees = each_leaf(update, grads, *trees, scalars=scalars, update_many=update_many)
        return updates, kind(step, *trees) if counted else kind(*trees)

    return stateful(kind, init, update_trees)


def stateless(
    update: Callable[..., Tensor], *scalars: Scalar, with_params: bool = False
) -> GradientTransformation:
    """Make a transformation without memory of `(g, *scalars) -> u` or `(g, p, *scalars) -> u`."""

    @wraps(update)
    def update_trees(grads: Tree, state: tuple[()], params: Tree = None) -> tuple[Tree, tuple[()]]:
        others = {"params": needed(params)} if with_params else {}
        (updates,) = each_leaf(lambda *leaf: (update(*leaf),), grads, scalars=scalars, **others)
        return updates, state

    return GradientTransformation(lambda params: (), update_trees)


def each_leaf(
    update: Callable[..., Leaves],
    grads: Tree,
    *states: Tree,
    params: Tree = (),
    scalars: Sequence[Scalar] = (),
    update_many: Callable[..., Any] | None = None,
) -> tuple[Tree, ...]:
    """Apply `(g, *states, p, *scalars) -> (u, *new states)` to corresponding leaves, and return the trees.

    Every result is rounded to the dtype of its gradient, so that no scalar promotes a state. A state that
    is None stays None for every leaf, and comes back as `()`.

    Raises:
        ValueError: a tree of the state is not like grads, in structure or in a leaf's shape.
    """
    leaves, structure = _tree.flatten(grads)
    given = [*states, params] if params != () else states
    columns = [_matched(tree, grads, leaves, structure) for tree in given]
    if update_many is not None and _are_alike(leaves, columns, scalars):
        rounded_once = [in_dtype(s, leaves[0].dtype) for s in scalars]
        found = update_many(leaves, *columns, *rounded_once)
        return tuple(() if column is None else _tree.unflatten(structure, column) for column in found)
    rounded = {dtype: [in_dtype(s, dtype) for s in scalars] for dtype in {g.dtype for g in leaves}}
    results: list[list[Any]] = [[] for _ in range(1 + len(states))]
    for g, *others in zip(leaves, *columns, strict=True):
        for column, result in zip(results, update(g, *others, *rounded[g.dtype]), strict=True):
            column.append(result if result is None or result.dtype == g.dtype else result.to(g.dtype))
    return tuple(
        () if i and states[i - 1] is None else _tree.unflatten(structure, column)
        for i, column in enumerate(results)
    )


def _are_alike(leaves: list[Tensor], columns: list[list[Any]], scalars: Sequence[Any]) -> bool:
    """Tell whether leaves on a CPU have one wide dtype, and neither transformations nor traces see them."""
    if len(leaves) < 2 or is_watched():
        return False
    dtype = leaves[0].dtype
    if wide(dtype) != dtype or leaves[0].device.type != "cpu":
        return False
    for column in [leaves, *columns, [s for s in scalars if isinstance(s, Tensor)]]:
        for leaf in column:
            if leaf is not None and (type(leaf) is not Tensor or leaf.requires_grad):
                return False
    return all(leaf.dtype == dtype for column in [leaves, *columns] for leaf in column if leaf is not None)


def _matched(tree: Tree, grads: Tree, leaves: list[Tensor], structure: Any) -> list[Any]:
    """List the leaves of a tree in the order of those of grads, whose shapes they must have."""
    if tree is None:
        return [None] * len(leaves)
    matched = _tree.match(structure, tree)
    if matched is None or [o.shape for o in matched] != [g.shape for g in leaves]:
        raise ValueError(
            f"optimizer state was made for a different parameter tree, or with other options: "
            f"{_tree.differences(tree, grads, 'state', 'params')}; make it with transform.init(params)"
        )
    return matched


def zeros(params: Tree) -> Tree:
    """Make a tree of zeros like params: the usual first state."""
    return _tree.map(torch.zeros_like, params)


def filled(params: Tree, start: Scalar) -> Tree:
    """Make a tree like params whose entries are all `start`."""
    return _tree.map(lambda p: torch.zeros_like(p) + like(start, p), params)


def needed(params: Tree, name: str = "this transformation") -> Tree:
    """Return params, which a transformation that reads them must be given."""
    if params is None:
        raise ValueError(f"{name} needs params: update(grads, opt_state, params)")
    return params


def no_steps(params: Tree) -> Tensor:
    """Make a count of steps, 0-d int64, on the parameters' device."""
    leaves = _tree.leaves(params)
    return torch.zeros((), dtype=torch.int64, device=leaves[0].device if leaves else None)


def in_dtype(scalar: Any, dtype: torch.dtype) -> Any:
    """Round a 0-d float tensor to the dtype of a leaf's scalars, so that it promotes nothing."""
    is_float = isinstance(scalar, Tensor) and scalar.is_floating_point()
    return scalar.to(wide(dtype)) if is_float else scalar


def ema(average: Tensor, x: Tensor, beta: Scalar) -> Tensor:
    """Average exponentially: β·average + (1 − β)·x."""
    weight = 1.0 - beta
    return torch.lerp(average, x, weight.to(x.dtype) if isinstance(weight, Tensor) else weight)


def ema_of_squares(average: Tensor, x: Tensor, beta: Scalar) -> Tensor:
    """Average squares exponentially, β·average + (1 − β)·x², without overflow of x² alone."""
    if not isinstance(beta, Tensor):
        return torch.addcmul(beta * average, x, x, value=1.0 - beta)
    return torch.addcmul(in_dtype(beta, x.dtype) * average, in_dtype(1.0 - beta, x.dtype) * x, x)


def check_moments(betas: tuple[Scalar, Scalar], eps: Scalar) -> tuple[Scalar, Scalar, Scalar]:
    """Return two decay rates, each in [0, 1), and an ε >= 0."""
    return *check_betas(betas), check_scalar("eps", eps, "[0, inf)")


def check_betas(betas: tuple[Scalar, Scalar]) -> tuple[Scalar, Scalar]:
    """Return two decay rates, each in [0, 1)."""
    if isinstance(betas, float | int) or len(betas) != 2:
        place = f"; {LR_PLACE}" if isinstance(betas, float | int) else ""
        raise TypeError(f"betas must be a pair (β₁, β₂); got {betas!r}{place}")
    beta1, beta2 = betas
    return check_scalar("betas[0]", beta1, "[0, 1)"), check_scalar("betas[1]", beta2, "[0, 1)")
