"""Sums over ranks: what a ring costs on this machine, and the model of it.

python -m pytest tests/benchmarks/test_ranks.py -m benchmark -n 0 -s

Latency and bandwidth are fitted to two ranks; the model then tells the times of three.
"""

import json
from pathlib import Path

import pytest

from .. import rank_laws
from ..ranks import start
from ..ring import cost

pytestmark = pytest.mark.benchmark


def test_ring(tmp_path: Path) -> None:
    times = {}
    for count in (2, 3):
        folder = tmp_path / str(count)
        folder.mkdir()
        for rank in start(rank_laws, folder, count, ["times_of_sums"], seconds=120.0):
            assert rank.errors == {"times_of_sums": ""}, rank.output
        times[count] = {int(size): t for size, t in json.loads((folder / "times.json").read_text()).items()}
    sizes = sorted(times[2])
    latency = times[2][sizes[0]] / 2
    bandwidth = sizes[-1] / (times[2][sizes[-1]] - times[2][sizes[0]])
    print(f"\nlatency {latency * 1e6:.0f} µs, bandwidth {bandwidth / 1e9:.2f} GB/s, fitted to two ranks")
    for size in sizes:
        for count in (2, 3):
            model = cost(size, count, latency, bandwidth)
            measured = times[count][size]
            print(
                f"{size:>11,} bytes, {count} ranks: {measured * 1e3:8.3f} ms measured, "
                f"{model * 1e3:8.3f} ms by the model, ratio {model / measured:.2f}"
            )


def test_steps(tmp_path: Path) -> None:
    for rank in start(rank_laws, tmp_path, 2, ["times_of_steps"], seconds=120.0):
        assert rank.errors == {"times_of_steps": ""}, rank.output
    for name, seconds in json.loads((tmp_path / "times.json").read_text()).items():
        print(f"\n{name}: {seconds * 1e6:.1f} µs a step")
