"""Losses and paths to draw, and readers of what a picture says: its legend, its lines and its marks."""

import io

import numpy as np
import torch


def bowl(w):
    """A bowl that is different along its two axes, so that no exchange of them goes unseen."""
    return w[0] ** 2 + 10 * (w[1] - 0.5) ** 2 + w[0] + 3


def rosenbrock(w):
    return (1 - w[0]) ** 2 + 100 * (w[1] - w[0] ** 2) ** 2


def descend(lr, steps, start=(-4.0, 1.0), curvature=(1.0, 10.0), dtype=torch.float64):
    """Gradient descent on ½ Σ hᵢ wᵢ² in closed form, T+1 points."""
    factors = 1 - lr * torch.tensor(curvature, dtype=dtype)
    return torch.tensor(start, dtype=dtype) * factors ** torch.arange(steps + 1)[:, None]


def quadratic(w):
    return (w[0] ** 2 + 10 * w[1] ** 2) / 2


def legend(ax):
    """The entries; long ones are broken into lines."""
    return [text.get_text().replace("\n", " ") for text in ax.get_legend().get_texts()]


def drawn(ax):
    """The lines of data, in order: not the marks of starts, ends, crosses and triangles."""
    return [line for line in ax.lines if line.get_linestyle() != "None" and line.get_linewidth() > 1]


def marks(ax, marker):
    found = [line.get_xydata() for line in ax.lines if line.get_marker() == marker]
    return np.concatenate([np.empty((0, 2)), *found])


def crosses(ax):
    return marks(ax, "x")


def texts(ax):
    """The texts inside the axes, such as the names next to the ends of lines."""
    return [text.get_text() for text in ax.texts]


def render(ax):
    """Draw it; any warning is an error here."""
    page = io.BytesIO()
    ax.figure.savefig(page, format="png", dpi=50)
    assert page.getvalue().startswith(b"\x89PNG")
