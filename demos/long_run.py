"""A run that is killed twice and goes on: the same bits as one that was left alone.

Ten million rows lie on disk and are mapped, never loaded. Their order is a plan that is never held. One
process trains through. Two others are killed, by SIGKILL and by SIGTERM, each in the middle of the run, and
a last one goes on from the file that they left.

    python demos/long_run.py [--out DIR] [--fast]

Under torchrun several processes take every step together. The last one is killed, which ends the others,
and all go on from the file that the first has written.

    torchrun --nproc-per-node 2 demos/long_run.py [--out DIR] [--fast]
"""

import datetime
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
import torch.distributed as dist
from _card import Card
from matplotlib.figure import Figure
from torch import Tensor

import gdfunc as gd

FEATURES, BATCH = 16, 1000
RANK, RANKS = (int(os.environ.get(name, number)) for name, number in (("RANK", 0), ("WORLD_SIZE", 1)))
Data = tuple[Tensor, Tensor]


def loss_fn(params: dict[str, Tensor], batch: Data) -> Tensor:
    x, y = batch
    return (x @ params["w"] + params["b"] - y).square().mean()


def join(**how: str) -> None:
    """Make a group of the processes that torchrun has started."""
    if RANKS > 1:
        patience = datetime.timedelta(minutes=1)
        dist.init_process_group("gloo", timeout=patience, rank=RANK, world_size=RANKS, **how)


def of_first(folder: str) -> Path:
    """Return the folder that the first process has given."""
    folders = [folder]
    if RANKS > 1:
        dist.broadcast_object_list(folders)
    return Path(folders[0])


def wait() -> None:
    """Wait until all processes are here."""
    if RANKS > 1:
        dist.barrier()


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
        if end is not None and step >= end[0] and RANK == RANKS - 1:
            os.kill(os.getpid(), end[1])

    x, y = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("x", "y"))
    plan = gd.lazy_batches(gd.random.key(0), n=len(y), batch_size=BATCH, epochs=1)
    step = gd.make_step(gd.distributed.data_parallel(loss_fn), gd.adam())
    init = step.init({"w": torch.zeros(FEATURES), "b": torch.zeros(())})
    options = {} if path is None else {"checkpoint_to": path, "checkpoint_every": 1}
    options["backend"] = "native" if RANKS == 1 else "eager"
    _, trajectory = gd.train(step, init, (x, y), plan, 1e-3, log=kill, **options)
    return trajectory.loss


def killed(folder: Path, path: Path, step: int, number: int) -> int:
    """Train in another process that is killed, in one a rank; return the step that is on disk."""
    arguments = [str(folder), str(path), str(step), str(number)]
    subprocess.run([sys.executable, __file__, "--child", *arguments], capture_output=True)
    wait()
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


def measure(folder: Path, rows: int) -> tuple[Tensor, Tensor, list[int]]:
    """Return the losses of a run, those of one that was stopped, and where it was."""
    if RANK == 0:
        write(folder, rows)
    wait()
    steps, path = rows // BATCH, folder / "run.safetensors"
    started = time.perf_counter()
    whole = train(folder, None)
    seconds = time.perf_counter() - started
    if RANK == 0:
        print(f"{rows:,} rows, {steps:,} steps: {seconds:.1f} s without a stop")
    ends = (steps // 3, signal.SIGKILL), (2 * steps // 3, signal.SIGTERM)
    stops = [killed(folder, path, step, number) for step, number in ends]
    return whole, train(folder, path), stops


def show(card: Card, whole: Tensor, resumed: Tensor, stops: Sequence[int]) -> None:
    steps = len(whole)
    difference = (whole - resumed).abs().max().item()
    numbers = {"maximum difference": difference, "steps": steps}
    card.picture("loss", draw(whole, resumed, stops), conclusion(stops, steps, difference), numbers)
    card.table("loss", ["step", "loss", "resumed"], zip(range(steps), whole, resumed, strict=True))


def main(argv: Sequence[str] | None = None) -> int:
    card = Card(__file__, "Does a run that is killed go on to the same bits?", argv)
    rows = 500_000 if card.fast else 10_000_000
    join()
    with tempfile.TemporaryDirectory() as own:
        folder = of_first(own)
        if RANK > 0:
            measure(folder, rows)
        else:
            with card:
                show(card, *measure(folder, rows))
        wait()
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        folder, path, step, number = sys.argv[2:]
        join(init_method=f"file://{folder}/group-{step}")
        train(Path(folder), Path(path), (int(step), int(number)))
    else:
        raise SystemExit(main())
