"""Runs on a mapped file in the page cache beside the same runs on data in memory: a print, not a test.

    python tests/benchmarks/mapped_files.py

Memory is filled from the same file. The runs take turns, and the ratio is that of their shortest times. The
file of 1 GB lies in the temporary folder while this runs.
"""

import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import gdfunc as gd

ROWS, FEATURES, BATCH, TURNS = 2**22, 64, 1024, 3


def loss_fn(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return (x @ w - 1).square().mean()


def seconds(data: np.ndarray, backend: str, shuffle: bool | str) -> float:
    """CPU seconds of a run."""
    plan = gd.lazy_batches(gd.random.key(0), ROWS, BATCH, 1, shuffle=shuffle)
    started = time.process_time()
    init = torch.zeros(FEATURES)

    gd.train(gd.make_step(loss_fn), init, data, plan, 1e-3, backend=backend)
    return time.process_time() - started


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.npy"
        whole = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(ROWS, FEATURES))
        for part in np.split(whole, 64):
            part[:] = np.random.default_rng(0).standard_normal(part.shape, dtype=np.float32)
        memory = np.array(whole)
        for backend in ("eager", "native"):
            for shuffle in (True, "blocks"):
                times: dict[str, list[float]] = {"memory": [], "mapped": []}
                for _ in range(TURNS):
                    times["memory"].append(seconds(memory, backend, shuffle))
                    times["mapped"].append(seconds(np.load(path, mmap_mode="r"), backend, shuffle))
                mapped, memory_time = min(times["mapped"]), min(times["memory"])
                print(
                    f"{backend:7} shuffle={shuffle!s:7} memory {memory_time:.2f} s, mapped {mapped:.2f} s, "
                    f"mapped / memory {mapped / memory_time:.3f}"
                )


if __name__ == "__main__":
    main()
