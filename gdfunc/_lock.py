"""Module-level locks that a forked child, such as a worker of torch's DataLoader, finds free."""

import os
from collections.abc import Callable
from functools import partial
from threading import RLock

_PATIENCE = 10.0  # seconds that a fork waits for the holder of a lock with `waits=True`


class Lock:
    """A reentrant lock that is free in a forked child, where the thread that held it does not exist.

    Args:
        waits: True where the holder changes settings of the whole process. A fork then waits for the
            holder, so that the child does not inherit half a change.
    """

    def __init__(self, waits: bool = False) -> None:
        self._lock, self._patience, self._taken = RLock(), _PATIENCE * waits, False
        _locks.append(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def before_fork(self) -> None:
        self._taken = self._lock.acquire(timeout=self._patience)

    def after_fork(self, in_child: bool) -> None:
        if self._taken:
            self._lock.release()
        elif in_child:
            self._lock = RLock()


_locks: list[Lock] = []


def _each(method: Callable[..., None], *args: bool) -> None:
    for lock in _locks:
        method(lock, *args)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=partial(_each, Lock.before_fork),
        after_in_parent=partial(_each, Lock.after_fork, False),
        after_in_child=partial(_each, Lock.after_fork, True),
    )
