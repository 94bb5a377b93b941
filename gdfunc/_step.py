"""One step of gradient descent: the body of every training loop.

A step is a scan body, `step(carry, batch, lr) -> (carry, loss)`. It is pure: it mutates nothing, and
`torch.func.grad`, `jvp` and `vmap` go through it with respect to the parameters, the data and lr.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from numbers import Real
from typing import Any, NamedTuple, ParamSpec

import torch
from torch import Tensor

from . import _tree
from ._errors import check_function, without_lr
from ._gradients import LossFn, check_loss_fn, unchecked_grad
from ._inputs import check_inputs, check_params
from ._numerics import Scalar, widest
from ._shown import Call, shown
from ._stateful import Evaluated, Stateful, checked_state, keyed, loss_of
from ._transforms._base import GradientTransformation, check_transform
from ._tree import Tree

P = ParamSpec("P")


@dataclass(frozen=True, repr=False)
class Step:
    """One step of descent: how its carry begins, and how it goes on.

    carry₀ = init(params);  carry, loss = step(carry, batch, lr)

    A call checks that the carry belongs to the step. `train` checks that once, and then uses `advance`.
    Wherever a step is expected, a function `(carry, batch, lr) -> (carry, loss)` with any tree of tensors
    as its carry will do.

    Attributes:
        init: `params -> carry`, in storage of its own; `(params, buffers, key) -> carry` for a `stateful`
            loss.
        advance: `(carry, batch, lr) -> (carry, loss, grads)`, without checks. The loss is that of the old
            parameters, grads its gradient, or None where there is none to record.
        state: the class of the carry, whose field `params` is where the next loss is measured; None if
            the carry is the parameters themselves.
        accept: `(carry, batch, lr) -> batch`, the checks of a call before `advance`, which needs a batch of
            tensors.
        call: the call that made the step, by which it is printed.
        ranks: how many ranks of torch.distributed take the step together; None if each takes its own.
        trouble: `carry -> message` of a carry that the step cannot move, None of another. `train` warns of
            it at the end of a run.
        computes_params: whether the next parameters are computed from other fields of the carry, so that a
            step around this one cannot change them.
        judges_params: whether a step is judged by the loss or the residuals at its new parameters, so that
            a projection of them comes too late.

    Example:
        >>> step = gd.make_step(lambda w, batch: (batch * w**2).mean())
        >>> step
        make_step(loss_fn=<lambda>)
        >>> carry = step.init(torch.tensor(1.0))
        >>> step(carry, torch.tensor([1.0, 3.0]), 0.1)
        (tensor(0.6000), tensor(2.))
    """

    init: Callable[..., Any]
    advance: Callable[[Any, Tree, Any], tuple[Any, Any, Tree]]
    state: type | None = None
    accept: Callable[[Any, Tree, Any], Tree] = lambda carry, batch, lr: batch
    call: Call | None = None
    ranks: int | None = None
    trouble: Callable[[Any], str | None] | None = None
    computes_params: bool = False
    judges_params: bool = False

    def __repr__(self) -> str:
        return repr(self.call) if self.call else f"Step({shown(self.advance)})"

    def __call__(self, carry: Any, batch: Tree, lr: Scalar) -> tuple[Any, Any]:
        self.check(carry)
        carry, loss, _ = self.advance(carry, self.accept(carry, batch, lr), lr)
        return carry, loss

    def check(self, carry: Any) -> None:
        """Refuse the carry of another step."""
        fits = isinstance(carry, self.state) if self.state else not hasattr(carry, "params")
        if not fits:
            wanted = self.state.__name__ if self.state else "the parameters alone"
            arguments = "params, buffers, key" if self.state is StatefulState else "params"
            raise TypeError(
                f"carry is {type(carry).__name__}, but this step needs {wanted}; "
                f"make the carry with step.init({arguments})"
            )


StepLike = Step | Callable[[Any, Tree, Any], tuple[Any, Any]]


def step_maker(make: Callable[P, Step]) -> Callable[P, Step]:
    """Decorate a function that makes steps, of losses with state too.

    It refuses an lr, and its steps show how they were made.
    """
    checked: Any = without_lr(make)

    @wraps(make)
    def made(*args: P.args, **kwargs: P.kwargs) -> Step:
        call = Call(make, args, kwargs)
        given = args[0] if args else kwargs.get("loss_fn", kwargs.get("step"))
        if not isinstance(given, Stateful):
            step = checked(*args, **kwargs)
        elif args:
            step = _stateful_step(given, lambda loss_fn: checked(loss_fn, *args[1:], **kwargs))
        else:
            step = _stateful_step(given, lambda loss_fn: checked(**{**kwargs, "loss_fn": loss_fn}))
        return replace(step, call=call, ranks=getattr(given, "ranks", None))

    return made


def _stateful_step(loss_fn: Stateful, make: Callable[[LossFn], Step]) -> Step:
    """Make a step of a loss with state from a maker of steps of plain losses.

    Every step remakes it for a loss that has the buffers of this step, and the keys of its samples.
    """
    plain = make(loss_fn.bound({}))

    def init(params: Tree, buffers: Tree = {}, key: Tensor | None = None) -> StatefulState:  # noqa: B006
        carry = plain.init(params)
        return StatefulState(carry, *checked_state(buffers, key, _tree.leaves(params)[0].device))

    def advance(state: StatefulState, batch: Tree, lr: Scalar) -> tuple[StatefulState, Any, Tree]:
        plain.check(state.carry)
        step = make(loss_fn.bound(state.buffers))
        samples, key = keyed(batch, state.key)
        carry, value, grads = step.advance(state.carry, samples, lr)
        old, structure = _tree.flatten(state.buffers)
        new = value.buffers if isinstance(value, Evaluated) else old
        # No output shares storage with an input.
        ids = set(map(id, old))  # by identity too, because the storage behind a transformation is unknown
        new = [b.clone() if id(b) in ids else b for b in new]
        buffers = _tree.unflatten(structure, _tree.unshare(new, old))
        return StatefulState(carry, buffers, key), loss_of(value), grads

    return step_around(plain, init, advance, StatefulState)


def step_around(
    inner: Step,
    init: Callable[..., Any],
    advance: Callable[[Any, Tree, Any], tuple[Any, Any, Tree]],
    state: type,
) -> Step:
    """Make a step whose state has the carry of another as `carry`, with the checks and trouble of that."""
    trouble = inner.trouble

    def accept(state: Any, batch: Tree, lr: Scalar) -> Tree:
        return inner.accept(state.carry, batch, lr)

    told = None if trouble is None else lambda state: trouble(state.carry)
    return replace(inner, init=init, advance=advance, state=state, accept=accept, trouble=told)


class TrainState(NamedTuple):
    """The carry of a step with a transformation: parameters, and the transformation's memory.

    Example:
        >>> step = gd.make_step(lambda w, batch: (w**2).mean(), gd.scale(2.0))
        >>> step.init(torch.tensor([1.0]))
        TrainState(params=tensor([1.]), opt_state=())
    """

    params: Tree
    opt_state: Any


class StatefulState(NamedTuple):
    """The carry of a step whose loss has state.

    Attributes:
        carry: that of the step without state: the parameters, a `TrainState`, …
        buffers: what the loss carries along.
        key: int64 [2], of the next step; `()` for a run without a key.

    Example:
        >>> step = gd.make_step(gd.stateful(lambda w, batch, buffers, key: (w**2, buffers + w)))
        >>> state, loss = step(step.init(torch.tensor(1.0), torch.tensor(0.0)), None, 0.25)
        >>> state
        StatefulState(carry=tensor(0.5000), buffers=tensor(1.), key=())
    """

    carry: Any
    buffers: Tree
    key: Any  # not None, which torch.func.vmap does not return

    @property
    def params(self) -> Tree:
        """Return the parameters in the carry."""
        return params_of(self.carry)


@step_maker
def make_step(loss_fn: LossFn, transform: GradientTransformation | None = None) -> Step:
    """Make the step of mini-batch gradient descent, plain or with a transformed gradient.

    θ' = θ − lr·∇L(θ, batch),  or with a transformation
    u, s' = update(∇L(θ, batch), s, θ);  θ' = θ − lr·u

    Args:
        loss_fn: `(params, batch) -> loss`, the mean over the batch as a 0-d tensor; see `batch_grad`. With
            buffers or random numbers: `stateful`.
        transform: what to do with the gradient.

    Returns:
        A `Step`, `step(carry, batch, lr) -> (carry, loss)`. Its carry is the parameters, or with a
        transformation a `TrainState`. The loss is that of the old parameters.

    Raises:
        TypeError: transform is not a `GradientTransformation`; (in the step) the carry is that of
            another step.
        TypeError, ValueError: (in the step) as `batch_grad` and `apply_updates` do.

    Example:
        >>> def loss_fn(params, batch):
        ...     x, y = batch
        ...     return ((x * params["w"] - y) ** 2).mean()
        >>> step = gd.make_step(loss_fn)
        >>> batch = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])
        >>> step({"w": torch.tensor(1.0)}, batch, 0.1)
        ({'w': tensor(2.)}, tensor(10.))
        >>> step = gd.make_step(loss_fn, gd.scale(0.5))
        >>> step(step.init({"w": torch.tensor(1.0)}), batch, 0.1)
        (TrainState(params={'w': tensor(1.5000)}, opt_state=()), tensor(10.))
    """
    check_loss_fn(loss_fn)
    if transform is None:
        return gradient_step(loss_fn, None, lambda params: params, apply_updates)
    check_transform(transform)

    def begin(params: Tree) -> TrainState:
        return TrainState(params, transform.init(params))

    def move(state: TrainState, grads: Tree, lr: Scalar) -> TrainState:
        params, opt_state = state
        result = transform.update(grads, opt_state, params)
        updates, opt_state = check_pair(result, "transform.update", "updates, opt_state")
        return TrainState(apply_updates(params, updates, lr), opt_state)

    return gradient_step(loss_fn, TrainState, begin, move)


def gradient_step(
    loss_fn: LossFn,
    state: type | None,
    begin: Callable[[Tree], Any],
    move: Callable[[Any, Tree, Scalar], Any],
) -> Step:
    """Make the step that moves its carry by the gradient.

    carry₀ = begin(params);  carry' = move(carry, ∇L(params, batch), lr)
    """
    gradients = unchecked_grad(loss_fn)

    def accept(carry: Any, batch: Tree, lr: Scalar) -> Tree:
        check_lr(lr)
        return check_inputs(params_of(carry), batch)[1]

    def advance(carry: Any, batch: Tree, lr: Scalar) -> tuple[Any, Tensor, Tree]:
        grads, loss = gradients(params_of(carry), batch)
        return move(carry, grads, lr), loss, grads

    return Step(lambda params: begin(copy_params(params)), advance, state, accept)


def apply_updates(params: Tree, updates: Tree, lr: Scalar) -> Tree:
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
    if directions is None or [u.shape for u in directions] != [p.shape for p in leaves]:
        directions = _tree.check_like(updates, params, "updates", "params")
    lr, rates, moved = check_lr(lr), {}, []
    for p, u in zip(leaves, directions, strict=True):
        kind = p.dtype, p.device
        if kind not in rates:
            rates[kind] = -torch.as_tensor(lr, dtype=p.dtype, device=p.device)
        moved.append(torch.addcmul(p, u if u.dtype == p.dtype else u.to(p.dtype), rates[kind]))
    return _tree.unflatten(structure, moved)


def copy_params(params: Tree) -> Tree:
    """Check parameters, and copy them out of autograd's graph: where a carry begins."""
    check_params(params)
    return _tree.clone(_tree.detach(params))


def params_of(carry: Any) -> Tree:
    """Find the parameters in a carry: its field `params`, or all of it."""
    return getattr(carry, "params", carry)


def as_step(step: StepLike) -> Step:
    """Make a step of a plain function `(carry, batch, lr) -> (carry, loss)`."""
    if isinstance(step, Step):
        return step
    kind = "a Step or a function (carry, batch, lr) -> (carry, loss)"
    remedy = "make one of a loss with gd.make_step(loss_fn, transform)"
    check_function("step", step, ("carry", "batch", "lr"), kind, remedy)

    def advance(carry: Any, batch: Tree, lr: Scalar) -> tuple[Any, Any, None]:
        result = step(carry, batch, lr)
        if isinstance(result, Tensor):
            raise TypeError(f"step must return (carry, loss); got one Tensor, as of a loss; {remedy}")
        carry, loss = check_pair(result, "step", "carry, loss")
        if carry is None:
            raise TypeError("step returned None as its carry; let it return (carry, loss)")
        return carry, loss, None

    return Step(lambda carry: _tree.clone(_tree.detach(carry)), advance, object)


def check_pair(result: Any, function: str, wanted: str) -> tuple[Any, Any]:
    """Refuse what is not a pair."""
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(f"{function} must return ({wanted}); got {type(result).__name__}")
    return result


def check_lr(lr: Any) -> Scalar:
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


def scalar(value: Any, params: Tree) -> Tensor:
    """Make a 0-d tensor in the widest dtype of the parameters, at least float32."""
    leaves = _tree.leaves(params)
    return torch.as_tensor(value, dtype=widest(leaves), device=leaves[0].device)


def learning_rate(lr: Any, params: Tree) -> Tensor:
    """Check lr and make it such a scalar."""
    return scalar(check_lr(lr), params)
