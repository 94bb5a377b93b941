"""Compiling C and loading it: the compiler, its flags, and the directory of compiled libraries."""

import _ctypes
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from weakref import finalize

from ...._errors import BackendError
from .._cache import is_sound, private_directory, store, trim, unwritable

# Nothing that changes a number: neither -ffast-math nor what it stands for. Products and sums are fused in
# contractions alone, where the code asks for it.
_FLAGS = [
    *("-O3", "-march=native", "-std=gnu11", "-fPIC", "-shared", "-w"),
    *("-fwrapv", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    *("-fopenmp-simd", "-fno-strict-aliasing"),
    *(["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []),
]
_PATIENCE = 600  # seconds for one run of the compiler


class Library(ctypes.CDLL):
    """A shared library that is unloaded when it is garbage-collected."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), mode=os.RTLD_NOW)
        # A thread of the loop may still run in it when the interpreter exits.
        finalize(self, _ctypes.dlclose, self._handle).atexit = False


def build(text: str) -> Library:
    """Compile C, or load the library that an earlier call compiled.

    Raises:
        BackendError: there is no compiler, it fails, or there is no safe directory.
    """
    compiler, target = _compiler()
    directory = private_directory() / "native"
    key = "\0".join([text, target, *_FLAGS, *map(str, _attempts(target))])
    path = directory / f"{hashlib.sha256(key.encode()).hexdigest()}.so"
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        if is_sound(path):
            with suppress(OSError):  # made for a C library that this system no longer has
                return Library(path)
        return _compile(compiler, _attempts(target), text, path)
    except OSError as error:
        raise unwritable(directory, error) from error


def _compile(compiler: list[str], attempts: list[list[str]], text: str, path: Path) -> Library:
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        source, made = Path(directory) / "loop.c", Path(directory) / "loop.so"
        source.write_text(text)
        for more in attempts:
            done = _run([*compiler, *_FLAGS, str(source), "-o", str(made), *more, "-lm"])
            if done.returncode:
                errors = (line for line in done.stderr.splitlines() if "error" in line)
                reason = next(errors, f"it ends with {done.returncode}")
                continue
            try:
                library = Library(made)
            except OSError as error:
                reason = f"{error}; where programs may not run, set XDG_CACHE_HOME to another directory"
                continue
            store(made, path)
            trim(path.parent)
            return library
    raise BackendError(
        f"{shlex.join(compiler)} cannot compile this loop ({reason}); use backend='inductor' or 'eager'"
    )


def _attempts(target: str) -> list[list[str]]:
    """List the options to try in turn: first those for the C library's functions of whole vectors."""
    library, version = platform.libc_ver()
    numbers = [int(number) for number in version.split(".")[:2] if number.isdigit()]
    has = platform.machine() == "x86_64" and library == "glibc" and numbers >= [2, 35]
    option = "-fveclib=libmvec" if "__clang__" in target else "-DVECTOR_MATH"
    return [[option, "-lmvec"], []] if has else [[]]


@cache
def _compiler() -> tuple[list[str], str]:
    """Find the C compiler, and the macros that it defines.

    The macros tell its version and the meaning of -march=native here: machines may share a home directory.
    """
    if os.name != "posix":
        raise BackendError(
            "backend='native' is written for Linux and macOS, not for Windows; use backend='inductor' or "
            "'eager', or Linux on Windows (WSL)"
        )
    try:
        wanted = shlex.split(os.environ.get("CC", ""))
    except ValueError as error:
        raise BackendError(
            f"CC={os.environ['CC']} cannot be split into words ({error}); correct its quotes"
        ) from error
    named = [wanted] if wanted else [["cc"], ["gcc"], ["clang"]]
    found = [command for command in named if shutil.which(command[0])]
    if not wanted and find_spec("ziglang"):
        found.append([sys.executable, "-m", "ziglang", "cc"])
    for command in found:
        done = _run([*command, *_FLAGS, "-dM", "-E", "-x", "c", os.devnull])
        if done.returncode == 0:
            return command, done.stdout
    if wanted:
        raise BackendError(
            f"CC={shlex.join(wanted)} is no C compiler that works here: name another, or none"
        )
    raise BackendError(
        "backend='native' needs a C compiler, and none was found: install gcc or clang (Debian: "
        "apt install gcc; macOS: xcode-select --install; elsewhere: pip install 'gdfunc[native]'), or name "
        "it in the environment variable CC"
    )


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a compiler in a session of its own, so that all its processes can be ended together."""
    # zig links files from its cache into the library, so they belong in the private directory as well.
    cache = str(private_directory() / "zig")
    environment = os.environ | {"ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache}
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            output, errors = process.communicate(timeout=_PATIENCE)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            raise BackendError(
                f"{command[0]} has not finished after {_PATIENCE} s and was stopped; name another compiler "
                f"in CC, or use backend='inductor' or 'eager'"
            ) from error
    return subprocess.CompletedProcess(command, process.returncode, output, errors)
