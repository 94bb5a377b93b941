"""What a trace leaves behind in the user's objects, and how it is taken out again.

A function that keeps a table, fills a buffer when it is first asked, or puts results aside in an attribute
does so in a trace too: with tensors that have no values. In their place comes back what was there before.
"""

import gc
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

from torch._subclasses import FakeTensor

from ._body import is_over
from ._fingerprint import is_library, is_librarys, named

_CACHE = type(cache(len))
_NOTHING = object()
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
        yield _of_dict(x.__globals__, named(x).names)
        for cell in x.__closure__ or ():
            yield _of_place(*[partial(way, cell, "cell_contents") for way in (getattr, setattr, delattr)])
    elif isinstance(x, types.ModuleType):
        if not is_library(vars(x).get("__name__")):
            yield _of_dict(vars(x))
        return
    if isinstance(x, type):
        if not is_librarys(x):
            yield _of_class(x)
        return
    if type(x).__dictoffset__:
        yield _of_dict(object.__getattribute__(x, "__dict__"))
    if not is_librarys(type(x)):
        for slot in [slot for cls in type(x).__mro__ for slot in vars(cls).values()]:
            if isinstance(slot, types.MemberDescriptorType):
                yield _of_place(*[partial(way, x) for way in (slot.__get__, slot.__set__, slot.__delete__)])


def _of_dict(x: dict[Any, Any], names: Iterable[str] | None = None) -> Restore:
    """By the methods of dict itself, which a subclass may override."""
    base = OrderedDict if isinstance(x, OrderedDict) else dict

    def content() -> dict[Any, Any]:
        return dict(base.items(x)) if names is None else {name: x[name] for name in names if name in x}

    before = content()

    def restore() -> None:
        for key, value in content().items():
            if _is_left(value):
                if key in before:
                    base.__setitem__(x, key, before[key])
                else:
                    base.__delitem__(x, key)

    return restore


def _of_sequence(x: Any) -> Restore:
    base: Any = list if isinstance(x, list) else deque
    before = tuple(base.__iter__(x))

    def restore() -> None:
        if any(map(_is_left, base.__iter__(x))):
            base.clear(x)
            base.extend(x, before)

    return restore


def _of_class(x: type) -> Restore:
    before = dict(vars(x))

    def restore() -> None:
        for name, value in list(vars(x).items()):
            if _is_left(value):
                if name in before:
                    type.__setattr__(x, name, before[name])
                else:
                    type.__delattr__(x, name)

    return restore


def _of_place(get: Callable[[], Any], put: Callable[[Any], None], drop: Callable[[], None]) -> Restore:
    def content() -> Any:
        try:
            return get()
        except (ValueError, AttributeError):
            return _NOTHING

    before = content()

    def restore() -> None:
        if _is_left(content()):
            if before is _NOTHING:
                drop()
            else:
                put(before)

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
