"""Mini-batches on one weight: a tutorial's run again, and its two unproved claims put to the test.

Source: "小批量随机梯度下降法和梯度下降法的再理解" (mini-batch stochastic gradient descent, and gradient
descent understood anew; day 4 of a series on deep learning), CSDN blog, 2020. It fits y = w·x to 500
rows, ten rows an update, under the loss ½ (w·x − y)², and prints w after every update until it is
5.0000. It numbers the updates by their first row (1, 11, 21, …) and says that this is wrong; here they
are counted: 1, 2, …, 50. Its data are not given. Those here have the same true w = 5, no noise (which
its last line, 5.0000, implies), and a start that makes the first line like its 8.7910.

The run is made on the rows in order, then shuffled, then with three weights and a bias, then with an
nn.Module. After that come the claims:

1. "At one w the gradients of different samples are similar", so that the mean of ten may stand for them
   all. Drawn there by hand. Tested here with noise on y: without it every sample has its minimum at the
   same w, and no gradient can point the wrong way; with it each sample has a minimum of its own.
2. "10,000 updates on batches of ten need be no less accurate than 100,000 updates on single samples",
   of which it says that it was never verified. Here it is, with many seeds, against samples seen and
   against time.

    python demos/minibatch_1d.py [--out DIR] [--fast]
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.func import vmap

import gdfunc as gd

ROWS, BATCH, LR = 500, 10, 0.25
TRUE_W, START = 5.0, 10.0
TRUE_WEIGHTS, TRUE_BIAS = (5.0, -3.0, 2.0), 1.0
SEED = 6  # of the rows: the first update is like the tutorial's
NOISE = 1.0  # σ: the standard deviation of y around w·x, where there is noise
DISTANCES = (3.0, 1.0, 0.3, 0.1, 0.03, 0.01)  # from the optimum, in the table of claim 1

# Claim 2: lr as a function of the samples seen before the update, and of the batch size.
CHOICES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "equal lr": lambda seen, batch: torch.full_like(seen, 0.2),
    "lr in proportion to the batch": lambda seen, batch: torch.full_like(seen, 0.02 * batch),
    "lr falling as 1/samples": lambda seen, batch: batch / (seen + 10),
}

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


def one_weight(*, shuffle: bool) -> Tensor:
    """The weight after each update, [50]."""
    data = draw(gd.random.key(SEED), ROWS)
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


def show_tutorial(out: Path) -> bool:
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
    ax = gd.plot.plot_curves(
        list(distances.values()),
        x=[torch.arange(1, len(distance) + 1) for distance in distances.values()],
        labels=list(distances),
        xlabel="update",
        ylabel="distance from the true weights",
    )
    save(ax.figure, out / "tutorial.png")
    # One epoch of one weight is shorter than two of three: nan fills the columns up.
    columns = nn.utils.rnn.pad_sequence(list(distances.values()), padding_value=math.nan).T
    save_table(out / "tutorial.csv", ["update", *distances], [np.arange(1, len(plane) + 1), *columns])
    return by_hand < 1e-5 and all(float(distance[-1]) < 5e-5 for distance in distances.values())


# Claim 1: at one w the gradients of different samples are similar.


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


def show_claim_1(out: Path, samples: int) -> None:
    noisy, clean = draw(gd.random.key(1), samples, NOISE), draw(gd.random.key(1), samples)
    curve, clean_curve = (spread(torch.logspace(-2, 1, 61), data) for data in (noisy, clean))
    table = spread(torch.tensor(DISTANCES), noisy)

    print(f"\nClaim 1: at one w the gradients of samples are similar ({samples} samples, σ = {NOISE})")
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
    print(f"Direction: {single:.2f} from w* a quarter of the samples point away from the mean (in theory")
    print(f"at σ), {ten:.2f} from it a quarter of the batches of ten; nearer to it, more of them.")
    print(f"Without noise at most {clean_curve.opposed.max():.1%} of the samples do, at any distance.")
    print(
        f"Size: their standard deviation is at least {noisy_std.min():.2f} of the mean at every distance,"
    )
    print(
        f"and {clean_std.min():.2f} to {clean_std.max():.2f} without noise, as the gradient goes with x²."
    )
    print(f"So far from w* the gradients are similar {far}; near it, {near}.")

    figure = Figure((11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    both_sides = spread(torch.linspace(-3, 3, 121), noisy)
    gd.plot.plot_curves(
        [both_sides.mean, both_sides.low, both_sides.high],
        x=both_sides.distance,
        ax=left,
        labels=["mean gradient", "10 % of the samples lie below", "90 % of the samples lie below"],
        xlabel=f"w − w* (σ = {NOISE:g})",
        ylabel="gradient",
        log_y=False,
    )
    left.fill_between(both_sides.distance, both_sides.low, both_sides.high, color="0.9")
    left.axhline(0, color="black", linewidth=0.8)
    gd.plot.plot_curves(
        [curve.opposed, curve.opposed_batches, opposed_in_theory(curve.distance)],
        x=curve.distance,
        ax=right,
        labels=["single samples", "batches of ten", "single samples in theory: ½ − arctan(d/σ)/π"],
        xlabel=f"distance d from w* (σ = {NOISE:g})",
        ylabel="share opposed to the mean gradient",
        log_x=True,
        log_y=False,
    )
    save(figure, out / "claim_1.png")
    columns = [*curve, opposed_in_theory(curve.distance)]
    save_table(out / "claim_1.csv", [*Spread._fields, "opposed_in_theory"], columns)


# Claim 2: updates on batches of ten, or ten times as many on single samples.


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
    data = vmap(lambda key: draw(key, samples, NOISE), chunk_size=1)(keys)
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
            data = draw(gd.random.key(3), updates * batch, NOISE)
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


def show_claim_2(out: Path, samples: int, seeds: int, timed_updates: int) -> None:
    started = time.perf_counter()
    result = accuracy(samples, seeds)
    took = time.perf_counter() - started
    cost = seconds_per_update(timed_updates)
    seconds = {batch: result.seen / batch * cost[batch] for batch in cost}

    print(
        f"\nClaim 2: {samples // BATCH} updates on batches of ten are no less accurate than {samples} on"
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
    print(
        f"eager, on this machine, the median of 5 runs of {timed_updates} updates each. The runs behind the"
    )
    print(f"errors were all made at once, under vmap, in {took:.0f} s.")
    as_many_updates = int((result.seen == samples // BATCH).nonzero())
    for i, choice in enumerate(CHOICES):
        batches, singles = (result.errors[batch][:, i] for batch in (BATCH, 1))
        print(f"With {choice}, batches of ten are")
        print(f"  after as many samples: {verdict(*compare(batches[:, -1], singles[:, -1]))}")
        print(f"  after as many updates: {verdict(*compare(batches[:, -1], singles[:, as_many_updates]))}")
    print(f"(As many updates on ten samples took {ten / single:.2f} × the time of those on one.)")

    draw_claim_2(out / "claim_2.png", result, seconds)
    columns = {
        f"{what} of batch {batch} with {choice}": values[batch][i]
        for i, choice in enumerate(CHOICES)
        for batch in cost
        for what, values in {"rms": result.rms, "expected rms": result.expected}.items()
    }
    save_table(out / "claim_2.csv", ["samples", *columns], [result.seen, *columns.values()])
    save_table(
        out / "claim_2_timing.csv", ["batch", "seconds_per_update"], [list(cost), list(cost.values())]
    )


def draw_claim_2(path: Path, result: Accuracy, seconds: dict[int, Tensor]) -> None:
    # Points that lie evenly on a logarithmic axis.
    shown = np.unique(np.geomspace(1, len(result.seen), 200).astype(int)) - 1
    axes = {"samples seen": dict.fromkeys(seconds, result.seen), "seconds of a run of its own": seconds}
    figure = Figure((13, 7.5), layout="constrained")
    figure.suptitle("Distance from the true weight (dotted: expected in theory)")
    grid = figure.subplots(len(axes), len(CHOICES), sharey=True)
    for row, (xlabel, x) in zip(grid, axes.items(), strict=True):
        for i, ax in enumerate(row):
            gd.plot.plot_curves(
                [result.rms[batch][i, shown] for batch in x],
                x=[x[batch][shown] for batch in x],
                ax=ax,
                labels=[f"{result.seen[-1] // batch} updates on batches of {batch}" for batch in x],
                xlabel=xlabel,
                ylabel="",
                log_x=True,
            )
            for batch in x:
                ax.plot(x[batch][shown], result.expected[batch][i, shown], ":", color="black", linewidth=1)
        row[0].set_ylabel(f"rms of w − 5 over {len(result.errors[1])} seeds")
    for ax, choice in zip(grid[0], CHOICES, strict=True):
        ax.set_title(choice)
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=150)
    print(f"saved {path}")


def save_table(path: Path, names: Sequence[str], columns: Sequence[Any]) -> None:
    table = np.stack([np.asarray(column) for column in columns], axis=1)
    np.savetxt(
        path, table, fmt="%.8g", delimiter=",", header=",".join(names), comments="", encoding="utf-8"
    )
    print(f"saved {path}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Mini-batches on one weight, and two claims about them.")
    parser.add_argument("--out", type=Path, default=Path("out/minibatch_1d"), help="where results go")
    parser.add_argument("--fast", action="store_true", help="fewer samples and seeds: a few seconds")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    arrived = show_tutorial(args.out)
    show_claim_1(args.out, samples=2_000 if args.fast else 50_000)
    if args.fast:
        show_claim_2(args.out, samples=1_000, seeds=10, timed_updates=100)
    else:
        show_claim_2(args.out, samples=100_000, seeds=100, timed_updates=1_000)
    return 0 if arrived else 1


if __name__ == "__main__":
    torch.set_num_threads(1)  # steps this small keep one thread busy; more of them wait for one another
    raise SystemExit(main())
