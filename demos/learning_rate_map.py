"""Which learning rate suits which batch size: U-curves, and how far the linear-scaling rule holds.

The S&P 500's monthly return is regressed on those of five of its shares. One sweep trains with every batch
size from 1 to 389, every learning rate and many orders of the data, always for the same number of epochs,
so that all runs see equally many samples. The U-curves show the loss that is left over the learning rate:
too small a rate does not arrive, too large a one wanders about the optimum or diverges.

The linear-scaling rule says that the best learning rate grows in proportion to the batch size. On a
quadratic it is a theorem for small learning rates: a run of B times fewer steps at B times the rate goes
equally far, and the noise it ends with, proportional to lr/B, is the same. It must end where lr comes near
2/L, which no batch size changes. The map shows where. A best learning rate is not a point, so the
rates that leave at most twice the least loss are drawn with it.

Sources: A. Krizhevsky, "One weird trick for parallelizing convolutional neural networks", 2014 (both rules,
√B and B); P. Goyal et al., "Accurate, large minibatch SGD: training ImageNet in 1 hour", 2017; S. Ma,
R. Bassily, M. Belkin, "The power of interpolation: understanding the effectiveness of SGD in modern
over-parametrized learning", 2018 (saturation); C. Shallue et al., "Measuring the effects of data
parallelism on neural network training", 2019. The data are matplotlib's `Stocks.csv`.

    python demos/learning_rate_map.py [--out DIR] [--fast]
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from _card import Card
from matplotlib.figure import Figure
from matplotlib.patheffects import Normal, Stroke
from torch import Tensor

import gdfunc as gd

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 194, 389)  # 389 months are all there are
DRAWN = (1, 4, 16, 64, 389)  # the batch sizes whose U-curves are drawn
LRS = (5e-4, 2.0)
SMALL = 8  # batch sizes up to this one are to obey the rule
GOOD = 2.0  # a good lr leaves at most so many times the least loss
EXCESS_LIMITS = (1e-3, 10.0)  # of the U-curves
SUBTITLE: dict[str, Any] = {"loc": "left", "fontsize": 9, "color": "0.35"}


class Outcome(NamedTuple):
    """The end of a run."""

    excess: Tensor  # loss / minimum − 1 over all of the data, after the last step
    diverged: Tensor  # whether that is above the start, or not finite


def train_all(
    problem: gd.problems.Problem, batch_sizes: tuple[int, ...], rates: int, orders: int, epochs: int
) -> gd.SweepResult:
    """Train with every batch size and learning rate on several orders of the data."""
    n, step = len(problem.data[1]), gd.make_step(problem.loss_fn)

    def excess(params: Any) -> Tensor:
        return problem.loss_fn(params, problem.data) / problem.minimum - 1

    def run(batch_size: int, lr: Tensor, key: Tensor) -> Outcome:
        index = gd.epoch_batches(key, n, batch_size, epochs, remainder="carry")
        final, _ = gd.train(step, problem.params, problem.data, index, lr, record=())
        return Outcome(excess(final), ~(excess(final) <= excess(problem.params)))

    low, high = (math.log10(lr) for lr in LRS)
    grid = gd.grid(
        batch_size=batch_sizes,
        lr=torch.logspace(low, high, rates, dtype=torch.float64),
        key=gd.random.split(gd.random.key(0), orders),
    )
    return gd.sweep(run, grid)


class Best(NamedTuple):
    """The best learning rate of a batch size, and those that are good; losses are medians over orders."""

    batch_size: int
    steps: int
    lr: float
    low: float
    high: float
    excess: float
    stable_to: float  # the largest lr with which no run diverged
    diverged: int
    runs: int


def median(excess: Tensor, diverged: Tensor) -> Tensor:
    """Take the median over the last axis; a run that diverged is worse than any other."""
    return torch.where(diverged, torch.inf, excess).median(dim=-1).values


def sum_up(result: gd.SweepResult, n: int, epochs: int) -> list[Best]:
    lrs, rows = result.axes["lr"], []
    for batch_size in result.axes["batch_size"]:
        part = result.select(batch_size=batch_size)
        runs = part.reshape()  # [lrs, orders]
        left = median(*runs)
        best = int(left.argmin())
        good = lrs[left <= GOOD * left[best]]
        stable = lrs[~runs.diverged.any(dim=1)]
        rows.append(
            Best(
                batch_size,
                epochs * n // batch_size,
                float(lrs[best]),
                float(good.min()),
                float(good.max()),
                float(left[best]),
                float(stable.max()),
                int(part.diverged.sum()),
                len(part.diverged),
            )
        )
    return rows


def rule(rows: list[Best]) -> float:
    """The c of lr = c·B, from the batch sizes that are to obey it: their geometric mean."""
    return math.exp(sum(math.log(row.lr / row.batch_size) for row in small(rows)) / len(small(rows)))


def small(rows: list[Best]) -> list[Best]:
    return [row for row in rows if row.batch_size <= SMALL]


def exponent(rows: list[Best]) -> float:
    """The a of lr ∝ Bᵃ, fitted to the same batch sizes: 1 is the linear rule, ½ that of the root."""
    logs = torch.tensor([(math.log(row.batch_size), math.log(row.lr)) for row in small(rows)])
    x, y = (logs - logs.mean(dim=0)).T
    return float(x @ y / (x @ x))


def conclusion(power: float, good: int, sizes: int, meets: float) -> str:
    """Say how the best lr grows with small batches, how often the linear rule's lr is good, and its end.

    The best lr is as batch^power, and the rule's reaches 2/L at a batch size of `meets`.
    """
    linear = "grows in proportion to small batches" if abs(power - 1) < 0.2 else "is not in proportion"
    counts = f"the rule's lr is good for {good} of {sizes} batch sizes"
    return f"The best lr {linear} (as batch^{power:.2f}); {counts}, and meets 2/L at batches of {meets:.0f}"


def numbers_of(rows: list[Best], L: float) -> dict[str, float]:
    """Sum up the table for the conclusion."""
    c = rule(rows)
    good = sum(row.low <= c * row.batch_size <= row.high for row in rows)
    return {"power": exponent(rows), "good": good, "sizes": len(rows), "meets": 2 / L / c}


def report(rows: list[Best], L: float) -> None:
    c = rule(rows)
    print(f"\n{76 * ' '}all orders")
    print(
        "batch   steps  best lr  lr / batch  good from       to  of rule  excess loss  stable to  diverged"
    )
    for row in rows:
        print(
            f"{row.batch_size:5} {row.steps:7} {row.lr:8.4f} {row.lr / row.batch_size:11.5f}"
            f" {row.low:10.4f} {row.high:8.4f} {row.lr / (c * row.batch_size):8.2f} {row.excess:12.2e}"
            f" {row.stable_to:10.4f} {row.diverged:4} of {row.runs}"
        )
    print(
        f"excess loss = loss / minimum − 1, median over the orders; good: at most {GOOD:g} times the best\n"
        f"diverged = ended above the start, or not finite; rule: lr = {c:.5f} × batch\n"
    )
    obeying = [row.batch_size for row in rows if row.low <= c * row.batch_size <= row.high]
    print(f"The rule is that of batches up to {SMALL}, and promises nothing above 2/L = {2 / L:.3f}.")
    print(f"Its lr is good for batches of {', '.join(map(str, obeying)) or 'no size'}.")


# The picture.


def draw(result: gd.SweepResult, rows: list[Best], problem: gd.problems.Problem) -> Figure:
    figure = Figure(figsize=(8, 9.4), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1.15))
    draw_curves(top, result, rows, 2 / problem.L)
    draw_rule(bottom, result, rows, 2 / problem.L)
    return figure


def draw_curves(ax: Any, result: gd.SweepResult, rows: list[Best], limit: float) -> None:
    """Draw the U-curves of some batch sizes."""
    drawn = [row for row in rows if row.batch_size in DRAWN]
    runs = [result.select(batch_size=row.batch_size).reshape() for row in drawn]
    ax.set(ylim=EXCESS_LIMITS)
    worst = 10 * EXCESS_LIMITS[1]  # out of view, without a cross for every order
    gd.plot.plot_curves(
        [torch.where(run.diverged, worst, run.excess).mT for run in runs],
        x=result.axes["lr"],
        ax=ax,
        labels=[row.batch_size for row in drawn],
        label_lines=False,
        xlabel=" ",
        ylabel="excess loss, loss / minimum − 1",
        log_x=True,
    )
    ax.get_legend().remove()
    ax.set(xlabel="")
    ax.set_title(
        f"what is left of the loss: median and 10–90 % of {len(runs[0].excess[0])} orders", **SUBTITLE
    )
    below: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "va": "top", "zorder": 6}
    halo = [Stroke(linewidth=3, foreground="white"), Normal()]
    for row, line in zip(drawn, list(ax.lines), strict=False):
        ax.plot(row.lr, row.excess, "*", color=line.get_color(), markeredgecolor="black", markersize=12)
        name = f"batch {row.batch_size}"
        ax.annotate(name, (row.lr, row.excess), (0, -9), path_effects=halo, **below)
    ax.axvline(limit, color="0.4", linewidth=1)
    ax.annotate("2/L ", (limit, EXCESS_LIMITS[0]), ha="right", va="bottom", color="0.4")


def draw_rule(ax: Any, result: gd.SweepResult, rows: list[Best], limit: float) -> None:
    """Draw the best learning rates beside the rule, on the map of all medians."""
    gd.plot.plot_grid(
        result,
        "lr",
        "batch_size",
        values=result.outputs.excess,
        ax=ax,
        label="excess loss, median of the orders",
        limits=(5e-3, 1.0),
        best=None,
        log_x=True,
        log_y=True,
        log_color=True,
    )
    for crosses in ax.lines:  # that are on dark cells
        crosses.set(color="white", path_effects=[Stroke(linewidth=1.6, foreground="0.25"), Normal()])
    batches = torch.tensor([row.batch_size for row in rows])
    lr = torch.tensor([row.lr for row in rows])
    reach = [[row.lr - row.low for row in rows], [row.high - row.lr for row in rows]]
    line: dict[str, Any] = {"color": "black", "linewidth": 1.8}
    line["path_effects"] = [Stroke(linewidth=4, foreground="white"), Normal()]
    ax.plot(rule(rows) * batches, batches, **line, label="linear scaling: lr ∝ batch")
    ax.plot(lr[0] * (batches / batches[0]).sqrt(), batches, ":", **line, label="√ scaling, from the first")
    ax.axvline(limit, color="0.4", linewidth=1)
    points: dict[str, Any] = {"fmt": "o", "color": "#D55E00", "markeredgecolor": "white", "capsize": 3}
    reached = f"best lr, and those within × {GOOD:g} of its loss"
    ax.errorbar(lr, batches, xerr=reach, **points, zorder=5, label=reached)
    old = ax.get_legend()
    handles, labels = ax.get_legend_handles_labels()
    handles += old.legend_handles if old else []
    labels += [text.get_text() for text in old.get_texts()] if old else []
    below: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.12), "ncols": 2}
    ax.legend(handles, labels, **below, frameon=False, fontsize="small")
    ax.set(xlim=LRS, xlabel="learning rate", ylabel="batch size")
    ax.set_title("the best learning rate of each batch size, on the map of all medians", **SUBTITLE)
    ticks = [row.batch_size for row in rows if row.batch_size != 194]  # too near 128 for a number
    ax.set_yticks(ticks, [str(size) for size in ticks])
    ax.set_yticks((), minor=True)


def main(argv: Sequence[str] | None = None) -> int:
    with Card(__file__, "Which learning rate suits which batch size?", argv) as card:
        sizes, rates, orders, epochs = ((4, 8, 64), 12, 5, 1) if card.fast else (BATCH_SIZES, 47, 49, 2)
        problem = gd.problems.stock_regression()
        result = train_all(problem, sizes, rates, orders, epochs)
        print(f"{result}\n{epochs} epochs each")
        rows = sum_up(result, len(problem.data[1]), epochs)
        report(rows, problem.L)
        result.save(card.file("runs.csv"))
        numbers = numbers_of(rows, problem.L)
        card.picture("learning_rate_map", draw(result, rows, problem), conclusion(**numbers), numbers)
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)  # on tensors this small, threads would only wait for one another
    raise SystemExit(main())
