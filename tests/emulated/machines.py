"""Other machines, on which an emulator runs the C of native loops, while Python and torch stay here."""

import ctypes
import subprocess
import sys
from importlib.util import find_spec
from math import prod
from pathlib import Path
from shutil import which

import pytest

from gdfunc._scan.backends.native import _build, _process, _target
from gdfunc._scan.backends.native._program import write

HARNESS = Path(__file__).with_name("harness.c")
ZIG = [sys.executable, "-m", "ziglang", "cc"]
WINE = "/usr/lib/wine/wine64"  # what Debian's wine64 installs
QEMU = ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"]  # with the C library of the cross compiler
CROSS = "aarch64-linux-gnu-gcc"
DLLS = ["-lucrtbase", "-lkernel32"]
# By name: the compiler of the loops, the emulator, and how the harness is compiled. zig would take minutes
# for MinGW's runtime, so the harness is linked without it.
MACHINES = {
    "aarch64 Linux, gcc": ([CROSS], QEMU, [[CROSS, "-w", str(HARNESS), "-o", "harness", "-ldl"]]),
    "aarch64 Linux, zig": (
        [*ZIG, "-target", "aarch64-linux-gnu.2.36"],
        QEMU,
        [[CROSS, "-w", str(HARNESS), "-o", "harness", "-ldl"]],
    ),
    "x86-64 Windows, zig": (
        [*ZIG, "-target", "x86_64-windows-gnu"],
        [WINE],
        [
            [*ZIG, "-target", "x86_64-windows-gnu", "-O1", "-w", "-c", str(HARNESS), "-o", "harness.o"],
            [*ZIG, "-target", "x86_64-windows-gnu", "-nostdlib", "harness.o", "-o", "harness", *DLLS],
        ],
    ),
}


def needs(*tools):
    """Skip a test by the names of the tools that are missing."""
    missing = [tool for tool in tools if not (find_spec(tool) if tool == "ziglang" else which(tool))]
    if missing:
        pytest.skip(f"{' and '.join(missing)} missing")


class Machine:
    """A machine of another kind: what compiles for it, and what runs its programs here."""

    def __init__(self, name, directory):
        compiler, self.emulator, commands = MACHINES[name]
        needs(*{compiler[0], self.emulator[0], CROSS if "Linux" in name else "ziglang"})
        if compiler[0] == sys.executable:
            needs("ziglang")
        self.directory, self.loops, self.built = directory, 0, None
        self.target = _target.probe(compiler)
        for command in commands:
            done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
        (self.program,) = [
            path for path in directory.iterdir() if path.stem == "harness" and path.suffix in ("", ".exe")
        ]

    def compiled(self, body):
        """Make the function that runs the loop over a body there."""
        return Remote(self, body)

    def build(self, text):
        """Compile a loop as the package does, unless it was the last one."""
        if text == self.built:
            return
        source, made = self.directory / "loop.c", self.directory / f"loop{self.target.suffix}"
        source.write_text(text)
        for command in _build._commands(self.target, (), source, made):
            done = _process.run(command)
            assert done.returncode == 0, done.stderr
        self.built = text

    def run(self, head, memories):
        """Run the loop that was built last; return its result and the memories."""
        self.directory.joinpath("in.bin").write_bytes(head + b"".join(memories))
        environment = {
            "WINEDEBUG": "-all",
            "WINEPREFIX": str(self.directory / "wine"),
            "PATH": "/usr/bin:/bin",
        }
        subprocess.run(
            [*self.emulator, self.program], cwd=self.directory, env=environment, check=True, timeout=300
        )
        self.loops += 1
        return self.directory.joinpath("out.bin").read_bytes()


class Remote:
    """A loop that another machine runs, with the call of native's `_Function`."""

    def __init__(self, machine, body):
        self.machine, self.text = machine, write(body, machine.target.tiles)
        avals = (*body.consts, *body.carry, *body.x, *body.y)
        self.bytes = [prod(aval.shape) * aval.dtype.itemsize for aval in avals]

    def __call__(self, starts, strides, size, length):
        if not length:
            return
        self.machine.build(self.text)
        member, time = (list(column) for column in strides)
        extents = [
            length * step if step else size * each if each else alone
            for alone, each, step in zip(self.bytes, member, time, strict=True)
        ]
        numbers = [len(starts), size, length]
        numbers += [number for row in zip(extents, member, time, strict=True) for number in row]
        head = (ctypes.c_int64 * len(numbers))(*numbers)
        memories = [ctypes.string_at(start, extent) for start, extent in zip(starts, extents, strict=True)]
        out = self.machine.run(bytes(head), memories)
        assert int.from_bytes(out[:8], "little", signed=True) == -1
        place = 8
        for start, extent in zip(starts, extents, strict=True):
            ctypes.memmove(start, out[place : place + extent], extent)
            place += extent
