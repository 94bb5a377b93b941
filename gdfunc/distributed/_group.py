"""The ranks of a run: what torch.distributed says of them, and small collectives that end on every rank.

Without a process group there is one rank, and nothing is sent. Every collective here waits as long as the
process group does, `torch.distributed.init_process_group(timeout=...)`, and then raises.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _tree
from .._errors import GdfuncError
from .._tree import Tree

_WORDS = 512  # bytes: of a value that the ranks compare, its digest and the start of its text


class RankError(GdfuncError, RuntimeError):
    """The ranks of a run are not all there, or differ in what must be the same on all of them.

    Example:
        >>> issubclass(gd.distributed.RankError, RuntimeError)
        True
    """


def rank() -> int:
    """Return the number of this process among those of the run; 0 for one alone."""
    return dist.get_rank() if is_grouped() else 0


def world_size() -> int:
    """Return how many processes share the run; 1 for one alone."""
    return dist.get_world_size() if is_grouped() else 1


def is_grouped() -> bool:
    """Tell whether torch.distributed has a process group."""
    return dist.is_available() and dist.is_initialized()


def agree(value: Any, what: str) -> None:
    """Raise the same error on every rank if their values differ.

    Args:
        value: compared by its `repr`; every rank calls with its own.
        what: the name of the value in the message.

    Raises:
        RankError: the values differ, and the message has the first two that do; or a rank does not answer.
    """
    if world_size() == 1:
        return
    text = repr(value).encode()
    words = (hashlib.sha256(text).digest() + text)[:_WORDS].ljust(_WORDS, b"\0")
    rows = [bytes(row.tolist()) for row in _gathered(_of_bytes(words), what)]
    other = next((i for i, row in enumerate(rows) if row != rows[0]), None)
    if other is not None:
        first, second = (row[32:].rstrip(b"\0").decode(errors="replace") for row in (rows[0], rows[other]))
        raise RankError(
            f"the ranks differ in {what}: it is {first} on rank 0, but {second} on rank {other}; give all "
            f"{len(rows)} ranks the same"
        )


def all_gather_tree(tree: Tree, what: str = "a tree") -> list[Tree]:
    """Gather the trees of all ranks on every rank.

    Args:
        tree: a tree of tensors. The trees of the ranks have one structure and equal dtypes; shapes may
            differ, as those of rows do.
        what: the name of the tree in messages.

    Returns:
        The tree of each rank, in the order of the ranks, on the devices of this rank's leaves.

    Raises:
        TypeError: a leaf is no tensor.
        RankError: the trees differ in structure or dtypes, or a rank does not answer.
    """
    _tree.check_tensors(tree, what)
    if world_size() == 1:
        return [_tree.clone(tree)]
    leaves, structure = _tree.flatten(tree)
    kinds = [(path, str(leaf.dtype)) for path, leaf in _tree.named_leaves(tree, what)]
    agree(kinds, f"the leaves of {what}")
    shapes = json.dumps([list(leaf.shape) for leaf in leaves]).encode()
    payload = torch.cat([_of_bytes(shapes), *map(_bytes_of, leaves)])
    sizes = torch.tensor([len(shapes), len(payload)])
    of_ranks = [row.tolist() for row in _gathered(sizes, what)]
    padded = payload.new_zeros(max(size for _, size in of_ranks))
    padded[: len(payload)] = payload
    rows = _gathered(padded, what)
    return [
        _tree.unflatten(structure, _leaves(row[:size], header, leaves))
        for row, (header, size) in zip(rows, of_ranks, strict=True)
    ]


@contextmanager
def answered(what: str) -> Iterator[None]:
    """Say which collective failed, where torch says that a connection was closed or timed out."""
    try:
        yield
    except RuntimeError as error:
        raise RankError(
            f"rank {rank()} of {world_size()} waited for {what}, but another rank has ended, or did not "
            f"come within the timeout of the process group; see the output of the others ({error})"
        ) from error


def device() -> torch.device:
    """Return the device whose memory the process group sends."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else _CPU


_CPU = torch.device("cpu")


def _gathered(row: Tensor, what: str) -> list[Tensor]:
    """Gather equally long rows, on the CPU."""
    row = row.to(device())
    rows = [torch.empty_like(row) for _ in range(world_size())]
    with answered(what):
        dist.all_gather(rows, row)
    return [each.cpu() for each in rows]


def _of_bytes(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def _bytes_of(leaf: Tensor) -> Tensor:
    plain = leaf.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return plain.reshape(-1).view(torch.uint8)


def _leaves(payload: Tensor, header: int, like: list[Tensor]) -> Iterator[Tensor]:
    """Take the leaves of a rank out of its bytes."""
    at = header
    for shape, leaf in zip(json.loads(bytes(payload[:header].tolist())), like, strict=True):
        size = torch.Size(shape).numel() * leaf.element_size()
        # Because a view in another dtype must begin at a multiple of its size.
        part = payload[at : at + size].clone().view(leaf.dtype).reshape(shape)
        at += size
        yield part.to(leaf.device)
