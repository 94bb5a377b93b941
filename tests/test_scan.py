"""`scan` against the nine-line loop: bit for bit in Python, to rounding elsewhere; what it refuses."""

import functools
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, jvp, vmap

import gdfunc as gd

from .assertions import assert_agrees, assert_same_bits
from .references import descent, loop, normal, total
from .tables import BACKENDS, DEVICES, needs_cuda


def nested_body(carry, x):
    """A carry of several trees and dtypes, an int counter, and y's of several shapes."""
    a = torch.tanh(carry["a"] * 0.9 + x)
    b = [carry["b"][0] + 1, carry["b"][1] - 0.1 * a.sum()]
    return {"a": a, "b": b, "none": None}, (a * 2, {"count": carry["b"][0], "none": None})


def nested_init(seed):
    return {"a": normal(seed, 3), "b": [torch.tensor(0), normal(seed + 1)], "none": None}


@given(st.integers(0, 2**32), st.integers(1, 6), st.booleans())
def test_scan_is_the_nine_line_loop(seed, length, reverse):
    xs = normal(seed, length, 3)
    got = gd.scan(nested_body, nested_init(seed), xs, reverse=reverse)
    assert_same_bits(got, loop(nested_body, nested_init(seed), xs, reverse))


def test_xs_may_be_a_tree_of_arrays():
    def body(total, x):
        return total + x["a"] * x["b"][0], x["a"]

    xs = {"a": np.arange(3.0), "b": [torch.arange(3.0), None]}
    total, ys = gd.scan(body, torch.tensor(0.0, dtype=torch.float64), xs)
    assert total == 5
    assert ys.tolist() == [0, 1, 2]


def test_dict_carries_may_order_their_keys_otherwise():
    def swap(carry, x):
        return {"b": carry["b"] + 1, "a": carry["a"] * 2}, None

    carry, _ = gd.scan(swap, {"a": torch.tensor(1), "b": torch.tensor(0)}, length=3)
    assert carry == {"a": 8, "b": 3}


# The table: programs x transformations x backends.


def chained(scan, w, p, xs):
    """The first of two scans gets its cotangent from the second: pytorch#153679."""
    first = descent(scan, w, p, xs)
    return first, descent(scan, w, p + first["moved"], xs)


def from_a_constant(scan, w, p, xs):
    """The first carry is no function of what is differentiated: pytorch#184528."""
    return descent(scan, w, torch.ones_like(p), xs * p)


def many_leaves(scan, w, p, xs):
    """Dicts, tuples, None, a counter, a flag, and carries that go through unchanged or trade places."""

    def f(carry, x):
        (a, b), seen = carry["pair"], carry["seen"]
        new = torch.where(seen["up"], torch.tanh(a * w + x["row"]), a * x["last"])
        count = seen["count"] + 1
        y = {"new": new, "count": count, "none": None, "up": seen["up"], "same": (b, b)}
        seen = {"count": count, "up": ~seen["up"]}
        return {"seen": seen, "pair": (b * 0.9 + new, a), "none": None, "still": carry["still"]}, y

    seen = {"count": torch.zeros((), dtype=torch.int32), "up": torch.tensor(True)}
    seen = {name: leaf.to(p.device) for name, leaf in seen.items()}
    init = {"pair": (p, p * w), "seen": seen, "none": None, "still": w * w}
    if scan is loop:
        results = scan(lambda c, x: f(c, {"row": x, "last": x[-1]}), init, xs)
    else:
        results = scan(f, init, {"row": xs, "last": xs[:, -1], "none": None})
    assert [tree.pop("none", 0) for tree in results] == [None, None]  # vmap lets no None out
    return results


def closed_over_in_closed_over(scan, w, p, xs):
    """f differentiates and vmaps, by what it closes over, functions of what it closes over."""

    def f(carry, x):
        slope = grad(lambda v: (v * carry * p).sin().sum())(w)
        rows = vmap(lambda row: (row * w).cos() * carry)(xs[:2] * p)
        return carry * 0.5 + slope * x, rows.sum(0)

    return scan(f, torch.ones_like(p), xs)


def scan_in_scan(scan, w, p, xs):
    """The body scans, from its own carry and over what it closes over."""

    def f(carry, x):
        inner, ys = scan(lambda c, z: (torch.sin(c * w + z * x), c), carry, xs[:3])
        return inner + 0.1 * carry, ys[1] * w

    carry, ys = scan(f, p, xs)
    return carry - p, ys


def cut(scan, w, p, xs):
    """Where f says detach, no derivative passes."""

    def f(carry, x):
        still = torch.cos(carry.detach() * w)
        return torch.sin(carry * x.detach() + still * x) * w, carry.detach() * still + w.detach() * x

    return scan(f, p, xs)


def under_no_grad(scan, w, p, xs):
    """Where f says no_grad, no cotangent passes, and what is made there is still good for use."""

    def f(carry, x):
        with torch.no_grad():
            still = torch.cos(carry * w) * x
            with torch.enable_grad():
                moving = torch.sin(carry * w + still)
        return moving * still * w, moving + still.sum()

    return scan(f, p, xs)


def indexed(scan, w, p, xs):
    """A counter picks what is read and written, in place on tensors that f made."""

    def f(carry, x):
        i, table = carry
        at = (i % 3)[None]
        row = x * w * table * p
        row[0] += w
        row.add_(x.index_select(0, at) * table)
        row[1:] = row[1:].cumsum(0) * p[:2]
        return (i + 1, table.index_put((at,), row.max()) * 0.9), row[:-1] * w

    (i, table), ys = scan(f, (torch.zeros((), dtype=torch.int64, device=p.device), p), xs)
    return i, table - p, ys


PROGRAMS = {
    "descent": descent,
    "reversed": functools.partial(descent, reverse=True),
    "chained": chained,
    "from a constant": from_a_constant,
    "many leaves": many_leaves,
    "closed-over": closed_over_in_closed_over,
    "scan in scan": scan_in_scan,
    "cut": cut,
    "under no_grad": under_no_grad,
    "indexed": indexed,
}


@functools.cache
def data(device):
    """w [], p [3], xs [5, 3], and batches of them."""
    shapes = [(), (3,), (5, 3), (3,), (3, 4), (5, 3, 2)]
    return [normal(seed, *shape).to(device) for seed, shape in enumerate(shapes)]


def gradient(run):
    return grad(total(run), (0, 1, 2))


def backward(run, inputs, followed):
    """Plain autograd, with respect to those inputs that are followed."""
    leaves = [leaf.clone().requires_grad_(flag) for leaf, flag in zip(inputs, followed, strict=True)]
    total(run)(*leaves).backward()
    return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]


def along(function, inputs):
    """The derivative in one direction, as a function of the inputs."""
    w, p, xs = inputs
    return lambda *args: jvp(function, args, (w + 1, p.flip(0), xs.sin()))[1]


def slope(run, inputs):
    """The same by reverse mode."""
    w, p, xs = inputs
    pairs = lambda *args: zip(gradient(run)(*args), (w + 1, p.flip(0), xs.sin()), strict=True)  # noqa: E731
    return lambda *args: sum((g * d).sum() for g, d in pairs(*args))


def by_w(function):
    return vmap(function, (0, None, None))


# The members of a vmap are as many as the entries of an unbatched carry, or fewer: pytorch#195324.
# name: (a program as a function of w, p, xs; w, p, xs; three w's; p's [3, 4]; xs's [5, 3, 2]) -> results
TRANSFORMATIONS = {
    "value": lambda run, a, ws, ps, xss: run(*a),
    "grad": lambda run, a, ws, ps, xss: gradient(run)(*a),
    "jvp": lambda run, a, ws, ps, xss: along(total(run), a)(*a),
    "vmap, as many as entries": lambda run, a, ws, ps, xss: by_w(run)(ws, *a[1:]),
    "vmap, fewer than entries": lambda run, a, ws, ps, xss: by_w(run)(ws[:2], *a[1:]),
    "vmap over the carry": lambda run, a, ws, ps, xss: vmap(run, (None, 1, None))(a[0], ps, a[2]),
    "vmap over xs": lambda run, a, ws, ps, xss: vmap(run, (None, None, 2))(*a[:2], xss),
    "grad of grad": lambda run, a, ws, ps, xss: grad(slope(run, a), (0, 1, 2))(*a),
    "vmap of grad": lambda run, a, ws, ps, xss: by_w(gradient(run))(ws[:2], *a[1:]),
    "jvp of grad": lambda run, a, ws, ps, xss: along(gradient(run), a)(*a),
    "grad of jvp": lambda run, a, ws, ps, xss: grad(along(total(run), a), (0, 1, 2))(*a),
    "jvp of jvp": lambda run, a, ws, ps, xss: along(along(total(run), a), a)(*a),
    "grad of vmap": lambda run, a, ws, ps, xss: gradient(by_w(run))(ws[:2], *a[1:]),
    "jvp of vmap": lambda run, a, ws, ps, xss: along(by_w(total(run)), [ws, *a[1:]])(ws, *a[1:]),
    "vmap of jvp": lambda run, a, ws, ps, xss: by_w(along(total(run), a))(ws[:2], *a[1:]),
    "vmap of vmap": lambda run, a, ws, ps, xss: vmap(by_w(run), (None, 1, None))(ws, ps, a[2]),
    "grad of grad of grad": lambda run, a, ws, ps, xss: grad(grad(grad(total(run))))(*a),
    "backward, the carry followed": lambda run, a, ws, ps, xss: backward(run, a, (True, True, True)),
    "backward, the carry not followed": lambda run, a, ws, ps, xss: backward(run, a, (True, False, False)),
}


def transformed(program, transformation, scan, device="cpu"):
    """One cell of the table."""
    *inputs, ws, ps, xss = data(device)
    run = functools.partial(PROGRAMS[program], scan)
    return TRANSFORMATIONS[transformation](run, inputs, ws, ps, xss)


expected = functools.cache(functools.partial(transformed, scan=loop))


CHECKPOINTED = {"descent", "many leaves", "scan in scan"}


def table():
    """Every cell; most of those that take compilations, or long, only when slow tests are asked for."""
    for backend in BACKENDS:
        for program in PROGRAMS:
            for transformation in TRANSFORMATIONS:
                if program == "under no_grad" and "jvp" in transformation:
                    continue  # torch's forward mode does not know no_grad
                marks = [needs_cuda] if backend == "cudagraph" else []
                third = transformation == "grad of grad of grad" and program != "descent"
                # The native backend has the same transformations of transformations of the other programs.
                composed = (
                    " of " in transformation if backend == "replay" else transformation.endswith("of jvp")
                )
                second = composed and backend != "eager" and program not in CHECKPOINTED
                inductor = backend == "inductor" and (program, transformation) != ("descent", "value")
                if third or second or inductor:
                    marks.append(pytest.mark.slow)
                if third and (backend, program) == ("inductor", "scan in scan"):
                    twice = "Inductor's C++ declares a name twice"
                    marks.append(pytest.mark.xfail(raises=gd.BackendError, strict=False, reason=twice))
                yield pytest.param(backend, program, transformation, marks=marks)


@pytest.mark.parametrize(("backend", "program", "transformation"), list(table()))
def test_every_backend_is_the_loop_under_every_transformation(backend, program, transformation):
    scan = functools.partial(gd.scan, **BACKENDS[backend])
    got = transformed(program, transformation, scan, DEVICES.get(backend, "cpu"))
    assert_agrees(got, expected(program, transformation))


ZERO = torch.tensor(0.0)


def keep(carry, x):
    return carry, None


FINE = {"f": keep, "init": ZERO, "length": 1}
TREES = {"f": lambda c, x: ({"a": c["a"]}, None), "init": {"a": ZERO, "b": ZERO}}
BAD_CALLS = [
    ({"length": None}, ValueError, "scan needs xs with at least one leaf, or length"),
    ({"length": None, "xs": ()}, ValueError, "scan needs xs with at least one leaf, or length"),
    ({"length": -1}, ValueError, "length must be an int >= 0; got -1"),
    ({"length": True}, ValueError, "length must be an int >= 0; got True"),
    ({"length": 2.0}, ValueError, "length must be an int >= 0; got 2.0"),
    (
        {"length": None, "xs": {"a": torch.ones(3), "b": torch.ones(5)}},
        *(ValueError, "xs leaves and length disagree on the number of steps: xs['a'] has 3, xs['b'] has 5"),
    ),
    ({"xs": torch.ones(3), "length": 4}, ValueError, "steps: length has 4, xs has 3"),
    ({"xs": [ZERO]}, ValueError, "xs[0] is 0-d; scan goes over dim 0"),
    ({"xs": [1.0]}, TypeError, "xs[0] is float, not a Tensor"),
    ({"init": {"n": 0}}, TypeError, "init['n'] is int, not a Tensor; wrap it"),
    ({"unroll": 0}, ValueError, "unroll must be an int >= 1; got 0"),
    (
        {"backend": "xla"},
        *(
            ValueError,
            "backend must be 'eager' or 'native' or 'inductor' or 'cudagraph' or 'auto'; got 'xla'",
        ),
    ),
    ({"f": lambda c, x: c}, TypeError, "f must return a pair (carry, y); got Tensor"),
    ({"f": lambda c, x: (1.0, None)}, TypeError, "carry is float, not a Tensor"),
    ({"f": lambda c, x: (c, 1.0)}, TypeError, "y of step 0: y is float, not a Tensor"),
    (TREES, ValueError, "carry does not have the structure of init: missing init['b']"),
    (
        {"f": lambda c, x: ({"a": c["a"][None]}, None), "init": {"a": ZERO}},
        *(
            ValueError,
            "carry['a'] changed from float32 () on cpu to float32 (1,) on cpu; it must keep its shape",
        ),
    ),
    (
        {"f": lambda c, x: (c.double(), None)},
        ValueError,
        "changed from float32 () on cpu to float64 () on cpu",
    ),
    (
        {"f": lambda c, x: (c.to("meta"), None)},
        ValueError,
        "changed from float32 () on cpu to float32 () on meta",
    ),
    (
        {"f": lambda c, x: (c + 1, {"y": c.new_zeros(int(c))}), "length": 2},
        *(ValueError, "y of step 1: y['y'] changed from float32 (0,) on cpu to float32 (1,) on cpu"),
    ),
    (
        {"f": lambda c, x: (c + 1, {"y": c} if c else {"z": c}), "length": 2},
        *(ValueError, "y of step 1 does not have the structure of y of step 0"),
    ),
]


@pytest.mark.parametrize(("changed", "kind", "message"), BAD_CALLS)
def test_bad_calls_raise(changed, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        gd.scan(**FINE | changed)
