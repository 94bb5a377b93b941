"""What a trace leaves behind in the user's objects, and how it is taken out again.

A function that keeps a table, fills a buffer when it is first asked, or puts results aside in an attribute
does so in a trace too: with tensors that have no values. In their place comes back what was there before.
"""

import gc
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from typing import Any

from ..._torch._modes import FakeTensor, is_over
from ._names import is_library, is_librarys, named
from ._readers import slots

_CACHE = type(cache(len))
_DEEP = 3  # containers within one another
Restore = Callable[[], None]


@contextmanager
def undone(objects: Iterable[Any]) -> Iterator[None]:
    """Afterwards, put back what these held where they now hold tensors of a trace that is over."""
    restorers = [restore for x in objects for restore in _restorers(x)]
    try:
        yield
    finally:
        for restore in restorers:
            restore()


def _restorers(x: Any) -> Iterator[Restore]:
    if isinstance(x, dict):
        yield _of_dict(x)
    elif isinstance(x, (list, deque)):
        yield _of_sequence(x)
    elif isinstance(x, _CACHE):
        yield _of_cache(x)
    elif isinstance(x, types.FunctionType):
        scope, names = x.__globals__, named(x).names
        held = partial(_picked, scope.__getitem__, names)
        yield _of_entries(held, scope.__setitem__, scope.__delitem__)
        for cell in x.__closure__ or ():
            yield _of_attributes(cell, ["cell_contents"])
    elif isinstance(x, types.ModuleType):
        if not is_library(vars(x).get("__name__")):
            yield _of_dict(vars(x))
        return
    if isinstance(x, type):
        if not is_librarys(x):
            yield _of_entries(
                lambda: dict(vars(x)), partial(type.__setattr__, x), partial(type.__delattr__, x)
            )
        return
    if type(x).__dictoffset__:
        yield _of_dict(object.__getattribute__(x, "__dict__"))
    if not is_librarys(type(x)):
        yield _of_attributes(x, [slot.__name__ for slot in slots(type(x))])


def _of_dict(x: dict[Any, Any]) -> Restore:
    """By the methods of dict itself, which a subclass may override."""
    base = OrderedDict if isinstance(x, OrderedDict) else dict
    return _of_entries(
        lambda: dict(base.items(x)), partial(base.__setitem__, x), partial(base.__delitem__, x)
    )


def _of_attributes(x: Any, names: Iterable[str]) -> Restore:
    held = partial(_picked, partial(object.__getattribute__, x), names)
    return _of_entries(held, partial(object.__setattr__, x), partial(object.__delattr__, x))


def _picked(get: Callable[[str], Any], names: Iterable[str]) -> dict[Any, Any]:
    """What is there by these names: a global, a slot or a cell may be empty."""
    found = {}
    for name in names:
        with suppress(KeyError, AttributeError, ValueError):
            found[name] = get(name)
    return found


def _of_entries(
    held: Callable[[], dict[Any, Any]], put: Callable[[Any, Any], None], drop: Callable[[Any], None]
) -> Restore:
    before = held()

    def restore() -> None:
        for key, value in held().items():
            if _is_left(value):
                if key in before:
                    put(key, before[key])
                else:
                    drop(key)

    return restore


def _of_sequence(x: Any) -> Restore:
    base: Any = list if isinstance(x, list) else deque
    before = tuple(base.__iter__(x))

    def restore() -> None:
        if any(map(_is_left, base.__iter__(x))):
            base.clear(x)
            base.extend(x, before)

    return restore


def _of_cache(x: Any) -> Restore:
    before = x.cache_info().misses

    def restore() -> None:
        if x.cache_info().misses != before and any(map(_is_left, gc.get_referents(x))):
            x.cache_clear()

    return restore


def _is_left(x: Any, deep: int = _DEEP) -> bool:
    """Tell whether it is, or has in it, a tensor of a trace that is over."""
    if isinstance(x, FakeTensor):
        return is_over(x)
    if not deep or type(x) not in (tuple, list, dict):
        return False
    return any(_is_left(part, deep - 1) for part in (x.values() if type(x) is dict else x))
