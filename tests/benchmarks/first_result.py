"""Time one contender from its imports to the result of W1 with T = 1,000; meant for a fresh process."""

import sys
import time

import torch

from . import peers, workloads

STEPS = 1000


def main(name: str) -> None:
    torch.set_num_threads(1)
    peers.preload(name)
    problem = workloads.regression(STEPS)  # the data and the plan are given to all
    started = time.perf_counter()
    build = peers.TRAINERS.get(name)
    run = build(problem) if build else workloads.ours(problem)[name]
    run(STEPS)
    print(time.perf_counter() - started)


if __name__ == "__main__":
    main(sys.argv[1])
