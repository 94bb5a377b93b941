"""The law of methods for least squares."""

import numpy as np

from .._claims._base import Claim
from .._claims._fits import FitClaim, GaussNewton
from .._law import NotApplicable, law, require_equal
from .._problems import Fit, walk
from .._subject import Subject

_TARGETS = (3.0, 1.0, 2.0, -1.0, 0.5, 0.75, -0.25)
_LINEAR = Fit(_TARGETS, is_linear=True)
# More parameters than residuals; and sums of exponentials, with rejected steps and one of little gain.
_RUNS: tuple[tuple[Fit, tuple[float, ...], int], ...] = (
    (_LINEAR, (1.0, -2.0, 0.5), 2),
    (Fit(_TARGETS[:2], is_linear=True), (1.0, -2.0, 0.5, 4.0), 2),
    (Fit((3.0, 2.0, 1.5, 1.0, 0.875)), (1.0, 0.5), 8),
    (Fit((3.0, 1.0, 2.5, 1.0, 0.875)), (-0.5, 2.0), 3),
    (Fit((3.0, 1.0, 2.5, 1.0, 0.875)), (-1.0, 0.125), 4),
    (Fit((4.0, 3.0, 1.5, 1.0, 0.875, 0.25)), (1.0, 2.0, 0.125, 1.0), 8),
)


@law("the formulas in dense matrices, solved by singular values")
def check_fit(subject: Subject, claim: Claim) -> None:
    """Check the steps of a method for least squares, which is made of residuals, against dense solutions.

    On linear residuals one step of Gauss and Newton with lr = 1 ends at the minimiser, and one from there
    stays. With fewer residuals than parameters the step has the least norm. Damped steps, the rule of the
    damping, and rejected steps are those of the formulas, at the subject's own points.

    Example:
        >>> from gdfunc import testing as gt
        >>> gt.check_fit(gt.from_step(gd.methods.gauss_newton), gt.GaussNewton())
    """
    if not isinstance(claim, FitClaim):
        raise NotApplicable("it is about methods for least squares")
    for problem, start, steps in _RUNS:
        is_curved_newton = isinstance(claim, GaussNewton) and not problem.is_linear
        for lrs in (np.ones(steps), np.resize((0.5, 0.25, 1.0, 0.75), steps)):
            count = 2 if is_curved_newton else steps
            points, _ = walk(subject, problem, start, lrs[:count], count)
            expected = claim.path(problem, points[:-1], lrs[:count])
            formula, scale = f"{claim.formula}, {claim!r} on {problem!r}", np.abs(points[:-1]).max()
            require_equal(points[1:], expected, formula, scale=scale, slack=1e-8)
    if isinstance(claim, GaussNewton):
        points, _ = walk(subject, _LINEAR, (1.0, -2.0, 0.5), 1.0, 2)
        _, matrix = _LINEAR.linearise(np.zeros(3))
        solution = np.linalg.lstsq(matrix, np.array(_TARGETS), rcond=None)[0]
        formula = f"the minimiser after one step and after two, on {_LINEAR!r}"
        require_equal(points[1:], np.stack([solution, solution]), formula, scale=1.0)
