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

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
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


def draw(trajectory: gd.Trajectory, net: nn.Module, test: Data, path: Path) -> None:
    """Draw the errors on the validation digits over the epochs, and all test digits that are read wrong."""
    images, digits = test
    read = net(images).argmax(dim=1)
    wrong = torch.nonzero(read != digits)[:, 0]
    epochs = len(trajectory.average)
    figure = Figure(figsize=(10, 5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(3, 2))

    ax = left.subplots()
    errors = [100 * (1 - trajectory.parameters), 100 * (1 - trajectory.average)]
    gd.plot.plot_curves(
        errors,
        x=torch.arange(1, epochs + 1),
        ax=ax,
        labels=["parameters", "their moving average"],
        xlabel="epoch",
        ylabel="validation digits read wrong, %",
    )
    best = int(trajectory.best.step) // (TRAINED // BATCH_SIZE)
    ax.axvline(best, color="0.4", linewidth=1)
    ax.annotate(f" best average: epoch {best}", (best, ax.get_ylim()[1]), va="top", color="0.4")
    error = 100 * (1 - trajectory.best.value)
    ax.set_title(
        f"Stopped after epoch {epochs}, back to {best}: {error:.1f} % of validation digits read wrong"
    )

    axes = list(right.subplots(max(1, -(-len(wrong) // 3)), 3, squeeze=False).flat)
    for place in axes:
        place.set_axis_off()
    for place, i in zip(axes, wrong, strict=False):
        place.imshow(images[i, 0].numpy(), cmap="gray_r")
        place.set_title(f"{int(digits[i])} read as {int(read[i])}", fontsize=9)
    right.suptitle(f"All {len(wrong)} of {len(digits)} test digits that are read wrong")
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/your_module"), help="folder for the picture")
    parser.add_argument("--fast", action="store_true", help="fewer epochs")
    args = parser.parse_args(argv)
    epochs, patience = (4, 2) if args.fast else (40, 8)
    args.out.mkdir(parents=True, exist_ok=True)

    split_key, init_key, run_key = gd.random.split(gd.random.key(0), 3)
    data = split(split_key)
    net = make_net()
    start = gd.modules.init(make_net, init_key)
    net.load_state_dict(gd.modules.state_dict(net, start.params, start.buffers))
    trajectory = train(net, data, run_key, epochs, patience)

    state = trajectory.best.carry
    net.load_state_dict(gd.modules.state_dict(net, state.average, state.carry.buffers))
    net.eval().requires_grad_(False)
    accuracy = share_right(net(data.test[0]), data.test[1])
    taken, best = (int(t) // (TRAINED // BATCH_SIZE) for t in (trajectory.steps, trajectory.best.step))
    print(f"Trained for {taken} of {epochs} epochs.")
    print(f"The best by validation was epoch {best}, with {trajectory.best.value:.2%} right.")
    print(f"The nn.Module reads {accuracy:.2%} of {len(data.test[1])} test digits right.")
    draw(trajectory, net, data.test, args.out / "your_module.png")
    print(f"Written: your_module.png in {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
