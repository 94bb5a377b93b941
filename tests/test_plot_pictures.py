"""Pictures of plots against baselines of 60 × 40 colours each, in tests/baselines/.

A colour is the mean over 10 × 10 pixels. Axes have a fixed place and no legend, since versions of
matplotlib and of its fonts move texts by a few pixels. The tolerance covers that, and no curve, colour or
limit. `python -m tests.test_plot_pictures` draws the baselines again: look at the differences before you
commit them.
"""

from pathlib import Path

import matplotlib.style
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread, imsave
from matplotlib.lines import Line2D

from .drawings import PICTURES, crowd, curves, descent, grid, one_parameter, phase, samples

BASELINES = Path(__file__).parent / "baselines"
STYLE = {"font.family": "DejaVu Sans", "figure.figsize": (6.0, 4.0), "figure.dpi": 100, "savefig.dpi": 100}
TOLERANCE = 0.04  # of a colour between 0 and 1


def drawn_as(draw, change=None):
    """The colours [40, 60, 3] of a picture, perhaps after a change of its axes."""
    with matplotlib.style.context("default"), matplotlib.rc_context(STYLE):
        ax = draw(Figure().add_axes((0.14, 0.14, 0.7, 0.8)))
        ax.get_legend().remove()
        if change:
            change(ax)
        canvas = FigureCanvasAgg(ax.figure)
        canvas.draw()
        pixels = np.asarray(canvas.buffer_rgba())[..., :3] / 255
    return pixels.reshape(40, 10, 60, 10, 3).mean(axis=(1, 3))


def blurred(colors):
    """Means over 3 × 3 neighbours, to which the place of a letter matters little."""
    padded = np.pad(colors, ((1, 1), (1, 1), (0, 0)), mode="edge")
    return sum(padded[i : i + 40, j : j + 60] for i in range(3) for j in range(3)) / 9


def difference(draw, colors):
    baseline = imread(BASELINES / f"{draw.__name__}.png")[..., :3]
    return np.abs(blurred(colors) - blurred(baseline)).max()


# Faults: what a picture must not do unseen.


def lines_of(ax):
    """The lines that are long, thickest first."""
    lines = [line for line in ax.lines if len(line.get_xdata()) > 2 and line.get_linestyle() != "None"]
    return sorted(lines, key=lambda line: -line.get_linewidth())


def without_a_line(ax):
    lines_of(ax)[0].remove()


def with_colors_swapped(ax):
    one, two = lines_of(ax)[:2]
    for line, color in zip((one, two), (two.get_color(), one.get_color()), strict=True):
        for same in ax.lines:
            if same is line:
                same.set_color(color)


def with_another_x_limit(ax):
    left, right = ax.get_xlim()
    ax.set_xlim(left, right * 1.3 if ax.get_xscale() == "log" else right + 0.15 * (right - left))


def with_another_y_limit(ax):
    low, high = ax.get_ylim()
    ax.set_ylim(low, high * 3 if ax.get_yscale() == "log" else high + 0.15 * (high - low))


def with_cells_upside_down(ax):
    mesh = ax.collections[0]
    mesh.set_array(mesh.get_array()[::-1])


def with_other_colors(ax):
    ax.collections[0].set_cmap("plasma")


def without_contours(ax):
    for contours in list(ax.collections):
        contours.remove()


def with_a_curve_more(ax):
    ax.add_artist(Line2D([0, 1], [0, 1], transform=ax.transAxes, color="black"))


LINES = [without_a_line, with_another_x_limit, with_another_y_limit, with_a_curve_more]
CELLS = [
    with_another_x_limit,
    with_another_y_limit,
    with_cells_upside_down,
    with_other_colors,
]
FAULTS = [
    *((draw, fault) for draw in (curves, descent, one_parameter, samples) for fault in LINES),
    *((draw, with_colors_swapped) for draw in (curves, descent, one_parameter)),
    *((draw, without_contours) for draw in (descent, crowd, samples)),
    *((draw, fault) for draw in (grid, phase) for fault in CELLS),
]


@pytest.mark.parametrize("draw", PICTURES)
def test_pictures_are_their_baselines(draw):
    assert difference(draw, drawn_as(draw)) <= TOLERANCE
    assert (BASELINES / f"{draw.__name__}.png").stat().st_size < 30_000


@pytest.mark.parametrize(("draw", "fault"), FAULTS)
def test_no_fault_goes_unseen(draw, fault):
    assert difference(draw, drawn_as(draw, fault)) > 1.2 * TOLERANCE


def main():
    BASELINES.mkdir(exist_ok=True)
    for draw in PICTURES:
        imsave(BASELINES / f"{draw.__name__}.png", drawn_as(draw).clip(0, 1))


if __name__ == "__main__":
    main()
