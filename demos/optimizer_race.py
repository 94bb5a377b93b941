"""Which optimizer forgives a bad learning rate? Twenty methods, every learning rate, several seeds.

A small network learns to read handwritten digits; without scikit-learn there are none, and a logistic
regression tells the months in which the S&P 500 rose from the returns of five shares. For each method one
sweep runs all learning rates, from far too small to far too large, each from several initial parameters and
orders of the data. A method forgives the learning rates that leave at most twice its least loss; runs that
diverge are counted and drawn. Then the methods walk down Rosenbrock's valley, Beale's function and a real
landscape, each with the best of the learning rates that keep it in view.

Started from the choice that every tutorial makes for its reader: one optimizer, one learning rate.
"""

import argparse
import csv
import math
import textwrap
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.func import vmap

import gdfunc as gd


class Method(NamedTuple):
    """An optimizer in the race, and the default lr of `torch.optim`."""

    transform: gd.GradientTransformation
    torch_lr: float | None = None


def kinds(params: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Label the leaves: Muon is for matrices alone, and the biases get Adam."""
    return {layer: {"w": "matrix", "b": "vector"} for layer in params}


FAMILIES = {
    "the gradient itself": {
        "SGD": Method(gd.chain(), 1e-3),
        "momentum": Method(gd.momentum(0.9)),
        "Nesterov": Method(gd.momentum(0.9, nesterov=True)),
        "clipped SGD": Method(gd.clip_by_global_norm(1.0)),
        "LARS": Method(gd.lars()),
        "LAMB": Method(gd.lamb()),
    },
    "signs, and sums of squares": {
        "sign": Method(gd.sign()),
        "Lion": Method(gd.lion()),
        "Rprop": Method(gd.rprop(), 1e-2),  # made for full batches
        "Adagrad": Method(gd.adagrad(), 1e-2),
        "Adadelta": Method(gd.adadelta(), 1.0),
        "RMSprop": Method(gd.rmsprop(), 1e-2),
    },
    "Adam and its kin": {
        "Adam": Method(gd.adam(), 1e-3),
        "AdamW": Method(gd.adamw(), 1e-3),
        "Adamax": Method(gd.adamax(), 2e-3),
        "NAdam": Method(gd.nadam(), 2e-3),
        "RAdam": Method(gd.radam(), 1e-3),
        "Yogi": Method(gd.yogi()),
        "AdaBelief": Method(gd.adabelief()),
    },
    "for matrices": {
        "Muon": Method(gd.partition({"matrix": gd.muon(), "vector": gd.adam()}, kinds), 1e-3),
    },
}
METHODS = {name: method for family in FAMILIES.values() for name, method in family.items()}
FAST = ("SGD", "Rprop", "Adam", "Muon")

DECADES = (-5, 3)  # of the learning rates
BATCH_SIZE = 32
GOOD = 2.0  # a good lr leaves at most so many times the method's least loss


class Landscape(NamedTuple):
    problem: gd.problems.Problem
    steps: int
    limits: tuple[tuple[float, float], tuple[float, float]]  # of the view; the map's are its own


LANDSCAPES = {
    "Rosenbrock's valley": Landscape(gd.problems.rosenbrock(), 150, ((-1.6, 1.4), (-0.5, 1.7))),
    "Beale's function": Landscape(gd.problems.beale(), 60, ((0.5, 4.0), (-1.0, 1.2))),
    "Jacksboro fault (metres)": Landscape(gd.problems.elevation(), 80, ((0, 402), (0, 343))),
}


def rates(per_decade: int) -> Tensor:
    low, high = DECADES
    return torch.logspace(low, high, per_decade * (high - low) + 1, dtype=torch.float64)


# The classification.


class Task(NamedTuple):
    name: str
    data: tuple[Tensor, Tensor]
    hidden: int  # units between; 0 makes it a logistic regression
    classes: int
    epochs: int


def load_task() -> Task:
    try:
        digits = gd.datasets.digits(dtype=torch.float32)
        return Task("Handwritten digits, 16 hidden units", (digits.x, digits.y), 16, 10, 6)
    except ModuleNotFoundError:
        stocks = gd.datasets.stocks(dtype=torch.float32)
        x = (stocks.x - stocks.x.mean(dim=0)) / stocks.x.std(dim=0)
        name = "Months in which the S&P 500 rose, logistic regression (no scikit-learn: no digits)"
        return Task(name, (x, (stocks.y > 0).long()), 0, 2, 30)


def initial_params(key: Tensor, sizes: list[int]) -> dict[str, dict[str, Tensor]]:
    """Draw the layers of a network with these many units, inputs first."""
    keys = gd.random.split(key, len(sizes) - 1)
    return {
        f"layer{i}": {
            "w": gd.random.normal(keys[i], (fan_in, fan_out)) / fan_in**0.5,
            "b": torch.zeros(fan_out),
        }
        for i, (fan_in, fan_out) in enumerate(pairwise(sizes))
    }


def loss_fn(params: dict[str, dict[str, Tensor]], batch: tuple[Tensor, Tensor]) -> Tensor:
    units, y = batch
    *hidden, output = params.values()
    for layer in hidden:
        units = torch.tanh(units @ layer["w"] + layer["b"])
    return gd.losses.cross_entropy(units @ output["w"] + output["b"], y)


def race(
    transform: gd.GradientTransformation, task: Task, lrs: Tensor, seeds: int, epochs: int
) -> tuple[Tensor, Tensor]:
    """Run every seed with every lr at once.

    Returns the losses over all of the data before and after the runs, [seeds, lrs] each.
    """
    x, y = task.data
    sizes = [x.shape[1], *([task.hidden] if task.hidden else []), task.classes]
    step = gd.make_step(loss_fn, transform)

    def run(key: Tensor, lr: Tensor) -> tuple[Tensor, Tensor]:
        for_params, for_order = gd.random.split(key)
        params = initial_params(for_params, sizes)
        index = gd.epoch_batches(for_order, len(y), BATCH_SIZE, epochs)
        final, _ = gd.train(step, step.init(params), task.data, index, lr, record=())
        return loss_fn(params, task.data), loss_fn(final.params, task.data)

    keys = gd.random.split(gd.random.key(0), seeds)
    return gd.sweep(run, gd.grid(key=keys, lr=lrs)).reshape()


class Row(NamedTuple):
    """One method over all learning rates and seeds; losses are medians over the seeds."""

    method: str
    best_lr: float
    best_loss: float
    from_lr: float  # of the good range around the best
    to_lr: float
    torch_lr: float | None
    loss_at_torch_lr: float | None
    diverged: int
    runs: int

    @property
    def width(self) -> float:
        return self.to_lr / self.from_lr

    @property
    def torch_misses(self) -> bool:
        return self.torch_lr is not None and not self.from_lr <= self.torch_lr <= self.to_lr


def median(losses: Tensor) -> Tensor:
    """Take the median over the seeds; a run that overflowed is worse than any other."""
    return torch.where(losses.isfinite(), losses, torch.inf).median(dim=0).values


def end_of_range(lrs: list[float], losses: list[float], place: int, bound: float) -> float:
    """Go to higher lrs, from a place to where straight lines on doubly logarithmic axes pass the bound."""
    while place + 1 < len(lrs) and losses[place + 1] <= bound:
        place += 1
    if place + 1 == len(lrs):
        return lrs[place]
    share = math.log(bound / losses[place]) / math.log(losses[place + 1] / losses[place])
    return lrs[place] * (lrs[place + 1] / lrs[place]) ** share


def sum_up(name: str, lrs: Tensor, before: Tensor, after: Tensor) -> Row:
    losses = median(after).double()
    best = int(losses.argmin())
    least, bound = losses[best].item(), GOOD * losses[best].item()
    high = end_of_range(lrs.tolist(), losses.tolist(), best, bound)
    low = end_of_range(lrs.flip(0).tolist(), losses.flip(0).tolist(), len(lrs) - 1 - best, bound)
    torch_lr, at_torch_lr = METHODS[name].torch_lr, None
    if torch_lr:
        at_torch_lr = math.exp(np.interp(math.log(torch_lr), lrs.log().numpy(), losses.log().numpy()))
    diverged = int((~(after <= before)).sum())  # NaN is not <= anything
    return Row(name, lrs[best].item(), least, low, high, torch_lr, at_torch_lr, diverged, after.numel())


def conclusion(missed: int, defaults: int, widths: dict[str, float], losses: dict[str, float]) -> str:
    """Say how many of torch's default lrs miss the good range, and what the widest range costs.

    Widths are factors between the ends of the good ranges, and losses are the least of each method.
    """
    kept = defaults - missed
    counts = f"misses the good range of {missed}" if missed > kept else f"is in the good range of {kept}"
    widest, lowest = max(widths, key=widths.__getitem__), min(losses, key=losses.__getitem__)
    width = float(f"{widths[widest]:.2g}")
    price = f"whose least loss is {losses[widest] / losses[lowest]:.2g} times {lowest}'s, the least of all"
    return (
        f"torch's default lr {counts} of {defaults} optimizers; the widest range is {widest}'s, "
        f"× {width:,g}, {'which has the least loss, too' if widest == lowest else price}"
    )


def report_race(rows: list[Row], start: float, said: str) -> None:
    """Print the methods, the most forgiving first, and what they show."""
    print(f"\n{'method':12}   range    from lr      to lr   best lr", end="")
    print("  best loss  torch's lr, its loss  diverged")
    for row in rows:
        default = f"{row.torch_lr:10g}  {row.loss_at_torch_lr:8.3f}" if row.torch_lr else 20 * " "
        print(
            f"{row.method:12} × {row.width:5.3g} {row.from_lr:10.2g} {row.to_lr:10.2g} "
            f"{row.best_lr:9.2g}  {row.best_loss:9.4f}  {default}  {row.diverged:3} of {row.runs}"
        )
    print(
        f"range = of the learning rates that leave at most {GOOD:g} times the method's least loss, around\n"
        f"its best; losses are medians over the seeds, {start:.3f} at the start; diverged = ended above\n"
        f"the start or not finite, of all lrs from {span()}\n\n{said}."
    )


def span() -> str:
    return f"1e{DECADES[0]} to 1e{DECADES[1]}"


def draw_ranges(
    losses: dict[str, Tensor], rows: list[Row], lrs: Tensor, said: str, title: str, path: Path
) -> None:
    """Draw the ranking: a bar of good learning rates for each method."""
    ax = gd.plot.plot_sensitivity(
        {row.method: (lrs, losses[row.method]) for row in rows},
        factor=GOOD,
        defaults={row.method: row.torch_lr for row in rows if row.torch_lr},
        label="final loss",
    )
    ax.figure.set_size_inches(7.2, 2.4 + 0.26 * len(rows))
    ax.figure.suptitle(textwrap.fill(said, 84), x=0.01, ha="left", fontweight="bold", fontsize=10)
    ax.set_title(title, loc="right", fontsize=8, color="0.35")
    ax.figure.savefig(path, dpi=200)


def draw_race(
    losses: dict[str, Tensor], rows: list[Row], lrs: Tensor, start: float, title: str, path: Path
) -> None:
    """Draw a panel for each method, the most forgiving first: final loss over the learning rate."""
    count = -(-len(rows) // 5)
    figure = Figure(figsize=(17, 3.1 * count + 1.2), layout="constrained")
    axes = figure.subplots(count, 5, sharex=True, sharey=True, squeeze=False)
    floor = min(row.best_loss for row in rows)
    for ax, row in zip(axes.flat, rows, strict=False):
        ax.set(ylim=(floor / 1.6, 300 * start), xlim=tuple(10.0**end for end in DECADES))
        curve, names = {row.method: losses[row.method]}, {"xlabel": "lr", "ylabel": "final loss"}
        gd.plot.plot_curves(curve, x=lrs, ax=ax, log_x=True, **names)
        ax.get_legend().remove()  # the same in all panels: told once, in the title of the page
        ax.axhline(start, color="0.4", linewidth=1)
        ax.axvspan(row.from_lr, row.to_lr, color="#009E73", alpha=0.15)
        ax.plot(row.best_lr, row.best_loss, "*", color="black", markersize=9, zorder=5)
        if row.torch_lr:
            ax.axvline(row.torch_lr, color="#D55E00", linestyle=":", linewidth=1.6)
        ax.set_title(
            f"{row.method}: × {row.width:.3g}, {row.diverged}/{row.runs} diverged", fontsize="medium"
        )
        ax.label_outer()
    for ax in axes.flat[len(rows) :]:
        ax.set_axis_off()
    axes[0, 0].annotate(
        "start; above it: diverged", (10.0 ** DECADES[0], 1.15 * start), fontsize="small", color="0.3"
    )
    figure.suptitle(
        f"{title}\nline: median, band: 10–90 % of {len(losses[rows[0].method])} seeds; × a seed's last "
        f"finite loss; green: at most {GOOD:g} times the least loss; star: the best; dotted: torch's "
        "default, where it has one; lines go on above the top",
        fontsize="large",
    )
    figure.savefig(path, dpi=130)


# The landscapes.


class Walk(NamedTuple):
    """A method on a landscape, with the learning rate that ends lowest of those that keep to the view."""

    landscape: str
    method: str
    steps: int
    lr: float
    final_loss: float
    left_the_view: int
    runs: int
    path: Tensor  # [T + 1, 2]


def walk(name: str, method: str, lrs: Tensor, steps: int) -> Walk:
    """Descend with every lr at once and keep the path that ends lowest.

    Off the view a path may end low by luck alone (off the map, too, there are low places), so such paths
    are out, and counted, unless there is no other.
    """
    (problem, _, limits), transform = LANDSCAPES[name], METHODS[method].transform
    step = gd.make_step(problem.loss_fn, transform)

    def run(lr: Tensor) -> Tensor:
        init = step.init(problem.params)
        final, trajectory = gd.train(step, init, None, gd.full_batch(1, steps), lr, record="params")
        return gd.plot.path(trajectory.params, final.params)

    paths = vmap(run)(lrs)  # [lrs, T + 1, 2]
    losses = vmap(problem.loss_fn)(paths[:, -1])
    low, high = torch.tensor(limits, dtype=paths.dtype).T
    stays = ((paths >= low) & (paths <= high)).all(dim=(1, 2))
    eligible = losses.isfinite() & (stays | ~stays.any())
    best = torch.where(eligible, losses, torch.inf).argmin()
    left = int((~stays).sum())
    return Walk(name, method, steps, lrs[best].item(), losses[best].item(), left, len(lrs), paths[best])


def report_walks(walks: list[Walk]) -> None:
    for name in unique(walk.landscape for walk in walks):
        here = sorted((walk for walk in walks if walk.landscape == name), key=lambda walk: walk.final_loss)
        problem, runs = LANDSCAPES[name].problem, here[0].runs
        print(f"\n{name}: {here[0].steps} steps from {problem.loss_fn(problem.params):g}", end="")
        print(f", minimum {problem.minimum:g}; of {runs} learning rates, {span()}, the best in view")
        for walk in here:
            print(f"  {walk.method:12} ends at {walk.final_loss:9.3g}  lr {walk.lr:<8.2g}", end="")
            print(f"  {walk.left_the_view:3} learning rates leave the view")


def unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def draw_walks(walks: list[Walk], path: Path) -> None:
    """Draw a row of panels for each family of methods, a column for each landscape."""
    families = {
        family: [name for name in members if any(walk.method == name for walk in walks)]
        for family, members in FAMILIES.items()
    }
    families = {family: members for family, members in families.items() if members}
    landscapes = unique(walk.landscape for walk in walks)
    figure = Figure(figsize=(6.6 * len(landscapes), 7.2 * len(families) + 0.8), layout="constrained")
    axes = figure.subplots(len(families), len(landscapes), squeeze=False)
    for row, (family, members) in enumerate(families.items()):
        for ax, landscape in zip(axes[row], landscapes, strict=True):
            problem, _, limits = LANDSCAPES[landscape]
            here = [walk for walk in walks if walk.landscape == landscape and walk.method in members]
            gd.plot.plot_descent(
                problem.loss_fn,
                [walk.path for walk in here],
                ax=ax,
                labels=[f"{walk.method}, lr {walk.lr:.2g} → {walk.final_loss:.3g}" for walk in here],
                minimum=problem.minimum,
                minimizers=problem.minimizers,
                limits=limits,
            )
            ax.set_title(f"{landscape}\n{family}, {here[0].steps} steps", fontsize="medium")
            if "metres" in landscape:
                ax.invert_yaxis()  # rows are counted from the north
                ax.set(xlabel="column", ylabel="row", aspect="equal")
    figure.suptitle(
        f"Each method with the learning rate that ends lowest of those, of {walks[0].runs} in {span()}, "
        "that keep it in view all the way: method, lr → final loss"
    )
    figure.savefig(path, dpi=110)


def write(path: Path, rows: list[Any], fields: tuple[str, ...]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(field.replace("_", " ") for field in fields)
        table.writerows([getattr(row, field) for field in fields] for row in rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path("out/optimizer_race"), help="folder for the results"
    )
    parser.add_argument(
        "--fast", action="store_true", help="fewer methods, learning rates, seeds and steps"
    )
    args = parser.parse_args(argv)
    names, per_decade, seeds = (FAST, 1, 3) if args.fast else (tuple(METHODS), 3, 5)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # on tensors this small, threads would only wait for one another

    task, lrs = load_task(), rates(per_decade)
    epochs = 1 if args.fast else task.epochs
    title = f"{task.name}: {epochs} epochs in batches of {BATCH_SIZE}"
    print(f"{title}; {len(names)} methods x {len(lrs)} learning rates x {seeds} seeds", flush=True)
    results = {name: race(METHODS[name].transform, task, lrs, seeds, epochs) for name in names}
    start = results[names[0]][0].median().item()
    rows = [sum_up(name, lrs, *result) for name, result in results.items()]
    rows.sort(key=lambda row: -row.width)
    defaults = [row for row in rows if row.torch_lr]
    missed = sum(row.torch_misses for row in defaults)
    widths, least = ({row.method: getattr(row, k) for row in rows} for k in ("width", "best_loss"))
    said = conclusion(missed, len(defaults), widths, least)
    report_race(rows, start, said)
    write(args.out / "race.csv", rows, Row._fields)
    losses = {name: after for name, (_, after) in results.items()}
    draw_ranges(losses, rows, lrs, said, title, args.out / "ranges.png")
    draw_race(losses, rows, lrs, start, title, args.out / "loss_over_lr.png")

    # Muon knows no vectors, and a place on a map is one.
    walks = [
        walk(name, method, rates(2 * per_decade), 20 if args.fast else landscape.steps)
        for name, landscape in LANDSCAPES.items()
        for method in names
        if method != "Muon"
    ]
    report_walks(walks)
    print(
        "\nAdamW and LAMB decay the weights, which draws them to the origin: the map's north-west corner.\n"
        "Muon takes no walk: it is for matrices."
    )
    write(args.out / "walks.csv", walks, Walk._fields[:-1])
    draw_walks(walks, args.out / "walks.png")
    print(f"\nWritten: race.csv, ranges.png, loss_over_lr.png, walks.csv and walks.png in {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
