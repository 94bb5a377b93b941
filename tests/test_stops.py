"""Ends of a run that remember: against plain Python loops of what Keras and Lightning do."""

import functools
import math
import pickle

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.func import grad, vmap

import gdfunc as gd

from .assertions import assert_agrees, assert_refused, assert_same_bits
from .references import COMPILED, few, linear_data, linear_loss, normal
from .runs import ctrl_c

KEY = gd.random.key(0)
each = pytest.mark.parametrize("backend", ["eager", *COMPILED])

# Runs whose losses and evaluations are given numbers: the carry counts the steps and keeps their sum.


def counting(carry, batch, lr):
    count, total = carry
    return (count + 1, total + batch[0]), batch[0]


def watch(losses, values, stop, k=1, every=1, **options):
    """A run whose step t has the loss `losses[t]`. Its carry after t steps evaluates to `values[t]`."""
    zero = torch.zeros(1, dtype=torch.float64)
    data, index = torch.cat([losses, zero]), torch.arange(len(losses))[:, None]
    options |= {"evaluate": {"value": lambda carry: values[carry[0]]}, "evaluate_every": k, "every": every}
    return gd.train(counting, (torch.tensor(0), zero[0]), data, index, 0.0, stop=stop, **options)


class EarlyStopping:
    """Keras's callback of that name, from its source; Lightning's decides alike."""

    def __init__(self, patience, mode, min_delta):
        self.patience, self.is_min, self.min_delta = patience, mode == "min", min_delta
        self.wait, self.best, self.at = 0, math.inf if self.is_min else -math.inf, 0

    def sees(self, current, steps):
        """Tell whether training stops after a value, measured on the model after so many steps."""
        self.wait += 1
        better = (
            current + self.min_delta < self.best if self.is_min else current - self.min_delta > self.best
        )
        if better:
            self.best, self.at, self.wait = current, steps, 0
        return self.patience is not None and self.wait >= self.patience


def watch_by_hand(losses, values, early, quantity, k):
    """The number of steps of the run with one callback."""
    for t, loss in enumerate(losses):
        ends = quantity == "loss" and early.sees(loss, t)
        if (t + 1) % k == 0 and quantity != "loss":
            ends = early.sees(values[t + 1], t + 1) or ends
        if ends:
            return t + 1
    return len(losses)


numbers = st.sampled_from([0.0, 0.5, 1.0]) | st.sampled_from([1.0 + 2**-40, 2.0, -1.0]) | st.floats(-5, 5)
series = st.lists(numbers, max_size=25)
waits = st.none() | st.integers(1, 4)
deltas = st.sampled_from([0.0, 0.25, 1.0])
modes = st.sampled_from(["min", "max"])


def tensor(numbers):
    return torch.tensor(numbers, dtype=torch.float64)


@pytest.mark.long
@given(
    series,
    st.data(),
    st.sampled_from(["loss", "value"]),
    waits,
    modes,
    deltas,
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([0.0, 1e9]),
)
def test_patience_is_early_stopping(losses, data, quantity, patience, mode, delta, every, blocks, seconds):
    anything = numbers | st.sampled_from([math.nan, math.inf, -math.inf])
    values = data.draw(st.lists(anything, min_size=len(losses) + 1, max_size=len(losses) + 1))
    k, early = every * blocks, EarlyStopping(patience, mode, delta)
    assume(quantity == "loss" or k <= len(losses))
    taken = watch_by_hand(losses, values, early, quantity, k)
    stop = gd.stops.patience(quantity, patience, mode=mode, min_delta=delta)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gdfunc._train._drive._SEGMENT_SECONDS", seconds)
        (count, _), trajectory = watch(tensor(losses), tensor(values), stop, k, every)
    assert int(trajectory.steps) == int(count) == taken
    assert not trajectory.diverged
    assert trajectory.step.tolist() == list(range(0, taken, every))
    assert trajectory.loss.tolist() == losses[:taken:every]
    assert trajectory.evaluated.tolist() == list(range(k, taken + 1, k))
    assert trajectory.value.nan_to_num(7.0).equal(tensor(values)[k : taken + 1 : k].nan_to_num(7.0))
    best = trajectory.best
    assert best.value.dtype == torch.float64
    assert (float(best.value), int(best.step)) == (early.best, early.at)
    assert int(best.carry[0]) == early.at
    assert float(best.carry[1]) == float(sum(tensor(losses[: early.at]), tensor(0.0)))


LOSSES = tensor([5.0, 4.0, 4.5, 3.5, 3.5, 3.25, 9.0, 9.0, 9.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0])
VALUES = tensor([9.0, 2.0, 3.0, 4.0, math.nan, 5.0, 5.0, 5.5, 1.0, 1.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
CASES = [
    ("loss", 2, "min", 1, 1),
    ("loss", 3, "max", 3, 1),
    ("value", 2, "max", 1, 1),
    ("value", 2, "min", 2, 2),
    ("value", None, "max", 4, 2),
    ("value", 3, "min", 5, 1),
]


@pytest.mark.long
@each
@pytest.mark.parametrize(("quantity", "patience", "mode", "k", "every"), CASES)
def test_patience_is_the_same_on_every_backend_and_for_every_member(
    quantity, patience, mode, k, every, backend
):
    """Each member of a vmapped run ends by itself, and its best carry no longer changes then."""
    stop = gd.stops.patience(quantity, patience, mode=mode, min_delta=0.1)
    losses = torch.stack([LOSSES, LOSSES.flip(0), -LOSSES, torch.zeros_like(LOSSES), 4 + LOSSES.sin()])
    values = torch.stack([VALUES, VALUES.flip(0), -VALUES, torch.full_like(VALUES, math.nan), VALUES.cos()])
    alone = functools.partial(watch, stop=stop, k=k, every=every)
    final, trajectory = vmap(functools.partial(alone, backend=backend))(losses, values)
    for i in range(5):
        expected_final, expected = alone(losses[i], values[i], backend="eager")
        assert_same_bits(alone(losses[i], values[i], backend=backend)[1].best, expected.best)
        row = gd._tree.map(lambda leaf, i=i: leaf[i], (final, trajectory.best, trajectory.steps))
        assert_same_bits(row, (expected_final, expected.best, expected.steps))
        size = len(expected.evaluated)
        assert trajectory.value[i, :size].nan_to_num().equal(expected.value.nan_to_num())


DATA, HELD_OUT = linear_data(0, 12, 2), linear_data(7, 9, 2)
INIT = {"w": normal(5, 2), "b": normal(6, 1)[0]}
ADAM = gd.make_step(linear_loss, gd.adam())


def validation(state):
    return linear_loss(state.params, HELD_OUT)


def run(steps=60, lr=0.3, stop=None, **options):
    """A run of Adam whose validation loss swings."""
    index, start = gd.sample_batches(KEY, 12, 4, steps), ADAM.init(INIT)
    options = {"evaluate": validation, "evaluate_every": 2} | options
    return gd.train(ADAM, start, DATA, index, lr, stop=stop, **options)


@pytest.mark.long
@given(st.floats(0.05, 1.0), st.integers(1, 6), st.sampled_from(["loss", "validation"]))
@few
def test_the_best_carry_is_whole_and_that_of_the_loop_bit_for_bit(lr, patience, quantity):
    best, wait, state, steps = (math.inf, ADAM.init(INIT), 0), 0, ADAM.init(INIT), 0
    for t, row in enumerate(gd.sample_batches(KEY, 12, 4, 60)):
        before, steps = state, t + 1
        state, loss = ADAM(state, gd.take(DATA, row), lr)
        is_due = quantity == "loss" or steps % 2 == 0
        value, carry, at = (loss, before, t) if quantity == "loss" else (validation(state), state, steps)
        if is_due:
            wait = 0 if value < best[0] else wait + 1
            best = (float(value), carry, at) if value < best[0] else best
            if wait >= patience:
                break
    final, trajectory = run(lr=lr, stop=gd.stops.patience(quantity, patience))
    assert_same_bits(final, state)
    assert int(trajectory.steps) == steps
    assert (float(trajectory.best.value), int(trajectory.best.step)) == (best[0], best[2])
    assert_same_bits(trajectory.best.carry, best[1])
    measured = trajectory.loss if quantity == "loss" else trajectory.validation
    assert trajectory.best.value == measured.min()


@pytest.mark.long
@each
@pytest.mark.parametrize("quantity", ["loss", "validation"])
def test_members_of_a_sweep_keep_the_best_that_they_keep_alone(quantity, backend):
    lrs = torch.tensor([0.05, 0.3, 1.0], dtype=torch.float64)
    stop = gd.stops.patience(quantity, 5)
    final, trajectory = vmap(lambda lr: run(lr=lr, stop=stop, backend=backend))(lrs)
    for i, lr in enumerate(lrs):
        expected_final, expected = run(lr=lr, stop=stop, backend="eager")
        row = gd._tree.map(lambda leaf, i=i: leaf[i], (final, trajectory.best, trajectory.steps))
        assert_agrees(row, (expected_final, expected.best, expected.steps))
    assert len(set(trajectory.steps.tolist())) > 1


@pytest.mark.long
@pytest.mark.parametrize("backend", ["eager", "native"])
def test_the_best_carry_has_the_buffers_keys_and_learning_rate_of_its_step(backend):
    @gd.stateful
    def loss_fn(params, batch, buffers, key):
        noise = gd.random.normal(key, (), dtype=torch.float64)
        loss = linear_loss(params, (batch[0], batch[1] + 0.1 * noise))
        return loss, {"mean": 0.9 * buffers["mean"] + 0.1 * batch[1].mean()}

    inner = gd.make_step(loss_fn, gd.adam())
    step = gd.methods.reduce_on_plateau(inner, patience=2, factor=0.5)
    start, index = step.init(INIT, {"mean": tensor(0.0)}, KEY), gd.sample_batches(KEY, 12, 4, 60)

    def train(steps, **options):
        return gd.train(step, start, DATA, index[:steps], 0.5, backend=backend, **options)

    options = {"evaluate": {"validation": validation}, "evaluate_every": 2}
    best = train(60, stop=gd.stops.patience("validation", 5), **options)[1].best
    assert 0 < int(best.step) < 60
    assert_agrees(best.carry, train(int(best.step), **options)[0])
    assert_agrees(best.value, validation(best.carry))


@pytest.mark.long
@pytest.mark.usefixtures("no_segment_time", "ctrl_c_is_heard")
@pytest.mark.parametrize("quantity", ["loss", "validation"])
@pytest.mark.parametrize(
    ("backend", "after", "every", "k"),
    [
        *[("eager", after, 2, 4) for after in (1, 6, 17)],
        *[("native", after, 1, 2) for after in (1, 12, 20)],
    ],
)
def test_an_interrupted_run_is_resumed_to_the_bits_of_the_whole(quantity, backend, after, every, k):
    stop = gd.stops.any_of(gd.stops.patience(quantity, 12), lambda carry, loss: loss < 1e-9)
    options = {"every": every, "evaluate_every": k, "backend": backend, "stop": stop}
    expected = run(**options)
    with pytest.raises(gd.TrainingInterrupted) as caught:
        run(progress=ctrl_c(after), **options)
    stopped = pickle.loads(pickle.dumps(caught.value))
    so_far = run(**options | {"stop": gd.stops.patience(quantity)})[1]
    name, size = (
        ("loss", -(-stopped.step // every)) if quantity == "loss" else (quantity, stopped.step // k)
    )
    measured = getattr(so_far, name)[:size]
    if len(measured) and every == 1:
        assert stopped.trajectory.best.value == measured.min()
    assert_same_bits(run(resume=stopped, **options), expected)
    with pytest.raises(ValueError, match=r"resume\.state"):
        run(resume=stopped, **options | {"stop": None})


@pytest.mark.long
@each
def test_derivatives_go_through_the_best_carry_and_value(backend):
    lr = torch.tensor(0.3, dtype=torch.float64)

    def best(lr):
        kept = run(lr=lr, stop=gd.stops.patience("validation", 3), backend=backend)[1].best
        return kept.value + kept.carry.params["w"].sum()

    taken = int(run(lr=lr, stop=gd.stops.patience("validation", 3))[1].best.step)

    def by_hand(lr):
        final, _ = run(taken, lr)
        return validation(final) + final.params["w"].sum()

    torch.testing.assert_close(grad(best)(lr), grad(by_hand)(lr), rtol=1e-9, atol=0)


def test_an_error_of_check_finite_and_a_divergence_leave_the_best_so_far():
    losses = LOSSES.clone()
    losses[7] = math.nan
    stop = gd.stops.patience("loss")
    with pytest.raises(gd.NonFiniteError) as caught:
        watch(losses, VALUES, stop, check_finite="loss")
    (count, _), trajectory = watch(losses, VALUES, stop)
    assert trajectory.diverged
    assert int(count) == int(trajectory.steps) == 7
    for best in (caught.value.trajectory.best, trajectory.best):
        assert (float(best.value), int(best.step)) == (3.25, 5)


@pytest.mark.long
@each
@pytest.mark.parametrize("k", [1, 3, 4])
def test_a_carry_between_two_evaluations_never_is_the_best(k, backend):
    """Each member of a sweep ends after other many steps, with its best value there."""

    def member(end):
        values = torch.where(torch.arange(17) == end, -9.0, VALUES.nan_to_num())
        stop = gd.stops.any_of(gd.stops.patience("value"), lambda carry, loss: carry[0] == end)
        return watch(LOSSES, values, stop, k=k, every=1, backend=backend)[1]

    ends = torch.arange(1, 13)
    trajectory = vmap(member)(ends)
    assert trajectory.steps.equal(ends)
    for end, value, step in zip(ends.tolist(), *trajectory.best[1:], strict=True):
        values = VALUES.nan_to_num().tolist()
        values[end] = -9.0
        judged = range(k, end + 1, k)
        assert float(value) == min([values[t] for t in judged], default=math.inf)
        assert int(step) == min(judged, key=values.__getitem__, default=0)


@pytest.mark.parametrize(("mode", "improves"), [("min", -0.5), ("max", 0.5)])
def test_an_improvement_by_min_delta_alone_is_none(mode, improves):
    for quantity in ("loss", "value"):
        for change in (0.0, improves, 2 * improves):
            series = tensor([1.0, 1.0, 1.0 + change, 1.0 + change])
            stop = gd.stops.patience(quantity, mode=mode, min_delta=0.5)
            best = watch(series, torch.cat([series[:1], series]), stop)[1].best
            at = 2 if change == 2 * improves else 0
            assert int(best.step) == at + (quantity == "value")


def test_min_delta_is_mapped():
    deltas = tensor([0.0, 0.3, 2.0])
    steps = vmap(
        lambda delta: watch(LOSSES, VALUES, gd.stops.patience("loss", 3, min_delta=delta))[1].steps
    )(deltas)
    expected = [watch_by_hand(LOSSES, VALUES, EarlyStopping(3, "min", d), "loss", 1) for d in deltas]
    assert steps.tolist() == expected
    assert len(set(expected)) > 1


@pytest.mark.long
def test_equal_stops_compile_once(traces):
    for patience in (3, 3, 4):
        run(backend="native", stop=gd.stops.patience("validation", patience))
    once = len(traces)
    run(backend="native", stop=gd.stops.patience("validation", 3))
    assert len(traces) == once


# Several.


def ends(losses, *stops, k=1):
    return int(watch(losses, VALUES, *stops, k=k)[1].steps)


@pytest.mark.long
@given(st.lists(numbers, min_size=1, max_size=16), st.integers(1, 4), st.floats(-2, 2), st.integers(1, 3))
def test_any_and_all_end_with_the_first_and_with_the_last(losses, patience, bound, k):
    assume(k <= len(losses))
    losses = tensor(losses)
    a, b = gd.stops.patience("value", patience), gd.stops.patience("loss", patience, mode="max")

    def low(carry, loss):
        return loss < bound

    first = min(ends(losses, stop, k=k) for stop in (a, b, low))
    assert ends(losses, gd.stops.any_of(a, b, low), k=k) == first
    assert ends(losses, gd.stops.any_of(a, gd.stops.any_of(low, b)), k=k) == first
    assert (
        ends(losses, gd.stops.any_of(a), k=k)
        == ends(losses, gd.stops.all_of(a), k=k)
        == ends(losses, a, k=k)
    )
    early, taken, is_over = EarlyStopping(patience, "min", 0.0), len(losses), False
    for t, loss in enumerate(losses):
        if is_over and loss < bound:  # what was judged last still holds
            taken = t + 1
            break
        if (t + 1) % k == 0:
            is_over = early.sees(VALUES[t + 1], t + 1)
        if is_over and loss < bound:
            taken = t + 1
            break
    assert ends(losses, gd.stops.all_of(low, a), k=k) == taken


def test_the_best_of_several_is_that_of_the_first_that_keeps_one():
    low, loss = (lambda carry, loss: loss < 0), gd.stops.patience("loss")
    for join in (gd.stops.any_of, gd.stops.all_of):
        value = gd.stops.patience("value", mode="max")
        assert int(watch(LOSSES, VALUES, join(low, loss, value))[1].best.step) == 9
        assert int(watch(LOSSES, VALUES, join(value, low, loss))[1].best.step) == 10
        assert "best" not in vars(watch(LOSSES, VALUES, join(low, low))[1])


@pytest.mark.long
@each
def test_a_stop_of_ones_own_sees_where_values_were_measured(backend):
    """Its memory adds up the carries before and after every step, and doubles at every evaluation."""

    def update(memory, seen):
        places = torch.stack([seen.carry[0], seen.step, seen.after[0], torch.ones_like(seen.step)])
        return (memory + places if "loss" in seen.values else memory * 2), None

    stop = gd.stops.Stop(
        lambda carry: torch.zeros(4, dtype=torch.int64),
        update,
        lambda memory: gd.stops.Best(memory, tensor(0.0), torch.tensor(0)),
    )
    _, trajectory = watch(LOSSES[:6], VALUES, stop, k=2, backend=backend)
    expected = torch.zeros(4, dtype=torch.int64)
    for t in range(6):
        expected = (expected + torch.tensor([t, t, t + 1, 1])) * (2 if t % 2 else 1)
    assert trajectory.best.carry.equal(expected)


# Errors.


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gd.stops.patience("loss", 0), "patience must be an int >= 1; got 0"),
        (lambda: gd.stops.patience("loss", 2.0), "patience must be an int >= 1; got 2.0"),
        (lambda: gd.stops.patience("loss", mode="low"), "mode must be 'min' or 'max'; got 'low'"),
        (lambda: gd.stops.patience("loss", min_delta=-1.0), "min_delta must be a finite number in"),
        (lambda: gd.stops.patience(validation), "TypeError: quantity must be 'loss' or the name of"),
        (lambda: gd.stops.any_of(), "TypeError: any_of and all_of need at least one stop"),
        (lambda: gd.stops.all_of(3), "TypeError: stop must be a function .* or one of gd.stops; got 3"),
        (lambda: run(stop="loss"), "TypeError: stop must be a function .* got 'loss'"),
        (
            lambda: run(stop=gd.stops.patience("accuracy", 3)),
            r"stop judges 'accuracy', but the run evaluates \['validation'\]; pass evaluate={'accuracy': ",
        ),
        (
            lambda: run(stop=gd.stops.any_of(gd.stops.patience("accuracy")), evaluate=None),
            "'accuracy', but the run evaluates nothing",
        ),
        (
            lambda: run(stop=gd.stops.patience("w"), evaluate={"w": lambda state: state.params["w"]}),
            r"TypeError: 'w' must be a 0-d real tensor to be judged by patience; got torch.float64 \(2,\)",
        ),
        (
            lambda: run(stop=gd.stops.Stop(lambda carry: (), lambda memory, seen: (memory, True))),
            "TypeError: stop must return a 0-d bool tensor, .* got bool",
        ),
        (
            lambda: run(stop=gd.stops.patience("loss"), adjoint=gd.adjoints.Truncated(3)),
            "counts from the planned end of a run, which stop= moves",
        ),
    ],
)
def test_bad_stops_raise(call, message):
    assert_refused(call, message)
