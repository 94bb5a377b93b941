"""Runs over an iterable of batches beside the same runs on data in memory: a print, not a test.

    python tests/benchmarks/streams.py

The batches are made before, so that loading costs nothing. The runs take turns, and the ratio is that of
their shortest times. Both cores must be free: one reads ahead while the other trains.
"""

import itertools
import time

import torch

import gdfunc as gd

ROWS, TURNS = 4096, 5


def loss_fn(params: dict[str, torch.Tensor], batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    x, y = batch
    hidden = torch.tanh(torch.tanh(x @ params["a"]) @ params["b"])
    return ((hidden @ params["c"]).squeeze(-1) - y).square().mean()


def compare(features: int, batch_size: int, hidden: int, steps: int, backend: str) -> None:
    """Print the times of a step of a two-layer network."""
    normal = gd.random.normal
    keys = gd.random.split(gd.random.key(0), 5)
    x, y = normal(keys[0], (ROWS, features)), normal(keys[1], (ROWS,))
    shapes = {"a": (features, hidden), "b": (hidden, hidden), "c": (hidden, 1)}
    params = {
        name: normal(key, shape) / shape[0] ** 0.5
        for key, (name, shape) in zip(keys[2:], shapes.items(), strict=True)
    }
    index = gd.sample_batches(gd.random.key(1), ROWS, batch_size, steps)
    batches, step = [gd.take((x, y), row) for row in index[:64]], gd.make_step(loss_fn)
    times: dict[str, list[float]] = {"memory": [], "streamed": []}
    for _ in range(TURNS):
        for name in times:
            data = ((x, y), index) if name == "memory" else (itertools.cycle(batches), steps)
            started = time.perf_counter()
            gd.train(step, params, *data, 0.01, backend=backend)
            times[name].append(time.perf_counter() - started)
    memory, streamed = (min(each) / steps * 1e6 for each in times.values())
    print(
        f"{backend:6} {features:3} features, batch {batch_size:3}, {hidden:3} hidden: "
        f"memory {memory:6.0f} us, streamed {streamed:6.0f} us a step, ratio {streamed / memory:.3f}"
    )


def main() -> None:
    torch.set_num_threads(1)
    for backend in ("native", "eager"):
        for features, batch_size, hidden, steps in (
            (20, 32, 64, 4000),
            (64, 128, 128, 1000),
            (64, 512, 128, 300),
        ):
            compare(features, batch_size, hidden, steps, backend)


if __name__ == "__main__":
    main()
