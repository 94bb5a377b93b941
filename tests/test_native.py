"""The native backend against eager, operator by operator: shapes, dtypes, NaN, ∞, −0.0, empty axes."""

import functools
import os
import re
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from math import inf, nan, pi
from types import SimpleNamespace

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import gdfunc as gd
from gdfunc._errors import BackendError
from gdfunc._scan import _body
from gdfunc._scan.backends import native

from .references import COMPILED, normal
from .tables import TABLE

HOSTILE = [0.0, -0.0, 1.0, -1.0, 0.5, -2.5, 3.0, pi, 1e-3, 1e30, -1e30, 1e-40, inf, -inf, nan]


def of_torch(names):
    return {name: getattr(torch, name) for name in names.split()}


# Functions of the C library may be a few units in the last place off; all else has the same bits.
FUNCTIONS = of_torch(
    "exp exp2 expm1 log log1p log2 log10 sin cos tan asin acos atan sinh cosh tanh erf erfc sigmoid "
    "sqrt rsqrt asinh acosh atanh sinc erfinv logit xlogy atan2 hypot"
)
FUNCTIONS |= {
    "silu": functional.silu,
    "softplus": functional.softplus,
    "elu": functional.elu,
    "sqrt by pow": lambda a: a**0.5,
    "pow 2.5": lambda a: a**2.5,
    "pow": lambda a, b: a**b,
    "2 ** a": lambda a: 2.0**a,
}
HALVES = torch.bfloat16, torch.float16
LAYERS = {"w": (6, 16), "b": (16,), "v": (16, 3)}
EXACT = of_torch(
    "neg abs sign reciprocal floor ceil trunc round relu isnan isinf isfinite logical_not square "
    "maximum minimum add sub mul div copysign eq ne lt le gt ge logical_and logical_or logical_xor "
    "nan_to_num frac fmax fmin signbit heaviside deg2rad rsub"
)
EXACT |= {
    "numbers": lambda a: (a + 0.1, 2 - a, a / 3, 0.3 / a, a > 0.1, a.remainder(0.3), a * (a > 0)),
    "powers": lambda a: (a**3, a**-1, a**-2, a**0),
    "clamp": lambda a: (a.clamp(-0.3, 0.7), a.clamp_min(0.1), torch.where(a > 0, a, 0.0)),
    "clamp by tensors": lambda a, b: (torch.clamp(a, max=b), torch.where(a > b, a, b)),
    # Quotients that are too large are NaN in torch's vectors.
    "fmod": lambda a, b: torch.fmod(a.clamp(-99, 99), b.clamp(0.1, 50)),
    "fmod of negative": lambda a, b: torch.fmod(a.clamp(-99, 99), b.clamp(-50, -0.1)),
    "remainder": lambda a, b: torch.remainder(a.clamp(-99, 99), b.clamp(0.1, 50)),
    "remainder of negative": lambda a, b: torch.remainder(a.clamp(-99, 99), b.clamp(-50, -0.1)),
    "remainder of zero": lambda a, b: torch.remainder(a.clamp(-99, 99), b * 0),
    "nextafter": lambda a, b: torch.nextafter(
        *(each.float() if each.dtype in HALVES else each for each in (a, b))
    ),
    # As for quotients, of which the largest are not whole in torch's vectors.
    "floor_divide": lambda a, b: a.clamp(-99, 99) // b.clamp(0.1, 50),
    "floor_divide of negative": lambda a, b: a.clamp(-99, 99) // b.clamp(-50, -0.1),
    "floor_divide by zero": lambda a, b: a // (b * 0),
    "floor_divide by numbers": lambda a: (
        a.clamp(-99, 99) // 0.3,
        a.clamp(-99, 99) // -7,
        3 // a.clamp(1, 9),
    ),
    "div, floor": lambda a, b: torch.div(a.clamp(-9, 9), b.clamp(-5, -0.1), rounding_mode="floor"),
    "slope of sigmoid": lambda a, b: torch.ops.aten.sigmoid_backward(a, b),
    "div, trunc": lambda a, b: torch.div(a, b, rounding_mode="trunc"),
    "div by numbers": lambda a: (
        torch.div(a, 0.3, rounding_mode="trunc"),
        torch.div(a.clamp(-9, 9), -7, rounding_mode="floor"),
    ),
    "leaky": lambda a: functional.leaky_relu(a),
    "hardtanh": lambda a: functional.hardtanh(a),
    "threshold": lambda a: functional.threshold(a, 0.1, 7.0),
    "casts": lambda a: (a.double().float().to(a.dtype), (a > 0).to(a.dtype) + 1, (a >= 0).to(torch.int64)),
}
GAMMAS = of_torch("lgamma digamma") | {  # next to their roots below 0 only to a share of their slopes
    "trigamma": lambda a: torch.polygamma(1, a),
    "digamma by its order": lambda a: torch.polygamma(0, a),
}
FUSED = {  # of two roundings torch may make one
    "add, alpha": lambda a, b: torch.add(a, b, alpha=0.7),
    "sub, alpha": lambda a, b: torch.sub(a, b, alpha=-3),
    "lerp": lambda a, b: torch.lerp(a, b, 0.25),
    "addcmul": lambda a, b: torch.addcmul(a, b, torch.tensor(0.3, dtype=a.dtype), value=0.5),
}
CANCELLING = {  # next to zero only to a share of what was subtracted
    "gelu": functional.gelu,
    "gelu by tanh": lambda a: functional.gelu(a, approximate="tanh"),
    "mish": functional.mish,
    "logit": lambda a: torch.logit(torch.sigmoid(a), eps=1e-3),
    "log_sigmoid": functional.logsigmoid,
    "bce": lambda a: functional.binary_cross_entropy_with_logits(a, (a > 0).to(a.dtype)),
    "huber": lambda a: functional.huber_loss(a, a * 0, reduction="none"),
    "smooth l1": lambda a: functional.smooth_l1_loss(a, a * 0, reduction="none"),
}


def of_integers(a, b):
    flat, column = a.flatten(), a.flatten()[:50, None]
    most = 2**31 - 1 if a.dtype is torch.int32 else 2**63 - 1
    sums = a + b, a * b, a - 3 * b, a.sum(), (a > b).sum(), flat.cumsum(0), flat.cumprod(0)
    signs = -a, a.abs(), a.sign(), a.signbit(), a**2, a.floor() + a.round()
    bits = a & b, a | b, a ^ b, ~a, a << 3, a >> 2
    quotients = a % 7, a % most, a // 3, torch.div(a, 3, rounding_mode="trunc"), torch.fmod(a, 3), a / b
    over = torch.where(b == 0, -1, b)
    mixed = a // over.to(torch.int8), a.double() // over, a // over.float(), a % -3, a // -3, 100 // over
    halves = a // over, a % over, torch.fmod(a, over), torch.div(a, over, rounding_mode="trunc"), mixed
    least = torch.iinfo(a.dtype).min // over.clamp(-1, -1), torch.iinfo(a.dtype).min % over.clamp(-1, -1)
    choices = torch.maximum(a, b), a.clamp(-2, 2), torch.where(a > b, a, b), *flat[:50].sort(stable=True)
    masks = a > b, a > 0.5, (a > b) & (b > 0) | ~(a > 0), (a > b).any(), (a > b).all(), a.bool()
    product = column * 3 @ b.flatten()[None, :50] @ column
    casts = a * 0.5, torch.exp(a % 3), a.float() + b.double()
    return sums, signs, bits, quotients, halves, least, choices, masks, product, casts


def reductions(a):
    sums = a.sum(), a.sum(0), a.sum(-1), a.sum(1, keepdim=True), a.sum((0, 2)), a.sum(0).sum(-1)
    means = a.mean(), a.mean(-1), a.prod(-1), a.var(-1), a.std(0), a.norm(), a.norm(dim=1)
    exponentials = a.softmax(-1), a.log_softmax(0), a.logsumexp(1)
    norms = functional.group_norm(a, 1, a[0, :, 0], eps=0.1), functional.layer_norm(a, a.shape[-1:])
    running = a.cumsum(1), a.cumprod(-1)
    quantile = () if a.dtype in HALVES else a.quantile(0.5, 0)  # torch has none
    return sums, means, exponentials, norms, running, quantile, a.flatten() @ a.flatten()


def extrema(a):
    extremes = a.amax(-1), a.amax(0), a.amin((0, 2)), a.max(), *a.max(1), *a.min(-1)
    places = a.argmax(-1), a.argmin(0), a.argmax()
    running = *a.cummax(0), *a.cummin(-1), *a[0, 0, 0].cummax(0), *(a > 0).cummax(1), *a[:, :1].cummin(1)
    in_order = *a.sort(stable=True, dim=0), *a.sort(stable=True, dim=-1, descending=True)
    of_numbers = a.sort(dim=0).values.view(-1), *a.amax().sort(), *a.amax().median(0)
    b = a + 0.0  # because which of 0 and -0 torch takes is chance
    middles = b.kthvalue(1 + a.shape[1] // 3, 1).values, b.median(1, keepdim=True).values
    best = b.topk(1 + a.shape[0] // 2, 0).values, b.topk(1, largest=False).values
    pool = functional.max_pool1d(a, 2, 1, 1, return_indices=True)
    ceil = {"dilation": (1, 2), "ceil_mode": True, "return_indices": True}
    pools = *pool, *functional.max_pool2d(a, 2, (3, 1), 1, **ceil)
    return extremes, places, running, in_order, of_numbers, b.flatten()[:50].median(), middles, best, pools


def views(a):
    permuted = a.mT, a.permute(2, 0, 1), a.permute(2, 0, 1).reshape(a.shape[1], -1), a.mT.flatten()
    expanded = a[:, None] * 2, a[:, :, :1].expand(a.shape), a[:, :1].expand(a.shape).flatten()
    parts = a[:, 1:], a[:, ::2, -1:], a[..., -1], a[:, 0] + a[:, -1], a.unbind(1)[0], a.split(2, 0)[-1]
    moved = a.flip(0, 2), a.roll(1, 1), a.movedim(0, -1) + 1, a[:1].squeeze(0), a.chunk(2, 2)[0] * 2
    repeated = a.repeat(2, 1, 3), a.tile(2, 1), torch.stack([a, a + 1], -1)
    joined = torch.cat([a, a[:, :1] * 2, a.flip(1)], 1)
    padded = functional.pad(a, (1, 2, 0, 1), value=3.0), functional.pad(a, (-1, 2, 1, -1), value=3.0)
    windows = a.unfold(1, 2, 1) * 2, a.unfold(0, 2, 1).unfold(2, 2, 3).flatten(1)
    diagonal = torch.diagonal_scatter(a, a.diagonal(-1, 0, 2) * 2, -1, 0, 2)
    ranges = a * torch.arange(a.shape[-1]), a * torch.linspace(0, 1, a.shape[-1], dtype=a.dtype)
    made = torch.eye(a.shape[-1], dtype=a.dtype) + 0, torch.full((3,), 2.5, dtype=a.dtype)
    ones = functional.one_hot(torch.arange(a.shape[0]) % 2, 2)
    return permuted, expanded, parts, moved, repeated, joined, padded, windows, diagonal, ranges, made, ones


# A body with all functions of a table takes a second to compile: few examples, and none to make them small.
few = settings(max_examples=settings.default.max_examples // 8, phases=[Phase.explicit, Phase.generate])
dtypes = st.sampled_from([torch.float32, torch.float64, *HALVES])
seeds = st.integers(0, 2**32)
extents = st.integers(1, 20)
ONE = torch.tensor(1.0)


def hostile(seed, shape, dtype):
    """Random numbers, among them all special ones."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(shape, generator=generator, dtype=dtype)
    special = torch.tensor(HOSTILE, dtype=dtype)
    picked = special[torch.randint(len(special), shape, generator=generator)]
    return torch.where(torch.rand(shape, generator=generator) < 0.4, picked, drawn)


def tame(seed, shape, dtype=torch.float64):
    return normal(seed, *shape, dtype=dtype)


def both(f, *operands):
    """A function of the operands, or a dict of functions, in one native step and in eager."""
    if isinstance(f, dict):
        functions = f
        f = lambda *operands: {name: each(*operands) for name, each in functions.items()}  # noqa: E731
    xs = tuple(operand[None] for operand in operands)
    _, ys = gd.scan(lambda carry, x: (carry, f(*x)), ONE, xs, backend="native")
    return gd._tree.map(lambda leaf: leaf[0], ys), f(*operands)


def assert_close(got, expected, units, scale=None, signs=True):
    """The same shape, dtype, NaN, infinities, signs of zero; the rest to some units in the last place."""
    for (name, right), left in zip(
        gd._tree.named_leaves(expected, "expected"), gd._tree.leaves(got), strict=True
    ):
        assert (left.shape, left.dtype) == (right.shape, right.dtype), name
        if not right.is_floating_point():
            assert left.equal(right), (name, left, right)
            continue
        same = (left == right) | (left.isnan() & right.isnan())
        if signs:
            same &= (left != 0) | right.isnan() | (left.signbit() == right.signbit())
        size = right.abs().double() if scale is None else scale
        info = torch.finfo(right.dtype)
        near = (left.double() - right.double()).abs() <= units * info.eps * size + info.tiny
        assert (same | near).all(), (name, left[~(same | near)], right[~(same | near)])


def takes(f):
    """Count the tensors that a function takes."""
    try:
        f(torch.ones(1))
    except TypeError:
        return 2
    return 1


def arity(functions, n):
    return {name: f for name, f in functions.items() if takes(f) == n}


def assert_same(run, rtol=0.0, atol=0.0, compiled="native"):
    """A run, a function of the backend, has equal results when compiled and in eager."""
    got, expected = (gd._tree.leaves(run(backend)) for backend in (compiled, "eager"))
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol, equal_nan=True)


SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 7, 16, 33]), max_size=3).map(tuple)


@pytest.mark.long
@pytest.mark.optimised
@few
@given(SHAPES, dtypes, seeds)
def test_functions_of_one_number_are_those_of_torch(shape, dtype, seed):
    got, expected = both(arity(EXACT, 1), hostile(seed, shape, dtype))
    assert_close(got, expected, 0, signs=False)
    got, expected = both(arity(FUNCTIONS, 1), hostile(seed, shape, dtype))
    assert_close(got, expected, 1 if dtype in HALVES else 8)
    got, expected = both(GAMMAS, hostile(seed, shape, dtype))
    assert_close(got, expected, 8, sum(1 + size.double().abs() for size in expected.values()))
    got, expected = both(CANCELLING, tame(seed, shape, dtype))
    assert_close(got, expected, 32, torch.tensor(8.0).double(), signs=False)


@pytest.mark.long
@pytest.mark.optimised
@few
@given(SHAPES, st.lists(st.booleans(), min_size=3, max_size=3), dtypes, st.booleans(), st.booleans(), seeds)
def test_functions_of_two_numbers_broadcast(shape, ones, dtype, shorter, swapped, seed):
    other = tuple(1 if one else extent for extent, one in zip(shape, ones, strict=False))[shorter:]
    operands = [hostile(seed, shape, dtype), hostile(seed + 1, other, dtype)][:: -1 if swapped else 1]
    got, expected = both(arity(EXACT, 2), *operands)
    assert_close(got, expected, 0, signs=False)
    got, expected = both(FUSED, *operands)
    size = sum(operand.double().abs().nan_to_num(0, 0, 0) * 3 for operand in operands)
    assert_close(got, expected, 1, size, signs=False)
    got, expected = both(arity(FUNCTIONS, 2), *operands)
    assert_close(got, expected, 1 if dtype in HALVES else 8)


@pytest.mark.long
@few
@given(SHAPES, st.sampled_from([torch.int64, torch.int32]), seeds)
def test_integers_are_those_of_torch(shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randint(-5, 6, shape, generator=generator, dtype=dtype) for _ in range(2))
    assert_close(*both(of_integers, a, b), 2)


@pytest.mark.long
def test_nan_has_no_slope_of_zero():
    a = torch.tensor([nan, 0.5, 0.0, 3.0, -3.0, 1.0], dtype=torch.float64)
    losses = {
        f"{loss.__name__}, {reduction}": torch.func.grad(
            lambda a, loss=loss, reduction=reduction: loss(a, a * 0, reduction=reduction).sum()
        )
        for loss in (functional.smooth_l1_loss, functional.huber_loss, functional.l1_loss)
        for reduction in ("none", "mean", "sum")
    }
    assert_close(*both(losses, a), 4, signs=False)


@pytest.mark.long
@pytest.mark.optimised
@few
@given(extents, extents, extents, dtypes, seeds)
def test_reductions_are_those_of_torch(rows, columns, depth, dtype, seed):
    scale = torch.tensor(max(1.0, rows * columns * depth / 4)).double()
    assert_close(*both(reductions, tame(seed, (rows + 1, columns, depth + 1), dtype)), 64, scale)


@pytest.mark.long
@few
@given(extents, extents, extents, dtypes, seeds)
def test_extrema_are_those_of_torch(rows, columns, depth, dtype, seed):
    assert_close(*both(extrema, hostile(seed, (rows + 1, columns + 1, depth + 1), dtype)), 0, signs=False)


@pytest.mark.long
@pytest.mark.optimised
def test_long_sums_are_as_exact_as_those_of_torch():
    a = torch.rand((600, 700, 3), generator=torch.Generator().manual_seed(0))
    f = lambda a: (a.sum(), a.sum(1).sum(0), (a * a[:1]).sum(1).sum(0))  # noqa: E731
    assert_close(both(f, a)[0], [leaf.float() for leaf in f(a.double())], 1)


@pytest.mark.long
@pytest.mark.optimised
@few
@given(extents, extents, dtypes, seeds)
def test_reductions_of_numbers_that_are_not_finite_are_those_of_torch(rows, columns, dtype, seed):
    def f(a):
        sums = a.sum(0), a.mean(), a.cumsum(0), (a * 1e-20).norm(dim=0), torch.relu(a).sum(-1)
        exponentials = a.softmax(0), a.log_softmax(-1), a.logsumexp(0)
        masks = a.isfinite().sum(-1), a.isnan().any(0), (a > 0).all(-1)
        return sums, exponentials, masks, a @ torch.ones_like(a).T

    a = hostile(seed, (rows, columns), dtype)
    assert_close(*both(f, a), 16, a.double().abs().nan_to_num(0, 0, 0).sum(), signs=False)


@pytest.mark.long
@few
@given(st.sampled_from([0, 1, 3]), st.sampled_from([0, 1, 4]), st.integers(0, 2), dtypes)
@example(0, 1, 0, torch.float32)
def test_empty_axes_give_the_results_of_torch(rows, columns, more, dtype):
    def f(a, b):
        sums = a.sum(), a.sum(0), a.sum(-1), a.prod(0), a.mean(-1), a.cumsum(0), a.softmax(-1)
        masks = (a > 0).any(0), (a > 0).all(-1), torch.where(a > 0, a, 0.5)
        products = a @ b, a.T @ a, a[:, :1] @ b[:1] if len(b) else a * 2
        joined = torch.cat([a, a, b.T]), functional.pad(a, (1, 0), value=2.0)
        picked = *a.sort(stable=True), a.index_select(0, torch.arange(len(a)))
        shapes = a.flatten() * 2, a.T.reshape(-1) + 1, a[None].expand(3, -1, -1) * 1
        extremes = (a.amax(-1), a.argmax(-1)) if columns else ()
        return sums, masks, products, joined, picked, shapes, extremes

    b = tame(1, (columns, rows if more < rows else more), dtype)
    got = both(f, tame(0, (rows, columns), dtype), b)
    assert_close(*got, 16, torch.tensor(10.0).double(), signs=False)


LAYOUTS = {
    "transposed": lambda a: a.mT.contiguous().mT,
    "expanded": lambda a: a[:1].expand(a.shape),
    "of a column": lambda a: a[:, :1].expand(a.shape),
    "every other": lambda a: a.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, 1::2],
    "of a larger one": lambda a: functional.pad(a, (1, 2, 3, 1))[3:-1, 1:-2],
    "negated lazily": lambda a: torch._neg_view(a),
}


@pytest.mark.long
@few
@given(*[st.sampled_from(sorted(LAYOUTS))] * 3, st.integers(1, 9), st.integers(1, 9), dtypes)
def test_inputs_may_have_any_layout(one, two, three, rows, columns, dtype):
    """As what is carried, scanned and closed over."""
    first, second, third = (
        LAYOUTS[layout](tame(seed, (rows, columns), dtype)) for seed, layout in enumerate((one, two, three))
    )
    xs = torch.stack([second, second * 2]).transpose(1, 2).contiguous().transpose(1, 2)

    def body(carry, x):
        return carry * 0.5 + third.mT.sum(0, keepdim=True).mT, (carry @ x.mT, x.flatten() + 1, third.mT * 2)

    got, expected = (gd.scan(body, first, xs, backend=backend) for backend in ("native", "eager"))
    assert_close(got, expected, 64, torch.tensor(8.0).double(), signs=False)


# Convolutions and pooling: geometries, and all derivatives.

WINDOWS = {
    "conv1d": (lambda x, w: functional.conv1d(x, w, stride=2, padding=2, dilation=2), (2, 3, 9), (4, 3, 3)),
    "conv2d": (lambda x, w: functional.conv2d(x, w, w[:, 0, 0, 0], padding=1), (2, 2, 6, 5), (5, 2, 3, 3)),
    "groups": (
        lambda x, w: functional.conv2d(x, w, stride=(2, 1), padding="valid", groups=2),
        *((2, 4, 6, 5), (4, 2, 3, 2)),
    ),
    "conv3d": (lambda x, w: functional.conv3d(x, w, padding=(1, 0, 1)), (1, 2, 3, 4, 3), (2, 2, 2, 3, 2)),
    "transposed": (
        lambda x, w: functional.conv_transpose2d(x, w, stride=2, padding=1, output_padding=1, groups=2),
        *((2, 4, 3, 4), (4, 2, 3, 3)),
    ),
    "max_pool1d": (lambda x, w: functional.max_pool1d(x * w, 3, 2, 1), (2, 3, 9), (9,)),
    "max_pool2d": (lambda x, w: functional.max_pool2d(x * w, 2, ceil_mode=True), (2, 2, 5, 4), (4,)),
    "max_pool3d": (lambda x, w: functional.max_pool3d(x * w, 2, 1), (1, 2, 3, 3, 4), (4,)),
    "avg_pool1d": (lambda x, w: functional.avg_pool1d(x * w, 3, 2, 1), (2, 3, 9), (9,)),
    "avg_pool2d": (
        lambda x, w: functional.avg_pool2d(x * w, 3, 2, 1, ceil_mode=True, count_include_pad=False),
        *((2, 2, 6, 5), (5,)),
    ),
    "avg_pool3d": (
        lambda x, w: functional.avg_pool3d(x * w, 2, 1, divisor_override=3),
        (1, 2, 3, 3, 4),
        (4,),
    ),
    "of nothing": (lambda x, w: functional.conv1d(x[:0], w).sum() + w.sum(), (2, 3, 9), (4, 3, 3)),
    "adaptive": (lambda x, w: functional.adaptive_avg_pool2d(x * w, (3, 2)), (2, 2, 6, 4), (4,)),
    "group_norm": (lambda x, w: functional.group_norm(x, 2, w, w + 1), (2, 4, 3), (4,)),
}


def derivatives(f):
    """A function of two tensors, its gradients, those of single samples, and many at once."""

    def loss(x, w):
        return torch.sin(f(x, w)).sum()

    slopes = torch.func.grad(loss, (0, 1))
    alone = torch.func.vmap(torch.func.grad(lambda w, x: loss(x[None], w)), (None, 0))
    return {
        "value": f,
        "gradients": slopes,
        "of samples": lambda x, w: alone(w, x),
        "many": lambda x, w: torch.func.vmap(f, (0, 0))(torch.stack([x, -x]), torch.stack([w, w + 1])),
    }


def second_derivatives(f):
    """Forward over reverse, and reverse over reverse."""
    slopes = torch.func.grad(lambda x, w: torch.sin(f(x, w)).sum(), (0, 1))
    return {
        "curvature": lambda x, w: torch.func.jvp(slopes, (x, w), (x.cos(), w.cos()))[1],
        "third": torch.func.grad(lambda x, w: sum(s.sin().sum() for s in slopes(x, w)), (0, 1)),
    }


@pytest.mark.long
@pytest.mark.parametrize("name", WINDOWS)
def test_convolutions_and_pooling_are_those_of_torch(name):
    f, *shapes = WINDOWS[name]
    operands = [tame(seed, shape) for seed, shape in enumerate(shapes)]
    assert_close(*both(derivatives(f), *operands), 64, torch.tensor(50.0).double(), signs=False)


ROUGH = {  # functions of two tensors, with jumps or bends
    "remainder": torch.remainder,
    "fmod": torch.fmod,
    "floor": lambda a, b: a * torch.div(a, b, rounding_mode="floor") + b,
    "trunc": lambda a, b: a * torch.div(a, b, rounding_mode="trunc") + b,
    "gammas": lambda a, b: torch.lgamma(a) * torch.digamma(b + 0.3),
    "cummax": lambda a, b: a.cummax(-1).values * b,
    "cummin": lambda a, b: (a * b).cummin(0).values,
}


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ROUGH)
def test_derivatives_of_rough_functions_are_those_of_torch(name, dtype):
    f, a, b = ROUGH[name], 3 * tame(0, (3, 5), dtype), tame(1, (3, 5), dtype).abs() + 0.5
    functions = derivatives(f)

    def through(a, b, backend):
        def total(a, b):
            return gd.scan(
                lambda c, x: (c + f(x, c).sin().mean(), c), b, torch.stack([a, -a]), backend=backend
            )[0]

        slopes = torch.func.grad(lambda *ab: total(*ab).sum(), (0, 1))(a, b)
        return slopes, torch.func.jvp(total, (a, b), (a.cos(), b.cos()))

    assert_close(*both(functions, a, b), 64, torch.tensor(50.0).double(), signs=False)
    tolerance = 64 * torch.finfo(dtype).eps
    assert_same(functools.partial(through, a, b), tolerance, tolerance)


@pytest.mark.long
def test_gradients_of_samples_have_a_forward_mode():
    """Because its zeros share memory with other tensors, which a loop in C cannot see."""

    def f(w, x):
        g = torch.func.vmap(torch.func.grad(lambda w, x: torch.tanh(w @ x).sum()), (None, 0))(w, x)
        return w - g.mean(0), g.sum()

    w, xs = tame(0, (3, 2)), tame(1, (4, 5, 2))

    def moved(backend):
        return torch.func.jvp(lambda w: gd.scan(f, w, xs, backend=backend), (w,), (w.cos(),))[1]

    assert_same(moved, 1e-12, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", WINDOWS)
def test_second_derivatives_of_convolutions_and_pooling_are_those_of_torch(name, dtype):
    f, *shapes = WINDOWS[name]
    operands = [tame(seed, shape, dtype) for seed, shape in enumerate(shapes)]
    assert_close(*both(second_derivatives(f), *operands), 256, torch.tensor(50.0).double(), signs=False)


SMOOTH = {
    f"{name} {i}": lambda a, f=f, i=i: gd._tree.leaves(f(a))[i]
    for name, f in arity(FUNCTIONS | EXACT | CANCELLING, 1).items()
    for i, value in enumerate(gd._tree.leaves(f(torch.ones(1))))
    # torch has no derivative of floor_divide, and no forward mode of the gradient of huber
    if value.is_floating_point() and name not in ("huber", "floor_divide by numbers")
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMOOTH)
def test_derivatives_of_functions_of_one_number_are_those_of_torch(name):
    def total(a):
        return (SMOOTH[name](a) * torch.linspace(0.5, 1, len(a), dtype=a.dtype)).sum()

    slope = torch.func.grad(total)
    functions = {
        "gradient": slope,
        "tangent": lambda a: torch.func.jvp(SMOOTH[name], (a,), (a.cos(),))[1],
        "second": torch.func.grad(lambda a: slope(a).square().sum()),
        "curvature": lambda a: torch.func.jvp(slope, (a,), (a.cos(),))[1],
        "many": lambda a: torch.func.vmap(slope)(torch.stack([a, a * 0.5])),
    }
    for dtype in (torch.float32, torch.float64):
        a = torch.cat([torch.linspace(-0.9, 0.9, 12), torch.linspace(1.1, 3, 7)]).to(dtype)
        got, expected = both(functions, a)
        for each in expected:
            assert_close(got[each], expected[each], 256, 1 + expected[each].double().abs(), signs=False)


@pytest.mark.slow
@settings(phases=[Phase.explicit, Phase.generate])
@given(st.data(), st.integers(1, 3), st.booleans(), dtypes)
def test_convolutions_of_any_geometry_are_those_of_torch(data, n, transposed, dtype):
    def drawn(low, high):
        return data.draw(st.lists(st.integers(low, high), min_size=n, max_size=n))

    size, stride, dilation, more = drawn(1, 3), drawn(1, 3), drawn(1, 2), drawn(0, 4)
    groups, of_group, out = (data.draw(st.integers(1, 3)) for _ in range(3))
    extents = [(k - 1) * d + 1 + extra for k, d, extra in zip(size, dilation, more, strict=True)]
    padding = [data.draw(st.integers(0, (k - 1) * d)) for k, d in zip(size, dilation, strict=True)]
    how = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    if transposed:
        how["output_padding"] = [min(s, d) - 1 for s, d in zip(stride, dilation, strict=True)]
    convolve = getattr(functional, f"conv{'_transpose' * transposed}{n}d")
    channels = (groups * of_group, out) if transposed else (groups * out, of_group)
    x, w = tame(0, (2, groups * of_group, *extents), dtype), tame(1, (*channels, *size), dtype)

    def f(x, w):
        return convolve(x, w, **how)

    functions = derivatives(f) | second_derivatives(f)
    assert_close(*both(functions, x, w), 256, torch.tensor(200.0).double(), signs=False)


ATTENTION = {
    "plain": {},
    "causal": {"is_causal": True},
    "masked": {"attn_mask": torch.tensor([[True] * 4, [False] * 4, [True, False] * 2])},
    "biased": {"attn_mask": torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4)},
    "scaled": {"scale": 0.3},
    "grouped": {"enable_gqa": True},
}


@pytest.mark.long
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_and_its_derivatives_are_those_of_torch(name):
    q = tame(0, (2, 4, 3, 5))
    k, v = (tame(seed, (2, 2 if name == "grouped" else 4, 4, 5)) for seed in (1, 2))

    def total(q, k, v, backend):
        def f(c, x):
            y = functional.scaled_dot_product_attention(q * x, k, v * x, **ATTENTION[name])
            return c, y.sin().sum()

        return gd.scan(f, (), torch.linspace(0.5, 1, 3, dtype=torch.float64), backend=backend)[1].sum()

    def slopes(q, k, v, backend):
        return torch.func.grad(total, (0, 1, 2))(q, k, v, backend)

    def curved(q, k, v, backend):
        return torch.func.grad(lambda q: slopes(q, k, v, backend)[1].square().sum())(q)

    for f in (total, slopes, curved):
        with sdpa_kernel(SDPBackend.MATH):  # torch's fused attention has no second derivative
            expected = f(q, k, v, "eager")
        torch.testing.assert_close(f(q, k, v, "native"), expected, rtol=1e-9, atol=1e-11, equal_nan=True)


@pytest.mark.long
@few
@given(st.integers(2, 9), st.integers(2, 9), st.integers(2, 20), dtypes, seeds)
def test_views_are_those_of_torch(rows, columns, depth, dtype, seed):
    assert_close(*both(views, hostile(seed, (rows, columns, depth), dtype)), 0)


@pytest.mark.long
@pytest.mark.optimised
@few
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), dtypes, seeds)
def test_contractions_are_those_of_torch(n, m, k, dtype, seed):
    def f(a, b, c):
        matrices = a @ b, b.T @ a.T, a @ (b.T * 2).T, a.T @ a, torch.addmm(b[0], a, b, beta=0.5, alpha=2)
        vectors = a @ b[:, 0], a[0] @ b, functional.linear(a, b.T, b[0]), torch.outer(a[:, 0], b[0])
        batches = c @ b, c @ (b * torch.arange(1, 4, dtype=b.dtype)[:, None, None])
        outer = torch.einsum("ik,im->km", a, a[:, :1] * 2 + b[0]), torch.einsum("bnk,km->nm", c, b)
        return matrices, vectors, batches, outer, torch.einsum("bn,bk->bnk", c[:, :, 0], c[:, 0]).sum(0)

    a, b, c = tame(seed, (n, k), dtype), tame(seed + 1, (k, m), dtype), tame(seed + 2, (3, n, k), dtype)
    assert_close(*both(f, a, b, c), 16, scale=torch.tensor(30.0 * k).double())


@pytest.mark.long
@few
@given(st.integers(2, 9), st.integers(1, 9), dtypes, seeds)
def test_picking_and_placing_are_those_of_torch(rows, columns, dtype, seed):
    def assigned(a):
        a = a.clone()
        a[0] = a[1] * 2
        a[:, -1] += 1
        return a

    def f(a, b, at, over, across):
        apart = a[None, :, :, None].expand(4, -1, -1, 2)[over % 2, :, across[0, :1]]
        indexed = a[at], a[:, across[:, 0]], a[at[:2], across[0]], apart, functional.embedding(over, a)
        picked = a.index_select(0, over), a.gather(1, across), a.take_along_dim(across[:, :1], 1)
        scattered = a.scatter(1, across[:, :1], 7.0), a.scatter(1, across[:, :1], a + 1)
        added = a.scatter_add(1, across, a.repeat(1, 2)), a.index_add(0, over, b)
        put = a.index_put((torch.tensor([0, 1]),), b[:2]), a.index_put((at,), b, accumulate=True)
        return (
            indexed,
            picked,
            scattered,
            added,
            put,
            functional.cross_entropy(a, across[:, 0]),
            assigned(a),
        )

    generator = torch.Generator().manual_seed(seed)
    indices = [torch.randint(*ends, generator=generator) for ends in ((-rows, rows, (4,)), (0, rows, (4,)))]
    across = torch.randint(columns, (rows, 2), generator=generator)
    a, b = tame(seed, (rows, columns), dtype), tame(seed + 1, (4, columns), dtype)
    assert_close(*both(f, a, b, *indices, across), 16, scale=torch.tensor(10.0).double())


BYTES = torch.tensor([[2, 4], [0, 255]], dtype=torch.uint8)
ZEROS = torch.tensor([[0.0, -0.0, nan, 1.0]])
LARGE = torch.tensor([[2.0**31 + 5, 2.0**40 + 3, -(2.0**33) - 7, 300.7, -1.0]], dtype=torch.float64)
EDGES = {
    "any of bytes": (lambda x: x.any(), BYTES),
    "all of bytes": (lambda x: x.all(), BYTES),
    "any of one byte": (lambda x: x[:1].any(0), BYTES),
    "any along no axis": (lambda x: torch.any(x, dim=()), BYTES > 2),
    "all along no axis": (lambda x: torch.all(x, dim=()), BYTES),
    "arange by floats": (lambda x: x.sum() + torch.arange(0.7, 5, 1.5, dtype=torch.int64), BYTES),
    "addmm without its bias": (lambda x: torch.addmm(x[2], x[None, 3:], x[None, 3:].mT, beta=0), ZEROS),
    "clamp at 0": (lambda x: 1 / x.clamp(min=0.0), ZEROS),
    "clamp at -0": (lambda x: 1 / x.clamp(max=-0.0), ZEROS),
    "fmax of zeros": (lambda x: 1 / torch.fmax(x, -x), ZEROS),
    "fmin of zeros": (lambda x: 1 / torch.fmin(x, -x), ZEROS),
    "bool to the power of a bool": (lambda x: (x**True, x**False, x**2), BYTES > 2),
    "bytes of large numbers": (lambda x: (x.byte(), x.sum(dtype=torch.uint8)), LARGE),
    "division by 127": (lambda x: x // 127, BYTES.to(torch.int8)),
}


@pytest.mark.parametrize("name", EDGES)
def test_the_ends_of_dtypes_and_both_zeros(name):
    f, xs = EDGES[name]
    assert_same(lambda backend: gd.scan(lambda c, x: (c, f(x)), (), xs, backend=backend))


TRUTHS = torch.tensor([[2, 0, 255], [1, 4, 0]], dtype=torch.uint8).view(torch.bool)


@pytest.mark.parametrize("members", [None, 0, 1])
def test_bool_is_true_whatever_its_byte(members):
    """As what is closed over, carried and scanned."""

    def f(b, carry, x):
        total, held = carry
        t = x.logical_not()
        orders = b == x, b != t, b < t, b <= x, b > t, held >= t, torch.maximum(b, t), b.sort(stable=True)
        logic = b & t, b | x, b ^ x, ~b, b.logical_and(x), held.logical_or(t), b.logical_xor(x), b * x
        choices = torch.where(b, 1.5, x * 0.5), torch.where(t, b, x), total.masked_fill(x, 7), b[::2]
        sums = b.sum(), b.any(), x.all(-1), b.cumsum(-1), b.prod(-1), b.amax(-1), held.amin(-1), b[:1].any()
        numbers = b.to(torch.int64), b.float(), b + 0.5, b * total, b.to(torch.uint8), -b.double(), b ^ True
        moved = b, x, held, b.flip(0), torch.stack([b, x]), b.gather(-1, x.to(torch.int64)), b.clone()
        return (total + b.to(torch.int64) + x, held), (orders, logic, choices, sums, numbers, moved)

    def run(backend):
        scan = lambda b, held, xs: gd.scan(  # noqa: E731
            functools.partial(f, b), (held.long() * 0, held), xs, backend=backend
        )
        if members is None:
            return scan(TRUTHS[0], TRUTHS[1], TRUTHS)
        held = TRUTHS.mT if members else TRUTHS
        return torch.func.vmap(scan, (0, members, 1))(TRUTHS, held, torch.stack([TRUTHS, TRUTHS]))

    assert_same(run)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:params.* a step below")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("transform", [gd.momentum(0.9), gd.adam()])
def test_parameters_of_16_bits_are_trained_as_in_eager(transform, dtype):
    params = {name: tame(seed, shape, dtype) / 2 for seed, (name, shape) in enumerate(LAYERS.items())}
    data = tame(3, (40, 6), dtype), tame(4, (40, 3), dtype)

    def loss_fn(params, batch):
        hidden = torch.tanh(batch[0] @ params["w"] + params["b"])
        return ((hidden @ params["v"] - batch[1]) ** 2).mean()

    step = gd.make_step(loss_fn, transform)
    index = gd.sample_batches(gd.random.key(0), n=40, batch_size=8, steps=20)
    run = functools.partial(gd.train, step, step.init(params), data, index, 0.01)
    eps = torch.finfo(dtype).eps
    assert_same(lambda backend: run(backend=backend), 4 * eps, eps)


SCALES = {  # as the second operand, a number is not rounded to 16 bits if it scales, and is if it shifts
    "numbers": lambda a: (a * 0.3, a / 0.3, 0.3 / a, a + 0.3, 0.3 - a, a > 0.3),
    "tensors": lambda a, s: (a * s, s * a, a / s, s / a, a + s, s - a, a * s.double(), a / s.long().add(3)),
    "dtypes": lambda a, s: (
        a.double() / 3,
        a.float(),
        a.bfloat16(),
        a.half(),
        a.nan_to_num().bool(),
        a + a.float(),
    ),
    "integers": lambda a: (a.clamp(-99, 99).nan_to_num(0).long(), a.clamp(0, 99).nan_to_num(0).byte() * a),
}


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
def test_numbers_and_conversions_round_as_those_of_torch(dtype):
    a = hostile(0, (700,), torch.float64)
    a = torch.cat([a, torch.arange(-70, 70) * 2.0**-20, torch.logspace(-45, 39, 99, dtype=a.dtype)])
    for target in (dtype, torch.float32, torch.float64):
        moved = lambda a, target=target: (a.to(dtype).to(target), a.to(target).to(dtype))  # noqa: E731
        assert_close(*both(moved, a), 0)
    a = a.to(dtype)
    assert_close(*both(arity(SCALES, 1), a), 0)
    assert_close(*both(arity(SCALES, 2), a, torch.tensor(0.3)), 0)


@pytest.mark.optimised
@pytest.mark.parametrize("length", [511, 513, 5000, 60_000])
def test_long_contractions_are_as_exact_as_those_of_torch(length):
    """One number that takes in all products of a tenth loses a thousandth of them."""
    a, b = torch.full((1, 4, length), 1.0), torch.full((length, 16), 0.1)
    _, got = gd.scan(lambda c, x: (c, x @ b), (), a, backend="native")
    torch.testing.assert_close(got, torch.full_like(got, 0.1 * length), rtol=1e-5, atol=0)


# Bad indices.


@pytest.mark.parametrize("bad", [4, -5, 2**40, -(2**40)])
@pytest.mark.parametrize("length", [1, 5, 200])
def test_a_bad_index_stops_the_loop_and_names_the_step(bad, length):
    table = torch.arange(4.0)
    at = torch.arange(length) % 4
    assert gd.scan(lambda c, i: (c, table[i]), ONE, at - 4, backend="native")[1].equal(table[at])
    at[-1] = bad
    for pick in (lambda i: table[i[None]], lambda i: table.index_put((i[None],), ONE, accumulate=True)):
        with pytest.raises(IndexError, match=f"an index is out of range in step {length - 1} of the loop"):
            gd.scan(lambda c, i: (c, pick(i)), ONE, at, backend="native")  # noqa: B023


ZERO_DIVISIONS = {
    "floor": lambda a, b: a // b,
    "remainder": lambda a, b: a % b,
    "fmod": torch.fmod,
    "trunc": lambda a, b: torch.div(a, b, rounding_mode="trunc"),
    "a number": lambda a, b: torch.where(b == 0, a // 0, a),
    "a number that a byte has not": lambda a, b: a.to(torch.uint8) // 256,
    "a sum": lambda a, b: (a % b).sum(),
    "in a column": lambda a, b: (a[:, None] // b).amax(0),
}


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int8, torch.uint8])
@pytest.mark.parametrize("name", ZERO_DIVISIONS)
def test_division_of_integers_by_zero_stops_the_loop(name, dtype):
    f, a = ZERO_DIVISIONS[name], torch.arange(1, 41).to(dtype)
    by = torch.stack([a, a, torch.where(a == 7, 0, a)])
    step = 0 if "number" in name else 2
    for backend, message in (
        ("eager", "ZeroDivisionError"),
        ("native", f"ZeroDivisionError.*in step {step} "),
    ):
        with pytest.raises(RuntimeError, match=message):
            gd.scan(lambda c, b: (c, f(a, b)), ONE, by, backend=backend)


@pytest.mark.parametrize(
    "pick",
    [
        lambda a, i: a.index_select(0, i),
        lambda a, i: a.gather(0, i),
        lambda a, i: a.scatter(0, i, 1.0),
        lambda a, i: a.scatter_add(0, i, a[:1]),
        lambda a, i: functional.embedding(i, a[:, None]),
        lambda a, i: functional.nll_loss(a.log_softmax(0)[None], i),
        lambda a, i: torch.where(i > 0, a[:1], a.gather(0, i)),
        lambda a, i: a.index_copy(0, i, a[:1]),
        lambda a, i: functional.one_hot(i, 4),
    ],
)
def test_an_index_that_torch_does_not_wrap_is_refused(pick):
    table = torch.arange(4.0)
    for bad in (-1, 4):
        index = torch.tensor([[bad]])
        with pytest.raises((IndexError, RuntimeError)):
            pick(table, index[0])
        with pytest.raises(IndexError, match="in step 0"):
            gd.scan(lambda c, i: (c, pick(table, i)), ONE, index, backend="native")


# Refusals, before anything is compiled.

SQUARE = torch.eye(3, dtype=torch.float64)
REFUSED = {
    "aten.logcumsumexp": lambda c: c.logcumsumexp(0),
    "aten.polygamma.default of order 2": lambda c: torch.polygamma(2, c),
    "aten.bucketize": lambda c: torch.bucketize(c[0, 0], c[0]),  # whose rewriting asks for a value
    "aten.linalg_inv_ex": lambda c: torch.linalg.inv(c),
    "aten.pow.Tensor_Tensor": lambda c: c.long() ** c.long(),
    "aten.pow.Tensor_Scalar": lambda c: c.long() ** 5,
    "aten.view.dtype to another dtype": lambda c: c.view(torch.float32),
    "aten.as_strided": lambda c: c.as_strided((2, 2), (3, 1)),
    "complex": lambda c: torch.fft.fft(c).real,
    "nextafter.default of 16 bits": lambda c: c.bfloat16().nextafter(c.half().bfloat16()),
    "float8_e5m2 tensors": lambda c: c.to(torch.float8_e5m2).float(),
    "aten.index.*mask|aten.nonzero": lambda c: torch.ops.aten.index.Tensor(c, [torch.ones(3, 3).bool()]),
    "aten.convolution": lambda c: functional.conv1d(c.long()[None], c.long()[:, :, None]),
    "draws from torch's generator": lambda c: functional.scaled_dot_product_attention(
        c, c, c, dropout_p=0.5
    ),
    "a step of .* FLOP in products": lambda c: (c.repeat(200, 200) @ c.repeat(200, 200)).sum(),
    "e.09 bytes beyond them": lambda c: (c.repeat(10_000, 2000) * 2).sin().sum(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_operation_that_is_not_covered_is_refused_by_name(name, monkeypatch):
    f = REFUSED[name]
    monkeypatch.setattr(native, "build", lambda *args: pytest.fail("compiled"))
    for _ in range(2):
        with pytest.raises(BackendError, match=name):
            gd.scan(lambda c, x: (c, f(c)), SQUARE, length=2, backend="native")


def test_no_compiler_is_one_clear_sentence(monkeypatch):
    native._target.find.cache_clear()
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(native._target, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match="needs a C compiler, and none was found: install gcc or clang"):
        gd.scan(lambda c, x: (c * 1.2345, None), ONE, length=2, backend="native")
    monkeypatch.undo()
    native._target.find.cache_clear()
    assert gd.scan(lambda c, x: (c * 1.2345, None), ONE, length=1, backend="native")[0] == ONE * 1.2345


# The loop.


def descend(c, x):
    return c - 0.1 * torch.sin(c + x), c.sum()


@pytest.mark.long
def test_results_depend_on_neither_segments_nor_threads(monkeypatch):
    xs, starts = tame(0, (500, 3)), tame(1, (5, 3))
    run = lambda start: gd.scan(descend, start, xs, backend="native")  # noqa: E731
    whole = [run(start) for start in starts]
    middle, first = gd.scan(descend, starts[0], xs[:123], backend="native")
    end, second = gd.scan(descend, middle, xs[123:], backend="native")
    assert end.equal(whole[0][0])
    assert torch.cat([first, second]).equal(whole[0][1])
    before = torch.get_num_threads()
    monkeypatch.setattr(native, "_WORTH_THREADS", 0)
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        carries, rows = torch.func.vmap(run)(starts)
        assert carries.equal(torch.stack([carry for carry, _ in whole]))
        assert rows.equal(torch.stack([ys for _, ys in whole]))
    monkeypatch.undo()
    assert torch.get_num_threads() == before
    with ThreadPoolExecutor(4) as pool:
        again = list(pool.map(run, [*starts, *starts]))
    assert all(a[0].equal(b[0]) and a[1].equal(b[1]) for a, b in zip(again, [*whole, *whole], strict=True))


def test_threads_are_started_only_for_members_that_take_longer_than_the_start(monkeypatch):
    started = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(
        native,
        "ThreadPoolExecutor",
        lambda *args, **options: started.append(args) or ThreadPoolExecutor(*args),
    )
    for members, steps, threads in ((2, 10, []), (2, 200_000, [(2,)]), (20_000, 10, [(2,)])):
        del started[:]
        scan = functools.partial(gd.scan, descend, backend="native")
        torch.func.vmap(scan, (0, None))(tame(1, (members, 3)), tame(0, (steps, 3)))
        assert started == threads


@pytest.mark.long
@pytest.mark.usefixtures("nothing_traced")
def test_threads_trace_and_compile_side_by_side():
    """Because torch's tracer patches modules that all threads share."""
    xs, start = tame(0, (50, 3)), tame(1, (3,))

    def slope(number, backend="native"):
        def f(c, x):
            return torch.sin(0.5 * c + number * x), None

        return torch.func.grad(lambda c: gd.scan(f, c, xs, backend=backend)[0].sum())(start)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(6) as pool:
            got = list(pool.map(slope, range(8)))
    finally:
        sys.setswitchinterval(before)
    for number, leaf in enumerate(got):
        torch.testing.assert_close(leaf, slope(number, "eager"), rtol=1e-10, atol=1e-12)


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_division_rounds_as_eager_does_for_none_one_and_many_elements(dtype):
    """torch divides by a tensor of one element, whatever its axes, as by a number."""
    shapes = [(), (1,), (1, 1), (3,), (0,), (2, 0), (2, 3)]
    dividends = [50 * tame(1, shape).to(dtype) for shape in shapes]
    divisors = [torch.tensor(7.3, dtype=dtype), torch.tensor([[-2.7]], dtype=dtype), 3, -2.5]

    def quotients(carry, _):
        pairs = [*product(dividends, divisors), *product(divisors, dividends)]
        return carry, [
            torch.div(a, b, rounding_mode=mode) if isinstance(a, torch.Tensor) else (a // b, a % b)
            for a, b in pairs
            for mode in ("floor", "trunc")
        ]

    got, expected = (
        gd.scan(quotients, ONE, length=1, backend=backend)[1] for backend in ("native", "eager")
    )
    for left, right in zip(gd._tree.leaves(got), gd._tree.leaves(expected), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("transform", ["grad", "jvp"])
def test_derivative_of_a_vmapped_loop_is_compiled_for_one_member(transform, monkeypatch):
    factor, rows = torch.tensor(0.7, dtype=torch.float64), normal(1, 4, 3)

    def total(start, factor, backend="native"):
        def member(carry):
            return gd.scan(lambda c, x: (c * factor + x, c.sum()), carry, rows, backend=backend)

        carry, sums = torch.func.vmap(member)(start)
        return carry.square().sum() + sums.square().sum()

    def derived(members, **options):
        given, run = (normal(0, members, 3), factor), functools.partial(total, **options)
        if transform == "grad":
            return torch.func.grad(run, (0, 1))(*given)
        return torch.func.jvp(run, given, (given[0].cos(), factor.cos()))

    derived(2)
    monkeypatch.setattr(native, "build", None)
    torch.testing.assert_close(derived(5), derived(5, backend="eager"), rtol=1e-12, atol=0)


def test_another_number_of_members_is_neither_traced_nor_compiled(monkeypatch):
    xs, starts = tame(0, (20, 3)), tame(1, (7, 3))
    run = lambda start: gd.scan(descend, start, xs, backend="native")[0]  # noqa: E731
    cases = torch.func.vmap(run), torch.func.vmap(torch.func.grad(lambda start: run(start).sum()))
    for case in cases:
        case(starts[:2])
    monkeypatch.setattr(_body, "graph_of", None)
    monkeypatch.setattr(native, "build", None)
    for case in cases:
        torch.testing.assert_close(case(starts), torch.stack([case(row[None])[0] for row in starts]))


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_of_one_negative_zero_have_the_sign_of_torchs(dtype):
    xs = torch.full((2, 4, 1, 3), -0.0, dtype=dtype)

    def f(c, x):
        one = x[0, 0, 0]
        loss = functional.cross_entropy(one.reshape(1, 1), torch.zeros(1, dtype=torch.int64))
        sums = x.sum(1), x[:1, :, :1].sum(), x[:1].sum((0, 1)), one.sum(), one.mean(), x.prod(1)
        return c, (loss, *sums, x.mean(1), x.sum(1, keepdim=True), x[:, 0].cumsum(0), x.amax(1))

    got, expected = (gd.scan(f, xs[0], xs, backend=backend)[1] for backend in ("native", "eager"))
    for a, b in zip(got, expected, strict=True):
        assert a.signbit().equal(b.signbit())


@pytest.mark.long
def test_pictures_in_bytes_are_enlarged_as_in_torch_or_refused():
    xs = (torch.arange(2 * 5 * 5) * 37 % 256).reshape(2, 1, 1, 5, 5)

    def run(xs, backend, mode):
        f = lambda c, x: (c, functional.interpolate(x, scale_factor=2, mode=mode))  # noqa: E731
        return gd.scan(f, xs[0], xs, backend=backend)[1]

    assert run(xs.byte(), "native", "nearest").equal(run(xs.byte(), "eager", "nearest"))
    torch.testing.assert_close(*(run(xs.double(), backend, "bilinear") for backend in ("native", "eager")))
    with pytest.raises(gd.BackendError, match="upsample_bilinear2d"):
        run(xs.byte(), "native", "bilinear")


@pytest.mark.parametrize("size", [1e-22, 1.0, 1e18, 1e25])
def test_variances_of_float32_overflow_and_vanish_no_sooner_than_torchs(size):
    xs = tame(0, (3, 50, 4), torch.float32) * size

    def f(c, x):
        return c, (x.var(0), x.std(0, correction=0), x.std())

    assert_same(lambda backend: gd.scan(f, xs[0], xs, backend=backend), 1e-5)


@pytest.mark.parametrize("seconds", [1e-7, 1e-3, 1.0])
@pytest.mark.parametrize("members", [1, 3])
def test_segments_of_the_loop_take_50_ms_from_the_first_of_the_next_call(members, seconds, monkeypatch):
    now, segments = [0.0], []

    def run(first, last, start, end, *rest):
        segments.append(end - start)
        now[0] += seconds * (end - start) * (last - first)
        return -1

    monkeypatch.setattr(native, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    loop = object.__new__(native._Function)
    loop.run, loop.scratch = run, 64
    loop.rounds, loop.pace = 0, 0.0
    length, most = 10**6 if seconds < 1e-3 else 200, max(1, int(0.05 / (seconds * members) * (1 + 1e-9)))
    for first in (1, min(most, length)):
        del segments[:]
        loop([0], (None, None), members, length)
        assert sum(segments) == length
        assert segments[0] in (first, first - 1)
        assert max(segments) <= most


@pytest.mark.long
def test_a_factor_of_several_products_is_copied_once_in_each_loop_and_each_step(monkeypatch):
    texts, write = [], native.write
    monkeypatch.setattr(native, "write", lambda *given: texts.append(write(*given)) or texts[-1])

    def products(c, x):
        return x @ c.T, (2 * x).tanh() @ c.T

    def f(c, x):
        first, second = products(c, x)
        inner = gd.scan(lambda d, _: (d - 0.01 * products(d, x)[0].T @ x, products(d, x)), c, length=20)
        return c - 0.01 * second.T @ x, (first, second, inner)

    c, xs = normal(0, 10, 64).float(), normal(1, 3, 32, 64).float()
    got = gd.scan(f, c, xs, backend="native")
    assert len(re.findall(r"^transpose_float\(", texts[0], re.MULTILINE)) == 2
    torch.testing.assert_close(got, gd.scan(f, c, xs, backend="eager"), rtol=1e-4, atol=1e-4)


def test_lengths_and_numbers_in_tensors_compile_nothing(monkeypatch):
    built, build = [], native.build
    monkeypatch.setattr(native, "build", lambda text, target: built.append(text) or build(text, target))

    def run(lr, xs, backend):
        return gd.scan(lambda c, x: (c - lr * torch.sin(c + 2 * x), c), xs[0], xs, backend=backend)

    for length in (1, 2, 70, 1000):
        lr, xs = tame(length, ()) * 0.1, tame(length, (length, 3))
        assert_same(functools.partial(run, lr, xs), 1e-12, 1e-13)
    assert len(built) == 1


@pytest.mark.parametrize("shares", [1, 2])
@pytest.mark.parametrize("flush", [False, True])
def test_denormals_are_flushed_as_in_the_calling_thread(flush, shares, monkeypatch):
    def flushes():
        return bool(torch.tensor(2.0**-140) * 0.5 == 0)

    def halve(start):
        return gd.scan(lambda c, x: (c * 0.5, None), start, length=5, backend="native")[0]

    monkeypatch.setattr(torch, "get_num_threads", lambda: shares)
    monkeypatch.setattr(native, "_WORTH_THREADS", 0)
    with ThreadPoolExecutor(1) as other:
        assert not other.submit(flushes).result()
        if not torch.set_flush_denormal(flush):
            pytest.skip("torch cannot flush denormal numbers here")
        try:
            got = torch.func.vmap(halve)(torch.full((4,), 2.0**-140))
            assert flushes() == flush
        finally:
            torch.set_flush_denormal(False)
        assert not other.submit(flushes).result()
    assert got.tolist() == [0.0 if flush else 2.0**-145] * 4


UPDATES = {  # of a carry that is too large for registers: what may be overwritten, and what must not
    "each element from its own": lambda c: {"a": c["a"] * 0.9 + 1, "b": c["b"].exp() / 3},
    "exchanged": lambda c: {"a": c["b"] * 1, "b": c["a"] * 1},
    "from its neighbour": lambda c: {"a": c["a"].roll(1) / 2, "b": c["b"] + 1},
    "reversed": lambda c: {"a": c["a"].flip(0) * 0.9, "b": c["b"]},
    "transposed": lambda c: {"a": (c["a"].view(8, 12).mT * 0.9).flatten(), "b": c["b"]},
    "from all of itself": lambda c: {"a": c["a"] - c["a"].mean(), "b": c["b"] - c["b"].amax() / 2},
    "from a running sum": lambda c: {"a": c["a"].cumsum(0) / 96, "b": c["b"]},
    "from a product": lambda c: (
        c | {"a": (c["a"].view(8, 12) @ c["b"].view(12, 8) / 9).repeat(1, 2)[:, :12].flatten()}
    ),
    "the old one read after": lambda c: {"a": c["a"] + 1, "b": c["b"] + c["a"].exp()},
    "the new one read after": lambda c: {"a": c["a"] + c["b"], "b": c["b"] - (c["a"] + c["b"]).sin()},
    "scattered": lambda c: c | {"a": c["a"].scatter_add(0, (c["b"].abs() * 9).long() % 96, c["a"]) / 2},
    "put together": lambda c: {"a": torch.cat([c["a"][48:] / 2, c["a"][:48]]), "b": c["b"]},
    "a row of it for all": lambda c: {"a": (c["a"].view(8, 12) + c["a"][:12]).flatten() / 2, "b": c["b"]},
    "summed by rows": lambda c: {"a": (c["a"] + c["b"].view(8, 12).sum(0).repeat(8)) / 9, "b": c["b"] / 2},
    "one of a larger one": lambda c: {"a": c["a"], "b": c["b"] + c["a"].view(8, 12).sum(1).repeat(12)},
}


@pytest.mark.long
@pytest.mark.parametrize("name", UPDATES)
def test_a_carry_is_overwritten_only_where_no_later_reader_needs_it(name):
    def f(carry, x):
        def once(c, _):
            return UPDATES[name](c), c["a"][::5] + x

        pairs = once(carry["flat"], None), gd.scan(once, carry["inner"], None, 3)
        return {"flat": pairs[0][0], "inner": pairs[1][0]}, [y for _, y in pairs]

    init = {where: {"a": tame(0, (96,)), "b": tame(1, (96,))} for where in ("flat", "inner")}
    xs = torch.arange(4.0, dtype=torch.float64)
    assert_same(lambda backend: gd.scan(f, init, xs, backend=backend), 1e-12, 1e-12)


MATRIX = tame(1, (3, 3))
CHAINS = {
    "one expression": lambda c: c.sin(),
    "products": lambda c: (MATRIX @ c).sin(),
    "means": lambda c: c.sin() - c.mean(),
    "views": lambda c: c.flip(0).reshape(1, 3).expand(2, 3)[0] * 0.9,
    "running sums": lambda c: c.cumsum(0).tanh(),
    "joined parts": lambda c: torch.cat([c[:1], c.cos()[1:]]),
}


@pytest.mark.long
@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_of_hundreds_of_operations_is_written_without_deep_recursion(name):
    def f(carry, x):
        end = carry
        for _ in range(300):
            end = CHAINS[name](end)
        return end, carry.sum()

    assert_same(lambda backend: gd.scan(f, tame(0, (3,)), length=2, backend=backend), 1e-12, 1e-12)


def wander(start, length=10**9):
    return gd.scan(lambda c, x: (torch.sin(c + 1), None), start, length=length, backend="native")[0]


def wander_in_one_step(start):
    return gd.scan(lambda c, x: (wander(c), None), start, length=1, backend="native")[0]


def wander_in_loops(start):
    def turn(c, x):
        return gd.scan(lambda c, x: (wander(c, 100), None), c, length=100)[0], None

    far = lambda c, x: (gd.scan(turn, c, length=10**6)[0], None)  # noqa: E731
    return gd.scan(far, start, length=1, backend="native")


def wander_far(start):
    def turn(c, x):
        return torch.sin(c[:, None] * torch.arange(5_000)).sum(1), None

    return gd.scan(turn, start, length=1, backend="native")[0]


@pytest.mark.long
@pytest.mark.usefixtures("ctrl_c_is_heard")
@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
@pytest.mark.parametrize("shares", [1, 2])
@pytest.mark.parametrize(
    ("run", "members"), [(wander, 4), (wander_in_one_step, 4), (wander_in_loops, 4), (wander_far, 10_000)]
)
def test_ctrl_c_stops_the_loop(run, members, shares, monkeypatch):
    call, began = native._Function.__call__, []

    def interrupted(*args):
        threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        began.append(time.process_time())
        return call(*args)

    monkeypatch.setattr(torch, "get_num_threads", lambda: shares)
    monkeypatch.setattr(native._Function, "__call__", interrupted)  # by then it is compiled
    with pytest.raises(KeyboardInterrupt):
        torch.func.vmap(run)(tame(0, (members, 300)))
    assert time.process_time() - began[0] < 1  # of the processor, because the machine may be loaded


@pytest.mark.long
@pytest.mark.parametrize("name", TABLE)
def test_every_transformation_of_the_family_runs_natively(name):
    row = TABLE[name]
    transform = row.make(**row.hyperparameters)
    params = {"w": tame(0, (4, 3)), "m": tame(1, (3, 3))} | ({} if row.matrices else {"s": tame(2, ())})
    data = tame(3, (20, 4))

    def loss_fn(params, batch):
        hidden = torch.tanh(batch @ params["w"]) @ params["m"]
        return (hidden**2).mean() + sum((leaf**4).mean() for leaf in params.values())

    step = gd.make_step(loss_fn, transform)
    init = step.init(params)
    index = gd.sample_batches(gd.random.key(0), n=20, batch_size=5, steps=12)
    assert_same(lambda backend: gd.train(step, init, data, index, row.lr, backend=backend), 1e-8, 1e-10)


def cross_entropy(outputs, y):
    weight = torch.tensor([1.0, 2.0, 3.0], dtype=outputs.dtype)
    return functional.cross_entropy(outputs, y.argmax(-1), weight, label_smoothing=0.1)


def bce(outputs, y):
    return functional.binary_cross_entropy_with_logits(outputs, (y > 0).double())


NETWORKS = {  # layers, a loss, and options of the run
    "layer norm": (
        lambda: [nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3)],
        cross_entropy,
        {},
    ),
    "embedding": (
        lambda: [Round(), nn.Embedding(3, 4), nn.Flatten(), nn.Linear(24, 3)],
        *(cross_entropy, {"record": ("loss", "grad_norm"), "check_finite": "all"}),
    ),
    "binary": (lambda: [nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 3)], bce, {"every": 3}),
    "pooled": (lambda: [nn.MaxPool1d(2), nn.Linear(3, 3)], functional.mse_loss, {}),
    "robust": (lambda: [nn.Linear(6, 8), nn.Softplus(), nn.Linear(8, 3)], functional.huber_loss, {}),
    "conv": (
        lambda: [nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)],
        *(cross_entropy, {}),
    ),
    "relu": (lambda: [nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3)], cross_entropy, {}),
    "transformer": (lambda: [Fold(), encoder(), nn.Flatten(), nn.Linear(6, 3)], functional.mse_loss, {}),
}


def encoder():
    return nn.TransformerEncoderLayer(2, 2, 4, dropout=0.0, batch_first=True)


class Fold(nn.Module):
    def forward(self, x):
        return x.unflatten(-1, (3, 2))


class Round(nn.Module):
    def forward(self, x):
        return x.abs().long().clamp(0, 2)


@pytest.mark.long
@pytest.mark.optimised
@pytest.mark.parametrize("compiled", COMPILED)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_trained_as_in_eager(name, compiled):
    layers, loss, options = NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        apply, params, _ = gd.modules.functional(nn.Sequential(*layers()).double())
    data = tame(0, (20, 6)), tame(1, (20, 3))
    step = gd.make_step(lambda p, batch: loss(apply(p, batch[0]), batch[1]))
    index = gd.sample_batches(gd.random.key(0), n=20, batch_size=4, steps=8)
    run = functools.partial(gd.train, step, params, data, index, 0.05, **options)
    assert_same(lambda backend: run(backend=backend), 1e-9, 1e-11, compiled)
