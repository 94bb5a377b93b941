"""How large a learning rate may be: where a network's curvature settles, and a map of momentum's limits.

On a quadratic whose curvature is at most L, gradient descent is stable for lr < 2/L. A network has no such
L: along full-batch descent its sharpness, the largest eigenvalue of the Hessian, first grows (progressive
sharpening) and then hovers about 2/lr, the very edge of stability, while the loss goes on falling, though
not at every step. Here a small tanh network learns the S&P 500's monthly return from those of five shares,
with four learning rates in one sweep; `train` records the sharpness on the way.

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

import argparse
import math
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

import gdfunc as gd

SIZES = (5, 32, 32, 1)  # of the network's layers
EDGES = (20.0, 30.0, 40.0, 60.0)  # 2/lr for each learning rate of the network
RECORDS = 120  # sharpnesses along a run
LANCZOS = 12  # products with the Hessian for each, on its 1281 parameters
LRS = (0.02, 4.6)  # of the map: the smallest and the largest, times 1/L
FRICTIONS = (1.0, 0.01)  # 1 − momentum, from none to nearly all of it
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


def train_network(steps: int, every: int) -> gd.SweepResult:
    """Train with each learning rate; the outputs are trajectories of loss and sharpness."""
    data, params = returns(), initial_params(gd.random.key(0))
    step, index = gd.make_step(network_loss), gd.full_batch(len(data[1]), steps)
    eigenpairs = gd.curvature.top_eigenvalues(gd.curvature.hvp(network_loss), iterations=LANCZOS)

    def top(params: Params, _loss: Tensor) -> gd.curvature.Eigenpairs:
        return eigenpairs(params, data, gd.random.key(1))._replace(eigenvectors=())

    def run(lr: Tensor) -> gd.Trajectory:
        _, trajectory = gd.train(step, params, data, index, lr, record=("loss", top), every=every)
        return trajectory

    return gd.sweep(run, gd.grid(lr=2 / torch.tensor(EDGES)))


def hovering(sharpness: Tensor) -> Tensor:
    """The mean of the last quarter of the records."""
    return sharpness[..., -(sharpness.shape[-1] // 4) :].mean(dim=-1)


def report_network(runs: gd.Trajectory, steps: int) -> None:
    sharpness, residuals = runs.top.eigenvalues[..., 0], runs.top.residuals[..., 0]
    print(f"A {'-'.join(map(str, SIZES))} tanh network on monthly returns, {steps} full-batch steps:")
    print("     lr   2/lr  sharpness: start   largest  last quarter  of 2/lr   loss: start     end  rises")
    for edge, curve, loss in zip(EDGES, sharpness, runs.loss, strict=True):
        rises = int((loss.diff() > 0).sum())
        last = float(hovering(curve))
        print(
            f"{2 / edge:7.4f} {edge:6.0f} {curve[0]:17.1f} {curve.max():9.1f} {last:13.1f}"
            f" {last / edge:8.3f} {loss[0]:13.3f} {loss[-1]:7.3f} {rises:3} of {len(loss) - 1}"
        )
    print("rises = records whose loss is above the one before them; the largest residual of an eigenpair")
    print(f"is {float((residuals / sharpness).max()):.0e} of its eigenvalue\n")


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


def report_map(found: Map, steps: int) -> float:
    """Print how far measurement and theory are apart; return the median of that."""
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
    apart = (measured < 1) != (predicted < 1)
    print(
        f"  stable: {int((measured < 1).sum())} measured, {int((predicted < 1).sum())} predicted,"
        f" of which {int(apart.sum())} differ"
    )
    print(
        f"  best measured {best['output']:.4f} at lr {best['lr']:.3g}, momentum {1 - best['friction']:.3g};"
    )
    print(f"  Polyak's best {rate:.4f} at lr {lr:.3g}, momentum {momentum:.3g};")
    print(f"  without momentum at best {float((L - mu) / (L + mu)):.4f}\n")
    return float(difference.median())


# The picture.


def draw_network(axes: Any, runs: gd.Trajectory) -> None:
    labels = [f"lr = 2/{edge:.0f}" for edge in EDGES]
    sharpness = runs.top.eigenvalues[..., 0]
    panels = {"sharpness: largest eigenvalue of the Hessian": sharpness, "loss": runs.loss}
    for ax, (ylabel, curves) in zip(axes, panels.items(), strict=True):
        gd.plot.plot_curves(list(curves), x=runs.step[0], ax=ax, labels=labels, ylabel=ylabel)
    left, right = axes
    for line, edge in zip(list(left.lines), EDGES, strict=True):
        left.axhline(edge, color=line.get_color(), linewidth=1, linestyle=":")
        place = {"xy": (0.99, edge), "xycoords": left.get_yaxis_transform(), "ha": "right", "va": "bottom"}
        left.annotate(f"2/lr = {edge:.0f}", **place, color=line.get_color(), fontsize="small")
    ticks = (10, 20, 30, 40, 60)
    left.set_yticks(ticks, [f"{tick}" for tick in ticks])
    left.set_yticks((), minor=True)
    left.set_title("A network sharpens until 2/lr, and hovers there …")
    right.set_title("… while its loss goes on falling, if not at every step")


def draw_map(axes: Any, found: Map) -> None:
    left, right = axes
    result, rates, L = found.measured, found.measured.outputs, found.eigenvalues[-1]
    gd.plot.plot_grid(
        result,
        "lr",
        "friction",
        values=steps_a_digit(rates),
        ax=left,
        label="steps until the error is ten times smaller",
        best=None,
        limits=(25, 5000),
        log_x=True,
        log_y=True,
        log_color=True,
    )
    gd.plot.plot_grid(
        result,
        "lr",
        "friction",
        values=rates - found.predicted,
        ax=right,
        label="factor of the error a step, measured − predicted",
        best=None,
        cmap="RdBu",
        limits=(-1e-3, 1e-3),
        log_x=True,
        log_y=True,
    )
    lrs, frictions = result.axes["lr"], result.axes["friction"]
    predicted = steps_a_digit(found.predicted).reshape(result.grid.shape)
    white: dict[str, Any] = {"colors": "white", "linewidths": 0.8}
    lines = left.contour(lrs, frictions, predicted, (40, 70, 150, 400, 1000, 3000), **white)
    left.clabel(lines, fontsize="small")
    lr, momentum, _ = polyak(found.eigenvalues)
    for ax in axes:
        ax.plot(2 * (2 - frictions) / L, frictions, color="#D55E00", linewidth=2)
        ax.plot(lr, 1 - momentum, "*", color="white", markeredgecolor="black", markersize=13)
        ax.set(ylim=FRICTIONS, ylabel="momentum")
        ticks = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99)
        ax.set_yticks([1 - tick for tick in ticks], [f"{tick:g}" for tick in ticks])
        ax.set_yticks((), minor=True)
        if ax.get_legend():
            ax.get_legend().remove()
    left.annotate("diverges", (4.4 / L, 0.75), ha="right", va="center", fontsize="small", rotation=90)
    left.set_title("Heavy ball on stock levels: measured (white: theory)")
    right.set_title("Orange: lr = 2(1 + momentum)/L; star: Polyak's best")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path("out/edge_of_stability"), help="folder for the results"
    )
    parser.add_argument("--fast", action="store_true", help="fewer steps and a coarser map")
    args = parser.parse_args(argv)
    network_steps, records, points, steps = (120, 12, 8, 150) if args.fast else (6000, RECORDS, 64, 500)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # on tensors this small, threads would only wait for one another

    runs = train_network(network_steps, network_steps // records).outputs
    report_network(runs, network_steps)
    found = map_momentum(points, steps)
    median = report_map(found, steps)
    found.measured.save(args.out / "rates.csv")

    figure = Figure(figsize=(13, 10.5), layout="constrained")
    axes = figure.subplots(2, 2)
    draw_network(axes[0], runs)
    draw_map(axes[1], found)
    figure.savefig(args.out / "edge_of_stability.png", dpi=100)
    print(f"Written: rates.csv and edge_of_stability.png in {args.out}")
    return 0 if median < AGREES else 1


if __name__ == "__main__":
    raise SystemExit(main())
