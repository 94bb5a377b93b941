"""From C to a function: the compiler, its flags, and the directory of what was compiled before."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from ..._errors import BackendError
from .._cache import private_directory

# Nothing that changes a number: neither -ffast-math nor what it stands for. Products and sums are fused in
# contractions alone, where the code asks for it.
_FLAGS = [
    *("-O3", "-march=native", "-std=gnu11", "-fPIC", "-shared", "-w"),
    *("-fwrapv", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    *("-fopenmp-simd", "-fno-strict-aliasing"),
]
_WIDE = ["-mprefer-vector-width=512"]
_VECTOR_MATH = ["-DVECTOR_MATH", "-lmvec"]


def build(text: str) -> ctypes.CDLL:
    """Compile C, or find it compiled.

    Raises:
        BackendError: there is no compiler, it fails, or there is no safe directory.
    """
    compiler, version = _compiler()
    directory = private_directory() / "native"
    directory.mkdir(mode=0o700, exist_ok=True)
    name = hashlib.sha256("\0".join([text, version, *_flags(), _processor()]).encode()).hexdigest()
    path = directory / f"{name}.so"
    if not path.exists():
        _compile(compiler, text, path)
    return ctypes.CDLL(str(path))


def _compile(compiler: str, text: str, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        source, made = Path(directory) / "loop.c", Path(directory) / "loop.so"
        source.write_text(text)
        for more in _attempts():
            command = [compiler, *_flags(), str(source), "-o", str(made), *more, "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0 and _loads(made):
                os.replace(made, path)
                return
    reason = next((line for line in done.stderr.splitlines() if "error" in line), "it cannot be loaded")
    raise BackendError(f"{compiler} cannot compile this loop ({reason}); use backend='inductor' or 'eager'")


def _attempts() -> list[list[str]]:
    """With the C library's functions of whole vectors first, where it may have them."""
    library, version = platform.libc_ver()
    numbers = [int(number) for number in version.split(".")[:2] if number.isdigit()]
    has = platform.machine() == "x86_64" and library == "glibc" and numbers >= [2, 35]
    return [_VECTOR_MATH, []] if has else [[]]


def _loads(path: Path) -> bool:
    try:
        ctypes.CDLL(str(path), mode=os.RTLD_NOW)
    except OSError:
        return False
    return True


def _flags() -> list[str]:
    return [*_FLAGS, *(_WIDE if platform.machine() == "x86_64" else [])]


@cache
def _compiler() -> tuple[str, str]:
    """The C compiler and its version."""
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        path = shutil.which(name) if name else None
        if path and os.name == "posix":
            done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
            if done.returncode == 0:
                return path, done.stdout
    raise BackendError(
        "backend='native' needs a C compiler, and none was found: install gcc or clang (Debian: "
        "apt install gcc; macOS: xcode-select --install), or name it in the environment variable CC"
    )


@cache
def _processor() -> str:
    """What -march=native means here: a home directory may be shared by machines."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    kept = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    return "\n".join(dict.fromkeys(kept)) or f"{platform.machine()} {platform.processor()}"
