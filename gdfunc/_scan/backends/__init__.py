"""The backends: each runs a loop forward, on plain tensors. A table names them; "auto" has an order."""

from functools import partial
from typing import Any

from torch import Tensor

from ..._errors import BackendError, warn
from .._body import Body, Runner
from . import _cudagraph, _inductor, _replay, native

replay = _replay.run

# From the fastest on, for each kind of device; those of QUICK compile within a second.
RANKED: dict[str, tuple[Runner, ...]] = {
    "cuda": (_cudagraph.run, _inductor.run),
    "cpu": (native.run, _inductor.run),
}
QUICK: dict[str, tuple[Runner, ...]] = {"cpu": (native.run,)}
WORTH_COMPILING = 10_000  # steps: fewer, at 1 ms each from Python, end before a slow compiler does

_said: set[str] = set()


def runner_of(backend: str, steps: int) -> Runner:
    """Return the runner of a backend, for a run of so many steps in all.

    "eager" replays the graph. "auto" takes the fastest backend that can run the body on its device; a
    short run is left to those that compile quickly.
    """
    if backend == "auto":
        return partial(_fastest, RANKED if steps >= WORTH_COMPILING else QUICK)
    runners = {"native": native.run, "inductor": _inductor.run, "cudagraph": _cudagraph.run}
    return runners.get(backend, replay)


def _fastest(ranked: dict[str, tuple[Runner, ...]], body: Body, *loop: Any) -> list[Tensor]:
    """Try the backends in order; the last resort replays the graph, and runs loops inside it in order.

    Args:
        loop: the other arguments of a Runner.
    """
    device = next((aval.device.type for aval in (*body.carry, *body.x, *body.consts)), "cpu")
    for runner in ranked.get(device, ()):
        try:
            return runner(body, *loop)
        except BackendError as error:
            step_back(error)
    return partial(replay, nested=partial(_fastest, ranked))(body, *loop)


def step_back(error: BackendError) -> None:
    """Say once why the fastest backend is not the one that runs."""
    if str(error) not in _said:
        _said.add(str(error))
        warn(f"backend='auto' steps back: {error}")
