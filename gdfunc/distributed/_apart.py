"""The time in which a rank runs members of a sweep, apart from the other ranks."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from .._torch._ranks import store
from ._group import rank, world_size

# Because the store outlives a process that is killed, and the next one has the same rank.
_PROCESS = secrets.token_hex(8)


def is_apart() -> bool:
    """Tell whether this rank runs members of a sweep that the other ranks do not run."""
    if world_size() == 1:
        return False
    key = _key()
    return store().check([key]) and store().get(key).decode() == _PROCESS


@contextmanager
def apart() -> Iterator[None]:
    """Note in the store that this rank runs members of its own."""
    store().set(_key(), _PROCESS)
    try:
        yield
    finally:
        with suppress(RuntimeError):  # of a store whose process has ended
            store().delete_key(_key())


def _key() -> str:
    return f"gdfunc/apart/{rank()}"
