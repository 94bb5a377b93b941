"""A run that is killed twice and goes on: the same bits as one that was left alone.

Ten million rows lie on disk and are mapped, never loaded. Their order is a plan that is never held. One
process trains through. Two others are killed, by SIGKILL and by SIGTERM, each in the middle of the run, and
a last one goes on from the file that they left.

    python demos/long_run.py [--out DIR] [--fast]
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from _card import Card
from matplotlib.figure import Figure
from torch import Tensor

import gdfunc as gd

FEATURES, BATCH = 16, 1000
Data = tuple[Tensor, Tensor]


def loss_fn(params: dict[str, Tensor], batch: Data) -> Tensor:
    x, y = batch
    return (x @ params["w"] + params["b"] - y).square().mean()


def write(folder: Path, rows: int) -> None:
    """Write x and y, float32 [rows, 16] and [rows], a part at a time."""
    sizes = {"x": (rows, FEATURES), "y": (rows,)}
    x, y = (
        np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=np.float32, shape=shape)
        for name, shape in sizes.items()
    )
    truth = np.linspace(-1, 1, FEATURES, dtype=np.float32)
    for at in range(0, rows, 100_000):
        draw = np.random.default_rng(at)
        x[at : at + 100_000] = draw.standard_normal(x[at : at + 100_000].shape, dtype=np.float32)
        noise = draw.standard_normal(len(x[at : at + 100_000]), dtype=np.float32)
        y[at : at + 100_000] = x[at : at + 100_000] @ truth + 1 + 0.1 * noise


def train(folder: Path, path: Path | None, end: tuple[int, int] | None = None) -> Tensor:
    """Return the loss of every step; `end`: a step, and the signal that ends this process there."""

    def kill(step: int, numbers: dict[str, float]) -> None:
        if end is not None and step >= end[0]:
            os.kill(os.getpid(), end[1])

    x, y = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("x", "y"))
    plan = gd.lazy_batches(gd.random.key(0), n=len(y), batch_size=BATCH, epochs=1)
    step = gd.make_step(loss_fn, gd.adam())
    init = step.init({"w": torch.zeros(FEATURES), "b": torch.zeros(())})
    options = {} if path is None else {"checkpoint_to": path, "checkpoint_every": 1}
    _, trajectory = gd.train(step, init, (x, y), plan, 1e-3, backend="native", log=kill, **options)
    return trajectory.loss


def killed(folder: Path, path: Path, step: int, number: int) -> int:
    """Train in another process that is killed; return the step that is on disk."""
    arguments = [str(folder), str(path), str(step), str(number)]
    subprocess.run([sys.executable, __file__, "--child", *arguments], capture_output=True)
    return gd.load(path)["step"]


def conclusion(stops: Sequence[int], steps: int, difference: float) -> str:
    """Say by how much the losses of the two runs differ at most."""
    times = f"Killed after {' and '.join(f'{step:,}' for step in stops)} of {steps:,} steps"
    if difference == 0:
        return f"{times}, the run has the losses of one that was not: maximum difference 0"
    return f"{times}, the run has other losses than one that was not: maximum difference {difference:.1e}"


def draw(whole: Tensor, resumed: Tensor, stops: Sequence[int]) -> Figure:
    figure = Figure((8, 4), layout="constrained")
    ax = figure.subplots()
    labels = ["not stopped", "killed and gone on"]
    gd.plot.plot_curves([whole, resumed], ax=ax, labels=labels, ylabel="loss")
    for stop in stops:
        ax.axvline(stop, color="0.5", linewidth=0.8)
    return figure


def show(card: Card, folder: Path, rows: int) -> None:
    write(folder, rows)
    steps, path = rows // BATCH, folder / "run.safetensors"
    started = time.perf_counter()
    whole = train(folder, None)
    print(f"{rows:,} rows, {steps:,} steps: {time.perf_counter() - started:.1f} s without a stop")
    ends = (steps // 3, signal.SIGKILL), (2 * steps // 3, signal.SIGTERM)
    stops = [killed(folder, path, step, number) for step, number in ends]
    resumed = train(folder, path)
    difference = (whole - resumed).abs().max().item()
    numbers = {"maximum difference": difference, "steps": steps}
    card.picture("loss", draw(whole, resumed, stops), conclusion(stops, steps, difference), numbers)
    card.table("loss", ["step", "loss", "resumed"], zip(range(steps), whole, resumed, strict=True))


def main(argv: Sequence[str] | None = None) -> int:
    with (
        Card(__file__, "Does a run that is killed go on to the same bits?", argv) as card,
        tempfile.TemporaryDirectory() as folder,
    ):
        show(card, Path(folder), rows=500_000 if card.fast else 10_000_000)
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        folder, path, step, number = sys.argv[2:]
        train(Path(folder), Path(path), (int(step), int(number)))
    else:
        raise SystemExit(main())
