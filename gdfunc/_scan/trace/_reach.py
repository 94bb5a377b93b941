"""The changeable objects in a function's reach: read, compared with an earlier reading, and put back."""

import gc
import io
import itertools
import operator
import random
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import cache, lru_cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..._torch._modes import no_dispatch_modes, unseen
from ..._torch._transforms import no_wrapping
from ._code import imports_in, names_in, owner
from ._key import key_of

_FAR = 3_000  # objects that are looked at, the nearest first
_SIMPLE = {int, bool, float, complex, str, bytes, type(None), types.CodeType}
_CACHE = type(cache(len))
_ABSENT = object()
Entries = dict[Any, Any]
Entry = tuple[int, Any]  # the number of a place, and a name, key or position in it


class Place(NamedTuple):
    """Something that may change: what it holds, and how that is written (None: not at all)."""

    does: str  # what a function does that changes it
    read: Callable[[], Entries]
    write: Callable[[Entries], Any] | None
    at: int = 0  # the number of the object


class Reach:
    """The objects that a function can reach, as far as can be seen, and what they held at first."""

    def __init__(self, f: Any) -> None:
        self.objects, self.parents = [f], [0]
        self.names: dict[str, None] = {}
        self._walk()
        self.places: list[Place] = []
        for at, x in enumerate([*self.objects, *_global_generators()]):
            with suppress(Exception):  # some objects do not let themselves be read
                self.places += [place._replace(at=at) for place in _places(x, self.names)]
        self.before = self.now()

    def _walk(self) -> None:
        seen, modules = {id(self.objects[0])}, list[int]()

        def add(parts: Iterable[Any], parent: int) -> None:
            for part in parts:
                if type(part) not in _SIMPLE and id(part) not in seen and len(self.objects) < _FAR:
                    seen.add(id(part))
                    self.objects.append(part)
                    self.parents.append(parent)

        for at, x in enumerate(self.objects):  # which grow on the way
            if isinstance(x, types.FunctionType):
                self.names |= names_in(x)
            elif isinstance(x, types.ModuleType) and owner(x.__name__) == "user":
                modules.append(at)
            with suppress(Exception):
                add(_parts(x), at)
            for module in modules if at + 1 == len(self.objects) else ():
                add(_named(vars(self.objects[module]), self.names).values(), module)

    def now(self) -> list[Entries]:
        """Read what all places hold."""
        with unseen(), no_wrapping(), no_dispatch_modes():
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

    def restore(self, choose: Callable[[Place, Any], bool] = lambda place, new: True) -> list[Entry]:
        """Put back the entries whose place and new value are chosen; list those that cannot be put back."""
        changes = self.changes(self.before).items()
        chosen = {entry: old for entry, (old, new) in changes if choose(self.places[entry[0]], new)}
        for i in {i for i, _ in chosen}:
            if write := self.places[i].write:
                old = {name: value for (place, name), value in chosen.items() if place == i}
                merged = {**self.before[i], **_read(self.places[i]), **old}
                write({name: value for name, value in merged.items() if value is not _ABSENT})
        return [entry for entry in chosen if self.places[entry[0]].write is None]

    def describe(self, entry: Entry) -> str:
        """Say what a function did to change an entry."""
        place, at = self.places[entry[0]], self.places[entry[0]].at
        if at >= len(self.objects):
            return f"draws from {_GLOBAL[at - len(self.objects)]}'s generator"
        chain = [self.objects[at]]
        while at:
            at = self.parents[at]
            chain.append(self.objects[at])
        return f"{place.does} {path(chain[::-1], None if type(entry[1]) is int else entry[1])}"


_GLOBAL = ["NumPy", "Python", "torch", *["torch"] * 64]


def path(chain: list[Any], name: Any = None) -> str:
    """Name the last object of a chain, or an entry of it, by how its function reaches it."""
    text = "f"
    names = [_name_of(parent, child) for parent, child in pairwise(chain)]
    for i, (x, found) in enumerate(zip(chain, [*names, name], strict=True)):
        if isinstance(x, types.FunctionType):
            text = "f" if x.__name__ == "<lambda>" else x.__name__
            kind = "closure variable" if found in x.__code__.co_freevars else "global"
            text += "" if found is None else f"'s {kind} `{found}`"
        elif found is not None:
            holds_attributes = isinstance(x, (type, types.ModuleType)) or (
                i and _is_dict_of(x, chain[i - 1])
            )
            text += f".{found}" if holds_attributes else f"[{found!r}]"
    return text


def _is_dict_of(x: Any, parent: Any) -> bool:
    return bool(type(parent).__dictoffset__) and object.__getattribute__(parent, "__dict__") is x


def _name_of(parent: Any, child: Any) -> Any:
    """Find by which name or key an object holds another one."""
    entries = [item for place in _places(parent, ()) for item in _read(place).items()]
    entries += vars(parent).items() if isinstance(parent, types.ModuleType) else []
    entries += enumerate(parent) if isinstance(parent, tuple) else []
    return next((name for name, value in entries if value is child), None)


def _parts(x: Any) -> list[Any]:
    """List what an object holds."""
    if isinstance(x, types.FunctionType):
        cells = [part for cell in x.__closure__ or () for part in gc.get_referents(cell)]
        return [
            x.__defaults__,
            x.__kwdefaults__,
            x.__dict__,
            *cells,
            *_named(x.__globals__, names_in(x)).values(),
            *imports_in(x),
        ]
    if isinstance(x, types.ModuleType):
        return []
    if isinstance(x, type):
        return [] if owner(x.__module__) != "user" else [*vars(x).values(), *x.__bases__]
    parts: list[Any] = [object.__getattribute__(x, "__dict__")] if type(x).__dictoffset__ else []
    if isinstance(x, np.random.Generator):
        parts.append(x.bit_generator)
    if isinstance(x, _CACHE):  # whose own dict is better left alone
        return [*parts, *_results(x)]
    # Whatever it is, a container, a method, an iterator; but of a tensor no more than its attributes.
    return [*parts, type(x), *([] if isinstance(x, Tensor) else gc.get_referents(x))]


def _named(scope: Entries, names: Iterable[str]) -> Entries:
    """Read the variables of these names that are there."""
    return {name: scope[name] for name in names if name in scope}


def _picked(get: Callable[[str], Any], names: Iterable[str]) -> Entries:
    """Read the slots or cells of these names that are not empty."""
    found = {}
    for name in names:
        with suppress(KeyError, AttributeError, ValueError):
            found[name] = get(name)
    return found


def _places(x: Any, names: Iterable[str]) -> Iterator[Place]:
    """List what may change of an object: its entries, attributes, variables, or a state in C."""
    if isinstance(x, types.FunctionType):
        cells = dict(zip(x.__code__.co_freevars, x.__closure__ or (), strict=True))
        read = partial(_picked, lambda name: cells[name].cell_contents, cells)
        yield _variables(read, lambda name, new: _fill_cell(cells[name], new), cells.__delitem__)
        scope = x.__globals__
        yield _variables(partial(_named, scope, names_in(x)), scope.__setitem__, scope.__delitem__)
    elif isinstance(x, types.ModuleType) and owner(x.__name__) == "user":
        scope = vars(x)
        yield _variables(partial(_named, scope, names), scope.__setitem__, scope.__delitem__)
    elif isinstance(x, type) and owner(x.__module__) == "user":
        yield _variables(lambda: dict(vars(x)), partial(type.__setattr__, x), partial(type.__delattr__, x))
    elif isinstance(x, dict):  # by the methods of dict itself, which a subclass may override
        mapping: Any = OrderedDict if isinstance(x, OrderedDict) else dict
        yield Place(
            "changes", lambda: dict(mapping.items(x)), partial(_refill, x, mapping.clear, mapping.update)
        )
    elif isinstance(x, (list, deque, set)):
        base: Any = next(base for base in (list, deque, set) if isinstance(x, base))
        extend = set.update if base is set else base.extend
        put = partial(_refill, x, base.clear, lambda x, new: extend(x, new.values()))
        yield Place("changes the contents of", lambda: dict(enumerate(base.__iter__(x))), put)
    elif isinstance(x, np.ndarray) and not x.dtype.hasobject:
        yield Place("writes into", lambda: {0: x.tobytes()}, lambda new: _fill(x, new[0]))
    elif isinstance(x, _CACHE):
        yield Place("fills", lambda: {0: _results(x)}, lambda new: x.cache_clear())
    elif hasattr(type(x), "__next__") or isinstance(x, io.IOBase):
        yield Place("advances", lambda: {0: _position(x)}, None)
    for kind, (get, set_) in _STATES.items():
        if isinstance(x, kind):
            yield Place("draws from", partial(_state, get, x), partial(_set_state, set_, x))
    of_x: Any = type(x)
    slots = _slots(of_x)
    if slots and owner(type(x).__module__) == "user":
        read = partial(_picked, partial(object.__getattribute__, x), slots)
        yield _variables(read, partial(object.__setattr__, x), partial(object.__delattr__, x))


@lru_cache(4096)
def _slots(kind: type) -> list[str]:
    held = [value for cls in kind.__mro__ for value in vars(cls).values()]
    return [slot.__name__ for slot in held if type(slot) is types.MemberDescriptorType]


def _state(get: Callable[[Any], Any], x: Any) -> Entries:
    return {0: get(x)}


def _set_state(set_: Callable[[Any, Any], Any], x: Any, new: Entries) -> None:
    set_(x, new[0])


def _fill_cell(cell: types.CellType, new: Any) -> None:
    cell.cell_contents = new


def _set_bits(x: np.random.BitGenerator, state: Any) -> None:
    x.state = state


# How the state of a generator of random numbers is read and written.
_STATES: dict[Any, tuple[Callable[[Any], Any], Callable[[Any, Any], Any]]] = {
    random.Random: (lambda x: x.getstate(), lambda x, state: x.setstate(state)),
    np.random.RandomState: (lambda x: x.get_state(legacy=False), lambda x, state: x.set_state(state)),
    np.random.BitGenerator: (lambda x: x.state, lambda x, state: _set_bits(x, state)),
    torch.Generator: (
        lambda x: x.get_state().numpy().tobytes(),
        lambda x, state: x.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8)),
    ),
}


def _global_generators() -> list[Any]:
    on_gpus = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
    shared: Any = (np.random.get_state, random.getstate)
    return [*[method.__self__ for method in shared], torch.default_generator, *on_gpus]


def _results(x: Any) -> tuple[Any, ...]:
    """List what a `functools.cache` keeps."""
    held = [part for part in gc.get_referents(x) if part is not x.__dict__]
    parts = [part for each in held for part in (each.values() if type(each) is dict else (each,))]
    return tuple(part for part in parts if type(part).__module__ != "functools")


def _variables(
    read: Callable[[], Entries], put: Callable[[str, Any], Any], drop: Callable[[str], Any]
) -> Place:
    """Make the place of variables, which are written one by one."""

    def write(new: Entries) -> None:
        old = read()
        for name in old.keys() - new.keys():
            drop(name)
        for name, value in new.items():
            if name not in old or old[name] is not value:
                put(name, value)

    return Place("changes", read, write)


def _refill(x: Any, clear: Callable[[Any], Any], update: Callable[[Any, Any], Any], new: Entries) -> None:
    clear(x)
    update(x, new)


def _fill(x: Any, values: bytes) -> None:
    x[...] = np.frombuffer(values, x.dtype).reshape(x.shape)


def _position(x: Any) -> Any:
    """Tell where an iterator is, as far as it can be told without advancing it."""
    if isinstance(x, io.IOBase):
        return x.tell() if x.seekable() else None
    if isinstance(x, types.GeneratorType):
        return x.gi_frame and (x.gi_frame.f_lasti, {**x.gi_frame.f_locals})
    if isinstance(x, (enumerate, itertools.cycle)):
        state: Any = x.__reduce__()[1:]
        return state[0][0].__length_hint__(), repr(state[0][1:]), repr(state[1:])
    return repr(x) if isinstance(x, (itertools.count, itertools.repeat)) else x.__length_hint__()


def _read(place: Place) -> Entries:
    with suppress(Exception):  # a closed file, an iterator that does not tell where it is
        return place.read()
    return {}


def _is_same(old: Any, new: Any) -> bool:
    """Tell whether two values are the same object, or equal plain ones without a tensor."""
    if old is new:
        return True
    if type(old) is not type(new) or isinstance(new, Tensor):
        return False
    if type(new) in _SIMPLE:
        return bool(old == new) or repr(old) == repr(new)
    if type(new) is tuple and len(old) == len(new) and all(map(operator.is_, old, new)):
        return True
    a, b = key_of([old]), key_of([new])
    return a.key is not None and a.key == b.key and not a.tensors
