"""Runs on disk: one that is stopped and called again has the bits of one that was not."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from typing import NamedTuple

import pytest
import torch
from torch.func import vmap

import gdfunc as gd
from gdfunc._train import _drive

from .assertions import assert_same
from .disk import filling
from .references import linear_data, linear_loss, normal
from .tables import STEPS, TABLE, make, start_of

pytest.importorskip("safetensors")
PARAMS = {"w": normal(0, 3), "b": normal(1, 1)[0]}
DATA = linear_data(3, 40, 3)
INDEX = gd.sample_batches(gd.random.key(1), 40, 4, 60)


@pytest.fixture(autouse=True)
def _short_segments(monkeypatch):
    monkeypatch.setattr(_drive, "_SEGMENT_SECONDS", 0.0)


each_backend = pytest.mark.parametrize("backend", ["eager", "native", "auto"])


def run(path=None, until=None, step=None, index=INDEX, lr=0.05, data=None, init=None, **options):
    """A run that is written to a path, and stopped once so many steps are done."""

    def stop(done, total):
        if until is not None and done >= until:
            raise KeyboardInterrupt

    step = step or gd.make_step(linear_loss, gd.adam())
    init = step.init(PARAMS) if init is None else init
    data = DATA if data is None else data
    return gd.train(step, init, data, index, lr, progress=stop, checkpoint_to=path, **options)


def stopped(path, until=20, **options):
    with pytest.raises(gd.TrainingInterrupted) as caught:
        run(path, until, **options)
    return caught.value


@pytest.mark.long
@each_backend
def test_a_run_that_is_called_again_goes_on_to_the_same_bits(backend, tmp_path):
    options = {"backend": backend, "record": ("loss", "params", "grad_norm"), "every": 3}
    path = tmp_path / "run"
    error = stopped(path, **options)
    assert 0 < error.step < 60
    assert error.__notes__ == [f"gdfunc: {path} holds the run after {error.step} steps"]
    assert_same(run(path, **options), run(**options))
    assert_same(run(path, until=0, **options), run(**options))  # is done: no step is taken


# "auto" with so many steps that it leaves Python.
eager_and_slow = pytest.mark.parametrize(
    ("backend", "steps"),
    [
        ("eager", 12),
        *[pytest.param(*row, marks=pytest.mark.slow) for row in (("native", 24), ("auto", 120))],
    ],
)


@pytest.mark.filterwarnings("ignore::gdfunc.StuckWarning")  # of searches that compare different batches
@eager_and_slow
@pytest.mark.parametrize("name", STEPS)
def test_every_method_goes_on_to_the_same_bits(name, backend, steps, tmp_path):
    row = STEPS[name]
    step = row.make(linear_loss, DATA, **row.hyperparameters)
    data = torch.arange(40) if row.has_data else DATA
    options = {
        "step": step,
        "init": step.init(PARAMS),
        "data": data,
        "index": INDEX.repeat(2, 1)[:steps],
        "backend": backend,
    }
    options |= {"record": ("loss", "state")}
    stopped(tmp_path / "run", until=1, **options)
    assert_same(run(tmp_path / "run", **options), run(**options))


@eager_and_slow
@pytest.mark.parametrize("name", TABLE)
def test_every_transformation_goes_on_to_the_same_bits(name, backend, steps, tmp_path):
    row = TABLE[name]
    step = gd.make_step(lambda params, batch: sum((leaf**2).sum() for leaf in params.values()), make(row))
    options = {
        "step": step,
        "init": step.init(start_of(row)),
        "data": (),
        "index": torch.zeros(steps, 0).long(),
        "backend": backend,
    }
    stopped(tmp_path / "run", until=1, **options)
    assert_same(run(tmp_path / "run", **options), run(**options))


class Pair(NamedTuple):
    w: torch.Tensor
    b: torch.Tensor


def test_containers_of_the_users_own_come_back(tmp_path):
    def loss_fn(params, batch):
        return linear_loss(params._asdict(), batch)

    init = Pair(**PARAMS)
    options = {"step": gd.make_step(loss_fn), "init": init}
    stopped(tmp_path / "run", **options)
    assert_same(run(tmp_path / "run", **options), run(**options))
    options["record"] = ("params",)
    with pytest.raises(
        gd.CheckpointError, match=r"records\.0\.params is a Pair, a class that is not known"
    ):
        run(tmp_path / "other", **options)


@pytest.mark.long
@each_backend
def test_buffers_keys_stops_and_evaluations_come_back(backend, tmp_path):
    def loss_fn(params, batch, buffers, key):
        noise = gd.random.normal(key[0], (3,), dtype=torch.float64)
        loss = linear_loss(params | {"w": params["w"] + 0.01 * noise}, batch)
        return loss, {"mean": 0.9 * buffers["mean"] + 0.1 * loss}

    step = gd.make_step(gd.stateful(loss_fn), gd.adam())
    zero = {"mean": torch.zeros((), dtype=torch.float64)}
    options = {"step": step, "init": step.init(PARAMS, zero, gd.random.key(2)), "backend": backend}
    options |= {"evaluate": {"error": lambda carry: (carry.params["w"] ** 2).sum()}, "evaluate_every": 2}
    options |= {"stop": gd.stops.patience("error", 2, mode="max")}
    stopped(tmp_path / "run", until=1, **options)
    assert_same(run(tmp_path / "run", **options), run(**options))


def test_a_finished_run_is_made_longer(tmp_path):
    run(tmp_path / "run", index=INDEX[:30])
    assert_same(run(tmp_path / "run"), run())


def other(**changed):
    return {"step": gd.make_step(linear_loss, gd.adam()), "record": ("loss",), "every": 2} | changed


def changed_at(i, j):
    index = INDEX.clone()
    index[i, j] = (index[i, j] + 1) % 40
    return index


OTHERS = {
    "transformation": (
        other(step=gd.make_step(linear_loss, gd.momentum(0.5))),
        "its step is make_step.*adam",
    ),
    "record": (
        other(record=("loss", "lr")),
        r"its record is \['loss'\], but that of this run is \['loss', 'lr'\]",
    ),
    "every": (other(every=4), "its every is 2, but that of this run is 4"),
    "data": (other(data=tuple(2 * leaf for leaf in DATA)), "its data is not that of this run: pass"),
    "index": (
        other(index=changed_at(3, 1)),
        "its index is not that of this run up to the step where it stopped",
    ),
    "lr": (other(lr=0.06), "its lr is not that of this run up to the step"),
    "backend": (other(backend="native"), "resume is of a run on backend='eager'"),
    "stop": (
        other(stop=lambda carry, loss: loss < 0),
        "its stop is None, but that of this run is <lambda>",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_run_is_refused_by_name(name, tmp_path):
    changed, words = OTHERS[name]
    path = tmp_path / "run"
    stopped(path, backend="eager", **{key: value for key, value in other().items() if key != "backend"})
    before = path.read_bytes()
    with pytest.raises(ValueError, match=words):
        run(path, **changed)
    assert path.read_bytes() == before


def halved(params, batch):
    return linear_loss(params, batch) / 2


halved.__name__ = linear_loss.__name__  # as after an edit of the function between two processes


def ridge(weight):
    def loss_fn(params, batch):
        return linear_loss(params, batch) + weight * (params["w"] ** 2).sum()

    return gd.make_step(loss_fn, gd.adam())


def evaluations(factor):
    def accuracy(carry):
        return factor * carry.params["w"].sum()

    return {"evaluate": accuracy, "evaluate_every": 2}


def recorded(factor):
    def size(carry, loss):
        return factor * carry.params["w"].norm()

    return {"record": ("loss", size)}


def drawn(factor):
    def draw(step):
        x, y = (leaf[INDEX[step % 60]] for leaf in DATA)
        return factor * x, y

    return {"data": draw, "index": 60}


SAME_NAMES = {
    "loss": ({}, {"step": gd.make_step(halved, gd.adam())}, "its loss at the carry in the file was"),
    "a value that the loss closes over": (
        {"step": ridge(0.1)},
        {"step": ridge(0.2)},
        "its loss at the carry in the file was",
    ),
    "evaluation": (evaluations(1.0), evaluations(1.1), "its accuracy at the carry in the file was"),
    "record": (recorded(1.0), recorded(1.1), "its size at the carry in the file was"),
    "data of a function": (drawn(1.0), drawn(1.1), "its loss at the carry in the file was"),
    "patience": (
        {"stop": gd.stops.patience("loss", 100)},
        {"stop": gd.stops.patience("loss", 200)},
        r"stop is patience\(quantity='loss', patience=100, .* but that of this run is .*patience=200",
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("backend", ["eager", "native"])
@pytest.mark.parametrize("name", SAME_NAMES)
def test_what_has_the_same_name_but_other_values_is_refused(name, backend, tmp_path):
    first, second, words = SAME_NAMES[name]
    stopped(tmp_path / "run", backend=backend, **first)
    with pytest.raises(gd.CheckpointError, match=words):
        run(tmp_path / "run", backend=backend, **second)
    assert_same(run(tmp_path / "run", backend=backend, **first), run(backend=backend, **first))


def test_a_loss_that_is_another_at_each_call_goes_on(tmp_path):
    def loss_fn(params, batch):
        return linear_loss(params, batch) * torch.rand((), generator=generator)

    generator = torch.Generator().manual_seed(0)
    options = {"step": gd.make_step(loss_fn, gd.adam()), "backend": "eager"}
    stopped(tmp_path / "run", **options)
    _, trajectory = run(tmp_path / "run", **options)
    assert trajectory.loss.shape == (60,)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"v": torch.ones(3)}, r"state\.w is in it, not in like"),
        ({"w": torch.ones(2)}, r"state\.w is float32\[3\] in it, float32\[2\] in like"),
        ({"w": torch.ones(3).double()}, r"state\.w is float32\[3\] in it, float64\[3\] in like"),
    ],
)
def test_other_parameters_are_refused_by_name(params, words, tmp_path):
    step = gd.make_step(lambda params, batch: sum((leaf**2).sum() for leaf in params.values()))
    options = {"step": step, "data": (), "index": torch.zeros(12, 0).long()}
    stopped(tmp_path / "run", until=1, init={"w": torch.ones(3)}, **options)
    with pytest.raises(gd.CheckpointError, match=words):
        run(tmp_path / "run", init=params, **options)


def test_a_plan_may_differ_after_the_step_where_the_run_stopped(tmp_path):
    error = stopped(tmp_path / "run", until=10)
    assert error.step < 59
    index = changed_at(59, 0)
    assert_same(run(tmp_path / "run", index=index), run(index=index))


def test_a_loss_that_shows_its_address_goes_on(tmp_path):
    class Loss:
        def __call__(self, params, batch):
            return linear_loss(params, batch)

    losses = Loss(), Loss()  # one in each process
    assert repr(losses[0]) != repr(losses[1])
    stopped(tmp_path / "run", step=gd.make_step(losses[0], gd.adam()))
    assert_same(run(tmp_path / "run", step=gd.make_step(losses[1], gd.adam())), run())


def test_files_and_interruptions_are_not_mixed_up(tmp_path):
    error = stopped(tmp_path / "run")
    with pytest.raises(ValueError, match=r"both resume= and .*run hold a run"):
        run(tmp_path / "run", resume=error)
    gd.save(tmp_path / "run", {"w": torch.ones(2)})
    with pytest.raises(gd.CheckpointError, match=r"it holds no run of gd\.train"):
        run(tmp_path / "run")


def test_options_without_a_file_are_refused():
    with pytest.raises(ValueError, match="checkpoint_every and checkpoint_keep need checkpoint_to"):
        run(checkpoint_every=3)
    with pytest.raises(ValueError, match="checkpoint_every must be an int >= 1"):
        run("run", checkpoint_every=0)


@pytest.mark.parametrize("argument", ["checkpoint_to", "log"])
def test_a_run_inside_a_transformation_writes_and_logs_nothing(argument, tmp_path):
    given = {"checkpoint_to": tmp_path / "run", "log": lambda step, numbers: None}[argument]

    def final(lr):
        return gd.train(gd.make_step(linear_loss), PARAMS, DATA, INDEX, lr, **{argument: given})

    with pytest.raises(ValueError, match=f"{argument} .*inside vmap, grad, jvp or jit"):
        vmap(final)(torch.tensor([0.1, 0.2]))


@pytest.mark.long
def test_files_are_written_every_so_many_steps_and_the_last_are_kept(tmp_path):
    path = tmp_path / "run.safetensors"
    run(path, backend="eager", checkpoint_every=1, checkpoint_keep=3)
    numbered = sorted(file.name for file in tmp_path.iterdir())
    assert numbered == [
        *(f"run.{step:012}.safetensors" for step in kept_steps(tmp_path)),
        "run.safetensors",
    ]
    assert len(numbered) == 4
    last = tmp_path / numbered[0]
    os.replace(last, path)  # go back to an earlier step
    assert_same(run(path, backend="eager"), run(backend="eager"))


def kept_steps(folder):
    return sorted(int(file.name.split(".")[1]) for file in folder.glob("run.0*"))


@pytest.mark.parametrize("name", ["m*.run", "a[1].run", "what?", "sp ace é.run", ".hidden"])
def test_a_name_is_no_pattern(name, tmp_path):
    others = [tmp_path / f"{stem}.{step:012}.run" for stem in ("m", "mine", "a1") for step in range(3)]
    for file in others:
        file.touch()
    left = tmp_path / f".{name}.abc.tmp"  # of a process that was killed
    left.mkdir()
    run(tmp_path / name, checkpoint_every=10, checkpoint_keep=2)
    assert not left.exists()
    assert all(file.exists() for file in others)
    assert len([*tmp_path.iterdir()]) == len(others) + 3


def test_a_handler_that_ends_the_process_leaves_the_file(tmp_path):
    def end(step, numbers):
        if step >= 20:
            sys.exit(3)

    with pytest.raises(SystemExit) as caught:
        run(tmp_path / "run", log=end)
    assert f"{tmp_path / 'run'} holds the run after" in caught.value.__notes__[0]
    assert_same(run(tmp_path / "run"), run())


def test_an_error_before_a_file_is_written_tells_of_none(tmp_path):
    with (
        pytest.warns(UserWarning, match=r"goes on without a file .*the folder .*no is not there"),
        pytest.raises(gd.TrainingInterrupted) as caught,
    ):
        run(tmp_path / "no" / "run", until=1)
    assert not hasattr(caught.value, "__notes__")


def test_an_error_in_a_run_tells_where_its_file_is(tmp_path):
    def fail(step, numbers):
        if step >= 10:
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine") as caught:
        run(tmp_path / "run", log=fail)
    assert "holds the run after" in caught.value.__notes__[0]
    assert_same(run(tmp_path / "run"), run())


WRITES = ("mkdtemp", "fsync", "replace", "rmtree")


@pytest.mark.parametrize("times", [1, 2], ids=["once", "twice"])
@pytest.mark.parametrize("name", WRITES)
def test_an_interruption_while_a_file_is_written_loses_nothing(name, times, tmp_path, monkeypatch):
    room = {"mkdtemp": tempfile, "rmtree": shutil}.get(name, os)
    original, calls = getattr(room, name), []

    def interrupted(*args, **kwargs):
        calls.append(name)
        if 4 < len(calls) <= 4 + times:  # the second is pressed while the first is answered
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(room, name, interrupted)
        with pytest.raises(KeyboardInterrupt) as caught:
            run(tmp_path / "run", checkpoint_every=5)
    assert (type(caught.value) is gd.TrainingInterrupted) is (times == 1)
    assert_same(run(tmp_path / "run"), run())
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_many_segments_give_the_same_records(monkeypatch):
    monkeypatch.setattr(_drive, "_SEGMENTS", 3)
    options = {"evaluate": lambda carry: carry.params["w"].sum(), "evaluate_every": 2, "every": 2}
    options = options | {"evaluate": {"total": options["evaluate"]}, "backend": "eager"}
    joined = run(**options)
    monkeypatch.undo()
    assert_same(joined, run(**options))


def test_a_path_that_cannot_be_written_is_told_at_the_start(tmp_path):
    with pytest.raises(FileNotFoundError):
        run(tmp_path / "none" / "run")


def at_step(number, fill):
    """A log function that fills the disk."""
    return lambda step, numbers: fill(1024) if step == number else None


@pytest.mark.long
def test_a_full_disk_costs_a_file_and_not_the_run(tmp_path):
    path = tmp_path / "run"
    with filling() as fill, pytest.warns(UserWarning, match="the run goes on without a file of step"):
        error = stopped(path, until=30, checkpoint_every=1, log=at_step(10, fill), backend="eager")
    assert gd.load(path)["step"] == 9
    assert error.step == 30
    assert error.__notes__ == [f"gdfunc: {path} holds the run after 9 steps"]
    assert_same(run(path, backend="eager"), run(backend="eager"))


def test_a_disk_that_is_full_at_the_end_costs_no_result(tmp_path):
    path = tmp_path / "run"
    with filling() as fill, pytest.warns(UserWarning, match="the run goes on without a file of step 60"):
        got = run(path, log=at_step(60, fill), backend="eager")
    assert_same(got, run(backend="eager"))
    assert gd.load(path)["step"] == 1


@pytest.mark.long
def test_the_file_of_another_process_is_not_overwritten(tmp_path):
    path, other = tmp_path / "run", tmp_path / "other"
    run(other, lr=0.01, backend="eager")

    def write(step, numbers):
        if step == 10:
            os.replace(other, path)

    with pytest.warns(UserWarning, match="run was written by another process since; give each run a file"):
        got = run(path, log=write, backend="eager", checkpoint_every=5)
    assert_same(got, run(backend="eager"))
    assert_same(run(path, lr=0.01, backend="eager"), run(lr=0.01, backend="eager"))


def test_another_torch_is_told(tmp_path):
    path = tmp_path / "run"
    stopped(path)
    gd.save(path, gd.load(path) | {"torch": "1.0"})
    with pytest.warns(UserWarning, match=r"was written under torch 1\.0, and this is 2"):
        run(path)


CHILD = """
import os, signal, sys
import torch
import gdfunc as gd
from gdfunc._train import _drive
from tests.test_long_runs import run

_drive._SEGMENT_SECONDS = 0.0

path, number = sys.argv[1], int(sys.argv[2])


def end(done, numbers):
    if done >= 20:
        os.kill(os.getpid(), number)


run(path, backend="eager", checkpoint_every=1, log=end)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_run_goes_on_in_another_process(number, tmp_path):
    path = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-c", CHILD, path, str(int(number))], capture_output=True, text=True
    )
    assert done.returncode != 0
    if number != signal.SIGKILL:
        assert "TrainingInterrupted: stopped after 2" in done.stderr
        assert f"{path} holds the run after 2" in done.stderr
    assert gd.load(path)["step"] >= 19
    assert_same(run(path, backend="eager"), run(backend="eager"))
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_log_gets_the_numbers_of_every_segment():
    rows = []
    options = {
        "record": {
            "loss": "loss",
            "size": lambda carry, loss: {"w": carry.params["w"].norm(), "all": carry.params},
        }
    }
    options |= {"evaluate": {"gap": lambda carry: (carry.params["w"] ** 2).sum()}, "backend": "eager"}
    _, trajectory = run(log=lambda step, numbers: rows.append((step, numbers)), **options)
    assert rows[-1][0] == 60
    for step, numbers in rows:
        assert set(numbers) == {"lr", "loss", "size.w", "size.all.b", "gap"}
        assert numbers["loss"] == trajectory.loss[step - 1].item()
        assert numbers["gap"] == trajectory.gap[step - 1].item()
        assert numbers["lr"] == 0.05
    with pytest.raises(TypeError, match="log is str"):
        run(log="file.csv")


def test_progress_shows_the_loss_and_begins_where_the_run_does(tmp_path, capsys):
    pytest.importorskip("tqdm")
    error = stopped(tmp_path / "run")
    step = gd.make_step(linear_loss, gd.adam())
    init = step.init(PARAMS)
    gd.train(step, init, DATA, INDEX, 0.05, progress=True, checkpoint_to=tmp_path / "run")
    shown = capsys.readouterr().err
    assert f"| {error.step}/60 " in shown
    assert "60/60" in shown
    assert "loss=" in shown
    assert "lr=0.05" in shown


@pytest.mark.long
@pytest.mark.parametrize("backend", ["eager", "native"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_raises_skips_or_stops(bad, backend):
    x, y = (leaf.clone() for leaf in DATA)
    x[7] = bad
    index = INDEX.clone()
    index[index == 7] = 8
    index[30, 0] = 7  # step 30 alone reads it
    before = run(data=(x, y), index=index[:30], backend=backend)[0]
    with pytest.raises(gd.NonFiniteError) as caught:
        run(data=(x, y), index=index, backend=backend, check_finite="all")
    assert caught.value.step == 30
    assert_same(caught.value.state, before)
    ended, trajectory = run(data=(x, y), index=index, backend=backend, stop=lambda carry, loss: loss < 0)
    assert trajectory.diverged
    assert_same(ended, before)
    step = gd.make_step(linear_loss, gd.apply_if_finite(gd.adam()))
    options = {"data": (x, y), "step": step, "backend": backend}
    skipped = run(index=index[:31], **options)[0]
    until = run(index=index[:30], **options)[0]
    assert_same(skipped.params, until.params)
    assert_same(skipped.opt_state.inner, until.opt_state.inner)
    assert (int(skipped.opt_state.consecutive), int(skipped.opt_state.total)) == (1, 1)
    later = run(index=index, **options)[0].opt_state
    assert (int(later.consecutive), int(later.total)) == (0, 1)
