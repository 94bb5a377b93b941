"""The derivative of a run with respect to what governs it: five ways, one switch."""

import inspect
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad_and_value, jvp, vjp, vmap

from . import _tree
from ._errors import check_choice, check_int, warn
from ._scan._scan import BACKENDS, call, is_readable
from ._through import FixedPoint, Through, ask
from ._tree import Tree

MODES = ("reverse", "checkpoint", "forward", "truncated", "implicit")
_MODE_OF = {"last": "truncated", "solver": "implicit", "iterations": "implicit", "chunk_size": "forward"}
Slot = int | str
Function = Callable[[list[Tree]], tuple[Tensor, Any]]


class Hypergradient(NamedTuple):
    """The derivative of a run, and what it is the derivative of; see `hypergrad`.

    Attributes:
        grads: dF/dφ, a tree like the argument; for several, a tuple, or a dict by name.
        value: F, 0-d.
        aux: what else the function returned, with `has_aux=True`.
        residual: in mode `"implicit"`, ‖(I − Jᵀ)u − v‖ / ‖v‖ of the linear system, 0-d.
        remaining: in mode `"implicit"`, u·(Φ(θ) − θ), 0-d: what F would still change by, to first order, if
            the run went on to its fixed point.

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
    mode: str = "reverse",
    last: int | None = None,
    solver: str | None = None,
    iterations: int | None = None,
    chunk_size: int | None = None,
    has_aux: bool = False,
    backend: str = "eager",
) -> Callable[..., Hypergradient]:
    """Turn a function that trains and returns a number into the function that gives its derivative.

    dF/dφ = ∂F/∂φ + ∂F/∂θ_T · dθ_T/dφ,  dθ_{t+1}/dφ = J_t · dθ_t/dφ + ∂Φ_t/∂φ,  J_t = ∂Φ_t/∂θ_t

    where F(φ) = run(φ) and θ_{t+1} = Φ_t(θ_t, φ) are the steps. φ is any argument that reaches the number:
    lr, a schedule [T], momentum, initial parameters, weights of the data, regularisation. The modes:

    - `"reverse"`: from the last step to the first. A few times the time of the run for any number of
      arguments; memory O(T).
    - `"checkpoint"`: the same number with memory O(√T), for one more run. A `train(checkpoint=)` of your
      own stands.
    - `"forward"`: along with the run; memory does not grow with T. Time grows with the entries of φ, all of
      which are vmapped: few, then.
    - `"truncated"`: reverse through the `last` steps of each run alone, the carry before them held fixed
      (with `every=` in `train`, from the last step before them that is recorded): biased, and cheap.
    - `"implicit"`: at the end of a run that has converged, θ = Φ(θ, φ), by

          dF/dφ = ∂F/∂φ + u·∂Φ/∂φ,  (I − Jᵀ) u = ∂F/∂θ

      whatever the way there: memory of one step, and no dependence on the initial parameters. Φ is the
      last step of the run, a transformation's state included: it has a fixed point if every step takes the
      same batch, as in `full_batch`. The function calls `train` exactly once, and its number follows from
      the final parameters: a trajectory counts as constant. For plain gradient descent I − J = lr·∇²L, and
      the solvers work with Hessian-vector products.

    Args:
        run: returns a 0-d float tensor, or with has_aux a pair `(number, tree of tensors)`.
        argnums: which arguments: a position or a name, or several.
        mode: as above.
        last: for `"truncated"`, how many steps at the end, at least 1.
        solver: for `"implicit"`: `"cg"` (None), conjugate gradients, for a symmetric J: plain gradient
            descent; or `"neumann"`, u = Σ_k (Jᵀ)ᵏ v, for any step that converges, as fast as the run does.
        iterations: for `"implicit"`, of the solver, 100 (None); each is a backward pass through one step.
        chunk_size: for `"forward"`, how many entries of φ at once; None: all.
        has_aux: whether run returns a pair.
        backend: `"eager"` calls run each time. Another one takes run with its derivative for the one step
            of a `scan` on that backend: traced once, and repeated without Python for as long as shapes, T
            and all that run can reach but the values of tensors stay. With `"native"` short runs take a
            fifteenth of the time. Side effects of run happen in the trace alone, values (of lr, say) are
            not checked, and Ctrl-C waits for the end. Not for `"implicit"`.

    Returns:
        A function of run's arguments that gives a `Hypergradient`. Chosen arguments are trees of float
        tensors; a Python float becomes a 0-d float64 tensor. It can be vmapped and swept, and in all modes
        but `"implicit"` differentiated again.

    Raises:
        TypeError: a chosen argument has a leaf that is no float tensor; run returns no tensor.
        ValueError: there is no such argument; run returns no 0-d real float tensor, or one that does not
            depend on the arguments; an option of another mode; in `"implicit"`, not exactly one `train`.
        BackendError: (a RuntimeError) run decides on the value of a tensor, or has what the backend does
            not cover; see `scan`.
        UserWarning: in mode `"implicit"` the residual is above 0.01, or what remains above a hundredth of
            F (where their values can be read).

    Example:
        >>> problem = gd.problems.stock_regression()
        >>> step = gd.make_step(problem.loss_fn)
        >>> index = gd.full_batch(389, steps=50)
        >>> def run(lr):
        ...     final, _ = gd.train(step, problem.params, problem.data, index, lr)
        ...     return problem.loss_fn(final, problem.data)
        >>> reverse = gd.hypergrad(run)(0.01)
        >>> forward = gd.hypergrad(run, mode="forward")(0.01)
        >>> print(f"{reverse.grads:.6e} {forward.grads:.6e}")
        -1.223454e-02 -1.223454e-02

    References:
        D. Maclaurin, D. Duvenaud, R. Adams, "Gradient-based hyperparameter optimization through reversible
        learning", 2015.
        L. Franceschi, M. Donini, P. Frasconi, M. Pontil, "Forward and reverse gradient-based hyperparameter
        optimization", 2017.
        A. Griewank, "Achieving logarithmic growth of temporal and spatial complexity in reverse automatic
        differentiation", 1992.
        A. Shaban, C.-A. Cheng, N. Hatch, B. Boots, "Truncated back-propagation for bilevel optimization",
        2019.
        F. Pedregosa, "Hyperparameter optimization with approximate gradient", 2016: conjugate gradients.
        J. Lorraine, P. Vicol, D. Duvenaud, "Optimizing millions of hyperparameters by implicit
        differentiation", 2020: the Neumann series.
    """
    check_choice("mode", mode, MODES)
    if check_choice("backend", backend, BACKENDS) != "eager" and mode == "implicit":
        raise ValueError(f"mode='implicit' iterates in Python, with backend='eager'; got {backend!r}")
    options = {"last": last, "solver": solver, "iterations": iterations, "chunk_size": chunk_size}
    for name, value in options.items():
        if value is not None and mode != _MODE_OF[name]:
            raise ValueError(f"{name}= is for mode={_MODE_OF[name]!r}; got {value!r} in mode={mode!r}")
    if mode == "truncated" and last is None:
        raise ValueError("mode='truncated' needs last=, the number of steps to go back")
    last = None if last is None else check_int("last", last, 1)
    chunk_size = None if chunk_size is None else check_int("chunk_size", chunk_size, 1)
    solver = check_choice("solver", solver or "cg", ("cg", "neumann"))
    iterations = check_int("iterations", 100 if iterations is None else iterations, 1)
    several = isinstance(argnums, Sequence) and not isinstance(argnums, str)
    chosen: list[Slot] = list(argnums) if several else [argnums]  # type: ignore[arg-type, list-item]
    if not chosen or not all(isinstance(which, int | str) for which in chosen):
        raise ValueError(f"argnums must be a position or a name, or several; got {argnums!r}")

    def differentiate(f: Function, point: list[Tree]) -> tuple[Any, ...]:
        if mode == "implicit":
            return _implicit(f, point, solver, iterations)
        if mode == "forward":
            return _forward(f, point, chunk_size)
        through = Through(checkpoint="sqrt" if mode == "checkpoint" else None, last=last)
        with ask(through):
            return _reverse(f, point, mode)

    def gradient(*args: Any, **kwargs: Any) -> Hypergradient:
        slots = [_slot(run, which, args, kwargs) for which in chosen]
        point = [
            _as_point((args[slot] if isinstance(slot, int) else kwargs[slot]), str(which))
            for which, slot in zip(chosen, slots, strict=True)
        ]

        # Without those that are chosen: another number is no other function.
        others = [None if i in slots else arg for i, arg in enumerate(args)]
        named = {name: None if name in slots else arg for name, arg in kwargs.items()}

        def f(point: list[Tree]) -> tuple[Tensor, Any]:
            given = dict(zip(slots, point, strict=True))
            result = run(
                *(given.get(i, arg) for i, arg in enumerate(others)),
                **{name: given.get(name, arg) for name, arg in named.items()},
            )
            return _value(result, has_aux)

        result = call(lambda: differentiate(f, point), backend)
        if backend in ("eager", "auto"):  # a compiled loop gives new tensors
            result = _tree.unshare(result, _tree.tensors((args, kwargs, point)))
        grads, value, aux, *report = result
        if not several:
            grads = grads[0]
        else:
            by_name = all(isinstance(which, str) for which in chosen)
            grads = dict(zip(chosen, grads, strict=True)) if by_name else tuple(grads)
        return Hypergradient(grads, value, aux, *report)

    return gradient


def _reverse(f: Function, point: list[Tree], mode: str) -> tuple[list[Tree], Tensor, Any]:
    def checked(point: list[Tree]) -> tuple[Tensor, Any]:
        value, aux = f(point)
        if mode != "truncated":
            _check_dependence(value)
        return value, aux

    grads, (value, aux) = grad_and_value(checked, has_aux=True)(point)
    return grads, value, aux


def _forward(f: Function, point: list[Tree], chunk_size: int | None) -> tuple[list[Tree], Tensor, Any]:
    leaves, structure = _tree.flatten(point)

    def along(*direction: Tensor) -> tuple[Tensor, Tensor, Any]:
        """The derivative in one direction, the value and aux."""

        def doubled(*leaves: Tensor) -> tuple[Tensor, Any]:
            value, aux = f(_tree.unflatten(structure, leaves))
            return value, (value, aux)

        _, slope, rest = jvp(doubled, tuple(leaves), direction, has_aux=True)  # type: ignore[misc]
        return slope, *rest

    sizes = [leaf.numel() for leaf in leaves]
    directions = [
        torch.eye(sum(sizes), dtype=leaf.dtype, device=leaf.device)
        .split(sizes, dim=1)[i]
        .reshape(-1, *leaf.shape)
        for i, leaf in enumerate(leaves)
    ]
    if sum(sizes) == 1:
        slope, value, aux = along(*(direction[0] for direction in directions))
        slopes = slope[None]
    else:
        slopes, *rows = vmap(along, chunk_size=chunk_size)(*directions)
        value, aux = _tree.map(lambda leaf: leaf[0], rows)
    grads = [
        slope.reshape(leaf.shape).to(leaf.dtype)
        for slope, leaf in zip(slopes.split(sizes), leaves, strict=True)
    ]
    return _tree.unflatten(structure, grads), value, aux


def _implicit(f: Function, point: list[Tree], solver: str, iterations: int) -> tuple[Any, ...]:
    """Differentiate at the fixed point where the one run in f ends."""
    end = FixedPoint()
    with ask(Through(fixed_point=end)):
        value, aux = f(point)
    if not end.runs:
        raise ValueError("mode='implicit' needs a function that calls train once; it called it never")
    leaves, structure = _tree.flatten(end.carry)
    moving = [i for i, leaf in enumerate(leaves) if leaf.is_floating_point()]

    def around(carry: list[Tensor], point: list[Tree]) -> tuple[Tensor, list[Tensor]]:
        """F and Φ as functions of the carry at the end and of φ."""
        filled = dict(enumerate(leaves)) | dict(zip(moving, carry, strict=True))
        given = FixedPoint(_tree.unflatten(structure, list(filled.values())), end.trajectory)
        with ask(Through(fixed_point=given)):
            value, _ = f(point)
        _check_dependence(
            value, "; in mode='implicit' a trajectory is a constant: use the final parameters"
        )
        image = _tree.leaves(given.image)
        return value, [image[i] for i in moving]

    start = [leaves[i] for i in moving]
    (_, image), pull, *_ = vjp(around, start, point)
    v, direct = pull((torch.ones_like(value), _tree.map(torch.zeros_like, image)))

    def transposed(u: list[Tensor]) -> tuple[list[Tensor], list[Tree]]:
        """Jᵀu and uᵀ·∂Φ/∂φ."""
        return pull((torch.zeros_like(value), u))

    def system(u: list[Tensor]) -> list[Tensor]:
        return _plus(u, transposed(u)[0], -1)

    u = {"cg": _conjugate_gradients, "neumann": _neumann}[solver](system, v, iterations)
    residual = _ratio(_tree.norm(_plus(v, system(u), -1)), _tree.norm(v))
    remaining = _tree.dot(u, _plus(image, start, -1))
    if is_readable(residual):
        _warn_of_error(value, residual, remaining, iterations)
    return _plus(direct, transposed(u)[1]), value, aux, residual, remaining


def _warn_of_error(value: Tensor, residual: Tensor, remaining: Tensor, iterations: int) -> None:
    said = ""
    if residual > 0.01:
        said = (
            f"left a residual of {residual:.2g} after {iterations} iterations: take more, or "
            f"solver='neumann' for a step that is not plain gradient descent"
        )
    elif remaining.abs() > 0.01 * value.abs():
        said = (
            f"met a run that has not converged: its number, {value:.3g}, would still change by about "
            f"{remaining:.2g}; take more steps, all on the same batch"
        )
    if said:
        warn(f"mode='implicit' {said}")


def _check_dependence(value: Tensor, hint: str = "") -> None:
    if not value.requires_grad:
        raise ValueError(
            f"the number that run returns does not depend on the chosen arguments "
            f"(detach, .item() and comparisons cut the path{hint})"
        )


def _conjugate_gradients(
    system: Callable[[list[Tensor]], list[Tensor]], v: list[Tensor], iterations: int
) -> list[Tensor]:
    """Solve A u = v for a symmetric, positive definite A."""
    u, residual, direction = _tree.map(torch.zeros_like, v), v, v
    square = _tree.dot(v, v)
    for _ in range(iterations):
        image = system(direction)
        length = _ratio(square, _tree.dot(direction, image))
        u, residual = _plus(u, direction, length), _plus(residual, image, -length)
        previous, square = square, _tree.dot(residual, residual)
        direction = _plus(residual, direction, _ratio(square, previous))
    return u


def _neumann(
    system: Callable[[list[Tensor]], list[Tensor]], v: list[Tensor], iterations: int
) -> list[Tensor]:
    """Solve A u = v by u ← u + (v − A u), which sums (I − A)ᵏ v."""
    u = v
    for _ in range(iterations - 1):
        u = _plus(u, _plus(v, system(u), -1))
    return u


def _plus(a: list[Tensor], b: list[Tensor], scale: Any = 1) -> list[Tensor]:
    return _tree.map(lambda x, y: x + scale * y, a, b)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b; where b is zero, a, which is zero then."""
    return a / torch.where(b == 0, torch.ones_like(b), b)


def _slot(run: Callable[..., Any], which: Slot, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Slot:
    """Where an argument was passed: its position, or its keyword."""
    if isinstance(which, int) and 0 <= which < len(args):
        return which
    asked, names = which, list(inspect.signature(run).parameters)
    if isinstance(which, int) and 0 <= which < len(names):
        which = names[which]
    if isinstance(which, str) and which not in kwargs and which in names:
        which = names.index(which)
    if which in kwargs or (isinstance(which, int) and 0 <= which < len(args)):
        return which
    passed = [f"{len(args)} by position", *(f"{name}=" for name in kwargs)]
    raise ValueError(f"argnums names {asked!r}, which the call did not pass; it passed {', '.join(passed)}")


def _as_point(argument: Any, name: str) -> Tree:
    """The argument with floats as 0-d tensors, if all its leaves are float tensors."""
    if isinstance(argument, Tensor) and argument.is_floating_point():
        return argument
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
