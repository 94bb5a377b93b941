"""Methods for finite sums, whose batches are row numbers."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ._base import Choices, Claim

Gradients = Callable[[np.ndarray], np.ndarray]  # x [d] -> fᵢ'(x) of every sample, [n, d]


@dataclass(frozen=True)
class SumClaim(Claim):
    """A rule for a finite sum, which knows its path on any plan."""

    def path(
        self, gradients: Gradients, start: np.ndarray, plan: np.ndarray, lrs: np.ndarray
    ) -> np.ndarray:
        """Return the points of a run, [T + 1, d].

        Args:
            gradients: `x [d] -> [n, d]`, the gradient of every sample.
            start: [d].
            plan: the rows of every step, [T, ...].
            lrs: [T].
        """
        return np.array([start, *self.ends(gradients, start, plan, lrs)])

    def ends(
        self, gradients: Gradients, x: np.ndarray, plan: np.ndarray, lrs: np.ndarray
    ) -> Iterator[np.ndarray]:
        """Yield the point after every step."""
        raise NotImplementedError


@dataclass(frozen=True)
class Pass(SumClaim):
    """A rule whose step is a pass: a walk over the batches of one row of the plan.

    Attributes:
        batch_size: B; the rows of a pass are [m·B].
        output: "last", or "average": θ' is the mean of the w's at which gradients were taken.
    """

    choices: ClassVar[Choices] = {"output": ("last", "average")}
    counts: ClassVar[tuple[str, ...]] = ("batch_size",)

    batch_size: int = 1
    output: str = "last"

    def ends(
        self, gradients: Gradients, x: np.ndarray, plan: np.ndarray, lrs: np.ndarray
    ) -> Iterator[np.ndarray]:
        for rows, lr in zip(plan, lrs, strict=True):
            points = self.points(gradients, x, rows.reshape(-1, self.batch_size), lr)
            x = np.mean(points[:-1], 0) if self.output == "average" else points[-1]
            yield x

    def points(
        self, gradients: Gradients, x: np.ndarray, batches: np.ndarray, lr: float
    ) -> list[np.ndarray]:
        """Return the w's of a pass from x, the start among them."""
        raise NotImplementedError


@dataclass(frozen=True)
class SVRG(Pass):
    """w = θ; for every batch b of a pass: w ← w − lr·(f_b'(w) − f_b'(θ) + f'(θ)); θ' = w.

    Attributes:
        batch_size: B; the rows of a pass are [m·B].
        output: "last", or "average": θ' is the mean of the w's at which gradients were taken.
    """

    family: ClassVar[str] = "svrg"
    formula: ClassVar[str] = "w' = w - lr (grad f_b(w) - grad f_b(x) + grad f(x)), x the start of the pass"
    source: ClassVar[str] = "R. Johnson, T. Zhang 2013"

    def points(
        self, gradients: Gradients, x: np.ndarray, batches: np.ndarray, lr: float
    ) -> list[np.ndarray]:
        at_start, points = gradients(x), [x]
        for batch in batches:
            change = (gradients(points[-1]) - at_start)[batch].mean(0)
            points.append(points[-1] - lr * (change + at_start.mean(0)))
        return points


@dataclass(frozen=True)
class SARAH(Pass):
    """v = f'(θ), w = θ − lr·v; for every batch b of a pass: v ← f_b'(w) − f_b'(w₋₁) + v, w ← w − lr·v.

    Attributes:
        batch_size, output: as for `SVRG`.
    """

    family: ClassVar[str] = "sarah"
    formula: ClassVar[str] = (
        "v' = grad f_b(w) - grad f_b(w_before) + v, w' = w - lr v'; first v = grad f(x)"
    )
    source: ClassVar[str] = "L. M. Nguyen et al. 2017"

    def points(
        self, gradients: Gradients, x: np.ndarray, batches: np.ndarray, lr: float
    ) -> list[np.ndarray]:
        estimate = gradients(x).mean(0)
        points = [x, x - lr * estimate]
        for batch in batches:
            estimate = estimate + (gradients(points[-1]) - gradients(points[-2]))[batch].mean(0)
            points.append(points[-1] - lr * estimate)
        return points


@dataclass(frozen=True)
class SAGA(SumClaim):
    """θ' = θ − lr·(f_b'(θ) − mean of b's rows of the table + mean of the table); then b's rows are renewed.

    The table begins with the gradients at the start. A sample that a batch holds twice counts twice in the
    step and once in the table.
    """

    family: ClassVar[str] = "saga"
    formula: ClassVar[str] = "x' = x - lr (grad f_b(x) - table_b + mean of the table), then the rows b"
    source: ClassVar[str] = "A. Defazio, F. Bach, S. Lacoste-Julien 2014"

    def ends(
        self, gradients: Gradients, x: np.ndarray, plan: np.ndarray, lrs: np.ndarray
    ) -> Iterator[np.ndarray]:
        table = gradients(x)
        for rows, lr in zip(plan, lrs, strict=True):
            now = gradients(x)
            x = x - lr * ((now - table)[rows].mean(0) + table.mean(0))
            table[rows] = now[rows]
            yield x


@dataclass(frozen=True)
class SAG(SumClaim):
    """The batch's rows of the table are renewed; then θ' = θ − lr·(mean of the table).

    The table begins with the gradients at the start.
    """

    family: ClassVar[str] = "sag"
    formula: ClassVar[str] = "the rows b of the table, then x' = x - lr (mean of the table)"
    source: ClassVar[str] = "M. Schmidt, N. Le Roux, F. Bach 2017"

    def ends(
        self, gradients: Gradients, x: np.ndarray, plan: np.ndarray, lrs: np.ndarray
    ) -> Iterator[np.ndarray]:
        table = gradients(x)
        for rows, lr in zip(plan, lrs, strict=True):
            table[rows] = gradients(x)[rows]
            x = x - lr * table.mean(0)
            yield x
