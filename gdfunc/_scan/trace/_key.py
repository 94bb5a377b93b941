"""The key of a trace, which tells when the trace may serve again.

A trace is right for as long as nothing that its function reads has changed. The key lists the plain state
in the function's reach by value. Objects are numbered in the order of the walk, so aliases count and cycles
end. Tensors count by their metadata and become inputs, frozen libraries by identity. The walk stops at the
first thing that is not plain. Then the function has no key and is traced on every call: never stale.
"""

import abc
import enum
import functools
import gc
import hashlib
import types
import typing
import weakref
from collections import OrderedDict, defaultdict, deque, namedtuple
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..._torch._modes import default_device, unseen, uses_autocast
from ._code import BY_NAME, GETTERS, HIDDEN, imports_in, names_in, owner

_CONSTANTS = {int, bool, str, bytes, type(None), type(...), type(NotImplemented), types.CodeType, object}
_CONSTANTS |= {torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size, torch.finfo}
_CONSTANTS |= {torch.iinfo, type(torch.ops.aten.sin), type(torch.ops.aten.sin.default), np.ufunc}
_CONSTANTS |= {types.MemberDescriptorType, types.GetSetDescriptorType, types.WrapperDescriptorType}
_CONSTANTS |= {types.ClassMethodDescriptorType, type(vars(namedtuple("_", "x"))["x"]), type(np.sum)}
_IN_C = {types.BuiltinFunctionType, types.MethodWrapperType, types.MethodDescriptorType}
_PARTS: dict[type, tuple[str, ...]] = {
    **dict.fromkeys((slice, range), ("start", "stop", "step")),
    **dict.fromkeys((staticmethod, classmethod), ("__func__", "__dict__")),
    **{types.MethodType: ("__func__", "__self__"), functools.cached_property: ("func",)},
    functools.partial: ("func", "args", "keywords", "__dict__"),
    **{property: ("fget", "fset", "fdel"), types.SimpleNamespace: ("__dict__",), complex: ("real", "imag")},
}
_SEQUENCES, _CACHE = {tuple, list, set, frozenset, deque}, type(functools.cache(len))
_METACLASSES = {type, abc.ABCMeta, type(typing.Protocol), enum.EnumMeta, type(torch.autograd.Function)}
_NOT_STATE = {"_abc_impl", "__annotations__", "__annotations_cache__", "__conditional_annotations__"}
_NOT_STATE |= {"__annotate_func__", "__classdictcell__", "__dataclass_fields__", "__dataclass_params__"}
_NOT_STATE |= {"__dict__", "__doc__", "__firstlineno__", "__module__", "__orig_bases__", "__parameters__"}
_NOT_STATE |= {"__slotnames__", "__static_attributes__", "__type_params__", "__weakref__"}
_FAR = 20_000  # objects, of which a walk reads about a thousand in a millisecond


class Key(tuple[Any, ...]):
    """A tuple whose hash is computed once."""

    def __hash__(self) -> int:
        return self.__dict__.get("hash") or self.__dict__.setdefault("hash", super().__hash__())


class Reading(NamedTuple):
    """The key of a function and the tensors in its reach; without a key, the path to the cause."""

    key: Key | None
    tensors: list[Tensor]
    chain: list[Any]
    why: str


def key_of(f: Any) -> Reading:
    """Read what a function can reach; equal keys list their tensors in the same order."""
    x, at, objects, numbers, parents = f, 0, [f], {id(f): 0}, [0]
    key, tensors, functions, modules = list[Any](), list[Tensor](), list[Any](), list[Any]()
    objects_before = 0
    try:
        with unseen():  # because modes and subclasses must not see the reading
            kinds = ("cpu", "cuda") if uses_autocast() else ()
            key += [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]
            key += [torch.get_default_dtype(), default_device(), torch.is_grad_enabled()]
            for at, x in enumerate(objects):  # the list grows on the way
                kind = type(x)
                value, parts = _read(x, kind)
                key += (kind, value)
                for part in parts:
                    of_part = type(part)
                    if of_part in _CONSTANTS:
                        key += (of_part, part)
                    elif of_part is float:
                        key += (float, part.hex())
                    else:
                        number = numbers.get(id(part))
                        if number is None:
                            number = numbers[id(part)] = len(objects)
                            objects.append(part)
                            parents.append(at)
                            if number > _FAR:
                                raise TypeError("holds too many objects")
                        key.append(number)
                if kind is types.FunctionType:
                    functions.append(x)
                elif kind is Tensor or kind is nn.Parameter:
                    tensors.append(x)
                elif kind is types.ModuleType and owner(x.__name__) == "user":
                    modules.append(x)
                if modules and at + 1 == len(objects) and objects_before < len(numbers):
                    objects_before = len(numbers)
                    names = {name: None for f in functions for name in names_in(f)}
                    if not BY_NAME.isdisjoint(names) or not GETTERS.isdisjoint(numbers):
                        x, at = modules[0], numbers[id(modules[0])]
                        raise TypeError("may be read by names that are made at run time")
                    for module in modules:  # of which the attributes count that code names
                        objects.append({name: vars(module)[name] for name in names if name in vars(module)})
                        parents.append(numbers[id(module)])
            return Reading(Key(key), tensors, [], "")
    except Exception as error:  # it is not plain, or does not let itself be read, or has no hash
        chain = [x]
        while at:
            at = parents[at]
            chain += [objects[at]] * (id(objects[at]) in numbers)
        return Reading(None, tensors, chain[::-1], str(error))


def _read(x: Any, kind: Any) -> tuple[Any, Any]:
    """Give what an object is by value, and its parts."""
    if kind is types.FunctionType:
        return _read_function(x)
    if kind is dict or kind is OrderedDict or kind is defaultdict:
        own = None if kind is dict else x.__dict__ or None if kind is OrderedDict else x.default_factory
        parts = x.values() if own is None else (own, *x.values())
        return (tuple(x), parts) if {*map(type, x)} <= {str} else (len(x), (*x, *parts))
    if kind in _SEQUENCES:
        return (len(x), getattr(x, "maxlen", None)), x
    if kind is Tensor or kind is nn.Parameter:
        layout = x.stride() if x.layout is torch.strided else x.layout
        return (x.dtype, x.shape, layout, x.device, x.requires_grad, x.is_leaf), (x.__dict__ or None,)
    if kind in _PARTS:
        return (), [getattr(x, name) for name in _PARTS[kind]]
    if kind is weakref.ref:
        return (), (x(),)
    if kind is _CACHE:
        bounded = x.cache_parameters()["maxsize"] is not None  # and has a dict of its own kind
        return (), [[part for part in gc.get_referents(x) if not bounded or type(part) is not dict]]
    if (kind is np.ndarray or issubclass(kind, np.generic)) and not x.dtype.hasobject:
        return (x.dtype, x.shape, hashlib.sha256(x.tobytes()).digest()), ()
    if issubclass(kind, types.ModuleType):
        lazy = kind is not types.ModuleType or "__getattr__" in vars(x)
        if owner(x.__name__) == "frozen" or (owner(x.__name__) == "user" and not lazy):
            return x, ()
    elif kind in _IN_C:
        bound, home = getattr(x, "__self__", None), getattr(x, "__module__", None) or "builtins"
        if not isinstance(bound, types.ModuleType | None):
            return x.__name__, (bound,)
        if owner(home) == "frozen" and x.__name__ not in HIDDEN:
            return x, ()
    elif issubclass(kind, type):
        return _read_class(x)
    elif issubclass(kind, tuple) and kind.__bases__[0] is tuple and not kind.__dictoffset__:
        return len(x), (kind, *x)  # a NamedTuple
    elif _is_ordinary(kind):
        return (), (kind, object.__getstate__(x))
    raise TypeError


@functools.lru_cache(4096)
def _is_ordinary(kind: type) -> bool:
    """Tell whether all that an instance holds is in its `__dict__` and slots: nothing is made in C."""
    if "standard" in {owner(cls.__module__) for cls in kind.__mro__}:
        return False
    if issubclass(kind, enum.Enum):
        return vars(kind)["_member_type_"] in (object, int, str)
    slots = [v for cls in kind.__mro__ for v in vars(cls).values() if type(v) is types.MemberDescriptorType]
    words = len(slots) + (kind.__weakrefoffset__ > 0) + (kind.__dictoffset__ > 0)
    in_python = all(cls is object or cls.__flags__ & 1 << 9 for cls in kind.__mro__)
    return in_python and kind.__basicsize__ == object.__basicsize__ + 8 * words and not kind.__itemsize__


def _read_class(x: type) -> tuple[Any, Any]:
    """Read what a class of the user's and its bases define, but for what a dataclass generates."""
    if owner(x.__module__) == "frozen" and (x.__module__ != "types" or x in vars(types).values()):
        return x, ()
    if type(x) not in _METACLASSES or owner(x.__module__) == "standard":
        raise TypeError
    fields = vars(x).get("__dataclass_fields__", {}).values()
    own = {name: value for name, value in vars(x).items() if name not in _NOT_STATE}
    for name, value in [*own.items()] if fields else ():
        if type(value) is types.FunctionType and value.__code__.co_filename == "<string>":
            del own[name]  # it names the types of the fields
    parts = [part for field in fields for part in (field.default, field.default_factory)]
    return (x, len(x.__bases__), *own), (*x.__bases__, *own.values(), *parts)


def _read_function(f: types.FunctionType) -> tuple[Any, Any]:
    """Read code, defaults, attributes and cells, and the globals and imports that the code names."""
    scope, rest = f.__globals__, (f.__defaults__, f.__kwdefaults__, f.__dict__ or None)
    parts: list[Any] = [] if rest == (None, None, None) else [*rest]
    for cell in f.__closure__ or ():
        parts += gc.get_referents(cell) or [...]  # it may be empty
    home = owner(scope.get("__name__"))
    if home == "frozen" and f.__name__ not in HIDDEN:
        return (f.__code__, len(parts)), parts
    names = names_in(f)
    if home != "user" or not HIDDEN.isdisjoint(names):
        raise TypeError("may read what it does not name")
    found = tuple([name for name in names if name in scope])
    parts += [*[scope[name] for name in found], *imports_in(f)]
    return (f.__code__, found, len(parts)), parts
