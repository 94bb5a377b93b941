"""Gradients of batches and of samples: laws, and what is refused at the door."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import grad

import gdfunc as gd

from .references import fingerprint, linear_data, linear_gradient, linear_loss, normal, storages

PARAMS = {"w": torch.tensor([0.3, -0.2], dtype=torch.float64), "b": torch.tensor(0.1, dtype=torch.float64)}
BATCH = linear_data(0, 5, 2)


def drawn(seed, features, batch_size):
    params = {"w": normal(seed, features), "b": normal(seed + 9, 1)[0]}
    return params, linear_data(seed + 1, batch_size, features)


cases = st.tuples(st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 6))


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@given(cases)
def test_batch_grad_is_the_gradient_by_hand(case):
    params, batch = drawn(*case)
    grads, loss = gd.batch_grad(linear_loss)(params, batch)
    close(grads, linear_gradient(params, batch))
    close(loss, linear_loss(params, batch))


@given(cases)
def test_the_mean_of_per_sample_gradients_is_the_batch_gradient(case):
    params, batch = drawn(*case)
    grads, losses = gd.per_sample_grad(linear_loss)(params, batch)
    mean = {name: leaf.mean(0) for name, leaf in grads.items()}
    batch_grads, loss = gd.batch_grad(linear_loss)(params, batch)
    close(mean, batch_grads)
    close(losses.mean(), loss)


def test_the_law_fails_for_a_sum_loss():
    def sum_loss(params, batch):
        return linear_loss(params, batch) * len(batch[1])

    grads, _ = gd.per_sample_grad(sum_loss)(PARAMS, BATCH)
    total, _ = gd.batch_grad(sum_loss)(PARAMS, BATCH)
    close(grads["w"].sum(0), total["w"])
    assert (grads["w"].mean(0) - total["w"]).norm() > 0.5 * total["w"].norm()


@given(cases, st.integers(1, 8))
def test_any_chunk_size_gives_the_same(case, chunk_size):
    params, batch = drawn(*case)
    whole = gd.per_sample_grad(linear_loss)(params, batch)
    chunked = gd.per_sample_grad(linear_loss, chunk_size=chunk_size)(params, batch)
    close(chunked, whole)


@given(cases)
def test_each_per_sample_gradient_is_that_of_its_sample(case):
    params, (x, y) = drawn(*case)
    grads, losses = gd.per_sample_grad(linear_loss)(params, (x, y))
    for i in range(len(y)):
        sample = x[i : i + 1], y[i : i + 1]
        close({name: leaf[i] for name, leaf in grads.items()}, linear_gradient(params, sample))
        close(losses[i], linear_loss(params, sample))


@given(cases, st.randoms(use_true_random=False))
def test_permuting_a_batch_changes_nothing_beyond_rounding(case, generator):
    params, (x, y) = drawn(*case)
    order = list(range(len(y)))
    generator.shuffle(order)
    gradients = gd.batch_grad(linear_loss)
    close(gradients(params, (x[order], y[order])), gradients(params, (x, y)))


LAYERS = {
    "linear": (lambda: nn.Linear(6, 3), (6,)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3), (2, 5)),
    "conv2d": (lambda: nn.Conv2d(2, 3, 2), (2, 4, 4)),
    "conv3d": (lambda: nn.Conv3d(1, 2, 2), (1, 3, 3, 3)),
    "layer norm": (lambda: nn.LayerNorm(6), (6,)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (4, 3)),
    "attention": (lambda: nn.MultiheadAttention(4, 2, batch_first=True), (3, 4)),
    "embedding": (lambda: nn.Embedding(7, 3), (4,)),
}


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_give_the_gradients_of_single_samples(name, batch_size):
    build, shape = LAYERS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = build().double()
    apply, params, _ = gd.modules.functional(layer)
    x = normal(1, batch_size, *shape)
    if name == "embedding":
        x = (x.abs() * 100).long() % 7

    def loss_fn(params, x):
        output = apply(params, x, x, x)[0] if name == "attention" else apply(params, x)
        return (torch.sin(output) ** 2).flatten(1).sum(1).mean()

    grads, _ = gd.per_sample_grad(loss_fn)(params, x)
    for i in range(batch_size):
        single = grad(loss_fn)(params, x[i : i + 1])
        torch.testing.assert_close(
            {name: leaf[i] for name, leaf in grads.items()}, single, rtol=1e-10, atol=1e-14
        )


def test_numpy_data_and_any_tree():
    x, y = (leaf.numpy() for leaf in BATCH)
    read_only = x.copy()
    read_only.flags.writeable = False
    nested = {"in": [read_only, None], "out": {"y": y}}

    def loss_fn(params, batch):
        return linear_loss({"w": params[0][0], "b": params[1]}, (batch["in"][0], batch["out"]["y"]))

    expected = linear_gradient(PARAMS, BATCH)
    grads, _ = gd.batch_grad(loss_fn)([(PARAMS["w"],), PARAMS["b"]], nested)
    close(grads[0][0], expected["w"])
    per_sample, _ = gd.per_sample_grad(loss_fn)([(PARAMS["w"],), PARAMS["b"]], nested)
    close(per_sample[1].mean(0), expected["b"])


def test_a_loss_without_data():
    grads, _loss = gd.batch_grad(lambda w, batch: (w**2).sum())(PARAMS["w"], None)
    close(grads, 2 * PARAMS["w"])
    with pytest.raises(ValueError, match="batch has no leaves: there are no samples to tell apart"):
        gd.per_sample_grad(lambda w, batch: (w**2).sum())(PARAMS["w"], None)


def test_a_leaf_that_the_loss_ignores_has_gradient_zero():
    grads, _ = gd.batch_grad(lambda p, batch: (p["w"] ** 2).sum())(PARAMS, None)
    assert grads["b"] == 0


@pytest.mark.parametrize("make", [gd.batch_grad, gd.per_sample_grad])
@pytest.mark.parametrize(
    "loss_fn",
    [
        linear_loss,
        lambda p, batch: (p["w"].sum() + p["b"] + 0 * batch[0].sum()).mean(),
        lambda p, batch: p["b"],
        lambda p, batch: (p["w"] * 1).sum() + p["b"] * batch[1].sum(),
    ],
)
def test_inputs_are_left_alone_and_outputs_are_the_callers_own(make, loss_fn):
    inputs = [*PARAMS.values(), *BATCH]
    before = fingerprint(inputs)
    grads, loss = make(loss_fn)(PARAMS, BATCH)
    assert fingerprint(inputs) == before
    places = storages([*inputs, *grads.values(), loss])
    assert len(set(places)) == len(places)


def test_requires_grad_parameters_give_plain_gradients_of_the_right_value():
    params = {name: leaf.clone().requires_grad_() for name, leaf in PARAMS.items()}
    grads, _ = gd.batch_grad(linear_loss)(params, BATCH)
    close(grads["w"].detach(), linear_gradient(PARAMS, BATCH)["w"])


class TestCheckMeanLoss:
    def test_a_mean_passes(self):
        assert gd.check_mean_loss(linear_loss, PARAMS, BATCH) is None

    def test_a_sum_is_found(self):
        with pytest.raises(ValueError, match=r"loss is not a mean over the batch: it is .* 5 samples"):
            gd.check_mean_loss(lambda p, b: len(b[1]) * linear_loss(p, b), PARAMS, BATCH)

    def test_silent_broadcasting_is_found(self):
        def loss_fn(params, batch):
            x, y = batch
            return ((x @ params["w"][:, None] - y) ** 2).mean()  # [B, 1] - [B]

        at_zero = {name: torch.zeros_like(leaf) for name, leaf in PARAMS.items()}
        for params in (PARAMS, at_zero):
            with pytest.raises(ValueError, match="give predictions and targets one shape"):
                gd.check_mean_loss(loss_fn, params, BATCH)


def loss_of(value):
    return lambda params, batch: value(params, batch)


def scalar(params):
    return params["w"].sum() + params["b"]


BAD_LOSSES = [
    (lambda p, b: 1.0, TypeError, "loss must return a real floating-point scalar; got float"),
    (lambda p, b: scalar(p)[None], ValueError, r"real floating-point scalar; got shape \(1,\)"),
    (lambda p, b: b[0] @ p["w"], ValueError, r"real floating-point scalar; got shape \("),
    (lambda p, b: scalar(p).long(), ValueError, "real floating-point scalar; got int64"),
    (lambda p, b: scalar(p) + 0j, ValueError, "real floating-point scalar; got complex"),
    (lambda p, b: b[1].mean(), ValueError, "loss does not depend on params"),
    (lambda p, b: scalar(p).detach(), ValueError, "loss does not depend on params"),
    (lambda p, b: (scalar(p), 1), TypeError, "real floating-point scalar; got tuple"),
]


@pytest.mark.parametrize("make", [gd.batch_grad, gd.per_sample_grad])
@pytest.mark.parametrize(("loss_fn", "kind", "message"), BAD_LOSSES)
def test_bad_losses_raise(make, loss_fn, kind, message):
    with pytest.raises(kind, match=message):
        make(loss_fn)(PARAMS, BATCH)


BUFFER = torch.zeros(6)
BAD_PARAMS = [
    ({}, ValueError, "params has no tensor leaves"),
    (
        {"k": torch.tensor(1)},
        TypeError,
        r"params\['k'\] is int64; parameters must be floating point; keep it",
    ),
    ({"k": torch.tensor(True)}, TypeError, r"params\['k'\] is bool; parameters must be floating point"),
    ({"k": torch.tensor(1j)}, TypeError, r"params\['k'\] is complex64; parameters must be floating point"),
    ({"a": {"lr": 3.0}}, TypeError, r"params\['a'\]\['lr'\] is float, not a Tensor"),
    ([torch.ones(1), None], TypeError, r"params\[1\] is None, not a Tensor"),
    ((np.ones(2),), TypeError, r"params\[0\] is ndarray, not a Tensor"),
    ({"w": torch.empty(0, 3)}, ValueError, r"params\['w'\] is empty: shape \(0, 3\)"),
    (
        {"a": BUFFER, "b": BUFFER},
        ValueError,
        r"params\['a'\] and params\['b'\] share storage; pass one and use",
    ),
    ({"a": BUFFER[:4], "b": BUFFER[3:]}, ValueError, r"params\['a'\] and params\['b'\] share storage"),
    ({"a": BUFFER.view(2, 3)[:, 0], "b": BUFFER[3:]}, ValueError, "share storage"),
    (
        {"a": torch.ones(1), "b": torch.ones(1, device="meta")},
        ValueError,
        r"params\['b'\] is on meta but params\['a'\] is on cpu",
    ),
]


@pytest.mark.parametrize("make", [gd.batch_grad, gd.per_sample_grad])
@pytest.mark.parametrize(("params", "kind", "message"), BAD_PARAMS)
def test_bad_parameters_raise_before_anything_is_computed(make, params, kind, message):
    def never(params, batch):
        raise AssertionError("the loss was called")

    with pytest.raises(kind, match=message):
        make(never)(params, torch.ones(3))


@pytest.mark.parametrize(
    "params",
    [
        {"a": BUFFER[:3], "b": BUFFER[3:]},
        {"a": BUFFER.view(2, 3)[:, 0], "b": BUFFER.view(2, 3)[:, 1]},
        {"a": torch.zeros(1).expand(4)},
    ],
)
def test_disjoint_views_and_expanded_leaves_are_allowed(params):
    def loss_fn(params, batch):
        return sum((leaf + 1).pow(2).sum() for leaf in params.values())

    grads, _ = gd.batch_grad(loss_fn)(params, None)
    close(grads, {name: torch.full_like(leaf, 2.0) for name, leaf in params.items()})


X, Y = BATCH
BAD_BATCHES = [
    ((X, Y[:4]), ValueError, r"disagree on the number of samples: batch\[0\] has 5, batch\[1\] has 4"),
    (
        {"x": X, "n": torch.tensor(1.0)},
        ValueError,
        r"batch\['n'\] is 0-d; every leaf of batch has samples on dim 0",
    ),
    ((X[:0], Y[:0]), ValueError, r"batch is empty: batch\[0\] has shape \(0, 2\)"),
    (
        (X.float(), Y),
        ValueError,
        r"batch\[0\] is float32 but params\['w'\] is float64; convert one with .to",
    ),
    ((X.float().numpy(), Y), ValueError, r"batch\[0\] is float32 but params\['w'\] is float64"),
    ((X, Y.to("meta")), ValueError, r"batch\[1\] is on meta but params\['w'\] is on cpu"),
    ((X, "labels"), TypeError, r"batch\[1\] is str, not a Tensor or a NumPy array"),
    ((X, 3), TypeError, r"batch\[1\] is int, not a Tensor"),
]


@pytest.mark.parametrize("make", [gd.batch_grad, gd.per_sample_grad])
@pytest.mark.parametrize(("batch", "kind", "message"), BAD_BATCHES)
def test_bad_batches_raise_before_anything_is_computed(make, batch, kind, message):
    def never(params, batch):
        raise AssertionError("the loss was called")

    with pytest.raises(kind, match=message):
        make(never)(PARAMS, batch)


def test_integer_leaves_are_labels():
    grads, _ = gd.batch_grad(lambda p, b: (p["w"][b] ** 2).mean())(PARAMS, torch.tensor([0, 1, 1]))
    close(grads["w"], PARAMS["w"] * torch.tensor([2.0, 4.0]) / 3)


def test_mixed_dtypes_keep_each_leaf_its_own():
    params = {"a": torch.ones(2), "b": torch.ones(2, dtype=torch.float64)}
    grads, _ = gd.batch_grad(lambda p, b: (p["a"] * p["b"] * b).mean())(params, torch.ones(2))
    assert [leaf.dtype for leaf in grads.values()] == [torch.float32, torch.float64]


@pytest.mark.parametrize("chunk_size", [0, -1, 2.0, True, "4"])
def test_bad_chunk_sizes_raise(chunk_size):
    with pytest.raises(ValueError, match="chunk_size must be an int >= 1; got"):
        gd.per_sample_grad(linear_loss, chunk_size=chunk_size)


def test_bad_randomness_raises():
    with pytest.raises(ValueError, match="randomness must be 'error' or 'different' or 'same'; got 'any'"):
        gd.per_sample_grad(linear_loss, randomness="any")


def test_dropout_names_the_option():
    def loss_fn(params, batch):
        return nn.functional.dropout(batch[0] @ params["w"], 0.5).mean() + params["b"]

    with pytest.raises(RuntimeError, match="randomness") as caught:
        gd.per_sample_grad(loss_fn)(PARAMS, BATCH)
    assert 'randomness="different"' in caught.value.__notes__[0]
    with torch.random.fork_rng():
        grads, _ = gd.per_sample_grad(loss_fn, randomness="different")(PARAMS, BATCH)
    assert grads["w"].shape == (5, 2)


def test_a_loss_that_writes_into_the_batch_is_told_so():
    def loss_fn(params, batch):
        batch[1].add_(1)
        return (params["w"].sum() * batch[1]).mean()

    for make in (gd.batch_grad, gd.per_sample_grad):
        with pytest.raises(ValueError, match="the loss wrote into batch"):
            make(loss_fn)(PARAMS, tuple(leaf.clone() for leaf in BATCH))


def test_a_loss_that_writes_into_params_is_told_so():
    def loss_fn(params, batch):
        params["w"].add_(1)
        return params["w"].sum()

    with pytest.raises(RuntimeError, match="in-place") as caught:
        gd.batch_grad(loss_fn)(PARAMS, BATCH)
    assert "must not write into params or batch" in caught.value.__notes__[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_master_weights_do_not_stall(dtype):
    """A hundred steps of 1e-3·2⁻¹⁰ from 1: lost one by one in the narrow dtype, kept in float32."""

    def loss_fn(w, batch):
        return (w * batch).mean()

    index, lr, data = gd.full_batch(2, 100), 2.0**-20, torch.ones(2)
    with pytest.warns(UserWarning, match="gd.low_precision"):
        stalled, _ = gd.train(gd.make_step(loss_fn), torch.ones((), dtype=dtype), data.to(dtype), index, lr)
    assert stalled == 1
    step = gd.make_step(gd.low_precision(loss_fn, dtype))
    moved, trajectory = gd.train(step, torch.tensor(1.0), data, index, lr)
    assert moved == 1 - 100 * 2.0**-20
    assert moved.dtype == trajectory.loss.dtype == torch.float32


def test_low_precision_leaves_labels_alone_and_refuses_integers():
    def loss_fn(params, batch):
        x, label = batch
        assert (x.dtype, label.dtype) == (torch.bfloat16, torch.int64)
        return (params["w"][label] * x).mean()

    narrow = gd.low_precision(loss_fn, torch.bfloat16)
    grads, _ = gd.batch_grad(narrow)({"w": torch.ones(3)}, (np.ones(2, np.float32), torch.tensor([0, 2])))
    assert grads["w"].tolist() == [0.5, 0.0, 0.5]
    assert grads["w"].dtype == torch.float32
    with pytest.raises(ValueError, match="dtype must be a real floating-point torch"):
        gd.low_precision(loss_fn, torch.int32)
