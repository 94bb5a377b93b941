"""Native loops that compute each product once, and the statements around products."""

import re
from functools import partial

import pytest
import torch
from torch.func import grad

import gdfunc as gd
from gdfunc._scan import _recent
from gdfunc._scan.backends import native
from gdfunc._scan.backends.native import _program, _rows
from gdfunc._scan.trace import _trace
from gdfunc.adjoints import Checkpoint, Reverse

from .references import normal

BATCH, WIDTH, STEPS = 16, 16, 10
CALL = re.compile(r"^\s*contract_\d+\((.*), (.*), (.*)\);$", re.MULTILINE)


@pytest.fixture
def written(monkeypatch):
    """The programs that were compiled."""
    programs, build = [], native.build
    monkeypatch.setattr(native, "build", lambda text, target: build(programs.append(text) or text, target))
    return programs


def loss_fn(params, batch):
    hidden = (batch @ params["in"].T).relu()
    return (hidden @ params["out"].T).tanh().square().mean()


def final_loss():
    """The final loss of a run as a function of lr, its start and its data; and arguments for it."""
    step = gd.make_step(loss_fn)
    index = gd.sample_batches(gd.random.key(0), 24, BATCH, STEPS)
    params = {"in": normal(0, WIDTH, WIDTH) / 4, "out": normal(1, WIDTH, WIDTH) / 4}

    def run(lr, params, data, backend, adjoint=None):
        if adjoint is None:  # the specification: a loop in Python
            carry = params
            for rows in index:
                carry, _ = step(carry, data[rows], lr)
            return loss_fn(carry, data)
        final, _ = gd.train(step, params, data, index, lr, backend=backend, record=(), adjoint=adjoint)
        return loss_fn(final, data)

    return run, (torch.tensor(0.5, dtype=torch.float64), params, normal(2, 24, WIDTH))


@pytest.mark.long
@pytest.mark.parametrize("adjoint", [Checkpoint(4), Reverse()], ids=str)
def test_derivatives_with_products_that_are_handed_on_are_those_of_the_python_loop(adjoint):
    run, point = final_loss()
    fast = gd.jit(grad(partial(run, backend="native", adjoint=adjoint), (0, 1, 2)), backend="native")
    torch.testing.assert_close(fast(*point), grad(partial(run, backend="eager"), (0, 1, 2))(*point))
    second = grad(grad(partial(run, backend="native", adjoint=adjoint)))
    torch.testing.assert_close(second(*point), grad(grad(partial(run, backend="eager")))(*point))


def test_products_that_are_written_into_are_handed_on_as_they_were():
    def f(c, x):
        product = c @ x
        result = product.tanh()
        product.mul_(2)
        return c - 0.1 * product * result, None

    def loss(xs, backend, adjoint):
        return gd.scan(f, normal(0, WIDTH, WIDTH), xs, backend=backend, adjoint=adjoint)[0].square().sum()

    xs = normal(1, 6, WIDTH, WIDTH)
    found = grad(loss)(xs, "native", Checkpoint(3))
    torch.testing.assert_close(found, grad(loss)(xs, "eager", Reverse()))


def test_recomputed_steps_hand_their_products_on_without_changing_a_bit(written, monkeypatch):
    results, products = [], []
    for limit in (_rows._MOST_BYTES, 0):
        monkeypatch.setattr(_rows, "_MOST_BYTES", limit)
        for traces in ("_recipes", "_bodies"):
            monkeypatch.setattr(_trace, traces, _recent.Recent())
        run, point = final_loss()
        derivative = grad(partial(run, backend="native", adjoint=Checkpoint(5)))
        results.append(gd.jit(derivative, backend="native")(*point))
        products.append(len(CALL.findall(written[-1])))
    assert torch.equal(*results)
    assert products[0] == products[1] - 5  # those of the gradient in a step


def test_products_write_a_result_where_it_goes(written):
    def f(c, x):
        return c - 0.1 * (x.T @ x).tanh(), x @ c

    c, xs = normal(0, WIDTH, WIDTH), normal(1, 3, BATCH, WIDTH)
    found = gd.scan(f, c, xs, backend="native")
    assert ["y_0" in each for each in CALL.findall(written[-1])].count(True) == 1
    torch.testing.assert_close(found, gd.scan(f, c, xs, backend="eager"))


def test_a_cheap_factor_of_several_products_is_stored_once(written):
    def f(c, x):
        factor = x.relu()
        return c - 0.1 * (factor @ c).tanh(), factor @ c.T

    c, xs = normal(0, WIDTH, WIDTH), normal(1, 3, BATCH, WIDTH)
    found = gd.scan(f, c, xs, backend="native")
    assert len({left for left, _, _ in CALL.findall(written[-1])}) == 1
    torch.testing.assert_close(found, gd.scan(f, c, xs, backend="eager"))


def test_views_of_products_are_not_copied_in_a_long_chain_of_operations(written):
    def f(c, x):
        for _ in range(_program._DEEP // 2 - 1):  # then the second view is the first to be too deep
            x = (x + c).sin()
        return c - 0.1 * (x.T @ c).T, None

    c, xs = normal(0, WIDTH, WIDTH), normal(1, 3, WIDTH, WIDTH)
    found = gd.scan(f, c, xs, backend="native")[0]
    assert not re.search(r"const double (v\d+) = s\d+\[.*\];\ns\d+\[.*\] = \1;", written[-1])
    torch.testing.assert_close(found, gd.scan(f, c, xs, backend="eager")[0])


def test_a_row_that_is_picked_by_an_index_is_read_from_its_start(written):
    data, index = normal(0, 9, WIDTH), torch.tensor([[3, -1], [8, 0]])
    found = gd.scan(lambda c, i: (c + 1, data[i]), torch.tensor(0), index, backend="native")[1]
    assert re.search(rf"double \* v\d+ = const_0 \+ {WIDTH} \* v\d+;", written[-1])
    assert torch.equal(found, data[index])
