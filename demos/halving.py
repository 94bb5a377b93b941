"""Savings and losses of stopping hopeless runs early: successive halving of learning rates.

The S&P 500's monthly return is regressed on those of five of its shares, as they are, by gradient descent
on batches of 64. Halving runs 27 learning rates to a first rung, drops the two thirds with the largest
loss over all of the data, and goes on with the others to the next. Thus a quarter of the steps finds the
best of 27, if the order of the losses is early what it is at the end.

A second picture asks how often it is. Over several orders of the data and several plans of rungs it shows
what halving takes, and how much higher its choice ends than the grid's best. With a learning rate that
falls to zero the losses hardly cross, and little is lost. With a constant one the large rates lead early
and then stall at the noise of the batches, where the order is that of the last few batches.

Sources: K. Jamieson, A. Talwalkar, "Non-stochastic best arm identification and hyperparameter
optimization", 2016. The data are matplotlib's.

    python demos/halving.py [--out DIR] [--fast]
"""

import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from _card import Card
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import gdfunc as gd

BATCH_SIZE, STEPS = 64, 270
RUNGS = (30, 90, 270)
ETA = 3
PLANS = (  # rungs as parts of the whole, and eta, from the cheapest to the dearest
    ((1 / 27, 1 / 9, 1 / 3, 1), 3),
    ((1 / 9, 1 / 3, 1), 3),
    ((1 / 9, 1 / 3, 1), 2),
    ((1 / 3, 1), 3),
    ((1 / 2, 1), 3),
    ((2 / 3, 1), 3),
)
SCHEDULES = {"falling": 0.0, "constant": 1.0}  # name: the share of lr that is left at the end
COLOURS = ("#9aa5b1", "#E69F00", "#0072B2")  # of runs that end at the first, at the second, at a later rung
QUESTION = "What does stopping hopeless runs early save?"
LOSS_QUESTION = "When does stopping early lose the best run?"


class Descent(NamedTuple):
    """Gradient descent on the stocks, with a learning rate that falls to a share of itself."""

    problem: gd.problems.Problem
    step: gd.Step
    end: float

    @classmethod
    def on_stocks(cls, end: float) -> "Descent":
        problem = gd.problems.stock_regression(standardize=False)
        return cls(problem, gd.make_step(problem.loss_fn), end)

    def rates(self, count: int) -> Tensor:
        """Learning rates around 2/L, beyond which descent on all of the data diverges."""
        return 2 / self.problem.L * torch.logspace(-2.5, 0.2, count, dtype=torch.float64)

    def gap(self, params: Any, trajectory: Any = None) -> Tensor:
        """The loss over all of the data, over its minimum, less 1."""
        return self.problem.loss_fn(params, self.problem.data) / self.problem.minimum - 1

    def run(self, key: Tensor, lr: Tensor, steps: slice, carry: Any) -> tuple[Any, gd.Trajectory]:
        """Take some of the steps, as `gd.search.halving` asks for."""
        index = gd.sample_batches(key, len(self.problem.data[1]), BATCH_SIZE, STEPS)
        lrs = gd.schedules.linear(lr, 1.0, self.end, total_iters=STEPS)(torch.arange(STEPS))
        carry = self.problem.params if carry is None else carry
        gaps = {"gap": self.gap}
        return gd.train(self.step, carry, self.problem.data, index[steps], lrs[steps], record=gaps)

    def halve(self, key: Tensor, grid: Any, rungs: Sequence[int], eta: float) -> gd.search.HalvingResult:
        return gd.search.halving(partial(self.run, key), grid, rungs, self.gap, eta=eta)

    def ends(self, key: Tensor, grid: Any) -> Tensor:
        """The gaps [N] at the end of a sweep that drops nothing; inf for those that diverged."""

        def run(lr: Tensor) -> Tensor:
            return self.gap(self.run(key, lr, slice(0, STEPS), None)[0])

        return gd.sweep(run, grid).outputs.nan_to_num(nan=torch.inf)


class Tried(NamedTuple):
    """Halvings with one plan of rungs, over the orders of the data."""

    cost: float  # the largest share of the grid's steps
    losses: list[float]  # of the choice, over the loss of the grid's best, less 1

    @property
    def found(self) -> int:
        return sum(loss == 0 for loss in self.losses)


def try_plans(descent: Descent, keys: Tensor, count: int, plans: Sequence[Any]) -> list[Tried]:
    grid = gd.grid(lr=descent.rates(count))
    tried: list[Tried] = [Tried(0.0, []) for _ in plans]
    for key in keys:
        ends = descent.ends(key, grid)
        best = int(ends.argmin())
        for at, (parts, eta) in enumerate(plans):
            result = descent.halve(key, grid, [round(STEPS * part) for part in parts], eta)
            # Because the runs of a smaller vmap differ by rounding, both losses are those of the sweep.
            loss = float((1 + ends[result.best]) / (1 + ends[best]) - 1)
            cost = max(tried[at].cost, result.cost / result.full_cost)
            tried[at] = Tried(cost, [*tried[at].losses, loss])
    return tried


def conclusion(counts: Sequence[int], rungs: Sequence[int], cost: float, place: int) -> str:
    """Say what a halving cost, from the members at each rung, and the place of its choice in the grid."""
    went = [f"{count} to {rung}" for count, rung in zip(counts, rungs, strict=True)]
    found = "the best of all" if place == 1 else f"only number {place} of all"
    return (
        f"{cost:.0%} of the steps try {counts[0]} learning rates: all run to step {rungs[0]},"
        f" {', '.join(went[1:])}; the winner is {found}"
    )


def loss_conclusion(tried: dict[str, Tried]) -> str:
    """Say how often halving finds the best, and how much worse its choice is on average, by schedule."""
    found = [
        f"in {each.found} of {len(each.losses)} orders with a {name} rate" for name, each in tried.items()
    ]
    losses = [f"{statistics.mean(each.losses):.1%}" for each in tried.values()]
    cost = max(each.cost for each in tried.values())
    return (
        f"{cost:.0%} of the steps find the best {', '.join(found)}; on average the choice ends"
        f" {' and '.join(losses)} above it"
    )


def colour(steps: int, rungs: Sequence[int]) -> str:
    return COLOURS[min(sum(steps > rung for rung in rungs), len(COLOURS) - 1)]


def draw(result: gd.search.HalvingResult, ends: Tensor) -> Figure:
    """Draw how long each learning rate ran, and the losses on the way."""
    figure = Figure((10, 5), layout="constrained")
    bars, curves = figure.subplots(1, 2, width_ratios=(1, 1.35))
    lrs, steps, rungs = result.axes["lr"].tolist(), result.steps.tolist(), result.rungs
    colours = [colour(taken, rungs) for taken in steps]
    ratio = (lrs[-1] / lrs[0]) ** (1 / max(len(lrs) - 1, 1))
    edges = [lr / ratio**0.42 for lr in lrs]
    heights = [lr * ratio**0.42 - edge for lr, edge in zip(lrs, edges, strict=True)]
    bars.barh(edges, [rungs[-1]] * len(lrs), heights, align="edge", color="0.94")
    bars.barh(edges, steps, heights, align="edge", color=colours)
    ends_of_bars = edges[0], edges[-1] + heights[-1]
    bars.set(yscale="log", xlabel="step", ylabel="learning rate", xlim=(0, rungs[-1]), ylim=ends_of_bars)
    bars.set_xticks(rungs)
    bars.set_title("coloured: steps taken, pale: steps saved", loc="left", fontsize=10)
    order = sorted(range(len(lrs)), key=lambda i: steps[i])
    rows = [result.outputs.gap[i, : steps[i]].numpy() for i in order]
    shades = [colours[i] for i in order]
    gd.plot.plot_curves(rows, ax=curves, colors=shades, ylabel="loss / minimum − 1", band=None)
    for line in curves.get_lines():
        line.set(linestyle="-", linewidth=1.3)
    for rung in rungs[:-1]:
        curves.axvline(rung, color="0.4", linestyle=":", linewidth=1.2, zorder=1)
    best = float(ends.min())
    curves.plot(rungs[-1], best, "D", color="#c8102e", markersize=7, zorder=6, clip_on=False)
    curves.set(xlim=(0, rungs[-1]), ylim=(best / 2, 20))
    curves.set_xticks(rungs)
    _name_ends(curves, rungs, [int((result.steps == rung).sum()) for rung in rungs])
    above = sum(bool(row[-1] > 20) for row in rows)
    leave = "leaves" if above == 1 else "leave"
    curves.set_title(f"{above} of the curves {leave} through the top", loc="left", fontsize=10)
    return figure


def _name_ends(ax: Axes, rungs: Sequence[int], counts: Sequence[int]) -> None:
    """Write a legend of the colours, and of the mark of the grid's best."""
    for rung, count in zip(rungs, counts, strict=True):
        is_last = rung == rungs[-1]
        text = f"{count} left at {rung}" if is_last else f"{count} dropped at {rung}"
        ax.plot([], [], color=colour(rung, rungs), linewidth=2.5, label=text)
    ax.plot(
        [], [], "D", color="#c8102e", markersize=6, linestyle="none", label="best end of the whole grid"
    )
    ax.legend(fontsize=9, frameon=False, loc="upper right")


def draw_losses(tried: dict[str, list[Tried]]) -> Figure:
    """Draw how much higher than the grid's best the choice of each plan ends, over what it costs."""
    figure = Figure((7.2, 4.8), layout="constrained")
    ax = figure.subplots()
    for name, shade in (("constant", "#D55E00"), ("falling", "#0072B2")):
        costs = [each.cost for each in tried[name]]
        losses = torch.tensor([each.losses for each in tried[name]]).mT
        ax.plot(costs, 100 * losses.mean(dim=0), "o-", color=shade, linewidth=2, markersize=6)
        for cost, each, loss in zip(costs, tried[name], losses.mean(dim=0).tolist(), strict=True):
            text = f"{each.found}/{len(each.losses)}"
            place = (0, 8 if name == "constant" else -17)
            ax.annotate(
                text,
                (cost, 100 * loss),
                place,
                textcoords="offset points",
                ha="center",
                color=shade,
                fontsize=9,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4},
            )
        ax.plot([], [], "o-", color=shade, linewidth=2, label=f"{name} rate")
    ax.set(xlabel="share of the grid's steps", ylabel="mean excess over the loss of the grid's best, %")
    ax.set_title("beside the points: in how many orders the best was found", loc="left", fontsize=10)
    ax.set_yscale("symlog", linthresh=0.1)
    ax.margins(y=0.12)
    ax.grid(color="0.92")
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    ax.legend(fontsize=10, frameon=False)
    return figure


def show_one(card: Card, count: int) -> None:
    descent, key = Descent.on_stocks(SCHEDULES["falling"]), gd.random.key(0)
    grid = gd.grid(lr=descent.rates(count))
    result, ends = descent.halve(key, grid, RUNGS, ETA), descent.ends(key, grid)
    counts = [int((result.steps >= rung).sum()) for rung in RUNGS]
    place = int((ends < ends[result.best]).sum()) + 1
    cost = result.cost / result.full_cost
    print("lr        steps  gap at its last rung  gap at the end of the sweep")
    rows = []
    for record, end in zip(result.to_records(), ends.tolist(), strict=True):
        rows.append((record["lr"], record["steps"], record["score"], end))
        print("{:8.4f}  {:5}  {:20.3e}  {:27.3e}".format(*rows[-1]))
    said = conclusion(counts, RUNGS, cost, place)
    numbers = {"members": counts, "cost": result.cost, "full cost": result.full_cost, "place": place}
    card.picture("rungs", draw(result, ends), said, numbers)
    card.table("rungs", ["lr", "steps", "gap at its last rung", "gap at the end of the sweep"], rows)


def show_plans(card: Card, count: int, orders: int, plans: Sequence[Any]) -> None:
    keys, tried = gd.random.split(gd.random.key(1), orders), {}
    for name, end in SCHEDULES.items():
        tried[name] = try_plans(Descent.on_stocks(end), keys, count, plans)
    rows = [
        (
            name,
            " ".join(f"{part:.3f}" for part in parts),
            eta,
            each.cost,
            each.found,
            statistics.mean(each.losses),
        )
        for name, results in tried.items()
        for (parts, eta), each in zip(plans, results, strict=True)
    ]
    print("schedule  cost  best found  mean excess")
    for name, _, _, cost, found, loss in rows:
        print(f"{name:8}  {cost:4.0%}  {found:4} of {orders:2}  {loss:11.2%}")
    chosen = {name: results[min(1, len(plans) - 1)] for name, results in tried.items()}
    numbers = {name: {"found": each.found, "losses": each.losses} for name, each in chosen.items()}
    card.picture("lost", draw_losses(tried), loss_conclusion(chosen), numbers, question=LOSS_QUESTION)
    card.table("plans", ["schedule", "rungs", "eta", "cost", "found", "mean excess"], rows)


def main(argv: Sequence[str] | None = None) -> int:
    with Card(__file__, QUESTION, argv) as card:
        if card.fast:
            show_one(card, count=9)
            show_plans(card, count=9, orders=2, plans=PLANS[1:4:2])
        else:
            show_one(card, count=27)
            show_plans(card, count=27, orders=20, plans=PLANS)
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)  # on tensors this small, threads would only wait for one another
    raise SystemExit(main())
