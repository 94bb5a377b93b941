"""Which directions descent leaves unfinished, and how momentum changes that: theory under measured lines.

The progress of diabetes in 442 patients is regressed on ten measurements, all of mean 0 and variance 1, by
gradient descent on all of the data. In the eigenvectors qᵢ of the Hessian, with eigenvalues λᵢ, the error
eₜ = wₜ − w* falls apart into ten numbers that never meet:

    descent      qᵢ·eₜ = (1 − lr λᵢ)ᵗ qᵢ·e₀
    heavy ball   qᵢ·eₜ₊₁ = (1 + β − lr λᵢ) qᵢ·eₜ − β qᵢ·eₜ₋₁,  e₋₁ = e₀

Both methods run with their best constants: lr = 2/(L + μ) for descent, Polyak's for the heavy ball. A
second picture counts the steps that make the error a million times smaller, for several condition numbers
κ = L/μ: a ridge penalty ρ/2 |w|² makes them of the same data, with eigenvalues λᵢ + ρ.

Sources: G. Goh, "Why momentum really works", Distill, 2017, which draws this for a made-up quadratic;
B. T. Polyak, "Some methods of speeding up the convergence of iteration methods", 1964. The data are
scikit-learn's.

    python demos/condition_number.py [--out DIR] [--fast]
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from _card import Card
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor

import gdfunc as gd

SMALL = 1e-6  # the error that counts as finished, over the first
AGREES = 1e-10  # the largest difference between run and theory, over the first error
NAMES = {"s1": "cholesterol", "s2": "LDL", "s3": "HDL", "s4": "cholesterol/HDL", "s5": "triglycerides"}
QUESTION = "Which directions does gradient descent leave unfinished, and what does momentum change?"
COUNT_QUESTION = "How does the number of steps grow with the condition number?"


class Quadratic(NamedTuple):
    """A regression in the eigenvectors of its Hessian."""

    features: tuple[str, ...]
    data: tuple[Tensor, Tensor]
    eigenvalues: Tensor  # increasing, [D]
    eigenvectors: Tensor  # in the columns, [D, D]
    correlations: Tensor  # mean x·y, [D]

    def minimizer(self, ridge: float | Tensor = 0.0) -> Tensor:
        return self.eigenvectors @ (self.eigenvectors.mT @ self.correlations / (self.eigenvalues + ridge))


class Constants(NamedTuple):
    """The best constants of a method, and the factor of the error a step that they make."""

    lr: Tensor
    momentum: Tensor
    rate: Tensor


def descent(low: Tensor, high: Tensor) -> Constants:
    """The best lr of gradient descent for eigenvalues from low to high."""
    return Constants(2 / (high + low), torch.zeros_like(low), (high - low) / (high + low))


def polyak(low: Tensor, high: Tensor) -> Constants:
    """The best constants of the heavy ball for eigenvalues from low to high."""
    low, high = low.sqrt(), high.sqrt()
    rate = (high - low) / (high + low)
    return Constants(4 / (high + low).square(), rate.square(), rate)


METHODS: dict[str, Callable[[Tensor, Tensor], Constants]] = {"descent": descent, "heavy ball": polyak}


def diabetes() -> Quadratic:
    data = gd.datasets.diabetes()
    x, y = (column - column.mean(dim=0) for column in (data.x, data.y))
    x, y = x / x.std(dim=0, correction=0), y / y.std(correction=0)
    values, vectors = torch.linalg.eigh(x.mT @ x / len(x))
    return Quadratic(data.features, (x, y), values, vectors, x.mT @ y / len(x))


def measure(quadratic: Quadratic, constants: Constants, steps: int, ridge: float | Tensor = 0.0) -> Tensor:
    """Run on the data, and return the error along each eigenvector after 0 … T steps, [T + 1, D]."""

    def loss_fn(w: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return 0.5 * (x @ w - y).square().mean() + 0.5 * ridge * w.square().sum()

    step = gd.methods.heavy_ball(loss_fn, constants.momentum)
    start = torch.zeros_like(quadratic.correlations)
    index = gd.full_batch(len(quadratic.data[1]), steps)
    final, trajectory = gd.train(
        step, step.init(start), quadratic.data, index, constants.lr, record="params"
    )
    path = gd.plot.path(trajectory.params, final.params)
    return (path - quadratic.minimizer(ridge)) @ quadratic.eigenvectors


def expect(eigenvalues: Tensor, constants: Constants, start: Tensor, steps: int) -> Tensor:
    """The same in theory: from errors [D] at the start, by one recursion for each eigenvalue."""
    lr, momentum, _ = constants
    if momentum == 0:
        powers = torch.arange(steps + 1)[:, None]
        return start * (1 - lr * eigenvalues) ** powers
    errors = [start, start * (1 - lr * eigenvalues)]
    while len(errors) <= steps:
        errors.append((1 + momentum - lr * eigenvalues) * errors[-1] - momentum * errors[-2])
    return torch.stack(errors[: steps + 1])


def disagreement(measured: Tensor, expected: Tensor) -> float:
    """The largest difference, over the length of the first error."""
    return float((measured - expected).abs().max() / measured[0].norm())


def steps_until(errors: Tensor, small: float = SMALL) -> float:
    """Count the steps after which the error [T + 1, D] stays small, over the first; inf if it does not."""
    large = torch.nonzero(~(errors.norm(dim=-1) < small * errors[0].norm())).flatten()
    count = int(large[-1]) + 1 if len(large) else 0
    return count if count < len(errors) else math.inf


def exponent(conditions: Sequence[float], counts: Sequence[float]) -> float:
    """The slope of the straight line through the counts on doubly logarithmic axes."""
    return float(np.polyfit(np.log(conditions), np.log(counts), 1)[0])


class Counts(NamedTuple):
    """Steps until the error is small, by condition number."""

    conditions: list[float]
    measured: dict[str, list[float]]  # by method
    expected: dict[str, list[float]]


def count_steps(quadratic: Quadratic, points: int, largest: float = math.inf) -> Counts:
    """Count for ridges that spread κ evenly on a logarithmic axis, from 3 to that of the data at most."""
    low, high = quadratic.eigenvalues[0], quadratic.eigenvalues[-1]
    ends = math.log10(3), math.log10(min(largest, float(high / low)))
    conditions = torch.logspace(*ends, points, dtype=low.dtype)
    ridges = ((high - conditions * low) / (conditions - 1)).clamp(min=0)
    measured, expected = {}, {}
    for name, method in METHODS.items():
        # Double roots delay the heavy ball: its error falls as t·rateᵗ.
        slowest = method(low + ridges.min(), high + ridges.min()).rate
        steps = int(1.5 * math.log(SMALL) / math.log(slowest))

        def run(ridge: Tensor, method=method, steps=steps) -> Tensor:
            return measure(quadratic, method(low + ridge, high + ridge), steps, ridge)

        paths = gd.sweep(run, gd.grid(ridge=ridges)).outputs
        measured[name] = [steps_until(path) for path in paths]
        expected[name] = [
            steps_until(
                expect(quadratic.eigenvalues + ridge, method(low + ridge, high + ridge), path[0], steps)
            )
            for ridge, path in zip(ridges, paths, strict=True)
        ]
    return Counts(conditions.tolist(), measured, expected)


def direction(quadratic: Quadratic, which: int) -> str:
    """Name the two measurements that an eigenvector holds most of, and how: sum or difference."""
    vector = quadratic.eigenvectors[:, which]
    first, second = vector.abs().topk(2).indices.tolist()
    names = [NAMES.get(quadratic.features[i], quadratic.features[i]) for i in (first, second)]
    return f"{names[0]} {'with' if vector[first] * vector[second] > 0 else 'against'} {names[1]}"


def conclusion(left: dict[str, float], finished: float, flattest: str, disagrees: float) -> str:
    """Say how much each method has left when the heavy ball is done, and whether theory agrees.

    left: the largest error along an eigenvector after `finished` steps, over the first error.
    """
    plain, momentum = left["descent"], left["heavy ball"]
    agrees = f"{'as theory says' if disagrees < AGREES else 'unlike theory'}, to {bound(disagrees)}"
    if plain > 100 * momentum:
        return (
            f"When momentum has finished every direction (to {momentum:.0e}, {finished:,g} steps), descent"
            f" has {plain:.0%} of its error left in {flattest}: {agrees}"
        )
    return (
        f"When momentum has finished every direction (to {momentum:.0e}, {finished:,g} steps), descent is"
        f" not far behind, at {plain:.0e}: {agrees}"
    )


def bound(value: float) -> str:
    """The next power of ten: digits of rounding errors mean nothing."""
    return f"{10.0 ** math.ceil(math.log10(value)):.0e}" if value else "the last bit"


def count_conclusion(exponents: dict[str, float], last: dict[str, float], kappa: float, equal: str) -> str:
    """Say as which power of κ the steps grow, from the powers and the counts at the largest κ."""
    plain, momentum = exponents["descent"], exponents["heavy ball"]
    word = "only as" if momentum < 0.75 * plain else "as fast, as"
    return (
        f"The steps grow as κ^{plain:.2f}, with momentum {word} κ^{momentum:.2f}: {last['descent']:,g}"
        f" against {last['heavy ball']:,g} at κ = {kappa:.0f}; theory counts the same in {equal}"
    )


def last_two(errors: Tensor) -> Tensor:
    """The size of two errors in a row, √½(eₜ² + eₜ₋₁²), over the first: no zeros where a run swings."""
    return (errors[1:].square() + errors[:-1].square()).div(2).sqrt() / errors[0].norm()


def draw_errors(quadratic: Quadratic, runs: dict[str, tuple[Tensor, Tensor]], finished: float) -> Figure:
    """Draw the error along each eigenvector: measured thick and light, theory thin and black."""
    figure = Figure((10, 5), layout="constrained")
    axes = figure.subplots(1, len(runs), sharey=True)
    values = quadratic.eigenvalues
    scale = ScalarMappable(LogNorm(float(values[0]) / 1.8, float(values[-1])), "plasma_r")
    for ax, (name, (measured, expected)) in zip(axes, runs.items(), strict=True):
        sizes = last_two(measured)
        for i, value in enumerate(values):
            ax.plot(sizes[:, i], color=scale.to_rgba(value), linewidth=4, alpha=0.7)
        ax.plot(last_two(expected), color="black", linewidth=0.6, zorder=5)
        ax.axvline(finished, color="0.4", linestyle=":", linewidth=1.2, zorder=1)
        ax.set(yscale="log", ylim=(1e-9, 8), xlim=(0, len(sizes)), xlabel="steps")
        ax.set_title(name, loc="left", fontsize=11)
    axes[0].set_ylabel("error along an eigenvector, over the first error")
    sizes = last_two(runs["descent"][0])
    lower, upper = sorted((0, -1), key=lambda i: float(sizes[-1, i]))
    words = {0: f"flattest: {direction(quadratic, 0)}", -1: f"steepest: {direction(quadratic, -1)}"}
    # Because the lines fall, there is room above the left end and below the right end of a text.
    for i, at, shift, side, to in ((upper, 8, 1.5, "bottom", "left"), (lower, -8, 0.6, "top", "right")):
        x, y = at % len(sizes), float(sizes[at, i]) * shift
        paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        axes[0].text(x, y, words[i], ha=to, va=side, fontsize=9, bbox=paper)
    bar = figure.colorbar(scale, ax=axes, aspect=30, pad=0.01, label="eigenvalue λ (thin black: theory)")
    bar.ax.tick_params(labelsize=9)
    return figure


def draw_counts(counts: Counts) -> Figure:
    figure = Figure((7.2, 5), layout="constrained")
    ax = figure.subplots()
    kappa = np.array(counts.conditions)
    for name, colour, power in (("descent", "#D55E00", 1.0), ("heavy ball", "#0072B2", 0.5)):
        ax.plot(kappa, counts.measured[name], "o", color=colour, markersize=9, alpha=0.6)
        ax.plot(kappa, counts.expected[name], color="black", linewidth=0.8)
        guide = -math.log(SMALL) / 2 * kappa**power
        ax.plot(kappa, guide, color="0.5", linestyle=":", linewidth=1.4)
        sign = "κ" if power == 1 else "√κ"
        place = len(kappa) // 2
        for text, y, shade, side in (
            (name, counts.measured[name][place] * 1.35, colour, "right"),
            (f"½ ln 10⁶ {sign}", guide[place] / 1.35, "0.4", "left"),
        ):
            low = "bottom" if side == "right" else "top"
            ax.text(kappa[place], y, text, color=shade, ha=side, va=low, fontsize=11)
    ax.set(xscale="log", yscale="log", xlabel="condition number κ = L/μ")
    ax.set_ylabel(f"steps until the error is {SMALL:g} of the first")
    ax.set_title("circles: runs on the data, line: theory", loc="right", fontsize=9, color="0.35")
    return figure


def show_errors(card: Card, quadratic: Quadratic) -> None:
    low, high = quadratic.eigenvalues[0], quadratic.eigenvalues[-1]
    rate = float(polyak(low, high).rate)
    steps = int(2.2 * math.log(SMALL) / math.log(rate))
    runs = {}
    for name, method in METHODS.items():
        measured = measure(quadratic, method(low, high), steps)
        runs[name] = (
            measured,
            expect(quadratic.eigenvalues, method(low, high), measured[0], steps),
        )
    finished = steps_until(runs["heavy ball"][0])
    at = int(min(finished, steps))
    left = {name: (measured[at].abs() / measured[0].norm()) for name, (measured, _) in runs.items()}
    print(f"Errors along the eigenvectors after {at} steps, over the first error; κ = {high / low:.0f}")
    print("eigenvalue  at the start  descent  heavy ball  mostly (less than 1e-12 is rounding)")
    first = runs["descent"][0][0].abs() / runs["descent"][0][0].norm()
    rows = []
    for i, value in enumerate(quadratic.eigenvalues):
        row = (float(value), float(first[i]), *(float(errors[i]) for errors in left.values()))
        cells = ["< 1e-12" if cell < 1e-12 else f"{cell:.0e}" for cell in row[2:]]
        print(f"{row[0]:10.4f}  {row[1]:12.4f}  {cells[0]:>7}  {cells[1]:>10}  {direction(quadratic, i)}")
        rows.append((*row, direction(quadratic, i)))
    largest = {name: float(errors.max()) for name, errors in left.items()}
    disagrees = max(disagreement(*run) for run in runs.values())
    said = conclusion(largest, finished, direction(quadratic, int(left["descent"].argmax())), disagrees)
    numbers = {"left": largest, "steps": finished, "disagreement": disagrees, "κ": high / low}
    card.picture("errors", draw_errors(quadratic, runs, at), said, numbers)
    card.table("errors", ["eigenvalue", "start", *runs, "mostly"], rows)


def show_counts(card: Card, quadratic: Quadratic, points: int, largest: float) -> None:
    counts = count_steps(quadratic, points, largest)
    powers = {name: exponent(counts.conditions, values) for name, values in counts.measured.items()}
    pairs = [(counts.measured[name], counts.expected[name]) for name in METHODS]
    same = sum(a == b for measured, expected in pairs for a, b in zip(measured, expected, strict=True))
    last = {name: values[-1] for name, values in counts.measured.items()}
    equal = f"{same} of {len(METHODS) * points} runs"
    said = count_conclusion(powers, last, counts.conditions[-1], equal)
    numbers = {"powers": powers, "steps": last, "same in theory": same}
    card.picture("steps", draw_counts(counts), said, numbers, question=COUNT_QUESTION)
    columns = {
        f"{name}, {kind}": values[name]
        for name in METHODS
        for kind, values in (("measured", counts.measured), ("expected", counts.expected))
    }
    card.table("steps", ["κ", *columns], zip(counts.conditions, *columns.values(), strict=True))


def main(argv: Sequence[str] | None = None) -> int:
    with Card(__file__, QUESTION, argv) as card:
        quadratic = diabetes()
        show_errors(card, quadratic)
        points, largest = (4, 50) if card.fast else (16, math.inf)
        show_counts(card, quadratic, points, largest)
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)  # on tensors this small, threads would only wait for one another
    raise SystemExit(main())
