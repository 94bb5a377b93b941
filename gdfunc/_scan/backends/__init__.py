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


def runner_of(backend: str, steps: int) -> Runner:
    """Return the runner of a backend, for a run of so many steps in all. "eager" replays the graph."""
    return partial(_fastest, steps) if backend == "auto" else RUNNERS.get(backend, replay)


def _fastest(steps: int, body: Body, *loop: Any) -> list[Tensor]:
    """Run on the first backend that can run the body, and whose compilation pays for itself.

    Args:
        steps: of the whole run.
        loop: the other arguments of a Runner.
    """
    device = next((aval.device.type for aval in (*body.carry, *body.x, *body.consts)), "cpu")
    saved, refusals = steps * body.calls * _cost.OPERATION, list[BackendError]()
    for name in RANKED.get(device, ()):
        if saved < _compilation(name, body):
            continue
        try:
            results = RUNNERS[name](body, *loop)
        except BackendError as error:
            refusals.append(error)
        else:
            _log.debug("%d steps on %s", loop[3], name)
            return results
    for refusal in refusals[:1]:
        if not isinstance(refusal, native.TorchIsFaster):
            _cost.warn_of_loss(refusal, "calls torch's operations from Python", saved)
    _log.debug("%d steps on replay: %s", loop[3], refusals)
    return partial(replay, nested=partial(_nested, steps))(body, *loop)


def _nested(steps: int, body: Body, *loop: Any) -> list[Tensor]:
    """Run a loop within each of so many steps."""
    return _fastest(steps * loop[3], body, *loop)


def _compilation(name: str, body: Body) -> float:
    """Estimate the seconds of a compilation that one run must save."""
    if name == "native":
        seconds = body.size * _cost.NATIVE
        return seconds if seconds > _cost.NATIVE_AT_MOST else 0.0
    least, more = _cost.INDUCTOR
    return least + more * body.size if name == "inductor" else 0.0
