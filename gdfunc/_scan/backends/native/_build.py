"""From C to a function: the compiler, its flags, and the directory of what was compiled before."""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from ...._errors import BackendError
from .._cache import private_directory

# Nothing that changes a number: neither -ffast-math nor what it stands for. Products and sums are fused in
# contractions alone, where the code asks for it.
_FLAGS = [
    *("-O3", "-march=native", "-std=gnu11", "-fPIC", "-shared", "-w"),
    *("-fwrapv", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    *("-fopenmp-simd", "-fno-strict-aliasing"),
]
_WIDE = ["-mprefer-vector-width=512"]
_VECTOR_MATH = {"gcc": ["-DVECTOR_MATH", "-lmvec"], "clang": ["-fveclib=libmvec", "-lmvec"]}


def build(text: str) -> ctypes.CDLL:
    """Compile C, or find it compiled.

    Raises:
        BackendError: there is no compiler, it fails, or there is no safe directory.
    """
    compiler, target = _compiler()
    directory = private_directory() / "native"
    key = "\0".join([text, target, *_flags(), *map(str, _attempts(target))])
    path = directory / f"{hashlib.sha256(key.encode()).hexdigest()}.so"
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        if _fault(path):
            _compile(compiler, _attempts(target), text, path)
    except OSError as error:
        raise BackendError(
            f"{directory} cannot be written ({error.strerror}); "
            f"set XDG_CACHE_HOME to a directory of your own"
        ) from error
    return ctypes.CDLL(str(path))


def _compile(compiler: list[str], attempts: list[list[str]], text: str, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        source, made = Path(directory) / "loop.c", Path(directory) / "loop.so"
        source.write_text(text)
        for more in attempts:
            done = _run([*compiler, *_flags(), str(source), "-o", str(made), *more, "-lm"])
            if not done.returncode and not _fault(made):
                os.replace(made, path)
                return
        errors = (line for line in done.stderr.splitlines() if "error" in line)
        reason = next(errors, f"it ends with {done.returncode}") if done.returncode else _fault(made)
    raise BackendError(
        f"{shlex.join(compiler)} cannot compile this loop ({reason}); use backend='inductor' or 'eager'"
    )


def _attempts(target: str) -> list[list[str]]:
    """With the C library's functions of whole vectors first, where it may have them."""
    library, version = platform.libc_ver()
    numbers = [int(number) for number in version.split(".")[:2] if number.isdigit()]
    has = platform.machine() == "x86_64" and library == "glibc" and numbers >= [2, 35]
    return [_VECTOR_MATH["clang" if "__clang__" in target else "gcc"], []] if has else [[]]


def _fault(path: Path) -> str:
    """Why a library cannot be loaded, if it cannot."""
    try:
        ctypes.CDLL(str(path), mode=os.RTLD_NOW)
    except OSError as error:
        return f"{error}; where programs may not run, set XDG_CACHE_HOME to another directory"
    return ""


def _flags() -> list[str]:
    return [*_FLAGS, *(_WIDE if platform.machine() == "x86_64" else [])]


@cache
def _compiler() -> tuple[list[str], str]:
    """The C compiler, and the macros that it defines.

    They tell its version and what -march=native means here: a home directory may be shared by machines.
    """
    if os.name != "posix":
        raise BackendError(
            "backend='native' is written for Linux and macOS, not for Windows; use backend='inductor' or "
            "'eager', or Linux on Windows (WSL)"
        )
    asked = shlex.split(os.environ.get("CC", ""))
    named = [asked] if asked else [["cc"], ["gcc"], ["clang"]]
    found = [command for command in named if shutil.which(command[0])]
    if not asked and find_spec("ziglang"):
        found.append([sys.executable, "-m", "ziglang", "cc"])
    for command in found:
        done = _run([*command, *_flags(), "-dM", "-E", "-x", "c", os.devnull])
        if done.returncode == 0:
            return command, done.stdout
    if asked:
        raise BackendError(
            f"CC={shlex.join(asked)} is no C compiler that works here: name another, or none"
        )
    raise BackendError(
        "backend='native' needs a C compiler, and none was found: install gcc or clang (Debian: "
        "apt install gcc; macOS: xcode-select --install; elsewhere: pip install 'gdfunc[native]'), or name "
        "it in the environment variable CC"
    )


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    # What zig keeps is linked into what is run: it belongs in the private directory as well.
    cache = str(private_directory() / "zig")
    environment = os.environ | {"ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, errors="replace"
    )
