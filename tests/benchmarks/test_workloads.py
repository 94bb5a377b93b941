"""gdfunc against its peers, in one run, on one core; choose workloads with -k, such as -k W1.

python -m pytest tests/benchmarks -m benchmark -s

prints one table and writes it to `out/benchmarks.csv`. To have the peers beside it:

python -m pip install jax optax opacus backpack-for-pytorch scikit-learn

Times are medians of five repeats, each after a warm-up; the contenders take turns. All their results
are checked first against the loop of torch.optim (W4: torch's vmap(grad)). Who is too slow for the full
size of W1-W3 runs fewer steps: times are per step, and the table gives both sizes. W7 counts what a package
imports lazily, on first use. W9 repeats W1, W3 and W4 at several sizes. A ratio above 1: gdfunc is faster.
"""

import csv
import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from . import first_result, peers, workloads
from .workloads import BACKENDS, Problem, Run

pytestmark = [pytest.mark.benchmark, pytest.mark.filterwarnings("ignore")]  # the peers' own warnings

ROOT = Path(__file__).parents[2]
REPEATS = 5
SECONDS = 0.5  # how long one run may take before it is cut to the workload's least size


class Timing(NamedTuple):
    median: float
    lowest: float
    highest: float
    size: int


class Report:
    """The table as it grows."""

    def __init__(self, threads: str) -> None:
        self.rows: list[dict[str, Any]] = []
        self.left_out: dict[str, None] = {}
        found = {
            "gdfunc": importlib.metadata.version("gdfunc"),
            "torch": torch.__version__,
        } | peers.versions()
        self.setting = {
            "versions": ", ".join(f"{name} {number}" for name, number in found.items()),
            "device": f"CPU {processor()}",
            "threads": threads,
        }

    def leave_out(self, why: str) -> None:
        self.left_out[why] = None

    def add(self, workload: str, unit: str, timings: dict[str, Timing]) -> None:
        rivals = [name for name in timings if not is_ours(name)]
        for ours in filter(is_ours, timings):
            for peer in rivals or [""]:
                row = {"workload": workload, "unit": unit} | columns("ours", ours, timings[ours])
                if peer:
                    row |= columns("peer", peer, timings[peer])
                    row["ratio"] = timings[peer].median / timings[ours].median
                self.rows.append(row)

    def show(self) -> None:
        lines = [("workload", "unit", "ours", "time", "size", "peer", "time", "size", "peer/ours")]
        for row in self.rows:
            cells = [row["workload"], row["unit"]]
            for side in ("ours", "peer"):
                cells += [row.get(side, ""), row.get(f"{side}_time", ""), row.get(f"{side}_size", "")]
            lines.append(tuple(shown(cell) for cell in [*cells, row.get("ratio", "")]))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        print("\n\n" + "\n".join(f"{name}: {value}" for name, value in self.setting.items()))
        print(f"medians of {REPEATS} repeats after a warm-up; a ratio above 1: gdfunc is faster\n")
        for line in lines:
            cells = zip(line, widths, "<<<>><>>>", strict=True)
            print("  ".join(f"{cell:{side}{width}}" for cell, width, side in cells).rstrip())
        print(*(f"left out: {why}" for why in self.left_out), sep="\n")

    def write(self, path: Path) -> None:
        sides = [f"{side}{what}" for side in ("ours", "peer") for what in ("", *COLUMNS)]
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["workload", "unit", *sides, "ratio", *self.setting])
            writer.writeheader()
            writer.writerows(row | self.setting for row in self.rows)
        print(f"written to {path}")


COLUMNS = ("_time", "_lowest", "_highest", "_size")


def columns(side: str, name: str, timing: Timing) -> dict[str, Any]:
    return {side: name} | {side + what: value for what, value in zip(COLUMNS, timing, strict=True)}


def shown(cell: Any) -> str:
    if not isinstance(cell, float):
        return str(cell)
    return f"{cell:.3g}" if cell < 1000 else f"{cell:.0f}"


def is_ours(name: str) -> bool:
    return name.startswith("gdfunc ")


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    )
    return names[0].partition(":")[2].strip() if names else platform.processor()


@pytest.fixture(scope="module")
def report():
    """One thread for all: torch is told so, and the others find one core to run on."""
    before, numpys = torch.get_num_threads(), np.random.get_state()  # noqa: NPY002  imports draw from it
    torch.set_num_threads(1)
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else None
    if cores:
        os.sched_setaffinity(0, {max(cores)})
    for peer in (*peers.TRAINERS, *peers.GRADIENTS):
        peers.missing(peer)  # imports it if it is there
    np.random.set_state(numpys)  # noqa: NPY002
    report = Report("1, on one core" if cores else "torch 1, the other peers as many as they take")
    yield report
    torch.set_num_threads(before)
    if cores:
        os.sched_setaffinity(0, cores)
    report.show()
    report.write(ROOT / "out" / "benchmarks.csv")


def contest(
    report: Report,
    workload: str,
    unit: str,
    runs: dict[str, Run],
    sizes: tuple[int, int],
    models: int = 1,
    reference: str = "torch.optim loop",
) -> None:
    """Check every contender, find the size it can bear, and time all in turn."""
    least, full = sizes
    expected = numbers(runs[reference](least))
    chosen = {}
    for name, run in runs.items():
        check(name, numbers(run(least)), expected)
        chosen[name] = full if seconds(run, least) / least * full <= SECONDS else least
        run(chosen[name])
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(REPEATS):
        for name, run in runs.items():
            run(chosen[name])  # after another's turn, the first run finds the caches and the heap cold
            taken[name].append(seconds(run, chosen[name]))
    timings = {}
    for name, times in taken.items():
        scale = 1e3 if unit.startswith("ms") else 1e6 / chosen[name] / models
        ends = (statistics.median(times), min(times), max(times))
        timings[name] = Timing(*(scale * end for end in ends), chosen[name])
    report.add(workload, unit, timings)


def seconds(run: Run, size: int) -> float:
    started = time.perf_counter()
    run(size)
    return time.perf_counter() - started


def numbers(results: Any) -> dict[str, np.ndarray]:
    leaves = results if isinstance(results, dict) else {"loss": results}
    return {name: np.asarray(leaf) for name, leaf in leaves.items()}


def check(name: str, results: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """The same work: float32 throughout, equal up to what rounding adds up to."""
    assert results.keys() == expected.keys(), name
    for leaf, values in expected.items():
        assert results[leaf].dtype == np.float32, f"{name}: {leaf}"
        largest = np.abs(values).max()
        np.testing.assert_allclose(results[leaf], values, rtol=1e-3, atol=1e-4 * largest, err_msg=name)


def contenders(
    report: Report, ours: dict[str, Run], table: dict[str, Any], problem: Problem
) -> dict[str, Run]:
    """gdfunc on all of its backends, and the peers that are installed."""
    return ours | {name: table[name](problem) for name in installed(report, table)}


def installed(report: Report, table: dict[str, Any]) -> list[str]:
    for name in table:
        if peers.missing(name):
            report.leave_out(f"{name}: {peers.missing(name)}")
    return [name for name in table if not peers.missing(name)]


def race_trainers(report: Report, workload: str, problem: Problem, sizes: tuple[int, int]) -> None:
    many = isinstance(problem.lr, torch.Tensor)
    runs = contenders(report, workloads.our_trainers(problem), peers.TRAINERS, problem)
    unit, models = ("µs/model-step", len(problem.lr)) if many else ("µs/step", 1)
    contest(report, workload, unit, runs, sizes, models)


def race_gradients(report: Report, workload: str, name: str, size: int) -> None:
    problem = workloads.per_sample(name, size)
    runs = contenders(report, workloads.our_gradients(problem), peers.GRADIENTS, problem)
    contest(report, workload, "ms", runs, (size, size), reference="torch vmap(grad)")


def needs_digits(report: Report, workload: str) -> None:
    if not find_spec("sklearn"):
        report.leave_out(f"{workload}: scikit-learn not installed")
        pytest.skip("scikit-learn is not installed")


def test_W1_regression(report):
    race_trainers(report, "W1 regression", workloads.regression(100_000), (1000, 100_000))


def test_W2_digits(report):
    needs_digits(report, "W2")
    race_trainers(report, "W2 digits", workloads.digits(2000), (500, 2000))


def test_W3_sweep(report):
    needs_digits(report, "W3")
    race_trainers(report, "W3 sweep, N=64", workloads.sweep(64, 200), (20, 200))


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_W4_per_sample_gradients(report, name):
    race_gradients(report, f"W4 {name}, B=128", name, 128)


@pytest.mark.parametrize("caches", ["cold", "warm"])
def test_W7_first_result(report, caches, tmp_path):
    if caches == "warm" and BACKENDS == ("eager",):
        pytest.skip("the eager loop keeps no cache")
    ours = [f"gdfunc {backend}" for backend in BACKENDS]
    taken: dict[str, list[float]] = {name: [] for name in [*ours, *installed(report, peers.TRAINERS)]}
    for repeat in range(REPEATS + 1):
        for name, times in taken.items():
            folder = str(tmp_path / name / (str(repeat) if caches == "cold" else "shared"))
            cache = dict.fromkeys(("XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"), folder)
            command = [sys.executable, "-m", first_result.__name__, name]
            done = subprocess.run(
                command, cwd=ROOT, env=os.environ | cache, capture_output=True, text=True, check=True
            )
            if repeat:
                times.append(1e3 * float(done.stdout))
    timings = {
        name: Timing(statistics.median(times), min(times), max(times), first_result.STEPS)
        for name, times in taken.items()
    }
    report.add(f"W7 first result, {caches}", "ms", timings)


@pytest.mark.parametrize("steps", [100, 400, 1600])
def test_W9_growth_of_W1_with_steps(report, steps):
    race_trainers(report, f"W9 W1, T={steps}", workloads.regression(steps), (steps, steps))


@pytest.mark.parametrize("models", [1, 16, 256])
def test_W9_growth_of_W3_with_models(report, models):
    needs_digits(report, "W9 W3")
    race_trainers(report, f"W9 W3, N={models}", workloads.sweep(models, 200), (5, 50))


@pytest.mark.parametrize("size", [1, 16, 256])
def test_W9_growth_of_W4_with_samples(report, size):
    race_gradients(report, f"W9 W4 mlp, B={size}", "mlp", size)
