"""`scan` against the nine-line loop, bit for bit, and what it refuses."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, jvp, vmap

import gdfunc as gd

from .references import normal, scan_reference, storages


def nested_body(carry, x):
    """A carry of several trees and dtypes, an int counter, and y's of several shapes."""
    a = torch.tanh(carry["a"] * 0.9 + x)
    b = [carry["b"][0] + 1, carry["b"][1] - 0.1 * a.sum()]
    return {"a": a, "b": b, "none": None}, (a * 2, {"count": carry["b"][0], "none": None})


def nested_init(seed):
    return {
        "a": normal(seed, 3),
        "b": [torch.tensor(0), normal(seed + 1, 1)[0].float().double()],
        "none": None,
    }


def assert_same_bits(got, expected):
    if isinstance(expected, torch.Tensor):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)
    elif isinstance(expected, dict):
        assert list(got) == list(expected)
        for name in expected:
            assert_same_bits(got[name], expected[name])
    elif isinstance(expected, (list, tuple)):
        assert len(got) == len(expected)
        for pair in zip(got, expected, strict=True):
            assert_same_bits(*pair)
    else:
        assert got is expected is None


@given(st.integers(0, 2**32), st.integers(1, 6), st.booleans())
def test_scan_is_the_nine_line_loop(seed, length, reverse):
    xs = normal(seed, length, 3)
    carry, ys = gd.scan(nested_body, nested_init(seed), xs, reverse=reverse)
    expected, expected_ys = scan_reference(nested_body, nested_init(seed), xs, reverse)
    assert_same_bits(carry, expected)
    assert_same_bits(ys[0], torch.stack([y[0] for y in expected_ys]))
    assert_same_bits(ys[1]["count"], torch.stack([y[1]["count"] for y in expected_ys]))
    assert ys[1]["none"] is None


@given(st.integers(0, 2**32), st.integers(0, 5), st.integers(0, 5))
def test_scan_over_a_then_b_is_scan_over_both(seed, first, second):
    xs = normal(seed, first + second, 3)
    carry, ys_a = gd.scan(nested_body, nested_init(seed), xs[:first])
    carry, ys_b = gd.scan(nested_body, carry, xs[first:])
    whole, ys = gd.scan(nested_body, nested_init(seed), xs)
    assert_same_bits(carry, whole)
    assert_same_bits(torch.cat([ys_a[0], ys_b[0]]), ys[0])


def test_xs_may_be_a_tree_of_arrays():
    def body(total, x):
        return total + x["a"] * x["b"][0], x["a"]

    xs = {"a": np.arange(3.0), "b": [torch.arange(3.0), None]}
    total, ys = gd.scan(body, torch.tensor(0.0, dtype=torch.float64), xs)
    assert total == 5
    assert ys.tolist() == [0, 1, 2]


def test_length_without_xs():
    carry, ys = gd.scan(lambda c, x: (c + 1, x), torch.tensor(0), length=4)
    assert carry == 4
    assert ys is None


@pytest.mark.parametrize("reverse", [False, True])
def test_zero_steps_give_init_and_empty_outputs(reverse):
    init = nested_init(0)
    carry, ys = gd.scan(nested_body, init, torch.empty(0, 3, dtype=torch.float64), reverse=reverse)
    assert_same_bits(carry, init)
    assert ys[0].shape == (0, 3)
    assert ys[0].dtype == torch.float64
    assert ys[1]["count"].dtype == torch.int64


def test_outputs_are_the_callers_own():
    init, closed_over = normal(0, 2), normal(1, 2)
    bodies = [
        lambda c, x: (c, c),
        lambda c, x: ((c[0], c[0]), c[0]),
        lambda c, x: (closed_over, closed_over),
    ]
    for body, first in zip(bodies, [init, (init, init.clone()), init], strict=True):
        for length in (0, 1, 2):
            carry, ys = gd.scan(body, first, length=length)
            leaves = [*(carry if isinstance(carry, tuple) else [carry])]
            places = storages([init, closed_over, *leaves, *([ys] if length else [])])
            assert len(set(places)) == len(places)


def test_dict_carries_may_order_their_keys_otherwise():
    def swap(carry, x):
        return {"b": carry["b"] + 1, "a": carry["a"] * 2}, None

    carry, _ = gd.scan(swap, {"a": torch.tensor(1), "b": torch.tensor(0)}, length=3)
    assert carry == {"a": 8, "b": 3}


def total(w, xs):
    carry, ys = gd.scan(lambda c, x: (torch.sin(c * w + x), c), torch.zeros((), dtype=xs.dtype), xs)
    return carry + ys.sum()


def loop_total(w, xs):
    carry, ys = scan_reference(lambda c, x: (torch.sin(c * w + x), c), torch.zeros((), dtype=xs.dtype), xs)
    return carry + sum(ys)


def test_transformations_go_through():
    w, xs, tangent = normal(0, 1)[0], normal(1, 5), normal(2, 1)[0]
    torch.testing.assert_close(grad(total, (0, 1))(w, xs), grad(loop_total, (0, 1))(w, xs))
    torch.testing.assert_close(grad(grad(total))(w, xs), grad(grad(loop_total))(w, xs))
    torch.testing.assert_close(
        jvp(lambda w: total(w, xs), (w,), (tangent,)), jvp(lambda w: loop_total(w, xs), (w,), (tangent,))
    )
    many = normal(3, 4)
    torch.testing.assert_close(
        vmap(grad(total), (0, None))(many, xs), torch.stack([grad(loop_total)(w, xs) for w in many])
    )
    eps = 1e-6
    slope = (loop_total(w + eps, xs) - loop_total(w - eps, xs)) / (2 * eps)
    torch.testing.assert_close(grad(total)(w, xs), slope, rtol=1e-8, atol=1e-8)


def test_a_shared_init_under_vmap_is_each_members_own():
    # pytorch#195324: with as many members as entries the wrong axis can pass for the right one.
    for members in (2, 3):
        factors = normal(0, members)
        init = normal(1, 2)
        rows = vmap(lambda a: gd.scan(lambda c, x: (c * a, c), init, length=3)[0])(factors)  # noqa: B023
        torch.testing.assert_close(rows, torch.stack([init * a * a * a for a in factors]))


ZERO = torch.tensor(0.0)


def keep(carry, x):
    return carry, None


BAD_CALLS = [
    (lambda: gd.scan(keep, ZERO), ValueError, "scan needs xs with at least one leaf, or length"),
    (lambda: gd.scan(keep, ZERO, ()), ValueError, "scan needs xs with at least one leaf, or length"),
    (lambda: gd.scan(keep, ZERO, length=-1), ValueError, "length must be an int >= 0; got -1"),
    (lambda: gd.scan(keep, ZERO, length=True), ValueError, "length must be an int >= 0; got True"),
    (lambda: gd.scan(keep, ZERO, length=2.0), ValueError, "length must be an int >= 0; got 2.0"),
    (
        lambda: gd.scan(keep, ZERO, {"a": torch.ones(3), "b": torch.ones(5)}),
        ValueError,
        "xs leaves and length disagree on the number of steps: xs['a'] has 3, xs['b'] has 5",
    ),
    (lambda: gd.scan(keep, ZERO, torch.ones(3), 4), ValueError, "steps: length has 4, xs has 3"),
    (lambda: gd.scan(keep, ZERO, [ZERO]), ValueError, "xs[0] is 0-d; scan goes over dim 0"),
    (lambda: gd.scan(keep, ZERO, [1.0]), TypeError, "xs[0] is float, not a Tensor"),
    (lambda: gd.scan(keep, {"n": 0}, length=1), TypeError, "init['n'] is int, not a Tensor; wrap it"),
    (lambda: gd.scan(keep, ZERO, length=1, unroll=0), ValueError, "unroll must be an int >= 1; got 0"),
    (
        lambda: gd.scan(keep, ZERO, length=1, backend="xla"),
        ValueError,
        "backend must be 'eager'; got 'xla'",
    ),
    (
        lambda: gd.scan(lambda c, x: (c.add_(1), None), ZERO.clone(), length=2),
        ValueError,
        "f wrote into its carry or x; it must return new tensors instead",
    ),
    (
        lambda: gd.scan(lambda c, x: (c + x.mul_(2), None), ZERO, torch.ones(2)),
        ValueError,
        "f wrote into its carry or x",
    ),
    (
        lambda: gd.scan(lambda c, x: c, ZERO, length=1),
        TypeError,
        "f must return a pair (carry, y); got Tensor",
    ),
    (lambda: gd.scan(lambda c, x: (1.0, None), ZERO, length=1), TypeError, "carry is float, not a Tensor"),
    (
        lambda: gd.scan(lambda c, x: (c, 1.0), ZERO, length=1),
        TypeError,
        "y of step 0: y is float, not a Tensor",
    ),
    (
        lambda: gd.scan(lambda c, x: ({"a": c["a"]}, None), {"a": ZERO, "b": ZERO}, length=1),
        ValueError,
        "carry does not have the structure of init: missing init['b']",
    ),
    (
        lambda: gd.scan(lambda c, x: ({"a": c["a"][None]}, None), {"a": ZERO}, length=1),
        ValueError,
        "carry['a'] changed from float32 () on cpu to float32 (1,) on cpu; it must keep its shape",
    ),
    (
        lambda: gd.scan(lambda c, x: (c.double(), None), ZERO, length=1),
        ValueError,
        "carry changed from float32 () on cpu to float64 () on cpu",
    ),
    (
        lambda: gd.scan(lambda c, x: (c.to("meta"), None), ZERO, length=1),
        ValueError,
        "carry changed from float32 () on cpu to float32 () on meta",
    ),
    (
        lambda: gd.scan(lambda c, x: (c + 1, {"y": c.new_zeros(int(c))}), ZERO, length=2),
        ValueError,
        "y of step 1: y['y'] changed from float32 (0,) on cpu to float32 (1,) on cpu",
    ),
    (
        lambda: gd.scan(lambda c, x: (c + 1, {"y": c} if c else {"z": c}), ZERO, length=2),
        ValueError,
        "y of step 1 does not have the structure of y of step 0",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD_CALLS)
def test_bad_calls_raise(call, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        call()
