"""The layout of a step's tensors: memory is used again as soon as no later reader needs its content."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import accumulate

from ._statement import Access, Buffer, Code

_ON_STACK = 8192  # bytes
Uses = dict[Buffer, list[tuple[int, Access]]]


@dataclass
class Slot:
    """A field of the scratch memory, which one buffer has after another."""

    name: str
    c_type: str
    count: int


def uses(statements: Sequence[Code]) -> Uses:
    """List the accesses to each buffer in order, with the numbers of their statements."""
    found: Uses = {}
    for number, statement in enumerate(statements):
        for access in statement.accesses:
            found.setdefault(access.buffer.root, []).append((number, access))
    return found


def spans(found: Uses) -> dict[Buffer, tuple[int, int]]:
    """Number the first and the last statement that uses each buffer."""
    return {buffer: (accesses[0][0], accesses[-1][0]) for buffer, accesses in found.items()}


def overwrites(found: Uses, old: Buffer, new: Buffer) -> bool:
    """Tell from the uses in a step whether new values may take the place of the old ones.

    The statement that first writes new ones may read only the old element that it replaces, and no later
    statement may read any.
    """
    begin = min((number for number, _ in found.get(new, ())), default=None)
    reads = {number for number, _ in found.get(old, ())}
    if begin is None or not reads or max(reads) < begin:
        return begin is not None
    together = [access for number, access in (*found[old], *found[new]) if number == begin]
    places = {access.place if access.buffer in (old, new) else None for access in together}
    return max(reads) == begin and len(places) == 1 and None not in places


def nearest(buffers: Iterable[Buffer]) -> list[Buffer]:
    """Choose the smallest buffers, which go on the stack for the compiler to keep in registers."""
    ordered = sorted(buffers, key=lambda buffer: buffer.count)
    totals = accumulate(8 * buffer.count for buffer in ordered)
    return [buffer for buffer, total in zip(ordered, totals, strict=True) if total <= _ON_STACK]


def share(lives: Mapping[Buffer, tuple[int, int]]) -> dict[Buffer, Slot]:
    """Let buffers that are not needed at the same time lie in the same slot: less memory, and nearer."""
    slots: list[Slot] = []
    taken: list[tuple[int, int]] = []  # a heap: the last statement that uses a slot, and its number
    free: dict[str, list[int]] = {}
    chosen: dict[Buffer, Slot] = {}
    for buffer, (first, last) in sorted(lives.items(), key=lambda item: item[1]):
        while taken and taken[0][0] < first:
            _, number = heappop(taken)
            free.setdefault(slots[number].c_type, []).append(number)
        if numbers := free.get(buffer.c_type):
            number = min(numbers, key=lambda at: (abs(slots[at].count - buffer.count), at))
            numbers.remove(number)
        else:
            number = len(slots)
            slots.append(Slot(f"r{number}", buffer.c_type, buffer.count))
        slot = chosen[buffer] = slots[number]
        slot.count = max(slot.count, buffer.count)
        heappush(taken, (last, number))
    return chosen
