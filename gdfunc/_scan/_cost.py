"""The costs by which backend="auto" decides.

They are counted, not timed, so that every repeat of a run is decided alike. All are in seconds on one core,
and rough. To measure them:

    python -m pytest tests/benchmarks/test_costs.py -m benchmark -n 0 -s
"""

from .._errors import PerformanceWarning, warn

PYTHON_STEP = 5e-4  # an eager step of a small model, gradient included
TRACE = 0.05  # two recordings of such a step; from then on the loop runs outside Python
OPERATION = 4e-6  # a call of an operation from Python, beyond its work
NATIVE = 5e-3  # a native compilation, for each operation
NATIVE_AT_MOST = 1.0  # a native compilation that is made even if one run does not pay for it
INDUCTOR = 5.0, 0.1  # a compilation by Inductor, and more for each operation
_WORTH_A_WARNING = 10.0

_said: set[str] = set()


def warn_of_loss(cause: Exception, instead: str, seconds: float) -> None:
    """Warn, once for each cause, where a loop loses much time because it was not compiled."""
    if seconds < _WORTH_A_WARNING or str(cause) in _said:
        return
    _said.add(str(cause))
    loss = f"about {seconds:.0f} s" if seconds < 1e6 else "10 to 1,000 times as long"
    warn(
        f"backend='auto' {instead}, which takes {loss}, where a compiled loop takes a tenth of it or less: "
        f"{cause}",
        PerformanceWarning,
    )
