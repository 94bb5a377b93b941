"""Time a sweep on one of several ranks; the last line holds its seconds, wall and CPU, without the start.

python -m tests.benchmarks.sharded_sweep FOLDER RANK COUNT MEMBERS STEPS
"""

import json
import sys
import time

import torch
import torch.distributed as dist

import gdfunc as gd

REPEATS = 5


def main(folder: str, rank: str, count: str, members: str, steps: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=int(rank), world_size=int(count))
    problem = gd.problems.stock_regression()
    step = gd.make_step(problem.loss_fn, gd.momentum(0.9))
    index = gd.sample_batches(gd.random.key(0), 389, 32, int(steps))

    def run(lr: torch.Tensor) -> torch.Tensor:
        final, _ = gd.train(
            step, step.init(problem.params), problem.data, index, lr, record=(), backend="native"
        )
        return problem.loss_fn(final.params, problem.data)

    grid = gd.grid(lr=torch.logspace(-4, -1, int(members), dtype=torch.float64))
    gd.sweep(run, grid)  # compiles the loop
    seconds = []
    for _ in range(REPEATS):
        dist.barrier()
        wall, cpu = time.perf_counter(), time.process_time()
        gd.sweep(run, grid)
        seconds.append((time.perf_counter() - wall, time.process_time() - cpu))
    print(json.dumps(seconds))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
