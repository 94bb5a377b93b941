"""The C compiler and the kind of machine it writes for. Both are asked of the compiler, not assumed.

A machine can so write and compile for another one: `probe(["zig", "cc", "-target", "aarch64-linux-musl"])`.
"""

import os
import platform
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from ...._errors import BackendError
from ._process import failure, run
from ._statement import Tiles

# For this processor, in the words of one compiler or another; the last for compilers that know neither.
_KINDS = (("-march=native",), ("-mcpu=native",), ())
# By the macro of the widest vectors. AVX-512 and NEON have 32 registers, AVX2 and SSE 16. SSE, the default,
# needs some of them for products, because it multiplies and adds in two instructions.
_TILES = {"__AVX512F__": Tiles(64, 24), "__AVX2__": Tiles(32, 12), "__aarch64__": Tiles(16, 24)}
_DEFAULT = Tiles(16, 8)
_SYSTEMS = {"_WIN32": "Windows", "__APPLE__": "macOS", "__linux__": "Linux"}
_MACOS = "14.0"  # the oldest that torch has wheels for
INSTALL = "pip install 'gdfunc[native]'" if os.name == "posix" else 'pip install "gdfunc[native]"'


class NoCompiler(BackendError):
    """No C compiler works on this machine."""


@dataclass(frozen=True)
class Target:
    """A C compiler, and the kind of machine that it writes for."""

    command: tuple[str, ...]  # with the options that choose the kind of machine
    macros: str  # which the compiler predefines: its version, the system, and what the processor has
    system: str
    tiles: Tiles
    vector_math: tuple[str, ...] = ()  # options by which C's functions take whole vectors, if there are any
    is_measured: bool = True  # whether the accuracy of these functions is known

    @property
    def suffix(self) -> str:
        """Return how the name of a library ends."""
        return ".dll" if self.system == "Windows" else ".so"

    @property
    def compiler(self) -> str:
        """Name the compiler and its version."""
        version = re.search('__VERSION__ "(.*)"', self.macros)
        name = version[1] if version else "of unknown version"
        return name if "lang" in name else f"gcc {name}"


@cache
def find() -> Target:
    """Find the C compiler that CC names, or the first of the usual ones that works.

    Raises:
        BackendError: CC names no compiler that works.
        NoCompiler: CC names none, and there is none.
    """
    setting = os.environ.get("CC", "")
    try:
        wanted = _words(setting)
    except ValueError as error:
        raise BackendError(
            f"CC={setting} cannot be split into words ({error}); correct its quotes"
        ) from error
    commands = [wanted] if wanted else _usual()
    reasons = []
    for command in commands:
        try:
            return probe(command)
        except BackendError as error:
            reasons.append(str(error))
    if wanted:
        raise BackendError(
            f"CC={setting} is no C compiler that works here: {reasons[0]}; name another, or none"
        )
    found = f"and none works ({'; '.join(reasons)})" if reasons else "and none was found"
    others = {
        "linux": "install gcc or clang (Debian: apt install gcc)",
        "darwin": "install clang (xcode-select --install)",
    }
    remedy = f"{others[sys.platform]}, or {INSTALL}" if sys.platform in others else INSTALL
    raise NoCompiler(
        f"backend='native' needs a C compiler, {found}: {remedy}; "
        f"or name one in the environment variable CC"
    )


def _words(setting: str) -> list[str]:
    """Split CC into words. A backslash is a part of a path on Windows."""
    if os.name == "posix":
        return shlex.split(setting)
    return [word.strip('"') for word in shlex.split(setting, posix=False)]


def _usual() -> list[list[str]]:
    """List the compilers to try in turn. On Windows zig alone has a C library that is good enough."""
    is_posix = os.name == "posix"
    found = [
        [name] for name in ("cc", "gcc", "clang") if is_posix and shutil.which(name) and not _is_stub(name)
    ]
    if find_spec("ziglang"):
        target = [] if is_posix else ["-target", "x86_64-windows-gnu"]
        found.append([sys.executable, "-m", "ziglang", "cc", *target])
    return found


def _is_stub(name: str) -> bool:
    """Tell whether a compiler of macOS would open a dialog that offers to install it."""
    is_apples = sys.platform == "darwin" and str(shutil.which(name)).startswith("/usr/bin/")
    return is_apples and run(["xcode-select", "-p"]).returncode != 0


def probe(command: Sequence[str]) -> Target:
    """Ask a compiler for what it writes code, by default for this processor.

    Raises:
        BackendError: the compiler does not work, or its C library is not good enough.
    """
    if not shutil.which(command[0]):
        raise BackendError(f"there is no {command[0]}")
    is_chosen = any(word.startswith(("-march=", "-mcpu=")) for word in command)
    with tempfile.TemporaryDirectory() as directory:
        empty = Path(directory) / "empty.c"
        empty.touch()
        for kind in ((),) if is_chosen else _KINDS:
            done = run([*command, *kind, "-dM", "-E", str(empty)])
            if done.returncode == 0:
                return _target((*command, *kind), done.stdout)
    raise BackendError(f"{shlex.join(command)} fails ({failure(done)})")


def _target(command: tuple[str, ...], macros: str) -> Target:
    names = set(re.findall(r"#define (\w+)", macros))
    system = next((system for macro, system in _SYSTEMS.items() if macro in names), "an unknown system")
    tiles = next((tiles for macro, tiles in _TILES.items() if macro in names), _DEFAULT)
    name, is_clang = shlex.join(command), "__clang__" in names
    if "_MSC_VER" in names:
        raise BackendError(f"{name} compiles for MSVC, which has another dialect of C; {INSTALL} works")
    if "__MINGW32__" in names and not is_clang:
        raise BackendError(f"{name} is MinGW's, whose sin, cos and erfc are inaccurate; {INSTALL} works")
    if system == "macOS":
        command = (*command, f"-mmacosx-version-min={_MACOS}")
        return Target(command, macros, system, tiles, ("-fveclib=Darwin_libsystem_m",), is_measured=False)
    if "__x86_64__" in names:
        command = (*command, "-mprefer-vector-width=512")
        library, version = platform.libc_ver()
        numbers = [int(number) for number in version.split(".")[:2] if number.isdigit()]
        if system == "Linux" and library == "glibc" and numbers >= [2, 35]:
            option = "-fveclib=libmvec" if is_clang else "-DVECTOR_MATH"
            return Target(command, macros, system, tiles, (option, "-lmvec"))
    return Target(command, macros, system, tiles)
