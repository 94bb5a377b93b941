"""Loops that are run on other machines: the operator tables, and runs of all kinds.

Each compares what native computes with eager, within the tolerance of the operator tables.
"""

from functools import partial

import torch
from torch.func import vmap
from torch.nn import functional

import gdfunc as gd

from ..assertions import assert_agrees
from ..references import normal
from ..test_native import (
    CANCELLING,
    EXACT,
    FUNCTIONS,
    FUSED,
    GAMMAS,
    WINDOWS,
    arity,
    assert_close,
    both,
    derivatives,
    extrema,
    hostile,
    of_integers,
    reductions,
    tame,
    views,
)

SHAPE = (3, 33)


def table(functions, count, units, dtype, signs=True, numbers=hostile, scale=None):
    """The functions of so many numbers in a table, on numbers of all kinds."""
    operands = [numbers(seed, SHAPE, dtype) for seed in range(count)]
    got, expected = both(arity(functions, count), *operands)
    assert_close(got, expected, units, scale and scale(operands, expected), signs=signs)


def of_sizes(operands, expected):
    return sum(operand.double().abs().nan_to_num(0, 0, 0) * 3 for operand in operands)


def of_results(operands, expected):
    return sum(1 + size.double().abs() for size in expected.values())


def of_eight(operands, expected):
    return torch.tensor(8.0).double()


def reduced(dtype):
    assert_close(*both(reductions, tame(0, (4, 17, 9), dtype)), 64, torch.tensor(150.0).double())


def whole(dtype):
    a, b = (
        torch.randint(-5, 6, SHAPE, generator=torch.Generator().manual_seed(i), dtype=dtype) for i in (0, 1)
    )
    assert_close(*both(of_integers, a, b), 2)


def agrees(run, tolerance=1e-9):
    assert_agrees(run("native"), run("eager"), tolerance)


def products(dtype):
    """Products of matrices in all orders, their sizes not whole vectors."""
    a, b, c = tame(0, (7, 33, 19), dtype), tame(1, (7, 19, 13), dtype), tame(2, (600, 5), dtype)
    f = lambda a, b, c: (a @ b, a.mT @ a, (a @ b).mT, a[0] @ b[0, :, 0], c.T @ c)  # noqa: E731
    assert_close(*both(f, a, b, c), 64, torch.tensor(99.0).double(), signs=False)


def trained(make=gd.make_step, transform=None, loss_fn=None, lr=0.05):
    """60 steps of a network with softmax and cross-entropy."""
    x, y = normal(0, 96, 12, dtype=torch.float32), torch.arange(96) % 5
    params = {"w": 0.3 * normal(1, 12, 21), "b": torch.zeros(21), "v": 0.3 * normal(2, 21, 5)}
    params = gd._tree.map(lambda leaf: leaf.float(), params)

    def loss(params, batch):
        hidden = torch.tanh(batch[0] @ params["w"] + params["b"])
        return functional.cross_entropy(hidden @ params["v"], batch[1])

    step = make(loss_fn or loss, *([transform] if transform else []))
    index = gd.sample_batches(gd.random.key(0), 96, 16, 60)
    start = params if transform is None else gd.TrainState(params, transform.init(params))

    def run(backend, lr=lr):
        return gd.train(step, start, (x, y), index, lr, backend=backend)[1].loss

    return run


def regression(backend):
    x = normal(0, 100, 1)
    index = gd.sample_batches(gd.random.key(0), 100, 10, 500)
    problem = gd.problems.linear_regression(x, 3 * x[:, 0] + 2)
    return gd.train(
        gd.make_step(problem.loss_fn), problem.params, problem.data, index, 0.05, backend=backend
    )


def swept(backend):
    run = trained()
    return vmap(lambda lr: run(backend, lr))(torch.linspace(0.01, 0.2, 7))


def clipped(backend):
    """Sums of per-sample gradients, each clipped."""
    x, y = normal(0, 40, 3), normal(1, 40)

    def step(w, at):
        gradients = vmap(torch.func.grad(lambda w, x, y: ((x @ w).tanh() - y) ** 2), (None, 0, 0))(
            w, x[at], y[at]
        )
        norms = gradients.norm(dim=1, keepdim=True)
        return w - 0.05 * (gradients / norms.clamp(min=1)).sum(0), norms.sum()

    index = gd.sample_batches(gd.random.key(0), 40, 8, 50)
    return gd.scan(step, normal(2, 3), index, backend=backend)


def drawn(backend):
    """Random numbers of a key in the carry."""

    def walk(carry, _):
        x, key = carry
        key, now = gd.random.split(key)
        return (x + 0.1 * gd.random.normal(now, (5,)), key), gd.random.uniform(now, (3,))

    (x, _), ys = gd.scan(walk, (torch.zeros(5), gd.random.key(3)), length=40, backend=backend)
    return x, ys


def attention(backend):
    q, k, v = (normal(seed, 2, 3, 9, 8) for seed in range(3))

    def step(c, _):
        return c + 0.1 * functional.scaled_dot_product_attention(c, k, v, is_causal=True), c.sum()

    return gd.scan(step, q, length=6, backend=backend)


def picked(backend):
    """Elements gathered and scattered by integers."""
    table, at = normal(0, 20, 4), torch.arange(30) * 7 % 20

    def step(c, i):
        rows = c[at]
        return c.index_add(0, at, 0.01 * rows.sin()), (c.gather(1, at[:20, None] % 4), rows.sum(0), c[i])

    return gd.scan(step, table, torch.arange(9), backend=backend)


def nested(backend):
    def outer(c, x):
        inner, ys = gd.scan(lambda a, b: (a * 0.9 + b.sin(), a), c, x, backend=backend)
        return inner, ys.sum()

    return gd.scan(outer, normal(0, 5), normal(1, 7, 11, 5), backend=backend)


def hypergradient(backend):
    run = lambda lr: trained()(backend, lr)[-1]  # noqa: E731
    return torch.func.grad(run)(torch.tensor(0.05))


def wide(backend):
    """A frame of several pages on the stack."""
    xs = normal(0, 3, 64, 120)
    return gd.scan(
        lambda c, x: (c + x.sum(0), [(x * k).cumsum(0).sum(0) for k in range(9)]),
        xs[0, 0],
        xs,
        backend=backend,
    )


LOOPS = {}
for dtype in (torch.float32, torch.float64):
    name = str(dtype).removeprefix("torch.")
    LOOPS |= {
        f"functions of one, {name}": partial(table, FUNCTIONS, 1, 8, dtype),
        f"functions of two, {name}": partial(table, FUNCTIONS, 2, 8, dtype),
        f"exact of one, {name}": partial(table, EXACT, 1, 0, dtype, signs=False),
        f"exact of two, {name}": partial(table, EXACT, 2, 0, dtype, signs=False),
        f"gammas, {name}": partial(table, GAMMAS, 1, 8, dtype, scale=of_results),
        f"cancelling, {name}": partial(table, CANCELLING, 1, 32, dtype, False, tame, of_eight),
        f"fused, {name}": partial(table, FUSED, 2, 1, dtype, False, scale=of_sizes),
        f"reductions, {name}": partial(reduced, dtype),
        f"products, {name}": partial(products, dtype),
    }
LOOPS |= {
    "exact of one, bfloat16": partial(table, EXACT, 1, 0, torch.bfloat16, signs=False),
    "functions of one, float16": partial(table, FUNCTIONS, 1, 1, torch.float16),
    "extrema": lambda: assert_close(*both(extrema, hostile(0, (4, 7, 5), torch.float32)), 0, signs=False),
    "views": lambda: assert_close(*both(views, tame(0, (5, 7, 9), torch.float32)), 1, signs=False),
    "int32": partial(whole, torch.int32),
    "int64": partial(whole, torch.int64),
    "regression": partial(agrees, regression),
    "network": lambda: agrees(trained(), 1e-4),
    "Adam": lambda: agrees(trained(transform=gd.adam(), lr=0.01), 1e-4),
    "sweep": partial(agrees, swept, 1e-4),
    "clipped": partial(agrees, clipped),
    "random numbers": partial(agrees, drawn, 1e-5),
    "attention": partial(agrees, attention),
    "picking": partial(agrees, picked),
    "nested": partial(agrees, nested),
    "hypergradient": partial(agrees, hypergradient, 1e-3),
    "a large frame": partial(agrees, wide),
}
for geometry in ("conv2d", "transposed", "max_pool2d"):
    f, of_x, of_w = WINDOWS[geometry]
    LOOPS[geometry] = lambda f=f, of_x=of_x, of_w=of_w: assert_close(
        *both(derivatives(f), tame(0, of_x), tame(1, of_w)), 64, torch.tensor(99.0).double(), signs=False
    )
