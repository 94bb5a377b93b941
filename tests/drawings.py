"""One picture of each kind, drawn from formulas: into given axes, or into a figure of its own."""

import numpy as np
import torch

import gdfunc as gd
from gdfunc import plot

from .pictures import bowl, descend, quadratic

STEPS = torch.arange(40.0, dtype=torch.float64)
LRS = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0]
GRID = gd.grid(momentum=[0.0, 0.5, 0.9], lr=LRS)


def curves(ax):
    seeds = torch.linspace(0.7, 1.4, 5, dtype=torch.float64)[:, None]
    lost = torch.where(STEPS < 25, torch.exp(0.1 * STEPS), torch.inf)
    return plot.plot_curves(
        {
            "full batch": torch.exp(-0.2 * STEPS),
            "mini-batch": torch.cat([seeds * (torch.exp(-0.15 * STEPS) + 0.02), lost[None]]),
            "single": 0.3 + torch.exp(-0.3 * STEPS),
        },
        label_lines=True,
        ax=ax,
    )


def descent(ax):
    paths = {"lr 0.05": descend(0.05, 30), "lr 0.18": descend(0.18, 30), "lr 0.205": descend(0.205, 30)}
    return plot.plot_descent(quadratic, paths, minimizers=[torch.zeros(2)], ax=ax)


def one_parameter(ax):
    return plot.plot_descent(lambda w: (w**2).sum() + 1, [descend(0.85, 6)[:, 0]], ax=ax)


def crowd(ax):
    return plot.plot_descent(
        bowl, [descend(0.1, 12, (4 * np.cos(i), 2 * np.sin(2 * i))) for i in range(12)], ax=ax
    )


def samples(ax):
    x = torch.linspace(-2, 2, 12, dtype=torch.float64)
    batch = (x, 3 * x + torch.sin(9 * x))

    def loss(w, batch):
        return ((w * batch[0] - batch[1]) ** 2).mean()

    return plot.plot_samples(loss, torch.tensor(5.0, dtype=torch.float64), batch, at=[9.0, 3.0], ax=ax)


def grid(ax):
    def run(momentum, lr):
        return torch.where(
            lr > 2 * (1 - momentum**2) + 0.5, torch.inf, (lr - 0.2 - 0.1 * momentum) ** 2 + 0.01
        )

    return plot.plot_grid(gd.sweep(run, GRID), "lr", "momentum", log_x=True, ax=ax)


def phase(ax):
    def run(momentum, lr):
        steps = torch.arange(40.0)
        return (1 - lr) ** steps * (1 + momentum * torch.cos(steps)) + 1e-4

    return plot.plot_phase(gd.sweep(run, GRID), "lr", "momentum", log_x=True, ax=ax)


PICTURES = [curves, descent, one_parameter, crowd, samples, grid, phase]
