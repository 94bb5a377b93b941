"""How native loops are compiled and kept: other compilers, damaged libraries, and refusals."""

import gc
import hashlib
import os
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from unittest import mock

import pytest
import torch

import gdfunc as gd
from gdfunc._errors import BackendError
from gdfunc._scan import _recent
from gdfunc._scan.backends import _cache
from gdfunc._scan.backends.native import _build, _process, _target

pytestmark = pytest.mark.skipif(os.name != "posix", reason="is refused there")

C = "int answer(void) {{ return {}; }}\n"


def built(text):
    return _build.build(text, _target.find())


@pytest.fixture(autouse=True)
def _compiler_is_sought_anew():
    _target.find.cache_clear()
    yield
    _target.find.cache_clear()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "gdfunc" / "native"


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Name a script as the compiler: it tells the real one's macros, and fails when it compiles."""

    def make(script):
        real = " ".join(_target.find().command)
        _target.find.cache_clear()
        path = tmp_path / "compiler"
        path.write_text(f'#!/bin/sh\ncase "$*" in *-dM*) exec {real} "$@";; esac\n{script}\n')
        path.chmod(0o700)
        monkeypatch.setenv("CC", str(path))

    return make


OPERATORS = "reductions or functions_of or contractions or picking or bad_index"
PROGRAMS = f"{OPERATORS} or extrema or views or empty or layout or pooling or network or drawn_bodies"


def assert_passes(suite, environment):
    """Run some tests of native loops in a new process."""
    tests = [str(Path(__file__).with_name(f"test_native{part}.py")) for part in ("", "_bodies")]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-n",
        "0",
        *tests,
        "-k",
        suite,
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gcc", "gcc-11", "clang", "clang-19", "ziglang"])
def test_operators_agree_with_eager_under_every_compiler(name):
    if not (find_spec(name) if name == "ziglang" else which(name)):
        pytest.skip(f"{name} is not installed")
    environment = {key: value for key, value in os.environ.items() if key != "CC"}
    assert_passes(
        OPERATORS, environment | ({"PATH": "/nonexistent"} if name == "ziglang" else {"CC": name})
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compiler", "library", "flag"),
    [("gcc", "libasan.so", "-static-libubsan"), ("clang", "libclang_rt.asan-x86_64.so", "-shared-libasan")],
)
def test_generated_code_is_clean_under_the_sanitizers(compiler, library, flag):
    if not which(compiler):
        pytest.skip(f"asks {compiler} for its sanitizers")
    # The second so that exceptions, which torch throws and catches, find their way.
    libraries = [
        subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip()
        for name in (library, "libstdc++.so")
    ]
    sanitized = f"{compiler} -fsanitize=address,undefined -fno-sanitize-recover=all {flag}"
    preloaded = {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}
    assert_passes(PROGRAMS, os.environ | preloaded | {"CC": sanitized})


def test_the_cache_is_keyed_by_source_flags_compiler_and_processor(cache, monkeypatch):
    target = _target.find()
    cases = [(1, [], ""), (2, [], ""), (1, ["-DOTHER"], ""), (1, [], "#define __AVX1024__ 1\n")]
    for times, (number, flags, macros) in enumerate(cases, start=1):
        text = C.format(number)
        with monkeypatch.context() as patch:
            patch.setattr(_build, "_FLAGS", [*_build._FLAGS, *flags])
            other = replace(target, macros=target.macros + macros)
            assert _build.build(text, other).answer() == number
            assert len(list(cache.glob("*.so"))) == times
            patch.setattr(_build, "_compile", lambda *args: pytest.fail("compiled again"))
            assert _build.build(text, other).answer() == number
    assert "__VERSION__" in target.macros
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


def test_compiling_at_once_leaves_one_library(cache):
    with ThreadPoolExecutor(4) as threads:
        libraries = list(threads.map(built, [C.format(7)] * 8))
    assert [library.answer() for library in libraries] == [7] * 8
    assert sorted(path.suffix for path in cache.iterdir()) == [".sha256", ".so"]


def flip(data):
    at = data.index(b"answer")
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


DAMAGES = {
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "a bit": flip,
    "longer": lambda data: data + b"\0",
}


@pytest.mark.long
@pytest.mark.parametrize("suffix", [".so", ".sha256"])
def test_damaged_library_is_compiled_again(suffix, cache):
    assert built(C.format(3)).answer() == 3
    (library,), (file,) = cache.glob("*.so"), cache.glob(f"*{suffix}")
    sound, written = library.read_bytes(), file.read_bytes()
    for damage in DAMAGES.values():
        gc.collect()
        file.unlink()
        file.write_bytes(damage(written if suffix == ".so" else b"answer " + written))
        assert built(C.format(3)).answer() == 3
        assert library.read_bytes() == sound


def test_library_with_another_length_or_digest_is_not_sound(cache):
    built(C.format(3))
    (library,), (digest,) = cache.glob("*.so"), cache.glob("*.sha256")
    length, _, number = digest.read_text().partition(":")
    assert (int(length), number) == (
        library.stat().st_size,
        hashlib.sha256(library.read_bytes()).hexdigest(),
    )
    for text in (f"{int(length) + 1}:{number}", f"{length}:{number[::-1]}", number, length):
        digest.write_text(text)
        assert not _cache.is_sound(library)
    digest.write_text(f"{length}:{number}")
    assert _cache.is_sound(library)


@pytest.mark.parametrize("fault", ["link", "mode", "owner"])
def test_library_that_others_could_have_written_is_compiled_again(fault, cache, monkeypatch):
    built(C.format(8))
    (library,) = cache.glob("*.so")
    if fault == "link":
        library.rename(library.with_name("elsewhere"))
        library.symlink_to("elsewhere")
    elif fault == "mode":
        library.chmod(0o722)
    elif os.geteuid():
        pytest.skip("only root can give a file to another user")
    else:
        os.chown(library, 12345, -1)
    compiled = mock.Mock(side_effect=_build._compile)
    monkeypatch.setattr(_build, "_compile", compiled)
    assert built(C.format(8)).answer() == 8
    assert compiled.call_count == 1
    assert stat.S_IMODE(library.lstat().st_mode) == 0o700
    assert library.lstat().st_uid == os.geteuid()
    assert built(C.format(8)).answer() == 8
    assert compiled.call_count == 1


def test_interrupted_store_leaves_the_old_library_or_none(cache, monkeypatch):
    real, calls = os.replace, []

    def replace(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        built(C.format(3))
    monkeypatch.setattr(os, "replace", real)
    assert built(C.format(3)).answer() == 3
    assert sorted(path.suffix for path in cache.iterdir()) == [".sha256", ".so"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc lists the files")
def test_library_and_its_directory_are_on_the_disk_when_it_is_stored(cache, monkeypatch):
    done, replace, fsync = [], os.replace, os.fsync

    def synced(file):
        done.append(Path(os.readlink(f"/proc/self/fd/{file}")).suffix or "directory")
        fsync(file)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda *paths: done.append("move") or replace(*paths))
    built(C.format(3))
    assert done == [".so", ".sha256", "move", "move", "directory"]


def test_cache_has_a_bound_and_drops_the_least_recently_used(cache):
    for number in range(4):
        built(C.format(number))
    oldest = sorted(cache.glob("*.so"), key=lambda path: path.stat().st_mtime_ns)
    built(C.format(0))  # now the one that was used last
    (cache / "tmp_killed").mkdir()
    os.utime(cache / "tmp_killed", (0, 0))
    (cache / "tmp_busy").mkdir()
    size = sum(path.stat().st_size for path in cache.iterdir())
    _cache.trim(cache, size - 1)
    assert set(cache.glob("*.so")) == {*oldest} - {oldest[1]}
    assert len(list(cache.glob("*.sha256"))) == 3
    assert [path.name for path in cache.glob("tmp_*")] == ["tmp_busy"]
    _cache.trim(cache, 0)
    assert [path.name for path in cache.iterdir()] == ["tmp_busy"]


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc lists the mappings")
def test_library_is_unloaded_when_nothing_refers_to_it(cache):
    def mapped():
        return Path("/proc/self/maps").read_text().count(str(cache))

    libraries = [built(C.format(number)) for number in (21, 22, 21)]
    functions = [library.answer for library in libraries]
    assert mapped() >= 4
    del libraries
    assert [function() for function in functions] == [21, 22, 21]
    del functions
    gc.collect()
    assert mapped() == 0


@pytest.mark.long
def test_library_of_a_forgotten_loop_is_unloaded(monkeypatch):
    monkeypatch.setattr(_recent, "REMEMBERED", 2)

    def mapped():
        lines = Path("/proc/self/maps").read_text().splitlines()
        return {line.split()[-1] for line in lines if "native" in line}

    before = mapped()
    for number in range(6):
        gd.scan(lambda c, x, n=number: (c * x + n, c), torch.ones(3), torch.ones(5, 3), backend="native")
    gc.collect()
    assert len(mapped() - before) <= 2


LAST_CALL = """
import atexit, sys, threading, time
import torch, gdfunc as gd
torch.set_num_threads(2)
def run():
    def descend(lr):
        return gd.scan(lambda c, x: (c - lr * x, c), torch.ones(4), torch.ones(9, 4), backend="native")[0]
    return torch.func.vmap(descend)(torch.linspace(0, 1, 6))
expected = run()
def check():
    assert torch.equal(run(), expected)
    print("right")
def late():
    threading.main_thread().join()
    time.sleep(0.2)
    check()
atexit.register(check)
threading.Thread(target=late).start()
"""


@pytest.mark.long
def test_native_runs_on_several_threads_while_the_interpreter_exits():
    command = [sys.executable, "-c", LAST_CALL]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.stdout, done.returncode) == ("right\nright\n", 0), done.stderr


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'loop.c:1: error: too long' >&2; exit 1", r"\(loop.c:1: error: too long\)"),
        ("kill -9 $$", r"\(it ends with -9\)"),
        (
            'for x; do case "$x" in *.so) echo no library > "$x";; esac; done',
            "set XDG_CACHE_HOME to a directory",
        ),
        ("true", "it writes no library"),
    ],
)
def test_a_compiler_that_fails_is_told_and_leaves_nothing(script, reason, cache, compiler, monkeypatch):
    compiler(script)
    with pytest.raises(BackendError, match=f"compiler .*cannot compile this loop .*{reason}"):
        built(C.format(4))
    assert not list(cache.iterdir())
    monkeypatch.delenv("CC")
    _target.find.cache_clear()
    assert built(C.format(4)).answer() == 4


def test_the_compiler_may_be_named_with_arguments(cache, monkeypatch):
    monkeypatch.setenv("CC", " ".join([*_target.find().command, "-DNUMBER=6"]))
    _target.find.cache_clear()
    assert built(C.format("NUMBER")).answer() == 6


def is_gone(process):
    try:
        return process.read_text().split()[2] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.long
def test_compiler_that_hangs_is_stopped_with_all_its_processes(cache, compiler, monkeypatch, tmp_path):
    compiler(f"sleep 100 & echo $! > {tmp_path}/child; wait")
    monkeypatch.setattr(_process, "_PATIENCE", 0.5)
    with pytest.raises(BackendError, match=r"not finished after 0.5 s .* name another compiler"):
        built(C.format(4))
    child = Path(f"/proc/{(tmp_path / 'child').read_text().strip()}/stat")
    for _ in range(100):  # until the system has delivered the signal
        if is_gone(child):
            break
        time.sleep(0.05)
    assert is_gone(child)
    assert not list(cache.iterdir())


def test_unbalanced_quote_in_CC_is_named(monkeypatch):
    monkeypatch.setenv("CC", "gcc '-O2")
    with pytest.raises(BackendError, match=r"CC=gcc '-O2 cannot be split into words .*correct its quotes"):
        _target.find()


@pytest.mark.parametrize("name", ["/nonexistent", "false", "false --flag"])
def test_a_compiler_that_is_asked_for_and_does_not_work_is_not_replaced(name, monkeypatch):
    monkeypatch.setenv("CC", name)
    _target.find.cache_clear()
    with pytest.raises(BackendError, match=f"CC={name} is no C compiler that works"):
        _target.find()


def test_a_directory_that_cannot_be_written_is_refused(cache):
    cache.parent.mkdir(mode=0o700)
    cache.touch()
    with pytest.raises(BackendError, match=f"{cache} cannot be written .*; set XDG_CACHE_HOME"):
        built(C.format(5))
