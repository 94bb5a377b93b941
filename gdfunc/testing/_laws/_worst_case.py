"""Guarantees after N steps: no problem is worse than the bound, and one attains it."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from .._claims._base import Claim
from .._claims._linear import OGM, GradientDescent, Momentum, Nesterov, TripleMomentum
from .._law import NotApplicable, law, require_at_most, require_equal
from .._problems import Huber, Problem, Quadratic, walk, worst_huber
from .._subject import Subject

POINT, ANSWER = 0, 1


class Case(NamedTuple):
    """A guarantee for curvature in [mu, 1], from distance 1 of the minimiser 0.

    Attributes:
        measure: "gap", "gradient" or "gradient by gap", the square of the gradient over the first gap.
        where: of the points, or of the answers.
        h: the learning rate.
        steps: N.
        mu: the smallest curvature.
        bound: the guarantee.
        formula: with its numbers.
        attained: the problem on which the bound is an equality; None: there is none.
    """

    measure: str
    where: int
    h: float
    steps: int
    mu: float
    bound: float
    formula: str
    attained: Problem | None


def _power_mean(m: int, mu: float, h: float) -> float:
    """Return E_m = μ/((μ − 1) + (1 − μ·h)^−m), and 1/(m·h + 1) for μ = 0."""
    return mu / (mu - 1 + (1 - mu * h) ** -m) if mu else 1 / (m * h + 1)


def _of_gradient_descent() -> Iterator[Case]:
    """List J. Kim 2024's gap, and the gradient's bounds of Taylor et al. 2017 and Rotaru et al. 2024."""
    for mu, h, n in [
        (0, 1, 5),
        (0, 0.5, 4),
        (0, 1.75, 3),
        (0.25, 1, 4),
        (0.125, 1.5, 3),
        (0.25, 1.9375, 4),
    ]:
        a = (1 - h * mu) ** n
        b = (1 - a) * (1 - mu) / mu if mu else n * h
        at_gap, at_gradient = Huber(1.0, mu, a**2 / (1 + (1 + a) * b)), Huber(1.0, mu, a / (1 + b))
        numbers = f"mu = {mu}, L = 1, h = {h}, N = {n}, R = 1"
        for measure, m, factor, huber, formula in (
            ("gap", 2 * n, 0.5, at_gap, "gap_N <= (L/2) R^2 max(E_2N, (1 - h)^2N)"),
            ("gradient", n, 1.0, at_gradient, "|grad_N| <= L R max(E_N, |1 - h|^N)"),
            ("gradient by gap", 2 * n, 2.0, at_gradient, "|grad_N|^2 <= 2 L gap_0 max(E_2N, (1 - h)^2N)"),
        ):
            slow, fast = _power_mean(m, mu, h), abs(1 - h) ** m
            worst: Problem = huber if slow > fast else Quadratic((1.0,))
            bound = factor * max(slow, fast)
            yield Case(measure, POINT, h, n, mu, bound, f"{formula}, {numbers}", worst)


def _of_nesterov(claim: Nesterov) -> Iterator[Case]:
    """List the bounds of the default momentum, or of a constant one for the μ that it is for."""
    if claim.momentum is None:
        for n in (1, 2, 5, 9):
            x, y = 2 / (n**2 + 5 * n + 6), 2 / (n**2 + 7 * n + 4)
            # 1/2/(2D + 1) is the bound.
            for where, bound, formula in (
                (ANSWER, x, "f(x_N) - f* <= 2 L R^2 / (N^2 + 5 N + 6)"),
                (POINT, y, "f(y_N) - f* <= 2 L R^2 / (N^2 + 7 N + 4)"),
            ):
                worst = worst_huber((0.5 / bound - 1) / 2)
                yield Case("gap", where, 1.0, n, 0.0, bound, f"{formula}, L = R = 1, N = {n}", worst)
    elif isinstance(claim.momentum, float) and claim.momentum:
        q = (1 - claim.momentum) / (1 + claim.momentum)
        for n in (2, 6):
            formula = f"f(x_N) - f* <= (1 - q)^N (gap_0 + mu/2 R^2), q = {q:.6g}, L = R = 1, N = {n}"
            yield Case("gap and distance", ANSWER, 1.0, n, q**2, (1 - q) ** n, formula, None)


def _of_ogm(claim: OGM) -> Iterator[Case]:
    if claim.steps:
        theta = claim.thetas(claim.steps)[-1]
        bound, formula = (
            0.5 / theta**2,
            f"f(x_N) - f* <= L R^2 / (2 theta_N^2), L = R = 1, N = {claim.steps}",
        )
        worst = worst_huber((theta**2 - 1) / 2)
        yield Case("gap", POINT, 1.0, claim.steps, 0.0, bound, formula, worst)


def _of_triple_momentum(claim: TripleMomentum) -> Iterator[Case]:
    rho, kappa = claim.rho, claim.condition_number
    for n in (1, 3, 8):
        formula = f"f(x_N) - f* <= rho^2N L kappa/2 R^2, rho = {rho:.6g}, L = R = 1, N = {n}"
        bound = rho ** (2 * n) * kappa / 2
        yield Case("gap", ANSWER, 1 + rho, n, 1 / kappa, bound, formula, Quadratic((1.0,)))


def _of_momentum(claim: Momentum) -> Iterator[Case]:
    """List the bound of E. Ghadimi et al. 2015 for lr ≤ 1/L and β = √((1 − lr·μ)·(1 − lr·L))."""
    beta = claim.momentum
    # With a smaller β all digits of 1 − h are lost.
    if not 1e-3 < beta < 1 or claim.nesterov or (claim.dampening and claim.form == "buffer"):
        return
    h = (1 - beta) * (1 + beta / 2)
    mu = (1 - beta**2 / (1 - h)) / h
    for n in (1, 3, 8):
        formula = f"gap_N <= (1 - lr mu)^N gap_0, lr = {h:.6g}, mu = {mu:.6g}, L = 1, N = {n}"
        yield Case("gap by gap", POINT, h, n, mu, (1 - h * mu) ** n, formula, None)


def _cases(claim: Claim) -> list[Case]:
    if isinstance(claim, GradientDescent):
        return list(_of_gradient_descent())
    if isinstance(claim, Nesterov):
        return list(_of_nesterov(claim))
    if isinstance(claim, OGM):
        return list(_of_ogm(claim))
    if isinstance(claim, TripleMomentum):
        return list(_of_triple_momentum(claim))
    return list(_of_momentum(claim)) if isinstance(claim, Momentum) else []


def _measured(subject: Subject, case: Case, problem: Problem, start: np.ndarray) -> float:
    """Return what a case measures, in units such that its bound holds for every start."""
    end = walk(subject, problem, start, case.h, case.steps)[case.where][-1]
    square = float(start @ start)
    slope = float(np.linalg.norm(problem.gradients(end)))
    gap, first = (float(problem.values(x)) for x in (end, start))
    return {
        "gap": gap / square,
        "gradient": slope / math.sqrt(square),
        "gradient by gap": slope**2 / first,
        "gap by gap": gap / first,
        "gap and distance": gap / (first + case.mu / 2 * square),
    }[case.measure]


@law("J. Kim 2024; A. B. Taylor et al. 2017; D. Kim, J. A. Fessler 2016; B. Van Scoy et al. 2018")
def check_worst_case(subject: Subject, claim: Claim) -> None:
    """Check what a method guarantees after N steps, from below and from above.

    No problem with curvature in [μ, L] ends above the bound. Where it is sharp, one problem attains it:
    a Huber function, or the quadratic with curvature L.

    GradientDescent, h = lr·L in (0, 2):  gap_N ≤ (L/2)·R²·max(E_2N, (1 − h)^2N), and two on the gradient
    Nesterov():  f(x_N) − f* ≤ 2·L·R²/(N² + 5·N + 6), f(y_N) − f* ≤ 2·L·R²/(N² + 7·N + 4)
    OGM(N):  L·R²/(2·θ_N²);  TripleMomentum(κ):  ρ^(2·N)·L·κ/2·R²
    Nesterov(β) and Momentum(β): the bounds for the μ that β is the best for, which are not attained

    Example:
        >>> from gdfunc import testing as gt
        >>> nesterov = gt.from_step(gd.methods.nesterov, result=lambda state: state.position)
        >>> gt.check_worst_case(nesterov, gt.Nesterov())
    """
    cases = _cases(claim)
    if not cases:
        raise NotApplicable("there is no theorem for it on N steps")
    for case in cases:
        if case.attained is not None:
            value = _measured(subject, case, case.attained, np.array([1.0]))
            formula = f"{case.formula}, with equality on {case.attained!r}"
            require_equal(value, case.bound, formula, scale=1.0)
        tried = [
            (Quadratic((case.mu, (case.mu + 1) / 2, 1.0), (), (1.0, 2.0, -1.0)), (1.0, 0.25, -2.0)),
            (Huber(1.0, case.mu, 0.0625), (1.0,)),
        ]
        for problem, start in tried:
            value = _measured(subject, case, problem, np.array(start))
            require_at_most(value, case.bound, f"{case.formula}, {problem!r} from {start}", scale=1e-6)
