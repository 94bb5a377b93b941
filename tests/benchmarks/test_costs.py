"""The costs by which backend="auto" decides, measured beside their constants in `gdfunc/_scan/_cost.py`.

python -m pytest tests/benchmarks/test_costs.py -m benchmark -n 0 -s
"""

import statistics
import time
from collections.abc import Callable
from functools import partial

import pytest
import torch

import gdfunc as gd
from gdfunc._scan import _cost
from gdfunc._scan._scan import fold

from . import workloads
from .timing import in_turn

REPEATS, STEPS = 5, 200
TRACED = gd.adjoints.Checkpoint(10**9)  # an adjoint that makes the eager backend replay a trace


def seconds(run: Callable[[], object]) -> float:
    """The median of some runs after a first."""
    return statistics.median(in_turn({"run": run}, REPEATS)["run"])


def eager_step(problem: workloads.Problem) -> float:
    run = workloads.training_run(problem)
    return seconds(lambda: run("eager", STEPS)) / STEPS


def trace(problem: workloads.Problem) -> float:
    """One step of a new loss, traced and replayed, less the step."""
    scales = iter(range(10**6))

    def once(**options: object) -> None:
        scale = float(next(scales))
        step = gd.make_step(lambda params, batch: problem.loss_fn(params, batch) * scale)
        gd.train(step, problem.params, problem.data, problem.index[:1], problem.lr, **options)

    return seconds(partial(once, adjoint=TRACED, backend="eager")) - seconds(partial(once, backend="eager"))


def operation() -> float:
    """An operation on a tensor of one entry, in a graph of a hundred that is replayed."""

    def f(carry: torch.Tensor, x: None) -> tuple[torch.Tensor, None]:
        for _ in range(100):
            carry = carry.sin()
        return carry, None

    run = partial(fold, f, torch.ones(1), None, STEPS, "eager", adjoint=TRACED, seen={})
    return seconds(run) / STEPS / 100


def inductor(problem: workloads.Problem) -> float:
    """A compilation, whose time depends on the caches: remove them first for the full time."""
    scale = time.time()  # another graph in each process
    step = gd.make_step(lambda params, batch: problem.loss_fn(params, batch) * scale, gd.adam())
    started = time.perf_counter()
    init, index = step.init(problem.params), problem.index[:8]
    gd.train(step, init, problem.data, index, problem.lr, backend="inductor")
    return time.perf_counter() - started


@pytest.mark.benchmark
@pytest.mark.usefixtures("one_thread")
def test_costs() -> None:
    one_weight, network = workloads.regression(STEPS), workloads.digits(STEPS)
    members = network._replace(lr=torch.logspace(-3, -1, 64))
    rows = [
        ("PYTHON_STEP", _cost.PYTHON_STEP, "a step of one weight", eager_step(one_weight)),
        ("", None, "of an MLP", eager_step(network)),
        ("", None, "of 64 MLPs", eager_step(members)),
        ("TRACE", _cost.TRACE, "a step of one weight", trace(one_weight)),
        ("", None, "of an MLP", trace(network)),
        ("OPERATION", _cost.OPERATION, "the sine of one number", operation()),
        ("INDUCTOR", sum(_cost.INDUCTOR), "an MLP with Adam", inductor(network)),
    ]
    print(f"\ntorch {torch.__version__}, one thread, medians of {REPEATS}, seconds")
    for name, constant, what, measured in rows:
        print(f"{name:12} {'' if constant is None else format(constant, '.1e'):8} {what:24} {measured:.1e}")
