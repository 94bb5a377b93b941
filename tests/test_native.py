"""The native backend against eager, operator by operator: shapes, dtypes, NaN, ∞, −0.0, empty axes."""

import functools
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

import gdfunc as gd
from gdfunc._errors import BackendError
from gdfunc._scan import _auto, _body, _trace, native

from .test_conformance import TABLE

HOSTILE = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.5,
    -2.5,
    3.0,
    math.pi,
    1e-3,
    1e30,
    -1e30,
    1e-40,
    math.inf,
    -math.inf,
    math.nan,
]


def of_torch(names):
    return {name: getattr(torch, name) for name in names.split()}


# Functions of the C library may be a few units in the last place off; all else has the same bits.
FUNCTIONS = of_torch(
    "exp exp2 expm1 log log1p log2 log10 sin cos tan asin acos atan sinh cosh tanh erf erfc sigmoid "
    "sqrt rsqrt"
)
FUNCTIONS |= {
    "silu": torch.nn.functional.silu,
    "softplus": torch.nn.functional.softplus,
    "elu": torch.nn.functional.elu,
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
    "nan_to_num frac"
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
    "leaky": lambda a: torch.nn.functional.leaky_relu(a),
    "hardtanh": lambda a: torch.nn.functional.hardtanh(a),
    "threshold": lambda a: torch.nn.functional.threshold(a, 0.1, 7.0),
    "to half and back": lambda a: a.double().float().to(a.dtype),
    "mask": lambda a: a * (a > 0),
    "bool to float": lambda a: (a > 0).to(a.dtype) + 1,
    "heaviside": lambda a: (a >= 0).to(torch.int64),
}
FUSED = {  # of two roundings torch may make one
    "add, alpha": lambda a, b: torch.add(a, b, alpha=0.7),
    "sub, alpha": lambda a, b: torch.sub(a, b, alpha=-3),
    "lerp": lambda a, b: torch.lerp(a, b, 0.25),
    "addcmul": lambda a, b: torch.addcmul(a, b, torch.tensor(0.3, dtype=a.dtype), value=0.5),
}
CANCELLING = {  # next to zero only to a share of what was subtracted
    "gelu": torch.nn.functional.gelu,
    "gelu by tanh": lambda a: torch.nn.functional.gelu(a, approximate="tanh"),
    "mish": torch.nn.functional.mish,
    "logit": lambda a: torch.logit(torch.sigmoid(a), eps=1e-3),
    "log_sigmoid": torch.nn.functional.logsigmoid,
    "bce": lambda a: torch.nn.functional.binary_cross_entropy_with_logits(a, (a > 0).to(a.dtype)),
    "huber": lambda a: torch.nn.functional.huber_loss(a, a * 0, reduction="none"),
    "smooth l1": lambda a: torch.nn.functional.smooth_l1_loss(a, a * 0, reduction="none"),
}
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
    "layer_norm": lambda a: torch.nn.functional.layer_norm(a, a.shape[-1:]),
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
    "pad": lambda a: torch.nn.functional.pad(a, (1, 2, 0, 1), value=3.0),
    "diagonal": lambda a: a.diagonal(0, 0, 1),
    "diagonal, off": lambda a: a.diagonal(-1, 1, 2),
    "tril": lambda a: a.tril(),
    "triu": lambda a: a.triu(1),
    "roll": lambda a: a.roll(1, 1),
    "unbind": lambda a: a.unbind(1)[0],
    "split": lambda a: a.split(2, 0)[-1],
    "chunk": lambda a: a.chunk(2, 2)[0] * 2,
    "movedim": lambda a: a.movedim(0, -1) + 1,
    "squeeze": lambda a: a[:1].squeeze(0),
    "arange": lambda a: a * torch.arange(a.shape[-1]),
    "linspace": lambda a: a * torch.linspace(0, 1, a.shape[-1], dtype=a.dtype),
    "eye": lambda a: torch.eye(a.shape[-1], dtype=a.dtype) + 0,
    "one_hot": lambda a: torch.nn.functional.one_hot(torch.arange(a.shape[0]) % 2, 2),
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


def arity(functions, n):
    return {name: f for name, f in functions.items() if takes(name, f) == n}


TWO = {"maximum", "minimum", "add", "sub", "mul", "div", "copysign", "eq", "ne", "lt", "le"}
TWO |= {"gt", "ge", "logical_and", "logical_or", "logical_xor", "pow", "atan2", "hypot", "where"}
TWO |= {"rsub", "clamp by tensors", "fmod", "fmod of negative", "remainder"}
TWO |= {"remainder of negative", "remainder of zero"}


def takes(name, f):
    return 2 if name in TWO else 1


SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 7, 16, 33]), max_size=3).map(tuple)


@few
@given(SHAPES, dtypes, st.integers(0, 2**32))
def test_functions_of_one_number(shape, dtype, seed):
    got, expected = both(arity(EXACT, 1), hostile(seed, shape, dtype))
    assert_close(got, expected, 0, signs=False)
    got, expected = both(arity(FUNCTIONS, 1), hostile(seed, shape, dtype))
    assert_close(got, expected, 8)
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


@few
@given(extents, extents, extents, dtypes, st.integers(0, 2**32))
def test_reductions(rows, columns, depth, dtype, seed):
    a = tame(seed, (rows + 1, columns, depth + 1), dtype)
    got, expected = both(REDUCTIONS, a)
    assert_close(got, expected, 64, scale=torch.tensor(max(1.0, rows * columns * depth / 4)).double())


@few
@given(extents, extents, extents, dtypes, st.integers(0, 2**32))
def test_extrema(rows, columns, depth, dtype, seed):
    got, expected = both(ORDERED, hostile(seed, (rows, columns, depth), dtype))
    assert_close(got, expected, 0, signs=False)


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
        "linear": lambda a, b, c: torch.nn.functional.linear(a, b.T, b[0]),
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
        "embedding": lambda a, b, at, over, across: torch.nn.functional.embedding(over, a),
        "nll": lambda a, b, at, over, across: torch.nn.functional.cross_entropy(a, across[:, 0]),
        "assigned": lambda a, b, at, over, across: assigned(a),
    }
    got, expected = both(functions, a, b, at, over, across)
    assert_close(got, expected, 16, scale=torch.tensor(10.0).double())


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
        lambda a, i: torch.nn.functional.embedding(i, a[:, None]),
        lambda a, i: torch.nn.functional.nll_loss(a.log_softmax(0)[None], i),
        lambda a, i: torch.where(i > 0, a[:1], a.gather(0, i)),
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
    "aten.sort": lambda c: c.sort()[0],
    "prims.prod": lambda c: c.cumprod(0),  # not aten's of that name
    "aten.linalg_inv_ex": lambda c: torch.linalg.inv(c),
    "aten.fmod.Tensor|aten.remainder.Tensor": lambda c: c.long() % (c.long() + 1),
    "aten.pow.Tensor_Tensor": lambda c: c.long() ** c.long(),
    "aten.pow.Tensor_Scalar": lambda c: c.long() ** 5,
    "aten.div.Tensor_mode": lambda c: c.div(0.3, rounding_mode="floor"),
    "complex": lambda c: torch.fft.fft(c).real,
    "bfloat16 tensors": lambda c: c.bfloat16().float(),
    "aten.index.*mask|aten.nonzero": lambda c: torch.ops.aten.index.Tensor(c, [torch.ones(3, 3).bool()]),
    "aten.convolution": lambda c: torch.nn.functional.conv1d(c[None], c[:, :, None]),
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
    monkeypatch.setenv("CC", "/nonexistent/cc")
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
    monkeypatch.setattr(_trace, "_recipes", _trace._Recent())
    monkeypatch.setattr(_trace, "_bodies", _trace._Recent())
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
    monkeypatch.setattr(_body, "trace_flat", None)
    monkeypatch.setattr(native, "build", None)
    for case in cases.values():
        torch.testing.assert_close(case(starts), torch.stack([case(row[None])[0] for row in starts]))


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
    loop.library, loop.scratch, loop.pace = SimpleNamespace(run=run), 1, 0.0
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

    def run(lr, xs):
        return gd.scan(lambda c, x: (c - lr * torch.sin(c + 2 * x), c), xs[0], xs, backend="native")

    for length in (1, 2, 70, 1000):
        lr, xs = tame(length, (), torch.float64) * 0.1, tame(length, (length, 3), torch.float64)
        carry, ys = run(lr, xs)
        expected = gd.scan(lambda c, x: (c - lr * torch.sin(c + 2 * x), c), xs[0], xs)  # noqa: B023
        assert torch.allclose(carry, expected[0], rtol=1e-12, atol=1e-13)
        assert torch.allclose(ys, expected[1], rtol=1e-12, atol=1e-13)
    assert len(built) == 1


def test_a_denormal_stays_and_no_mode_is_left_behind():
    carry, _ = gd.scan(lambda c, x: (c * 0.5, None), torch.tensor(2.0**-140), length=5, backend="native")
    assert carry == 2.0**-145
    assert torch.tensor(2.0**-140) * 0.5 == 2.0**-141


def test_training_is_that_of_eager():
    x, y = (
        tame(0, (40, 6), torch.float64),
        torch.randint(3, (40,), generator=torch.Generator().manual_seed(1)),
    )

    def loss_fn(params, batch):
        hidden = torch.relu(batch[0] @ params["a"] + params["b"])
        return torch.nn.functional.cross_entropy(hidden @ params["c"], batch[1])

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
            step, init = gd.make_transform_step(loss_fn, transform), gd.init_state(transform, params)
        for options in ({}, {"every": 4}, {"record": ("loss", "grad_norm"), "check_finite": "all"}):
            (got, rows), (final, trajectory) = (
                gd.train(step, init, (x, y), index, 0.05, backend=backend, **options)
                for backend in ("native", "eager")
            )
            for left, right in zip(
                gd._tree.leaves((got, rows)), gd._tree.leaves((final, trajectory)), strict=True
            ):
                assert torch.allclose(left, right, rtol=1e-9, atol=1e-11)


def test_auto_takes_the_native_loop(monkeypatch):
    ran, run = [], native.run
    monkeypatch.setattr(_auto, "_RANKED", {"cpu": (lambda *a: ran.append(a[4]) or run(*a),)})
    xs = tame(0, (10_000, 3), torch.float64)
    gd.scan(descend, xs[0], xs, backend="auto")
    assert ran == [10_000]


SANITIZED = """
import torch
from gdfunc._scan.native import _build
_build._FLAGS[0] = "-O1"
_build._FLAGS += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-static-libubsan"]
import tests.test_native as t
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
t.test_training_is_that_of_eager()
t.test_a_bad_index_stops_the_loop_and_names_the_step(4, 5)
print("clean")
"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("gcc"), reason="asks gcc for its sanitizers")
def test_generated_code_is_clean_under_the_sanitizers(tmp_path):
    asked = ["gcc", "-print-file-name=libasan.so"]
    library = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    environment = os.environ | {
        "LD_PRELOAD": library,
        "ASAN_OPTIONS": "detect_leaks=0",
        "XDG_CACHE_HOME": str(tmp_path),
        "CC": "gcc",
    }
    done = subprocess.run(
        [sys.executable, "-c", SANITIZED],
        env=environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "clean\n", done.stderr[-3000:]


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
@pytest.mark.parametrize("shares", [1, 2])
def test_ctrl_c_is_heard_in_the_loop(shares, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: shares)
    starts = tame(0, (4, 300), torch.float64)

    def run(start, length):
        return gd.scan(lambda c, x: (torch.sin(c + 1), None), start, length=length, backend="native")[0]

    torch.func.vmap(functools.partial(run, length=3))(starts)  # compiles
    timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
    began = time.perf_counter()
    # A shell that starts this in the background lets it ignore the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            torch.func.vmap(functools.partial(run, length=10**9))(starts)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.perf_counter() - began < 10


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

    step, init = gd.make_transform_step(loss_fn, transform), gd.init_state(transform, params)
    index = gd.sample_batches(gd.random.key(0), n=20, batch_size=5, steps=12)
    got, expected = (
        gd.train(step, init, data, index, row.lr, backend=name) for name in ("native", "eager")
    )
    leaves = gd._tree.leaves(got), gd._tree.leaves(expected)
    for left, right in zip(*leaves, strict=True):
        assert torch.allclose(left, right, rtol=1e-8, atol=1e-10)


def cross_entropy(outputs, y):
    weight = torch.tensor([1.0, 2.0, 3.0], dtype=outputs.dtype)
    return nn.functional.cross_entropy(outputs, y.argmax(-1), weight, label_smoothing=0.1)


def bce(outputs, y):
    return nn.functional.binary_cross_entropy_with_logits(outputs, (y > 0).double())


NETWORKS = {
    "layer norm": (lambda: [nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3)], cross_entropy),
    "embedding": (lambda: [Round(), nn.Embedding(3, 4), nn.Flatten(), nn.Linear(24, 3)], cross_entropy),
    "binary": (lambda: [nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 3)], bce),
    "pooled": (lambda: [nn.MaxPool1d(2), nn.Linear(3, 3)], nn.functional.mse_loss),
    "robust": (lambda: [nn.Linear(6, 8), nn.Softplus(), nn.Linear(8, 3)], nn.functional.huber_loss),
}


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
    got, expected = (
        gd.train(step, params, data, index, 0.05, backend=name) for name in ("native", "eager")
    )
    for left, right in zip(gd._tree.leaves(got), gd._tree.leaves(expected), strict=True):
        assert torch.allclose(left, right, rtol=1e-9, atol=1e-11)
