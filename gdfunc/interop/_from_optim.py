"""Steps of optimizers that change their parameters in place, as those of torch.optim do."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _tree
from .._errors import BackendError
from .._gradients import LossFn, check_loss_fn
from .._step import Step, gradient_step, step_maker
from .._torch._modes import is_tracing
from .._torch._transforms import is_transforming
from .._transforms._base import no_steps
from .._tree import Tree

_REFUSED = {
    torch.optim.LBFGS: "needs several losses a step; use gd.methods.lbfgs(loss_fn)",
    torch.optim.SparseAdam: "needs sparse gradients, and those of a step are dense; use torch.optim.Adam",
}
_REFUSED_OPTIONS = {
    "differentiable": "for derivatives through the optimizer, which changes its copies in place",
    "capturable": "for CUDA graphs, and the step of an optimizer runs in eager alone",
}


class OptimState(NamedTuple):
    """The carry of an optimizer's step: parameters, and what the optimizer remembers of each leaf.

    Attributes:
        params: the parameters.
        opt_state: for each leaf of the parameters its entry in the optimizer's `state`.
        count: 0-d int64, the steps taken. Before the first step, opt_state holds zeros, which are not used.
    """

    params: Tree
    opt_state: tuple[Any, ...]
    count: Tensor  # type: ignore[assignment]  # hides a method that tuples have


class Number(NamedTuple):
    """A number in an optimizer's state, which keeps it as a Python int or float."""

    value: Tensor  # 0-d, int64 or float64


@step_maker
def from_optim(loss_fn: LossFn, optimizer: Callable[..., torch.optim.Optimizer], **options: Any) -> Step:
    """Make the step of an optimizer of torch.optim, with the bits of its own loop.

    θ', s' = optimizer(θ, **options) with state s, after one `step()` with lr and the gradient ∇L(θ, batch)

    The optimizer works on copies, so the step is pure. A schedule of torch's is lr as data: the list of its
    values, one a step. `train` rounds lr to the dtype of the parameters. An optimizer writes in place and
    reads values, so the step runs in eager alone, and neither `vmap` nor `grad` go through it. gdfunc's
    transformations have no such limits.

    Args:
        loss_fn: `(params, batch) -> loss`; see `batch_grad`.
        optimizer: a class of torch.optim, or of another library with its interface, or a function
            `(leaves, **options) -> optimizer`.
        options: the arguments of the optimizer, without lr.

    Returns:
        A `Step`. The fields of its state are `params`, `opt_state` and `count`.

    Raises:
        TypeError: (in init) an option is `differentiable` or `capturable`; the optimizer needs several
            losses a step or sparse gradients, or remembers something that is neither a tensor nor a number
            of one leaf.
        ValueError: (in the step) a transformation of torch.func runs around it, or as `make_step`.
        BackendError: (in `train`) on a compiled backend.

    Example:
        >>> step = gd.interop.from_optim(lambda w, batch: 0.5 * w**2, torch.optim.SGD, momentum=0.5)
        >>> state, _ = gd.train(step, step.init(torch.tensor(4.0)), None, gd.full_batch(1, 2), 0.5)
        >>> state.params
        tensor(0.)
    """
    check_loss_fn(loss_fn)
    if not callable(optimizer):
        name = type(optimizer).__name__
        raise TypeError(f"optimizer is a {name}, which has its parameters already; pass the class {name}")

    def make(leaves: list[Tensor]) -> torch.optim.Optimizer:
        made = optimizer(leaves, **options)
        for name, why in _REFUSED_OPTIONS.items():
            if made.defaults.get(name):
                raise TypeError(f"{name}={made.defaults[name]!r} is {why}; leave {name} out")
        for kind, why in _REFUSED.items():
            if isinstance(made, kind):
                raise TypeError(f"{_name(kind)} {why}")
        return made

    def begin(params: Tree) -> OptimState:
        _check_place(optimizer)
        leaves = _copies(params)
        made, zeros = make(leaves), [torch.zeros_like(leaf) for leaf in leaves]
        # A step with the gradient zero shows which state the optimizer keeps.
        take_step(made, leaves, None, lambda: (None, zeros))
        memory = _tree.map(torch.zeros_like, _memory(made, leaves))
        return OptimState(params, memory, no_steps(params))

    def move(carry: OptimState, grads: Tree, lr: Any) -> OptimState:
        _check_place(optimizer)
        leaves, structure = _copies(carry.params), _tree.flatten(carry.params)[1]
        made = make(leaves)
        if int(carry.count):
            made.state.update(zip(leaves, map(_restored, carry.opt_state), strict=True))
        before = _numbers(made)
        # An optimizer that reads its loss fails here, because there is none.
        take_step(made, leaves, float(lr), lambda: (None, _tree.leaves(grads)))
        if _numbers(made) != before:
            raise TypeError(
                f"{_name(type(made))} remembers numbers in its param_groups, and a step carries its "
                f"state alone"
            )
        params = _tree.unflatten(structure, [leaf.detach() for leaf in leaves])
        return OptimState(params, _memory(made, leaves), carry.count + 1)

    return gradient_step(loss_fn, OptimState, begin, move)


def take_step(
    optimizer: Any,
    leaves: list[Tensor],
    lr: float | None,
    value_and_grads: Callable[[], tuple[Tensor | None, list[Tensor]]],
) -> Any:
    """Let an optimizer change its parameters once, and return the loss.

    Args:
        optimizer: a `torch.optim.Optimizer`, or an object with its interface.
        leaves: its parameters.
        lr: replaces that of every parameter group; None keeps it.
        value_and_grads: gives the loss, if there is one, and its gradients at the present values of the
            leaves.
    """
    if lr is not None:
        for group in optimizer.param_groups:
            group["lr"] = lr

    def closure() -> Tensor | None:
        value, grads = value_and_grads()
        for leaf, grad in zip(leaves, grads, strict=True):
            leaf.grad = grad
        return value

    return optimizer.step(closure)


def _copies(params: Tree) -> list[Tensor]:
    return [leaf.detach().clone().requires_grad_() for leaf in _tree.leaves(params)]


def _check_place(optimizer: Callable[..., Any]) -> None:
    """Refuse a trace and every transformation, through which changes in place do not go."""
    why = f"{_name(optimizer)} changes its parameters in place and reads values, so that"
    remedy = "gdfunc's transformations, such as gd.adam(), have no such limit"
    if is_tracing():
        error = BackendError(f"{why} its step cannot be compiled: use backend='eager'; {remedy}")
        error.is_expected = True
        raise error
    if is_transforming():
        raise ValueError(f"{why} vmap, grad and jvp do not go through its step; {remedy}")


def _memory(optimizer: Any, leaves: list[Tensor]) -> tuple[Any, ...]:
    """Take an optimizer's state as a tree of tensors, one entry for each leaf."""
    name, ours = _name(type(optimizer)), {id(leaf) for leaf in leaves}
    for key in optimizer.state:
        if id(key) not in ours:
            raise TypeError(f"{name} remembers {key!r} beside its parameters, which a step cannot carry")
    return tuple(_as_tree(optimizer.state.get(leaf, {}), f"{name}.state[leaf]") for leaf in leaves)


def _as_tree(value: Any, path: str) -> Any:
    """Make a tree of tensors of an entry of an optimizer's state."""
    if isinstance(value, Tensor) or value is None:
        return value
    if isinstance(value, int | float):
        return Number(torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64))
    if isinstance(value, dict):
        return {key: _as_tree(entry, f"{path}[{key!r}]") for key, entry in value.items()}
    raise TypeError(f"{path} is {type(value).__name__}, but a step carries tensors and numbers alone")


def _restored(value: Any) -> Any:
    """Make an entry of an optimizer's state of a tree of tensors, in storage that it may write to."""
    if isinstance(value, dict):
        return {key: _restored(entry) for key, entry in value.items()}
    if isinstance(value, Number):
        return value.value.tolist()
    return value if value is None else value.detach().clone()


def _numbers(optimizer: Any) -> list[dict[str, Any]]:
    """List the numbers in an optimizer's parameter groups, other than lr."""
    groups = optimizer.param_groups
    return [
        {k: v for k, v in group.items() if isinstance(v, int | float) and k != "lr"} for group in groups
    ]


def _name(optimizer: Callable[..., Any]) -> str:
    name, module = getattr(optimizer, "__name__", repr(optimizer)), getattr(optimizer, "__module__", "")
    return f"torch.optim.{name}" if module.startswith("torch.optim") else name
