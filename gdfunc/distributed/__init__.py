"""Runs of several processes, on one machine or many, by torch.distributed under torchrun.

    # torchrun --nproc-per-node 2 script.py
    torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(minutes=1))
    step = gd.make_step(gd.distributed.data_parallel(loss_fn), gd.adam())
    final, trajectory = gd.train(step, step.init(params), data, index, lr, checkpoint_to="run.safetensors")
    torch.distributed.destroy_process_group()  # without it, torch may abort at the end of the script

Every process is a rank: `rank` tells which, `world_size` of how many. All call the same lines with the same
arguments; without a process group there is one rank. `data_parallel` shares the rows of every batch out.
The parameters are those of one process up to rounding, and have the same bits on all ranks, whether or not
n or B is a multiple of the number of ranks. `grad`, `jvp` and `vmap` go through such a run. Tensors that a
loss closes over, and that are differentiated in reverse mode, are `replicated`.

Steps with a sum over the ranks run from Python under `backend="auto"`. Compiled backends refuse them, and
every `adjoint=` but `Reverse()` does, because it traces them. Steps that each rank takes alone are
compiled; `average` joins the ranks between two calls of `train`.

Rank 0 writes the checkpoints; any number of ranks goes on from them. Ranks that differ in parameters,
settings, plan or number of steps raise the same `RankError` at the start, and ranks that have drifted apart
at the end. If a rank raises, is killed or hangs, the others raise a `RankError` within the timeout of the
process group, with the words of the first, or the number of the one that is silent or late. For this every
rank gives the store of the group a sign of life a second, or every W/1000 seconds.

On paper, the limits at W ranks. A sum of n bytes over a ring takes 2(W − 1)·(α + n/(W·β)) seconds, with the
latency α of a message and the bandwidth β of a rank; each rank sends 2(1 − 1/W)·n bytes. With α = 5 µs and
β = 50 GB/s (a port of 400 Gbit/s), 10,000 ranks, and P float32 parameters, n = 4P, a step costs

    P | sent by a rank | a sum | of it latency | a step of 100 between two averages
    1e6 | 0.008 GB | 0.1 s | 100% | 1 ms
    1e9 | 8 GB | 0.26 s | 38% | 2.6 ms
    1e11 | 800 GB | 16 s | 1% | 161 ms

The latency of the ring rules below n = α·β·W = 2.5 GB. NCCL then takes trees, whose latency grows with
the logarithm: 2·log₂W·α = 0.13 ms. A step of c seconds with a sum of s seconds uses c/(c + s) of the
machines, and H local steps between two averages c/(c + s/H): they pay where s > c. A step also waits for
the slowest of the ranks. Batches much larger than `gd.stats.noise_scale` hardly lower the number of steps;
further ranks are better used for other members of a sweep.

Each rank takes the whole batch from the data before it evaluates its rows: 10⁶ samples of 1 kB are 1 GB, or
0.1 s at 10 GB/s. Comparing the ranks at the start of a run gathers 32 bytes a rank, about ten times, and
after each segment of 0.1 s or a step 8 bytes: the ranks end it together.

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
