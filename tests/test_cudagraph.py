"""The cudagraph backend against the replay from Python, bit for bit, with a stand-in that needs no GPU."""

import contextlib
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import gdfunc as gd
from gdfunc._scan._body import Body
from gdfunc._scan._loop import Bound
from gdfunc._scan.backends import _cudagraph, _replay
from gdfunc._scan.trace._trace import trace
from gdfunc.adjoints import Checkpoint, Reverse

from .assertions import assert_same_bits
from .references import normal, storages
from .tables import needs_cuda


class Graph(TorchDispatchMode):
    """Repeats, like a CUDA graph, the same operations on the same memory; it does not run Python again."""

    made = 0

    def __init__(self, function: Callable[[], None], device: torch.device) -> None:
        super().__init__()
        Graph.made += 1
        self.operations = []
        function()
        with self:
            function()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self.operations.append((operation, args, kwargs or {}, result))
        return result

    def turn(self):
        return contextlib.nullcontext()

    @torch.inference_mode()  # memory is memory
    def replay(self):
        for operation, args, kwargs, result in self.operations:
            for place, leaf in zip(leaves(result), leaves(operation(*args, **kwargs)), strict=True):
                if place.data_ptr() != leaf.data_ptr():
                    place.copy_(leaf)


def leaves(result):
    return [result] if isinstance(result, torch.Tensor) else list(result)


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """Fill new memory with NaN or with numbers that are no index, so that a use of it shows."""

    def poisoned(avals, empty=_cudagraph._empty):
        tensors = empty(avals)
        for leaf in tensors:
            leaf.fill_(
                float("nan") if leaf.is_floating_point() else 1 if leaf.dtype == torch.bool else 10**6
            )
        return tensors

    monkeypatch.setattr(_cudagraph, "_empty", poisoned)


on_cpu = partial(_cudagraph.in_blocks, Graph)


def body_of(f, init, xs):
    """A body that no other test has, and what it closes over."""
    body, closed_over, _ = trace(f, f, init, xs)
    return Body(body.graph, body.consts, body.carry, body.x), closed_over


SCALE, TABLE = normal(1, 3), normal(2, 64, 3)


def moving(device="cpu"):
    """A body with a table read at a counter, a swap, a carry that stays, and y's of several kinds."""
    scale = (
        SCALE if device == "cpu" else torch.tensor(0.9, dtype=torch.float64)
    )  # on the CPU, as users have
    table = TABLE.to(device)

    def f(carry, x):
        a, b, count, same = carry
        new = torch.tanh(scale * b + x[0]) + table[count[None]][0]
        return (b, new, count + 1, same), (a, x[0], count > 3, x[1])

    init, xs = given_to(0, 1, device)
    return body_of(f, tuple(init), xs)


def given_to(seed, length, device="cpu"):
    init = [normal(seed, 3), normal(seed + 1, 3), torch.tensor(0), normal(seed + 2, 2)]
    xs = [normal(seed + 3, length, 3), torch.arange(2 * length).reshape(length, 2)]
    return [leaf.to(device) for leaf in init], [leaf.to(device) for leaf in xs]


MOVING, CLOSED_OVER = moving()
SMALL = [], [normal(1, 3)], [normal(2, 16, 3)], 16  # the arguments of a loop that makes one graph


def small_body(f=lambda c, x: (c - x, c)):
    return body_of(f, normal(1, 3), normal(2, 1, 3))


@contextlib.contextmanager
def graphs_made(count):
    before = Graph.made
    yield
    assert Graph.made - before == count


@given(st.integers(0, 2**32), st.integers(1, 60), st.integers(1, 9))
def test_blocks_and_what_is_left_over_are_the_loop(seed, length, unroll):
    init, xs = given_to(seed, length)
    expected = _replay.run(MOVING, CLOSED_OVER, init, xs, length)
    assert_same_bits(on_cpu(MOVING, CLOSED_OVER, init, xs, length, unroll), expected)


@pytest.mark.long
@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(1, 5))
def test_loops_without_xs_or_ys_or_a_carry(seed, length, unroll):
    init, xs = normal(seed, 2), normal(seed, length, 2)
    for f, first, rows in (
        (lambda carry, _: (carry * 0.5, None), [init], []),
        (lambda carry, _: (carry * 0.5, carry), [init], []),
        (lambda carry, x: (carry, x * 2), [], [xs]),
    ):
        body, consts = body_of(f, init if first else (), xs if rows else ())
        expected = _replay.run(body, consts, first, rows, length)
        assert_same_bits(on_cpu(body, consts, first, rows, length, unroll), expected)


@pytest.mark.parametrize(("length", "unroll"), [(5, 1), (16, 1), (37, 1), (12, 4), (13, 4)])
def test_results_are_new_and_stay_as_they_are(length, unroll):
    init, xs = given_to(3, length)
    tensors = [*CLOSED_OVER, *init, *xs]
    before = [leaf.clone() for leaf in tensors]
    first = on_cpu(MOVING, CLOSED_OVER, init, xs, length, unroll)
    held = [leaf.clone() for leaf in first]
    other, rows = given_to(4, length)
    second = on_cpu(MOVING, CLOSED_OVER, other, rows, length, unroll)
    assert_same_bits(first, held)
    assert_same_bits(tensors, before)
    assert not torch.equal(first[1], second[1])
    of_all = [storages([leaf]) for leaf in (*first, *second, *tensors)]
    assert len(set.union(*map(set, of_all))) == len(of_all)


def test_one_graph_for_all_lengths_and_values():
    body, consts = small_body(lambda c, x: (c * SCALE + x, c))
    for seed, length in enumerate((16, 17, 64, 31)):
        with graphs_made(seed == 0):
            changed, init, xs = [normal(seed, 3)], [normal(seed, 3)], [normal(seed, length, 3)]
            expected = _replay.run(body, changed, init, xs, length)
            assert_same_bits(on_cpu(body, changed, init, xs, length), expected)
    with graphs_made(1):
        on_cpu(body, consts, init, xs, 31, 3)
        on_cpu(body, consts, init, xs, 30, 3)


def test_a_short_loop_makes_no_graph():
    body, consts = small_body()
    with graphs_made(0):
        on_cpu(body, consts, [normal(1, 3)], [normal(2, 15, 3)], 15)
        on_cpu(body, consts, [normal(1, 3)], [normal(2, 3, 3)], 3, 4)


@pytest.mark.parametrize("setting", ["deterministic", "precision"])
def test_a_graph_belongs_to_the_settings_it_was_made_under(setting):
    body, _ = small_body()
    precision = torch.get_float32_matmul_precision()
    try:
        with graphs_made(2):
            on_cpu(body, *SMALL)
            if setting == "precision":
                torch.set_float32_matmul_precision("medium")
            else:
                torch.use_deterministic_algorithms(True)
            on_cpu(body, *SMALL)
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(False)


def test_a_graph_made_in_inference_mode_serves_outside_of_it():
    body, _ = small_body()
    with torch.inference_mode():
        first = on_cpu(body, *SMALL)
    with graphs_made(0):
        assert_same_bits(on_cpu(body, *SMALL), first)


class Crowded(Graph):
    """Lets others run in the middle of a turn, and notes whether one came in."""

    inside, most = 0, 0

    @contextlib.contextmanager
    def turn(self):
        Crowded.inside += 1
        yield
        Crowded.inside -= 1

    def replay(self):
        threading.Event().wait(0.001)
        Crowded.most = max(Crowded.most, Crowded.inside)
        super().replay()


def test_threads_take_turns_at_one_graph():
    body, consts = small_body(lambda c, x: (c * SCALE + x, c))

    def inputs(seed):
        return consts, [normal(seed, 3)], [normal(seed + 1, 21, 3)], 21

    with graphs_made(1), ThreadPoolExecutor(8) as threads:
        run = lambda seed: _cudagraph.in_blocks(Crowded, body, *inputs(seed), 4)  # noqa: E731
        got = list(threads.map(run, range(16)))
    assert Crowded.most == 1
    for seed, results in enumerate(got):
        assert_same_bits(results, _replay.run(body, *inputs(seed)))


def loops(runner, inner, outer):
    """A loop over a loop, as Checkpoint makes them."""
    body, consts = small_body(lambda c, x: (torch.sin(c) + x, c * 2))
    length = inner * outer
    loop = Bound(body, length, runner=runner)
    return lambda: Checkpoint(inner).run_loop(loop, consts, [normal(1, 3)], [normal(2, length, 3)])


@pytest.mark.parametrize(
    ("inner", "outer", "graphs"),
    [
        (4, 16, 1),  # all steps of 16 rounds in one graph
        (4, 21, 1),  # … and the loops of the rounds left over are too short for one
        (40, 16, 1),  # 16 rounds are too long, one is not
        (300, 17, 1),  # even one is: the loop inside becomes a graph, 16 steps of it
    ],
)
def test_a_loop_in_a_loop_goes_into_the_graph_unless_too_long(inner, outer, graphs):
    nested = loops(on_cpu, inner, outer)
    with graphs_made(graphs):
        results = nested()
    assert_same_bits(results, loops(_replay.run, inner, outer)())
    with graphs_made(0):
        assert_same_bits(nested(), results)


@pytest.mark.long
@pytest.mark.parametrize("every", [None, 7])
def test_derivatives_of_the_primitive_are_those_of_the_replay(every):
    body, consts = small_body(lambda c, x: (torch.sin(c * SCALE) + x, c))
    init = normal(1, 3)

    def loss(runner, scale, x):
        loop = Bound(body, 37, runner=runner)
        adjoint = Reverse() if every is None else Checkpoint(every)
        carry, ys = adjoint.run_loop(loop, [scale], [init], [x])
        return (carry**2).sum() + (ys**3).mean()

    assert len(consts) == 1
    xs = normal(5, 4, 37, 3)
    for derivative in (grad, lambda f: grad(lambda s, x: grad(f)(s, x).pow(2).sum())):
        got, expected = (
            vmap(derivative(partial(loss, runner)), (None, 0))(SCALE, xs)
            for runner in (on_cpu, _replay.run)
        )
        assert torch.allclose(got, expected, rtol=1e-12, atol=1e-12)


class Refused(Graph):
    """Fails as a capture does: first the operation, then the end of the capture."""

    def __init__(self, function, device):
        super().__init__(function, device)
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nmore lines")
        finally:
            self.end()

    def end(self):
        raise RuntimeError("capture invalidated")


class RefusedAtOnce(Graph):
    """Fails before there is a capture."""

    def __init__(self, function, device):
        super().__init__(function, device)
        raise RuntimeError("operation not permitted when stream is capturing")


def while_handling_another(run):
    try:
        raise KeyError("another")
    except KeyError:
        return run()


@pytest.mark.parametrize("record", [Refused, RefusedAtOnce])
@pytest.mark.parametrize("around", [lambda run: run(), while_handling_another])
def test_a_loop_that_cannot_be_recorded_says_why_and_is_not_tried_again(record, around):
    body, _ = small_body(lambda c, x: (c + x, None))
    reason = "a CUDA graph cannot record this loop (operation not permitted when stream is capturing); use"
    for count in (1, 0):
        with graphs_made(count), pytest.raises(gd.BackendError, match=re.escape(reason)):
            around(partial(_cudagraph.in_blocks, record, body, *SMALL))
    with graphs_made(1):
        assert_same_bits(on_cpu(body, *SMALL), _replay.run(body, *SMALL))


class Full(Graph):
    """Finds no memory the first time."""

    tries = 0

    def __init__(self, function, device):
        Full.tries += 1
        if Full.tries == 1:
            raise torch.OutOfMemoryError("out of memory")
        super().__init__(function, device)


def test_a_loop_for_which_memory_was_short_is_tried_again():
    body, _ = small_body(lambda c, x: (c * x, None))
    with pytest.raises(torch.OutOfMemoryError):
        _cudagraph.in_blocks(Full, body, *SMALL)
    assert_same_bits(_cudagraph.in_blocks(Full, body, *SMALL), _replay.run(body, *SMALL))


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_without_cuda_one_sentence():
    with pytest.raises(gd.BackendError, match=r"^backend='cudagraph' needs a CUDA device, and .* none"):
        gd.scan(lambda c, x: (c + x, c), torch.zeros(2), torch.zeros(3, 2), backend="cudagraph")


@pytest.mark.parametrize(("init", "found"), [([torch.zeros(2)], "cpu"), ([], "none at all")])
def test_tensors_elsewhere_are_named(monkeypatch, init, found):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    body, consts = body_of(lambda c, _: (c, None), init, ())
    with pytest.raises(gd.BackendError, match=f"one CUDA device, and these are on {found}; move them"):
        _cudagraph.run(body, consts, init, [], 20)


def assert_close_on_cuda(got, expected):
    for one, other in zip(got, expected, strict=True):
        assert one.device == other.device
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@needs_cuda
@pytest.mark.parametrize(("length", "unroll"), [(5, 1), (16, 1), (37, 1), (12, 4), (13, 4)])
def test_on_cuda_it_is_the_loop(length, unroll):
    body, consts = moving("cuda")
    for seed in range(2):
        init, xs = given_to(seed, length, "cuda")
        got = _cudagraph.run(body, consts, init, xs, length, unroll)
        assert_close_on_cuda(got, _replay.run(body, consts, init, xs, length))


@needs_cuda
def test_on_cuda_streams_take_turns_at_one_graph():
    body, consts = moving("cuda")
    expected = [_replay.run(body, consts, *given_to(seed, 48, "cuda"), 48) for seed in range(8)]

    def work(seed):
        init, xs = given_to(seed, 48, "cuda")
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            results = [_cudagraph.run(body, consts, init, xs, 48) for _ in range(20)]
        torch.cuda.synchronize()
        return results

    with ThreadPoolExecutor(4) as threads:
        for results, answer in zip(threads.map(work, range(8)), expected, strict=True):
            for result in results:
                assert_close_on_cuda(result, answer)


@needs_cuda
def test_on_cuda_a_failed_capture_leaves_all_as_it_was():
    init, xs = torch.zeros(2).cuda(), torch.ones(16, 2).cuda()
    body, consts = body_of(lambda c, x: (c.cpu().cuda() + x, None), init, xs)
    stream = torch.cuda.current_stream()
    with pytest.raises(gd.BackendError, match="a CUDA graph cannot record this loop"):
        _cudagraph.run(body, consts, [init], [xs], 16)
    assert torch.cuda.current_stream() == stream
    assert not torch.cuda.is_current_stream_capturing()
    test_on_cuda_it_is_the_loop(37, 1)


@needs_cuda
def test_on_cuda_within_a_capture_of_the_users():
    body, consts = moving("cuda")
    consts = [leaf.cuda() for leaf in consts]
    init, xs = given_to(1, 20, "cuda")
    expected = _replay.run(body, consts, init, xs, 20)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = _cudagraph.run(body, consts, init, xs, 20)
    graph.replay()
    assert_close_on_cuda(results, expected)
