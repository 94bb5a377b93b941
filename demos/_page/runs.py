"""Runs behind the page's first picture: learning rates × batch sizes, all precomputed."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from descent_paths import MONTHS, SHARES, regression
from torch import Tensor
from torch.func import vmap

import gdfunc as gd

from ._encode import encode, percent

BATCHES = (1, 16, MONTHS)
RATES = 28
LOWEST, HIGHEST = 0.001, 2.2  # 2/L is 1.24
PASSES = 20
DOTS = 20  # of single samples a pass, after the first pass
VIEW = ((-0.42, 0.66), (-0.3, 0.84))  # the weights that the picture shows at least
ALIKE, INVISIBLE = 1.5, 1e-4  # ends within this factor of the best, or below this gap, are near it
REACH = 4.0  # how many views from its middle points are kept
DECADES = 12.0  # gaps are kept from 1e-12 to 1e12


class Runs(NamedTuple):
    """The runs of a batch size, on one order of the data, by learning rate."""

    batch: int
    steps: np.ndarray  # [F]: the steps that are kept: all in the first pass
    weights: np.ndarray  # [R, F, 2]
    gaps: np.ndarray  # [R, F]: loss / minimum − 1 over all data
    ends: np.ndarray  # [R]: median gap over the last pass
    diverged: np.ndarray  # [R] bool: ended above the start


def rates() -> list[float]:
    """Return learning rates of two digits, in equal ratios."""
    return [float(f"{lr:.2g}") for lr in np.geomspace(LOWEST, HIGHEST, RATES)]


def train(problem: gd.problems.Problem, lrs: Sequence[float], batch: int, passes: int = PASSES) -> Runs:
    """Train with all learning rates at once."""
    step = gd.make_step(problem.loss_fn)
    index = gd.epoch_batches(gd.random.key(0), MONTHS, batch, passes)

    def run(lr: Tensor) -> Tensor:
        final, trajectory = gd.train(step, problem.params, problem.data, index, lr, record="params")
        return gd.plot.path(trajectory.params, final)["w"]

    def gap(w: Tensor) -> Tensor:
        return problem.loss_fn({"w": w}, problem.data) / problem.minimum - 1

    paths = vmap(run)(torch.tensor(lrs, dtype=torch.float64))
    a_pass = MONTHS // batch
    steps = kept_steps(len(index), a_pass)
    gaps = vmap(vmap(gap))(paths[:, steps]).clamp(min=0)  # rounding errors at the minimum
    ends = gaps[:, steps > len(index) - a_pass].median(dim=1).values
    diverged = ~(ends <= gap(problem.params["w"]))  # NaN too
    fields = (steps, paths[:, steps], gaps, ends, diverged)
    return Runs(batch, *(field.numpy() for field in fields))


def kept_steps(count: int, a_pass: int) -> Tensor:
    """Return all steps of the first pass, then every step or about `DOTS` a pass, and the last step."""
    every = max(1, a_pass // DOTS) if a_pass > 2 * DOTS else 1
    return torch.cat([torch.arange(a_pass), torch.arange(a_pass, count, every), torch.tensor([count])])


def kinds(runs: Runs) -> list[str]:
    """Name each run's end: best or near it, slow below the best lr, noisy or overshoots above, diverges."""
    best = np.where(runs.diverged, np.inf, runs.ends).argmin()
    above = "overshoots" if runs.batch == MONTHS else "noisy"
    names = np.array(["slow"] * best + [above] * (len(runs.ends) - best), dtype=object)
    names[runs.ends <= max(ALIKE * runs.ends[best], INVISIBLE)] = "near"
    names[best] = "best"
    names[runs.diverged] = "diverges"
    return list(names)


def describe(runs: Runs, lrs: Sequence[float]) -> dict[str, Any]:
    """Return the runs of a batch size as the page reads them."""
    named = kinds(runs)
    best = named.index("best")
    # Heights are decades, from what nobody sees to the start.
    span = np.log10(np.array([INVISIBLE, runs.gaps[0, 0]]))
    heights = np.interp(np.log10(runs.ends), span, [0.0, 1.0]).round(3)
    middle, half = frame()
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        places = encode((runs.weights - middle) / (REACH * half))
        levels = encode(np.log10(runs.gaps) / DECADES)
    return {
        "batch": runs.batch,
        "steps": runs.steps.tolist(),
        "weights": places,
        "gaps": levels,
        "kinds": named,
        "gap": [float(f"{end:.6g}") if math.isfinite(end) else None for end in runs.ends],
        "ends": [percent(end) for end in runs.ends],
        "heights": np.where(runs.diverged, 1.0, heights).tolist(),
        "best": f"{lrs[best]:g}",
        "best_end": percent(runs.ends[best]),
        "first_divergent": next(
            (f"{lr:g}" for lr, kind in zip(lrs, named, strict=True) if kind == "diverges"), ""
        ),
    }


def frame() -> tuple[np.ndarray, float]:
    """Return the middle of the view, and half of its longer side."""
    view = np.array(VIEW)
    return view.mean(axis=1), float(np.ptp(view, axis=1).max() / 2)


def hero(passes: int = PASSES, lrs: Sequence[float] | None = None) -> dict[str, Any]:
    """Run everything and return it as the page reads it."""
    problem, lrs = regression(), list(lrs or rates())
    x, _ = problem.data
    # The loss is its minimum + (w − w*)ᵀ XᵀX (w − w*) / 2n.
    values, vectors = np.linalg.eigh((x.T @ x / (2 * len(x))).numpy())
    middle, half = frame()
    return {
        "lrs": [f"{lr:g}" for lr in lrs],
        "passes": passes,
        "months": MONTHS,
        "shares": SHARES,
        "limit": f"{2 / problem.L:.2f}",
        "start": problem.params["w"].tolist(),
        "start_gap": float(problem.loss_fn(problem.params, problem.data) / problem.minimum - 1),
        "minimizer": problem.minimizers[0]["w"].tolist(),
        "curvatures": (values / float(problem.minimum)).tolist(),
        "directions": vectors.T.tolist(),
        "view": VIEW,
        "middle": middle.tolist(),
        "reach": REACH * half,
        "decades": DECADES,
        "runs": [describe(train(problem, lrs, batch, passes), lrs) for batch in BATCHES],
    }


def write_table(hero: Mapping[str, Any], file: Path) -> None:
    """Write how each run ended as a CSV file; the gap of a run that overflowed is empty."""
    rows = [
        (run["batch"], lr, gap, kind)
        for run in hero["runs"]
        for lr, gap, kind in zip(hero["lrs"], run["gap"], run["kinds"], strict=True)
    ]
    with file.open("w", newline="", encoding="utf-8") as opened:
        csv.writer(opened).writerows([("batch", "lr", "gap", "end"), *rows])
