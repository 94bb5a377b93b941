"""What compiled loops promise beside their results: when they compile, what they own and refuse."""

import copy
import functools
import inspect
import linecache
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from torch.autograd.function import FunctionMeta
from torch.func import grad, jvp, vmap

import gdfunc as gd
from gdfunc._errors import BackendError
from gdfunc._scan import _recent, _scan, backends
from gdfunc._scan.backends import _inductor, native
from gdfunc._scan.trace import _trace

from .assertions import assert_agrees, assert_same_bits
from .references import descent, fingerprint, loop, normal, storages, total
from .tables import BACKENDS, DEVICES, EACH, EACH_INDUCTOR_SLOW, TRACED

inductor = functools.partial(gd.scan, backend="inductor", unroll=2)
in_c = functools.partial(gd.scan, backend="native")
compiled = pytest.mark.parametrize(
    "scan", [pytest.param(in_c, id="native"), pytest.param(inductor, id="inductor", marks=pytest.mark.slow)]
)


def scan_of(backend):
    return functools.partial(gd.scan, **BACKENDS[backend]), DEVICES.get(backend, "cpu")


def descend(c, x):
    """A body that is compiled once for all tests that take it."""
    return c - 0.1 * torch.sin(c + x), c.sum()


# Identities, on every backend.


@pytest.mark.slow
def test_every_unroll_is_the_loop():
    for unroll, steps, reverse in (
        (1, 7, False),
        (3, 7, True),
        (3, 7, False),
        (100, 1, False),
        (100, 7, True),
    ):
        xs = normal(0, steps, 3)
        got = gd.scan(descend, xs[0], xs, unroll=unroll, reverse=reverse, backend="inductor")
        assert_agrees(got, loop(descend, xs[0], xs, reverse))


@pytest.mark.parametrize("backend", EACH)
def test_any_number_of_steps(backend):
    scan, device = scan_of(backend)
    for steps in (0, 1, 2, 3, 4, 9):
        xs = normal(steps, steps, 3).to(device)
        carry, ys = scan(descend, torch.ones(3, dtype=torch.float64, device=device), xs)
        assert ys.shape == (steps,)
        if steps:
            assert_agrees((carry, ys), loop(descend, torch.ones(3, dtype=torch.float64), xs.cpu()))
        else:
            assert carry.tolist() == [1, 1, 1]


@pytest.mark.parametrize("backend", EACH_INDUCTOR_SLOW)
def test_without_xs_without_carry_and_without_both(backend):
    scan, device = scan_of(backend)
    start, closed_over = torch.tensor([1, 2], device=device), normal(0, 2, 3).to(device)
    for steps in (5, 1, 0):
        carry, ys = scan(lambda c, x: (c + 1, (x, {}, None)), start, length=steps)
        assert carry.tolist() == [1 + steps, 2 + steps]
        assert ys == (None, {}, None)
        carry, ys = scan(lambda c, x: (c, x * closed_over), (), closed_over[0, 0].expand(steps))
        assert carry == ()
        assert_agrees(ys, (closed_over[0, 0] * closed_over).cpu().expand(steps, 2, 3))
        carry, ys = scan(lambda c, x: (c, {"y": closed_over.T}), [None], length=steps)
        assert carry == [None]
        assert_same_bits(ys["y"].cpu(), closed_over.cpu().T.expand(steps, 3, 2))


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("backend", EACH)
def test_outputs_are_the_callers_own_and_inputs_are_left_alone(backend, steps):
    scan, device = scan_of(backend)
    square = normal(0, 3, 3).to(device)
    init = normal(1, 3, 3).T, normal(2, 1)[0].expand(3), torch.tensor([True])
    init = tuple(leaf.to(device) for leaf in init)
    xs = normal(3, 3, 2, steps).to(device).permute(2, 1, 0)[:, :, ::2]  # neither contiguous nor dense

    def f(carry, x):
        a, b, on = carry
        new = (a.T, b, on)  # a view, itself, itself
        return new, (a, a, a[0], x, x.T, x[:, 0], square, square[1:], b * x[0, 0], on, on)

    def run():
        return scan(f, init, xs)

    inputs = [*init, xs, square]
    before = fingerprint([leaf.cpu().contiguous() for leaf in inputs]), [leaf._version for leaf in inputs]
    first = run()
    carry, rows = loop(f, tuple(leaf.cpu() for leaf in init), xs.cpu()) if device == "cpu" else (None, None)
    if rows is not None:
        assert_same_bits(first, (carry, rows))
    kept = gd._tree.clone(first)
    places = storages([*inputs, *gd._tree.leaves(first)])
    assert len(set(places)) == len(places)
    second = run()
    assert_same_bits(first, kept)
    assert not set(storages(gd._tree.leaves(first))) & set(storages(gd._tree.leaves(second)))
    for leaf in gd._tree.leaves(first):
        leaf.zero_()
    assert_same_bits(run(), kept)
    after = fingerprint([leaf.cpu().contiguous() for leaf in inputs]), [leaf._version for leaf in inputs]
    assert after == before


@compiled
def test_checkpoints_under_a_compiled_backend(scan):
    xs = normal(0, 5, 3)

    def value(scan, p, **options):
        carry, ys = scan(descend, p, xs, **options)
        return carry.square().sum() + ys.sum()

    expected = grad(lambda p: value(loop, p))(xs[0])
    assert_agrees(grad(lambda p: value(scan, p, adjoint=gd.adjoints.Checkpoint(2)))(xs[0]), expected)


# What upstream gets wrong.


def shared_within(scan):
    """Loops within loops, whose first carry is held twice, closed over, and read when they are done."""

    def f(c, x):
        (twice, _), _ = scan(
            lambda s, row: ((s[0] - 0.1 * torch.sin(s[0] * row + s[1]), s[1]), None), (c, c), x
        )
        closed_over, _ = scan(lambda s, row: (s - 0.1 * torch.sin(s * row + c), None), c, x)
        return 0.5 * (twice + closed_over) - 0.1 * c, c.sum()

    return f


def test_a_loop_within_a_loop_writes_into_nothing_that_others_read():
    """Inductor writes into the first carry of a nested loop: results were silently wrong."""
    init, xs = normal(0, 3), normal(1, 4, 5, 3)
    expected = loop(shared_within(loop), init, xs)
    assert_agrees(inductor(shared_within(inductor), init, xs), expected)


def test_a_scan_within_a_compiled_one_is_compiled_with_it():
    """Laid out step by step, a loop of 48 steps took Inductor five minutes."""
    init, f = normal(0, 3), shared_within(gd.scan)
    xs = normal(1, 4, 17, 3)
    expected = loop(shared_within(loop), init, xs)
    assert_agrees(inductor(f, init, xs), expected)
    assert_agrees(gd.scan(f, init, xs, adjoint=gd.adjoints.Checkpoint(2)), expected)
    traced = [_trace.trace(f, f, init, xs[:, :steps]) for steps in (16, 17)]
    assert [each.body.has_loops for each in traced] == [False, True]


@pytest.mark.parametrize("options", TRACED)
def test_a_scan_within_that_is_given_only_what_is_closed_over(options):
    """It ran in the trace, on tensors without values: native crashed, others kept the first result."""
    start, rows = normal(0, 3), normal(1, 17, 3)

    def f(c, x):
        inner, _ = gd.scan(lambda s, row: (s + 0.1 * torch.sin(row), None), start, rows)
        return c + inner, None

    for _ in range(2):
        expected = gd.scan(f, normal(2, 3), length=2)
        assert_agrees(gd.scan(f, normal(2, 3), length=2, **options), expected)
        start.mul_(3)


@pytest.mark.parametrize("options", TRACED)
def test_a_scan_within_beside_an_assignment(options):
    """What writes assignments as pure operations has no rule for a primitive of one's own."""
    rows = normal(1, 17, 3)

    def f(c, x):
        c = c.clone()
        c[0] = x
        inner, _ = gd.scan(lambda s, row: (s + 0.1 * torch.sin(row * s), None), c, rows)
        inner[1] = c[0]
        return inner, inner.sum()

    def value(c, **options):
        carry, ys = gd.scan(f, c, normal(3, 4), **options)
        return carry.square().sum() + ys.sum()

    for transform in (lambda v: v, grad, lambda v: lambda c: jvp(v, (c,), (c,))):
        expected, got = (
            transform(functools.partial(value, **given))(normal(2, 3)) for given in ({}, options)
        )
        assert_agrees(got, expected)


def descent_on(loss):
    return lambda w, x: (w - 0.1 * grad(loss)(w, x), loss(w, x))


@pytest.mark.parametrize(
    ("backend", "many"), [("native", 12), pytest.param("inductor", 50, marks=pytest.mark.slow)]
)
def test_fail_on_recompile_limit_hit_after_many_losses(backend, many):
    xs, start = normal(0, 4, 2), normal(1, 2)
    for k in range(1, many + 1):
        f = descent_on(lambda w, x, k=k: (w - x).mul(k).cos().sum())
        assert_agrees(gd.scan(f, start, xs, backend=backend), loop(f, start, xs))


# When a loop is compiled.


@pytest.fixture
def compilations(monkeypatch):
    """Counts what is compiled."""
    counted, compile_ = [], _inductor._compile
    monkeypatch.setattr(_inductor, "_compile", lambda *a, **k: counted.append(None) or compile_(*a, **k))
    return counted


def test_another_lr_seed_data_and_length_compile_nothing(compilations, monkeypatch):
    def step(lr, seed, length):
        xs = normal(seed, length, 3)
        moved = descent(inductor, lr, normal(seed + 1, 3), xs)["moved"]
        assert_agrees(moved, descent(loop, lr, normal(seed + 1, 3), xs)["moved"])

    lr = torch.tensor(0.1, dtype=torch.float64)
    step(lr, 0, 5)
    known = len(compilations)
    traces, record = [], _trace._record
    monkeypatch.setattr(_trace, "_record", lambda *args: traces.append(None) or record(*args))
    for seed, length in enumerate((5, 5, 8, 9, 16, 33, 100), 1):
        step(lr * seed, seed, length)
    assert len(compilations) == known <= 1
    assert not traces


def test_a_gradient_of_other_data_and_length_compiles_nothing(compilations):
    def slope(scan, w, xs):
        return grad(total(functools.partial(descent, scan)))(w, xs[0], xs)

    counts = []
    for seed in range(3):
        w, xs = normal(seed, 1)[0], normal(seed + 1, 5 + 4 * seed, 3)
        assert_agrees(slope(inductor, w, xs), slope(loop, w, xs))
        counts.append(len(compilations))
    assert counts[0] == counts[2] <= 2


def test_a_changed_number_is_seen_and_the_user_told_of_the_wait(capfd):
    start = torch.tensor(1.0, dtype=torch.float64)
    for rate, times in ((2.0, 1), (3.0, 1), (2.0, 0)):
        carry, _ = inductor(lambda c, x: (c * rate, c), start, length=4)  # noqa: B023
        assert carry == rate**4
        told = capfd.readouterr().err
        line = r"gdfunc: compiling a loop of \d operations with Inductor … \d+\.\d s\n"
        assert re.fullmatch(line * times, told)


# What a trace cannot do.


def by_if(c, x):
    return (c if c > 0 else -c), None


def by_item(c, x):
    return c * c.item(), None


def by_float(c, x):
    return c * float(x), None


def by_int(c, x):
    return c + int(x), None


def by_mask(c, x):
    return c + x[x > 0].sum(), None


def by_while(c, x):
    while c.sum() < 1:
        c = c + 1
    return c, None


def by_a_closed_over_value(c, x):
    return (c if ONE > 0 else -c), None


ONE = torch.tensor(1.0)


@pytest.mark.parametrize("options", TRACED)
@pytest.mark.parametrize(
    ("f", "line"),
    [
        (by_if, 1), (by_item, 1), (by_float, 1), (by_int, 1), (by_mask, 1), (by_while, 1),
        (by_a_closed_over_value, 1),
    ],
)  # fmt: skip
def test_a_body_that_decides_on_values_is_refused_with_its_line(f, line, options):
    number = inspect.getsourcelines(f)[1] + line
    gd.scan(f, ONE, torch.ones(2))  # is fine in Python
    with pytest.raises(BackendError) as caught:
        gd.scan(f, ONE, torch.ones(2), **options)
    message = str(caught.value)
    assert f"{__file__}:{number}: `{linecache.getline(__file__, number).strip()}`" in message
    assert "torch.where" in message
    assert isinstance(caught.value, gd.GdfuncError)
    assert isinstance(caught.value, RuntimeError)


@pytest.mark.parametrize("options", TRACED)
@pytest.mark.parametrize("draw", [torch.rand_like, lambda x: x + torch.randn(2), torch.bernoulli])
def test_a_body_that_draws_from_torchs_generator_is_refused(draw, options):
    with pytest.raises(BackendError, match=r"f draws from torch's generator .* draw from gd.random"):
        gd.scan(lambda c, x: (c + draw(x).sum(), None), ONE, torch.ones(2, 2), **options)


@pytest.mark.parametrize("options", [{}, *TRACED])
@pytest.mark.parametrize(
    "f",
    [
        lambda c, x: (c.add_(1), None),
        lambda c, x: (c + x.mul_(2), None),
        lambda c, x: (c + x[:1].fill_(2), None),
        lambda c, x: (torch.add(c, x, out=c), None),
        lambda c, x: (c + 1, c.view(3, 1).zero_()),
    ],
)
def test_a_body_that_writes_into_what_it_is_given_is_refused(f, options):
    init, xs = torch.zeros(3), torch.ones(2, 3)
    with pytest.raises(ValueError, match="f wrote into its carry or x; it must return new tensors instead"):
        gd.scan(f, init, xs, **options)
    if options:
        assert not init.any()
        assert xs.all()


@pytest.mark.parametrize("options", TRACED)
@pytest.mark.parametrize(
    "write",
    [lambda log, x: log.add_(x), lambda log, x: log[1:].copy_(x), lambda log, x: log.__setitem__(0, x)],
)
def test_a_traced_body_that_writes_into_what_it_closes_over_is_refused(write, options):
    log = torch.zeros(3)

    def f(c, x):
        write(log, x)
        return c + log.sum(), None

    with pytest.raises(
        ValueError, match="f wrote into a tensor it closes over; it must return new tensors instead"
    ):
        gd.scan(f, ONE, torch.ones(2), **options)
    assert not log.any()


@pytest.mark.parametrize("options", TRACED)
def test_a_module_that_updates_its_buffers_is_refused_and_keeps_them(options):
    with torch.random.fork_rng():
        norm = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(2, 2))
    buffers = dict(norm.named_buffers())
    with pytest.raises(ValueError, match="f wrote into a tensor it closes over"):
        gd.scan(lambda c, x: (norm(c), None), torch.ones(2), length=2, **options)
    assert len(buffers) == 2
    assert all(buffer is buffers[name] for name, buffer in norm.named_buffers())


@pytest.mark.parametrize("options", [{}, *TRACED, {"backend": "auto"}])
def test_errors_of_the_users_own_pass_through(options):
    def mistaken(c, x):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        gd.scan(mistaken, ONE, torch.ones(2), **options)
    with pytest.raises(RuntimeError, match=r"size|broadcast"):
        gd.scan(lambda c, x: (c + torch.ones(2) + torch.ones(3), None), ONE, torch.ones(2), **options)
    with pytest.raises(ValueError, match="carry changed from float32"):
        gd.scan(lambda c, x: (c.double(), None), ONE, torch.ones(2), **options)
    with pytest.raises(TypeError, match="f must return a pair"):
        gd.scan(lambda c, x: c, ONE, torch.ones(2), **options)
    with pytest.raises(TypeError, match="y is float, not a Tensor"):
        gd.scan(lambda c, x: (c, 1.0), ONE, torch.ones(2), **options)


TWO = torch.tensor(2.0, dtype=torch.float64)
TALL = torch.arange(6.0, dtype=torch.float64).reshape(2, 3).T
WEIGHT = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))


def pulled(c):
    values, pull = torch.func.vjp(lambda a: a**2 * TWO, c)
    return pull(values)[0]


FOLLOWED = {
    "jacrev": lambda c: torch.func.jacrev(lambda a: a**2)(c).sum(),
    "hessian": torch.func.hessian(lambda a: (TWO * a**3).sum()),
    "vjp": pulled,
    "vjp of rows": lambda c: vmap(lambda s: torch.func.vjp(lambda a: a * s * TWO, c)[1](c)[0])(c),
    "a closed-over number and a constant": lambda c: (
        c * (TWO * torch.tensor(0.5)) + torch.tensor(1.0) ** TWO
    ),
    "requires_grad": lambda c: c * (3 if WEIGHT.requires_grad else 1),
    "strides": lambda c: c * TALL.stride(0) + TALL.is_contiguous(),
    "data": lambda c: c * WEIGHT.data,
    "a copy": lambda c: c * copy.deepcopy(TWO),
    "an array": lambda c: c + torch.as_tensor(np.array([1.0, 2.0])),
}


@pytest.mark.parametrize("options", TRACED)
@pytest.mark.parametrize("name", FOLLOWED)
def test_what_a_trace_follows(name, options):
    f = FOLLOWED[name]
    start = torch.tensor([1.0, 2.0], dtype=torch.float64)
    got, expected = (
        gd.scan(lambda c, x: (torch.sin(c), f(c)), start, length=2, **how) for how in (options, {})
    )
    assert_agrees(got, expected)


COUNT = torch.tensor(1)
UNTRACEABLE = {
    "f decides on the value of a tensor": lambda c: c[:COUNT].sum(),
    "f reads .grad of a tensor": lambda c: c if WEIGHT.grad is None else WEIGHT.grad,
    "f takes a tensor.s values out of torch": lambda c: c * float(np.from_dlpack(TWO)),
    r"f cannot be traced \(RuntimeError: The tensor has": lambda c: c + torch.tensor([TWO, TWO]),
    r"f cannot be traced \(RuntimeError: .tolist": lambda c: c * TWO.tolist(),
    r"f formats or prints a tensor": lambda c: c * float(f"{TWO:.2f}"),
    "f makes a tensor in a way that a trace cannot follow": lambda c: (
        c + torch.rand(2, generator=torch.Generator().manual_seed(0))
    ),
}


@pytest.mark.parametrize("options", TRACED)
@pytest.mark.parametrize("reason", UNTRACEABLE)
def test_what_a_trace_does_not_follow_is_refused(reason, options, monkeypatch):
    f = UNTRACEABLE[reason]
    start = torch.ones(2, dtype=torch.float64)
    with pytest.raises(BackendError, match=reason):
        gd.scan(lambda c, x: (c, f(c)), start, length=2, **options)
    monkeypatch.setattr(_scan, "_WORTH_TRACING", 2)
    monkeypatch.setattr(backends, "_said", set())
    with pytest.warns(UserWarning, match=f"steps back: {reason}"):
        got = gd.scan(lambda c, x: (c, f(c)), start, length=2, backend="auto")
    assert_same_bits(got, gd.scan(lambda c, x: (c, f(c)), start, length=2))


def test_a_constant_is_not_the_memory_of_an_array():
    array = np.array([1.0, 2.0])

    def f(c, x):
        return c + torch.as_tensor(array), None

    run = functools.partial(gd.scan, f, torch.zeros(2, dtype=torch.float64), length=1, backend="native")
    run()
    old, array = array, array.copy()
    old[:] = 7
    assert run()[0].tolist() == [1, 2]


class Straight(torch.autograd.Function):
    """Rounds, and takes the derivative of that for 1."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.round()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, cotangent):
        return cotangent


@pytest.mark.parametrize("options", TRACED)
def test_a_derivative_of_the_users_own_is_kept_within_f_and_refused_around_it(options):
    def run(c, function=Straight.apply, **options):
        def f(c, x):
            return c - 0.1 * grad(lambda c: (function(c) ** 2).sum())(c), c

        return gd.scan(f, c, length=3, **options)

    start = torch.tensor([1.3, 0.7])
    assert_agrees(run(start, **options), run(start))
    for transform in (grad, lambda f: lambda c: jvp(f, (c,), (c,)), lambda f: vmap(grad(f))):
        with pytest.raises(BackendError, match="f applies Straight, whose own derivative is lost"):
            transform(lambda c: run(c, **options)[0].sum())(start)
    slope = grad(lambda c: run(c, torch.round, **options)[0].sum())(start)
    assert_agrees(slope, torch.ones(2))


@pytest.mark.filterwarnings("ignore:.*traced on every call")
def test_what_another_thread_applies_during_a_trace_is_no_part_of_it():
    def f(c, x):
        with ThreadPoolExecutor(1) as another:
            another.submit(Straight.apply, ONE).result()
        return torch.sin(c), c

    def final(c, **options):
        return gd.scan(f, c, length=3, **options)[0].sum()

    start = torch.tensor([1.3, 0.7])
    assert_agrees(grad(partial(final, backend="native"))(start), grad(final)(start))
    assert "__getattribute__" not in vars(FunctionMeta)


def test_vmaps_own_refusals_pass_through():
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda a: gd.scan(lambda c, x: (c + a * torch.rand(()), c), a, length=2)[0])(ONE[None])


# The machine: no compiler, no CUDA, no safe place.


def never_compiled(c, x):
    return c * 0.123456789, c


def compile_one():
    gd.scan(never_compiled, ONE, length=2, backend="inductor")


def refused(message):
    return pytest.raises(BackendError, match=message)


def test_the_cache_is_used_and_the_environment_left_alone():
    before = dict(os.environ)
    gd.scan(descend, normal(0, 3), normal(1, 5, 3), unroll=2, backend="inductor")
    assert dict(os.environ) == before
    assert any((gd._scan.backends._cache.private_directory() / "inductor").rglob("*.so"))


def test_no_compiler_is_one_clear_sentence(tmp_path):
    script = (
        "import torch, gdfunc as gd\n"
        "try:\n"
        "    gd.scan(lambda c, x: (c + 1, c), torch.tensor(0), length=4, backend='inductor')\n"
        "except gd.BackendError as error:\n"
        "    print(error)\n"
    )
    environment = {**os.environ, "CXX": "/nonexistent/g++", "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    needed = "backend='inductor' needs a C++ compiler, and none was found: install g++ or clang++\n"
    assert done.stdout == needed


# auto


@pytest.fixture
def told(monkeypatch):
    """What auto has warned of so far: nothing."""
    monkeypatch.setattr(backends, "_said", set())


def test_auto_is_eager_for_few_steps_and_compiled_for_many(compilations, monkeypatch, told):
    ran = []
    monkeypatch.setitem(backends.RANKED, "cpu", (lambda *a: ran.append(a[4]) or _inductor.run(*a),))
    xs = normal(0, 10_000, 3) * 0.1
    p = normal(1, 3)
    short, _ = gd.scan(descend, p, xs[:999], backend="auto")
    assert (ran, compilations) == ([], [])
    assert_same_bits(short, gd.scan(descend, p, xs[:999])[0])
    long = gd.scan(descend, p, xs, backend="auto", unroll=2)
    assert ran == [10_000]
    assert_agrees(long, gd.scan(descend, p, xs))


def test_auto_steps_back_with_one_warning_where_f_cannot_be_traced(monkeypatch, told):
    monkeypatch.setattr(_scan, "_WORTH_TRACING", 3)
    monkeypatch.setattr(backends, "WORTH_COMPILING", 3)
    xs = normal(0, 4)

    def f(c, x):
        return (c + x if x > 0 else c - x), c

    with pytest.warns(
        UserWarning, match=r"auto' steps back: f decides on the value .*`return \(c \+ x"
    ) as caught:
        got = gd.scan(f, xs[0], xs, backend="auto")
    assert len(caught) == 1
    assert_same_bits(got, gd.scan(f, xs[0], xs))
    gd.scan(f, xs[0], xs, backend="auto")  # a second warning would be an error here


def test_auto_steps_back_with_one_warning_where_compiling_fails(monkeypatch, told):
    monkeypatch.setattr(_scan, "_WORTH_TRACING", 3)
    monkeypatch.setattr(backends, "WORTH_COMPILING", 3)

    def fail(*args, **kwargs):
        raise BackendError("no such luck")

    monkeypatch.setattr(_inductor, "_compile", fail)
    monkeypatch.setattr(native, "_compiled", fail)
    monkeypatch.setattr(_trace, "_recipes", _recent.Recent())
    monkeypatch.setattr(_trace, "_bodies", _recent.Recent())
    w, p, xs = normal(0, 1)[0], normal(1, 3), normal(2, 4, 3)
    auto = functools.partial(gd.scan, backend="auto", unroll=3)
    with pytest.warns(UserWarning, match="auto' steps back: no such luck") as caught:
        got = descent(auto, w, p, xs)
    assert len(caught) == 1
    expected = descent(loop, w, p, xs)
    assert_agrees(got, expected)
    slope = grad(lambda w: descent(auto, w, p, xs)["moved"].square().sum())(w)
    assert_agrees(slope, grad(lambda w: descent(loop, w, p, xs)["moved"].square().sum())(w))
    with refused("no such luck"):
        compile_one()
