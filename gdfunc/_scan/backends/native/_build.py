"""Compiling C and loading it, and the directory of compiled libraries."""

import _ctypes
import ctypes
import hashlib
import os
import shlex
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from importlib.resources import files
from pathlib import Path
from weakref import finalize

from ...._errors import BackendError
from .._cache import discard, is_sound, private_directory, remedy, store, trim, unwritable
from ._process import failure, run
from ._program import FUNCTIONS
from ._target import Target

# Nothing that changes a number: neither -ffast-math nor what it stands for. Products and sums are fused in
# contractions alone, where the code asks for it.
_FLAGS = [
    *("-O3", "-std=gnu11", "-w", "-fwrapv", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    *("-fopenmp-simd", "-fno-strict-aliasing"),
]
_MOST_UNITS = 4.0  # in the last place, by which a function of whole vectors may be off
_ACCURACY = files(__package__).joinpath("accuracy.c").read_text(encoding="utf-8")


class Library(ctypes.CDLL):
    """A shared library that is unloaded when it is garbage-collected."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        close = getattr(_ctypes, "dlclose" if os.name == "posix" else "FreeLibrary")
        # A thread of the loop may still run in it when the interpreter exits.
        finalize(self, close, self._handle).atexit = False


def build(text: str, target: Target) -> Library:
    """Compile C, or load the library that an earlier call compiled.

    Raises:
        BackendError: the compiler fails, or there is no safe directory.
    """
    return _build(text, target, [target.vector_math, ()] if has_vector_math(target) else [()])


@cache
def has_vector_math(target: Target) -> bool:
    """Tell whether C's functions of whole vectors are accurate here, from a test if that is not known."""
    if target.is_measured:
        return bool(target.vector_math)
    try:
        library = _build(f"{FUNCTIONS}\n{_ACCURACY}", target, [target.vector_math])
    except BackendError:  # the compiler or the system does not have them
        return False
    library.units.restype = ctypes.c_double
    return bool(library.units() <= _MOST_UNITS)


def _build(text: str, target: Target, attempts: Sequence[Sequence[str]]) -> Library:
    directory = private_directory() / "native"
    key = "\0".join([text, target.macros, *target.command, *_FLAGS, *map(str, attempts)])
    path = directory / f"{hashlib.sha256(key.encode()).hexdigest()}{target.suffix}"
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        if is_sound(path):
            with suppress(OSError):  # made for a C library that this system no longer has
                return Library(path)
        return _compile(text, target, attempts, path)
    except OSError as error:
        raise unwritable(directory, error) from error


def _compile(text: str, target: Target, attempts: Sequence[Sequence[str]], path: Path) -> Library:
    with tempfile.TemporaryDirectory(dir=path.parent, ignore_cleanup_errors=True) as directory:
        source, made = Path(directory) / "loop.c", Path(directory) / f"loop{target.suffix}"
        source.write_text(text, encoding="utf-8")
        for options in attempts:
            runs = map(run, _commands(target, options, source, made))
            failed = next((done for done in runs if done.returncode), None)
            if failed or not made.exists():
                reason = failure(failed) if failed else "it writes no library"
                continue
            store(made, path)
            try:
                library = Library(path)
            except OSError as error:
                discard(path)
                reason = f"{error}; where programs may not run, {remedy()}"
                continue
            trim(path.parent)
            return library
    raise BackendError(
        f"{shlex.join(target.command)} cannot compile this loop ({reason}); "
        f"use backend='inductor' or 'eager'"
    )


def _commands(target: Target, options: Sequence[str], source: Path, made: Path) -> list[list[str]]:
    """List the commands that make a library."""
    command, text = [*target.command, *_FLAGS], str(source)
    if target.system != "Windows":
        return [[*command, "-fPIC", "-shared", text, "-o", str(made), *options, "-lm"]]
    # Because zig compiles MinGW's runtime for a library that uses it, which takes it minutes, a library for
    # Windows uses functions.c and the system's C library alone.
    object_file = str(source.with_suffix(".o"))
    link = ["-shared", "-nostdlib", object_file, "-o", str(made), "-lucrtbase"]
    return [[*command, "-c", text, "-o", object_file, *options], [*target.command, *link]]
