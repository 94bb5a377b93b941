"""Which samples drive training: ranked by loss, gradient norm and influence, with wrong labels to be found.

Digits: one in twenty training labels is replaced by a wrong one, and a small network learns them all by
heart. Its samples are ranked by loss and gradient norm, early and at the end, and by self-influence along
the path, Σ lr·‖gᵢ‖² (Pruthi et al.). How many wrong labels are among the first that a human would look at?
Early all three find them. In the end, when all losses are small, only the self-influence still does: it
remembers. Drawn too are the first two dozen suspects, and the training samples that helped or harmed some
test digits most, their proponents and opponents, by Σ lr·⟨gᵢ, g_test⟩.

Stocks: the months that pull hardest at the regression of the S&P 500 on five of its shares, and whether
they helped or harmed the fit of the last ten years.

Nothing of this needs [n, P] gradients: norms and inner products are reduced chunk by chunk, from factors.

Sources: G. Pruthi, F. Liu, S. Kale, M. Sundararajan, "Estimating training data influence by tracing
gradient descent", 2020; M. Paul, S. Ganguli, G. Dziugaite, "Deep learning on a data diet", 2021 (norms
early on). The digits are scikit-learn's; without it that part is left out. The stocks are matplotlib's.

    python demos/which_samples_matter.py [--out DIR] [--fast]
"""

import argparse
import csv
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

import gdfunc as gd

HIDDEN = 64
TRAINED, TESTED = 1200, 597
WRONG = 0.05
BATCH_SIZE, LR, EPOCHS = 40, 0.5, 300
EARLY = 10  # the epoch of the early rankings
TRACED = 10  # epochs between two points of the path
MONTHS, RECENT = 389, 120
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "0.5")


# Each conclusion is printed, and is the title of a picture.


def conclusion(looked_at: int, loss: float, influence: float) -> str:
    """Compare the shares of the wrong labels that loss and self-influence find at the end."""
    if influence > loss + 0.05:
        opening = "At the end the loss forgets wrong labels, and self-influence does not"
    elif influence < loss - 0.05:
        opening = "At the end the loss finds more wrong labels than self-influence"
    else:
        opening = "At the end self-influence finds as many wrong labels as the loss"
    return f"{opening}: {100 * loss:.0f} and {100 * influence:.0f} % are among the first {looked_at}"


def suspects_conclusion(planted: int, shown: int, of: int) -> str:
    count = "All" if planted == shown else f"{planted} of"
    return f"{count} {shown} most suspect of {of:,} labels are planted errors (in orange)"


def influence_conclusion(planted: int, shown: int) -> str:
    return f"{planted} of the {shown} samples that harmed the three worst test digits most are mislabelled"


def months_conclusion(month: str, share: float, half: int, of: int) -> str:
    rest = f"and {half} months of {of} half of it"
    return f"One month, {month}, did {100 * share:.0f} % of the fitting, Σ lr‖g‖², {rest}"


# Digits.


class Task(NamedTuple):
    """Digits of which some are mislabelled."""

    data: tuple[Tensor, Tensor]  # images [n, 64] and the labels given
    truth: Tensor  # the right labels
    test: tuple[Tensor, Tensor]
    wrong: Tensor  # bool [n]


def mislabelled_digits() -> Task:
    """Split the digits, and give a few of the training samples another label."""
    digits = gd.datasets.digits(dtype=torch.float32)
    x, y = digits.x, digits.y
    split, which, shift = gd.random.split(gd.random.key(0), 3)
    train, test = gd.random.permutation(split, len(y)).split([TRAINED, TESTED])
    wrong = gd.random.permutation(which, TRAINED) < round(WRONG * TRAINED)
    other = (y[train] + gd.random.randint(shift, (TRAINED,), 1, 10)) % 10
    given = torch.where(wrong, other, y[train])
    return Task((x[train], given), y[train], (x[test], y[test]), wrong)


def logits(params: Any, x: Tensor) -> Tensor:
    return torch.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


def loss_fn(params: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return gd.losses.cross_entropy(logits(params, batch[0]), batch[1])


def accuracy(params: Any, data: tuple[Tensor, Tensor]) -> float:
    return float((logits(params, data[0]).argmax(dim=1) == data[1]).double().mean())


def network(key: Tensor) -> dict[str, Tensor]:
    first, second = gd.random.split(key)
    return {
        "w1": gd.random.normal(first, (64, HIDDEN)) / 8,
        "b1": torch.zeros(HIDDEN),
        "w2": gd.random.normal(second, (HIDDEN, 10)) / HIDDEN**0.5,
        "b2": torch.zeros(10),
    }


class Run(NamedTuple):
    """A run, seen at some of its epochs."""

    points: dict[str, Tensor]  # parameters [points, ...]
    lr: float  # of all the steps from one point to the next
    final: dict[str, Tensor]


def learn(data: tuple[Tensor, Tensor], epochs: int) -> Run:
    index = gd.epoch_batches(gd.random.key(1), TRAINED, BATCH_SIZE, epochs)
    every = TRACED * TRAINED // BATCH_SIZE
    step, params = gd.make_step(loss_fn), network(gd.random.key(2))
    final, trajectory = gd.train(step, params, data, index, LR, record=("params",), every=every)
    return Run(trajectory.params, LR * every, final)


class Scores(NamedTuple):
    """The scores of every training sample, [points + 1, n]: large is suspect."""

    loss: Tensor
    norm: Tensor
    self_influence: Tensor  # up to there


NAMES = Scores("loss", "gradient norm", "self-influence up to there")


def score(task: Task, run: Run) -> Scores:
    norms = gd.reduce_per_sample(loss_fn, gd.reducers.norms())
    path = gd.plot.path(run.points, run.final)
    points = range(len(path["b1"]))
    pairs = [norms({name: leaf[t] for name, leaf in path.items()}, task.data) for t in points]
    traced = [
        gd.stats.self_influence(loss_fn, {k: leaf[: t + 1] for k, leaf in path.items()}, run.lr, task.data)
        for t in points
    ]
    norm, loss = (torch.stack(column) for column in zip(*pairs, strict=True))
    return Scores(loss, norm, torch.stack(traced))


def found(scores: Tensor, wrong: Tensor) -> Tensor:
    """The share of the wrong labels among the first k of a ranking, for k = 0 … n."""
    ordered = wrong[gd.stats.ranks(scores).argsort()]
    return torch.cat([torch.zeros(1), ordered.cumsum(dim=0) / wrong.sum()])


def show(ax: Any, image: Tensor, title: str, color: str = "black") -> None:
    ax.imshow(image.reshape(8, 8).numpy(), cmap="gray_r", vmin=0, vmax=1)
    ax.set_title(title, fontsize="small", color=color)
    ax.set(xticks=[], yticks=[])


def head(figure: Figure, said: str, width: int = 110) -> None:
    """Print a conclusion, and make it the title."""
    print(f"{said}.")
    figure.suptitle(textwrap.fill(said, width), x=0.01, ha="left", fontweight="bold", fontsize=12)


def draw_found(scores: Scores, wrong: Tensor, said: str, file: Path) -> None:
    """Draw the wrong labels found: over the labels looked at, and over the epochs."""
    figure = Figure(figsize=(12, 5.3), layout="constrained")
    head(figure, said)
    left, right = figure.subplots(1, 2)
    planted = int(wrong.sum())
    looked_at = 100 * torch.arange(len(wrong) + 1) / len(wrong)
    for name, values, color in zip(NAMES, scores, COLORS, strict=False):
        for t, style, when in ((EARLY // TRACED, "--", f"epoch {EARLY}"), (-1, "-", "the end")):
            curve = 100 * found(values[t], wrong)
            left.plot(looked_at, curve, style, color=color, label=f"{name}, {when}")
        shares = [100 * float(found(row, wrong)[planted]) for row in values]
        right.plot(TRACED * torch.arange(len(shares)), shares, ".-", color=color, label=name)
    share = 100 * planted / len(wrong)
    left.plot([0, share, 100], [0, 100, 100], ":", color="black", linewidth=1, label="the best possible")
    left.plot([0, 100], [0, 100], "-.", color="black", linewidth=1, label="at random")
    left.set(xlim=(0, 25), xlabel="labels looked at, % of all, most suspect first")
    subtitle: dict[str, Any] = {"loc": "left", "fontsize": 10, "color": "0.35"}
    left.set_title(f"finding {planted} wrong labels among {len(wrong):,} digits", **subtitle)
    right.axhline(share, color="black", linestyle="-.", linewidth=1, label="at random")
    right.set(xlabel="epoch")
    right.set_title(f"found among the first {planted}, as training goes on", **subtitle)
    for ax in (left, right):
        ax.set(ylim=(0, 102), ylabel="wrong labels found, % of them")
        # Above the line of a ranking at random.
        ax.legend(loc="lower right", bbox_to_anchor=(1, 0.25), fontsize="small", framealpha=1)
        ax.grid(color="0.9", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)


def draw_suspects(task: Task, scores: Tensor, file: Path) -> None:
    """Draw the first two dozen of a ranking, with the labels given, and the right ones if others."""
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    first = gd.stats.ranks(scores).argsort()[:24]
    head(figure, suspects_conclusion(int(task.wrong[first].sum()), len(first), len(scores)), 84)
    for ax, i in zip(figure.subplots(3, 8).flat, first.tolist(), strict=True):
        planted, given = bool(task.wrong[i]), int(task.data[1][i])
        title = f'"{given}", is {int(task.truth[i])}' if planted else f'"{given}"'
        show(ax, task.data[0][i], title, COLORS[1] if planted else "black")
    figure.supxlabel("the first by self-influence, with the labels given", fontsize=9, color="0.35")
    figure.savefig(file, dpi=150)


def draw_influence(task: Task, run: Run, file: Path) -> None:
    """Draw those test digits that the network gets most wrong, with who helped and who harmed them."""
    losses = gd.reduce_per_sample(loss_fn, gd.reducers.norms())(run.final, task.test)[1]
    worst = gd.stats.ranks(losses).argsort()[:3].tolist()
    figure, harmful = Figure(figsize=(9, 4.6), layout="constrained"), 0
    for row, i in zip(figure.subplots(3, 9), worst, strict=True):
        target = tuple(leaf[i : i + 1] for leaf in task.test)
        effect = gd.stats.influence(loss_fn, run.points, run.lr, task.data, target)
        order = gd.stats.ranks(effect).argsort().tolist()
        predicted = int(logits(run.final, target[0]).argmax())
        show(row[0], target[0][0], f"test: {int(target[1])}\nread as {predicted}")
        for ax, j in zip(row[1:], [*order[:4], *order[-4:]], strict=True):
            planted = bool(task.wrong[j])
            sign = "+" if float(effect[j]) > 0 else "−"
            show(
                ax, task.data[0][j], f'{sign}  "{int(task.data[1][j])}"', COLORS[1] if planted else "black"
            )
        harmful += sum(bool(task.wrong[j]) for j in order[-4:])
    head(figure, influence_conclusion(harmful, 12), 84)
    note = "test digits, the samples that helped (+) or harmed (−) each most; planted errors in orange"
    figure.supxlabel(note, fontsize=9, color="0.35")
    figure.savefig(file, dpi=150)


def digits(out: Path, fast: bool) -> Scores:
    """Plant wrong labels, find them, and return the share that each ranking finds at every point."""
    task = mislabelled_digits()
    run = learn(task.data, EPOCHS // 10 if fast else EPOCHS)
    planted = int(task.wrong.sum())
    right = 100 * accuracy(run.final, task.data), 100 * accuracy(run.final, task.test)
    print(f"digits: {TRAINED} samples, {planted} of them mislabelled; in the end {right[0]:.1f} % of the")
    print(
        f"  given labels are learned, wrong ones included, and {right[1]:.1f} % of the test set read right"
    )
    scores = score(task, run)
    shares = Scores(*([float(found(row, task.wrong)[planted]) for row in rows] for rows in scores))
    print(f"\n  of the wrong labels are among the first {planted}: at the start, epoch {EARLY}, the end")
    for name, share in zip(NAMES, shares, strict=True):
        print(f"    {name:27} " + "".join(f"{100 * share[t]:6.0f} %" for t in (0, EARLY // TRACED, -1)))
    print()
    said = conclusion(planted, shares.loss[-1], shares.self_influence[-1])
    draw_found(scores, task.wrong, said, out / "found.png")
    draw_suspects(task, scores.self_influence[-1], out / "suspects.png")
    draw_influence(task, run, out / "influence.png")
    print()
    return shares


# Stocks.


def months(out: Path, fast: bool) -> list[tuple[str, float, float]]:
    """Rank the months by what they did to a regression: date, mean norm along the path, and influence."""
    problem, dates = gd.problems.stock_regression(), gd.datasets.stocks().dates
    index = gd.epoch_batches(gd.random.key(3), MONTHS, 10, 2 if fast else 10)
    step = gd.make_step(problem.loss_fn)
    _, trajectory = gd.train(step, problem.params, problem.data, index, 0.03, record=("params",))
    recent = tuple(leaf[-RECENT:] for leaf in problem.data)
    norms = gd.stats.self_influence(problem.loss_fn, trajectory.params, 0.03, problem.data, index=index)
    effect = gd.stats.influence(problem.loss_fn, trajectory.params, 0.03, problem.data, recent, index=index)
    order = gd.stats.ranks(norms).argsort().tolist()
    print(f"stocks: the months that moved the fit most, of {MONTHS}")
    print(f"  {'month':8} {'share of all Σ lr‖g‖²':>22} {'effect on the loss of the last ten years':>42}")
    for i in order[:8]:
        print(f"  {dates[i]:8} {100 * float(norms[i] / norms.sum()):20.1f} % {-float(effect[i]):+42.2e}")
    half = int((norms.sort(descending=True).values.cumsum(dim=0) < norms.sum() / 2).sum()) + 1

    figure = Figure(figsize=(11, 6), layout="constrained")
    head(figure, months_conclusion(dates[order[0]], float(norms[order[0]] / norms.sum()), half, MONTHS))
    top, bottom = figure.subplots(2, 1, sharex=True)
    years = 1990 + (torch.arange(MONTHS) + 1) / 12
    top.vlines(years, 0, 100 * norms / norms.sum(), color=COLORS[0], linewidth=1.5)
    top.set(ylabel="share of Σ lr‖gᵢ‖², %", ylim=(0, None), xlim=(1990, 2022.6))
    top.set_title("the S&P 500 regressed on five shares", loc="left", fontsize=10, color="0.35")
    for helped, color, name in ((True, COLORS[2], "helped"), (False, COLORS[1], "harmed")):
        chosen = (effect > 0) == helped
        bottom.vlines(years[chosen], 0, effect[chosen], color=color, linewidth=1.5, label=name)
    label(top, years, 100 * norms / norms.sum(), dates)
    label(bottom, years, effect, dates)
    bottom.axhline(0, color="0.3", linewidth=0.8)
    bottom.axvspan(2022.5 - RECENT / 12, 2022.5, color="0.92", zorder=0, label="the last ten years")
    bottom.set(ylabel="influence on the loss of\nthe last ten years", xlabel="month")
    bottom.legend(fontsize="small", loc="lower left")
    for ax in (top, bottom):
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(out / "months.png", dpi=150)
    return [(dates[i], float(norms[i]), float(effect[i])) for i in order]


def label(ax: Any, years: Tensor, heights: Tensor, dates: tuple[str, ...]) -> None:
    """Write the dates of the largest bars, but not of neighbours."""
    done: list[float] = []
    for i in gd.stats.ranks(heights.abs()).argsort()[:12].tolist():
        year, height = float(years[i]), float(heights[i])
        if all(abs(year - other) > 1.7 for other in done):
            place = {
                "xytext": (4, 0),
                "textcoords": "offset points",
                "va": "bottom" if height > 0 else "top",
            }
            ax.annotate(dates[i], (year, height), fontsize="small", **place)
            done.append(year)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path("out/which_samples_matter"), help="folder for the results"
    )
    parser.add_argument("--fast", action="store_true", help="fewer epochs")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # on tensors this small, threads would only wait for one another

    pictures = ["months.png"]
    try:
        digits(args.out, args.fast)
    except ModuleNotFoundError as error:
        print(f"the digits are left out: {error}\n")
    else:
        pictures += ["found.png", "suspects.png", "influence.png"]
    ranked = months(args.out, args.fast)
    with (args.out / "months.csv").open("w", newline="", encoding="utf-8") as file:
        header = ("month", "sum of lr times squared norm", "influence on the last ten years")
        csv.writer(file).writerows([header, *ranked])
    print(f"Written: months.csv, {', '.join(pictures)} in {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
