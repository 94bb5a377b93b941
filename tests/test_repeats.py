"""Operations like one before: their copies are what torch's tracer records."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gdfunc._torch import _graphs
from gdfunc._torch._modes import clean_room, valueless

OPERATIONS = {
    "product": lambda x, y: x * y,
    "int": lambda x, y: x * 2,
    "float": lambda x, y: x * 2.0,
    "bool": lambda x, y: x + True,
    "zero": lambda x, y: x * 0.0,
    "negative zero": lambda x, y: x * -0.0,
    "nan": lambda x, y: x.clamp_max(float("nan")),
    "transposed": lambda x, y: x.T,
    "row": lambda x, y: x[1:].repeat(3, 1)[:3],
    "diagonal": lambda x, y: x.diagonal().expand(3, 3),
    "contiguous": lambda x, y: x.contiguous() + y,
    "reshaped": lambda x, y: x.reshape(9).reshape(3, 3),
    "same": lambda x, y: x.to(x.dtype),
    "detached": lambda x, y: x.detach(),
    "largest": lambda x, y: x.max(0)[0].expand(3, 3),
    "parts": lambda x, y: torch.cat(x.split(1)[::-1]),
    "int64": lambda x, y: x.to(torch.int64),
    "constant": lambda x, y: x + torch.tensor(2.0),
    "zeros": lambda x, y: torch.zeros(3, 3) + y,
    "written": lambda x, y: x.clone().add_(y.to(x.dtype)),
    "written view": lambda x, y: written(x.clone(), y),
    "turned": lambda x, y: (x + 1).t_(),
    "gradient": lambda x, y: torch.func.grad(lambda p: (p * y).tanh().sum())(x.double()),
    "vmapped": lambda x, y: torch.func.vmap(torch.dot)(x.double(), y.double()).expand(3, 3),
    "tangent": lambda x, y: torch.func.jvp(torch.sin, (x.double(),), (y.double(),))[1],
}


def written(x, y):
    x[0] = y[1]
    return x


def run(program, *tensors):
    """Apply operations to tensors, which include the results of earlier ones."""
    pool = list(tensors)
    for name, first, second in program:
        pool.append(OPERATIONS[name](pool[first % len(pool)], pool[second % len(pool)]))
    return pool[len(tensors) :]


def recorded(program):
    with clean_room() as mode:
        given = [
            valueless(mode, (3, 3), dtype, torch.device("cpu")) for dtype in (torch.float32, torch.int64)
        ]
        return _graphs.recorder(lambda *tensors: run(program, *tensors))(*given)


def metadata(graph):
    nodes = [node.meta.get("val") for node in graph.graph.nodes]
    return [
        (x.shape, x.dtype, x.stride(), x.storage_offset()) for x in nodes if isinstance(x, torch.Tensor)
    ]


def check(program):
    graph = recorded(program)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_graphs, "Repeats", nullcontext)
        alone = recorded(program)
    assert graph.code == alone.code
    assert metadata(graph) == metadata(alone)


places = st.integers(0, 40)


@pytest.mark.long
@settings(max_examples=50)
@given(st.lists(st.tuples(st.sampled_from([*OPERATIONS]), places, places), min_size=2, max_size=12))
def test_a_copied_operation_is_what_the_tracer_records(program):
    check(program)


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_on_its_own_results_is_what_the_tracer_records(name):
    check(
        [(name, 0, 1), (name, 0, 1), (name, 2, 3), (name, 2, 2), (name, 3, 4), (name, 0, 0), (name, 4, 1)]
    )


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_graph_with_copies_computes_what_its_function_does(name):
    program = [(name, 0, 0), (name, 0, 1), (name, 2, 3), (name, 2, 2)]
    tensors = torch.linspace(-1, 2, 9).reshape(3, 3), torch.arange(9.0).double().reshape(3, 3)
    for got, wanted in zip(recorded(program)(*tensors), run(program, *tensors), strict=True):
        assert torch.equal(got.nan_to_num(7), wanted.nan_to_num(7))


def test_operations_on_sparse_tensors_are_left_to_the_tracer():
    """Because a sparse tensor has neither strides nor memory of its own."""

    def product(x):
        return [torch.sparse.mm(x.to_sparse(), x) for _ in range(2)]

    with clean_room() as mode:
        graph = _graphs.recorder(product)(valueless(mode, (3, 3), torch.float32, torch.device("cpu")))
    names = list(map(str, _graphs.operators(graph)))
    assert names
    assert names[: len(names) // 2] == names[len(names) // 2 :]
