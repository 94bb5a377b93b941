"""Laws of gradient descent, in their sharpest form: each is attained by the problem that it tries."""

import math

import numpy as np

from .._claims._base import Claim
from .._claims._linear import GradientDescent
from .._claims._signs import Sign
from .._law import NotApplicable, law, require_at_most, require_equal
from .._problems import (
    Huber,
    Logistic,
    Maximum,
    PLSine,
    Problem,
    Quadratic,
    TriangularWave,
    walk,
)
from .._subject import Subject

RIDGE = Logistic(((1.0, 0.5), (-1.0, 2.0), (0.5, -1.5)), (1.0, -1.0, 1.0), ridge=0.25)
LANDSCAPES = (
    (Quadratic((0.5, 0.5)), (1.0, -2.0)),
    (Quadratic((0.25, 2.0), (1.0, 0.0), (1.0, 2.0)), (0.0, 3.0)),
    (Huber(2.0, 0.25, 0.5), (3.0,)),
    (RIDGE, (1.0, -2.0)),
    (TriangularWave(2.0, 1.0, 4), (0.0,)),
    (PLSine(), (2.0,)),
)


def _require_descent(claim: Claim) -> None:
    if not isinstance(claim, GradientDescent):
        raise NotApplicable("it is a theorem on gradient descent")


@law("A. B. Taylor, J. M. Hendrickx, F. Glineur 2018; sharp")
def check_contraction(
    subject: Subject,
    claim: Claim,
    problem: Problem | None = None,
    h: float | None = None,
    start: tuple[float, ...] = (2.0, -1.0),
    other: tuple[float, ...] = (-1.0, 0.5),
    steps: int = 6,
) -> None:
    """Check how fast two paths of gradient descent come together.

    ‖xₜ − yₜ‖ ≤ ρᵗ·‖x₀ − y₀‖ with ρ = max(|1 − lr·μ|, |1 − lr·L|) for 0 < lr·L < 2, with equality on the
    quadratics with curvature μ and L.

    Args:
        subject: the subject.
        claim: `GradientDescent`.
        problem: strongly convex; None: two of the law's own.
        h: lr·L; None: several.
        start: x₀, [D].
        other: y₀, [D].
        steps: T.

    Example:
        >>> from gdfunc import testing as gt
        >>> descent = gt.from_step(gd.make_step)
        >>> gt.check_contraction(descent, gt.GradientDescent(), gt.Quadratic((0.5, 2.0)), h=1.5)
    """
    _require_descent(claim)
    for f in (Quadratic((0.25, 1.0), (0.5, 1.0), (2.0, 1.0)), RIDGE) if problem is None else (problem,):
        for rate in (0.5, 1.0, 1.75) if h is None else (h,):
            lr = rate / f.L
            rho = max(abs(1 - lr * f.mu), abs(1 - lr * f.L))
            paths = [walk(subject, f, x, lr, steps)[0] for x in (start, other)]
            apart = np.linalg.norm(paths[0] - paths[1], axis=1)
            formula = f"|x_t - y_t| <= rho^t |x_0 - y_0|, rho = {rho:.6g} with lr = {lr:.6g}, {f!r}"
            bound = rho ** np.arange(steps + 1) * apart[0]
            require_at_most(apart, bound, formula, scale=apart[0], first=0)
            if isinstance(f, Quadratic):
                steepest = np.argmax(np.abs(1 - lr * np.array(f.spectrum)))
                x = f.center + f.basis[:, steepest]
                error = np.linalg.norm(walk(subject, f, x, lr, steps)[0] - f.center, axis=1)
                formula = f"|x_t - x*| = rho^t |x_0 - x*|, rho = {rho:.6g} with lr = {lr:.6g}, {f!r}"
                require_equal(error, rho ** np.arange(steps + 1), formula, scale=1.0, first=0)


@law("elementary: Taylor's theorem with curvature in [mu, L]")
def check_descent_sandwich(
    subject: Subject,
    claim: Claim,
    problem: Problem | None = None,
    start: tuple[float, ...] = (),
    h: float = 0.75,
    steps: int = 6,
) -> None:
    """Check the decrease of the loss in every step from both sides.

    lr·(1 − lr·L/2)·‖G‖² ≤ f(x) − f(x′) ≤ lr·(1 − lr·μ/2)·‖G‖² for any f with curvature in [μ, L]. Both are
    equalities where μ = L.

    Args:
        subject: the subject.
        claim: `GradientDescent`.
        problem: None: six of the law's own, two of them not convex.
        start: [D], with a problem.
        h: lr·L.
        steps: T.

    Example:
        >>> from gdfunc import testing as gt
        >>> descent, problem = gt.from_step(gd.make_step), gt.Quadratic((0.5, 2.0))
        >>> gt.check_descent_sandwich(descent, gt.GradientDescent(), problem, start=(1.0, -1.0))
    """
    _require_descent(claim)
    for f, x in LANDSCAPES if problem is None else ((problem, start),):
        lr = h / f.L
        points, _ = walk(subject, f, x, lr, steps)
        values, slopes = f.values(points), f.gradients(points[:-1])
        squares, decrease = (slopes**2).sum(axis=1), -np.diff(values)
        least, most = (lr * (1 - lr * curvature / 2) * squares for curvature in (f.L, f.mu))
        numbers = f"lr = {lr:.6g}, L = {f.L:.6g}, mu = {f.mu:.6g}, {f!r}"
        scale = np.abs(values[:-1]) + most
        require_at_most(least, decrease, f"lr (1 - lr L/2) |G|^2 <= f(x) - f(x'), {numbers}", scale=scale)
        require_at_most(decrease, most, f"f(x) - f(x') <= lr (1 - lr mu/2) |G|^2, {numbers}", scale=scale)


@law("H. Abbaszadehpeivasti, E. de Klerk, M. Zamani 2021; sharp for lr <= 1/L")
def check_nonconvex(
    subject: Subject, claim: Claim, L: float = 2.0, h: float = 0.75, steps: int = 6
) -> None:
    """Check the smallest gradient without convexity, on the function that is worst.

    minₜ ‖∇f(xₜ)‖² ≤ 4·L·(f(x₀) − f*)/(N·h·(4 − h) + 2) for curvature in [−L, L] and h = lr·L ≤ 1, with
    equality on the triangular wave.

    Args:
        subject: the subject.
        claim: `GradientDescent`.
        L: the largest curvature of either sign.
        h: lr·L, in (0, 1].
        steps: N.

    Example:
        >>> from gdfunc import testing as gt
        >>> gt.check_nonconvex(gt.from_step(gd.make_step), gt.GradientDescent(), L=4.0, h=1.0)
    """
    _require_descent(claim)
    factor = steps * h * (4 - h) + 2
    formula = f"min |grad|^2 <= 4 L gap_0 / (N h (4 - h) + 2), L = {L:.6g}, h = {h:.6g}, N = {steps}"
    wave = TriangularWave(L, h, steps)
    points, _ = walk(subject, wave, [0.0], h / L, steps)
    slopes = wave.gradients(points)[:, 0] ** 2
    require_equal(slopes, np.ones(steps + 1), f"|grad f(x_t)| = 1 on {wave!r}", scale=1.0, first=0)
    require_equal(slopes.min(), 4 * L * wave.gap / factor, formula, scale=1.0)
    sine = PLSine()
    points, _ = walk(subject, sine, [2.5], h / sine.L, steps)
    bound = 4 * sine.L * sine.values(points[0]) / factor
    require_at_most((sine.gradients(points) ** 2).min(), bound, formula, where=repr(sine))


@law("H. Abbaszadehpeivasti, E. de Klerk, M. Zamani 2023; an upper bound")
def check_pl(subject: Subject, claim: Claim) -> None:
    """Check the first step under the inequality of Polyak and Łojasiewicz.

    With ½·‖∇f‖² ≥ μ·(f − f*), the gap falls at least by the factor (2·L − 2·μ)/(2·L + μ) for lr = 1/L,
    and by (lr·L − 1)²/((lr·L − 1)² + lr·μ·(2 − lr·L)) for lr in [√3/L, 2/L].

    Example:
        >>> from gdfunc import testing as gt
        >>> gt.check_pl(gt.from_step(gd.make_step), gt.GradientDescent())
    """
    _require_descent(claim)
    sine = PLSine()
    L, mu = sine.L, sine.pl
    h = 1.875
    factors = {
        1.0: (2 * L - 2 * mu) / (2 * L + mu),
        h: (h - 1) ** 2 / ((h - 1) ** 2 + h / L * mu * (2 - h)),
    }
    for x in np.linspace(-3, 3, 7):
        for rate, factor in factors.items():
            points, _ = walk(subject, sine, [x], rate / L, 1)
            before, after = sine.values(points)
            formula = f"gap_1 <= {factor:.6g} gap_0, lr = {rate}/L, L = {L}, mu = {mu}, from {x:.3g}"
            require_at_most(after, factor * before, formula)


@law("E. de Klerk, F. Glineur, A. B. Taylor 2017; sharp")
def check_exact_line_search(subject: Subject, claim: Claim, mu: float = 0.125, L: float = 1.0) -> None:
    """Check gradient descent with the lr of an exact line search on its worst quadratic.

    f(xₜ₊₁) − f* = ((L − μ)/(L + μ))²·(f(xₜ) − f*) in every step on diag(μ, L) from (1/μ, 1/L), where the
    best lr is 2/(L + μ).

    Args:
        subject: the subject.
        claim: `GradientDescent`.
        mu: the smallest curvature.
        L: the largest curvature.

    Example:
        >>> from gdfunc import testing as gt
        >>> gt.check_exact_line_search(gt.from_step(gd.make_step), gt.GradientDescent(), mu=0.5, L=2.0)
    """
    _require_descent(claim)
    f, steps = Quadratic((mu, L)), 6
    points, _ = walk(subject, f, (1 / mu, 1 / L), 2 / (L + mu), steps)
    slopes = f.gradients(points[:-1])
    best = (slopes**2).sum(axis=1) / (np.array(f.spectrum) * slopes**2).sum(axis=1)
    require_equal(best, np.full(steps, 2 / (L + mu)), "the best lr is |G|^2 / G'HG = 2/(L + mu)")
    factor = ((L - mu) / (L + mu)) ** 2
    expected = f.values(points[0]) * factor ** np.arange(steps + 1)
    require_equal(f.values(points), expected, f"gap_(t+1) = ((L - mu)/(L + mu))^2 gap_t, {f!r}", first=0)


@law("J. M. Altschuler, P. A. Parrilo 2023; the sharp value is numerically exact")
def check_silver(subject: Subject, claim: Claim, L: float = 2.0, radius: float = 1.0, j: int = 3) -> None:
    """Check gradient descent with the silver schedule on its worst function.

    hᵢ = 1 + ρ^(ν(i) − 1) with ρ = 1 + √2, where 2^ν(i) is the power of two in i. After N = 2ʲ − 1 steps
    the gap is at most (L/2)·R²/(2·ρʲ − 1), with equality on a Huber function.

    Args:
        subject: the subject.
        claim: `GradientDescent`.
        L: the curvature.
        radius: R, the distance of the start.
        j: log₂(N + 1).

    Example:
        >>> from gdfunc import testing as gt
        >>> gt.check_silver(gt.from_step(gd.make_step), gt.GradientDescent(), j=4)
    """
    _require_descent(claim)
    rho, steps = 1 + math.sqrt(2), 2**j - 1
    h = np.array([1 + rho ** ((i & -i).bit_length() - 2) for i in range(1, steps + 1)])
    huber = Huber(L, 0.0, radius / (2 * h.sum() + 1))
    points, _ = walk(subject, huber, [radius], h / L, steps)
    bound = L / 2 * radius**2 / (2 * rho**j - 1)
    formula = f"gap_N = (L/2) R^2 / (2 rho^j - 1), j = {j}, L = {L:.6g}, R = {radius:.6g}, {huber!r}"
    require_equal(huber.values(points[-1]), bound, formula, scale=L * radius**2)
    huber = Huber(L, 0.0, radius / rho**j)
    points, _ = walk(subject, huber, [radius], h / L, steps)
    slope = np.abs(huber.gradients(points[-1]))
    formula = f"|grad_N| = L R / rho^j, j = {j}, L = {L:.6g}, R = {radius:.6g}, {huber!r}"
    require_equal(slope[0], L * radius / rho**j, formula, scale=L * radius)


@law("Y. Drori, M. Teboulle 2016; sharp")
def check_subgradient(
    subject: Subject, claim: Claim, M: float = 2.0, radius: float = 1.0, steps: int = 4
) -> None:
    """Check the subgradient method on its worst function.

    minₜ f(xₜ) − f(x_ref) ≤ M·R/√(N + 1) for convex f with subgradients no longer than M, ‖x₀ − x_ref‖ = R
    and lr = R/(M·√(N + 1)), with equality on M·max xᵢ in N + 1 dimensions.

    Args:
        subject: the subject.
        claim: `GradientDescent`.
        M: the largest norm of a subgradient.
        radius: R.
        steps: N.

    Example:
        >>> from gdfunc import testing as gt
        >>> gt.check_subgradient(gt.from_step(gd.make_step), gt.GradientDescent(), M=4.0)
    """
    _require_descent(claim)
    f, lr = Maximum(M), radius / (M * math.sqrt(steps + 1))
    points, _ = walk(subject, f, [0.0] * (steps + 1), lr, steps)
    reference = np.full(steps + 1, -radius / math.sqrt(steps + 1))
    gaps = f.values(points) - f.values(reference)
    formula = f"min f(x_t) - f(x_ref) = M R / sqrt(N + 1), M = {M:.6g}, R = {radius:.6g}, N = {steps}"
    require_equal(gaps.min(), M * radius / math.sqrt(steps + 1), formula)
    # Every step lowers the first coordinate that is largest.
    expected = -lr * M * np.tril(np.ones((steps + 1, steps + 1)), -1)
    require_equal(points, expected, "x_t = -lr M (e_1 + ... + e_t)", scale=lr * M, first=0)


@law("elementary; the setting of J. Bernstein et al. 2018")
def check_sign_descent(
    subject: Subject, claim: Claim, spectrum: tuple[float, ...] = (0.5, 1.0, 4.0), lr: float = 0.25
) -> None:
    """Check the decrease of the loss under a sign step on a separable quadratic.

    f(x′) = f(x) − lr·‖G‖₁ + lr²/2·Σ Lᵢ for f = ½·Σ Lᵢ·xᵢ², where the last sum is over Gᵢ ≠ 0.

    Args:
        subject: the subject.
        claim: `Sign`.
        spectrum: Lᵢ, [D].
        lr: the learning rate.

    Example:
        >>> from gdfunc import testing as gt
        >>> gt.check_sign_descent(gt.from_transform(gd.sign()), gt.Sign(), lr=0.125)
    """
    if not isinstance(claim, Sign):
        raise NotApplicable("it is a theorem on the sign of the gradient")
    f = Quadratic(spectrum)
    points, _ = walk(subject, f, np.linspace(-2, 3, len(spectrum)) + 0.125, lr, 6)
    slopes, values = f.gradients(points[:-1]), f.values(points)
    moving = (slopes != 0) @ np.array(spectrum)
    expected = values[:-1] - lr * np.abs(slopes).sum(axis=1) + lr**2 / 2 * moving
    formula = f"f(x') = f - lr |G|_1 + lr^2/2 sum L_i over G_i != 0, lr = {lr:.6g}, {f!r}"
    require_equal(values[1:], expected, formula, scale=values[:-1])
