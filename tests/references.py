"""Independent answers that the tests compare with: slow, plain, and written from the definitions."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor
from torch.func import grad

import gdfunc as gd

Tree = Any

COMPILED = ["native", pytest.param("inductor", marks=pytest.mark.slow)]  # backends; it takes seconds each
# A fifth of the profile's examples, for laws whose examples are dear or all alike.
few = settings(max_examples=settings().max_examples // 5)
rare = settings(max_examples=settings().max_examples // 10)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Test data from a seed, not drawn from what is under test."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def ks_statistic(sample: Tensor, cdf: Callable[[Tensor], Tensor]) -> float:
    """Kolmogorov and Smirnov's distance, times √n: above 2.8 with a chance of 3·10⁻⁷."""
    ordered, n = sample.double().sort().values, len(sample)
    expected, ranks = cdf(ordered), torch.arange(n + 1, dtype=torch.float64) / n
    distance = torch.maximum((ranks[1:] - expected).max(), (expected - ranks[:-1]).max())
    return float(distance) * math.sqrt(n)


def flat(tree: Tree) -> Tensor:
    """All floating-point leaves as one vector of float64."""
    leaves = [leaf for leaf in gd._tree.leaves(tree) if leaf.is_floating_point()]
    return torch.cat([leaf.flatten().double() for leaf in leaves])


def gradients_one_by_one(loss_fn: Callable[..., Tensor], params: Tree, batch: Tree) -> list[Tree]:
    """The gradient of every sample, each from a batch of one."""
    size = len(gd._tree.leaves(batch)[0])
    return [grad(loss_fn)(params, gd._tree.map(lambda x, i=i: x[i : i + 1], batch)) for i in range(size)]


def loop(
    f: Callable[[Tree, Tree], tuple[Tree, Tree]], init: Tree, xs: Tensor, reverse: bool = False
) -> tuple[Tree, Tree]:
    """The nine-line loop, for one tensor xs."""
    carry, ys = init, [None] * len(xs)
    for t in reversed(range(len(xs))) if reverse else range(len(xs)):
        carry, ys[t] = f(carry, xs[t])
    return carry, gd._tree.map(lambda *column: torch.stack(column), *ys)


def linear_data(
    seed: int, n: int, features: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """A noisy linear regression whose columns are not scaled alike."""
    x = normal(seed, n, features, dtype=dtype) * torch.linspace(0.5, 2.0, features, dtype=dtype)
    return x, x @ normal(seed + 1, features, dtype=dtype) + 0.1 * normal(seed + 2, n, dtype=dtype)


def linear_loss(params: Tree, batch: Tree) -> Tensor:
    """Mean squared error of a linear model {"w": [D], "b": []}."""
    x, y = batch
    return ((x @ params["w"] + params["b"] - y) ** 2).mean()


def linear_gradient(params: Tree, batch: Tree) -> Tree:
    """Its gradient, by hand."""
    x, y = batch
    residual = x @ params["w"] + params["b"] - y
    return {"w": 2 * x.T @ residual / len(y), "b": 2 * residual.mean()}


def relative_error(got: Tensor, expected: Tensor, start: Tensor | float = 0.0) -> float:
    """The error as a share of how far the values have moved."""
    return float((got - expected).norm() / (expected - start).norm())


def fingerprint(tree_leaves: list[Tensor]) -> list[tuple[bytes, int]]:
    """The bytes and the version of every tensor, to show later that nobody wrote into it."""
    return [(leaf.detach().clone().view(-1).numpy().tobytes(), leaf._version) for leaf in tree_leaves]


def storages(tree_leaves: list[Tensor]) -> list[int]:
    """Where each tensor's memory starts."""
    return [leaf.untyped_storage().data_ptr() for leaf in tree_leaves]


def descent(scan, w, p, xs, reverse=False):
    """The carry is differentiated, f closes over w, and so does the loss that f differentiates."""

    def f(carry, x):
        q, n = carry
        slope = grad(lambda v: (v * x * w).sin().sum())(q)
        return (q - w * slope, n + 1), (q.sum() * w, n)

    (q, n), ys = scan(f, (p, torch.zeros((), dtype=torch.int64, device=p.device)), xs, reverse=reverse)
    return {"moved": q - p, "n": n, "ys": ys}


def total(run):
    """A number that depends on all that comes out of a program, nonlinearly and on each entry otherwise."""

    def function(*args):
        values = [leaf.flatten() for leaf in gd._tree.leaves(run(*args)) if leaf.is_floating_point()]
        row = torch.cat(values)
        return (row.square() * torch.linspace(1, 2, len(row), dtype=row.dtype, device=row.device)).sum()

    return function
