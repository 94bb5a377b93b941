"""A traced `scan` against the nine-line loop for drawn bodies; what a trace must notice; memory."""

import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, jvp, vmap

import gdfunc as gd
from gdfunc._scan.trace import _trace
from gdfunc._sweep._memory import Memory
from gdfunc.adjoints import Checkpoint

from .references import loop, normal, total

REVERSE = gd.adjoints.Reverse()

# A grammar of bodies: an operation makes a vector [3] of two others and of f's counter, flag and closure.


def in_place(a, b, f):
    fresh = a * f.v + b
    fresh.mul_(0.5).add_(a).sin_()
    return fresh


def in_place_in_part(a, b, f):
    fresh = a * f.v + b
    fresh[1:] = b[:-1]
    fresh[0] += 0.1
    return fresh


OPERATIONS = {
    "sin": lambda a, b, f: torch.sin(a),
    "tanh": lambda a, b, f: torch.tanh(a + f.v),
    "exp": lambda a, b, f: torch.exp(torch.tanh(a)),
    "mul": lambda a, b, f: a * b,
    "add": lambda a, b, f: a - 0.5 * b,
    "matmul": lambda a, b, f: f.matrix @ a,
    "sum": lambda a, b, f: a.sum() * f.v,
    "where": lambda a, b, f: torch.where(a > b, a, f.v * b),
    "where flagged": lambda a, b, f: torch.where(f.flag, a, b),
    "cumsum": lambda a, b, f: a.cumsum(0),
    "slice": lambda a, b, f: torch.cat([a[1:], b[:1]]),
    "stride": lambda a, b, f: a.flip(0)[::2].sum() + b,
    "index": lambda a, b, f: a.index_select(0, f.count.remainder(3)[None]) * b,
    "index of the matrix": lambda a, b, f: f.matrix.index_select(1, f.count.remainder(3)[None])[:, 0] + a,
    "max": lambda a, b, f: a.max() * b,
    "mask": lambda a, b, f: a * (b > 0),
    "in place": in_place,
    "in place in part": in_place_in_part,
    "inner grad": lambda a, b, f: grad(lambda z: (z * b).sin().sum())(a),
    "inner grad by what is closed over": lambda a, b, f: grad(lambda z: (z * a * b).sin().sum())(f.v),
    "inner vmap": lambda a, b, f: vmap(lambda row: (row * b).sum())(f.matrix) + a,
    "detach": lambda a, b, f: a.detach() * b,
}
TREES = [  # how vectors a and b, a counter and a flag are packed into a carry, and unpacked
    (
        lambda a, b, n, on: {"a": a, "rest": (b, n, None), "on": on},
        lambda t: (t["a"], *t["rest"][:2], t["on"]),
    ),
    (lambda a, b, n, on: [[on, a], {"z": n, "y": b}], lambda t: (t[0][1], t[1]["y"], t[1]["z"], t[0][0])),
]
lines = st.tuples(st.sampled_from(sorted(OPERATIONS)), st.integers(0, 9), st.integers(0, 9))


@st.composite
def programs(draw):
    """A function (scan, v, matrix, init, xs) -> results of drawn operations, tree and direction."""
    code = draw(st.lists(lines, min_size=1, max_size=5))
    pack, unpack = draw(st.sampled_from(TREES))
    outputs = draw(st.lists(st.integers(0, 9), max_size=3))
    reverse = draw(st.booleans())

    def program(scan, v, matrix, init, xs):
        def f(carry, x):
            a, b, count, flag = unpack(carry)
            here = types.SimpleNamespace(v=v, matrix=matrix, count=count, flag=flag)
            made = [a, b, x]
            for name, i, j in code:
                made.append(OPERATIONS[name](made[i % len(made)], made[j % len(made)], here))
            new = torch.tanh(made[-1]), torch.sin(made[-2] + x)
            y = {"rows": [made[i % len(made)] for i in outputs], "count": count, "none": None}
            return pack(*new, count + 1, ~flag), y

        first = pack(init, init * v, torch.tensor(0), torch.tensor(True))
        carry, ys = scan(f, first, xs, reverse=reverse)
        return [leaf for leaf in gd._tree.leaves((unpack(carry), ys)) if leaf is not None]

    return program


def derivative(run, args):
    return jvp(total(run), args, tuple(torch.cos(leaf) for leaf in args))


TRANSFORMATIONS = {
    "value": lambda run, args: run(*args),
    "grad": lambda run, args: grad(total(run), (0, 1, 2, 3))(*args),
    "jvp": derivative,
    "vmap": lambda run, args: vmap(run, (0, None, None, None))(torch.stack([args[0], args[2]]), *args[1:]),
    "vmap of the matrix": lambda run, args: vmap(run, (None, 2, None, None))(
        args[0], torch.stack([args[1], args[1].T], 2), *args[2:]
    ),
    "vmap of grad": lambda run, args: vmap(grad(total(run)), (None, None, 0, None))(
        *args[:2], torch.stack([args[0], args[2]]), args[3]
    ),
}


def agrees(program, transformation, length, seed, **options):
    """Whether a program's results under a transformation are those of the loop."""
    args = normal(seed, 3), normal(seed + 1, 3, 3), normal(seed + 2, 3), normal(seed + 3, length, 3)
    transform = TRANSFORMATIONS[transformation]
    expected = transform(lambda *a: program(loop, *a), args)

    def traced(*a):
        return program(lambda f, init, xs, **k: gd.scan(f, init, xs, **options, **k), *a)

    torch.testing.assert_close(transform(traced, args), expected, rtol=1e-9, atol=1e-11)


bodies = given(
    programs(),
    st.sampled_from(sorted(TRANSFORMATIONS)),
    st.integers(1, 5),
    st.integers(1, 6),
    st.integers(0, 2**32),
)


@bodies
def test_a_traced_scan_is_the_loop_for_any_body(program, transformation, length, every, seed):
    agrees(program, transformation, length, seed, adjoint=Checkpoint(every))


def test_forward_over_reverse_where_some_of_the_carry_has_no_tangent():
    def run(scan, a):
        (a, b), ys = scan(
            lambda c, x: ((c[0].sin(), c[1].cos() * x[0]), c[1]), (a, normal(1, 2)), normal(2, 3, 2)
        )
        return a.sin().sum() + b.sum() + ys.sum()

    a = normal(0, 4)
    got, expected = (
        jvp(grad(lambda a: run(scan, a)), (a,), (a.cos(),))[1]  # noqa: B023
        for scan in (lambda f, init, xs: gd.scan(f, init, xs, backend="native"), loop)
    )
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("options", [{"adjoint": Checkpoint(1)}, {"backend": "native"}])
def test_what_is_a_view_alone_need_not_be_one_under_vmap(options):
    kernel, xs = normal(0, 3, 2, 2, 2), normal(1, 2, 2, 2, 4, 3)

    def run(scan, k):
        return scan(
            lambda c, x: (torch.nn.functional.conv2d(x, c).flatten().cumsum(0).tanh().sum() * c, c), k, xs
        )[1]

    kernels = torch.stack([kernel, kernel + 0.1])
    got, expected = (
        vmap(lambda k: run(scan, k))(kernels)  # noqa: B023
        for scan in (lambda f, init, xs: gd.scan(f, init, xs, **options), loop)
    )
    torch.testing.assert_close(got, expected)


# A trace is for one state of Python.

FACTOR = 2.0


def test_no_trace_is_stale(monkeypatch):
    start = torch.tensor(1.0)
    settings = types.SimpleNamespace(rate=2.0, factors=[2.0])
    rate = 2.0

    def by_global(c, x):
        return c * FACTOR, None

    def by_closure(c, x):
        return c * rate, None

    def by_attribute(c, x):
        return c * settings.rate, None

    def by_item(c, x):
        return c * settings.factors[0], None

    def run(f):
        return gd.scan(f, start, length=2, adjoint=Checkpoint(1))[0].item()

    bodies = [by_global, by_closure, by_attribute, by_item]
    assert [run(f) for f in bodies] == [4.0] * 4
    monkeypatch.setitem(globals(), "FACTOR", 3.0)
    rate = settings.rate = settings.factors[0] = 3.0
    assert [run(f) for f in bodies] == [9.0] * 4
    monkeypatch.setitem(globals(), "FACTOR", 2.0)
    rate = settings.rate = settings.factors[0] = 2
    assert [run(f) for f in bodies] == [4.0] * 4


def test_scans_inside_that_differ_in_length_are_not_taken_for_each_other():
    start = torch.tensor(1.0, dtype=torch.float64)
    for steps in (2, 3):

        def f(c, x):
            return gd.scan(lambda d, _: (d * 0.5, None), c, length=steps, adjoint=Checkpoint(1))[0], None  # noqa: B023

        assert gd.scan(f, start, length=2, adjoint=Checkpoint(1))[0] == 0.5 ** (2 * steps)


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_a_trace_is_for_one_default_dtype(default):
    def f(c, x):
        return c, torch.ones(())

    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        _, ys = gd.scan(f, torch.zeros(2), length=2, adjoint=Checkpoint(1))
    finally:
        torch.set_default_dtype(before)
    assert ys.dtype == default


@pytest.fixture
def traces(monkeypatch):
    """Counts the traces that are made."""
    counted, record = [], _trace._record
    monkeypatch.setattr(_trace, "_record", lambda *args: counted.append(None) or record(*args))
    return counted


def test_equal_functions_of_other_tensors_are_traced_once(traces):
    def run(w, p, xs, rate=0.5):
        return gd.scan(lambda c, x: (c - rate * torch.sin(c * w) * x, c), p, xs, adjoint=Checkpoint(2))[0]

    for seed in range(3):
        w, p = normal(seed, 3), normal(seed + 1, 3)
        for length in (4, 7):
            xs = normal(seed + 2, length)
            expected, _ = loop(lambda c, x: (c - 0.5 * torch.sin(c * w) * x, c), p, xs)  # noqa: B023
            torch.testing.assert_close(run(w, p, xs), expected)
    assert len(traces) == 2  # a new trace is made twice
    run(w, p, xs, rate=0.25)
    run(w.float(), p.float(), xs.float())
    run(w[:1], p, xs)
    assert len(traces) == 8


def test_a_trace_is_for_one_kind_of_carry_and_of_x():
    def f(c, x):
        return c * 2, (torch.ones(c.shape, dtype=c.dtype), torch.zeros(x.shape, dtype=x.dtype))

    for dtype in (torch.float32, torch.float64):
        for size in (2, 3):
            small, large = torch.ones(1), torch.ones(4, size, dtype=dtype)
            for init, xs in ((large[0], small), (small[0], large)):
                _, ys = gd.scan(f, init, xs, adjoint=Checkpoint(1))
                assert [y.shape[1:] for y in ys] == [init.shape, xs.shape[1:]]
                assert [y.dtype for y in ys] == [init.dtype, xs.dtype]


# Memory.


def peak_of_backward(length, adjoint, transform):
    w, p = normal(0, 1)[0], normal(1, 1000)

    def loss(w):
        carry, _ = gd.scan(
            lambda c, x: (torch.sin(c * w) + torch.cos(c), None), p, length=length, adjoint=adjoint
        )
        return carry.sum()

    transform(loss, w)  # the traces, which are made once
    with Memory() as live:
        transform(loss, w)
    return live.peak


def by_autograd(loss, w):
    loss(w.clone().requires_grad_()).backward()


@pytest.mark.parametrize("transform", [by_autograd, lambda loss, w: grad(loss)(w)])
@pytest.mark.parametrize(
    ("adjoint", "least", "most"),
    [
        (REVERSE, 3.5, 4.2),
        (Checkpoint("sqrt"), 1.7, 2.3),
        (Checkpoint(1), 3.5, 4.2),
        (Checkpoint(10**9), 3.5, 4.2),
        (Checkpoint(carries=8), 0.99, 1.05),
    ],
    ids=str,
)
def test_a_checkpointed_backward_pass_grows_as_the_root_of_the_steps(adjoint, least, most, transform):
    short, long = (peak_of_backward(length, adjoint, transform) for length in (64, 256))
    assert least < long / short < most


def test_checkpointing_bounds_the_peak():
    carry = 8 * 1000
    all_carries = peak_of_backward(256, REVERSE, by_autograd)
    assert all_carries > 256 * carry
    assert peak_of_backward(256, Checkpoint("sqrt"), by_autograd) < all_carries / 4
