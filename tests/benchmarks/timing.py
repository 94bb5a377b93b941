"""Contenders that take turns."""

import time
from collections.abc import Callable
from typing import Any


def in_turn(
    runs: dict[str, Callable[[], Any]],
    repeats: int,
    warm_ups: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Let the runs take turns. Return the seconds of each, without those of the first turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(warm_ups + repeats):
        for name, run in runs.items():
            started = clock()
            run()
            if turn >= warm_ups:
                times[name].append(clock() - started)
    return times
