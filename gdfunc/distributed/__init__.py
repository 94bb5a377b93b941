"""Runs of several processes, on one machine or many, by torch.distributed under torchrun.

    # torchrun --nproc-per-node 2 script.py
    torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(minutes=1))
    step = gd.make_step(gd.distributed.data_parallel(loss_fn), gd.adam())
    final, trajectory = gd.train(step, step.init(params), data, index, lr, checkpoint_to="run.safetensors")

Every process is a rank: `rank` tells which, `world_size` of how many. All call the same lines with the same
arguments; without torchrun the same script is one process. `data_parallel` shares the rows of every batch
out. The parameters are those of one process up to rounding, and have the same bits on all ranks, whether or
not n or B is a multiple of the number of ranks. `grad`, `jvp` and `vmap` go through such a run.
Tensors that a loss closes over, and that are differentiated in reverse mode, are `replicated`.

Steps with a sum over the ranks run in eager on every backend but an explicit one, which refuses them. Steps
that each rank takes alone are compiled, and `average` joins the ranks between two calls of `train`.

Rank 0 writes the checkpoints; any number of ranks goes on from them. Ranks that differ in parameters,
settings, plan or number of steps raise the same `RankError` at the start. If a rank raises, is killed or
hangs, the others raise a `RankError` within the timeout of the process group, with the words of the first.

Example:
    >>> gd.distributed.rank(), gd.distributed.world_size()
    (0, 1)
"""

from ._average import average as average
from ._data_parallel import data_parallel as data_parallel
from ._group import RankError as RankError
from ._group import rank as rank
from ._group import world_size as world_size
from ._sums import replicated as replicated
