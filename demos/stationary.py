"""The place where constant-step descent comes to rest: a covariance, measured over millions of steps.

With a constant learning rate η the iterates do not converge: they go on to wander about the optimum θ*. For
least squares, and batches drawn with replacement, their stationary second moment solves a linear equation
(`_moments.py` derives it), from which the covariance Σ follows. Both are compared here.

Above some η the equation has no positive solution: the variance is infinite. The iterates need not diverge
there: they keep a stationary law, with heavy tails, as long as their Lyapunov exponent is below 0. And
somewhat below that η the fourth moment is infinite already: a measured variance has an infinite standard
error. All of this is in the table (CSV) and the pictures: one vmap runs every learning rate on several
streams of batches. The learning rates share these, so neighbours err together.

Sources: G. Pflug, "Stochastic minimization with constant step-size: asymptotic laws", 1986; F. Bach,
E. Moulines, "Non-strongly-convex smooth stochastic approximation with convergence rate O(1/n)", 2013;
S. Mandt, M. Hoffman, D. Blei, "Stochastic gradient descent as approximate Bayesian inference", 2017 (whose
diffusion is the dashed line); A. Dieuleveut, A. Durmus, F. Bach, "Bridging the gap between constant step
size stochastic gradient descent and Markov chains", 2020; M. Gurbuzbalaban, U. Simsekli, L. Zhu, "The
heavy-tail phenomenon in SGD", 2021. The data are matplotlib's `Stocks.csv`.

    python demos/stationary.py [--out DIR] [--fast]
"""

import math
import time
from typing import Any, NamedTuple

import torch
from _card import Card
from _moments import diffusion, limit, second_moment, trace, vector
from matplotlib.figure import Figure
from torch import Tensor
from torch.func import vmap

import gdfunc as gd

BATCH_SIZES = (1, 4, 16)
EXACT = "#D55E00"
COLORS = {1: "#0072B2", 4: "#D55E00", 16: "#009E73"}
# Learning rates, as shares of the one above which the variance is infinite.
SHARES = (0.02, 0.04, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.2, 1.6, 2.5)
FAST_SHARES = (0.1, 0.2, 0.4, 0.9, 1.2, 2.5)
SEEDS = 8
RUNNING = (0.1, 0.4, 0.9, 1.2, 1.6)  # the shares whose variance is drawn over the steps
TRANSIENT = 2  # pieces of a run that are thrown away
AGREES = 4.0  # standard errors between measured and exact, at most, wherever there is a standard error


class Row(NamedTuple):
    """One batch size and learning rate: tr Σ, measured and exact."""

    batch_size: int
    lr: float
    share: float  # of the largest lr whose variance is finite
    measured: float
    standard_error: float
    exact: float
    diffusion: float
    z: float  # (measured − exact) / standard error
    rms_z: float  # of the 27 entries of the mean and of Σ; 1 is to be expected
    moments: (
        int  # 4: the fourth is finite, and with it the standard error; 2: only the variance is; 0: neither
    )
    exponent: (
        float  # Lyapunov's: the growth of ln ‖θ − θ*‖ a step, but for the noise; above 0 iterates diverge
    )


def add_up_moments(center: Tensor) -> gd.GradientTransformation:
    """Pass the gradient on, and add up δδᵀ, δ = (θ − center, 1)."""

    def init(params: dict[str, Tensor]) -> Tensor:
        return center.new_zeros(len(center) + 1, len(center) + 1)

    def update(grads: Any, total: Tensor, params: dict[str, Tensor]) -> tuple[Any, Tensor]:
        delta = torch.cat([vector(params) - center, center.new_ones(1)])
        return grads, total + torch.outer(delta, delta)

    return gd.GradientTransformation(init, update)


class Measured(NamedTuple):
    """Means of δδᵀ over each piece of a run, and what they took."""

    moments: Tensor  # [lrs, seeds, pieces, p+1, p+1]
    steps: int  # of all runs, without the transient
    plan_seconds: float
    loop_seconds: float


def simulate(
    problem: gd.problems.Problem,
    batch_size: int,
    lrs: Tensor,
    pieces: int,
    piece: int,
) -> Measured:
    """Run every learning rate and seed at once, piece by piece: no plan and no record of it all is held."""
    transform = add_up_moments(vector(problem.minimizers[0]))
    step = gd.make_step(problem.loss_fn, transform)

    def run(params: Any, lr: Tensor, index: Tensor) -> tuple[Any, Tensor]:
        init = step.init(params)
        final, _ = gd.train(step, init, problem.data, index, lr, record=())
        return final.params, final.opt_state / len(index)

    over_seeds = vmap(run, in_dims=(0, None, 0))
    over_lrs = vmap(over_seeds, in_dims=(0, 0, None))
    keys = gd.random.split(gd.random.fold_in(gd.random.key(0), batch_size), SEEDS)
    params = {name: leaf.expand(len(lrs), SEEDS, *leaf.shape) for name, leaf in problem.params.items()}
    moments, plan_seconds, loop_seconds = [], 0.0, 0.0
    for i in range(pieces):
        started = time.perf_counter()
        steps = range(i * piece, (i + 1) * piece)
        index = torch.stack(
            [gd.sample_batches(key, len(problem.data[1]), batch_size, steps) for key in keys]
        )
        planned = time.perf_counter()
        params, means = over_lrs(params, lrs, index)
        if i >= TRANSIENT:  # the first piece compiles
            moments.append(means)
            plan_seconds += planned - started
            loop_seconds += time.perf_counter() - planned
    steps_in_all = len(lrs) * SEEDS * piece * len(moments)
    return Measured(torch.stack(moments, dim=2), steps_in_all, plan_seconds, loop_seconds)


def lyapunov(problem: gd.problems.Problem, batch_size: int, lrs: Tensor, limit: float) -> Tensor:
    """Lyapunov's exponent of the learning rates above the limit, from short runs without noise; else NaN.

    Targets of 0 leave no noise: every sample has its minimum at 0.
    """
    (x, y), runs, steps = problem.data, 128, 300
    step = gd.make_step(problem.loss_fn)
    start = {name: torch.ones_like(leaf) for name, leaf in problem.params.items()}

    def exponent(lr: Tensor, index: Tensor) -> Tensor:
        final, _ = gd.train(step, start, (x, torch.zeros_like(y)), index, lr, record=())
        return vector(final).norm().log() / steps

    index = gd.sample_batches(gd.random.key(1), len(y), batch_size, runs * steps)
    above, exponents = lrs > limit, torch.full_like(lrs, torch.nan)
    grid = gd.grid(lr=lrs[above], index=index.reshape(runs, steps, batch_size))
    exponents[above] = gd.sweep(exponent, grid).reshape().mean(dim=1)
    return exponents


def mean_and_error(values: Tensor) -> tuple[Tensor, Tensor]:
    """The mean over the first axis, and its standard error: the method of batch means.

    A piece is many times as long as the iterates remember, so pieces count as independent.
    """
    return values.mean(dim=0), values.std(dim=0) / math.sqrt(len(values))


def compare(
    problem: gd.problems.Problem,
    batch_size: int,
    limits: tuple[float, float],
    lrs: Tensor,
    measured: Measured,
) -> list[Row]:
    rows = []
    exponents = lyapunov(problem, batch_size, lrs, limits[0]).tolist()
    for lr, exponent, moments in zip(lrs.tolist(), exponents, measured.moments, strict=True):
        stable = lr < limits[0]
        exact = second_moment(problem, batch_size, lr)
        exact_trace = trace(exact) if stable else torch.tensor(math.inf)
        value, error = mean_and_error(trace(moments).flatten())
        entries, errors = mean_and_error(moments.flatten(end_dim=1))
        upper = torch.triu(torch.ones_like(exact)).bool().flatten()
        z = ((entries - exact) / errors).flatten()[upper][:-1]  # the last entry is 1 without error
        rows.append(
            Row(
                batch_size=batch_size,
                lr=lr,
                share=lr / limits[0],
                measured=float(value),
                standard_error=float(error),
                exact=float(exact_trace),
                diffusion=float(diffusion(problem, batch_size, lr).trace()),
                z=float((value - exact_trace) / error) if stable else math.nan,
                rms_z=float(z.square().mean().sqrt()) if stable else math.nan,
                moments=4 if lr < limits[1] else 2 if stable else 0,
                exponent=exponent,
            )
        )
    return rows


def report(rows: list[Row]) -> None:
    print(f"\n{'':26}tr Σ, the mean of ‖θ − θ*‖²")
    print(
        "batch       lr  of limit        measured ± s.e.       exact  diffusion  measured − exact   rms z"
    )
    for row in rows:
        trusted, stable = row.moments == 4, row.moments >= 2
        if row.exponent > 0:
            measured = "diverges"
        elif trusted:
            measured = f"{row.measured:.4e} ± {row.standard_error:.1e}"
        else:
            measured = f"{row.measured:.4e} ±   ∞    "
        exact = f"{row.exact:.4e}" if stable else "∞"
        relative = row.measured / row.exact - 1
        gap = f"{100 * relative:+7.2f} %" if stable else f"Lyapunov exponent {row.exponent:+.3f}"
        z = f" {row.z:+5.1f} s.e.  {row.rms_z:4.2f}" if trusted else ""
        print(
            f"{row.batch_size:5} {row.lr:8.5f} {row.share:9.2f}  {measured:>21} {exact:>11}"
            f"  {row.diffusion:9.3e}  {gap}{z}"
        )


def conclusion(limits: list[float], full: float, ratios: list[float]) -> str:
    """Say where variances become infinite, and how far the diffusion approximation is too low before it."""
    rates = ", ".join(f"{lr:.2g}" for lr in limits)
    early = "before full batches diverge" if max(limits) < full else "though full batches diverge no later"
    low, high = min(ratios), max(ratios)
    factors = " to ".join(dict.fromkeys((times(low), times(high))))
    blind = f"does not see it: at 0.9 of that lr it is {factors} times too low"
    seen = f"holds nearly up to it: at 0.9 of that lr the exact one is {factors} times as large"
    return (
        f"SGD's spread is infinite above a finite lr ({rates}), {early} ({full:.2g});"
        f" the diffusion approximation {blind if low > 1.5 else seen}"
    )


def agreement_conclusion(z: list[float], doubtful: list[float]) -> str:
    """Say how far measured and exact spread are apart, with an error bar and without a finite one."""
    worst = max(abs(value) for value in z)
    verb = "agree" if worst < AGREES else "do not agree"
    without = (
        f"where it is infinite, the measured is {min(doubtful):.2f} to {max(doubtful):.2f} of the exact"
    )
    errors = f"at most {worst:.1f} standard errors apart in {len(z)} settings"
    return f"Where the error bar is finite, measured and exact spread {verb}: {errors}; {without}"


def running_conclusion(apart: dict[float, float], seeds: int) -> str:
    """Say whether means settle, from the largest over the smallest of the seeds' by share of the limit."""
    below = max(ratio for share, ratio in apart.items() if share < 1)
    above = [ratio for share, ratio in apart.items() if share > 1]
    factors = " to ".join(dict.fromkeys((times(min(above)), times(max(above)))))
    settles = "settles only below the limit" if min(above) > below else "settles no better below the limit"
    return (
        f"The mean of squares {settles}: there {seeds} seeds end within a factor of {times(below)},"
        f" above it {factors} times apart"
    )


def times(factor: float) -> str:
    return f"{factor:.1f}" if factor < 10 else f"{factor:,.0f}"


# The pictures.


def draw_traces(
    problem: gd.problems.Problem, rows: list[Row], limits: dict[int, tuple[float, float]]
) -> Figure:
    """Draw tr Σ over lr, measured, exact and approximated."""
    figure = Figure(figsize=(7.2, 5.6), layout="constrained")
    ax = figure.subplots()
    low, high = min(row.exact for row in rows) / 2, 10.0
    for size, (largest, largest_of_errors) in limits.items():
        color = COLORS[size]
        # Points that gather at the limit, where the curve turns upright.
        lrs = largest * (1 - torch.logspace(math.log10(1 - SHARES[0] / 1.5), -6, 120, dtype=torch.float64))
        exact = [float(trace(second_moment(problem, size, lr))) for lr in lrs.tolist()]
        straight = [float(diffusion(problem, size, lr).trace()) for lr in lrs.tolist()]
        ax.plot(lrs, exact, color=color)
        ax.plot(lrs, straight, "--", color=color, linewidth=1)
        ax.axvspan(largest_of_errors, largest, color=color, alpha=0.08, linewidth=0)
        place = {"ha": "right", "va": "top", "rotation": 90, "fontsize": 9, "color": color}
        ax.annotate(f"batches of {size} ", (largest, high / 2), **place)
        for row in (row for row in rows if row.batch_size == size):
            height = row.measured if row.measured < high else high  # what overflowed, NaN, is above too
            ax.plot(row.lr, height, mark(row), color=color, fillstyle=fill(row), clip_on=False, zorder=4)
    full = 2 / problem.L
    ax.axvline(full, color="0.3", linewidth=1)
    edge: dict[str, Any] = {"ha": "right", "va": "bottom", "rotation": 90, "fontsize": 9, "color": "0.3"}
    ax.annotate(f"full batches diverge: {full:.2g} ", (full, 1.2 * low), **edge)
    key = {"color": "0.3", "linestyle": ""}
    ax.plot([], [], "o", **key, label="measured, finite error bar")
    ax.plot([], [], "o", fillstyle="none", **key, label="measured, infinite error bar (shaded)")
    ax.plot([], [], "^", fillstyle="none", **key, label="measured, infinite spread")
    ax.plot([], [], "x", **key, label="the iterates diverge")
    ax.plot([], [], "-", color="0.3", label="exact")
    ax.plot([], [], "--", color="0.3", linewidth=1, label="diffusion approximation")
    ax.legend(loc="upper left", fontsize=8, frameon=False)
    ax.set(xscale="log", yscale="log", ylim=(low, high), xlabel="learning rate")
    finish(figure, "on the top edge: above it")
    ax.set_title("tr Σ, the mean of ‖θ − θ*‖²", loc="left", fontsize=9, color="0.35")
    return figure


def draw_agreement(rows: list[Row], limits: dict[int, tuple[float, float]]) -> Figure:
    """Draw the measured over the exact tr Σ, and the difference in standard errors."""
    figure = Figure(figsize=(7.2, 5.2), layout="constrained")
    ratios, errors = axes = figure.subplots(2, 1, sharex=True, height_ratios=(1.3, 1))
    for size, (largest, largest_of_errors) in limits.items():
        for ax in axes:
            ax.axvspan(largest_of_errors, largest, color=COLORS[size], alpha=0.08, linewidth=0)
        ratios.plot([], [], "o", color=COLORS[size], label=f"batches of {size}")
    for row in rows:
        if row.moments:
            look = {"color": COLORS[row.batch_size], "fillstyle": fill(row)}
            ratios.plot(row.lr, row.measured / row.exact, mark(row), **look)
        if row.moments == 4:
            errors.errorbar(row.lr, row.z, 1.0, fmt="o", color=COLORS[row.batch_size], capsize=3)
    ratios.axhline(1, color="0.3", linewidth=1)
    ratios.set(xscale="log", yscale="log", ylim=(0.4, 2.5))
    ticks = (0.5, 0.7, 1.0, 1.4, 2.0)
    ratios.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    ratios.set_yticks((), minor=True)
    ratios.legend(loc="upper left", fontsize=8, frameon=False)
    ratios.set_title("measured / exact tr Σ", loc="left", fontsize=9, color="0.35")
    errors.axhspan(-3, 3, color="0.5", alpha=0.15, linewidth=0)
    errors.set(ylim=(-5, 5), xlabel="learning rate")
    title = "(measured − exact) / standard error; neighbours share their batches, and err together"
    errors.set_title(title, loc="left", fontsize=9, color="0.35")
    finish(figure, "open, shaded: the error bar is infinite")
    return figure


def finish(figure: Figure, note: str) -> None:
    for ax in figure.axes:
        ax.grid(color="0.9", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(
        f"{SEEDS} seeds on 389 monthly returns of five shares; {note}", fontsize=8, color="0.35"
    )


def fill(row: Row) -> str:
    return "full" if row.moments == 4 else "none"


def mark(row: Row) -> str:
    return "x" if row.exponent > 0 else "o" if row.moments else "^"


def running_means(measured: Measured) -> Tensor:
    """Return the mean of ‖θ − θ*‖² up to each piece, [lrs, seeds, pieces]."""
    values = trace(measured.moments)
    return values.cumsum(dim=-1) / torch.arange(1, values.shape[-1] + 1)


def draw_running_means(rows: list[Row], running: Tensor, piece: int) -> Figure:
    """Draw the mean of ‖θ − θ*‖² up to each step, over the steps, of some learning rates."""
    figure = Figure(figsize=(7.2, 5), layout="constrained")
    ax = gd.plot.plot_curves(
        {round(row.share, 2): means for row, means in zip(rows, running, strict=True)},
        x=piece * torch.arange(1, running.shape[-1] + 1),
        ax=figure.subplots(),
        by="limit ×",
        label_lines=True,
        band=(0.0, 1.0),
        xlabel="step, after the transient",
        ylabel="",
    )
    for row in rows:
        if row.moments:
            ax.hlines(row.exact, 0, ax.lines[0].get_xdata()[-1], color=EXACT, linestyle="--", zorder=5)
    ax.get_legend().remove()
    ax.xaxis.set_major_formatter("{x:,.0f}")
    title = f"mean of ‖θ − θ*‖² up to there, batches of {rows[0].batch_size}"
    ax.set_title(title, loc="left", fontsize=9, color="0.35")
    note = f"median and range of {SEEDS} seeds; dashed orange: exact, infinite above the limit"
    figure.supxlabel(note, fontsize=8, color="0.35")
    return figure


def show(card: Card) -> bool:
    sizes, shares = ((4,), FAST_SHARES) if card.fast else (BATCH_SIZES, SHARES)
    pieces, piece = (6, 60) if card.fast else (TRANSIENT + 20, 10_000)
    problem = gd.problems.stock_regression()
    limits, measured, rows = {}, {}, []
    for size in sizes:
        limits[size] = limit(problem, size, 2), limit(problem, size, 4)
        lrs = limits[size][0] * torch.tensor(shares, dtype=torch.float64)
        print(
            f"batches of {size:2}: {len(lrs)} learning rates x {SEEDS} seeds at once; ", end="", flush=True
        )
        measured[size] = simulate(problem, size, lrs, pieces, piece)
        steps, plan_seconds, loop_seconds = measured[size][1:]
        print(
            f"{steps:,} steps in {loop_seconds:.1f} s, {steps / loop_seconds:,.0f} "
            f"a second, and {plan_seconds:.1f} s to draw the batches"
        )
        rows += compare(problem, size, limits[size], lrs, measured[size])
    report(rows)
    card.table("traces", Row._fields, rows)

    numbers: dict[str, Any] = {
        "limits": [largest for largest, _ in limits.values()],
        "full": 2 / problem.L,
        "ratios": [row.exact / row.diffusion for row in rows if round(row.share, 2) == 0.9],
    }
    card.picture("trace_over_lr", draw_traces(problem, rows, limits), conclusion(**numbers), numbers)
    z = [row.z for row in rows if row.moments == 4]
    doubtful = [row.measured / row.exact for row in rows if row.moments == 2]
    card.picture(
        "agreement",
        draw_agreement(rows, limits),
        agreement_conclusion(z, doubtful),
        {"z": z, "doubtful": doubtful},
        question="Does the spread of runs agree with the exact one?",
    )
    show_running_means(card, [row for row in rows if row.batch_size == 4], measured[4], piece)
    return max(abs(value) for value in z) < AGREES


def show_running_means(card: Card, rows: list[Row], measured: Measured, piece: int) -> None:
    chosen = [i for i, row in enumerate(rows) if round(row.share, 2) in RUNNING]
    rows, running = [rows[i] for i in chosen], running_means(measured)[chosen]
    ends = running[..., -1]
    ratios = ends.amax(dim=1) / ends.amin(dim=1)
    apart = {round(row.share, 2): ratio for row, ratio in zip(rows, ratios.tolist(), strict=True)}
    card.picture(
        "running_means",
        draw_running_means(rows, running, piece),
        running_conclusion(apart, SEEDS),
        apart,
        question="Does a measured variance settle?",
    )


def main(argv: list[str] | None = None) -> int:
    torch.set_num_threads(1)  # on tensors this small, threads would only wait for one another
    with Card(__file__, "How far from the optimum does constant-step SGD come to rest?", argv) as card:
        agrees = show(card)
    return 0 if agrees else 1


if __name__ == "__main__":
    raise SystemExit(main())
