"""The place where constant-step descent comes to rest: a covariance, measured over millions of steps.

With a constant learning rate η the iterates do not converge: they go on to wander about the optimum θ*. For
least squares, and batches of B samples drawn with replacement, how far is exact algebra. With the design
vector a and the residual r at θ* of sample i, h = aaᵀ and g = ar, one step is

    θ' − θ* = (I − η h_B)(θ − θ*) − η g_B,  h_B and g_B the means over the batch,

and with δ = (θ − θ*, 1) it is δ' = A_B δ, A_B the mean over the batch of A = [[I − ηh, −ηg], [0, 1]]. So
the stationary second moment S = E δδᵀ solves a linear equation, correlations of h and g included:

    S = E A_B S A_Bᵀ = (1 − 1/B) ĀSĀᵀ + (1/B) mean A S Aᵀ,  Ā = mean A,  S[-1, -1] = 1.

Its last column is the mean of δ, which comes out as 0; so the rest is the covariance Σ.

Above some η it has no positive solution: the variance is infinite. The iterates need not diverge there:
they keep a stationary law, with heavy tails, as long as their Lyapunov exponent is below 0. And somewhat
below that η the fourth moment is infinite already: a measured variance has an infinite standard error. All
of this is in the table (CSV) and the pictures: one vmap runs every learning rate on several streams of
batches. The learning rates share these, so neighbours err together.

Sources: G. Pflug, "Stochastic minimization with constant step-size: asymptotic laws", 1986; F. Bach,
E. Moulines, "Non-strongly-convex smooth stochastic approximation with convergence rate O(1/n)", 2013;
S. Mandt, M. Hoffman, D. Blei, "Stochastic gradient descent as approximate Bayesian inference", 2017 (whose
diffusion is the dashed line); A. Dieuleveut, A. Durmus, F. Bach, "Bridging the gap between constant step
size stochastic gradient descent and Markov chains", 2020; M. Gurbuzbalaban, U. Simsekli, L. Zhu, "The
heavy-tail phenomenon in SGD", 2021. The data are matplotlib's `Stocks.csv`.

    python demos/stationary.py [--out DIR] [--fast]
"""

import argparse
import csv
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.func import vmap

import gdfunc as gd

BATCH_SIZES = (1, 4, 16)
# Learning rates, as shares of the one above which the variance is infinite.
SHARES = (0.02, 0.04, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.2, 1.6, 2.5)
FAST_SHARES = (0.1, 0.2, 0.4, 0.9, 1.2, 2.5)
SEEDS = 8
RUNNING = (0.1, 0.4, 0.9, 1.2, 1.6)  # the shares whose variance is drawn over the steps
TRANSIENT = 2  # pieces of a run that are thrown away
AGREES = 4.0  # standard errors between measured and exact, at most, wherever there is a standard error
# In how many ways the factors of a product, each of some sample of the batch, share their samples:
# (2, 1, 1): 6 says that in six groupings of four factors two are of one sample and two of others.
GROUPINGS = {
    2: {(1, 1): 1, (2,): 1},
    4: {(1, 1, 1, 1): 1, (2, 1, 1): 6, (2, 2): 3, (3, 1): 4, (4,): 1},
}


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


# The exact answer.


def vector(params: dict[str, Tensor]) -> Tensor:
    return torch.cat([params["w"], params["b"][None]])


def samples(problem: gd.problems.Problem) -> tuple[Tensor, Tensor]:
    """h [n, p, p] and g [n, p]: every sample's Hessian, and its gradient at the optimum."""
    x, y = problem.data
    design = torch.cat([x, torch.ones_like(y)[:, None]], dim=1)
    residual = design @ vector(problem.minimizers[0]) - y
    return design[:, :, None] * design[:, None, :], design * residual[:, None]


def contraction(problem: gd.problems.Problem, lr: float) -> Tensor:
    """I − ηh of every sample, [n, p, p]."""
    h, _ = samples(problem)
    return torch.eye(h.shape[-1]).to(h) - lr * h


def one_step(problem: gd.problems.Problem, lr: float) -> Tensor:
    """A of every sample, [n, p+1, p+1]."""
    _, g = samples(problem)
    top = torch.cat([contraction(problem, lr), -lr * g[:, :, None]], dim=2)
    bottom = torch.eye(g.shape[1] + 1).to(g)[-1:].expand(len(g), 1, -1)
    return torch.cat([top, bottom], dim=1)


def kron(a: Tensor, b: Tensor, equation: str) -> Tensor:
    product = torch.einsum(equation, a, b)
    return product.reshape(*product.shape[:-4], a.shape[-2] * b.shape[-2], -1)


def mean_powers(factors: Tensor, largest: int) -> dict[int, Tensor]:
    """mean A⊗…⊗A, m times, for each m up to 2 or 4: [pᵐ, pᵐ]."""
    pairs = kron(factors, factors, "nij,nkl->nikjl")
    powers = {1: factors.mean(dim=0), 2: pairs.mean(dim=0)}
    if largest > 2:
        for m, others in ((3, factors), (4, pairs)):
            powers[m] = kron(pairs, others, "nij,nkl->ikjl") / len(factors)
    return powers


def second_moment(problem: gd.problems.Problem, batch_size: int, lr: float) -> Tensor:
    """S, [p+1, p+1]: the solution of the linear equation, whether or not it is positive."""
    powers = mean_powers(one_step(problem, lr), 2)
    map_of_s = (1 - 1 / batch_size) * torch.kron(powers[1], powers[1]) + powers[2] / batch_size
    # The last entry of S is known to be 1: what it is multiplied by goes to the right-hand side.
    system = torch.eye(len(map_of_s) - 1).to(map_of_s) - map_of_s[:-1, :-1]
    solution = torch.linalg.solve(system, map_of_s[:-1, -1])
    return torch.cat([solution, solution.new_ones(1)]).reshape(powers[1].shape)


def diffusion(problem: gd.problems.Problem, batch_size: int, lr: float) -> Tensor:
    """Mandt, Hoffman and Blei's Σ, [p, p]: HΣ + ΣH = (η/B) mean ggᵀ."""
    h, g = samples(problem)
    hessian, eye = h.mean(dim=0), torch.eye(g.shape[1]).to(g)
    operator = torch.kron(hessian, eye) + torch.kron(eye, hessian)
    noise = lr / batch_size * g.T @ g / len(g)
    return torch.linalg.solve(operator, noise.flatten()).reshape(noise.shape)


def growth(problem: gd.problems.Problem, batch_size: int, lr: float, order: int) -> float:
    """By what factor a step multiplies E (θ − θ*)⊗…⊗(θ − θ*) in the long run, but for the noise.

    It is the spectral radius of E A_B⊗…⊗A_B on symmetric tensors: below 1, and only there, the stationary
    law has a finite moment of this (even) order.
    """
    powers = mean_powers(contraction(problem, lr), order)
    p, total = len(powers[1]), torch.zeros(())
    for groups, ways in GROUPINGS[order].items():
        term = torch.ones(1, 1, dtype=powers[1].dtype)
        for m in groups:
            term = torch.kron(term, powers[m])
        total = total + ways * math.perm(batch_size, len(groups)) / batch_size**order * term
    indices = torch.cartesian_prod(*[torch.arange(p)] * order).sort(dim=1).values
    _, entry, count = indices.unique(dim=0, return_inverse=True, return_counts=True)
    to_tensor = torch.nn.functional.one_hot(entry).to(total)
    on_symmetric = (to_tensor / count).T @ total @ to_tensor
    return float(torch.linalg.eigvals(on_symmetric).abs().max())


def limit(problem: gd.problems.Problem, batch_size: int, order: int) -> float:
    """The learning rate above which the stationary moment of this order is infinite, by bisection."""
    low, high = 0.0, 2 / problem.L  # where full batches diverge
    for _ in range(12 if order > 2 else 40):
        middle = (low + high) / 2
        stable = growth(problem, batch_size, middle, order) < 1
        low, high = (middle, high) if stable else (low, middle)
    return low


# The measured one.


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


def trace(moments: Tensor) -> Tensor:
    """The trace of E (θ − θ*)(θ − θ*)ᵀ, the corner of δδᵀ."""
    return moments.diagonal(dim1=-2, dim2=-1)[..., :-1].sum(dim=-1)


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


def conclude(rows: list[Row]) -> bool:
    """Say in words what the table says, and whether it agrees with the equation."""
    trusted = [row for row in rows if row.moments == 4]
    doubtful = [row.measured / row.exact for row in rows if row.moments == 2]
    wild = [row for row in rows if row.moments == 0]
    worst = max(abs(row.z) for row in trusted)
    rms = [row.rms_z for row in trusted]
    print(
        f"\nWith a finite fourth moment ({len(trusted)} settings) measured and exact tr Σ differ by at "
        f"most {worst:.1f} standard errors;\n  rms z, over all entries of the mean and of Σ, is "
        f"{min(rms):.2f} to {max(rms):.2f}, where chance alone gives about 1."
    )
    print(
        f"With a finite variance alone ({len(doubtful)}) the measured tr Σ is {min(doubtful):.2f} to "
        f"{max(doubtful):.2f} times the exact: it lives on rare\n  excursions, of which a run sees too "
        "few or one too many, and its error bar is infinite, whatever a formula gives."
    )
    calm = sum(row.exponent < 0 for row in wild)
    print(
        f"With an infinite variance ({len(wild)}): {calm} with a Lyapunov exponent below 0, whose iterates "
        f"go far out\n  and come back; {len(wild) - calm} diverge."
    )
    return worst < AGREES


# The pictures.


def color_of(batch_size: int) -> str:
    return {1: "#0072B2", 4: "#D55E00", 16: "#009E73"}[batch_size]


def draw_traces(
    problem: gd.problems.Problem, rows: list[Row], limits: dict[int, tuple[float, float]], path: Path
) -> None:
    """Draw tr Σ over lr; below it the measured over the exact, and the difference in standard errors."""
    figure = Figure(figsize=(9, 11), layout="constrained")
    top, bottom, errors = axes = figure.subplots(3, 1, sharex=True, height_ratios=(4, 2, 1.2))
    low, high = min(row.exact for row in rows) / 2, 1.0
    for size, (largest, largest_of_errors) in limits.items():
        color = color_of(size)
        # Points that gather at the limit, where the curve turns upright.
        lrs = largest * (1 - torch.logspace(math.log10(1 - SHARES[0] / 1.5), -6, 120, dtype=torch.float64))
        exact = [float(trace(second_moment(problem, size, lr))) for lr in lrs.tolist()]
        straight = [float(diffusion(problem, size, lr).trace()) for lr in lrs.tolist()]
        top.plot(lrs, exact, color=color, label=f"batches of {size}")
        top.plot(lrs, straight, "--", color=color, linewidth=1)
        for ax in axes:
            ax.axvline(largest, color=color, linewidth=1, linestyle=":")
            ax.axvspan(largest_of_errors, largest, color=color, alpha=0.08, linewidth=0)
        for row in (row for row in rows if row.batch_size == size):
            draw_row(axes, row, color, high)
    key = {"color": "0.3", "linestyle": ""}
    top.plot([], [], "o", **key, label="measured: finite 4th moment, so finite error (bottom)")
    top.plot(
        [], [], "o", fillstyle="none", **key, label="measured: finite variance, infinite error (shaded)"
    )
    top.plot(
        [], [], "^", fillstyle="none", **key, label="measured: infinite variance; on the top edge: above it"
    )
    top.plot([], [], "x", **key, label="Lyapunov exponent above 0: the iterates diverge")
    top.plot([], [], "-", color="0.3", label="exact")
    top.plot([], [], "--", color="0.3", linewidth=1, label="diffusion approximation (Mandt et al. 2017)")
    top.plot([], [], ":", color="0.3", linewidth=1, label="above this lr the variance is infinite")
    top.legend(loc="upper left", fontsize="small", framealpha=1)
    top.set(xscale="log", yscale="log", ylim=(low, high), ylabel="tr Σ, the mean of ‖θ − θ*‖²")
    top.set_title("Where constant-step SGD on monthly stock returns comes to rest")
    bottom.axhline(1, color="0.3", linewidth=1)
    bottom.set_yscale("log")
    ticks = (0.5, 0.7, 1.0, 1.4, 2.0)
    bottom.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    bottom.set_yticks((), minor=True)
    bottom.set(ylim=(0.4, 2.5), ylabel="measured / exact")
    errors.axhspan(-3, 3, color="0.5", alpha=0.15, linewidth=0)
    errors.set(ylim=(-5, 5), xlabel="learning rate", ylabel="difference, s.e.")
    for ax in axes:
        ax.grid(color="0.9", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def draw_row(axes: Any, row: Row, color: str, high: float) -> None:
    top, bottom, errors = axes
    fill = "full" if row.moments == 4 else "none"
    marker = "x" if row.exponent > 0 else "o" if row.moments else "^"
    height = row.measured if row.measured < high else high  # what overflowed, NaN, is above too
    top.plot(row.lr, height, marker, color=color, fillstyle=fill, clip_on=False, zorder=4)
    if row.moments:
        bottom.plot(row.lr, row.measured / row.exact, marker, color=color, fillstyle=fill)
    if row.moments == 4:
        errors.errorbar(row.lr, row.z, 1.0, fmt=marker, color=color, capsize=3)


def draw_running_means(
    batch_size: int, rows: list[Row], measured: Measured, piece: int, path: Path
) -> None:
    """Draw the mean of ‖θ − θ*‖² up to each step, over the steps."""
    rows = [row for row in rows if row.batch_size == batch_size]
    chosen = [i for i, row in enumerate(rows) if round(row.share, 2) in RUNNING]
    values = trace(measured.moments[chosen])  # [lrs, seeds, pieces]
    counts = torch.arange(1, values.shape[-1] + 1)
    running = values.cumsum(dim=-1) / counts
    ax = Figure(figsize=(9, 6.5), layout="constrained").subplots()
    labels = [f"lr {rows[i].lr:.3f}, {rows[i].share:.1f} of the limit" for i in chosen]
    gd.plot.plot_curves(
        list(running),
        x=counts * piece,
        ax=ax,
        labels=labels,
        band=(0.0, 1.0),
        xlabel="step, after the transient",
        ylabel="mean of ‖θ − θ*‖² up to there",
    )
    for i in chosen:
        if rows[i].moments:
            ax.axhline(rows[i].exact, color="black", linewidth=0.8)
    ax.set_title(f"The measured variance over time, batches of {batch_size} (thin black: exact)")
    ax.figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/stationary"), help="folder for the results")
    parser.add_argument("--fast", action="store_true", help="fewer steps, learning rates and batch sizes")
    args = parser.parse_args(argv)
    sizes, shares = ((4,), FAST_SHARES) if args.fast else (BATCH_SIZES, SHARES)
    pieces, piece = (6, 60) if args.fast else (TRANSIENT + 20, 10_000)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # on tensors this small, threads would only wait for one another

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

    with (args.out / "traces.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([Row._fields, *rows])
    draw_traces(problem, rows, limits, args.out / "trace_over_lr.png")
    draw_running_means(4, rows, measured[4], piece, args.out / "running_means.png")
    report(rows)
    agrees = conclude(rows)
    print(f"Written: traces.csv, trace_over_lr.png and running_means.png in {args.out}")
    return 0 if agrees else 1


if __name__ == "__main__":
    raise SystemExit(main())
