"""An eager Adam step over ten leaves, against torch.optim.Adam(foreach=True), in one run.

python -m pytest tests/benchmarks/test_adam_step.py -m benchmark -s
"""

import statistics
from itertools import pairwise

import pytest
import torch
from torch.func import grad_and_value
from torch.utils.benchmark import Timer

import gdfunc as gd

REPEATS, STEPS = 9, 100
SIZES = [16, 32, 32, 32, 32, 1]


def loss_fn(params, batch):
    x, y = batch
    for layer in range(4):
        x = torch.relu(x @ params[f"w{layer}"] + params[f"b{layer}"])
    return ((x @ params["w4"] + params["b4"] - y) ** 2).mean()


@pytest.mark.benchmark
def test_an_adam_step_costs_at_most_one_and_a_half_of_torchs_and_its_gradient():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    params = {}
    for i, shape in enumerate(pairwise(SIZES)):
        params |= {f"w{i}": torch.randn(shape, generator=generator) / 4, f"b{i}": torch.zeros(shape[1])}
    batch = torch.randn(32, 16, generator=generator), torch.randn(32, 1, generator=generator)

    step = gd.make_step(loss_fn, gd.adam())
    state = step.init(params)
    gradient = grad_and_value(loss_fn)
    theirs = [leaf.clone().requires_grad_() for leaf in params.values()]
    optimizer = torch.optim.Adam(theirs, lr=1e-3, foreach=True)

    def their_step():
        for parameter, slope in zip(theirs, gradient(params, batch)[0].values(), strict=True):
            parameter.grad = slope
        optimizer.step()

    runs = {
        "gdfunc, gradient and Adam": lambda: step(state, batch, 1e-3),
        "torch.func gradient": lambda: gradient(params, batch),
        "torch.func gradient and torch.optim.Adam": their_step,
    }
    times = {name: [] for name in runs}
    for repeat in range(REPEATS + 1):  # the first warms up
        for name, run in runs.items():
            taken = Timer("run()", globals={"run": run}).timeit(STEPS).mean * 1e6
            times[name] += [taken] * bool(repeat)
    torch.set_num_threads(threads)
    ours, func, both = (statistics.median(taken) for taken in times.values())
    allowed = func + 1.5 * (both - func)
    print(f"\ntorch {torch.__version__}, CPU, 1 thread, medians of {REPEATS} × {STEPS} steps, µs a step")
    for name, taken in times.items():
        print(f"{name:42} {statistics.median(taken):8.1f}  ({min(taken):.1f} to {max(taken):.1f})")
    print(f"ours / (gradient + 1.5 × Adam): {ours / allowed:.2f};  ours / theirs: {ours / both:.2f}")
    assert ours <= allowed
