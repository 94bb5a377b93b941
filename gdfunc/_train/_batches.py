"""The source of a run's batches: the seam between data and the loop."""

import hashlib
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _tree
from .._lazy import LazyBatches
from .._shown import shown
from .._tree import Tree

_PART = 2**24  # bytes that a digest may copy


def _nothing(*_: Any) -> None: ...


class Batches(NamedTuple):
    """The source of a run's batches.

    Attributes:
        rows: `(first, last) -> rows`, a tree [last − first, ...] over which a segment scans. A segment may
            be asked for again until the next one is.
        batch: makes the batch of a step from its row.
        fingerprint: `step -> digests by name` of all that the batches before a step were made of.
        most: a segment has at most so many steps, if it can, because its rows are in memory.
        state: `step -> what the source goes on from`, after the batches before a step.
        go_on: `(step, state)`, lets the source go on; None if it cannot.
        close: called when the run ends, however it ends.
    """

    rows: Callable[[int, int], Tree]
    batch: Callable[[Tree], Tree]
    fingerprint: Callable[[int], dict[str, str]]
    most: int | None = None
    state: Callable[[int], Any] = _nothing
    go_on: Callable[[int, Any], None] | None = _nothing
    close: Callable[[], None] = _nothing

    @property
    def repeats(self) -> bool:
        """Whether the rows of any step may be asked for at any time."""
        return self.most is None


def from_memory(data: Tree, index: Tensor | LazyBatches) -> Batches:
    """Take the batches of data in memory, or mapped into it, by a plan [T, B] of sample numbers."""
    leaves, structure = _tree.flatten(data)
    of_data, of_plan = cache(lambda: digest(data)), digest_of_plan(index)
    return Batches(
        lambda first, last: part(index, first, last),
        lambda row: _tree.unflatten(structure, [leaf[row] for leaf in leaves]),
        lambda step: {"data": of_data(), "index": of_plan(step)},
    )


def from_function(draw: Callable[[Tensor], Tree], device: torch.device) -> Batches:
    """Make each batch from the number of its step, inside the loop."""
    return Batches(
        lambda first, last: torch.arange(first, last, device=device),
        draw,
        lambda step: {"data": shown(draw)},
    )


def digest_of_plan(index: Tensor | LazyBatches) -> Callable[[int], str]:
    """Make a function of a step: the SHA-256 of all that the rows of a plan before it depend on."""
    return (lambda step: index.digest()) if isinstance(index, LazyBatches) else RowsDigest(index)


def part(leaf: Tensor | LazyBatches, first: int, last: int) -> Tensor:
    """Slice rows, or give all of a tensor as they are."""
    if isinstance(leaf, Tensor) and last - first == leaf.shape[0]:
        return leaf
    return leaf[first:last]


def digest(tree: Tree) -> str:
    """Compute the SHA-256 of the dtypes, shapes and bytes of a tree, a part of it at a time."""
    made = hashlib.sha256()
    for path, leaf in _tree.named_leaves(tree, ""):
        made.update(f"{path} {shown(leaf)};".encode())
        _update(made, leaf)
    return made.hexdigest()


class RowsDigest:
    """Computes the SHA-256 of the first rows of a tensor; the next one goes on from the one before."""

    def __init__(self, rows: Tensor) -> None:
        self.rows, self.step = rows, 0
        self.made: Any = None

    def __call__(self, step: int) -> str:
        if self.made is None or step < self.step:
            self.step, self.made = 0, hashlib.sha256(shown(self.rows[:0]).encode())
        _update(self.made, self.rows[self.step : step])
        self.step = step
        return self.made.hexdigest()


def _update(made: Any, leaf: Tensor) -> None:
    """Add the bytes of a tensor to a digest."""
    if leaf.numel():
        rows = leaf.detach().reshape(1) if not leaf.ndim else leaf.detach()
        for some in rows.split(max(1, _PART // rows[0].nbytes)):
            made.update(_bytes(some))


def _bytes(leaf: Tensor) -> Any:
    plain = leaf.resolve_conj().resolve_neg().cpu().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy()
