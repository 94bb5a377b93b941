"""Laws of methods whose moves are linear in the gradients: their paths follow from their coefficients."""

from typing import Any

import numpy as np
import torch

from .._claims._base import Claim
from .._claims._linear import FixedCoefficients
from .._feeds import ALL_LRS, LRS, feeds, observe
from .._law import NotApplicable, law, require_equal
from .._problems import Quadratic, walk, worst_huber
from .._subject import Subject, run_linear

OWN_QUADRATICS = (
    Quadratic((1.0,)),
    Quadratic((0.25, 1.0, 2.0), (1.0, -0.5, 2.0), (1.0, 2.0, -1.0)),
    Quadratic((0.0, 0.5), (0.25, 0.0), (1.0, 3.0)),
)


def coefficients(subject: Subject, claim: Claim, lrs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return C with xₜ = x₀ − Σₛ Cₜₛ·gₛ, [T, T], of the points and of the answers.

    The claim's closed form gives them, or if it has none, the subject's moves under unit gradients.
    """
    if not claim.is_linear:
        raise NotApplicable("its moves are not linear in the gradients with fixed coefficients")
    steps = len(lrs)
    if isinstance(claim, FixedCoefficients):
        eye = torch.eye(steps, dtype=torch.float64)
        done = run_linear(subject, eye, lrs, torch.zeros_like(eye[0]))
        return -done.points[0][1:], -done.results[0][1:]
    unit = [np.eye(steps)]
    moves = claim.moves(unit, [np.zeros((steps, steps))], lrs)[0]
    points = np.concatenate([np.zeros((1, steps)), moves.cumsum(axis=0)])
    return -points[1:], -claim.answers(unit, [points], lrs)[0][1:]


@law("superposition")
def check_linearity(subject: Subject, claim: Claim) -> None:
    """Check that the moves are linear in the gradients, with the same coefficients for every entry.

    xₜ = x₀ − Σₛ cₜₛ·gₛ for gradients of several leaves, from a point away from zero.

    Example:
        >>> from gdfunc import testing as gt
        >>> momentum = gt.from_transform(gd.momentum(0.5))
        >>> gt.check_linearity(momentum, gt.FixedCoefficients())
    """
    if not isinstance(claim, FixedCoefficients):
        raise NotApplicable("it is about methods whose coefficients are not known")
    for name, grads in feeds(claim).items():
        steps = len(next(iter(grads.values())))
        points, _ = coefficients(subject, claim, np.resize(ALL_LRS, steps))
        moves = np.diff(points, axis=0, prepend=0.0)
        seen = observe(subject, grads)
        for g, move, x in zip(seen.grads, seen.moves, seen.points, strict=True):
            expected = -np.tensordot(moves, g, axes=1)
            scale = np.maximum(np.abs(x), np.abs(g).max())
            require_equal(move, expected, f"{FixedCoefficients.formula}, {name} gradients", scale=scale)


@law("elementary: on a quadratic the errors obey a linear recursion")
def check_quadratic(
    subject: Subject,
    claim: Claim,
    problem: Quadratic | None = None,
    lr: Any = None,
    start: Any = None,
    steps: int = 12,
) -> None:
    """Check the path on a quadratic against its closed form.

    Along an eigenvector with eigenvalue λ:  eₜ = e₀ − λ·Σₛ cₜₛ·eₛ₋₁. For gradient descent that is
    eₜ = (1 − lr·λ)ᵗ·e₀, and for momentum the power of a companion matrix.

    Args:
        subject: the subject.
        claim: a method that is linear in the gradients.
        problem: None: three of the law's own.
        lr: a number, or one per step; None: inside the stable range of gradient descent, changing.
        start: [D]; None: one unit off the minimiser along every eigenvector.
        steps: T.

    Example:
        >>> from gdfunc import testing as gt
        >>> momentum = gt.from_transform(gd.momentum(0.5))
        >>> problem = gt.Quadratic(spectrum=(1.0, 4.0), minimizer=(0.5, 0.0))
        >>> gt.check_quadratic(momentum, gt.Momentum(0.5), problem, lr=0.25, start=(2.0, -1.0), steps=20)
    """
    for quadratic in OWN_QUADRATICS if problem is None else (problem,):
        rates = np.resize(LRS, steps) / quadratic.L if lr is None else np.broadcast_to(lr, (steps,))
        x = quadratic.center + quadratic.basis.sum(axis=1) if start is None else np.asarray(start)
        e, spectrum = (x - quadratic.center) @ quadratic.basis, np.array(quadratic.spectrum)
        of_points, of_answers = coefficients(subject, claim, rates)
        shares = np.stack([_errors(of_points, curvature) for curvature in spectrum], axis=1)
        answers = 1 - np.einsum("ts,sd,d->td", of_answers, shares[:-1], spectrum)
        answers = np.concatenate([np.ones((1, len(e))), answers])
        expected = [quadratic.center + (rows * e) @ quadratic.basis.T for rows in (shares, answers)]
        formula = f"e_t = e_0 - lambda sum_s c_ts e_(s-1), {quadratic!r}"
        for name, seen, wanted in zip(
            ("point", "answer"), walk(subject, quadratic, x, rates, steps), expected, strict=True
        ):
            scale = np.maximum.accumulate(np.abs(seen).max(axis=1, keepdims=True)) + np.abs(x).max()
            require_equal(seen, wanted, formula, scale=scale, where=name, first=0)


def _errors(of_points: np.ndarray, curvature: float) -> np.ndarray:
    """Return eₜ/e₀ for t = 0 … T along an eigenvector."""
    steps = len(of_points)
    system = np.eye(steps + 1)
    system[1:, :-1] += curvature * of_points
    return np.linalg.solve(system, np.ones(steps + 1))


@law("an identity; the worst case of gradient descent, Nesterov's method and OGM")
def check_huber(
    subject: Subject, claim: Claim, L: float = 1.0, h: float = 1.0, radius: float = 1.0, steps: int = 5
) -> None:
    """Check the gap on the Huber function that stays linear up to the last step.

    Let D be the displacement after N steps under a unit gradient, in units of 1/L. With τ = R/(2·D + 1)
    the gap after N steps is (L/2)·R²/(2·D + 1), for every method with fixed coefficients.

    Args:
        subject: the subject.
        claim: a method that is linear in the gradients.
        L: the curvature around the minimum.
        h: lr·L.
        radius: R, the distance of the start.
        steps: N.

    Example:
        >>> from gdfunc import testing as gt
        >>> gt.check_huber(gt.from_step(gd.make_step), gt.GradientDescent(), L=4.0, h=1.5, steps=10)
    """
    lrs = np.full(steps, h / L)
    names = "point", "answer"
    for row, (name, matrix) in enumerate(zip(names, coefficients(subject, claim, lrs), strict=True)):
        displacement = float(matrix[-1].sum() * L)
        huber = worst_huber(displacement, L, radius)
        seen = walk(subject, huber, [radius], lrs, steps)[row][-1]
        bound = L / 2 * radius**2 / (2 * displacement + 1)
        formula = (
            f"f(x_N) - f* = (L/2) R^2 / (2 D + 1), D = {displacement:.6g}, L = {L:.6g}, "
            f"R = {radius:.6g}, N = {steps}, {huber!r}"
        )
        require_equal(huber.values(seen), bound, formula, scale=L * radius**2, where=name)
