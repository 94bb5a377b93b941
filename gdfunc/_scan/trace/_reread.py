"""Reading the same things again, by code that is written for them: a walk is several times as slow.

After a walk it is known which cell, global or entry leads where, and what is there. So a function is
written that goes these ways one after the other, and gives up at the first thing that is not as it was. If
it comes to the end, a walk would give the same key: what a walk compares it compares too, or it asks for
the same object. It keeps nothing alive that the key does not.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from ._names import is_library, names_in
from ._readers import BITS, HIDDEN, Same, reader

# Gives the tensors and all objects, in the order of the walk; None if something is not as it was.
Rereader = Callable[[Any], tuple[list[Tensor], list[Any]] | None]
_LONGEST = 1000  # entries of a key: Python takes 10 µs to compile the code for one


def rereader(objects: Sequence[Any], key: Sequence[Any], ends: Sequence[int]) -> Rereader | None:
    """Write the code for a walk over these objects, of which the first is what it began with.

    The key begins with the settings. Of each object follow its kind, its value and its parts, to its end.
    """
    if len(key) > _LONGEST:
        return None
    told = [tuple(key[start:end]) for start, end in pairwise((1, *ends))]
    code, names = _Code(), list[str]()

    def meet(way: str, number: int) -> None:
        kind, value, *rest = told[number]
        if number < len(names):
            code.unless(f"{way} is {names[number]}")
        elif isinstance(value, Same) and not rest and not issubclass(kind, (type, ModuleType)):
            names.append(code.constant(objects[number]))  # nothing in it changes
            code.unless(f"{way} is {names[number]}")
        else:
            names.append(f"x{number}")
            code.lines.append(f"x{number} = {way}")
            code.unless(f"type(x{number}) is {code.constant(kind)}")

    meet("x0", 0)
    for x, it, (kind, value, *rest) in zip(names, objects, told, strict=False):  # the names grow on the way
        if not x.startswith("x"):
            continue
        parts = list(_parts(rest))
        ways_of = _module if issubclass(kind, ModuleType) else _WAYS.get(kind)
        ways = ways_of(code, x, it, value) if ways_of else None
        if ways is None:
            code.lines.append(f"value, parts = {code.constant(reader(kind))}({x})")
            code.unless(f"value == {code.constant(value)}")
            ways = code.unpacked(x, "parts", len(parts))
        for way, part in zip(ways, parts, strict=True):
            if isinstance(part, tuple):
                code.unless(code.is_constant(way, *part))
            else:
                meet(way, part)
    tensors = [name for name, (kind, *_) in zip(names, told, strict=True) if issubclass(kind, Tensor)]
    code.lines.append(f"objects = [{', '.join(names)}]")
    code.lines.append("numbers = {*map(id, objects)}")
    code.unless(f"len(numbers) == {len(objects)} and HIDDEN.isdisjoint(numbers)")
    return code.compiled(f"[{', '.join(tensors)}], objects")


def _parts(rest: Sequence[Any]) -> Iterator[Any]:
    """Split what a key tells of parts: numbers of objects, or kinds of constants, each with its value."""
    items = iter(rest)
    for item in items:
        yield (item, next(items)) if isinstance(item, type) else item


class _Code:
    """The lines of a function of x0, and the constants that they name."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.constants: dict[str, Any] = {"is_library": is_library, "HIDDEN": HIDDEN}

    def constant(self, value: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = value
        return name

    def unless(self, condition: str) -> None:
        self.lines.append(f"if not ({condition}): return None")

    def unpacked(self, x: str, way: str, size: int) -> list[str]:
        """Give names to so many parts; an error if there are more or fewer."""
        names = [f"{x}_{i}" for i in range(size)]
        self.lines.append(f"[{', '.join(names)}] = {way}")
        return names

    def is_constant(self, way: str, kind: type, value: Any) -> str:
        """The condition that a part is the constant that it was: of the same kind, and bit by bit."""
        if kind in BITS:
            return f"type(p := {way}) is {kind.__name__} and {self.constant(BITS[kind])}(p) == {value}"
        if kind in (int, str, bytes, torch.device):
            return f"type(p := {way}) is {self.constant(kind)} and p == {self.constant(value)}"
        return f"{way} is {self.constant(value)}"

    def compiled(self, result: str) -> Any:
        body = "".join(f"        {line}\n" for line in self.lines)
        text = (
            f"def again(x0):\n    try:\n{body}    except Exception:  # the walk finds out what it is\n"
            f"        return None\n    return {result}\n"
        )
        exec(text, self.constants)
        return self.constants.pop("again")  # lest they hold each other


# For the kinds that are met most: test that the value is as it was, and list the ways to the parts.
Ways = list[str] | None


def _function(code: _Code, x: str, f: Any, value: Any) -> Ways:
    was, bare, *found = value
    names, imports, _ = names_in(was)
    if imports:
        return None
    same = code.constant(was)
    code.unless(f"{x}.__code__ is {same} or {x}.__code__ == {same}")  # the latter takes its time
    ways = [f"{x}.__defaults__", f"{x}.__kwdefaults__", f"({x}.__dict__ or None)"]
    if bare:
        code.unless(f"{x}.__defaults__ is None and {x}.__kwdefaults__ is None and not {x}.__dict__")
        ways = []
    cells = code.unpacked(x, f"{x}.__closure__ or ()", len(was.co_freevars))
    ways += [f"{cell}.cell_contents" for cell in cells]  # an error if it is empty
    if names and not found:  # a library's, which never goes
        code.unless(f"{x}.__globals__ is {code.constant(f.__globals__)}")
    for present in found:
        absent = tuple(name for name in names if name not in present)
        code.lines.append(f"scope = {x}.__globals__")
        code.unless("not is_library(scope.get('__name__'))")
        code.unless(f"scope.keys().isdisjoint({code.constant(absent)})")
        ways += [f"scope[{name!r}]" for name in present]
    return ways


def _tensor(code: _Code, x: str, _: Any, value: Any) -> Ways:
    dtype, shape, strides, device, requires_grad, is_leaf = value
    if not isinstance(strides, tuple):
        return None
    code.unless(
        f"{x}.dtype is {code.constant(dtype)} and {x}.shape == {code.constant(shape)} and "
        f"{x}.layout is {code.constant(torch.strided)} and {x}.stride() == {strides} and "
        f"{x}.device == {code.constant(device)} and "
        f"{x}.requires_grad is {requires_grad} and {x}.is_leaf is {is_leaf}"
    )
    return [f"type({x})", f"({x}.__dict__ or None)"]


def _sequence(code: _Code, x: str, _: Any, value: Any) -> Ways:
    return code.unpacked(x, x, value)


def _dict(code: _Code, x: str, _: Any, value: Any) -> Ways:
    if not isinstance(value, tuple):  # keys of other kinds, which are parts
        return None
    if value:
        code.unless(f"{{*map(type, {x})}} == {{str}} and (*{x},) == {code.constant(value)}")
    return code.unpacked(x, f"{x}.values()", len(value))


def _module(code: _Code, x: str, it: Any, _: Any) -> Ways:
    code.unless(f"{x} is {code.constant(it)} and is_library(vars({x}).get('__name__'))")  # as it was
    return []


_WAYS: dict[type, Callable[[_Code, str, Any, Any], Ways]] = {
    FunctionType: _function,
    **dict.fromkeys((Tensor, Parameter), _tensor),
    **dict.fromkeys((list, tuple), _sequence),
    dict: _dict,
}
