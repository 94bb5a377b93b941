"""A network's decision boundary while it trains, on two measurements of real tumours.

A network of 16 hidden units learns to tell malignant from benign tumours by two measurements, the area and
the smoothness of the worst nuclei. The data are the 569 breast tumours of scikit-learn. On the boundary the
network gives both classes an equal chance. At each step the script counts the tumours on their own side of
the boundary, and finds those that change sides. All of them are training data, so these counts say nothing
about other tumours.

Source: the idea is that of the TensorFlow Playground (D. Smilkov, S. Carter, 2016), whose data are made up.

    python demos/decision_boundary.py [--out DIR] [--fast]
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from _card import Card
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from torch import Tensor
from torch.func import vmap

import gdfunc as gd

FEATURES = ("worst area", "worst smoothness")
HIDDEN, BATCH, LR = 16, 32, 0.01
CLASSES = {0: ("malignant", "#D55E00"), 1: ("benign", "#0072B2")}
SHADES = LinearSegmentedColormap.from_list("chance", ["#f6c9a8", "#ffffff", "#a9cfe8"])
NEARLY = 0.99  # of those that are right in the end: the boundary is as good as there
SIDE = 121  # points along a side of the grid on which the network is drawn

Params = dict[str, Tensor]


class Tumours(NamedTuple):
    """Two measurements of each tumour, also in standard deviations from their means."""

    raw: Tensor  # [n, 2]
    x: Tensor  # [n, 2]
    y: Tensor  # [n]: 0. malignant, 1. benign


def tumours() -> Tumours:
    data = gd.datasets.breast_cancer(dtype=torch.float32)
    raw = data.x[:, [data.features.index(feature) for feature in FEATURES]]
    return Tumours(raw, (raw - raw.mean(dim=0)) / raw.std(dim=0), data.y.float())


def initial_params(key: Tensor) -> Params:
    first, last = gd.random.split(key)
    w1 = gd.random.normal(first, (2, HIDDEN))
    w2 = gd.random.normal(last, (HIDDEN,)) / HIDDEN**0.5
    return {"w1": w1, "b1": torch.zeros(HIDDEN), "w2": w2, "b2": torch.zeros(())}


def logit(params: Params, x: Tensor) -> Tensor:
    """Return the logarithm of the odds that a tumour is benign; 0 on the boundary."""
    return torch.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


def loss_fn(params: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return gd.losses.binary_cross_entropy_with_logits(logit(params, x), y)


def train(data: Tumours, epochs: int) -> Params:
    """Return the parameters before each step and after the last, a leading axis of T + 1."""
    init_key, order_key = gd.random.split(gd.random.key(0))
    step = gd.make_step(loss_fn, gd.adam())
    index = gd.epoch_batches(order_key, len(data.y), BATCH, epochs)
    init = step.init(initial_params(init_key))
    final, trajectory = gd.train(step, init, (data.x, data.y), index, LR, record="params")
    return gd.plot.path(trajectory.params, final.params)


class Sides(NamedTuple):
    """On which side of the boundary the tumours lie, over the steps."""

    right: list[int]  # how many lie on their own side, before each step and after the last
    last_change: int  # the step after which none changes sides any more; 0 if none ever does
    changed_late: int  # how many change sides after `nearly`

    @property
    def nearly(self) -> int:
        """The first step at which nearly as many are right as in the end."""
        return next(i for i, count in enumerate(self.right) if count >= NEARLY * self.right[-1])


def sides(benign: Tensor, y: Tensor) -> Sides:
    """Count from the sides [T + 1, n] on which the network sees the tumours."""
    right = (benign == (y > 0)).sum(dim=1).tolist()
    moves = benign[1:] != benign[:-1]
    steps = moves.any(dim=1).nonzero().flatten()
    last = int(steps[-1]) + 1 if len(steps) else 0
    found = Sides(right, last, 0)
    return found._replace(changed_late=int(moves[found.nearly :].any(dim=0).sum()))


def conclusion(found: Sides, samples: int) -> str:
    """Say when the boundary is nearly there, and what the rest of the steps change."""
    steps, at = len(found.right) - 1, found.nearly
    count, end = found.right[at], found.right[-1]
    opening = f"After {at:,} of {steps:,} steps {count} of {samples} tumours are on the right side"
    if end == count:
        rest = "and as many in the end"
    else:
        rest = f"and {abs(end - count)} {'more' if end > count else 'fewer'} in the end"
    if not found.changed_late:
        return f"{opening}, {rest}: none changes sides later"
    late = f"{found.changed_late} change sides later, the last at step {found.last_change:,}"
    return f"{opening}, {rest}: {late}"


class Panel:
    """Axes with the tumours, the chance that the network gives, and its boundary."""

    def __init__(self, ax: Axes, data: Tumours) -> None:
        self.ax, self.data = ax, data
        low, high = data.raw.amin(dim=0), data.raw.amax(dim=0)
        margin = 0.06 * (high - low)
        (left, bottom), (right, top) = (low - margin).tolist(), (high + margin).tolist()
        places = torch.linspace(left, right, SIDE), torch.linspace(bottom, top, SIDE)
        self.places = [place.numpy() for place in places]
        grid = torch.stack(torch.meshgrid(*places, indexing="xy"), dim=-1)
        self.grid = (grid - data.raw.mean(dim=0)) / data.raw.std(dim=0)
        extent = (left, right, bottom, top)
        empty = torch.zeros(SIDE, SIDE).numpy()
        self.chance = ax.imshow(
            empty, cmap=SHADES, vmin=0, vmax=1, extent=extent, origin="lower", aspect="auto"
        )
        for value, (name, color) in CLASSES.items():
            chosen = data.raw[data.y == value]
            ax.plot(*chosen.T, ".", color=color, markersize=4, markeredgewidth=0, label=name)
        ring = {"markerfacecolor": "none", "markeredgecolor": "black", "markeredgewidth": 0.7}
        (self.wrong,) = ax.plot([], [], "o", markersize=5, label="on the wrong side", **ring)
        self.boundary = None
        ax.set(xlabel=FEATURES[0], ylabel=FEATURES[1], xlim=(left, right), ylim=(bottom, top))

    def show(self, params: Params, step: int) -> None:
        """Show the network with these parameters."""
        odds = logit(params, self.grid)
        self.chance.set_data(odds.sigmoid().numpy())
        if self.boundary is not None:
            self.boundary.remove()
            self.boundary = None
        if odds.min() < 0 < odds.max():
            line = {"levels": [0.0], "colors": "black", "linewidths": 1.4}
            self.boundary = self.ax.contour(*self.places, odds.numpy(), **line)
        wrong = (logit(params, self.data.x) > 0) != (self.data.y > 0)
        self.wrong.set_data(*self.data.raw[wrong].T)
        said = f"step {step:,}: {int((~wrong).sum())} of {len(wrong)} right"
        self.ax.set_title(said, loc="left", fontsize=9)


def at(path: Params, step: int) -> Params:
    return {name: leaf[step] for name, leaf in path.items()}


def moments(steps: int, count: int) -> list[int]:
    """Return the start and up to count − 1 steps in a geometric sequence up to the last."""
    rest = torch.logspace(0, float(torch.tensor(steps).log10()), count - 1).round().long()
    return [0, *rest.unique().tolist()]


def draw_moments(path: Params, data: Tumours, chosen: Sequence[int]) -> Figure:
    figure = Figure((9, 5.8), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True, sharey=True)
    for ax, step in zip(axes.flat, chosen, strict=True):
        Panel(ax, data).show(at(path, step), step)
        ax.label_outer()
    entries = axes[0, 0].get_legend_handles_labels()
    figure.legend(*entries, loc="outside lower center", ncols=3, frameon=False)
    return figure


def show(card: Card, epochs: int, frames: int) -> None:
    data = tumours()
    path = train(data, epochs)
    benign = vmap(lambda params: logit(params, data.x) > 0)(path)
    found = sides(benign, data.y)
    steps = len(found.right) - 1
    print(f"{len(data.y)} tumours, {steps:,} steps of Adam on batches of {BATCH}, lr {LR:g}")
    right = {"right": found.right[found.nearly], "right in the end": found.right[-1]}
    late = {"changed late": found.changed_late, "last change": found.last_change}
    numbers = {"step": found.nearly, **right, **late}
    said = conclusion(found, len(data.y))
    card.picture("decision_boundary", draw_moments(path, data, moments(steps, 6)), said, numbers)

    figure = Figure((6, 5), layout="constrained")
    panel, times = Panel(figure.subplots(), data), moments(steps, frames)
    panel.ax.legend(loc="upper right", frameon=True, fontsize=8)
    card.film("decision_boundary", figure, lambda i: panel.show(at(path, times[i]), times[i]), len(times))
    card.table("right", ["step", "on the right side"], enumerate(found.right))


def main(argv: list[str] | None = None) -> int:
    torch.set_num_threads(1)  # on tensors this small, threads would only wait for one another
    with Card(__file__, "How does a network's boundary move while it trains?", argv) as card:
        show(card, *(12, 12) if card.fast else (60, 100))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
