"""Data in files that are mapped into memory: read where they lie, never copied as a whole."""

import subprocess
import sys

import numpy as np
import pytest
import torch

import gdfunc as gd
from gdfunc._data import as_data
from gdfunc._train import _batches

from .assertions import assert_same
from .references import linear_data, linear_loss, normal

PARAMS = {"w": normal(0, 3), "b": normal(1, 1)[0]}
DATA = linear_data(3, 40, 3)
PLAN = gd.lazy_batches(gd.random.key(0), 40, 6, 9)
each_backend = pytest.mark.parametrize("backend", ["eager", "native"])


def run(data, backend):
    step = gd.make_step(linear_loss, gd.adam())
    return gd.train(step, step.init(PARAMS), data, PLAN, 0.05, backend=backend)


MAPPED = """
import sys
from pathlib import Path

import numpy as np
import torch

import gdfunc as gd

folder, backend, kind = Path(sys.argv[1]), *sys.argv[2:]
n, d = 2**21, 256


def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def loss_fn(w, x):
    return (x @ w - 1).square().mean()


most = 0


def look(step, numbers):
    global most
    most = max(most, anonymous())


def run(data, samples, **options):
    plan = gd.lazy_batches(gd.random.key(0), samples, 1024, 1)
    return gd.train(
        gd.make_step(loss_fn), torch.zeros(d), data, plan, 1e-3, backend=backend, log=look, **options
    )


run(torch.ones(70_000, d), 70_000)  # imports and compiles
if kind == "numpy":
    np.lib.format.open_memmap(folder / "x.npy", mode="w+", dtype=np.float32, shape=(n, d))[::1000] = 1.0
    x = np.load(folder / "x.npy", mmap_mode="r")
else:
    import json
    from safetensors import safe_open

    header = json.dumps({"x": {"dtype": "F32", "shape": [n, d], "data_offsets": [0, 4 * n * d]}}).encode()
    with open(folder / "x.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(file.tell() + 4 * n * d)
    x = safe_open(folder / "x.safetensors", "pt").get_tensor("x")
before, most = anonymous(), 0
final, trajectory = run(x, n, checkpoint_to=folder / "run")
print(len(trajectory.loss), most - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["numpy", "safetensors"])
@each_backend
def test_data_of_two_gigabytes_on_disk_are_not_copied(backend, kind, tmp_path):
    pytest.importorskip("safetensors")
    try:
        out = subprocess.run(
            [sys.executable, "-c", MAPPED, tmp_path, backend, kind],
            capture_output=True,
            text=True,
            check=True,
        )
        steps, grown = map(int, out.stdout.split())
        assert steps == 2048
        assert grown < 2**31 / 10
    finally:
        for path in tmp_path.glob("x.*"):
            path.unlink()


@each_backend
def test_a_mapped_file_gives_the_bits_of_memory_and_stays_as_it_is(backend, tmp_path):
    for name, leaf in zip("xy", DATA, strict=True):
        np.save(tmp_path / f"{name}.npy", leaf.numpy())
    before = (tmp_path / "x.npy").read_bytes()
    mapped = tuple(np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in "xy")
    assert_same(run(mapped, backend), run(DATA, backend))
    assert torch.equal(gd.take(mapped[0], PLAN[3]), DATA[0][PLAN[3]])
    assert (tmp_path / "x.npy").read_bytes() == before
    assert not mapped[0].flags.writeable


def test_only_what_is_read_shares_memory_that_is_read_only():
    array = np.arange(4.0)
    array.flags.writeable = False
    assert as_data(array, "data", is_read=True).data_ptr() == array.ctypes.data
    assert as_data(array, "data").data_ptr() != array.ctypes.data
    assert as_data(array[::-1], "data", is_read=True).tolist() == [3.0, 2.0, 1.0, 0.0]


def test_a_digest_does_not_depend_on_its_parts(monkeypatch):
    tree = {"x": normal(0, 7, 3), "t": normal(0, 7, 3).T, "s": torch.tensor(2.0), "e": torch.ones(0, 3)}
    whole = _batches.digest(tree)
    for part in (1, 50):
        monkeypatch.setattr(_batches, "_PART", part)
        assert _batches.digest(tree) == whole
    assert _batches.digest(tree | {"s": torch.tensor(3.0)}) != whole
