"""Which samples drive training: ranked by loss, gradient norm and influence, with wrong labels to be found.

Digits: one in twenty training labels is replaced by a wrong one, and a small network learns them all by
heart. Its samples are ranked by loss and gradient norm, early and at the end, and by self-influence along
the path, Σ lr·‖gᵢ‖² (Pruthi et al.). How many wrong labels are among the first that a human would look at?
Early all three find them. In the end, when all losses are small, only the self-influence still does: it
remembers. Drawn too are the first two dozen suspects, and the training samples that helped or harmed the
test digits read worst, their proponents and opponents, by Σ lr·⟨gᵢ, g_test⟩.

Stocks: the months that pull hardest at the regression of the S&P 500 on five of its shares, and whether
they helped or harmed the fit of the last ten years.

Nothing of this needs [n, P] gradients: norms and inner products are reduced chunk by chunk, from factors.

Sources: G. Pruthi, F. Liu, S. Kale, M. Sundararajan, "Estimating training data influence by tracing
gradient descent", 2020; M. Paul, S. Ganguli, G. Dziugaite, "Deep learning on a data diet", 2021 (norms
early on). The digits are scikit-learn's; without it that part is left out. The stocks are matplotlib's.

    python demos/which_samples_matter.py [--out DIR] [--fast]
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from _card import Card
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

import gdfunc as gd

HIDDEN = 64
TRAINED, TESTED = 1200, 597
WRONG = 0.05
BATCH_SIZE, LR, EPOCHS = 40, 0.5, 300
EARLY = 10  # the epoch of the early rankings
TRACED = 10  # epochs between two points of the path
MONTHS, RECENT = 389, 120
SUSPECTS, WORST, EACH = 24, 3, 4  # how many are drawn; of the last, on either side
BLUE, RED, GREEN = "#0072B2", "#D55E00", "#009E73"
PURPLE = "#7B2D8E"  # of wrong labels


# The conclusions.


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
    return f"{count} {shown} most suspect of {of:,} labels are planted errors"


def influence_conclusion(helpers: Sequence[int], harmers: Sequence[int], share: float) -> str:
    """Compare the mislabelled among the most helpful and among the most harmful samples with all samples.

    Both groups are (mislabelled, samples), each sample counted once.
    """
    least = min(wrong / of for wrong, of in (helpers, harmers))
    word = "are mostly" if least > 0.5 else "are often" if least > 2 * share else "are not all often"
    groups = "The samples that help and those that harm the worst test digits most"
    counts = " and ".join(f"{wrong} of {of}" for wrong, of in (helpers, harmers))
    return f"{groups} {word} mislabelled: {counts}, against {100 * share:.0f} % of all samples"


def months_conclusion(month: str, share: float, half: int, of: int) -> str:
    rest = f"and {half} month{'s' * (half > 1)} of {of} half of it"
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
    self_influence: Tensor  # up to that point


NAMES = Scores("loss", "gradient norm", "self-influence")


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


def show_sample(ax: Any, task: Task, i: int, note: str = "") -> None:
    """Draw a training sample with the label given, the right one if that is another, and a note."""
    given, true = int(task.data[1][i]), int(task.truth[i])
    title = f'"{given}"' if given == true else f'"{given}", is {true}'
    show(ax, task.data[0][i], title + note, "black" if given == true else PURPLE)


def draw_found(shares: Scores, random: float, looked_at: int) -> Figure:
    """Draw the shares [points] of the wrong labels that rankings find, over the epochs."""
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    ax = figure.subplots()
    gd.plot.plot_curves(
        {name: 100 * values for name, values in zip(NAMES, shares, strict=True)},
        x=TRACED * torch.arange(len(shares.loss)),
        ax=ax,
        colors=[BLUE, "#56B4E9", RED],
        label_lines=True,
        xlabel="epoch",
        ylabel=f"wrong labels among the first {looked_at}, %",
        log_y=False,
    )
    ax.axhline(100 * random, color="0.4", linewidth=0.8)
    place = {"xycoords": ("axes fraction", "data"), "xytext": (0, 3), "textcoords": "offset points"}
    ax.annotate("at random", (0.9, 100 * random), **place, fontsize="small", color="0.35")
    ax.set(ylim=(0, 100))
    return figure


def draw_suspects(task: Task, scores: Tensor, first: Tensor) -> Figure:
    """Draw the first of a ranking, with the labels given, the right ones if others, and their scores."""
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    for ax, i in zip(figure.subplots(3, SUSPECTS // 3).flat, first.tolist(), strict=True):
        show_sample(ax, task, i)
        ax.set_xlabel(f"× {float(scores[i] / scores.median()):,.0f}", fontsize="small", color="0.35")
    note = "in quotes the label given, in purple where it is wrong; × the median's self-influence, Σ lr‖g‖²"
    figure.supxlabel(note, fontsize=9, color="0.35")
    return figure


class Influence(NamedTuple):
    """The effect of the training samples on a test digit."""

    image: Tensor
    digit: int
    read: int
    effect: Tensor  # [n]: > 0 helped
    order: list[int]  # of the samples, from the one that helped most


def influences(task: Task, run: Run) -> list[Influence]:
    """Trace the test digits of the largest loss."""
    losses = gd.reduce_per_sample(loss_fn, gd.reducers.norms())(run.final, task.test)[1]
    found = []
    for i in gd.stats.ranks(losses).argsort()[:WORST].tolist():
        target = tuple(leaf[i : i + 1] for leaf in task.test)
        effect = gd.stats.influence(loss_fn, run.points, run.lr, task.data, target)
        order = gd.stats.ranks(effect).argsort().tolist()
        read = int(logits(run.final, target[0]).argmax())
        found.append(Influence(target[0][0], int(target[1]), read, effect, order))
    return found


def draw_influence(task: Task, found: list[Influence]) -> Figure:
    """Draw a row for each test digit: the samples that helped it most, and those that harmed it most.

    A sample that a row above has in the same group is marked.
    """
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    parts = figure.subfigures(1, 3, width_ratios=(1.1, EACH, EACH), wspace=0.05)
    heads = ("test digit", "helped it most", "harmed it most")
    for part, head in zip(parts, heads, strict=True):
        part.suptitle(head, x=0.02, ha="left", fontsize=10, fontweight="bold", color="0.35")
    tested = parts[0].subplots(len(found), 1, squeeze=False)[:, 0]
    for ax, one in zip(tested, found, strict=True):
        show(ax, one.image, f"{one.digit}, read as {one.read}")
    for part, color, places in zip(
        parts[1:], (GREEN, RED), (range(EACH), range(-1, -EACH - 1, -1)), strict=True
    ):
        drawn: set[int] = set()
        for row, one in zip(part.subplots(len(found), EACH, squeeze=False), found, strict=True):
            chosen, effect = [one.order[place] for place in places], one.effect.abs()
            for ax, i in zip(row, chosen, strict=True):
                show_sample(ax, task, i, ", again" if i in drawn else "")
                share = float(effect[i] / effect.max())
                bar = Rectangle((0, -0.14), share, 0.08, transform=ax.transAxes, color=color, clip_on=False)
                ax.add_patch(bar)
            drawn.update(chosen)
    note = "in quotes the label given, in purple where it is wrong; bars: the influence, within each row;"
    note += "\nagain: in a row above, and counted once"
    figure.supxlabel(note, fontsize=9, color="0.35")
    return figure


def show_digits(card: Card) -> Scores:
    """Plant wrong labels, find them, and return the share that each ranking finds at every point."""
    task = mislabelled_digits()
    run = learn(task.data, EPOCHS // 10 if card.fast else EPOCHS)
    planted = int(task.wrong.sum())
    right = 100 * accuracy(run.final, task.data), 100 * accuracy(run.final, task.test)
    print(f"digits: {TRAINED} samples, {planted} of them mislabelled; in the end {right[0]:.1f} % of the")
    print(
        f"  given labels are learned, wrong ones included, and {right[1]:.1f} % of the test set read right"
    )
    scores = score(task, run)
    shares = Scores(*(torch.stack([found(row, task.wrong)[planted] for row in rows]) for rows in scores))
    print(f"\n  of the wrong labels are among the first {planted}: at the start, epoch {EARLY}, the end")
    for name, share in zip(NAMES, shares, strict=True):
        print(f"    {name:15} " + "".join(f"{100 * share[t]:6.0f} %" for t in (0, EARLY // TRACED, -1)))
    print()
    loss, influence = float(shares.loss[-1]), float(shares.self_influence[-1])
    numbers: dict[str, Any] = {"looked_at": planted, "loss": loss, "influence": influence}
    question = "Which ranking finds wrong labels?"
    figure = draw_found(shares, planted / TRAINED, planted)
    card.picture("found", figure, conclusion(**numbers), numbers, question)

    suspicion = scores.self_influence[-1]
    first = gd.stats.ranks(suspicion).argsort()[:SUSPECTS]
    numbers = {"planted": int(task.wrong[first].sum()), "shown": SUSPECTS, "of": TRAINED}
    said, question = suspects_conclusion(**numbers), "Are the most suspect labels wrong?"
    card.picture("suspects", draw_suspects(task, suspicion, first), said, numbers, question)

    traced = influences(task, run)
    groups = [
        sorted({i for one in traced for i in one.order[part]}) for part in (slice(EACH), slice(-EACH, None))
    ]
    helpers, harmers = ((int(task.wrong[group].sum()), len(group)) for group in groups)
    numbers = {"helpers": helpers, "harmers": harmers, "share": planted / TRAINED}
    said = influence_conclusion(**numbers)
    question = "Which samples help and harm the test digits that are read worst?"
    card.picture("influence", draw_influence(task, traced), said, numbers, question)
    print()
    return shares


# Stocks.


class Months(NamedTuple):
    """The effect of the months on a regression."""

    dates: tuple[str, ...]
    share: Tensor  # [n], of Σ lr‖g‖² over all months
    effect: Tensor  # [n], on the fit of the last ten years: > 0 helped
    order: list[int]  # from the largest share


def rank_months(epochs: int) -> Months:
    problem = gd.problems.stock_regression()
    index = gd.epoch_batches(gd.random.key(3), MONTHS, 10, epochs)
    step = gd.make_step(problem.loss_fn)
    _, trajectory = gd.train(step, problem.params, problem.data, index, 0.03, record=("params",))
    recent = tuple(leaf[-RECENT:] for leaf in problem.data)
    norms = gd.stats.self_influence(problem.loss_fn, trajectory.params, 0.03, problem.data, index=index)
    effect = gd.stats.influence(problem.loss_fn, trajectory.params, 0.03, problem.data, recent, index=index)
    order = gd.stats.ranks(norms).argsort().tolist()
    return Months(gd.datasets.stocks().dates, norms / norms.sum(), effect, order)


def show_months(card: Card) -> None:
    """Rank the months by what they did to a regression."""
    months = rank_months(2 if card.fast else 10)
    print(f"stocks: the months that moved the fit most, of {MONTHS}")
    print(
        f"  {'month':8} {'share of all Σ lr‖g‖²':>22} {'influence on the last ten years (> 0: helped)':>48}"
    )
    for i in months.order[:8]:
        print(
            f"  {months.dates[i]:8} {100 * float(months.share[i]):20.1f} % {float(months.effect[i]):+48.2e}"
        )
    total = months.share[months.order].cumsum(dim=0)
    first = months.order[0]
    numbers: dict[str, Any] = {
        "month": months.dates[first],
        "share": float(months.share[first]),
        "half": int((total < 0.5).sum()) + 1,
        "of": MONTHS,
    }
    question = "Which months did the fitting?"
    card.picture("months", draw_months(months), months_conclusion(**numbers), numbers, question)
    header = ("month", "share of the sum of lr times squared norms", "influence on the last ten years")
    ranked = ((months.dates[i], months.share[i], months.effect[i]) for i in months.order)
    card.table("months", header, ranked)


def draw_months(months: Months) -> Figure:
    """Draw the share of every month, and its influence on the last ten years."""
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    years, shares = 1990 + (torch.arange(MONTHS) + 1) / 12, 100 * months.share
    top.vlines(years, 0, shares, color=BLUE, linewidth=1.5)
    top.set(ylabel="share of Σ lr‖gᵢ‖², %", ylim=(0, None), xlim=(1990, 2022.6))
    top.set_title("the S&P 500 regressed on five shares", loc="left", fontsize=9, color="0.35")
    for helped, color, name in ((True, GREEN, "helped"), (False, RED, "harmed")):
        chosen = (months.effect > 0) == helped
        bottom.vlines(years[chosen], 0, months.effect[chosen], color=color, linewidth=1.5, label=name)
    label(top, years, shares, months.dates)
    label(bottom, years, months.effect, months.dates)
    bottom.axhline(0, color="0.3", linewidth=0.8)
    bottom.axvspan(2022.5 - RECENT / 12, 2022.5, color="0.92", zorder=0, label="the last ten years")
    bottom.set(ylabel="influence on the loss of\nthe last ten years", xlabel="month")
    bottom.legend(fontsize="small", loc="lower left")
    for ax in (top, bottom):
        ax.spines[["top", "right"]].set_visible(False)
        ax.margins(y=0.1)
    return figure


def label(ax: Any, years: Tensor, heights: Tensor, dates: tuple[str, ...]) -> None:
    """Write the dates of the largest bars on the side that is free, but not of neighbours."""
    done: list[float] = []
    for i in gd.stats.ranks(heights.abs()).argsort()[:8].tolist():
        year, height = float(years[i]), float(heights[i])
        if any(abs(year - other) <= 1.7 for other in done):
            continue
        after = heights[(years > year) & (years < year + 2.5)] / height
        side, shift = ("right", -4) if (after > 0.7).any() else ("left", 4)
        place = {"xytext": (shift, 0), "textcoords": "offset points", "ha": side}
        va = "bottom" if height > 0 else "top"
        ax.annotate(dates[i], (year, height), fontsize="small", va=va, **place)
        done.append(year)


def main(argv: Sequence[str] | None = None) -> int:
    with Card(__file__, "Which samples drive training?", argv) as card:
        try:
            show_digits(card)
        except ModuleNotFoundError as error:
            print(f"the digits are left out: {error}\n")
        show_months(card)
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)  # on tensors this small, threads would only wait for one another
    raise SystemExit(main())
