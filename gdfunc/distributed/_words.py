"""The words that ranks leave for one another in the store of their group, and what they tell of a failure.

Under `gdfunc/began/r`, `gdfunc/sign/r` and `gdfunc/ended/r` stand how many collectives rank r had begun at
the start of what the ranks do together; that number now, with a time, as a sign of life, or nothing when
rank r is done; and that number when it ended with an error, with the error.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from .._torch._ranks import collectives, store
from ._group import RankError, rank, world_size

_MISSED = 3  # periods without a sign of life, after which a rank is named


def period() -> float:
    """Return the seconds between two signs of life: the store answers about a thousand in a second."""
    return max(1.0, world_size() / 1000)


def write(name: str, text: str) -> None:
    """Leave a word of this rank for the others, as far as they can still be told."""
    with suppress(RuntimeError):  # of a store whose process has ended
        store().set(f"gdfunc/{name}/{rank()}", text)


def read(name: str) -> list[str]:
    """Read the words of all ranks; empty where there are none."""
    keys = [f"gdfunc/{name}/{i}" for i in range(world_size())]
    if store().check(keys):
        return [word.decode() for word in store().multi_get(keys)]
    return [read_of(name, i) for i in range(world_size())]


def read_of(name: str, other: int) -> str:
    """Read the word of one rank."""
    key = f"gdfunc/{name}/{other}"
    return store().get(key).decode() if store().check([key]) else ""


def leave_word(error: BaseException) -> None:
    """Tell the other ranks why this one ends; a `RankError` is no reason of its own."""
    reason = "" if isinstance(error, RankError) else f"{type(error).__name__}: {error}"
    write("ended", f"{collectives()} {reason}")


def give_sign() -> None:
    """Give a sign of life."""
    write("sign", f"{collectives()} {time.monotonic()}")


def reasons() -> dict[int, str]:
    """Return why other ranks have ended, by their numbers."""
    words = enumerate(read("ended"))
    return {i: reason for i, word in words if i != rank() and (reason := word.partition(" ")[2])}


@contextmanager
def answered(what: str) -> Iterator[None]:
    """Say which collective failed, and what is known of the others, where a rank has ended or is late."""
    try:
        yield
    except RuntimeError as error:
        words = "; ".join(_account()) or "the output of the others may tell why"
        raise RankError(
            f"rank {rank()} of {world_size()} waited for {what}, but another rank has ended, or did not "
            f"come within the timeout of the process group: {words}"
        ) from error


def _account() -> list[str]:
    """Tell what is known of the others: why they ended, who is silent, and who is late."""
    try:
        if found := reasons():
            return [f"rank {i} ended with {reason}" for i, reason in found.items()]
        before, seconds = read("sign"), _MISSED * period()
        if any(before):  # outside of `train` and `sweep` there are no signs
            time.sleep(seconds)
        if found := reasons():
            return [f"rank {i} ended with {reason}" for i, reason in found.items()]
        words = zip(before, read("sign"), read("ended"), strict=True)
        said = []
        for i, (old, new, ended) in enumerate(words):
            if i == rank() or ended or not new:
                continue
            if new == old:
                said.append(f"rank {i} has given no sign of life for {seconds:.0f} s")
            elif (count := int(new.split()[0])) < collectives():
                said.append(f"rank {i} is late: it has begun {count} collectives, and this {collectives()}")
        return said
    except RuntimeError:
        return ["the process with the store of the group has ended, which is rank 0 or torchrun"]
