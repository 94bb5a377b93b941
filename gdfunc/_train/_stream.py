"""Batches that a thread reads ahead: of a loader, of any iterable, of a data set that is indexed."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, TensorDataset, default_collate

from .. import _tree
from .._data import as_data, is_plain
from .._inputs import kind
from .._tree import Tree
from ._batches import Batches, digest_of_plan

_AHEAD = 4, 1024  # batches: so many at least, and up to so many while they are small
_BYTES_AHEAD = 2**24
_BYTES = 2**26  # of the rows of a segment, at most
_SECONDS = 0.1  # between two looks at whether to stop
_PATIENCE = 2.0  # seconds that the end of a run waits for a source that is reading


def is_source(data: Any) -> bool:
    """Tell whether something gives batches one after another, and is no tree of arrays."""
    if isinstance(data, TensorDataset) or _tree.children(data) is not None:
        return False
    return isinstance(data, Iterator | IterableDataset) or (
        hasattr(data, "__iter__") and not hasattr(data, "__array__") and not isinstance(data, str)
    )


def is_indexed(data: Any) -> bool:
    """Tell whether something is a data set of torch that computes its samples one by one."""
    return isinstance(data, Dataset) and not isinstance(data, IterableDataset) and not is_plain(data)


def from_iterable(source: Any, steps: int, device: torch.device) -> tuple[Batches, Tree]:
    """Read batches ahead; return their source, and the first."""
    goes_on = hasattr(source, "state_dict") and hasattr(source, "load_state_dict")
    reader = Reader(lambda step: source, steps, device, source.state_dict if goes_on else None)

    def go_on(step: int, state: Any) -> None:
        reader.close()
        source.load_state_dict(state)
        reader.begin(step, state)

    first = reader.first()
    return reader.batches(lambda step: {"data": type(source).__name__}, go_on if goes_on else None), first


def from_dataset(dataset: Any, index: Any, device: torch.device) -> tuple[Batches, Tree]:
    """Collate the samples of a data set by a plan, ahead; return their source, and the first batch."""

    def read(step: int) -> Iterator[Tree]:
        for t in range(step, len(index)):
            yield default_collate([dataset[i] for i in index[t].tolist()])

    reader = Reader(read, len(index), device, None)

    def go_on(step: int, state: Any) -> None:
        reader.close()
        reader.begin(step, state)

    of_plan = digest_of_plan(index)

    def fingerprint(step: int) -> dict[str, str]:
        return {"data": f"{type(dataset).__name__} of {len(dataset)}", "index": of_plan(step)}

    first = reader.first()
    return reader.batches(fingerprint, go_on), first


class Reader:
    """Reads batches in a thread, a few ahead, and holds those of the segment under way.

    Args:
        read: `step -> batches`, from the one of that step on.
        steps: the number of batches that the run takes.
        device: of the batches.
        state_of: returns what the source would go on from; None if nobody asks.
    """

    def __init__(
        self,
        read: Callable[[int], Iterable[Tree]],
        steps: int,
        device: torch.device,
        state_of: Callable[[], Any] | None,
    ) -> None:
        self.read, self.steps, self.state_of = read, steps, state_of
        self.copier = _Copier(device)
        self.like: Tree = None
        self.begin(0, None)

    def begin(self, step: int, state: Any) -> None:
        """Begin to read at a step; nothing is read before the first batch is asked for."""
        self.entries = _entries(self.read, step, self.steps, self.state_of, self.copier)
        self.start, self.before = step, state
        self.held: deque[tuple[list[Tensor], Any]] = deque()
        self.queue: Queue[Any] = Queue()
        self.stop = Event()
        self.thread: Thread | None = None

    def first(self) -> Tree:
        """Return the first batch, with which all others must agree. No thread reads before the run."""
        if not self.steps:
            raise ValueError("index is 0 steps: a run of a source of batches has at least one")
        if self.state_of is not None:
            self.before = deepcopy(self.state_of())
        entry = next(self.entries)
        self.like = self._batch(entry, 0)
        leaves, self.structure = _tree.flatten(self.like)
        self.kinds = _kinds(leaves)
        self.size = sum([leaf.nbytes for leaf in leaves])
        self.copier.arrived(leaves)
        self.held.append((leaves, entry[1]))
        return self.like

    def rows(self, first: int, last: int) -> Tree:
        """Stack the batches of the steps first … last−1."""
        while self.start < first:
            _, self.before = self.held.popleft()
            self.start += 1
        while self.start + len(self.held) < last:
            self._accept(self._next(), self.start + len(self.held))
        batches = [leaves for leaves, _ in list(self.held)[first - self.start : last - self.start]]
        return _tree.unflatten(self.structure, map(torch.stack, zip(*batches, strict=True)))

    def state(self, step: int) -> Any:
        """Return what the source goes on from after the batches before a step."""
        return self.before if step == self.start else self.held[step - self.start - 1][1]

    def close(self) -> None:
        """Let the thread end; one whose source does not answer is left to end by itself."""
        self.stop.set()
        if self.thread is not None:
            self.thread.join(_PATIENCE)

    def batches(
        self, fingerprint: Callable[[int], dict[str, str]], go_on: Callable[[int, Any], None] | None
    ) -> Batches:
        """Make the source of a run."""
        return Batches(
            self.rows,
            lambda row: row,
            fingerprint,
            max(1, _BYTES // max(self.size, 1)),
            self.state,
            go_on,
            self.close,
        )

    def _accept(self, entry: "Entry", step: int) -> None:
        """Check the next batch, and hold it."""
        batch = self._batch(entry, step)
        leaves, structure = _tree.flatten(batch)
        if structure != self.structure or _kinds(leaves) != self.kinds:
            leaves = self._check(batch, step)
        self.copier.arrived(leaves)
        self.held.append((leaves, entry[1]))

    def _batch(self, entry: "Entry", step: int) -> Tree:
        """Return the batch of an entry, if there is one."""
        batch, _, error = entry
        if error is not None:
            error.add_note(f"gdfunc: this happened where data made the batch of step {step}")
            raise error
        if batch is _END:
            raise ValueError(
                f"data ended after {step} batches, but the run has {self.steps} steps; for several passes: "
                f"itertools.chain.from_iterable(itertools.repeat(data, passes))"
            )
        return batch

    def _next(self) -> "Entry":
        """Take the next batch from the thread."""
        if self.thread is None:
            least, most = _AHEAD
            self.queue.maxsize = max(least, min(_BYTES_AHEAD // max(self.size, 1), most))
            arguments = self.entries, self.queue, self.stop
            self.thread = Thread(target=_fill, args=arguments, name="gdfunc reads ahead", daemon=True)
            self.thread.start()
        while True:
            try:
                return self.queue.get(timeout=_SECONDS)
            except Empty:  # a chance for Ctrl-C
                continue

    def _check(self, batch: Tree, step: int) -> list[Tensor]:
        """Refuse a batch that is not like the first; return its leaves in the order of the first."""
        name = f"the batch of step {step}"
        leaves = _tree.check_structure(batch, self.like, name, "the first batch")
        for (path, first), leaf in zip(_tree.named_leaves(self.like, ""), leaves, strict=True):
            if (leaf.shape, leaf.dtype) != (first.shape, first.dtype):
                raise ValueError(
                    f"{name} has {kind(leaf)}{list(leaf.shape)}{' at ' * bool(path)}{path}, but the first "
                    f"has {kind(first)}{list(first.shape)}; drop_last=True of a loader leaves a shorter "
                    f"last batch out"
                )
        return leaves


class _Copier:
    """Copies batches to a device, out of a source that may use their memory for the next one.

    To a GPU they go through pinned memory and a stream of their own, for whose end the thread waits, and
    not the loop.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Tree) -> Tree:
        batch = _tree.map(Tensor.detach, batch)  # no part of an autograd graph
        if self.stream is None:
            return _tree.map(lambda leaf: leaf.to(self.device, copy=True), batch)
        if any(leaf.is_cuda for leaf in _tree.leaves(batch)):  # whose own stream may not have made them yet
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            pinned = _tree.map(lambda leaf: leaf if leaf.is_cuda else leaf.pin_memory(), batch)
            copied = _tree.map(lambda leaf: leaf.to(self.device, non_blocking=True, copy=True), pinned)
        self.stream.synchronize()
        return copied

    def arrived(self, leaves: list[Tensor]) -> None:
        """Let no later copy take the memory of a batch before the loop has read it."""
        if self.stream is not None:
            for leaf in leaves:
                leaf.record_stream(torch.cuda.current_stream(self.device))


def _kinds(leaves: list[Tensor]) -> list[Any]:
    return [(leaf.shape, leaf.dtype) for leaf in leaves]


_END = object()
Entry = tuple[Any, Any, BaseException | None]  # a batch or the end, its source's state, an error


def _entries(
    read: Callable[[int], Iterable[Tree]],
    first: int,
    steps: int,
    state_of: Callable[[], Any] | None,
    copier: _Copier,
) -> Iterator[Entry]:
    """Give the batches of a run, each with what its source goes on from; then the end, or the error."""
    try:
        for step, batch in zip(range(first, steps), read(first), strict=False):
            copied = copier(as_data(batch, f"the batch of step {step}"))
            yield copied, state_of and deepcopy(state_of()), None
    except GeneratorExit:
        raise
    except BaseException as error:
        yield None, None, error
    else:
        yield _END, None, None


def _fill(entries: Iterator[Entry], queue: Queue[Any], stop: Event) -> None:
    """Put batches into a queue until told to stop."""
    for entry in entries:
        if not _put(queue, entry, stop):
            return


def _put(queue: Queue[Any], entry: Any, stop: Event) -> bool:
    """Wait until there is room; tell whether nobody said stop before."""
    while not stop.is_set():
        try:
            queue.put(entry, timeout=_SECONDS)
            return True
        except Full:
            continue
    return False
