"""Mini-batch gradient descent on real data, against the optimum that least squares gives exactly.

The S&P 500's monthly return is regressed on those of five of its shares. For each batch size, one vmap
runs every learning rate, held constant or falling to zero, on several orders of the data: 180 runs at
once. All of them go into a table (CSV), the telling ones are printed, and two pictures show the gap to
the optimum over the epochs and over the learning rate.

Started from the loops that tutorials on mini-batch descent write by hand; the data are matplotlib's
`Stocks.csv`.
"""

import argparse
import csv
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.func import vmap

import gdfunc as gd

BATCH_SIZES = (1, 8, 64, 389)  # 389 months are all there are
LRS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # full batches diverge above 2/L = 0.82
SCHEDULES = ("constant", "falling")
TOLERANCE = 1e-5  # the best run must end with a smaller gap than this
DRAWN = (  # the runs whose gap is drawn over the epochs
    (389, "constant", 1.0),
    (8, "constant", 0.1),
    (8, "constant", 0.02),
    (8, "falling", 0.02),
    (1, "falling", 0.002),
    (389, "constant", 0.5),
)
GAP_LIMITS = (1e-9, 1e3)  # of the pictures; what diverges leaves through the top


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


def sweep(
    problem, batch_size: int, epochs: int, orders: int, progress: bool = False
) -> tuple[Tensor, Tensor]:
    """Run every schedule, learning rate and order of the data at once.

    Returns the gap, loss / minimum − 1 over all of the data, [schedules, lrs, orders, epochs + 1], and
    the final distance, ‖θ − θ*‖ / ‖θ*‖, [schedules, lrs, orders].
    """
    n = len(problem.data[1])
    optimum = vector(problem.minimizers[0])

    def gap(params, _batch_loss=None):
        return problem.loss_fn(params, problem.data) / problem.minimum - 1

    def run(lr, index):
        final, trajectory = gd.train(
            gd.make_step(problem.loss_fn),
            problem.params,
            problem.data,
            index,
            lr,
            record=gap,
            every=n // batch_size,  # once an epoch
            progress=progress,
        )
        distance = (vector(final) - optimum).norm() / optimum.norm()
        return torch.cat([trajectory.gap, gap(final)[None]]), distance

    keys = gd.random.split(gd.random.key(0), orders)
    index = vmap(lambda key: gd.epoch_batches(key, n, batch_size, epochs))(keys)  # [orders, T, B]
    steps = index.shape[1]
    falling = 1 - torch.arange(steps, dtype=torch.float64) / steps
    schedules = torch.stack([torch.ones_like(falling), falling])
    lrs = torch.tensor(LRS, dtype=torch.float64)[:, None] * schedules[:, None]  # [schedules, lrs, T]
    over_orders = vmap(run, in_dims=(None, 0))
    over_lrs = vmap(over_orders, in_dims=(0, None))
    return vmap(over_lrs, in_dims=(0, None))(lrs, index)


def vector(params: dict[str, Tensor]) -> Tensor:
    return torch.cat([params["w"], params["b"][None]])


def median(runs: Tensor) -> Tensor:
    """Take the median over the last axis; a run that overflowed is worse than any other."""
    return torch.where(runs.isfinite(), runs, torch.inf).median(dim=-1).values


def tabulate(minimum: float, batch_size: int, gap: Tensor, distance: Tensor) -> list[Row]:
    """Sum up the runs of one batch size; those that end above their start have diverged."""
    start, half_time, end = (median(gap[..., t]) for t in (0, gap.shape[-1] // 2, -1))
    numbers = torch.stack([minimum * (1 + end), half_time, end, median(distance)], dim=-1)
    return [
        Row(batch_size, schedule, lr, *numbers[s, i].tolist(), "yes" if end[s, i] > start[s, i] else "no")
        for s, schedule in enumerate(SCHEDULES)
        for i, lr in enumerate(LRS)
    ]


def best(rows: list[Row], batch_sizes: tuple[int, ...], schedules: tuple[str, ...]) -> Row:
    fitting = [row for row in rows if row.batch_size in batch_sizes and row.schedule in schedules]
    return min(fitting, key=lambda row: row.gap_to_the_exact_optimum)


def report(rows: list[Row]) -> None:
    """Print the best rows and those of a large constant lr, and what they mean."""
    print("\n" + "  ".join(f"{name:>8}" for name in COLUMNS))
    for row in rows:
        is_best = row == best(rows, (row.batch_size,), (row.schedule,))
        if is_best or (row.schedule == "constant" and row.lr >= 0.5):
            cells = (*row[:2], f"{row.lr:g}", *(f"{number:.2e}" for number in row[3:-1]), row.diverged)
            widths = (max(8, len(name)) for name in COLUMNS)
            print("  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))
    print("gap = loss / minimum − 1, distance = ‖θ − θ*‖ / ‖θ*‖: medians over the orders of the data\n")

    print("In the second half of its epochs a constant lr of 0.5")
    for row in rows:
        if (row.schedule, row.lr) == ("constant", 0.5):
            before, after = row.gap_at_half_time, row.gap_to_the_exact_optimum
            verdict = "stalls at their noise" if after > before / 10 else "goes on to the optimum"
            verdict = "diverges" if row.diverged == "yes" else verdict
            print(f"  {verdict:22} with batches of {row.batch_size:3}: gap {before:.1e}, then {after:.1e}")
    gaps = [best(rows, BATCH_SIZES[:-1], (s,)).gap_to_the_exact_optimum for s in SCHEDULES]
    print(
        f"Mini-batches get to a gap of {gaps[0]:.1e} with a constant lr, {gaps[1]:.1e} with a falling one."
    )


def draw_curves(gaps: dict[int, Tensor], path: Path) -> None:
    """Draw the gap over the epochs for the runs in DRAWN."""
    curves, labels = [], []
    for size, schedule, lr in DRAWN:
        if size in gaps:
            curve = gaps[size][SCHEDULES.index(schedule), LRS.index(lr)]
            diverges = ", diverges" if median(curve[:, -1]) > curve[0, 0] else ""
            curves.append(curve)
            labels.append(f"batch {size}, lr {lr:g} {schedule}{diverges}")
    ax = Figure(figsize=(8, 6.5), layout="constrained").subplots()
    ax.set(ylim=GAP_LIMITS, title="Mini-batch descent on monthly returns of five shares and the S&P 500")
    gd.plot.plot_curves(curves, ax=ax, labels=labels, xlabel="epoch", ylabel="gap to the exact optimum")
    ax.figure.savefig(path, dpi=150)


def draw_map(gaps: dict[int, Tensor], limit: float, path: Path) -> None:
    """Draw the final gap over the learning rate for every batch size and schedule."""
    figure = Figure(figsize=(11, 6), layout="constrained")
    for s, ax in enumerate(figure.subplots(1, 2, sharey=True)):
        ax.set(ylim=GAP_LIMITS, title=f"{SCHEDULES[s]} learning rate")
        gd.plot.plot_curves(
            [median(gap[s, ..., -1]) for gap in gaps.values()],
            x=torch.tensor(LRS),
            ax=ax,
            labels=[f"batch {size}" for size in gaps],
            xlabel=("lr", "first lr")[s],
            ylabel="final gap to the exact optimum, median",
            log_x=True,
        )
        ax.label_outer()
        ax.axvline(limit, color="0.4", linewidth=1)
        ax.annotate("2/L ", (limit, GAP_LIMITS[0]), ha="right", va="bottom", color="0.4")
        start = gaps[BATCH_SIZES[-1]][0, 0, 0, 0]
        ax.axhline(start, color="0.4", linewidth=1)
        ax.annotate("above the start: diverged", (LRS[0], 1.3 * start), va="bottom", color="0.4")
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/quickstart"), help="folder for the results")
    parser.add_argument("--fast", action="store_true", help="fewer epochs and orders, no batches of 1")
    args = parser.parse_args(argv)
    sizes, epochs, orders = (BATCH_SIZES[1:], 12, 3) if args.fast else (BATCH_SIZES, 20, 9)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # on tensors this small, threads would only wait for one another

    problem = gd.problems.stock_regression()
    gaps, rows = {}, []
    for size in sizes:
        print(f"batches of {size}: {len(SCHEDULES) * len(LRS) * orders} runs at once", flush=True)
        gaps[size], distance = sweep(problem, size, epochs, orders, progress=not args.fast)
        rows += tabulate(problem.minimum, size, gaps[size], distance)

    with (args.out / "runs.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    draw_curves(gaps, args.out / "gap_over_epochs.png")
    draw_map(gaps, 2 / problem.L, args.out / "gap_over_lr.png")
    report(rows)
    print(f"Written: runs.csv, gap_over_epochs.png and gap_over_lr.png in {args.out}")
    gap = best(rows, sizes, SCHEDULES).gap_to_the_exact_optimum
    print(f"The best run {'reaches' if gap < TOLERANCE else 'MISSES'} the optimum: gap {gap:.1e}")
    return 0 if gap < TOLERANCE else 1


if __name__ == "__main__":
    raise SystemExit(main())
