"""Curvature: products against dense matrices, eigenvalues against eigvalsh, traces against their law."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import grad, hessian, jacrev, jvp, vmap

import gdfunc as gd
from gdfunc.curvature import ggn_vp, hutchinson_trace, hvp, top_eigenvalues

from .assertions import assert_pure, assert_refused
from .references import few, flat, linear_data, normal

KEY = gd.random.key(0)
seeds = st.integers(0, 2**32)


def network(params, x):
    return torch.tanh(x @ params["in"]) @ params["out"] + params["b"]


def network_loss(params, batch):
    x, y = batch
    return ((network(params, x) - y) ** 2).mean()


def drawn_network(seed, hidden=3, outputs=None, dtype=torch.float64):
    """Parameters of three leaves, one of them 0-d, and data."""
    out = (hidden,) if outputs is None else (hidden, outputs)
    params = {
        "in": normal(seed, 2, hidden, dtype=dtype),
        "out": normal(seed + 1, *out, dtype=dtype),
        "b": normal(seed + 2, 1, dtype=dtype)[0],
    }
    return params, linear_data(seed + 3, 7, 2, dtype)


def unpack(vector, like):
    parts = vector.split([leaf.numel() for leaf in like.values()])
    return {name: part.reshape(like[name].shape) for (name, part) in zip(like, parts, strict=True)}


def dense_hessian(loss_fn, params, batch):
    return hessian(lambda vector: loss_fn(unpack(vector, params), batch))(flat(params))


def dense_ggn(model_fn, output_loss_fn, params, batch):
    x, y = batch
    predictions = model_fn(params, x)
    J = jacrev(lambda vector: model_fn(unpack(vector, params), x).reshape(-1))(flat(params))
    H = hessian(lambda p: output_loss_fn(p.reshape(predictions.shape), y))(predictions.reshape(-1))
    return J.T @ H @ J


def close(got, expected, tolerance=1e-11):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def random_like(params, seed):
    return {
        name: normal(seed + i, *leaf.shape).to(leaf.dtype) for i, (name, leaf) in enumerate(params.items())
    }


@pytest.mark.long
@given(seeds, st.integers(1, 4))
def test_hvp_is_the_dense_hessian_times_the_vector(seed, hidden):
    params, batch = drawn_network(seed, hidden)
    vector = random_like(params, seed + 9)
    got = hvp(network_loss)(params, batch, dict(reversed(vector.items())))  # keys in another order
    assert [(name, leaf.shape) for name, leaf in got.items()] == [(n, p.shape) for n, p in params.items()]
    close(flat(got), dense_hessian(network_loss, params, batch) @ flat(vector), 1e-9)


@pytest.mark.long
@given(seeds, st.sampled_from(["mse", "cross_entropy"]))
def test_ggn_vp_is_the_dense_product(seed, name):
    output_loss_fn = getattr(gd.losses, name)
    params, (x, y) = drawn_network(seed, outputs=3)
    y = normal(seed + 7, 7, 3) if name == "mse" else y.abs().mul(10).long() % 3
    vector = random_like(params, seed + 9)
    got = flat(ggn_vp(network, output_loss_fn)(params, (x, y), vector))
    close(got, dense_ggn(network, output_loss_fn, params, (x, y)) @ flat(vector), 1e-9)
    assert got @ flat(vector) >= -1e-9


def test_modules_and_predictions_that_are_trees():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        apply, params, _ = gd.modules.functional(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)))
    x, y = linear_data(0, 5, 2, torch.float32)
    vector = random_like(params, 3)
    expected = ggn_vp(apply, gd.losses.mse)(params, (x, y[:, None]), vector)

    def twins(params, x):
        return {"a": apply(params, x["x"]), "b": [apply(params, x["x"])]}

    def loss_fn(predictions, targets):
        halves = predictions["a"], predictions["b"][0]
        return sum(gd.losses.mse(half, targets) for half in halves) / 2

    got = ggn_vp(twins, loss_fn)(params, ({"x": x.numpy()}, y[:, None]), vector)
    close(got, expected, 1e-6)


def test_a_linear_loss_has_hessian_zero_and_a_leaf_without_use_too():
    params = {"w": normal(0, 3), "unused": torch.tensor(1.0)}
    got = hvp(lambda p, batch: p["w"].sum())(params, None, params)
    assert {name: leaf.abs().sum() for name, leaf in got.items()} == {"w": 0, "unused": 0}
    assert got["unused"].dtype == torch.float32


def test_inputs_are_left_alone_and_outputs_are_the_callers_own():
    params, vector = {"a": normal(0, 3), "b": normal(1, 2)}, {"a": normal(2, 3), "b": normal(3, 2)}
    for loss_fn in (
        lambda p: (p["a"] ** 2).sum() / 2 + p["b"].sum(),  # H = I in a: the vector itself
        lambda p: (p["a"].sum() + p["b"].sum()) ** 2,  # both gradients are views of one number
    ):
        assert_pure(hvp(lambda p, batch, f=loss_fn: f(p)), params, None, vector)


SPECTRA = {
    "spread": [10.0**-i for i in range(9)],
    "clustered": [2.0, 2.0 - 1e-7, 2.0 - 2e-7, 1.0, 1.0 + 1e-9, 0.5, 0.5],
    "repeated": [3.0, 3.0, 3.0, 1.0, 1.0, 1.0, 1.0],
    "identity": [1.0] * 6,
    "negative": [-5.0, -5.0, -1.0, -0.1],
    "indefinite": [-4.0, -1.0, 0.0, 0.0, 2.0, 3.0],
    "zero": [0.0] * 5,
    "singular": [7.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    "large": [1e12, 1.0, -1e12],
    "single": [-2.0],
}


def quadratic(spectrum, seed, rotated, dtype):
    """A loss of one vector whose Hessian has this spectrum, and that Hessian."""
    D = len(spectrum)
    Q = torch.linalg.qr(normal(seed, D, D))[0] if rotated else torch.eye(D, dtype=torch.float64)
    H = (Q * torch.tensor(spectrum, dtype=torch.float64)) @ Q.T
    H = ((H + H.T) / 2).to(dtype)
    return (lambda p, batch: p @ H @ p / 2), H


def outermost(H, which):
    values = torch.linalg.eigvalsh(H.double())
    rank = {"largest": values, "smallest": -values, "magnitude": values.abs()}[which]
    return values[rank.argsort(descending=True)], rank.sort(descending=True).values


@pytest.mark.long
@given(
    name=st.sampled_from(sorted(SPECTRA)),
    seed=seeds,
    rotated=st.booleans(),
    which=st.sampled_from(["largest", "smallest", "magnitude"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    data=st.data(),
)
def test_lanczos_finds_eigenvalues_to_within_its_residuals(name, seed, rotated, which, dtype, data):
    spectrum = SPECTRA[name]
    k = data.draw(st.integers(1, len(spectrum)))
    iterations = data.draw(st.integers(k, len(spectrum) + 2))
    loss_fn, H = quadratic(spectrum, seed, rotated, dtype)
    find = top_eigenvalues(hvp(loss_fn), k, iterations=iterations, which=which)
    pairs = find(torch.ones(len(H), dtype=dtype), None, gd.random.key(seed))
    found, vectors, stated = (leaf.double() for leaf in pairs)
    values, ranks = outermost(H, which)
    rounding = 30 * torch.finfo(dtype).eps * float(values.abs().max())

    assert pairs.eigenvalues.dtype == dtype
    close(vectors @ vectors.T, torch.eye(k, dtype=torch.float64), 30 * torch.finfo(dtype).eps)
    residuals = (vectors @ H.double() - found[:, None] * vectors).norm(dim=1)
    assert ((residuals - stated).abs() <= rounding).all()
    nearest = (found[:, None] - values).abs().amin(dim=1)
    assert (nearest <= stated + rounding).all()
    rank = {"largest": found, "smallest": -found, "magnitude": found.abs()}[which]
    assert (rank <= ranks[:k] + rounding).all()  # a subspace has no more than the whole
    if iterations >= len(spectrum):
        assert (rank - ranks[:k]).abs().max() <= rounding
        assert stated.max() <= rounding


@pytest.mark.long
def test_the_space_is_extended_when_it_is_exhausted():
    """A zero Hessian, one unused leaf, one eigenvalue: every Krylov space has a single dimension or two."""
    loss_fn, _ = quadratic([4.0] * 5, 0, False, torch.float64)
    params = {"used": normal(0, 5), "unused": normal(1, 20)}
    find = top_eigenvalues(hvp(lambda p, batch: loss_fn(p["used"], batch)), 25, iterations=25)
    pairs = find(params, None, KEY)
    close(pairs.eigenvalues, torch.tensor([4.0] * 5 + [0.0] * 20, dtype=torch.float64))
    assert pairs.eigenvectors["unused"].shape == (25, 20)
    close(pairs.eigenvectors["unused"][:5], torch.zeros(5, 20, dtype=torch.float64))


def test_few_iterations_suffice_for_an_eigenvalue_that_stands_apart():
    problem = gd.problems.quadratic([100.0, *torch.linspace(0, 1, 199)], key=KEY)
    pairs = top_eigenvalues(hvp(problem.loss_fn), iterations=8)(problem.params, None, KEY)
    assert abs(pairs.eigenvalues - problem.L) < 1e-9
    assert pairs.residuals < 1e-6
    fewer = top_eigenvalues(hvp(problem.loss_fn), iterations=2)(problem.params, None, KEY)
    assert 1e-3 < fewer.residuals < 10
    assert fewer.eigenvalues < problem.L


@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_squares_that_overflow_or_vanish_do_no_harm(scale):
    """Beyond 1e19, and below 1e-23, float32 cannot hold a square."""
    spectrum = scale * torch.cat([torch.tensor([100.0]), torch.linspace(0, 1, 199)])
    find = top_eigenvalues(hvp(lambda p, batch: p @ (spectrum * p) / 2), iterations=8)
    pairs = find(torch.ones(200) / 200, None, KEY)
    assert abs(pairs.eigenvalues / (100 * scale) - 1) < 1e-5
    assert 0 < pairs.residuals < 1e-3 * scale


def test_a_single_number_and_leaves_of_two_dtypes():
    pairs = top_eigenvalues(hvp(lambda p, batch: 3 * p**2))(torch.tensor(0.5), None, KEY)
    assert pairs.eigenvalues.tolist() == [6.0]
    assert pairs.eigenvectors.shape == (1,)
    params = {"a": torch.ones(2), "b": torch.ones((), dtype=torch.float64)}
    product = hvp(lambda p, batch: (p["a"].sum() * p["b"]) ** 2)
    pairs = top_eigenvalues(product, 3)(params, None, KEY)
    close(pairs.eigenvalues, torch.tensor([6 + math.sqrt(132), 0, 6 - math.sqrt(132)]).double(), 1e-5)
    assert [leaf.dtype for leaf in pairs.eigenvectors.values()] == [torch.float32, torch.float64]
    assert hutchinson_trace(product, 10)(params, None, KEY).trace.dtype == torch.float64


def test_the_key_is_all_that_is_random():
    params, batch = drawn_network(0)
    find = top_eigenvalues(hvp(network_loss), iterations=3)
    first, again = (find(params, batch, KEY) for _ in range(2))
    assert torch.equal(first.eigenvalues, again.eigenvalues)
    assert not torch.equal(first.eigenvalues, find(params, batch, gd.random.key(1)).eigenvalues)


@pytest.mark.long
@few
@given(seeds)
def test_the_derivative_of_an_eigenvalue_is_that_of_the_dense_one(seed):
    params, batch = drawn_network(seed)
    find = top_eigenvalues(hvp(network_loss), iterations=10)

    def sharpness(params):
        return find(params, batch, KEY).eigenvalues[0]

    def dense(params):
        return torch.linalg.eigvalsh(dense_hessian(network_loss, params, batch))[-1]

    expected, vector = grad(dense)(params), random_like(params, seed + 9)
    close(grad(sharpness)(params), expected, 1e-6)
    close(jvp(sharpness, (params,), (vector,))[1], flat(expected) @ flat(vector), 1e-6)


def test_the_derivative_is_finite_where_eigenvalues_coincide():
    """The Hessian of Σ p⁴ at 1 is 12 I; with v held fixed, λ grows by 24 v²."""
    find = top_eigenvalues(hvp(lambda p, batch: (p**4).sum()))
    p = torch.ones(5, dtype=torch.float64)
    v = find(p, None, KEY).eigenvectors[0]
    close(grad(lambda p: find(p, None, KEY).eigenvalues[0])(p), 24 * v**2)


def test_vmap_keeps_members_apart_even_where_one_has_diverged():
    params, batch = drawn_network(0)
    scales = torch.tensor([1.0, math.nan, 2.0, math.inf], dtype=torch.float64)
    find, trace = (
        top_eigenvalues(hvp(network_loss), 2, iterations=6),
        hutchinson_trace(hvp(network_loss), 9),
    )

    def both(scale):
        scaled = {name: scale * leaf for name, leaf in params.items()}
        return find(scaled, batch, KEY), trace(scaled, batch, KEY)

    members = vmap(both)(scales)
    for i in (0, 2):
        pairs, estimate = both(scales[i])
        close(members[0].eigenvalues[i], pairs.eigenvalues)
        close(members[0].residuals[i], pairs.residuals)
        close(members[1].trace[i], estimate.trace)
    for i in (1, 3):
        assert members[0].eigenvalues[i].isnan().all()
        assert not members[1].trace[i].isfinite()


def recorded(**options):
    params, batch = drawn_network(0)
    find = top_eigenvalues(hvp(network_loss), iterations=2, backend=options.get("backend", "eager"))
    trace = hutchinson_trace(ggn_vp(network, gd.losses.mse), 4)
    record = {
        "sharpness": lambda params, loss: find(params, batch, KEY).eigenvalues[0],
        "trace": lambda params, loss: trace(params, batch, KEY).trace,
        "params": "params",
    }
    step, index = gd.make_step(network_loss), gd.full_batch(7, 6)

    def run(lr):
        return gd.train(step, params, batch, index, lr, record=record, every=2, **options)[1]

    return run


def test_sharpness_is_recorded_along_a_run():
    trajectory = recorded()(0.1)
    _, batch = drawn_network(0)
    find = top_eigenvalues(hvp(network_loss), iterations=2)
    for t in range(3):
        params = {name: leaf[t] for name, leaf in trajectory.params.items()}
        assert torch.equal(trajectory.sharpness[t], find(params, batch, KEY).eigenvalues[0])
    assert trajectory.sharpness.unique().numel() == 3


@pytest.mark.long
@pytest.mark.parametrize(
    "options",
    [{"adjoint": gd.adjoints.Checkpoint(1)}, pytest.param({"backend": "inductor"}, marks=pytest.mark.slow)],
)
def test_a_compiled_run_records_the_same(options):
    expected = recorded()(0.1)
    close(vars(recorded(**options)(0.1)), vars(expected))
    members = vmap(recorded(**options))(torch.tensor([0.1, 0.02], dtype=torch.float64))
    close(members.sharpness[0], expected.sharpness)
    close(members.trace[0], expected.trace)


@pytest.mark.long
def test_the_derivative_of_a_recorded_eigenvalue_goes_through_a_traced_run():
    find = top_eigenvalues(hvp(lambda p, batch: (p**4).sum()), iterations=2)

    def last(lr, adjoint=gd.adjoints.Reverse()):
        def body(p, _):
            return p - lr * 4 * p**3, find(p, None, KEY).eigenvalues[0]

        start = torch.tensor([1.0, 0.5], dtype=torch.float64)
        return gd.scan(body, start, length=2, adjoint=adjoint)[1][-1]

    lr = torch.tensor(0.01, dtype=torch.float64)  # λ = 12 (1 − 4 lr)²
    close(grad(last)(lr), -96 * (1 - 4 * lr))
    close(grad(lambda lr: last(lr, adjoint=gd.adjoints.Checkpoint(1)))(lr), -96 * (1 - 4 * lr))


def law(H, distribution):
    """The variance of one probe's product, from Isserlis' theorem."""
    squares = H.square().sum()
    return 2 * (squares - H.diagonal().square().sum() if distribution == "rademacher" else squares)


@pytest.mark.parametrize("distribution", ["rademacher", "normal"])
def test_the_trace_and_its_standard_error_have_the_right_law(distribution):
    loss_fn, H = quadratic([5.0, 3.0, 1.0, 1.0, -2.0], 3, True, torch.float64)
    probes, repeats = 400, 400
    estimate = hutchinson_trace(hvp(loss_fn), probes, distribution=distribution, chunk_size=100)
    start = torch.zeros(5, dtype=torch.float64)
    traces, errors = vmap(lambda key: estimate(start, None, key))(gd.random.split(KEY, repeats))
    assert traces.shape == errors.shape == (repeats,)
    exact = (law(H, distribution) / probes).sqrt()
    assert abs(errors.mean() / exact - 1) < 0.02
    assert errors.std() < 0.1 * exact  # in each, not only on average

    def score(trace):
        return float((traces.mean() - trace) / (traces.std() / math.sqrt(repeats)))

    assert abs(score(H.trace())) < 4
    assert abs(score(1.02 * H.trace())) > 4  # the test would notice two per cent
    scores = (traces - H.trace()) / errors
    assert 0.85 < scores.std() < 1.15
    assert ((scores.abs() < 1.96).double().mean() - 0.95).abs() < 0.04


def test_rademacher_probes_are_exact_for_a_diagonal_and_normal_ones_are_not():
    problem = gd.problems.quadratic([1.0, 2.0, 10.0])
    exact = hutchinson_trace(hvp(problem.loss_fn), 2)(problem.params, None, KEY)
    assert exact.trace == 13
    assert exact.standard_error == 0
    noisy = hutchinson_trace(hvp(problem.loss_fn), 50, distribution="normal")(problem.params, None, KEY)
    assert noisy.standard_error > 0.1


@pytest.mark.parametrize(("chunk_size", "chunks"), [(1, 10), (3, 4), (20, 1), (None, 1)])
def test_any_chunk_size_gives_the_same_trace(chunk_size, chunks):
    params, batch = drawn_network(0)
    calls = []

    def product(params, batch, vector):
        calls.append(vector)
        return hvp(network_loss)(params, batch, vector)

    got = hutchinson_trace(product, 10, chunk_size=chunk_size)(params, batch, KEY)
    assert len(calls) == chunks
    close(got, hutchinson_trace(hvp(network_loss), 10)(params, batch, KEY))


PARAMS, BATCH = drawn_network(0)
MSE = gd.losses.mse
PRODUCTS = {"hvp": hvp(network_loss), "ggn_vp": ggn_vp(network, MSE)}


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: {**v, "c": v["b"]}, r"structure of params: unexpected vector\['c'\]"),
        (lambda v: {"in": v["in"], "b": v["b"]}, r"missing params\['out'\]"),
        (lambda v: v["b"], "vector does not have the structure of params"),
        (
            lambda v: {**v, "out": v["out"][:2]},
            r"\['out'\] has shape \(2,\) but params\['out'\] has \(3,\)",
        ),
        (
            lambda v: {**v, "b": v["b"].float()},
            r"vector\['b'\] is float32 on cpu but params.* float64 on cpu; convert it",
        ),
        (lambda v: {**v, "b": 1.0}, r"TypeError: vector\['b'\] is float, not a Tensor"),
    ],
)
def test_vectors_that_do_not_fit_raise(name, change, message):
    assert_refused(lambda: PRODUCTS[name](PARAMS, BATCH, change(PARAMS)), message)


@pytest.mark.parametrize("name", PRODUCTS)
def test_params_and_batches_are_checked_as_for_gradients(name):
    integers = {"in": torch.ones(2, 3, dtype=torch.int64)}
    with pytest.raises(TypeError, match=r"params\['in'\] is int64; parameters must be floating point"):
        PRODUCTS[name](integers, BATCH, integers)
    with pytest.raises(ValueError, match=r"batch\[0\] has 7, batch\[1\] has 4"):
        PRODUCTS[name](PARAMS, (BATCH[0], BATCH[1][:4]), PARAMS)


@pytest.mark.parametrize(
    ("model_fn", "loss_fn", "batch", "message"),
    [
        (network, MSE, BATCH[0], r"TypeError: batch must be a pair \(inputs, targets\); got Tensor"),
        (
            lambda p, x: (x @ p["in"]).argmax(1),
            MSE,
            BATCH,
            "TypeError: model_fn must return float tensors; predictions is int64",
        ),
        (lambda p, x: x[:, 0], MSE, BATCH, "loss does not depend on params: no leaf reaches it"),
        (network, lambda p, y: p - y, BATCH, r"real floating-point scalar; got shape \(7,\)"),
        (network, lambda p, y: y.mean(), BATCH, "loss does not depend on"),
    ],
)
def test_models_and_losses_that_have_no_gauss_newton_matrix_raise(model_fn, loss_fn, batch, message):
    assert_refused(lambda: ggn_vp(model_fn, loss_fn)(PARAMS, batch, PARAMS), message)


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_model_that_writes_into_the_batch_raises(name):
    def model_fn(params, x):
        x.add_(1)
        return network(params, x)

    def loss_fn(params, batch):
        return MSE(model_fn(params, batch[0]), batch[1])

    batch = tuple(leaf.clone() for leaf in BATCH)
    product = {"hvp": hvp(loss_fn), "ggn_vp": ggn_vp(model_fn, MSE)}[name]
    with pytest.raises((RuntimeError, ValueError), match=r"in-place|wrote into batch"):
        product(PARAMS, batch, PARAMS)


def find(**options):
    return top_eigenvalues(hvp(network_loss), **options)


def estimate(**options):
    return hutchinson_trace(hvp(network_loss), **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: find(k=0), "k must be an int >= 1; got 0"),
        (lambda: find(k=5, iterations=4), "must be at least k; got iterations=4 and k=5"),
        (lambda: find(iterations=2.0), "iterations must be an int >= 1; got 2.0"),
        (lambda: find(which="LA"), "which must be 'largest' or 'smallest' or 'magnitude'; got 'LA'"),
        (lambda: find(backend="jit"), "backend must be 'eager' or .*; got 'jit'"),
        (lambda: find(k=11)(PARAMS, BATCH, KEY), "at most the number of parameters, 10; got 11"),
        (lambda: estimate(probes=1), "probes must be an int >= 2; got 1"),
        (lambda: estimate(distribution="gauss"), "must be 'rademacher' or 'normal'; got 'gauss'"),
        (lambda: estimate(chunk_size=0), "chunk_size must be an int >= 1; got 0"),
    ],
)
def test_bad_options_are_refused(call, message):
    assert_refused(call, message)


@pytest.mark.parametrize("make", [top_eigenvalues, hutchinson_trace])
def test_a_seed_is_no_key_and_a_foreign_product_is_found(make):
    with pytest.raises(TypeError, match="key must be an int64 tensor"):
        make(hvp(network_loss))(PARAMS, BATCH, 0)
    with pytest.raises(ValueError, match="product does not have the structure of params"):
        make(lambda params, batch, vector: vector["b"])(PARAMS, BATCH, KEY)
