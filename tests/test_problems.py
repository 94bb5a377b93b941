"""Every problem keeps what it promises: its minimum, its L and μ, its data."""

import csv
import importlib.metadata
import math
import sys
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import full, ones
from torch.func import grad, hessian, jvp, vmap

from gdfunc import _tree, datasets, problems, random
from gdfunc.problems import linear_regression, logistic_regression, quadratic

from .assertions import assert_refused
from .references import normal

seeds = st.integers(0, 2**32 - 1)


def regression_data(seed, n=30, dim=4):
    x = normal(seed, n, dim)
    return x, x @ normal(seed + 1, dim) + 0.3 * normal(seed + 2, n) + 2.0


def classification_data(seed, n=40, dim=3):
    x = normal(seed, n, dim)
    return x, (x[:, 0] + 2 * normal(seed + 1, n) > 0).to(torch.int64)


def repeated_column(dtype=torch.float64):
    x, y = regression_data(0)
    return linear_regression(torch.cat([x, x[:, :1]], dim=1), y, dtype=dtype)


REGRESSION, CLASSIFICATION = regression_data(0), classification_data(0)
SMOOTH = {  # functions of the dtype
    "quadratic": partial(quadratic, [0.5, 2.0, 7.0]),
    "quadratic, shifted": partial(quadratic, [0.5, 2.0], minimizer=[3.0, -1.0]),
    "quadratic, rotated": partial(quadratic, [0.0, 2.0, 7.0], minimizer=[1.0, 2.0, 3.0], key=random.key(1)),
    "rosenbrock": problems.rosenbrock,
    "rosenbrock, dim 5": partial(problems.rosenbrock, 5),
    "beale": problems.beale,
    "rastrigin": problems.rastrigin,
    "rastrigin, dim 3": partial(problems.rastrigin, 3),
    "himmelblau": problems.himmelblau,
    "linear": partial(linear_regression, *REGRESSION),
    "linear, no bias": partial(linear_regression, *REGRESSION, bias=False),
    "linear, rank deficient": repeated_column,
    "linear, fewer samples than features": partial(linear_regression, *regression_data(0, n=3, dim=5)),
    "logistic": partial(logistic_regression, *CLASSIFICATION),
    "logistic, penalised": partial(logistic_regression, *CLASSIFICATION, l2=0.1),
    "stocks": problems.stock_regression,
    "stocks, raw": partial(problems.stock_regression, standardize=False),
}
ALL = {**SMOOTH, "elevation": problems.elevation}

float64_problem = pytest.fixture(params=ALL.values(), ids=ALL.keys())(
    lambda request: request.param(dtype=torch.float64)
)


leaves = _tree.leaves


def ravel(tree):
    return torch.cat([leaf.reshape(-1) for leaf in leaves(tree)])


def unravel(vector, like):
    parts = vector.split([leaf.numel() for leaf in leaves(like)])
    shaped = [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves(like), strict=True)]
    return _tree.unflatten(_tree.flatten(like)[1], shaped)


def of_vector(problem):
    """The loss over all of the data, as a function of one vector."""
    return lambda vector: problem.loss_fn(unravel(vector, problem.params), problem.data)


def curvatures(problem, tree):
    return torch.linalg.eigvalsh(hessian(of_vector(problem))(ravel(tree)))


# What is known about the minimum


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("make", SMOOTH.values(), ids=SMOOTH.keys())
def test_minimizers_are_stationary_and_have_the_minimum(make, dtype):
    problem = make(dtype=dtype)
    f, eps = of_vector(problem), torch.finfo(dtype).eps
    for minimizer in problem.minimizers:
        x = ravel(minimizer)
        steepness = curvatures(problem, minimizer).abs().max()
        size = 1 + x.norm()
        assert grad(f)(x).norm() <= max(1e-12, 30 * eps * steepness * size)
        assert abs(f(x) - problem.minimum) <= 30 * eps * (problem.minimum + eps * steepness * size**2)


def test_nothing_nearby_or_far_is_lower(float64_problem):
    f, minimum = of_vector(float64_problem), float64_problem.minimum

    @given(seed=seeds, radius=st.sampled_from([1e-4, 1e-2, 1.0, 100.0]))
    def check(seed, radius):
        for minimizer in float64_problem.minimizers:
            x = ravel(minimizer)
            probes = x + radius * normal(seed, 20, len(x))
            assert vmap(f)(probes).min() >= minimum * (1 - 1e-14)

    check()


def test_minimizers_of_nonconvex_functions_are_strict_and_distinct():
    for name in ("rosenbrock", "beale", "rastrigin", "himmelblau"):
        problem = SMOOTH[name]()
        assert all(curvatures(problem, x).min() > 0.1 for x in problem.minimizers), name
    four = torch.stack(SMOOTH["himmelblau"]().minimizers)
    assert four.shape == (4, 2)
    assert torch.pdist(four).min() > 1


def test_start_is_above_the_minimum_and_like_the_minimizers(float64_problem):
    problem = float64_problem
    start = problem.loss_fn(problem.params, problem.data)
    assert start > problem.minimum + 1e-6
    shapes = [leaf.shape for leaf in leaves(problem.params)]
    for minimizer in problem.minimizers:
        assert type(minimizer) is type(problem.params)
        assert [leaf.shape for leaf in leaves(minimizer)] == shapes


# L and μ


@pytest.mark.long
@given(
    spectrum=st.lists(st.floats(0, 100, allow_subnormal=False), min_size=1, max_size=6),
    rotated=st.booleans(),
    seed=seeds,
)
def test_quadratic_has_the_given_spectrum(spectrum, rotated, seed):
    key = random.key(seed) if rotated else None
    center = normal(seed, len(spectrum))
    problem = quadratic(spectrum, minimizer=center, key=key)
    wanted = torch.tensor(sorted(spectrum), dtype=torch.float64)
    slack = 1e-13 * (1 + wanted.max())
    H = hessian(problem.loss_fn)(normal(seed + 1, len(spectrum)))
    assert (torch.linalg.eigvalsh(H) - wanted).abs().max() <= slack
    assert (problem.mu, problem.L) == (wanted.min(), wanted.max())
    assert torch.equal(problem.minimizers[0], center)
    # One unit along every eigenvector.
    assert abs(problem.loss_fn(problem.params) - wanted.sum() / 2) <= slack * len(spectrum)


def test_quadratic_is_diagonal_unless_a_key_rotates_it():
    def hessian_of(key):
        return hessian(quadratic([1.0, 2.0, 5.0], key=key).loss_fn)(torch.ones(3).double())

    assert torch.equal(hessian_of(None), torch.diag(torch.tensor([1.0, 2.0, 5.0]).double()))
    first, again, other = (hessian_of(random.key(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 0.1
    assert first.triu(1).abs().max() > 0.1


@pytest.mark.long
def test_rotations_are_uniform():
    # Without positive diagonals of R, LAPACK's Q has a first entry that is never positive.
    keys = random.split(random.key(0), 400)
    starts = torch.stack([quadratic([1.0, 1.0], key=key).params for key in keys])
    assert (starts.norm(dim=1) - math.sqrt(2)).abs().max() < 1e-12
    # Directions on the circle: 400 unit vectors, mean within 5 standard errors of zero.
    assert (starts.mean(dim=0).abs() < 5 * math.sqrt(1 / 400)).all()


@pytest.mark.parametrize(
    "name", [name for name in SMOOTH if name.startswith(("linear", "stocks", "quadratic"))]
)
def test_L_and_mu_are_the_extreme_curvatures(name):
    problem = SMOOTH[name]()
    x = ravel(problem.params)
    eigenvalues = curvatures(problem, unravel(normal(3, len(x)), problem.params))
    assert abs(eigenvalues[-1] - problem.L) <= 1e-13 * problem.L
    assert abs(eigenvalues[0] - problem.mu) <= 1e-13 * problem.L


@pytest.mark.parametrize("name", ["linear, rank deficient", "linear, fewer samples than features"])
def test_mu_is_exactly_zero_where_the_rank_is_short(name):
    assert SMOOTH[name]().mu == 0.0


@pytest.mark.long
@given(seed=seeds, l2=st.sampled_from([0.1, 1.0]), radius=st.sampled_from([0.1, 1.0, 30.0]))
def test_logistic_curvature_lies_between_mu_and_L(seed, l2, radius):
    problem = logistic_regression(*classification_data(seed), l2=l2)
    at_zero = curvatures(problem, problem.params)
    assert abs(at_zero[-1] - problem.L) <= 1e-13 * problem.L
    somewhere = curvatures(problem, {"w": radius * normal(seed, 3)})
    assert problem.mu == l2
    assert somewhere[0] >= l2 - 1e-13 * problem.L
    assert somewhere[-1] <= problem.L * (1 + 1e-13)


def test_logistic_curvature_approaches_mu_far_out():
    problem = logistic_regression(*classification_data(0), l2=0.1)
    far = curvatures(problem, {"w": 1e4 * torch.ones(3).double()})
    assert (far - problem.mu).abs().max() < 1e-3


@pytest.mark.long
@given(seed=seeds)
def test_rastrigin_curvature_is_at_most_L(seed):
    problem = problems.rastrigin(3)
    assert curvatures(problem, 5 * normal(seed, 3)).abs().max() <= problem.L * (1 + 1e-14)
    assert abs(curvatures(problem, torch.zeros(3).double())[-1] - problem.L) <= 1e-12


def test_unbounded_curvature_has_no_constants():
    for name in ("rosenbrock", "beale", "himmelblau", "elevation"):
        assert (ALL[name]().L, ALL[name]().mu) == (None, None)
    assert SMOOTH["rastrigin"]().mu is None


# The test functions


@pytest.mark.parametrize(
    ("problem", "point", "value"),
    [
        (problems.rosenbrock(), (-1.2, 1.0), 24.2),
        (problems.rosenbrock(), (0.0, 1.0), 101.0),
        (problems.rosenbrock(3), (0.0, 0.0, 2.0), 402.0),
        (problems.rosenbrock(3), (2.0, 3.0, 9.0), 105.0),
        (problems.beale(), (1.0, 1.0), 14.203125),
        (problems.beale(), (2.0, 2.0), 3.5**2 + 8.25**2 + 16.625**2),
        (problems.rastrigin(), (1.0, -2.0), 5.0),
        (problems.rastrigin(1), (0.5,), 20.25),
        (problems.rastrigin(3), (0.25, 0.0, 0.0), 10.0625),
        (problems.himmelblau(), (0.0, 0.0), 170.0),
        (problems.himmelblau(), (1.0, 2.0), 68.0),
    ],
)
def test_values_worked_out_by_hand(problem, point, value):
    found = problem.loss_fn(torch.tensor(point, dtype=torch.float64), None)
    assert abs(found - value) <= 1e-13 * value


def test_standard_starts():
    assert problems.rosenbrock(5).params.tolist() == [-1.2, 1.0, -1.2, 1.0, -1.2]
    assert problems.beale().params.tolist() == [1.0, 1.0]
    assert problems.himmelblau().params.tolist() == [0.0, 0.0]
    assert problems.rastrigin(2).params.tolist() == [4.2, 4.2]


# Contract of a loss


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("make", ALL.values(), ids=ALL.keys())
def test_every_floating_dtype(make, dtype):
    problem = make(dtype=dtype)
    loss = problem.loss_fn(problem.params, problem.data)
    assert (loss.shape, loss.dtype) == ((), dtype)
    assert loss.isfinite()
    data = problem.data or ()
    trees = (problem.params, *problem.minimizers)
    assert all(leaf.dtype == dtype for tree in trees for leaf in (*leaves(tree), *data))


@pytest.mark.parametrize("name", ["quadratic, rotated", "elevation", "himmelblau"])
def test_a_float64_test_function_takes_float32_params(name):
    problem = ALL[name]()
    narrow = problem.params.float()
    loss = problem.loss_fn(narrow, None)
    assert loss.dtype == torch.float32
    assert abs(loss - problem.loss_fn(problem.params)) <= 1e-5 * loss


def test_composes_with_torch_func(float64_problem):
    f = of_vector(float64_problem)
    x = ravel(float64_problem.params) + 0.3 * normal(5, 4, len(ravel(float64_problem.params)))
    v = normal(6, len(x[0]))
    assert torch.allclose(vmap(f)(x), torch.stack([f(one) for one in x]), rtol=1e-13, atol=0)
    gradients = vmap(grad(f))(x)
    for one, gradient in zip(x, gradients, strict=True):
        slope = jvp(f, (one,), (v,))[1]
        step = 1e-6
        difference = (f(one + step * v) - f(one - step * v)) / (2 * step)
        scale = 1 + f(one).abs() + gradient.norm()
        assert abs(slope - gradient @ v) <= 1e-12 * scale
        assert abs(slope - difference) <= 1e-6 * scale
    second = vmap(hessian(f))(x)
    assert torch.allclose(second, second.mT, rtol=0, atol=1e-11 * (1 + second.abs().max()))


@pytest.mark.parametrize("name", ["linear", "linear, no bias", "logistic, penalised", "stocks"])
def test_loss_is_the_mean_over_samples(name):
    problem = SMOOTH[name]()
    params = unravel(normal(1, len(ravel(problem.params))), problem.params)
    x, y = problem.data
    single = vmap(lambda a, b: problem.loss_fn(params, (a[None], b[None])))(x, y)
    whole = problem.loss_fn(params, problem.data)
    assert single.shape == (len(x),)
    assert single.std() > 0
    assert abs(single.mean() - whole) <= 1e-13 * whole


def test_nothing_is_shared_or_disturbed():
    x, y = regression_data(0)
    kept = x.clone(), y.clone()
    state = torch.get_rng_state()
    problem = linear_regression(x, y)
    for leaf in problem.data:
        leaf.zero_()
    assert torch.equal(x, kept[0])
    assert torch.equal(y, kept[1])

    center, spectrum = torch.ones(2).double(), torch.ones(2).double()
    problem = quadratic(spectrum, minimizer=center, key=random.key(0))
    before = problem.loss_fn(problem.params)
    center.zero_(), spectrum.zero_(), problem.minimizers[0].zero_()
    assert torch.equal(problem.loss_fn(problem.params), before)

    heights = datasets.elevation_map()
    heights.zero_()
    assert datasets.elevation_map().min() == 236
    assert torch.equal(torch.get_rng_state(), state)


def test_requires_grad_stays_outside():
    x, y = regression_data(0)
    problem = linear_regression(x.requires_grad_(), y)
    assert not any(leaf.requires_grad for leaf in (*problem.data, *leaves(problem.minimizers[0])))


# Regressions


@given(seed=seeds, n=st.integers(1, 12), dim=st.integers(1, 6), bias=st.booleans())
def test_least_squares_agrees_with_numpy(seed, n, dim, bias):
    x, y = regression_data(seed, n, dim)
    problem = linear_regression(x.numpy(), y.numpy(), bias=bias)
    design = np.column_stack([x, np.ones(n)]) if bias else x.numpy()
    # NumPy, too, gives the solution of least norm where there are many.
    solution = np.linalg.lstsq(design, y.numpy(), rcond=None)[0]
    scales = np.linalg.svd(design, compute_uv=False)
    found = ravel(problem.minimizers[0]).numpy()
    tolerance = 1e-12 * (scales[0] / scales[-1]) ** 2 * (1 + np.linalg.norm(solution))
    assert np.linalg.norm(found - solution) <= tolerance
    residual = design @ solution - y.numpy()
    assert abs(problem.minimum - (residual @ residual) / (2 * n)) <= 1e-12 * (1 + y.square().sum())


@pytest.mark.parametrize("ones", [1, 3, 8])
def test_logistic_of_a_constant_is_the_log_odds(ones):
    y = torch.arange(10) < ones
    problem = logistic_regression(torch.ones(10, 1), y)
    share = ones / 10
    assert abs(problem.minimizers[0]["w"].item() - math.log(share / (1 - share))) < 1e-12
    entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
    assert abs(problem.minimum - entropy) < 1e-15


def assert_newton_has_ended(problem, l2):
    gradient = grad(of_vector(problem))(problem.minimizers[0]["w"])
    assert gradient.norm() < 2e-12 * max(1, math.sqrt(4 * (problem.L - l2)))


@pytest.mark.parametrize("l2", [0.0, 1e-6, 0.1])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_logistic_gradient_vanishes_at_any_scale_and_rank(scale, l2):
    x, y = classification_data(4, n=60)
    x = torch.cat([scale * x[:, :1], x[:, 1:], x[:, 1:2] - x[:, 2:]], dim=1)
    problem = logistic_regression(x, y, l2=l2)
    assert_newton_has_ended(problem, l2)


@pytest.mark.long
def test_newton_does_not_overshoot_on_heavy_tails():
    for seed in range(20):
        x = normal(seed, 40, 3) / normal(seed + 100, 40, 3) ** 3
        y = x[:, 0].sign() * x[:, 0].abs().sqrt() + 0.5 * normal(seed + 200, 40) > 0
        for l2 in (1e-9, 1e-3, 10.0):
            assert_newton_has_ended(logistic_regression(x, y, l2=l2), l2)


@pytest.mark.parametrize("margin", [-1e4, -50.0, -30.0, -21.0, -1.0, 0.0, 1.0, 30.0, 50.0])
def test_logistic_loss_is_exact_far_out(margin):
    loss_fn = logistic_regression(torch.tensor([[1.0], [-1.0]]), torch.ones(2)).loss_fn
    batch = torch.ones(1, 1).double(), torch.ones(1).double()
    w = torch.tensor([margin]).double()
    wanted = max(-margin, 0.0) + math.log1p(math.exp(-abs(margin)))
    assert abs(loss_fn({"w": w}, batch) - wanted) <= 4e-16 * wanted
    slope = grad(lambda w: loss_fn({"w": w}, batch))(w)
    assert abs(slope + 1 / (1 + math.exp(min(margin, 700)))) <= 4e-16


@pytest.mark.long
@given(
    x=st.lists(st.integers(-3, 3), min_size=1, max_size=8), labels=st.integers(0, 255), bias=st.booleans()
)
def test_separable_data_are_told_from_others(x, labels, bias):
    y = torch.tensor([labels >> i & 1 for i in range(len(x))])
    column = torch.tensor(x, dtype=torch.float64)
    if bias:
        rows = torch.stack([column, torch.ones_like(column)], dim=1)
        zeros, ones = column[y == 0], column[y == 1]
        both = len(zeros) > 0 and len(ones) > 0
        # A minimum exists where the classes overlap properly, or x is the same for all samples.
        overlap = both and zeros.max() > ones.min() and ones.max() > zeros.min()
        exists = both and (bool(overlap) or column.min() == column.max())
    else:
        rows = column[:, None]
        signed = (2 * y - 1) * column
        exists = bool((signed > 0).any() and (signed < 0).any()) or not column.any()
    if exists:
        problem = logistic_regression(rows, y)
        assert grad(of_vector(problem))(problem.minimizers[0]["w"]).norm() < 1e-11
    else:
        with pytest.raises(ValueError, match="with l2=0; pass l2 > 0"):
            logistic_regression(rows, y)
    penalised = logistic_regression(rows, y, l2=1e-3)
    assert grad(of_vector(penalised))(penalised.minimizers[0]["w"]).norm() < 1e-11


@pytest.mark.parametrize("seed", range(5))
def test_separation_hidden_by_a_rotation_is_found(seed):
    # The first column separates 20 samples and is zero for the 40 others, whose classes overlap.
    x, y = normal(seed, 60, 4), torch.arange(60) % 2
    x[:20, 0], x[20:, 0] = (2.0 * y[:20] - 1) * x[:20, 0].abs(), 0
    rotation = torch.linalg.qr(normal(seed + 9, 4, 4)).Q
    with pytest.raises(ValueError, match="separates the classes"):
        logistic_regression(x @ rotation, y)
    logistic_regression(x @ rotation, y, l2=1e-6)
    x[0, 0] = -x[0, 0]
    logistic_regression(x @ rotation, y)


# Bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quadratic([1.0, -1.0]), "none < 0"),
        (lambda: quadratic([]), "D >= 1"),
        (lambda: quadratic([[1.0]]), r"eigenvalues must be \[D\]"),
        (lambda: quadratic([1.0, math.nan]), "eigenvalues is not finite"),
        (lambda: quadratic([1.0], minimizer=[1.0, 2.0]), r"\[1\] .* got \(2,\)"),
        (lambda: quadratic([1.0], dtype=torch.int64), "TypeError: got torch.int64"),
        (lambda: quadratic(ones(2) * 1j), "TypeError: eigenvalues must be real"),
        (lambda: problems.rosenbrock(1), "dim must be an int >= 2; got 1"),
        (lambda: problems.rosenbrock(2.0), "dim must be an int"),
        (lambda: problems.rastrigin(0), "dim must be an int >= 1; got 0"),
        (lambda: problems.beale(dtype=torch.int32), "TypeError: got torch.int32"),
        (
            lambda: linear_regression(ones(5), ones(5)),
            r"x must be \[n, D\] .* got \(5,\) and \(5,\): reshape",
        ),
        (lambda: linear_regression(ones(5, 2), ones(5, 1)), r"got \(5, 2\) and \(5, 1\)"),
        (lambda: linear_regression(ones(5, 2), ones(4)), r"got \(5, 2\) and \(4,\)"),
        (lambda: linear_regression(ones(0, 2), ones(0)), "n, D >= 1"),
        (lambda: linear_regression(ones(5, 0), ones(5)), "n, D >= 1"),
        (lambda: linear_regression(full((5, 2), math.inf), ones(5)), "x is not finite everywhere"),
        (
            lambda: linear_regression(full((5, 2), 1e6), ones(5), dtype=torch.float16),
            "not finite .* torch.float16",
        ),
        (lambda: logistic_regression(ones(2, 1), torch.tensor([-1, 1])), "no other values than 0 and 1"),
        (lambda: logistic_regression(ones(2, 1), torch.tensor([0, 1]), l2=-0.1), "l2 must be .* got -0.1"),
    ],
)
def test_bad_input_is_named(call, message):
    assert_refused(call, message)


# Data


def sample_data(name):
    (path,) = (
        file.locate()
        for file in importlib.metadata.files("matplotlib")
        if file.parts[-2:] == ("sample_data", name)
    )
    return path


def test_390_months_of_prices_make_389_returns():
    with open(sample_data("Stocks.csv")) as file:
        _, header, *rows = csv.reader(file)
    months = {}
    for row in rows:
        cells = dict(zip(header, row, strict=True))
        year, month, day = map(int, cells.pop("Date").split("-"))
        if day == 1:
            months[12 * year + month] = cells
    assert sorted(months) == list(range(12 * 1990 + 1, 12 * 2022 + 6 + 1))
    assert len(months) == 390

    data = datasets.stocks()
    assert data.features == ("IBM", "AAPL", "MSFT", "XRX", "ADBE")
    assert (data.x.shape, data.y.shape, len(data.dates)) == ((389, 5), (389,), 389)
    for t, (before, after) in enumerate(pairwise(sorted(months))):
        year, month = divmod(after - 1, 12)
        assert data.dates[t] == f"{year}-{month + 1:02}"
        found = [*data.x[t].tolist(), data.y[t].item()]
        for name, value in zip((*data.features, "^GSPC"), found, strict=True):
            growth = float(months[after][name]) / float(months[before][name])
            assert abs(value - (growth - 1)) <= 1e-15 * growth


def test_the_rows_left_out_hold_nothing_new():
    with open(sample_data("Stocks.csv")) as file:
        _, header, *rows = csv.reader(file)
    assert len(rows) == 524
    others = [row for row in rows if not row[0].endswith("-01")]
    assert len(others) == 134
    assert [row for row in others if any(row[1:])] == [rows[-1]]
    assert rows[-1][0] == "2022-06-28"
    assert rows[-2] == ["2022-06-01", *rows[-1][1:]]
    # What the three shares that are left out lack, the five have.
    months = [row for row in rows if row not in others]
    complete = {name for name, *cells in zip(header, *months, strict=True) if all(cells)}
    assert complete == {"Date", *datasets.stocks().features, "^GSPC", "^IXIC"}


def test_stock_regression_is_ill_conditioned_only_when_raw():
    raw, standardized = (problems.stock_regression(standardize=flag) for flag in (False, True))
    assert f"{raw.L / raw.mu:.1f} {standardized.L / standardized.mu:.2f}" == "294.3 4.95"
    assert abs(raw.minimum - standardized.minimum) <= 1e-13 * raw.minimum
    assert torch.equal(raw.data[0], datasets.stocks().x)
    x, y = standardized.data
    assert (x.mean(dim=0).abs() < 1e-14).all()
    assert ((x.square().mean(dim=0) - 1).abs() < 1e-13).all()
    assert torch.equal(y, datasets.stocks().y)


def test_elevation_map_is_the_file():
    with np.load(sample_data("jacksboro_fault_dem.npz"), allow_pickle=False) as file:
        heights = file["elevation"]
        assert file["ymin"] > file["ymax"]
        assert abs(file["dx"] - 1 / 1200) < 1e-15
        assert abs(file["dy"] - 1 / 1200) < 1e-15
    assert np.array_equal(datasets.elevation_map().numpy(), heights)
    assert (heights == heights.min()).sum() == 1
    assert (heights == heights.max()).sum() == 1
    row, column = np.unravel_index(heights.argmin(), heights.shape)
    assert problems.elevation().minimizers[0].tolist() == [column, row]


def test_elevation_interpolates():
    heights, f = datasets.elevation_map(), vmap(problems.elevation().loss_fn)
    rows, columns = torch.meshgrid(torch.arange(344), torch.arange(403), indexing="ij")
    grid = torch.stack([columns, rows], dim=-1).double().reshape(-1, 2)
    assert torch.equal(f(grid).reshape(344, 403), heights)

    inner = grid.reshape(344, 403, 2)[:-1, :-1].reshape(-1, 2)
    east, south = torch.tensor([0.5, 0.0]).double(), torch.tensor([0.0, 0.5]).double()
    corners = heights[:-1, :-1], heights[:-1, 1:], heights[1:, :-1], heights[1:, 1:]
    a, b, c, d = (corner.reshape(-1) for corner in corners)
    assert torch.equal(f(inner + east), (a + b) / 2)
    assert torch.equal(f(inner + south), (a + c) / 2)
    assert torch.equal(f(inner + east + south), (a + b + c + d) / 4)
    assert torch.equal(f(inner + east / 2 + 1.5 * south), (3 * a + b + 3 * (3 * c + d)) / 16)


def test_elevation_off_the_map_is_that_of_the_edge():
    heights, f = datasets.elevation_map(), problems.elevation().loss_fn
    for place, (row, column) in {
        (-7.0, -0.5): (0, 0),
        (1e6, math.inf): (343, 402),
        (-math.inf, 343.2): (343, 0),
        (500.0, 10.0): (10, 402),
        (402.0, 343.0): (343, 402),
    }.items():
        assert f(torch.tensor(place).double()) == heights[row, column]
    assert f(torch.tensor([math.nan, 3.0])).isnan()
    assert torch.equal(grad(f)(torch.tensor([-7.0, -7.0])), torch.zeros(2))


@pytest.mark.parametrize("call", [datasets.stocks, datasets.elevation_map, problems.elevation])
def test_sample_data_needs_matplotlib_but_does_not_import_it(call, monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib", raising=False)
    call()
    assert "matplotlib" not in sys.modules


PLOT, DEMOS = "needs matplotlib: pip install 'gdfunc.plot.'", "needs scikit-learn: .*'gdfunc.demos.'"


@pytest.mark.parametrize(
    ("call", "module", "message"),
    [
        (datasets.stocks, "matplotlib", f"datasets.stocks {PLOT}"),
        (problems.stock_regression, "matplotlib", PLOT),
        (datasets.elevation_map, "matplotlib", PLOT),
        (problems.elevation, "matplotlib", PLOT),
        (datasets.digits, "sklearn", f"datasets.digits {DEMOS}"),
        (datasets.diabetes, "sklearn", f"datasets.diabetes {DEMOS}"),
        (datasets.breast_cancer, "sklearn", f"breast_cancer {DEMOS}"),
    ],
)
def test_a_missing_extra_is_named_on_one_line(call, module, message, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.long
def test_digits():
    sklearn = pytest.importorskip("sklearn.datasets")
    data, file = datasets.digits(), sklearn.load_digits()
    assert torch.equal(data.x * 16, torch.tensor(file.data))
    assert (data.x.min(), data.x.max(), data.y.dtype) == (0, 1, torch.int64)
    assert data.y.tolist() == file.target.tolist()
    assert data.features[:2] == ("pixel_0_0", "pixel_0_1")
    assert datasets.digits(dtype=torch.float32).x.dtype == torch.float32


@pytest.mark.long
def test_diabetes():
    sklearn = pytest.importorskip("sklearn.datasets")
    data, file = datasets.diabetes(), sklearn.load_diabetes()
    assert np.array_equal(data.x.numpy(), file.data)
    assert np.array_equal(data.y.numpy(), file.target)
    assert (data.x.mean(dim=0).abs() < 1e-14).all()
    assert ((data.x.square().sum(dim=0) - 1).abs() < 1e-12).all()
    assert 0.0091 < torch.linalg.eigvalsh(data.x.T @ data.x / len(data.x)).max() < 0.0092
    assert abs(linear_regression(data.x, data.y).L - 1) < 1e-12
    assert datasets.diabetes(dtype=torch.float32).y.dtype == torch.float32


@pytest.mark.long
def test_breast_cancer():
    sklearn = pytest.importorskip("sklearn.datasets")
    data, file = datasets.breast_cancer(), sklearn.load_breast_cancer()
    assert np.array_equal(data.x.numpy(), file.data)
    assert data.y.dtype == torch.int64
    assert data.y.tolist() == file.target.tolist()
    assert data.features == tuple(file.feature_names)
    assert [str(name) for name in file.target_names] == ["malignant", "benign"]
    means = data.x.mean(dim=0)
    assert round(float(means.max() / means.min()), -3) == 232_000
    with pytest.raises(ValueError, match="separates"):
        logistic_regression(data.x, data.y)
    scaled = (data.x - means) / data.x.std(dim=0)
    problem = logistic_regression(scaled, data.y, l2=0.01)
    assert grad(of_vector(problem))(problem.minimizers[0]["w"]).norm() < 1e-11
