"""Starts the ranks of a run as processes that talk over gloo, and runs the laws of `rank_laws` in them.

    python -m tests.ranks FOLDER RANK COUNT SECONDS LAW...

Each rank writes what became of each law into FOLDER/RANK.json: nothing, or the error.
"""

import datetime
import json
import os
import subprocess
import sys
import traceback
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

from gdfunc._scan.backends.native import _build


class Ended(NamedTuple):
    """How a rank has ended."""

    code: int
    output: str
    errors: dict[str, str]


def start(folder: Path, count: int, laws: list[str], seconds: float = 30.0) -> list[Ended]:
    """Run laws in so many ranks, whose collectives time out after so many seconds."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    arguments = [str(count), str(seconds), *laws]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.ranks", str(folder), str(rank), *arguments],
            cwd=Path(__file__).parents[1],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]
    ended = []
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, (process, output) in enumerate(zip(processes, outputs, strict=True)):
        path = folder / f"{rank}.json"
        errors = json.loads(path.read_text()) if path.exists() else {}
        ended.append(Ended(process.returncode, output, errors))
    return ended


def main(folder: str, rank: str, count: str, seconds: str, *laws: str) -> None:
    from . import rank_laws

    torch.set_num_threads(1)
    if not laws[0].startswith("times_"):
        _build._FLAGS[0] = "-O0"
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "`torch.jit.script")
    timeout = datetime.timedelta(seconds=float(seconds))
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, timeout, rank=int(rank), world_size=int(count))
    errors = {}
    for law in laws:
        try:
            getattr(rank_laws, law)(Path(folder))
            errors[law] = ""
        except (Exception, pytest.fail.Exception):
            errors[law] = traceback.format_exc()
        (Path(folder) / f"{rank}.json").write_text(json.dumps(errors))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
