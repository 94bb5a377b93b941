"""The layout of a step's tensors: memory is used again as soon as no later reader needs its content."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from ._statement import Buffer, Code

_ON_STACK = 8192  # bytes


@dataclass
class Slot:
    """A field of the scratch memory, which one buffer has after another."""

    name: str
    c_type: str
    count: int
    last: int = -1  # statement that uses it


def spans(statements: Sequence[Code]) -> dict[Buffer, tuple[int, int]]:
    """Number the first and the last statement that uses each buffer."""
    found: dict[Buffer, tuple[int, int]] = {}
    for number, statement in enumerate(statements):
        for access in statement.accesses:
            root = access.buffer.root
            found[root] = found.get(root, (number, number))[0], number
    return found


def overwrites(statements: Sequence[Code], old: Buffer, new: Buffer) -> bool:
    """Tell whether new values may take the place of the old ones.

    The statement that first writes new ones may read only the old element that it replaces, and no later
    statement may read any.
    """
    has_begun = False
    for statement in statements:
        uses = [access for access in statement.accesses if access.buffer.root in (old, new)]
        reads_old = any(access.buffer.root is old for access in uses)
        if has_begun and reads_old:
            return False
        if not has_begun and any(access.buffer.root is new for access in uses):
            places = {access.place if access.buffer in (old, new) else None for access in uses}
            if reads_old and (len(places) > 1 or None in places):
                return False
            has_begun = True
    return has_begun


def nearest(buffers: Iterable[Buffer]) -> list[Buffer]:
    """Choose the smallest buffers, which go on the stack for the compiler to keep in registers."""
    ordered = sorted(buffers, key=lambda buffer: buffer.count)
    totals = accumulate(8 * buffer.count for buffer in ordered)
    return [buffer for buffer, total in zip(ordered, totals, strict=True) if total <= _ON_STACK]


def share(lives: Mapping[Buffer, tuple[int, int]]) -> dict[Buffer, Slot]:
    """Let buffers that are not needed at the same time lie in the same slot: less memory, and nearer."""
    slots: list[Slot] = []
    chosen: dict[Buffer, Slot] = {}
    for buffer, (first, last) in sorted(lives.items(), key=lambda item: item[1]):
        free = [slot for slot in slots if slot.c_type == buffer.c_type and slot.last < first]
        if not free:
            free = [Slot(f"r{len(slots)}", buffer.c_type, buffer.count)]
            slots += free
        slot = chosen[buffer] = min(free, key=lambda slot: abs(slot.count - buffer.count))
        slot.count, slot.last = max(slot.count, buffer.count), last
    return chosen
