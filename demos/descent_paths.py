"""Full-batch, mini-batch and single-sample descent from one start: the tutorials' figure, made true.

Tutorials draw by hand how the path of batch descent is smooth, that of mini-batches shakes a little and
that of single samples a lot. Here all three are run, on the regression of the S&P 500's monthly return
on those of two of its shares. Beside the paths stands what the shaking buys and what it costs: the loss
over the samples seen, for several orders of the data.

Started from the contour sketch in nearly every tutorial on mini-batch descent; the data are
matplotlib's `Stocks.csv`.
"""

import argparse
import csv
import math
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.func import vmap

import gdfunc as gd

MONTHS = 389
SHARES = ("IBM", "XRX")
START = (-0.3, 0.7)
METHODS = {  # name: batch size, lr (full batches diverge above 2/L = 1.24), steps to draw of its path
    "single sample": (1, 0.03, 250),
    "mini-batch": (16, 0.15, 60),
    "full batch": (MONTHS, 0.6, 20),
}
CLOSE = 0.1  # the table tells when the gap first is smaller
COLUMNS = (
    "method",
    "batch size",
    "lr",
    "steps",
    f"samples to gap {CLOSE}",
    "gap to the exact optimum",
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
    batch_size, lr, _ = METHODS[name]
    median = gap.median(dim=0).values
    close = torch.nonzero(median < CLOSE).flatten().tolist()
    samples = batch_size * close[0] if close else "never"
    return name, batch_size, lr, len(median) - 1, samples, median[-1].item(), gap[:, -1].max().item()


def draw(problem: gd.problems.Problem, runs: dict[str, tuple[Tensor, Tensor]], file: Path) -> None:
    """Draw the first path of every method on the contours, and every method's gap over the samples."""
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    drawn = {name: paths[0, : METHODS[name][2] + 1] for name, (paths, _) in runs.items()}
    gd.plot.plot_descent(
        lambda params: problem.loss_fn(params, problem.data),
        [{"w": path} for path in drawn.values()],
        ax=left,
        labels=[f"{name}, lr {METHODS[name][1]:g}: {len(path) - 1} steps" for name, path in drawn.items()],
        minimum=problem.minimum,
        minimizers=problem.minimizers,
    )
    left.set(
        title="The first steps on one order of the data",
        xlabel=f"weight of {SHARES[0]}",
        ylabel=f"weight of {SHARES[1]}",
    )

    right.set(ylim=(1e-5, 1e1))
    # On a logarithmic axis, points as far apart as the eye can tell, out of thousands of steps.
    steps = {
        name: torch.logspace(0, math.log10(gap.shape[1] - 1), 100).round().long().unique()
        for name, (_, gap) in runs.items()
    }
    gd.plot.plot_curves(
        [gap[:, steps[name]] for name, (_, gap) in runs.items()],
        x=[METHODS[name][0] * steps[name] for name in runs],
        ax=right,
        labels=list(runs),
        xlabel="samples seen, in up to 100 logarithmic steps",
        ylabel="loss / minimum − 1",
        log_x=True,
    )
    orders = len(runs["full batch"][1])
    right.set(title=f"The whole runs on {orders} orders of the data")
    figure.savefig(file, dpi=150)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path("out/descent_paths"), help="folder for the results"
    )
    parser.add_argument("--fast", action="store_true", help="fewer epochs and orders")
    args = parser.parse_args(argv)
    epochs, orders = (2, 5) if args.fast else (20, 25)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # on tensors this small, threads would only wait for one another

    problem = regression()
    weights = [f"{w:.4f} {share}" for w, share in zip(problem.minimizers[0]["w"], SHARES, strict=True)]
    print(f"S&P 500 ≈ {' + '.join(weights)}: least squares on {MONTHS} months; {orders} orders of them\n")
    runs, rows = {}, []
    print(f"{COLUMNS[0]:13}  " + "  ".join(f"{name:>6}" for name in COLUMNS[1:]))
    for name, (batch_size, lr, _) in METHODS.items():
        runs[name] = descend(problem, batch_size, lr, epochs, orders)
        rows.append(summarize(name, runs[name][1]))
        *row, median, worst = rows[-1]
        cells = [*row[1:], f"{median:.2e}", f"{worst:.2e}"]
        widths = [max(6, len(column)) for column in COLUMNS[1:]]
        print(
            f"{name:13}  " + "  ".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True)), flush=True
        )
    print(f"gap = loss / minimum − 1 over all of the data, after {epochs} epochs\n")

    with (args.out / "methods.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    draw(problem, runs, args.out / "descent_paths.png")
    print(f"Written: methods.csv and descent_paths.png in {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
