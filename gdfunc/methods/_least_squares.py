"""Nonlinear least squares: Gauss and Newton's method, and its damped form by Levenberg and Marquardt."""

from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import jacfwd, jvp, vjp

from .. import _tree
from .._errors import check_choice, check_function, check_int, check_scalar
from .._gradients import SharedLoss, apart
from .._inputs import check_inputs, kind
from .._numerics import Scalar, norms, safe_ratio, widen
from .._scan import scan
from .._stateful import Bound
from .._step import Step, apply_updates, check_lr, copy_params, learning_rate, params_of, scalar, step_maker
from .._tree import Tree

ResidualFn = Callable[[Tree, Tree], Tree]
_UNRESOLVED = 4096  # roundings of the loss: a smaller gain is taken on trust


class Linearised(NamedTuple):
    """Least squares with the residuals replaced by their tangent, and its damped solution."""

    residuals: Tensor  # r, [m], in the dtype that residual_fn gave
    gradient: Tensor  # Jᵀr, [P]
    update: Tensor  # u, [P]
    change: Tensor  # J·u, [m]
    scale: Tensor  # of the parameters: the largest norms of the columns of J so far


Solver = Callable[[Callable[[Tensor], Tensor], Tensor, Tensor | None, Tensor], Linearised]


class LevenbergMarquardtState(NamedTuple):
    """The carry of `levenberg_marquardt`.

    Attributes:
        params: where the next residuals are measured.
        damping: μ of the next step.
        growth: the factor by which a rejected step raises μ.
        scale: D, [P]; 0-d for `solver="cg"`.
        gain: ρ of the last step, the decrease over the predicted decrease; the step was rejected if ρ <= 0.
    """

    params: Tree
    damping: Tensor
    growth: Tensor
    scale: Tensor
    gain: Tensor


@step_maker
def gauss_newton(residual_fn: ResidualFn, *, solver: str = "qr", iterations: int = 20) -> Step:
    """Make the step of Gauss and Newton: least squares with the residuals replaced by their tangent.

    θ' = θ − lr·u,  u = argmin ‖J·u − r‖,  L(θ) = mean r(θ)²

    With lr = 1 it solves a linear problem in one step, and converges quadratically near a minimum with
    small residuals. From farther away it may diverge, where `levenberg_marquardt` does not.

    Args:
        residual_fn: `(params, batch) -> residuals`, a tree of float tensors, m numbers in total.
        solver: `"qr"` orthogonalises J [m, P], for up to about a hundred parameters. It is as accurate as
            least squares can be. `"cg"` needs no matrix: conjugate gradients on products with J and Jᵀ.
            Where J has dependent columns, both give the solution of least norm, so that nothing moves
            along directions that the residuals do not see.
        iterations: of `"cg"`, an int >= 1. In exact arithmetic P of them suffice, and more do no harm. A
            derivative through `"cg"` is that of its iterations, and NaN where the gradient is zero.

    Returns:
        A `Step`, whose carry is the parameters. The loss is the mean of the squared residuals.

    Raises:
        TypeError: residual_fn is no function of two arguments, or has state; (in the step) it returns
            something else than float tensors.
        ValueError: a hyperparameter is out of range; (in the step) params and batch do not fit.

    Example:
        >>> x = torch.tensor([0.0, 0.0, 2.0])
        >>> step = gd.methods.gauss_newton(lambda params, y: params["w"] * x - y)
        >>> step({"w": torch.tensor(0.0)}, torch.tensor([0.0, 1.0, 6.0]), 1.0)
        ({'w': tensor(3.)}, tensor(12.3333))

    References:
        A. Björck, "Numerical methods for least squares problems", 1996, sections 2.4 and 7.4.
    """
    solve = _solver(residual_fn, solver, iterations)

    def advance(params: Tree, batch: Tree, lr: Scalar) -> tuple[Tree, Tensor, Tree]:
        found = _linearised(residual_fn, solve, params, batch, None, scalar(0.0, params))
        return (
            apply_updates(params, _tree.unravel(found.update, params), lr),
            *_loss_and_gradient(found, params),
        )

    return Step(copy_params, advance, None, _accept)


@step_maker
def levenberg_marquardt(
    residual_fn: ResidualFn, *, damping: Scalar = 1e-3, solver: str = "qr", iterations: int = 20
) -> Step:
    """Make the step of Levenberg and Marquardt: Gauss and Newton's, damped by how well it predicted.

    θ' = θ − lr·u,  u = argmin ‖J·u − r‖² + μ·‖D·u‖²,  L(θ) = mean r(θ)²
    ρ = (‖r(θ)‖² − ‖r(θ')‖²) / (‖r‖² − ‖r − lr·J·u‖²)
    ρ > 0:  μ' = μ·max(⅓, 1 − (2ρ − 1)³), ν' = 2;  otherwise θ' = θ, μ' = μ·ν, ν' = 2ν

    D holds the largest norm of each column of J so far, so that the units of the parameters do not matter.
    Residuals that are not finite count as ρ <= 0. Where both decreases are within the rounding of the
    loss, ρ counts as 1, so that the last digits are found too. A step evaluates J once and the residuals
    twice, whether it is rejected or not. μ that has grown as far as the dtype allows is stuck: `train`
    warns.

    Args:
        residual_fn: `(params, batch) -> residuals`, a tree of float tensors, m numbers in total.
        damping: the first μ, a number > 0 or a 0-d tensor.
        solver: `"qr"` orthogonalises J [m, P], for up to about a hundred parameters. `"cg"` needs no
            matrix: conjugate gradients on products with J and Jᵀ. Its D is a number, the largest
            ‖J·g‖/‖g‖ so far, for the gradient g.
        iterations: of `"cg"`, an int >= 1. In exact arithmetic P of them suffice, and more do no harm.

    Returns:
        A `Step`, whose state is a `LevenbergMarquardtState`. The loss is the mean of the squared residuals.

    Raises:
        TypeError: residual_fn is no function of two arguments, or has state; (in the step) it returns
            something else than float tensors, or the state is that of another step.
        ValueError: a hyperparameter is out of range; (in the step) params and batch do not fit.

    Example:
        >>> fit = gd.problems.nist("Misra1a")
        >>> step = gd.methods.levenberg_marquardt(fit.residual_fn)
        >>> index = gd.full_batch(len(fit.data[1]), steps=30)
        >>> def run(start):  # from both starts at once
        ...     return gd.train(step, step.init(start), fit.data, index, 1.0, record=())[0].params
        >>> bool((fit.digits(torch.func.vmap(run)(fit.starts)) > 8).all())
        True

    References:
        K. Levenberg, "A method for the solution of certain non-linear problems in least squares", 1944.
        D. Marquardt, "An algorithm for least-squares estimation of nonlinear parameters", 1963.
        J. Moré, "The Levenberg-Marquardt algorithm: implementation and theory", 1978: D.
        H. B. Nielsen, "Damping parameter in Marquardt's method", 1999: μ.
    """
    solve = _solver(residual_fn, solver, iterations)
    damping = check_scalar("damping", damping, "(0, inf)")

    def init(params: Tree) -> LevenbergMarquardtState:
        params = copy_params(params)
        zero = scalar(0.0, params)
        scale = torch.zeros_like(_tree.ravel(params)) if solver == "qr" else zero.clone()
        return LevenbergMarquardtState(params, scalar(damping, params), zero + 2, scale, zero)

    def advance(
        state: LevenbergMarquardtState, batch: Tree, lr: Scalar
    ) -> tuple[LevenbergMarquardtState, Tensor, Tree]:
        params, lr = state.params, learning_rate(lr, state.params)
        found = _linearised(residual_fn, solve, params, batch, state.damping, state.scale)
        u, old = found.update, widen(found.residuals)
        trial = apply_updates(params, _tree.unravel(u, params), lr)
        new = widen(apart(_residuals_at(residual_fn), params=trial, batch=batch))
        # Because (a − b)·(a + b) keeps digits that a² − b² loses.
        decrease = (old - new) @ (old + new)
        shrunk = (2 - lr) * found.change.square().sum()
        predicted = lr * (shrunk + 2 * state.damping * (found.scale * u).square().sum())
        limits = torch.finfo(predicted.dtype)
        least = _UNRESOLVED * limits.eps * old.square().sum()
        is_unresolved = (predicted <= least) & (decrease.abs() <= least)
        gain = torch.where(is_unresolved, 1.0, safe_ratio(decrease, predicted, -1.0))
        gain = torch.where(gain.isfinite(), gain, -1.0)
        is_good = gain > 0
        factor = torch.where(is_good, (1 - (2 * gain - 1) ** 3).clamp(min=1 / 3), state.growth)
        following = LevenbergMarquardtState(
            _tree.where(is_good, trial, params),
            (state.damping * factor).clamp(limits.eps**2, limits.eps**-2),
            torch.where(is_good, 2.0, (2 * state.growth).clamp(max=1 / limits.eps)),
            found.scale,
            gain,
        )
        return following, *_loss_and_gradient(found, params)

    def trouble(state: LevenbergMarquardtState) -> str | None:
        if state.gain > 0 or state.damping < torch.finfo(state.damping.dtype).eps ** -2:
            return None
        return (
            "levenberg_marquardt is stuck: with the largest damping that the dtype allows, no step had "
            "finite residuals and a lower loss; begin elsewhere, compute in float64, or, if the first loss "
            "is NaN, let train(..., check_finite='loss') name the sample"
        )

    return Step(init, advance, LevenbergMarquardtState, _accept, trouble=trouble, judges_params=True)


def _accept(carry: Any, batch: Tree, lr: Scalar) -> Tree:
    check_lr(lr)
    return check_inputs(params_of(carry), batch)[1]


def _solver(residual_fn: ResidualFn, solver: str, iterations: int) -> Solver:
    if isinstance(residual_fn, Bound | SharedLoss):
        raise TypeError(
            "residual_fn is made by gd.stateful or data_parallel, but this method is for residuals, which "
            "depend on params and batch alone; pass a function (params, batch) -> residuals"
        )
    function, remedy = "a function (params, batch) -> residuals", "such as predictions − targets"
    check_function("residual_fn", residual_fn, ("params", "batch"), function, remedy)
    check_int("iterations", iterations, 1)
    if check_choice("solver", solver, ("qr", "cg")) == "qr":
        return _by_qr

    def by_cg(residuals: Any, at: Tensor, damping: Tensor | None, scale: Tensor) -> Linearised:
        return _by_cg(residuals, at, damping, scale, iterations)

    return by_cg


def _residuals_at(residual_fn: ResidualFn) -> Callable[[Tree, Tree], Tensor]:
    """Check what a residual_fn returns, and join it to a vector."""

    def residuals(params: Tree, batch: Tree) -> Tensor:
        tree = residual_fn(params, batch)
        for path, leaf in _tree.named_leaves(tree, "residuals"):
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
                raise TypeError(f"residual_fn must return float tensors; {path} is {kind(leaf)}")
        leaves = _tree.leaves(tree)
        if not leaves:
            raise TypeError("residual_fn must return float tensors; it returned none")
        if not any(leaf.numel() for leaf in leaves):
            raise TypeError("residual_fn must return float tensors; it returned no numbers")
        dtype = reduce(torch.promote_types, (leaf.dtype for leaf in leaves))
        return _tree.ravel(tree, dtype)

    return residuals


def _with_own(residuals: Callable[[Tensor], Tensor]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Give residuals in at least float32 to be differentiated, beside those in their own dtype."""

    def both(at: Tensor) -> tuple[Tensor, Tensor]:
        r = residuals(at)
        return widen(r), r

    return both


def _linearised(
    residual_fn: ResidualFn, solve: Solver, params: Tree, batch: Tree, damping: Tensor | None, scale: Tensor
) -> Linearised:
    residuals = _residuals_at(residual_fn)

    def solved(params: Tree, batch: Tree) -> Linearised:
        at = _tree.ravel(params)
        return solve(lambda v: residuals(_tree.unravel(v, params), batch), at, damping, scale)

    return apart(solved, params=params, batch=batch)


def _loss_and_gradient(found: Linearised, params: Tree) -> tuple[Tensor, Tree]:
    own = found.residuals
    return widen(own).square().mean().to(own.dtype), _tree.unravel(found.gradient * (2 / len(own)), params)


def _by_qr(
    residuals: Callable[[Tensor], Tensor], at: Tensor, damping: Tensor | None, scale: Tensor
) -> Linearised:
    jacobian, own = jacfwd(_with_own(residuals), has_aux=True)(at)
    r = widen(own)
    if damping is None:
        u = least_squares(jacobian, r)
        return Linearised(own, jacobian.mT @ r, u, jacobian @ u, scale)
    scale = torch.maximum(scale, norms(jacobian.mT).nan_to_num(0.0, 0.0))
    unit = torch.where(scale > 0, scale, 1.0)
    # Columns in units of the scale, so that the damping is μ times the identity.
    u = least_squares(jacobian / unit, r, damping) / unit
    return Linearised(own, jacobian.mT @ r, u, jacobian @ u, scale)


def least_squares(matrix: Tensor, target: Tensor, damping: Tensor | None = None) -> Tensor:
    """Solve min ‖A·x − b‖² + μ·‖x‖² as accurately as by Householder's QR (Björck 1967).

    Where columns depend on each other, x is the solution of least norm. Elementary operations alone, which
    every backend has: modified Gram-Schmidt of A and b, which does to an identity what it does to A. So
    below b stands −x in the end, and below a dependent column a null vector.

    Args:
        matrix: A, [m, P]; with damping, of columns not much longer than 1.
        target: b, [m].
        damping: μ, 0-d; None: 0.

    Returns:
        x, [P].
    """
    unit = torch.ones_like(matrix[0])
    if damping is None:
        unit = norms(matrix.mT)
        unit = torch.where(unit > 0, unit, 1.0)
    x, null, triangle, heights = _orthogonalised(matrix / unit, target)
    if damping is not None:
        damped = torch.cat([triangle, damping.sqrt() * torch.eye(len(x)).to(triangle)])
        x = _orthogonalised(damped, torch.cat([heights, torch.zeros_like(x)])).solution
    # Because rounding along a null direction is divided by √μ, and nothing brings it back.
    rest = torch.cat([null, x[:, None]], 1) / unit[:, None]
    for _ in range(len(x)):
        column, rest = rest[:, 0], rest[:, 1:]
        share = safe_ratio(column @ rest, column @ column)
        rest = rest - column[:, None] * share
    return rest[:, 0]


class Orthogonalised(NamedTuple):
    """Least squares by modified Gram-Schmidt, A = Q·R with b = Q·h + rest.

    A column in the space of those before it has a row of zeros in R, and 0 in the solution.
    """

    solution: Tensor  # of min ‖A·x − b‖, [P]
    null: Tensor  # null vectors of A in the places of dependent columns, [P, P]
    triangle: Tensor  # R, [P, P]
    heights: Tensor  # h, [P]


def _orthogonalised(matrix: Tensor, target: Tensor) -> Orthogonalised:
    (count, size), eye = matrix.shape, torch.eye(matrix.shape[1]).to(matrix)
    rest = torch.cat([torch.cat([matrix, eye]), torch.cat([target, 0 * eye[0]])[:, None]], 1)
    lengths, noise = norms(matrix.mT), 8 * torch.finfo(matrix.dtype).eps
    null: list[Tensor] = []
    rows: list[Tensor] = []
    for j in range(size):
        column, ahead = rest[:, 0], rest[:, 1:]
        squared = column[:count] @ column[:count]
        # It is the sum of the columns with these factors, whose rounding may be all that is left of it.
        is_new = squared > (noise * (lengths @ column[count:].abs())) ** 2
        null.append(torch.where(is_new, 0.0, column[count:]))
        q = torch.where(is_new, column, 0.0) / torch.where(is_new, squared, 1.0).sqrt()
        row = q[:count] @ rest[:count]
        rows.append(torch.cat([row.new_zeros(j), row]))
        rest = ahead - q[:, None] * row[1:]
    made = torch.stack(rows)
    return Orthogonalised(-rest[count:, 0], torch.stack(null, 1), made[:, :-1], made[:, -1])


def _by_cg(
    residuals: Callable[[Tensor], Tensor],
    at: Tensor,
    damping: Tensor | None,
    scale: Tensor,
    iterations: int,
) -> Linearised:
    """Solve the damped least squares by conjugate gradients, in the form that forms no JᵀJ."""
    r, pull, own = vjp(_with_own(residuals), at, has_aux=True)  # type: ignore[misc]

    def push(v: Tensor) -> Tensor:
        return jvp(lambda at: widen(residuals(at)), (at,), (v,))[1]

    # Residuals and J in units of their sizes, because squares of squares overflow or vanish early.
    size = _size(norms(r))
    (slope,) = pull(r / size)
    steepness = norms(push(safe_ratio(slope, norms(slope)))).nan_to_num(0.0, 0.0)
    scale, unit = torch.maximum(scale, steepness), _size(steepness)
    shift = 0.0 if damping is None else damping * (scale / unit).square()

    def iterate(carry: Any, _: None) -> tuple[Any, None]:
        x, left, p, slope = carry
        image = push(p) / unit
        # To the minimum along p, also where rounding has spoiled ⟨p, slope⟩ = ‖slope‖² at the solution.
        length = safe_ratio(p @ slope, image.square().sum() + shift * p.square().sum())
        x, left = x + length * p, left - length * image
        new = pull(left)[0] / unit - shift * x
        share = safe_ratio(new.square().sum(), slope.square().sum())
        return (x, left, new + share * p, new), None

    first = slope / unit
    (u, _, _, _), _ = scan(iterate, (torch.zeros_like(at), r / size, first, first), length=iterations)
    # The derivative of iterations that begin at the solution would be zero, which is wrong, so it is NaN.
    squared = first.square().sum()
    u = u * (size / unit) + torch.where(squared == 0, squared.sqrt(), 0.0)
    return Linearised(own, slope * size, u, push(u), scale)


def _size(norm: Tensor) -> Tensor:
    """Return a norm as a constant to divide by, 1 where it is zero or not finite."""
    return torch.where((norm > 0) & norm.isfinite(), norm, 1.0).detach()
