"""Laws of stochastic gradients at the ends: all samples in a batch, the minimum, and noise without end."""

import math

import numpy as np
import torch
from torch import Tensor

from .._claims._base import Claim
from .._claims._linear import GradientDescent, Momentum
from .._claims._sums import SARAH, Pass, SumClaim
from .._law import NotApplicable, law, require_equal
from .._subject import Subject, run
from .._sums import FiniteSum, path_on, sum_of_arrays
from ._sums import SMALL, START, shape_plan


@law("a batch of all samples has no noise")
def check_full_batch(subject: Subject, claim: Claim, lr: float = 0.25) -> None:
    """Check that batches of all samples make gradient descent: x_t − x* = (I − lr·H)ᵗ·(x₀ − x*).

    A pass of m batches is m steps for SVRG, and m + 1 for SARAH. Their average leaves the last point out.

    Args:
        subject: the subject.
        claim: `GradientDescent`, or a method for finite sums.
        lr: a number.

    Example:
        >>> from gdfunc import testing as gt
        >>> gt.check_full_batch(gt.from_step(gd.methods.saga, of_rows=True), gt.SAGA(), lr=0.125)
    """
    if not isinstance(claim, GradientDescent | SumClaim):
        raise NotApplicable("it is about gradient descent")
    n, d = getattr(claim, "batch_size", 3), 2
    problem = sum_of_arrays(np.resize(SMALL.H, (n, d, d)), np.resize(SMALL.b, (n, d)))
    plan = shape_plan(claim, np.tile(np.arange(n), (4, 1)))
    error = START - problem.minimizer
    shrink = np.eye(d) - lr * problem.H.mean(0)
    path = np.array([np.linalg.matrix_power(shrink, t) @ error for t in range(6)])
    expected = path[1:5]
    if isinstance(claim, Pass):
        last = 5 if isinstance(claim, SARAH) else 4
        expected = path[[last]] if claim.output == "last" else path[:last].mean(0)[None]
    points = path_on(subject, problem, plan, lr, START)[1:] - problem.minimizer
    formula = f"x_t - x* = (I - lr H)^t (x_0 - x*), lr = {lr:.6g}, n = B = {n}"
    require_equal(points, expected, formula, scale=np.abs(error).max())


@law("the estimate's variance vanishes at the minimum")
def check_minimum(subject: Subject, claim: Claim, problem: FiniteSum = SMALL, lr: float = 0.25) -> None:
    """Check that a method that reduces variance stays at the minimum, which SGD leaves.

    Args:
        subject: the subject.
        claim: a method for finite sums.
        problem: the sum.
        lr: a number.

    Example:
        >>> from gdfunc import testing as gt
        >>> gt.check_minimum(gt.from_step(gd.methods.saga, of_rows=True), gt.SAGA())
    """
    if not isinstance(claim, SumClaim):
        raise NotApplicable("it is about methods that reduce variance")
    best, size = problem.minimizer, getattr(claim, "batch_size", 2)
    rows = np.random.default_rng(0).integers(len(problem.b), size=(4, size))
    moves = np.diff(path_on(subject, problem, shape_plan(claim, rows), lr, best), axis=0)
    noise = lr * np.abs(problem.gradients(best)).max()
    formula = f"x_t = x* from x_0 = x*, lr = {lr:.6g}"
    require_equal(moves, np.zeros_like(moves), formula, scale=max(noise, np.abs(best).max()))


@law("the stationary variance of a linear recursion, by Lyapunov's equation")
def check_noise_floor(subject: Subject, claim: Claim, curvature: float = 4.0, lr: float = 0.125) -> None:
    """Check the variance at which momentum with noisy gradients stays.

    Var x = lr·(1 + β)·s² / (λ·(1 − β)·(2·(1 + β) − lr·λ)) on f(x) = ½ λx² with gradient noise of
    variance s², where β = 0 is gradient descent. For a linear method it is s² times the sum of squares
    of the answer to one impulse, so that no noise is drawn. For gradient descent the covariance of two
    coordinates with the same noise is lr·s²/(λ + λ′ − lr·λ·λ′).

    Args:
        subject: the subject.
        claim: `GradientDescent`, or `Momentum` without dampening and Nesterov's step.
        curvature: λ.
        lr: a number with lr·λ < 2·(1 + β).

    Example:
        >>> from gdfunc import testing as gt
        >>> gt.check_noise_floor(gt.from_transform(gd.momentum(0.5)), gt.Momentum(0.5), curvature=2.0)
    """
    beta = claim.momentum if isinstance(claim, Momentum) else 0.0
    is_undamped = claim == Momentum(beta) or (
        isinstance(claim, Momentum) and not beta and not claim.dampening
    )
    if not isinstance(claim, GradientDescent) and not is_undamped:
        raise NotApplicable("it is about gradient descent, and momentum without dampening")
    roots = np.roots([1.0, lr * curvature - 1 - beta, beta])
    shrink = float(np.abs(roots).max())
    if shrink > 0.97:
        raise NotApplicable("the answer to an impulse takes many hundreds of steps to fade")
    steps = 8 + math.ceil(math.log(1e-12) / (2 * math.log(max(shrink, 1e-3))))

    impulse = (torch.arange(steps) == 0).double()[:, None]

    def response(curvature: float) -> np.ndarray:
        def loss_fn(x: Tensor, noise: Tensor) -> Tensor:
            return 0.5 * curvature * x.square() + (noise * x).mean()

        return run(subject, loss_fn, torch.zeros((), dtype=torch.float64), impulse, lr, steps).points[0]

    x = response(curvature)
    expected = lr * (1 + beta) / (curvature * (1 - beta) * (2 * (1 + beta) - lr * curvature))
    formula = f"Var x / s^2 = lr (1+b)/(k (1-b) (2 (1+b) - lr k)), b = {beta:.6g}, k = {curvature:.6g}"
    require_equal(np.square(x).sum(), expected, f"{formula}, lr = {lr:.6g}")
    if not beta:
        other = 1.25 * curvature
        formula = f"Cov / s^2 = lr/(k + k' - lr k k'), k = {curvature:.6g}, k' = {other:.6g}, lr = {lr:.6g}"
        expected = lr / (curvature + other - lr * curvature * other)
        require_equal((x * response(other)).sum(), expected, formula)
