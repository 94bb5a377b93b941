"""What code names, and which modules are libraries, that do not change at run time."""

import dis
import functools
import os
import sys
import types
from typing import Any, NamedTuple


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


class Names(NamedTuple):
    """What a code, and those within it, name: globals or attributes, and modules to import."""

    names: dict[str, None]
    imports: list[str]
    more: bool  # whether they may read globals or the environment by names of their making


@functools.lru_cache(4096)
def names_in(code: types.CodeType) -> Names:
    """Read off what a code names."""
    names, imports = dict.fromkeys(code.co_names), []
    steps = [step for step in dis.get_instructions(code) if step.opname != "EXTENDED_ARG"]
    for level, step in zip(steps, steps[2:], strict=False):
        if step.opname == "IMPORT_NAME":
            imports += ["." * level.argval + step.argval, step.argval.partition(".")[0]]
    more = not _INDIRECT.isdisjoint(names) or {"sys", "modules"} <= {*names}
    more |= "builtins" in {*names, *code.co_freevars} and not _BY_NAME.isdisjoint(names)
    # As a global, not as an attribute of that name.
    more |= any(step.opname in ("LOAD_GLOBAL", "LOAD_NAME") and step.argval in _BY_NAME for step in steps)
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            within = names_in(inner)
            names |= within.names
            imports += within.imports
            more |= within.more
    return Names(names, [name for name in imports if name], more)


_BY_NAME = {"globals", "vars", "locals", "eval", "exec", "__import__"}
_INDIRECT = {"environ", "getenv", "import_module", "_getframe", "currentframe", "f_globals", "__globals__"}


def named(f: types.FunctionType) -> Names:
    """Tell what a function names, unless it is a library's by its globals: decorators copy `__module__`."""
    return _NONE if is_library(f.__globals__.get("__name__")) else names_in(f.__code__)


_NONE = Names({}, [], False)
