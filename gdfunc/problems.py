"""Losses with known minimum, smoothness L and strong convexity μ, and data that needs no network.

Everything is float64 unless `dtype=` says otherwise, so that theory can be tested to the last
digits. Every loss is `loss_fn(params, batch)` like any other: the mean over the batch, 0-d. The
test functions have no data; theirs ignore the batch, which may be left out.
"""

import csv
import math
from collections.abc import Callable, Sequence
from importlib import util
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import _tree, random
from ._errors import check_int, check_scalar, missing_extra
from ._tree import Tree

_SHARES = ("IBM", "AAPL", "MSFT", "XRX", "ADBE")
_INDEX = "^GSPC"


class Problem(NamedTuple):
    """A loss, a place to start, and what is known about the minimum.

    Attributes:
        loss_fn: `(params, batch) -> loss`, 0-d; for all of the data pass `data`.
        params: where to start; the customary point where there is one.
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
    """

    loss_fn: Callable[..., Tensor]
    params: Tree
    data: Tree | None
    minimizers: tuple[Tree, ...]
    minimum: float
    L: float | None = None
    mu: float | None = None


class Dataset(NamedTuple):
    """Samples and their targets, with names; `(dataset.x, dataset.y)` is data to train on.

    Attributes:
        x: float [n, D].
        y: [n]; int64 where it is a class.
        features: the names of the D columns of x.
        dates: the months of the n rows, where the rows are months.

    Example:
        >>> gd.problems.Dataset(torch.zeros(2, 1), torch.zeros(2), features=("height",)).dates
        ()
    """

    x: Tensor
    y: Tensor
    features: tuple[str, ...]
    dates: tuple[str, ...] = ()


def mse(predictions: Tensor, targets: Tensor) -> Tensor:
    """Average the squared errors, as torch does: no factor ½.

    mean (p − t)²

    Args:
        predictions: float, of any shape.
        targets: of the same shape; nothing is broadcast.

    Returns:
        The mean over all entries, 0-d.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> gd.problems.mse(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 5.0]))
        tensor(4.5000)
    """
    if predictions.shape != targets.shape:
        raise ValueError(_shapes_differ(tuple(predictions.shape), tuple(targets.shape)))
    return (predictions - targets).square().mean()


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Average the negative log-probability that logits give to the right classes.

    mean −log softmax(z)ₜ

    Args:
        logits: float [B, C].
        targets: the class of each sample, int64 [B] with entries in [0, C).

    Returns:
        The mean over the batch, 0-d.

    Raises:
        TypeError: the targets are not int64.
        ValueError: the shapes are not [B, C] and [B].

    Example:
        >>> gd.problems.cross_entropy(torch.zeros(2, 10), torch.tensor([3, 7]))
        tensor(2.3026)
    """
    if targets.dtype != torch.int64:
        raise TypeError(f"cross_entropy: targets must be int64 classes; got {targets.dtype}")
    if logits.ndim != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(
            "cross_entropy: logits must be [B, C] and targets [B]; "
            f"got {tuple(logits.shape)} and {tuple(targets.shape)}"
        )
    return -logits.log_softmax(dim=1).gather(1, targets[:, None]).mean()


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
        key: of gdfunc.random; it draws Q uniformly from the rotations and reflections. None: Q = I.
        dtype: of the problem.

    Returns:
        The problem; params is [D].

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
    spectrum = _tensor("eigenvalues", eigenvalues, dtype)
    if spectrum.ndim != 1 or not len(spectrum) or spectrum.min() < 0:
        raise ValueError(f"eigenvalues must be [D] with D >= 1 and none < 0; got {eigenvalues!r}")
    dim = len(spectrum)
    center = _tensor("minimizer", [0.0] * dim if minimizer is None else minimizer, dtype)
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
        The problem; params is [dim].

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
        The problem; params is [2].

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

    The minimum is 0 at the origin, and L = 2 + 40π². It is customarily looked for in [−5.12, 5.12]
    from anywhere; the start here is (4.2, …, 4.2).

    Args:
        dim: number of coordinates, at least 1.
        dtype: of the problem.

    Returns:
        The problem; params is [dim].

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
        The problem; params is [2].

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


def linear_regression(
    x: Tensor | np.ndarray,
    y: Tensor | np.ndarray,
    *,
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
) -> Problem:
    """Make the least-squares problem of given data, and solve it.

    L(w, b) = ½ mean (x·w + b − y)²

    With the ½ the Hessian is AᵀA / n, where A is x, with a column of ones if there is a bias; L and
    μ are its largest and smallest eigenvalue. Where the columns of A are linearly dependent, μ is 0
    and the minimiser given is the one of least norm.

    Args:
        x: [n, D].
        y: [n].
        bias: whether there is a b.
        dtype: of the problem; the data are rounded to it, and then solved in float64.

    Returns:
        The problem; params is {"w": [D], "b": []}, or {"w": [D]} without a bias, and starts at
        zero; data is (x, y).

    Raises:
        TypeError: the dtype is not a floating one.
        ValueError: the shapes are others, or an entry is not finite.

    Example:
        >>> x, y = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([1.0, 3.0, 6.0])
        >>> problem = gd.problems.linear_regression(x, y)
        >>> w, b = problem.minimizers[0].values()
        >>> print(f"{w.item():.4f} {b.item():.4f} {problem.minimum:.4f}")
        2.5000 0.8333 0.0278
        >>> print(f"{problem.L:.4f} {problem.mu:.4f}")
        2.3874 0.2792

    References:
        A. Björck, "Numerical Methods for Least Squares Problems", 1996.
    """
    x, y = _samples(x, y, dtype)
    design, target = (leaf.to("cpu", torch.float64) for leaf in (x, y))
    if bias:
        design = torch.cat([design, torch.ones_like(target)[:, None]], dim=1)

    def loss_fn(params: Tree, batch: Tree) -> Tensor:
        inputs, targets = batch
        predictions = inputs @ params["w"] + (params["b"] if bias else 0.0)
        return 0.5 * mse(predictions, targets)

    def as_params(solution: Tensor) -> Tree:
        weights = {"w": solution[: x.shape[1]].clone()}
        return {**weights, "b": solution[-1].clone()} if bias else weights

    # gelsd: the one driver that gives the solution of least norm whatever the rank.
    solution = torch.linalg.lstsq(design, target[:, None], driver="gelsd").solution[:, 0]
    minimum = 0.5 * (design @ solution - target).square().mean()
    scales = torch.linalg.svdvals(design) / math.sqrt(len(design))
    full_rank = int(_significant(scales, design).sum()) == design.shape[1]
    return Problem(
        loss_fn,
        as_params(torch.zeros_like(solution).to(x)),
        (x, y),
        (as_params(solution.to(x)),),
        float(minimum),
        L=float(scales[0]) ** 2,
        mu=float(scales[-1]) ** 2 if full_rank else 0.0,
    )


def logistic_regression(
    x: Tensor | np.ndarray,
    y: Tensor | np.ndarray,
    *,
    l2: float = 0.0,
    dtype: torch.dtype = torch.float64,
) -> Problem:
    """Make the logistic regression of given data on two classes, and solve it by Newton's method.

    L(w) = mean log(1 + exp(−s x·w)) + l2/2 ‖w‖²,  s = 2y − 1

    L = λmax(XᵀX / n)/4 + l2, which the Hessian attains at w = 0, and μ = l2, which it approaches
    far out. There is no bias: for one, give x a column of ones (l2 then holds for it, too).

    Args:
        x: [n, D].
        y: the classes 0 and 1, [n].
        l2: the weight of the penalty, not negative.
        dtype: of the problem; the data are rounded to it, and then solved in float64, to a gradient
            norm below 1e-12 (times √λmax(XᵀX / n), where that is larger than 1).

    Returns:
        The problem; params is {"w": [D]} and starts at zero; data is (x, y), y as floats.

    Raises:
        TypeError: the dtype is not a floating one.
        ValueError: the shapes are others, an entry is not finite, y has another value than 0 and 1,
            or l2 is negative; l2 is 0 and the data are separable: some w has s x·w ≥ 0 for all
            samples and > 0 for one, and along it the loss falls for ever.

    Example:
        >>> x = torch.tensor([[-1.0], [0.5], [1.0], [2.0]])
        >>> problem = gd.problems.logistic_regression(x, torch.tensor([0, 1, 0, 1]), l2=0.1)
        >>> print(f"{problem.minimizers[0]['w'].item():.4f} {problem.minimum:.4f}")
        0.6909 0.5895
        >>> print(f"{problem.L:.4f} {problem.mu:.4f}")
        0.4906 0.1000

    References:
        A. Albert, J. Anderson, "On the existence of maximum likelihood estimates in logistic
        regression models", 1984.
        F. Bach, "Self-concordant analysis for logistic regression", 2010: why Newton's steps
        descend.
    """
    l2 = float(check_scalar("l2", l2, "[0, inf)"))
    x, y = _samples(x, y, dtype)
    if not bool(((y == 0) | (y == 1)).all()):
        raise ValueError("y must have no other values than 0 and 1")

    def loss_fn(params: Tree, batch: Tree) -> Tensor:
        inputs, targets = batch
        margins = (2 * targets - 1) * (inputs @ params["w"])
        return _log_loss(margins).mean() + 0.5 * l2 * params["w"].square().sum()

    rows, classes = (leaf.to("cpu", torch.float64) for leaf in (x, y))
    solution = _solve_logistic(rows, 2 * classes - 1, l2)
    minimum = loss_fn({"w": solution}, (rows, classes))
    largest = float(torch.linalg.matrix_norm(rows, 2)) ** 2 / len(rows)
    return Problem(
        loss_fn,
        {"w": torch.zeros_like(solution).to(x)},
        (x, y),
        ({"w": solution.to(x)},),
        float(minimum),
        L=largest / 4 + l2,
        mu=l2,
    )


def stocks(*, dtype: torch.dtype = torch.float64) -> Dataset:
    """Load 389 monthly returns of five shares and of the S&P 500, February 1990 to June 2022.

    return(month) = price(month) / price(month before) − 1

    Read from `Stocks.csv` among matplotlib's sample data, which names Yahoo Finance as its source
    and puts the last price of a month into a row dated on the first. Of the 524 rows 390 are such
    months: none is missing, none lacks a price of these five shares or the index, and 390 prices
    make 389 returns. Left out are the rows of other days: 133 without any price, and the last,
    2022-06-28, which repeats 2022-06-01 and shows that June 2022 ends there, two trading days
    early. Left out too are the shares that came later (AMZN, DELL, GOOGL) and the index ^IXIC.

    Returns are fractions: 0.01 is one per cent. The shares' prices are adjusted for splits and
    dividends; the index holds no dividends. Large returns are kept as they are: XRX +0.77 in
    January 2001, ADBE +0.85 in February 2000, AAPL −0.58 in September 2000.

    Args:
        dtype: of x and y.

    Returns:
        x: the shares, [389, 5], in the order of `features`; y: the S&P 500, [389]; dates: the
        months, "1990-02" to "2022-06".

    Raises:
        ModuleNotFoundError: matplotlib is not installed; it is the extra `plot`.

    Example:
        >>> data = gd.problems.stocks()
        >>> data.x.shape, data.y.shape, data.features
        (torch.Size([389, 5]), torch.Size([389]), ('IBM', 'AAPL', 'MSFT', 'XRX', 'ADBE'))
        >>> data.dates[0], data.y[0]
        ('1990-02', tensor(0.0085, dtype=torch.float64))
    """
    path = _sample_data("stocks") / "Stocks.csv"
    with path.open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(line for line in file if not line.startswith("#")))
    columns = (*_SHARES, _INDEX)
    months = [row for row in table if row["Date"].endswith("-01") and all(row[c] for c in columns)]
    prices = torch.tensor([[float(row[c]) for c in columns] for row in months], dtype=torch.float64)
    returns = _tensor("returns", prices[1:] / prices[:-1] - 1, dtype)
    dates = tuple(row["Date"][:7] for row in months[1:])
    return Dataset(returns[:, :-1].clone(), returns[:, -1].clone(), _SHARES, dates)


def stock_regression(*, standardize: bool = True, dtype: torch.dtype = torch.float64) -> Problem:
    """Make the linear regression of the S&P 500's monthly return on those of five of its shares.

    Raw returns are small beside the bias's column of ones: the condition number L/μ is 294.3.
    Brought to mean 0 and standard deviation 1 it is 4.95. The minimum is the same.

    Args:
        standardize: whether x is shifted and scaled so; y is left as it is.
        dtype: of the problem.

    Returns:
        The problem, as of `linear_regression` on `stocks()`, with a bias.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; it is the extra `plot`.

    Example:
        >>> for standardize in (True, False):
        ...     problem = gd.problems.stock_regression(standardize=standardize)
        ...     print(f"{problem.L:.4f} {problem.mu:.4f} {problem.minimum:.4e}")
        2.4265 0.4900 3.7146e-04
        1.0017 0.0034 3.7146e-04
    """
    x, y, *_ = stocks()
    if standardize:
        x = (x - x.mean(dim=0)) / x.std(dim=0, correction=0)
    return linear_regression(x, y, dtype=dtype)


def elevation_map(*, dtype: torch.dtype = torch.float64) -> Tensor:
    """Load the heights of a landscape at Jacksboro fault, Tennessee.

    Read from `jacksboro_fault_dem.npz` among matplotlib's sample data. A cell is 1/1200 of a degree
    wide and high. The file's `ymin` is the larger of its two latitudes, that of the first row.

    Args:
        dtype: of the heights, which are whole numbers from 236 to 1076.

    Returns:
        Heights in metres, [344, 403]: rows from north to south, columns from west to east.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; it is the extra `plot`.

    Example:
        >>> heights = gd.problems.elevation_map()
        >>> heights.shape, heights.min().item(), heights.max().item()
        (torch.Size([344, 403]), 236.0, 1076.0)
    """
    path = _sample_data("elevation_map") / "jacksboro_fault_dem.npz"
    with np.load(path, allow_pickle=False) as file:
        return _tensor("heights", file["elevation"], dtype)


def elevation(*, dtype: torch.dtype = torch.float64) -> Problem:
    """Make the height of a real landscape a loss: params is a place on the map.

    f(x, y) = (1−u)(1−v) hⱼᵢ + u(1−v) hⱼ,ᵢ₊₁ + (1−u)v hⱼ₊₁,ᵢ + uv hⱼ₊₁,ᵢ₊₁,  x = i + u, y = j + v

    Bilinear between the heights h of `elevation_map`, so that no place is lower than the lowest of
    them: 236 m, in column 347 and row 288 alone. There, as on all lines of the grid, the slope
    jumps; the gradient is that of the cell to the south-east and need not vanish. A place off the
    map has the height of the nearest one on it. The start is the summit.

    Args:
        dtype: of the problem.

    Returns:
        The problem; params is (column, row) [2], in cells from the north-west corner, and the loss
        is in metres.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; it is the extra `plot`.

    Example:
        >>> problem = gd.problems.elevation()
        >>> problem.params, problem.loss_fn(problem.params)
        (tensor([219., 297.], dtype=torch.float64), tensor(1076., dtype=torch.float64))
        >>> problem.minimizers[0], problem.minimum
        (tensor([347., 288.], dtype=torch.float64), 236.0)
    """
    heights = elevation_map(dtype=dtype)
    rows, columns = heights.shape
    last = torch.tensor([columns - 1, rows - 1], dtype=dtype)
    corners = torch.tensor([0, 1, columns, columns + 1])

    def loss_fn(params: Tensor, batch: None = None) -> Tensor:
        grid, far = heights.to(params).flatten(), last.to(params)
        place = torch.minimum(params.clamp(min=0), far)
        # A place that is NaN needs some cell; its offsets in that cell still make the height NaN.
        cell = torch.minimum(place.nan_to_num().floor(), far - 1)
        (u, v), (column, row) = place - cell, cell.to(torch.int64)
        weights = torch.stack([(1 - u) * (1 - v), u * (1 - v), (1 - u) * v, u * v])
        return weights @ grid[row * columns + column + corners.to(params.device)]

    def position(index: Tensor) -> Tensor:
        return torch.stack([index % columns, index // columns]).to(dtype)

    summit, lowest = position(heights.argmax()), position(heights.argmin())
    return Problem(loss_fn, summit, None, (lowest,), float(heights.min()))


def digits(*, dtype: torch.dtype = torch.float64) -> Dataset:
    """Load 1797 images of handwritten digits, 8 × 8 pixels each, from scikit-learn.

    Args:
        dtype: of x.

    Returns:
        x: the pixels row by row, from 0 to 1 (the file's 0 … 16 over 16), [1797, 64]; y: the digit,
        0 to 9, int64 [1797].

    Raises:
        ModuleNotFoundError: scikit-learn is not installed; it comes with the extra `demos`.

    Example:
        >>> data = gd.problems.digits()
        >>> data.x.shape, data.x.max(), data.y[:5]
        (torch.Size([1797, 64]), tensor(1., dtype=torch.float64), tensor([0, 1, 2, 3, 4]))

    References:
        E. Alpaydin, C. Kaynak, "Optical recognition of handwritten digits", UCI repository, 1998.
    """
    data = _scikit_learn("digits", dtype, torch.int64)
    return data._replace(x=data.x / 16)


def diabetes(*, dtype: torch.dtype = torch.float64) -> Dataset:
    """Load ten measurements of 442 patients and how their diabetes went on, from scikit-learn.

    Its columns have mean 0 and sum of squares 1, not variance 1: in a regression on them the bias
    has curvature 1, and nothing else more than 0.0092.

    Args:
        dtype: of x and y.

    Returns:
        x: [442, 10]; y: a measure of the progress after one year, from 25 to 346, [442].

    Raises:
        ModuleNotFoundError: scikit-learn is not installed; it comes with the extra `demos`.

    Example:
        >>> data = gd.problems.diabetes()
        >>> data.x.shape, data.features[:4], data.y[:3].tolist()
        (torch.Size([442, 10]), ('age', 'sex', 'bmi', 'bp'), [151.0, 75.0, 141.0])

    References:
        B. Efron, T. Hastie, I. Johnstone, R. Tibshirani, "Least angle regression", 2004.
    """
    return _scikit_learn("diabetes", dtype, dtype)


def breast_cancer(*, dtype: torch.dtype = torch.float64) -> Dataset:
    """Load 30 measurements of the cell nuclei in 569 breast tumours, from scikit-learn.

    The columns are as they were measured: the mean of one is 232,000 times that of another. They
    separate the classes, so `logistic_regression` on them needs l2 > 0.

    Args:
        dtype: of x.

    Returns:
        x: [569, 30]; y: 0 malignant, 1 benign, int64 [569].

    Raises:
        ModuleNotFoundError: scikit-learn is not installed; it comes with the extra `demos`.

    Example:
        >>> data = gd.problems.breast_cancer()
        >>> data.x.shape, data.features[:2], data.y.bincount()
        (torch.Size([569, 30]), ('mean radius', 'mean texture'), tensor([212, 357]))

    References:
        W. Street, W. Wolberg, O. Mangasarian, "Nuclear feature extraction for breast tumor
        diagnosis", 1993.
    """
    return _scikit_learn("breast_cancer", dtype, torch.int64)


def _tensor(name: str, values: Any, dtype: torch.dtype) -> Tensor:
    """A finite tensor of a floating dtype that shares no storage with what it was made from."""
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating one, such as torch.float64; got {dtype}")
    values = _tree.as_tensors(values)
    if not isinstance(values, Tensor):
        # Straight to the dtype: by way of torch's default, float32, digits would be lost.
        values = torch.tensor(values, dtype=dtype)
    if values.is_complex():
        raise TypeError(f"{name} must be real; got {values.dtype}")
    tensor = values.detach().to(dtype, copy=True)
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{name} is not finite everywhere in {dtype}; leave such entries out")
    return tensor


def _samples(x: Any, y: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x, y = _tensor("x", x, dtype), _tensor("y", y, dtype)
    if x.ndim != 2 or not x.numel() or y.shape != x.shape[:1]:
        raise ValueError(
            "x must be [n, D] and y [n] with n, D >= 1; "
            f"got {tuple(x.shape)} and {tuple(y.shape)}: reshape them, e.g. x[:, None] or y[:, 0]"
        )
    return x, y


def _test_function(
    loss_fn: Callable[..., Tensor],
    start: Sequence[float],
    minimizers: Sequence[Sequence[float]],
    dtype: torch.dtype,
) -> Problem:
    """A loss without data whose minimum is 0."""
    places = tuple(_tensor("minimizers", place, dtype) for place in minimizers)
    return Problem(loss_fn, _tensor("params", start, dtype), None, places, 0.0)


def _shapes_differ(predictions: tuple[int, ...], targets: tuple[int, ...]) -> str:
    shapes = f"mse: predictions {predictions} and targets {targets}"
    try:
        common = tuple(torch.broadcast_shapes(predictions, targets))
    except RuntimeError:
        return f"{shapes} differ in shape; they must be the same"
    remedy = "y[:, None]" if predictions == (*targets, 1) else "y.reshape(predictions.shape)"
    same_size = math.prod(predictions) == math.prod(targets)
    return f"{shapes} would broadcast to {common}; reshape one" + (f", e.g. {remedy}" * same_size)


def _orthogonal(key: Tensor, dim: int) -> Tensor:
    """A uniformly random orthogonal matrix, float64 [dim, dim]."""
    q, r = torch.linalg.qr(random.normal(key, (dim, dim), torch.float64))
    # QR is unique, and Q uniform, only once the diagonal of R is made positive (Mezzadri 2007).
    return q * r.diagonal().sign()


def _significant(scales: Tensor, matrix: Tensor) -> Tensor:
    """Which singular values (largest first) count towards the rank; the others are rounding."""
    return scales > scales[0] * max(matrix.shape) * torch.finfo(scales.dtype).eps


def _log_loss(margins: Tensor) -> Tensor:
    """log(1 + exp(−m)) of every margin m, without overflow."""
    # Above 40, float64 cannot tell log(1 + eᵗ) from t; torch's own threshold of 20 loses digits.
    return torch.nn.functional.softplus(-margins, threshold=40)


def _solve_logistic(x: Tensor, signs: Tensor, l2: float) -> Tensor:
    """Minimise mean log(1 + exp(−s x·w)) + l2/2 ‖w‖² by Newton's method, float64 [D]."""
    n = len(x)
    # In coordinates c of the row space with x·w = z·c and mean z zᵀ = I, nothing is badly scaled
    # and no direction is left along which the loss is constant.
    u, scales, vh = torch.linalg.svd(x, full_matrices=False)
    kept = _significant(scales, x)
    z = u[:, kept] * math.sqrt(n)
    to_w = vh[kept].T / scales[kept] * math.sqrt(n)
    penalty = l2 * to_w.T @ to_w
    tolerance = 1e-12 * max(1.0, float(scales[0]) / math.sqrt(n))
    lengths = torch.linalg.vector_norm(z, dim=1)
    eps, tiny = torch.finfo(x.dtype).eps, torch.finfo(x.dtype).tiny
    halvings = 0.5 ** torch.arange(60, dtype=x.dtype)

    c = z.new_zeros(z.shape[1])
    for _ in range(200):
        w = to_w @ c
        margins = signs * (x @ w)
        wrong = torch.sigmoid(-margins)
        gradient = penalty @ c - (wrong * signs) @ z / n
        hessian = penalty + (z.T * (wrong * (1 - wrong))) @ z / n
        # Along a separating direction d, mean wrong (z·d)²/‖z‖ is at most mean wrong |z·d|, and that
        # is the slope. To find it larger in all directions proves that there is a minimum.
        spread = (z.T * (wrong / lengths.clamp(min=tiny))) @ z / n
        slope = torch.linalg.vector_norm(gradient) + 10 * eps * spread.trace()
        exists = l2 > 0 or bool((torch.linalg.eigvalsh(spread) > slope).all())
        gradient_w = l2 * w - (wrong * signs) @ x / n
        if exists and torch.linalg.vector_norm(gradient_w) < tolerance:
            return w
        step, failed = torch.linalg.solve_ex(hessian, gradient)
        if failed or (l2 == 0 and bool((margins > 0).all())):
            break
        # A step that changes no margin by more than 1 descends (Bach 2010, proposition 1), and so
        # does any cut down to that; among those and longer ones the best is taken.
        if (z @ step).abs().max() > 1:
            trials = c - halvings[:, None] * step
            losses = _log_loss(signs * (trials @ z.T)).mean(dim=1)
            c = trials[(losses + 0.5 * ((trials @ penalty) * trials).sum(dim=1)).argmin()]
        else:
            c = c - step
    if l2 == 0:
        raise ValueError(
            "x separates the classes y, as far as float64 can tell, so there is no minimum with l2=0; "
            "pass l2 > 0"
        )
    raise ValueError(f"no minimum was found in float64 with l2={l2}; scale x or pass a larger l2")


def _folder(what: str, module: str, package: str, extra: str) -> Path:
    """Where an installed package lies; it is not imported."""
    spec = util.find_spec(module)
    if spec is None or spec.origin is None:
        raise missing_extra(f"problems.{what}", package, extra)
    return Path(spec.origin).parent


def _sample_data(what: str) -> Path:
    return _folder(what, "matplotlib", "matplotlib", "plot") / "mpl-data" / "sample_data"


def _scikit_learn(name: str, dtype: torch.dtype, target_dtype: torch.dtype) -> Dataset:
    _folder(name, "sklearn", "scikit-learn", "demos")
    from sklearn import datasets

    bunch = getattr(datasets, f"load_{name}")()
    x = _tensor("x", bunch.data, dtype)
    y = torch.tensor(bunch.target, dtype=target_dtype)
    return Dataset(x, y, tuple(str(feature) for feature in bunch.feature_names))
