"""`reduce_on_plateau`: torch's ReduceLROnPlateau, inside a run."""

import inspect
import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.func import grad, vmap
from torch.optim.lr_scheduler import ReduceLROnPlateau

import gdfunc as gd

from .assertions import assert_refused
from .references import COMPILED, few, linear_data, linear_loss, normal

each = pytest.mark.parametrize("backend", ["eager", *COMPILED])


def recording(carry, batch, lr):
    """A step that keeps the learning rate that it is given; its losses are its data."""
    return torch.as_tensor(lr, dtype=torch.float64), batch[0]


def lrs_of(losses, lr, backend="eager", **options):
    """The learning rates of a run with these losses."""
    step = gd.methods.reduce_on_plateau(recording, **options)
    losses = torch.as_tensor(losses, dtype=torch.float64)
    index, start = torch.arange(len(losses))[:, None], step.init(torch.tensor(0.0, dtype=torch.float64))
    evaluate = {"lrs": lambda state: state.carry}
    return gd.train(step, start, losses, index, lr, evaluate=evaluate, backend=backend)[1].lrs


def torch_lrs(losses, lr, every=1, **options):
    """The same of torch's scheduler, which is stepped with the means of `every` losses."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr)
    scheduler, found, total = ReduceLROnPlateau(optimizer, **options), [], 0.0
    for t, loss in enumerate(losses):
        found.append(optimizer.param_groups[0]["lr"])
        total += loss
        if (t + 1) % every == 0:
            scheduler.step(total / every)
            total = 0.0
    return found


levels = st.just(1.0) | st.sampled_from([0.0, 0.999, 2.0, -1.0, math.nan, math.inf, -math.inf])
HYPERPARAMETERS = {
    "mode": st.sampled_from(["min", "max"]),
    "factor": st.sampled_from([0.0, 0.1, 0.5]) | st.floats(0.05, 0.95),
    "patience": st.integers(0, 3),
    "threshold": st.sampled_from([0.0, 1e-4, 0.1, 1.0, 2.0]),
    "threshold_mode": st.sampled_from(["rel", "abs"]),
    "cooldown": st.integers(0, 3),
    "min_lr": st.sampled_from([0.0, 0.01, 0.3, 0.5]),
    "eps": st.sampled_from([0.0, 1e-8, 0.1]),
    "every": st.integers(1, 3),
}


@given(
    st.lists(levels | st.floats(-2, 2), min_size=1, max_size=30),
    st.fixed_dictionaries({}, optional=HYPERPARAMETERS),
    st.sampled_from([1.0, 0.5, 2.0**-5]),
)
@example([1.0] * 12, {"patience": 1, "cooldown": 3}, 1.0)
@example([1.0] * 12, {"patience": 1, "cooldown": 1, "every": 2}, 0.5)
@example([1.0] * 6, {"patience": 0, "factor": 0.5, "eps": 0.25}, 1.0)
@example([1.0, 0.5, 0.25, 0.5], {"patience": 0, "threshold": 0.5}, 1.0)
@example([1.0, 0.5, 0.25, 0.5], {"patience": 0, "threshold": 0.5, "threshold_mode": "abs"}, 1.0)
@example([2.0, 1.2, 1.2], {"patience": 0, "threshold": 0.5, "threshold_mode": "abs"}, 1.0)
@example([1.0, 1.0, 0.5, 0.5], {"patience": 0, "threshold": 0.75, "threshold_mode": "abs", "every": 2}, 1.0)
@example([1.0, 1.5, 2.0], {"patience": 0, "threshold": 0.5, "mode": "max"}, 1.0)
@example([1.0, 1.5, 2.0], {"patience": 0, "threshold": 0.5, "mode": "max", "threshold_mode": "abs"}, 1.0)
def test_learning_rates_are_those_of_torch(losses, options, lr):
    """With a power of two as lr, to which the scale is exact, they are so to the last bit."""
    assert lrs_of(losses, lr, **options).tolist() == torch_lrs(losses, lr, **options)


LOSSES = [3.0, 2.0, 2.0, 2.5, 2.1, 2.0, 2.0, 1.0, 1.0, 1.0, 1.5, 1.0, 1.0, 1.0, 1.0, 0.5, 0.6, 0.7]
OPTIONS = {"factor": 0.3, "patience": 1, "cooldown": 2, "min_lr": 0.003, "threshold": 0.01}


@given(st.floats(1e-3, 10.0))
@few
def test_any_learning_rate_follows_torch_up_to_rounding(lr):
    expected = torch_lrs(LOSSES, lr, **OPTIONS)
    assert lrs_of(LOSSES, lr, **OPTIONS).tolist() == pytest.approx(expected, rel=1e-14)


@each
@pytest.mark.parametrize("every", [1, 2])
def test_members_and_backends_follow_torch(every, backend):
    """Each of the hyperparameters that may be a tensor is mapped."""
    table = {
        "factor": [0.3, 0.5, 0.1],
        "threshold": [0.01, 0.4, 0.0],
        "min_lr": [0.003, 0.2, 0.0],
        "eps": [0.0, 1e-8, 0.05],
    }
    values = {name: torch.tensor(column, dtype=torch.float64) for name, column in table.items()}

    def member(values):
        return lrs_of(LOSSES, 0.5, backend, **OPTIONS | values, every=every)

    rows = vmap(member)(values)
    for i, row in enumerate(rows):
        changed = OPTIONS | {name: column[i] for name, column in table.items()}
        assert row.tolist() == pytest.approx(torch_lrs(LOSSES, 0.5, every, **changed), rel=1e-14)
    assert len(set(map(tuple, rows.tolist()))) == 3


def test_defaults_are_those_of_torch():
    ours, theirs = (
        {name: parameter.default for name, parameter in inspect.signature(f).parameters.items()}
        for f in (gd.methods.reduce_on_plateau, ReduceLROnPlateau)
    )
    assert ours.pop("every") == 1
    del ours["step"], theirs["optimizer"]
    assert ours == theirs


def test_a_schedule_is_multiplied():
    lrs = torch.linspace(1.0, 0.1, len(LOSSES), dtype=torch.float64)
    scale = torch.tensor(torch_lrs(LOSSES, 1.0, **OPTIONS | {"min_lr": 0.0}), dtype=torch.float64)
    got = lrs_of(LOSSES, lrs, **OPTIONS | {"min_lr": 0.0})
    torch.testing.assert_close(got, lrs * scale, rtol=1e-14, atol=0)


def test_derivatives_go_through_the_learning_rate_and_the_factor():
    losses = [1.0] * 6  # patience 1: the third and the fifth shrink lr
    for order, values in enumerate([(0.5, 0.3), (0.3, 0.5)]):
        lr, factor = (torch.tensor(value, dtype=torch.float64) for value in values)

        def last(lr, factor):
            return lrs_of(losses, lr, factor=factor, patience=1)[-1]

        assert last(lr, factor) == lr * factor * factor, order
        slopes = grad(last, (0, 1))(lr, factor)
        torch.testing.assert_close(slopes, (factor**2, 2 * lr * factor), rtol=1e-14, atol=0)


def test_a_step_of_parameters_descends_with_the_learning_rates_of_torch():
    data, lr = linear_data(0, 12, 2), 1.0  # which is too large, so that the loss grows at first
    params, options = {"w": normal(5, 2), "b": normal(6, 1)[0]}, {"factor": 0.5, "patience": 0}
    step = gd.methods.reduce_on_plateau(gd.make_step(linear_loss), **options)
    record = {"loss": "loss", "scale": lambda state, loss: state.scale}
    final, trajectory = gd.train(
        step, step.init(params), data, gd.full_batch(12, 30), lr, record=record, backend="eager"
    )
    expected = torch_lrs(trajectory.loss.tolist(), lr, **options)
    assert trajectory.scale.tolist() == expected
    assert expected[-1] < lr
    plain, _ = gd.train(
        gd.make_step(linear_loss), params, data, gd.full_batch(12, 30), trajectory.scale, backend="eager"
    )
    torch.testing.assert_close(final.params, plain, rtol=1e-13, atol=0)


STEP = gd.make_step(linear_loss)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gd.methods.reduce_on_plateau(STEP, mode="low"), "mode must be 'min' or 'max'"),
        (lambda: gd.methods.reduce_on_plateau(STEP, threshold_mode="r"), "threshold_mode must be 'rel' or"),
        (lambda: gd.methods.reduce_on_plateau(STEP, factor=1.0), "factor must be a finite number in"),
        (lambda: gd.methods.reduce_on_plateau(STEP, patience=-1), "patience must be an int >= 0"),
        (lambda: gd.methods.reduce_on_plateau(STEP, cooldown=1.5), "cooldown must be an int >= 0"),
        (lambda: gd.methods.reduce_on_plateau(STEP, every=0), "every must be an int >= 1"),
        (lambda: gd.methods.reduce_on_plateau(STEP, lr=0.1), "TypeError: reduce_on_plateau takes no lr"),
        (
            lambda: gd.methods.reduce_on_plateau(lambda c, b, lr: (c, (lr, lr)))(
                gd.methods.reduce_on_plateau(STEP).init(torch.tensor(1.0)), None, 0.1
            ),
            "TypeError: reduce_on_plateau judges the step's loss, which must be a 0-d tensor; got tuple",
        ),
    ],
)
def test_bad_calls_raise(call, message):
    assert_refused(call, message)


@pytest.mark.parametrize("wrap", [gd.methods.reduce_on_plateau, lambda step: gd.methods.ema(step, 0.9)])
def test_a_wrapped_step_takes_the_state_of_its_loss_by_name(wrap):
    step = wrap(gd.make_step(gd.stateful(lambda w, batch, buffers, key: (w**2, buffers + 1))))
    state = step.init(torch.tensor(1.0), buffers=torch.tensor(0.0), key=gd.random.key(0))
    assert step(state, None, 0.1)[0].carry.buffers == 1


def test_a_mean_over_steps_can_be_checked_for_finite_values():
    step = gd.methods.reduce_on_plateau(gd.make_step(lambda w, batch: w**2), every=2)
    state = step.init(torch.tensor(1.0))
    final, _ = gd.train(step, state, None, gd.full_batch(1, 3), 0.1, check_finite="all")
    assert final.params.isfinite()
