"""What a picture says: its legend, its lines and its marks."""

import io

import numpy as np


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


def render(ax):
    """Draw it; any warning is an error here."""
    page = io.BytesIO()
    ax.figure.savefig(page, format="png", dpi=50)
    assert page.getvalue().startswith(b"\x89PNG")
