"""One state of the first picture, drawn for readers without scripts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from descent_paths import regression
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import gdfunc as gd

from ._encode import decode

COLORS = ("#009E73", "#D55E00", "#0072B2")  # of batches 1, 16 and 389, as on the page


def draw_still(hero: Mapping[str, Any], rate: int, file: Path, chosen: int = 1) -> None:
    """Draw the path of one batch size, and the losses of all, at one learning rate."""
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    rates = len(hero["lrs"])
    for i, (run, color) in enumerate(zip(hero["runs"], COLORS, strict=True)):
        steps = np.array(run["steps"])
        gaps = 10 ** (decode(run["gaps"], rates, len(steps))[rate] * hero["decades"])
        passes = steps * run["batch"] / hero["months"]
        width, order = (1.2, 3) if i == chosen else (0.8, 2)
        right.plot(passes, gaps, color=color, linewidth=width, zorder=order, label=f"batch {run['batch']}")
        if i == chosen:
            places = hero["reach"] * decode(run["weights"], rates, len(steps), 2)[rate]
            draw_path(left, hero, np.array(hero["middle"]) + places, color)
    left.set(xlabel=f"weight of {hero['shares'][0]}", ylabel=f"weight of {hero['shares'][1]}")
    right.set_xscale("function", functions=(np.sqrt, np.square))  # room for the first pass
    right.set_xticks([n for n in (0, 1, 2, 5, 10, 20) if n <= hero["passes"]])
    right.set(yscale="log", ylim=(1e-4, 1e2), xlabel="passes over the data", ylabel="loss / minimum − 1")
    right.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False)
    run = hero["runs"][chosen]
    end = "diverges" if run["kinds"][rate] == "diverges" else f"ends {run['ends'][rate]} above the minimum"
    said = f"lr {hero['lrs'][rate]}, batch {run['batch']}: {end}"
    figure.suptitle(said, x=0.01, ha="left", fontweight="bold")
    figure.savefig(file, dpi=120)


def draw_path(ax: Axes, hero: Mapping[str, Any], path: np.ndarray, color: str) -> None:
    problem = regression()
    gd.plot.plot_descent(
        lambda params: problem.loss_fn(params, problem.data),
        [{"w": path}],
        ax=ax,
        minimum=problem.minimum,
        minimizers=problem.minimizers,
        limits=hero["view"],
    )
    for line in ax.lines:
        if line.get_linestyle() != "None":
            line.set(color=color, linewidth=1)
        elif line.get_marker() != "*":
            line.set_markeredgecolor(color)
            if line.get_marker() == "D":
                line.set_markerfacecolor(color)
    if ax.get_legend() is not None:
        ax.get_legend().remove()
