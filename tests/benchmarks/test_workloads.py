"""gdfunc against its peers, in one run, on one core; choose workloads with -k, such as -k W1.

python -m pytest tests/benchmarks -m benchmark -s

prints one table and writes it to `out/benchmarks.csv`. To have the peers beside it:

python -m pip install jax optax opacus scikit-learn
python -m pip install --no-deps backpack-for-pytorch einops unfoldNd

(BackPACK asks for torchvision, whose newest version would replace torch, and does not need it here.)

Numbers are medians of five repeats, each after a warm-up; the contenders take turns. All their results
are checked first against the loop of torch.optim (W4, W5: torch's vmap(grad); W6: torch.func). Who is too
slow for the full size of W1-W3 runs fewer steps: times are per step, and the table gives both sizes. W1 has
C beside it that was written by hand (by_hand.c). W2 is run with plain gradients, with per-sample gradients
that are averaged in each step, and with Adam, whose denormal numbers JAX flushes to zero and gdfunc only if
it is asked to: so it is there twice. W3 is run once more on all cores, by all contenders. W5 has a plain
batch gradient beside it, which is less work: its ratio tells what clipping costs; its streamed statistics
are also counted in what the norms alone take on the same backend. W6 is the derivative of a run's final
loss in lr, also counted in runs of the same contender. W7 counts what a package imports lazily, on first
use. W8 is W1-W5 on a GPU, if there is one. W9 repeats W1-W4 at growing sizes, each contender until it takes
too long; rows in MB tell how far the process grows during a run, results included (on Linux). A ratio above
1: gdfunc is faster, or takes less memory.
"""

import csv
import ctypes
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import gdfunc as gd

from . import all_cores, first_result, peers, workloads
from .workloads import Problem, Run

pytestmark = [pytest.mark.benchmark, pytest.mark.filterwarnings("ignore")]  # the peers' own warnings

ROOT = Path(__file__).parents[2]
REPEATS = 5
SECONDS = 0.5  # how long one run may take before it is cut to the workload's least size
SHORT = 1e-3  # seconds: such runs are timed ten in a row
PATIENCE = 1.5  # seconds that a run of W9 may take before the contender is left out of larger sizes
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
PEAK = Path("/proc/self/clear_refs")  # a 5 written there lets the kernel count the peak anew


class Measured(NamedTuple):
    median: float
    lowest: float
    highest: float
    size: int


class Report:
    """The table as it grows."""

    def __init__(self, threads: str, cores: Iterable[int] = ()) -> None:
        self.cores = list(cores)  # all that there are, of which one is used
        self.rows: list[dict[str, Any]] = []
        self.left_out: dict[str, None] = {}
        found = {
            "gdfunc": importlib.metadata.version("gdfunc"),
            "torch": torch.__version__,
        } | peers.versions()
        self.setting = {
            "versions": ", ".join(f"{name} {number}" for name, number in found.items()),
            "device": ", ".join([f"CPU {processor()}", *graphics()]),
            "threads": threads,
        }

    def leave_out(self, why: str) -> None:
        self.left_out[why] = None

    def add(self, workload: str, unit: str, found: dict[str, Measured]) -> None:
        rivals = [name for name in found if not is_ours(name)]
        for ours in filter(is_ours, found):
            for peer in rivals or [""]:
                row = {"workload": workload, "unit": unit} | columns("ours", ours, found[ours])
                if peer:
                    row |= columns("peer", peer, found[peer])
                    row["ratio"] = ratio(found[peer].median, found[ours].median, unit)
                self.rows.append(row)

    def show(self) -> None:
        lines = [("workload", "unit", "ours", "median", "size", "peer", "median", "size", "peer/ours")]
        for row in self.rows:
            cells = [row["workload"], row["unit"]]
            for side in ("ours", "peer"):
                cells += [row.get(side, ""), row.get(f"{side}_median", ""), row.get(f"{side}_size", "")]
            lines.append(tuple(shown(cell) for cell in [*cells, row.get("ratio", "")]))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        print("\n\n" + "\n".join(f"{name}: {value}" for name, value in self.setting.items()))
        print(
            f"medians of {REPEATS} repeats after a warm-up; a ratio above 1: gdfunc is faster, or smaller\n"
        )
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
            writer.writerows(self.setting | row for row in self.rows)
        print(f"written to {path}")


COLUMNS = ("_median", "_lowest", "_highest", "_size")


def columns(side: str, name: str, found: Measured) -> dict[str, Any]:
    return {side: name} | {side + what: value for what, value in zip(COLUMNS, found, strict=True)}


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


def graphics() -> list[str]:
    return [f"GPU {torch.cuda.get_device_name()}"] if torch.cuda.is_available() else []


@pytest.fixture(scope="module")
def report():
    """One thread for all: torch is told so, and the others find one core to run on."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else None
    if cores:
        os.sched_setaffinity(0, {max(cores)})
    for peer in (*peers.TRAINERS, *peers.GRADIENTS, *peers.CLIPPED):
        peers.missing(peer)  # imports it if it is there
    report = Report(
        "1, on one core" if cores else "torch 1, the other peers as many as they take", cores or ()
    )
    yield report
    torch.set_num_threads(before)
    if cores:
        os.sched_setaffinity(0, cores)
    report.show()
    report.write(ROOT / "out" / "benchmarks.csv")


@pytest.fixture
def gpu(report):
    """The device of W8, where all multiply float32 as float32."""
    if not torch.cuda.is_available():
        report.leave_out("W8: torch finds no CUDA device")
        pytest.skip("torch finds no CUDA device")
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield "cuda"
    torch.backends.cudnn.allow_tf32 = before


def contest(
    report: Report,
    workload: str,
    problem: Problem,
    runs: dict[str, Run],
    sizes: tuple[int, int],
    weigh: bool = False,
) -> dict[str, float]:
    """Check every contender against the first, find the size it can bear, and measure all in turn.

    Returns the seconds that a run takes each.
    """
    least, full = sizes
    expected: dict[str, np.ndarray] = {}
    chosen = {}
    for name, run in list(runs.items()):
        try:
            results = numbers(run(least))
        except gd.BackendError as error:
            report.leave_out(f"{workload}, {name}: {error}")
            del runs[name]
            continue
        expected = expected or results
        if name not in peers.YARDSTICKS:
            check(name, results, expected)
        size = least
        # By and by: what a run costs beside its steps must not count in each. The first may compile.
        while size < full and min(seconds(run, size) for _ in "12") * min(10, full / size) <= SECONDS:
            size = min(10 * size, full)
        chosen[name] = full if size == full else least
    del expected, results
    taken: dict[str, list[float]] = {name: [] for name in runs}
    grown: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(REPEATS):
        for name, run in runs.items():
            # After another's turn, the first run finds the caches and the heap cold: it is not timed.
            grown[name].append((megabytes if weigh else seconds)(run, chosen[name]))
            taken[name].append(seconds(run, chosen[name]))
    unit, models = ("ms", 1) if problem.index is None else ("µs/step", 1)
    if isinstance(problem.lr, torch.Tensor):
        unit, models = "µs/model-step", len(problem.lr)
    scale = {name: 1e3 if unit == "ms" else 1e6 / chosen[name] / models for name in runs}
    report.add(workload, unit, {name: measured(taken[name], chosen[name], scale[name]) for name in runs})
    if weigh:
        report.add(workload, "MB", {name: measured(grown[name], chosen[name]) for name in runs})
    return {name: statistics.median(times) for name, times in taken.items()}


def measured(values: list[float], size: int, scale: float = 1.0) -> Measured:
    ends = statistics.median(values), min(values), max(values)
    return Measured(*(scale * end for end in ends), size)


def ratio(peer: float, ours: float, unit: str) -> float | str:
    """How many times ours the peer's is; of memory, only where neither drowns in the heap's own noise."""
    return "" if unit == "MB" and min(peer, ours) < 1 else peer / ours


def seconds(run: Run, size: int) -> float:
    """What a run takes; of short ones, what each of several in a row takes."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)

    def lasting(times: int) -> float:
        wait()
        started = time.perf_counter()
        for _ in range(times):
            run(size)
        wait()
        return (time.perf_counter() - started) / times

    once = lasting(1)
    return once if once > SHORT else lasting(10)


def megabytes(run: Run, size: int) -> float:
    """How far the process's memory rises above where it stood while it was idle."""
    before = math.inf
    while (now := fresh_peak()) < before:  # JAX frees what it returned a moment later, in its own thread
        before = now
        time.sleep(0.01)
    run(size)
    return peak() - before


def fresh_peak() -> float:
    """The memory in use, from which the peak is counted anew; the heap returns first what is free."""
    LIBC.malloc_trim(0)
    PEAK.write_text("5")
    return peak()


def peak() -> float:
    kibibytes = Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]
    return int(kibibytes) * 1024 / 1e6


def can_weigh(report: Report) -> bool:
    possible = hasattr(LIBC, "malloc_trim") and os.access(PEAK, os.W_OK)
    if not possible:
        report.leave_out("memory in MB: needs Linux and glibc")
    return possible


def numbers(results: Any) -> dict[str, np.ndarray]:
    leaves = results if isinstance(results, dict) else {"loss": results}
    return {
        name: leaf.cpu().numpy() if isinstance(leaf, torch.Tensor) else np.asarray(leaf)
        for name, leaf in leaves.items()
    }


def check(name: str, results: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """The same work: float32 throughout, equal up to what rounding adds up to."""
    assert results.keys() == expected.keys(), name
    for leaf, values in expected.items():
        found = results[leaf]
        assert (found.dtype, found.shape) == (np.float32, values.shape), f"{name}: {leaf}"
        close = np.allclose(found, values, rtol=1e-3, atol=1e-4 * np.abs(values).max())
        assert close, f"{name}: {leaf} is off by up to {np.abs(found - values).max()}"


def contenders(report: Report, problem: Problem) -> dict[str, Run]:
    """The peers that can run where the problem lies, the reference first, and gdfunc on each backend."""
    table = peers.table(problem)
    names = installed(report, table, problem.device.type)
    return {name: table[name](problem) for name in names} | workloads.ours(problem)


def installed(report: Report, names: Iterable[str], device: str = "cpu") -> list[str]:
    absent = {name: why for name in names if (why := peers.missing(name, device))}
    for name, why in absent.items():
        report.leave_out(f"{name}: {why}")
    return [name for name in names if name not in absent]


def built(report: Report, workload: str, build: Callable[[], Problem]) -> Problem:
    """The problem, if its data are installed."""
    try:
        return build()
    except ImportError as error:
        report.leave_out(f"{workload}: {error}")
        pytest.skip(str(error))


def race(report: Report, workload: str, task: str, device: str = "cpu") -> None:
    build, sizes = TASKS[task]
    problem = built(report, workload, build).to(device)
    weigh = problem.clip is not None and device == "cpu" and can_weigh(report)
    contest(report, workload, problem, contenders(report, problem), sizes, weigh)


TASKS = {  # the problem, and the least and the full size of a run: steps, or samples
    "W1 regression": (partial(workloads.regression, 100_000), (1000, 100_000)),
    "W2 digits": (partial(workloads.digits, 2000), (500, 2000)),
    "W2 per-sample gradients averaged": (partial(workloads.digits, 2000, "per-sample"), (500, 2000)),
    "W2 Adam": (partial(workloads.digits, 2000, "adam"), (500, 2000)),
    "W12 digits, CNN": (partial(workloads.digits_cnn, 500), (100, 500)),
    "W3 sweep, N=64": (partial(workloads.sweep, 64, 200), (20, 200)),
    "W4 mlp, B=128": (partial(workloads.per_sample, "mlp", 128), (128, 128)),
    "W4 cnn, B=128": (partial(workloads.per_sample, "cnn", 128), (128, 128)),
    "W5 mlp, B=128": (partial(workloads.clipped, "mlp", 128), (128, 128)),
    "W5 cnn, B=128": (partial(workloads.clipped, "cnn", 128), (128, 128)),
}


@pytest.mark.parametrize("task", TASKS)
def test_on_one_core(report, task):
    race(report, task, task)


@pytest.mark.parametrize("task", ["W3 sweep, N=64"])
def test_on_all_cores(report, task):
    """In a process of its own: JAX takes its threads when it starts."""
    if len(report.cores) < 2:
        report.leave_out(f"{task}, all cores: there is one core, or no way to choose among them")
        pytest.skip("needs several cores")
    built(report, task, TASKS[task][0])
    command = [sys.executable, "-m", all_cores.__name__, task, *map(str, report.cores)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    rows, left_out = json.loads(done.stdout.splitlines()[-1])
    report.rows += rows
    report.left_out |= dict.fromkeys(left_out)


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_W5_streamed_statistics(report, model):
    """What reductions over entries cost: against that of the norms alone."""
    problem, values = workloads.per_sample(model, 128), {}
    for reducer in ("norms", "mean", "second_moment", "variance"):
        name = f"W5 streamed statistics, {model}, {reducer}"
        taken = contest(report, name, problem, workloads.statistics(problem, reducer), (128, 128))
        values = values or taken
        times = {ours: measured([took / values[ours]], 128) for ours, took in taken.items()}
        report.add(name, "norms", times)


@pytest.mark.parametrize("task", ["W1 regression", "W2 digits"])
def test_W6_hypergradients(report, task):
    """The derivative of the final loss in lr: against the peers, and against the run itself."""
    problem, steps = built(report, "W6", TASKS[task][0]), 1000
    values: dict[str, float] = {}
    for mode in ("value", "reverse", "checkpoint", "forward"):
        peer_mode = "reverse" if mode == "checkpoint" else mode
        names = installed(report, peers.HYPERGRADIENTS)
        runs = {name: peers.HYPERGRADIENTS[name](problem, peer_mode) for name in names}
        runs |= workloads.hypergradients(problem, mode)
        taken = contest(report, f"W6 {task}, {mode}", problem, runs, (steps, steps))
        values = values or taken
        times = {name: [took / values[name]] for name, took in taken.items()}
        report.add(f"W6 {task}, {mode}", "runs", {name: measured(times[name], steps) for name in times})


def first_result_time(name: str, caches: Path) -> float:
    """What a fresh process that finds these caches takes, in seconds."""
    cache = dict.fromkeys(("XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"), str(caches))
    command = [sys.executable, "-m", first_result.__name__, name]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | cache, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def test_W7_first_result(report, tmp_path):
    """Compiled backends keep caches on disk: they are met cold and warm, the peers once for both."""
    ours = [f"gdfunc {backend}" for backend in workloads.backends("cpu")]
    compiled = [name for name in ours if name != "gdfunc eager"]
    found: dict[str, Measured] = {}
    for caches, names in (("cold", [*ours, *installed(report, peers.TRAINERS)]), ("warm", compiled)):
        taken: dict[str, list[float]] = {name: [] for name in names}
        for repeat in range(REPEATS + 1):
            for name, times in taken.items():
                folder = tmp_path / name.replace(" ", "_") / (str(repeat) if caches == "cold" else "shared")
                times.append(first_result_time(name, folder))
        found |= {name: measured(times[1:], first_result.STEPS, 1e3) for name, times in taken.items()}
        row = {name: found[name] for name in found if name in names or not is_ours(name)}
        report.add(f"W7 first result, {caches}", "ms", row)


@pytest.mark.parametrize("task", TASKS)
def test_W8_on_one_gpu(report, gpu, task):
    race(report, f"W8 {task}", task, gpu)


def grow(
    report: Report, workload: str, sizes: tuple[int, ...], case: Callable[[int], tuple[Problem, int]]
) -> None:
    """Race over growing sizes, time and memory; who would take too long stays out of what is larger.

    A case is the problem and the size of a run. Contenders are made anew where the problem is another.
    """
    weigh, last = can_weigh(report), None
    pace: dict[str, float] = {}
    for size in sizes:
        problem, length = case(size)
        if problem is not last:
            last, runs = problem, contenders(report, problem)
        slow = [name for name in runs if pace.get(name, 0.0) * size > PATIENCE]
        if slow:
            report.leave_out(f"W9 {workload}={size}: {', '.join(slow)} (would take {PATIENCE} s or more)")
        racing = {name: run for name, run in runs.items() if name not in slow}
        if not any(map(is_ours, racing)):
            break
        taken = contest(report, f"W9 {workload}={size}", problem, racing, (length, length), weigh)
        pace |= {name: taken[name] / size for name in taken}


def test_W9_growth_of_W1_with_steps(report):
    problem = workloads.regression(1_000_000)
    problem = problem._replace(index=problem.index.repeat(4, 1))
    sizes = 100, 1_000, 10_000, 100_000, 1_000_000, 4_000_000
    grow(report, "W1, T", sizes, lambda steps: (problem, steps))


def test_W9_growth_of_W2_with_the_batch(report):
    steps = 500
    built(report, "W9 W2", partial(workloads.digits, steps))
    grow(
        report,
        "W2, B",
        (1, 16, 128, 1024, 1797),
        lambda size: (workloads.digits(steps, batch_size=size), steps),
    )


def test_W9_growth_of_W3_with_models(report):
    steps = 5
    built(report, "W9 W3", partial(workloads.digits, steps))
    grow(report, "W3, N", (1, 16, 256, 4096), lambda models: (workloads.sweep(models, steps), steps))


def test_W9_growth_of_W4_with_samples(report):
    problem = workloads.per_sample("mlp", 1024)
    grow(report, "W4 mlp, B", (1, 16, 128, 1024), lambda size: (problem, size))
