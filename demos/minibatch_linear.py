"""A linear regression by mini-batches: a tutorial's loop and gdfunc on the same batches, side by side.

Source: "Pytorch 梯度下降算法【3/9】小批量梯度下降(Mini-Batch Gradient Descent)" (gradient descent in
PyTorch, part 3 of 9: mini-batch gradient descent), Huawei Cloud community, 2023. It fits y = 2x + 1 to 100
noisy rows with nn.Linear, nn.MSELoss and torch.optim.SGD (lr 0.01, batches of ten, 100 epochs), and prints
the loss of the last batch of every tenth epoch, and the weights at the end.

Its rows come from numpy.random.seed(42); RandomState(42) draws the same and leaves the global generator
alone. Its first weights and its order come from torch's global generator, without a seed; here they come
from keys, and both loops get the same. The logged losses and the final weights of the two loops must agree
to 1e-6 in float32 and to 1e-12 in float64; otherwise the exit status is 1.

    python demos/minibatch_linear.py [--out DIR] [--fast]
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import gdfunc as gd

ROWS, BATCH, EPOCHS, LR = 100, 10, 100, 0.01
LOG_EVERY = 10  # epochs
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}

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
    """What a loop leaves: the loss of every batch [T], and the weights after the last."""

    losses: Tensor
    params: Params


def tutorial_loop(data: Data, index: Tensor, init: Params) -> Run:
    x, y = data
    model = make_model(init)
    criterion = nn.MSELoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    losses = []
    for batch_indices in index:
        optimizer.zero_grad()
        loss = criterion(model(x[batch_indices]), y[batch_indices])
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return Run(torch.stack(losses), model.state_dict())


def gdfunc_loop(data: Data, index: Tensor, init: Params) -> Run:
    apply, params, _ = gd.modules.functional(make_model(init))

    def loss_fn(params: Params, batch: Data) -> Tensor:
        x, y = batch
        return gd.losses.mse(apply(params, x), y)

    final, trajectory = gd.train(gd.make_step(loss_fn), params, data, index, LR)
    return Run(trajectory.loss, final)


class Comparison(NamedTuple):
    tutorial: Run
    gdfunc: Run
    loss_difference: float  # the largest of the logged losses
    param_difference: float  # the largest of the final weights
    agree: bool


def logged(losses: Tensor) -> Tensor:
    """The losses that the tutorial prints: of the last batch of epochs 10, 20, …, 100."""
    return losses.reshape(EPOCHS, -1)[LOG_EVERY - 1 :: LOG_EVERY, -1]


def compare(dtype: torch.dtype) -> Comparison:
    data, init = tutorial_data(dtype), initial_params(dtype)
    index = gd.epoch_batches(gd.random.key(1), ROWS, BATCH, EPOCHS)
    theirs, ours = tutorial_loop(data, index, init), gdfunc_loop(data, index, init)
    loss_difference = float((logged(ours.losses) - logged(theirs.losses)).abs().max())
    param_difference = max(float((ours.params[name] - theirs.params[name]).abs().max()) for name in init)
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
    print(f"Largest difference of the parameters:    {result.param_difference:.1e}")
    print(f"Allowed: {TOLERANCE[dtype]:.0e}. They {'agree' if result.agree else 'DIFFER'}.\n")


def draw(path: Path, results: dict[torch.dtype, Comparison]) -> None:
    def by_epoch(losses: Tensor) -> Tensor:
        return losses.reshape(EPOCHS, -1)

    figure = Figure((11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = torch.arange(1, EPOCHS + 1)
    tutorial, ours, *_ = results[torch.float32]
    gd.plot.plot_curves(
        [by_epoch(run.losses).mean(dim=1) for run in (tutorial, ours)],
        x=epochs,
        ax=left,
        labels=["the tutorial, torch.optim.SGD", "gdfunc"],
        xlabel="epoch",
        ylabel="loss in float32, mean over the epoch",
    )
    gd.plot.plot_curves(
        [
            by_epoch(ours.losses - tutorial.losses).abs().amax(dim=1) / torch.finfo(dtype).eps
            for dtype, (tutorial, ours, *_) in results.items()
        ],
        x=epochs,
        ax=right,
        labels=[f"{name_of(dtype)}, ε = {torch.finfo(dtype).eps:.1e}" for dtype in results],
        xlabel="epoch",
        ylabel="largest difference of a loss, in ε",
        log_y=False,
    )
    figure.savefig(path, dpi=150)
    print(f"saved {path}")


def save_losses(path: Path, results: dict[torch.dtype, Comparison]) -> None:
    """Write the loss of every update, with all its digits."""
    columns = {
        f"{who}_{name_of(dtype)}": run.losses.double()
        for dtype, (tutorial, ours, *_) in results.items()
        for who, run in {"tutorial": tutorial, "gdfunc": ours}.items()
    }
    table = torch.stack([torch.arange(1, len(next(iter(columns.values()))) + 1), *columns.values()], dim=1)
    header = ",".join(["update", *columns])
    np.savetxt(path, table.numpy(), fmt="%.17g", delimiter=",", header=header, comments="")
    print(f"saved {path}")


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="A tutorial's mini-batch loop and gdfunc, side by side.")
    parser.add_argument("--out", type=Path, default=Path("out/minibatch_linear"), help="where results go")
    parser.add_argument("--fast", action="store_true", help="changes nothing: it takes seconds anyway")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    results = {dtype: compare(dtype) for dtype in TOLERANCE}
    for dtype, result in results.items():
        show(dtype, result)
    draw(args.out / "losses.png", results)
    save_losses(args.out / "losses.csv", results)
    return 0 if all(result.agree for result in results.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
