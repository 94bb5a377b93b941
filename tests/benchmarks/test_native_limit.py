"""Where torch's own kernels overtake a native loop: measured for the limits in `native/_program.py`.

python -m pytest tests/benchmarks/test_native_limit.py -m benchmark -n 0 -s
"""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import gdfunc as gd
from gdfunc._scan.backends.native import _program

from ..references import normal
from .timing import in_turn

REPLAY = gd.adjoints.Checkpoint(10**9)  # an adjoint that makes the eager backend replay a trace


def mlp(width: int) -> tuple[Tensor, ...]:
    return normal(0, 128, width, dtype=torch.float32), *(
        normal(0, width, width, dtype=torch.float32) / width**0.5 for _ in range(2)
    )


def mlp_loss(params: tuple[Tensor, ...], x: Tensor) -> Tensor:
    return ((x @ params[0]).tanh() @ params[1]).square().mean()


def convolution(width: int) -> tuple[Tensor, ...]:
    weights = (normal(0, width, width, 3, 3, dtype=torch.float32) / (3 * width**0.5) for _ in range(2))
    return normal(0, 32, width, 12, 12, dtype=torch.float32), *weights


def convolution_loss(params: tuple[Tensor, ...], x: Tensor) -> Tensor:
    hidden = functional.conv2d(x, params[0], padding=1).relu()
    return functional.conv2d(hidden, params[1], padding=1).square().mean()


def pointwise(width: int) -> tuple[Tensor, ...]:
    return normal(0, 1, width, dtype=torch.float32), normal(0, width, dtype=torch.float32)


def pointwise_loss(params: tuple[Tensor, ...], x: Tensor) -> Tensor:
    return ((params[0] - x).square() * params[0]).mean()


BODIES = {
    "mlp": (mlp, mlp_loss, [64, 128, 256, 512, 1024]),
    "convolution": (convolution, convolution_loss, [4, 16, 32, 64]),
    "pointwise": (pointwise, pointwise_loss, [10**4, 10**5, 10**6, 10**7]),
}


def best(run: Callable[[], object], repeats: int = 7) -> float:
    return min(in_turn({"run": run}, repeats)["run"])


@pytest.mark.benchmark
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", BODIES)
def test_replay_against_native(name: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_program, "_limit", lambda: math.inf)
    sizes, size_of, before = [(0.0, 0.0)], _program.size_of, torch.get_num_threads()
    monkeypatch.setattr(_program, "size_of", lambda step: sizes.append(size_of(step)) or sizes[-1])
    torch.set_num_threads(threads)
    make, loss, widths = BODIES[name]
    step, lrs = gd.make_step(loss), torch.full((4,), 1e-4)
    try:
        for width in widths:
            x, *params = make(width)
            run = partial(gd.scan, partial(lambda x, p, lr: step(p, x, lr), x), tuple(params), lrs)
            fast = best(partial(run, backend="native")) / len(lrs)
            replay = best(partial(run, backend="eager", adjoint=REPLAY)) / len(lrs)
            print(
                f"\n{name} {width}, {threads} threads: {sizes[-1][0]:.1e} FLOP, {sizes[-1][1]:.1e} bytes, "
                f"native {fast:.1e} s, replay / native {replay / fast:.2f}"
            )
    finally:
        torch.set_num_threads(before)
