"""The costs by which backend="auto" decides.

They are counted, not timed, so that every repeat of a run is decided alike. All are in seconds on one core,
and rough. To measure them:

    python -m pytest tests/benchmarks/test_costs.py -m benchmark -n 0 -s
"""

import sys

from .._errors import PerformanceWarning, warn

PYTHON_STEP = 5e-4  # an eager step of a small model, gradient included
TRACE = 0.05  # two recordings of such a step; from then on the loop runs outside Python
LEAF = 2e-5, 1.2e-2  # what each leaf of the carry adds to a step, and to its recordings, beyond ten
OPERATION = 4e-6  # a call of an operation from Python, beyond its work
NATIVE = 5e-3  # a native compilation, for each operation
NATIVE_AT_MOST = 1.0  # a native compilation that is made even if one run does not pay for it
INDUCTOR = 10.0, 0.3  # a compilation by Inductor, and more for each operation
_WORTH_A_WARNING = 10.0

_said: set[str] = set()


def is_worth_tracing(steps: int, leaves: int) -> bool:
    """Tell whether so many steps from Python take longer than the trace of one."""
    (of_step, of_trace), more = LEAF, max(0, leaves - 10)
    return steps * (PYTHON_STEP + of_step * more) >= TRACE + of_trace * more


def warn_of_loss(cause: Exception, steps: int, seconds: float) -> None:
    """Warn, once for each cause, where a loop loses much time because it was not compiled."""
    if seconds < _WORTH_A_WARNING or str(cause) in _said:
        return
    _said.add(str(cause))
    # A function that jit compiles counts as a run without end.
    is_run = steps < sys.maxsize
    what = f"{steps:,} steps, which take {seconds:.0f} s or more," if is_run else "this function"
    warn(
        f"backend='auto' runs {what} from Python. Compiled, small steps take a hundredth of the time, and "
        f"large ones hardly less. backend='eager' runs without this warning. The reason: {cause}",
        PerformanceWarning,
    )
