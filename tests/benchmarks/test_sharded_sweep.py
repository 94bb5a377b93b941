"""A sweep on two ranks of a thread each, against one such rank, without the start of the processes.

python -m pytest tests/benchmarks/test_sharded_sweep.py -m benchmark -n 0 -s
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MEMBERS, STEPS = 256, 4000
FACTOR = 1.7


def seconds(folder: Path, count: int) -> tuple[float, float]:
    """The medians of the slowest rank's seconds, by the wall and of CPU."""
    folder.mkdir()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    arguments = [str(count), str(MEMBERS), str(STEPS)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.sharded_sweep", str(folder), str(rank), *arguments],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    of_ranks = [json.loads(output.splitlines()[-1]) for output in outputs]
    wall, cpu = (
        statistics.median(max(rank[i][kind] for rank in of_ranks) for i in range(len(of_ranks[0])))
        for kind in (0, 1)
    )
    return wall, cpu


@pytest.mark.benchmark
def test_two_ranks_take_little_more_than_half_the_time_of_one(tmp_path):
    (one, cpu_of_one), (two, cpu_of_two) = (seconds(tmp_path / str(count), count) for count in (1, 2))
    print(f"\n{MEMBERS} members, {STEPS} steps, one rank and two: {one:.2f} s and {two:.2f} s")
    print(f"{one / two:.2f} times faster; in CPU seconds a rank {cpu_of_one / cpu_of_two:.2f} times")
    assert one / two >= FACTOR
