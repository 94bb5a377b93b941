"""The law of line searches that end at Wolfe's strong conditions."""

import numpy as np

from .._claims._base import Claim
from .._claims._curved import Wolfe, dense_bfgs
from .._law import LawBroken, NotApplicable, law, require_at_most, require_equal
from .._problems import Hermite, Logistic, Problem, Quadratic, Rosenbrock, Waves, walk
from .._subject import Subject

_NEAR = 2.0**-20  # from a boundary, as a share
_STEPS = 30
_RUNS: tuple[tuple[Problem, tuple[float, ...]], ...] = (
    (Rosenbrock(), (-1.25, 1.0)),
    (Quadratic((0.25, 1.0, 16.0), (1.0, -1.0, 0.5), (1.0, 2.0, -1.0)), (3.0, 1.0, -2.0)),
    (Waves((0.5, 0.875, 8.0)), (2.0, 1.0, 0.5)),
    (Logistic(((1.0, 0.5), (-0.5, 4.0), (2.0, 1.0), (0.25, -1.0)), (1, -1, 1, -1), 0.125), (3.0, -2.0)),
)


@law("J. Nocedal, S. J. Wright 2006; the cubic with chosen ends")
def check_wolfe(subject: Subject, claim: Claim) -> None:
    """Check that every accepted step of a search satisfies both of Wolfe's strong conditions.

    f(x') − f(x) <= c₁·⟨g, x' − x⟩  and  |⟨g', x' − x⟩| <= c₂·|⟨g, x' − x⟩|

    On a valley, a bowl, waves and a logistic regression, every move keeps them, and goes along −H·g of
    dense BFGS from the pairs of the points that were accepted, while the gradient is not yet rounding. On
    cubics whose value and slope at the first trial lie just within one condition, that
    trial is accepted, and just beyond it is not.

    Example:
        >>> from gdfunc import testing as gt
        >>> gt.check_wolfe(gt.from_step(gd.methods.lbfgs), gt.Wolfe())
    """
    if not isinstance(claim, Wolfe):
        raise NotApplicable("it is about searches for Wolfe's conditions")
    c1, c2 = claim.decrease, claim.curvature
    for within in (True, False):
        share = 1 - _NEAR if within else 1 + _NEAR
        middle = -0.5 * (1 + c1)  # a decrease that is more than enough
        ends = {
            "decrease": (-c1 * (2 - share), 0.5 * c2),
            "slope uphill": (middle, share * c2),
            "slope downhill": (middle, -share * c2),
        }
        for name, (value, slope) in ends.items():
            cubic = Hermite(value, slope)
            points, _ = walk(subject, cubic, [1.0, 0.0], 1.0, 4)
            moved = points[:, 0] != 1.0
            first = float(points[np.argmax(moved), 0]) if moved.any() else 1.0
            formula = f"the first trial, at 0, {'is' if within else 'is not'} accepted: {name}, {cubic!r}"
            if (abs(first) <= 1e-12) != within:
                raise LawBroken(formula=formula, value=first, bound=0.0, where="the first point")
    for problem, start in _RUNS:
        points, _ = walk(subject, problem, start, 1.0, _STEPS)
        _require_conditions(claim, problem, points)


def _require_conditions(claim: Wolfe, problem: Problem, points: np.ndarray) -> None:
    """Require the conditions and the direction of every move, up to where the gradient is rounding."""
    x = points[np.append(True, np.diff(points, axis=0).any(1))]
    g, f = problem.gradients(x), problem.values(x)
    # Because the loss no longer tells close points apart there, slopes judge the conditions.
    resolved = np.linalg.norm(g, axis=1) > 1e-5 * np.linalg.norm(g[0])
    last = int(np.argmin(resolved)) if not resolved.all() else len(x)
    x, g, f = x[: last + 1], g[: last + 1], f[: last + 1]
    moves, formula = np.diff(x, axis=0), f"{claim.formula}, {claim!r} on {problem!r}"
    if len(moves) < 3:
        raise LawBroken(formula=f"three moves in {_STEPS} steps: {formula}", value=len(moves), bound=3)
    slopes = (g[:-1] * moves).sum(1)
    require_at_most(slopes, 0.0, f"moves downhill: {formula}", slack=0.0, where="<g, x' - x>")
    after = np.abs((g[1:] * moves).sum(1))
    size = np.maximum(np.abs(f[:-1]), np.abs(slopes))
    require_at_most(np.diff(f), claim.decrease * slopes, formula, scale=size, where="decrease")
    require_at_most(after, -claim.curvature * slopes, formula, scale=-slopes, where="slope")
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    for t, move in enumerate(moves):
        u = dense_bfgs(pairs[-claim.history :]) @ g[t] if pairs else g[t]
        along = -u * np.linalg.norm(move) / np.linalg.norm(u)
        scale = float(np.linalg.norm(move))
        where = f"direction of move {t + 1}"
        require_equal(move, along, formula, scale=scale, slack=1e-6, where=where, first=0)
        if move @ (g[t + 1] - g[t]) > 0:
            pairs.append((move, g[t + 1] - g[t]))
