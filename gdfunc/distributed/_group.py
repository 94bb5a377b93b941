"""The ranks of a run: what torch.distributed says of them, and small collectives that end on every rank.

Without a process group there is one rank, and nothing is sent. Every collective here waits as long as the
process group does, `torch.distributed.init_process_group(timeout=...)`, and then raises.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _tree
from .._errors import GdfuncError
from .._shown import shown
from .._torch._modes import unwatched
from .._torch._ranks import store
from .._tree import Tree

_SHOWN = 60  # characters of a value on each side of where it differs from another's
_PREFIX = "gdfunc/ended"  # of the keys in the store under which ranks say why they end


class RankError(GdfuncError, RuntimeError):
    """The ranks of a run are not all there, or differ in what must be the same on all of them.

    Example:
        >>> issubclass(gd.distributed.RankError, RuntimeError)
        True
    """


def rank() -> int:
    """Return the number of this process among those of the run; 0 for one alone.

    Example:
        >>> gd.distributed.rank()
        0
    """
    return dist.get_rank() if is_grouped() else 0


def world_size() -> int:
    """Return how many processes share the run; 1 for one alone.

    Example:
        >>> gd.distributed.world_size()
        1
    """
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
    text = repr(value)
    digests = _gathered(_of_bytes(hashlib.sha256(text.encode()).digest()), what)
    other = next((i for i, digest in enumerate(digests) if not digest.equal(digests[0])), None)
    if other is not None:
        texts = [bytes(row.tolist()).decode() for row in _gathered_bytes(_of_bytes(text.encode()), what)]
        first, second = _differing(texts[0], texts[other])
        raise RankError(
            f"the ranks differ in {what}: {first} on rank 0, but {second} on rank {other}; give all "
            f"{len(texts)} ranks the same"
        )


def _differing(a: str, b: str) -> tuple[str, str]:
    """Shorten two texts to where they begin to differ."""
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    start = max(0, same - _SHOWN // 2)
    parts = [text[start : same + _SHOWN] for text in (a, b)]
    first, second = (
        "…" * (start > 0) + part + "…" * (same + _SHOWN < len(text))
        for part, text in zip(parts, (a, b), strict=True)
    )
    return first, second


def forms(tree: Tree, name: str) -> list[str]:
    """List the paths of a tree's leaves with their dtypes and shapes."""
    return [f"{path} {shown(leaf)}" for path, leaf in _tree.named_leaves(tree, name)]


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
    headers = [int(size) for size in _gathered(torch.tensor(len(shapes)), what)]
    rows = _gathered_bytes(payload, what)
    return [
        _tree.unflatten(structure, _leaves(row, header, leaves))
        for row, header in zip(rows, headers, strict=True)
    ]


def check_ranks(number: int) -> None:
    """Refuse another number of ranks than there was when a loss was made for them."""
    if number != world_size():
        raise RankError(
            f"data_parallel was called where the number of ranks was {number}, but now it is "
            f"{world_size()}; call it after torch.distributed.init_process_group"
        )


def leave_word(error: BaseException) -> None:
    """Tell the other ranks why this one ends, as far as they can still be told."""
    if world_size() > 1 and not isinstance(error, RankError):
        with suppress(RuntimeError):  # of a store whose process has ended
            store().set(f"{_PREFIX}/{rank()}", f"{type(error).__name__}: {error}")


def forget_word() -> None:
    """Take back what this rank said of an earlier run."""
    with suppress(RuntimeError):
        store().set(f"{_PREFIX}/{rank()}", "")


@contextmanager
def answered(what: str) -> Iterator[None]:
    """Say which collective failed, and what is known of the others, where a rank has ended or is late."""
    try:
        yield
    except RuntimeError as error:
        words = "; ".join(_words()) or "the output of the others may tell why"
        raise RankError(
            f"rank {rank()} of {world_size()} waited for {what}, but another rank has ended, or did not "
            f"come within the timeout of the process group: {words}"
        ) from error


def _words() -> list[str]:
    """List the words that other ranks have left."""
    found = []
    with suppress(RuntimeError):
        keys = {i: f"{_PREFIX}/{i}" for i in range(world_size()) if i != rank()}
        for i, key in keys.items():
            if store().check([key]) and (word := store().get(key).decode()):
                found.append(f"rank {i} ended with {word}")
    return found


def device() -> torch.device:
    """Return the device whose memory the process group sends."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else _CPU


_CPU = torch.device("cpu")


def _gathered(row: Tensor, what: str) -> list[Tensor]:
    """Gather equally long rows, on the CPU."""
    with unwatched():
        row = row.to(device())
        rows = [torch.empty_like(row) for _ in range(world_size())]
        with answered(what):
            dist.all_gather(rows, row)
        return [each.cpu() for each in rows]


def _gathered_bytes(row: Tensor, what: str) -> list[Tensor]:
    """Gather rows of bytes that differ in length."""
    sizes = [int(size) for size in _gathered(torch.tensor(len(row)), what)]
    padded = row.new_zeros(max(sizes))
    padded[: len(row)] = row
    return [row[:size] for row, size in zip(_gathered(padded, what), sizes, strict=True)]


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
