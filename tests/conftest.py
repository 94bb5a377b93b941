"""Settings for the whole suite, and the check that no test leaves global state changed.

The suite runs on two processes (`-n 2` in pyproject.toml). `-n 0` gives one, for a debugger or
timings. Tests marked `slow` run with `-m slow`: loops that Inductor compiles beyond one case per law,
third derivatives through programs of several scans, second derivatives of convolutions, native code
of other compilers and under sanitizers, and long statistics. Loops are compiled without optimisation,
but in tests marked `optimised`, in timings (`-m benchmark`) and under `--hypothesis-profile thorough`.
GDFUNC_NO_SKIPS=1 turns skips into failures.
"""

import os
import random
import signal
from collections.abc import Iterator
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import settings

from gdfunc._scan import _recent
from gdfunc._scan.backends.native import _build
from gdfunc._scan.trace import _trace

settings.register_profile("dev", deadline=None, max_examples=25)
settings.register_profile("ci", settings.get_profile("ci"), deadline=None, max_examples=50)
settings.register_profile("thorough", deadline=None, max_examples=200)
settings.register_profile("nightly", deadline=None, max_examples=2000, print_blob=True)
settings.register_profile("exhaustive", deadline=None, max_examples=10_000, print_blob=True)
settings.load_profile("ci" if settings.get_current_profile_name() == "ci" else "dev")


def is_thorough(config: pytest.Config) -> bool:
    """Tell whether loops are to be compiled as for users, and not quickly: also for timings."""
    is_timing = config.getoption("markexpr") == "benchmark"
    return is_timing or settings.get_current_profile_name() in ("thorough", "nightly", "exhaustive")


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Let Inductor compile in half the time; it reads the variable when it is imported."""
    if not is_thorough(config):
        os.environ["AOT_INDUCTOR_DEBUG_COMPILE"] = "1"


# Reasons that are good on every machine: hardware, and what the user who runs the tests is.
ALLOWED_SKIPS = ("CUDA", "only root", "torch cannot flush denormal numbers here")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Let a skip fail where all optional tools are installed."""
    report = yield
    if os.environ.get("GDFUNC_NO_SKIPS") and report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2]
        if not any(allowed in reason for allowed in ALLOWED_SKIPS):
            report.outcome, report.longrepr = "failed", f"skipped with GDFUNC_NO_SKIPS: {reason}"
    return report


# Workers share the cores. On tensors as small as the tests' more threads would only wait for one another.
torch.set_num_threads(
    max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
)


def global_state() -> tuple[object, ...]:
    """What a library must leave alone: generators, default dtype, grad mode, determinism, denormals."""
    return (
        torch.get_rng_state().numpy().tobytes(),
        np.random.get_state()[1].tobytes(),  # noqa: NPY002  the global generator is what is watched
        random.getstate(),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.get_num_threads(),
        (torch.tensor(2.0**-140) * 0.5).item(),
    )


@pytest.fixture(autouse=True, scope="session")
def _caches_are_the_tests_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        # All workers of one run share what they compile.
        base = tmp_path_factory.getbasetemp()
        directory = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"
        directory.mkdir(mode=0o700, exist_ok=True)
        patch.setenv("XDG_CACHE_HOME", str(directory))
        yield


@pytest.fixture(autouse=True)
def _loops_are_compiled_quickly(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compile native loops in a tenth of the time, unless a test is marked `optimised`."""
    level = "-O3" if is_thorough(request.config) or request.node.get_closest_marker("optimised") else "-O0"
    with mock.patch.object(_build, "_FLAGS", [level, *_build._FLAGS[1:]]):
        yield


@pytest.fixture(autouse=True)
def _global_state_is_left_alone() -> Iterator[None]:
    before = global_state()
    yield
    assert global_state() == before


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """The traces that are made: one entry for each."""
    made, record = [], _trace._record
    monkeypatch.setattr(_trace, "_record", lambda *args: made.append(None) or record(*args))
    return made


@pytest.fixture
def nothing_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget all traces, and with them all compiled loops."""
    monkeypatch.setattr(_trace, "_recipes", _recent.Recent())
    monkeypatch.setattr(_trace, "_bodies", _recent.Recent())


@pytest.fixture
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what backend='auto' has warned of."""
    monkeypatch.setattr("gdfunc._scan._cost._said", set())


@pytest.fixture
def no_segment_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the segments of a run as short as they can be."""
    monkeypatch.setattr("gdfunc._train._drive._SEGMENT_SECONDS", 0.0)


@pytest.fixture
def ctrl_c_is_heard() -> Iterator[None]:
    """Raise KeyboardInterrupt at Ctrl-C, even if a shell started the tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
