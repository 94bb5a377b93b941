"""The native loop on other machines: emulated, cross-compiled, and by the failures that they have.

Tests that need qemu, wine or another compiler are marked `slow`, and skipped by the name of a missing tool.
"""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import gdfunc as gd
from gdfunc import __main__
from gdfunc._scan import _cost
from gdfunc._scan.backends import native
from gdfunc._scan.backends.native import _build, _process, _target
from gdfunc._scan.backends.native._program import FUNCTIONS as C_FUNCTIONS

from .emulated.loops import LOOPS
from .emulated.machines import MACHINES, ZIG, Machine, needs


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    """The machines by name, each made when it is first asked for."""
    made = {}

    def machine(name):
        if name not in made:
            made[name] = Machine(name, tmp_path_factory.mktemp("machine"))
        return made[name]

    return machine


@pytest.mark.slow
@pytest.mark.optimised
@pytest.mark.usefixtures("nothing_traced")
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("name", MACHINES)
def test_loop_on_another_machine_agrees_with_eager(name, loop, machines, monkeypatch):
    machine = machines(name)
    before = machine.loops
    monkeypatch.setattr(native, "_compiled", machine.compiled)
    LOOPS[loop]()
    assert machine.loops > before


@pytest.mark.slow
@pytest.mark.optimised
@pytest.mark.usefixtures("nothing_traced")
def test_loops_compile_for_apple_silicon_with_the_systems_vector_functions(monkeypatch, tmp_path):
    """They cannot be run here."""
    needs("ziglang")
    target = _target.probe([*ZIG, "-target", "aarch64-macos"])
    assert (target.system, target.tiles, target.is_measured) == ("macOS", (16, 24), False)
    made = []

    def compile_only(text, _):
        source, library = tmp_path / "loop.c", tmp_path / f"{len(made)}.dylib"
        source.write_text(text)
        for command in _build._commands(target, target.vector_math, source, library):
            done = _process.run(command)
            assert done.returncode == 0, done.stderr
        made.append(library.read_bytes())
        pytest.skip("only to leave the loop")

    monkeypatch.setattr(native, "find", lambda: target)
    monkeypatch.setattr(native, "build", compile_only)
    loops = [loop for name, loop in LOOPS.items() if "float64" not in name]
    for loop in loops:
        with pytest.raises(pytest.skip.Exception):
            loop()
    accuracy = f"{C_FUNCTIONS}\n{_build._ACCURACY}"
    with pytest.raises(pytest.skip.Exception):
        compile_only(accuracy, target)
    assert len(made) == len(loops) + 1 == 30
    assert all(library.startswith(b"\xcf\xfa\xed\xfe") for library in made)  # Mach-O of 64 bits
    found = set(re.findall(rb"_simd_(\w+?)_[fd]\d", made[-1]))
    assert {b"sin", b"cos", b"exp", b"tanh"} <= found, found


@pytest.mark.slow
@pytest.mark.optimised
def test_the_first_compilation_for_windows_builds_no_runtime(monkeypatch, tmp_path):
    """From an empty cache of zig's, a loop is compiled from its own text alone."""
    needs("ziglang")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    target = _target.probe([*ZIG, "-target", "x86_64-windows-gnu"])
    source, made = tmp_path / "loop.c", tmp_path / "loop.dll"
    source.write_text(
        f"{C_FUNCTIONS}\ndouble run(double x) {{ return exp(x) + lgamma(x) + hypotf(x, 2); }}"
    )
    for command in _build._commands(target, (), source, made):
        done = _process.run(command)
        assert (done.returncode, done.stderr) == (0, "")
    assert made.read_bytes().startswith(b"MZ")
    objects = [path for path in (tmp_path / "gdfunc" / "zig").rglob("*") if path.suffix in (".o", ".obj")]
    assert len(objects) <= 1, objects


def test_38_loops_run_on_each_of_three_machines():
    assert (len(LOOPS), len(MACHINES)) == (38, 3)
    assert all(re.match("aarch64 Linux|x86-64 Windows", name) for name in MACHINES)


# The compiler is asked.


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "gdfunc" / "native"


MACROS = {
    "AVX-512": (
        "#define __x86_64__ 1\n#define __linux__ 1\n#define __AVX2__ 1\n#define __AVX512F__ 1",
        (64, 24),
    ),
    "AVX2": ("#define __x86_64__ 1\n#define __linux__ 1\n#define __AVX2__ 1", (32, 12)),
    "SSE": ("#define __x86_64__ 1\n#define __linux__ 1\n#define __SSE4_1__ 1", (16, 8)),
    "NEON": ("#define __aarch64__ 1\n#define __APPLE__ 1\n#define __clang__ 1", (16, 24)),
}


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A compiler that runs a script; CC names it."""

    def make(script):
        path = tmp_path / "fake cc" / "cc"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o700)
        monkeypatch.setenv("CC", f"'{path}'")
        _target.find.cache_clear()
        return path

    yield make
    _target.find.cache_clear()


@pytest.mark.parametrize("name", MACROS)
def test_vectors_and_tiles_are_those_of_the_compilers_macros(name, fake):
    macros, tiles = MACROS[name]
    fake(f"cat <<'END'\n{macros}\nEND")
    assert _target.find().tiles == tiles


@pytest.mark.parametrize(
    ("accepted", "kind"), [("-march=native", "-march=native"), ("-mcpu=native", "-mcpu=native"), ("", None)]
)
def test_options_for_this_processor_are_those_that_the_compiler_takes(accepted, kind, fake, cache):
    check = f'[ "$word" = "{accepted}" ] || {{ echo "cc: error: unsupported $word" >&2; exit 1; }}'
    fake(f'for word; do case "$word" in -m*=native) {check};; esac; done; exec gcc "$@"')
    target = _target.find()
    assert [word for word in target.command if "native" in word] == [kind] * bool(kind)
    text = "int vector(void) { return 0\n#ifdef __AVX2__\n+ 32\n#endif\n; }"
    assert _build.build(text, target).vector() in (0, 32)
    other = replace(target, command=("gcc",))
    assert _build.build(text, other).vector() == 0
    assert len(list(cache.glob("*.so"))) == 2  # the options are in the key


def test_a_processor_that_CC_names_is_not_replaced_by_this_one(monkeypatch):
    monkeypatch.setenv("CC", "gcc -march=x86-64-v2")
    _target.find.cache_clear()
    target = _target.find()
    assert "-march=native" not in target.command
    assert target.tiles == (16, 8)
    _target.find.cache_clear()


def test_text_is_laid_out_for_the_vectors_of_the_compiler(monkeypatch, fake):
    texts = []
    monkeypatch.setattr(native, "build", lambda text, target: texts.append(text) or pytest.fail("compiled"))
    fake(f"cat <<'END'\n{MACROS['NEON'][0]}\nEND")
    with pytest.raises(pytest.fail.Exception):
        gd.scan(lambda c, x: (c @ c * 0.0123, None), torch.ones(48, 48), length=2, backend="native")
    assert "#define VECTOR 16" in texts[0]
    assert len(set(re.findall(r"\bc\d+_\d+ \+=", texts[0]))) == 24


def test_the_first_error_of_a_compiler_is_in_the_message(fake):
    fake("echo 'note: hello' >&2; echo 'cc: error: no licence' >&2; exit 1")
    with pytest.raises(gd.BackendError, match=r"fake cc/cc'? is no C compiler.*\(cc: error: no licence\)"):
        _target.find()


def test_compilers_that_are_found_and_fail_are_named_with_their_errors(monkeypatch, tmp_path, fake):
    path = fake("echo 'cc: error: no licence' >&2; exit 1")
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(path.parent))
    monkeypatch.setattr(_target, "find_spec", lambda name: None)
    with pytest.raises(
        native.NoCompiler, match=r"none works \(cc fails \(cc: error: no licence\)\).*pip install"
    ):
        _target.find()


@pytest.mark.parametrize(
    ("macros", "message"),
    [
        (
            "#define _WIN32 1\n#define __MINGW32__ 1",
            "is MinGW's, whose sin, cos and erfc are inaccurate; pip install",
        ),
        (
            "#define _WIN32 1\n#define _MSC_VER 1920\n#define __clang__ 1",
            "compiles for MSVC.*; pip install",
        ),
    ],
)
def test_compilers_for_windows_but_zig_are_refused_by_their_macros(macros, message, fake):
    fake(f"cat <<'END'\n{macros}\nEND")
    with pytest.raises(gd.BackendError, match=message):
        _target.find()


def test_a_mac_without_tools_opens_no_dialog(monkeypatch, fake, tmp_path):
    stub = fake(": > dialog; exit 1")
    select = stub.with_name("xcode-select")
    select.write_text("#!/bin/sh\nexit 2\n")
    select.chmod(0o700)
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(stub.parent))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_target, "sys", SimpleNamespace(platform="darwin", executable=sys.executable))
    monkeypatch.setattr(_target, "find_spec", lambda name: None)
    monkeypatch.setattr(_target.shutil, "which", lambda name: f"/usr/bin/{name}")
    with pytest.raises(
        native.NoCompiler, match=r"none was found: install clang \(xcode-select --install\), or pip"
    ):
        _target.find()
    assert not (tmp_path / "dialog").exists()
    select.write_text("#!/bin/sh\nexit 0\n")
    with pytest.raises(native.NoCompiler, match="none works"):
        _target.find()
    assert (tmp_path / "dialog").exists()


# The system's functions of whole vectors, used only if they are accurate.

WRONG = """
#include <immintrin.h>
__m128 _ZGVbN4v_expf(__m128 x) { return x; }
__m256 _ZGVcN8v_expf(__m256 x) { return x; }
__m256 _ZGVdN8v_expf(__m256 x) { return x; }
__m512 _ZGVeN16v_expf(__m512 x) { return x; }
"""


@pytest.mark.long
@pytest.mark.optimised
@pytest.mark.skipif(
    not Path("/usr/lib/x86_64-linux-gnu/libmvec.so.1").exists(), reason="needs glibc on x86-64"
)
@pytest.mark.usefixtures("cache")
def test_vector_functions_of_unknown_accuracy_are_measured_and_wrong_ones_not_used(tmp_path):
    target = replace(_target.probe(["gcc"]), is_measured=False)
    assert _build.has_vector_math(target)
    (tmp_path / "wrong.c").write_text(WRONG)
    library = tmp_path / "libwrong.so"
    command = [
        "gcc",
        "-mavx512f",
        "-mavx2",
        "-O1",
        "-shared",
        "-fPIC",
        str(tmp_path / "wrong.c"),
        "-o",
        str(library),
    ]
    subprocess.run(command, check=True)
    wrong = replace(target, vector_math=("-DVECTOR_MATH", str(library), "-lmvec"))
    assert not _build.has_vector_math(wrong)
    assert not _build.has_vector_math(replace(target, vector_math=("-fveclib=none-such",)))
    loop = "\n#pragma omp simd\nfor (int i = 0; i < 64; i++) x[i] = expf(x[i]);"
    text = f"{C_FUNCTIONS}\nvoid f(float *x) {{ {loop} }}"
    x = torch.zeros(64)
    _build.build(text, wrong).f(ctypes.c_void_p(x.data_ptr()))
    assert x.equal(torch.ones(64))
    x.zero_()
    _build.build(text, replace(wrong, is_measured=True)).f(ctypes.c_void_p(x.data_ptr()))
    assert x.equal(torch.zeros(64))  # the wrong library is one that would be called


def test_a_wait_for_threads_hears_of_ctrl_c_between_short_waits(monkeypatch):
    """As on Windows, where a wait without an end hears of nothing."""
    waits = []

    def wait(shares, timeout):
        waits.append(timeout)
        if len(waits) == 3:
            raise KeyboardInterrupt
        return futures_wait(shares, 0)

    futures_wait = native.wait
    monkeypatch.setattr(native, "wait", wait)
    monkeypatch.setattr(native, "LONG", 0)
    with pytest.raises(KeyboardInterrupt):
        gd.scan(
            lambda c, x: (c * 1.001 + c.sin().sum(), None),
            torch.ones(999),
            length=200_000,
            backend="native",
        )
    assert waits == [native._SEGMENT_SECONDS] * 3


def test_a_wait_for_a_compiler_is_made_of_short_waits(monkeypatch):
    monkeypatch.setattr(_process, "_BEAT", 0.01)
    done = _process.run([sys.executable, "-c", "import time; time.sleep(0.2); print('ü' * 70_000)"])
    assert done.stdout.strip() == "ü" * 70_000


def test_a_cache_in_a_path_with_spaces_and_other_letters_works(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "Ünï cødé name"))
    assert _build.build("int answer(void) { return 8; }", _target.find()).answer() == 8
    assert len(list(tmp_path.rglob("*.so"))) == 1


def test_a_cache_where_programs_may_not_run_is_named_with_the_remedy(monkeypatch, cache):
    error = OSError("loop.so: failed to map segment from shared object")
    monkeypatch.setattr(_build, "Library", mock.Mock(side_effect=error))
    with pytest.raises(gd.BackendError, match=r"map segment.*programs may not run, set XDG_CACHE_HOME to"):
        _build.build("int answer(void) { return 9; }", _target.find())
    assert not list(cache.iterdir())


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("unshare") or os.geteuid(), reason="only root can mount a file system")
@pytest.mark.parametrize(
    ("option", "words"), [("noexec", "programs may not run"), ("ro", "Read-only file system")]
)
def test_a_real_file_system_that_lets_no_cache_be_is_named_and_auto_runs_in_eager(tmp_path, option, words):
    code = """
import torch
import gdfunc as gd

def run(backend):
    return gd.scan(lambda c, x: (c + x, c), torch.tensor(0.0), torch.ones(5_000), backend=backend)[0].item()

print(run("auto"))
try:
    run("native")
except gd.BackendError as error:
    print(error)
"""
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    commands = (
        f"mount -t tmpfs -o {option},mode=0700 none {mounted} && exec {sys.executable} -W error -c '{code}'"
    )
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", commands],
        env={**os.environ, "XDG_CACHE_HOME": str(mounted)},
        capture_output=True,
        text=True,
        check=True,
    )
    answer, error = done.stdout.split("\n", 1)
    assert answer == "5000.0"
    assert words in error
    assert "set XDG_CACHE_HOME to" in error


# Messages to the user.


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(_target, "find_spec", lambda name: None)
    _target.find.cache_clear()
    yield
    _target.find.cache_clear()


@pytest.mark.usefixtures("no_compiler", "nothing_said", "nothing_traced")
def test_auto_without_a_compiler_says_once_what_would_make_long_loops_fast(monkeypatch, recwarn):
    f = lambda c, x: (c * 0.5 + x, None)  # noqa: E731
    xs = torch.ones(300)
    expected = gd.scan(f, xs[0], xs, backend="eager")[0]
    assert gd.scan(f, xs[0], xs)[0] == expected
    assert not recwarn.list  # a fast loop
    monkeypatch.setattr(_cost, "OPERATION", 10 / 300)
    monkeypatch.setattr(_cost, "INDUCTOR", (float("inf"), 0.0))
    with pytest.warns(
        gd.PerformanceWarning, match=r"a hundredth of the time.*none was found.*pip install"
    ) as said:
        assert gd.scan(f, xs[0], xs)[0] == expected
    assert [warning.filename for warning in said] == [__file__]
    gd.scan(f, xs[0], xs)
    assert not recwarn.list


def report(monkeypatch):
    monkeypatch.setattr(__main__, "RUNNERS", {"native": None, "cudagraph": None})
    return dict(__main__.report())


@pytest.mark.long
def test_the_report_tells_what_runs_here(monkeypatch):
    told = report(monkeypatch)
    assert list(told) == ["gdfunc", "device", "compiler", "target", "cache", "eager", "native", "cudagraph"]
    assert told["gdfunc"].startswith(f"{gd.__version__}, torch {torch.__version__}, Python 3.")
    assert (told["eager"], told["native"]) == ("works", "works")
    assert re.search(r"\d", told["compiler"])
    assert f"vectors of {_target.find().tiles.width} bytes" in told["target"]
    assert re.search(r"gdfunc, \d+\.\d MB", told["cache"])


@pytest.mark.usefixtures("no_compiler", "nothing_traced")
def test_the_report_names_the_line_that_installs_a_compiler(monkeypatch):
    told = report(monkeypatch)
    assert "needs a C compiler, and none was found" in told["compiler"]
    assert told["native"].splitlines()[-1] == "install it: pip install 'gdfunc[native]'"
    assert told["eager"] == "works"


@pytest.mark.slow
def test_the_report_is_what_python_m_gdfunc_prints():
    done = subprocess.run([sys.executable, "-m", "gdfunc"], capture_output=True, text=True, check=True)
    lines = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    assert {"eager": "works", "native": "works"}.items() <= dict(lines).items()
    assert [name for name, _ in lines][-3:] == ["native", "inductor", "cudagraph"]
