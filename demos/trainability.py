"""The boundary between learning rates that train a network and those that do not, four times enlarged.

A network with 8 inputs and one layer of 8 tanh units, y = w₂·tanh(W₁x), is fitted to 8 samples by 200
steps of gradient descent. W₁ has one learning rate and w₂ another. Each cell of a picture is a run with its
own pair of the two; all runs have the same samples and the same start. A run has converged if its last 20
losses are, in the mean, below its first loss. Each window after the first lies where the boundary inside
the one before is densest. There the box-counting dimension of the boundary is measured: 1 for a smooth
curve, more for a fractal, 2 for a boundary that runs through every box.

Source: J. Sohl-Dickstein, "The boundary of neural network trainability is fractal", 2024, arXiv:2402.06184,
which measures the speeds of convergence and divergence by the same sums, Σ lossₜ/loss₀ and Σ loss₀/lossₜ.
The samples and the start are drawn from the normal distribution.

    python demos/trainability.py [--out DIR] [--fast]
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from _card import Card
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

import gdfunc as gd

UNITS = SAMPLES = 8
STEPS, LAST = 200, 20
ENLARGED = 6  # how many times a window is enlarged in the next
SMOOTH = 1.2  # the dimension of a boundary that still counts as a smooth curve, at most
QUESTION = "Is there a clear line between the learning rates that train a network and the others?"

# Colours of convergence are darker than all of divergence, so that greys show the boundary too.
CONVERGED = LinearSegmentedColormap.from_list("converged", ["#050d26", "#10316b", "#1f5f9e"])
DIVERGED = LinearSegmentedColormap.from_list("diverged", ["#f08a3c", "#fbc15e", "#fff8cf"])

Params = dict[str, Tensor]
Data = tuple[Tensor, Tensor]


class Window(NamedTuple):
    """A rectangle of learning rates, in decades."""

    second: tuple[float, float]  # log₁₀ of the lr of w₂, along x
    first: tuple[float, float]  # log₁₀ of the lr of W₁, along y


WINDOW = Window((-1.2, 0.3), (0.0, 3.0))


class Runs(NamedTuple):
    """How the runs of a window went, [N, N] with the first layer's lr on dim 0."""

    converged: np.ndarray  # bool
    to_zero: np.ndarray  # Σ lossₜ/loss₀: small where convergence was fast
    to_infinity: np.ndarray  # Σ loss₀/lossₜ: small where divergence was fast


def task() -> tuple[Params, Data]:
    """Draw the start and the samples."""
    keys, dtype = gd.random.split(gd.random.key(0), 4), torch.float64
    x = gd.random.normal(keys[0], (SAMPLES, UNITS), dtype=dtype)
    y = gd.random.normal(keys[1], (SAMPLES,), dtype=dtype)
    first = gd.random.normal(keys[2], (UNITS, UNITS), dtype=dtype) / UNITS**0.5
    second = gd.random.normal(keys[3], (UNITS,), dtype=dtype) / UNITS**0.5
    return {"first": first, "second": second}, (x, y)


def loss_fn(params: Params, batch: Data) -> Tensor:
    x, y = batch
    return gd.losses.mse(torch.tanh(x @ params["first"]) @ params["second"], y)


def relative_losses(first: Tensor, second: Tensor) -> Tensor:
    """Descend with one learning rate for each layer; return the losses divided by the first, [STEPS]."""
    params, data = task()
    rates = {"first": gd.scale(first), "second": gd.scale(second)}
    step = gd.make_step(loss_fn, gd.partition(rates, {name: name for name in params}))
    index = gd.full_batch(SAMPLES, STEPS)
    _, trajectory = gd.train(step, step.init(params), data, index, 1.0, backend="native")
    return trajectory.loss / trajectory.loss[0]


def run(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Descend with a pair of learning rates; return the fields of `Runs` for this run."""
    losses = relative_losses(first, second)
    inverse = (1 / losses).nan_to_num(0)  # NaN comes after infinity
    return losses[-LAST:].mean() < 1, losses.sum(), inverse.sum()


def run_window(window: Window, points: int) -> Runs:
    """Train a network in the middle of each of points² cells."""
    second, first = (10 ** centres(ends, points) for ends in window)
    result = gd.sweep(run, gd.grid(first=first, second=second), chunk_size=4800)
    return Runs(*(field.numpy() for field in result.reshape()))


def centres(ends: tuple[float, float], points: int) -> Tensor:
    low, high = ends
    return low + (high - low) * (torch.arange(points, dtype=torch.float64) + 0.5) / points


def boundary(converged: np.ndarray) -> np.ndarray:
    """Mark the cells that end otherwise than the next cell in one of the two directions."""
    marked = np.zeros_like(converged)
    marked[:-1] |= converged[:-1] != converged[1:]
    marked[:, :-1] |= converged[:, :-1] != converged[:, 1:]
    return marked


def box_counts(marked: np.ndarray) -> dict[int, int]:
    """Count the boxes of 1, 2, 4, … cells a side that hold a marked cell: as far as 8 boxes a side."""
    n, counts, size = len(marked), {}, 1
    while n % size == 0 and n // size >= 8:
        boxes = marked.reshape(n // size, size, n // size, size)
        counts[size] = int(boxes.any(axis=(1, 3)).sum())
        size *= 2
    return counts


class Dimension(NamedTuple):
    """A box-counting dimension; the band is of the slopes from one size of boxes to the next."""

    slope: float
    low: float
    high: float


def dimension(marked: np.ndarray) -> Dimension:
    """Fit −d log(boxes)/d log(size): 0 where nothing is marked."""
    counts = box_counts(marked)
    if not marked.any():
        return Dimension(0.0, 0.0, 0.0)
    boxes = np.log2(list(counts.values()))
    slope = -np.polyfit(np.log2(list(counts)), boxes, 1)[0]
    return Dimension(float(slope), float(-np.diff(boxes).max()), float(-np.diff(boxes).min()))


def densest(marked: np.ndarray, window: Window) -> Window:
    """Find the window, `ENLARGED` times smaller, that holds most of the marked cells."""
    n, size = len(marked), len(marked) // ENLARGED
    sums = np.pad(marked.cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    inside = sums[size:, size:] - sums[:-size, size:] - sums[size:, :-size] + sums[:-size, :-size]
    row, column = np.unravel_index(inside.argmax(), inside.shape)
    ends = []
    for start, (low, high) in zip((column, row), window, strict=True):
        cell = (high - low) / n
        ends.append((float(low + start * cell), float(low + (start + size) * cell)))
    return Window(*ends)


def conclusion(found: Sequence[Dimension]) -> str:
    """Say whether the boundary is smooth in the last window, from the band of its dimension there."""
    last, times = found[-1], ENLARGED ** (len(found) - 1)
    if last.low > SMOOTH:
        word = "is rough"
    elif last.high < SMOOTH:
        word = "is smooth"
    else:
        word = "may be rough or smooth"
    measured = f"box-counting dimension {last.low:.2f} to {last.high:.2f}"
    whole = f"{found[0].low:.2f} to {found[0].high:.2f} not enlarged (a smooth curve: 1)"
    return f"Enlarged {times} times, the boundary of trainability {word}: {measured}, and {whole}"


def ranks(values: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Replace the values by their ranks, from 0 to 1, among the chosen ones; the others are NaN."""
    chosen, ranked = values[among], np.full(values.shape, np.nan)
    ranked[among] = np.searchsorted(np.sort(chosen), chosen) / max(1, len(chosen) - 1)
    return ranked


def ranked_speeds(runs: Sequence[Runs]) -> tuple[np.ndarray, np.ndarray]:
    """Rank the runs of all windows together, [windows, N, N]: those that converged, and those that did not.

    A run then has the same colour in a window and in its enlargement.
    """
    converged, to_zero, to_infinity = (np.stack(field) for field in zip(*runs, strict=True))
    return ranks(to_zero, converged), ranks(-to_infinity, ~converged)


def draw_window(ax: Axes, window: Window, converged: np.ndarray, diverged: np.ndarray) -> None:
    """Draw the ranks [N, N] of the runs that converged and of those that diverged; others are NaN."""
    extent = (*window.second, *window.first)
    for ranked, colours in ((converged, CONVERGED), (diverged, DIVERGED)):
        image = np.ma.masked_invalid(ranked)
        ax.imshow(
            image,
            colours,
            origin="lower",
            extent=extent,
            aspect="auto",
            interpolation="nearest",
            vmin=0,
            vmax=1,
        )
    ax.locator_params(nbins=4)
    ax.ticklabel_format(useOffset=False)
    ax.tick_params(labelsize=9)


def draw(windows: Sequence[Window], runs: Sequence[Runs], found: Sequence[Dimension]) -> Figure:
    figure = Figure((9, 10), layout="constrained")
    axes = figure.subplots(-(-len(windows) // 2), 2, squeeze=False).flatten()
    speeds = zip(*ranked_speeds(runs), strict=True)
    for i, (ax, window, ranked, fit) in enumerate(zip(axes, windows, speeds, found, strict=True)):
        draw_window(ax, window, *ranked)
        if i + 1 < len(windows):
            inner = windows[i + 1]
            corner, width = (inner.second[0], inner.first[0]), inner.second[1] - inner.second[0]
            for colour, line in (("black", 3.5), ("white", 1.5)):
                frame = Rectangle(corner, width, inner.first[1] - inner.first[0], fill=False)
                frame.set(edgecolor=colour, linewidth=line)
                ax.add_patch(frame)
        band = f"dimension {fit.slope:.2f} ({fit.low:.2f} to {fit.high:.2f})"
        ax.set_title(f"{ENLARGED**i} ×: {band}", loc="left", fontsize=10, color="0.25")
    figure.supxlabel("log₁₀ of the second layer's learning rate", fontsize=11)
    figure.supylabel("log₁₀ of the first layer's learning rate", fontsize=11)
    below = axes[-2:]
    for ax, colours, name, ends in (
        (below[0], CONVERGED, "converged", ("fast", "slowly")),
        (below[1], DIVERGED, "diverged", ("slowly", "fast")),
    ):
        bar = figure.colorbar(ScalarMappable(cmap=colours), ax=ax, location="bottom", aspect=40, pad=0.02)
        bar.set_ticks([0, 0.5, 1], labels=[ends[0], f"{name} (by rank in all windows)", ends[1]])
        bar.ax.tick_params(length=0, labelsize=10)
    return figure


def show(card: Card, points: int, count: int) -> None:
    windows, runs, found = [WINDOW], [], []
    print(f"{count} windows of {points**2:,} networks, {STEPS} steps each")
    print("enlarged  converged  on the boundary  dimension (from size to size of the boxes)")
    rows = []
    for i in range(count):
        runs.append(run_window(windows[i], points))
        marked = boundary(runs[i].converged)
        found.append(dimension(marked))
        share, fit = float(marked.mean()), found[i]
        print(
            f"{ENLARGED**i:6} ×  {runs[i].converged.mean():9.1%}  {share:15.1%}"
            f"  {fit.slope:9.2f} ({fit.low:.2f} to {fit.high:.2f})",
            flush=True,
        )
        rows.append((ENLARGED**i, *windows[i].second, *windows[i].first, share, *fit))
        if i + 1 < count:
            windows.append(densest(marked, windows[i]))
    slopes = [fit.slope for fit in found]
    numbers = {"dimension": slopes, "band": [fit[1:] for fit in found], "windows": windows}
    card.picture("boundary", draw(windows, runs, found), conclusion(found), numbers)
    header = ["enlarged", "log lr 2 from", "log lr 2 to", "log lr 1 from", "log lr 1 to"]
    card.table("windows", [*header, "on the boundary", "dimension", "least", "most"], rows)


def main(argv: Sequence[str] | None = None) -> int:
    with Card(__file__, QUESTION, argv) as card:
        if card.fast:
            show(card, points=48, count=2)
        else:
            show(card, points=240, count=4)
    return 0


if __name__ == "__main__":
    torch.set_flush_denormal(True)  # losses near 0 would slow the converged runs down
    raise SystemExit(main())
