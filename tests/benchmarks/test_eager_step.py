"""A step of gdfunc in Python, against the tutorial's loop of torch.optim, in one run on one thread.

python -m pytest tests/benchmarks/test_eager_step.py -m benchmark -s
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch

import gdfunc as gd

from . import peers, workloads
from .timing import in_turn

pytestmark = [pytest.mark.benchmark, pytest.mark.usefixtures("one_thread")]

REPEATS = 15
WORKLOADS = {  # the problem, and the number of steps
    "W1 regression": (workloads.regression, 500),
    "W2 digits": (workloads.digits, 300),
    "W12 digits, CNN": (workloads.digits_cnn, 50),
}
SIZES = [16, 32, 32, 32, 32, 1]


def race(runs: dict[str, Callable[[], Any]], steps: int) -> list[float]:
    """Let the runs take turns, print what a step of each takes, and return the medians in µs."""
    # The time of this process alone, which another does not slow down as much.
    found = in_turn(runs, REPEATS, clock=time.process_time)
    times = {name: [seconds / steps * 1e6 for seconds in taken] for name, taken in found.items()}
    print(f"\ntorch {torch.__version__}, CPU, 1 thread, medians of {REPEATS} × {steps} steps, µs a step")
    for name, taken in times.items():
        print(f"{name:42} {statistics.median(taken):8.1f}  ({min(taken):.1f} to {max(taken):.1f})")
    return [statistics.median(taken) for taken in times.values()]


@pytest.mark.parametrize("name", WORKLOADS)
def test_an_eager_step_costs_at_most_1_15_of_torch_optims(name):
    build, steps = WORKLOADS[name]
    problem = build(steps)
    their_run, our_run = peers.torch_optim(problem), workloads.ours(problem)["gdfunc eager"]
    torch.testing.assert_close(our_run(20), their_run(20), rtol=1e-5, atol=1e-6)
    runs = {"gdfunc eager": partial(our_run, steps), "torch.optim loop": partial(their_run, steps)}
    ours, theirs = race(runs, steps)
    print(f"{name}: ours / theirs {ours / theirs:.2f}")
    assert ours <= 1.15 * theirs


def loss_fn(params, batch):
    x, y = batch
    for layer in range(4):
        x = torch.relu(x @ params[f"w{layer}"] + params[f"b{layer}"])
    return ((x @ params["w4"] + params["b4"] - y) ** 2).mean()


def test_an_adam_step_costs_at_most_a_tenth_more_than_its_gradient_and_torchs_adam():
    generator = torch.Generator().manual_seed(0)
    params = {}
    for i, shape in enumerate(pairwise(SIZES)):
        params |= {f"w{i}": torch.randn(shape, generator=generator) / 4, f"b{i}": torch.zeros(shape[1])}
    batch = torch.randn(32, 16, generator=generator), torch.randn(32, 1, generator=generator)

    step, gradient, steps = gd.make_step(loss_fn, gd.adam()), gd.batch_grad(loss_fn), 100
    state = step.init(params)
    theirs = [leaf.clone().requires_grad_() for leaf in params.values()]
    optimizer = torch.optim.Adam(theirs, lr=1e-3, foreach=True)

    def their_step():
        for parameter, slope in zip(theirs, gradient(params, batch)[0].values(), strict=True):
            parameter.grad = slope
        optimizer.step()

    runs = {
        "gdfunc, gradient and Adam": lambda: step(state, batch, 1e-3),
        "gdfunc gradient": lambda: gradient(params, batch),
        "gdfunc gradient and torch.optim.Adam": their_step,
    }
    repeated = {name: lambda run=run: [run() for _ in range(steps)] for name, run in runs.items()}
    ours, _, both = race(repeated, steps)
    print(f"ours / theirs: {ours / both:.2f}")
    assert ours <= 1.1 * both
