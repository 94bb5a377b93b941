"""The backend that chooses: the fastest that can run this body on this device."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..._errors import BackendError, warn
from .._body import Body
from .._loop import Leaves, Runner
from . import _cudagraph, _inductor, _replay, native

_RANKED = {"cuda": (_cudagraph.run, _inductor.run), "cpu": (native.run, _inductor.run)}
_QUICK = {"cpu": (native.run,)}  # compiled within a second
_told: set[str] = set()


def run(body: Body, consts: Leaves, init: Leaves, xs: Leaves, length: int, unroll: int = 1) -> list[Tensor]:
    """Try the backends from the fastest on; the last resort replays the graph from Python."""
    return _run_first(_RANKED, body, consts, init, xs, length, unroll)


def run_brief(
    body: Body, consts: Leaves, init: Leaves, xs: Leaves, length: int, unroll: int = 1
) -> list[Tensor]:
    """Do so for a run of few steps, with the backends that compile quickly."""
    return _run_first(_QUICK, body, consts, init, xs, length, unroll)


def _run_first(ranked: Mapping[str, Sequence[Runner]], body: Body, *rest: Any) -> list[Tensor]:
    device = next((aval.device.type for aval in (*body.carry, *body.x, *body.consts)), "cpu")
    for runner in ranked.get(device, ()):
        try:
            return runner(body, *rest)
        except BackendError as error:
            step_back(error)
    return _replay.run(body, *rest)


def step_back(error: BackendError) -> None:
    """Say once why the fastest backend is not the one that runs."""
    if str(error) not in _told:
        _told.add(str(error))
        warn(f"backend='auto' steps back: {error}")
