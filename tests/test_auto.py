"""The default backend: what it chooses, that it says so, and that it changes no answer."""

import contextlib
import functools
import logging

import pytest
import torch
from hypothesis import given, settings
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


@pytest.mark.long
@pytest.mark.parametrize(
    ("steps", "loss_fn", "backend"),
    [
        (99, PROBLEM.loss_fn, "eager"),
        (100, PROBLEM.loss_fn, "native"),
        (5_000, PROBLEM.loss_fn, "native"),
        (99, uncovered, "eager"),
        (100, uncovered, "replay"),
        (100, untraceable, "eager"),
    ],
)
def test_auto_is_eager_below_100_steps_then_native_then_replay(ran, steps, loss_fn, backend):
    got = run(steps, loss_fn)
    chosen = ran()
    assert chosen == [(steps, backend)]
    expected = run(steps, loss_fn, backend="eager")
    (assert_same_bits if backend == "eager" else assert_agrees)(got, expected)


@pytest.mark.long
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


@pytest.mark.long
@pytest.mark.usefixtures("nothing_said")
def test_a_loss_of_ten_seconds_is_said_once_at_the_users_line_with_its_remedy(monkeypatch, recwarn):
    run(300, untraceable)
    run(300, uncovered)
    assert not recwarn.list
    monkeypatch.setattr(_cost, "PYTHON_STEP", 10 / 300)
    monkeypatch.setattr(_cost, "OPERATION", 10 / 300)
    monkeypatch.setattr(_cost, "INDUCTOR", (float("inf"), 0.0))
    said = {
        untraceable: r"10 s or more.*f needs the value of a tensor at .*return loss if.*torch.where",
        uncovered: r"which take \d+ s or more.*'native' does not cover aten.logcumsumexp",
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


@pytest.mark.long
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


@pytest.mark.long
def test_auto_compiles_a_long_body_only_for_a_run_that_pays_for_it(ran):
    def f(carry, x):
        for _ in range(110):
            carry = (WEIGHTS @ carry).sin()
        return carry, None

    for steps, backend in [(100, "replay"), (1_300, "native")]:
        gd.scan(f, WEIGHTS[0], length=steps)
        assert ran() == [(steps, backend)]


def swallowed_read(c, x):
    try:
        scale = 2.0 if float(c) > 5 else 1.0
    except Exception:
        scale = 0.0
    return c * 0.9 + x * scale, None


def suppressed_read(c, x):
    scale = 0.0
    with contextlib.suppress(RuntimeError):
        scale = float(c.sum())
    return c * 0.9 + scale * 0.01 + x, None


def own_error(c, x):
    try:
        shift = float(c.numpy().mean())
    except Exception as error:
        raise ValueError("cannot read the carry") from error
    return c * 0.9 + 0.01 * shift, None


def writer():
    count = torch.tensor(0.0)
    return lambda c, x: (c + x / count.add_(1.0), None)


def logger_of_tensors():
    seen = []
    return lambda c, x: (seen.append(c.item()) or c + x * len(seen), None)


def conjugate(c, x):
    number = (torch.complex(c, x) * 1j).conj()
    return number.real * 0.9 + 0.1, number.conj().imag


TRAPS = {
    "a read whose error f swallows": lambda: swallowed_read,
    "a read whose error f suppresses": lambda: suppressed_read,
    "an error of f's own": lambda: own_error,
    "a write into a tensor from outside": writer,
    "a list of values": logger_of_tensors,
    "complex numbers": lambda: conjugate,
}


@pytest.mark.parametrize("name", TRAPS)
def test_auto_gives_what_eager_gives_where_a_trace_meets_something_else(name):
    xs = torch.linspace(0.5, 1.5, 100, dtype=torch.float64)
    results = [gd.scan(TRAPS[name](), xs[3], xs, backend=backend) for backend in ("auto", "eager")]
    assert_agrees(*results)


def test_a_loss_that_writes_into_a_tensor_from_outside_is_called_once_a_step():
    results = []
    for backend in ("auto", "eager"):
        count, norm = torch.tensor(0.0), torch.nn.BatchNorm1d(3, affine=False)

        def loss(w, batch, count=count, norm=norm):
            count.add_(1.0)
            return (norm(batch) * w - 1).square().mean() / count

        index = gd.sample_batches(gd.random.key(0), 40, 8, 120)
        data = PROBLEM.data[0].float()
        final, _ = gd.train(gd.make_step(loss), torch.zeros(3), data, index, 0.1, backend=backend)
        results.append([final, count, *norm.buffers()])
    assert_same_bits(*results)
    assert results[0][1] == 120


ASSIGNMENTS = {
    "an element": lambda z, w: z.__setitem__(0, w[0] ** 2),
    "some elements": lambda z, w: z.__setitem__(slice(1, None), w[1:] ** 2),
    "a product in place": lambda z, w: z[:2].mul_(w[:2]),
    "by a view of a view": lambda z, w: z.view(3, 1)[1:].t().add_(w[1:]),
    "by numbers": lambda z, w: z.__setitem__(torch.tensor([2, 0]), w[:2]),
    "by a mask": lambda z, w: z.masked_fill_(w > 1, 0.5),
}


@pytest.mark.long
@pytest.mark.parametrize("name", ASSIGNMENTS)
def test_a_loss_that_assigns_has_vmap_and_derivatives(name):
    def loss_fn(params, batch):
        z = torch.zeros(3, dtype=torch.float64) + params["w"].sin()
        ASSIGNMENTS[name](z, params["w"])
        return PROBLEM.loss_fn(params, batch) + z.square().sum()

    def train(backend, lr):
        return run(100, loss_fn, lr=lr, backend=backend, record=())[0]["w"]

    lrs = torch.tensor([0.01, 0.05], dtype=torch.float64)
    for derivative in (lambda f: f, torch.func.jacrev, torch.func.jacfwd):
        auto, native, eager = (
            torch.func.vmap(derivative(functools.partial(train, backend)))(lrs)
            for backend in ("auto", "native", "eager")
        )
        assert_agrees(auto, eager)
        assert_agrees(native, eager)


def linear():
    with torch.random.fork_rng():
        return torch.nn.Linear(1, 1)


@pytest.mark.long
def test_a_parameter_in_a_script_module_keeps_its_derivative():
    layer, slopes = torch.jit.script(linear()), []
    for backend in ("eager", "auto"):
        with (
            pytest.warns(UserWarning, match="cannot tell")
            if backend == "auto"
            else contextlib.nullcontext()
        ):
            run = gd.scan(
                lambda c, x: (c * 0.9 + layer(c), None), torch.ones(1), length=100, backend=backend
            )
        slopes.append(torch.autograd.grad(run[0].sum(), [layer.weight, layer.bias]))
    assert_agrees(slopes[1], slopes[0], 1e-5)


def test_a_hook_of_all_modules_is_part_of_the_key():
    layer = linear().requires_grad_(False)
    run = functools.partial(gd.scan, lambda c, x: (layer(c), None), torch.ones(1), length=100)
    run()
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, given, out: out * 0.25)
    try:
        assert_agrees(run(), run(backend="eager"), 1e-5)
    finally:
        handle.remove()


def test_a_file_that_f_opens_is_written_in_every_step(tmp_path):
    def f(c, x):
        with open(tmp_path / "log", "a") as file:
            file.write("step\n")
        return c + 1, None

    gd.scan(f, torch.tensor(0.0), length=100)
    assert len((tmp_path / "log").read_text().splitlines()) == 100


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::gdfunc.PerformanceWarning")
def test_a_run_that_stops_at_its_first_step_takes_few_more(ran):
    def stop(carry, loss):
        return loss < 1e9

    for loss_fn in (PROBLEM.loss_fn, uncovered, untraceable):
        run(50_000, loss_fn, stop=stop, record=())
        assert len(ran()) == 1


@pytest.mark.long
@pytest.mark.usefixtures("ctrl_c_is_heard")
@pytest.mark.filterwarnings("ignore::gdfunc.PerformanceWarning")
@pytest.mark.parametrize("loss_fn", [uncovered, untraceable])
def test_ctrl_c_finds_the_first_segments_of_a_long_run_done(loss_fn):
    with pytest.raises(gd.TrainingInterrupted) as caught:
        run(100_000, loss_fn, progress=ctrl_c(1))
    assert 0 < caught.value.step <= 2_000


def test_many_leaves_are_traced_for_longer_runs_alone():
    assert _cost.is_worth_tracing(100, 10)
    assert not _cost.is_worth_tracing(120, 300)
    assert _cost.is_worth_tracing(600, 300)


TRANSFORMS = {
    "sgd": None,
    "adam": gd.adam(),
    "momentum": gd.momentum(0.9, nesterov=True),
    "clipped": gd.chain(gd.clip_by_global_norm(0.1), gd.rmsprop()),
}


@pytest.mark.long
@settings(max_examples=12)
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
