"""Laws of sweeps whose members several ranks share, which `ranks` runs."""

import os
import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

import gdfunc as gd
from gdfunc import _tree
from gdfunc._scan.backends.native import _build
from gdfunc._sweep import _ranks
from gdfunc.distributed._gather import agree
from gdfunc.distributed._group import RankError

from .assertions import assert_same
from .references import linear_data, linear_loss

ROOT = Path(__file__).parents[1]
DATA = linear_data(0, 12, 3)
START = {"w": torch.zeros(3, dtype=torch.float64), "b": torch.zeros((), dtype=torch.float64)}
LRS = torch.tensor([0.3, 0.1, 1e200, 0.03, 0.01], dtype=torch.float64)
GRID = gd.grid(batch_size=[4, 3], lr=LRS)
RUNGS = [2, 6, 12]


def prepare(laws: Sequence[str]) -> None:
    """Compile quickly, and wait for a silent rank no longer than a test can."""
    _build._FLAGS[0], _ranks.SILENCE = "-O0", 6.0


# Runs.


def run(lr, batch_size=4, steps=slice(0, 12), carry=None, **kwargs):
    index = gd.epoch_batches(gd.random.key(3), n=12, batch_size=batch_size, epochs=4)
    carry = START if carry is None else carry
    return gd.train(gd.make_step(linear_loss), carry, DATA, index[steps], lr, **kwargs)


def counted(calls, **point):
    calls.append(point)
    return run(**point)


def close(a: Any, b: Any) -> bool:
    pairs = zip(_tree.leaves(a), _tree.leaves(b), strict=True)
    return all(x.shape == y.shape and x.allclose(y, 1e-10, 1e-10, equal_nan=True) for x, y in pairs)


def parts_of(result: gd.SweepResult) -> Any:
    return result.outputs, result.diverged, result.lengths


def check_same_on_all_ranks(result: gd.SweepResult) -> None:
    rows = [leaf.numpy().tobytes() for leaf in _tree.leaves(parts_of(result))]
    agree(rows, "the rows that they have now")


# Laws: functions of a folder, which all ranks call in the same order.


def every_rank_has_the_rows_of_the_plain_sweep(_):
    for chunk_size in (None, 2):
        result = gd.sweep(run, GRID, chunk_size=chunk_size)
        check_same_on_all_ranks(result)
        plain = gd.sweep(run, GRID, chunk_size=chunk_size, shard=False)
        assert close(parts_of(result), parts_of(plain))
        assert result.grid is GRID
        assert result.diverged.sum() == 2


def a_rank_runs_its_members_only(_):
    calls = []
    gd.sweep(partial(counted, calls), GRID, chunk_size=1)
    fewest, most = len(GRID) // dist.get_world_size(), -(-len(GRID) // dist.get_world_size())
    assert fewest <= len(calls) <= most
    sizes = [None] * dist.get_world_size()
    dist.all_gather_object(sizes, len(calls))
    assert sum(sizes) == len(GRID)


def there_may_be_fewer_members_than_ranks(_):
    class Own(NamedTuple):
        loss: torch.Tensor

    result = gd.sweep(lambda lr: Own(lr * 2), gd.grid(lr=[0.5]))
    check_same_on_all_ranks(result)
    assert result.outputs == Own(torch.tensor([1.0]))


def a_sweep_inside_a_member_is_its_ranks_own(_):
    def outer(lr):
        inner = gd.sweep(lambda x: x * lr, gd.grid(x=[1.0, 2.0, 4.0]))
        return inner.outputs

    result = gd.sweep(outer, gd.grid(lr=[1.0, 10.0, 100.0, 1000.0]), chunk_size=1)
    check_same_on_all_ranks(result)
    assert result.outputs[:, 2].tolist() == [4.0, 40.0, 400.0, 4000.0]


def a_sweep_under_a_transformation_is_its_ranks_own(_):
    scale = 1.0 + dist.get_rank()
    slope = torch.func.grad(lambda a: gd.sweep(lambda x: x * a, gd.grid(x=[1.0, scale])).outputs.sum())
    assert slope(torch.tensor(1.0)) == 1.0 + scale


def members_that_all_ranks_run_together_are_not_shared(_):
    def together(lr):
        step = gd.make_step(gd.distributed.data_parallel(linear_loss))
        return gd.train(step, START, DATA, gd.full_batch(12, 5), lr)[0]

    grid = gd.grid(lr=LRS[:2])
    for chunk_size in (None, 1):
        with pytest.raises(RankError, match="sweep whose members the ranks share"):
            gd.sweep(together, grid, chunk_size=chunk_size)
    result = gd.sweep(together, grid, shard=False)
    check_same_on_all_ranks(result)
    assert result.outputs["w"].shape == (2, 3)


def a_halving_decides_alike_on_all_ranks(_):
    result = gd.search.halving(run, GRID, RUNGS, "loss")
    agree([result.ranking, result.steps.tolist(), result.best], "their halvings")
    check_same_on_all_ranks(result)
    alone = gd.search.halving(run, GRID, RUNGS, "loss", shard=False)
    assert result.ranking == alone.ranking
    assert close(parts_of(result), parts_of(alone))
    assert close(result.finals, alone.finals)


def an_interrupted_sweep_goes_on_to_the_same_bits(_):
    whole, calls, again = gd.sweep(run, GRID, chunk_size=1), [], []

    def impatient(**point):
        if len(calls) == 2:
            raise KeyboardInterrupt
        return counted(calls, **point)

    with pytest.raises(gd.SweepInterrupted) as error:
        gd.sweep(impatient, GRID, chunk_size=1)
    assert len(error.value.members) == 2
    result = gd.sweep(partial(counted, again), GRID, chunk_size=1, resume=error.value)
    assert_same(parts_of(result), parts_of(whole))
    check_same_on_all_ranks(result)
    assert 0 < len(again) < len(GRID) // 2


def a_folder_holds_the_chunks_of_all_ranks(folder):
    calls, path = [], folder / "chunks"
    whole = gd.sweep(run, GRID, chunk_size=2, checkpoint_to=path)
    again = gd.sweep(partial(counted, calls), GRID, chunk_size=2, checkpoint_to=path)
    alone = gd.sweep(partial(counted, calls), GRID, chunk_size=3, checkpoint_to=path, shard=False)
    assert not calls
    assert_same(parts_of(whole), parts_of(again))
    assert_same(parts_of(whole), parts_of(alone))


def ranks_with_other_grids_are_refused(_):
    grid = gd.grid(lr=[0.1, 0.2 + dist.get_rank()])
    with pytest.raises(RankError, match="differ in the grid of a sweep"):
        gd.sweep(lambda lr: lr, grid)
    assert gd.sweep(lambda lr: lr, gd.grid(lr=[1.0, 2.0])).outputs.tolist() == [1.0, 2.0]


def a_rank_that_raises_is_named_with_its_members(_):
    last = dist.get_world_size() - 1

    def failing(lr):
        if dist.get_rank() == last:
            raise OverflowError("the disk of this rank is full")
        return lr

    expected = (OverflowError, "disk") if dist.get_rank() == last else (RankError, f"rank {last} of")
    with pytest.raises(expected[0], match=expected[1]) as error:
        gd.sweep(failing, gd.grid(lr=[float(i) for i in range(2 * (last + 1))]))
    if dist.get_rank() != last:
        said = str(error.value)
        assert "ended with OverflowError: the disk of this rank is full" in said
        assert (
            f"2 of the {2 * (last + 1)} members are lost: {2 * last}, {2 * last + 1}; checkpoint_to="
            in said
        )
    assert gd.sweep(lambda lr: lr, gd.grid(lr=[1.0, 2.0])).outputs.tolist() == [1.0, 2.0]


def killed(folder):
    """The last rank is killed in its second chunk; the others tell of it within the timeout."""
    calls = []

    def deadly(**point):
        if dist.get_rank() == 1 and len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return counted(calls, **point)

    try:
        gd.sweep(deadly, GRID, chunk_size=1, checkpoint_to=folder / "chunks")
    except RankError as error:
        print(error, flush=True)
        os._exit(3)


def halving_killed(folder):
    """The last rank is killed in its second chunk of the second rung."""
    calls = []

    def deadly(**point):
        calls.append(point["steps"].start)
        if dist.get_rank() == 1 and calls.count(2) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return run(**point)

    try:
        gd.search.halving(deadly, GRID, RUNGS, eta=1.5, chunk_size=1, checkpoint_to=folder / "file")
    except RankError as error:
        print(error, *error.__notes__, flush=True)
        os._exit(3)


def a_halving_of_all_ranks_leaves_one_file(folder):
    for shard in (True, False):
        result, again = (
            gd.search.halving(run, GRID, RUNGS, checkpoint_to=folder / f"file{shard}", shard=shard)
            for _ in range(2)
        )
        check_same_on_all_ranks(result)
        assert_same(parts_of(result), parts_of(again))
        agree(sorted(path.name for path in folder.glob("file*")), "the files")
    assert len([*folder.glob("file*")]) == 2
