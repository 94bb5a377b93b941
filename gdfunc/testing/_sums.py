"""Finite sums of quadratics, all of their plans, and how a subject moves on them."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _tree
from .._tree import Tree
from ._claims._base import Claim, join, split
from ._claims._sums import Pass, SumClaim
from ._subject import Subject, run

Vector = tuple[float, ...]
LRS = (0.125, 0.0625, 0.25)  # repeated: another lr in every step


@dataclass(frozen=True)
class FiniteSum:
    """The mean f of n quadratics, fᵢ(x) = ½ xᵀHᵢx − bᵢᵀx.

    The parameters are any tree with d entries, which are x in the order of the leaves.

    Attributes:
        hessians: Hᵢ, [n, d, d], symmetric.
        offsets: bᵢ, [n, d].

    Raises:
        ValueError: the shapes disagree, or a Hessian is not symmetric.

    Example:
        >>> from gdfunc import testing as gt
        >>> problem = gt.FiniteSum(hessians=(((1.0,),), ((3.0,),)), offsets=((1.0,), (1.0,)))
        >>> problem.minimizer, problem.mu, problem.L
        (array([0.5]), 1.0, 3.0)
        >>> step = gd.make_step(problem.loss_fn)
        >>> step(torch.zeros(1, dtype=torch.float64), problem.data, 0.5)[0]
        tensor([0.5000], dtype=torch.float64)
    """

    hessians: tuple[tuple[Vector, ...], ...]
    offsets: tuple[Vector, ...]

    def __post_init__(self) -> None:
        n, d = self.b.shape if self.b.ndim == 2 else (0, 0)
        if not n or self.H.shape != (n, d, d):
            raise ValueError(
                f"hessians must be [n, d, d] and offsets [n, d]; got {self.H.shape} and {self.b.shape}"
            )
        if not (self.H.transpose(0, 2, 1) == self.H).all():
            raise ValueError("hessians must be symmetric; pass (H + H.T) / 2")

    @property
    def H(self) -> np.ndarray:
        """Return the Hessians as an array, [n, d, d]."""
        return np.array(self.hessians, dtype=np.float64)

    @property
    def b(self) -> np.ndarray:
        """Return the offsets as an array, [n, d]."""
        return np.array(self.offsets, dtype=np.float64)

    @property
    def data(self) -> tuple[Tensor, Tensor]:
        """Return the samples, float64 [n, d, d] and [n, d]."""
        return torch.from_numpy(self.H), torch.from_numpy(self.b)

    @property
    def minimizer(self) -> np.ndarray:
        """Return the x at which the gradients fᵢ' have mean zero, [d]."""
        return np.linalg.solve(self.H.mean(0), self.b.mean(0))

    @property
    def L(self) -> float:
        """Return the largest eigenvalue of any Hᵢ."""
        return float(np.linalg.eigvalsh(self.H).max())

    @property
    def mu(self) -> float:
        """Return the smallest eigenvalue of any Hᵢ."""
        return float(np.linalg.eigvalsh(self.H).min())

    def gradients(self, x: Any) -> np.ndarray:
        """Return fᵢ'(x) of every sample, [n, d]."""
        return self.H @ np.asarray(x) - self.b

    @staticmethod
    def loss_fn(params: Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the mean of fᵢ(x) over a batch of samples."""
        x, (hessians, offsets) = _tree.ravel(params), batch
        return ((0.5 * hessians @ x - offsets) @ x).mean()


def sum_of_arrays(hessians: np.ndarray, offsets: np.ndarray) -> FiniteSum:
    """Make a sum of arrays, whose Hessians may be asymmetric by rounding."""
    symmetric = (hessians + hessians.transpose(0, 2, 1)) / 2
    rows = tuple(tuple(tuple(row) for row in matrix) for matrix in symmetric.tolist())
    return FiniteSum(rows, tuple(tuple(row) for row in offsets.tolist()))


def least_squares(
    features: Sequence[Sequence[float]], targets: Sequence[float], ridge: float = 0.0
) -> FiniteSum:
    """Make the sum of least squares, fᵢ(x) = ½ (aᵢᵀx − yᵢ)² + ½ ridge·‖x‖², without its constants.

    With a ridge the Hessians and the gradients at the minimum are correlated.

    Args:
        features: aᵢ, [n, d].
        targets: yᵢ, [n].
        ridge: a float >= 0.

    Example:
        >>> from gdfunc import testing as gt
        >>> gt.least_squares([[1.0], [2.0]], [1.0, 3.0], ridge=1.0)
        FiniteSum(hessians=(((2.0,),), ((5.0,),)), offsets=((1.0,), (6.0,)))
    """
    a, y = np.asarray(features, dtype=np.float64), np.asarray(targets, dtype=np.float64)
    return sum_of_arrays(a[:, :, None] * a[:, None] + ridge * np.eye(a.shape[1]), a * y[:, None])


def sharp_pair(L: float, mu: float, lr: float, radius: float, noise: float) -> FiniteSum:
    """Make the two functions at which one step of SGD is worst.

    Among all sums of L-smooth, μ-strongly convex functions with E‖fᵢ'(x*)‖² = v², a step from a point at
    distance R of x* ends farthest for this one, with x* = 0 and from x₀ = R·e₁:

    E‖x₁ − x*‖² = (½ lr (L − μ) R + √((1 − ½ lr (L + μ))² R² + lr²v²))²

    Here fᵢ'(0) = ±v·e₂ and Hᵢ = ½ (L + μ) I + ½ (L − μ) Qᵢ, where the reflection Qᵢ turns e₁ against
    wᵢ = (1 − ½ lr (L + μ)) R·e₁ − lr·fᵢ'(0).

    Args:
        L: the largest curvature.
        mu: the smallest curvature.
        lr: the learning rate of the step.
        radius: R.
        noise: v.

    Example:
        >>> from gdfunc import testing as gt
        >>> problem = gt.sharp_pair(L=2.0, mu=0.5, lr=0.5, radius=1.0, noise=1.0)
        >>> ends = (1.0, 0.0) - 0.5 * problem.gradients((1.0, 0.0))
        >>> bound = (0.375 + ((1 - 0.625) ** 2 + 0.25) ** 0.5) ** 2
        >>> round(float((ends**2).sum(1).mean()), 9), round(bound, 9)
        (1.0, 1.0)

    References:
        The bound is that of PESTO, A. B. Taylor, J. M. Hendrickx, F. Glineur 2017. The pair is gdfunc's.
    """
    hessians, gradients = [], np.array([[0.0, noise], [0.0, -noise]])
    for gradient in gradients:
        w = np.array([(1 - lr * (L + mu) / 2) * radius, 0.0]) - lr * gradient
        angle = np.arctan2(-w[1], -w[0])
        reflection = np.array([[np.cos(angle), np.sin(angle)], [np.sin(angle), -np.cos(angle)]])
        hessians.append((L + mu) / 2 * np.eye(2) + (L - mu) / 2 * reflection)
    return sum_of_arrays(np.array(hessians), -gradients)


def all_batches(n: int, batch_size: int = 1, *, replace: bool = False) -> np.ndarray:
    """List the batches of n samples, [count, B]: the subsets, or with replace all sequences."""
    if replace:
        return np.array(list(itertools.product(range(n), repeat=batch_size)))
    return np.array(list(itertools.combinations(range(n), batch_size)))


def all_plans(n: int, steps: int, batch_size: int = 1, *, replace: bool = False) -> Tensor:
    """List every plan of independent uniform batches, so that an expectation is a mean over plans.

    Args:
        n: the number of samples.
        steps: T.
        batch_size: B.
        replace: whether a batch may hold a sample twice.

    Returns:
        int64 [plans, T, B], all equally likely.

    Example:
        >>> from gdfunc import testing as gt
        >>> gt.all_plans(3, 3).shape, gt.all_plans(3, 3, 2).shape, gt.all_plans(3, 2, 2, replace=True).shape
        (torch.Size([27, 3, 1]), torch.Size([27, 3, 2]), torch.Size([81, 2, 2]))
    """
    batches = all_batches(n, batch_size, replace=replace)
    return torch.from_numpy(np.array(list(itertools.product(batches, repeat=steps))))


def path_on(subject: Subject, problem: FiniteSum, plan: Any, lrs: Any, start: Any) -> np.ndarray:
    """Run a subject on a plan of a sum, and return its points as vectors, [T + 1, d].

    Args:
        subject: the subject.
        problem: the sum.
        plan: int64 [T, B].
        lrs: a number, or one per step, [T].
        start: parameters with d entries: an array, or a tree of tensors.
    """
    plan = torch.as_tensor(plan)
    params = torch.from_numpy(start) if isinstance(start, np.ndarray) else start
    return join(run(subject, problem.loss_fn, params, plan, lrs, len(plan), problem.data).points)


def _problem_for(claim: Claim) -> tuple[FiniteSum, dict[str, Tensor]]:
    """Return four quadratics whose parameters have the claim's shapes, and where to start."""
    generator = np.random.default_rng(0)
    dim = sum(math.prod(shape) for shape in claim.shapes)
    factors = generator.standard_normal((4, dim, dim)) / math.sqrt(dim)
    problem = sum_of_arrays(factors @ factors.transpose(0, 2, 1), generator.standard_normal((4, dim)))
    shaped = zip("abc", claim.shapes, strict=False)
    return problem, {name: torch.from_numpy(generator.standard_normal(shape)) for name, shape in shaped}


def _plans_for(claim: Claim) -> dict[str, np.ndarray]:
    """Return plans for a sum of four, among them batches that hold a sample twice."""
    if isinstance(claim, Pass):
        rows = np.random.default_rng(1).integers(4, size=(4, 3 * claim.batch_size))
        return {f"4 passes of 3 batches of {claim.batch_size}": rows}
    return {
        "batches of 1": np.array([[2], [0], [0], [3], [1], [2]]),
        "batches of 3": np.array([[2, 0, 2], [1, 1, 1], [3, 0, 1], [0, 2, 3], [2, 3, 3], [1, 2, 0]]),
    }


def moves_on(
    subject: Subject, claim: Claim, problem: FiniteSum, plan: Any, lrs: Any, start: Tree = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the moves of a subject on a plan, and those that its claim expects, [T, d].

    Args:
        subject: the subject.
        claim: one about gradients, tried at those that the subject has seen, or about finite sums.
        problem: the sum.
        plan: the rows of every step, int64 [T, B].
        lrs: repeated over the steps.
        start: a tree with d entries; None: a vector away from zero.
    """
    plan = np.asarray(plan)
    if start is None:
        start = torch.linspace(-1.0, 2.0, problem.b.shape[1], dtype=torch.float64)
    rates = np.resize(lrs, len(plan))
    done = run(subject, problem.loss_fn, start, torch.from_numpy(plan), rates, len(plan), problem.data)
    points = join(done.points)
    if isinstance(claim, SumClaim):
        expected = np.diff(claim.path(problem.gradients, points[0], plan, rates), axis=0)
    else:
        gradients = [problem.gradients(x)[rows].mean(0) for x, rows in zip(points, plan, strict=False)]
        before = [leaf[:-1] for leaf in done.points]
        with np.errstate(all="ignore"):
            expected = join(claim.moves(split(np.array(gradients), before), before, rates))
    return np.diff(points, axis=0), expected


def moves_on_sums(subject: Subject, claim: Claim) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return `moves_on` for the plans of one sum, by their names."""
    problem, start = _problem_for(claim)
    plans = _plans_for(claim)
    return {name: moves_on(subject, claim, problem, plan, LRS, start) for name, plan in plans.items()}
