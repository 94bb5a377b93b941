"""A memory that does not grow without end."""

from dataclasses import dataclass
from itertools import count
from typing import Any

from .._lock import Lock

REMEMBERED, BYTES = 512, 2**28  # entries, before the least recently used is forgotten


@dataclass(slots=True)
class _Entry:
    value: Any
    size: int
    used: int


class Recent:
    """A dict that forgets what was not used for longest."""

    def __init__(self) -> None:
        self._entries: dict[Any, _Entry] = {}
        self._bytes, self._clock, self._keeping = 0, count(), Lock()

    def find(self, key: Any) -> Any:
        entry = self._entries.get(key)
        if entry is None:
            return None
        entry.used = next(self._clock)
        return entry.value

    def keep(self, key: Any, value: Any, size: int = 0) -> None:
        with self._keeping:
            self._forget(key)
            self._entries[key] = _Entry(value, size, next(self._clock))
            self._bytes += size
            while len(self._entries) > REMEMBERED or (self._bytes > BYTES and len(self._entries) > 1):
                self._forget(min(self._entries, key=lambda key: self._entries[key].used))

    def _forget(self, key: Any) -> None:
        entry = self._entries.pop(key, None)
        self._bytes -= entry.size if entry else 0
