"""The changeable objects in a function's reach: read, compared with an earlier reading, and put back."""

import ctypes
import gc
import io
import itertools
import random
import types
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, from_numpy

from ..._torch._modes import unwatched
from ._code import imports_in, names_in, opens_a_file, owner, reads_a_clock
from ._key import key_of

FAR, ALL = 3_000, 50_000  # objects that are looked at, the nearest first; where all of them are plain
_SIMPLE = {int, bool, float, complex, str, bytes, type(None), types.CodeType}
_CACHE = type(cache(len))
_NUMBER_IN_C: Any = ctypes.c_int.__base__
_ABSENT = object()
DRAWS, ADVANCES = "draws from", "advances"
Entries = dict[Any, Any]
Entry = tuple[int, Any]  # the number of a place, and a name, key or position in it


class Place(NamedTuple):
    """Part of an object that may change, with the functions that read and write it (None: not writable)."""

    does: str  # what a function does that changes it
    read: Callable[[], Entries]
    write: Callable[[Entries], Any] | None
    at: int = 0  # the number of the object


class Reach:
    """The objects that a function can reach, as far as can be seen, and what they held at first."""

    def __init__(self, f: Any, far: int = FAR) -> None:
        self.objects, self.parents, self.far = [f], [0], far
        self.clock: str = ""  # the name of a function that reads one
        self.file: str = ""  # the name of a function that opens one
        self.places: list[Place] = []
        self._walk()
        for at, x in enumerate(_global_generators(), len(self.objects)):
            self.places += [place._replace(at=at) for place in _places(x, ())]
        self.before = self.now()

    def _walk(self) -> None:
        seen, modules, names = {id(self.objects[0])}, list[int](), dict[str, None]()

        def add(parts: Iterable[Any], parent: int) -> None:
            for part in parts:
                if type(part) not in _SIMPLE and id(part) not in seen and len(self.objects) < self.far:
                    seen.add(id(part))
                    self.objects.append(part)
                    self.parents.append(parent)

        for at, x in enumerate(self.objects):  # the list grows on the way
            if isinstance(x, types.FunctionType):
                names |= names_in(x)
                self.clock = self.clock or (x.__qualname__ if reads_a_clock(x) else "")
                self.file = self.file or (x.__qualname__ if opens_a_file(x) else "")
            elif isinstance(x, types.ModuleType) and owner(x.__name__) == "user":
                modules.append(at)
            with suppress(Exception):  # some objects do not let themselves be read
                places = [place._replace(at=at) for place in _places(x, names)]
                self.places += places
                add(_parts(x, places), at)
            for module in modules if at + 1 == len(self.objects) else ():
                add(_named(vars(self.objects[module]), names).values(), module)

    def now(self) -> list[Entries]:
        """Read what all places hold."""
        with unwatched():
            return [_read(place) for place in self.places]

    def changes(self, before: list[Entries]) -> dict[Entry, tuple[Any, Any]]:
        """List the entries that are not what they were, with their old and new values."""
        found = {}
        for place, (old, new) in enumerate(zip(before, self.now(), strict=True)):
            for name in {**old, **new}:
                values = old.get(name, _ABSENT), new.get(name, _ABSENT)
                if not _is_same(*values):
                    found[place, name] = values
        return found

    def restore(self, entries: Iterable[Entry]) -> list[Entry]:
        """Put back the places of these entries; list the entries that cannot be put back."""
        for i in {i for i, _ in entries}:
            if write := self.places[i].write:
                write(self.before[i])
        return [entry for entry in entries if self.places[entry[0]].write is None]

    def describe(self, entries: Iterable[Entry]) -> str:
        """Say what a function did to change these entries, or the first of them."""
        return " and ".join([*dict.fromkeys(map(self._describe, sorted(entries, key=str)))][:3])

    def _describe(self, entry: Entry) -> str:
        place, at = self.places[entry[0]], self.places[entry[0]].at
        if at >= len(self.objects):
            return f"draws from {_GLOBAL[at - len(self.objects)]}'s generator"
        chain = [self.objects[at]]
        while at:
            at = self.parents[at]
            chain.append(self.objects[at])
        return f"{place.does} {path(chain[::-1], None if type(entry[1]) is int else entry[1])}"


_GLOBAL = ["NumPy", "Python", "torch", *["torch"] * 64]


def _global_generators() -> list[Any]:
    on_gpus = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
    shared: Any = (np.random.get_state, random.getstate)
    return [*[method.__self__ for method in shared], torch.default_generator, *on_gpus]


def path(chain: list[Any], name: Any = None) -> str:
    """Name the last object of a chain, or an entry of it, by how its function reaches it."""
    text = "f"
    for i, x in enumerate(chain):
        found = _name_of(x, chain[i + 1]) if i + 1 < len(chain) else name
        if isinstance(x, types.FunctionType):
            text = "f" if x.__name__ == "<lambda>" else x.__name__
            kind = "closure variable" if found in x.__code__.co_freevars else "global"
            text += "" if found is None else f"'s {kind} `{found}`"
        elif found is not None:
            is_scope = isinstance(x, (type, types.ModuleType)) or (i and _is_dict_of(x, chain[i - 1]))
            text += f".{found}" if is_scope else f"[{found!r}]"
    return text


def _is_dict_of(x: Any, parent: Any) -> bool:
    return bool(type(parent).__dictoffset__) and object.__getattribute__(parent, "__dict__") is x


def _name_of(parent: Any, child: Any) -> Any:
    """Find by which name or key an object holds another one."""
    entries = [item for place in _places(parent, ()) for item in _read(place).items()]
    entries += vars(parent).items() if isinstance(parent, types.ModuleType) else []
    entries += enumerate(parent) if isinstance(parent, tuple) else []
    return next((name for name, value in entries if value is child), None)


def _parts(x: Any, places: list[Place]) -> list[Any]:
    """List what an object holds, in its places and elsewhere."""
    if isinstance(x, types.ModuleType):
        return []
    parts = [part for place in places for part in _read(place).values()]
    if isinstance(x, types.FunctionType):
        return [*parts, x.__defaults__, x.__kwdefaults__, x.__dict__, *imports_in(x)]
    if isinstance(x, type):
        return [*parts, *x.__bases__] if places else []
    if isinstance(x, _CACHE):  # whose own dict is better left alone
        return [*parts, x.__dict__]
    parts += [object.__getattribute__(x, "__dict__")] if type(x).__dictoffset__ else []
    # Whatever it is, a container, a method, an iterator; but of a tensor no more than its attributes.
    return [*parts, type(x), *([] if isinstance(x, Tensor) else gc.get_referents(x))]


def _places(x: Any, names: Iterable[str]) -> Iterator[Place]:
    """List what may change of an object: its entries, attributes, variables, or a state in C."""
    of_x: Any = type(x)
    if isinstance(x, types.FunctionType):
        cells: Any = dict(zip(x.__code__.co_freevars, x.__closure__ or (), strict=True))
        yield _variables(
            lambda: {name: held for name, cell in cells.items() for held in gc.get_referents(cell)},
            lambda name, new: object.__setattr__(cells[name], "cell_contents", new),
            lambda name: object.__delattr__(cells[name], "cell_contents"),
        )
        yield _scope(x.__globals__, names_in(x))
    elif isinstance(x, types.ModuleType) and owner(x.__name__) == "user":
        yield _scope(vars(x), names)
    elif isinstance(x, type) and owner(x.__module__) == "user":
        yield _variables(lambda: dict(vars(x)), partial(type.__setattr__, x), partial(type.__delattr__, x))
    elif base := next((base for base in _CONTAINERS if isinstance(x, base)), None):
        yield _contents(x, base)
    elif state := next((state for state in _STATES if isinstance(x, state[1])), None):
        does, _, get, put = state
        yield Place(does, lambda: {0: get(x)}, put and (lambda old: put(x, old[0])))
    if owner(of_x.__module__) == "user" and (slots := _slots(of_x)):
        set_, delete = partial(object.__setattr__, x), partial(object.__delattr__, x)
        yield _variables(lambda: _attributes(x, slots), set_, delete)


@lru_cache(4096)
def _slots(kind: type) -> list[str]:
    held = [value for cls in kind.__mro__ for value in vars(cls).values()]
    return [slot.__name__ for slot in held if type(slot) is types.MemberDescriptorType]


def _attributes(x: Any, names: Iterable[str]) -> Entries:
    found = {}
    for name in names:
        with suppress(AttributeError):
            found[name] = object.__getattribute__(x, name)
    return found


def _named(scope: Entries, names: Iterable[str]) -> Entries:
    """Read the variables of these names that are there."""
    return {name: scope[name] for name in names if name in scope}


def _scope(variables: Entries, names: Iterable[str]) -> Place:
    """Make the place of the global variables of these names."""
    return _variables(lambda: _named(variables, names), variables.__setitem__, variables.__delitem__)


def _variables(
    read: Callable[[], Entries], put: Callable[[str, Any], Any], drop: Callable[[str], Any]
) -> Place:
    """Make the place of variables, which are written one by one."""

    def write(old: Entries) -> None:
        new = read()
        for name in new.keys() - old.keys():
            drop(name)
        for name, value in old.items():
            if name not in new or new[name] is not value:
                put(name, value)

    return Place("changes", read, write)


def _contents(x: Any, base: Any) -> Place:
    """Make the place of what a container holds, by the methods of `base`, which a subclass may override."""
    is_dict = issubclass(base, dict)

    def read() -> Entries:
        return dict(base.items(x) if is_dict else enumerate(base.__iter__(x)))

    def write(old: Entries) -> None:
        base.clear(x)
        _CONTAINERS[base](x, old if is_dict else old.values())

    return Place("changes" if is_dict else "changes the contents of", read, write)


# The method that fills each container.
_CONTAINERS: dict[Any, Callable[[Any, Any], Any]] = {
    **{OrderedDict: OrderedDict.update, dict: dict.update},
    **{list: list.extend, deque: deque.extend, set: set.update},
}


def _results(x: Any) -> tuple[Any, ...]:
    """List what a `functools.cache` keeps."""
    held = [part for part in gc.get_referents(x) if part is not x.__dict__]
    parts = [part for each in held for part in (each.values() if type(each) is dict else (each,))]
    return tuple(part for part in parts if type(part).__module__ != "functools")


def _fill(x: np.ndarray, values: Any) -> None:
    if x.dtype.hasobject:
        x.flat[:] = values
    else:
        np.copyto(x, np.ndarray(x.shape, x.dtype, values))


# States that are read and written in one piece: what a function does to them, the kind of object, and how
# they are read and written (None: not at all). An iterator over iterators, such as a zip, has their states.
_STATES: list[tuple[Any, ...]] = [
    (DRAWS, random.Random, random.Random.getstate, random.Random.setstate),
    (DRAWS, np.random.RandomState, lambda x: x.get_state(legacy=False), np.random.RandomState.set_state),
    (DRAWS, np.random.BitGenerator, lambda x: x.state, lambda x, old: object.__setattr__(x, "state", old)),
    (DRAWS, torch.Generator, lambda x: x.get_state().numpy(), lambda x, old: x.set_state(from_numpy(old))),
    ("writes into", np.ndarray, lambda x: tuple(x.flat) if x.dtype.hasobject else x.tobytes(), _fill),
    ("writes into", bytearray, bytes, lambda x, old: x.__setitem__(slice(None), old)),
    ("writes into", array, bytes, lambda x, old: x.__setitem__(slice(None), array(x.typecode, old))),
    ("writes into", _NUMBER_IN_C, _NUMBER_IN_C.value.__get__, _NUMBER_IN_C.value.__set__),
    ("fills", _CACHE, _results, lambda x, _: x.cache_clear()),
    (ADVANCES, io.IOBase, lambda x: x.tell(), None),
    (ADVANCES, types.GeneratorType, lambda x: (x.gi_frame.f_lasti, *x.gi_frame.f_locals.values()), None),
    (ADVANCES, itertools.cycle, lambda x: x.__reduce__()[1][0].__length_hint__(), None),
    (ADVANCES, itertools.count, repr, None),
    (ADVANCES, itertools.accumulate, lambda x: tuple(map(id, gc.get_referents(x))), None),
    (ADVANCES, Iterator, lambda x: x.__length_hint__(), None),
]


def _read(place: Place) -> Entries:
    with suppress(Exception):  # a closed file, an iterator that does not tell where it is
        return place.read()
    return {}


def _is_same(old: Any, new: Any) -> bool:
    """Tell whether two values are the same object, or equal plain ones without a tensor."""
    if old is new or type(old) is not type(new):
        return old is new
    if type(new) is tuple and len(old) == len(new) and all(map(_is_same, old, new)):
        return True
    a, b = key_of([old]), key_of([new])
    return a.key is not None and a.key == b.key and not a.tensors
