"""The backends: each runs a loop forward, on plain tensors. "auto" chooses by the graph."""

import logging
from functools import partial
from typing import Any

from torch import Tensor

from ..._errors import BackendError
from .. import _cost
from .._body import Body, Runner
from . import _cudagraph, _inductor, _replay, native

replay = _replay.run

RUNNERS: dict[str, Runner] = {
    "native": native.run,
    "inductor": _inductor.run,
    "cudagraph": _cudagraph.run,
}
# In the order in which "auto" tries them, for each kind of device.
RANKED = {"cuda": ("cudagraph", "inductor"), "cpu": ("native", "inductor")}
_log = logging.getLogger("gdfunc")


def runner_of(backend: str, steps: int, is_first: bool = True) -> Runner:
    """Return the runner of a backend. "eager" replays the graph.

    Args:
        steps: of the whole run.
        is_first: whether the loop is the first segment of the run, for which the log tells what ran.
    """
    if backend == "auto":
        return partial(_fastest, steps, is_first)
    return RUNNERS.get(backend, replay)


def _fastest(steps: int, is_first: bool, body: Body, *loop: Any) -> list[Tensor]:
    """Run on the first backend that can run the body, and whose compilation pays for itself.

    Args:
        loop: the other arguments of a Runner.
    """
    device = next((aval.device.type for aval in (*body.carry, *body.x, *body.consts)), "cpu")
    seconds, refusal = steps * body.calls * _cost.OPERATION, None
    for name in RANKED.get(device, ()):
        if seconds < _compilation(name, body):
            continue
        try:
            results = RUNNERS[name](body, *loop)
        except BackendError as error:
            refusal = refusal or error
        else:
            if is_first:
                _log.debug("%d steps on %s", steps, name)
            return results
    if refusal is not None and not isinstance(refusal, native.TorchIsFaster):
        _cost.warn_of_loss(refusal, steps, seconds)
    if is_first:
        _log.debug("%d steps on replay: %s", steps, refusal or "too few to compile so large a step for")
    return partial(replay, nested=partial(_nested, steps))(body, *loop)


def _nested(steps: int, body: Body, *loop: Any) -> list[Tensor]:
    """Run a loop within each of so many steps."""
    return _fastest(steps * loop[3], False, body, *loop)


def _compilation(name: str, body: Body) -> float:
    """Estimate the seconds of a compilation that one run must save."""
    if name == "native":
        seconds = body.size * _cost.NATIVE
        return seconds if seconds > _cost.NATIVE_AT_MOST else 0.0
    least, more = _cost.INDUCTOR
    return least + more * body.size if name == "inductor" else 0.0
