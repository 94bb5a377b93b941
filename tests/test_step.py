"""One step: laws of the update, and what it refuses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gdfunc as gd
from gdfunc import _tree

from .references import linear_data, linear_gradient, linear_loss, normal

PARAMS = {"w": normal(0, 2), "b": normal(1, 1)[0]}
BATCH = linear_data(3, 6, 2)
STEPS = {
    "plain": (gd.make_step, lambda params: params),
    "transform": (
        lambda loss_fn: gd.make_step(loss_fn, gd.scale(1.0)),
        lambda params: gd.TrainState(params, ()),
    ),
}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def params_of(carry):
    return carry.params if isinstance(carry, gd.TrainState) else carry


@pytest.mark.parametrize("kind", STEPS)
@given(st.integers(0, 2**32), st.floats(0, 10))
def test_a_step_is_theta_minus_lr_times_the_gradient(kind, seed, lr):
    make, carry_of = STEPS[kind]
    params, batch = {"w": normal(seed, 2), "b": normal(seed + 1, 1)[0]}, linear_data(seed + 2, 4, 2)
    carry, loss = make(linear_loss)(carry_of(params), batch, lr)
    by_hand = linear_gradient(params, batch)
    for name, leaf in params_of(carry).items():
        torch.testing.assert_close(leaf, params[name] - lr * by_hand[name], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(loss, linear_loss(params, batch))


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("dtype", DTYPES)
@given(st.integers(0, 2**32))
def test_zero_gradient_or_zero_lr_leaves_the_bits(kind, dtype, seed):
    make, carry_of = STEPS[kind]
    params = normal(seed, 5).to(dtype)
    flat, _ = make(lambda p, batch: 0 * p.sum())(carry_of(params), None, 0.3)
    assert torch.equal(params_of(flat), params)
    still, _ = make(lambda p, batch: (p**2).sum())(carry_of(params), None, 0.0)
    assert torch.equal(params_of(still), params)


@pytest.mark.long
@given(st.integers(0, 2**32))
def test_a_scaled_loss_with_lr_scaled_back_is_the_same_path_bit_for_bit(seed):
    params, batch = normal(seed, 3), linear_data(seed + 1, 5, 3)

    def path(scale):
        step = gd.make_step(lambda p, b: scale * ((b[0] @ p - b[1]) ** 2).mean())
        carry, iterates = params, []
        for _ in range(10):
            carry, _ = step(carry, batch, 0.1 / scale)
            iterates.append(carry)
        return torch.stack(iterates)

    for power in range(-8, 9):
        assert torch.equal(path(2.0**power), path(1.0))
    assert not torch.equal(path(1.0)[-1], params)


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1), torch.tensor(0.1).double(), torch.tensor(1)])
@pytest.mark.parametrize("dtypes", [[d, d] for d in DTYPES] + [[torch.float32, torch.float64]])
def test_a_step_keeps_structure_shape_dtype_and_strides(lr, dtypes):
    params = {
        "matrix": normal(0, 3, 2).to(dtypes[0]).T,
        "list": [normal(1, 4).to(dtypes[1]), (normal(2, 1)[0].to(dtypes[1]),)],
    }

    def loss_fn(p, batch):
        return sum((leaf.double() ** 2).sum() for leaf in _tree.leaves(p))

    new = gd.make_step(loss_fn)(params, None, lr)[0]
    assert _tree.flatten(new)[1] == _tree.flatten(params)[1]
    for got, old in zip(_tree.leaves(new), _tree.leaves(params), strict=True):
        assert (got.shape, got.dtype, got.stride()) == (old.shape, old.dtype, old.stride())
        assert not torch.equal(got, old)


BAD_LRS = [
    *((lr, f"got {lr!r}") for lr in (float("nan"), float("inf"), -0.1, "0.1", True, None)),
    (torch.ones(1), r"got shape \(1,\)"),
    (torch.tensor(1j), "got torch.complex64"),
]


@pytest.mark.parametrize(("lr", "message"), BAD_LRS)
def test_bad_lrs_raise(lr, message):
    with pytest.raises(ValueError, match=r"lr must be a finite number >= 0 \(0-d\); " + message):
        gd.make_step(linear_loss)(PARAMS, BATCH, lr)


@pytest.mark.parametrize(
    ("updates", "message"),
    [
        ({"w": PARAMS["w"]}, r"updates does not have the structure of params: missing params\['b'\]"),
        (PARAMS | {"c": PARAMS["b"]}, r"structure of params: unexpected updates\['c'\]"),
        (
            [*PARAMS.values()],
            r"missing params\['w'\], params\['b'\]; unexpected updates\[0\], updates\[1\]",
        ),
        (PARAMS | {"w": normal(0, 3)}, r"updates\['w'\] has shape \(3,\) but params\['w'\] has \(2,\)"),
        (PARAMS | {"b": normal(0, 1)}, r"updates\['b'\] has shape \(1,\) but params\['b'\] has \(\)"),
    ],
)
def test_updates_that_do_not_fit_raise(updates, message):
    with pytest.raises(ValueError, match=message):
        gd.apply_updates(PARAMS, updates, 0.1)


def test_updates_may_order_their_keys_otherwise():
    updates = {"b": torch.tensor(1.0), "w": torch.tensor([1.0, 2.0])}
    moved = gd.apply_updates(PARAMS, updates, 0.5)
    assert list(moved) == list(PARAMS)
    assert torch.equal(moved["w"], PARAMS["w"] - torch.tensor([0.5, 1.0]))


def test_updates_of_a_wider_dtype_promote_nothing():
    moved = gd.apply_updates(torch.ones(2), torch.ones(2, dtype=torch.float64), 0.5)
    assert moved.dtype == torch.float32
    assert moved.tolist() == [0.5, 0.5]


def test_the_carry_of_another_step_raises():
    bare, adam = gd.make_step(linear_loss), gd.make_step(linear_loss, gd.adam())
    heavy = gd.methods.heavy_ball(linear_loss, 0.9)
    for step, carry, message in (
        (adam, PARAMS, "carry is dict, but this step needs TrainState; make the carry with step.init"),
        (heavy, adam.init(PARAMS), "carry is TrainState, but this step needs HeavyBallState"),
        (bare, adam.init(PARAMS), "carry is TrainState, but this step needs the parameters alone"),
    ):
        with pytest.raises(TypeError, match=message):
            step(carry, BATCH, 0.1)
        with pytest.raises(TypeError, match=message):
            gd.train(step, carry, BATCH, gd.full_batch(6, 2), 0.1)


def test_an_update_that_returns_no_pair_raises():
    bare = gd.GradientTransformation(lambda params: (), lambda grads, state, params=None: grads)
    step = gd.make_step(linear_loss, bare)
    with pytest.raises(TypeError, match=r"transform.update must return \(updates, opt_state\); got dict"):
        step(step.init(PARAMS), BATCH, 0.1)


WRAPPED = {
    "plain": gd.make_step(linear_loss),
    "ema": gd.methods.ema(gd.make_step(linear_loss, gd.adam()), 0.9),
    "lookahead of ema": gd.methods.lookahead(gd.methods.ema(gd.make_step(linear_loss), 0.9), k=2),
    "heavy_ball": gd.methods.heavy_ball(linear_loss, 0.9),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_a_call_checks_its_batch_and_lr_and_takes_arrays(name):
    step, (x, y) = WRAPPED[name], BATCH
    carry = step.init(PARAMS)
    with pytest.raises(ValueError, match=r"disagree on the number of samples: batch\[0\] has 6"):
        step(carry, (x, y[:4]), 0.1)
    with pytest.raises(ValueError, match="lr must be a finite number >= 0"):
        step(carry, BATCH, -0.1)
    _, loss = step(carry, (x.numpy(), y.numpy()), 0.1)
    assert loss == step(carry, BATCH, 0.1)[1]


@pytest.mark.parametrize("name", WRAPPED)
def test_a_run_refuses_an_empty_batch(name):
    step, index = WRAPPED[name], torch.zeros(3, 0, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"batch is empty: batch\[0\] has shape \(0, 2\)"):
        gd.train(step, step.init(PARAMS), BATCH, index, 0.1)
