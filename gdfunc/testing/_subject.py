"""Optimizers under test: every kind becomes a function from a loss to a step."""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import _tree
from .._gradients import unchecked_grad
from .._sampling import take
from .._step import Step, StepLike, as_step, check_pair, copy_params, gradient_step, make_step, params_of
from .._transforms._base import GradientTransformation
from .._tree import Tree
from ..interop._from_optim import take_step


@dataclass(frozen=True)
class Subject:
    """An optimizer under test.

    Attributes:
        make: `loss_fn -> Step`.
        name: how messages call it.
        is_pure: whether a step can be repeated from the same carry, and vmapped.
        result: `carry -> params`, the answer of a run, such as an average.
        of_rows: whether make takes `(loss_fn, data)`, and a batch is the numbers of its samples.
    """

    make: Callable[..., Step]
    name: str
    is_pure: bool = True
    result: Callable[[Any], Tree] = params_of
    of_rows: bool = False

    def __repr__(self) -> str:
        return self.name


def require_subject(value: Any) -> None:
    """Refuse an optimizer that no adapter has made a subject."""
    if not isinstance(value, Subject):
        raise TypeError(
            f"subject is {value!r}, not a Subject; make one with subject, from_transform, from_step, "
            f"from_torch or from_optax, as in gt.from_transform(gd.adam())"
        )


class HandState(NamedTuple):
    """The carry of a hand-written optimizer."""

    params: Tree
    state: Any


def subject(
    init: Callable[[Tree], Any],
    update: Callable[[Tree, Any, Tree, Any], tuple[Tree, Any]],
    name: str = "",
    *,
    whole_tree: bool = False,
    result: Callable[[Tree, Any], Tree] | None = None,
) -> Subject:
    """Make a subject of an optimizer that is written by hand.

    params', state' = update(∇L(params), state, params, lr)

    Args:
        init: `params -> state`, any object.
        update: `(grads, state, params, lr) -> (params, state)`.
        name: how messages call it; by default the name of update.
        whole_tree: by default the two functions are called for every leaf of the parameters, with tensors,
            and each leaf has a state of its own. True: they are called once, with trees.
        result: `(params, state) -> params`, the answer of a run, such as an average. It is called for every
            leaf, or once, as the others are. None: the parameters.

    Example:
        >>> from gdfunc import testing as gt
        >>> plain = gt.subject(lambda p: (), lambda g, state, p, lr: (p - lr * g, state), "plain")
        >>> gt.feed(plain, torch.tensor([1.0, 2.0, 4.0]), lr=0.5)
        tensor([-0.5000, -1.0000, -2.0000])
        >>> def update(g, average, p, lr):
        ...     p = p - lr * g
        ...     return p, 0.9 * average + 0.1 * p
        >>> averaged = gt.subject(torch.clone, update, result=lambda p, average: average)
        >>> gt.check_answer(averaged, gt.EMA(decay=0.9))
    """

    shown = getattr(update, "__name__", "update")

    def begin(params: Tree) -> HandState:
        state = init(params) if whole_tree else tuple(init(leaf) for leaf in _tree.leaves(params))
        return HandState(params, state)

    def move(carry: HandState, grads: Tree, lr: Any) -> HandState:
        def moved(g: Tree, state: Any, p: Tree) -> tuple[Tree, Any]:
            return check_pair(update(g, state, p, lr), shown, "params, state")

        if whole_tree:
            return HandState(*moved(grads, carry.state, carry.params))
        leaves, structure = _tree.flatten(carry.params)
        columns = zip(_tree.leaves(grads), carry.state, leaves, strict=True)
        after, states = zip(*(moved(*column) for column in columns), strict=True)
        return HandState(_tree.unflatten(structure, after), states)

    def make(loss_fn: Callable[..., Tensor]) -> Step:
        return gradient_step(loss_fn, HandState, begin, move)

    def answer(carry: HandState) -> Tree:
        if result is None:
            return carry.params
        if whole_tree:
            return result(*carry)
        leaves, structure = _tree.flatten(carry.params)
        pairs = zip(leaves, carry.state, strict=True)
        return _tree.unflatten(structure, [result(leaf, state) for leaf, state in pairs])

    return Subject(make, name or getattr(update, "__name__", "subject"), result=answer)


def from_transform(transform: GradientTransformation, name: str = "") -> Subject:
    """Make a subject of a `GradientTransformation`.

    Example:
        >>> from gdfunc import testing as gt
        >>> gt.feed(gt.from_transform(gd.momentum(0.5)), torch.ones(3))
        tensor([-1.0000, -1.5000, -1.7500])
    """
    return Subject(lambda loss_fn: make_step(loss_fn, transform), name or f"from_transform({transform!r})")


def from_step(
    make: Callable[..., StepLike],
    name: str = "",
    *,
    result: Callable[[Any], Tree] = params_of,
    of_rows: bool = False,
) -> Subject:
    """Make a subject of a function that makes a step: a method, or one's own.

    Args:
        make: `loss_fn -> step`, or with of_rows `(loss_fn, data) -> step`. A step is a `gd.Step`, or a
            function `(carry, batch, lr) -> (carry, loss)`, whose first carry is the parameters and whose
            every carry must be the parameters or have a field `params`. They are trees, such as dicts. A
            method written by hand that remembers more is easier to make with `subject`.
        name: how messages call it; by default the name of make.
        result: `carry -> params`, the answer of a run if it is not the point where the loss is measured,
            such as `lambda carry: carry.average`.
        of_rows: whether a batch of the step is row numbers of its data, int64 [B], as in `gd.methods.saga`.

    Example:
        >>> from gdfunc import testing as gt
        >>> heavy_ball = gt.from_step(lambda loss_fn: gd.methods.heavy_ball(loss_fn, 0.5))
        >>> gt.feed(heavy_ball, torch.ones(3))
        tensor([-1.0000, -1.5000, -1.7500])
        >>> saga = gt.from_step(gd.methods.saga, of_rows=True)
        >>> gt.check_batches(saga, gt.SAGA())
    """

    def make_checked(*loss_and_data: Any) -> Step:
        return as_step(make(*loss_and_data))

    return Subject(make_checked, name or getattr(make, "__name__", "step"), result=result, of_rows=of_rows)


class TorchState(NamedTuple):
    """The carry of a torch optimizer: a copy of its parameters, and the objects that it changes."""

    params: Tree
    optimizer: Any
    leaves: list[Tensor]


def from_torch(make: Callable[[list[Tensor]], torch.optim.Optimizer], name: str = "") -> Subject:
    """Make a subject of a `torch.optim.Optimizer`, or of a class with its interface.

    The learning rate of a step replaces that of every parameter group. The optimizer changes in place, so
    the laws of purity do not apply.

    Args:
        make: `parameters -> optimizer`.
        name: how messages call it; by default the class of the optimizer.

    Example:
        >>> from gdfunc import testing as gt
        >>> sgd = gt.from_torch(lambda params: torch.optim.SGD(params, lr=1.0, momentum=0.5))
        >>> gt.feed(sgd, torch.ones(3))
        tensor([-1.0000, -1.5000, -1.7500])
    """

    def make_torch_step(loss_fn: Callable[..., Tensor]) -> Step:
        gradients = unchecked_grad(loss_fn)

        def init(params: Tree) -> TorchState:
            params = copy_params(params)
            leaves = [leaf.clone().requires_grad_() for leaf in _tree.leaves(params)]
            return TorchState(params, make(leaves), leaves)

        def advance(carry: TorchState, batch: Tree, lr: Any) -> tuple[TorchState, Tensor, None]:
            structure = _tree.flatten(carry.params)[1]

            def present() -> Tree:
                return _tree.unflatten(structure, [leaf.detach().clone() for leaf in carry.leaves])

            def value_and_grads() -> tuple[Tensor, list[Tensor]]:
                grads, loss = gradients(present(), batch)
                return loss, _tree.leaves(grads)

            loss = take_step(carry.optimizer, carry.leaves, float(lr), value_and_grads)
            return TorchState(present(), carry.optimizer, carry.leaves), loss, None

        return Step(init, advance, TorchState)

    probe = make([torch.zeros(1, requires_grad=True)])
    return Subject(make_torch_step, name or f"torch.optim.{type(probe).__name__}", is_pure=False)


def from_optax(make: Callable[[float], Any], name: str = "") -> Subject:
    """Make a subject of an `optax.GradientTransformation`.

    θ' = optax.apply_updates(θ, make(lr).update(∇L(θ), state, θ))

    Optax's own sign and learning rate are under test: make is called for every lr. Float64 parameters stay
    so, by JAX's context manager; its global flag is neither read nor set.

    Args:
        make: `lr -> transformation`. The state must not depend on lr, as it does with
            `optax.inject_hyperparams`.
        name: how messages call it.

    Raises:
        ImportError: JAX or Optax is not installed.

    Example:
        `gt.from_optax(lambda lr: optax.adam(lr))` is a subject that keeps `gt.Adam()`.
    """
    try:
        jax, optax = (importlib.import_module(name) for name in ("jax", "optax"))
    except ImportError as missing:
        raise ImportError("from_optax needs JAX and Optax: pip install jax optax") from missing
    room = jax if hasattr(jax, "enable_x64") else importlib.import_module("jax.experimental")
    made = functools.cache(make)  # equal lrs share one object, so that JAX compiles its functions once

    def to_jax(tree: Tree) -> Any:
        return _tree.map(lambda leaf: jax.numpy.asarray(leaf.detach().numpy()), tree)

    def init(params: Tree) -> Any:
        with room.enable_x64(True):
            return made(1.0).init(to_jax(params))

    def update(grads: Tree, state: Any, params: Tree, lr: Any) -> tuple[Tree, Any]:
        with room.enable_x64(True):
            before = to_jax(params)
            updates, state = made(float(lr)).update(to_jax(grads), state, before)
            after = optax.apply_updates(before, updates)
        return _tree.map(lambda p, new: torch.from_numpy(np.array(new)), params, after), state

    return subject(init, update, name or "optax", whole_tree=True)


class Run(NamedTuple):
    """A run of a subject in NumPy. Every field is a list with one array per leaf of the parameters.

    Attributes:
        points: [T + 1, ...], the parameters before every step, and after the last.
        results: [T + 1, ...], the subject's answers there.
        lrs: float64[T].
        carry: the last carry.
    """

    points: list[np.ndarray]
    results: list[np.ndarray]
    lrs: np.ndarray
    carry: Any

    @property
    def moves(self) -> list[np.ndarray]:
        """Return the displacement of every step, [T, ...]."""
        with np.errstate(invalid="ignore"):  # an infinite point has no displacement, so NaN
            return [np.diff(leaf, axis=0) for leaf in self.points]


def run(
    subject: Subject,
    loss_fn: Callable[..., Tensor],
    params: Tree,
    batches: Tree,
    lrs: Any,
    steps: int,
    data: Tree = None,
) -> Run:
    """Run a subject, step by step.

    Args:
        subject: the subject.
        loss_fn: `(params, batch) -> loss`.
        params: where to start.
        batches: leaves [T, ...], one batch per step, or None; with data a plan, int64 [T, B].
        lrs: a number, or one per step, [T].
        steps: T.
        data: samples, leaves [n, ...], of which a plan picks the batches.

    Returns:
        A `Run`, in NumPy.

    Raises:
        TypeError: subject is not a `Subject`.
        ValueError: lrs are not one number, or T of them.

    Example:
        >>> from gdfunc import testing as gt
        >>> descent = gt.from_step(gd.make_step)
        >>> done = gt.run(descent, lambda w, batch: 0.5 * w**2, torch.tensor(1.0), None, 0.5, steps=3)
        >>> done.points
        [array([1.   , 0.5  , 0.25 , 0.125])]
    """
    require_subject(subject)
    if np.shape(lrs) not in ((), (1,), (steps,)):
        raise ValueError(
            f"lrs has shape {list(np.shape(lrs))}; give one number, or one per step, [{steps}]"
        )
    if subject.of_rows and data is None:
        raise ValueError(
            f"a batch of {subject!r} is row numbers, and this law has no rows; "
            f"claim a method for finite sums, such as gt.SAGA()"
        )
    step = subject.make(loss_fn, data) if subject.of_rows else subject.make(loss_fn)
    if data is not None and not subject.of_rows:
        batches = take(data, batches)
    rates = np.broadcast_to(np.asarray(lrs, dtype=np.float64), (steps,))
    carry = step.init(params)
    points, results = [_copied(params_of(carry))], [_copied(subject.result(carry))]
    for t in range(steps):
        batch = None if batches is None else _tree.map(lambda leaf, t=t: leaf[t], batches)
        carry, _ = step(carry, batch, float(rates[t]))
        _tree.check_like(params_of(carry), params, "new params", "params")
        points.append(_copied(params_of(carry)))
        results.append(_copied(subject.result(carry)))
    return Run(_stacked(points), _stacked(results), rates, carry)


def _stacked(rows: list[list[np.ndarray]]) -> list[np.ndarray]:
    """Stack the leaves of every step along a leading axis."""
    return [np.stack(leaf) for leaf in zip(*rows, strict=True)]


def _copied(tree: Tree) -> list[np.ndarray]:
    """Copy the leaves, because a step under test may write into them."""
    return [leaf.detach().double().numpy().copy() for leaf in _tree.leaves(tree)]


def run_linear(subject: Subject, grads: Tree, lrs: Any, params: Tree) -> Run:
    """Run a subject on linear losses with chosen gradients, leaves [T, ...]."""
    steps = len(_tree.leaves(grads)[0])
    return run(subject, linear_loss, params, _tree.map(lambda g: g[:, None], grads), lrs, steps)


def feed(subject: Subject, grads: Tree, lr: Any = 1.0, params: Tree = None) -> Tree:
    """Feed chosen gradients to a subject, and return its moves.

    The losses are linear, fₜ(θ) = ⟨gₜ, θ⟩, so the gradient does not depend on θ. The moves θₜ − θₜ₋₁ are
    then the optimizer's whole answer to g₁ … g_T.

    Args:
        subject: the subject.
        grads: gradients in order, tensors or arrays [T, ...] in any tree.
        lr: a number, or one per step, [T].
        params: where to start, leaves [...]; None: at zero.

    Returns:
        The moves, tensors [T, ...] in the same tree.

    Raises:
        TypeError: subject is not a `Subject`, or a gradient is no tensor and no array.
        ValueError: lr is not one number, or T of them.

    Example:
        >>> from gdfunc import testing as gt
        >>> gt.feed(gt.from_transform(gd.adam()), torch.tensor([3.0, 3.0, -3.0]))
        tensor([-1.0000, -1.0000, -0.2620])
        >>> import numpy as np
        >>> g = np.array([1.0, 4.0, -2.0])
        >>> moves = gt.feed(gt.from_transform(gd.momentum(0.5)), g, lr=0.1)
        >>> closed_form = [-0.1 * sum(0.5 ** (t - j) * g[j] for j in range(t + 1)) for t in range(3)]
        >>> np.allclose(moves, closed_form)
        True
    """
    grads = _tree.map(_as_tensor, grads)
    leaves, structure = _tree.flatten(grads)
    start = _tree.map(lambda g: torch.zeros_like(g[0]), grads) if params is None else params
    moves = run_linear(subject, grads, lr, start).moves
    return _tree.unflatten(
        structure, [torch.as_tensor(m, dtype=g.dtype) for m, g in zip(moves, leaves, strict=True)]
    )


def _as_tensor(leaf: Any) -> Tensor:
    if not isinstance(leaf, Tensor | np.ndarray) or leaf.ndim == 0:
        raise TypeError(
            f"grads holds {leaf!r}, but its leaves are tensors or arrays [T, ...]; use torch.tensor(...)"
        )
    return torch.as_tensor(leaf)


def linear_loss(params: Tree, batch: Tree) -> Tensor:
    """Return the mean of ⟨gᵢ, θ⟩ over a batch with leaves g [B, ...]."""
    leaves = _tree.leaves(params)
    pairs = zip(leaves, _tree.leaves(batch), strict=True)
    return sum(((p * g.mean(0)).sum() for p, g in pairs), start=leaves[0].new_zeros(()))
