"""Settings for the whole suite, and the check that no test leaves global state changed.

The suite runs on two processes (`-n 2` in pyproject.toml). `-n 0` gives one, for a debugger or
timings. Tests marked `slow` run with `-m slow`. They are: what compiles with
Inductor beyond one case per law, third derivatives through programs of several scans, second
derivatives of convolutions, native code of other compilers and under sanitizers, and long
statistics. GDFUNC_NO_SKIPS=1 turns skips into failures.
"""

import os
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import settings

settings.register_profile("dev", deadline=None, max_examples=25)
settings.register_profile("ci", settings.get_profile("ci"), deadline=None, max_examples=50)
settings.register_profile("thorough", deadline=None, max_examples=200)
settings.register_profile("nightly", deadline=None, max_examples=2000, print_blob=True)
settings.load_profile("ci" if settings.get_current_profile_name() == "ci" else "dev")


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
def _global_state_is_left_alone() -> Iterator[None]:
    before = global_state()
    yield
    assert global_state() == before
