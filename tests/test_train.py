"""A run: its meaning, what it records, how it is watched and stopped, and what it refuses."""

import functools
import gc
import io
import os
import signal
import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, jvp, vmap

import gdfunc as gd

from .references import fingerprint, linear_data, linear_gradient, linear_loss, normal, storages

KEY = gd.random.key(0)
DATA = linear_data(0, 12, 2)
INIT = {"w": normal(5, 2), "b": normal(6, 1)[0]}
INDEX = gd.epoch_batches(KEY, 12, 4, 5)  # 15 steps
STEP = gd.make_step(linear_loss)
EVERYTHING = ("loss", "params", "lr", "grad_norm", "state")


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


def test_train_is_the_loop():
    final, trajectory = gd.train(STEP, INIT, DATA, INDEX, 0.05, record=EVERYTHING)
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
    final, trajectory = gd.train(STEP, INIT, DATA, INDEX, 0.05)
    assert final["w"].equal(carry["w"])
    assert trajectory.loss[-1].equal(loss)


def test_a_transformed_run_carries_its_state():
    transform = gd.chain(gd.scale(0.5))
    step = gd.make_step(linear_loss, transform)
    final, trajectory = gd.train(
        step, step.init(INIT), DATA, INDEX, 0.1, record=("params", "state", "grad_norm")
    )
    plain, _ = gd.train(STEP, INIT, DATA, INDEX, 0.05)
    torch.testing.assert_close(final.params, plain, rtol=1e-13, atol=0)
    assert trajectory.params["w"].equal(trajectory.state.params["w"])


@pytest.mark.parametrize(
    "lr", [0.05, torch.tensor(0.05), torch.full((15,), 0.05), np.full(15, 0.05), [0.05] * 15]
)
def test_lr_comes_as_a_number_a_tensor_or_a_schedule(lr):
    final, _ = gd.train(STEP, INIT, DATA, INDEX, lr)
    torch.testing.assert_close(final, loop()[0][-1], rtol=1e-6, atol=0)


def test_a_schedule_is_taken_step_by_step():
    lrs = torch.linspace(0.1, 0.0, 15, dtype=torch.float64)
    final, trajectory = gd.train(STEP, INIT, DATA, INDEX, lrs, record=("lr",))
    torch.testing.assert_close(final, loop(lr=lrs)[0][-1], rtol=1e-12, atol=1e-12)
    assert trajectory.lr.equal(lrs)


@pytest.mark.parametrize("every", [1, 2, 4, 7, 15, 40])
@pytest.mark.parametrize("check_finite", ["off", "all"])
def test_every_thins_the_record_and_nothing_else(every, check_finite):
    final, whole = gd.train(STEP, INIT, DATA, INDEX, 0.05, record=EVERYTHING)
    same, thin = gd.train(
        STEP, INIT, DATA, INDEX, 0.05, record=EVERYTHING, every=every, check_finite=check_finite
    )
    assert same["w"].equal(final["w"])
    assert thin.step.tolist() == list(range(0, 15, every))
    assert thin.loss.equal(whole.loss[::every])
    assert thin.params["w"].equal(whole.params["w"][::every])


@given(st.integers(0, 15))
def test_a_run_in_two_parts_is_the_run_bit_for_bit(cut):
    final, whole = gd.train(STEP, INIT, DATA, INDEX, 0.05)
    middle, first = gd.train(STEP, INIT, DATA, INDEX[:cut], 0.05)
    resumed, second = gd.train(STEP, middle, DATA, INDEX[cut:], 0.05)
    assert resumed["w"].equal(final["w"])
    assert torch.cat([first.loss, second.loss]).equal(whole.loss)


def test_where_the_segments_fall_is_of_no_matter(monkeypatch):
    expected, whole = gd.train(STEP, INIT, DATA, INDEX, 0.05)
    for seconds in (0.0, 1e9):
        monkeypatch.setattr("gdfunc._train._drive._SEGMENT_SECONDS", seconds)
        final, trajectory = gd.train(STEP, INIT, DATA, INDEX, 0.05)
        assert final["w"].equal(expected["w"])
        assert trajectory.loss.equal(whole.loss)


def test_records_of_ones_own():
    def distance(params, loss):
        return {"from_start": (params["w"] - INIT["w"]).norm()}

    _, trajectory = gd.train(STEP, INIT, DATA, INDEX, 0.05, record=("loss", distance))
    assert trajectory.distance["from_start"][0] == 0
    assert trajectory.distance["from_start"][-1] > 0
    _, named = gd.train(
        STEP, INIT, DATA, INDEX, 0.05, record={"half": lambda params, loss: loss / 2, "l": "loss"}
    )
    assert named.half.equal(trajectory.loss / 2)
    assert named.l.equal(trajectory.loss)
    _, single = gd.train(STEP, INIT, DATA, INDEX, 0.05, record="params")
    assert sorted(vars(single)) == ["params", "step"]


def test_what_was_not_recorded_says_so():
    _, trajectory = gd.train(STEP, INIT, DATA, INDEX, 0.05)
    with pytest.raises(
        AttributeError, match=r"params was not recorded: train\(..., record=\) kept step, loss"
    ):
        trajectory.params  # noqa: B018


@pytest.mark.parametrize("every", [1, 3])
def test_no_steps_give_the_start_and_an_empty_record(every):
    final, trajectory = gd.train(STEP, INIT, DATA, INDEX[:0], 0.05, record=("loss", "params"), every=every)
    assert final["w"].equal(INIT["w"])
    assert trajectory.loss.shape == (0,)
    assert trajectory.params["w"].shape == (0, 2)
    assert trajectory.step.shape == (0,)


def test_a_function_with_any_carry_is_a_step():
    def step(carry, batch, lr):
        w, count = carry["w"] - lr * batch[0].mean(0), carry["count"] + 1
        return {"w": w, "count": count}, (w.sum(), count)

    init = {"w": INIT["w"], "count": torch.tensor(0)}
    final, trajectory = gd.train(step, init, DATA, INDEX, 0.05, record=("loss", "params", "lr"), every=2)
    assert final["count"] == len(INDEX)
    assert trajectory.params["count"].tolist() == list(range(0, 15, 2))
    counting, _ = gd.train(
        lambda n, batch, lr: (n + 1, lr), torch.tensor(0), (DATA[0].float(), DATA[1]), INDEX, 0.05
    )
    assert counting == 15


def test_a_run_of_no_steps_passes_derivatives_on():
    slope = grad(lambda init: gd.train(STEP, init, DATA, INDEX[:0], 0.05)[0]["w"].sum())(INIT)
    assert slope["w"].tolist() == [1.0, 1.0]


def test_a_loss_without_data():
    final, _ = gd.train(
        gd.make_step(lambda w, batch: (w**2).sum()), torch.tensor([1.0]), None, gd.full_batch(1, 3), 0.25
    )
    assert final.tolist() == [0.125]


def test_inputs_are_left_alone_and_outputs_are_the_callers_own():
    inputs = [*INIT.values(), *DATA, INDEX]
    before = fingerprint(inputs)
    final, trajectory = gd.train(STEP, INIT, DATA, INDEX, 0.05, record=("loss", "params"))
    assert fingerprint(inputs) == before
    outputs = [*final.values(), trajectory.loss, *trajectory.params.values(), trajectory.step]
    places = storages([*inputs, *outputs])
    assert len(set(places)) == len(places)


# Transformations of a whole run.


def final_loss(lr, init=INIT, data=DATA):
    final, _ = gd.train(STEP, init, data, INDEX, lr)
    return linear_loss(final, DATA)


def test_the_gradient_of_a_run_is_the_finite_difference():
    lr, eps = torch.tensor(0.05, dtype=torch.float64), 1e-6
    by_lr = (final_loss(lr + eps) - final_loss(lr - eps)) / (2 * eps)
    torch.testing.assert_close(grad(final_loss)(lr), by_lr, rtol=1e-7, atol=1e-9)
    _, forward = jvp(final_loss, (lr,), (torch.ones_like(lr),))
    torch.testing.assert_close(forward, by_lr, rtol=1e-7, atol=1e-9)
    by_init = grad(final_loss, 1)(lr, INIT)
    direction = normal(8, 2)
    up, down = ({**INIT, "w": INIT["w"] + sign * eps * direction} for sign in (1, -1))
    difference = (final_loss(lr, up) - final_loss(lr, down)) / (2 * eps)
    torch.testing.assert_close(by_init["w"] @ direction, difference, rtol=1e-7, atol=1e-9)
    by_data = grad(final_loss, 2)(lr, INIT, DATA)[1]
    bump = eps * torch.eye(12, dtype=torch.float64)[7]
    difference = (
        final_loss(lr, data=(DATA[0], DATA[1] + bump)) - final_loss(lr, data=(DATA[0], DATA[1] - bump))
    ) / (2 * eps)
    torch.testing.assert_close(by_data[7], difference, rtol=1e-6, atol=1e-9)


def test_the_gradient_of_a_schedule_and_of_a_thinned_run():
    lrs = torch.full((15,), 0.05, dtype=torch.float64)
    torch.testing.assert_close(grad(final_loss)(lrs).sum(), grad(final_loss)(lrs[0]))

    def thinned(lr):
        return linear_loss(gd.train(STEP, INIT, DATA, INDEX, lr, every=4)[0], DATA)

    torch.testing.assert_close(grad(thinned)(lrs[0]), grad(final_loss)(lrs[0]))


def test_plain_autograd_reaches_lr_but_not_the_start():
    lr = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    init = {name: leaf.clone().requires_grad_() for name, leaf in INIT.items()}
    final_loss(lr, init).backward()
    torch.testing.assert_close(lr.grad, grad(final_loss)(lr.detach()))
    assert init["w"].grad is None


@pytest.mark.parametrize("members", [2, 3])
def test_a_vmapped_sweep_is_separate_runs(members):
    lrs = torch.linspace(0.01, 0.1, members, dtype=torch.float64)

    def run(lr, init, key):
        index = gd.epoch_batches(key, 12, 4, 3)
        return gd.train(STEP, init, DATA, index, lr, record=("loss", "params", "lr"), every=2)

    keys = gd.random.split(KEY, members)
    inits = {"w": normal(1, members, 2), "b": normal(2, members)}
    for in_dims in [(0, None, None), (None, 0, None), (None, None, 0), (0, 0, 0)]:
        args = [lrs, inits, keys]
        first = [lrs[0], INIT, KEY]
        chosen = [arg if dim == 0 else one for arg, dim, one in zip(args, in_dims, first, strict=True)]
        final, trajectory = vmap(run, in_dims)(*chosen)
        for i in range(members):
            member = [
                arg
                if dim is None
                else ({k: v[i] for k, v in arg.items()} if isinstance(arg, dict) else arg[i])
                for arg, dim in zip(chosen, in_dims, strict=True)
            ]
            single, own = run(*member)
            torch.testing.assert_close(final["w"][i], single["w"], rtol=1e-11, atol=1e-12)
            torch.testing.assert_close(trajectory.loss[i], own.loss, rtol=1e-11, atol=1e-12)
            assert trajectory.params["w"].shape == (members, 5, 2)


def test_requires_grad_parameters_retain_no_graph():
    init = {name: leaf.clone().requires_grad_() for name, leaf in INIT.items()}
    index = gd.sample_batches(KEY, 12, 4, 1000)
    gc.collect()
    before = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
    final, trajectory = gd.train(STEP, init, DATA, index, 0.05, record=("loss", "params"))
    gc.collect()
    after = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
    outputs = [*final.values(), trajectory.loss, *trajectory.params.values()]
    assert all(leaf.grad_fn is None and not leaf.requires_grad for leaf in outputs)
    assert after - before < 20


def test_memory_does_not_grow_with_steps_beyond_the_record():
    seen, alive = [], []

    def count(params, loss):
        return {}

    def watch(done, steps):
        seen.append(done)
        if len(seen) == 2 or done == steps:
            gc.collect()
            alive.append(sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()))

    index = gd.sample_batches(KEY, 12, 4, 600)
    gd.train(STEP, INIT, DATA, index, 0.05, record={"nothing": count}, progress=watch)
    assert len(seen) > 2
    assert alive[-1] - alive[0] < 10


# Watching and stopping.


def test_progress_calls_a_function_with_the_steps_done():
    calls = []
    gd.train(STEP, INIT, DATA, INDEX, 0.05, progress=lambda done, steps: calls.append((done, steps)))
    assert [steps for _, steps in calls] == [15] * len(calls)
    done = [done for done, _ in calls]
    assert done == sorted(set(done))
    assert done[-1] == 15


def test_progress_without_tqdm_is_a_plain_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    gd.train(STEP, INIT, DATA, INDEX, 0.05, progress=True)
    assert stream.getvalue().endswith("\r15/15 steps\n")


def test_progress_with_tqdm_is_its_bar(monkeypatch):
    pytest.importorskip("tqdm")
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    gd.train(STEP, INIT, DATA, INDEX, 0.05, progress=True)
    assert "15/15" in stream.getvalue()


@pytest.mark.parametrize("every", [1, 2])
def test_an_interrupt_loses_nothing_and_resumes_to_the_same_bits(every, monkeypatch):
    monkeypatch.setattr("gdfunc._train._drive._SEGMENT_SECONDS", 0.0)

    def stop(done, steps):
        if done >= 6:
            raise KeyboardInterrupt

    final, whole = gd.train(STEP, INIT, DATA, INDEX, 0.05)
    with pytest.raises(gd.TrainingInterrupted, match="stopped after") as caught:
        gd.train(STEP, INIT, DATA, INDEX, 0.05, progress=stop, every=every)
    stopped = caught.value
    assert isinstance(stopped, KeyboardInterrupt)
    assert 6 <= stopped.step < 15
    assert stopped.trajectory.loss.equal(whole.loss[: stopped.step : every])
    resumed, rest = gd.train(STEP, stopped.state, DATA, INDEX[stopped.step :], 0.05)
    assert resumed["w"].equal(final["w"])
    assert rest.loss.equal(whole.loss[stopped.step :])


def test_an_interrupted_sweep_keeps_every_member():
    lrs = torch.tensor([[0.01, 0.02, 0.03], [0.04, 0.05, 0.06]], dtype=torch.float64)

    def stop(done, steps):
        if done >= 6:
            raise KeyboardInterrupt

    def sweep(run, *args):
        return vmap(vmap(run))(lrs, *args)

    final, whole = sweep(lambda lr: gd.train(STEP, INIT, DATA, INDEX, lr))
    with pytest.raises(gd.TrainingInterrupted) as caught:
        sweep(lambda lr: gd.train(STEP, INIT, DATA, INDEX, lr, progress=stop))
    stopped = caught.value
    assert stopped.state["w"].shape == (2, 3, 2)
    assert stopped.trajectory.loss.equal(whole.loss[:, :, : stopped.step])
    rest = INDEX[stopped.step :]
    resumed, _ = sweep(lambda lr, state: gd.train(STEP, state, DATA, rest, lr), stopped.state)
    torch.testing.assert_close(resumed, final, rtol=1e-12, atol=0)


def test_an_interrupt_before_the_first_segment_gives_the_start():
    def stopped_step(params, batch, lr):
        raise KeyboardInterrupt

    with pytest.raises(gd.TrainingInterrupted) as caught:
        gd.train(stopped_step, INIT, DATA, INDEX, 0.05)
    assert caught.value.step == 0
    assert caught.value.state["w"].equal(INIT["w"])


@pytest.mark.skipif(not hasattr(signal, "SIGINT") or os.name == "nt", reason="sends a POSIX signal")
def test_a_real_ctrl_c_stops_a_long_run():
    index = gd.full_batch(12, 10**6)
    reached = threading.Event()

    def watch(done, steps):
        if done > 100 and not reached.is_set():
            reached.set()
            os.kill(os.getpid(), signal.SIGINT)

    # A shell that starts this in the background lets it ignore the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(gd.TrainingInterrupted) as caught:
            gd.train(STEP, INIT, DATA, index, 0.05, progress=watch, every=50)
    finally:
        signal.signal(signal.SIGINT, before)
    assert 100 < caught.value.step < 10**5
    assert len(caught.value.trajectory.loss) == -(-caught.value.step // 50)


def poisoned(at, where="y"):
    """Data whose sample `at` is NaN, visited by step `at` alone."""
    x, y = (leaf.clone() for leaf in DATA)
    (y if where == "y" else x)[at] = float("nan")
    return x, y


@pytest.mark.parametrize("check_finite", ["loss", "all"])
@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("bad", [0, 5, 11])
def test_check_finite_reports_the_step_and_keeps_the_last_good_state(bad, every, check_finite):
    index = torch.arange(12)[:, None]
    good, whole = gd.train(STEP, INIT, DATA, index[:bad], 0.05)
    with pytest.raises(gd.NonFiniteError, match=f"loss is not finite after step {bad}") as caught:
        gd.train(STEP, INIT, poisoned(bad), index, 0.05, every=every, check_finite=check_finite)
    assert (caught.value.step, caught.value.leaf) == (bad, "loss")
    assert caught.value.state["w"].equal(good["w"])
    assert caught.value.trajectory.loss.equal(whole.loss[::every])
    assert caught.value.trajectory.step.tolist() == list(range(0, bad, every))


def test_check_finite_all_finds_a_leaf_that_the_loss_does_not_show():
    def loss_fn(params, batch):  # at w = 0 the loss is 0 and its derivative infinite
        return params["w"].abs().sqrt().sum() + (params["b"] ** 2).sum()

    init = {"b": torch.tensor([1.0]), "w": torch.tensor([0.0])}
    args = (gd.make_step(loss_fn), init, None, gd.full_batch(1, 1), 0.1)
    gd.train(*args, check_finite="loss")
    with pytest.raises(gd.NonFiniteError, match=r"params\['w'\] is not finite after step 0"):
        gd.train(*args, check_finite="all")
    transform = gd.chain()
    step = gd.make_step(loss_fn, transform)
    with pytest.raises(gd.NonFiniteError, match=r"state.params\['w'\] is not finite"):
        gd.train(step, step.init(init), None, gd.full_batch(1, 1), 0.1, check_finite="all")


def test_check_finite_under_vmap_says_why_not():
    def run(lr):
        return gd.train(STEP, INIT, DATA, INDEX, lr, check_finite="loss")[1].loss

    with pytest.raises(RuntimeError) as caught:
        vmap(run)(torch.tensor([0.1, 0.2]))
    assert caught.value.__notes__ == ["gdfunc: check_finite reads values, which vmap does not allow"]


def test_without_check_finite_divergence_is_shown():
    final, trajectory = gd.train(STEP, INIT, poisoned(3), torch.arange(12)[:, None], 0.05)
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
        final, trajectory = gd.train(step, init, DATA, index, lr, stop=stop, every=every)
    for got, expected in zip(gd._tree.leaves(final), gd._tree.leaves(carry), strict=True):
        assert got.equal(expected)
        assert got.isfinite().all()
    assert (trajectory.steps.dtype, trajectory.diverged.dtype) == (torch.int64, torch.bool)
    assert (int(trajectory.steps), bool(trajectory.diverged)) == (steps, diverged)
    assert trajectory.step.tolist() == list(range(0, steps, every))
    assert trajectory.loss.tolist() == [float(loss) for loss in losses]


@pytest.mark.parametrize("every", [1, 4])
def test_a_run_that_never_stops_is_the_run_without_stop(every):
    final, whole = gd.train(STEP, INIT, DATA, INDEX, 0.05, record=EVERYTHING, every=every)
    same, watched = gd.train(
        STEP, INIT, DATA, INDEX, 0.05, record=EVERYTHING, every=every, stop=lambda carry, loss: loss < 0
    )
    assert (int(watched.steps), bool(watched.diverged)) == (15, False)
    del watched.steps, watched.diverged
    pairs = zip(gd._tree.leaves((final, whole)), gd._tree.leaves((same, watched)), strict=True)
    assert all(a.equal(b) for a, b in pairs)


@pytest.mark.parametrize("every", [1, 2, 3, 20])
def test_what_a_stopped_run_recorded_is_the_beginning_of_the_whole_record(every):
    def distance(params, loss):
        return {"from_start": (params["w"] - INIT["w"]).norm()}

    record = (*EVERYTHING, distance)
    _, whole = gd.train(STEP, INIT, DATA, INDEX, 0.05, record=record)
    final, stopped = gd.train(
        STEP,
        INIT,
        DATA,
        INDEX,
        0.05,
        record=record,
        every=every,
        stop=lambda carry, loss: carry["w"].equal(whole.params["w"][8]) * torch.ones((), dtype=torch.bool),
    )
    assert int(stopped.steps) == 8
    assert final["w"].equal(whole.params["w"][8])
    for name in vars(whole):
        got, expected = getattr(stopped, name), getattr(whole, name)
        for a, b in zip(gd._tree.leaves(got), gd._tree.leaves(expected), strict=True):
            assert a.equal(b[:8:every])


def test_a_run_whose_first_loss_is_not_finite_takes_no_step():
    final, trajectory = gd.train(
        STEP, INIT, poisoned(0), torch.arange(12)[:, None], 0.05, stop=lambda carry, loss: loss < 0
    )
    assert final["w"].equal(INIT["w"])
    assert (int(trajectory.steps), bool(trajectory.diverged)) == (0, True)
    assert trajectory.loss.shape == trajectory.step.shape == (0,)


def test_a_diverging_run_ends_before_its_first_loss_that_is_not_finite():
    index = gd.full_batch(12, 1000)
    final, trajectory = gd.train(STEP, INIT, DATA, index, 10.0, stop=lambda carry, loss: loss < 1e-9)
    _, endless = gd.train(STEP, INIT, DATA, index, 10.0)
    assert trajectory.diverged
    assert int(trajectory.steps) == int(endless.loss.isfinite().sum()) == len(trajectory.loss) < 1000
    assert trajectory.loss[-1] > 1e300
    assert all(leaf.isfinite().all() for leaf in final.values())


def members_below(lr, threshold, init=INIT, index=INDEX, record=("loss", "params"), every=1):
    return gd.train(
        STEP,
        init,
        DATA,
        index,
        lr,
        record=record,
        every=every,
        stop=lambda carry, loss: loss < threshold,
    )


@pytest.mark.parametrize("every", [1, 2])
def test_each_member_of_a_sweep_ends_for_itself(every):
    lrs = torch.tensor([0.001, 0.1, 1e40, 0.1], dtype=torch.float64)
    thresholds = torch.tensor([-1.0, 0.5, 0.5, 1e3], dtype=torch.float64)
    run = functools.partial(members_below, every=every)
    for in_dims in [(0, 0), (0, None), (None, 0)]:
        args = [arg if dim == 0 else arg[1] for arg, dim in zip((lrs, thresholds), in_dims, strict=True)]
        final, trajectory = vmap(run, in_dims)(*args)
        assert len(trajectory.step[0]) == -(-int(trajectory.steps.max()) // every)
        for i in range(4):
            own_final, own = run(
                *[a if dim is None else a[i] for a, dim in zip(args, in_dims, strict=True)]
            )
            assert trajectory.steps[i] == own.steps
            assert trajectory.diverged[i] == own.diverged
            torch.testing.assert_close(final["w"][i], own_final["w"], rtol=1e-11, atol=1e-12)
            kept = len(own.loss)
            torch.testing.assert_close(trajectory.loss[i, :kept], own.loss, rtol=1e-11, atol=1e-12)
            later = trajectory.params["w"][i, kept:]
            assert later.equal(final["w"][i].expand_as(later))  # the frozen carry
    sweep = vmap(run)(lrs, thresholds)[1]
    assert sweep.diverged.tolist() == [False, False, True, False]
    assert sweep.steps[0] == 15
    assert sweep.steps[3] == 1
    assert 1 < sweep.steps[1] < 15


def test_derivatives_go_through_a_run_that_stops():
    def final_loss(lr, threshold):
        return linear_loss(members_below(lr, threshold)[0], DATA)

    lrs = torch.tensor([0.02, 0.05, 0.1], dtype=torch.float64)
    threshold = torch.tensor(0.6, dtype=torch.float64)
    steps = vmap(lambda lr: members_below(lr, threshold)[1].steps)(lrs)
    assert len(set(steps.tolist())) == 3
    expected = torch.stack(
        [
            grad(
                lambda lr, taken=taken: linear_loss(gd.train(STEP, INIT, DATA, INDEX[:taken], lr)[0], DATA)
            )(lr)
            for lr, taken in zip(lrs, steps, strict=True)
        ]
    )
    by_grad = torch.stack([grad(final_loss)(lr, threshold) for lr in lrs])
    torch.testing.assert_close(by_grad, expected, rtol=1e-11, atol=1e-12)
    batched = vmap(grad(final_loss), (0, None))(lrs, threshold)
    torch.testing.assert_close(batched, expected, rtol=1e-11, atol=1e-12)
    total = grad(lambda lrs: vmap(final_loss, (0, None))(lrs, threshold).sum())(lrs)
    torch.testing.assert_close(total, expected, rtol=1e-11, atol=1e-12)
    _, pushed = jvp(
        lambda lrs: vmap(final_loss, (0, None))(lrs, threshold), (lrs,), (torch.ones_like(lrs),)
    )
    torch.testing.assert_close(pushed, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("seconds", [0.0, 1e9])
@pytest.mark.parametrize("every", [1, 4])
def test_check_finite_does_not_look_beyond_the_end(monkeypatch, seconds, every):
    monkeypatch.setattr("gdfunc._train._drive._SEGMENT_SECONDS", seconds)
    index = torch.arange(12)[:, None]
    _, whole = gd.train(STEP, INIT, DATA, index, 0.05, record=("loss", "params"))
    arguments = (STEP, INIT, poisoned(7), index, 0.05)
    for at, check_finite in [(5, "loss"), (6, "all")]:
        end = whole.params["w"][at]

        def stop(carry, loss, end=end):
            return (carry["w"] == end).all()

        final, trajectory = gd.train(*arguments, every=every, stop=stop, check_finite=check_finite)
        assert (int(trajectory.steps), bool(trajectory.diverged)) == (at, False)
        assert final["w"].equal(end)
    with pytest.raises(gd.NonFiniteError, match="loss is not finite after step 7") as caught:
        gd.train(*arguments, every=every, stop=lambda carry, loss: loss < 0, check_finite="loss")
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
        gd.train(STEP, INIT, DATA, INDEX[:steps], 0.05, stop=lambda carry, loss: value(loss))


def test_no_steps_with_stop():
    final, trajectory = gd.train(STEP, INIT, DATA, INDEX[:0], 0.05, stop=lambda carry, loss: loss < 1e9)
    assert final["w"].equal(INIT["w"])
    assert (int(trajectory.steps), bool(trajectory.diverged), trajectory.loss.shape) == (0, False, (0,))


def test_stop_hides_no_wrong_step():
    def never(carry, loss):
        return loss < 0

    def run(step):
        return gd.train(step, INIT, DATA, INDEX, 0.05, stop=never)

    with pytest.raises(TypeError, match=r"step must return \(carry, loss\); got dict"):
        run(lambda params, batch, lr: params)
    with pytest.raises(ValueError, match=r"\['w'\] changed from float64 \(2,\) on cpu to float64 \(\)"):
        run(lambda params, batch, lr: (params | {"w": params["w"].sum()}, lr))
    with pytest.raises(ValueError, match=r"\['w'\] changed from float64 \(2,\) on cpu to float32 \(2,\)"):
        run(lambda params, batch, lr: (params | {"w": params["w"].float()}, lr))


def test_a_step_without_a_loss_can_be_stopped():
    def step(w, batch, lr):
        return w - lr, None

    final, trajectory = gd.train(
        step, torch.tensor(1.0), None, gd.full_batch(1, 10), 0.25, stop=lambda w, loss: w < 0.5
    )
    assert final == 0.25
    assert trajectory.steps == 3


@pytest.mark.parametrize("end", [5, 9, 13])
@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_an_interrupted_run_with_stop_goes_on_to_the_same_end(monkeypatch, seconds, end):
    monkeypatch.setattr("gdfunc._train._drive._SEGMENT_SECONDS", seconds)

    def interrupt(done, steps):
        if done >= 4:
            raise KeyboardInterrupt

    _, whole = gd.train(STEP, INIT, DATA, INDEX, 0.05, record=("loss", "params"))
    at_end = whole.params["w"][end]

    def stop(carry, loss):
        return (carry["w"] == at_end).all()

    with pytest.raises(gd.TrainingInterrupted) as caught:
        gd.train(STEP, INIT, DATA, INDEX, 0.05, stop=stop, progress=interrupt)
    stopped = caught.value
    assert stopped.step == int(stopped.trajectory.steps) == len(stopped.trajectory.loss) <= end
    assert stopped.state["w"].equal(whole.params["w"][stopped.step])
    assert stopped.trajectory.loss.equal(whole.loss[: stopped.step])
    if stopped.step < end:
        resumed, rest = gd.train(STEP, stopped.state, DATA, INDEX[stopped.step :], 0.05, stop=stop)
        assert resumed["w"].equal(at_end)
        assert int(rest.steps) == end - stopped.step


# What the backward pass keeps.


ADJOINTS = [*map(gd.adjoints.Checkpoint, (1, 4, 10**6, "sqrt")), gd.adjoints.Checkpoint(carries=3)]


@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
def test_checkpoints_change_no_value_and_no_derivative(adjoint, every):
    def run(lr, init, data, **options):
        final, trajectory = gd.train(
            STEP, init, data, INDEX[:14], lr, every=every, record=EVERYTHING, **options
        )
        return linear_loss(final, DATA), (final, trajectory)

    args = torch.tensor(0.05, dtype=torch.float64), INIT, DATA
    expected = grad(run, (0, 1, 2), has_aux=True)(*args)
    got = grad(functools.partial(run, adjoint=adjoint), (0, 1, 2), has_aux=True)(*args)
    for a, b in zip(gd._tree.leaves(got), gd._tree.leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
    one = torch.ones_like(args[0])
    _, expected = jvp(lambda lr: run(lr, *args[1:])[0], args[:1], (one,))
    _, got = jvp(lambda lr: run(lr, *args[1:], adjoint=adjoint)[0], args[:1], (one,))
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=0)


def size_of_graph(leaf):
    """How many nodes autograd keeps to differentiate this tensor."""
    found, waiting = set(), [leaf.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [before for before, _ in node.next_functions]
    return len(found)


@pytest.mark.parametrize("every", [1, 4])
def test_checkpoints_bound_what_a_run_keeps(monkeypatch, every):
    monkeypatch.setattr("gdfunc._train._drive._SEGMENT_SECONDS", 1e9)
    lr = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    index = gd.full_batch(12, 256)

    def kept(adjoint):
        return size_of_graph(gd.train(STEP, INIT, DATA, index, lr, every=every, adjoint=adjoint)[0]["w"])

    assert kept(gd.adjoints.Reverse()) > 256
    assert kept(gd.adjoints.Checkpoint("sqrt")) < 100
    assert kept(gd.adjoints.Checkpoint(16)) < 100


def test_checkpoints_go_with_stop():
    def final_loss(lr, **options):
        final, trajectory = gd.train(
            STEP, INIT, DATA, INDEX, lr, stop=lambda carry, loss: loss < 2.0, **options
        )
        return linear_loss(final, DATA), trajectory.steps

    lrs = torch.tensor([0.02, 0.1], dtype=torch.float64)
    expected, steps = vmap(grad(final_loss, has_aux=True))(lrs)
    got, same = vmap(
        grad(functools.partial(final_loss, adjoint=gd.adjoints.Checkpoint("sqrt")), has_aux=True)
    )(lrs)
    assert steps.tolist() == same.tolist()
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_warns_once(dtype):
    def loss_fn(w, batch):
        return ((w - 1) ** 2).sum()

    with pytest.warns(
        UserWarning, match=r"params is b?float16: a step below 2\^-\d+ of a weight"
    ) as caught:
        gd.train(gd.make_step(loss_fn), torch.zeros(2, dtype=dtype), None, gd.full_batch(1, 20), 0.1)
    assert len(caught) == 1
    assert caught[0].filename == __file__


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
    (
        {"step": lambda carry, batch, lr: (carry, lr), "init": {"w": INIT["w"], "n": 3}},
        TypeError,
        r"init\['n'\] is int, not a Tensor",
    ),
    ({"step": lambda carry, batch, lr: (carry, lr), "init": ()}, ValueError, "init has no tensor leaves"),
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
    (
        {"backend": "xla"},
        ValueError,
        "backend must be 'eager' or 'native' or 'inductor' or 'cudagraph' or 'auto'; got 'xla'",
    ),
    (
        {"record": ("loss", "theta")},
        ValueError,
        "record must name loss, params, lr, grad_norm, state or be a",
    ),
    ({"record": (lambda params, loss: loss,)}, ValueError, "has no name to record it under; pass {'name'"),
    ({"record": {"step": "loss"}}, ValueError, "'step' cannot name a record"),
    ({"step": lambda params, batch, lr: params}, TypeError, r"step must return \(carry, loss\); got dict"),
    (
        {"step": lambda params, batch, lr: STEP(params, batch, lr), "record": "grad_norm"},
        ValueError,
        "record='grad_norm' needs a gdfunc Step",
    ),
]


@pytest.mark.parametrize(("changed", "kind", "message"), BAD_CALLS)
def test_bad_calls_raise(changed, kind, message):
    arguments = {"step": STEP, "init": INIT, "data": DATA, "index": INDEX, "lr": 0.05} | changed
    with pytest.raises(kind, match=message):
        gd.train(**arguments)


def test_a_trajectory_is_a_tree():
    _, trajectory = gd.train(STEP, INIT, DATA, INDEX, 0.05, record=("loss", "params"))
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

    def run(data, **options):
        step = gd.make_step(lambda params, batch: linear_loss(params, (batch["x"], batch["y"])))
        return gd.train(step, INIT, data, gd.full_batch(len(x), steps=5), 0.1, **options)[0]

    expected = run(data)
    assert run(data, progress=change)["w"].equal(expected["w"])
