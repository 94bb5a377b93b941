"""One state of the first picture, drawn for readers without scripts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from descent_paths import regression
from matplotlib.figure import Figure

import gdfunc as gd

from ._encode import decode

COLORS = ("#009E73", "#D55E00", "#0072B2")  # of batches 1, 16 and 389, as on the page


def draw_still(hero: Mapping[str, Any], rate: int, file: Path, chosen: int = 1) -> None:
    """Draw the path of one batch size, and the losses of all, at one learning rate."""
    problem = regression()
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    rates = len(hero["lrs"])
    for i, (run, color) in enumerate(zip(hero["runs"], COLORS, strict=True)):
        steps = np.array(run["steps"])
        gaps = 10 ** (decode(run["gaps"], rates, len(steps))[rate] * hero["decades"])
        right.plot(np.maximum(steps * run["batch"], 1), gaps, color=color, label=f"batch {run['batch']}")
        if i == chosen:
            path = (
                np.array(hero["middle"])
                + hero["reach"] * decode(run["weights"], rates, len(steps), 2)[rate]
            )
            gd.plot.plot_descent(
                lambda params: problem.loss_fn(params, problem.data),
                [{"w": path}],
                ax=left,
                minimum=problem.minimum,
                minimizers=problem.minimizers,
                limits=hero["view"],
            )
    left.set(xlabel=f"weight of {hero['shares'][0]}", ylabel=f"weight of {hero['shares'][1]}")
    if left.get_legend() is not None:
        left.get_legend().remove()
    right.set(xscale="log", yscale="log", ylim=(1e-4, 1e2), xlabel="samples seen")
    right.set_ylabel("loss / minimum − 1")
    right.legend(frameon=False)
    figure.suptitle(f"lr {hero['lrs'][rate]}", x=0.01, ha="left", fontweight="bold")
    figure.savefig(file, dpi=120)
