"""The cost of privacy: accuracy against noise at several clipping norms, and the ε of an accountant.

Softmax regression on digits by DP-SGD: batches by Poisson sampling, every sample's gradient clipped,
Gaussian noise on the sum. One vmap runs every noise, learning rate and seed. Two findings to look for:

- Small clipping norms with larger learning rates do as well as middling ones: what counts is the noise
  beside the signal. Large norms are worse: the noise grows with the norm, and gradients shorter than it do
  not. The norm that follows the median of the gradients' norms (Andrew et al.) finds its place unasked.
- Accuracy falls with the noise, and so does ε. If Opacus is installed its accountant gives ε at δ = 10⁻⁵
  for the plan's own sampling rate; without it the table has the noise alone.

For every point the best of some learning rates is shown, by its accuracy on the test set. That choice, and
the accuracies themselves, are not private, nor is the random generator cryptographic: this compares, it
does not release. Without scikit-learn, the months in which the S&P 500 rose stand in for the digits.

Sources: M. Abadi et al., "Deep learning with differential privacy", 2016; G. Andrew, O. Thakkar,
H. McMahan, S. Ramaswamy, "Differentially private learning with adaptive clipping", 2021.

    python demos/private_descent.py [--out DIR] [--fast]
"""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from _card import Card
from matplotlib.figure import Figure
from torch import Tensor
from torch.func import vmap

import gdfunc as gd

DELTA = 1e-5
RATE = 0.1
STEPS = 200
NOISES = (0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0)
MAX_NORMS = (0.1, 1.0, 3.0, 10.0)
JUDGED = NOISES[-1]  # the noise at which the norms are compared
ALIKE = 0.03  # of the accuracy: norms that cost hardly more than the best
# Learning rates, over the clipping norm once that is smaller than a gradient is long.
LRS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
SEEDS = 4
COLORS = ("#56B4E9", "#0072B2", "#009E73", "#D55E00", "black")
# Dashes, markers, and signs before the names, because the curves nearly coincide.
LOOKS = (("-", "o", "● "), ("--", "s", "■ "), ("-.", "^", "▲ "), ("-", "", ""), ("-", "D", "◆ "))


class Task(NamedTuple):
    name: str
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: int


def load() -> Task:
    """Split the digits, or, without scikit-learn, the months by whether the index rose."""
    try:
        data, name = gd.datasets.digits(dtype=torch.float32), "digits"
        x, y = data.x, data.y
    except ModuleNotFoundError as error:
        print(f"months in place of digits: {error}")
        data, name = gd.datasets.stocks(dtype=torch.float32), "months of the S&P 500"
        x, y = 10 * data.x, (data.y > 0).long()
    # Gradients of a sample are as long as its inputs: known bounds on them make known norms.
    x = torch.cat([x, torch.ones(len(x), 1)], dim=1)
    order = gd.random.permutation(gd.random.key(0), len(y))
    train, test = order[len(y) // 4 :], order[: len(y) // 4]
    return Task(name, (x[train], y[train]), (x[test], y[test]), int(y.max()) + 1)


def loss_fn(params: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return gd.losses.cross_entropy(batch[0] @ params, batch[1])


def accuracy(params: Tensor, data: tuple[Tensor, Tensor]) -> Tensor:
    return ((data[0] @ params).argmax(dim=-1) == data[1]).double().mean()


def private_runs(
    task: Task, plan: gd.privacy.PoissonPlan, max_norm: Any, lrs: Tensor, seeds: int
) -> Tensor:
    """Train with every noise, learning rate and seed at once: test accuracy [noises, lrs, seeds]."""
    data, size = gd.privacy.pad(task.train), len(task.train[1])
    start = torch.zeros(task.train[0].shape[1], task.classes)

    def run(noise: Tensor, lr: Tensor, key: Tensor) -> Tensor:
        step = gd.privacy.make_private_step(
            loss_fn, key=key, max_norm=max_norm, noise_multiplier=noise, divisor=RATE * size
        )
        final, _ = gd.train(step, step.init(start), data, plan.index, lr, record=())
        return accuracy(final.params, task.test)

    # One plan for all: seeds differ in their noise.
    over_seeds = vmap(run, (None, None, 0))
    over_lrs = vmap(over_seeds, (None, 0, None))
    return vmap(over_lrs, (0, None, None))(
        torch.tensor(NOISES), lrs, gd.random.split(gd.random.key(2), seeds)
    )


def without_privacy(task: Task, plan: gd.privacy.PoissonPlan) -> float:
    """The best test accuracy of the same steps, neither clipped nor noisy."""
    step = gd.privacy.make_private_step(
        loss_fn, key=gd.random.key(0), max_norm=1e6, noise_multiplier=0.0, divisor=RATE * len(task.train[1])
    )
    start = torch.zeros(task.train[0].shape[1], task.classes)

    def run(lr: Tensor) -> Tensor:
        data = gd.privacy.pad(task.train, plan)
        final, _ = gd.train(step, step.init(start), data, plan.index, lr, record=())
        return accuracy(final.params, task.test)

    return float(vmap(run)(torch.tensor(LRS)).max())


def epsilons(plan: gd.privacy.PoissonPlan) -> list[float] | None:
    """The ε of each noise by Opacus' accountant, or None without it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its imports
            from opacus.accountants import RDPAccountant
    except ImportError:
        return None
    found = []
    for noise in NOISES:
        accountant = RDPAccountant()
        accountant.history = gd.privacy.history(plan, noise)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the best order lies at the end of its list
            found.append(float(accountant.get_epsilon(delta=DELTA)))
    return found


class Curve(NamedTuple):
    """One clipping norm: for each noise the accuracies of the best learning rate."""

    name: str
    accuracies: Tensor  # [noises, seeds]
    lrs: list[float]


def best_of(name: str, accuracies: Tensor, lrs: Tensor) -> Curve:
    best = accuracies.mean(dim=2).argmax(dim=1)
    return Curve(name, accuracies[torch.arange(len(best)), best], lrs[best].tolist())


def compare(task: Task, plan: gd.privacy.PoissonPlan, seeds: int) -> list[Curve]:
    curves = []
    for max_norm in MAX_NORMS:
        lrs = torch.tensor(LRS) / min(1.0, max_norm)
        curves.append(
            best_of(f"clipped to {max_norm:g}", private_runs(task, plan, max_norm, lrs, seeds), lrs)
        )
    # The count of the unclipped is released too: its noise must be more than half of any multiplier here.
    follow = gd.privacy.Quantile(start=1.0, noise=2.0 * max(NOISES))
    lrs = torch.tensor(LRS)
    curves.append(best_of("following the median", private_runs(task, plan, follow, lrs, seeds), lrs))
    return curves


def conclusion(noise: float, costs: dict[float, float], following: float) -> str:
    """Compare what clipping norms cost at a noise, and the norm that follows the median, in accuracy."""
    alike = [norm for norm, cost in costs.items() if cost < min(costs.values()) + ALIKE]
    low, high = (f"{100 * cost(costs[norm] for norm in alike):.0f}" for cost in (min, max))
    points = f"{low} to {high} points" if low != high else f"{low} points"
    names = (
        f"norms from {min(alike):g} to {max(alike):g} cost" if len(alike) > 1 else f"to {alike[0]:g} costs"
    )
    others = [f"{norm:g} costs {100 * cost:.0f}" for norm, cost in costs.items() if norm not in alike]
    parts = [f"Clipping {names} {points} of accuracy at σ = {noise:g}", *others]
    return ", ".join(parts) + f"; following the median costs {100 * following:.0f}"


def costs_at(noise: float, curves: list[Curve], best: float) -> tuple[dict[float, float], float]:
    """Compute the cost of each clipping norm at a noise, and of the one that follows the median.

    The costs are medians over the seeds, as drawn.
    """
    at = NOISES.index(noise)
    *fixed, following = (best - float(curve.accuracies[at].quantile(0.5)) for curve in curves)
    return dict(zip(MAX_NORMS, fixed, strict=True)), following


def report(curves: list[Curve], epsilon: list[float] | None) -> None:
    print(f"\n{'noise':>5} {'ε at δ = 1e-5':>14}  test accuracy, % (learning rate)")
    print(" " * 22 + "".join(f"{curve.name:>22}" for curve in curves))
    for i, noise in enumerate(NOISES):
        spent = f"{epsilon[i]:14.2f}" if epsilon else f"{'–':>14}"
        cells = (f"{100 * float(c.accuracies[i].mean()):.1f} ({c.lrs[i]:.3g})" for c in curves)
        print(f"{noise:5} {spent}  " + "".join(f"{cell:>22}" for cell in cells))


def draw(task: Task, curves: list[Curve], epsilon: list[float] | None, best: float) -> Figure:
    """Draw accuracy over noise, and ε above it where that is known."""
    figure = Figure(figsize=(7.2, 5), layout="constrained")
    ax = figure.subplots()
    gd.plot.plot_curves(
        {sign + c.name: 100 * c.accuracies.mT for c, (*_, sign) in zip(curves, LOOKS, strict=True)},
        x=torch.tensor(NOISES),
        ax=ax,
        colors=COLORS,
        label_lines=True,
        band=(0.0, 1.0),
        xlabel=f"noise multiplier σ, on {len(task.train[1]):,} {task.name} in batches at rate {RATE}",
        ylabel="test accuracy, %",
        log_x=True,
        log_y=False,
    )
    for line, (dashes, marker, _) in zip(ax.get_lines(), LOOKS, strict=False):
        line.set(linestyle=dashes, marker=marker, markersize=4)
    ax.axhline(100 * best, color="black", linewidth=0.8)
    place: dict[str, Any] = {"xytext": (0, 4), "textcoords": "offset points", "fontsize": "small"}
    ax.annotate("neither clipped nor noisy", (NOISES[0], 100 * best), **place)
    ax.set_ylim(top=100)
    seeds = curves[0].accuracies.shape[1]
    said = f"median, and least to most of {seeds} seeds; each at the best learning rate, by the test set"
    ax.get_legend().get_texts()[0].set_text(said)
    ax.set_xticks(NOISES, [f"{noise:g}" for noise in NOISES])
    ax.set_xticks((), minor=True)
    if epsilon:
        top = ax.secondary_xaxis("top")
        top.set_xticks(NOISES, [f"{spent:.2g}" for spent in epsilon])
        top.set_xticks((), minor=True)
        top.set_xlabel(f"ε at δ = {DELTA:g}: the less, the more private")
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    with Card(__file__, "What does privacy cost, and does the clipping norm matter?", argv) as card:
        steps, seeds = (20, 2) if card.fast else (STEPS, SEEDS)
        task = load()
        plan = gd.privacy.poisson_batches(gd.random.key(1), len(task.train[1]), RATE, steps)
        sizes = (plan.index < len(task.train[1])).sum(dim=1)
        print(f"{len(task.train[1])} {task.name}; {steps} batches at rate {RATE}: ", end="")
        print(f"{int(sizes.min())} to {int(sizes.max())} samples")
        best = without_privacy(task, plan)
        curves = compare(task, plan, seeds)
        epsilon = epsilons(plan)
        report(curves, epsilon)
        note = "" if epsilon else " Opacus is not installed: no ε."
        print(f"Without clipping and noise: {100 * best:.1f} %.{note}")

        costs, following = costs_at(JUDGED, curves, best)
        numbers = {"noise": JUDGED, "costs": costs, "following": following}
        figure = draw(task, curves, epsilon, best)
        card.picture("accuracy", figure, conclusion(JUDGED, costs, following), numbers)
        spent = epsilon or [""] * len(NOISES)
        card.table(
            "accuracy",
            ("clipping", "noise", "epsilon", "lr", "mean test accuracy"),
            (
                (curve.name, noise, spent[i], curve.lrs[i], curve.accuracies[i].mean())
                for curve in curves
                for i, noise in enumerate(NOISES)
            ),
        )
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)  # on tensors this small, threads would only wait for one another
    raise SystemExit(main())
