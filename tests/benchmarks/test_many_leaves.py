"""The first native run of a step of many leaves, in CPU seconds, and the second in milliseconds.

python -m pytest tests/benchmarks/test_many_leaves.py -m benchmark -n 0 -s
"""

import operator
import resource
import time
from collections.abc import Callable
from functools import reduce
from pathlib import Path

import pytest
import torch
from torch import Tensor

import gdfunc as gd

TRANSFORMS = {"sgd": lambda: None, "momentum": lambda: gd.momentum(0.9), "adam": gd.adam}


def loss(params: dict[str, Tensor], batch: Tensor) -> Tensor:
    scale = batch.mean()
    return reduce(operator.add, [(leaf * scale - 1).tanh().square().sum() for leaf in params.values()])


def run_of(leaves: int, transform: str) -> Callable[[], object]:
    params = {f"w{at}": torch.linspace(-1, 1, 3 + at % 8) for at in range(leaves)}
    step = gd.make_step(loss, *filter(None, [TRANSFORMS[transform]()]))
    data, index = torch.linspace(-1, 2, 4)[:, None], gd.sample_batches(gd.random.key(0), 4, 2, 5)
    return lambda: gd.train(step, step.init(params), data, index, 0.05, backend="native")


def seconds(run: Callable[[], object]) -> tuple[float, float]:
    """Measure the CPU time of this process, and that of the compiler."""
    before, compiler = time.process_time(), resource.getrusage(resource.RUSAGE_CHILDREN)
    run()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (
        time.process_time() - before,
        after.ru_utime + after.ru_stime - compiler.ru_utime - compiler.ru_stime,
    )


@pytest.mark.benchmark
@pytest.mark.optimised
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("leaves", [400, 2_000])
def test_first_run(leaves: int, transform: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    run_of(3, transform)()  # imports, and what is known of the compiler
    run = run_of(leaves, transform)
    python, compiler = seconds(run)
    again = min(sum(seconds(run)) for _ in range(3))
    print(
        f"\n{leaves} leaves, {transform}: {python + compiler:.1f} s, of which the compiler takes "
        f"{compiler:.1f}; again {again * 1e3:.0f} ms"
    )
