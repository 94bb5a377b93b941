"""Names in the code of a function, and the owners of modules."""

import functools
import operator
import os
import sys
import types
from typing import Any

# Modules that do not change while a program runs. Other standard modules read files and settings.
_FROZEN = {"torch", "numpy", "gdfunc", "_pytest", "builtins", "math", "cmath", "functools", "itertools"}
_FROZEN |= {"operator", "abc", "enum", "types", "typing", "collections", "dataclasses", "numbers", "copy"}
_FROZEN |= {"contextlib", "warnings", "fractions", "statistics", "bisect", "heapq", "reprlib", "time"}
_FROZEN |= {"datetime", "random", "uuid", "_operator", "_functools", "_collections", "_abc"}
_STANDARD = os.path.dirname(os.__file__)
# Code with these names may read what it does not name: anything, or any attribute of a module.
HIDDEN = {"globals", "eval", "exec", "open", "__import__", "__globals__", "__builtins__", "f_globals"}
HIDDEN |= {"f_back", "backends"}  # the last are torch's settings
# Libraries read files, settings and counts of writes under these names.
HIDDEN |= {"load", "loadtxt", "genfromtxt", "fromfile", "memmap", "get_state", "geterr", "initial_seed"}
HIDDEN |= {"get_rng_state", "get_num_threads", "are_deterministic_algorithms_enabled", "_version"}
HIDDEN |= {"storage_offset", "register_module_forward_hook"}
# Modules that give something else at each call, under these names.
_OUTSIDE = {"time", "datetime", "secrets", "uuid", "os"}
_CLOCKS = {"time", "time_ns", "monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns", "now"}
_CLOCKS |= {"process_time", "process_time_ns", "thread_time", "thread_time_ns", "utcnow", "today"}
_CLOCKS |= {"urandom", "getrandom", "randbelow", "randbits", "token_bytes", "token_hex", "uuid1", "uuid4"}
BY_NAME = {"getattr", "hasattr", "setattr", "delattr", "vars", "dir", "format", "format_map", "attrgetter"}
BY_NAME |= {"methodcaller", "__dict__", "__dir__", "__getattr__", "__getattribute__", "__reduce_ex__"}
GETTERS = {*map(id, (getattr, hasattr, vars, dir, operator.attrgetter, operator.methodcaller))}


@functools.cache
def owner(module: Any) -> str:
    """Tell by its name whose a module is; a script may shadow a standard one."""
    root = module.partition(".")[0] if isinstance(module, str) else ""
    file = getattr(sys.modules.get(root), "__file__", None) or _STANDARD
    if root in sys.stdlib_module_names:
        return "user" if not file.startswith(_STANDARD) else "frozen" if root in _FROZEN else "standard"
    return "frozen" if root in _FROZEN else "user"


def reads_a_clock(f: types.FunctionType) -> bool:
    """Tell whether the code of a function names a clock, or a source of random numbers outside Python."""
    names = names_in(f)
    for value in [f.__globals__[name] for name in names if name in f.__globals__]:
        is_scope = isinstance(value, types.ModuleType | type)
        home = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", "")
        called = names.keys() if is_scope else {getattr(value, "__name__", "")}
        if home in _OUTSIDE and not _CLOCKS.isdisjoint(called):
            return True
    return False


def opens_a_file(f: types.FunctionType) -> bool:
    """Tell whether the code of a function names `open`."""
    return "open" in names_in(f) and f.__globals__.get("open", open) is open


def names_in(f: types.FunctionType) -> dict[str, None]:
    """List what the code of a function names, or nothing for one of a frozen library's."""
    return {} if owner(f.__globals__.get("__name__")) == "frozen" else _names(f.__code__)


@functools.lru_cache(4096)
def _names(code: types.CodeType) -> dict[str, None]:
    names = dict.fromkeys(part for name in code.co_names for part in (name, name.partition(".")[0]))
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            names |= _names(const)
        elif isinstance(const, tuple):  # it may be the pattern of a `match`
            names |= dict.fromkeys(name for name in const if isinstance(name, str))
    return names


def imports_in(f: types.FunctionType) -> list[types.ModuleType]:
    """List the modules, other than frozen ones, that a function may import where it runs."""
    names, modules = names_in(f), []
    homes, package = [""], f.__globals__.get("__package__") or ""
    while package:
        homes, package = [*homes, f"{package}."], package.rpartition(".")[0]
    for path in [home + name for home in homes for name in names if home + name in sys.modules]:
        # The other names tell a standard module from an attribute of its name, such as `np.array`.
        used = [name for name in names if name != path and name in vars(sys.modules[path])]
        if owner(path) == "user" or (owner(path) == "standard" and used):
            modules.append(sys.modules[path])
    return modules
