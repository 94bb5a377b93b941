"""Starts the ranks of a run as processes that talk over gloo, and runs laws in them.

    python -m tests.ranks ROOM FOLDER RANK COUNT SECONDS LAW...

A law is a function of a folder in tests/ROOM.py, whose `prepare` each rank calls first. Each rank writes
into FOLDER/RANK.json how each law ended: nothing, or the error.
"""

import datetime
import inspect
import json
import os
import subprocess
import sys
import traceback
import warnings
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist


class Ended(NamedTuple):
    """How a rank has ended."""

    code: int
    output: str
    errors: dict[str, str]


def laws_of(room: ModuleType) -> list[str]:
    """List the laws of a room: its functions of a folder."""
    functions = [f for f in vars(room).values() if inspect.isfunction(f) and f.__module__ == room.__name__]
    return [f.__name__ for f in functions if [*inspect.signature(f).parameters] in (["_"], ["folder"])]


def start(
    room: ModuleType, folder: Path, count: int, laws: list[str], seconds: float = 30.0
) -> list[Ended]:
    """Run laws of a room in so many ranks, whose collectives time out after so many seconds."""
    name = room.__name__.rpartition(".")[2]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    arguments = [str(count), str(seconds), *laws]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.ranks", name, str(folder), str(rank), *arguments],
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


def check(law: str, ended: list[Ended]) -> None:
    """Fail with the error of the first rank on which a law was broken."""
    for number, rank in enumerate(ended):
        error = rank.errors.get(law, rank.output)
        assert not error, f"rank {number}: {error}"
        assert rank.code == 0, f"rank {number} ended with {rank.code}: {rank.output}"


def main(name: str, folder: str, rank: str, count: str, seconds: str, *laws: str) -> None:
    room = import_module(f"tests.{name}")
    torch.set_num_threads(1)
    room.prepare(laws)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "`torch.jit.script")
    timeout = datetime.timedelta(seconds=float(seconds))
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, timeout, rank=int(rank), world_size=int(count))
    errors = {}
    for law in laws:
        try:
            getattr(room, law)(Path(folder))
            errors[law] = ""
        except (Exception, pytest.fail.Exception):
            errors[law] = traceback.format_exc()
        (Path(folder) / f"{rank}.json").write_text(json.dumps(errors))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
