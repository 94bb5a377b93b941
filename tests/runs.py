"""Runs as functions of everything that governs them, for derivatives to go through."""

import signal

import torch

import gdfunc as gd
from gdfunc import _tree
from gdfunc.adjoints import Reverse

from .references import linear_data, linear_loss, normal

# Three models: their parameters, data, and losses.


def regression():
    return {"w": torch.zeros(1, 1), "b": torch.zeros(1)}, linear_data(0, 40, 1), linear_loss_of_matrix


def linear_loss_of_matrix(params, batch):
    x, y = batch
    return ((x @ params["w"].mT + params["b"])[:, 0] - y).square().mean()


def logistic():
    x = normal(3, 40, 4)
    labels = (x @ normal(4, 4) + 0.5 * normal(5, 40) > 0).double()

    def loss_fn(params, batch):
        x, y = batch
        return torch.nn.functional.binary_cross_entropy_with_logits(x @ params, y)

    return torch.zeros(4), (x, labels), loss_fn


def mlp():
    x = normal(6, 40, 3)
    params = {"w1": 0.5 * normal(7, 3, 5), "b1": 0.1 * normal(8, 5), "w2": 0.5 * normal(9, 5, 2)}

    def loss_fn(params, batch):
        x, y = batch
        return (torch.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] - y).square().mean()

    return params, (x, torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin()], dim=1)), loss_fn


MODELS = {"regression": regression, "logistic": logistic, "mlp": mlp}
T = 12  # steps of three epochs


def make_run(model, epochs=3, **kwargs):
    """The loss on all data after epochs of four steps, as a function of everything that governs them."""
    params, data, loss_fn = MODELS[model]()
    params = _tree.map(lambda leaf: leaf.double(), params)
    index = gd.epoch_batches(gd.random.key(1), n=40, batch_size=10, epochs=epochs)

    def run(lr, lrs, momentum, init, weights, decay, adjoint=Reverse()):
        def weighted(params, batch):
            x, y, weight = batch
            return weight.mean() * loss_fn(params, (x, y))

        transform = gd.chain(gd.weight_decay(decay), gd.momentum(momentum))
        step = gd.make_step(weighted, transform)
        state = gd.TrainState(init, transform.init(init))
        final, trajectory = gd.train(
            step, state, (*data, weights), index, lr * lrs, adjoint=adjoint, **kwargs
        )
        return loss_fn(final.params, data) + 0.1 * trajectory.loss.mean()

    point = {
        "lr": torch.tensor(0.05, dtype=torch.float64),
        "lrs": torch.linspace(2.0, 0.5, 4 * epochs, dtype=torch.float64),
        "momentum": torch.tensor(0.6, dtype=torch.float64),
        "init": params,
        "weights": 1 + 0.3 * normal(10, 40).tanh(),
        "decay": torch.tensor(0.02, dtype=torch.float64),
    }
    return run, point


def ridge_run(steps=400, transform=None, backend="eager"):
    """The fit of a ridge regression to other data, as a function of its penalties and of the start."""
    data, other = linear_data(20, 30, 3), linear_data(30, 30, 3)

    def run(penalty, init, aim, adjoint=Reverse()):
        def loss_fn(params, batch):
            return linear_loss(params, batch) + penalty @ params["w"] ** 2

        how = {"backend": backend, "adjoint": adjoint, "every": 3}
        index = gd.full_batch(30, steps)
        step, lr = gd.make_step(loss_fn, transform), 0.05 if transform else 0.1
        final, trajectory = gd.train(step, step.init(init), data, index, lr, **how)
        final = final.params if transform else final
        return linear_loss(final, other) + aim * penalty.sum() ** 2 + 0 * trajectory.loss[-1]

    init = {"w": torch.zeros(3).double(), "b": torch.zeros(()).double()}
    return run, (torch.tensor([0.1, 0.2, 0.3]).double(), init, torch.tensor(0.5).double())


def ctrl_c(after):
    """A progress function that presses Ctrl-C once so many steps are done."""

    def press(done, steps):
        if done >= after:
            signal.raise_signal(signal.SIGINT)

    return press


def assert_close(got, expected, tolerance):
    got, expected = _tree.leaves(got), _tree.leaves(expected)
    scale = max(float(leaf.abs().max()) for leaf in expected)
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        assert float((a - b).abs().max()) <= tolerance * scale
