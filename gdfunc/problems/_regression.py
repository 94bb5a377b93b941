"""Linear and logistic regression of given data, solved in float64."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import datasets
from .._errors import check_scalar
from .._numerics import finite_tensor, softplus
from .._tree import Tree
from ..losses import mse
from ._problem import Problem


def linear_regression(
    x: Tensor | np.ndarray,
    y: Tensor | np.ndarray,
    *,
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
) -> Problem:
    """Make the least-squares problem of given data, and solve it.

    L(w, b) = ½ mean (x·w + b − y)²

    With the ½ the Hessian is AᵀA / n, where A is x, with a column of ones if there is a bias. L and
    μ are its largest and smallest eigenvalue. If the columns of A are linearly dependent, μ is 0
    and the given minimiser is the one of least norm.

    Args:
        x: [n, D].
        y: [n].
        bias: whether there is a b.
        dtype: of the problem. The data are rounded to it, and then solved in float64.

    Returns:
        The problem, with data (x, y). Its params are {"w": [D], "b": []}, or {"w": [D]} without a
        bias, and start at zero.

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
    start, minimizer = as_params(torch.zeros_like(solution).to(x)), as_params(solution.to(x))
    L, mu = float(scales[0]) ** 2, float(scales[-1]) ** 2 if full_rank else 0.0
    return Problem(loss_fn, start, (x, y), (minimizer,), float(minimum), L, mu)


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
        dtype: of the problem. The data are rounded to it, and then solved in float64, to a gradient
            norm below 1e-12 (times √λmax(XᵀX / n), where that is larger than 1).

    Returns:
        The problem, with data (x, y), y as floats. Its params are {"w": [D]} and start at zero.

    Raises:
        TypeError: the dtype is not a floating one.
        ValueError: the shapes are others, an entry is not finite, y has another value than 0 and 1,
            or l2 is negative. Or l2 is 0 and the data are separable: some w has s x·w ≥ 0 for all
            samples and > 0 for one, and the loss falls for ever along w.

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
        return softplus(-margins).mean() + 0.5 * l2 * params["w"].square().sum()

    rows, classes = (leaf.to("cpu", torch.float64) for leaf in (x, y))
    solution = _solve_logistic(rows, 2 * classes - 1, l2)
    minimum = loss_fn({"w": solution}, (rows, classes))
    largest = float(torch.linalg.matrix_norm(rows, 2)) ** 2 / len(rows)
    start, minimizer = {"w": torch.zeros_like(solution).to(x)}, {"w": solution.to(x)}
    return Problem(loss_fn, start, (x, y), (minimizer,), float(minimum), largest / 4 + l2, l2)


def stock_regression(*, standardize: bool = True, dtype: torch.dtype = torch.float64) -> Problem:
    """Make the linear regression of the S&P 500's monthly return on those of five of its shares.

    Raw returns are much smaller than the bias's column of ones: the condition number L/μ is 294.3.
    Brought to mean 0 and standard deviation 1 it is 4.95. The minimum is the same.

    Args:
        standardize: whether x is shifted and scaled so. y stays unchanged.
        dtype: of the problem.

    Returns:
        The problem, as of `linear_regression` on `stocks()`, with a bias.

    Raises:
        ModuleNotFoundError: matplotlib, the extra `plot`, is not installed.

    Example:
        >>> for standardize in (True, False):
        ...     problem = gd.problems.stock_regression(standardize=standardize)
        ...     print(f"{problem.L:.4f} {problem.mu:.4f} {problem.minimum:.4e}")
        2.4265 0.4900 3.7146e-04
        1.0017 0.0034 3.7146e-04
    """
    x, y, *_ = datasets.stocks()
    if standardize:
        x = (x - x.mean(dim=0)) / x.std(dim=0, correction=0)
    return linear_regression(x, y, dtype=dtype)


def _samples(x: Any, y: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x, y = finite_tensor("x", x, dtype), finite_tensor("y", y, dtype)
    if x.ndim != 2 or not x.numel() or y.shape != x.shape[:1]:
        raise ValueError(
            "x must be [n, D] and y [n] with n, D >= 1; "
            f"got {tuple(x.shape)} and {tuple(y.shape)}: reshape them, e.g. x[:, None] or y[:, 0]"
        )
    return x, y


def _significant(scales: Tensor, matrix: Tensor) -> Tensor:
    """Tell which singular values (largest first) count towards the rank. The others are rounding."""
    return scales > scales[0] * max(matrix.shape) * torch.finfo(scales.dtype).eps


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
        # does a longer step that is cut down to that. The best of these and of longer steps is taken.
        if (z @ step).abs().max() > 1:
            trials = c - halvings[:, None] * step
            losses = softplus(-signs * (trials @ z.T)).mean(dim=1)
            c = trials[(losses + 0.5 * ((trials @ penalty) * trials).sum(dim=1)).argmin()]
        else:
            c = c - step
    if l2 == 0:
        raise ValueError(
            "x separates the classes y, as far as float64 can tell, so there is no minimum with l2=0; "
            "pass l2 > 0"
        )
    raise ValueError(f"no minimum was found in float64 with l2={l2}; scale x or pass a larger l2")
