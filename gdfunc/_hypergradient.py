"""The derivative of a run with respect to what governs it."""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.func import grad_and_value, jvp, vjp, vmap

from . import _tree
from ._scan._adjoint import Adjoint, check_adjoint
from ._torch._autograd import is_readable
from ._torch._modes import is_tracing
from ._torch._transforms import differentiable_attention, layers
from ._tree import Tree
from .adjoints import Forward, Implicit, Truncated
from .adjoints._implicit import Reporting

Slot = int | str
Function = Callable[[list[Tree]], tuple[Tensor, Any]]


class Hypergradient(NamedTuple):
    """The derivative of a run, and what it is the derivative of; see `hypergrad`.

    Attributes:
        grads: dF/dφ, a tree like the argument; for several, a tuple, or a dict by name.
        value: F, 0-d.
        aux: what else the function returned, with `has_aux=True`.
        residual: of `Implicit`, ‖(I − Jᵀ)u − v‖ / ‖v‖, 0-d float64. Several runs: the sum.
        remaining: of `Implicit`, u·(Φ(θ) − θ), 0-d float64: by how much F would change, to first order, if
            the run went on to its fixed point. Several runs: the sum.

    Example:
        >>> gd.Hypergradient(grads=torch.tensor(2.0), value=torch.tensor(1.0)).grads
        tensor(2.)
    """

    grads: Any
    value: Tensor
    aux: Any = ()
    residual: Any = ()
    remaining: Any = ()


def hypergrad(
    run: Callable[..., Any],
    argnums: Slot | Sequence[Slot] = 0,
    *,
    adjoint: Adjoint | Forward | None = None,
    has_aux: bool = False,
) -> Callable[..., Hypergradient]:
    """Turn a function that trains and returns a number into the function that gives its derivative.

        dF/dφ,  F(φ) = run(φ)

    φ is any argument that reaches the number: lr, a schedule [T], momentum, initial parameters, weights of
    the data, regularisation. `torch.func.grad(run)` gives the same derivative. `hypergrad` adds names of
    arguments, numbers in place of tensors, the value, forward mode, and what `Implicit` reports.

    Args:
        run: returns a 0-d float tensor, or with has_aux a pair `(number, tree of tensors)`.
        argnums: which arguments: a position or a name, or several.
        adjoint: how the derivative goes through the run, one of `gd.adjoints`. It is passed to run as the
            keyword `adjoint`, which run passes on to `train` or `scan`. `Forward()` alone is not passed on.
            None: run is called as it is, and differentiated in reverse.
        has_aux: whether run returns a pair.

    Returns:
        A function of run's arguments that gives a `Hypergradient`. Chosen arguments are trees of float
        tensors; a Python float becomes a 0-d float64 tensor. It can be vmapped, swept and compiled
        (`gd.jit`), and with all adjoints but `Implicit` differentiated again.

    Raises:
        TypeError: a chosen argument has a leaf that is no float tensor; run returns no tensor; adjoint is
            none of `gd.adjoints`.
        ValueError: there is no such argument; run takes no keyword `adjoint`, or does not pass `Implicit`
            on; run returns no 0-d real float tensor, or one that does not depend on the arguments.
        UserWarning: see `gd.adjoints.Implicit`.

    Example:
        >>> problem = gd.problems.stock_regression()
        >>> step = gd.make_step(problem.loss_fn)
        >>> index = gd.full_batch(389, steps=50)
        >>> def run(lr, adjoint=gd.adjoints.Reverse()):
        ...     final, _ = gd.train(step, problem.params, problem.data, index, lr, adjoint=adjoint)
        ...     return problem.loss_fn(final, problem.data)
        >>> adjoints = gd.adjoints.Reverse(), gd.adjoints.Checkpoint("sqrt"), gd.adjoints.Forward()
        >>> print(*(f"{gd.hypergrad(run, 'lr', adjoint=adjoint)(0.01).grads:.6e}" for adjoint in adjoints))
        -1.223454e-02 -1.223454e-02 -1.223454e-02

    References:
        See `gd.adjoints`, and L. Franceschi, M. Donini, P. Frasconi, M. Pontil, "Forward and reverse
        gradient-based hyperparameter optimization", 2017.
    """
    if adjoint is not None and not isinstance(adjoint, Forward):
        _check_takes_adjoint(run, check_adjoint(adjoint))
    several = isinstance(argnums, Sequence) and not isinstance(argnums, str)
    chosen: list[Slot] = list(argnums) if several else [argnums]  # type: ignore[arg-type, list-item]
    if not chosen or not all(isinstance(which, int | str) for which in chosen):
        raise ValueError(f"argnums must be a position or a name, or several; got {argnums!r}")

    def gradient(*args: Any, **kwargs: Any) -> Hypergradient:
        given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        slots = [_slot(run, which, given) for which in chosen]
        if len({*slots}) < len(slots):
            raise ValueError(f"argnums names an argument twice; got {argnums!r}")
        point = [_as_point(given[slot], str(which)) for which, slot in zip(chosen, slots, strict=True)]

        def f(point: list[Tree], **more: Any) -> tuple[Tensor, Any]:
            passed = given | dict(zip(slots, point, strict=True))
            of_args = [passed[i] for i in range(len(args))]
            with differentiable_attention():
                result = run(*of_args, **{name: passed[name] for name in kwargs}, **more)
            return _value(result, has_aux)

        if isinstance(adjoint, Forward):
            result = _forward(f, point, adjoint.chunk_size)
        elif isinstance(adjoint, Implicit):
            result = _implicit(f, point, adjoint)
        else:
            result = _reverse(f if adjoint is None else partial(f, adjoint=adjoint), point, adjoint)
        grads, *rest = _tree.unshare(result, _tree.tensors((args, kwargs, point)))
        if several:
            by_name = all(isinstance(which, str) for which in chosen)
            grads = dict(zip(chosen, grads, strict=True)) if by_name else tuple(grads)
        return Hypergradient(grads if several else grads[0], *rest)

    return gradient


def _reverse(f: Function, point: list[Tree], adjoint: Adjoint | None) -> tuple[Any, ...]:
    leaves, structure = _tree.flatten(point)

    def with_gradient(*leaves: Tensor) -> tuple[Tensor, Any]:
        value, aux = f(_tree.unflatten(structure, leaves))
        # The last steps of Truncated need not depend on the arguments.
        if not value.requires_grad and not isinstance(adjoint, Truncated):
            raise _independent()
        if not value.requires_grad:
            return value, ([torch.zeros_like(leaf) for leaf in leaves], aux)
        # Because torch.func.grad keeps the whole backward pass for a further derivative, which more than
        # doubles the memory.
        further = is_tracing() or any(layer.requires_grad for layer in layers(value)[1:])
        grads = torch.autograd.grad(
            value, leaves, create_graph=further, allow_unused=True, materialize_grads=True
        )
        return value, (grads, aux)

    value, _, (grads, aux) = vjp(with_gradient, *leaves, has_aux=True)  # type: ignore[misc]
    return _tree.unflatten(structure, grads), value, aux


def _independent() -> ValueError:
    return ValueError(
        "the number that run returns does not depend on the chosen arguments (detach, .item() and "
        "comparisons cut the path)"
    )


def _implicit(f: Callable[..., Any], point: list[Tree], adjoint: Implicit) -> tuple[Any, ...]:
    """Differentiate also by a report, whose cotangent says how well the system was solved."""

    def reporting(point: list[Tree], report: Tensor) -> tuple[Tensor, Any]:
        return f(point, adjoint=Reporting(adjoint.solver, adjoint.iterations, report=report))

    report = torch.zeros(3, dtype=torch.float64, device=_tree.leaves(point)[0].device)
    (grads, report), (value, aux) = grad_and_value(reporting, (0, 1), has_aux=True)(point, report)
    residual, remaining, systems = report.unbind()
    if is_readable(systems) and not systems:
        raise ValueError(
            "the number that run returns does not depend on the end of a run with adjoint=Implicit(...): "
            "pass the keyword adjoint on to train or scan, and use the final carry, not the trajectory"
        )
    return grads, value, aux, residual, remaining


def _forward(f: Function, point: list[Tree], chunk_size: int | None) -> tuple[list[Tree], Tensor, Any]:
    leaves, structure = _tree.flatten(point)

    def along(*direction: Tensor) -> tuple[Tensor, Tensor, Any]:
        """The derivative in one direction, the value and aux."""

        def value_of(*leaves: Tensor) -> tuple[Tensor, Any]:
            value, aux = f(_tree.unflatten(structure, leaves))
            if unpack_dual(value).tangent is None:
                raise _independent()
            return value, aux

        value, slope, aux = jvp(value_of, tuple(leaves), direction, has_aux=True)  # type: ignore[misc]
        return slope, value, aux

    sizes = [leaf.numel() for leaf in leaves]
    rows = torch.eye(sum(sizes), dtype=torch.float64).split(sizes, dim=1)
    directions = [
        row.to(leaf.device, leaf.dtype).reshape(-1, *leaf.shape)
        for row, leaf in zip(rows, leaves, strict=True)
    ]
    if sum(sizes) == 1:
        slope, value, aux = along(*(direction[0] for direction in directions))
        slopes = slope[None]
    else:
        slopes, *same = vmap(along, chunk_size=chunk_size)(*directions)
        value, aux = _tree.map(lambda leaf: leaf[0], same)
    grads = [
        slope.reshape(leaf.shape).to(leaf.dtype)
        for slope, leaf in zip(slopes.split(sizes), leaves, strict=True)
    ]
    return _tree.unflatten(structure, grads), value, aux


def _check_takes_adjoint(run: Callable[..., Any], adjoint: Adjoint) -> None:
    parameters = inspect.signature(run).parameters
    if "adjoint" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    raise ValueError(
        f"hypergrad passes adjoint={adjoint!r} to run, which takes no such keyword. Write\n"
        f"    def run({', '.join([*parameters, 'adjoint=gd.adjoints.Reverse()'])}):\n"
        f"        ... gd.train(..., adjoint=adjoint)"
    )


def _slot(run: Callable[..., Any], which: Slot, given: dict[Any, Any]) -> Slot:
    """Return the position or the keyword by which an argument was passed."""
    slot = which
    if which not in given:
        names = list(inspect.signature(run).parameters)
        if isinstance(which, int) and 0 <= which < len(names):
            slot = names[which]
        elif which in names:
            slot = names.index(str(which))
    if slot in given:
        return slot
    names = [f"{name}=" for name in given if isinstance(name, str)]
    passed = ", ".join([f"{len(given) - len(names)} by position", *names])
    raise ValueError(f"argnums names {which!r}, which the call did not pass; it passed {passed}")


def _as_point(argument: Any, name: str) -> Tree:
    """The argument with floats as 0-d tensors, if all its leaves are float tensors."""
    if isinstance(argument, Real) and not isinstance(argument, bool):
        return torch.tensor(float(argument), dtype=torch.float64)
    argument = _tree.as_tensors(argument)
    if not _tree.leaves(argument):
        raise ValueError(f"argument {name} has no tensor leaves")
    for path, leaf in _tree.named_leaves(argument, f"argument {name}"):
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            got = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
            raise TypeError(f"{path} is {got}; give what is differentiated as float tensors")
    return argument


def _value(result: Any, has_aux: bool) -> tuple[Tensor, Any]:
    if has_aux and (not isinstance(result, tuple) or len(result) != 2):
        raise TypeError(f"run must return (number, aux) with has_aux=True; got {type(result).__name__}")
    value, aux = result if has_aux else (result, ())
    aux = _tree.map(torch.as_tensor, aux)
    if not isinstance(value, Tensor):
        hint = "; a pair needs has_aux=True" if isinstance(value, tuple) else ""
        hint = "; .item() and float() cut the derivative" if isinstance(value, float) else hint
        raise TypeError(f"run must return a 0-d float tensor; got {type(value).__name__}{hint}")
    if value.shape or not value.is_floating_point():
        raise ValueError(f"run must return a 0-d float tensor; got {value.dtype} {tuple(value.shape)}")
    return value, aux
