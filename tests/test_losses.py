"""Losses: torch's values and derivatives, no broadcasting, and digits that stay where logits are large."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, hessian, vmap
from torch.nn import functional as F

from gdfunc import losses

from .assertions import assert_refused
from .references import normal

seeds = st.integers(0, 2**32 - 1)
TABLE = {
    "mse": (losses.mse, F.mse_loss),
    "mae": (losses.mae, F.l1_loss),
    "huber": (losses.huber, F.huber_loss),
    "huber, δ 0.3": (lambda p, t: losses.huber(p, t, 0.3), lambda p, t: F.huber_loss(p, t, delta=0.3)),
    "binary_cross_entropy_with_logits": (
        lambda z, t: losses.binary_cross_entropy_with_logits(z, t.sigmoid()),
        lambda z, t: F.binary_cross_entropy_with_logits(z, t.sigmoid()),
    ),
}
ELEMENTWISE = [losses.mse, losses.mae, losses.huber, losses.binary_cross_entropy_with_logits]


def agree(ours, theirs, x):
    for f in (lambda f: f, grad, hessian):
        torch.testing.assert_close(f(ours)(x), f(theirs)(x), rtol=1e-12, atol=1e-14)


@pytest.mark.long
@pytest.mark.parametrize("name", TABLE)
@given(seed=seeds, shape=st.lists(st.integers(1, 4), max_size=3))
def test_loss_and_its_derivatives_are_torchs(name, seed, shape):
    ours, theirs = TABLE[name]
    x, y = normal(seed, *shape, 2)[..., 0], normal(seed + 1, *shape)
    agree(lambda p: ours(p, y), lambda p: theirs(p, y), x)


@pytest.mark.long
@given(seed=seeds, B=st.integers(1, 5), C=st.integers(1, 4))
def test_cross_entropy_and_its_derivatives_are_torchs(seed, B, C):
    logits, targets = 5 * normal(seed, B, C), normal(seed, B).abs().mul(10).long() % C
    agree(lambda z: losses.cross_entropy(z, targets), lambda z: F.cross_entropy(z, targets), logits)
    each = vmap(lambda z, t: losses.cross_entropy(z[None], t[None]))(logits, targets)
    torch.testing.assert_close(each.mean(), losses.cross_entropy(logits, targets))


def test_huber_is_quadratic_at_zero_and_takes_a_tensor_for_delta():
    zero = torch.zeros(2, dtype=torch.float64)
    assert torch.equal(hessian(lambda p: losses.huber(p, zero))(zero), torch.eye(2).double() / 2)
    values = vmap(lambda delta: losses.huber(torch.tensor([3.0]), torch.zeros(1), delta))(
        torch.tensor([1.0, 9.0])
    )
    assert values.tolist() == [2.5, 4.5]
    with pytest.raises(ValueError, match=r"delta must be a finite number in \(0, inf\)"):
        losses.huber(zero, zero, 0.0)


@pytest.mark.parametrize("target", [True, False])
def test_binary_cross_entropy_keeps_the_digits_of_large_right_logits(target):
    logit = torch.tensor([100.0 if target else -100.0], dtype=torch.float64)
    loss = losses.binary_cross_entropy_with_logits(logit, torch.tensor([target]))
    torch.testing.assert_close(loss, torch.tensor(-100.0).double().exp(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("loss", ELEMENTWISE, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize(
    ("predictions", "targets", "message"),
    [
        ((5, 1), (5,), " would broadcast to (5, 5); reshape one, e.g. y[:, None]"),
        ((5,), (5, 1), " would broadcast to (5, 5); reshape one, e.g. y.reshape(predictions.shape)"),
        ((5, 2), (5, 1), " would broadcast to (5, 2); reshape one"),
        ((5,), (4,), " differ in shape; they must be the same"),
    ],
)
def test_no_loss_broadcasts(loss, predictions, targets, message):
    with pytest.raises(ValueError, match=r"predictions") as error:
        loss(torch.zeros(predictions), torch.zeros(targets))
    assert str(error.value) == f"{loss.__name__}: predictions {predictions} and targets {targets}{message}"


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.zeros(5, 1, dtype=torch.int64), r"\[B, C\] and targets \[B\]; got \(5, 3\) and \(5, 1\)"),
        (torch.zeros(1, dtype=torch.int64), r"got \(5, 3\) and \(1,\)"),
        (torch.zeros(5), r"TypeError: int64 classes; got torch.float32"),
        (torch.full((5,), -100), "RuntimeError: out of bounds"),
    ],
)
def test_cross_entropy_refuses_targets_that_are_no_classes(targets, message):
    assert_refused(lambda: losses.cross_entropy(torch.zeros(5, 3), targets), message)


@pytest.mark.long
@given(seed=seeds, B=st.integers(1, 6), C=st.integers(1, 4))
def test_class_weights_average_over_samples_and_agree_with_torch_where_they_sum_to_their_number(seed, B, C):
    logits, targets = 5 * normal(seed, B, C), normal(seed, B).abs().mul(10).long() % C
    weights = normal(seed + 1, C).exp()
    each = vmap(lambda z, t: losses.cross_entropy(z[None], t[None], weights))(logits, targets)
    torch.testing.assert_close(each.mean(), losses.cross_entropy(logits, targets, weights))
    balanced = B / (C * targets.bincount(minlength=C).clamp_min(1).double())
    balanced = balanced * B / balanced[targets].sum()
    agree(
        lambda z: losses.cross_entropy(z, targets, balanced),
        lambda z: F.cross_entropy(z, targets, balanced),
        logits,
    )


@given(seed=seeds, shape=st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_masked_mean_is_a_mean_over_samples_and_with_a_count_torchs_over_entries(seed, shape):
    x, mask = normal(seed, *shape), normal(seed + 1, *shape) > 0
    by_hand = [
        row[kept].mean() if kept.any() else torch.tensor(0.0) for row, kept in zip(x, mask, strict=True)
    ]
    torch.testing.assert_close(
        losses.masked_mean(x, mask), torch.stack([*map(torch.Tensor.double, by_hand)]).mean()
    )
    if mask.any():
        agree(
            lambda x: losses.masked_mean(x, mask, int(mask.sum()) / len(mask)), lambda x: x[mask].mean(), x
        )
        poisoned = torch.where(mask, x, torch.nan)
        assert torch.equal(losses.masked_mean(poisoned, mask), losses.masked_mean(x, mask))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: losses.masked_mean(torch.zeros(2, 3), torch.ones(2, 3)), "TypeError: mask must be bool"),
        (
            lambda: losses.masked_mean(torch.zeros(2, 3), torch.ones(2) > 0),
            r"one shape; got \(2, 3\) and \(2,\)",
        ),
        (lambda: losses.masked_mean(torch.zeros(()), torch.ones(()) > 0), r"must be \[B, ...\]"),
        (
            lambda: losses.masked_mean(torch.zeros(2), torch.ones(2) > 0, 0.0),
            r"count must be .* \(0, inf\)",
        ),
        (
            lambda: losses.cross_entropy(torch.zeros(5, 3), torch.zeros(5).long(), torch.ones(5)),
            r"class_weights must be \[C\] = \(3,\), one a class; got \(5,\)",
        ),
    ],
)
def test_weights_and_masks_that_do_not_fit_are_refused(call, message):
    assert_refused(call, message)
