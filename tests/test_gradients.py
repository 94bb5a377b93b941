"""Gradients of batches and of samples: laws, and what is refused at the door."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import gdfunc as gd

from .assertions import assert_pure, assert_refused
from .references import linear_data, linear_gradient, linear_loss, normal

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
def test_per_sample_gradients_are_those_of_the_samples_and_their_mean_the_batchs(case):
    params, (x, y) = drawn(*case)
    grads, losses = gd.per_sample_grad(linear_loss)(params, (x, y))
    for i in range(len(y)):
        sample = x[i : i + 1], y[i : i + 1]
        close({name: leaf[i] for name, leaf in grads.items()}, linear_gradient(params, sample))
        close(losses[i], linear_loss(params, sample))
    mean = {name: leaf.mean(0) for name, leaf in grads.items()}
    close((mean, losses.mean()), gd.batch_grad(linear_loss)(params, (x, y)))


@given(cases)
def test_the_weighted_mean_of_per_sample_gradients_is_the_gradient_of_the_weighted_loss(case):
    params, (x, y) = drawn(*case)
    weights = normal(case[0] + 5, len(y)).abs()

    def weighted(params, batch):
        x, y, weight = batch
        return (weight * (x @ params["w"] + params["b"] - y) ** 2).sum() / weights.sum()

    grads, _ = gd.per_sample_grad(linear_loss)(params, (x, y))
    mean = {name: torch.tensordot(weights, leaf, 1) / weights.sum() for name, leaf in grads.items()}
    close(mean, gd.batch_grad(weighted)(params, (x, y, weights))[0])


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


@pytest.mark.parametrize(
    "loss_fn",
    [
        linear_loss,
        lambda p, batch: (p["w"].sum() + p["b"] + 0 * batch[0].sum()).mean(),
        lambda p, batch: p["b"],
        lambda p, batch: (p["w"] * 1).sum() + p["b"] * batch[1].sum(),
    ],
)
def test_inputs_are_left_alone_and_outputs_are_the_callers_own(loss_fn):
    for make in (gd.batch_grad, gd.per_sample_grad):
        assert_pure(make(loss_fn), PARAMS, BATCH)


def test_requires_grad_parameters_give_plain_gradients_of_the_right_value():
    params = {name: leaf.clone().requires_grad_() for name, leaf in PARAMS.items()}
    grads, _ = gd.batch_grad(linear_loss)(params, BATCH)
    close(grads["w"].detach(), linear_gradient(PARAMS, BATCH)["w"])


LOGITS = torch.linspace(-2, 3, 5 * 4 * 3).reshape(5, 4, 3).sin()
CLASSES, WEIGHTS = torch.tensor([0, 1, 1, 2, 0]), torch.tensor([0.5, 2.0, 3.0])
TOKENS = torch.tensor([[0, 1, 2, 1], [2, -1, -1, -1], [1, 1, -1, -1], [0, 2, 2, -1], [1, -1, -1, -1]])
EMPTY = torch.cat([TOKENS[:4], torch.full((1, 4), -1)])


def _token_losses(params, batch):
    return F.cross_entropy(
        params["w"] * batch[0].movedim(2, 1), batch[1], ignore_index=-1, reduction="none"
    )


AMBIGUOUS = {  # a loss that is a mean over something else, one over the samples, and a batch
    "class weights": (
        lambda p, b: F.cross_entropy(p["w"] * b[0], b[1], WEIGHTS),
        lambda p, b: gd.losses.cross_entropy(p["w"] * b[0], b[1], WEIGHTS),
        (LOGITS[:, 0], CLASSES),
    ),
    "padding": (
        lambda p, b: F.cross_entropy(p["w"] * b[0].movedim(2, 1), b[1], ignore_index=-1),
        lambda p, b: gd.losses.masked_mean(_token_losses(p, b), b[1] >= 0),
        (LOGITS, TOKENS),
    ),
    "a sample of padding": (
        lambda p, b: F.cross_entropy(p["w"] * b[0].movedim(2, 1), b[1], ignore_index=-1),
        lambda p, b: gd.losses.masked_mean(_token_losses(p, b), b[1] >= 0, count=2.0),
        (LOGITS, EMPTY),
    ),
}


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

    @pytest.mark.parametrize("name", AMBIGUOUS)
    def test_a_mean_over_something_else_is_found_and_its_remedy_passes(self, name):
        wrong, right, batch = AMBIGUOUS[name]
        params = {"w": torch.tensor(0.5)}
        with pytest.raises(
            ValueError, match=r"something else than the samples.*class_weights=.*masked_mean"
        ):
            gd.check_mean_loss(wrong, params, batch)
        assert gd.check_mean_loss(right, params, batch) is None


def scalar(params):
    return params["w"].sum() + params["b"]


each_gradient = pytest.mark.parametrize("make", [gd.batch_grad, gd.per_sample_grad])
SCALAR = "real floating-point scalar; got"


@each_gradient
@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda p, b: 1.0, f"TypeError: loss must return a {SCALAR} float"),
        (lambda p, b: scalar(p)[None], rf"{SCALAR} shape \(1,\)"),
        (lambda p, b: b[0] @ p["w"], rf"{SCALAR} shape \("),
        (lambda p, b: scalar(p).long(), f"{SCALAR} int64"),
        (lambda p, b: scalar(p) + 0j, f"{SCALAR} complex"),
        (lambda p, b: b[1].mean(), "loss does not depend on params"),
        (lambda p, b: scalar(p).detach(), "loss does not depend on params"),
        (lambda p, b: (scalar(p), 1), f"TypeError: {SCALAR} tuple"),
        (lambda p, b: (scalar(p) * b[1].add_(1)).mean(), "the loss wrote into batch"),
    ],
)
def test_bad_losses_raise(make, loss_fn, message):
    assert_refused(lambda: make(loss_fn)(PARAMS, tuple(leaf.clone() for leaf in BATCH)), message)


def never(params, batch):
    raise AssertionError("the loss was called")


BUFFER, (X, Y), FLOATS = torch.zeros(6), BATCH, "parameters must be floating point"


@each_gradient
@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "params has no tensor leaves"),
        ({"k": torch.tensor(1)}, rf"TypeError: params\['k'\] is int64; {FLOATS}; keep it"),
        ({"k": torch.tensor(True)}, rf"TypeError: params\['k'\] is bool; {FLOATS}"),
        ({"k": torch.tensor(1j)}, rf"TypeError: params\['k'\] is complex64; {FLOATS}"),
        ({"a": {"lr": 3.0}}, r"TypeError: params\['a'\]\['lr'\] is float, not a Tensor"),
        ([torch.ones(1), None], r"TypeError: params\[1\] is None, not a Tensor"),
        ((np.ones(2),), r"TypeError: params\[0\] is ndarray, not a Tensor"),
        ({"w": torch.empty(0, 3)}, r"params\['w'\] is empty: shape \(0, 3\)"),
        ({"a": BUFFER, "b": BUFFER}, r"\['a'\] and params\['b'\] share storage; pass one and use"),
        ({"a": BUFFER[:4], "b": BUFFER[3:]}, r"params\['a'\] and params\['b'\] share storage"),
        ({"a": BUFFER.view(2, 3)[:, 0], "b": BUFFER[3:]}, "share storage"),
        (
            {"a": torch.ones(1), "b": torch.ones(1, device="meta")},
            r"params\['b'\] is on meta but params\['a'\] is on cpu",
        ),
    ],
)
def test_bad_parameters_raise_before_anything_is_computed(make, params, message):
    assert_refused(lambda: make(never)(params, torch.ones(3)), message)


@each_gradient
@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((X, Y[:4]), r"disagree on the number of samples: batch\[0\] has 5, batch\[1\] has 4"),
        ({"x": X, "n": torch.tensor(1.0)}, r"batch\['n'\] is 0-d; every leaf of batch has samples on"),
        ((X[:0], Y[:0]), r"batch is empty: batch\[0\] has shape \(0, 2\)"),
        (
            (X.float(), Y),
            r"batch\[0\] is float32 but params\['w'\] is float64; convert a tensor with x.double()",
        ),
        ((X.float().numpy(), Y), r"batch\[0\] is float32 but params\['w'\] is float64"),
        ((X, Y.to("meta")), r"batch\[1\] is on meta but params\['w'\] is on cpu"),
        ((X, "labels"), r"TypeError: batch\[1\] is str, not a Tensor or an array of numbers"),
        ((X, 3), r"TypeError: batch\[1\] is int, not a Tensor"),
    ],
)
def test_bad_batches_raise_before_anything_is_computed(make, batch, message):
    assert_refused(lambda: make(never)(PARAMS, batch), message)


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


def test_integer_leaves_are_labels():
    grads, _ = gd.batch_grad(lambda p, b: (p["w"][b] ** 2).mean())(PARAMS, torch.tensor([0, 1, 1]))
    close(grads["w"], PARAMS["w"] * torch.tensor([2.0, 4.0]) / 3)


def test_mixed_dtypes_keep_each_leaf_its_own():
    params = {"a": torch.ones(2), "b": torch.ones(2, dtype=torch.float64)}
    grads, _ = gd.batch_grad(lambda p, b: (p["a"] * p["b"] * b).mean())(params, torch.ones(2))
    assert [leaf.dtype for leaf in grads.values()] == [torch.float32, torch.float64]


def test_bad_options_raise():
    for size in (0, -1, 2.0, True, "4"):
        assert_refused(
            lambda c=size: gd.per_sample_grad(linear_loss, chunk_size=c), "chunk_size must be an int >= 1"
        )
    message = "randomness must be 'error' or 'different' or 'same'; got 'any'"
    assert_refused(lambda: gd.per_sample_grad(linear_loss, randomness="any"), message)


def test_dropout_names_the_option():
    def loss_fn(params, batch):
        return nn.functional.dropout(batch[0] @ params["w"], 0.5).mean() + params["b"]

    with pytest.raises(RuntimeError, match="randomness") as caught:
        gd.per_sample_grad(loss_fn)(PARAMS, BATCH)
    assert 'randomness="different"' in caught.value.__notes__[0]
    with torch.random.fork_rng():
        grads, _ = gd.per_sample_grad(loss_fn, randomness="different")(PARAMS, BATCH)
    assert grads["w"].shape == (5, 2)


def test_a_loss_that_writes_into_params_is_told_so():
    def loss_fn(params, batch):
        params["w"].add_(1)
        return params["w"].sum()

    with pytest.raises(RuntimeError, match="in-place") as caught:
        gd.batch_grad(loss_fn)(PARAMS, BATCH)
    assert "must not write into params or batch" in caught.value.__notes__[0]


@pytest.mark.long
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
