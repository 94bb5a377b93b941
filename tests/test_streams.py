"""Sources of batches: a run over one is that over its batches in memory, and says what went wrong."""

import gc
import itertools
import signal
import threading
import time

import pytest
import torch
from torch.func import vmap
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import gdfunc as gd
from gdfunc._scan import _cost
from gdfunc._train import _drive, _stream

from .assertions import assert_same
from .references import linear_data, linear_loss, normal

PARAMS = {"w": normal(0, 3), "b": normal(1, 1)[0]}
DATA = linear_data(3, 40, 3)
INDEX = gd.sample_batches(gd.random.key(1), 40, 4, 60)
STEP = gd.make_step(linear_loss, gd.adam())
each_backend = pytest.mark.parametrize("backend", ["eager", "native", "auto"])


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    deadline = time.monotonic() + 10
    while ours() and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert not ours()


def ours():
    return [thread for thread in threading.enumerate() if thread.name.startswith("gdfunc")]


def run(data=DATA, index=INDEX, lr=0.05, **options):
    return gd.train(STEP, STEP.init(PARAMS), data, index, lr, **options)


def batches():
    return (gd.take(DATA, row) for row in INDEX)


class Loader:
    """An iterable of the batches that goes on from a state."""

    def __init__(self):
        self.position = 0

    def __iter__(self):
        while self.position < len(INDEX):
            self.position += 1
            yield gd.take(DATA, INDEX[self.position - 1])

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


class Samples(Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, i):
        return tuple(leaf[i].clone() for leaf in DATA)


class Stream(IterableDataset):
    def __iter__(self):
        return batches()


def loader(data, **options):
    return DataLoader(data, generator=torch.Generator(), **options)


SOURCES = {
    "generator": (batches, 60),
    "iterator of a list": (lambda: iter(list(batches())), 60),
    "arrays": (lambda: ((x.numpy(), y.numpy()) for x, y in batches()), 60),
    "loader": (
        lambda: loader(Samples(), batch_sampler=INDEX.tolist()),
        60,
    ),
    "workers": (
        lambda: loader(Stream(), batch_size=None, num_workers=1),
        60,
    ),
    "with a state": (Loader, 60),
    "data set": (Samples, INDEX),
    "function": (lambda: lambda t: gd.take(DATA, INDEX[t]), 60),
}


@pytest.mark.long
@each_backend
@pytest.mark.parametrize("name", SOURCES)
def test_a_run_over_a_source_is_that_over_its_batches_in_memory(name, backend):
    make, index = SOURCES[name]
    options = {"record": ("loss", "params"), "every": 3, "backend": backend}
    final, trajectory = run(make(), index, **options)
    expected, records = run(**options)
    torch.testing.assert_close((final, vars(trajectory)), (expected, vars(records)))


@each_backend
@pytest.mark.parametrize("name", [name for name in SOURCES if name not in ("workers", "generator")])
def test_short_segments_change_no_bit(name, backend, monkeypatch):
    make, index = SOURCES[name]
    whole = run(make(), index, backend=backend)
    monkeypatch.setattr(_stream, "_BYTES", 1)
    monkeypatch.setattr(_drive, "_SEGMENT_SECONDS", 0.0)
    assert_same(run(make(), index, backend=backend), whole)


@pytest.mark.parametrize("name", ["with a state", "data set", "function"])
@each_backend
def test_a_source_that_can_goes_on_to_the_same_bits(name, backend, tmp_path, monkeypatch):
    monkeypatch.setattr(_drive, "_SEGMENT_SECONDS", 0.0)
    make, index = SOURCES[name]

    def stop(done, total):
        if done >= 20:
            raise KeyboardInterrupt

    whole = run(make(), index, backend=backend)
    for file in (None, tmp_path / "run"):
        with pytest.raises(gd.TrainingInterrupted) as caught:
            run(make(), index, backend=backend, progress=stop, checkpoint_to=file)
        again = {"resume": caught.value} if file is None else {"checkpoint_to": file}
        assert caught.value.step < 60
        assert_same(run(make(), index, backend=backend, **again), whole)


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_torchdatas_loader_goes_on_in_the_middle_of_an_epoch(tmp_path, monkeypatch):
    stateful_dataloader = pytest.importorskip("torchdata.stateful_dataloader")
    monkeypatch.setattr(_drive, "_SEGMENT_SECONDS", 0.0)

    def shuffled():
        generator = torch.Generator().manual_seed(3)
        loader = stateful_dataloader.StatefulDataLoader
        return loader(TensorDataset(*DATA), batch_size=4, shuffle=True, generator=generator)

    def stop(done, total):
        if done >= 4:
            raise KeyboardInterrupt

    with pytest.raises(gd.TrainingInterrupted):
        run(shuffled(), 10, checkpoint_to=tmp_path / "run", progress=stop)
    assert_same(run(shuffled(), 10, checkpoint_to=tmp_path / "run"), run(shuffled(), 10))


@pytest.mark.parametrize("name", ["generator", "loader", "iterator of a list"])
def test_a_source_that_cannot_go_on_says_so(name, tmp_path):
    make, index = SOURCES[name]
    with pytest.raises(ValueError, match="checkpoint_to needs a source that can go on from a step"):
        run(make(), index, checkpoint_to=tmp_path / "run")
    with pytest.raises(gd.TrainingInterrupted) as caught:
        run(make(), index, progress=interrupt)
    with pytest.raises(ValueError, match="resume needs a source that can go on from a step"):
        run(make(), index, resume=caught.value)


def interrupt(done, total):
    raise KeyboardInterrupt


def broken(kind):
    """Batches of which the one of step 7 is another."""
    for t, batch in enumerate(batches()):
        if t == 7:
            x, y = batch
            if kind == "error":
                raise OSError("the disk is gone")
            yield {"ragged": (x[:3], y[:3]), "dtype": (x.float(), y), "tree": {"x": x}, "text": "no"}[kind]
        else:
            yield batch


BROKEN = {
    "error": (OSError, "the disk is gone"),
    "ragged": (
        ValueError,
        r"the batch of step 7 has float64\[3, 3\] at \[0\], but the first has float64\[4, 3\]",
    ),
    "dtype": (ValueError, r"the batch of step 7 has float32\[4, 3\] at \[0\], but the first has float64"),
    "tree": (ValueError, "the batch of step 7 does not have the structure of the first batch"),
    "text": (TypeError, "the batch of step 7 is str"),
}


@each_backend
@pytest.mark.parametrize("kind", BROKEN)
def test_a_bad_batch_is_named_by_its_step(kind, backend):
    error, words = BROKEN[kind]
    with pytest.raises(error, match=words) as caught:
        run(broken(kind), 60, backend=backend)
    assert kind != "error" or "where data made the batch of step 7" in caught.value.__notes__[0]


def test_data_that_end_early_say_where():
    with pytest.raises(ValueError, match="data ended after 5 batches, but the run has 60 steps; for"):
        run(itertools.islice(batches(), 5), 60)
    with pytest.raises(ValueError, match="data ended after 0 batches"):
        run(iter([]), 60)
    passes = itertools.chain.from_iterable(itertools.repeat(list(itertools.islice(batches(), 5)), 3))
    torch.testing.assert_close(run(passes, 15)[0], run(index=INDEX[:5].repeat(3, 1))[0])


def test_the_order_of_keys_may_change_from_batch_to_batch():
    def loss_fn(params, batch):
        return linear_loss(params, (batch["x"], batch["y"]))

    def turned():
        for t, (x, y) in enumerate(batches()):
            y = y[:, None].expand(-1, 3)  # of the shape of x, so that the order alone tells them apart
            yield {"x": x, "y": y} if t % 2 == 0 else {"y": y, "x": x}

    x, y = DATA
    step = gd.make_step(lambda params, batch: loss_fn(params, {**batch, "y": batch["y"][:, 0]}))
    data = {"x": x, "y": y[:, None].expand(-1, 3)}
    assert_same(gd.train(step, PARAMS, turned(), 60, 0.05), gd.train(step, PARAMS, data, INDEX, 0.05))


def test_a_source_may_use_the_memory_of_a_batch_for_the_next():
    def one_buffer(convert):
        buffer = gd.tree.map(torch.clone, gd.take(DATA, INDEX[0]))
        for batch in batches():
            gd.tree.map(lambda to, leaf: to.copy_(leaf), buffer, batch)
            yield convert(buffer)

    whole = run(batches(), 60)
    assert_same(run(one_buffer(lambda batch: batch), 60), whole)
    assert_same(run(one_buffer(lambda batch: tuple(leaf.numpy() for leaf in batch)), 60), whole)


@pytest.mark.parametrize("until", [0, 20])
def test_a_source_may_change_the_state_that_it_gave(until, tmp_path, monkeypatch):
    class Living(Loader):
        """A source whose state is an object that it goes on changing."""

        def __init__(self):
            self.state = {"position": 0}

        position = property(
            lambda self: self.state["position"], lambda self, new: self.state.update(position=new)
        )

        def state_dict(self):
            return self.state

    def stop(done, total):
        if done >= until:
            raise KeyboardInterrupt

    monkeypatch.setattr(_drive, "_SEGMENT_SECONDS", 0.0)
    options = {"backend": "eager", "checkpoint_to": tmp_path / "run"}
    with pytest.raises(gd.TrainingInterrupted):
        run(Living(), 60, progress=stop, **options)
    assert_same(run(Living(), 60, **options), run(batches(), 60, backend="eager"))


def test_a_run_that_is_interrupted_before_its_first_step_goes_on():
    def loss_fn(params, batch):
        raise KeyboardInterrupt

    step = gd.make_step(loss_fn, gd.adam())
    with pytest.raises(gd.TrainingInterrupted) as caught:
        gd.train(step, step.init(PARAMS), Loader(), 60, 0.05, backend="eager")
    assert caught.value.step == 0
    resumed = run(Loader(), 60, backend="eager", resume=caught.value)
    assert_same(resumed, run(batches(), 60, backend="eager"))


def test_batches_that_require_a_gradient_keep_no_graph():
    final, trajectory = run(((x.clone().requires_grad_(), y) for x, y in batches()), 60)
    assert not any(leaf.requires_grad for leaf in [*gd.tree.leaves(final), trajectory.loss])


@pytest.mark.parametrize(
    "options",
    [{"lr": -1.0}, {"log": 3}, {"checkpoint_keep": 3}, {"backend": "none"}, {"record": "none"}],
    ids=str,
)
def test_arguments_that_are_refused_leave_no_thread(options):
    with pytest.raises((ValueError, TypeError)) as caught:
        run(Loader(), 60, **options)
    threads = [thread.name for thread in threading.enumerate()]
    assert not any(name.startswith("gdfunc") for name in threads), (threads, caught)


@pytest.mark.long
def test_an_interruption_does_not_wait_for_a_source_that_does_not_answer(monkeypatch):
    monkeypatch.setattr(_stream, "_PATIENCE", 0.2)
    monkeypatch.setattr(_drive, "_SEGMENT_SECONDS", 0.0)
    released = threading.Event()

    def silent():
        yield from itertools.islice(batches(), 9)
        signal.raise_signal(signal.SIGINT)  # the main thread gets it, while this one waits
        released.wait(20)
        yield from batches()

    started = time.monotonic()
    with pytest.raises(gd.TrainingInterrupted) as caught:
        run(silent(), 60, backend="eager")
    taken = time.monotonic() - started
    released.set()
    assert taken < 10
    assert caught.value.step <= 9


def test_an_endless_source_is_read_no_further_than_the_run():
    read = []

    def endless():
        for t in itertools.count():
            read.append(t)
            yield gd.take(DATA, INDEX[t % 60])

    assert_same(run(endless(), 60), run(batches(), 60))
    assert read == list(range(60))


def test_rows_of_a_segment_stay_small(monkeypatch):
    held = []
    monkeypatch.setattr(_stream, "_BYTES", 5 * 4 * 4 * 8)  # five batches
    original = _stream.Reader.rows

    def rows(self, first, last):
        held.append(last - first)
        return original(self, first, last)

    monkeypatch.setattr(_stream.Reader, "rows", rows)
    run(batches(), 60, backend="native")
    assert max(held) <= 8  # four, and the rest that is no segment of its own


def test_a_run_that_cannot_be_traced_goes_on_with_the_same_batches(monkeypatch):
    monkeypatch.setattr(_cost, "TRACE", 0.0)

    def loss_fn(params, batch):
        return linear_loss(params, batch) * float(batch[0].sum() > -1e9)  # cannot be traced

    step = gd.make_step(loss_fn)
    final, _ = gd.train(step, PARAMS, batches(), 60, 0.05)
    assert_same(final, gd.train(step, PARAMS, DATA, INDEX, 0.05, backend="eager")[0])


def test_what_is_not_finite_is_found_in_the_batch_that_was_read():
    def spoiled():
        for t, (x, y) in enumerate(batches()):
            yield (x.index_fill(0, torch.tensor([2]), float("nan")), y) if t == 9 else (x, y)

    with pytest.raises(gd.NonFiniteError) as caught:
        run(spoiled(), 60, check_finite="all")
    assert caught.value.step == 9
    assert caught.value.sample == "data[0][2]"


def test_a_source_inside_a_transformation_is_refused():
    with pytest.raises(ValueError, match="data is a source of batches, which is read outside of vmap"):
        vmap(lambda lr: run(batches(), 60, lr)[0].params["w"])(torch.ones(2))
    inside = vmap(lambda lr: run(lambda t: gd.take(DATA, INDEX[t]), 60, lr)[0].params["w"])
    assert inside(torch.full((2,), 0.05)).shape == (2, 3)


REFUSED = {
    "a tuple": (DATA, 60, TypeError, "index is 60, a number of steps.*but data is tuple"),
    "a list": (list(batches()), 60, TypeError, "index is 60, a number of steps.*but data is list"),
    "no data": (None, 60, TypeError, "index is 60, a number of steps.*but data is NoneType"),
    "a plan": (batches(), INDEX, TypeError, "data is generator, which gives batches one after another"),
    "a loader": (
        DataLoader(TensorDataset(*DATA)),
        INDEX,
        TypeError,
        "let index be their number, or pass loader.dataset",
    ),
    "negative": (batches(), -1, ValueError, "index must be an int >= 0"),
    "none": (batches(), 0, ValueError, "index is 0 steps"),
    "rows out of range": (Samples(), INDEX + 30, IndexError, "data has samples 0 to 39"),
    "no step": (lambda: DATA, 60, TypeError, r"data takes \(\), not \(step\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_go_together_is_told(name):
    data, index, error, words = REFUSED[name]
    with pytest.raises(error, match=words):
        run(data, index)
