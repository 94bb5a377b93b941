"""Gradient noise along a run: its cloud, how batches shrink it, and the batch size that it suggests.

Every sample has a gradient of its own, and a mini-batch averages a few. On the regression of the S&P 500's
monthly return on those of two of its shares, gradients have two entries, so that their cloud can be drawn
as it is. As descent goes on the mean gradient shrinks far more than the cloud: steps become mostly noise.

- Over all batches the squared error of a mini-batch gradient is tr Σ/B, or less without replacement, by
  (n − B)/(n − 1). That is measured, and is so at every point of the run.
- The noise scale tr Σ/‖G‖² is McCandlish's suggestion for the batch size. It grows along a run, by a factor
  of hundreds here. So there is no one best batch size; there is one for how far you want to get.
- Is it a good suggestion? A sweep tells: for each batch size the best of many learning rates, and the steps
  that its mean over many orders takes to come within a gap of the minimum. Steps and samples trade off as
  steps = S·(1 + b/B): b is the batch size at which both are twice their least. The table has b beside the
  noise scale of the run on its way to that gap; the paper promises no more than the order of magnitude.

Sources: S. McCandlish et al., "An empirical model of large-batch training", 2018; L. Balles, J. Romero,
P. Hennig, "Coupling adaptive batch sizes with learning rates", 2017; R. Byrd et al., "Sample size
selection in optimization methods for machine learning", 2012; R. Bollapragada, R. Byrd, J. Nocedal,
"Adaptive sampling strategies for stochastic optimization", 2018. The data are matplotlib's `Stocks.csv`.

    python demos/gradient_noise.py [--out DIR] [--fast]
"""

import argparse
import csv
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.func import vmap

import gdfunc as gd

SHARES = ("IBM", "XRX")
START = (-0.3, 0.7)
MONTHS = 389
LR = 0.2  # of the run that is looked at; full batches diverge above 2/L = 1.24
STEPS = 30
LOOKED_AT = (0, 3, 8, 20)  # the steps whose clouds are drawn
DRAWN_BATCH = 16
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TARGETS = (1.0, 0.5, 0.3, 0.2, 0.1, 0.05, 0.03)
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")


def regression() -> gd.problems.Problem:
    """Regress the index on two shares, without a constant: the parameters are their weights."""
    stocks = gd.datasets.stocks()
    columns = [stocks.features.index(share) for share in SHARES]
    # In units of 10 % the curvatures are near 1, and so are useful learning rates.
    problem = gd.problems.linear_regression(10 * stocks.x[:, columns], 10 * stocks.y, bias=False)
    return problem._replace(params={"w": torch.tensor(START, dtype=torch.float64)})


# The run, and what its gradients say.


def follow(problem: gd.problems.Problem) -> gd.Trajectory:
    """Run full-batch descent, and record how the gradients of all samples lie at every step."""
    noise = gd.reduce_per_sample(problem.loss_fn, gd.stats.spread())

    def spread(params: Any, loss: Tensor) -> gd.stats.Spread:
        return noise(params, problem.data)[0]

    step, index = gd.make_step(problem.loss_fn), gd.full_batch(MONTHS, STEPS)
    return gd.train(step, problem.params, problem.data, index, LR, record=("params", "loss", spread))[1]


def gradients(problem: gd.problems.Problem, trajectory: gd.Trajectory, t: int) -> Tensor:
    """Those of all samples at step t, [n, 2]."""
    params = {name: leaf[t] for name, leaf in trajectory.params.items()}
    return gd.per_sample_grad(problem.loss_fn)(params, problem.data)[0]["w"]


def batch_errors(g: Tensor, batch_size: int, draws: int, *, replacement: bool) -> float:
    """The mean of ‖g_B − ḡ‖² over many batches."""
    key = gd.random.fold_in(gd.random.key(2), batch_size)
    index = gd.sample_batches(key, len(g), batch_size, draws, replacement=replacement)
    return float((g[index].mean(dim=1) - g.mean(dim=0)).square().sum(dim=1).mean())


# The sweep.


def mean_gaps(problem: gd.problems.Problem, batch_size: int, lrs: Tensor, seeds: int, steps: int) -> Tensor:
    """loss / minimum − 1 over all of the data, the mean over orders: [lrs, steps]."""
    step = gd.make_step(problem.loss_fn)

    def gap(params: Any, _batch_loss: Tensor) -> Tensor:
        return problem.loss_fn(params, problem.data) / problem.minimum - 1

    def run(lr: Tensor, key: Tensor) -> Tensor:
        index = gd.sample_batches(key, MONTHS, batch_size, steps)
        return gd.train(step, problem.params, problem.data, index, lr, record=(gap,))[1].gap

    keys = gd.random.split(gd.random.key(1), seeds)
    return vmap(vmap(run, (None, 0)), (0, None))(lrs, keys).mean(dim=1)


def steps_to(target: float, gaps: Tensor) -> float:
    """The steps that the best learning rate takes, to a fraction of a step; infinite if none gets there."""
    there = gaps < target
    last = there.int().argmax(dim=1).clamp_min(1)
    before, after = (gaps.gather(1, i[:, None])[:, 0].log() for i in (last - 1, last))
    share = (before - torch.tensor(target).log()) / (before - after)
    steps = torch.where(there.any(dim=1), last - 1 + share, torch.inf)
    return float(steps.min())


class Critical(NamedTuple):
    """The answer of the sweep about one target."""

    gap: float
    steps: list[float]  # for each batch size
    least_steps: float
    least_samples: float
    batch_size: float  # b = least samples / least steps
    noise_scale: float  # where the run is at that gap
    noise_scale_before: float  # the median on the way there


def fit(target: float, steps: list[float], gaps: Tensor, scales: Tensor) -> Critical:
    """Fit steps = least steps + least samples / B, in relative error."""
    y = torch.tensor(steps, dtype=torch.float64)
    sizes = torch.tensor(BATCH_SIZES, dtype=torch.float64)
    known = y.isfinite()
    columns = torch.stack([1 / y, 1 / (sizes * y)], dim=1)[known]
    ones = columns.new_ones(len(columns), 1)
    least_steps, least_samples = torch.linalg.lstsq(columns, ones).solution[:, 0].tolist()
    way = gaps >= target
    here = float(scales[way.sum().clamp_max(len(scales) - 1)])
    return Critical(
        target,
        steps,
        least_steps,
        least_samples,
        least_samples / least_steps,
        here,
        float(scales[way].median()),
    )


def sweep(problem: gd.problems.Problem, trajectory: gd.Trajectory, fast: bool) -> list[Critical]:
    lrs = torch.logspace(-2.7, 0.2, 12 if fast else 40, dtype=torch.float64)
    orders, least, most = (8, 40, 120) if fast else (64, 100, 2000)
    gaps = {size: mean_gaps(problem, size, lrs, orders, max(least, most // size)) for size in BATCH_SIZES}
    scales, run_gaps = gd.stats.noise_scale(trajectory.spread), trajectory.loss / problem.minimum - 1
    return [
        fit(target, [steps_to(target, gaps[size]) for size in BATCH_SIZES], run_gaps, scales)
        for target in TARGETS
    ]


def conclusion(mean: float, noise: float, uphill: tuple[float, float], step: int) -> str:
    """Compare a step with the start: ‖ḡ‖ and √tr Σ as ratios, the shares of batches uphill at both."""
    ratios = f"to {100 * mean:.2g} %, the noise to {100 * noise:.2g} %"
    word = "shrinks far more than" if mean < noise / 2 else "does not shrink far more than"
    first, last = (f"{100 * share:.0f} %" for share in uphill)
    shares = f"{first} of batches lead uphill at the start, {last} at step {step}"
    return f"The mean gradient {word} its noise ({ratios}): {shares}"


def sweep_conclusion(ratios: list[float]) -> str:
    """Judge the noise scale on the way to a gap, over the batch size that the sweep finds best for it."""
    low, high = min(ratios), max(ratios)
    word = "is" if low > 0.1 and high < 10 else "is not"
    times = f"{low:.1f} to {high:.1f} times what a sweep finds"
    return (
        f"The noise scale on the way to a gap {word} within a factor of ten of the best batch size: {times}"
    )


def report(rows: list[Critical]) -> str:
    """Print the sweep, and return what it shows."""
    print("\nsteps that the best learning rate takes to a gap, for each batch size; b; noise scale")
    sizes = "".join(f"{size:>7}" for size in BATCH_SIZES)
    print(f"{'gap':>5} {sizes}  {'b':>5}  {'on the way':>10}  {'at the gap':>10}")
    for row in rows:
        steps = "".join(f"{step:7.1f}" if step < 1e4 else "      –" for step in row.steps)
        scales = f"{row.noise_scale_before:10.0f}  {row.noise_scale:10.0f}"
        print(f"{row.gap:5} {steps}  {row.batch_size:5.0f}  {scales}")
    said = sweep_conclusion([row.noise_scale_before / row.batch_size for row in rows])
    print(f"{said}.\n")
    return said


# The pictures.


def draw_clouds(problem: gd.problems.Problem, trajectory: gd.Trajectory, path: Path) -> None:
    """Draw every sample's gradient at some steps, and the means of batches among them."""
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    axes = figure.subplots(1, len(LOOKED_AT), sharex=True, sharey=True)
    uphill = []
    scales = gd.stats.noise_scale(trajectory.spread)
    for ax, t in zip(axes, LOOKED_AT, strict=True):
        g = gradients(problem, trajectory, t)
        index = gd.sample_batches(gd.random.key(3), len(g), DRAWN_BATCH, 150)
        means, mean = g[index].mean(dim=1), g.mean(dim=0)
        ax.axhline(0, color="0.85", linewidth=0.8, zorder=0)
        ax.axvline(0, color="0.85", linewidth=0.8, zorder=0)
        ax.plot(*g.T, ".", color="0.55", markersize=3, label=f"{len(g)} single months")
        ax.plot(*means.T, ".", color=COLORS[0], markersize=3, label=f"150 batches of {DRAWN_BATCH}")
        arrow = {"arrowstyle": "-|>", "color": COLORS[1], "lw": 2.5, "shrinkA": 0, "shrinkB": 0}
        ax.annotate("", xy=mean, xytext=(0, 0), arrowprops=arrow, zorder=5)
        ax.plot([], [], "-", color=COLORS[1], linewidth=2, label="their mean, the full gradient")
        uphill.append(float((means @ mean < 0).double().mean()))
        share = f"{100 * uphill[-1]:.0f} % of the batches lead uphill"
        title = f"step {t}: noise scale {float(scales[t]):.0f}\n{share}"
        ax.set_title(title, fontsize=10, loc="left", color="0.35")
        ax.set_xlabel(f"∂loss / ∂w of {SHARES[0]}")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set(
        ylabel=f"∂loss / ∂w of {SHARES[1]} (some months lie outside)", xlim=(-1.3, 1.0), ylim=(-1.0, 1.6)
    )
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    spread, last = trajectory.spread, LOOKED_AT[-1]
    mean, noise = (float((v[last] / v[0]).sqrt()) for v in (spread.squared_norm, spread.variance))
    said = conclusion(mean, noise, (uphill[0], uphill[-1]), last)
    print(f"{said}.")
    figure.suptitle(textwrap.fill(said, 96), x=0.01, ha="left", fontweight="bold", fontsize=12)
    figure.savefig(path, dpi=150)


def draw_errors(problem: gd.problems.Problem, trajectory: gd.Trajectory, draws: int, ax: Any) -> None:
    """Draw the error of mini-batch gradients over the batch size, at the start and near the end."""
    sizes = [*BATCH_SIZES, 350]
    for t, color in zip((0, LOOKED_AT[-1]), COLORS, strict=False):
        g = gradients(problem, trajectory, t)
        total = float(trajectory.spread.variance[t]) * (1 - 1 / MONTHS)
        line = torch.logspace(0, 2.585, 100)
        ax.plot(line, total / line, "-", color=color, linewidth=1)
        ax.plot(line, total / line * (MONTHS - line) / (MONTHS - 1), "--", color=color, linewidth=1)
        for marker, replacement in (("o", True), ("x", False)):
            errors = [batch_errors(g, size, draws, replacement=replacement) for size in sizes]
            kind = "with" if replacement else "without"
            ax.plot(sizes, errors, marker, color=color, label=f"step {t}, {kind} replacement")
        signal = float(trajectory.spread.squared_norm[t])
        ax.axhline(signal, color=color, linestyle=":", linewidth=1.5, label=f"‖full gradient‖² at step {t}")
    ax.plot([], [], "-", color="0.4", linewidth=1, label="tr Σ/B")
    ax.plot([], [], "--", color="0.4", linewidth=1, label="tr Σ/B · (n − B)/(n − 1)")
    ax.set(xscale="log", yscale="log", xlabel="batch size B", ylabel="mean of ‖g_B − ḡ‖²")
    ax.set_title("Mini-batch noise falls as 1/B", loc="left", color="0.35")


def draw_suggestions(
    problem: gd.problems.Problem, trajectory: gd.Trajectory, rows: list[Critical], ax: Any
) -> None:
    """Draw batch sizes over the gap: those that statistics suggest, and those that the sweep finds."""
    gap, spread = trajectory.loss / problem.minimum - 1, trajectory.spread
    suggestions = {
        "noise scale": (gd.stats.noise_scale(spread), "-"),
        "norm test, θ = ½": (gd.stats.norm_test(spread, 0.5).batch_size, "--"),
        "inner-product test, θ = 0.9": (gd.stats.inner_product_test(spread, 0.9).batch_size, "-."),
        f"CABS at lr {LR}": (gd.stats.cabs(spread, LR), ":"),
    }
    for (name, (sizes, style)), color in zip(suggestions.items(), COLORS, strict=True):
        ax.plot(gap, sizes, style, color=color, label=name)
    gaps = [row.gap for row in rows]
    ax.plot(
        gaps,
        [row.noise_scale_before for row in rows],
        "k-",
        linewidth=1,
        label="noise scale, median so far",
    )
    ax.plot(gaps, [row.batch_size for row in rows], "ko", label="b of the sweep, to that gap")
    ax.set(xscale="log", yscale="log", xlim=(4, 0.02), ylim=(1, 3000))
    ax.set(xlabel="loss / minimum − 1, falling along the run", ylabel="batch size")
    ax.set_title("What the noise suggests, and what is best", loc="left", color="0.35")


def draw_trade_off(rows: list[Critical], ax: Any) -> None:
    """Draw samples over steps for each batch size, with the fitted hyperbola."""
    sizes = torch.tensor(BATCH_SIZES, dtype=torch.float64)
    chosen = [row for row in rows if row.gap in (1.0, 0.3, 0.1, 0.03)]
    for row, color in zip(chosen, COLORS, strict=True):
        steps = torch.tensor(row.steps)
        ax.plot(steps, steps * sizes, "o", color=color, label=f"to gap {row.gap}: b = {row.batch_size:.0f}")
        line = torch.logspace(-0.5, 3.3, 200)
        fitted = row.least_steps + row.least_samples / line
        ax.plot(fitted, fitted * line, "-", color=color, linewidth=1)
        ax.plot(
            2 * row.least_steps, 2 * row.least_samples, "*", color=color, markersize=13, markeredgecolor="k"
        )
    ax.plot([], [], "k*", markersize=10, label="batches of b: twice the least of both")
    ax.set(xscale="log", yscale="log", xlim=(0.9, 2000), ylim=(8, 6000))
    ax.set(xlabel="steps, best learning rate", ylabel="samples = batch size · steps")
    ax.set_title(
        f"The sweep: batches of {BATCH_SIZES[0]} (right) to {BATCH_SIZES[-1]} (left)",
        loc="left",
        color="0.35",
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path("out/gradient_noise"), help="folder for the results"
    )
    parser.add_argument("--fast", action="store_true", help="fewer learning rates, orders and draws")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # on tensors this small, threads would only wait for one another

    problem = regression()
    trajectory = follow(problem)
    scales = gd.stats.noise_scale(trajectory.spread)
    print(
        f"full-batch descent, lr {LR}: step, gap, ‖gradient‖², tr Σ of the samples' gradients, noise scale"
    )
    for t in (*LOOKED_AT, STEPS - 1):
        spread = [float(leaf[t]) for leaf in trajectory.spread]
        gap = spread[1] / problem.minimum - 1
        print(f"{t:5}  {gap:7.4f}  {spread[2]:9.5f}  {spread[3]:7.4f}  {float(scales[t]):8.1f}")
    rows = sweep(problem, trajectory, args.fast)
    said = report(rows)

    with (args.out / "batch_sizes.csv").open("w", newline="", encoding="utf-8") as file:
        header = ("gap", *(f"steps at {size}" for size in BATCH_SIZES), *Critical._fields[2:])
        csv.writer(file).writerows([header, *((row.gap, *row.steps, *row[2:]) for row in rows)])
    draw_clouds(problem, trajectory, args.out / "clouds.png")
    figure = Figure(figsize=(15, 6), layout="constrained")
    figure.suptitle(said, x=0.01, ha="left", fontweight="bold", fontsize=14)
    left, middle, right = figure.subplots(1, 3)
    draw_errors(problem, trajectory, 300 if args.fast else 10_000, left)
    draw_suggestions(problem, trajectory, rows, middle)
    draw_trade_off(rows, right)
    for ax in (left, middle, right):
        ax.legend(fontsize="small", framealpha=1)
        ax.grid(color="0.9", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(args.out / "batch_sizes.png", dpi=150)
    print(f"Written: batch_sizes.csv, clouds.png and batch_sizes.png in {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
