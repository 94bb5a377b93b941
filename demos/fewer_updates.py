"""Ten times fewer updates on batches of ten: a tutorial's claim that it never verified, put to the test.

Source: "小批量随机梯度下降法和梯度下降法的再理解" (mini-batch stochastic gradient descent, and gradient
descent understood again; day 4 of a series on deep learning), CSDN blog, 2020, whose run and drawing are
those of `minibatch_1d.py`. It fits y = w·x under the loss ½ (w·x − y)², and says: "10,000 updates on
batches of ten need be no less accurate than 100,000 updates on single samples". Here both are made, with
noise on y and with many seeds, against samples seen and against time, beside what theory expects.

    python demos/fewer_updates.py [--out DIR] [--fast]
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from _card import Card
from matplotlib.figure import Figure
from torch import Tensor
from torch.func import vmap

import gdfunc as gd

BATCH = 10
TRUE_W, START = 5.0, 10.0
NOISE = 1.0  # σ: the standard deviation of y around w·x

# Each lr as a function of the samples seen before the update, and of the batch size.
CHOICES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "equal lr": lambda seen, batch: torch.full_like(seen, 0.2),
    "lr in proportion to the batch": lambda seen, batch: torch.full_like(seen, 0.02 * batch),
    "lr falling as 1/samples": lambda seen, batch: batch / (seen + 10),
}

Data = tuple[Tensor, Tensor]


def loss_fn(w: Tensor, batch: Data) -> Tensor:
    x, y = batch
    return 0.5 * (w * x - y).square().mean()


def draw(key: Tensor, n: int) -> Data:
    """Draw x from the standard normal distribution, and y = 5x + noise."""
    x_key, noise_key = gd.random.split(key)
    x = gd.random.normal(x_key, (n,))
    return x, TRUE_W * x + NOISE * gd.random.normal(noise_key, (n,))


class Accuracy(NamedTuple):
    """How far runs are from the true weight, by batch size."""

    seen: Tensor  # [G]: 10, 20, … samples
    errors: dict[int, Tensor]  # [S, 3, G]: w − 5 by seed and choice of lr
    rms: dict[int, Tensor]  # [3, G]: over the seeds
    expected: dict[int, Tensor]  # [3, G]: the same in theory


def learning_rates(samples: int, batch: int) -> Tensor:
    """lr by choice and update, [3, T]."""
    seen = torch.arange(0, samples, batch, dtype=torch.float32)
    return torch.stack([choice(seen, batch) for choice in CHOICES.values()])


def run_errors(data: Data, batch: int) -> Tensor:
    """w − 5 by seed and choice of lr, after 10, 20, … samples, [S, 3, G].

    Every seed has samples of its own, [S, n], in random order already, and goes through them once.
    """
    samples = data[0].shape[1]
    index = gd.epoch_batches(gd.random.key(0), samples, batch, epochs=1, shuffle=False)
    step = gd.make_step(loss_fn)

    def run(data: Data, lrs: Tensor) -> Tensor:
        init, every = torch.tensor(START), BATCH // batch
        final, trajectory = gd.train(step, init, data, index, lrs, record="params", every=every)
        return gd.plot.path(trajectory.params, final)[1:] - TRUE_W

    over_choices = vmap(run, in_dims=(None, 0))
    return vmap(over_choices, in_dims=(0, None))(data, learning_rates(samples, batch))


def root_mean_square(errors: Tensor) -> tuple[Tensor, Tensor]:
    """The root of the mean square over the seeds on dim 0, and its standard error."""
    squares = errors.double().square()
    root = squares.mean(dim=0).sqrt()
    return root, squares.std(dim=0) / math.sqrt(len(squares)) / (2 * root)


def expected_rms(samples: int, batch: int) -> Tensor:
    """√E (w − 5)² by choice of lr, after 10, 20, … samples, [3, G].

    e' = (1 − 2η + η² (1 + 2/B)) e + η² σ²/B,  e = E (w − 5)²,  as x is normal: E x² = 1, E x⁴ = 3

    For a constant η it settles at e = (η σ²/B) / (2 − η (1 + 2/B)).
    """
    square = np.full(len(CHOICES), (START - TRUE_W) ** 2)
    squares = []
    for lr in learning_rates(samples, batch).double().numpy().T:
        square = (1 - 2 * lr + lr**2 * (1 + 2 / batch)) * square + lr**2 * NOISE**2 / batch
        squares.append(square)
    every = BATCH // batch
    return torch.from_numpy(np.stack(squares, axis=1))[:, every - 1 :: every].sqrt()


def accuracy(samples: int, seeds: int) -> Accuracy:
    keys = gd.random.split(gd.random.key(2), seeds)
    # A seed at a time, for the memory: drawing takes many times the size of what is drawn.
    data = vmap(lambda key: draw(key, samples), chunk_size=1)(keys)
    errors = {batch: run_errors(data, batch) for batch in (1, BATCH)}
    return Accuracy(
        seen=torch.arange(BATCH, samples + 1, BATCH),
        errors=errors,
        rms={batch: root_mean_square(errors[batch])[0] for batch in errors},
        expected={batch: expected_rms(samples, batch) for batch in errors},
    )


def seconds_per_update(updates: int, repeats: int = 5) -> dict[int, float]:
    """Wall time of one update in a run of its own, by batch size: the median of some runs.

    The batch sizes take turns, so that whatever else the machine does meets both. The first turn only
    warms up.
    """
    times: dict[int, list[float]] = {1: [], BATCH: []}
    for _ in range(repeats + 1):
        for batch, taken in times.items():
            data = draw(gd.random.key(3), updates * batch)
            index = torch.arange(updates * batch).reshape(updates, batch)
            started = time.perf_counter()
            gd.train(gd.make_step(loss_fn), torch.tensor(START), data, index, 0.1)
            taken.append((time.perf_counter() - started) / updates)
    return {batch: statistics.median(taken[1:]) for batch, taken in times.items()}


def compare(batches: Tensor, singles: Tensor) -> tuple[float, float]:
    """The ratio of two rms errors over seeds [S], and the standard errors between them.

    Both runs of a seed saw the same samples, so their squared errors are compared seed by seed.
    """
    difference = batches.double().square() - singles.double().square()
    z = difference.mean() / (difference.std() / math.sqrt(len(difference)))
    return float(root_mean_square(batches)[0] / root_mean_square(singles)[0]), float(z)


def verdict(ratio: float, z: float) -> str:
    word = ("less" if ratio > 1 else "more") if abs(z) > 3 else "not clearly more or less"
    return f"{word} accurate (rms error × {ratio:.2f}, {z:+.1f} standard errors)"


def show(card: Card, samples: int, seeds: int, timed_updates: int) -> None:
    started = time.perf_counter()
    result = accuracy(samples, seeds)
    took = time.perf_counter() - started
    cost = seconds_per_update(timed_updates)
    seconds = {batch: result.seen / batch * cost[batch] for batch in cost}

    print(
        f"{samples // BATCH} updates on batches of ten are no less accurate than {samples} on"
        f" single samples ({seeds} seeds, σ = {NOISE})"
    )
    print(f"{'':29}                        rms of w − 5 after all samples   until it is < 1")
    print(f"{'choice of lr':29} batch updates time, s  measured            expected  samples  time, s")
    for i, choice in enumerate(CHOICES):
        for batch, errors in result.errors.items():
            rms, standard_error = (float(value) for value in root_mean_square(errors[:, i, -1]))
            reached = (result.rms[batch][i] < 1).nonzero()[:1, 0]
            until = [
                f"{float(x[reached]):.4g}" if len(reached) else "never"
                for x in (result.seen, seconds[batch])
            ]
            print(
                f"{choice:29} {batch:5} {samples // batch:7} {seconds[batch][-1]:7.3f}"
                f"  {rms:.5f} ± {standard_error:.5f}  {result.expected[batch][i, -1]:8.5f}"
                f" {until[0]:>8} {until[1]:>8}"
            )
    single, ten = (1e6 * cost[batch] for batch in (1, BATCH))
    print(f"Time is updates × time per update: {single:.0f} µs on one sample, {ten:.0f} µs on ten;")
    print(f"on this machine, the median of 5 runs of {timed_updates} updates each. The runs behind the")
    print(f"errors were all made at once, under vmap, in {took:.0f} s.")
    as_many_updates = int((result.seen == samples // BATCH).nonzero())
    for i, choice in enumerate(CHOICES):
        batches, singles = (result.errors[batch][:, i] for batch in (BATCH, 1))
        print(f"With {choice}, batches of ten are")
        print(f"  after as many samples: {verdict(*compare(batches[:, -1], singles[:, -1]))}")
        print(f"  after as many updates: {verdict(*compare(batches[:, -1], singles[:, as_many_updates]))}")
    print(f"(As many updates on ten samples took {ten / single:.2f} × the time of those on one.)")

    compared = {
        choice: compare(result.errors[BATCH][:, i, -1], result.errors[1][:, i, -1])
        for i, choice in enumerate(CHOICES)
    }
    numbers = {choice: {"ratio": ratio, "standard errors": z} for choice, (ratio, z) in compared.items()}
    card.picture("accuracy", draw_accuracy(result), conclusion(compared), numbers)
    columns = {
        f"{what} of batch {batch} with {choice}": values[batch][i]
        for i, choice in enumerate(CHOICES)
        for batch in cost
        for what, values in {"rms": result.rms, "expected rms": result.expected}.items()
    }
    card.table("accuracy", ["samples", *columns], zip(result.seen, *columns.values(), strict=True))
    card.table("timing", ["batch", "seconds_per_update"], cost.items())


def conclusion(compared: dict[str, tuple[float, float]]) -> str:
    """Say for each choice of lr how the rms error changes, from the ratio and the standard errors."""
    parts = []
    for choice, (ratio, z) in compared.items():
        factor = max(ratio, 1 / ratio)
        change = f"{factor:.2g} times" if factor > 2 else f"{abs(ratio - 1):.0%}"
        word = "larger" if ratio > 1 else "smaller"
        change = f"{change} {word}" if abs(z) > 3 else "not clearly changed"
        parts.append(f"{change} with {choice}")
    return f"With a tenth of the updates, on ten samples each, the error is {', '.join(parts)}"


def draw_accuracy(result: Accuracy) -> Figure:
    # Points that lie evenly on a logarithmic axis.
    shown = np.unique(np.geomspace(1, len(result.seen), 200).astype(int)) - 1
    figure = Figure((10, 4), layout="constrained")
    axes = figure.subplots(1, len(CHOICES), sharey=True)
    for i, (ax, choice) in enumerate(zip(axes, CHOICES, strict=True)):
        gd.plot.plot_curves(
            [rms[i, shown] for rms in result.rms.values()],
            x=result.seen[shown],
            ax=ax,
            labels=[f"{result.seen[-1] // batch:,} updates on {batch}" for batch in result.rms],
            xlabel="samples seen",
            ylabel="",
            log_x=True,
        )
        # Single samples are wide and pale, because both curves coincide in one of the panels.
        singles = [ax.get_lines()[0], *ax.get_legend().get_lines()[:1]]
        for line in singles:
            line.set(linewidth=5, alpha=0.45)
        for expected in result.expected.values():
            ax.plot(result.seen[shown], expected[i, shown], color="black", linewidth=0.6, zorder=5)
        if i:
            ax.get_legend().remove()
        ax.set_title(choice, loc="left", fontsize=9, color="0.35")
    axes[0].set_ylabel(f"rms of w − 5 over {len(result.errors[1])} seeds\n(thin: theory)")
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    with Card(__file__, "Are a tenth of the updates, on batches of ten, as accurate?", argv) as card:
        if card.fast:
            show(card, samples=1_000, seeds=10, timed_updates=100)
        else:
            show(card, samples=100_000, seeds=100, timed_updates=1_000)
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)  # steps this small keep one thread busy; more of them wait for one another
    raise SystemExit(main())
