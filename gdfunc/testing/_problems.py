"""Losses with known constants, among them those on which a theorem is an equality.

Every problem prints as the code that rebuilds it. Parameters are any tree whose entries, in order, are the
coordinates; a law runs a subject on a tree of two leaves.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .. import _tree
from .._tree import Tree
from ._claims._base import join
from ._subject import Subject, run

Numbers = tuple[float, ...]


@dataclass(frozen=True)
class Problem:
    """A loss whose curvature lies in [mu, L].

    `loss_fn(params, batch)` is a loss like any other, for parameters of any tree whose entries are the
    coordinates. `values` and `gradients` take points [..., D] and return NumPy. To use another problem,
    such as one of `gd.problems`, give its `loss_fn` to `run`.
    """

    @property
    def L(self) -> float:
        """Return the largest curvature; by default no bound."""
        return float("inf")

    @property
    def mu(self) -> float:
        """Return the smallest curvature; by default no bound."""
        return -float("inf")

    def loss(self, x: Tensor) -> Tensor:
        """Return f(x) for a vector [D]."""
        raise NotImplementedError

    def loss_fn(self, params: Tree, batch: Any = None) -> Tensor:
        """Return f of a tree of parameters; the batch is ignored."""
        return self.loss(_tree.ravel(params))

    def values(self, points: Any) -> np.ndarray:
        """Return f at points [..., D]."""
        rows = torch.as_tensor(np.asarray(points, dtype=np.float64))
        flat = rows.reshape(-1, rows.shape[-1])
        return np.array([float(self.loss(x)) for x in flat]).reshape(rows.shape[:-1])

    def gradients(self, points: Any) -> np.ndarray:
        """Return ∇f at points [..., D]."""
        rows = torch.as_tensor(np.asarray(points, dtype=np.float64)).requires_grad_()
        flat = rows.reshape(-1, rows.shape[-1])
        (slopes,) = torch.autograd.grad(torch.stack([self.loss(x) for x in flat]).sum(), rows)
        return slopes.numpy()


@dataclass(frozen=True)
class Quadratic(Problem):
    """f(x) = ½·(x − x*)ᵀH(x − x*), where H has a given spectrum.

    Attributes:
        spectrum: the eigenvalues, [D].
        minimizer: x*, [D]; (): the origin.
        mirror: v, [D]; the eigenvectors are the columns of I − 2·vvᵀ/‖v‖². (): the axes.

    Raises:
        ValueError: minimizer or mirror has another length than spectrum.

    Example:
        >>> from gdfunc import testing as gt
        >>> problem = gt.Quadratic(spectrum=(1.0, 4.0), minimizer=(0.5, 0.0))
        >>> problem.mu, problem.L, problem.values([0.5, 1.0])
        (1.0, 4.0, array(2.))
    """

    spectrum: Numbers
    minimizer: Numbers = ()
    mirror: Numbers = ()

    def __post_init__(self) -> None:
        for name in ("minimizer", "mirror"):
            if len(getattr(self, name)) not in (0, len(self.spectrum)):
                raise ValueError(
                    f"{name} is {getattr(self, name)}, but spectrum has {len(self.spectrum)} entries"
                )

    @property
    def L(self) -> float:
        return max(self.spectrum)

    @property
    def mu(self) -> float:
        return min(self.spectrum)

    @property
    def center(self) -> np.ndarray:
        """Return x*, [D]."""
        return np.array(self.minimizer or [0.0] * len(self.spectrum))

    @property
    def basis(self) -> np.ndarray:
        """Return the eigenvectors, the columns of [D, D]."""
        return reflection(np.array(self.mirror)) if any(self.mirror) else np.eye(len(self.spectrum))

    @property
    def hessian(self) -> np.ndarray:
        """Return H, [D, D]."""
        return self.basis * np.array(self.spectrum) @ self.basis.T

    def loss(self, x: Tensor) -> Tensor:
        if len(x) != len(self.spectrum):
            raise ValueError(f"the point has {len(x)} entries, but spectrum has {len(self.spectrum)}")
        along = (x - torch.from_numpy(self.center).to(x)) @ torch.from_numpy(self.basis).to(x)
        return 0.5 * (torch.tensor(self.spectrum, dtype=x.dtype) * along**2).sum()


@dataclass(frozen=True)
class Huber(Problem):
    """f′(x) = L·x for |x| ≤ τ, and μ·x + (L − μ)·τ·sign(x) beyond, in one dimension."""

    L: float = 1.0
    mu: float = 0.0
    tau: float = 1.0

    def loss(self, x: Tensor) -> Tensor:
        # Not by clamp, whose derivative at its bounds is another in another torch.
        beyond = x.abs() - self.tau
        outside = self.L * self.tau * (beyond + 0.5 * self.tau) + 0.5 * self.mu * beyond**2
        return torch.where(beyond <= 0, 0.5 * self.L * x**2, outside).sum()


@dataclass(frozen=True)
class TriangularWave(Problem):
    """The worst smooth function without convexity for N steps of lr h/L, h ≤ 1, in one dimension.

    On the way down from 0 the slope is 1 at every iterate and dips to 1 − h/2 half way. After N steps it
    falls to 0 with curvature L. So f(0) − f* = (N·h·(4 − h) + 2)/(4·L).
    """

    L: float = 1.0
    h: float = 1.0
    steps: int = 1

    @property
    def mu(self) -> float:
        return -self.L

    @property
    def gap(self) -> float:
        """Return f(0) − f*."""
        return (self.steps * self.h * (4 - self.h) + 2) / (4 * self.L)

    def loss(self, x: Tensor) -> Tensor:
        g = self.h / self.L
        down = -x
        whole = (down.detach() / g).floor().clamp(0, self.steps)
        rest = down - whole * g
        # The slope falls up to the middle of a step, uphill of the start, and after the last step.
        falls = (rest <= g / 2) | (whole >= self.steps)
        fall = rest - self.L * torch.where(falls, rest**2 / 2, g**2 / 4 - (g - rest) ** 2 / 2)
        return -(whole * g * (1 - self.h / 4) + fall).sum()


@dataclass(frozen=True)
class PLSine(Problem):
    """f(x) = a·(x² + 3·sin²(x)): not convex, with L = 8·a and f* = 0, in one dimension.

    It keeps the inequality of Polyak and Łojasiewicz, ½·f′² ≥ pl·f with pl = a/32.
    """

    scale: float = 1.0

    @property
    def L(self) -> float:
        return 8 * self.scale

    @property
    def mu(self) -> float:
        return -4 * self.scale

    @property
    def pl(self) -> float:
        """Return the constant of the inequality."""
        return self.scale / 32

    def loss(self, x: Tensor) -> Tensor:
        return (self.scale * (x**2 + 3 * x.sin() ** 2)).sum()


@dataclass(frozen=True)
class Logistic(Problem):
    """f(x) = mean log(1 + exp(−bᵢ·⟨aᵢ, x⟩)) + ridge/2·‖x‖².

    Attributes:
        features: rows aᵢ, [n][D].
        labels: bᵢ, each 1 or −1, [n].
        ridge: >= 0.
    """

    features: tuple[Numbers, ...]
    labels: Numbers
    ridge: float = 0.0

    @property
    def L(self) -> float:
        a = np.array(self.features)
        return float(np.linalg.norm(a, 2) ** 2 / (4 * len(a)) + self.ridge)

    @property
    def mu(self) -> float:
        return self.ridge

    def loss(self, x: Tensor) -> Tensor:
        a, b = (torch.tensor(part, dtype=x.dtype) for part in (self.features, self.labels))
        return functional.softplus(-b * (a @ x)).mean() + 0.5 * self.ridge * (x**2).sum()


@dataclass(frozen=True)
class Waves(Problem):
    """f(x) = Σ wᵢ·(1 − cos xᵢ): it curves upwards around its minima, f* = 0, and downwards between.

    Attributes:
        weights: wᵢ > 0, [D].
    """

    weights: Numbers

    @property
    def L(self) -> float:
        return max(self.weights)

    @property
    def mu(self) -> float:
        return -self.L

    def loss(self, x: Tensor) -> Tensor:
        return (torch.tensor(self.weights, dtype=x.dtype) * (1 - x.cos())).sum()


@dataclass(frozen=True)
class Rosenbrock(Problem):
    """f(x, y) = 100·(y − x²)² + (1 − x)²: a curved valley, whose curvature has no bound."""

    def loss(self, x: Tensor) -> Tensor:
        return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2


@dataclass(frozen=True)
class Cone(Problem):
    """f(x) = M·|x| in one dimension, which has no curvature but an edge.

    Attributes:
        slope: M > 0.
    """

    slope: float = 1.0

    @property
    def mu(self) -> float:
        return 0.0

    def loss(self, x: Tensor) -> Tensor:
        return self.slope * x.abs().sum()


@dataclass(frozen=True)
class Raised(Problem):
    """Another problem plus a constant."""

    problem: Problem
    by: float

    @property
    def L(self) -> float:
        return self.problem.L

    @property
    def mu(self) -> float:
        return self.problem.mu

    def loss(self, x: Tensor) -> Tensor:
        return self.problem.loss(x) + self.by


@dataclass(frozen=True)
class Maximum(Problem):
    """f(x) = M·max xᵢ, whose subgradient is that of the first largest coordinate."""

    M: float = 1.0

    @property
    def mu(self) -> float:
        return 0.0

    def loss(self, x: Tensor) -> Tensor:
        return self.M * x.max(0).values


@dataclass(frozen=True)
class Hermite(Problem):
    """The cubic of the way down s = 1 − x₀ with f = 0 and slope −1 at s = 0.

    The other coordinates begin at 0, where they have the slope s².

    Attributes:
        value: f at s = 1.
        slope: its derivative with respect to s there.
    """

    value: float
    slope: float

    def loss(self, x: Tensor) -> Tensor:
        s = 1 - x[0]
        bend, third = 3 * self.value + 2 - self.slope, self.slope - 1 - 2 * self.value
        return -s + bend * s**2 + third * s**3 + s**2 * x[1:].sum()


@dataclass(frozen=True)
class Fit(Problem):
    """Residuals for methods of least squares: `loss_fn` returns the residuals, [m], not their mean square.

    Its curve is a sum of exponentials, r_j = Σᵢ aᵢ·exp(−bᵢ·tⱼ) − yⱼ with x = (a, b) and tⱼ = j. With
    `is_linear` it is instead r = A·x − y with A_ji = cos(i·j + i).

    Attributes:
        targets: y, [m].
        is_linear: whether the residuals are linear.
    """

    targets: Numbers
    is_linear: bool = False

    def loss(self, x: Tensor) -> Tensor:
        y, t = torch.tensor(self.targets, dtype=x.dtype), torch.arange(len(self.targets), dtype=x.dtype)
        if self.is_linear:
            i = torch.arange(1, len(x) + 1, dtype=x.dtype)
            return (i * t[:, None] + i).cos() @ x - y
        size, rate = x.chunk(2)
        return (size * (-rate * t[:, None]).exp()).sum(1) - y

    def linearise(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the residuals [m] and their derivatives J [m, D] at a point."""
        at = torch.from_numpy(np.array(x))
        return self.loss(at).numpy(), torch.func.jacrev(self.loss)(at).numpy()


def reflection(v: np.ndarray) -> np.ndarray:
    """Return the matrix that turns v around, I − 2·vvᵀ/‖v‖², [D, D]."""
    return np.eye(len(v)) - 2 * np.outer(v, v) / (v @ v)


def worst_huber(displacement: float, L: float = 1.0, radius: float = 1.0) -> Huber:
    """Return the Huber function on which a method ends at gap (L/2)·R²/(2·D + 1).

    Args:
        displacement: D, of N steps under a unit gradient, in units of 1/L.
        L: the curvature around the minimum.
        radius: R, the distance of the start.

    Example:
        >>> from gdfunc import testing as gt
        >>> gt.worst_huber(displacement=2.0)  # two steps of gradient descent with lr = 1/L
        Huber(L=1.0, mu=0.0, tau=0.2)
        >>> points, _ = gt.walk(gt.from_step(gd.make_step), gt.worst_huber(2.0), [1.0], 1.0, steps=2)
        >>> round(float(gt.worst_huber(2.0).values(points[-1])), 9)  # ½·R²/(2·D + 1)
        0.1
    """
    return Huber(L, 0.0, radius / (2 * displacement + 1))


def walk(subject: Subject, problem: Problem, start: Any, lrs: Any, steps: int) -> Any:
    """Run a subject on a problem from a vector [D]; return its points and answers, each [T + 1, D].

    The parameters have two leaves, a scalar and a vector, or one if there is one coordinate.

    Args:
        subject: the subject.
        problem: a `Problem` of this kit.
        start: x₀, [D].
        lrs: a number, or one per step, [T].
        steps: T.

    Raises:
        TypeError: problem is no `Problem` of this kit.
        ValueError: start is no vector, or lrs are not one number, or T of them.

    Example:
        >>> from gdfunc import testing as gt
        >>> import numpy as np
        >>> problem = gt.Quadratic((0.25, 1.0))
        >>> points, answers = gt.walk(gt.from_step(gd.make_step), problem, [1.0, 1.0], 0.5, steps=60)
        >>> gt.measure_rate(np.linalg.norm(points - problem.center, axis=1)).kind
        'linear'
    """
    if not isinstance(problem, Problem):
        raise TypeError(
            f"problem is {type(problem).__name__}, not a Problem of gdfunc.testing; "
            f"run(subject, problem.loss_fn, params, ...) takes any loss"
        )
    if np.ndim(start) != 1:
        raise ValueError(f"start has shape {list(np.shape(start))}; it must be a vector, [D]")
    x = torch.as_tensor(np.asarray(start, dtype=np.float64))
    params: Tree = x[0].clone() if len(x) == 1 else {"a": x[0].clone(), "b": x[1:].clone()}
    done = run(subject, problem.loss_fn, params, None, lrs, steps)
    return join(done.points), join(done.results)
