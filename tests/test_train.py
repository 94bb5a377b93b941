"""A run: its meaning, what it records, how it is watched and stopped, and what it refuses."""

import functools
import io
import re
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, jvp, vmap

import gdfunc as gd

from .assertions import assert_same_bits
from .references import COMPILED, linear_data, linear_gradient, linear_loss, normal

KEY = gd.random.key(0)
DATA = linear_data(0, 12, 2)
INIT = {"w": normal(5, 2), "b": normal(6, 1)[0]}
INDEX = gd.epoch_batches(KEY, 12, 4, 5)  # 15 steps
STEP = gd.make_step(linear_loss)
EVERYTHING = ("loss", "params", "lr", "grad_norm", "state")


each = pytest.mark.parametrize("backend", ["eager", *COMPILED])


def run(lr=0.05, index=INDEX, init=INIT, data=DATA, step=STEP, **options):
    return gd.train(step, init, data, index, lr, **options)


def loop(index=INDEX, lr=0.05, init=INIT, data=DATA):
    """The run by hand: iterates (T+1 of them) and losses."""
    iterates, losses = [init], []
    for t, row in enumerate(index):
        batch = tuple(torch.as_tensor(leaf)[row] for leaf in data)
        params, lr_now = iterates[-1], lr[t] if isinstance(lr, torch.Tensor) and lr.ndim else lr
        gradient = linear_gradient(params, batch)
        losses.append(linear_loss(params, batch))
        iterates.append({name: params[name] - lr_now * gradient[name] for name in params})
    return iterates, losses


@pytest.mark.long
@each
def test_train_is_the_loop(backend):
    final, trajectory = run(record=EVERYTHING, backend=backend)
    iterates, losses = loop()
    torch.testing.assert_close(final, iterates[-1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(trajectory.loss, torch.stack(losses), rtol=1e-12, atol=1e-12)
    path = torch.stack([params["w"] for params in iterates[:-1]])
    torch.testing.assert_close(trajectory.params["w"], path, rtol=1e-12, atol=1e-12)
    assert trajectory.params["w"].equal(trajectory.state["w"])
    assert trajectory.lr.tolist() == [0.05] * 15
    assert trajectory.step.tolist() == list(range(15))
    batch = gd.take(DATA, INDEX[3])
    gradient = linear_gradient(iterates[3], batch)
    norm = (gradient["w"].square().sum() + gradient["b"].square()).sqrt()
    torch.testing.assert_close(trajectory.grad_norm[3], norm)


def test_train_is_the_python_loop_of_its_step_bit_for_bit():
    carry = INIT
    for row in INDEX:
        carry, loss = STEP(carry, gd.take(DATA, row), 0.05)
    final, trajectory = run()
    assert final["w"].equal(carry["w"])
    assert trajectory.loss[-1].equal(loss)


def test_a_transformed_run_carries_its_state():
    step = gd.make_step(linear_loss, gd.chain(gd.scale(0.5)))
    final, trajectory = run(0.1, init=step.init(INIT), step=step, record=("params", "state"))
    plain, _ = run()
    torch.testing.assert_close(final.params, plain, rtol=1e-13, atol=0)
    assert trajectory.params["w"].equal(trajectory.state.params["w"])


@pytest.mark.parametrize(
    "lr", [0.05, torch.tensor(0.05), torch.full((15,), 0.05), np.full(15, 0.05), [0.05] * 15]
)
def test_lr_comes_as_a_number_a_tensor_or_a_schedule(lr):
    final, _ = run(lr)
    torch.testing.assert_close(final, loop()[0][-1], rtol=1e-6, atol=0)


@each
def test_a_schedule_is_taken_step_by_step(backend):
    lrs = torch.linspace(0.1, 0.0, 15, dtype=torch.float64)
    final, trajectory = run(lrs, record=("lr",), backend=backend)
    torch.testing.assert_close(final, loop(lr=lrs)[0][-1], rtol=1e-12, atol=1e-12)
    assert trajectory.lr.equal(lrs)


@pytest.mark.parametrize("every", [1, 2, 4, 7, 15, 40])
@pytest.mark.parametrize("check_finite", ["off", "all"])
def test_every_thins_the_record_and_nothing_else(every, check_finite):
    final, whole = run(record=EVERYTHING)
    same, thin = run(record=EVERYTHING, every=every, check_finite=check_finite)
    assert same["w"].equal(final["w"])
    assert thin.step.tolist() == list(range(0, 15, every))
    assert thin.loss.equal(whole.loss[::every])
    assert thin.params["w"].equal(whole.params["w"][::every])


def test_records_of_ones_own():
    def distance(params, loss):
        return {"from_start": (params["w"] - INIT["w"]).norm()}

    _, trajectory = run(record=("loss", distance))
    assert trajectory.distance["from_start"][0] == 0
    assert trajectory.distance["from_start"][-1] > 0
    _, named = run(record={"half": lambda params, loss: loss / 2, "l": "loss"})
    assert named.half.equal(trajectory.loss / 2)
    assert named.l.equal(trajectory.loss)
    _, single = run(record="params")
    assert sorted(vars(single)) == ["params", "step"]


def test_a_missing_record_is_named():
    _, trajectory = run()
    message = r"params was not recorded: train\(..., record=\) kept step, loss"
    with pytest.raises(AttributeError, match=message):
        trajectory.params  # noqa: B018


def test_a_function_with_any_carry_is_a_step():
    def step(carry, batch, lr):
        w, count = carry["w"] - lr * batch[0].mean(0), carry["count"] + 1
        return {"w": w, "count": count}, (w.sum(), count)

    init = {"w": INIT["w"], "count": torch.tensor(0)}
    final, trajectory = run(init=init, step=step, record=("loss", "params", "lr"), every=2)
    assert final["count"] == len(INDEX)
    assert trajectory.params["count"].tolist() == list(range(0, 15, 2))
    data = DATA[0].float(), DATA[1]
    assert run(init=torch.tensor(0), data=data, step=lambda n, batch, lr: (n + 1, lr))[0] == 15


def test_a_run_of_no_steps_passes_derivatives_on():
    slope = grad(lambda init: run(index=INDEX[:0], init=init)[0]["w"].sum())(INIT)
    assert slope["w"].tolist() == [1.0, 1.0]


def test_a_loss_without_data():
    step = gd.make_step(lambda w, batch: (w**2).sum())
    final, _ = gd.train(step, torch.tensor([1.0]), None, gd.full_batch(1, 3), 0.25)
    assert final.tolist() == [0.125]


# Transformations of a whole run.


def test_plain_autograd_reaches_lr_but_not_the_start():
    lr = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    init = {name: leaf.clone().requires_grad_() for name, leaf in INIT.items()}
    linear_loss(run(lr, init=init)[0], DATA).backward()
    torch.testing.assert_close(lr.grad, grad(lambda lr: linear_loss(run(lr)[0], DATA))(lr.detach()))
    assert init["w"].grad is None


@pytest.mark.parametrize("members", [2, 3])
def test_a_vmapped_sweep_is_separate_runs(members):
    def member(lr, init, key):
        index = gd.epoch_batches(key, 12, 4, 3)
        return run(lr, index, init, record=("loss", "params", "lr"), every=2)

    lrs = torch.linspace(0.01, 0.1, members, dtype=torch.float64)
    many = lrs, {"w": normal(1, members, 2), "b": normal(2, members)}, gd.random.split(KEY, members)
    one = lrs[0], INIT, KEY
    for dims in [(0, None, None), (None, 0, None), (None, None, 0), (0, 0, 0)]:
        args = [one[i] if dim is None else many[i] for i, dim in enumerate(dims)]
        final, trajectory = vmap(member, dims)(*args)
        assert trajectory.params["w"].shape == (members, 5, 2)
        for i in range(members):
            row = [
                arg if dim is None else gd._tree.map(lambda leaf: leaf[i], arg)  # noqa: B023
                for arg, dim in zip(args, dims, strict=True)
            ]
            alone, record = member(*row)
            torch.testing.assert_close(final["w"][i], alone["w"], rtol=1e-11, atol=1e-12)
            torch.testing.assert_close(trajectory.loss[i], record.loss, rtol=1e-11, atol=1e-12)


# Watching and stopping.


def test_progress_calls_a_function_with_the_steps_done():
    calls = []
    run(progress=lambda done, steps: calls.append((done, steps)))
    assert [steps for _, steps in calls] == [15] * len(calls)
    done = [done for done, _ in calls]
    assert done == sorted(set(done))
    assert done[-1] == 15


@pytest.mark.parametrize(("without", "end"), [("tqdm", "\r15/15 steps, "), (None, "15/15")])
def test_progress_is_a_bar_of_tqdm_or_a_plain_line(without, end, monkeypatch):
    if without:
        monkeypatch.setitem(sys.modules, without, None)
    else:
        pytest.importorskip("tqdm")
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    run(progress=True)
    assert end in stream.getvalue()
    assert re.search(r"loss.*\d", stream.getvalue())


def interrupt_after(steps):
    """A progress function that interrupts the run once so many steps are done."""

    def interrupt(done, total):
        if done >= steps:
            raise KeyboardInterrupt

    return interrupt


@pytest.mark.long
@each
@pytest.mark.usefixtures("no_segment_time")
@pytest.mark.parametrize("stop", [None, lambda carry, loss: loss < 0.5])
def test_an_interrupted_sweep_keeps_every_member(stop, backend):
    lrs = torch.tensor([[0.01, 0.02, 0.03], [0.04, 0.1, 1e30 if stop else 0.06]], dtype=torch.float64)
    index = INDEX.repeat(4, 1)
    member = functools.partial(run, index=index, stop=stop, backend=backend)

    def sweep(run, *args):
        return vmap(vmap(run))(lrs, *args)

    final, whole = sweep(member)
    with pytest.raises(gd.TrainingInterrupted) as caught:
        sweep(lambda lr: member(lr, progress=interrupt_after(6)))
    stopped = caught.value
    assert 6 <= stopped.step < 60
    assert stopped.state["w"].shape == (2, 3, 2)
    assert stopped.trajectory.loss.equal(whole.loss[:, :, : stopped.step])
    if stop:
        assert stopped.trajectory.steps.equal(whole.steps.clamp(max=stopped.step))
        assert stopped.trajectory.diverged.equal(whole.diverged)
        assert whole.diverged.sum() == 1
    else:
        rest = functools.partial(member, index=index[stopped.step :])
        resumed, _ = sweep(lambda lr, state: rest(lr, init=state), stopped.state)
        torch.testing.assert_close(resumed, final, rtol=1e-12, atol=0)


def test_an_interrupt_before_the_first_segment_gives_the_start():
    def stopped_step(params, batch, lr):
        raise KeyboardInterrupt

    with pytest.raises(gd.TrainingInterrupted) as caught:
        run(step=stopped_step)
    assert caught.value.step == 0
    assert caught.value.state["w"].equal(INIT["w"])
    with pytest.raises(AttributeError, match="of a run that took no step"):
        _ = caught.value.trajectory.loss


def poisoned(at):
    """Data whose sample `at` is NaN, visited by step `at` alone."""
    x, y = (leaf.clone() for leaf in DATA)
    y[at] = float("nan")
    return x, y


@pytest.mark.long
@each
@pytest.mark.parametrize(
    ("bad", "every", "check_finite"), [(0, 1, "loss"), (5, 1, "all"), (5, 4, "loss"), (11, 4, "all")]
)
def test_check_finite_reports_the_step_and_keeps_the_last_good_state(bad, every, check_finite, backend):
    index = torch.arange(12)[:, None]
    good, whole = run(index=index[:bad], backend=backend)
    with pytest.raises(gd.NonFiniteError, match=f"loss is not finite after step {bad}") as caught:
        run(index=index, data=poisoned(bad), every=every, check_finite=check_finite, backend=backend)
    assert (caught.value.step, caught.value.leaf) == (bad, "loss")
    torch.testing.assert_close(caught.value.state, good, rtol=1e-12, atol=0)
    torch.testing.assert_close(caught.value.trajectory.loss, whole.loss[::every], rtol=1e-12, atol=0)
    assert caught.value.trajectory.step.tolist() == list(range(0, bad, every))


def test_check_finite_all_finds_a_leaf_that_the_loss_does_not_show():
    def loss_fn(params, batch):  # at w = 0 the loss is 0 and its derivative infinite
        return params["w"].abs().sqrt().sum() + (params["b"] ** 2).sum()

    init = {"b": torch.tensor([1.0]), "w": torch.tensor([0.0])}
    args = (gd.make_step(loss_fn), init, None, gd.full_batch(1, 1), 0.1)
    gd.train(*args, check_finite="loss")
    with pytest.raises(gd.NonFiniteError, match=r"params\['w'\] is not finite after step 0"):
        gd.train(*args, check_finite="all")
    step = gd.make_step(loss_fn, gd.chain())
    with pytest.raises(gd.NonFiniteError, match=r"state.params\['w'\] is not finite"):
        gd.train(step, step.init(init), None, gd.full_batch(1, 1), 0.1, check_finite="all")


@pytest.mark.long
@each
def test_skipped_steps_keep_all_bits_and_are_counted_in_a_run(backend):
    step = gd.make_step(linear_loss, gd.apply_if_finite(gd.adam()))
    index = torch.tensor([0, 1, 5, 5, 2, 5, 3])[:, None]
    _, trajectory = run(
        index=index, data=poisoned(5), init=step.init(INIT), step=step, record="state", backend=backend
    )
    params, state = trajectory.state
    assert state.consecutive.tolist() == [0, 0, 0, 1, 2, 0, 1]
    assert state.total.tolist() == [0, 0, 0, 1, 2, 2, 3]
    for leaf in gd._tree.leaves((params, state.inner)):
        assert [leaf[t].equal(leaf[t + 1]) for t in range(6)] == [False, False, True, True, False, True]
    expected = run(index=index, data=poisoned(5), init=step.init(INIT), step=step, record="state")[1]
    torch.testing.assert_close(trajectory.state.params, expected.state.params, rtol=1e-12, atol=0)


def test_check_finite_under_vmap_says_why_not():
    with pytest.raises(RuntimeError) as caught:
        vmap(lambda lr: run(lr, check_finite="loss")[1].loss)(torch.tensor([0.1, 0.2]))
    assert caught.value.__notes__ == ["gdfunc: check_finite reads values, which vmap does not allow"]


def test_without_check_finite_divergence_is_shown():
    final, trajectory = run(index=torch.arange(12)[:, None], data=poisoned(3))
    assert final["w"].isnan().all()
    assert trajectory.loss[:3].isfinite().all()
    assert trajectory.loss[3:].isnan().all()


# A run that ends by itself.


def stopped_loop(step, carry, index, lr, stop, every=1, data=DATA):
    """A run with `stop` by hand: the last carry, the steps taken, whether it diverged, and the losses."""
    losses, steps = [], 0
    for row in index:
        new, loss = step(carry, gd.take(data, row), lr)
        if not loss.isfinite():
            return carry, steps, True, losses
        if steps % every == 0:
            losses.append(loss)
        carry, steps = new, steps + 1
        if stop(new, loss):
            break
    return carry, steps, False, losses


ADAM = gd.chain(gd.adam(), gd.chain())
STEPS = {
    "plain": (STEP, INIT),
    "adam": (gd.make_step(linear_loss, ADAM), gd.TrainState(INIT, ADAM.init(INIT))),
}
STOPS = {
    "low loss": lambda size: lambda carry, loss: loss < size,
    "high loss": lambda size: lambda carry, loss: loss > size,
    "far": lambda size: lambda carry, loss: (gd._step.params_of(carry)["w"] - INIT["w"]).norm() > size / 10,
    "never": lambda size: lambda carry, loss: loss < -size,
}


@pytest.mark.long
@given(
    st.sampled_from(sorted(STEPS)),
    st.sampled_from(sorted(STOPS)),
    st.floats(0.01, 10),
    st.sampled_from([0.0, 0.02, 0.3, 1e40]),
    st.integers(0, 20),
    st.integers(1, 6),
    st.sampled_from([0.0, 1e9]),
)
def test_stop_is_a_break(kind, rule, size, lr, length, every, seconds):
    step, init = STEPS[kind]
    stop, index = STOPS[rule](size), gd.sample_batches(KEY, 12, 4, length)
    carry, steps, diverged, losses = stopped_loop(step, init, index, lr, stop, every)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gdfunc._train._drive._SEGMENT_SECONDS", seconds)
        final, trajectory = run(lr, index, init, step=step, stop=stop, every=every)
    assert_same_bits(final, carry)
    assert all(leaf.isfinite().all() for leaf in gd._tree.leaves(final))
    assert (trajectory.steps.dtype, trajectory.diverged.dtype) == (torch.int64, torch.bool)
    assert (int(trajectory.steps), bool(trajectory.diverged)) == (steps, diverged)
    assert trajectory.step.tolist() == list(range(0, steps, every))
    assert trajectory.loss.tolist() == [float(loss) for loss in losses]


@pytest.mark.parametrize("every", [1, 2, 3, 20])
def test_the_record_of_a_stopped_run_is_the_beginning_of_the_whole_record(every):
    def distance(params, loss):
        return {"from_start": (params["w"] - INIT["w"]).norm()}

    _, whole = run(record=(*EVERYTHING, distance))
    end = whole.params["w"][8]
    stop = lambda carry, loss: (carry["w"] == end).all()  # noqa: E731
    final, stopped = run(record=(*EVERYTHING, distance), every=every, stop=stop)
    assert int(stopped.steps) == 8
    assert final["w"].equal(end)
    for name in vars(whole):
        assert_same_bits(
            getattr(stopped, name), gd._tree.map(lambda leaf: leaf[:8:every], getattr(whole, name))
        )


def test_a_run_whose_first_loss_is_not_finite_takes_no_step():
    index = torch.arange(12)[:, None]
    final, trajectory = run(index=index, data=poisoned(0), stop=lambda carry, loss: loss < 0)
    assert final["w"].equal(INIT["w"])
    assert (int(trajectory.steps), bool(trajectory.diverged)) == (0, True)
    assert trajectory.loss.shape == trajectory.step.shape == (0,)


@pytest.mark.long
@each
def test_a_diverging_run_ends_before_its_first_loss_that_is_not_finite(backend):
    index = gd.full_batch(12, 1000)
    final, trajectory = run(10.0, index, stop=lambda carry, loss: loss < 1e-9, backend=backend)
    _, endless = run(10.0, index, backend=backend)
    assert trajectory.diverged
    assert int(trajectory.steps) == int(endless.loss.isfinite().sum()) == len(trajectory.loss) < 1000
    assert trajectory.loss[-1] > 1e300
    assert all(leaf.isfinite().all() for leaf in final.values())


def run_below(threshold, lr, **options):
    return run(lr, stop=lambda carry, loss: loss < threshold, **options)


@pytest.mark.long
@each
@pytest.mark.parametrize("every", [1, 2])
def test_members_of_a_sweep_end_as_they_do_alone(every, backend):
    lrs = torch.tensor([0.001, 0.1, 1e40, 0.1], dtype=torch.float64)
    thresholds = torch.tensor([-1.0, 0.5, 0.5, 1e3], dtype=torch.float64)
    member = functools.partial(run_below, record=("loss", "params"), every=every)
    for dims in [(0, 0), (None, 0), (0, None)]:
        args = [arg if dim == 0 else arg[1] for arg, dim in zip((thresholds, lrs), dims, strict=True)]
        final, trajectory = vmap(functools.partial(member, backend=backend), dims)(*args)
        assert len(trajectory.step[0]) == -(-int(trajectory.steps.max()) // every)
        for i in range(4):
            alone, record = member(*[arg if arg.ndim == 0 else arg[i] for arg in args])
            assert trajectory.steps[i] == record.steps
            assert trajectory.diverged[i] == record.diverged
            torch.testing.assert_close(final["w"][i], alone["w"], rtol=1e-11, atol=1e-12)
            length = len(record.loss)
            torch.testing.assert_close(trajectory.loss[i, :length], record.loss, rtol=1e-11, atol=1e-12)
            frozen = trajectory.params["w"][i, length:]
            assert frozen.equal(final["w"][i].expand_as(frozen))
    sweep = vmap(member)(thresholds, lrs)[1]
    assert sweep.diverged.tolist() == [False, False, True, False]
    assert sweep.steps[0] == 15
    assert sweep.steps[3] == 1
    assert 1 < sweep.steps[1] < 15


@pytest.mark.long
def test_derivatives_go_through_a_run_that_stops():
    threshold = torch.tensor(0.6, dtype=torch.float64)

    def final_loss(lr):
        return linear_loss(run_below(threshold, lr)[0], DATA)

    def slope(lr, taken):
        return grad(lambda lr: linear_loss(run(lr, INDEX[:taken])[0], DATA))(lr)

    lrs = torch.tensor([0.02, 0.05, 0.1], dtype=torch.float64)
    steps = vmap(lambda lr: run_below(threshold, lr)[1].steps)(lrs)
    assert len(set(steps.tolist())) == 3
    expected = torch.stack([slope(lr, taken) for lr, taken in zip(lrs, steps, strict=True)])
    for got in (
        torch.stack([grad(final_loss)(lr) for lr in lrs]),
        vmap(grad(final_loss))(lrs),
        grad(lambda lrs: vmap(final_loss)(lrs).sum())(lrs),
        jvp(vmap(final_loss), (lrs,), (torch.ones_like(lrs),))[1],
    ):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("seconds", [0.0, 1e9])
@pytest.mark.parametrize("every", [1, 4])
def test_check_finite_does_not_look_beyond_the_end(monkeypatch, seconds, every):
    monkeypatch.setattr("gdfunc._train._drive._SEGMENT_SECONDS", seconds)
    index = torch.arange(12)[:, None]
    _, whole = run(index=index, record=("loss", "params"))
    bad = functools.partial(run, index=index, data=poisoned(7), every=every)
    for at, check_finite in [(5, "loss"), (6, "all")]:
        end = whole.params["w"][at]

        def stop(carry, loss, end=end):
            return (carry["w"] == end).all()

        final, trajectory = bad(stop=stop, check_finite=check_finite)
        assert (int(trajectory.steps), bool(trajectory.diverged)) == (at, False)
        assert final["w"].equal(end)
    with pytest.raises(gd.NonFiniteError, match="loss is not finite after step 7") as caught:
        bad(stop=lambda carry, loss: loss < 0, check_finite="loss")
    assert caught.value.state["w"].equal(whole.params["w"][7])
    assert caught.value.trajectory.loss.equal(whole.loss[:7:every])


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (lambda loss: True, "bool"),
        (lambda loss: None, "NoneType"),
        (lambda loss: loss, r"torch.float64 \(\)"),
        (lambda loss: loss[None] < 1, r"torch.bool \(1,\)"),
    ],
)
@pytest.mark.parametrize("steps", [0, 15])
def test_stop_must_return_a_flag(value, got, steps):
    with pytest.raises(TypeError, match=rf"stop must return a 0-d bool tensor, .* got {got}"):
        run(index=INDEX[:steps], stop=lambda carry, loss: value(loss))


@pytest.mark.parametrize(
    ("step", "kind", "message"),
    [
        (lambda p, batch, lr: p, TypeError, r"step must return \(carry, loss\); got dict"),
        (
            lambda p, batch, lr: (p | {"w": p["w"].sum()}, lr),
            ValueError,
            r"float64 \(2,\) on cpu to float64 \(\)",
        ),
        (
            lambda p, batch, lr: (p | {"w": p["w"].float()}, lr),
            ValueError,
            r"\['w'\] changed from .* to float32",
        ),
    ],
)
def test_stop_hides_no_wrong_step(step, kind, message):
    with pytest.raises(kind, match=message):
        run(step=step, stop=lambda carry, loss: loss < 0)


def test_a_step_without_a_loss_can_be_stopped():
    plan, stop = gd.full_batch(1, 10), lambda w, loss: w < 0.5
    final, trajectory = gd.train(
        lambda w, batch, lr: (w - lr, None), torch.tensor(1.0), None, plan, 0.25, stop=stop
    )
    assert final == 0.25
    assert trajectory.steps == 3


@pytest.mark.parametrize("end", [5, 9, 13])
@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_an_interrupted_run_with_stop_goes_on_to_the_same_end(monkeypatch, seconds, end):
    monkeypatch.setattr("gdfunc._train._drive._SEGMENT_SECONDS", seconds)

    _, whole = run(record=("loss", "params"))
    at_end = whole.params["w"][end]

    def stop(carry, loss):
        return (carry["w"] == at_end).all()

    with pytest.raises(gd.TrainingInterrupted) as caught:
        run(stop=stop, progress=interrupt_after(4))
    stopped = caught.value
    assert stopped.step == int(stopped.trajectory.steps) == len(stopped.trajectory.loss) <= end
    assert stopped.state["w"].equal(whole.params["w"][stopped.step])
    assert stopped.trajectory.loss.equal(whole.loss[: stopped.step])
    if stopped.step < end:
        resumed, rest = run(index=INDEX[stopped.step :], init=stopped.state, stop=stop)
        assert resumed["w"].equal(at_end)
        assert int(rest.steps) == end - stopped.step


# Checkpoints of the backward pass.


@pytest.mark.long
def test_checkpoints_go_with_stop():
    def final_loss(lr, **options):
        final, trajectory = run(lr, stop=lambda carry, loss: loss < 2.0, **options)
        return linear_loss(final, DATA), trajectory.steps

    lrs = torch.tensor([0.02, 0.1], dtype=torch.float64)
    expected, steps = vmap(grad(final_loss, has_aux=True))(lrs)
    thrifty = functools.partial(final_loss, adjoint=gd.adjoints.Checkpoint("sqrt"))
    got, same = vmap(grad(thrifty, has_aux=True))(lrs)
    assert steps.tolist() == same.tolist()
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_warns_once(dtype):
    step, message = (
        gd.make_step(lambda w, batch: ((w - 1) ** 2).sum()),
        r"params is b?float16: a step below 2\^-\d",
    )
    with pytest.warns(UserWarning, match=message) as caught:
        gd.train(step, torch.zeros(2, dtype=dtype), None, gd.full_batch(1, 20), 0.1)
    assert len(caught) == 1
    assert caught[0].filename == __file__


KEEP = lambda carry, batch, lr: (carry, lr)  # noqa: E731
BAD_CALLS = [
    ({"index": INDEX.float()}, TypeError, r"index must be an int64 tensor \[T, B\], .* got torch.float32"),
    ({"index": [[0, 1]]}, TypeError, r"index must be an int64 tensor \[T, B\], .* got list"),
    ({"index": INDEX[0]}, ValueError, r"index must be \[T, B\], a batch a row; got shape \(4,\)"),
    ({"index": INDEX + 1}, IndexError, "index goes from 1 to 12, but data has samples 0 to 11"),
    ({"index": INDEX - 1}, IndexError, "index goes from -1 to 10, but data has samples 0 to 11"),
    ({"lr": torch.ones(1)}, ValueError, r"a tensor \[T\] with T = 15 as in index; got shape \(1,\)"),
    ({"lr": torch.ones(15, 1)}, ValueError, r"got shape \(15, 1\)"),
    ({"lr": float("nan")}, ValueError, r"lr must be a finite number >= 0 \(0-d\); got nan"),
    ({"lr": -1.0}, ValueError, "got -1.0"),
    ({"lr": "0.1"}, ValueError, "got '0.1'"),
    (
        {"lr": gd.schedules.exponential(0.1, 0.9)},
        TypeError,
        r"lr is a function; pass its values.*arange\(15\)",
    ),
    ({"lr": torch.tensor(-0.1)}, ValueError, "lr must be finite and >= 0 in every step"),
    ({"lr": torch.full((15,), float("nan"))}, ValueError, "lr must be finite and >= 0 in every step"),
    (
        {"init": [0.0, 1.0]},
        TypeError,
        r"params\[0\] is float, not a Tensor; make it one with torch.as_tensor",
    ),
    (
        {"init": gd.TrainState(INIT, ())},
        TypeError,
        "carry is TrainState, but this step needs the parameters",
    ),
    ({"step": 0.1}, TypeError, r"step is float, not a Step or a function \(carry, batch, lr\)"),
    ({"step": lambda params, batch, lr: (None, lr)}, TypeError, "step returned None as its carry"),
    ({"step": KEEP, "init": {"w": INIT["w"], "n": 3}}, TypeError, r"init\['n'\] is int, not a Tensor"),
    ({"step": KEEP, "init": ()}, ValueError, "init has no tensor leaves"),
    (
        {"data": (DATA[0], DATA[1][:5])},
        ValueError,
        r"data leaves disagree on the number of samples: data\[0\]",
    ),
    (
        {"data": (DATA[0].float(), DATA[1])},
        ValueError,
        r"data\[0\] is float32 but params\['w'\] is float64",
    ),
    ({"data": (DATA[0][:0], DATA[1][:0])}, ValueError, "data is empty"),
    ({"init": {}}, ValueError, "params has no tensor leaves"),
    ({"init": {"w": INIT["w"], "b": INIT["w"]}}, ValueError, "share storage"),
    ({"every": 0}, ValueError, "every must be an int >= 1; got 0"),
    ({"adjoint": "sqrt"}, TypeError, r"adjoint must be Reverse\(\), .* of gd.adjoints; got 'sqrt'"),
    ({"adjoint": gd.adjoints.Forward()}, TypeError, r"adjoint must be Reverse\(\), .*; got Forward\("),
    ({"check_finite": True}, ValueError, "check_finite must be 'off' or 'loss' or 'all'; got True"),
    ({"backend": "xla"}, ValueError, "backend must be 'eager' or 'native' or 'inductor' or .* got 'xla'"),
    (
        {"record": ("loss", "theta")},
        ValueError,
        "record must name loss, params, lr, grad_norm, state or be a",
    ),
    ({"record": (lambda params, loss: loss,)}, ValueError, "has no name to record it under; pass {'name'"),
    ({"record": {"step": "loss"}}, ValueError, "'step' cannot name a record"),
    ({"step": lambda params, batch, lr: params}, TypeError, r"step must return \(carry, loss\); got dict"),
    (
        {"step": lambda p, b, lr: STEP(p, b, lr), "record": "grad_norm"},
        ValueError,
        "'grad_norm' needs a gdfunc Step",
    ),
]


@pytest.mark.parametrize(("changed", "kind", "message"), BAD_CALLS)
def test_bad_calls_raise(changed, kind, message):
    with pytest.raises(kind, match=message):
        run(**changed)


def test_a_trajectory_is_a_tree():
    _, trajectory = run(record=("loss", "params"))
    doubled = gd._tree.map(lambda leaf: leaf * 2, trajectory)
    assert isinstance(doubled, gd.Trajectory)
    assert doubled.params["w"].equal(2 * trajectory.params["w"])
    names = [path for path, _ in gd._tree.named_leaves(trajectory, "run")]
    assert names == ["run.step", "run.loss", "run.params['w']", "run.params['b']"]


def test_a_container_that_changes_on_the_way_is_the_one_that_was_given():
    x, y = DATA
    data = {"x": x, "y": y}

    def change(done, steps):
        data["y"] = torch.zeros_like(y)

    step = gd.make_step(lambda params, batch: linear_loss(params, (batch["x"], batch["y"])))
    expected, _ = run(data=data, step=step)
    assert run(data=data, step=step, progress=change)[0]["w"].equal(expected["w"])
