"""An impure function is refused by name and leaves everything as found, and auto gives what eager gives."""

import ctypes
import datetime
import functools
import io
import itertools
import os
import random
import time
import types
import uuid
from array import array
from collections import deque

import numpy as np
import pytest
import torch

import gdfunc as gd
from gdfunc import BackendError

STEPS = torch.arange(100.0)  # as many as auto traces for
COUNT = 0


class Holder:
    """An object that counts and keeps."""

    def __init__(self):
        self.count, self.last = 0, None


@pytest.fixture(autouse=True)
def generators_as_before():
    numpy, python, of_torch = np.random.get_state(), random.getstate(), torch.get_rng_state()  # noqa: NPY002
    yield
    np.random.set_state(numpy)  # noqa: NPY002
    random.setstate(python)
    torch.set_rng_state(of_torch)


def drawing(draw, state, *generators):
    return functools.partial(draw, *generators), functools.partial(state, *generators)


def drawing_from_torch(*generators):
    read = generators[0].get_state if generators else torch.get_rng_state
    return lambda: torch.randn(3, generator=(*generators, None)[0]), lambda: read().tolist()


def counting_in(holder):
    """Count in the attribute of an object, a class or a function."""

    def f():
        holder.count += 1
        return holder.count

    holder.count = 0
    return f, lambda: holder.count


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


def changing(container, change):
    """Change a container; its state is a copy, in order."""
    return lambda: change(container), lambda: str(container)


def keeping_the_last_value():
    holder = Holder()

    def f():
        before, holder.last = holder.last, torch.ones(3) if holder.last is None else holder.last + 1
        return 0.0 if before is None else before

    return f, lambda: holder.last


def counting_at_0(held):
    def f():
        held[0] = (held[0] + 1) % 200
        return held[0] % 3

    return f, lambda: str(held)


def counting_in_c(number):
    def f():
        number.value += 1
        return number.value % 3

    return f, lambda: number.value


def counting_behind(rows):
    holder = Holder()

    def f():
        assert rows
        holder.count += 1
        return holder.count % 3

    return f, lambda: holder.count


def toggling():
    holder = types.SimpleNamespace(on=False)

    def f():
        holder.on = not holder.on
        return float(holder.on)

    return f, lambda: holder.on


PUT_BACK = {  # an impure function, and a reading of the state that it changes
    "numpy": lambda: drawing(np.random.randn, lambda: str(np.random.get_state())),  # noqa: NPY002
    "python": lambda: drawing(random.random, random.getstate),
    "numpy generator": lambda: drawing(
        np.random.Generator.normal, lambda g: str(g.bit_generator.state), np.random.default_rng(0)
    ),
    "random state": lambda: drawing(
        lambda g: g.normal(), lambda g: str(g.get_state()), np.random.RandomState(0)
    ),
    "python generator": lambda: drawing(random.Random.random, random.Random.getstate, random.Random(0)),
    "torch": drawing_from_torch,
    "torch generator": lambda: drawing_from_torch(torch.Generator().manual_seed(0)),
    "count in an attribute": lambda: counting_in(Holder()),
    "count in a class": lambda: counting_in(type("Counter", (), {})),
    "count in a function": lambda: counting_in(lambda: None),
    "count in a global": counting_in_a_global,
    "count in a closure": counting_in_a_closure,
    "count in an array": counting_in_an_array,
    "list": lambda: changing([], lambda log: log.append(1.0) or len(log)),
    "list of tensors": lambda: changing([], lambda log: log.append(torch.ones(3)) or len(log)),
    "deque": lambda: changing(deque([0.0], maxlen=3), lambda log: log.append(1.0) or sum(log)),
    "set": lambda: changing(set(), lambda known: known.add(len(known)) or len(known)),
    "growing dict": lambda: changing({}, lambda table: table.setdefault(len(table), 0) or len(table)),
    "popped dict": lambda: changing({i: i for i in range(5000)}, lambda table: table.popitem()[1]),
    "flag": toggling,
    "bytes": lambda: counting_at_0(bytearray(2)),
    "array": lambda: counting_at_0(array("i", [0])),
    "array of objects": lambda: counting_at_0(np.array([0, None])),
    "number in C": lambda: counting_in_c(ctypes.c_int(0)),
    "count behind many objects": lambda: counting_behind([(i,) for i in range(9000)]),
}
quiet = pytest.mark.filterwarnings("ignore:.*traced on every call")


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


CHECKPOINTED = {"backend": "eager", "adjoint": gd.adjoints.Checkpoint(10)}  # which traces too


@quiet
@pytest.mark.parametrize("name", PUT_BACK)
def test_an_impure_function_is_refused_by_name_and_leaves_everything_as_found(name):
    f, state = seeded(PUT_BACK[name])
    before = state()
    for options in ({"backend": "native"}, {"backend": "inductor"}, CHECKPOINTED):
        with pytest.raises(BackendError, match=r"draws from|changes|writes into|from outside") as caught:
            run(f, **options)
        assert caught.value.untouched
        assert "backend='eager'" in str(caught.value)
        assert state() == before


@quiet
@pytest.mark.parametrize("make", [*PUT_BACK.values(), keeping_the_last_value])
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


ADVANCED = {
    "iterator of a list": lambda: iter([*range(5000)]),
    "iterator of a range": lambda: iter(range(5000)),
    "iterator of a dict": lambda: iter(dict.fromkeys(range(5000))),
    "enumerate": lambda: (i for i, _ in enumerate(range(5000))),
    "zip": lambda: map(sum, zip(range(5000), range(5000), strict=True)),
    "generator": lambda: (i for i in itertools.count()),
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


@quiet
def test_a_generator_that_is_held_and_not_advanced_is_no_obstacle():
    def endless(lock):
        while True:
            yield lock

    held = endless(io.BytesIO())
    next(held)
    run(lambda: float(held is not None), "native")


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
    with pytest.raises(BackendError, match=r"something else when .* called again at .*test_purity.py:\d+"):
        run(CLOCKS[name], "native")


@pytest.mark.parametrize(
    "clock",
    [
        lambda: float(time.time() < 0),
        lambda: float(datetime.datetime.now().year < 0),
        lambda: float(uuid.uuid4().int < 0),
        lambda: float(os.urandom(1)[0] > 255),
    ],
)
@quiet
def test_a_clock_that_decides_is_refused_though_two_traces_agree(clock):
    with pytest.raises(BackendError, match=r"f reads a clock in .*<lambda>"):
        run(clock, "native")
    assert run(clock, "auto")[0].equal(run(clock, "eager")[0])


@quiet
def test_a_body_that_draws_and_then_branches_gets_eagers_first_draw():
    def f(c, x):
        step = np.random.randn()  # noqa: NPY002
        return (c + step if c.sum() > -1e9 else c), c

    results = []
    for backend in ("eager", "auto"):
        np.random.seed(0)  # noqa: NPY002
        results.append(gd.scan(f, torch.zeros(1), STEPS, backend=backend)[0])
    assert torch.equal(*results)


@pytest.mark.parametrize("form", [lambda x: float(f"{x:.3f}"), str, repr, print, "{}".format])
def test_formatting_a_traced_tensor_is_refused_at_the_users_line(form):
    with pytest.raises(BackendError, match=r"formats or prints a tensor at .*test_purity.py:\d+"):
        gd.scan(lambda c, x: (c + x, [c, form(x)][0]), torch.zeros(3), STEPS, backend="native")


@pytest.mark.long
@pytest.mark.usefixtures("no_segment_time")
@pytest.mark.filterwarnings("ignore:.*traced on every call")
def test_a_train_traces_twice_in_all_its_segments_together(traces):
    lock, segments = io.BytesIO(), []

    def loss_fn(w, batch):
        return (w * w * (lock is not None)).sum()

    index = gd.full_batch(1, 200)
    options = {"backend": "native", "progress": lambda done, steps: segments.append(done)}
    for _ in range(2):
        traces.clear()
        gd.train(gd.make_step(loss_fn), torch.ones(1), torch.ones(1), index, 0.1, **options)
        assert len(segments) > 10
        assert len(traces) == 2
