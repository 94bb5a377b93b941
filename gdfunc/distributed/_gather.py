"""Small collectives that end on every rank: values that must be the same, and trees of all ranks.

Every collective waits for the timeout of the process group, and then raises.
"""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _tree
from .._shown import shown
from .._torch._modes import unwatched
from .._tree import Tree
from ._group import RankError, world_size
from ._words import answered

_SHOWN = 60  # characters of a value on each side of where it differs from another's


def agree(value: Any, what: str, remedy: str = "give all ranks the same") -> None:
    """Raise the same error on every rank if their values differ.

    Args:
        value: compared by its `repr`; every rank calls with its own.
        what: the name of the value in the message.
        remedy: the end of the message.

    Raises:
        RankError: the values differ, and the message has the first two that do; or a rank does not answer.
    """
    if world_size() == 1:
        return
    text = repr(value)
    digests = gathered(_of_bytes(hashlib.sha256(text.encode()).digest()), what)
    other = next((i for i, digest in enumerate(digests) if not digest.equal(digests[0])), None)
    if other is not None:
        texts = [bytes(row.tolist()).decode() for row in _gathered_bytes(_of_bytes(text.encode()), what)]
        first, second = _differing(texts[0], texts[other])
        raise RankError(
            f"the ranks differ in {what}: {first} on rank 0, but {second} on rank {other}; {remedy}"
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
    headers = [int(size) for size in gathered(torch.tensor(len(shapes)), what)]
    rows = _gathered_bytes(payload, what)
    return [
        _tree.unflatten(structure, _leaves(row, header, leaves))
        for row, header in zip(rows, headers, strict=True)
    ]


def _device() -> torch.device:
    """Return the device whose memory the process group sends."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else _CPU


_CPU = torch.device("cpu")


def gathered(row: Tensor, what: str) -> list[Tensor]:
    """Gather equally long rows, on the CPU."""
    with unwatched():
        row = row.to(_device())
        rows = [torch.empty_like(row) for _ in range(world_size())]
        with answered(what):
            dist.all_gather(rows, row)
        return [each.cpu() for each in rows]


def _gathered_bytes(row: Tensor, what: str) -> list[Tensor]:
    """Gather rows of bytes that differ in length."""
    sizes = [int(size) for size in gathered(torch.tensor(len(row)), what)]
    padded = row.new_zeros(max(sizes))
    padded[: len(row)] = row
    return [row[:size] for row, size in zip(gathered(padded, what), sizes, strict=True)]


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
