"""Operations are recorded by copying the nodes of equal ones: torch takes a millisecond to record each."""

from collections.abc import Hashable, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, in_kernel_invocation_manager
from torch.fx.experimental.proxy_tensor import _ProxyTensor, get_proxy_mode
from torch.utils._python_dispatch import TorchDispatchMode

from ._modes import unseen

_PLAIN = {int, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format}
_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view}
_VALUES |= {torch.Tag.nondeterministic_seeded}
KNOWN = {"aten", "prims", "gdfunc"}  # namespaces of the operators of torch and gdfunc
_DEVICE = torch.ops.prim.device.default
_LIFT = torch.ops.aten.lift_fresh.default  # of a constant, whose value torch follows


class _Result(NamedTuple):
    """A result of an operation, its node, and the number of an input that it is a view of."""

    size: torch.Size  # as it was: a result may be reshaped in place
    stride: tuple[int, ...]
    start: int
    dtype: torch.dtype
    attributes: dict[str, Any]
    node: fx.Node
    base: Any


class _Record(NamedTuple):
    """The nodes of an operation, each with the meta that it then had, between its inputs and results."""

    inputs: Sequence[fx.Node]
    nodes: list[tuple[fx.Node, dict[str, Any]]]
    results: list[_Result | None]
    kind: type  # of the results


class Repeats(TorchDispatchMode):
    """Copy the nodes of an operation where its arguments have the metadata of earlier ones.

    The tracer of `make_fx`, which runs below, records the first of them, and all operations that write,
    draw, or read a value.
    """

    supports_higher_order_operators = True  # they go on to the tracer

    def __init__(self) -> None:
        super().__init__()
        self._records: dict[Hashable, _Record | None] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # because torch would wrap each call, which takes it 10 µs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE and type(args[0]) is FakeTensor:  # half of all calls
            return args[0].device
        kwargs, mode = kwargs or {}, get_proxy_mode()
        if mode is None or not _is_pure(func):
            return func(*args, **kwargs)
        tracer: Any = mode.tracer
        key: list[Any] = [func, tracer, torch.get_default_dtype(), torch.is_inference_mode_enabled()]
        inputs: dict[int, tuple[Tensor, fx.Node]] = {}
        with unseen():  # some calls of torch do not suspend the modes on functions
            try:
                for value in (args, kwargs):
                    _describe(value, key, inputs, tracer.tensor_tracker)
                record = self._records.get(known := tuple(key), ...)
            except TypeError:
                record = None
            if record is not None and record is not ...:
                return _again(record, [*inputs.values()], tracer)
        last = next(iter(reversed(tracer.graph.nodes)), None)
        result = func(*args, **kwargs)
        if record is ...:
            with unseen():
                self._records[known] = _record_of(result, [*inputs.values()], last, tracer)
        return result


_pure: dict[Any, bool] = {}


def _is_pure(func: Any) -> bool:
    """Tell whether an operator gives the same for arguments of the same metadata, and changes none."""
    if func not in _pure:
        of_torch = isinstance(func, OpOverload) and func.namespace in KNOWN and func is not _LIFT
        _pure[func] = of_torch and not func._schema.is_mutable and _VALUES.isdisjoint(func.tags)
    return _pure[func]


def _describe(value: Any, key: list[Any], inputs: dict[int, Any], tracked: Any) -> None:
    """Add what an operation may know of an argument to a key, and list the tensors in it.

    Raises:
        TypeError: it is not plain.
    """
    kind = type(value)
    if kind is FakeTensor:
        slot = tracked.get(value)
        if slot is None or slot.constant is not None or value.constant is not None:
            raise TypeError
        if value.layout is not torch.strided:  # a sparse tensor has no strides and no memory of its own
            raise TypeError
        if id(value) not in inputs:
            inputs[id(value)] = value, slot.proxy.node
            key += (value.dtype, value.shape, value.stride(), value.storage_offset(), value.fake_device)
            key += (value.untyped_storage().nbytes(), value.requires_grad)
            key.append(torch._C._dispatch_keys(value).raw_repr())
        key += (kind, list(inputs).index(id(value)))
    elif kind is tuple or kind is list or kind is dict:
        key += (kind, tuple(value) if kind is dict else len(value))
        for each in value.values() if kind is dict else value:
            _describe(each, key, inputs, tracked)
    elif kind is float or kind in _PLAIN:
        key += (kind, value.hex() if kind is float else value)
    else:
        raise TypeError


def _record_of(
    result: Any, inputs: list[tuple[Tensor, fx.Node]], last: fx.Node | None, tracer: Any
) -> _Record | None:
    """Tell how an operation has just been recorded, or None where it cannot be copied."""
    nodes, known = [], {node for _, node in inputs}
    new = list(takewhile(lambda node: node is not last, reversed(tracer.graph.nodes)))
    for node in reversed(new):
        writes = isinstance(node.target, OpOverload) and node.target._schema.is_mutable
        if node.op != "call_function" or writes or not known.issuperset(node.all_input_nodes):
            return None
        nodes.append((node, dict(node.meta)))
        known.add(node)
    if len(known) < len(inputs) + len(nodes):  # two inputs are one node
        return None
    kind, tensors = type(result), [leaf for leaf, _ in inputs]
    results: list[_Result | None] = []
    fresh = list[int]()
    for leaf in result if kind in (tuple, list) else [result]:
        if leaf is None:
            results.append(None)
            continue
        slot = tracer.tensor_tracker.get(leaf) if type(leaf) is FakeTensor else None
        if slot is None or slot.constant is not None or slot.proxy.node not in known or not _is_plain(leaf):
            return None
        bases = [at for at, given in enumerate(tensors) if _memory(given) == _memory(leaf)]
        fresh += [] if bases else [_memory(leaf)]
        is_input = any(given is leaf for given in tensors)
        if is_input or len(bases) > 1 or (not bases and leaf.storage_offset()):
            return None
        layout = leaf.shape, leaf.stride(), leaf.storage_offset(), leaf.dtype
        base = next(iter(bases), None)
        results.append(_Result(*layout, dict(vars(leaf)), slot.proxy.node, base))
    if len({*fresh}) < len(fresh):
        return None
    return _Record([node for _, node in inputs], nodes, results, kind)


def _is_plain(leaf: Tensor) -> bool:
    """Tell whether sizes, strides and memory are all there is to a tensor."""
    marks = leaf.requires_grad or leaf.is_conj() or leaf.is_neg() or leaf._is_zerotensor()
    return leaf.layout is torch.strided and not marks


def _memory(leaf: Tensor) -> int:
    return leaf.untyped_storage()._cdata


def _again(record: _Record, inputs: list[tuple[Tensor, fx.Node]], tracer: Any) -> Any:
    """Write the nodes for other inputs, and make results that the tracer follows."""
    copies = dict(zip(record.inputs, [node for _, node in inputs], strict=True))
    for node, meta in record.nodes:
        copies[node] = copy = tracer.graph.node_copy(node, copies.__getitem__)
        copy.meta = dict(meta)
    results: list[Any] = []
    for result in record.results:
        if result is None:
            results.append(None)
        else:
            results.append(_like(result, inputs))
            proxy = tracer.proxy(copies[result.node])
            tracer.tensor_tracker[results[-1]] = _ProxyTensor(proxy, None)
    return results[0] if record.kind not in (tuple, list) else record.kind(results)


def _like(result: _Result, inputs: list[tuple[Tensor, fx.Node]]) -> Tensor:
    """Make a tensor without values: torch's own constructor takes four times as long."""
    mode, device = result.attributes["fake_mode"], result.attributes["_fake_device"]
    with in_kernel_invocation_manager(mode):
        leaf = torch.empty_strided(result.size, result.stride, dtype=result.dtype, device="meta")
        if result.base is not None:
            memory = inputs[result.base][0].untyped_storage()
            leaf.set_(memory, result.start, result.size, result.stride)
    new = Tensor._make_subclass(FakeTensor, leaf, dispatch_device=True, device_for_backend_keys=device)
    torch._C._set_throw_on_mutable_data_ptr(new)
    vars(new).update(result.attributes)
    return new
