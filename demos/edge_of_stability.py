"""How large a learning rate may be: where a network's curvature settles, and a map of momentum's limits.

On a quadratic whose curvature is at most L, gradient descent is stable for lr < 2/L. A network has no such
L: along full-batch descent its sharpness, the largest eigenvalue of the Hessian, first grows (progressive
sharpening) and then hovers about 2/lr, the very edge of stability, while the loss goes on falling, though
not at every step. Here a small tanh network learns the S&P 500's monthly return from those of five shares,
with four learning rates in one sweep; a scan over stretches of the run records the sharpness between them.

With momentum β the edge is lr < 2(1 + β)/L. For a quadratic all is known: a step of the heavy ball shrinks
the error by the largest modulus of the roots of z² − (1 + β − lr·λ) z + β over the eigenvalues λ. Against
that stand 64 × 64 runs of one sweep: the regression of the S&P 500's level on those of the five shares (the
growth of a dollar, not returns), whose trends are so alike that L/μ is 711. The parameters are counted from
the optimum, that is, with a target of 0: the error of a least-squares run does not depend on the target,
and near 0 floats do not round it away. The start is 1 along each eigenvector of the Hessian.

Sources: J. Cohen, S. Kaur, Y. Li, J. Z. Kolter, A. Talwalkar, "Gradient descent on neural networks
typically occurs at the edge of stability", 2021; B. T. Polyak, "Some methods of speeding up the convergence
of iteration methods", 1964. The data are matplotlib's `Stocks.csv`.

    python demos/edge_of_stability.py [--out DIR] [--fast]
"""

import math
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from _card import Card
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor

import gdfunc as gd

SIZES = (5, 32, 32, 1)  # of the network's layers
EDGES = (20.0, 30.0, 40.0, 60.0)  # 2/lr for each learning rate of the network
RECORDS = 120  # sharpnesses along a run
LANCZOS = 12  # products with the Hessian for each, on its 1281 parameters
LRS = (0.02, 4.6)  # of the map: the smallest and the largest, times 1/L
FRICTIONS = (1.0, 0.01)  # 1 − momentum, from none to nearly all of it
CUTS = (0.0, 0.5, 0.9, 0.98)  # the momenta at which the map is drawn once more, as curves
EDGE = "#D55E00"  # the colour of the largest stable lr
SETTLED = 0.05  # a sharpness this near to 2/lr, relatively, is there
AGREES = 1e-3  # the median difference between measured and predicted rate, at most

Data = tuple[Tensor, Tensor]
Params = dict[str, Any]


# The network.


def standardized(series: Tensor) -> Tensor:
    return (series - series.mean(dim=0)) / series.std(dim=0)


def returns() -> Data:
    stocks = gd.datasets.stocks(dtype=torch.float32)
    return standardized(stocks.x), standardized(stocks.y)


def initial_params(key: Tensor) -> Params:
    shapes = list(pairwise(SIZES))
    return {
        f"layer{i}": {"w": gd.random.normal(key, shape) / shape[0] ** 0.5, "b": torch.zeros(shape[1])}
        for i, (key, shape) in enumerate(zip(gd.random.split(key, len(shapes)), shapes, strict=True))
    }


def network_loss(params: Params, batch: Data) -> Tensor:
    units, targets = batch
    *hidden, output = params.values()
    for layer in hidden:
        units = torch.tanh(units @ layer["w"] + layer["b"])
    return gd.losses.mse((units @ output["w"] + output["b"])[:, 0], targets)


class Descent(NamedTuple):
    """A run of the network: the loss of every step, and the sharpness before every stretch of steps."""

    losses: Tensor  # [T]
    sharpness: Tensor  # [records]
    residuals: Tensor  # of the eigenpairs, [records]


def train_network(steps: int, every: int) -> gd.SweepResult:
    """Train with each learning rate; the outputs are Descents."""
    data, params = returns(), initial_params(gd.random.key(0))
    step, index = gd.make_step(network_loss), gd.full_batch(len(data[1]), steps)
    eigenpairs = gd.curvature.top_eigenvalues(gd.curvature.hvp(network_loss), iterations=LANCZOS)

    def run(lr: Tensor) -> Descent:
        def stretch(params: Params, index: Tensor) -> tuple[Params, Descent]:
            top = eigenpairs(params, data, gd.random.key(1))
            # Compiled even if it is short, because there are many stretches.
            final, trajectory = gd.train(step, params, data, index, lr, backend="native")
            return final, Descent(trajectory.loss, top.eigenvalues[0], top.residuals[0])

        stretches = index.reshape(steps // every, every, -1)
        _, descent = gd.scan(stretch, params, stretches, backend="eager")
        return descent._replace(losses=descent.losses.flatten())

    return gd.sweep(run, gd.grid(lr=2 / torch.tensor(EDGES)))


def pooled(runs: Descent) -> Tensor:
    """The median of the losses of every stretch, as they are drawn."""
    losses, records = runs.losses, runs.sharpness.shape[-1]
    return losses.reshape(len(losses), records, -1).quantile(0.5, dim=-1)


def hovering(sharpness: Tensor) -> Tensor:
    """The mean of the last quarter of the records."""
    return sharpness[..., -(sharpness.shape[-1] // 4) :].mean(dim=-1)


def report_network(runs: Descent) -> dict[str, list[float]]:
    """Print how the runs went; return what the conclusion is made of, by learning rate."""
    steps = runs.losses.shape[1]
    rises = (runs.losses.diff() > 0).double().mean(dim=1)
    ratios = hovering(runs.sharpness) / torch.tensor(EDGES)
    falls = 1 - pooled(runs)[:, -1] / pooled(runs)[:, 0]
    print(f"A {'-'.join(map(str, SIZES))} tanh network on monthly returns, {steps} full-batch steps:")
    print("     lr   2/lr  sharpness: start   largest  last quarter  of 2/lr   loss: start     end  rises")
    for i, (edge, curve, loss) in enumerate(zip(EDGES, runs.sharpness, runs.losses, strict=True)):
        print(
            f"{2 / edge:7.4f} {edge:6.0f} {curve[0]:17.1f} {curve.max():9.1f} {edge * ratios[i]:13.1f}"
            f" {ratios[i]:8.3f} {loss[0]:13.3f} {loss[-1]:7.3f} {rises[i]:6.1%}"
        )
    print("rises = steps that raise the loss; the largest residual of an eigenpair")
    print(f"is {float((runs.residuals / runs.sharpness).max()):.0e} of its eigenvalue\n")
    return {"ratios": ratios.tolist(), "falls": falls.tolist(), "rises": rises.tolist()}


def conclusion(ratios: list[float], falls: list[float], rises: list[float]) -> str:
    """Say whether sharpnesses settle at 2/lr, of which `ratios` are, and what the loss does meanwhile."""
    there = all(abs(ratio - 1) < SETTLED for ratio in ratios)
    verb = "settles" if there else "has not settled"
    opening = f"The sharpness of a network {verb} at 2/lr ({min(ratios):.2f} to {max(ratios):.2f} of it)"
    loss = f"the median loss falls by {min(falls):.0%} or more"
    loss = loss if min(falls) > 0 else "the loss need not fall"
    though = f"though {min(rises):.0%} to {max(rises):.0%} of the steps raise it"
    return f"{opening}; meanwhile {loss}, {though if max(rises) >= 0.005 else 'at nearly every step'}"


# The map.


class Map(NamedTuple):
    """How runs of the heavy ball went: rates are the factor by which the error shrinks a step."""

    measured: gd.SweepResult  # float64 [frictions · lrs]
    predicted: Tensor  # the same
    eigenvalues: Tensor  # of the Hessian, increasing


def levels() -> Tensor:
    """The growth of a dollar in each share, in units of its root mean square, and ones: [389, 6]."""
    growth = (1 + gd.datasets.stocks().x).cumprod(dim=0)
    return torch.cat([growth / growth.square().mean(dim=0).sqrt(), torch.ones_like(growth[:, :1])], dim=1)


def map_momentum(points: int, steps: int) -> Map:
    x = levels()
    problem = gd.problems.linear_regression(x, torch.zeros(len(x)), bias=False)
    eigenvalues, eigenvectors = torch.linalg.eigh(x.mT @ x / len(x))
    start, index = {"w": eigenvectors.sum(dim=1)}, gd.full_batch(len(x), steps)

    def size(state: Any, _loss: Tensor) -> Tensor:
        """The logarithm of the error, which never passes through 0 together with its last change."""
        return torch.cat([state.params["w"], state.displacement["w"]]).abs().amax().log()

    def run(friction: Tensor, lr: Tensor) -> Tensor:
        step = gd.methods.heavy_ball(problem.loss_fn, 1 - friction)
        _, trajectory = gd.train(step, step.init(start), problem.data, index, lr, record=size)
        return slope(trajectory.size[steps // 2 :]).exp()

    lrs = between(LRS[0] / problem.L, LRS[1] / problem.L, points)
    frictions = between(*FRICTIONS, points)
    measured = gd.sweep(run, gd.grid(friction=frictions, lr=lrs))
    return Map(measured, predict(1 - frictions[:, None], lrs, eigenvalues).flatten(), eigenvalues)


def between(first: float, last: float, points: int) -> Tensor:
    return torch.logspace(math.log10(first), math.log10(last), points, dtype=torch.float64)


def slope(values: Tensor) -> Tensor:
    """The slope of the straight line through values [T], by least squares."""
    t = torch.arange(len(values)).to(values)
    t = t - t.mean()
    return (t @ values) / (t @ t)


def predict(momentum: Tensor, lr: Tensor, eigenvalues: Tensor) -> Tensor:
    """The largest modulus of the roots of z² − (1 + β − lr·λ) z + β over the eigenvalues."""
    middle = (1 + momentum - lr * eigenvalues[:, None, None]).to(torch.complex128)
    root = (middle.square() - 4 * momentum).sqrt()
    return torch.maximum((middle + root).abs(), (middle - root).abs()).amax(dim=0) / 2


def steps_a_digit(rate: Tensor) -> Tensor:
    """How many steps make the error ten times smaller; ∞ if it does not shrink."""
    return torch.where(rate < 1, -1 / rate.log10(), torch.inf)


def polyak(eigenvalues: Tensor) -> tuple[float, float, float]:
    """The best lr, momentum and rate: Polyak's."""
    low, high = eigenvalues[0].sqrt(), eigenvalues[-1].sqrt()
    rate = float((high - low) / (high + low))
    return float(4 / (high + low) ** 2), rate**2, rate


def report_map(found: Map, steps: int) -> dict[str, float]:
    """Print how far measurement and theory are apart; return what the conclusion is made of, and that."""
    measured, predicted = found.measured.outputs, found.predicted
    difference = (measured - predicted).abs()
    points = found.measured.to_records()
    best, worst = points[int(measured.argmin())], points[int(difference.argmax())]
    lr, momentum, rate = polyak(found.eigenvalues)
    mu, L = found.eigenvalues[0], found.eigenvalues[-1]
    print(f"The heavy ball on stock levels, L/μ = {L / mu:.0f}: {len(points)} runs of {steps} steps")
    print(
        f"  rate, the factor of the error a step: measured − predicted, over the last {steps // 2} steps:"
    )
    print(
        f"  median of the absolute {difference.median():.1e}, 99 % below {difference.quantile(0.99):.1e},"
        f" largest {difference.max():.1e} at lr {worst['lr']:.3g}, momentum {1 - worst['friction']:.3g}"
    )
    print(
        f"  best measured {best['output']:.4f} at lr {best['lr']:.3g}, momentum {1 - best['friction']:.3g};"
    )
    print(f"  Polyak's best {rate:.4f} at lr {lr:.3g}, momentum {momentum:.3g};")
    print(f"  without momentum at best {float((L - mu) / (L + mu)):.4f}\n")
    without = measured.reshape(found.measured.grid.shape)[0]  # the first friction is 1
    return {
        "runs": len(points),
        "astray": int(((measured < 1) != (predicted < 1)).sum()),
        "best": float(steps_a_digit(measured.min())),
        "without": float(steps_a_digit(without.min())),
        "median_difference": float(difference.median()),
    }


def map_conclusion(runs: int, astray: int, best: float, without: float) -> str:
    """Say how many runs are not on the side of the edge that theory names, and what momentum gains."""
    side = f"{'all' if not astray else f'{runs - astray:,} of'} {runs:,} runs obey the edge"
    steps = f"the error is ten times smaller after {best:.0f} steps at best, without it after {without:.0f}"
    word = "widens the learning rates to 2(1 + momentum)/L and saves steps"
    word = word if best < without else "saves no steps"
    return f"Momentum {word}: {side}; {steps}"


# The pictures.


def draw_network(runs: Descent) -> Figure:
    """Draw the sharpness, and the loss of all steps, pooled between two records of the sharpness."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps, records = runs.losses.shape[1], runs.sharpness.shape[1]
    every = steps // records
    named: dict[str, Any] = {"labels": EDGES, "by": "2/lr =", "label_lines": True}
    places = torch.arange(records) * every
    gd.plot.plot_curves(list(runs.sharpness), x=places, ax=left, ylabel="sharpness", **named)
    gd.plot.plot_curves(list(runs.losses), ax=right, window=every, band=(0.0, 1.0), ylabel="loss", **named)
    lines = list(left.lines[: len(EDGES)])
    for line, edge in zip(lines, EDGES, strict=True):
        left.axhline(edge, color=line.get_color(), linewidth=1, linestyle=":", zorder=1)
    ticks = (10, 20, 30, 40, 60)
    left.set_yticks(ticks, [f"{tick}" for tick in ticks])
    left.set_yticks((), minor=True)
    left.set_title("sharpness: largest eigenvalue of the Hessian", loc="left", fontsize=9, color="0.35")
    right.set_title(f"median and range within {every} steps", loc="left", fontsize=9, color="0.35")
    for ax in (left, right):
        if ax.get_legend():
            ax.get_legend().remove()
        ax.xaxis.set_major_formatter("{x:,.0f}")
    shape = "-".join(map(str, SIZES))
    note = f"a {shape} tanh network on 389 monthly returns of five shares; dotted: 2/lr"
    figure.supxlabel(note, fontsize=8, color="0.35")
    return figure


def draw_map(found: Map, steps: int) -> Figure:
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
    result, L = found.measured, found.eigenvalues[-1]
    gd.plot.plot_grid(
        result,
        "lr",
        "friction",
        values=steps_a_digit(result.outputs),
        ax=left,
        label="",
        best=None,
        limits=(25, 5000),
        log_x=True,
        log_y=True,
        log_color=True,
    )
    left.get_legend().remove()
    lrs, frictions = result.axes["lr"], result.axes["friction"]
    predicted = steps_a_digit(found.predicted).reshape(result.grid.shape)
    lines = left.contour(lrs, frictions, predicted, (40, 70, 150, 400, 1000, 3000), colors="white")
    lines.set_linewidth(0.8)
    left.clabel(lines, fontsize="small")
    lr, momentum, _ = polyak(found.eigenvalues)
    left.plot(2 * (2 - frictions) / L, frictions, color=EDGE, linewidth=2)
    left.plot(lr, 1 - momentum, "*", color="white", markeredgecolor="black", markersize=13)
    left.set(ylim=FRICTIONS, ylabel="momentum")
    ticks = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99)
    left.set_yticks([1 - tick for tick in ticks], [f"{tick:g}" for tick in ticks])
    left.set_yticks((), minor=True)
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
    place = {"ha": "right", "va": "center", "rotation": 90, "bbox": box}
    left.annotate("diverges", (4.4 / L, 0.55), fontsize="small", **place)
    title = "colour: measured steps until the error is ten times smaller\nwhite: theory, ☆: Polyak's best"
    left.set_title(title, loc="left", fontsize=9, color="0.35")
    figure.axes[-1].set_title("steps", fontsize=9, color="0.35")  # of the bar, between both panels
    draw_cuts(right, found)
    note = f"the heavy ball on the levels of five shares, {len(result.outputs):,} runs of {steps} steps"
    figure.supxlabel(f"{note}; orange: lr = 2(1 + momentum)/L", fontsize=8, color="0.35")
    return figure


def draw_cuts(ax: Any, found: Map) -> None:
    """Draw the rate over lr at some momenta, measured and predicted."""
    result = found.measured
    lrs, momenta = result.axes["lr"], 1 - result.axes["friction"]
    rates = result.outputs.reshape(result.grid.shape)
    smooth = between(float(lrs[0]), float(lrs[-1]), 400)
    for cut in CUTS:
        row = int((momenta - cut).abs().argmin())
        color = colormaps["viridis"](0.85 * CUTS.index(cut) / (len(CUTS) - 1))
        ax.plot(
            smooth, predict(momenta[row, None], smooth, found.eigenvalues)[0], color="black", linewidth=0.8
        )
        ax.plot(lrs, rates[row], "o", color=color, markersize=3.5, label=f"momentum {momenta[row]:.2g}")
        ax.axvline(2 * (1 + momenta[row]) / found.eigenvalues[-1], color=EDGE, linewidth=0.8)
    ax.axhline(1, color="0.4", linewidth=0.8)
    ax.set(xscale="log", xlabel="lr", ylim=(0.92, 1.03))
    ax.spines[["top", "left"]].set_visible(False)
    ax.yaxis.tick_right()
    ax.yaxis.set_label_position("right")
    ax.set_ylabel("factor of the error a step")
    ax.legend(frameon=False, fontsize=8, loc="lower left")
    ax.set_title("● measured; lines: theory", loc="left", fontsize=9, color="0.35")


def show(card: Card) -> bool:
    network_steps, records, points, steps = (120, 12, 8, 150) if card.fast else (6000, RECORDS, 64, 500)
    runs = train_network(network_steps, network_steps // records).outputs
    numbers = report_network(runs)
    card.picture("edge_of_stability", draw_network(runs), conclusion(**numbers), numbers)
    found = map_momentum(points, steps)
    measures = report_map(found, steps)
    difference = measures.pop("median_difference")
    card.picture(
        "heavy_ball",
        draw_map(found, steps),
        map_conclusion(**measures),
        measures,
        question="How large may the learning rate be with momentum, and what does momentum gain?",
    )
    found.measured.save(card.file("rates.csv"))
    return difference < AGREES


def main(argv: list[str] | None = None) -> int:
    torch.set_num_threads(1)  # on tensors this small, threads would only wait for one another
    with Card(__file__, "Where does the curvature of a network settle?", argv) as card:
        agrees = show(card)
    return 0 if agrees else 1


if __name__ == "__main__":
    raise SystemExit(main())
