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

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from _card import Card
from matplotlib.figure import Figure
from torch import Tensor
from torch.func import vmap

import gdfunc as gd
from gdfunc.stats import cabs, inner_product_test, noise_scale, norm_test

SHARES = ("IBM", "XRX")
START = (-0.3, 0.7)
MONTHS = 389
LR = 0.2  # of the run that is looked at; full batches diverge above 2/L = 1.24
STEPS = 30
LOOKED_AT = (0, 3, 8, 20)  # the steps whose clouds are drawn
DRAWN_BATCH, DRAWN = 16, 400
BETWEEN = "batches on the arrow's side of it lead downhill"
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TARGETS = (1.0, 0.5, 0.3, 0.2, 0.1, 0.05, 0.03)
TRADED = (1.0, 0.3, 0.1, 0.03)  # the gaps whose trade-off is drawn
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
SUBTITLE: dict[str, Any] = {"loc": "left", "fontsize": 9, "color": "0.35"}


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
    """Average ‖g_B − ḡ‖² over many batches."""
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
    scales, run_gaps = noise_scale(trajectory.spread), trajectory.loss / problem.minimum - 1
    return [
        fit(target, [steps_to(target, gaps[size]) for size in BATCH_SIZES], run_gaps, scales)
        for target in TARGETS
    ]


def uphill_of(g: Tensor) -> tuple[Tensor, Tensor]:
    """Draw batches among the gradients [n, 2]: their means, and which of them lead uphill."""
    index = gd.sample_batches(gd.random.key(3), len(g), DRAWN_BATCH, DRAWN)
    means = g[index].mean(dim=1)
    return means, means @ g.mean(dim=0) < 0


# The conclusions.


def conclusion(mean: float, noise: float, first: float, last: float, step: int) -> str:
    """Compare a step with the start: ‖ḡ‖ and √tr Σ as ratios, the shares of batches uphill at both."""
    ratios = f"to {100 * mean:.2g} %, the noise to {100 * noise:.2g} %"
    word = "shrinks far more than" if mean < noise / 2 else "does not shrink far more than"
    shares = f"{100 * first:.0f} % of batches lead uphill at the start, {100 * last:.0f} % at step {step}"
    return f"The mean gradient {word} its noise ({ratios}): {shares}"


def errors_conclusion(power: float, off: float, batches: int) -> str:
    """Judge B^power, fitted to the squared errors, and the largest relative distance off tr Σ/B."""
    if abs(power + 1) > 0.1:
        return f"Mini-batch noise does not fall as 1/B, but as B^{power:.2f}"
    measured = f"over {batches:,} batches of each size it is at most {100 * off:.0f} % off tr Σ/B"
    return f"Mini-batch noise falls as 1/B: {measured}"


def scale_conclusion(ratios: Sequence[float]) -> str:
    """Judge the noise scale on the way to a gap, over the batch size that the sweep finds best for it."""
    low, high = min(ratios), max(ratios)
    word = "is" if low > 0.1 and high < 10 else "is not"
    times = f"{low:.1f} to {high:.1f} times what a sweep finds"
    return f"The noise scale on the way {word} within a factor of ten of the best batch size: {times}"


def trade_conclusion(gap: float, sizes: tuple[int, int], steps: tuple[float, float], b: float) -> str:
    """Compare the steps of two batch sizes to a gap; at b both costs are twice the least."""
    (small, large), fewer = sizes, steps[0] / steps[1]
    more = large / small / fewer
    saved = f"{fewer:.2g} times fewer steps" if fewer > 1 else "no fewer steps"
    paid = f"{more:.2g} times the samples" if more > 1 else "no more samples"
    compared = f"batches of {large} take {saved} than batches of {small}, and {paid}"
    return f"To a gap of {gap:g}, {compared}; batches of {b:.0f}, twice the least of both"


def report(trajectory: gd.Trajectory, minimum: float, rows: list[Critical]) -> None:
    """Print the run with the batch sizes that its noise suggests, and the sweep."""
    spread, gaps = trajectory.spread, trajectory.loss / minimum - 1
    suggested = {
        "noise scale": noise_scale(spread),
        "norm test, ½": norm_test(spread, 0.5).batch_size,
        "inner-product test, 0.9": inner_product_test(spread, 0.9).batch_size,
        f"CABS at lr {LR}": cabs(spread, LR),
    }
    print(f"full-batch descent, lr {LR}, and the batch sizes that its noise suggests:")
    print(f"{'step':>5}  {'gap':>7}  {'‖ḡ‖²':>9}  {'tr Σ':>7}  {'  '.join(suggested)}")
    for t in (*LOOKED_AT, STEPS - 1):
        sizes = "  ".join(f"{float(size[t]):{len(name)}.1f}" for name, size in suggested.items())
        signal, noise = float(spread.squared_norm[t]), float(spread.variance[t])
        print(f"{t:5}  {float(gaps[t]):7.4f}  {signal:9.5f}  {noise:7.4f}  {sizes}")
    print("\nsteps that the best learning rate takes to a gap, for each batch size; b; noise scale")
    sizes = "".join(f"{size:>7}" for size in BATCH_SIZES)
    print(f"{'gap':>5} {sizes}  {'b':>5}  {'on the way':>10}  {'at the gap':>10}")
    for row in rows:
        steps = "".join(f"{step:7.1f}" if step < 1e4 else "      –" for step in row.steps)
        scales = f"{row.noise_scale_before:10.0f}  {row.noise_scale:10.0f}"
        print(f"{row.gap:5} {steps}  {row.batch_size:5.0f}  {scales}")
    print()


# The pictures.


def clean(ax: Any) -> None:
    ax.grid(color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def draw_clouds(problem: gd.problems.Problem, trajectory: gd.Trajectory) -> Figure:
    """Draw every sample's gradient at some steps, and the means of batches among them, on one scale."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    reach = 2.6 * math.sqrt(float(trajectory.spread.variance[0]) / DRAWN_BATCH)
    for ax, t in zip(figure.subplots(1, len(LOOKED_AT), sharey=True), LOOKED_AT, strict=True):
        g = gradients(problem, trajectory, t)
        means, uphill = uphill_of(g)
        draw_cloud(ax, g, means, uphill)
        outside, share = int((g.abs() > reach).any(dim=1).sum()), float(uphill.double().mean())
        ax.set_title(f"step {t}: {100 * share:.0f} % uphill\n{outside} months outside", **SUBTITLE)
        view = (-reach, reach)
        ax.set(xlim=view, ylim=view, aspect="equal", xlabel=f"∂loss / ∂w, {SHARES[0]}")
        near = 2.6 * math.sqrt(float(trajectory.spread.variance[t]) / DRAWN_BATCH)
        if near < reach / 2:
            draw_zoom(ax, g, means, uphill, near / 2)
        ax.spines[["top", "right"]].set_visible(False)
        ax.locator_params(nbins=4)
    figure.axes[0].set_ylabel(f"∂loss / ∂w, {SHARES[1]}")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    return figure


def draw_cloud(ax: Any, g: Tensor, means: Tensor, uphill: Tensor) -> None:
    """Draw gradients [n, 2], the means of batches, their own mean, and the line between the sides."""
    mean = g.mean(dim=0)
    ax.plot(*g.T, ".", color="0.82", markersize=3, label=f"{MONTHS} single months")
    looks = ((~uphill, "#56B4E9", ".", 4, "downhill"), (uphill, "#8C2D04", "x", 3.5, "uphill"))
    for side, color, marker, size, name in looks:
        label = f"batches of {DRAWN_BATCH} that lead {name}"
        ax.plot(*means[side].T, marker, color=color, markersize=size, markeredgewidth=0.8, label=label)
    ax.axline((0, 0), (-float(mean[1]), float(mean[0])), color="black", linewidth=0.8, label=BETWEEN)
    arrow = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.016, "zorder": 5}
    ax.quiver(0, 0, *mean, **arrow, minlength=0.1)
    ax.plot([], [], "-", color="black", linewidth=2, label="arrow: their mean, the full gradient")


def draw_zoom(ax: Any, g: Tensor, means: Tensor, uphill: Tensor, reach: float) -> None:
    """Draw a cloud once more in a corner, enlarged."""
    zoom = ax.inset_axes((0.55, 0, 0.45, 0.45), xlim=(-reach, reach), ylim=(-reach, reach))
    draw_cloud(zoom, g, means, uphill)
    zoom.set(xticks=(), yticks=(), aspect="equal")
    zoom.set_title(f"× {0.45 * ax.get_xlim()[1] / reach:.1f}", fontsize="small", y=0.8, x=0.04, loc="left")
    ax.indicate_inset_zoom(zoom, edgecolor="0.4")


class Errors(NamedTuple):
    """The mean squared errors of mini-batch gradients, by batch size, at a step."""

    step: int
    total: float  # tr Σ, of one sample
    signal: float  # ‖ḡ‖²
    replaced: list[float]
    distinct: list[float]


SIZES = (*BATCH_SIZES, 350)


def measure(problem: gd.problems.Problem, trajectory: gd.Trajectory, draws: int) -> list[Errors]:
    found = []
    for t in (0, LOOKED_AT[-1]):
        g = gradients(problem, trajectory, t)
        both = [
            [batch_errors(g, size, draws, replacement=with_) for size in SIZES] for with_ in (True, False)
        ]
        total = float(trajectory.spread.variance[t]) * (1 - 1 / MONTHS)
        found.append(Errors(t, total, float(trajectory.spread.squared_norm[t]), *both))
    return found


def judge_errors(found: list[Errors]) -> tuple[float, float]:
    """Fit the power of B to the errors with replacement, and find the largest distance off tr Σ/B."""
    sizes = torch.tensor(SIZES, dtype=torch.float64)
    totals = torch.tensor([[errors.total] for errors in found], dtype=torch.float64)
    ratios = sizes / totals * torch.tensor([errors.replaced for errors in found], dtype=torch.float64)
    x = sizes.log() - sizes.log().mean()
    power = float((ratios.log() @ x / (x @ x)).mean()) - 1
    return power, float((ratios - 1).abs().max())


def draw_errors(found: list[Errors]) -> Figure:
    """Draw the error of mini-batch gradients over the batch size, at the start and near the end."""
    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    ax, line = figure.subplots(), torch.logspace(0, math.log10(388), 100)
    for errors, color in zip(found, COLORS, strict=False):
        ax.plot(line, errors.total / line, "-", color=color, linewidth=1)
        distinct = errors.total / line * (MONTHS - line) / (MONTHS - 1)
        ax.plot(line, distinct, "--", color=color, linewidth=1)
        ax.plot(SIZES, errors.replaced, "o", color=color, markersize=5)
        ax.plot(SIZES, errors.distinct, "x", color=color)
        ax.axhline(errors.signal, color=color, linestyle=":", linewidth=1.2)
        text: dict[str, Any] = {"color": color, "fontsize": "small", "textcoords": "offset points"}
        ax.annotate(f"step {errors.step}", (2, errors.total / 2), (6, 4), **text)
        ax.annotate(f"‖ḡ‖² at step {errors.step}", (1, errors.signal), (0, -4), va="top", **text)
    keys = {"o": "with replacement, and tr Σ/B", "x": "without, and tr Σ/B · (n − B)/(n − 1)"}
    for (marker, name), style in zip(keys.items(), ("-", "--"), strict=True):
        ax.plot([], [], marker + style, color="0.4", linewidth=1, markersize=5, label=name)
    ax.set(
        xscale="log", yscale="log", xlabel="batch size B", ylabel="mean of ‖g_B − ḡ‖²", ylim=(5e-5, None)
    )
    ax.legend(fontsize="small", loc="lower left", framealpha=1)
    clean(ax)
    return figure


def draw_scales(trajectory: gd.Trajectory, minimum: float, rows: list[Critical]) -> Figure:
    """Draw the noise scale over the gap, and the batch sizes that the sweep finds."""
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    ax, gaps = figure.subplots(), [row.gap for row in rows]
    before = [row.noise_scale_before for row in rows]
    ax.plot(trajectory.loss / minimum - 1, noise_scale(trajectory.spread), "-", color="0.6")
    ax.plot(gaps, before, "-", color=COLORS[0])
    ax.plot(gaps, [row.batch_size for row in rows], "ko")
    text: dict[str, Any] = {"fontsize": "small", "textcoords": "offset points", "va": "center"}
    ax.annotate(
        "noise scale at the gap", (gaps[-3], rows[-3].noise_scale), (-8, 4), ha="right", color="0.4", **text
    )
    ax.annotate("median on the way to it", (gaps[-1], before[-1]), (6, 0), color=COLORS[0], **text)
    ax.annotate("best batch size, by the sweep", (gaps[-1], rows[-1].batch_size), (8, 0), **text)
    ax.set(xscale="log", yscale="log", xlim=(4, 0.028), ylim=(10, 1500))
    ax.set(xlabel="gap, loss / minimum − 1, falling along the run", ylabel="batch size")
    clean(ax)
    return figure


def draw_trade_off(rows: list[Critical]) -> Figure:
    """Draw samples over steps for each batch size, with the fitted hyperbola."""
    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    ax, sizes = figure.subplots(), torch.tensor(BATCH_SIZES, dtype=torch.float64)
    for row, color in zip([row for row in rows if row.gap in TRADED], COLORS, strict=True):
        steps = torch.tensor(row.steps)
        ax.plot(steps, steps * sizes, "o", color=color, markersize=5)
        line = torch.logspace(0, math.log10(BATCH_SIZES[-1]), 200)
        fitted = row.least_steps + row.least_samples / line
        ax.plot(fitted, fitted * line, "-", color=color, linewidth=1)
        star = (2 * row.least_steps, 2 * row.least_samples)
        ax.plot(*star, "*", color=color, markersize=13, markeredgecolor="black")
        end = (float(fitted[0]), float(fitted[0]))
        text: dict[str, Any] = {"color": color, "fontsize": "small", "textcoords": "offset points"}
        ax.annotate(f"to a gap of {row.gap:g}", end, (6, -9), **text)
    star = "twice the least steps and the least samples"
    ax.plot([], [], "*", color="white", markeredgecolor="black", markersize=11, label=star)
    ax.legend(fontsize="small", loc="upper right", frameon=False)
    ax.set(xscale="log", xlabel="steps at the best learning rate")
    ax.set(yscale="log", ylabel="samples = batch size · steps")
    ax.set_title(
        f"batches of {BATCH_SIZES[0]} (right) to {BATCH_SIZES[-1]} (left of each curve)", **SUBTITLE
    )
    clean(ax)
    return figure


def show_clouds(card: Card, problem: gd.problems.Problem, trajectory: gd.Trajectory) -> None:
    step, spread = LOOKED_AT[-1], trajectory.spread
    mean, noise = (float((v[step] / v[0]).sqrt()) for v in (spread.squared_norm, spread.variance))
    uphill = [uphill_of(gradients(problem, trajectory, t))[1].double().mean() for t in (0, step)]
    numbers = {
        "mean": mean,
        "noise": noise,
        "first": float(uphill[0]),
        "last": float(uphill[1]),
        "step": step,
    }
    question = "Why do mini-batches lose their way near the minimum?"
    card.picture("clouds", draw_clouds(problem, trajectory), conclusion(**numbers), numbers, question)


def show_sweep(
    card: Card, problem: gd.problems.Problem, trajectory: gd.Trajectory, rows: list[Critical]
) -> None:
    ratios = [row.noise_scale_before / row.batch_size for row in rows]
    question = "Does the noise tell the best batch size?"
    figure = draw_scales(trajectory, float(problem.minimum), rows)
    card.picture("noise_scale", figure, scale_conclusion(ratios), {"ratios": ratios}, question)

    def ends(row: Critical) -> list[tuple[int, float]]:
        there = [
            (size, steps) for size, steps in zip(BATCH_SIZES, row.steps, strict=True) if steps < math.inf
        ]
        return [there[0], there[-1]]

    row = rows[TARGETS.index(0.1)]
    sizes, steps = zip(*ends(row), strict=True)
    traded: dict[str, Any] = {"gap": row.gap, "sizes": sizes, "steps": steps, "b": row.batch_size}
    question = "What do large batches save, and what do they cost?"
    card.picture("trade_off", draw_trade_off(rows), trade_conclusion(**traded), traded, question)


def main(argv: Sequence[str] | None = None) -> int:
    with Card(__file__, "Which batch size does the noise of gradients suggest?", argv) as card:
        problem = regression()
        trajectory = follow(problem)
        rows = sweep(problem, trajectory, card.fast)
        report(trajectory, float(problem.minimum), rows)
        header = ("gap", *(f"steps at {size}" for size in BATCH_SIZES), *Critical._fields[2:])
        card.table("batch_sizes", header, ((row.gap, *row.steps, *row[2:]) for row in rows))
        show_clouds(card, problem, trajectory)
        draws = 300 if card.fast else 20_000
        found = measure(problem, trajectory, draws)
        power, off = judge_errors(found)
        numbers: dict[str, Any] = {"power": power, "off": off, "batches": draws}
        question = "How does the noise of a mini-batch depend on its size?"
        card.picture("errors", draw_errors(found), errors_conclusion(**numbers), numbers, question)
        show_sweep(card, problem, trajectory, rows)
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)  # on tensors this small, threads would only wait for one another
    raise SystemExit(main())
