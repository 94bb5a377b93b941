"""An impure function is refused by name and leaves everything as found, and auto gives what eager gives."""

import datetime
import functools
import io
import itertools
import os
import random
import time
import types
import uuid
import warnings
from collections import deque

import numpy as np
import pytest
import torch

import gdfunc as gd
from gdfunc import BackendError
from gdfunc._scan.trace import _trace

STEPS = torch.arange(1000.0)  # as many as auto traces for
COUNT = 0


class Holder:
    """An object that counts and keeps."""

    def __init__(self):
        self.count, self.last, self.log, self.table = 0, None, [], {}

    def step(self):
        self.count += 1
        return self.count


@pytest.fixture(autouse=True)
def generators_as_before():
    numpy, python, of_torch = np.random.get_state(), random.getstate(), torch.get_rng_state()  # noqa: NPY002
    yield
    np.random.set_state(numpy)  # noqa: NPY002
    random.setstate(python)
    torch.set_rng_state(of_torch)


def drawing_from_numpy():
    return np.random.randn, lambda: np.random.get_state(legacy=False)["state"]["pos"]  # noqa: NPY002


def drawing_from_python():
    return random.random, lambda: hash(random.getstate())


def drawing_from_a_numpy_generator():
    generator = np.random.default_rng(0)
    return lambda: generator.normal(), lambda: str(generator.bit_generator.state)


def drawing_from_a_random_state():
    generator = np.random.RandomState(0)
    return lambda: generator.normal(), lambda: generator.get_state(legacy=False)["state"]["pos"]


def drawing_from_a_python_generator():
    generator = random.Random(0)
    return lambda: generator.random(), lambda: hash(generator.getstate())


def drawing_from_torch():
    return lambda: torch.randn(3), lambda: torch.get_rng_state().tolist()


def drawing_from_a_torch_generator():
    generator = torch.Generator().manual_seed(0)
    return lambda: torch.randn(3, generator=generator), lambda: generator.get_state().tolist()


def counting_in_an_attribute():
    holder = Holder()
    return holder.step, lambda: holder.count


def counting_in_a_global():
    def f():
        global COUNT
        COUNT += 1
        return COUNT

    return f, lambda: COUNT


def counting_in_a_closure():
    count = 0

    def f():
        nonlocal count
        count += 1
        return count

    return f, lambda: count


def counting_in_an_array():
    counts = np.zeros(2)

    def f():
        counts[1] += 1
        return float(counts[1])

    return f, counts.tolist


def counting_in_a_class():
    class Counter:
        count = 0

    def f():
        Counter.count += 1
        return Counter.count

    return f, lambda: Counter.count


def counting_in_a_function():
    def f():
        f.count += 1
        return f.count

    f.count = 0
    return f, lambda: f.count


def appending_to_a_list():
    holder = Holder()

    def f():
        holder.log.append(1.0)
        return len(holder.log)

    return f, lambda: [*holder.log]


def appending_a_tensor():
    log = []

    def f():
        log.append(torch.ones(3))
        return len(log)

    return f, lambda: len(log)


def appending_to_a_deque():
    log = deque([0.0], maxlen=3)
    return lambda: log.append(1.0) or sum(log), lambda: [*log]


def adding_to_a_set():
    known = set()
    return lambda: known.add(len(known)) or len(known), lambda: {*known}


def growing_a_dict():
    table = {}
    return lambda: table.setdefault(len(table), 0) or len(table), lambda: dict(table)


def popping_from_a_dict():
    table = {i: i for i in range(5000)}
    return lambda: table.popitem()[1], lambda: [*table]


def keeping_the_last_value():
    holder = Holder()

    def f():
        before, holder.last = holder.last, torch.ones(3) if holder.last is None else holder.last + 1
        return 0.0 if before is None else before

    return f, lambda: holder.last


def toggling():
    holder = types.SimpleNamespace(on=False)

    def f():
        holder.on = not holder.on
        return float(holder.on)

    return f, lambda: holder.on


PUT_BACK = [
    drawing_from_numpy,
    drawing_from_python,
    drawing_from_a_numpy_generator,
    drawing_from_a_random_state,
    drawing_from_a_python_generator,
    drawing_from_torch,
    drawing_from_a_torch_generator,
    counting_in_an_attribute,
    counting_in_a_global,
    counting_in_a_closure,
    counting_in_an_array,
    counting_in_a_class,
    counting_in_a_function,
    appending_to_a_list,
    appending_a_tensor,
    appending_to_a_deque,
    adding_to_a_set,
    growing_a_dict,
    popping_from_a_dict,
    toggling,
]
quiet = pytest.mark.filterwarnings("ignore:.*traced on every call", "ignore:backend='auto'")


def body(f):
    return lambda c, x: (c + f() * 0.5 + x, c[0])


def run(f, backend, **options):
    return gd.scan(body(f), torch.zeros(3), STEPS, backend=backend, **options)


def seeded(make):
    global COUNT
    COUNT = 0
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)
    torch.manual_seed(0)
    return make()


@quiet
@pytest.mark.parametrize("make", PUT_BACK)
def test_an_impure_function_is_refused_by_name_and_leaves_everything_as_found(make):
    f, state = seeded(make)
    before = state()
    for options in ({"backend": "native"}, {"backend": "eager", "adjoint": gd.adjoints.Checkpoint(10)}):
        with pytest.raises(BackendError, match=r"draws from|changes|writes into|from outside") as caught:
            run(f, **options)
        assert caught.value.untouched
        assert "backend='eager'" in str(caught.value)
        assert state() == before


@quiet
@pytest.mark.parametrize("make", [*PUT_BACK, keeping_the_last_value])
def test_auto_gives_of_an_impure_function_what_eager_gives(make):
    results = []
    for backend in ("eager", "auto"):
        f, state = seeded(make)
        carry, ys = run(f, backend)
        results.append((carry.tolist(), ys.tolist(), str(state())))
    assert results[0] == results[1]


def test_a_tensor_kept_for_the_next_call_is_refused_if_it_is_read_there():
    holder = Holder()

    def f(c, x):
        before, holder.last = holder.last, c
        return c + x if before is None else before + c, c

    with pytest.raises(BackendError, match=r"f changes f's closure variable `holder`.last"):
        gd.scan(f, torch.zeros(3), STEPS, backend="native")
    assert holder.last is None


def a_generator():
    i = 0
    while True:
        yield i
        i += 1


ADVANCED = {
    "iterator of a list": lambda: iter([*range(5000)]),
    "iterator of a range": lambda: iter(range(5000)),
    "iterator of a dict": lambda: iter(dict.fromkeys(range(5000))),
    "enumerate": lambda: (i for i, _ in enumerate(range(5000))),
    "zip": lambda: map(sum, zip(range(5000), range(5000), strict=True)),
    "generator": a_generator,
    "count": itertools.count,
    "cycle": lambda: itertools.cycle([1, 2, 3]),
    "chain": lambda: itertools.chain(range(5000)),
    "file": lambda: io.StringIO("1\n" * 5000),
}


@quiet
@pytest.mark.parametrize("name", ADVANCED)
def test_an_iterator_that_a_trace_advanced_is_an_error_under_auto_too(name):
    for backend in ("native", "auto"):
        iterator = ADVANCED[name]()
        with pytest.raises(BackendError, match=r"f advances .*cannot be put back") as caught:
            run(lambda iterator=iterator: float(next(iterator)), backend)
        assert not caught.value.untouched


CLOCKS = {
    "time": time.time,
    "perf_counter": time.perf_counter,
    "monotonic_ns": lambda: time.monotonic_ns() * 1e-9,
    "datetime": lambda: datetime.datetime.now().timestamp(),
    "urandom": lambda: int.from_bytes(os.urandom(6), "big"),
    "uuid": lambda: uuid.uuid4().int % 2**40,
    "system random": lambda: random.SystemRandom().random(),
    "generator made inside": lambda: np.random.default_rng().normal(),
    "tensor of a generator made inside": lambda: torch.tensor(
        np.random.default_rng().normal(size=3)
    ).float(),
}


@quiet
@pytest.mark.parametrize("name", CLOCKS)
def test_a_clock_is_refused_at_the_users_line(name):
    f = CLOCKS[name]
    with pytest.raises(
        BackendError, match=r"something else when it is called again at .*test_purity.py:\d+"
    ):
        run(f, "native")


def test_a_body_that_draws_and_then_branches_gets_eagers_first_draw():
    def f(c, x):
        step = np.random.randn()  # noqa: NPY002
        return (c + step if c.sum() > -1e9 else c), c

    results = []
    for backend in ("eager", "auto"):
        np.random.seed(0)  # noqa: NPY002
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results.append(gd.scan(f, torch.zeros(1), STEPS, backend=backend)[0])
    assert torch.equal(*results)


@quiet
def test_noise_of_numpy_is_noise_in_every_step_of_a_run():
    """Drawn once for the whole run, its deviation was 2e-5 in place of 0.1."""

    def loss_fn(w, batch):
        return (w * (w / 2 + np.random.randn() * 0.1)).sum()  # noqa: NPY002

    np.random.seed(0)  # noqa: NPY002
    index = gd.full_batch(1, 1000)
    run = functools.partial(gd.train, gd.make_step(loss_fn), torch.zeros(1), torch.ones(1), index, 0.5)
    _, trajectory = run(record="params", backend="auto")
    assert trajectory.params[-500:].std() > 0.03
    with pytest.raises(BackendError, match="f draws from NumPy's generator"):
        run(backend="native")


@pytest.mark.parametrize("form", [lambda x: float(f"{x:.3f}"), str, repr, print, "{}".format])
def test_formatting_a_traced_tensor_is_refused_at_the_users_line(form):
    with pytest.raises(BackendError, match=r"formats or prints a tensor at .*test_purity.py:\d+"):
        gd.scan(lambda c, x: (c + x, [c, form(x)][0]), torch.zeros(3), STEPS, backend="native")


def test_a_cache_may_be_filled_and_a_flag_set_once():
    holder = Holder()

    @functools.cache
    def half(of):
        return of / 2

    def f(c, x):
        holder.last = "seen"
        if "table" not in holder.table:
            holder.table["table"] = torch.arange(3.0), half(1.0)
        return c + holder.table["table"][0] * x, c

    got = gd.scan(f, torch.zeros(3), STEPS, backend="native")
    assert holder.table == {} or all(type(t) is torch.Tensor for t in holder.table["table"][:1])
    expected = gd.scan(f, torch.zeros(3), STEPS)
    torch.testing.assert_close(got, expected)
    assert (holder.last, holder.table["table"][1]) == ("seen", 0.5)


def test_a_train_traces_once_a_call_and_twice_where_it_is_new(monkeypatch):
    records, record = [], _trace._record
    monkeypatch.setattr(_trace, "_record", lambda *args: records.append(None) or record(*args))
    monkeypatch.setattr("gdfunc._train._drive._SEGMENT_SECONDS", 0.0)
    lock, segments = io.BytesIO(), []

    def loss_fn(w, batch):
        return (w * w * (lock is not None)).sum()

    index = gd.full_batch(1, 200)
    for _ in range(2):
        records.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            options = {"backend": "native", "progress": lambda done, steps: segments.append(done)}
            gd.train(gd.make_step(loss_fn), torch.ones(1), torch.ones(1), index, 0.1, **options)
        assert len(segments) > 10
        assert len(records) == 2
