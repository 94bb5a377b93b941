"""Sweeps whose members several ranks share: each law is a function of `sweep_ranks`."""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch

import gdfunc as gd
from gdfunc._sweep import _ranks

from . import sweep_ranks
from .assertions import assert_refused, assert_same
from .ranks import Ended, check, laws_of, start
from .sweep_ranks import GRID, ROOT, RUNGS, counted, parts_of, run

ENDS = ["killed", "halving_killed"]
LAWS = laws_of(sweep_ranks)


@pytest.fixture(scope="module", params=[2, 3])
def ended(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Ended]:
    """Run all laws on ranks that are started once, and return how each rank ended."""
    folder = tmp_path_factory.mktemp("ranks")
    return start(sweep_ranks, folder, request.param, [law for law in LAWS if law not in ENDS], seconds=60.0)


@pytest.mark.long
@pytest.mark.parametrize("law", [law for law in LAWS if law not in ENDS])
def test_ranks(law, ended):
    check(law, ended)


@pytest.mark.long
def test_a_rank_that_is_killed_costs_its_members_only(tmp_path):
    first, last = start(sweep_ranks, tmp_path, 2, ["killed"], seconds=60.0)
    assert (first.code, last.code) == (3, -9)
    assert "rank 1 of 2 has given no sign of life" in first.output
    assert "3 of the 10 members are lost: " in first.output
    assert "the same call goes on from it" in first.output
    calls = []
    result = gd.sweep(partial(counted, calls), GRID, chunk_size=1, checkpoint_to=tmp_path / "chunks")
    assert len(calls) == 3
    assert_same(parts_of(result), parts_of(gd.sweep(run, GRID, chunk_size=1)))


@pytest.mark.long
def test_a_rank_that_is_killed_costs_a_halving_its_members_of_the_rung_only(tmp_path):
    first, last = start(sweep_ranks, tmp_path, 2, ["halving_killed"], seconds=60.0)
    assert (first.code, last.code) == (3, -9)
    assert "rank 1 of 2 has given no sign of life" in first.output
    assert "1 of the 3 members are lost: 2; " in first.output
    assert "where these members were left: [" in first.output
    calls, how = [], {"eta": 1.5, "chunk_size": 1}
    result = gd.search.halving(partial(counted, calls), GRID, RUNGS, checkpoint_to=tmp_path / "file", **how)
    assert [call["steps"].start for call in calls] == [2] + [2] * 3 + [
        6
    ] * 4  # one is lost; the second group had not begun
    whole = gd.search.halving(run, GRID, RUNGS, **how)
    assert result.ranking == whole.ranking
    assert_same(parts_of(result), parts_of(whole))
    assert not (tmp_path / "file.rungs").exists()


SCRIPT = """
import datetime, os, signal, sys
import torch
import gdfunc as gd
folder = sys.argv[1]
torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(minutes=1))
assert torch.get_num_threads() == 1

def run(lr):
    open(f"{folder}/ran", "a").write(f"{float(lr):g}\\n")
    if lr == 6 and not os.path.exists(f"{folder}/killed"):
        open(f"{folder}/killed", "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return lr**2

grid = gd.grid(lr=[float(i) for i in range(8)])
result = gd.sweep(run, grid, chunk_size=1, checkpoint_to=f"{folder}/chunks")
print("rows", result.outputs.tolist())
torch.distributed.destroy_process_group()
"""


@pytest.mark.long
def test_the_same_command_goes_on_after_a_rank_is_killed(tmp_path):
    """Not by --max-restarts, with which gloo may find the addresses of killed processes in the store."""
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment["PYTHONPATH"] = str(ROOT)
    run = partial(subprocess.run, env=environment, capture_output=True, text=True, timeout=240)
    first, second = (run([*command, str(tmp_path / "script.py"), str(tmp_path)]) for _ in range(2))
    assert first.returncode != 0
    assert second.returncode == 0, second.stderr
    assert "rows" not in first.stdout
    for i in range(8):
        assert str(float(i * i)) in second.stdout
    ran = (tmp_path / "ran").read_text().split()
    assert ran.count("4") == ran.count("5") == ran.count("7") == 1
    assert ran.count("6") == 2


# The folder of a sweep, on one machine.


@pytest.mark.long
def test_a_sweep_goes_on_from_its_folder_to_the_same_bits(tmp_path):
    whole, calls = gd.sweep(run, GRID, chunk_size=2), []

    def failing(**point):
        if len(calls) == 3:
            raise MemoryError
        return counted(calls, **point)

    path = tmp_path / "new" / "chunks"
    with pytest.raises(MemoryError):
        gd.sweep(failing, GRID, chunk_size=2, checkpoint_to=path)
    assert sorted(file.name for file in path.iterdir()) == [f"{i:09}.safetensors" for i in (0, 2, 4)]
    result = gd.sweep(partial(counted, calls), GRID, chunk_size=2, checkpoint_to=path)
    assert len(calls) == 6
    assert_same(parts_of(result), parts_of(whole))
    assert len(list(path.iterdir())) == 6


@pytest.mark.long
def test_an_interruption_and_a_folder_go_together(tmp_path):
    calls = []

    def impatient(**point):
        if len(calls) == 3:
            raise KeyboardInterrupt
        return counted(calls, **point)

    with pytest.raises(gd.SweepInterrupted) as error:
        gd.sweep(impatient, GRID, chunk_size=2, checkpoint_to=tmp_path)
    assert f"{tmp_path} holds them too" in "".join(error.value.__notes__)
    again = []
    result = gd.sweep(
        partial(counted, again), GRID, chunk_size=2, checkpoint_to=tmp_path, resume=error.value
    )
    assert len(again) == 3
    assert_same(parts_of(result), parts_of(gd.sweep(run, GRID, chunk_size=2)))


def test_a_foreign_folder_is_refused(tmp_path):
    lrs = torch.tensor([[0.1, 0.2], [0.1, 0.3]])

    def doubled(x):
        return 2 * x

    gd.sweep(doubled, gd.grid(x=lrs), checkpoint_to=tmp_path)
    for other in (gd.grid(x=lrs + 1), gd.grid(x=lrs.double()), gd.grid(zipped=True, x=lrs)):
        assert_refused(
            lambda grid=other: gd.sweep(doubled, grid, checkpoint_to=tmp_path),
            "000000000.safetensors: it is no part of this sweep",
        )
    file = tmp_path / "000000000.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    damaged = "000000000.safetensors is damaged"
    assert_refused(lambda: gd.sweep(doubled, gd.grid(x=lrs), checkpoint_to=tmp_path), damaged)


def test_a_folder_needs_values(tmp_path):
    def total(a):
        return gd.sweep(lambda x: a * x, gd.grid(x=[1.0]), checkpoint_to=tmp_path).outputs.sum()

    assert_refused(lambda: torch.func.grad(total)(torch.tensor(1.0)), "checkpoint_to writes values")


# Whose the members are.


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_every_member_has_one_rank_and_all_have_about_as_many(count, monkeypatch):
    grid = gd.grid(batch_size=[1, 2, 3], lr=[0.1, 0.2], key=gd.random.split(gd.random.key(0), 5))
    ranks = object.__new__(_ranks.Ranks)
    ranks.grid, ranks.count = grid, count
    parts = [ranks.groups_of(i) for i in range(count)]
    assert sorted(m for part in parts for group in part for m in group) == [*range(30)]
    sizes = [sum(map(len, part)) for part in parts]
    assert max(sizes) - min(sizes) <= 3
    looped = [{grid[m]["batch_size"] for m in group} for part in parts for group in part]
    assert all(len(values) == 1 for values in looped)
