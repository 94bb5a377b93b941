"""Race one workload on all cores that are named, in a fresh process; the last line holds the report."""

import json
import os
import sys


def main(task: str, *cores: str) -> None:
    os.sched_setaffinity(0, set(map(int, cores)))
    import torch

    from . import test_workloads

    torch.set_num_threads(len(cores))
    report = test_workloads.Report(f"{len(cores)}, on all cores")
    test_workloads.race(report, f"{task}, {len(cores)} cores", task)
    print(json.dumps([[row | report.setting for row in report.rows], list(report.left_out)]))


if __name__ == "__main__":
    main(*sys.argv[1:])
