"""Mini-batches on one weight: a tutorial's drawing made true, its run, and its claim put to the test.

Source: "小批量随机梯度下降法和梯度下降法的再理解" (mini-batch stochastic gradient descent, and gradient
descent understood again; day 4 of a series on deep learning), CSDN blog, 2020. It fits y = w·x to 500
rows, ten rows an update, under the loss ½ (w·x − y)², and prints w after every update until it is
5.0000. It numbers the updates by their first row (1, 11, 21, …) and says that this is wrong; here they
are counted: 1, 2, …, 50. Its data are not given. Those here have the same true w = 5, no noise (which
its last line, 5.0000, implies), and a start that makes the first line like its 8.7910.

The run is made on the rows in order, then shuffled, then with three weights and a bias, then with an
nn.Module. Its drawing, one parabola per sample and the slopes at one w, stands beside it. After that comes
its claim:

"At one w the gradients of different samples are similar", so that the mean of ten may stand for them all.
It is drawn there by hand, and here as it is, and tested with noise on y: without it every sample has its
minimum at the same w, and no gradient can point the wrong way; with it each sample has a minimum of its
own. Its other claim, that fewer updates on batches are as accurate, is put to the test in
`fewer_updates.py`.

    python demos/minibatch_1d.py [--out DIR] [--fast]
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from _card import Card
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.func import vmap

import gdfunc as gd

ROWS, BATCH, LR = 500, 10, 0.25
TRUE_W, START = 5.0, 10.0
TRUE_WEIGHTS, TRUE_BIAS = (5.0, -3.0, 2.0), 1.0
SEED = 6  # of the rows: the first update is like the tutorial's
NOISE = 1.0  # σ: the standard deviation of y around w·x, where there is noise
PARABOLAS = 24  # samples in the drawing
# The tutorial's own lines, w after each of its 50 updates.
PRINTED = (
    *(8.7910, 7.5585, 7.0972, 6.4384, 6.0033, 5.8827, 5.7091, 5.5823, 5.4687, 5.3987),
    *(5.3272, 5.2702, 5.2038, 5.1736, 5.1183, 5.1074, 5.0836, 5.0763, 5.0454, 5.0400),
    *(5.0368, 5.0319, 5.0273, 5.0245, 5.0197, 5.0144, 5.0105, 5.0080, 5.0042, 5.0033),
    *(5.0030, 5.0019, 5.0015, 5.0012, 5.0008, 5.0005, 5.0004, 5.0003, 5.0003, 5.0003),
    *(5.0002, 5.0002, 5.0002, 5.0002, 5.0001, 5.0001, 5.0001, 5.0000, 5.0000, 5.0000),
)
DISTANCES = (3.0, 1.0, 0.3, 0.1, 0.03, 0.01)  # from the optimum, in the table of the claim

Data = tuple[Tensor, Tensor]


def loss_fn(w: Tensor, batch: Data) -> Tensor:
    x, y = batch
    return 0.5 * (w * x - y).square().mean()


def draw(key: Tensor, n: int, noise: float = 0.0) -> Data:
    """Draw x from the standard normal distribution, and y = 5x + noise."""
    x_key, noise_key = gd.random.split(key)
    x = gd.random.normal(x_key, (n,))
    return x, TRUE_W * x + noise * gd.random.normal(noise_key, (n,))


# The tutorial's run.


def one_weight(*, shuffle: bool, noise: float = 0.0) -> Tensor:
    """The weight after each update, [50]."""
    data = draw(gd.random.key(SEED), ROWS, noise)
    index = gd.epoch_batches(gd.random.key(0), ROWS, BATCH, epochs=1, shuffle=shuffle)
    step = gd.make_step(loss_fn)
    final, trajectory = gd.train(step, torch.tensor(START), data, index, LR, record="params")
    return gd.plot.path(trajectory.params, final)[1:]


def one_weight_by_hand() -> Tensor:
    """The tutorial's own loop on the same rows, in order, [50]."""
    x, y = draw(gd.random.key(SEED), ROWS)
    w = torch.tensor([START], requires_grad=True)
    path = []
    for i in range(0, ROWS, BATCH):
        loss = (w * x[i : i + BATCH] - y[i : i + BATCH]) ** 2 / 2
        loss.sum().backward()
        with torch.no_grad():
            w -= LR * w.grad / BATCH
            w.grad.zero_()
        path.append(w.detach().clone())
    return torch.cat(path)


def many_rows() -> Data:
    x = gd.random.normal(gd.random.key(SEED), (ROWS, len(TRUE_WEIGHTS)))
    return x, x @ torch.tensor(TRUE_WEIGHTS) + TRUE_BIAS


def many_weights() -> Tensor:
    """Three weights and a bias, in a dict, after each update, [100, 4]."""

    def plane_loss(params: dict[str, Tensor], batch: Data) -> Tensor:
        x, y = batch
        return 0.5 * (x @ params["w"] + params["b"] - y).square().mean()

    init = {"w": torch.full((len(TRUE_WEIGHTS),), START), "b": torch.tensor(START)}
    index = gd.epoch_batches(gd.random.key(0), ROWS, BATCH, epochs=2)
    final, trajectory = gd.train(gd.make_step(plane_loss), init, many_rows(), index, LR, record="params")
    path = gd.plot.path(trajectory.params, final)
    return torch.cat([path["w"], path["b"][:, None]], dim=1)[1:]


def with_a_module() -> Tensor:
    """The same weights in an nn.Linear, [100, 4]."""
    # On the meta device a module has shapes but no numbers: ours are passed in, and no seed is read.
    apply, _, _ = gd.modules.functional(nn.Linear(len(TRUE_WEIGHTS), 1, device="meta"))

    def module_loss(params: dict[str, Tensor], batch: Data) -> Tensor:
        x, y = batch
        return 0.5 * gd.losses.mse(apply(params, x)[:, 0], y)

    init = {"weight": torch.full((1, len(TRUE_WEIGHTS)), START), "bias": torch.tensor([START])}
    index = gd.epoch_batches(gd.random.key(0), ROWS, BATCH, epochs=2)
    final, trajectory = gd.train(gd.make_step(module_loss), init, many_rows(), index, LR, record="params")
    path = gd.plot.path(trajectory.params, final)
    return torch.cat([path["weight"][:, 0], path["bias"]], dim=1)[1:]


def show_tutorial(card: Card) -> bool:
    """Print and draw the four runs; tell whether they arrive as the tutorial's does."""
    ordered, shuffled = one_weight(shuffle=False), one_weight(shuffle=True)
    plane, module = many_weights(), with_a_module()
    by_hand = float((ordered - one_weight_by_hand()).abs().max())

    print(
        f"One weight, true value {TRUE_W}, start {START}, {ROWS} rows in order, {BATCH} an update, lr {LR}"
    )
    for update, w in enumerate(ordered.tolist(), 1):
        print(f"update {update:2}: w = {w:.4f}")
    print(f"The tutorial's own loop on the same rows differs from this by at most {by_hand:.0e}.")
    for title, path in {
        "The same, shuffled": shuffled[:, None],
        "Three weights and a bias, shuffled anew in each of two epochs": plane,
        "The same in an nn.Linear": module,
    }.items():
        print(f"\n{title}")
        for update in (1, 2, 10, 25, *range(50, len(path) + 1, 50)):
            print(f"update {update:3}: w = {' '.join(f'{w:7.4f}' for w in path[update - 1].tolist())}")

    true_plane = torch.tensor([*TRUE_WEIGHTS, TRUE_BIAS])
    distances = {
        "one weight in order": (ordered - TRUE_W).abs(),
        "one weight shuffled": (shuffled - TRUE_W).abs(),
        "three weights and a bias": torch.linalg.vector_norm(plane - true_plane, dim=1),
        "the same in an nn.Linear": torch.linalg.vector_norm(module - true_plane, dim=1),
    }
    noisy, printed = one_weight(shuffle=False, noise=NOISE), torch.tensor(PRINTED)
    numbers = {
        "ours": updates_to(TRUE_W, ordered),
        "printed": updates_to(TRUE_W, printed),
        "apart": float((ordered - printed).abs().max()),
        "shaking": float((noisy[len(noisy) // 2 :] - TRUE_W).abs().max()),
    }
    card.picture(
        "tutorial",
        draw_tutorial(ordered, noisy),
        tutorial_conclusion(**numbers),
        numbers,
        question="Does the tutorial's run arrive, and would it with noise in the data?",
    )
    # One epoch of one weight is shorter than two of three: nan fills the columns up.
    columns = nn.utils.rnn.pad_sequence(list(distances.values()), padding_value=math.nan)
    card.table("tutorial", ["update", *distances], zip(range(1, len(plane) + 1), *columns.T, strict=True))
    return by_hand < 1e-5 and all(float(distance[-1]) < 5e-5 for distance in distances.values())


def updates_to(value: float, path: Tensor) -> float:
    """Return the first update from which a path [T] prints a value with four digits, or inf."""
    others = torch.nonzero((path - value).abs() >= 5e-5)
    first = int(others.max()) + 2 if len(others) else 1
    return first if first <= len(path) else math.inf


def tutorial_conclusion(ours: float, printed: float, apart: float, shaking: float) -> str:
    """Tell from which update w is 5.0000, and how far noise throws it in the second half."""
    here, there = ("never" if math.isinf(n) else f"after {n} updates" for n in (ours, printed))
    arrives = "arrives at" if ours < math.inf else "does not arrive at"
    noise = "keeps it away" if shaking >= 5e-5 else "does not keep it away"
    return (
        f"Without noise w {arrives} {TRUE_W:.4f} ({here}; the tutorial's {there}, never more than"
        f" {apart:.1f} apart); noise {noise}: in the second half it is up to {shaking:.2g} off"
    )


def draw_tutorial(ordered: Tensor, noisy: Tensor) -> Figure:
    """Draw the weight over the updates, beside the tutorial's printed values."""
    figure = Figure((7.2, 4.4), layout="constrained")
    runs = {"without noise": ordered, f"with noise, σ = {NOISE:g}": noisy}
    ax = gd.plot.plot_curves(
        {name: torch.cat([torch.tensor([START]), run]) for name, run in runs.items()},
        ax=figure.subplots(),
        label_lines=True,
        xlabel=f"update on {BATCH} samples, lr {LR}",
        ylabel="w",
        log_y=False,
    )
    (printed,) = ax.plot(range(1, len(PRINTED) + 1), PRINTED, "o", markersize=5, color="black")
    printed.set(markerfacecolor="none", markeredgewidth=0.8, zorder=4)
    ax.set_title("○ as the tutorial prints it", loc="left", fontsize=9, color="0.35")
    return figure


# The claim: at one w the gradients of different samples are similar.


def conclusion(samples: int, at_start: int, at_end: int) -> str:
    """Tell where the slopes of samples agree, from how many pull against their mean at both places."""
    few = samples / 10
    far, near = at_start <= few, at_end <= few
    where = {
        (True, True): "far from the optimum and near it",
        (True, False): "far from the optimum, not near it",
        (False, True): "near the optimum, not far from it",
        (False, False): "neither far from the optimum nor near it",
    }[far, near]
    counts = f"{at_start} of {samples} pull the wrong way at w = {START:g}, {at_end} at w = {TRUE_W:g}"
    return f"The slopes of samples agree {where}: {counts}"


NEAR = ((4.2, 5.8), (-0.12, 1.25))  # the view of the second panel
SMALL: dict[str, Any] = {"loc": "left", "fontsize": 9, "color": "0.35"}


def show_parabolas(card: Card) -> None:
    """Draw the tutorial's parabolas: one for each sample, their mean, and the slopes at two places."""
    data, ends = draw(gd.random.key(1), PARABOLAS, NOISE), torch.tensor([START, TRUE_W])
    grads = vmap(lambda w: gd.per_sample_grad(loss_fn)(w, data)[0])(ends)
    wrong = (grads * grads.mean(dim=1, keepdim=True) < 0).sum(dim=1).tolist()
    figure = Figure((9, 5), layout="constrained")
    for ax, view in zip(figure.subplots(1, 2), (None, NEAR), strict=True):
        gd.plot.plot_samples(
            lambda params, batch: loss_fn(params["w"], batch),
            {"w": ends[0]},
            data,
            at=ends.tolist() if view is None else [TRUE_W],
            ax=ax,
            limits=view,
        )
        said = [text for text in ax.texts if text.get_text()]
        title = "\n".join(text.get_text() for text in said)  # above the curves, not upon them
        ax.set_title(title if view is None else f"near w = {TRUE_W:g}; σ = {NOISE:g}", **SMALL)
        for text in said:
            text.set_visible(False)
    handles, names = figure.axes[0].get_legend().legend_handles, figure.axes[0].get_legend().get_texts()
    for ax in figure.axes:
        ax.get_legend().remove()
    labels = [name.get_text().split(",")[0] for name in names]  # how many are in view differs
    place: dict[str, Any] = {"loc": "outside lower center", "ncols": 3, "frameon": False}
    figure.legend(handles, labels, fontsize="small", **place)
    numbers = {"samples": PARABOLAS, "at_start": wrong[0], "at_end": wrong[1]}
    card.picture("parabolas", figure, conclusion(**numbers), numbers)


class Spread(NamedTuple):
    """How the gradients of samples are distributed at some distances from the optimum, [W] each."""

    distance: Tensor
    mean: Tensor
    low: Tensor  # the 10 % quantile
    high: Tensor  # the 90 % quantile
    relative_std: Tensor  # standard deviation over |mean|
    opposed: Tensor  # share of samples whose gradient has not the sign of the mean
    opposed_batches: Tensor  # the same of batches of ten


def gradients_at(distance: Tensor, data: Data) -> Tensor:
    """The gradient of every sample at some distances from the optimum of all samples, [W, n]."""
    x, y = data
    ws = (x @ y) / (x @ x) + distance
    return vmap(lambda w: gd.per_sample_grad(loss_fn)(w, data)[0])(ws)


def spread(distance: Tensor, data: Data) -> Spread:
    grads = gradients_at(distance, data)
    mean = grads.mean(dim=1)
    index = gd.epoch_batches(gd.random.key(0), grads.shape[1], BATCH, epochs=1)

    def opposed(some: Tensor) -> Tensor:
        return (some * mean[:, None] < 0).float().mean(dim=1)

    low, high = torch.quantile(grads, torch.tensor([0.1, 0.9]), dim=1)
    relative_std = grads.std(dim=1) / mean.abs()
    return Spread(
        distance, mean, low, high, relative_std, opposed(grads), opposed(grads[:, index].mean(dim=2))
    )


def opposed_in_theory(distance: Tensor) -> Tensor:
    """The share of samples that point the wrong way, ½ − arctan(d/σ)/π.

    At the distance d the gradient is x²·d − x·ε, so it is the probability of ε/x > d, and a quotient of
    two normal variables is Cauchy's.
    """
    return 0.5 - torch.arctan(distance / NOISE) / math.pi


def distance_at(share: Tensor, level: float, distance: Tensor) -> float:
    """The distance at which a share that falls with it passes a level."""
    return float(np.interp(-level, -share, distance))


def show_claim(card: Card, samples: int) -> None:
    noisy, clean = draw(gd.random.key(1), samples, NOISE), draw(gd.random.key(1), samples)
    curve, clean_curve = (spread(torch.logspace(-2, 1, 61), data) for data in (noisy, clean))
    table = spread(torch.tensor(DISTANCES), noisy)

    print(f"\nThe claim: at one w the gradients of samples are similar ({samples} samples, σ = {NOISE})")
    print("distance      mean   10 % of   90 % of  std over    opposed to the mean       opposed")
    print(" from w*  gradient   samples   samples    |mean|  samples  (in theory)  batches of 10")
    for *row, theory in zip(*table, opposed_in_theory(table.distance), strict=True):
        distance, mean, low, high, ratio, opposed, batches = map(float, row)
        print(
            f"{distance:8.2f} {mean:9.4f} {low:9.4f} {high:9.4f} {ratio:9.2f}"
            f" {opposed:8.1%} {float(theory):12.1%} {batches:14.1%}"
        )
    single, ten = (
        distance_at(share, 0.25, curve.distance) for share in (curve.opposed, curve.opposed_batches)
    )
    noisy_std, clean_std = curve.relative_std, clean_curve.relative_std
    far = "in direction and size" if noisy_std[-1] < 0.5 else "in direction, but not in size"
    near = "the same" if single <= curve.distance[0] else "in neither"
    print(f"Without noise at most {clean_curve.opposed.max():.1%} of the samples do, at any distance.")
    print(
        f"Size: their standard deviation is at least {noisy_std.min():.2f} of the mean at every distance,"
    )
    print(
        f"and {clean_std.min():.2f} to {clean_std.max():.2f} without noise, as the gradient goes with x²."
    )
    print(f"So far from w* the gradients are similar {far}; near it, {near}.")

    card.picture(
        "claim",
        draw_claim(curve),
        claim_conclusion(single, ten),
        {"single": single, "ten": ten},
        question="How near to the optimum can an average of ten gradients be trusted?",
    )
    columns = [*curve, opposed_in_theory(curve.distance)]
    card.table("claim", [*Spread._fields, "opposed_in_theory"], zip(*columns, strict=True))


def claim_conclusion(single: float, ten: float) -> str:
    """Compare the distances within which more than a quarter pull the wrong way."""
    gain = single / ten
    opening = f"Averages of ten can be trusted {gain:.1f} × nearer to the optimum"
    opening = opening if gain > 1.2 else "Averages of ten are no surer than single samples"
    return (
        f"{opening}: a quarter of the single samples pull the wrong way at a distance of {single:.2g},"
        f" a quarter of the tens at {ten:.2g}"
    )


def draw_claim(curve: Spread) -> Figure:
    ax = gd.plot.plot_curves(
        {"single samples": curve.opposed, "batches of ten": curve.opposed_batches},
        x=curve.distance,
        xlabel=f"distance d from w* (σ = {NOISE:g})",
        ylabel="share that pulls against the mean gradient",
        log_x=True,
        log_y=False,
    )
    ax.lines[0].set(linewidth=5, alpha=0.4)
    ax.plot(curve.distance, opposed_in_theory(curve.distance), color="black", linewidth=0.8, zorder=5)
    ax.annotate("½ − arctan(d/σ)/π", (1.0, 0.25), (8, 6), textcoords="offset points", fontsize="small")
    return ax.figure


def main(argv: Sequence[str] | None = None) -> int:
    with Card(__file__, "Are the gradients of samples similar at one w?", argv) as card:
        arrived = show_tutorial(card)
        show_parabolas(card)
        show_claim(card, samples=2_000 if card.fast else 50_000)
    return 0 if arrived else 1


if __name__ == "__main__":
    torch.set_num_threads(1)  # steps this small keep one thread busy; more of them wait for one another
    raise SystemExit(main())
