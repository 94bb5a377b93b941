"""Full-batch, mini-batch and single-sample descent from one start: the tutorials' figure, made true.

Tutorials draw by hand how the path of batch descent is smooth, that of mini-batches shakes a little and
that of single samples a lot. Here all three are run, on the regression of the S&P 500's monthly return
on those of two of its shares, and each goes through the data equally often. Their losses over the samples
seen, for several orders of the data, tell what the shaking buys and what it costs.

Started from the contour sketch in nearly every tutorial on mini-batch descent; the data are
matplotlib's `Stocks.csv`.

    python demos/descent_paths.py [--out DIR] [--fast]
"""

import itertools
import math
from typing import NamedTuple

import torch
from _card import Card
from matplotlib.axes import Axes
from matplotlib.contour import ContourSet
from matplotlib.figure import Figure
from torch import Tensor
from torch.func import vmap

import gdfunc as gd

MONTHS = 389
SHARES = ("IBM", "XRX")
START = (-0.3, 0.7)
METHODS = {  # name: batch size, lr (full batches diverge above 2/L = 1.24)
    "full batch": (MONTHS, 0.6),
    "mini-batch": (16, 0.15),
    "single sample": (1, 0.03),
}
LOOKS = {  # colours as of the curves, and widths of the paths
    "full batch": ("#0072B2", 1.5),
    "mini-batch": ("#D55E00", 0.8),
    "single sample": ("#009E73", 0.3),
}
CLOSE = 0.1  # the table tells when the gap first is smaller
LEVELS = {0.01: "1 %", 0.03: "", 0.1: "10 %", 0.3: "", 1.0: "100 %", 3.0: "", 10.0: ""}  # gaps of contours
COLUMNS = (
    "method",
    "batch size",
    "lr",
    "steps",
    f"samples to gap {CLOSE}",
    "gap in the end",
    "largest of orders",
)


def regression() -> gd.problems.Problem:
    """Regress the index on two shares, without a constant: the parameters are their weights."""
    stocks = gd.datasets.stocks()
    columns = [stocks.features.index(share) for share in SHARES]
    # In units of 10 % the curvatures are near 1, and so are useful learning rates.
    problem = gd.problems.linear_regression(10 * stocks.x[:, columns], 10 * stocks.y, bias=False)
    return problem._replace(params={"w": torch.tensor(START, dtype=torch.float64)})


def descend(
    problem: gd.problems.Problem, batch_size: int, lr: float, epochs: int, orders: int
) -> tuple[Tensor, Tensor]:
    """Run one method on several orders of the data at once.

    Returns the paths, [orders, T + 1, 2], and along them the gap, loss / minimum − 1 over all of the
    data, [orders, T + 1].
    """
    step = gd.make_step(problem.loss_fn)

    def gap(params, _batch_loss=None):
        return problem.loss_fn(params, problem.data) / problem.minimum - 1

    def run(key):
        index = gd.epoch_batches(key, MONTHS, batch_size, epochs)
        final, trajectory = gd.train(step, problem.params, problem.data, index, lr, record=("params", gap))
        path = gd.plot.path(trajectory.params, final)
        return path["w"], torch.cat([trajectory.gap, gap(final)[None]])

    return vmap(run)(gd.random.split(gd.random.key(0), orders))


def summarize(name: str, gap: Tensor) -> tuple:
    """Make a method's row of the table: medians over the orders, and the worst of them in the end."""
    batch_size, lr = METHODS[name]
    median = gap.median(dim=0).values
    close = torch.nonzero(median < CLOSE).flatten().tolist()
    samples = batch_size * close[0] if close else math.inf
    steps = gap.shape[1] - 1
    return name, batch_size, lr, steps, samples, median[-1].item(), gap[:, -1].max().item()


class Shaking(NamedTuple):
    """How a method's paths shake, in the median over the orders."""

    uphill: float  # the share of steps that raise the loss over all of the data
    length: float  # of the path, over the distance from its start to its end


def shaking(paths: Tensor, gap: Tensor) -> Shaking:
    uphill = (gap.diff(dim=1) > 0).double().mean(dim=1)
    length = torch.linalg.vector_norm(paths.diff(dim=1), dim=2).sum(dim=1)
    straight = torch.linalg.vector_norm(paths[:, -1] - paths[:, 0], dim=1)
    return Shaking(float(uphill.median()), float((length / straight).median()))


def paths_conclusion(found: dict[int, Shaking]) -> str:
    """Compare how the paths of batch sizes shake."""
    sizes = sorted(found, reverse=True)
    uphill, length = ([found[size][i] for size in sizes] for i in (0, 1))
    more = all(a < b for values in (uphill, length) for a, b in itertools.pairwise(values))
    opening = (
        "The smaller the batch, the more its path shakes" if more else "Not every smaller batch shakes more"
    )
    shares = in_words([f"{100 * share:.0f}" for share in uphill])
    times = in_words([f"{ratio:.1f}" if ratio < 10 else f"{ratio:.0f}" for ratio in length])
    steps = f"{opening}: {shares} % of the steps go uphill"
    return f"{steps}, and the path is {times} times as long as a straight one"


def conclusion(samples: dict[int, float], ends: dict[int, float]) -> str:
    """Compare batch sizes: samples until the gap is below CLOSE (inf: never), and the gap in the end."""
    sizes = sorted(samples)
    needed, above = [samples[size] for size in sizes], [ends[size] for size in sizes]
    # A method that never arrives needs more than any number of samples.
    sooner = all(a < b for a, b in itertools.pairwise(needed))
    higher = all(a > b for a, b in itertools.pairwise(above))
    verb = "come down sooner" if sooner else "do not come down sooner"
    end = ("and" if sooner == higher else "but") + (" end higher" if higher else " do not end higher")
    counts = in_words(["never" if math.isinf(n) else f"{n:,.0f}" for n in needed])
    gaps = in_words([f"{float(f'{100 * gap:.2g}'):g}" for gap in above])
    return f"Smaller batches {verb} (samples to {CLOSE:.0%} above the minimum: {counts}) {end} ({gaps} %)"


def in_words(parts: list[str]) -> str:
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def draw_paths(problem: gd.problems.Problem, runs: dict[str, tuple[Tensor, Tensor]]) -> Figure:
    """Draw the path of every method on one order of the data, all on the same contours."""
    drawn = {name: paths[0] for name, (paths, _) in runs.items()}
    seen = torch.cat([*drawn.values(), problem.minimizers[0]["w"][None]])
    low, high = seen.amin(dim=0), seen.amax(dim=0)
    margin = 0.08 * (high - low)
    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    axes = figure.subplots(1, len(runs), sharey=True)
    for ax, (name, path) in zip(axes, drawn.items(), strict=True):
        gd.plot.plot_descent(
            lambda params: problem.loss_fn(params, problem.data),
            [{"w": path}],
            ax=ax,
            levels=[problem.minimum * (1 + gap) for gap in LEVELS],
            minimum=problem.minimum,
            minimizers=problem.minimizers,
            limits=tuple(zip((low - margin).tolist(), (high + margin).tolist(), strict=True)),
        )
        restyle(ax, *LOOKS[name])
        batch_size, lr = METHODS[name]
        title = f"{name}\n{len(path) - 1:,} steps of {batch_size}, lr {lr:g}"
        ax.set_title(title, loc="left", fontsize=9, color=LOOKS[name][0])
        ax.set(xlabel=f"weight of {SHARES[0]}", ylabel=f"weight of {SHARES[1]}")
        ax.label_outer()
    name_contours(axes[0])  # the only panel where they can be seen
    orders, epochs = len(runs["full batch"][0]), len(drawn["full batch"]) - 1
    note = f"{epochs} passes over {MONTHS} months; one of {orders} orders drawn, numbers are medians"
    figure.supxlabel(f"○ start  ★ minimizer  lines: % above it; {note}", fontsize=8, color="0.35")
    return figure


def name_contours(ax: Axes) -> None:
    (lines,) = (artist for artist in ax.collections if isinstance(artist, ContourSet) and not artist.filled)
    named = {level: name for level, name in zip(lines.levels, LEVELS.values(), strict=True) if name}
    ax.clabel(lines, list(named), fmt=named, fontsize=7, colors="0.4")


def restyle(ax: Axes, color: str, width: float) -> None:
    """Give a path a colour and a width, and put the minimizer on top of it, without the path's end."""
    ax.get_legend().remove()
    for line in ax.lines:
        if line.get_marker() in ("*", "D"):
            line.set(zorder=5, visible=line.get_marker() == "*")
            continue
        line.set(color=color, markeredgecolor=color)
        if line.get_linestyle() != "None":
            line.set(linewidth=width, path_effects=[])
        elif line.get_marker() == ".":
            line.set_markerfacecolor(color)


def show_heads(figure: Figure) -> None:
    """Mark where each path is, for a picture that moves."""
    for ax in figure.axes:
        for line in ax.lines:
            if line.get_marker() == "D":
                line.set(visible=True, marker="o", markersize=6, zorder=6)
                line.set(markerfacecolor=line.get_color(), markeredgecolor="white")


def draw_gaps(runs: dict[str, tuple[Tensor, Tensor]]) -> Figure:
    """Draw every method's gap over the samples, with its band over the orders of the data."""
    # On a logarithmic axis, points as far apart as the eye can tell, out of thousands of steps. Lines begin
    # after the first update: a line from the start would fall while the batch is still being read.
    steps = {
        name: torch.logspace(0, math.log10(gap.shape[1] - 1), 100).round().long().unique()
        for name, (_, gap) in runs.items()
    }
    ax = gd.plot.plot_curves(
        {name: gap[:, steps[name]] for name, (_, gap) in runs.items()},
        x=[METHODS[name][0] * steps[name] for name in runs],
        xlabel="samples seen",
        ylabel="loss / minimum − 1",
        log_x=True,
    )
    ax.set(ylim=(1e-5, 1e1))
    return ax.figure


def show(card: Card, epochs: int, orders: int) -> None:
    problem = regression()
    weights = [f"{w:.4f} {share}" for w, share in zip(problem.minimizers[0]["w"], SHARES, strict=True)]
    print(f"S&P 500 ≈ {' + '.join(weights)}: least squares on {MONTHS} months; {orders} orders of them\n")
    runs, rows = {}, []
    print(f"{COLUMNS[0]:13}  " + "  ".join(f"{name:>6}" for name in COLUMNS[1:]))
    for name, (batch_size, lr) in METHODS.items():
        runs[name] = descend(problem, batch_size, lr, epochs, orders)
        rows.append(summarize(name, runs[name][1]))
        *row, median, worst = rows[-1]
        cells = [*row[1:-1], "never" if math.isinf(row[-1]) else row[-1], f"{median:.2e}", f"{worst:.2e}"]
        widths = [max(6, len(column)) for column in COLUMNS[1:]]
        print(
            f"{name:13}  " + "  ".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True)), flush=True
        )
    print(f"gap = loss / minimum − 1 over all of the data; {epochs} passes over them\n")

    found = {METHODS[name][0]: shaking(*run) for name, run in runs.items()}
    figure = draw_paths(problem, runs)
    card.picture(
        "descent_paths",
        figure,
        paths_conclusion(found),
        {
            "uphill": {size: s.uphill for size, s in found.items()},
            "length": {size: s.length for size, s in found.items()},
        },
    )
    show_heads(figure)
    card.motion("descent_paths", figure.axes, frames=12 if card.fast else 100, seconds=10, dpi=90)
    samples, ends = ({row[1]: row[column] for row in rows} for column in (4, 5))
    card.picture(
        "gaps",
        draw_gaps(runs),
        conclusion(samples, ends),
        {"samples": samples, "ends": ends},
        question="What do smaller batches buy, and what do they cost?",
    )
    card.table("methods", COLUMNS, rows)


def main(argv: list[str] | None = None) -> int:
    torch.set_num_threads(1)  # on tensors this small, threads would only wait for one another
    with Card(__file__, "How much does the path of descent shake with the batch size?", argv) as card:
        show(card, *(2, 5) if card.fast else (20, 25))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
