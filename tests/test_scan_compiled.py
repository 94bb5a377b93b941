"""Compiled loops: when they are compiled, their memory, their refusals, and what auto chooses."""

import copy
import functools
import linecache
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from torch._inductor import config as inductor_config
from torch.autograd.function import FunctionMeta
from torch.func import grad, jvp, vmap

import gdfunc as gd
from gdfunc._errors import BackendError
from gdfunc._scan import _cost
from gdfunc._scan.backends import _inductor, native
from gdfunc._scan.trace import _trace

from .assertions import assert_agrees, assert_same_bits
from .references import descent, loop, normal, storages, total
from .tables import BACKENDS, DEVICES, EACH, EACH_INDUCTOR_SLOW, TRACED

traced = pytest.mark.parametrize("options", TRACED)
inductor = functools.partial(gd.scan, backend="inductor")


def scan_of(backend):
    return functools.partial(gd.scan, **BACKENDS[backend]), DEVICES.get(backend, "cpu")


def descend(c, x):
    """A body that is compiled once for all tests that take it."""
    return c - 0.1 * torch.sin(c + x), c.sum()


# Identities, on every backend.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("unroll", "steps", "reverse"),
    [(1, 7, False), (3, 7, True), (3, 7, False), (100, 1, False), (100, 7, True)],
)
def test_every_unroll_is_the_loop(unroll, steps, reverse):
    xs = normal(0, steps, 3)
    got = gd.scan(descend, xs[0], xs, unroll=unroll, reverse=reverse, backend="inductor")
    assert_agrees(got, loop(descend, xs[0], xs, reverse))


@pytest.mark.long
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


@pytest.mark.long
@pytest.mark.parametrize("backend", EACH)
def test_outputs_are_the_callers_own_and_inputs_are_left_alone(backend):
    scan, device = scan_of(backend)
    leaves = normal(0, 3, 3), normal(1, 3, 3).T, normal(2, 1)[0].expand(3), torch.tensor([True])
    square, *init = (leaf.to(device) for leaf in leaves)
    init = tuple(init)

    def f(carry, x):
        a, b, on = carry
        new = (a.T, b, on)  # a view, itself, itself
        return new, (a, a, a[0], x, x.T, x[:, 0], square, square[1:], b * x[0, 0], on, on)

    for steps in (4,) if backend == "inductor" else (1, 4):
        xs = normal(3, 3, 2, steps).to(device).permute(2, 1, 0)[:, :, ::2]  # neither contiguous nor dense
        inputs = [*init, xs, square]
        before = [(leaf._version, leaf.tolist()) for leaf in inputs]
        first = scan(f, init, xs)
        if device == "cpu":
            assert_same_bits(first, loop(f, init, xs))
        expected = gd._tree.clone(first)
        second = scan(f, init, xs)
        places = storages([*inputs, *gd._tree.leaves((first, second))])
        assert len(set(places)) == len(places)
        assert_same_bits(first, expected)
        for leaf in gd._tree.leaves(first):
            leaf.zero_()
        assert_same_bits(scan(f, init, xs), expected)
        assert [(leaf._version, leaf.tolist()) for leaf in inputs] == before


# Loops within loops, and other errors of torch.


def shared_within(scan):
    """A body of two loops, whose first carry is held twice, closed over, and read after them."""

    def f(c, x):
        step = lambda s, row: ((s[0] - 0.1 * torch.sin(s[0] * row + s[1]), s[1]), None)  # noqa: E731
        (twice, _), _ = scan(step, (c, c), x)
        closed_over, _ = scan(lambda s, row: (s - 0.1 * torch.sin(s * row + c), None), c, x)
        return 0.5 * (twice + closed_over) - 0.1 * c, c.sum()

    return f


@pytest.mark.long
@pytest.mark.parametrize(
    ("steps", "is_loop"), [pytest.param(16, False, marks=pytest.mark.slow), (17, True)]
)
def test_a_scan_within_a_compiled_one_is_compiled_with_it_and_writes_into_its_own_memory(steps, is_loop):
    """Inductor writes into the first carry of a nested loop, and step by step 48 steps took minutes."""
    init, f, xs = normal(0, 3), shared_within(gd.scan), normal(1, 4, steps, 3)
    expected = loop(shared_within(loop), init, xs)
    assert_agrees(inductor(f, init, xs), expected)
    assert_agrees(gd.scan(f, init, xs, adjoint=gd.adjoints.Checkpoint(2)), expected)
    assert _trace.trace(f, f, init, xs).body.has_loops is is_loop


@traced
def test_a_scan_within_may_depend_on_closed_over_tensors_alone(options):
    """Because the inner loop could run in the trace, on tensors without values."""
    start, rows = normal(0, 3), normal(1, 17, 3)

    def f(c, x):
        inner, _ = gd.scan(lambda s, row: (s + 0.1 * torch.sin(row), None), start, rows)
        return c + inner, None

    for _ in range(2):
        expected = gd.scan(f, normal(2, 3), length=2)
        assert_agrees(gd.scan(f, normal(2, 3), length=2, **options), expected)
        start.mul_(3)


@pytest.mark.long
@traced
def test_a_scan_within_goes_with_assignments(options):
    """Because torch's rewriting of assignments has no rule for the primitive of a loop."""
    rows = normal(1, 17, 3)

    def within(s, row):
        total = torch.zeros_like(s)
        total[0] = 3 * s[1]
        total += torch.sin(row * s)
        return torch.sin(s + 0.1 * total), total.clamp_(-1, 1)

    def f(c, x):
        c = c.clone()
        c[0] = x
        inner, totals = gd.scan(within, c, rows)
        inner[1] = c[0]
        return inner, inner.sum() + totals.sum()

    def value(c, **options):
        carry, ys = gd.scan(f, c, normal(3, 4), **options)
        return carry.square().sum() + ys.sum()

    for transform in (lambda v: v, grad, lambda v: lambda c: jvp(v, (c,), (c,))):
        run = lambda how: transform(functools.partial(value, **how))(normal(2, 3))  # noqa: B023, E731
        assert_agrees(run(options), run({}))


@pytest.mark.long
@pytest.mark.parametrize(
    ("backend", "many"), [("native", 12), pytest.param("inductor", 50, marks=pytest.mark.slow)]
)
def test_many_losses_and_trees_hit_no_recompile_limit(backend, many):
    xs, tree = normal(0, 4, 2), normal(1, 2)
    for k in range(1, many + 1):

        def f(tree, x, k=k):
            loss = lambda w: (w - x).mul(k).cos().sum()  # noqa: E731
            moved = gd._tree.map(lambda w: w - 0.1 * grad(loss)(w), tree)
            return moved, loss(*gd._tree.leaves(tree))

        tree = [tree]
        assert_agrees(gd.scan(f, tree, xs, backend=backend), loop(f, tree, xs))


# When a loop is compiled.


@pytest.fixture
def compilations(monkeypatch):
    """The compilations by Inductor: one entry for each."""
    counted, compile_ = [], _inductor._compile
    monkeypatch.setattr(_inductor, "_compile", lambda *a, **k: counted.append(None) or compile_(*a, **k))
    return counted


@pytest.mark.slow
def test_a_gradient_of_other_data_and_length_compiles_nothing(compilations):
    def slope(scan, w, xs):
        return grad(total(functools.partial(descent, scan)))(w, xs[0], xs)

    counts = []
    for seed in range(3):
        w, xs = normal(seed, 1)[0], normal(seed + 1, 5 + 4 * seed, 3)
        assert_agrees(slope(inductor, w, xs), slope(loop, w, xs))
        counts.append(len(compilations))
    assert counts[0] == counts[2] <= 2


# Refusals.


ONE = torch.tensor(1.0)
DECISIONS = {
    "if": lambda c, x: ((c if c > 0 else -c), None),
    "if of a closed-over tensor": lambda c, x: ((c if ONE > 0 else -c), None),
    "item": lambda c, x: (c * c.item(), None),
    "float": lambda c, x: (c * float(x), None),
    "int": lambda c, x: (c + int(x), None),
    "mask": lambda c, x: (c + x[x > 0].sum(), None),
}


@traced
@pytest.mark.parametrize("name", DECISIONS)
def test_a_body_that_decides_on_values_is_refused_with_its_line(name, options):
    f = DECISIONS[name]
    number = f.__code__.co_firstlineno
    gd.scan(f, ONE, torch.ones(2))  # is fine in Python
    with pytest.raises(BackendError, match=r"torch\.where") as caught:
        gd.scan(f, ONE, torch.ones(2), **options)
    assert f"{__file__}:{number}: `{linecache.getline(__file__, number).strip()}`" in str(caught.value)
    assert isinstance(caught.value, gd.GdfuncError)
    assert isinstance(caught.value, RuntimeError)


@traced
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


@traced
@pytest.mark.parametrize(
    "write",
    [torch.Tensor.add_, lambda log, x: log[1:].copy_(x), lambda log, x: log.__setitem__(0, x)],
)
def test_a_traced_body_that_writes_into_what_it_closes_over_is_refused(write, options):
    log = torch.zeros(3)

    def f(c, x):
        write(log, x)
        return c + log.sum(), None

    with pytest.raises(BackendError, match="f wrote into a tensor it closes over; let it return new"):
        gd.scan(f, ONE, torch.ones(2), **options)
    assert not log.any()


@traced
def test_a_module_that_updates_its_buffers_is_refused_and_keeps_them(options):
    with torch.random.fork_rng():
        norm = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(2, 2))
    buffers = dict(norm.named_buffers())
    with pytest.raises(BackendError, match="f wrote into a tensor it closes over"):
        gd.scan(lambda c, x: (norm(c), None), torch.ones(2), length=2, **options)
    assert len(buffers) == 2
    assert all(buffer is buffers[name] for name, buffer in norm.named_buffers())


@pytest.mark.parametrize("options", [{}, *TRACED, {"backend": "auto"}])
def test_errors_of_the_users_own_pass_through(options):
    def mistaken(c, x):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        gd.scan(mistaken, ONE, torch.ones(2), **options)
    mistakes = [
        (RuntimeError, r"size|broadcast", lambda c, x: (c + torch.ones(2) + torch.ones(3), None)),
        (ValueError, "carry changed from float32", lambda c, x: (c.double(), None)),
        (TypeError, "f must return a pair", lambda c, x: c),
        (TypeError, "y is float, not a Tensor", lambda c, x: (c, 1.0)),
    ]
    for kind, message, f in mistakes:
        with pytest.raises(kind, match=message):
            gd.scan(f, ONE, torch.ones(2), **options)


TWO = torch.tensor(2.0, dtype=torch.float64)
TALL = torch.arange(6.0, dtype=torch.float64).reshape(2, 3).T
WEIGHT = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))


FOLLOWED = {
    "jacrev": lambda c: torch.func.jacrev(lambda a: a**2)(c).sum(),
    "hessian": torch.func.hessian(lambda a: (TWO * a**3).sum()),
    "vjp": lambda c: torch.func.vjp(lambda a: a**2 * TWO, c)[1](c**2 * TWO)[0],
    "vjp of rows": lambda c: vmap(lambda s: torch.func.vjp(lambda a: a * s * TWO, c)[1](c)[0])(c),
    "numbers": lambda c: c * (TWO * torch.tensor(0.5)) + torch.tensor(1.0) ** TWO,
    "requires_grad": lambda c: c * (3 if WEIGHT.requires_grad else 1),
    "strides": lambda c: c * TALL.stride(0) + TALL.is_contiguous(),
    "data": lambda c: c * WEIGHT.data,
    "a copy": lambda c: c * copy.deepcopy(TWO),
    "an array": lambda c: c + torch.as_tensor(np.array([1.0, 2.0])),
}


@traced
@pytest.mark.parametrize("name", FOLLOWED)
def test_a_trace_follows_derivatives_metadata_and_constants(name, options):
    f = FOLLOWED[name]
    start = torch.tensor([1.0, 2.0], dtype=torch.float64)
    got, expected = (
        gd.scan(lambda c, x: (torch.sin(c), f(c)), start, length=2, **how) for how in (options, {})
    )
    assert_agrees(got, expected)


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


@pytest.mark.long
@traced
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


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*traced on every call")
def test_a_function_that_another_thread_applies_is_no_part_of_the_trace():
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


# The machine.


@pytest.mark.long
def test_the_cache_is_used_and_the_environment_left_alone():
    before = dict(os.environ)
    gd.scan(descend, normal(0, 3), normal(1, 5, 3), unroll=2, backend="inductor")
    assert dict(os.environ) == before
    assert any((gd._scan.backends._cache.private_directory() / "inductor").rglob("*.so"))


@pytest.mark.long
def test_no_compiler_is_one_clear_sentence():
    message = r"backend='inductor' needs a C\+\+ compiler, and none was found: install g\+\+ or clang\+\+$"
    missing = inductor_config.patch({"cpp.cxx": (None, "/nonexistent/g++")})
    with missing, pytest.raises(BackendError, match=message):
        gd.scan(lambda c, x: (c * 0.123456789, c), ONE, length=2, backend="inductor")


# auto


@pytest.fixture
def worth_compiling(monkeypatch, nothing_said):
    """Let backend='auto' compile every loop, and warn of every loss."""
    for cost, value in {"TRACE": 0.0, "INDUCTOR": (0.0, 0.0), "_WORTH_A_WARNING": 0.0}.items():
        monkeypatch.setattr(_cost, cost, value)


@pytest.mark.long
@pytest.mark.usefixtures("worth_compiling", "nothing_traced")
def test_auto_replays_with_one_warning_where_compiling_fails(monkeypatch):
    def fail(*args, **kwargs):
        raise BackendError("no such luck")

    monkeypatch.setattr(_inductor, "_compile", fail)
    monkeypatch.setattr(native, "_compiled", fail)
    w, p, xs = normal(0, 1)[0], normal(1, 3), normal(2, 4, 3)
    auto = functools.partial(gd.scan, backend="auto", unroll=3)
    with pytest.warns(gd.PerformanceWarning, match="runs 4 steps.* from Python.*: no such luck") as caught:
        got = descent(auto, w, p, xs)
    assert len(caught) == 1
    expected = descent(loop, w, p, xs)
    assert_agrees(got, expected)
    slope = grad(lambda w: descent(auto, w, p, xs)["moved"].square().sum())(w)
    assert_agrees(slope, grad(lambda w: descent(loop, w, p, xs)["moved"].square().sum())(w))
    with pytest.raises(BackendError, match="no such luck"):
        gd.scan(descend, p, xs, backend="inductor")
