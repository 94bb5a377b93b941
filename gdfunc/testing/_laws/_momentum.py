"""Laws of momentum: what it does where lr changes, at its double roots, and where it does not converge."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .._claims._base import Claim
from .._claims._linear import Momentum, Nesterov
from .._law import NotApplicable, law, require_equal
from .._problems import Problem, Quadratic, walk
from .._subject import Subject, feed


@law("elementary")
def check_lr_change(
    subject: Subject, claim: Claim, lrs: tuple[float, float, float] = (1.0, 0.5, 0.25)
) -> None:
    """Check which lr moves the memory of a gradient: that of its step, or the one of today.

    Gradients 1, 0, 0 and lrs l₁, l₂, l₃. A buffer moves −l₁, −l₂·β, −l₃·β². A displacement moves −l₁,
    −l₁·β, −l₁·β². With nesterov it is −l₁·(1 + β), −l₂·β², −l₃·β³.

    Args:
        subject: the subject.
        claim: `Momentum`.
        lrs: three learning rates.

    Example:
        >>> from gdfunc import testing as gt
        >>> gt.check_lr_change(gt.from_transform(gd.momentum(0.5)), gt.Momentum(0.5), lrs=(1.0, 0.5, 0.125))
    """
    if not isinstance(claim, Momentum):
        raise NotApplicable("it is about the buffer of momentum")
    beta, rates = claim.momentum, np.array(lrs)
    moves = feed(subject, torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64), list(lrs)).numpy()
    powers = beta ** np.arange(3)
    if claim.form == "displacement":
        expected, name = -rates[0] * powers, "-l1, -l1 beta, -l1 beta^2"
    elif claim.nesterov:
        expected = -rates * beta * powers - rates * [1.0, 0.0, 0.0]
        name = "-l1 (1 + beta), -l2 beta^2, -l3 beta^3"
    else:
        expected, name = -rates * powers, "-l1, -l2 beta, -l3 beta^2"
    require_equal(moves, expected, f"moves {name}, beta = {beta:.6g}, lrs = {lrs}", scale=max(lrs))


@law("elementary: the companion matrices have double roots")
def check_double_root(subject: Subject, claim: Claim, steps: int = 20) -> None:
    """Check the whole path at both ends of the spectrum that β is the best for.

    Heavy ball, r = √β = (1 − q)/(1 + q) with q = √(μ/L), and lr = (1 + r)²/L:
    xₜ = rᵗ·(1 + (1 − r)·t)·x₀ at curvature μ, and (−r)ᵗ·(1 + (1 + r)·t)·x₀ at L.
    Nesterov, β = (1 − q)/(1 + q), and lr = 1/L:
    xₜ = (1 − q)ᵗ·(1 + q·t)·x₀ at curvature μ, and xₜ = 0 from x₁ on at L.
    Its look-ahead is yₜ = (1 − q)^(t + 1)·(1 + (t + 1)·q)/(1 − q²)·x₀. So |xₜ| ≤ rᵗ·|x₀| is false.

    Args:
        subject: the subject.
        claim: `Momentum`, or `Nesterov` with a constant momentum.
        steps: T.

    Example:
        >>> from gdfunc import testing as gt
        >>> gt.check_double_root(gt.from_transform(gd.momentum(0.25)), gt.Momentum(0.25))
    """
    t = np.arange(steps + 1.0)
    if isinstance(claim, Momentum) and not claim.nesterov and not claim.dampening and claim.momentum:
        r = claim.momentum**0.5
        q, h = (1 - r) / (1 + r), (1 + r) ** 2
        paths = {q**2: r**t * (1 + (1 - r) * t), 1.0: (-r) ** t * (1 + (1 + r) * t)}
        for curvature, expected in paths.items():
            points, _ = walk(subject, Quadratic((curvature,)), [1.0], h, steps)
            formula = (
                f"x_t = r^t (1 + (1 - r) t), r = {r:.6g}, lr = {h:.6g}, curvature {curvature:.6g}, L = 1"
            )
            # The root is double: rounding errors grow like t.
            require_equal(points[:, 0], expected, formula, scale=steps, first=0)
        return
    constant = isinstance(claim, Nesterov) and isinstance(claim.momentum, float)
    if not constant and not (isinstance(claim, Momentum) and claim.nesterov and not claim.dampening):
        raise NotApplicable("it is about a constant momentum without dampening")
    q = (1 - claim.momentum) / (1 + claim.momentum)  # type: ignore[attr-defined]
    ahead = (1 - q) ** (t + 1) * (1 + (t + 1) * q) / (1 - q**2) if q < 1 else (t == 0) * 1.0
    position = (1 - q) ** t * (1 + q * t)
    points, answers = walk(subject, Quadratic((q**2,)), [1.0], 1.0, steps)
    formula = f"y_t = (1 - q)^(t+1) (1 + (t+1) q)/(1 - q^2), q = {q:.6g}, lr = 1/L, at curvature mu = q^2 L"
    require_equal(points[:, 0], ahead, formula, scale=steps, first=0)
    if constant:
        formula = f"x_t = (1 - q)^t (1 + q t), q = {q:.6g}, lr = 1/L, at curvature mu = q^2 L"
        require_equal(answers[:, 0], position, formula, scale=steps, first=0)
        _, answers = walk(subject, Quadratic((1.0,)), [1.0], 1.0, steps)
        require_equal(answers[1:, 0], 0 * t[1:], "x_1 = x_2 = ... = 0 at curvature L", scale=1.0)


@dataclass(frozen=True)
class Cycle(Problem):
    """f′(x) = 25·x for x < 1, x + 24 for x < 2, and 25·x − 24 beyond, in one dimension."""

    @property
    def L(self) -> float:
        return 25.0

    @property
    def mu(self) -> float:
        return 1.0

    def loss(self, x: Tensor) -> Tensor:
        steep = 12.5 * x**2 - torch.where(x < 2, 0.0, 24 * x - 48)
        flat = 0.5 * x**2 + 24 * x - 12
        return torch.where((x < 1) | (x >= 2), steep, flat).sum()


@law("L. Lessard, B. Recht, A. Packard 2016; the cycle is exact")
def check_cycle(subject: Subject, claim: Claim) -> None:
    """Check the cycle into which heavy ball falls with the constants that are the best for quadratics.

    With lr = 1/9 and β = 4/9 on a 25-smooth, 1-strongly convex function, the ball goes from 3.3 at rest to
    {2592, 792, −2208}/1225, and round and round. It is no counterexample for another β.

    Example:
        >>> from gdfunc import testing as gt
        >>> gt.check_cycle(gt.from_transform(gd.momentum(4 / 9)), gt.Momentum(4 / 9))
    """
    if not isinstance(claim, Momentum) or claim.nesterov or claim.dampening:
        raise NotApplicable("it is about heavy ball")
    if abs(claim.momentum - 4 / 9) > 1e-12:
        raise NotApplicable("it is about the momentum 4/9")
    points, _ = walk(subject, Cycle(), [3.3], 1 / 9, 402)
    cycle = np.array([2592.0, 792.0, -2208.0]) / 1225
    last = points[-3:, 0]
    turned = [np.roll(cycle, k) for k in range(3)]
    nearest = min(turned, key=lambda c: np.abs(c - last).max())
    formula = "the last three points are {2592, 792, -2208}/1225, lr = 1/9, beta = 4/9"
    require_equal(last, nearest, formula, scale=1.0, first=400)
