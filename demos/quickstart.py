"""Mini-batch gradient descent on real data, against the optimum that least squares gives exactly.

The S&P 500's monthly return is regressed on those of five of its shares. One sweep runs every batch size
and every learning rate, held constant or falling to zero, each on several orders of the data: 720 runs.
All of them go into a table (CSV), the telling ones are printed, and two pictures show the gap to the
optimum over the epochs and over the learning rate.

Started from the loops that tutorials on mini-batch descent write by hand; the data are matplotlib's
`Stocks.csv`.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

import gdfunc as gd

BATCH_SIZES = (1, 8, 64, 389)  # 389 months are all there are
LRS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # full batches diverge above 2/L = 0.82
SCHEDULES = {"constant": 1.0, "falling": 0.0}  # name: the share of lr that is left at the end
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


def draw_curves(result: gd.SweepResult, rows: list[Row], path: Path) -> None:
    """Draw the gap over the epochs for the runs in DRAWN."""
    drawn = [row for setting in DRAWN for row in rows if row[:3] == setting]
    curves, labels = [], []
    for size, schedule, lr, *_, diverged in drawn:
        curves.append(result.select(batch_size=size, end=SCHEDULES[schedule], lr=lr).outputs["gaps"])
        labels.append(f"batch {size}, lr {lr:g} {schedule}{', diverges' if diverged == 'yes' else ''}")
    ax = Figure(figsize=(8, 6.5), layout="constrained").subplots()
    ax.set(ylim=GAP_LIMITS, title="Mini-batch descent on monthly returns of five shares and the S&P 500")
    gd.plot.plot_curves(curves, ax=ax, labels=labels, xlabel="epoch", ylabel="gap to the exact optimum")
    ax.figure.savefig(path, dpi=150)


def draw_map(result: gd.SweepResult, limit: float, path: Path) -> None:
    """Draw the final gap over the learning rate for every batch size and schedule."""
    batch_sizes, start = result.axes["batch_size"], float(result.outputs["gaps"][0, 0])
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    for ax, (schedule, end) in zip(figure.subplots(1, 2, sharey=True), SCHEDULES.items(), strict=True):
        gaps = result.select(end=end).reshape()["gap"]  # [batch sizes, lrs, orders]
        ax.set(ylim=GAP_LIMITS, title=conclusion(schedule, [best_of(runs) for runs in gaps]))
        gd.plot.plot_curves(
            list(gaps.mT),
            x=result.axes["lr"],
            over="lr",
            ax=ax,
            labels=list(batch_sizes),
            by="batch",
            xlabel="lr" if end else "first lr",
            ylabel="final gap to the exact optimum, loss / minimum − 1",
            log_x=True,
        )
        ax.label_outer()
        ax.axvline(limit, color="0.4", linewidth=1)
        ax.annotate("2/L ", (limit, GAP_LIMITS[0]), ha="right", va="bottom", color="0.4")
        ax.axhline(start, color="0.4", linewidth=1)
        ax.annotate("the gap at the start", (LRS[0], 1.3 * start), va="bottom", color="0.4")
    figure.savefig(path, dpi=150)


def best_of(runs: Tensor) -> float:
    """Find the least median over the orders, of runs [lrs, orders]."""
    return min(median(orders) for orders in runs)


def conclusion(schedule: str, best: list[float]) -> str:
    """Say how near a schedule brings mini-batches to the optimum; the full batch's best gap is last."""
    *mini, full = best
    nearest = min(mini)
    if nearest <= 10 * full:
        return f"With a {schedule} lr, mini-batches come as near\nas the full batch: a gap of {nearest:.0e}"
    return f"With a {schedule} lr, mini-batches stop at {nearest:.0e},\nthe full batch at {full:.0e}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/quickstart"), help="folder for the results")
    parser.add_argument("--fast", action="store_true", help="fewer epochs and orders, no batches of 1")
    args = parser.parse_args(argv)
    sizes, epochs, orders = (BATCH_SIZES[1:], 12, 3) if args.fast else (BATCH_SIZES, 20, 9)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # on tensors this small, threads would only wait for one another

    problem = gd.problems.stock_regression()
    result = sweep(problem, sizes, epochs, orders, progress=not args.fast)
    print(result)
    ends = {name: result.outputs[name] for name in ("gap", "distance")}  # a CSV has no place for curves
    replace(result, outputs=ends).save(args.out / "runs.csv")
    rows = [
        sum_up(result, problem.minimum, size, schedule, lr)
        for size in sizes
        for schedule in SCHEDULES
        for lr in LRS
    ]
    draw_curves(result, rows, args.out / "gap_over_epochs.png")
    draw_map(result, 2 / problem.L, args.out / "gap_over_lr.png")
    report(rows)
    print(f"Written: runs.csv, gap_over_epochs.png and gap_over_lr.png in {args.out}")
    gap = best(rows, sizes, tuple(SCHEDULES)).gap_to_the_exact_optimum
    print(f"The best run {'reaches' if gap < TOLERANCE else 'MISSES'} the optimum: gap {gap:.1e}")
    return 0 if gap < TOLERANCE else 1


if __name__ == "__main__":
    raise SystemExit(main())
