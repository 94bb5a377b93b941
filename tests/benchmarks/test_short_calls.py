"""W10: short runs that a Python loop calls again and again, each compiled beforehand.

python -m pytest tests/benchmarks/test_short_calls.py -m benchmark -n 0 -s

Peers that are not installed are left out.
"""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import vmap

import gdfunc as gd

from . import peers, workloads
from .timing import in_turn

pytestmark = [
    pytest.mark.benchmark,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # the peers' own warnings
]

CALLS, REPEATS = 10, 100


def race(name: str, runs: dict[str, Callable[[], Any]]) -> None:
    """Let the runs take turns of ten calls; print the median and the minimum of a call of each."""
    repeated = {each: lambda run=run: [run() for _ in range(CALLS)] for each, run in runs.items()}
    times = {
        each: [seconds / CALLS * 1e6 for seconds in taken]
        for each, taken in in_turn(repeated, REPEATS, warm_ups=3).items()
    }
    print(f"\n{name}: torch {torch.__version__}, CPU, one thread, {REPEATS} × {CALLS} calls, µs a call")
    ours = min(next(iter(times.values())))
    for each, taken in times.items():
        least = min(taken)
        print(
            f"{each:28} median {statistics.median(taken):9.1f}  minimum {least:9.1f}  {least / ours:6.2f}"
        )


def both(call: Callable[[str], Any]) -> dict[str, Callable[[], Any]]:
    """The same call on native and on the default backend."""
    return {f"gdfunc {backend}": partial(call, backend) for backend in ("native", "auto")}


@pytest.mark.parametrize("steps", [10, 1_000])
def test_run(steps: int) -> None:
    problem = workloads.regression(steps)
    run = workloads.training_run(problem)
    race(f"W1, {steps:,} steps", both(lambda backend: run(backend, steps)))


def test_run_of_ten_leaves() -> None:
    params = {f"w{i}": torch.full((3,), float(i)) for i in range(10)}

    def loss_fn(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        mean = batch[0].mean()
        return torch.stack([((w * mean - 1) ** 2).sum() for w in params.values()]).sum()

    problem = workloads.regression(10)
    step = gd.make_step(loss_fn)
    train = partial(gd.train, step, params, problem.data, problem.index, 0.1)
    race("ten leaves, 10 steps", both(lambda backend: train(backend=backend)))


def test_vmapped_run() -> None:
    problem = workloads.regression(10)
    step = gd.make_step(problem.loss_fn)
    lrs = torch.tensor([0.1, 0.05, 0.01])

    def train(backend: str, lr: Tensor) -> Any:
        return gd.train(step, problem.params, problem.data, problem.index, lr, backend=backend)

    race("W1 for three learning rates, 10 steps", both(lambda backend: vmap(partial(train, backend))(lrs)))


def test_compiled_run_with_its_loss() -> None:
    """The final loss of a run as one compiled function, which JAX calls by its jit."""
    steps = 1_000
    problem = workloads.regression(steps)
    step = gd.make_step(problem.loss_fn)

    def final_loss(lr: float | Tensor) -> Tensor:
        final, _ = gd.train(step, problem.params, problem.data, problem.index, lr)
        return problem.loss_fn(final, problem.data)

    lr = torch.tensor(problem.lr)
    runs = {
        f"gdfunc jit, {name}": partial(gd.jit(final_loss, backend=name), lr) for name in ("native", "auto")
    }
    if not peers.missing(peers.JAX_SCAN):
        runs[peers.JAX_SCAN] = partial(peers.jax_hypergradient(problem, "value"), steps)
    race("W1, 1,000 steps and the loss after them", runs)
