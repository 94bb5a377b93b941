"""Runs of several ranks: each law is a function of `rank_laws`, which processes over gloo call."""

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import gdfunc as gd
from gdfunc._errors import untraceable
from gdfunc._scan._scan import falls_back
from gdfunc.distributed import RankError, average, data_parallel
from gdfunc.distributed._gather import agree, all_gather_tree

from . import rank_laws
from .rank_laws import loss_fn, problem, run
from .ranks import Ended, check, laws_of, start
from .ring import cost, simulate

LAWS = laws_of(rank_laws)
ENDS = [name for name in LAWS if name.startswith("a_rank_that_")]


@pytest.fixture(scope="module", params=[2, 3])
def ended(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Ended]:
    """Run all laws on ranks that are started once, and return how each rank ended."""
    folder = tmp_path_factory.mktemp("ranks") / str(request.param)
    folder.mkdir()
    return start(rank_laws, folder, request.param, [law for law in LAWS if law not in ENDS])


@pytest.mark.long
@pytest.mark.parametrize("law", [law for law in LAWS if law not in ENDS])
def test_ranks(law, ended):
    check(law, ended)


@pytest.mark.long
@pytest.mark.parametrize(
    ("law", "code", "words"),
    [
        ("a_rank_that_raises", 3, "rank 1 ended with ZeroDivisionError: the disk of this rank is full"),
        ("a_rank_that_is_killed", -9, "rank 1 has given no sign of life for 3 s"),
        ("a_rank_that_is_taken_back", 3, "rank 1 ended with TrainingInterrupted: stopped after"),
        ("a_rank_that_hangs", 3, "rank 1 is late: it has begun"),
        ("a_rank_that_goes_on_after_its_error", 3, "rank 1 ended with ZeroDivisionError: the disk of"),
    ],
)
def test_one_rank_that_ends_ends_all(law, code, words, tmp_path):
    first, last = start(rank_laws, tmp_path, 2, [law], seconds=5.0)
    assert (first.code, last.code) == (3, code)
    assert "RankError rank 0 of 2 waited for a sum, but another rank has ended" in first.output
    assert words in first.output
    if law == "a_rank_that_goes_on_after_its_error":
        assert "rank 1 of 2 ended an earlier run with an error, and rank 0 did not end it" in last.output
    if law == "a_rank_that_is_killed":
        assert "holds the run after" in first.output
        assert gd.load(tmp_path / "run.safetensors")["step"] > 0


@pytest.mark.long
def test_a_file_goes_on_with_any_number_of_ranks(tmp_path):
    for count in (2, 1, 3):
        folder = tmp_path / str(count)
        folder.mkdir()
        for rank in start(rank_laws, folder, count, ["files_of_other_world_sizes_are_read"]):
            assert rank.errors == {"files_of_other_world_sizes_are_read": ""}, rank.output
    assert gd.load(tmp_path / "shared.safetensors")["step"] == 18


@pytest.mark.long
@pytest.mark.parametrize("backend", ["eager", "native"])
def test_one_process_runs_as_without(backend):
    step = gd.make_step(data_parallel(loss_fn), gd.adam())
    shared, trajectory = run(step, backend=backend)
    alone, of_alone = run(gd.make_step(loss_fn, gd.adam()), backend=backend)
    for a, b in zip(gd.tree.leaves((shared, trajectory)), gd.tree.leaves((alone, of_alone)), strict=True):
        assert a.equal(b)
    assert repr(step).startswith("make_step(loss_fn=data_parallel(loss_fn), transform=adam(")


def test_loss_of_one_process_is_the_loss_itself():
    params, data, _ = problem()
    assert data_parallel(loss_fn)(params, data).equal(loss_fn(params, data))
    tree = average(params)
    assert tree["w"].equal(params["w"])
    assert tree["w"] is not params["w"]
    agree(3, "three")
    assert all_gather_tree(params)[0]["w"].equal(params["w"])


@pytest.mark.parametrize(
    "call",
    [
        lambda: data_parallel(loss_fn),
        lambda: average(problem()[0]),
        lambda: gd.sweep(lambda lr: lr, gd.grid(lr=[1.0])),
        lambda: gd.search.halving(lambda lr, steps, carry: (lr, {"loss": lr}), gd.grid(lr=[1.0]), [1]),
    ],
)
def test_processes_without_a_group_are_refused(call, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RankError, match="torchrun started 2 processes, but they form no group: call"):
        call()
    assert gd.sweep(lambda lr: lr, gd.grid(lr=[1.0]), shard=False).outputs.tolist() == [1.0]


def test_a_group_of_another_size_is_refused():
    params, data, index = problem()
    step = gd.make_step(replace(data_parallel(loss_fn), ranks=2))
    assert step.ranks == 2
    for call in (lambda: step(params, data, 0.1), lambda: gd.train(step, params, data, index, 0.1)):
        with pytest.raises(RankError, match="number of ranks was 2, but now it is 1; call it after"):
            call()


def test_steps_of_ranks_keep_their_number_in_methods_around_them():
    shared = data_parallel(loss_fn)
    for step in (gd.make_step(shared), gd.methods.sam(shared, rho=0.1), gd.make_step(loss_fn=shared)):
        assert (
            step.ranks == gd.methods.ema(step, 0.9).ranks == gd.methods.ema(step=step, decay=0.9).ranks == 1
        )
    assert gd.make_step(loss_fn).ranks is None


def test_a_loop_with_collectives_falls_back_in_silence():
    error = untraceable("the step sums over the ranks")
    error.is_expected = True
    assert falls_back(error, "auto", 10**7)
    with pytest.warns(gd.PerformanceWarning, match="sums over the rows"):
        falls_back(untraceable("the step sums over the rows"), "auto", 10**7)


def test_what_is_no_loss_is_refused():
    with pytest.raises(TypeError, match="loss_fn takes"):
        data_parallel(lambda params: params)


@pytest.mark.parametrize("ranks", range(1, 8))
def test_ring_takes_what_its_formula_says(ranks):
    latency, bandwidth = 5e-6, 1e7
    for size in (7 * ranks, 7 * ranks + 3):
        vectors = [[(r + 2) ** 3 * i for i in range(size)] for r in range(ranks)]
        found = simulate(vectors, latency, bandwidth)
        assert found.sums == [[sum(column) for column in zip(*vectors, strict=True)]] * ranks
        largest = -(-size // ranks) * ranks  # of equal chunks
        assert max(found.ends) <= cost(largest, ranks, latency, bandwidth) + 1e-15
        assert sum(found.sent) == 2 * (ranks - 1) * size
        if size % ranks == 0:
            assert found.ends == pytest.approx([cost(size, ranks, latency, bandwidth)] * ranks)
            assert found.sent == [2 * (ranks - 1) * size // ranks] * ranks


def test_ring_waits_for_its_slowest_rank():
    alone = cost(12, 4, 1.0, 3.0)
    found = simulate([[1] * 12] * 4, 1.0, 3.0, starts=[0.0, 9.0, 0.0, 0.0])
    assert max(found.ends) == pytest.approx(9.0 + alone)
    assert min(found.ends) > 9.0


def test_guide_has_the_numbers_of_the_formula():
    ranks, latency, bandwidth = 10_000, 5e-6, 50e9
    guide = " ".join(gd.distributed.__doc__.split())
    for entries in (1e6, 1e9, 1e11):
        sent, whole = 2 * (ranks - 1) / ranks * 4 * entries, cost(4 * entries, ranks, latency, bandwidth)
        share = 2 * (ranks - 1) * latency / whole
        row = f"{entries:.0e} | {sent / 1e9:.3g} GB | {whole:.2g} s | {share:.0%} | {whole * 10:.3g} ms"
        assert row.replace("e+0", "e").replace("e+", "e") in guide, row
    assert f"{latency * bandwidth * ranks / 1e9:.2g} GB" in guide
    assert f"{2 * math.log2(ranks) * latency * 1e3:.2g} ms" in guide


@pytest.mark.slow
def test_long_run_goes_on_to_the_same_bits_under_torchrun(tmp_path):
    root = Path(gd.__file__).parents[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    demo = [str(root / "demos" / "long_run.py"), "--fast", "--out", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *demo], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "the run has the losses of one that was not: maximum difference 0" in done.stdout
    assert (tmp_path / "card.json").exists()
