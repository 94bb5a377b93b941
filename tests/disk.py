"""A disk that is full, for a while."""

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def filling() -> Iterator[Callable[[int], None]]:
    """Give a function that lets no file grow beyond so many bytes, until the end of the block."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda room: resource.setrlimit(resource.RLIMIT_FSIZE, (room, usual[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
