"""Hypothesis strategies for problems, rates, parameters, keys and plans.

Constants are dyadic, multiples of 1/8 for the most part: they are exact in binary, and shrink to numbers
that can be read. Every drawn problem prints as the code that rebuilds it.
"""

import importlib
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import random
from .._errors import missing_extra
from .._sampling import epoch_batches, sample_batches
from ._problems import Huber, Logistic, PLSine, Quadratic, TriangularWave
from ._sums import FiniteSum, least_squares, sum_of_arrays

Strategy = Any  # hypothesis.strategies.SearchStrategy; hypothesis is imported where it is used


def _strategies() -> Any:
    try:
        return importlib.import_module("hypothesis.strategies")
    except ImportError as missing:
        raise missing_extra("a strategy of gdfunc.testing", "hypothesis", "test") from missing


def dyadics(low: float, high: float, denominator: int = 8) -> Strategy:
    """Draw multiples of 1/denominator in [low, high].

    Args:
        low, high: the ends, of which the first is rounded up and the last down.
        denominator: a power of two.

    Example:
        >>> from hypothesis import find
        >>> from gdfunc import testing as gt
        >>> find(gt.dyadics(0, 1), lambda x: x > 0.3)
        0.375
    """
    whole = _strategies().integers(math.ceil(low * denominator), math.floor(high * denominator))
    return whole.map(lambda k: k / denominator)


def quadratics(
    dim: int | None = None, mu: float | None = None, L: float | None = None, *, convex: bool = True
) -> Strategy:
    """Draw `Quadratic` problems: a spectrum, a minimiser, and eigenvectors.

    Args:
        dim: D; None: 1 to 4.
        mu: the smallest curvature, which one eigenvalue has; None: drawn.
        L: the largest, likewise.
        convex: whether the spectrum is >= 0.

    Example:
        >>> from hypothesis import given, settings
        >>> from gdfunc import testing as gt
        >>> @settings(max_examples=10, database=None)
        ... @given(gt.quadratics(mu=0.5), gt.rates())
        ... def test_descent_is_the_closed_form(problem, h):
        ...     descent = gt.from_step(gd.make_step)
        ...     gt.check_quadratic(descent, gt.GradientDescent(), problem, lr=h / problem.L)
        >>> test_descent_is_the_closed_form()
    """
    st = _strategies()

    @st.composite
    def draw_quadratic(draw: Any) -> Quadratic:
        size = dim or draw(st.integers(1, 4))
        top = L if L is not None else draw(dyadics(max(mu or 0.125, 0.125), 8))
        bottom = mu if mu is not None else (0.0 if convex else -top)
        spectrum = draw(st.lists(dyadics(bottom, top), min_size=size, max_size=size))
        if size > 1 and mu is not None:
            spectrum[0] = mu
        spectrum[-1] = top
        entries = st.lists(dyadics(-2, 2), min_size=size, max_size=size)
        mirror = draw(entries) if size > 1 else []
        return Quadratic(tuple(spectrum), tuple(draw(entries)), tuple(mirror) if any(mirror) else ())

    return draw_quadratic()


def hubers(L: float | None = None, mu: float | None = None) -> Strategy:
    """Draw `Huber` functions.

    Args:
        L: the curvature around the minimum; None: drawn.
        mu: that of the branches; None: drawn, often 0.

    Example:
        >>> from hypothesis import find
        >>> from gdfunc import testing as gt
        >>> find(gt.hubers(L=1.0, mu=0.0), lambda drawn: True).mu
        0.0
    """
    st = _strategies()
    top = dyadics(0.5, 8) if L is None else st.just(L)
    return top.flatmap(
        lambda L: st.builds(
            Huber,
            L=st.just(L),
            mu=st.one_of(st.just(0.0), dyadics(0, L)) if mu is None else st.just(mu),
            tau=dyadics(0.125, 2),
        )
    )


def smooth_nonconvex() -> Strategy:
    """Draw `TriangularWave` functions, the worst for descent without convexity.

    Example:
        >>> from hypothesis import find
        >>> from gdfunc import testing as gt
        >>> find(gt.smooth_nonconvex(), lambda drawn: True)
        TriangularWave(L=0.5, h=0.125, steps=1)
    """
    st = _strategies()
    return st.builds(TriangularWave, L=dyadics(0.5, 4), h=dyadics(0.125, 1), steps=st.integers(1, 8))


def pl_problems() -> Strategy:
    """Draw `PLSine` functions: not convex, under the inequality of Polyak and Łojasiewicz.

    Example:
        >>> from hypothesis import find
        >>> from gdfunc import testing as gt
        >>> find(gt.pl_problems(), lambda drawn: True)
        PLSine(scale=0.125)
    """
    return _strategies().builds(PLSine, scale=dyadics(0.125, 4))


def _rows(n: int, dim: int) -> Strategy:
    """Draw features, n rows of dim numbers."""
    st = _strategies()
    return st.tuples(*[st.tuples(*[dyadics(-2, 2)] * dim)] * n)


def logistic_regressions(n: int = 4, dim: int = 2, ridge: float | None = None) -> Strategy:
    """Draw `Logistic` regressions.

    Args:
        n: samples.
        dim: D.
        ridge: None: drawn, often 0.

    Example:
        >>> from hypothesis import find
        >>> from gdfunc import testing as gt
        >>> find(gt.logistic_regressions(n=1, dim=1), lambda drawn: True)
        Logistic(features=((0.125,),), labels=(-1.0,), ridge=0.0)
    """
    st = _strategies()
    return st.builds(
        Logistic,
        # With features of zero alone, nothing is to be learned, and L = 0.
        features=_rows(n, dim).filter(lambda rows: any(any(row) for row in rows)),
        labels=st.tuples(*[st.sampled_from([-1.0, 1.0])] * n),
        ridge=st.one_of(st.just(0.0), dyadics(0, 1)) if ridge is None else st.just(ridge),
    )


def least_squares_sums(n: int = 3, dim: int = 2) -> Strategy:
    """Draw `FiniteSum` problems fᵢ(x) = ½·(⟨aᵢ, x⟩ − yᵢ)² + ridge/2·‖x‖²; see `least_squares`.

    Args:
        n: samples.
        dim: D.

    Example:
        >>> from hypothesis import find
        >>> from gdfunc import testing as gt
        >>> find(gt.least_squares_sums(n=1, dim=1), lambda drawn: True)
        FiniteSum(hessians=(((0.125,),),), offsets=((0.0,),))
    """
    st = _strategies()
    return st.builds(least_squares, _rows(n, dim), st.tuples(*[dyadics(-2, 2)] * n), dyadics(0.125, 1))


def finite_sums(n: int = 3, dim: int = 2) -> Strategy:
    """Draw `FiniteSum` problems with Hessians of any rank, correlated with the gradients or not.

    Args:
        n: samples.
        dim: D.

    Example:
        >>> from hypothesis import find
        >>> from gdfunc import testing as gt
        >>> find(gt.finite_sums(n=1, dim=1), lambda drawn: True)
        FiniteSum(hessians=(((0.125,),),), offsets=((0.0,),))
    """
    st = _strategies()

    def make(factors: list[float], offsets: list[float], ridge: float) -> FiniteSum:
        a = np.array(factors).reshape(n, dim, dim)
        return sum_of_arrays(a @ a.transpose(0, 2, 1) + ridge * np.eye(dim), np.reshape(offsets, (n, dim)))

    def entries(size: int) -> Strategy:
        return st.lists(dyadics(-2, 2), min_size=size, max_size=size)

    return st.builds(make, entries(n * dim * dim), entries(n * dim), dyadics(0.125, 1))


def rates(inside: bool = True) -> Strategy:
    """Draw h = lr·L, inside or outside the range in which gradient descent is stable, (0, 2).

    Example:
        >>> from hypothesis import find
        >>> from gdfunc import testing as gt
        >>> find(gt.rates(inside=False), lambda drawn: True) > 2
        True
    """
    return dyadics(1 / 16, 31 / 16, 16) if inside else dyadics(33 / 16, 4, 16)


def params_trees(dtype: torch.dtype = torch.float64) -> Strategy:
    """Draw trees of parameters: a scalar, a vector, a matrix, or two leaves in a dict or a tuple.

    Args:
        dtype: of the leaves.

    Example:
        >>> from hypothesis import find
        >>> from gdfunc import testing as gt
        >>> find(gt.params_trees(), lambda drawn: True)
        tensor(0., dtype=torch.float64)
    """
    st = _strategies()

    def tensors(*shape: int) -> Strategy:
        size = math.prod(shape)
        entries = st.lists(dyadics(-4, 4), min_size=size, max_size=size)
        return entries.map(lambda values: torch.tensor(values, dtype=dtype).reshape(shape))

    vectors = st.integers(1, 4).flatmap(tensors)
    matrices = st.tuples(st.integers(1, 3), st.integers(1, 3)).flatmap(lambda shape: tensors(*shape))
    return st.one_of(
        tensors(),
        vectors,
        matrices,
        st.fixed_dictionaries({"w": vectors, "b": tensors()}),
        st.tuples(matrices, vectors),
    )


def keys() -> Strategy:
    """Draw keys of `gdfunc.random`.

    Example:
        >>> from hypothesis import find
        >>> from gdfunc import testing as gt
        >>> find(gt.keys(), lambda drawn: True)
        tensor([0, 0])
    """
    return _strategies().integers(0, 2**32).map(random.key)


def plans(n: int, batch_size: int | None = None, steps: int | None = None) -> Strategy:
    """Draw plans int64 [T, B]: epochs in random order, or batches with and without repetition.

    Args:
        n: samples.
        batch_size: B; None: 1 to n.
        steps: T; None: 1 to 8.

    Example:
        >>> from hypothesis import find
        >>> from gdfunc import testing as gt
        >>> find(gt.plans(n=3, batch_size=1, steps=2), lambda drawn: True)
        tensor([[0],
                [2]])
    """
    st = _strategies()

    def make(kind: str, key: Tensor, size: int, length: int) -> Tensor:
        if kind == "epochs":
            return epoch_batches(key, n, size, math.ceil(length / (n // size)))[:length]
        return sample_batches(key, n, size, length, replacement=kind == "with replacement")

    return st.builds(
        make,
        st.sampled_from(["epochs", "without replacement", "with replacement"]),
        keys(),
        st.just(batch_size) if batch_size else st.integers(1, n),
        st.just(steps) if steps else st.integers(1, 8),
    )


def hostile_values(dtype: torch.dtype = torch.float64) -> Strategy:
    """Draw numbers at which code breaks: 0, −0, NaN, infinities, denormals, and the ends of a dtype.

    Args:
        dtype: of the 0-d tensors.

    Example:
        >>> from hypothesis import find
        >>> from gdfunc import testing as gt
        >>> find(gt.hostile_values(), lambda drawn: True)
        tensor(0., dtype=torch.float64)
    """
    ends = torch.finfo(dtype)
    values = [0.0, -0.0, 1.0, ends.tiny, ends.tiny * ends.eps, ends.eps, ends.max, -ends.max]
    values += [math.inf, -math.inf, math.nan]
    return _strategies().sampled_from(values).map(lambda value: torch.tensor(value, dtype=dtype))
