"""What a function computes, as a key: its trace serves again for an equal key, and is never stale.

A trace is good for as long as nothing that the function read has changed: a number in its closure, a
global, an attribute, an entry of a dict. So all the Python state in its reach is read anew on every call.
That state is a graph. Each object gets a number when it is first met, and the key tells of one after the
other what it is by value and what its parts are: constants as they are, other objects by number. So cycles
end, and aliases count. What cannot be read reliably (an iterator, a lock, what is found by `globals()`,
`eval`, `sys.modules` or `os.environ`, a module that makes attributes when asked) makes the key None.

Out of sight are: the inside of libraries (torch, NumPy, gdfunc, pytest, the standard library), such as
their random generators; builtins; clocks and files; the contents of a `functools.cache`; and what
`getattr` finds in a module.
"""

import dis
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
from collections.abc import Callable, Hashable, Iterable
from importlib.util import resolve_name
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._ops import OperatorBase, OpOverloadPacket
from torch._subclasses import FakeTensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter


class Fingerprint(NamedTuple):
    """A key that equals another one iff the computation is the same, and the tensors that this takes."""

    key: Hashable | None
    tensors: list[Tensor]
    objects: list[Any]  # all that was read

    @property
    def size(self) -> int:
        """About how many bytes the key takes."""
        return 64 * len(self.key.parts) if isinstance(self.key, _Key) else 0


# What an object is by value (None: there is no telling), and its parts.
Reading = tuple[Hashable | None, Iterable[Any]]
Reader = Callable[[Any], Reading]


def fingerprint(f: Any) -> Fingerprint:
    """Read everything that a function can reach; equal keys list their tensors in the same order."""
    key, readable = _settings(), True
    objects: list[Any] = [f]  # all stay here to the end, lest a new one get the id of one that is gone
    numbers: dict[int, int] = {id(f): 0}
    tensors: list[Tensor] = []
    functions: list[types.FunctionType] = []
    modules: list[types.ModuleType] = []
    told: set[tuple[int, str]] = set()

    def refer(parts: Iterable[Any]) -> None:
        for part in parts:
            kind = type(part)
            if kind in _CONSTANTS:
                key.extend((kind, part))
            elif kind in _BITS:
                key.extend((kind, _BITS[kind](part)))
            else:
                number = numbers.setdefault(id(part), len(objects))
                if number == len(objects):
                    objects.append(part)
                key.append(number)

    with torch._C.DisableTorchFunction():  # modes and subclasses are not to see this
        for x in objects:  # which grow on the way
            kind: Any = type(x)
            read = _reader(kind)
            head, parts = read(x)
            readable = readable and head is not None
            key.extend((kind, head))
            refer(parts)
            if read is _function:
                functions.append(x)
            elif read is _tensor:
                tensors.append(x)
            elif read is _module and not is_library(vars(x).get("__name__")):
                modules.append(x)
            if modules and x is objects[-1]:  # of a module counts what the functions met so far name
                names = {name: None for function in functions for name in named(function).names}
                for i, module in enumerate(modules):
                    for name in [name for name in names if name in vars(module) and (i, name) not in told]:
                        told.add((i, name))
                        key.extend((i, name))
                        refer((vars(module)[name],))
    try:
        return Fingerprint(_Key(key) if readable else None, tensors, objects)
    except TypeError:  # a symbolic shape, say, has no hash
        return Fingerprint(None, tensors, objects)


class _Key:
    """A long tuple whose hash is computed once."""

    __slots__ = ("hash", "parts")

    def __init__(self, parts: Iterable[Any]) -> None:
        self.parts = tuple(parts)
        self.hash = hash(self.parts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.hash == other.hash and self.parts == other.parts

    def __hash__(self) -> int:
        return self.hash


class _Same:
    """An object that only equals itself, kept alive so that no other one gets its id."""

    def __init__(self, it: Any) -> None:
        self.it = it

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.it is self.it

    def __hash__(self) -> int:
        return id(self.it)


def _settings() -> list[Any]:
    """List what torch lets every function see."""
    autocast = [torch.is_autocast_enabled(d) and torch.get_autocast_dtype(d) for d in ("cpu", "cuda")]
    return [torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled(), *autocast]


@functools.cache
def is_library(module: Any) -> bool:
    """Tell by its name that a module does not change at run time; a script may shadow a standard one."""
    root = module.partition(".")[0] if isinstance(module, str) else ""
    standard = os.path.dirname(os.__file__)
    file = getattr(sys.modules.get(root), "__file__", None) or standard
    in_standard = root in sys.stdlib_module_names and file.startswith(standard)
    return in_standard or root in {"torch", "numpy", "gdfunc", "_pytest"}  # named by an assert in a test


def is_librarys(cls: type) -> bool:
    """Tell that a class belongs to a library; those made by `types.new_class` only say so."""
    return is_library(cls.__module__) and (cls.__module__ != "types" or cls in vars(types).values())


class _Names(NamedTuple):
    """What a code, and those within it, name: globals or attributes, and modules to import."""

    names: dict[str, None]
    imports: list[str]
    more: bool  # whether they may read globals or the environment by names of their making


@functools.lru_cache(4096)
def _names(code: types.CodeType) -> _Names:
    """Read off what a code names."""
    names, imports = dict.fromkeys(code.co_names), []
    steps = [step for step in dis.get_instructions(code) if step.opname != "EXTENDED_ARG"]
    for level, step in zip(steps, steps[2:], strict=False):
        if step.opname == "IMPORT_NAME":
            imports += ["." * level.argval + step.argval, step.argval.partition(".")[0]]
    more = not _INDIRECT.isdisjoint(names) or {"sys", "modules"} <= {*names}
    # As a global, not as an attribute of that name.
    more |= any(step.opname in ("LOAD_GLOBAL", "LOAD_NAME") and step.argval in _BY_NAME for step in steps)
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            within = _names(inner)
            names |= within.names
            imports += within.imports
            more |= within.more
    return _Names(names, [name for name in imports if name], more)


_BY_NAME = {"globals", "vars", "locals", "eval", "exec", "__import__"}
_INDIRECT = {"environ", "getenv", "import_module", "_getframe", "currentframe", "f_globals", "__globals__"}
_HIDDEN = {id(way) for way in (os.environ, os.getenv, importlib.import_module)}  # by whatever name


def named(f: types.FunctionType) -> _Names:
    """Tell what a function names, unless it is a library's by its globals: decorators copy `__module__`."""
    return _NONE if is_library(f.__globals__.get("__name__")) else _names(f.__code__)


_NONE = _Names({}, [], False)


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
    if not _HIDDEN.isdisjoint(map(id, values)) or ("modules" in names and id(sys) in map(id, values)):
        return None, ()
    own += values
    own += [sys.modules.get(_try(resolve_name, name, scope.get("__package__"))) for name in imports]
    return (f.__code__, bare, found), own


def _builtin(f: Any) -> Reading:
    """Read a function made in C, or a method made in C of whatever object."""
    bound = f.__self__ is not None and not isinstance(f.__self__, types.ModuleType)
    return (f.__name__, (f.__self__,)) if bound else (_Same(f), ())


def _class(cls: type) -> Reading:
    """Read what a class of the user's and its bases define."""
    if is_librarys(cls):
        return _Same(cls), ()
    own = {k: v for k, v in vars(cls).items() if k not in ("__annotations__", "_abc_impl")}
    return (_Same(cls), len(cls.__mro__), *own), (type(cls), *cls.__mro__, *own.values())


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
    return _Same(x), ()


def _module(x: types.ModuleType) -> Reading:
    """Take a module for itself; `fingerprint` reads what is named of it, if that is not made when asked."""
    plain = type(x) is types.ModuleType and "__getattr__" not in vars(x)
    return _Same(x) if plain or is_library(vars(x).get("__name__")) else None, ()


def _try(read: Callable[..., Any], *args: Any) -> Any:
    """Read what may not be there: a cell, a slot, a package."""
    try:
        return read(*args)
    except (ValueError, AttributeError, ImportError):
        return _EMPTY


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
def _reader(kind: type) -> Reader:
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


_EMPTY = object()
_content = types.CellType.cell_contents.__get__
# Constants stand in the key themselves: with their type, as 1 == 1.0 == True, and floats bit by bit.
_CONSTANTS = {int, bool, str, bytes, type(None), type(...), type(NotImplemented), types.CodeType}
_CONSTANTS |= {torch.dtype, torch.device, torch.layout, torch.memory_format}
_BITS: dict[Any, Callable[[Any], bytes]] = {
    float: struct.Struct("d").pack,
    complex: lambda z: struct.pack("dd", z.real, z.imag),
}
_UNCHANGING: list[Any] = [object, re.Pattern, typing.TypeVar]
_UNCHANGING += [types.WrapperDescriptorType, types.MethodDescriptorType, types.ClassMethodDescriptorType]
_UNCHANGING += [types.GetSetDescriptorType, types.MemberDescriptorType, type(vars(Fingerprint)["key"])]
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
    **dict.fromkeys((np.dtype, types.GenericAlias, types.UnionType), lambda x: (x, ())),
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
