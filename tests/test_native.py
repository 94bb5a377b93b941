"""The native backend against eager, operator by operator: shapes, dtypes, NaN, ∞, −0.0, empty axes."""

import ctypes
import functools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from math import inf, nan, pi
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import gdfunc as gd
from gdfunc._errors import BackendError
from gdfunc._scan import _body, _recent, backends
from gdfunc._scan.backends import native
from gdfunc._scan.trace import _trace

from .builds import quick
from .tables import TABLE

HOSTILE = [0.0, -0.0, 1.0, -1.0, 0.5, -2.5, 3.0, pi, 1e-3, 1e30, -1e30, 1e-40, inf, -inf, nan]


def of_torch(names):
    return {name: getattr(torch, name) for name in names.split()}


functional = nn.functional

# Functions of the C library may be a few units in the last place off; all else has the same bits.
FUNCTIONS = of_torch(
    "exp exp2 expm1 log log1p log2 log10 sin cos tan asin acos atan sinh cosh tanh erf erfc sigmoid "
    "sqrt rsqrt asinh acosh atanh sinc erfinv logit xlogy"
)
FUNCTIONS |= {
    "silu": functional.silu,
    "softplus": functional.softplus,
    "elu": functional.elu,
    "sqrt by pow": lambda a: a**0.5,
    "pow 2.5": lambda a: a**2.5,
    "pow": lambda a, b: a**b,
    "atan2": torch.atan2,
    "hypot": torch.hypot,
    "2 ** a": lambda a: 2.0**a,
}
EXACT = of_torch(
    "neg abs sign reciprocal floor ceil trunc round relu isnan isinf isfinite logical_not square "
    "maximum minimum add sub mul div copysign eq ne lt le gt ge logical_and logical_or logical_xor "
    "nan_to_num frac fmax fmin nextafter signbit heaviside deg2rad"
)
EXACT |= {
    "a + 0.1": lambda a: a + 0.1,
    "2 - a": lambda a: 2 - a,
    "a / 3": lambda a: a / 3,
    "0.3 / a": lambda a: 0.3 / a,
    "rsub": lambda a, b: torch.rsub(a, b),
    "a > 0.1": lambda a: a > 0.1,
    "clamp": lambda a: a.clamp(-0.3, 0.7),
    "clamp_min": lambda a: a.clamp_min(0.1),
    "clamp by tensors": lambda a, b: torch.clamp(a, max=b),
    # Quotients that are too large are NaN in torch's vectors.
    "fmod": lambda a, b: torch.fmod(a.clamp(-99, 99), b.clamp(0.1, 50)),
    "fmod of negative": lambda a, b: torch.fmod(a.clamp(-99, 99), b.clamp(-50, -0.1)),
    "remainder": lambda a, b: torch.remainder(a.clamp(-99, 99), b.clamp(0.1, 50)),
    "remainder of negative": lambda a, b: torch.remainder(a.clamp(-99, 99), b.clamp(-50, -0.1)),
    "remainder of zero": lambda a, b: torch.remainder(a.clamp(-99, 99), b * 0),
    "where": lambda a, b: torch.where(a > b, a, b),
    "where number": lambda a: torch.where(a > 0, a, 0.0),
    "remainder number": lambda a: a.remainder(0.3),
    "cube": lambda a: a**3,
    "pow -1": lambda a: a**-1,
    "pow -2": lambda a: a**-2,
    "pow 0": lambda a: a**0,
    "leaky": lambda a: functional.leaky_relu(a),
    "hardtanh": lambda a: functional.hardtanh(a),
    "threshold": lambda a: functional.threshold(a, 0.1, 7.0),
    "to half and back": lambda a: a.double().float().to(a.dtype),
    "mask": lambda a: a * (a > 0),
    "bool to float": lambda a: (a > 0).to(a.dtype) + 1,
    "bool to int": lambda a: (a >= 0).to(torch.int64),
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


def outer(a, b):
    return a[:, None] * 3 @ b[None]


INTEGER = {
    "add": lambda a, b: a + b,
    "mul": lambda a, b: a * b,
    "sub": lambda a, b: a - 3 * b,
    "neg": lambda a, b: -a,
    "abs": lambda a, b: a.abs(),
    "sign": lambda a, b: a.sign(),
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "not": lambda a, b: ~a,
    "shift left": lambda a, b: a << 3,
    "shift right": lambda a, b: a >> 2,
    "remainder": lambda a, b: a % 7,
    "remainder by much": lambda a, b: a % (2**31 - 1 if a.dtype is torch.int32 else 2**63 - 1),
    "floor division": lambda a, b: a // 3,
    "truncated division": lambda a, b: torch.div(a, 3, rounding_mode="trunc"),
    "fmod": lambda a, b: torch.fmod(a, 3),
    "floor": lambda a, b: a.floor() + a.round(),
    "cumprod": lambda a, b: a.flatten().cumprod(0),
    "sort": lambda a, b: tuple(a.flatten()[:50].sort(stable=True)),
    "matmul": lambda a, b: outer(a.flatten()[:50], b.flatten()[:50]) @ a.flatten()[:50, None],
    "signbit": lambda a, b: a.signbit(),
    "square": lambda a, b: a**2,
    "true division": lambda a, b: a / b,
    "by a float": lambda a, b: a * 0.5,
    "maximum": lambda a, b: torch.maximum(a, b),
    "clamp": lambda a, b: a.clamp(-2, 2),
    "compare": lambda a, b: a > b,
    "compare with a float": lambda a, b: a > 0.5,
    "bool": lambda a, b: (a > b) & (b > 0) | ~(a > 0),
    "where": lambda a, b: torch.where(a > b, a, b),
    "sum": lambda a, b: a.sum(),
    "any": lambda a, b: (a > b).any(),
    "all": lambda a, b: (a > b).all(),
    "count": lambda a, b: (a > b).sum(),
    "cumsum": lambda a, b: a.flatten().cumsum(0),
    "to bool": lambda a, b: a.bool(),
    "exp": lambda a, b: torch.exp(a % 3),
    "float": lambda a, b: a.float() + b.double(),
}
REDUCTIONS = {
    "sum": lambda a: a.sum(),
    "sum of the first": lambda a: a.sum(0),
    "sum of the last": lambda a: a.sum(-1),
    "sum kept": lambda a: a.sum(1, keepdim=True),
    "sum of two": lambda a: a.sum((0, 2)),
    "sum of sums": lambda a: a.sum(0).sum(0).mT if a.ndim > 3 else a.sum(0).sum(-1),
    "mean": lambda a: a.mean(),
    "mean of the last": lambda a: a.mean(-1),
    "prod": lambda a: a.prod(-1),
    "var": lambda a: a.var(-1),
    "std": lambda a: a.std(0),
    "norm": lambda a: a.norm(),
    "norms": lambda a: a.norm(dim=1),
    "softmax": lambda a: a.softmax(-1),
    "log_softmax": lambda a: a.log_softmax(0),
    "logsumexp": lambda a: a.logsumexp(1),
    "cumsum": lambda a: a.cumsum(1),
    "cumprod": lambda a: a.cumprod(-1),
    "group_norm": lambda a: functional.group_norm(a, 1, a[0, :, 0], eps=0.1),
    "median of rows": lambda a: a.quantile(0.5, 0),
    "layer_norm": lambda a: functional.layer_norm(a, a.shape[-1:]),
    "dot": lambda a: a.flatten() @ a.flatten(),
}
ORDERED = {
    "amax": lambda a: a.amax(-1),
    "amax of the first": lambda a: a.amax(0),
    "amin": lambda a: a.amin((0, 2)),
    "max": lambda a: a.max(),
    "max of an axis": lambda a: tuple(a.max(1)),
    "min of an axis": lambda a: tuple(a.min(-1)),
    "argmax": lambda a: a.argmax(-1),
    "argmin": lambda a: a.argmin(0),
    "argmax of all": lambda a: a.argmax(),
    "sort": lambda a: tuple(a.sort(stable=True, dim=0)),
    "sort, descending": lambda a: tuple(a.sort(stable=True, dim=-1, descending=True)),
    "view of sorted": lambda a: a.sort(dim=0).values.view(-1),
    "sort of a number": lambda a: tuple(a.amax().sort()),
    # Which of 0 and -0 torch takes is chance.
    "topk": lambda a: (a + 0.0).topk(1 + a.shape[0] // 2, 0).values,
    "topk, smallest": lambda a: (a + 0.0).topk(1, largest=False).values,
    "kthvalue": lambda a: (a + 0.0).kthvalue(1 + a.shape[1] // 3, 1).values,
    "median": lambda a: (a + 0.0).flatten()[:50].median(),
    "median of an axis": lambda a: (a + 0.0).median(1, keepdim=True).values,
    "median of a number": lambda a: tuple(a.amax().median(0)),
    "max_pool": lambda a: functional.max_pool1d(a, 2, 1, 1, return_indices=True),
    "max_pool, ceil": lambda a: functional.max_pool2d(
        a, 2, (3, 1), 1, dilation=(1, 2), ceil_mode=True, return_indices=True
    ),
}
VIEWS = {
    "transpose": lambda a: a.mT,
    "permute": lambda a: a.permute(2, 0, 1),
    "reshape": lambda a: a.permute(2, 0, 1).reshape(a.shape[1], -1),
    "flatten": lambda a: a.mT.flatten(),
    "unsqueeze": lambda a: a[:, None] * 2,
    "expand": lambda a: a[:, :, :1].expand(a.shape),
    "expand and flatten": lambda a: a[:, :1].expand(a.shape).flatten(),
    "slice": lambda a: a[:, 1:],
    "step": lambda a: a[:, ::2, -1:],
    "negative": lambda a: a[..., -1],
    "select": lambda a: a[:, 0] + a[:, -1],
    "flip": lambda a: a.flip(0, 2),
    "repeat": lambda a: a.repeat(2, 1, 3),
    "tile": lambda a: a.tile(2, 1),
    "cat": lambda a: torch.cat([a, a[:, :1] * 2, a.flip(1)], 1),
    "stack": lambda a: torch.stack([a, a + 1], -1),
    "pad": lambda a: functional.pad(a, (1, 2, 0, 1), value=3.0),
    "pad less": lambda a: functional.pad(a, (-1, 2, 1, -1), value=3.0),
    "unfold": lambda a: a.unfold(1, 2, 1) * 2,
    "windows": lambda a: a.unfold(0, 2, 1).unfold(2, 2, 3).flatten(1),
    "diagonal_scatter": lambda a: torch.diagonal_scatter(a, a.diagonal(-1, 0, 2) * 2, -1, 0, 2),
    "roll": lambda a: a.roll(1, 1),
    "unbind": lambda a: a.unbind(1)[0],
    "split": lambda a: a.split(2, 0)[-1],
    "chunk": lambda a: a.chunk(2, 2)[0] * 2,
    "movedim": lambda a: a.movedim(0, -1) + 1,
    "squeeze": lambda a: a[:1].squeeze(0),
    "arange": lambda a: a * torch.arange(a.shape[-1]),
    "linspace": lambda a: a * torch.linspace(0, 1, a.shape[-1], dtype=a.dtype),
    "eye": lambda a: torch.eye(a.shape[-1], dtype=a.dtype) + 0,
    "one_hot": lambda a: functional.one_hot(torch.arange(a.shape[0]) % 2, 2),
    "full": lambda a: torch.full((3,), 2.5, dtype=a.dtype),
}

# A body with all functions of a table takes a second to compile: few examples, and none to make them small.
few = settings(max_examples=settings.default.max_examples // 6, phases=[Phase.explicit, Phase.generate])
dtypes = st.sampled_from([torch.float32, torch.float64])
extents = st.integers(1, 20)


def hostile(seed, shape, dtype):
    """Numbers among which are all that are special."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(shape, generator=generator, dtype=dtype)
    special = torch.tensor(HOSTILE, dtype=dtype)
    picked = special[torch.randint(len(special), shape, generator=generator)]
    return torch.where(torch.rand(shape, generator=generator) < 0.4, picked, drawn)


def tame(seed, shape, dtype):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def both(functions, *operands):
    """All functions of the operands, in one native step and in eager."""

    def body(carry, x):
        return carry, {name: f(*x) for name, f in functions.items()}

    xs = tuple(operand[None] for operand in operands)
    _, ys = gd.scan(body, torch.zeros(()), xs, backend="native")
    got = gd._tree.map(lambda leaf: leaf[0], ys)
    return got, {name: f(*operands) for name, f in functions.items()}


def assert_close(got, expected, units, scale=None, signs=True):
    """The same shape, dtype, NaN, infinities, signs of zero; the rest to some units in the last place."""
    for name, right in expected.items():
        rights, lefts = (t if isinstance(t, tuple) else (t,) for t in (right, got[name]))
        for left, right in zip(lefts, rights, strict=True):
            assert (left.shape, left.dtype) == (right.shape, right.dtype), name
            if not right.is_floating_point():
                assert left.equal(right), (name, left, right)
                continue
            same = (left == right) | (left.isnan() & right.isnan())
            if signs:
                same &= (left != 0) | right.isnan() | (left.signbit() == right.signbit())
            tiny = torch.finfo(right.dtype).tiny
            size = right.abs().double() if scale is None else scale
            near = (left.double() - right.double()).abs() <= units * torch.finfo(
                right.dtype
            ).eps * size + tiny
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


def assert_same(run, rtol=0.0, atol=0.0):
    """A run, a function of the backend, has equal results natively and in eager."""
    got, expected = (gd._tree.leaves(run(backend)) for backend in ("native", "eager"))
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol, equal_nan=True)


SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 7, 16, 33]), max_size=3).map(tuple)


@few
@given(SHAPES, dtypes, st.integers(0, 2**32))
def test_functions_of_one_number(shape, dtype, seed):
    got, expected = both(arity(EXACT, 1), hostile(seed, shape, dtype))
    assert_close(got, expected, 0, signs=False)
    got, expected = both(arity(FUNCTIONS, 1), hostile(seed, shape, dtype))
    assert_close(got, expected, 8)
    got, expected = both({"lgamma": torch.lgamma}, hostile(seed, shape, dtype))
    assert_close(got, expected, 8, 1 + expected["lgamma"].abs().double())  # it has roots below 0
    got, expected = both(CANCELLING, tame(seed, shape, dtype))
    assert_close(got, expected, 32, torch.tensor(8.0).double(), signs=False)


@few
@given(
    SHAPES, st.lists(st.booleans(), min_size=3, max_size=3), dtypes, st.booleans(), st.integers(0, 2**32)
)
def test_functions_of_two_numbers_broadcast(shape, ones, dtype, shorter, seed):
    other = tuple(1 if one else extent for extent, one in zip(shape, ones, strict=False))[shorter:]
    for first, second in ((shape, other), (other, shape)):
        operands = hostile(seed, first, dtype), hostile(seed + 1, second, dtype)
        got, expected = both(arity(EXACT, 2), *operands)
        assert_close(got, expected, 0, signs=False)
        got, expected = both(FUSED, *operands)
        size = sum(operand.double().abs().nan_to_num(0, 0, 0) * 3 for operand in operands)
        assert_close(got, expected, 1, size, signs=False)
        got, expected = both(arity(FUNCTIONS, 2), *operands)
        assert_close(got, expected, 8)


@few
@given(SHAPES, st.sampled_from([torch.int64, torch.int32]), st.integers(0, 2**32))
def test_integers(shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randint(-5, 6, shape, generator=generator, dtype=dtype) for _ in range(2))
    got, expected = both(INTEGER, a, b)
    assert_close(got, expected, 2)


def test_numbers_become_bytes_modulo_256():
    a = torch.tensor([2.0**31 + 5, 2.0**40 + 3, -(2.0**33) - 7, 300.7, -1.0], dtype=torch.float64)
    got, expected = both({"byte": torch.Tensor.byte, "sum": lambda a: a.sum(dtype=torch.uint8)}, a)
    assert_close(got, expected, 0)


def test_nan_has_no_slope_of_zero():
    a = torch.tensor([nan, 0.5, 0.0, 3.0, -3.0, 1.0], dtype=torch.float64)
    losses = {
        f"{loss.__name__}, {reduction}": torch.func.grad(
            lambda a, loss=loss, reduction=reduction: loss(a, a * 0, reduction=reduction).sum()
        )
        for loss in (functional.smooth_l1_loss, functional.huber_loss, functional.l1_loss)
        for reduction in ("none", "mean", "sum")
    }
    got, expected = both(losses, a)
    assert_close(got, expected, 4, signs=False)


@few
@given(extents, extents, extents, dtypes, st.integers(0, 2**32))
def test_reductions(rows, columns, depth, dtype, seed):
    a = tame(seed, (rows + 1, columns, depth + 1), dtype)
    got, expected = both(REDUCTIONS, a)
    assert_close(got, expected, 64, scale=torch.tensor(max(1.0, rows * columns * depth / 4)).double())


@few
@given(extents, extents, extents, dtypes, st.integers(0, 2**32))
def test_extrema(rows, columns, depth, dtype, seed):
    got, expected = both(ORDERED, hostile(seed, (rows + 1, columns + 1, depth + 1), dtype))
    assert_close(got, expected, 0, signs=False)


def test_long_sums_are_as_exact_as_torch_makes_them():
    a = torch.rand((600, 700, 3), generator=torch.Generator().manual_seed(0))
    functions = {
        "sum": lambda a: a.sum(),
        "sum of sums": lambda a: a.sum(1).sum(0),
        "sum of products": lambda a: (a * a[:1]).sum(1).sum(0),
    }
    got, _ = both(functions, a)
    assert_close(got, {name: f(a.double()).float() for name, f in functions.items()}, 1)


SPECIAL = {
    "sum": lambda a: a.sum(0),
    "mean": lambda a: a.mean(),
    "cumsum": lambda a: a.cumsum(0),
    "softmax": lambda a: a.softmax(0),
    "log_softmax": lambda a: a.log_softmax(-1),
    "logsumexp": lambda a: a.logsumexp(0),
    "norm": lambda a: (a * 1e-20).norm(dim=0),
    "count": lambda a: a.isfinite().sum(-1),
    "any": lambda a: (a.isnan().any(0), (a > 0).all(-1)),
    "matmul": lambda a: a @ torch.ones_like(a).T,
    "relu": lambda a: torch.relu(a).sum(-1),
}


@few
@given(st.integers(1, 20), st.integers(1, 20), dtypes, st.integers(0, 2**32))
def test_reductions_of_what_is_not_finite(rows, columns, dtype, seed):
    a = hostile(seed, (rows, columns), dtype)
    got, expected = both(SPECIAL, a)
    size = a.double().abs().nan_to_num(0, 0, 0).sum()
    assert_close(got, expected, 16, size, signs=False)


EMPTY = {
    "sum": lambda a, b: (a.sum(), a.sum(0), a.sum(-1)),
    "prod": lambda a, b: a.prod(0),
    "mean": lambda a, b: a.mean(-1),
    "any": lambda a, b: ((a > 0).any(0), (a > 0).all(-1)),
    "cumsum": lambda a, b: a.cumsum(0),
    "softmax": lambda a, b: a.softmax(-1),
    "matmul": lambda a, b: (a @ b, a.T @ a, a[:, :1] @ b[:1] if len(b) else a * 2),
    "cat": lambda a, b: torch.cat([a, a, b.T]),
    "pad": lambda a, b: functional.pad(a, (1, 0), value=2.0),
    "sort": lambda a, b: tuple(a.sort(stable=True)),
    "index": lambda a, b: a.index_select(0, torch.arange(len(a))),
    "views": lambda a, b: (a.flatten() * 2, a.T.reshape(-1) + 1, a[None].expand(3, -1, -1) * 1),
    "where": lambda a, b: torch.where(a > 0, a, 0.5),
}


@few
@given(st.sampled_from([0, 1, 3]), st.sampled_from([0, 1, 4]), st.integers(0, 2), dtypes)
@example(0, 1, 0, torch.float32)
def test_empty_axes(rows, columns, more, dtype):
    a, b = tame(0, (rows, columns), dtype), tame(1, (columns, more), dtype)
    if more < rows:
        b = tame(1, (columns, rows), dtype)
    functions = EMPTY | ({"amax": lambda a, b: (a.amax(-1), a.argmax(-1))} if columns else {})
    got, expected = both(functions, a, b)
    assert_close(got, expected, 16, torch.tensor(10.0).double(), signs=False)


LAYOUTS = {
    "transposed": lambda a: a.mT.contiguous().mT,
    "expanded": lambda a: a[:1].expand(a.shape),
    "of a column": lambda a: a[:, :1].expand(a.shape),
    "every other": lambda a: a.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, 1::2],
    "of a larger one": lambda a: functional.pad(a, (1, 2, 3, 1))[3:-1, 1:-2],
    "negated lazily": lambda a: torch._neg_view(a),
}


@few
@given(*[st.sampled_from(sorted(LAYOUTS))] * 3, st.integers(1, 9), st.integers(1, 9), dtypes)
def test_inputs_may_lie_anyhow(one, two, three, rows, columns, dtype):
    """As what is carried, scanned and closed over."""
    first, second, third = (
        LAYOUTS[layout](tame(seed, (rows, columns), dtype)) for seed, layout in enumerate((one, two, three))
    )
    xs = torch.stack([second, second * 2]).transpose(1, 2).contiguous().transpose(1, 2)

    def body(carry, x):
        return carry * 0.5 + third.mT.sum(0, keepdim=True).mT, (carry @ x.mT, x.flatten() + 1, third.mT * 2)

    got, expected = (gd.scan(body, first, xs, backend=backend) for backend in ("native", "eager"))
    got, expected = (dict(enumerate(gd._tree.leaves(result))) for result in (got, expected))
    assert_close(got, expected, 64, torch.tensor(8.0).double(), signs=False)


# Convolutions and pooling: geometries, and all derivatives.

WINDOWS = {
    "conv1d": (lambda x, w: functional.conv1d(x, w, stride=2, padding=2, dilation=2), (2, 3, 9), (4, 3, 3)),
    "conv2d": (lambda x, w: functional.conv2d(x, w, w[:, 0, 0, 0], padding=1), (2, 2, 6, 5), (5, 2, 3, 3)),
    "groups": (
        lambda x, w: functional.conv2d(x, w, stride=(2, 1), padding="valid", groups=2),
        (2, 4, 6, 5),
        (4, 2, 3, 2),
    ),
    "conv3d": (lambda x, w: functional.conv3d(x, w, padding=(1, 0, 1)), (1, 2, 3, 4, 3), (2, 2, 2, 3, 2)),
    "transposed": (
        lambda x, w: functional.conv_transpose2d(x, w, stride=2, padding=1, output_padding=1, groups=2),
        (2, 4, 3, 4),
        (4, 2, 3, 3),
    ),
    "max_pool1d": (lambda x, w: functional.max_pool1d(x * w, 3, 2, 1), (2, 3, 9), (9,)),
    "max_pool2d": (lambda x, w: functional.max_pool2d(x * w, 2, ceil_mode=True), (2, 2, 5, 4), (4,)),
    "max_pool3d": (lambda x, w: functional.max_pool3d(x * w, 2, 1), (1, 2, 3, 3, 4), (4,)),
    "avg_pool1d": (lambda x, w: functional.avg_pool1d(x * w, 3, 2, 1), (2, 3, 9), (9,)),
    "avg_pool2d": (
        lambda x, w: functional.avg_pool2d(x * w, 3, 2, 1, ceil_mode=True, count_include_pad=False),
        (2, 2, 6, 5),
        (5,),
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


@pytest.mark.parametrize("name", WINDOWS)
def test_convolutions_and_pooling(name):
    f, *shapes = WINDOWS[name]
    operands = [tame(seed, shape, torch.float64) for seed, shape in enumerate(shapes)]
    with quick():
        got, expected = both(derivatives(f), *operands)
    assert_close(got, expected, 64, torch.tensor(50.0).double(), signs=False)


def test_forward_mode_of_the_gradients_of_samples():
    """Its zeros lie in memory as other tensors do, of which a loop in C knows nothing."""

    def f(w, x):
        g = torch.func.vmap(torch.func.grad(lambda w, x: torch.tanh(w @ x).sum()), (None, 0))(w, x)
        return w - g.mean(0), g.sum()

    w, xs = tame(0, (3, 2), torch.float64), tame(1, (4, 5, 2), torch.float64)

    def moved(backend):
        return torch.func.jvp(lambda w: gd.scan(f, w, xs, backend=backend), (w,), (w.cos(),))[1]

    assert_same(moved, 1e-12, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", WINDOWS)
def test_second_derivatives_of_convolutions_and_pooling(name, dtype):
    f, *shapes = WINDOWS[name]
    operands = [tame(seed, shape, dtype) for seed, shape in enumerate(shapes)]
    with quick():
        got, expected = both(second_derivatives(f), *operands)
    assert_close(got, expected, 256, torch.tensor(50.0).double(), signs=False)


SMOOTH = {name: f for name, f in (FUNCTIONS | EXACT | CANCELLING).items() if takes(f) == 1}
SMOOTH = {name: f for name, f in SMOOTH.items() if f(torch.ones(1)).is_floating_point()}
del SMOOTH["huber"]  # torch has no forward mode of its gradient


@pytest.mark.slow
@pytest.mark.parametrize("name", SMOOTH)
def test_derivatives_of_functions_of_one_number(name):
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
        with quick():
            got, expected = both(functions, a)
        for each in expected:
            scale = 1 + expected[each].double().abs()
            assert_close({each: got[each]}, {each: expected[each]}, 256, scale, signs=False)


@pytest.mark.slow
@settings(phases=[Phase.explicit, Phase.generate])
@given(st.data(), st.integers(1, 3), st.booleans(), dtypes)
def test_convolutions_of_any_geometry(data, n, transposed, dtype):
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

    with quick():
        got, expected = both(derivatives(f) | second_derivatives(f), x, w)
    assert_close(got, expected, 256, torch.tensor(200.0).double(), signs=False)


ATTENTION = {
    "plain": {},
    "causal": {"is_causal": True},
    "masked": {"attn_mask": torch.tensor([[True] * 4, [False] * 4, [True, False] * 2])},
    "biased": {"attn_mask": torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4)},
    "scaled": {"scale": 0.3},
    "grouped": {"enable_gqa": True},
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_of_four_axes_and_its_derivatives(name):
    q = tame(0, (2, 4, 3, 5), torch.float64)
    k, v = (tame(seed, (2, 2 if name == "grouped" else 4, 4, 5), torch.float64) for seed in (1, 2))

    def total(q, k, v, backend):
        def f(c, x):
            return c, functional.scaled_dot_product_attention(
                q * x, k, v * x, **ATTENTION[name]
            ).sin().sum()

        return gd.scan(f, (), torch.linspace(0.5, 1, 3, dtype=torch.float64), backend=backend)[1].sum()

    def slopes(q, k, v, backend):
        return torch.func.grad(total, (0, 1, 2))(q, k, v, backend)

    def curved(q, k, v, backend):
        return torch.func.grad(lambda q: slopes(q, k, v, backend)[1].square().sum())(q)

    for f in (total, slopes, curved):
        with sdpa_kernel(SDPBackend.MATH):  # torch's fused attention has no second derivative
            expected = f(q, k, v, "eager")
        torch.testing.assert_close(f(q, k, v, "native"), expected, rtol=1e-9, atol=1e-11, equal_nan=True)


def test_attention_with_dropout_is_refused():
    def f(c, x):
        return c, functional.scaled_dot_product_attention(c, c, c, dropout_p=0.5)

    with pytest.raises(BackendError, match="draws from torch's generator"):
        gd.scan(f, torch.eye(3)[None, None], length=2, backend="native")


@few
@given(st.integers(2, 9), st.integers(2, 9), st.integers(2, 20), dtypes, st.integers(0, 2**32))
def test_views(rows, columns, depth, dtype, seed):
    got, expected = both(VIEWS, hostile(seed, (rows, columns, depth), dtype))
    assert_close(got, expected, 0)


@few
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), dtypes, st.integers(0, 2**32))
def test_contractions(n, m, k, dtype, seed):
    functions = {
        "mm": lambda a, b, c: a @ b,
        "of a transpose": lambda a, b, c: b.T @ a.T,
        "with a transpose": lambda a, b, c: a @ (b.T * 2).T,
        "linear": lambda a, b, c: functional.linear(a, b.T, b[0]),
        "vector": lambda a, b, c: a @ b[:, 0],
        "vector on the left": lambda a, b, c: a[0] @ b,
        "bmm": lambda a, b, c: c @ (b * torch.arange(1, 4, dtype=b.dtype)[:, None, None]),
        "bmm, shared": lambda a, b, c: c @ b,
        "sum of outer products": lambda a, b, c: torch.einsum("ik,im->km", a, a[:, :1] * 2 + b[0]),
        "sum over the batch": lambda a, b, c: torch.einsum("bnk,km->nm", c, b),
        "outer": lambda a, b, c: torch.outer(a[:, 0], b[0]),
        "addmm": lambda a, b, c: torch.addmm(b[0], a, b, beta=0.5, alpha=2),
        "gram": lambda a, b, c: a.T @ a,
        "batched outer": lambda a, b, c: torch.einsum("bn,bk->bnk", c[:, :, 0], c[:, 0]).sum(0),
    }
    a, b, c = tame(seed, (n, k), dtype), tame(seed + 1, (k, m), dtype), tame(seed + 2, (3, n, k), dtype)
    got, expected = both(functions, a, b, c)
    assert_close(got, expected, 16, scale=torch.tensor(30.0 * k).double())


@few
@given(st.integers(2, 9), st.integers(1, 9), dtypes, st.integers(0, 2**32))
def test_picking_and_placing(rows, columns, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    at = torch.randint(-rows, rows, (4,), generator=generator)
    over = torch.randint(rows, (4,), generator=generator)
    across = torch.randint(columns, (rows, 2), generator=generator)
    a, b = tame(seed, (rows, columns), dtype), tame(seed + 1, (4, columns), dtype)
    functions = {
        "index": lambda a, b, at, over, across: a[at],
        "index the second": lambda a, b, at, over, across: a[:, across[:, 0]],
        "index both": lambda a, b, at, over, across: a[at[:2], across[0]],
        "index apart": lambda a, b, at, over, across: a[None, :, :, None].expand(4, -1, -1, 2)[
            over % 2, :, across[0, :1]
        ],
        "index_select": lambda a, b, at, over, across: a.index_select(0, over),
        "gather": lambda a, b, at, over, across: a.gather(1, across),
        "take along": lambda a, b, at, over, across: a.take_along_dim(across[:, :1], 1),
        "scatter": lambda a, b, at, over, across: a.scatter(1, across[:, :1], 7.0),
        "scatter source": lambda a, b, at, over, across: a.scatter(1, across[:, :1], a + 1),
        "scatter_add": lambda a, b, at, over, across: a.scatter_add(1, across, a.repeat(1, 2)),
        "index_put": lambda a, b, at, over, across: a.index_put((torch.tensor([0, 1]),), b[:2]),
        "accumulate": lambda a, b, at, over, across: a.index_put((at,), b, accumulate=True),
        "index_add": lambda a, b, at, over, across: a.index_add(0, over, b),
        "embedding": lambda a, b, at, over, across: functional.embedding(over, a),
        "nll": lambda a, b, at, over, across: functional.cross_entropy(a, across[:, 0]),
        "assigned": lambda a, b, at, over, across: assigned(a),
    }
    got, expected = both(functions, a, b, at, over, across)
    assert_close(got, expected, 16, scale=torch.tensor(10.0).double())


BYTES = torch.tensor([[2, 4], [0, 255]], dtype=torch.uint8)
ZEROS = torch.tensor([[0.0, -0.0, nan, 1.0]])
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
    "division by 127": (lambda x: x // 127, BYTES.to(torch.int8)),
}


@pytest.mark.parametrize("name", EDGES)
def test_the_ends_of_dtypes_and_both_zeros(name):
    f, xs = EDGES[name]
    assert_same(lambda backend: gd.scan(lambda c, x: (c, f(x)), (), xs, backend=backend))


@pytest.mark.parametrize("length", [511, 513, 5000, 60_000])
def test_long_contractions_are_as_exact_as_those_of_torch(length):
    """One number that takes in all products of a tenth loses a thousandth of them."""
    a, b = torch.full((1, 4, length), 1.0), torch.full((length, 16), 0.1)
    _, got = gd.scan(lambda c, x: (c, x @ b), (), a, backend="native")
    torch.testing.assert_close(got, torch.full_like(got, 0.1 * length), rtol=1e-5, atol=0)


def assigned(a):
    a = a.clone()
    a[0] = a[1] * 2
    a[:, -1] += 1
    return a


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
def test_what_torch_does_not_wrap_is_not_wrapped(pick):
    table = torch.arange(4.0)
    for bad in (-1, 4):
        index = torch.tensor([[bad]])
        with pytest.raises((IndexError, RuntimeError)):
            pick(table, index[0])
        with pytest.raises(IndexError, match="in step 0"):
            gd.scan(lambda c, i: (c, pick(table, i)), ONE, index, backend="native")


# What is refused, before anything is compiled.

ONE = torch.tensor(1.0)
SQUARE = torch.eye(3, dtype=torch.float64)
REFUSED = {
    "aten.cummax": lambda c: c.cummax(0)[0],
    "prims.digamma": lambda c: torch.digamma(c),
    "aten.bucketize": lambda c: torch.bucketize(c[0, 0], c[0]),  # whose rewriting asks for a value
    "aten.linalg_inv_ex": lambda c: torch.linalg.inv(c),
    "aten.fmod.Tensor|aten.remainder.Tensor": lambda c: c.long() % (c.long() + 1),
    "aten.pow.Tensor_Tensor": lambda c: c.long() ** c.long(),
    "aten.pow.Tensor_Scalar": lambda c: c.long() ** 5,
    "aten.floor_divide": lambda c: c.to(torch.uint8) // 256,  # which is 0 there
    "aten.div.Tensor_mode": lambda c: c.div(0.3, rounding_mode="floor"),
    "complex": lambda c: torch.fft.fft(c).real,
    "bfloat16 tensors": lambda c: c.bfloat16().float(),
    "aten.index.*mask|aten.nonzero": lambda c: torch.ops.aten.index.Tensor(c, [torch.ones(3, 3).bool()]),
    "aten.convolution": lambda c: functional.conv1d(c.long()[None], c.long()[:, :, None]),
    "a step of": lambda c: (c.repeat(1000, 1000) * 2).sin().sum(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_covered_is_refused_by_name(name, monkeypatch):
    f = REFUSED[name]
    monkeypatch.setattr(native, "build", lambda text: pytest.fail("compiled"))
    for _ in range(2):
        with pytest.raises(BackendError, match=name):
            gd.scan(lambda c, x: (c, f(c)), SQUARE, length=2, backend="native")


def test_no_compiler_is_one_clear_sentence(monkeypatch):
    native._build._compiler.cache_clear()
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(native._build, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match="needs a C compiler, and none was found: install gcc or clang"):
        gd.scan(lambda c, x: (c * 1.2345, None), ONE, length=2, backend="native")
    monkeypatch.undo()
    native._build._compiler.cache_clear()
    assert gd.scan(lambda c, x: (c * 1.2345, None), ONE, length=1, backend="native")[0] == ONE * 1.2345


# The loop.


def descend(c, x):
    return c - 0.1 * torch.sin(c + x), c.sum()


def test_segments_and_threads_do_not_show(monkeypatch):
    xs, starts = tame(0, (500, 3), torch.float64), tame(1, (5, 3), torch.float64)
    run = lambda start: gd.scan(descend, start, xs, backend="native")  # noqa: E731
    whole = [run(start) for start in starts]
    middle, first = gd.scan(descend, starts[0], xs[:123], backend="native")
    end, second = gd.scan(descend, middle, xs[123:], backend="native")
    assert end.equal(whole[0][0])
    assert torch.cat([first, second]).equal(whole[0][1])
    before = torch.get_num_threads()
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


def test_threads_trace_and_compile_side_by_side(monkeypatch):
    """torch's tracer patches what all threads share, and fell over its own feet."""
    monkeypatch.setattr(_trace, "_recipes", _recent.Recent())
    monkeypatch.setattr(_trace, "_bodies", _recent.Recent())
    xs, start = tame(0, (50, 3), torch.float64), tame(1, (3,), torch.float64)

    def slope(number, backend="native"):
        def f(c, x):
            return torch.sin(0.5 * c + number * x), None

        return torch.func.grad(lambda c: gd.scan(f, c, xs, backend=backend)[0].sum())(start)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(6) as pool:
            got = list(pool.map(slope, range(12)))
    finally:
        sys.setswitchinterval(before)
    for number, leaf in enumerate(got):
        torch.testing.assert_close(leaf, slope(number, "eager"), rtol=1e-10, atol=1e-12)


def test_another_number_of_members_traces_and_compiles_nothing(monkeypatch):
    xs, starts = tame(0, (20, 3), torch.float64), tame(1, (7, 3), torch.float64)
    run = lambda start: gd.scan(descend, start, xs, backend="native")[0]  # noqa: E731
    cases = {
        "values": torch.func.vmap(run),
        "gradients": torch.func.vmap(torch.func.grad(lambda start: run(start).sum())),
    }
    for case in cases.values():
        case(starts[:2])
    monkeypatch.setattr(_body, "graph_of", None)
    monkeypatch.setattr(native, "build", None)
    for case in cases.values():
        torch.testing.assert_close(case(starts), torch.stack([case(row[None])[0] for row in starts]))


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


@pytest.mark.parametrize("exponent", [True, False])
def test_a_bool_to_the_power_of_a_bool_is_a_bool(exponent):
    xs = torch.tensor([[True, False], [False, True]])
    assert_same(lambda backend: gd.scan(lambda c, x: (c, (x**exponent, x**2)), xs[0], xs, backend=backend))


def test_pictures_in_bytes_are_enlarged_alike_or_not_at_all():
    xs = (torch.arange(2 * 5 * 5) * 37 % 256).reshape(2, 1, 1, 5, 5)

    def run(xs, backend, mode):
        f = lambda c, x: (c, functional.interpolate(x, scale_factor=2, mode=mode))  # noqa: E731
        return gd.scan(f, xs[0], xs, backend=backend)[1]

    assert run(xs.byte(), "native", "nearest").equal(run(xs.byte(), "eager", "nearest"))
    torch.testing.assert_close(*(run(xs.double(), backend, "bilinear") for backend in ("native", "eager")))
    with pytest.raises(gd.BackendError, match="upsample_bilinear2d"):
        run(xs.byte(), "native", "bilinear")


@pytest.mark.parametrize("size", [1e-22, 1.0, 1e18, 1e25])
def test_spreads_of_float32_overflow_and_vanish_no_sooner_than_torchs(size):
    xs = tame(0, (3, 50, 4), torch.float32) * size

    def f(c, x):
        return c, (x.var(0), x.std(0, correction=0), x.std())

    assert_same(lambda backend: gd.scan(f, xs[0], xs, backend=backend), 1e-5)


@pytest.mark.parametrize("seconds", [1e-7, 1e-3, 1.0])
@pytest.mark.parametrize("members", [1, 3])
def test_segments_of_the_loop_take_50_ms_and_the_next_call_knows(members, seconds, monkeypatch):
    now, segments = [0.0], []

    def run(first, last, start, end, *rest):
        segments.append(end - start)
        now[0] += seconds * (end - start) * (last - first)
        return -1

    monkeypatch.setattr(native, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    loop = object.__new__(native._Function)
    loop.run, loop.scratch = run, ctypes.c_char * 64
    loop.rounds, loop.pace = 0, 0.0
    length, most = 10**6 if seconds < 1e-3 else 200, max(1, int(0.05 / (seconds * members) * (1 + 1e-9)))
    for first in (1, min(most, length)):
        del segments[:]
        loop([0], (None, None), members, length)
        assert sum(segments) == length
        assert segments[0] in (first, first - 1)
        assert max(segments) <= most


def test_lengths_and_numbers_in_tensors_compile_nothing(monkeypatch):
    built, build = [], native.build
    monkeypatch.setattr(native, "build", lambda text: built.append(text) or build(text))

    def run(lr, xs, backend):
        return gd.scan(lambda c, x: (c - lr * torch.sin(c + 2 * x), c), xs[0], xs, backend=backend)

    for length in (1, 2, 70, 1000):
        lr, xs = tame(length, (), torch.float64) * 0.1, tame(length, (length, 3), torch.float64)
        assert_same(functools.partial(run, lr, xs), 1e-12, 1e-13)
    assert len(built) == 1


@pytest.mark.parametrize("shares", [1, 2])
@pytest.mark.parametrize("flush", [False, True])
def test_denormals_are_what_the_calling_thread_makes_of_them(flush, shares, monkeypatch):
    def flushes():
        return bool(torch.tensor(2.0**-140) * 0.5 == 0)

    def halve(start):
        return gd.scan(lambda c, x: (c * 0.5, None), start, length=5, backend="native")[0]

    monkeypatch.setattr(torch, "get_num_threads", lambda: shares)
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
    "from a product": lambda c: {
        "a": (c["a"].view(8, 12) @ c["b"].view(12, 8) / 9).repeat(1, 2)[:, :12].flatten(),
        "b": c["b"] * 1.01,
    },
    "the old one read after": lambda c: {"a": c["a"] + 1, "b": c["b"] + c["a"].exp()},
    "the new one read after": lambda c: {
        "a": c["a"] / 2 + c["b"],
        "b": c["b"] - (c["a"] / 2 + c["b"]).sin(),
    },
    "scattered": lambda c: {
        "a": c["a"].scatter_add(0, (c["b"].abs() * 9).long() % 96, c["a"]) / 2,
        "b": c["b"],
    },
    "put together": lambda c: {"a": torch.cat([c["a"][48:] / 2, c["a"][:48]]), "b": c["b"]},
    "a row of it for all": lambda c: {"a": (c["a"].view(8, 12) + c["a"][:12]).flatten() / 2, "b": c["b"]},
    "summed by rows": lambda c: {"a": (c["a"] + c["b"].view(8, 12).sum(0).repeat(8)) / 9, "b": c["b"] / 2},
    "one of a larger one": lambda c: {"a": c["a"], "b": c["b"] + c["a"].view(8, 12).sum(1).repeat(12)},
}


@pytest.mark.parametrize("name", UPDATES)
@pytest.mark.parametrize("inner", [False, True])
def test_a_carry_is_overwritten_only_where_nobody_misses_it(name, inner):
    def f(carry, x):
        def once(c, _):
            return UPDATES[name](c), c["a"][::5] + x

        return gd.scan(once, carry, None, 3) if inner else once(carry, None)

    generator = torch.Generator().manual_seed(0)
    init = {leaf: torch.randn(96, generator=generator, dtype=torch.float64) for leaf in "ab"}
    xs = torch.arange(4.0, dtype=torch.float64)
    assert_same(lambda backend: gd.scan(f, init, xs, backend=backend), 1e-13, 1e-13)


def test_training_is_that_of_eager():
    x, y = (
        tame(0, (40, 6), torch.float64),
        torch.randint(3, (40,), generator=torch.Generator().manual_seed(1)),
    )

    def loss_fn(params, batch):
        hidden = torch.relu(batch[0] @ params["a"] + params["b"])
        return functional.cross_entropy(hidden @ params["c"], batch[1])

    params = {
        "a": tame(2, (6, 20), torch.float64),
        "b": tame(3, (20,), torch.float64),
        "c": tame(4, (20, 3), torch.float64),
    }
    index = gd.sample_batches(gd.random.key(0), n=40, batch_size=8, steps=30)
    for transform in (None, gd.adam(), gd.momentum(0.9, nesterov=True)):
        if transform is None:
            step, init = gd.make_step(loss_fn), params
        else:
            step = gd.make_step(loss_fn, transform)
            init = step.init(params)
        for options in ({}, {"every": 4}, {"record": ("loss", "grad_norm"), "check_finite": "all"}):
            run = functools.partial(gd.train, step, init, (x, y), index, 0.05, **options)
            assert_same(lambda backend: run(backend=backend), 1e-9, 1e-11)  # noqa: B023


@pytest.mark.parametrize(("ranks", "steps"), [("QUICK", 1_000), ("QUICK", 9_999), ("RANKED", 10_000)])
def test_auto_takes_the_native_loop(ranks, steps, monkeypatch):
    ran, run = [], native.run
    monkeypatch.setattr(backends, ranks, {"cpu": (lambda *a: ran.append(a[4]) or run(*a),)})
    xs = tame(0, (steps, 3), torch.float64)
    gd.scan(descend, xs[0], xs, backend="auto")
    assert ran == [steps]


SANITIZED = """
import torch
from gdfunc._scan.backends.native import _build
_build._FLAGS[0] = "-O1"
_build._FLAGS += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "{flag}"]
import tests.test_native as t
import tests.test_native_bodies as b
for shape in ((), (0, 3), (7, 33), (2, 3, 5)):
    for dtype in (torch.float32, torch.float64):
        t.both(t.arity(t.EXACT, 1), t.hostile(0, shape, dtype))
for shape in ((4, 6, 5), (2, 17, 33)):
    a = t.tame(1, shape, torch.float32)
    for functions in (t.REDUCTIONS, t.ORDERED, t.VIEWS):
        t.both(functions, a)
t.test_contractions.hypothesis.inner_test(33, 17, 20, torch.float32, 0)
t.test_contractions.hypothesis.inner_test(5, 40, 37, torch.float64, 0)
t.test_picking_and_placing.hypothesis.inner_test(5, 3, torch.float32, 0)
t.test_empty_axes.hypothesis.inner_test(3, 0, 2, torch.float32)
for layout in t.LAYOUTS:
    t.test_inputs_may_lie_anyhow.hypothesis.inner_test(layout, "expanded", layout, 5, 3, torch.float32)
for name in t.WINDOWS:
    f, *shapes = t.WINDOWS[name]
    t.both(t.derivatives(f), *[t.tame(0, shape, torch.float32) for shape in shapes])
for shapes in b.SHAPES[:2]:
    for names in (sorted(b.OPERATIONS)[n::12] for n in range(12)):
        code = [(name, 3 * n % 7, 5 * n % 8, n % 8) for n, name in enumerate(names)]
        b.verdicts([b.Program(code, [5, 6, 7])], "value", False, shapes, 3, 0)
t.test_training_is_that_of_eager()
t.test_a_bad_index_stops_the_loop_and_names_the_step(4, 5)
print("clean")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compiler", "library", "flag"),
    [("gcc", "libasan.so", "-static-libubsan"), ("clang", "libclang_rt.asan-x86_64.so", "-shared-libasan")],
)
def test_generated_code_is_clean_under_the_sanitizers(compiler, library, flag, tmp_path):
    if not shutil.which(compiler):
        pytest.skip(f"asks {compiler} for its sanitizers")
    # The second so that exceptions, which torch throws and catches, find their way.
    asked = [[compiler, f"-print-file-name={name}"] for name in (library, "libstdc++.so")]
    found = [
        subprocess.run(each, capture_output=True, text=True, check=True).stdout.strip() for each in asked
    ]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(found),
        "ASAN_OPTIONS": "detect_leaks=0",
        "XDG_CACHE_HOME": str(tmp_path),
        "CC": compiler,
    }
    done = subprocess.run(
        [sys.executable, "-c", SANITIZED.format(flag=flag)],
        env=environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "clean\n", done.stderr[-3000:]


def wander(start, length=10**9):
    return gd.scan(lambda c, x: (torch.sin(c + 1), None), start, length=length, backend="native")[0]


def wander_in_one_step(start):
    return gd.scan(lambda c, x: (wander(c), None), start, length=1, backend="native")[0]


def wander_in_loops(start):
    def turn(c, x):
        return gd.scan(lambda c, x: (wander(c, 100), None), c, length=100)[0], None

    return gd.scan(
        lambda c, x: (gd.scan(turn, c, length=10**6)[0], None), start, length=1, backend="native"
    )


def wander_far(start):
    def turn(c, x):
        return torch.sin(c[:, None] * torch.arange(5_000)).sum(1), None

    return gd.scan(turn, start, length=1, backend="native")[0]


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
@pytest.mark.parametrize("shares", [1, 2])
@pytest.mark.parametrize(
    ("run", "members"), [(wander, 4), (wander_in_one_step, 4), (wander_in_loops, 4), (wander_far, 10_000)]
)
def test_ctrl_c_is_heard_in_the_loop(run, members, shares, monkeypatch):
    call, began = native._Function.__call__, []

    def interrupted(*args):
        threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        began.append(time.perf_counter())
        return call(*args)

    monkeypatch.setattr(torch, "get_num_threads", lambda: shares)
    monkeypatch.setattr(native._Function, "__call__", interrupted)  # by then it is compiled
    # A shell that starts this in the background lets it ignore the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            torch.func.vmap(run)(tame(0, (members, 300), torch.float64))
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.perf_counter() - began[0] < 10


@pytest.mark.parametrize("name", TABLE)
def test_every_transformation_of_the_family_runs_natively(name):
    row = TABLE[name]
    transform = row.make(**row.hyperparameters)
    params = {"w": tame(0, (4, 3), torch.float64), "m": tame(1, (3, 3), torch.float64)}
    params |= {} if row.matrices else {"s": tame(2, (), torch.float64)}
    data = tame(3, (20, 4), torch.float64)

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


NETWORKS = {
    "layer norm": (lambda: [nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3)], cross_entropy),
    "embedding": (lambda: [Round(), nn.Embedding(3, 4), nn.Flatten(), nn.Linear(24, 3)], cross_entropy),
    "binary": (lambda: [nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 3)], bce),
    "pooled": (lambda: [nn.MaxPool1d(2), nn.Linear(3, 3)], functional.mse_loss),
    "robust": (lambda: [nn.Linear(6, 8), nn.Softplus(), nn.Linear(8, 3)], functional.huber_loss),
    "transformer": (lambda: [Fold(), encoder(), nn.Flatten(), nn.Linear(6, 3)], functional.mse_loss),
}


def encoder():
    return nn.TransformerEncoderLayer(2, 2, 4, dropout=0.0, batch_first=True)


class Fold(nn.Module):
    def forward(self, x):
        return x.unflatten(-1, (3, 2))


class Round(nn.Module):
    def forward(self, x):
        return x.abs().long().clamp(0, 2)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_and_losses(name):
    layers, loss = NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        apply, params, _ = gd.modules.functional(nn.Sequential(*layers()).double())
    data = tame(0, (20, 6), torch.float64), tame(1, (20, 3), torch.float64)
    step = gd.make_step(lambda p, batch: loss(apply(p, batch[0]), batch[1]))
    index = gd.sample_batches(gd.random.key(0), n=20, batch_size=4, steps=8)
    assert_same(lambda backend: gd.train(step, params, data, index, 0.05, backend=backend), 1e-9, 1e-11)
