"""Problems: a loss and what is known about its minimum, and losses without data."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import datasets, random
from .._errors import check_int
from .._numerics import finite_tensor
from .._shown import shown
from .._tree import Tree


class Problem(NamedTuple):
    """A loss, a place to start, and what is known about the minimum.

    Attributes:
        loss_fn: `(params, batch) -> loss`, 0-d. Pass `data` for all of the data.
        params: the start, which is the customary point if there is one.
        data: tensors with samples on dim 0, or None.
        minimizers: every known global minimiser, each a tree like params.
        minimum: the loss at a minimiser, over all of the data.
        L: the largest eigenvalue that the Hessian has anywhere; None where it is unbounded.
        mu: the infimum of its smallest eigenvalue; 0 for a loss that is convex but not strongly,
            None for one that is not convex.

    Example:
        >>> problem = gd.problems.himmelblau()
        >>> [problem.loss_fn(x, problem.data).item() < 1e-29 for x in problem.minimizers]
        [True, True, True, True]
        >>> gd.problems.quadratic([1.0, 10.0])
        Problem(loss_fn=loss_fn, params=float64[2], data=None, minimizers=(float64[2],), minimum=0.0, \
        L=10.0, mu=1.0)
    """

    loss_fn: Callable[..., Tensor]
    params: Tree
    data: Tree | None
    minimizers: tuple[Tree, ...]
    minimum: float
    L: float | None = None
    mu: float | None = None

    def __repr__(self) -> str:
        return f"Problem({', '.join(f'{name}={shown(value)}' for name, value in self._asdict().items())})"


def quadratic(
    eigenvalues: Tensor | np.ndarray | Sequence[float],
    *,
    minimizer: Tensor | np.ndarray | Sequence[float] | None = None,
    key: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Problem:
    """Make a convex quadratic whose Hessian H has a given spectrum.

    f(x) = ½ (x − x*)ᵀ H (x − x*),  H = Q diag(λ) Qᵀ

    The minimum is 0; L is the largest eigenvalue and μ the smallest. The start is x* + Q (1, …, 1):
    one unit along every eigenvector.

    Args:
        eigenvalues: λ, [D], none negative. Where some are zero, x* is one minimiser of many.
        minimizer: x*, [D]; None: the origin.
        key: of gdfunc.random, to draw Q uniformly from the rotations and reflections. None: Q = I.
        dtype: of the problem.

    Returns:
        The problem, with params [D].

    Raises:
        ValueError: an eigenvalue is negative or not finite, or a shape is wrong.

    Example:
        >>> problem = gd.problems.quadratic([1.0, 10.0])
        >>> problem.loss_fn(problem.params)
        tensor(5.5000, dtype=torch.float64)
        >>> rotated = gd.problems.quadratic([1.0, 10.0], key=gd.random.key(0))
        >>> torch.func.jacrev(torch.func.grad(rotated.loss_fn))(rotated.params)
        tensor([[9.8858, 1.0072],
                [1.0072, 1.1142]], dtype=torch.float64)

    References:
        F. Mezzadri, "How to generate random matrices from the classical compact groups", 2007.
    """
    spectrum = finite_tensor("eigenvalues", eigenvalues, dtype)
    if spectrum.ndim != 1 or not len(spectrum) or spectrum.min() < 0:
        raise ValueError(f"eigenvalues must be [D] with D >= 1 and none < 0; got {eigenvalues!r}")
    dim = len(spectrum)
    center = finite_tensor("minimizer", [0.0] * dim if minimizer is None else minimizer, dtype)
    if center.shape != spectrum.shape:
        raise ValueError(f"minimizer must be [{dim}] like eigenvalues; got {tuple(center.shape)}")
    basis = None if key is None else _orthogonal(key, dim).to(spectrum)

    def loss_fn(params: Tensor, batch: None = None) -> Tensor:
        offset = params - center.to(params)
        along = offset if basis is None else offset @ basis.to(params)
        return 0.5 * (spectrum.to(params) * along.square()).sum()

    start = center + (1.0 if basis is None else basis.sum(dim=1))
    L, mu = float(spectrum.max()), float(spectrum.min())
    return Problem(loss_fn, start, None, (center.clone(),), 0.0, L, mu)


def rosenbrock(dim: int = 2, *, dtype: torch.dtype = torch.float64) -> Problem:
    """Make Rosenbrock's curved valley, chained through `dim` coordinates.

    f(x) = Σᵢ 100 (xᵢ₊₁ − xᵢ²)² + (1 − xᵢ)²,  i = 1 … dim − 1

    The minimum is 0 at (1, …, 1), the start (−1.2, 1, −1.2, 1, …). From four coordinates on there
    may be a second, local minimum near (−1, 1, …, 1).

    Args:
        dim: number of coordinates, at least 2.
        dtype: of the problem.

    Returns:
        The problem, with params [dim].

    Raises:
        ValueError: dim is no int of at least 2.

    Example:
        >>> problem = gd.problems.rosenbrock()
        >>> problem.params, problem.loss_fn(problem.params)
        (tensor([-1.2000,  1.0000], dtype=torch.float64), tensor(24.2000, dtype=torch.float64))

    References:
        H. Rosenbrock, "An automatic method for finding the greatest or least value of a function",
        1960.
        J. Moré, B. Garbow, K. Hillstrom, "Testing unconstrained optimization software", 1981: the
        start.
        Y. Shang, Y. Qiu, "A note on the extended Rosenbrock function", 2006: the local minimum.
    """
    dim = check_int("dim", dim, 2)

    def loss_fn(params: Tensor, batch: None = None) -> Tensor:
        here, following = params[:-1], params[1:]
        return (100 * (following - here.square()).square() + (1 - here).square()).sum()

    start = [(-1.2, 1.0)[i % 2] for i in range(dim)]
    return _test_function(loss_fn, start, [[1.0] * dim], dtype)


def beale(*, dtype: torch.dtype = torch.float64) -> Problem:
    """Make Beale's function: steep walls around a flat valley.

    f(x, y) = (1.5 − x + xy)² + (2.25 − x + xy²)² + (2.625 − x + xy³)²

    The minimum is 0 at (3, 0.5), the start (1, 1).

    Args:
        dtype: of the problem.

    Returns:
        The problem, with params [2].

    Example:
        >>> problem = gd.problems.beale()
        >>> problem.loss_fn(problem.params)
        tensor(14.2031, dtype=torch.float64)

    References:
        E. Beale, "On an iterative method for finding a local minimum of a function of more than one
        variable", 1958.
        J. Moré, B. Garbow, K. Hillstrom, "Testing unconstrained optimization software", 1981: the
        start.
    """

    def loss_fn(params: Tensor, batch: None = None) -> Tensor:
        x, y = params.unbind()
        terms = [c - x * (1 - y**k) for k, c in ((1, 1.5), (2, 2.25), (3, 2.625))]
        return torch.stack(terms).square().sum()

    return _test_function(loss_fn, [1.0, 1.0], [[3.0, 0.5]], dtype)


def rastrigin(dim: int = 2, *, dtype: torch.dtype = torch.float64) -> Problem:
    """Make Rastrigin's function: a bowl with a local minimum near every point of the integer grid.

    f(x) = 10 dim + Σᵢ xᵢ² − 10 cos 2πxᵢ

    The minimum is 0 at the origin, and L = 2 + 40π². It is customarily sought in [−5.12, 5.12]
    from anywhere. The start here is (4.2, …, 4.2).

    Args:
        dim: number of coordinates, at least 1.
        dtype: of the problem.

    Returns:
        The problem, with params [dim].

    Raises:
        ValueError: dim is no int of at least 1.

    Example:
        >>> problem = gd.problems.rastrigin()
        >>> problem.loss_fn(problem.params), problem.L
        (tensor(49.0997, dtype=torch.float64), 396.78417604357435)

    References:
        L. Rastrigin, "Systems of extremal control", 1974.
        H. Mühlenbein, M. Schomisch, J. Born, "The parallel genetic algorithm as function
        optimizer", 1991: in any dimension.
    """
    dim = check_int("dim", dim, 1)

    def loss_fn(params: Tensor, batch: None = None) -> Tensor:
        return (10 + params.square() - 10 * torch.cos(2 * math.pi * params)).sum()

    problem = _test_function(loss_fn, [4.2] * dim, [[0.0] * dim], dtype)
    return problem._replace(L=2 + 40 * math.pi**2)


def himmelblau(*, dtype: torch.dtype = torch.float64) -> Problem:
    """Make Himmelblau's function: four minima, equally deep.

    f(x, y) = (x² + y − 11)² + (x + y² − 7)²

    The minimum is 0 at (3, 2) and, to four digits, (−2.805, 3.131), (−3.779, −3.283) and
    (3.584, −1.848); `minimizers` has all digits. The start is the origin.

    Args:
        dtype: of the problem.

    Returns:
        The problem, with params [2].

    Example:
        >>> problem = gd.problems.himmelblau()
        >>> problem.loss_fn(problem.params)
        tensor(170., dtype=torch.float64)

    References:
        D. Himmelblau, "Applied Nonlinear Programming", 1972.
    """

    def loss_fn(params: Tensor, batch: None = None) -> Tensor:
        x, y = params.unbind()
        return (x**2 + y - 11) ** 2 + (x + y**2 - 7) ** 2

    minimizers = [
        [3.0, 2.0],
        [-2.805118086952745, 3.131312518250573],
        [-3.779310253377747, -3.2831859912861696],
        [3.5844283403304917, -1.8481265269644036],
    ]
    return _test_function(loss_fn, [0.0, 0.0], minimizers, dtype)


def _test_function(
    loss_fn: Callable[..., Tensor], start: list[float], minimizers: list[list[float]], dtype: torch.dtype
) -> Problem:
    """Make the problem of a loss without data whose minimum is 0."""
    places = tuple(finite_tensor("minimizers", place, dtype) for place in minimizers)
    return Problem(loss_fn, finite_tensor("params", start, dtype), None, places, 0.0)


def _orthogonal(key: Tensor, dim: int) -> Tensor:
    """Draw a uniformly random orthogonal matrix, float64 [dim, dim]."""
    random._check_key(key)
    q, r = torch.linalg.qr(random.normal(key, (dim, dim), torch.float64))
    # QR is unique, and Q uniform, only once the diagonal of R is made positive (Mezzadri 2007).
    return q * r.diagonal().sign()


def elevation(*, dtype: torch.dtype = torch.float64) -> Problem:
    """Make the height of a real landscape a loss: params is a place on the map.

    f(x, y) = (1−u)(1−v) hⱼᵢ + u(1−v) hⱼ,ᵢ₊₁ + (1−u)v hⱼ₊₁,ᵢ + uv hⱼ₊₁,ᵢ₊₁,  x = i + u, y = j + v

    Bilinear between the heights h of `elevation_map`, so that no place is lower than the lowest of
    them: 236 m, in column 347 and row 288 alone. There, as on all lines of the grid, the slope
    jumps. The gradient is that of the cell to the south-east and need not vanish. A place off the
    map has the height of the nearest one on it. The start is the summit.

    Args:
        dtype: of the problem.

    Returns:
        The problem. Its params are (column, row) [2], in cells from the north-west corner, and its loss
        is in metres.

    Raises:
        ModuleNotFoundError: matplotlib, the extra `plot`, is not installed.

    Example:
        >>> problem = gd.problems.elevation()
        >>> problem.params, problem.loss_fn(problem.params)
        (tensor([219., 297.], dtype=torch.float64), tensor(1076., dtype=torch.float64))
        >>> problem.minimizers[0], problem.minimum
        (tensor([347., 288.], dtype=torch.float64), 236.0)
    """
    heights = datasets.elevation_map(dtype=dtype)
    rows, columns = heights.shape
    last = torch.tensor([columns - 1, rows - 1], dtype=dtype)
    corners = torch.tensor([0, 1, columns, columns + 1])

    def loss_fn(params: Tensor, batch: None = None) -> Tensor:
        grid, far = heights.to(params).flatten(), last.to(params)
        place = torch.minimum(params.clamp(min=0), far)
        # Because a place that is NaN needs some cell. Its offsets in that cell make the height NaN.
        cell = torch.minimum(place.nan_to_num().floor(), far - 1)
        (u, v), (column, row) = place - cell, cell.to(torch.int64)
        weights = torch.stack([(1 - u) * (1 - v), u * (1 - v), (1 - u) * v, u * v])
        return weights @ grid[row * columns + column + corners.to(params.device)]

    def position(index: Tensor) -> Tensor:
        return torch.stack([index % columns, index // columns]).to(dtype)

    summit, lowest = position(heights.argmax()), position(heights.argmin())
    return Problem(loss_fn, summit, None, (lowest,), float(heights.min()))
