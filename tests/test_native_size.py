"""Large steps of a native loop: many leaves, long expressions, and which steps are too large."""

import itertools
import operator
import sys
from functools import reduce

import pytest
import torch
from torch.fx.experimental import proxy_tensor

import gdfunc as gd
from gdfunc._errors import BackendError
from gdfunc._scan.backends import native
from gdfunc._scan.backends.native import _program
from gdfunc._scan.backends.native._statement import Code, Repeat, size_of

from .assertions import assert_agrees

TRANSFORMS = {"sgd": lambda: None, "momentum": lambda: gd.momentum(0.9), "adam": gd.adam}


def leaves(count, shape=(3,)):
    """Different values in equal shapes."""
    return {f"w{i}": torch.linspace(-1, 1, 9)[i % 9] + torch.zeros(shape) for i in range(count)}


def total(params, batch):
    return reduce(operator.add, [(leaf * batch.mean()).sin().square().sum() for leaf in params.values()])


def trained(params, transform, backend, lr=0.05):
    step = gd.make_step(total, *filter(None, [transform]))
    data, index = torch.linspace(-1, 2, 4)[:, None], gd.sample_batches(gd.random.key(0), 4, 2, 5)
    return gd.train(step, step.init(params), data, index, lr, backend=backend)


@pytest.fixture
def written(monkeypatch):
    """The programs that were compiled."""
    programs, build = [], native.build
    monkeypatch.setattr(native, "build", lambda text, target: build(programs.append(text) or text, target))
    return programs


@pytest.mark.long
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("shape", [(3,), (), (9, 9)], ids=str)  # in registers, and too large for them
def test_a_step_in_tables_is_the_step(transform, shape, monkeypatch, written):
    monkeypatch.setattr("gdfunc._scan.backends.native._program.LARGE", 0)
    params, make = leaves(12, shape), TRANSFORMS[transform]
    assert_agrees(trained(params, make(), "native"), trained(params, make(), "eager"), 1e-5)
    assert "CALL(calls_0)" in written[0]


@pytest.mark.long
def test_members_of_a_step_in_tables_are_single_runs(monkeypatch):
    monkeypatch.setattr("gdfunc._scan.backends.native._program.LARGE", 0)
    lrs, params = torch.tensor([0.05, 0.01]), leaves(11)
    together = torch.func.vmap(lambda lr: trained(params, None, "native", lr)[1].loss)(lrs)
    assert_agrees(together, torch.stack([trained(params, None, "eager", lr)[1].loss for lr in lrs]), 1e-5)


@pytest.mark.long
def test_torch_records_equal_leaves_once(monkeypatch, nothing_traced):
    calls, call = [], proxy_tensor.proxy_call
    monkeypatch.setattr(proxy_tensor, "proxy_call", lambda *args: calls.append(args[1]) or call(*args))
    counts = []
    for count in (4, 12):
        calls.clear()
        trained(leaves(count), None, "native")
        counts.append(len(calls))
    assert counts[0] == counts[1]


@pytest.mark.long
def test_python_calls_no_more_functions_for_each_leaf_of_a_larger_tree():
    def calls(count):
        params, counted = leaves(count), itertools.count()
        sys.setprofile(lambda _, event, what: event == "call" and next(counted))
        try:
            trained(params, gd.adam(), "native")
        finally:
            sys.setprofile(None)
        return next(counted)

    calls(8)  # imports
    few, more, many = map(calls, (9, 25, 57))
    assert many - more < 1.05 * 2 * (more - few)


@pytest.mark.long
def test_code_that_is_compiled_does_not_grow_with_equal_leaves(monkeypatch, written):
    monkeypatch.setattr("gdfunc._scan.backends.native._program.LARGE", 0)
    for count in (8, 16):
        trained(leaves(count), gd.momentum(0.9), "native")
    loops = [text.count("for (int64_t i0") for text in written]
    assert loops[0] == loops[1] < 10


@pytest.mark.long
def test_an_expression_of_hundreds_of_operations_is_covered():
    def f(carry, x):
        return reduce(lambda y, _: y * 0.999 + x, range(400), carry), None

    init, xs = torch.ones(3), torch.linspace(0, 1, 4)
    assert_agrees(gd.scan(f, init, xs, backend="native")[0], gd.scan(f, init, xs, backend="eager")[0], 1e-5)


@pytest.mark.long
def test_a_step_of_too_many_different_lines_is_refused_before_it_is_compiled(monkeypatch, written):
    monkeypatch.setattr("gdfunc._scan.backends.native._program._MOST_LINES", 10)
    with pytest.raises(BackendError, match=r"native' does not cover a step of \d+ lines of C"):
        trained(leaves(5), None, "native")
    assert not written


@pytest.mark.long
def test_equal_leaves_do_not_count_towards_the_lines_of_a_step(monkeypatch, written):
    monkeypatch.setattr("gdfunc._scan.backends.native._program.LARGE", 0)
    monkeypatch.setattr("gdfunc._scan.backends.native._program._MOST_LINES", 450)
    trained(leaves(64), gd.adam(), "native")
    assert len(written) == 1


@pytest.fixture
def limit(monkeypatch):
    """Set the factor in the environment."""

    def to(text):
        monkeypatch.setenv("GDFUNC_NATIVE_LIMIT", text)
        _program._limit.cache_clear()

    yield to
    monkeypatch.undo()
    _program._limit.cache_clear()


@pytest.mark.long
def test_the_environment_moves_the_limit_of_a_step(limit):
    def run(factor):  # another number in f makes another loop
        return gd.scan(
            lambda c, x: (factor * c @ c, None), torch.ones(500, 500), length=1, backend="native"
        )[0]

    limit("1")
    with pytest.raises(BackendError, match=r"torch's own kernels are faster \(GDFUNC_NATIVE_LIMIT=inf"):
        run(1)
    limit("3")
    assert run(2)[0, 0] == 2 * 500
    limit("-1")
    with pytest.raises(ValueError, match="GDFUNC_NATIVE_LIMIT must be a number >= 0, such as 2 or inf"):
        run(3)


@pytest.mark.long
def test_the_size_of_a_step_counts_products_in_flop_and_the_rest_in_bytes(monkeypatch):
    sizes, size_of = [], _program.size_of
    monkeypatch.setattr(_program, "size_of", lambda step: sizes.append(size_of(step)) or sizes[-1])
    a = torch.ones(30, 40)
    gd.scan(lambda c, x: (a.T @ (a @ c), None), torch.ones(40, 50), length=1, backend="native")
    gd.scan(lambda c, x: (c.sin(), None), torch.ones(1000), length=1, backend="native")
    far = lambda c: (c[:, None] - c).abs().sum(1)  # noqa: E731
    gd.scan(lambda c, x: (far(c), None), torch.ones(1000), length=1, backend="native")
    assert sizes[0][0] == 2 * 2 * 30 * 40 * 50
    assert sizes[1] == (0, 8000)
    assert sizes[2][0] == 16e6


def test_a_record_of_every_kth_step_counts_by_its_share_of_a_step():
    step, record = Code([], flop=2e6), Code([], flop=4e8)
    assert size_of([Repeat("t", 100, [step]), record]) == (4e6, 0)
    assert size_of([Repeat("t", 1000, [step]), record]) == (2e6, 0)
