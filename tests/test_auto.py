"""The default backend: what it chooses, that it says so, and that it changes no answer."""

import functools
import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gdfunc as gd
from gdfunc._scan import _cost, backends

from .assertions import assert_agrees, assert_same_bits
from .references import normal
from .runs import MODELS, ctrl_c

PROBLEM = gd.problems.linear_regression(normal(0, 40, 3), normal(1, 40))


@pytest.fixture
def ran(caplog):
    """What ran, as the log tells: steps and backend of each loop."""
    caplog.set_level(logging.DEBUG, "gdfunc")

    def read():
        ours = [record.getMessage() for record in caplog.records if record.name == "gdfunc"]
        found = [message.split(":")[0].split(" steps on ") for message in ours]
        caplog.clear()
        return [(int(steps), backend) for steps, backend in found]

    return read


WEIGHTS = normal(2, 2, 2)


def run(steps=200, loss_fn=PROBLEM.loss_fn, **options):
    index = gd.sample_batches(gd.random.key(0), 40, 8, steps)
    options = {"lr": 0.05, "data": PROBLEM.data, "record": ("loss", "params")} | options
    return gd.train(gd.make_step(loss_fn), PROBLEM.params, index=index, **options)


def uncovered(params, batch):
    """A loss with an operation that native does not cover."""
    return PROBLEM.loss_fn(params, batch) + 0.1 * params["w"].logcumsumexp(0).square().sum()


def untraceable(params, batch):
    loss = PROBLEM.loss_fn(params, batch)
    return loss if loss > 1e-9 else loss / 2


@pytest.mark.parametrize(
    ("steps", "loss_fn", "backend"),
    [
        (99, PROBLEM.loss_fn, None),
        (100, PROBLEM.loss_fn, "native"),
        (5_000, PROBLEM.loss_fn, "native"),
        (99, uncovered, None),
        (100, uncovered, "replay"),
        (100, untraceable, "eager"),
    ],
)
def test_auto_is_eager_below_100_steps_then_native_then_replay(ran, steps, loss_fn, backend):
    got = run(steps, loss_fn)
    chosen = ran()
    assert {name for _, name in chosen} == ({backend} if backend else set())
    assert backend in (None, "eager") or sum(length for length, _ in chosen) == steps
    expected = run(steps, loss_fn, backend="eager")
    (assert_same_bits if backend in (None, "eager") else assert_agrees)(got, expected)


def test_auto_takes_inductor_where_native_refuses_and_the_saved_calls_are_worth_it(
    monkeypatch,
):
    lengths = []

    def compiled(body, *loop):
        lengths.append(loop[3])
        return backends.replay(body, *loop)

    monkeypatch.setitem(backends.RUNNERS, "inductor", compiled)
    run(300, uncovered)
    assert lengths == []
    monkeypatch.setattr(_cost, "INDUCTOR", (0.0, 299 * _cost.OPERATION))
    run(300, uncovered)
    assert sum(lengths) == 300
    lengths.clear()
    run(300, PROBLEM.loss_fn)
    assert lengths == []


def test_every_repeat_of_a_run_is_decided_alike(ran, monkeypatch):
    monkeypatch.setattr("gdfunc._train._drive._SEGMENT_SECONDS", 0.0)
    first, chosen = run(), ran()
    for _ in range(3):
        assert_same_bits(run(), first)
        assert ran() == chosen


@pytest.mark.usefixtures("no_segment_time", "ctrl_c_is_heard")
@pytest.mark.parametrize("loss_fn", [PROBLEM.loss_fn, uncovered, untraceable])
def test_a_resumed_run_keeps_the_backend_of_its_first_part(ran, loss_fn):
    expected = run(120, loss_fn)
    before = {backend for _, backend in ran()}
    with pytest.raises(gd.TrainingInterrupted) as caught:
        run(120, loss_fn, progress=ctrl_c(90))
    assert_same_bits(run(120, loss_fn, resume=caught.value), expected)
    assert {backend for _, backend in ran()} == before


@pytest.mark.usefixtures("no_segment_time")
def test_an_eager_run_is_traced_once_in_vain(monkeypatch):
    tries = []
    trace = gd._scan._loop.trace
    monkeypatch.setattr(
        gd._scan._loop, "trace", lambda *given, **how: tries.append(0) or trace(*given, **how)
    )
    run(300, untraceable, every=130)
    assert len(tries) == 1


@pytest.mark.usefixtures("nothing_said")
def test_a_loss_of_ten_seconds_is_said_once_at_the_users_line_with_its_remedy(monkeypatch, recwarn):
    run(300, untraceable)
    run(300, uncovered)
    assert not recwarn.list
    monkeypatch.setattr(_cost, "PYTHON_STEP", 10 / 300)
    monkeypatch.setattr(_cost, "OPERATION", 10 / 300)
    monkeypatch.setattr(_cost, "INDUCTOR", (float("inf"), 0.0))
    said = {
        untraceable: r"about 10 s.*f decides on the value of a tensor at .*return loss if.*torch.where",
        uncovered: r"about \d+ s.*'native' does not cover aten.logcumsumexp",
    }
    for loss_fn, message in said.items():
        with pytest.warns(gd.PerformanceWarning, match=f"backend='auto' .*{message}") as caught:
            run(300, loss_fn)
        assert [warning.filename for warning in caught] == [__file__]
        run(300, loss_fn)
    assert not [each for each in recwarn.list if each.category is gd.PerformanceWarning]
    for loss_fn in said:
        with pytest.raises(gd.BackendError):
            run(300, loss_fn, backend="native")


def test_a_large_step_that_torch_runs_faster_is_no_loss(recwarn, monkeypatch, ran):
    monkeypatch.setattr(_cost, "_WORTH_A_WARNING", 0.0)
    monkeypatch.setattr("gdfunc._scan.backends.native._program._limit", lambda: 0.0)
    run(100, lambda params, batch: PROBLEM.loss_fn(params, batch) * 1.25)
    assert {backend for _, backend in ran()} == {"replay"}
    assert not recwarn.list


class Halved(torch.autograd.Function):
    """The identity, with half of its derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad / 2

    @staticmethod
    def jvp(ctx, tangent):
        return tangent / 2


@pytest.mark.parametrize(
    "differentiate",
    [
        lambda run, lr: torch.func.grad(run)(lr),
        lambda run, lr: torch.func.jvp(run, (lr,), (torch.ones_like(lr),))[1],
        lambda run, lr: torch.func.jacrev(torch.func.grad(run))(lr),
        lambda run, lr: torch.func.vmap(torch.func.grad(run))(lr.expand(2)),
        lambda run, lr: torch.autograd.grad(run(lr.requires_grad_()), lr)[0],
    ],
)
def test_a_derivative_that_a_traced_loop_would_lose_is_eagers(ran, differentiate):
    def loss(backend, lr):
        step = lambda c, x: (c - lr * Halved.apply(c.sin()), None)  # noqa: E731
        return gd.scan(step, torch.tensor(1.0), length=100, backend=backend)[0]

    lr = torch.tensor(0.01)
    results = [differentiate(functools.partial(loss, how), lr.clone()) for how in ("auto", "eager")]
    assert_same_bits(*results)
    assert {backend for _, backend in ran()} == {"eager"}
    assert_agrees(loss("auto", lr), loss("eager", lr), 1e-5)
    assert {backend for _, backend in ran()} == {"native"}


def test_auto_compiles_a_long_body_only_for_a_run_that_pays_for_it(ran):
    def f(carry, x):
        for _ in range(110):
            carry = (WEIGHTS @ carry).sin()
        return carry, None

    for steps, backend in [(100, "replay"), (1_300, "native")]:
        gd.scan(f, WEIGHTS[0], length=steps)
        assert ran() == [(steps, backend)]


TRANSFORMS = {
    "sgd": None,
    "adam": gd.adam(),
    "momentum": gd.momentum(0.9, nesterov=True),
    "clipped": gd.chain(gd.clip_by_global_norm(0.1), gd.rmsprop()),
}


@given(
    model=st.sampled_from([*MODELS]),
    transform=st.sampled_from([*TRANSFORMS]),
    steps=st.sampled_from([99, 100, 137, 256]),
    every=st.sampled_from([1, 7, 128]),
    members=st.sampled_from([0, 3]),
)
def test_auto_trains_as_eager_does(model, transform, steps, every, members):
    params, data, loss_fn = MODELS[model]()
    params = gd._tree.map(lambda leaf: leaf.double(), params)
    step = gd.make_step(loss_fn, TRANSFORMS[transform])
    index = gd.sample_batches(gd.random.key(steps), 40, 10, steps)

    def train(lr, backend):
        run = functools.partial(gd.train, step, step.init(params), data, index, every=every)
        return run(lr=lr, backend=backend, record=("loss", "params"))

    results = []
    for backend in ("auto", "eager"):
        run = functools.partial(train, backend=backend)
        lrs = torch.linspace(0.01, 0.03, members or 1, dtype=torch.float64)
        results.append(torch.func.vmap(run)(lrs) if members else run(lrs[0]))
    assert_agrees(*results)
