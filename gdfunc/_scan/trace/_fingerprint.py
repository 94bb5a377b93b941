"""What a function computes, as a key: its trace serves again for an equal key, and is never stale.

A trace is good for as long as nothing that the function read has changed: a number in its closure, a
global, an attribute, an entry of a dict. So all the Python state in its reach is read anew on every call.
That state is a graph. Each object gets a number when it is first met, and the key tells of one after the
other what it is by value and what its parts are: constants as they are, other objects by number. So cycles
end, and aliases count. What cannot be read reliably (an iterator, a lock, what is found by `globals()`,
`eval`, `sys.modules` or `os.environ`, a module that makes attributes when asked) makes the key None.

Out of sight are: the inside of libraries (torch, NumPy, gdfunc, pytest, the standard library), such as
their random generators; builtins; clocks and files; the contents of a `functools.cache`; what a name
made at run time finds in a module (by `getattr`, `__dict__`, `attrgetter`); names and documentation of
functions and classes; and of a tensor its offset, its hooks and whether it is a view.
"""

import types
from collections.abc import Hashable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._torch._modes import default_device, unseen, uses_autocast
from .._recent import Recent
from ._names import is_library, named
from ._readers import BITS, CONSTANTS, HIDDEN, reader
from ._reread import Rereader, rereader


class Key:
    """A long tuple whose hash is computed once, and what tells soonest whether a function has this key."""

    __slots__ = ("again", "hash", "parts")

    def __init__(self, parts: Iterable[Any]) -> None:
        self.again: Rereader | None = None
        self.parts = tuple(parts)
        self.hash = hash(self.parts)

    def __eq__(self, other: object) -> bool:
        same = self is other
        return same or (isinstance(other, Key) and self.hash == other.hash and self.parts == other.parts)

    def __hash__(self) -> int:
        return self.hash

    @property
    def size(self) -> int:
        """About how many bytes it takes, with the code for it."""
        return (256 if self.again else 64) * len(self.parts)


class Fingerprint(NamedTuple):
    """A key that equals another one iff the computation is the same, and the tensors that this takes."""

    key: Key | None
    tensors: list[Tensor]
    objects: list[Any]  # all that was read

    @property
    def size(self) -> int:
        """About how many bytes the key takes."""
        return self.key.size if self.key else 0


def fingerprint(f: Any) -> Fingerprint:
    """Read everything that a function can reach; equal keys list their tensors in the same order.

    Where two walks gave the same key, it is next found without one, by `_reread`.
    """
    code = f.__code__ if type(f) is types.FunctionType else type(f)
    settings, tried = _settings(), _written.find(code) or []
    for key in tried:
        if key.parts[0] == settings:
            with unseen():
                found = key.again(f)
            if found:
                return Fingerprint(key, *found)
    walked, ends = _read(f, settings)
    if walked.key is None or not ends:
        return walked
    key = _keys.find(walked.key)
    if key is None:
        _keys.keep(walked.key, walked.key, walked.size)
        return walked
    key.again = key.again or rereader(walked.objects, key.parts, ends)
    if key.again:
        _keys.keep(key, key, key.size)
        tried = [key, *[other for other in tried if other is not key][: _TRIED - 1]]
        _written.keep(code, tried, sum(other.size for other in tried))
    return walked._replace(key=key)


_TRIED = 4  # keys: for others of the same code, it is soon cheaper to walk
_keys, _written = Recent(), Recent()


def _read(f: Any, settings: Hashable) -> tuple[Fingerprint, list[int]]:
    """Walk over all that can be reached; list where in the key each object ends, if it tells no more."""
    key: list[Any] = [settings]
    ends: list[int] = []
    objects: list[Any] = [f]  # all stay here to the end, lest a new one get the id of one that is gone
    numbers: dict[int, int] = {id(f): 0}
    tensors: list[Tensor] = []
    functions: list[types.FunctionType] = []
    modules: list[types.ModuleType] = []
    told: set[tuple[int, str]] = set()

    def refer(parts: Iterable[Any]) -> None:
        for part in parts:
            kind = type(part)
            if kind in CONSTANTS:
                key.extend((kind, part))
            elif kind in BITS:
                key.extend((kind, BITS[kind](part)))
            else:
                number = numbers.setdefault(id(part), len(objects))
                if number == len(objects):
                    objects.append(part)
                key.append(number)

    def walk() -> Key | None:
        readable = True
        for x in objects:  # which grow on the way
            kind: Any = type(x)
            head, parts = (None, ()) if id(x) in HIDDEN else reader(kind)(x)
            readable = readable and head is not None
            key.extend((kind, head))
            refer(parts)
            ends.append(len(key))
            if issubclass(kind, types.FunctionType):
                functions.append(x)
            elif issubclass(kind, Tensor):
                tensors.append(x)
            elif issubclass(kind, types.ModuleType) and not is_library(vars(x).get("__name__")):
                modules.append(x)
            if modules and x is objects[-1]:  # of a module counts what the functions met so far name
                names = {name: None for function in functions for name in named(function).names}
                for i, module in enumerate(modules):
                    for name in [name for name in names if name in vars(module) and (i, name) not in told]:
                        told.add((i, name))
                        key.extend((i, name))
                        refer((vars(module)[name],))
        return Key(key) if readable else None

    with unseen():  # modes and subclasses are not to see this
        try:
            whole = walk()
        except Exception:  # there is what does not let itself be read, or, as a symbolic shape, has no hash
            whole = None
    return Fingerprint(whole, tensors, objects), [] if modules else ends


def _settings() -> Hashable:
    """Tell what torch lets every function see."""
    autocast = uses_autocast() and tuple(
        torch.is_autocast_enabled(d) and torch.get_autocast_dtype(d) for d in ("cpu", "cuda")
    )
    return torch.get_default_dtype(), default_device(), torch.is_grad_enabled(), autocast
