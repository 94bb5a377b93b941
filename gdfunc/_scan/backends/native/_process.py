"""Running a compiler: where its cache lies, how long it may take, and how all its processes are ended."""

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress

from ...._errors import BackendError
from .._cache import private_directory

_PATIENCE = 600  # seconds for one run of the compiler
_BEAT = 0.1  # seconds: on Windows, Ctrl-C is heard between two waits alone


def run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a compiler in a session of its own, so that all its processes can be ended together.

    Raises:
        BackendError: the compiler cannot be started, or has not finished after `_PATIENCE` seconds.
    """
    with _started(command) as process:
        try:
            output, errors = _outputs(process)
        except BaseException as error:
            _end(process)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            raise BackendError(
                f"{command[0]} has not finished after {_PATIENCE} s and was stopped; name another compiler "
                f"in CC, or use backend='inductor' or 'eager'"
            ) from error
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def _started(command: Sequence[str]) -> subprocess.Popen[str]:
    # zig links files from its cache into the library, so they belong in the private directory as well.
    cache = str(private_directory() / "zig")
    environment = os.environ | {"ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache}
    try:
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        raise BackendError(f"{command[0]} cannot be started ({error.strerror})") from error


def _outputs(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Wait for the outputs of a process."""
    end = time.monotonic() + _PATIENCE
    while time.monotonic() + _BEAT < end:
        with suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=_BEAT)
    return process.communicate(timeout=max(0.0, end - time.monotonic()))


def _end(process: subprocess.Popen[str]) -> None:
    """End a process and all that it has started."""
    if os.name == "posix":
        os.killpg(process.pid, signal.SIGKILL)
    else:
        subprocess.run(["taskkill", "/F", "/T", "/PID", str(process.pid)], capture_output=True, check=False)


def failure(done: subprocess.CompletedProcess[str]) -> str:
    """Return the first error that a compiler tells, or how it ended."""
    lines = (line.strip() for line in (done.stderr + done.stdout).splitlines())
    return next((line for line in lines if "error" in line.lower()), f"it ends with {done.returncode}")
