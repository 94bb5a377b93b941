"""A memory that does not grow without end."""

from collections import OrderedDict
from typing import Any

from .._lock import Lock

REMEMBERED, BYTES = 512, 2**28  # entries, before the least recently used is forgotten


class Recent:
    """A dict that forgets what was not used for longest."""

    def __init__(self) -> None:
        self._entries = OrderedDict[Any, tuple[Any, int]]()  # a value and its size in bytes
        self._bytes, self._keeping = 0, Lock()

    def find(self, key: Any) -> Any:
        with self._keeping:
            entry = self._entries.get(key)
            if entry is None:
                return None
            self._entries.move_to_end(key)
            return entry[0]

    def keep(self, key: Any, value: Any, size: int = 0) -> None:
        with self._keeping:
            self._bytes += size - self._entries.pop(key, (None, 0))[1]
            self._entries[key] = value, size
            while len(self._entries) > REMEMBERED or (self._bytes > BYTES and len(self._entries) > 1):
                _, (_, forgotten) = self._entries.popitem(last=False)
                self._bytes -= forgotten
