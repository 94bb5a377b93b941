"""The derivative at a fixed point, by a linear system instead of the steps."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress, islice
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import _tree
from .._errors import BackendError, check_choice, check_int, warn
from .._numerics import safe_ratio, usable_scale
from .._scan._adjoint import Adjoint, Segments
from .._scan._body import Active, Body, Flags, Leaves, filled, spread
from .._scan._derived import pullback
from .._scan._loop import Bound
from .._torch._autograd import is_readable
from .._tree import Tree
from ._truncated import Constant


@dataclass(frozen=True)
class Implicit(Adjoint):
    """Differentiate the fixed point in which the run ends, whatever the steps before.

        θ = Φ(θ, φ),  dF/dφ = ∂F/∂φ + u·∂Φ/∂φ,  (I − Jᵀ) u = ∂F/∂θ

    The run goes forward without a graph: memory of one step, and no dependence on the initial parameters.
    What it recorded is a constant. Φ is the last step of the run, a transformation's state included, so a
    fixed point exists if every step takes the same batch, as in `full_batch`. Integers and bools in the
    carry do not move. For plain gradient descent I − J = lr·∇²L: the solvers take Hessian-vector products.
    The solver is a loop on the backend of the run. There is no forward mode and no second derivative.

    Args:
        solver: `"cg"`, conjugate gradients, for a symmetric J: plain gradient descent. `"neumann"`,
            u = Σ_k (Jᵀ)ᵏ v with v = ∂F/∂θ, for any step that converges. It converges as fast as the run.
        iterations: of the solver, at least 1; each is a backward pass through one step.

    Raises:
        ValueError: an unknown solver, iterations out of range, or (in the run) a run of no step.
        BackendError: (in the derivative) forward mode, or a second derivative.
        UserWarning: (in the derivative, where values can be read) the residual ‖(I − Jᵀ)u − v‖ / ‖v‖ is
            above 0.01; or F would still change by u·(Φ(θ) − θ) if the run went on, and that is above a
            hundredth of what a move as long as θ, or as the whole run, could change.

    Example:
        >>> def run(decay, adjoint=gd.adjoints.Implicit("cg", 10)):
        ...     step = gd.make_step(lambda w, batch: (w - 1) ** 2 + decay * w**2)
        ...     plan = gd.full_batch(1, 50)
        ...     return gd.train(step, torch.tensor(0.0), None, plan, 0.25, adjoint=adjoint)[0]
        >>> torch.func.grad(run)(torch.tensor(1.0))  # of 1 / (1 + decay)
        tensor(-0.2500)

    References:
        F. Pedregosa, "Hyperparameter optimization with approximate gradient", 2016: conjugate gradients.
        J. Lorraine, P. Vicol, D. Duvenaud, "Optimizing millions of hyperparameters by implicit
        differentiation", 2020: the Neumann series.
    """

    solver: str = "cg"
    iterations: int = 100
    counts_from_end: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_choice("solver", self.solver, ("cg", "neumann"))
        check_int("iterations", self.iterations, 1)

    def run_forward(self, loop: Bound, consts: Leaves, init: Leaves, xs: Leaves) -> list[Tensor]:
        results = Constant().run_forward(loop, consts, init, xs)
        final, ys = results[: len(init)], results[len(init) :]
        step, last = replace(loop, length=1), [x[-1:] for x in xs]
        return [*AtFixedPoint(self, init).run_forward(step, consts, final, last)[: len(init)], *ys]

    def segments(self, steps: int, every: int) -> Segments:
        return Segments(steps, self, 1)

    def end(self, last_step: Callable[[Adjoint], Tree], init: Tree, final: Tree) -> Tree:
        return last_step(AtFixedPoint(self, _tree.leaves(init)))

    def check_steps(self, steps: int) -> None:
        if not steps:
            raise ValueError(
                "Implicit differentiates the last step of a run, which needs at least one step"
            )


@dataclass(frozen=True, eq=False)
class AtFixedPoint(Adjoint):
    """The adjoint of one step from the end of a run: the carry stays, and its derivative is that of Φ."""

    implicit: Implicit
    init: Leaves

    def run_forward(self, loop: Bound, consts: Leaves, init: Leaves, xs: Leaves) -> list[Tensor]:
        fixed, start = _tree.cut(init), _tree.cut(self.init)
        moving = [leaf.is_floating_point() for leaf in fixed]
        ends = list(compress(fixed, moving)), list(compress(start, moving))
        size = (_tree.norm(ends[0]) + _tree.norm(_plus(*ends, -1))).to(torch.float64)
        report = size.expand(3)
        if isinstance(self.implicit, Reporting):
            report = report + self.implicit.report.to(size.device)
        rule = _Solve(self.implicit.solver, self.implicit.iterations)
        results = replace(loop, body=_reporting(loop.body), rule=rule)(report, *consts, *fixed, *xs)
        carry = [
            leaf + (image - image.detach()) if flag else leaf
            for leaf, image, flag in zip(fixed, results, moving, strict=False)
        ]
        return [*carry, *_tree.cut(results[len(init) :])]


@dataclass(frozen=True, eq=False)
class Reporting(Implicit):
    """`Implicit` whose backward pass gives `report` [3], zeros, a cotangent: residual, remaining, 1."""

    report: Tensor = field(kw_only=True)


def _reporting(body: Body) -> Body:
    """Make the body with a report as its first input, which it ignores."""
    report = body.carry[0]._replace(shape=(3,), dtype=torch.float64)

    def function(report: Tensor, *tensors: Tensor) -> list[Tensor]:
        return list(body.graph(*tensors))

    found = body.derive("reporting", function, (report, *body.consts), body.carry, body.x)
    found.opaque = body.opaque
    return found


@dataclass(frozen=True)
class _Solve:
    """The backward pass of one step at a fixed point.

    The body's first input is the report. Its entries are the scale of θ, and its cotangent is the report.
    """

    solver: str
    iterations: int

    def check_forward_mode(self) -> None:
        raise BackendError(
            "Implicit has no forward mode: it solves for the cotangent of a fixed point. Take "
            "torch.func.grad or vjp of the run, or adjoint=Reverse()"
        )

    def backward(
        self, loop: Bound, active: Active, leaves: Leaves, cotangents: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        body = loop.body
        consts, theta, xs = body.split(leaves)
        v = filled(cotangents[: len(body.carry)], theta, active.carry)
        inputs = [*consts, *theta, *[x[0] for x in xs]]
        begin = [torch.zeros_like(leaf) for leaf in v]
        begin += [*v, *v] if self.solver == "cg" else []
        solver = self._body(body, active.carry)
        solving = replace(loop, body=solver, length=self.iterations, rule=_Once())
        u = solving(*inputs, *v, *begin)[: len(v)]
        with body.as_traced():
            image, pull = pullback(body.graph, inputs, active.inputs, active.carry)
            pulled = iter(pull(tuple(u)))
        is_active, carry, of_x = body.split(active.inputs)
        of_consts, of_theta = list(islice(pulled, sum(is_active))), list(islice(pulled, len(v)))
        size = _tree.norm(v)
        residual = _tree.norm(_plus(v, _plus(u, of_theta, -1), -1)) / usable_scale(size)
        remaining = _tree.dot(u, _plus(image, compress(theta, active.carry), -1))
        self._warn(residual, remaining, size * consts[0][0])
        if is_active[0]:
            of_consts[0] = torch.stack([residual, remaining, torch.ones_like(residual)]).to(torch.float64)
        found = [*of_consts, *[x[None] for x in pulled]]
        return spread(found, (*is_active, *[False] * len(carry), *of_x))

    def _body(self, body: Body, carry: Flags) -> Body:
        """Make the body of the solver's loop, over u alone, or u, its residual and direction."""
        consts = (*body.consts, *body.carry, *body.x)
        moving = (*[False] * len(body.consts), *carry, *[False] * len(body.x))

        def function(*tensors: Tensor) -> list[Tensor]:
            inputs, rest = tensors[: len(consts)], tensors[len(consts) :]
            v, *state = (list(rest[at : at + sum(carry)]) for at in range(0, len(rest), sum(carry)))
            _, pull = pullback(body.graph, inputs, moving, carry)

            def system(u: Leaves) -> list[Tensor]:
                return _plus(u, pull(tuple(u)), -1)

            if self.solver == "neumann":
                return _plus(state[0], _plus(v, system(state[0]), -1))
            return _conjugate(system, *state)

        u = tuple(compress(body.carry, carry))
        state = u * (3 if self.solver == "cg" else 1)
        return body.derive(("solving", self.solver, carry), function, (*consts, *u), state, ())

    def _warn(self, residual: Tensor, remaining: Tensor, scale: Tensor) -> None:
        bare = _tree.unwrap([residual, remaining, scale])
        if not all(type(leaf) is Tensor and is_readable(leaf) for leaf in bare):  # as in a trace
            return
        worst, ahead = float(bare[0].max()), float(bare[1].abs().max())
        if worst > 0.01:
            other = ", or solver='neumann' if the step is not plain gradient descent"
            warn(
                f"Implicit({self.solver!r}, {self.iterations}) left a residual of {worst:.2g}: take more "
                f"iterations{other if self.solver == 'cg' else ''}"
            )
        elif (bare[1].abs() > 0.01 * bare[2]).any():
            warn(
                f"Implicit differentiates a run that has not converged: its number would still change by "
                f"about {ahead:.2g}; take more steps, all on the same batch"
            )


@dataclass(frozen=True)
class _Once:
    """The rule of the solver's loop, which has no derivative."""

    def backward(self, *_: Any) -> Any:
        raise BackendError(
            "Implicit has no second derivative: its backward pass is a solver. Take Reverse() or "
            "Checkpoint()"
        )

    check_forward_mode = backward


def _conjugate(
    system: Callable[[Leaves], Leaves], u: Leaves, residual: Leaves, along: Leaves
) -> list[Tensor]:
    """Take an iteration of conjugate gradients for A u = v, with A symmetric and positive definite."""
    image, square = system(along), _tree.dot(residual, residual)
    length = safe_ratio(square, _tree.dot(along, image))
    residual = _plus(residual, image, -length)
    ratio = safe_ratio(_tree.dot(residual, residual), square)
    return [*_plus(u, along, length), *residual, *_plus(residual, along, ratio)]


def _plus(a: Iterable[Tensor], b: Iterable[Tensor], scale: Any = 1) -> list[Tensor]:
    return [(x + scale * y).to(x.dtype) for x, y in zip(a, b, strict=True)]
