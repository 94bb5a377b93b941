"""Settings for the whole suite, and the check that no test leaves global state changed."""

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
        directory = tmp_path_factory.mktemp("cache")
        directory.chmod(0o700)
        patch.setenv("XDG_CACHE_HOME", str(directory))
        yield


@pytest.fixture(autouse=True)
def _global_state_is_left_alone() -> Iterator[None]:
    before = global_state()
    yield
    assert global_state() == before
