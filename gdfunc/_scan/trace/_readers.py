"""How an object of each kind is read: what it is by value, and what its parts are."""

import functools
import hashlib
import importlib
import os
import re
import struct
import sys
import types
import typing
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Hashable, Sequence
from importlib.util import resolve_name
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from ..._torch._graphs import OperatorBase, OpOverloadPacket
from ..._torch._modes import FakeTensor
from ._names import Names, is_library, is_librarys, named

# What an object is by value (None: there is no telling), and its parts.
Reading = tuple[Hashable | None, Sequence[Any]]
Reader = Callable[[Any], Reading]


class Same:
    """An object that only equals itself, kept alive so that no other one gets its id."""

    def __init__(self, it: Any) -> None:
        self.it = it

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.it is self.it

    def __hash__(self) -> int:
        return id(self.it)


def _function(f: types.FunctionType) -> Reading:
    """Read code, defaults, attributes, cells, and the globals and imports that the code names."""
    own: list[Any] = [f.__defaults__, f.__kwdefaults__, f.__dict__ or None]
    bare = own == [None, None, None]
    own = [] if bare else own
    own += [_try(_content, cell) for cell in f.__closure__ or ()]
    names, imports, more = named(f)
    if not names and not imports:
        return (f.__code__, bare), own
    scope = f.__globals__
    if more:
        return None, ()
    found = tuple([name for name in names if name in scope])
    values = [scope[name] for name in found]
    if "modules" in names and id(sys) in map(id, values):
        return None, ()
    own += values
    own += [sys.modules.get(_try(resolve_name, name, scope.get("__package__"))) for name in imports]
    return (f.__code__, bare, found), own


def _builtin(f: Any) -> Reading:
    """Read a function made in C, or a method made in C of whatever object."""
    bound = f.__self__ is not None and not isinstance(f.__self__, types.ModuleType)
    return (f.__name__, (f.__self__,)) if bound else (Same(f), ())


def _class(cls: type) -> Reading:
    """Read what a class of the user's and its bases define."""
    if is_librarys(cls):
        return Same(cls), ()
    own = {k: v for k, v in vars(cls).items() if k not in ("__annotations__", "_abc_impl")}
    return (Same(cls), len(cls.__mro__), *own), (type(cls), *cls.__mro__, *own.values())


def _tensor(x: Tensor) -> Reading:
    """Read all of a tensor but its values."""
    layout = x.stride() if x.layout is torch.strided else x.layout
    attributes = None if type(x) is FakeTensor else x.__dict__ or None
    return (x.dtype, x.shape, layout, x.device, x.requires_grad, x.is_leaf), (type(x), attributes)


def _array(x: Any) -> Reading:
    """Read an array with its values, which a trace takes for constants."""
    if x.dtype.hasobject:
        return None, ()
    return (x.dtype, x.shape, hashlib.sha256(np.asarray(x).tobytes()).digest()), ()


def _mapping(base: Any) -> Reader:
    """Make the reader of a kind of dict, by the methods of that kind, which a subclass may override."""

    def read(x: Any) -> Reading:
        if not base.__len__(x):  # as most of the dicts of hooks in a module
            return (), ()
        keys, values = tuple(base.keys(x)), tuple(base.values(x))
        return (keys, values) if set(map(type, keys)) == {str} else (len(keys), keys + values)

    return read


def _sequence(base: Any) -> Reader:
    """Make the reader of a kind of sequence, or of set, whose order can be seen too."""

    def read(x: Any) -> Reading:
        parts = tuple(base.__iter__(x))
        return len(parts), parts

    return read


def _value(base: Any) -> Reader:
    """Make the reader of the number or text that an instance of a subclass is."""
    return lambda x: ((), base.__getnewargs__(x))


def _same(x: Any) -> Reading:
    """Take an object that never changes for itself."""
    return Same(x), ()


def _module(x: types.ModuleType) -> Reading:
    """Take a module for itself; `fingerprint` reads what is named of it, if that is not made when asked."""
    plain = type(x) is types.ModuleType and "__getattr__" not in vars(x)
    return Same(x) if plain or is_library(vars(x).get("__name__")) else None, ()


def _try(read: Callable[..., Any], *args: Any) -> Any:
    """Read what may not be there: a cell, a slot, a package."""
    try:
        return read(*args)
    except (ValueError, AttributeError, ImportError):
        return EMPTY


def _is_python(cls: type) -> bool:
    """Tell whether a class statement made this class; one made in C may have state that cannot be read."""
    in_c = (types.WrapperDescriptorType, types.MethodDescriptorType, types.BuiltinFunctionType)
    owners = [getattr(v, "__objclass__", None) or v.__self__ for v in vars(cls).values() if type(v) in in_c]
    on_heap = cls.__flags__ & 1 << 9
    return bool(on_heap) and not any(owner is cls for owner in owners)


def slots(kind: type) -> list[types.MemberDescriptorType]:
    """List the slots of a class and of what it inherits from."""
    return [v for cls in kind.__mro__ for v in vars(cls).values() if type(v) is types.MemberDescriptorType]


@functools.lru_cache(4096)
def reader(kind: type) -> Reader:
    """Find the reader of a class: its own, or one for its `__dict__`, its slots and what it inherits."""
    whole = next((base for base in _WHOLE if issubclass(kind, base)), None)
    if whole or (kind in _READERS and not kind.__dictoffset__):
        return _READERS[whole or kind]
    inherited = next((_READERS[base] for base in kind.__mro__[:-1] if base in _READERS), None)
    inside = slots(kind)
    opaque = not all(cls in _READERS or cls in _OPEN or _is_python(cls) for cls in kind.__mro__)
    user, has_dict = () if is_librarys(kind) else (kind,), bool(kind.__dictoffset__)

    def read(x: Any) -> Reading:
        head, parts = inherited(x) if inherited else ((), ())
        attributes = object.__getattribute__(x, "__dict__") or None if has_dict else None
        held = [_try(slot.__get__, x) for slot in inside]
        return None if opaque else head, (*user, attributes, *held, *parts)

    return read


EMPTY = object()
_content = types.CellType.cell_contents.__get__
# Constants stand in the key themselves: with their type, as 1 == 1.0 == True, and floats bit by bit.
CONSTANTS = {int, bool, str, bytes, type(None), type(...), type(NotImplemented), types.CodeType}
CONSTANTS |= {torch.dtype, torch.device, torch.layout, torch.memory_format}
BITS: dict[Any, Callable[[Any], bytes]] = {
    float: struct.Struct("d").pack,
    complex: lambda z: struct.pack("dd", z.real, z.imag),
}
_UNCHANGING: list[Any] = [object, re.Pattern, typing.TypeVar]
_UNCHANGING += [types.WrapperDescriptorType, types.MethodDescriptorType, types.ClassMethodDescriptorType]
_UNCHANGING += [types.GetSetDescriptorType, types.MemberDescriptorType, type(vars(Names)["names"])]
_UNCHANGING += [np.ufunc, type(np.sum), type(functools.cache(len))]
_UNCHANGING += [OperatorBase, OpOverloadPacket, torch.finfo, torch.iinfo]
# Made in C, but nothing is in them that is not in their members and `__dict__`, or read below.
_OPEN = {object, types.SimpleNamespace, typing.Generic, defaultdict, functools.partial, slice, range}
_OPEN |= {types.MethodType, property, staticmethod, classmethod}
_READERS: dict[Any, Reader] = {
    **dict.fromkeys(_UNCHANGING, _same),
    **{base: _value(base) for base in (int, float, complex, str, bytes)},
    **{base: _sequence(base) for base in (list, tuple, torch.Size, set, frozenset)},
    **{base: _mapping(base) for base in (dict, OrderedDict, types.MappingProxyType)},
    **dict.fromkeys((UninitializedParameter, UninitializedBuffer), lambda x: (None, ())),
    **dict.fromkeys((types.BuiltinFunctionType, types.MethodWrapperType), _builtin),
    **dict.fromkeys((np.ndarray, np.generic), _array),
    np.dtype: lambda x: (x, ()),
    types.GenericAlias: lambda x: ((), (x.__origin__, x.__args__)),
    types.UnionType: lambda x: ((), (x.__args__,)),
    Tensor: _tensor,
    type: _class,
    types.FunctionType: _function,
    types.ModuleType: _module,
    deque: lambda x: ((x.maxlen, deque.__len__(x)), tuple(deque.__iter__(x))),
    functools.cached_property: lambda x: ((), (x.func,)),
    weakref.ref: lambda x: ((), (x(),)),
}
# Their readers know their subclasses.
_WHOLE: list[Any] = [UninitializedParameter, UninitializedBuffer, Tensor, np.generic, np.dtype]
_WHOLE += [OperatorBase, OpOverloadPacket, type, types.FunctionType, types.ModuleType]
_WHOLE += [functools.cached_property]

# Ways to what cannot be read, by whatever name they are reached.
HIDDEN = {id(way) for way in (os.environ, os.getenv, importlib.import_module, sys.modules, __import__)}
HIDDEN |= {id(way) for way in (globals, locals, vars, eval, exec)}
