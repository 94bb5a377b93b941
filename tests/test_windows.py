"""Native loops on Windows, by what it lacks and refuses. No test runs there."""

import _ctypes
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

import gdfunc as gd
from gdfunc._scan.backends import _cache
from gdfunc._scan.backends.native import _build, _process, _target

LACKS = {"geteuid", "getuid", "killpg", "RTLD_NOW", "RTLD_LOCAL", "O_DIRECTORY", "getpgid", "setsid"}


class Windows:
    """The failures of Windows: no modes, directories that are no files, loaded libraries that stay."""

    def __init__(self, monkeypatch, tmp_path):
        self.loaded, self.held, self.ended = set(), 0, []
        system = SimpleNamespace(**{name: value for name, value in vars(os).items() if name not in LACKS})
        system.name, system.open, system.fsync, system.replace = "nt", self.open, self.fsync, self.replace
        for module in (_cache, _build, _process, _target):
            monkeypatch.setattr(module, "os", system)
        close = _ctypes.dlclose
        monkeypatch.setattr(_build, "_ctypes", SimpleNamespace(FreeLibrary=close))
        monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(_cache, "_WAITS", (0.0, 0.0, 0.0))

    def open(self, path, flags):
        if Path(path).is_dir():
            raise PermissionError(13, "Permission denied", path)
        self.writes = flags & os.O_RDWR
        return os.open(path, flags)

    def fsync(self, file):
        if not self.writes:
            raise OSError(9, "Bad file descriptor")

    def replace(self, source, target):
        if self.held or str(target) in self.loaded:
            self.held = max(0, self.held - 1)
            raise PermissionError(13, "Access is denied", str(target))
        os.replace(source, target)


@pytest.fixture
def windows(monkeypatch, tmp_path):
    directory = tmp_path / "Ünï cødé name"
    directory.mkdir()
    return Windows(monkeypatch, directory)


def dll(target=None):
    """Compile with this machine's compiler what would be a DLL."""
    target = target or replace(_target.probe(["gcc"]), system="Windows")
    return _build.build("int answer(void) { return 7; }", target)


@pytest.fixture
def linked_here(monkeypatch):
    """Make a library of this machine with the name of one for Windows."""
    commands = _build._commands
    monkeypatch.setattr(
        _build, "_commands", lambda target, *rest: commands(replace(target, system="Linux"), *rest)
    )


@pytest.mark.usefixtures("linked_here")
def test_windows_keeps_libraries_below_the_users_local_data(windows, tmp_path):
    assert dll().answer() == 7
    (library,) = tmp_path.rglob("*.dll")
    assert library.parent == tmp_path / "Ünï cødé name" / "gdfunc" / "native"
    library.chmod(0o666)  # as every file on Windows seems
    with mock.patch.object(_build, "_compile", side_effect=AssertionError("compiled again")):
        assert dll().answer() == 7
    _cache.trim(library.parent, 0)
    assert not list(library.parent.iterdir())


@pytest.mark.usefixtures("linked_here")
def test_an_antivirus_that_holds_a_new_library_is_waited_for_and_then_named(windows):
    windows.held = 3
    assert dll().answer() == 7
    windows.held = 1000
    target = replace(_target.probe(["gcc", "-DOTHER"]), system="Windows")
    with pytest.raises(
        gd.BackendError, match=r"cannot be written \(Access is denied\); let the antivirus.*LOCALAPPDATA"
    ):
        dll(target)


@pytest.mark.usefixtures("linked_here")
def test_a_library_that_another_process_loaded_meanwhile_is_used(windows, monkeypatch, tmp_path):
    dll()
    (library,) = tmp_path.rglob("*.dll")
    before = library.stat().st_mtime_ns, library.read_bytes()
    windows.loaded.add(str(library))
    sound = [False]  # not there at first
    real = _build.is_sound
    monkeypatch.setattr(_build, "is_sound", lambda path: sound.pop() if sound else real(path))
    assert dll().answer() == 7
    assert library.read_bytes() == before[1]


def test_windows_asks_zig_alone_unless_CC_names_a_compiler(windows, monkeypatch):
    monkeypatch.setattr(_target, "find_spec", lambda name: name == "ziglang")
    assert _target._usual() == [[sys.executable, "-m", "ziglang", "cc", "-target", "x86_64-windows-gnu"]]
    monkeypatch.setattr(_target, "find_spec", lambda name: None)
    assert _target._usual() == []


def test_CC_on_windows_may_have_backslashes_and_spaces(windows):
    words = _target._words(r'"C:\Program Files\LLVM\bin\clang.exe" -O2')
    assert words == [r"C:\Program Files\LLVM\bin\clang.exe", "-O2"]


def test_windows_ends_all_processes_of_a_compiler_by_its_own_command(windows, monkeypatch):
    run = mock.Mock()
    monkeypatch.setattr(_process.subprocess, "run", run)
    _process._end(SimpleNamespace(pid=123))
    assert run.call_args[0][0] == ["taskkill", "/F", "/T", "/PID", "123"]
