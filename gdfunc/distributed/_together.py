"""The time in which all ranks take part in one thing, a run or a sweep, and watch one another."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from .._torch._ranks import collectives, store
from ._gather import agree
from ._group import RankError, rank, world_size
from ._words import give_sign, leave_word, period, read, read_of, write

_POLL = 0.05  # seconds between two looks at the store


@contextmanager
def taking_part(what: str) -> Iterator[None]:
    """Give signs of life while this rank takes part, and tell the others if it ends with an error.

    Args:
        what: all ranks take part in; the same text on each.

    Raises:
        RankError: the ranks take part in different things. An earlier error of this rank left the others
            in the middle of theirs.
    """
    is_over = threading.Event()
    signs = threading.Thread(target=_live, args=(is_over,), daemon=True)
    _begin()  # whose error must not take the place of the earlier one that the others may still look for
    try:
        agree(what, "what they run")
        signs.start()
        yield
    except BaseException as error:
        leave_word(error)
        raise
    finally:
        is_over.set()
        if signs.ident:
            signs.join()
        write("sign", "")


def _live(is_over: threading.Event) -> None:
    give_sign()
    while not is_over.wait(period()):
        give_sign()


def _begin() -> None:
    """Tell that this rank begins; after an error, wait until all ranks do, with equally many collectives.

    Otherwise the first collective of this rank would be taken for one of the other ranks' run.
    """
    own = str(collectives())
    write("began", own)
    failed = read_of("ended", rank()).split()[:1]
    end = time.monotonic() + store().timeout.total_seconds()
    while failed and (late := [i for i, began in enumerate(read("began")) if began != own]):
        words = read("ended")
        others = [i for i in late if words[i] and words[i].split()[:1] != failed]
        if others or time.monotonic() > end:
            raise RankError(
                f"rank {rank()} of {world_size()} ended an earlier run with an error, and rank "
                f"{(others or late)[0]} did not end it there, so the ranks no longer answer one another: "
                f"let such an error end the process, and start all of them again"
            )
        time.sleep(_POLL)
    write("ended", "")
