"""Laws of methods that look at the loss, and of L-BFGS."""

import math
from typing import Any

import numpy as np
import torch

from .._claims._base import Claim, along
from .._claims._curved import LBFGS, SAM, LineSearch, Pointwise, Polyak
from .._feeds import LRS, feeds, observe
from .._law import NotApplicable, law, require_equal
from .._problems import Cone, Problem, Quadratic, Raised, Rosenbrock, Waves, walk
from .._subject import Subject

_START = (2.0, 1.0, 0.5, -2.5, -1.0)
_BOWL = Quadratic((0.25, 0.5, 1.0, 1.5, 2.0), (1.0, -1.0, 0.0, 0.5, 0.25), (1.0, 2.0, -1.0, 0.5, 1.0))


@law("the rule itself, from the subject's own points")
def check_step(subject: Subject, claim: Claim) -> None:
    """Check every step against the claim's rule at the subject's own points.

    On a bowl and on waves. A minimum that the claim names is the minimum there.

    Example:
        >>> from gdfunc import testing as gt
        >>> polyak = gt.from_step(lambda loss_fn: gd.methods.polyak(loss_fn, minimum=0.0))
        >>> gt.check_step(polyak, gt.Polyak(minimum=0.0))
    """
    if not isinstance(claim, Pointwise):
        raise NotApplicable("it is about steps without a memory that look at the loss")
    minimum, lrs = float(getattr(claim, "minimum", 0.0)), np.resize(LRS, 8)
    weights = (0.5, 0.875, 1.25, 1.625, 2.0)
    _require_rule(subject, claim, Raised(_BOWL, minimum), _START, lrs)
    _require_rule(subject, claim, Raised(Waves(weights), minimum), _START, lrs)


def _require_rule(subject: Subject, claim: Pointwise, problem: Problem, start: Any, lrs: Any) -> None:
    points, _ = walk(subject, problem, start, lrs, len(lrs))
    expected = [claim.displacement(problem, x, lr) for x, lr in zip(points, lrs, strict=False)]
    formula = f"{claim.formula}, {claim!r} on {problem!r}"
    scale = np.abs(points[:-1]).max(1, keepdims=True)
    require_equal(np.diff(points, axis=0), np.stack(expected), formula, scale=scale, where="move")


@law("B. T. Polyak 1987; M. Barré, A. Taylor, A. d'Aspremont 2020 for r = 2")
def check_polyak(subject: Subject, claim: Claim) -> None:
    """Check Polyak's step where its progress is an equality.

    For every quadratic and lr = r:  ‖x' − x*‖² = ‖x − x*‖² − r·(4 − r)·(f − f*)²/‖∇f‖²
    For curvatures μ and L from (√L, √μ):  ‖x'‖² = (1 − r·(4 − r)·μL/(L + μ)²)·‖x‖²
    For f = M·|x|:  |x'| = |1 − r|·|x|

    Below the minimum, and where the gradient is zero, the point stays. A bound holds on flat losses.

    Example:
        >>> from gdfunc import testing as gt
        >>> polyak = gt.from_step(lambda loss_fn: gd.methods.polyak(loss_fn, minimum=0.0))
        >>> gt.check_polyak(polyak, gt.Polyak(minimum=0.0))
    """
    if not isinstance(claim, Polyak):
        raise NotApplicable("it is about Polyak's step")
    unit = 1.0 if claim.max_step is None else max(1.0, 1.0 / claim.max_step)  # steeper: no bound acts
    center = np.array([1.0, -1.0, 0.5])
    bowl = Quadratic((unit, 2 * unit, 4 * unit), tuple(center), (1.0, 2.0, -1.0))
    for r in (0.5, 1.0, 1.5, 2.0):
        points, _ = walk(subject, Raised(bowl, claim.minimum), (3.0, 1.0, -2.0), r, 3)
        distances = ((points - center) ** 2).sum(1)
        gains = bowl.values(points) ** 2 / (bowl.gradients(points) ** 2).sum(1)
        formula = f"|x' - x*|^2 = |x - x*|^2 - r(4 - r)(f - f*)^2/|grad f|^2, r = {r:g}, on {bowl!r}"
        wanted = distances - r * (4 - r) * gains
        require_equal(distances[1:], wanted[:-1], formula, scale=distances[:-1], where="squared distance")

        pair = Quadratic((unit, 4 * unit))
        points, _ = walk(subject, Raised(pair, claim.minimum), (2.0, 1.0), r, 1)
        formula = f"|x'|^2 = (1 - r(4 - r) mu L/(L + mu)^2)|x|^2, r = {r:g}, on {pair!r}"
        wanted = (1 - r * (4 - r) * 4 / 25) * 5.0
        require_equal((points[1:] ** 2).sum(1), wanted, formula, where="squared distance")

        cone = Cone(4 * unit)
        points, _ = walk(subject, Raised(cone, claim.minimum), [0.5], r, 1)
        require_equal(points[1:], [[(1 - r) * 0.5]], f"x' = (1 - r)x, r = {r:g}, on {cone!r}", scale=0.5)

    below = Raised(bowl, claim.minimum - 1e3), (3.0, 1.0, -2.0)
    for problem, start in (below, (Raised(bowl, claim.minimum + 1e3), tuple(center))):
        points, _ = walk(subject, problem, start, 1.0, 1)
        formula = f"x' = x below the minimum or without a gradient, on {problem!r}"
        require_equal(points[1:], points[:1], formula, slack=0.0)
    if claim.max_step is not None:
        flat = Quadratic((1 / (8 * claim.max_step),) * 2)
        points, _ = walk(subject, Raised(flat, claim.minimum), (2.0, 1.0), 0.5, 1)
        formula = f"x' - x = -lr max_step grad f, on {flat!r}"
        require_equal(points[1:], points[:1] * (1 - 0.5 / 8), formula)


@law("L. Armijo 1966; on f = lambda/2 |x|^2 a step a is accepted iff a lambda <= 2(1 - c)")
def check_armijo(subject: Subject, claim: Claim) -> None:
    """Check which trial a line search accepts: the longest with a·λ ≤ 2·(1 − c) on f = λ/2·‖x‖².

    The curvatures λ lie just below and just above the boundary of a trial a = lr·qʲ, for the first trials
    and the last. On the boundary the trial is accepted, which is tested where all numbers are exact in
    binary. Where no trial is good, the point keeps its bits. On Rosenbrock's valley, from lr = 1, every
    step is the rule's.

    Example:
        >>> from gdfunc import testing as gt
        >>> gt.check_armijo(gt.from_step(gd.methods.line_search), gt.LineSearch())
    """
    if not isinstance(claim, LineSearch):
        raise NotApplicable("it is about line searches")
    c, q, m = claim.decrease, claim.factor, claim.max_steps
    is_exact = math.frexp(q)[0] == 0.5 and (1024 * c).is_integer()
    start = np.array([1.0, 0.5, -2.0])
    for j in sorted({0, 1, m, m + 1}):
        for relative in (1 - 2.0**-20, 1.0, 1 + 2.0**-20)[:: 1 if is_exact else 2]:
            lam = relative * 2 * (1 - c) / (0.5 * q**j)
            accepted = j + (relative > 1)
            size = 0.5 * q**accepted if accepted <= m else 0.0
            points, _ = walk(subject, Quadratic((lam,) * 3), start, 0.5, 1)
            formula = (
                f"a = {size:g}, the first 0.5 q^j, j <= {m}, with a lambda <= 2(1 - c) = {2 - 2 * c:g}, "
                f"lambda = {lam:.9g}, {claim!r}"
            )
            slack = 1e-9 if size and relative != 1 else 0.0
            require_equal(points[1:], [start * (1 - size * lam)], formula, scale=abs(start), slack=slack)
    _require_rule(subject, claim, Rosenbrock(), (-1.25, 1.0), np.ones(6))


@law("P. Foret et al. 2021; J. Kwon et al. 2021; closed forms on quadratics")
def check_sam(subject: Subject, claim: Claim) -> None:
    """Check sharpness-aware minimisation on quadratics with Hessian H.

    θ' = θ − lr·(g + ρ·Hg/‖g‖), over all leaves, or θ' = θ − lr·(g + ρ·H(θ²g)/‖θg‖) if it is adaptive.

    In one dimension SAM ends in a cycle, x' = −x with |x| = lr·λ·ρ/(2 − lr·λ), and the adaptive form is
    linear, x' = (1 − lr·λ·(1 + ρ))·x.

    Example:
        >>> from gdfunc import testing as gt
        >>> sam = gt.from_step(lambda loss_fn: gd.methods.sam(loss_fn, rho=0.25))
        >>> gt.check_sam(sam, gt.SAM(rho=0.25))
    """
    if not isinstance(claim, SAM):
        raise NotApplicable("it is about gradients taken uphill")
    rho, lrs = claim.rho, np.resize(LRS, 8)
    points, _ = walk(subject, _BOWL, _START, lrs, 8)
    hessian, x = _BOWL.hessian, points[:-1]
    g = (x - _BOWL.center) @ hessian
    units = np.abs(x) if claim.adaptive else np.ones_like(x)
    uphill = units**2 * g / np.linalg.norm(units * g, axis=1, keepdims=True)
    wanted = -lrs[:, None] * (g + rho * uphill @ hessian)
    formula = f"x' - x = -lr (g + rho H e), {claim!r} on {_BOWL!r}"
    require_equal(np.diff(points, axis=0), wanted, formula, scale=np.abs(x), where="move")

    lam, lr = 2.0, 0.25
    signs = (-1.0) ** np.arange(7.0)
    if claim.adaptive:
        start, factor = 2.0, 1 - lr * lam * (1 + rho)
        wanted, formula = start * factor ** np.arange(7.0), "x_t = (1 - lr lambda (1 + rho))^t x_0"
    else:
        start = lr * lam * rho / (2 - lr * lam)
        wanted, formula = start * signs, "x' = -x at |x| = lr lambda rho / (2 - lr lambda)"
    points, _ = walk(subject, Quadratic((lam,)), [start], lr, 6)
    formula += f", lr = {lr}, lambda = {lam}, rho = {rho:g}"
    require_equal(points[:, 0], wanted, formula, scale=abs(start), first=0)
    points, _ = walk(subject, _BOWL, _BOWL.center, 0.5, 1)
    require_equal(points[1:], points[:1], "x' = x where the gradient is zero", scale=1.0)


@law("J. Nocedal, S. J. Wright 2006: dense BFGS, the secant equation, and conjugate gradients")
def check_lbfgs(subject: Subject, claim: Claim) -> None:
    """Check L-BFGS against dense BFGS, the secant equation, and conjugate gradients.

    Its steps are those of BFGS with dense matrices at three scales of the loss, where a wrong γ shows. The
    secant equation is H·y = s: where a gradient is half of the one before, the direction is −s. With exact
    line searches on a quadratic in D dimensions the points are those of conjugate gradients, and the D-th
    is the minimiser, whatever the history.

    Example:
        >>> from gdfunc import testing as gt
        >>> gt.check_lbfgs(gt.from_transform(gd.lbfgs(5)), gt.LBFGS(history=5))
    """
    if not isinstance(claim, LBFGS):
        raise NotApplicable("it is about L-BFGS")
    lrs = np.resize(LRS, 8)
    for scale in (1 / 16, 1.0, 16.0):
        problem = Quadratic(tuple(scale * w for w in _BOWL.spectrum), _BOWL.minimizer, _BOWL.mirror)
        points, _ = walk(subject, problem, _START, lrs, 8)
        x = points[:-1]
        (wanted,) = claim.moves([problem.gradients(x)], [x], lrs)
        formula = f"{claim.formula}, {claim!r} on {problem!r}"
        require_equal(np.diff(points, axis=0), wanted, formula, scale=np.abs(x), where="move")

    random = feeds(claim)["random"]
    halved = {k: torch.stack([g[0::2], g[0::2] / 2], 1).flatten(0, 1) for k, g in random.items()}
    seen = observe(subject, halved, np.resize(LRS, len(halved["a"])))
    for move in seen.moves:
        formula, scale = "H y = s: u_t = -s_t where g_t = g_(t-1)/2", np.abs(move).max()
        require_equal(move[1::2], along(seen.lrs[1::2], move) * move[0::2], formula, scale=scale)

    points, rates = _conjugate_gradients(claim, _BOWL, np.array(_START))
    walked, _ = walk(subject, _BOWL, _START, rates, len(rates))
    formula = f"the points of conjugate gradients, lr by exact line search, on {_BOWL!r}"
    scale = np.abs(points).max()
    require_equal(walked[:-1], points[:-1], formula, scale=scale, slack=1e-7, first=0)
    require_equal(walked[-1:], [_BOWL.center], f"x_D = x*: {formula}", scale=scale, slack=1e-7)


def _conjugate_gradients(claim: LBFGS, problem: Quadratic, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the points of conjugate gradients, and the learning rates that lead L-BFGS to them."""
    hessian, g = problem.hessian, problem.gradients(x)
    p, points, grads, rates = g, [x], [g], []
    for _ in x:
        (u,) = claim.directions([np.stack(grads)], [np.stack(points)])
        rates.append(float(g @ u[-1] / (u[-1] @ hessian @ u[-1])))
        x = x - (g @ p / (p @ hessian @ p)) * p
        g_new = (x - problem.center) @ hessian
        p, g = g_new + (g_new @ g_new) / (g @ g) * p, g_new
        points.append(x)
        grads.append(g)
    return np.stack(points), np.array(rates)
