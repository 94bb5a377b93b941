"""The test of a function for purity: called twice, it does the same and changes nothing.

A compiled loop calls its function when it is traced, not in every step. So a function that draws, counts,
appends or advances an iterator is refused by name, and everything that its trace changed is put back. Each
new trace is made twice and the two graphs are compared, which shows a clock, or a generator of numbers that
gdfunc cannot see. A cache may be filled. The tensors of a trace have no values, so none stays behind.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import zip_longest
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from ..._errors import BackendError, line_of, users_frame, warn
from ..._torch._graphs import node_of, tracer, words_of
from ..._torch._modes import is_from_a_trace, same_bytes
from ..._torch._transforms import layers
from ._key import Reading
from ._lift import Lift
from ._reach import ADVANCES, DRAWS, FAR, Reach, path

_DEEP = 3  # containers within one another that are searched for tensors without values
_REMEDY = (
    "a compiled loop calls f when it is traced, not in every step. Keep what changes in the carry, draw "
    "from gd.random with a key in the carry, or use backend='eager'"
)
_warned: set[str] = set()


class Recorded(NamedTuple):
    """A graph, the tensors that f closes over, which are its first inputs, and how it was recorded."""

    graph: fx.GraphModule
    closed_over: list[Tensor]
    lift: Lift
    y_structure: Any


Record = Callable[[Callable[..., Any]], Recorded]


def warn_of(reading: Reading) -> None:
    """Warn, once for each cause, that a function has no key."""
    last = reading.chain[-1]
    kind = last if isinstance(last, type) else type(last)
    name = f"{kind.__module__.partition('.')[0]}.{kind.__qualname__}".removeprefix("builtins.")
    what = f"is the class {name}" if kind is last else f"is a {name}"
    what = f"is the module {last.__name__}" if isinstance(last, ModuleType) else what
    cause = f"{path(reading.chain)} {reading.why or what}"
    if cause not in _warned:
        _warned.add(cause)
        warn(
            f"{cause}: gdfunc cannot tell whether it changes between calls, so this loop is traced on "
            f"every call, which takes about 0.1 s. Let f reach only tensors and plain Python values"
        )


@contextmanager
def put_back(f: Any, far: int = FAR) -> Iterator[Reach]:
    """Leave what f can reach as it was if an error occurs; raise another error where that is impossible."""
    reach = Reach(f, far)
    try:
        yield reach
    except BaseException as error:
        if spent := reach.restore(reach.changes(reach.before)):
            refusal = _refusal(
                reach.describe(spent), ". This cannot be put back: make a new one before the next run"
            )
            refusal.untouched = False
            raise refusal from error
        raise


def record_twice(f: Any, checked: Callable[..., Any], record: Record, far: int) -> Recorded:
    """Record f with its checks, and again to see whether f changes something or does something else."""
    with put_back(f, far) as reach:
        moving = set[int]()  # the ids of tensors left behind that depend on the carry or x

        def watched(*given: Any) -> Any:
            result = checked(*given)
            left = [leaf for _, new in reach.changes(reach.before).values() for leaf in _valueless(new)]
            moving.update(id(leaf) for leaf in left if _depends(leaf))
            return result

        if reach.file:  # before f writes into it
            raise _refusal(f"opens a file in {reach.file}")
        first = record(watched)
        changes, once = reach.changes(reach.before), reach.now()
        spent = {entry for entry in changes if reach.places[entry[0]].does in (DRAWS, ADVANCES)}
        if spent:
            raise _refusal(reach.describe(spent))
        kept = {entry: _valueless(new) for entry, (_, new) in changes.items() if _valueless(new)}
        constant = {entry for entry, left in kept.items() if moving.isdisjoint(map(id, left))}
        try:
            second = record(checked)
        except Exception as error:
            # A cache is filled once and then only read. Filled again, it must hold the same.
            if not constant or not constant.isdisjoint(reach.changes(once)):
                raise (_refusal(reach.describe(kept)) if kept else error) from error
            reach.restore(constant)
            once = reach.now()
            second = record(checked)
        again = reach.changes(once)
        refilled = {entry for entry in changes if entry in again and _valueless(again[entry][1])}
        if counted := again.keys() - refilled:
            raise _refusal(reach.describe(counted))
        if _difference(first, second) is not None:
            where = _line(checked, record, first)
            raise _refusal(f"gives something else when it is called again{where}, as a clock does")
        if reach.clock:
            raise _refusal(f"reads a clock in {reach.clock}")
        reach.restore({entry for entry, (_, new) in reach.changes(reach.before).items() if _valueless(new)})
    return first


def _refusal(what: str, more: str = "") -> BackendError:
    return BackendError(f"f {what}, but {_REMEDY}{more}")


def _valueless(value: Any, deep: int = _DEEP) -> list[Tensor]:
    """List the tensors of a trace that a value is or holds."""
    if isinstance(value, Tensor):
        return [value] if is_from_a_trace(layers(value)[-1]) else []
    if not deep or type(value) not in (tuple, list, dict):
        return []
    parts = value.values() if type(value) is dict else value
    return [leaf for part in parts for leaf in _valueless(part, deep - 1)]


def _depends(leaf: Tensor) -> bool:
    """Tell whether a tensor is computed from the carry or x, and not from their shapes alone."""
    nodes = [node_of(layers(leaf)[-1])]
    seen = {*nodes}
    for node in nodes:  # the list grows on the way
        name = getattr(node.target, "__name__", str(node.target)).partition(".")[0]
        if node.op == "placeholder":
            return True
        if not name.startswith("new_") and not name.endswith("_like"):
            new = [source for source in node.all_input_nodes if source not in seen]
            seen.update(new)
            nodes += new
    return False


def _difference(a: Recorded, b: Recorded) -> fx.Node | None:
    """Find the first node that is not the same in two graphs: the node of the second graph."""
    words = [words_of(each.graph.graph) for each in (a, b)]
    for place, (left, right) in enumerate(zip_longest(*words)):
        if left != right:
            nodes = [*(a if right is None else b).graph.graph.nodes]
            return nodes[place]
    inputs = b.graph.graph.find_nodes(op="placeholder")
    for left, right, node in zip(a.closed_over, b.closed_over, inputs, strict=False):
        if left is not right and not same_bytes(left, right):
            return next(iter(node.users), node)
    return None


class _Lines(TorchFunctionMode):
    """Write at each node of a graph the user's line that called the operation."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        found = tracer()
        if found is not None and len(found.graph.nodes):
            frame = users_frame(sys._getframe(1))
            next(iter(reversed(found.graph.nodes))).meta.setdefault("frame", frame and line_of(frame))
        return result


def _line(checked: Callable[..., Any], record: Record, first: Recorded) -> str:
    """Record once more, to tell at which of the user's lines the graphs differ."""

    def noting(*given: Any) -> Any:
        with _Lines():
            return checked(*given)

    node = _difference(first, record(noting))
    while node is not None and node.op != "root" and "frame" not in node.meta:
        node = node.next
    return f" at {node.meta['frame']}" if node is not None and node.meta.get("frame") else ""
