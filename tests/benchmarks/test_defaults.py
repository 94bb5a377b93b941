"""W11: what a user gets who says nothing about backends, against the tutorial's loop and JAX.

python -m pytest tests/benchmarks/test_defaults.py -m benchmark -n 0 -s

The first run of each contender compiles, and is not timed. Peers that are not installed are left out.
"""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import gdfunc as gd

from . import peers, workloads
from .timing import in_turn
from .workloads import Problem

pytestmark = [
    pytest.mark.benchmark,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # the peers' own warnings
]

REPEATS = 7
EPOCHS, BATCH = 20, 30


def race(name: str, runs: dict[str, Callable[[], Any]]) -> None:
    """Let the runs take turns, and print the median of each and its ratio to ours, which is the first."""
    medians = {each: statistics.median(taken) for each, taken in in_turn(runs, REPEATS).items()}
    ours, *_ = medians.values()
    print(f"\n{name}: torch {torch.__version__}, CPU, one thread, medians of {REPEATS}")
    for each, taken in medians.items():
        print(f"{each:36} {taken * 1e3:10.3f} ms   {taken / ours:8.2f} of ours")


def contenders(problem: Problem, steps: int) -> dict[str, Callable[[], Any]]:
    """The default, eager, and the peers that are there."""
    run = workloads.training_run(problem)
    ours = {f"gdfunc {how}": partial(run, how, steps) for how in ("auto", "eager", "native", "inductor")}
    names = [name for name in ("torch.optim loop", peers.JAX) if not peers.missing(name)]
    return ours | {name: partial(peers.TRAINERS[name](problem), steps) for name in names}


TASKS: dict[str, tuple[Callable[[int], Problem], int]] = {
    "W1, 200 steps": (workloads.regression, 200),
    "W1, 1,000 steps": (workloads.regression, 1_000),
    "W2 for 64 learning rates, 200 steps": (partial(workloads.sweep, 64), 200),
    "CNN on digits, an epoch": (workloads.digits_cnn, 28),
    "CNN on digits, 20 epochs": (workloads.digits_cnn, 560),
}


@pytest.mark.parametrize("task", TASKS)
def test_defaults(task: str) -> None:
    build, steps = TASKS[task]
    problem = build(steps)
    runs = contenders(problem, steps)
    if problem.name == "cnn":
        runs["torch.compile of torch.optim's step"] = compiled(problem, steps)
    race(task, runs)


def compiled(problem: Problem, steps: int) -> Callable[[], Tensor]:
    """The loop of the tutorials, with loss, gradient and update compiled by torch."""
    params = {name: leaf.clone().requires_grad_() for name, leaf in problem.params.items()}
    optimizer = torch.optim.SGD(params.values(), lr=problem.lr)

    @torch.compile
    def step(batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = problem.loss_fn(params, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    def run() -> Tensor:
        with torch.no_grad():
            for name, leaf in params.items():
                leaf.copy_(problem.params[name])
        x, y = problem.data
        return torch.stack([step((x[rows], y[rows])) for rows in problem.index[:steps]])

    return run


def test_twelve_lines() -> None:
    """The first example of the README, plans included."""
    problem = gd.problems.stock_regression()
    step = gd.make_step(problem.loss_fn)
    lrs, keys = torch.logspace(-3, 0, 5), gd.random.split(gd.random.key(0), 8)

    def run(lr: Tensor, key: Tensor) -> Any:
        index = gd.epoch_batches(key, n=389, batch_size=BATCH, epochs=EPOCHS)
        return gd.train(step, problem.params, problem.data, index, lr)

    runs = {"gdfunc auto": lambda: gd.sweep(run, gd.grid(lr=lrs, key=keys)).reshape()}
    runs["torch.optim loop"] = torch.random.fork_rng()(  # its shuffles draw from torch's generator
        partial(optim_runs, problem, lrs.tolist(), len(keys))
    )
    if not peers.missing(peers.JAX):
        runs[peers.JAX] = jax_runs(problem, lrs)
    race("the README's twelve lines", runs)


def optim_runs(problem: Any, lrs: list[float], orders: int) -> list[Tensor]:
    """The same 40 runs, one after the other."""
    x, y = problem.data
    losses = []
    for lr in lrs:
        for _ in range(orders):
            params = {name: leaf.clone().requires_grad_() for name, leaf in problem.params.items()}
            optimizer = torch.optim.SGD(params.values(), lr=lr)
            for _ in range(EPOCHS):
                for rows in torch.randperm(len(y)).split(BATCH)[: len(y) // BATCH]:
                    optimizer.zero_grad()
                    loss = problem.loss_fn(params, (x[rows], y[rows]))
                    loss.backward()
                    optimizer.step()
                    losses.append(loss.detach())
    return losses


def jax_runs(problem: Any, lrs: Tensor) -> Callable[[], Any]:
    """The same 40 runs as one jitted function, in float64."""
    import jax
    import jax.numpy as jnp
    import optax

    with jax.enable_x64(True):
        (x, y), params = peers.in_jax(problem.data), peers.in_jax(problem.params)
        n, keys, rates = len(y), jax.random.split(jax.random.key(0), 8), jnp.asarray(lrs.numpy())

    def loss_fn(params: Any, batch: Any) -> Any:
        x, y = batch
        return ((x @ params["w"] + params["b"] - y) ** 2).mean() / 2

    def run(lr: Any, key: Any) -> Any:
        def epoch(key: Any) -> Any:
            return jax.random.permutation(key, n)[: n // BATCH * BATCH].reshape(-1, BATCH)

        rule = optax.sgd(lr)

        def step(carry: Any, rows: Any) -> Any:
            params, state = carry
            loss, grads = jax.value_and_grad(loss_fn)(params, (x[rows], y[rows]))
            updates, state = rule.update(grads, state)
            return (optax.apply_updates(params, updates), state), loss

        index = jax.vmap(epoch)(jax.random.split(key, EPOCHS)).reshape(-1, BATCH)
        (params_, _), losses = jax.lax.scan(step, (params, rule.init(params)), index)
        return params_, losses

    every = jax.jit(jax.vmap(jax.vmap(run, (None, 0)), (0, None)))

    def all_runs() -> Any:
        with jax.enable_x64(True):
            return jax.block_until_ready(every(rates, keys))

    return all_runs
