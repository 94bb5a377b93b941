"""How native loops are compiled and kept: other compilers, and all that can go wrong on the way."""

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from shutil import which
from types import SimpleNamespace

import pytest
import torch

from gdfunc._errors import BackendError
from gdfunc._scan.backends import native
from gdfunc._scan.backends.native import _build

from . import test_native as bodies

pytestmark = pytest.mark.skipif(os.name != "posix", reason="is refused there")

C = "int answer(void) {{ return {}; }}\n"


@pytest.fixture(autouse=True)
def _compiler_is_sought_anew():
    _build._compiler.cache_clear()
    yield
    _build._compiler.cache_clear()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "gdfunc" / "native"


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Names a script as the compiler: it tells what the real one would, and goes wrong when it compiles."""

    def make(script):
        real = " ".join(_build._compiler()[0])
        _build._compiler.cache_clear()
        path = tmp_path / "compiler"
        path.write_text(f'#!/bin/sh\ncase "$*" in *-dM*) exec {real} "$@";; esac\n{script}\n')
        path.chmod(0o700)
        monkeypatch.setenv("CC", str(path))

    return make


@pytest.mark.parametrize("name", ["gcc", "clang", "ziglang"])
def test_compilers_agree_with_eager(name, monkeypatch):
    if not (find_spec(name) if name == "ziglang" else which(name)):
        pytest.skip(f"{name} is not installed")
    if name == "ziglang":
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setenv("PATH", "/nonexistent")
    else:
        monkeypatch.setenv("CC", name)
    monkeypatch.setattr(
        native, "_compiled", lambda body: native._Function(native.build(native.write(body)))
    )
    assert name in " ".join(_build._compiler()[0])
    a = bodies.tame(0, (3, 17, 9), torch.float32)
    got, expected = bodies.both(bodies.REDUCTIONS, a)
    bodies.assert_close(got, expected, 64, scale=torch.tensor(200.0).double())
    for f, arity in ((bodies.FUNCTIONS, 1), (bodies.FUNCTIONS, 2), (bodies.EXACT, 1), (bodies.EXACT, 2)):
        operands = [bodies.hostile(seed, (33,), torch.float32) for seed in range(arity)]
        got, expected = bodies.both(bodies.arity(f, arity), *operands)
        bodies.assert_close(got, expected, 0 if f is bodies.EXACT else 8, signs=f is not bodies.EXACT)
    bodies.test_contractions.hypothesis.inner_test(33, 17, 20, torch.float32, 0)
    bodies.test_picking_and_placing.hypothesis.inner_test(5, 3, torch.float64, 0)
    bodies.test_a_bad_index_stops_the_loop_and_names_the_step(4, 5)


def test_the_cache_is_keyed_by_source_flags_compiler_and_processor(cache, monkeypatch):
    command, target = _build._compiler()
    for times, (text, flags, macros) in enumerate(
        [
            (C.format(1), [], ""),
            (C.format(2), [], ""),
            (C.format(1), ["-DOTHER"], ""),
            (C.format(1), [], "#define __AVX1024__ 1\n"),
        ],
        start=1,
    ):
        with monkeypatch.context() as patch:
            patch.setattr(_build, "_FLAGS", [*_build._FLAGS, *flags])
            patch.setattr(_build, "_compiler", lambda macros=macros: (command, target + macros))
            assert _build.build(text).answer() == int(text[-5])
            assert len(list(cache.iterdir())) == times
            patch.setattr(_build, "_compile", lambda *args: pytest.fail("compiled again"))
            assert _build.build(text).answer() == int(text[-5])
    assert "__VERSION__" in target
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


def test_compiling_at_once_leaves_one_library(cache):
    with ThreadPoolExecutor(4) as threads:
        built = list(threads.map(_build.build, [C.format(7)] * 8))
    assert [library.answer() for library in built] == [7] * 8
    assert [path.suffix for path in cache.iterdir()] == [".so"]


@pytest.mark.parametrize("damage", [b"", b"\x7fELF, and then nothing"])
def test_a_damaged_library_is_compiled_again(damage, cache, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(_build, "_compile", lambda compiler, attempts, text, path: path.write_bytes(damage))
        with pytest.raises(OSError, match=str(cache)):
            _build.build(C.format(3))
    assert len(list(cache.iterdir())) == 1
    assert _build.build(C.format(3)).answer() == 3


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'loop.c:1: error: too long' >&2; exit 1", r"\(loop.c:1: error: too long\)"),
        ("kill -9 $$", r"\(it ends with -9\)"),
        (
            'for last; do case "$last" in *.so) echo no library > "$last";; esac; done',
            "XDG_CACHE_HOME to another",
        ),
        ("true", "loop.so: cannot open"),
    ],
)
def test_a_compiler_that_fails_is_told_and_leaves_nothing(script, reason, cache, compiler, monkeypatch):
    compiler(script)
    with pytest.raises(BackendError, match=f"compiler cannot compile this loop .*{reason}"):
        _build.build(C.format(4))
    assert not list(cache.iterdir())
    monkeypatch.delenv("CC")
    _build._compiler.cache_clear()
    assert _build.build(C.format(4)).answer() == 4


def test_the_compiler_may_be_named_with_arguments(cache, monkeypatch):
    monkeypatch.setenv("CC", " ".join([*_build._compiler()[0], "-DNUMBER=6"]))
    _build._compiler.cache_clear()
    assert _build.build(C.format("NUMBER")).answer() == 6


@pytest.mark.parametrize("name", ["/nonexistent", "false", "false --flag"])
def test_a_compiler_that_is_asked_for_and_does_not_work_is_not_replaced(name, monkeypatch):
    monkeypatch.setenv("CC", name)
    _build._compiler.cache_clear()
    with pytest.raises(BackendError, match=f"CC={name} is no C compiler that works"):
        _build._compiler()


def test_a_directory_that_cannot_be_written_is_refused(cache):
    cache.parent.mkdir(mode=0o700)
    cache.touch()
    with pytest.raises(BackendError, match=f"{cache} cannot be written .*; set XDG_CACHE_HOME"):
        _build.build(C.format(5))


def test_windows_is_refused(monkeypatch):
    monkeypatch.setattr(_build, "os", SimpleNamespace(name="nt"))
    with pytest.raises(BackendError, match="for Linux and macOS, not for Windows; use backend='inductor'"):
        _build.build(C.format(0))
