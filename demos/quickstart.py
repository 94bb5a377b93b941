"""Mini-batch gradient descent on real data, against the optimum that least squares gives exactly.

The S&P 500's monthly return is regressed on those of five of its shares. One sweep runs every batch size
and every learning rate, held constant or falling to zero, each on several orders of the data: 720 runs.
All of them go into a table (CSV), the telling ones are printed, and two pictures show the excess loss,
loss / minimum − 1, over the epochs and over the learning rate.

Started from the loops that tutorials on mini-batch descent write by hand; the data are matplotlib's
`Stocks.csv`.

    python demos/quickstart.py [--out DIR] [--fast]
"""

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from _card import Card
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

import gdfunc as gd

BATCH_SIZES = (1, 8, 64, 389)  # 389 months are all there are
LRS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # full batches diverge above 2/L = 0.82
SCHEDULES = {"constant": 1.0, "falling": 0.0}  # name: the share of lr that is left at the end
TOLERANCE = 1e-5  # the best run must end with a smaller gap than this
DRAWN = {1: 0.005, 8: 0.05, 64: 0.2, 389: 0.5}  # batch size: the lr whose gap is drawn over the epochs
GAP_LIMITS = (1e-9, 1e1)  # of the pictures
STALLS = 3.0  # a gap that half of the epochs divide by less has stalled


def sweep(
    problem: gd.problems.Problem,
    batch_sizes: tuple[int, ...],
    epochs: int,
    orders: int,
    progress: bool = False,
) -> gd.SweepResult:
    """Train with every batch size, schedule and learning rate on several orders of the data.

    A run returns its gap, loss / minimum − 1 over all of the data, at each epoch and at its end, and how
    far it ends from the optimum, ‖θ − θ*‖ / ‖θ*‖.
    """
    n, step = len(problem.data[1]), gd.make_step(problem.loss_fn)
    optimum = vector(problem.minimizers[0])

    def gap(params, _batch_loss=None):
        return problem.loss_fn(params, problem.data) / problem.minimum - 1

    def run(batch_size, end, lr, key):
        index = gd.epoch_batches(key, n, batch_size, epochs)
        steps = len(index)
        lrs = gd.schedules.linear(lr, 1.0, end, total_iters=steps)(torch.arange(steps))
        once_an_epoch = n // batch_size
        final, trajectory = gd.train(
            step, problem.params, problem.data, index, lrs, record=gap, every=once_an_epoch
        )
        distance = (vector(final) - optimum).norm() / optimum.norm()
        gaps = torch.cat([trajectory.gap, gap(final)[None]])
        return {"gaps": gaps, "gap": gaps[-1], "distance": distance}

    grid = gd.grid(
        batch_size=batch_sizes,
        end=list(SCHEDULES.values()),
        lr=torch.tensor(LRS, dtype=torch.float64),
        key=gd.random.split(gd.random.key(0), orders),
    )
    return gd.sweep(run, grid, progress=progress)


def vector(params: dict[str, Tensor]) -> Tensor:
    return torch.cat([params["w"], params["b"][None]])


def median(runs: Tensor) -> float:
    """Take the median; a run that overflowed is worse than any other."""
    return float(torch.where(runs.isfinite(), runs, torch.inf).median())


class Row(NamedTuple):
    """One setting; numbers are medians over the orders of the data."""

    batch_size: int
    schedule: str
    lr: float
    final_loss: float
    gap_at_half_time: float
    gap_to_the_exact_optimum: float
    distance_to_it: float
    diverged: str


COLUMNS = [field.replace("_", " ") for field in Row._fields]


def sum_up(result: gd.SweepResult, minimum: float, batch_size: int, schedule: str, lr: float) -> Row:
    """Sum up the orders of one setting; if they end above their start they have diverged."""
    runs = result.select(batch_size=batch_size, end=SCHEDULES[schedule], lr=lr).outputs
    gaps = runs["gaps"]  # [orders, epochs + 1]
    start, half_time, end = (median(gaps[:, t]) for t in (0, gaps.shape[1] // 2, -1))
    numbers = (minimum * (1 + end), half_time, end, median(runs["distance"]))
    return Row(batch_size, schedule, lr, *numbers, "yes" if end > start else "no")


def best(rows: list[Row], batch_sizes: tuple[int, ...], schedules: tuple[str, ...]) -> Row:
    fitting = [row for row in rows if row.batch_size in batch_sizes and row.schedule in schedules]
    return min(fitting, key=lambda row: row.gap_to_the_exact_optimum)


def report(rows: list[Row]) -> None:
    """Print the best rows and those of a large constant lr."""
    print("\n" + "  ".join(f"{name:>8}" for name in COLUMNS))
    for row in rows:
        is_best = row == best(rows, (row.batch_size,), (row.schedule,))
        if is_best or (row.schedule == "constant" and row.lr >= 0.5):
            cells = (*row[:2], f"{row.lr:g}", *(f"{number:.2e}" for number in row[3:-1]), row.diverged)
            widths = (max(8, len(name)) for name in COLUMNS)
            print("  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))
    print("gap = loss / minimum − 1, distance = ‖θ − θ*‖ / ‖θ*‖: medians over the orders of the data\n")


def gains(rows: list[Row]) -> dict[str, dict[int, float]]:
    """Return by how much the second half of the epochs divides the gap, by schedule and batch size."""
    return {
        schedule: {
            row.batch_size: row.gap_at_half_time / row.gap_to_the_exact_optimum
            for row in rows
            if row.schedule == schedule and row.lr == DRAWN[row.batch_size]
        }
        for schedule in SCHEDULES
    }


def conclusion(constant: dict[int, float], falling: dict[int, float]) -> str:
    """Say who stalls, from how much the second half of the epochs divides the gap, by batch size."""
    *mini, full = (constant[size] for size in sorted(constant))
    *mini_falling, full_falling = (falling[size] for size in sorted(falling))
    most, least = max(mini), min(mini_falling)
    opening = "Mini-batches stall" if most < STALLS else "Mini-batches do not all stall"
    goes_on = "go on" if least >= STALLS else "do not all go on"
    word = "but" if (most < STALLS) == (least >= STALLS) else "and"
    return (
        f"{opening} at a constant lr, {word} {goes_on} at a falling one. The second half of the epochs"
        f" divides their excess loss by at most {most:.1f} at the constant lr (full batch: {full:,.0f}),"
        f" and by at least {least:.1f} at the falling one (full batch: {full_falling:.1f})"
    )


def draw_curves(result: gd.SweepResult) -> Figure:
    """Draw the gap over the epochs at one lr for each batch size, held constant and falling."""
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    sizes = result.axes["batch_size"]
    for ax, (schedule, end) in zip(figure.subplots(1, 2, sharey=True), SCHEDULES.items(), strict=True):
        gd.plot.plot_curves(
            {
                size: result.select(batch_size=size, end=end, lr=DRAWN[size]).outputs["gaps"]
                for size in sizes
            },
            ax=ax,
            by="batch",
            label_lines=True,
            xlabel="epoch",
            ylabel="excess loss, loss / minimum − 1",
        )
        ax.set_title(f"{schedule} lr", loc="left", fontsize=9, color="0.35")
    finish(figure, result, f"lr {' '.join(f'{DRAWN[size]:g}' for size in sizes)} by batch size")
    return figure


def draw_map(result: gd.SweepResult, limit: float) -> Figure:
    """Draw the final gap over the learning rate for every batch size and schedule."""
    start = float(result.outputs["gaps"][0, 0])
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    for ax, (schedule, end) in zip(figure.subplots(1, 2, sharey=True), SCHEDULES.items(), strict=True):
        gaps = result.select(end=end).reshape()["gap"]  # [batch sizes, lrs, orders]
        gaps = torch.where(gaps <= start, gaps, torch.inf)  # to end above the start is to diverge
        ax.set_ylim(GAP_LIMITS)
        gd.plot.plot_curves(
            dict(zip(result.axes["batch_size"], gaps.mT, strict=True)),
            x=result.axes["lr"],
            over="lr",
            ax=ax,
            by="batch",
            label_lines=True,
            xlabel="lr" if end else "first lr",
            ylabel="excess loss in the end, loss / minimum − 1",
            log_x=True,
        )
        ax.axvline(limit, color="0.4", linewidth=1)
        ax.annotate("2/L ", (limit, GAP_LIMITS[0]), ha="right", va="bottom", color="0.4")
        ax.axhline(start, color="0.4", linewidth=1)
        ax.annotate("at the start", (LRS[0], 1.1 * start), va="bottom", color="0.4", fontsize=8)
        ax.set_title(f"{schedule} lr", loc="left", fontsize=9, color="0.35")
        begin_strips(ax, result.axes["lr"])
        for text in ax.texts:
            if end and text.get_text() == "batch 1":  # on the right of its line another one passes
                text.set(position=(-6, 4), ha="right")
    finish(figure, result, "hatched: lrs at which the median ends above the start")
    return figure


def begin_strips(ax: Axes, lrs: Tensor) -> None:
    """Begin hatched strips between the last lr that ends below the start and the next one, not upon it."""
    for strip in ax.patches:
        last = int((lrs - strip.get_x()).abs().argmin())
        if isinstance(strip, Rectangle) and float(lrs[last]) == strip.get_x():
            between = math.sqrt(float(lrs[last] * lrs[last + 1]))
            strip.set(width=strip.get_x() + strip.get_width() - between, x=between)


def finish(figure: Figure, result: gd.SweepResult, note: str) -> None:
    """Name the band under the panels, and leave the panels' own legends out."""
    for ax in figure.axes:
        ax.get_legend().remove()
        ax.label_outer()
    band = f"median and 10–90 % of {len(result.axes['key'])} orders of 389 months"
    figure.supxlabel(f"{band}; {note}", fontsize=8, color="0.35")


def best_of(runs: Tensor) -> float:
    """Find the least median over the orders, of runs [lrs, orders]."""
    return min(median(orders) for orders in runs)


def lr_conclusion(best: dict[str, list[float]]) -> str:
    """Say how near schedules bring mini-batches to the optimum; the full batch's best gap is last."""
    parts = [f"{min(mini):.0e} against {full:.0e} with a {name} lr" for name, (*mini, full) in best.items()]
    full = min(gaps[-1] for gaps in best.values())
    nearest = min(min(mini) for *mini, _ in best.values())
    verb = "come as near the optimum as" if nearest <= 10 * full else "stay farther from the optimum than"
    return f"At their best lr mini-batches {verb} the full batch: {', '.join(parts)}"


def main(argv: list[str] | None = None) -> int:
    torch.set_num_threads(1)  # on tensors this small, threads would only wait for one another
    with Card(
        __file__, "How near do batch size and learning rate bring descent to the optimum?", argv
    ) as card:
        return show(card)


def show(card: Card) -> int:
    sizes, epochs, orders = (BATCH_SIZES[1:], 12, 3) if card.fast else (BATCH_SIZES, 20, 9)
    problem = gd.problems.stock_regression()
    result = sweep(problem, sizes, epochs, orders, progress=not card.fast)
    print(result)
    ends = {name: result.outputs[name] for name in ("gap", "distance")}  # a CSV has no place for curves
    replace(result, outputs=ends).save(card.file("runs.csv"))
    rows = [
        sum_up(result, problem.minimum, size, schedule, lr)
        for size in sizes
        for schedule in SCHEDULES
        for lr in LRS
    ]
    report(rows)
    second_half = gains(rows)
    card.picture(
        "gap_over_epochs",
        draw_curves(result),
        conclusion(**second_half),
        second_half,
        question="Who goes on to the optimum, and who stalls at the noise of batches?",
    )
    least = {
        name: [best_of(runs) for runs in result.select(end=end).reshape()["gap"]]
        for name, end in SCHEDULES.items()
    }
    card.picture("gap_over_lr", draw_map(result, 2 / problem.L), lr_conclusion(least), least)
    gap = best(rows, sizes, tuple(SCHEDULES)).gap_to_the_exact_optimum
    print(f"The best run {'reaches' if gap < TOLERANCE else 'MISSES'} the optimum: gap {gap:.1e}")
    return 0 if gap < TOLERANCE else 1


if __name__ == "__main__":
    raise SystemExit(main())
