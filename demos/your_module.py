"""An ordinary network from start to finish: batch norm, dropout, validation, early stopping, and back.

A small convolutional `nn.Module` learns to read handwritten digits. `gd.modules.functional` takes it apart
into a pure function, its parameters and its buffers. The running statistics of batch normalisation travel
in the carry of the run. Dropout draws its masks from a key in the same carry, so that a repeat has the same
bits. AdamW decays the weights and leaves the biases out. Its learning rate rises for two epochs and then
falls along a cosine. After every epoch the run measures the accuracy on digits held out for validation, of
the parameters and of their moving average, keeps the best carry, and ends when the average has not improved
for some epochs. The best average goes back into the `nn.Module`, which then reads digits that neither the
training nor the choice of the epoch has seen.

Sources: S. Ioffe, C. Szegedy, "Batch normalization: accelerating deep network training by reducing internal
covariate shift", 2015; N. Srivastava et al., "Dropout: a simple way to prevent neural networks from
overfitting", 2014; L. Prechelt, "Early stopping, but when?", 1998. The digits are scikit-learn's.

    python demos/your_module.py [--out DIR] [--fast]
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from _card import Card
from matplotlib.figure import Figure
from torch import Tensor, nn

import gdfunc as gd

BATCH_SIZE = 50
LR = 0.005
DECAY = 0.05  # of the weights, per step and in units of lr
WARMUP = 2  # epochs
AVERAGE = 0.99  # decay of the moving average of the parameters
TRAINED, VALIDATED = 1000, 397  # digits; the other 400 are for the test

Data = tuple[Tensor, Tensor]


def make_net() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Dropout(0.3), nn.Linear(32 * 4 * 4, 64)),
        *(nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 10)),
    )


class Split(NamedTuple):
    """Images [n, 1, 8, 8] and their digits [n], in three parts."""

    training: Data
    validation: Data
    test: Data


def split(key: Tensor) -> Split:
    digits = gd.datasets.digits(dtype=torch.float32)
    order = gd.random.permutation(key, len(digits.y))
    images = digits.x.reshape(-1, 1, 8, 8)
    rows = order.split([TRAINED, VALIDATED, len(order) - TRAINED - VALIDATED])
    return Split(*[(images[part], digits.y[part]) for part in rows])


def train(net: nn.Module, data: Split, key: Tensor, epochs: int, patience: int) -> gd.Trajectory:
    """Train a module until the accuracy on the validation digits no longer improves."""
    model = gd.modules.functional(net)
    order_key, run_key = gd.random.split(key)
    index = gd.epoch_batches(order_key, TRAINED, BATCH_SIZE, epochs)
    per_epoch = TRAINED // BATCH_SIZE
    falling = gd.schedules.cosine_annealing(LR, len(index) - WARMUP * per_epoch)
    lrs = gd.schedules.warmup(falling, WARMUP * per_epoch)(torch.arange(len(index)))

    decay = gd.masked(gd.weight_decay(DECAY), gd.tree.matrices)  # weights of two dimensions or more
    step = gd.make_step(model.loss(gd.losses.cross_entropy), gd.chain(gd.adam(), decay))
    step = gd.methods.ema(step, AVERAGE)

    def accuracy(params, buffers):
        images, digits = data.validation
        return share_right(model.apply(params, images, buffers=buffers, training=False), digits)

    _, trajectory = gd.train(
        step,
        step.init(model.params, model.buffers, run_key),
        data.training,
        index,
        lrs,
        evaluate={
            "parameters": lambda state: accuracy(state.params, state.carry.buffers),
            "average": lambda state: accuracy(state.average, state.carry.buffers),
        },
        evaluate_every=per_epoch,
        stop=gd.stops.patience("average", patience, mode="max"),
    )
    return trajectory


def share_right(logits: Tensor, digits: Tensor) -> Tensor:
    return (logits.argmax(dim=1) == digits).float().mean()


class Stop(NamedTuple):
    """The end of a run, and the least and most validation digits read wrong from its best epoch on."""

    best: int
    stopped: int
    epochs: int
    average: tuple[int, int]
    parameters: tuple[int, int]
    of: int


def wrong_of(shares: Tensor) -> Tensor:
    """Return the number of validation digits read wrong, from the shares read right."""
    return (VALIDATED * (1 - shares)).round().int()


def stop_of(trajectory: gd.Trajectory, epochs: int) -> Stop:
    per_epoch = TRAINED // BATCH_SIZE
    best, stopped = (int(step) // per_epoch for step in (trajectory.best.step, trajectory.steps))
    after = [wrong_of(shares)[best - 1 :] for shares in (trajectory.average, trajectory.parameters)]
    average, parameters = ((int(wrong.min()), int(wrong.max())) for wrong in after)
    return Stop(best, stopped, epochs, average, parameters, VALIDATED)


def conclusion(
    best: int, stopped: int, epochs: int, average: Sequence[int], parameters: Sequence[int], of: int
) -> str:
    """Say where the run ended, and what the moving average and the parameters read wrong from there on."""
    early = f"Stopped after {stopped} of {epochs} epochs, and back to epoch {best}"
    early = early if stopped < epochs else f"Not stopped in {epochs} epochs, and best at epoch {best}"
    ranges = [f"{least} to {most}" if least < most else f"{least}" for least, most in (average, parameters)]
    read = f"the moving average reads {ranges[0]} of {of} validation digits wrong"
    return f"{early}: from there on {read}, the parameters {ranges[1]}"


def reading_conclusion(wrong: int, of: int) -> str:
    right = f"{of - wrong} of {of}" if wrong else f"all {of}"
    return f"Back in its nn.Module, the network reads {right} digits right that it has not seen"


def draw_errors(trajectory: gd.Trajectory, stop: Stop) -> Figure:
    """Draw the errors on the validation digits over the epochs."""
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    ax = figure.subplots()
    gd.plot.plot_curves(
        {
            "parameters": wrong_of(trajectory.parameters),
            "their moving average": wrong_of(trajectory.average),
        },
        x=torch.arange(1, stop.stopped + 1),
        ax=ax,
        label_lines=True,
        xlabel="epoch",
        ylabel=f"validation digits read wrong, of {VALIDATED}",
    )
    low, high = ax.get_ylim()
    ticks = [n for n in (1, 2, 3, 4, 5, 7, 10, 20, 30, 50, 100, 200, 300) if low <= n <= high]
    ax.set_yticks(ticks, [str(n) for n in ticks])
    ax.set_yticks((), minor=True)
    ax.axvline(stop.best, color="0.4", linewidth=1)
    place = (stop.best, ax.get_ylim()[1])
    ax.annotate(" best average ", place, va="top", ha="right", color="0.35", fontsize="small")
    return figure


def draw_wrong(images: Tensor, digits: Tensor, read: Tensor) -> Figure:
    """Draw all digits that are read wrong."""
    wrong = torch.nonzero(read != digits)[:, 0]
    columns = 8
    rows = max(1, -(-len(wrong) // columns))
    figure = Figure(figsize=(7.2, 0.7 + 1.15 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes:
        ax.set_axis_off()
    for ax, i in zip(axes, wrong, strict=False):
        ax.imshow(images[i, 0].numpy(), cmap="gray_r")
        ax.set_title(f"{int(digits[i])} read as {int(read[i])}", fontsize=8)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    with Card(__file__, "When should the training of an nn.Module stop?", argv) as card:
        epochs, patience = (4, 2) if card.fast else (40, 8)
        split_key, init_key, run_key = gd.random.split(gd.random.key(0), 3)
        data = split(split_key)
        net = make_net()
        start = gd.modules.init(make_net, init_key)
        net.load_state_dict(gd.modules.state_dict(net, start.params, start.buffers))
        trajectory = train(net, data, run_key, epochs, patience)
        stop = stop_of(trajectory, epochs)
        numbers = stop._asdict()
        card.picture("epochs", draw_errors(trajectory, stop), conclusion(**numbers), numbers)

        state = trajectory.best.carry
        net.load_state_dict(gd.modules.state_dict(net, state.average, state.carry.buffers))
        net.eval().requires_grad_(False)
        images, digits = data.test
        read = net(images).argmax(dim=1)
        numbers = {"wrong": int((read != digits).sum()), "of": len(digits)}
        said, question = reading_conclusion(**numbers), "What does the network read wrong?"
        card.picture("wrong", draw_wrong(images, digits, read), said, numbers, question)
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)  # on images this small, threads would only wait for one another
    raise SystemExit(main())
