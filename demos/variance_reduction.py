"""Variance reduction: SVRG and SAGA go on to the optimum at the constant lr where SGD stalls at its noise.

The S&P 500's monthly return is regressed on those of five of its shares, one sample a step. The gap to the
exact optimum, loss / minimum − 1, is a quadratic form here, so it can be followed far below the rounding of
the loss. It is drawn against what the methods cost, gradients of samples in units of n: SGD takes n for n
steps; SAG and SAGA n more, for their table; SVRG and SARAH n + 2m for a pass of m steps. A sweep runs every
learning rate on several orders of the data at once. All of it goes into a table (CSV).

The theorem in the picture is that of SAGA at lr = 1/(3L), L of the steepest sample:
E‖θₖ − θ*‖² ≤ (1 − min(1/(4n), μ/(3L)))ᵏ [‖θ₀ − θ*‖² + 2n/(3L)·(f(θ₀) − f*)], and f − f* is at most half the
largest curvature of f times that. Full batches are drawn beside, with L of the mean in their lr: where the
steepest sample is 39 times as steep as the mean, whose condition number is 5, SVRG does not beat them.

Sources: R. Johnson, T. Zhang, "Accelerating stochastic gradient descent using predictive variance
reduction", 2013; A. Defazio, F. Bach, S. Lacoste-Julien, "SAGA: a fast incremental gradient method with
support for non-strongly convex composite objectives", 2014; M. Schmidt, N. Le Roux, F. Bach, "Minimizing
finite sums with the stochastic average gradient", 2017; L. M. Nguyen et al., "SARAH: a novel method for
machine learning problems using stochastic recursive gradient", 2017. Data: matplotlib's `Stocks.csv`.

    python demos/variance_reduction.py [--out DIR] [--fast]
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from _card import Card
from matplotlib.figure import Figure
from torch import Tensor

import gdfunc as gd

SHARES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0)  # learning rates, in units of 1/(3L)
FAST_SHARES, FAST = (0.2, 1.0), ("SGD", "SVRG", "SAGA")
PASS = 2  # how many steps of SVRG and SARAH lie between two full gradients, in units of n
GOALS = (1e-4, 1e-8, 1e-12)  # the table tells when a gap is below them
GAP_LIMITS = (1e-24, 1e4)  # of the picture; what diverges leaves through the top
FULL = "full batches"
COLORS = {
    "SGD": "#0072B2",
    "SGD, falling lr": "#56B4E9",
    "SVRG": "#009E73",
    "SARAH": "#CC79A7",
    "SAG": "#E69F00",
    "SAGA": "#D55E00",
    FULL: "black",
}


# Colours alone are alike in grey and to the colour-blind, so the lines differ in dashes and markers, too.
LOOKS = {
    "SGD": ("-", ""),
    "SGD, falling lr": ("--", ""),
    "SVRG": ("-", "o"),
    "SARAH": ("--", "s"),
    "SAG": ("-", "^"),
    "SAGA": ("-", "D"),
    FULL: (":", ""),
}


class Method(NamedTuple):
    """How to make a step, and what it costs."""

    make: Callable[..., Any]
    has_data: bool = True  # whether the step closes over the data, and gets row numbers
    pass_length: int = 0  # in units of n; 0: a step is one mini-batch
    table: bool = False
    falling: bool = False

    @property
    def price(self) -> int:
        """Gradients of samples from one record to the next, n steps or a pass, in units of n."""
        return 1 + 2 * self.pass_length

    def costs(self, records: int) -> Tensor:
        """Gradients computed before each record, and at the end."""
        return self.table + self.price * torch.arange(records + 1)


METHODS = {
    "SGD": Method(gd.make_step, has_data=False),
    "SGD, falling lr": Method(gd.make_step, has_data=False, falling=True),
    "SVRG": Method(gd.methods.svrg, pass_length=PASS),
    "SARAH": Method(gd.methods.sarah, pass_length=PASS),
    "SAG": Method(gd.methods.sag, table=True),
    "SAGA": Method(gd.methods.saga, table=True),
}


def vector(params: dict[str, Tensor]) -> Tensor:
    return torch.cat([params["w"], params["b"][None]])


def design(problem: gd.problems.Problem) -> Tensor:
    """The features and the bias's column of ones: sample i has the Hessian aᵢaᵢᵀ."""
    x, _ = problem.data
    return torch.cat([x, x.new_ones(len(x), 1)], dim=1)


def gap_of(problem: gd.problems.Problem) -> Callable[..., Tensor]:
    """Make the function of a run's carry that is its gap."""
    a, optimum = design(problem), vector(problem.minimizers[0])

    def gap(carry: Any, _loss: Any = None) -> Tensor:
        params = getattr(carry, "params", carry)
        return (a @ (vector(params) - optimum)).square().mean() / 2 / problem.minimum

    return gap


def full_batch_descent(problem: gd.problems.Problem, steps: int) -> Tensor:
    """Run gradient descent with its best constant lr, 2/(μ + L): the gap [steps + 1]."""
    step, gap = gd.make_step(problem.loss_fn), gap_of(problem)
    index = gd.full_batch(len(problem.data[1]), steps)
    lr = 2 / (problem.mu + problem.L)
    final, trajectory = gd.train(step, problem.params, problem.data, index, lr, record=gap)
    return torch.cat([trajectory.gap, gap(final)[None]])


def sweep(problem: gd.problems.Problem, method: Method, lrs: Tensor, keys: Tensor, budget: int) -> Tensor:
    """Run every learning rate on every order of the data.

    Returns the gap [lrs, keys, records + 1] at each record and at the end.
    """
    gap, n = gap_of(problem), len(problem.data[1])
    records = (budget - method.table) // method.price
    if method.has_data:
        step, data = method.make(problem.loss_fn, problem.data), torch.arange(n)
        init = step.init(problem.params)
    else:
        step, data, init = method.make(problem.loss_fn), problem.data, problem.params

    def run(lr: Tensor, key: Tensor) -> Tensor:
        samples = gd.sample_batches(key, n, 1, records * n * max(1, method.pass_length))
        index = samples.reshape(-1, n * method.pass_length or 1)
        steps = len(index)
        lr = lr * (1 - torch.arange(steps, dtype=lr.dtype) / steps) if method.falling else lr
        final, trajectory = gd.train(step, init, data, index, lr, record=gap, every=steps // records)
        return torch.cat([trajectory.gap, gap(final)[None]])

    return gd.sweep(run, gd.grid(lr=lrs, key=keys)).reshape()


def theorem(problem: gd.problems.Problem, costs: Tensor) -> Tensor:
    """SAGA's bound on the expected gap at lr = 1/(3L), over its costs in units of n."""
    a = design(problem)
    n, steepest = len(a), a.square().sum(dim=1).max()
    rate = min(1 / (4 * n), problem.mu / (3 * steepest.item()))
    start = problem.loss_fn(problem.params, problem.data) - problem.minimum
    distance = (vector(problem.params) - vector(problem.minimizers[0])).square().sum()
    first = distance + 2 * n / (3 * steepest) * start
    return problem.L / 2 * (1 - rate) ** (n * (costs - 1)) * first / problem.minimum


def median(runs: Tensor) -> Tensor:
    """Take the median over the orders, dim −2; a run that overflowed is worse than any other."""
    return torch.where(runs.isfinite(), runs, torch.inf).median(dim=-2).values


def spent(gaps: Tensor, costs: Tensor, goal: float) -> float:
    """Count the gradients until a median gap [records + 1] was first below a goal."""
    below = gaps < goal
    return costs[below.int().argmax()].item() if below.any() else float("inf")


def tabulate(gaps: dict[str, Tensor], shares: tuple[float, ...]) -> list[list[Any]]:
    """List what every method at every learning rate has spent at each goal, and where it ends."""
    rows = []
    for name, runs in gaps.items():
        costs = METHODS[name].costs(runs.shape[-1] - 1)
        for share, middle in zip(shares, median(runs), strict=True):
            goals = [spent(middle, costs, goal) for goal in GOALS]
            end = middle[-1].item()
            rows.append([name, share, *goals, end, "yes" if end > middle[0] else "no"])
    return rows


COLUMNS = [
    "method",
    "lr · 3L",
    *[f"cost to {goal:.0e}" for goal in GOALS],
    "final gap",
    "diverged",
]


def report(rows: list[list[Any]]) -> None:
    """Print, for every method, lr = 1/(3L) and the learning rate that ends best."""
    print("\n" + "  ".join(f"{name:>15}" for name in COLUMNS))
    for name in dict.fromkeys(row[0] for row in rows):
        own = [row for row in rows if row[0] == name]
        best = min(own, key=lambda row: row[-2])
        for row in own:
            if row is best or row[1] == 1.0:
                goals = ["never" if goal == float("inf") else f"{goal:g}" for goal in row[2:-2]]
                cells = [row[0], f"{row[1]:g}", *goals, f"{row[-2]:.1e}", row[-1]]
                widths = (max(15, len(column)) for column in COLUMNS)
                line = "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
                print(line + ("  best" if row is best else ""))
    print("gap = loss / minimum − 1, median over the orders; cost = gradients of samples computed / n\n")


def conclusion(sgd: float, saga: float, cost: float, goal: float) -> str:
    """Compare the final gaps of SGD and SAGA at one lr, and what SAGA spent on a goal (inf: never)."""
    stalls = f"At one constant lr, SGD ends {float(f'{100 * sgd:.2g}'):g} % above the minimum"
    if saga >= sgd:
        return f"{stalls}, and SAGA is no closer: {saga:.0e}"
    if math.isinf(cost):
        word = "goes on" if saga < sgd / 10 else "is hardly closer"
        return f"{stalls}, and SAGA {word}: {saga:.0e}, never within {goal:.0e}"
    return f"{stalls}, and SAGA is within {goal:.0e} of it after {cost:g} n gradients"


def draw(problem: gd.problems.Problem, gaps: dict[str, Tensor], shares: tuple[float, ...]) -> Figure:
    """Draw the gap over the gradients at lr = 1/(3L), and the final gap over the learning rate."""
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1.15, 1))
    costs = [METHODS[name].costs(runs.shape[-1] - 1) for name, runs in gaps.items()]
    whole = full_batch_descent(problem, int(costs[0][-1]))
    left.set(ylim=GAP_LIMITS)
    subtitle: dict[str, Any] = {"loc": "left", "fontsize": 9, "color": "0.35"}
    left.set_title("lr = 1/(3L), or falling from it to 0, or 2/(μ + L) of full batches", **subtitle)
    gd.plot.plot_curves(
        {**{name: runs[shares.index(1.0)] for name, runs in gaps.items()}, FULL: whole},
        x=[*costs, costs[0]],
        ax=left,
        colors=COLORS,
        label_lines=True,
        xlabel="gradients of samples computed / n",
        ylabel="loss / minimum − 1",
    )
    distinguish(left, [*gaps, FULL])
    bound = theorem(problem, costs[-1])
    left.plot(costs[-1], bound, color="black", linewidth=0.8)
    left.annotate("what SAGA's theorem promises", (costs[-1][1], 3 * bound[0]), fontsize="small")
    right.set(ylim=GAP_LIMITS)
    right.set_title(f"after {costs[0][-1]} n gradients, medians", **subtitle)
    gd.plot.plot_curves(
        {name: median(runs)[:, -1] for name, runs in gaps.items()},
        x=torch.tensor(shares),
        ax=right,
        colors=COLORS,
        label_lines=True,
        xlabel="learning rate, in units of 1/(3L)",
        ylabel="",
        log_x=True,
    )
    distinguish(right, list(gaps))
    start = gaps["SGD"][0, 0, 0]
    right.axhline(start, color="0.4", linewidth=0.8)
    right.annotate("above the start: diverged", (shares[0], 1.5 * start), color="0.35", fontsize="small")
    return figure


def distinguish(ax: Any, names: Sequence[str]) -> None:
    """Give the first lines of the axes, one for each name, the dashes and markers of their methods."""
    for line, name in zip(ax.get_lines(), names, strict=False):
        dashes, marker = LOOKS[name]
        line.set(linestyle=dashes, marker=marker, markersize=4)
        line.set_markevery(max(1, len(line.get_xdata()) // 10))


def main(argv: Sequence[str] | None = None) -> int:
    with Card(__file__, "Does a constant learning rate lead to the optimum?", argv) as card:
        shares, budget, orders = (FAST_SHARES, 10, 3) if card.fast else (SHARES, 40, 9)
        problem = gd.problems.stock_regression()
        steepest = design(problem).square().sum(dim=1).max()
        lrs = torch.tensor(shares, dtype=torch.float64) / (3 * steepest)
        keys = gd.random.split(gd.random.key(0), orders)
        gaps = {}
        for name in FAST if card.fast else METHODS:
            print(f"{name}: {len(lrs) * orders} runs at once", flush=True)
            gaps[name] = sweep(problem, METHODS[name], lrs, keys, budget)

        rows = tabulate(gaps, shares)
        report(rows)
        card.table("gaps", COLUMNS, rows)
        ends = {row[0]: row for row in rows if row[1] == 1.0}
        goal = GOALS[-1]
        numbers = {
            "sgd": ends["SGD"][-2],
            "saga": ends["SAGA"][-2],
            "cost": ends["SAGA"][COLUMNS.index(f"cost to {goal:.0e}")],
            "goal": goal,
        }
        card.picture("gaps", draw(problem, gaps, shares), conclusion(**numbers), numbers)
        return judge(gaps, shares.index(1.0))


def judge(gaps: dict[str, Tensor], at: int) -> int:
    """Say whether the second half of the budget helped, at lr = 1/(3L); 0 if it did as the theory says."""
    gains = {name: median(runs[at]) for name, runs in gaps.items()}
    gains = {name: (middle[len(middle) // 2] / middle[-1]).item() for name, middle in gains.items()}
    print("In the second half of the budget, at lr = 1/(3L), the gap was divided by")
    for name, gain in gains.items():
        print(f"  {gain:8.1e}  {name}")
    return 0 if gains["SGD"] < 10 < min(gains["SVRG"], gains["SAGA"]) else 1


if __name__ == "__main__":
    torch.set_num_threads(1)  # on tensors this small, threads would only wait for one another
    raise SystemExit(main())
