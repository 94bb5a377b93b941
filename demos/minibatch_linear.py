"""A linear regression by mini-batches: a tutorial's loop and gdfunc on the same batches, and its drawing.

Source: "Pytorch 梯度下降算法【3/9】小批量梯度下降(Mini-Batch Gradient Descent)" (gradient descent in
PyTorch, part 3 of 9: mini-batch gradient descent), Huawei Cloud community, 2023. It fits y = 2x + 1 to 100
noisy rows with nn.Linear, nn.MSELoss and torch.optim.SGD (lr 0.01, batches of ten, 100 epochs), and prints
the loss of the last batch of every tenth epoch, and the weights at the end. Its drawing, by hand, has the
smooth path of full batches beside the shaking one of mini-batches, "not strictly towards the minimum, but
the trend is". Here both paths are those of its own two weights, on the contours of its own loss, and the
steps that go uphill are counted.

Its rows come from numpy.random.seed(42); RandomState(42) draws the same and leaves the global generator
alone. Its first weights and its order come from torch's global generator, without a seed; here they come
from keys, and both loops get the same. The logged losses, and the weights after every update, of the two
loops must agree to 1e-6 in float32 and to 1e-12 in float64; otherwise the exit status is 1.

    python demos/minibatch_linear.py [--out DIR] [--fast]
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from _card import Card
from matplotlib.axes import Axes
from matplotlib.contour import ContourSet
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.func import vmap

import gdfunc as gd

ROWS, BATCH, EPOCHS, LR = 100, 10, 100, 0.01
LOG_EVERY = 10  # epochs
ZOOM = 100  # the last steps, which are drawn once more
VIEW = ((0.8, 2.2), (0.8, 1.6))  # of weight and bias
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
# On the meta device a module has shapes but no numbers: the weights are passed in.
APPLY, _, _ = gd.modules.functional(nn.Linear(1, 1, device="meta"))

Data = tuple[Tensor, Tensor]
Params = dict[str, Tensor]


def tutorial_data(dtype: torch.dtype) -> Data:
    """The tutorial's rows, x and y [100, 1] each."""
    # The legacy generator on purpose: only it has the numbers of numpy.random.seed(42).
    generator = np.random.RandomState(42)
    x = generator.rand(ROWS, 1)
    y = 2 * x + 1 + 0.1 * generator.randn(ROWS, 1)
    return torch.tensor(x, dtype=dtype), torch.tensor(y, dtype=dtype)


def initial_params(dtype: torch.dtype) -> Params:
    """Draw weights as nn.Linear(1, 1) does, uniformly on [−1, 1), but from a key."""
    weight, bias = gd.random.uniform(gd.random.key(0), (2,), minval=-1.0).to(dtype)
    return {"weight": weight.reshape(1, 1), "bias": bias.reshape(1)}


def make_model(params: Params) -> nn.Linear:
    """Make the tutorial's model with given weights, and draw none from torch's global generator."""
    model = nn.utils.skip_init(nn.Linear, 1, 1, dtype=params["weight"].dtype)
    model.load_state_dict(params)
    return model


class Run(NamedTuple):
    """The results of a loop: the loss of every batch [T], and the weights on the way, [T + 1, …] each."""

    losses: Tensor
    path: Params

    @property
    def params(self) -> Params:
        return {name: values[-1] for name, values in self.path.items()}


def tutorial_loop(data: Data, index: Tensor, init: Params) -> Run:
    x, y = data
    model = make_model(init)
    criterion = nn.MSELoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    losses, path = [], [init]
    for batch_indices in index:
        optimizer.zero_grad()
        loss = criterion(model(x[batch_indices]), y[batch_indices])
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        path.append({name: value.clone() for name, value in model.state_dict().items()})
    return Run(torch.stack(losses), {name: torch.stack([point[name] for point in path]) for name in init})


def loss_fn(params: Params, batch: Data) -> Tensor:
    x, y = batch
    return gd.losses.mse(APPLY(params, x), y)


def gdfunc_loop(data: Data, index: Tensor, init: Params) -> Run:
    final, trajectory = gd.train(gd.make_step(loss_fn), init, data, index, LR, record=("loss", "params"))
    return Run(trajectory.loss, gd.plot.path(trajectory.params, final))


class Comparison(NamedTuple):
    tutorial: Run
    gdfunc: Run
    loss_difference: float  # the largest of the logged losses
    param_difference: float  # the largest of the weights after any update
    agree: bool


def logged(losses: Tensor) -> Tensor:
    """The losses that the tutorial prints: of the last batch of epochs 10, 20, …, 100."""
    return losses.reshape(EPOCHS, -1)[LOG_EVERY - 1 :: LOG_EVERY, -1]


def compare(dtype: torch.dtype) -> Comparison:
    data, init = tutorial_data(dtype), initial_params(dtype)
    index = gd.epoch_batches(gd.random.key(1), ROWS, BATCH, EPOCHS)
    theirs, ours = tutorial_loop(data, index, init), gdfunc_loop(data, index, init)
    loss_difference = float((logged(ours.losses) - logged(theirs.losses)).abs().max())
    param_difference = max(float((ours.path[name] - theirs.path[name]).abs().max()) for name in init)
    agree = max(loss_difference, param_difference) <= TOLERANCE[dtype]
    return Comparison(theirs, ours, loss_difference, param_difference, agree)


def show(dtype: torch.dtype, result: Comparison) -> None:
    print(f"{name_of(dtype)}\n{'the tutorial, torch.optim.SGD':34}gdfunc")
    pair = zip(logged(result.tutorial.losses).tolist(), logged(result.gdfunc.losses).tolist(), strict=True)
    for i, losses in enumerate(pair, 1):
        lines = [f"Epoch [{LOG_EVERY * i}/{EPOCHS}], Loss: {loss:.4f}" for loss in losses]
        print(f"{lines[0]:34}{lines[1]}")
    print(f"Trained parameters, the tutorial: {dict(result.tutorial.params)}")
    print(f"Trained parameters, gdfunc:       {result.gdfunc.params}")
    print(f"Largest difference of the logged losses: {result.loss_difference:.1e}")
    exact = "" if result.param_difference else ", after every update: bit for bit torch.optim's"
    print(f"Largest difference of the parameters:    {result.param_difference:.1e}{exact}")
    print(f"Allowed: {TOLERANCE[dtype]:.0e}. They {'agree' if result.agree else 'DIFFER'}.\n")


class Descent(NamedTuple):
    """A path, the loss of all rows along it [T + 1], and how many of its steps raise that loss."""

    path: Params
    losses: Tensor
    uphill: int


def descend(index: Tensor) -> Descent:
    """Run the tutorial's model on some batches [T, B], in float64."""
    data, init = tutorial_data(torch.float64), initial_params(torch.float64)
    path = gdfunc_loop(data, index, init).path
    losses = vmap(lambda params: loss_fn(params, data))(path)
    return Descent(path, losses, int((losses.diff() > 0).sum()))


def least_squares() -> tuple[Params, Tensor]:
    """The minimizer of the loss of all rows, and its minimum."""
    x, y = tutorial_data(torch.float64)
    weight, bias = torch.linalg.lstsq(torch.cat([x, torch.ones_like(x)], dim=1), y).solution
    params = {"weight": weight[None], "bias": bias}
    return params, loss_fn(params, (x, y))


def conclusion(steps: int, full: int, mini: int, full_above: float, mini_above: float) -> str:
    """Say how many steps raise the full loss, and how far above its minimum they end, relatively."""
    word = "often" if mini > steps / 20 else "rarely"
    opening = f"Mini-batches {word} go uphill" if mini > full else "Mini-batches go uphill no more often"
    counts = f"{mini:,} of {steps:,} steps raise the full loss, {full:,} of full batches"
    alike = abs(mini_above - full_above) < 0.1 * full_above
    apart = f"mini-batches end {mini_above:.0%} above the minimum, full batches {full_above:.0%}"
    return f"{opening}: {counts}; {f'both end {mini_above:.0%} above the minimum' if alike else apart}"


def show_paths(card: Card) -> None:
    """Run the tutorial's model on mini-batches and full batches, and draw both paths of its two weights."""
    mini = descend(gd.epoch_batches(gd.random.key(1), ROWS, BATCH, EPOCHS))
    steps = len(mini.losses) - 1
    full = descend(torch.arange(ROWS).expand(steps, ROWS))
    minimum = least_squares()[1]
    full_above, mini_above = (float(run.losses[-1] / minimum - 1) for run in (full, mini))
    numbers = {
        "steps": steps,
        "full": full.uphill,
        "mini": mini.uphill,
        "full_above": full_above,
        "mini_above": mini_above,
    }
    card.picture("paths", draw_paths(full, mini), conclusion(**numbers), numbers)


def draw_paths(full: Descent, mini: Descent) -> Figure:
    """Draw the tutorial's picture: both paths on the contours of the loss, and their ends once more."""
    minimizer, minimum = least_squares()
    steps = len(mini.losses) - 1
    figure = Figure((7.2, 2.9), layout="constrained")
    for ax, first in zip(figure.subplots(1, 2), (0, steps - ZOOM), strict=True):
        runs = {"full batch": full.path, f"batches of {BATCH}": mini.path}
        gd.plot.plot_descent(
            lambda params: loss_fn(params, tutorial_data(torch.float64)),
            {name: {key: values[first:] for key, values in path.items()} for name, path in runs.items()},
            ax=ax,
            minimum=minimum,
            minimizers=[minimizer] if first == 0 else [],
            limits=VIEW if first == 0 else None,
        )
        ax.get_legend().remove()
        for text in list(ax.texts) if first else ():  # near, the names would hide the paths
            text.remove()
        smooth, shaking = (line for line in ax.lines if line.get_linestyle() != "None")
        smooth.set(linewidth=5, alpha=0.35, zorder=2.5, path_effects=[])
        shaking.set(linewidth=1.2, path_effects=[])
        mark_uphill(ax, mini, first)
        name_contours(ax)
        ax.set_title(f"steps {first:,} to {steps:,}", loc="left", fontsize=9, color="0.35")
    note = f"○ first  ◆ last  ★ minimizer  ▲ steps that raise the full loss; {ROWS} rows, lr {LR}"
    figure.supxlabel(note, fontsize=8, color="0.35")
    return figure


def mark_uphill(ax: Axes, run: Descent, first: int) -> None:
    """Mark the steps that raise the loss of all rows, from a step on, in their middles."""
    raises = torch.nonzero(run.losses.diff() > 0).flatten()
    points = torch.cat([run.path[name].flatten(1) for name in ("weight", "bias")], dim=1)
    middles = ((points[:-1] + points[1:]) / 2)[raises[raises >= first]]
    ax.plot(*middles.T, "^", color="black", markersize=5, zorder=4)


def name_contours(ax: Axes) -> None:
    """Write the loss at every fourth contour."""
    (lines,) = (artist for artist in ax.collections if isinstance(artist, ContourSet) and not artist.filled)
    ax.clabel(lines, lines.levels[::4], fmt="%.3g", fontsize=6, colors="0.35")


def save_losses(card: Card, results: dict[torch.dtype, Comparison]) -> None:
    """Write the loss of every update, with all its digits."""
    columns = {
        f"{who}_{name_of(dtype)}": run.losses.double()
        for dtype, (tutorial, ours, *_) in results.items()
        for who, run in {"tutorial": tutorial, "gdfunc": ours}.items()
    }
    updates = range(1, len(next(iter(columns.values()))) + 1)
    card.table("losses", ["update", *columns], zip(updates, *columns.values(), strict=True))


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main(argv: Sequence[str] | None = None) -> int:
    with Card(__file__, "Do mini-batches go to the minimum, if not straight?", argv) as card:
        results = {dtype: compare(dtype) for dtype in TOLERANCE}
        for dtype, result in results.items():
            show(dtype, result)
        show_paths(card)
        save_losses(card, results)
    return 0 if all(result.agree for result in results.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
