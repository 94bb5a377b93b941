"""Runs of a compiled backend: the numbers of the Python loop, compiled once, watched, stopped, resumed.

Compilations by Inductor take seconds, so that most tests share one body.
"""

import functools
import gc
import pickle
import re
import signal
import subprocess
import sys
import types
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gdfunc as gd
from gdfunc import _tree
from gdfunc._scan.backends import _inductor
from gdfunc._train._drive import segment_end
from gdfunc._train._plan import _GRAIN

from .assertions import assert_agrees, assert_same_bits
from .references import COMPILED, fingerprint, linear_data, linear_loss, normal, relative_error, storages
from .runs import MODELS, ctrl_c

DATA = linear_data(0, 12, 3)
INIT = {"w": normal(5, 3), "b": normal(6, 1)[0]}
STEP = gd.make_step(linear_loss)
RECORD = ("loss", "params")


def plan(steps, seed=0):
    """The same batches again and again: a long plan need not be drawn."""
    batches = gd.sample_batches(gd.random.key(seed), 12, 4, 60)
    return batches.repeat(-(-steps // 60), 1)[:steps].clone()


def run(steps=40, lr=0.05, init=INIT, data=DATA, step=STEP, backend="inductor", index=None, **options):
    """The run whose compiled loop most tests share."""
    index = plan(steps) if index is None else index
    return gd.train(step, init, data, index, lr, backend=backend, **{"record": RECORD} | options)


each = pytest.mark.parametrize("backend", ["eager", "inductor"])


# The same numbers.


@pytest.mark.long
@pytest.mark.parametrize("steps", [1, 4, 5, 9, 130])
def test_every_length_of_run_is_the_run_in_python(steps):
    assert_agrees(run(steps), run(steps, backend="eager"))


@each
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("options", [{}, {"stop": lambda carry, loss: loss < 1e9}])
def test_no_steps_give_the_start_and_an_empty_record(every, options, backend):
    final, trajectory = run(0, every=every, backend=backend, **options)
    assert_same_bits(final, INIT)
    assert trajectory.loss.shape == trajectory.step.shape == (0,)
    assert trajectory.params["w"].shape == (0, 3)


@pytest.mark.long
@each
def test_inputs_are_left_alone_and_outputs_are_the_callers_own(backend):
    index = plan(21)
    inputs = [*INIT.values(), *DATA, index]
    before = fingerprint(inputs)
    outputs = gd._tree.leaves(run(index=index, backend=backend))
    places = storages([*inputs, *outputs])
    assert len(set(places)) == len(places)
    first = fingerprint(outputs)
    run(index=index, lr=0.01, backend=backend)
    assert (fingerprint(inputs), fingerprint(outputs)) == (before, first)


@pytest.mark.long
@pytest.mark.usefixtures("no_segment_time")
@pytest.mark.parametrize("backend", ["eager", "native"])
def test_a_run_keeps_neither_a_graph_nor_tensors_beyond_its_record(backend):
    init = {name: leaf.clone().requires_grad_() for name, leaf in INIT.items()}
    ends, alive = [], []

    def watch(done, steps):
        ends.append(done)
        if len(ends) == 2 or done == steps:
            gc.collect()
            alive.append(sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()))

    record = {"nothing": lambda params, loss: {}}
    outputs = gd._tree.leaves(run(1000, init=init, backend=backend, record=record, progress=watch))
    assert all(leaf.grad_fn is None and not leaf.requires_grad for leaf in outputs)
    assert len(ends) > 2
    assert alive[-1] - alive[0] < 20


# Loops are compiled once.


@pytest.fixture
def compilations(monkeypatch):
    """The compilations by Inductor: one entry for each."""
    made, compile_ = [], _inductor._compile
    monkeypatch.setattr(_inductor, "_compile", lambda *args: made.append(None) or compile_(*args))
    return made


@pytest.mark.long
def test_another_lr_seed_data_step_or_length_compiles_nothing(traces, compilations, monkeypatch):
    run(40)
    traces.clear()
    compilations.clear()
    run(40, lr=0.01)
    run(40, lr=torch.tensor(0.01))
    run(40, lr=torch.linspace(0.1, 0.0, 40))
    run(index=plan(40, seed=1))
    run(40, data=linear_data(7, 12, 3))
    run(40, init={"w": normal(8, 3), "b": normal(9, 1)[0]})
    for steps in (4, 5, 41, 301):
        run(steps)
    monkeypatch.setattr("gdfunc._train._drive._SEGMENT_SECONDS", 0.0)
    run(50)
    run(51, progress=lambda done, steps: None)
    assert not traces
    for _ in range(3):
        run(40, step=gd.make_step(lambda params, batch: linear_loss(params, batch)))
    assert len(traces) == 2  # a new trace is made twice
    assert not compilations


# Segments.

GRAINS = st.sampled_from([1, _GRAIN])


@given(st.integers(0, 500), st.integers(1, 40), GRAINS, st.lists(st.integers(1, 50), min_size=1))
def test_segments_tile_a_run(total, every, grain, sizes):
    first, ends = 0, [0]
    whole = total - total % every
    while first < total:
        blocks = grain * sizes[len(ends) % len(sizes)]
        last = segment_end(first, blocks, every, total, grain)
        assert first < last <= total
        assert last == total or last % every == 0
        if first < whole:
            assert last <= whole
            size = (last - first) // every
            assert size >= grain or (first == 0 and last == whole)
            assert size < blocks + grain
        else:
            assert (first, last) == (whole, total)
        # So that each block runs alike wherever a run was interrupted:
        assert first % (grain * every) == 0 or first == whole
        first = last
        ends.append(last)
    assert ends == sorted(set(ends))


@pytest.mark.parametrize(
    ("backend", "seconds_a_step", "longest"),
    [("inductor", 1.0, 4), ("inductor", 1e-3, 100), ("eager", 1.0, 1)],
)
def test_a_slow_step_makes_short_segments(monkeypatch, backend, seconds_a_step, longest):
    """With a clock that goes on by so much a step."""
    ends, now = [0], [0.0]

    def clock():
        now[0] += elapsed[0]
        return now[0]

    elapsed = [0.0]
    original = segment_end

    def timed(first, blocks, every, total, grain):
        last = original(first, blocks, every, total, grain)
        elapsed[0] = seconds_a_step * (last - first)
        return last

    monkeypatch.setattr("gdfunc._train._drive.segment_end", timed)
    monkeypatch.setattr("gdfunc._train._drive.time", types.SimpleNamespace(perf_counter=clock))
    monkeypatch.setattr("gdfunc._train._drive._ENTRY_SECONDS", 1.0)
    run(400, backend=backend, progress=lambda done, steps: ends.append(done))
    lengths = [last - first for first, last in pairwise(ends)]
    assert sum(lengths) == 400
    # The first segment may trace and compile, so that only the third one knows the pace.
    assert max(lengths[2:-1]) <= longest
    assert max(lengths[2:]) < longest + _GRAIN


@each
@pytest.mark.parametrize("steps", [40, 41, 43])
def test_segments_change_no_bit(monkeypatch, steps, backend):
    expected = run(steps, backend=backend)
    for seconds in (0.0, 1e9):
        monkeypatch.setattr("gdfunc._train._drive._SEGMENT_SECONDS", seconds)
        assert_same_bits(run(steps, backend=backend), expected)


@pytest.mark.long
@each
@pytest.mark.parametrize("cut", [0, 1, 4, 6, 20, 36, 39, 42])
def test_a_run_in_two_parts_is_the_run(cut, backend):
    index = plan(42)
    final, whole = run(index=index, backend=backend)
    middle, first = run(index=index[:cut], backend=backend)
    resumed, second = run(index=index[cut:], init=middle, backend=backend)
    joined = {
        name: gd._tree.cat([getattr(first, name), getattr(second, name)]) for name in ("loss", "params")
    }
    del whole.step
    assert_agrees((resumed, gd.Trajectory(**joined)), (final, whole))
    if backend == "eager" or cut % _GRAIN == 0:
        assert_same_bits((resumed, joined), (final, vars(whole)))


# Watching and stopping.


@pytest.mark.usefixtures("no_segment_time")
def test_progress_of_a_compiled_run_is_told_after_every_segment():
    calls = []
    run(50, progress=lambda done, steps: calls.append((done, steps)))
    assert calls == [(done, 50) for done in (16, 32, 36, 40, 44, 50)]


@pytest.mark.long
@pytest.mark.usefixtures("nothing_traced")
def test_a_compilation_tells_that_it_goes_on(monkeypatch, capfd):
    def told_so_far(*args, **options):
        seen.append(capfd.readouterr())
        raise NotImplementedError("the rest of it\nand how")

    seen = []
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx_inner", told_so_far)
    message = r"cannot compile this loop \(NotImplementedError: the rest of it\); use"
    with pytest.raises(gd.BackendError, match=message):
        run()
    assert re.fullmatch(r"gdfunc: compiling a loop of \d+ operations with Inductor …", seen[0].err)
    assert re.fullmatch(r" \d+\.\d s\n", capfd.readouterr().err)
    assert seen[0].out == ""


@pytest.mark.usefixtures("no_segment_time", "ctrl_c_is_heard")
@pytest.mark.parametrize(
    ("backend", "steps", "after", "every"),
    [
        *[("inductor", *case, 1) for case in ((40, 1), (41, 20), (43, 32))],
        *[("eager", *case) for case in ((40, 1, 1), (43, 20, 2))],
    ],
)
def test_ctrl_c_keeps_all_steps_done_and_the_rest_goes_on_to_the_same_bits(backend, steps, after, every):
    index, options = plan(steps), {"backend": backend}
    final, whole = run(index=index, **options)
    with pytest.raises(gd.TrainingInterrupted, match="stopped after") as caught:
        run(index=index, progress=ctrl_c(after), every=every, **options)
    stopped = caught.value
    assert isinstance(stopped, KeyboardInterrupt)
    assert after <= stopped.step < steps
    assert_same_bits(stopped.state, run(index=index[: stopped.step], **options)[0])
    assert stopped.trajectory.loss.equal(whole.loss[: stopped.step : every])
    resumed, rest = run(index=index[stopped.step :], init=stopped.state, **options)
    assert_same_bits(resumed, final)
    assert rest.loss.equal(whole.loss[stopped.step :])


@pytest.mark.long
@pytest.mark.usefixtures("no_segment_time", "ctrl_c_is_heard")
@pytest.mark.parametrize("stop", [None, lambda carry, loss: loss < 0])
@pytest.mark.parametrize(
    ("backend", "steps", "after", "every"),
    [("auto", 120, 110, 1), ("native", 43, 20, 2), ("eager", 43, 21, 3), ("eager", 5, 5, 1)],
)
def test_an_interrupted_run_is_resumed_to_the_bits_of_the_whole(backend, steps, after, every, stop):
    """Also where `auto` would run the rest in Python, because it is short."""
    options = {"backend": backend, "every": every, "stop": stop, "lr": torch.linspace(0.1, 0.01, steps)}
    expected = run(steps, **options)
    with pytest.raises(gd.TrainingInterrupted) as caught:
        run(steps, progress=ctrl_c(after), **options)
    stopped = pickle.loads(pickle.dumps(caught.value))
    assert_same_bits(run(steps, resume=stopped, **options), expected)
    assert_same_bits(stopped.state, caught.value.state)  # nothing was written into what it holds


@pytest.mark.usefixtures("no_segment_time", "ctrl_c_is_heard")
def test_resuming_another_run_is_refused():
    with pytest.raises(gd.TrainingInterrupted) as caught:
        run(40, backend="eager", progress=ctrl_c(9))
    stopped = caught.value
    resumed = functools.partial(run, backend="eager", resume=stopped)
    for steps, options, message in [
        (5, {}, "resume is of another run: it was stopped after 9 steps"),
        (40, {"every": 3}, "with every=3 has no segment's end"),
        (40, {"record": ("loss",)}, "but record= names others"),
        (40, {"init": {"w": normal(5, 3)}}, "resume.state"),
        (40, {"backend": "native"}, "resume is of a run on backend='eager'; got backend='native'"),
        (40, {"resume": ValueError()}, "resume is ValueError, not TrainingInterrupted"),
    ]:
        with pytest.raises((TypeError, ValueError), match=message):
            resumed(steps, **options)
    with pytest.raises(ValueError, match="outside of vmap"):
        torch.func.vmap(lambda lr: resumed(40, lr=lr))(torch.ones(2))


@pytest.mark.usefixtures("ctrl_c_is_heard")
def test_ctrl_c_after_the_last_step_keeps_the_run(monkeypatch):
    cat = _tree.cat

    def interrupted(trees):
        monkeypatch.setattr(_tree, "cat", cat)
        signal.raise_signal(signal.SIGINT)

    expected = run(12, backend="eager")
    monkeypatch.setattr(_tree, "cat", interrupted)
    with pytest.raises(gd.TrainingInterrupted) as caught:
        run(12, backend="eager")
    assert caught.value.step == 12
    caught.value.trajectory.loss.zero_()  # it is the caller's own
    assert_same_bits(run(12, backend="eager", resume=caught.value), expected)


@pytest.mark.long
@pytest.mark.usefixtures("ctrl_c_is_heard")
@pytest.mark.parametrize(("at", "done"), [(1, 0), (2, 16), (4, 36)])
def test_ctrl_c_within_a_segment_gives_the_state_before_it(monkeypatch, at, done):
    run(40)
    monkeypatch.setattr("gdfunc._train._drive._SEGMENT_SECONDS", 0.0)
    loop, calls = _inductor._loop, []

    def interrupted(*args, **options):
        calls.append(None)
        results = loop(*args, **options)
        if len(calls) == at:
            signal.raise_signal(signal.SIGINT)
        return results

    monkeypatch.setattr(_inductor, "_loop", interrupted)
    with pytest.raises(gd.TrainingInterrupted) as caught:
        run(40)
    assert caught.value.step == done
    assert_same_bits(caught.value.state, run(index=plan(40)[:done])[0])
    assert len(caught.value.trajectory.step) == done


REPEATED = """
import torch, gdfunc as gd
problem = gd.problems.linear_regression(torch.arange(60.0).sin().view(20, 3), torch.arange(20.0).cos())
index = gd.epoch_batches(gd.random.key(7), 20, 4, 10)
step = gd.make_step(problem.loss_fn, gd.adam())
run = lambda lr: gd.train(step, step.init(problem.params), problem.data, index, lr)[1].loss
print(torch.func.vmap(run)(torch.tensor([0.01, 0.1, 0.2])).numpy().tobytes().hex())
"""


@pytest.mark.long
def test_a_run_in_another_process_has_the_same_bits(capsys):
    exec(REPEATED, {})
    here, call = capsys.readouterr().out, [sys.executable, "-c", REPEATED]
    assert subprocess.run(call, capture_output=True, check=True, text=True).stdout == here != ""


# Compiled runs of four models.


def convolution():
    params, _, loss_fn = MODELS["logistic"]()
    kernel, x = 0.3 * normal(11, 2, 1, 3), normal(12, 40, 1, 4)

    def loss(params, batch):
        rows = torch.nn.functional.conv1d(batch[0], params["kernel"]).tanh().flatten(1)
        return loss_fn(params["out"], (rows, batch[1]))

    return {"kernel": kernel, "out": params}, (x, (x.sum((1, 2)) > 0).double()), loss


@pytest.mark.long
@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize(("dtype", "share"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("model", [*MODELS.values(), convolution])
def test_200_compiled_steps_are_those_of_eager_to_a_share_of_the_movement(model, dtype, share, backend):
    params, data, loss_fn = gd._tree.map(lambda leaf: leaf.to(dtype), model()[:2]) + model()[2:]
    step, index = gd.make_step(loss_fn, gd.momentum(0.9)), gd.sample_batches(gd.random.key(0), 40, 10, 200)
    ends = [
        gd._tree.leaves(gd.train(step, step.init(params), data, index, 0.02, backend=how)[0].params)
        for how in (backend, "eager")
    ]
    for got, expected, start in zip(*ends, gd._tree.leaves(params), strict=True):
        assert relative_error(got, expected, start) <= share
