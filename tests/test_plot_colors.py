"""Colours without colour: three kinds of colour blindness, greyscale, and files for print.

References:
    Gustavo Machado, Manuel Oliveira and Leandro Fernandes, A Physiologically-based Model for Simulation of
    Color Vision Deficiency, 2009 (the matrices of full severity, on linear RGB).
    CIE 15:2004, Colorimetry (L*a*b*, of which 2.3 is a just noticeable difference).
"""

import itertools
import re

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from gdfunc import plot
from gdfunc.plot._phase import _COLORS

from .drawings import PICTURES, crowd, descent, grid, phase
from .pictures import descend, drawn, quadratic

VISIONS = {
    "usual": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
    "greyscale": [[0.2126, 0.7152, 0.0722]] * 3,
}
COLOR_BLIND = [name for name in VISIONS if name != "greyscale"]
TO_XYZ = [
    [0.4124564, 0.3575761, 0.1804375],
    [0.2126729, 0.7151522, 0.0721750],
    [0.0193339, 0.1191920, 0.9503041],
]


def lab(color, vision):
    """L*a*b* of a colour as it is seen."""
    parts = np.array(to_rgb(color))
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    seen = np.clip(VISIONS[vision] @ linear, 0, 1)
    x, y, z = (TO_XYZ @ seen) / np.sum(TO_XYZ, axis=1)
    x, y, z = (np.cbrt(v) if v > 216 / 24389 else (24389 / 27 * v + 16) / 116 for v in (x, y, z))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def distances(colors, vision):
    seen = [lab(color, vision) for color in colors]
    return [float(np.linalg.norm(one - two)) for one, two in itertools.combinations(seen, 2)]


def test_grey_has_no_colour_and_white_is_100():
    assert np.allclose(lab("#ffffff", "usual"), [100, 0, 0], atol=0.02)
    assert np.allclose(lab("#ff0000", "usual"), [53.24, 80.09, 67.20], atol=0.02)
    for vision in VISIONS:
        assert np.allclose(lab("#808080", vision)[1:], 0, atol=0.3)
    # The colours that protanopes and deuteranopes confuse.
    assert (
        distances(["#009E73", "#CC79A7"], "usual")[0]
        > 4 * distances(["#009E73", "#CC79A7"], "deuteranopia")[0]
    )


@pytest.mark.long
@pytest.mark.parametrize("style", ["paper", "dark"])
@pytest.mark.parametrize("vision", COLOR_BLIND)
def test_no_two_paths_look_alike_to_the_colour_blind(style, vision):
    with matplotlib.rc_context(plot.style(style)):
        ax = plot.plot_descent(quadratic, [descend(0.02 * i, 5) for i in range(1, 8)])
    colors = [line.get_color() for line in drawn(ax)]
    assert len(colors) == 7
    assert min(distances(colors, vision)) > 15


@pytest.mark.parametrize("vision", VISIONS)
def test_neighbouring_curves_differ_in_dashes_or_clearly_in_lightness(vision):
    ax = plot.plot_curves([np.ones(3)] * 28)
    for one, two in itertools.pairwise(drawn(ax)):
        lightness = abs(lab(one.get_color(), vision)[0] - lab(two.get_color(), vision)[0])
        assert one._unscaled_dash_pattern != two._unscaled_dash_pattern or lightness > 15


@pytest.mark.parametrize("count", [2, 7, 12])
def test_paths_that_are_named_in_the_legend_alone_differ_in_dashes(count):
    names = [f"a label of sixty characters, which goes on until it is over {i}" for i in range(count)]
    ax = plot.plot_descent(quadratic, [descend(0.01 * i, 5) for i in range(1, count + 1)], labels=names)
    lines = [line for line in ax.lines if line.get_linestyle() != "None"]
    assert len(lines) == count
    looks = [(line.get_color(), str(line._unscaled_dash_pattern)) for line in lines]
    assert len({*looks}) == count
    assert all(one[1] != two[1] for one, two in itertools.pairwise(looks))


def is_monotone(colors, vision):
    steps = np.diff([lab(color, vision)[0] for color in colors])
    return (steps > 0).all() or (steps < 0).all()


@pytest.mark.parametrize("vision", VISIONS)
def test_colours_of_a_map_are_in_order_of_lightness(vision):
    assert is_monotone(grid(None).collections[0].get_cmap()(np.linspace(0, 1, 40)), vision)


@pytest.mark.long
@pytest.mark.parametrize("vision", VISIONS)
@pytest.mark.parametrize("style", ["paper", "dark"])
def test_ordered_curves_and_crowds_of_paths_are_in_order_of_lightness(vision, style):
    with matplotlib.rc_context(plot.style(style)):
        ax = plot.plot_curves({lr: np.ones(3) for lr in range(1, 21)})
        assert is_monotone([line.get_color() for line in drawn(ax)], vision)
        figure = plot.plot_descent(quadratic, [descend(0.009 * i, 9) for i in range(1, 21)]).figure
        colors = figure.axes[1].collections[-1].get_cmap()
        assert is_monotone(colors(np.linspace(0, 1, 40)), vision)


@pytest.mark.parametrize("vision", VISIONS)
def test_outcomes_are_told_apart_without_colour(vision):
    assert min(distances(_COLORS, vision)) > (8 if vision == "greyscale" else 25)


# Files for print.


def saved(draw, path):
    with matplotlib.rc_context(plot.style("paper")):
        draw(None).figure.savefig(path)
    return path.read_bytes()


@pytest.mark.long
@pytest.mark.parametrize("draw", PICTURES)
def test_files_for_print_are_small_and_embed_truetype(draw, tmp_path):
    content = saved(draw, tmp_path / "a.pdf")
    assert b"/CIDFontType2" in content
    assert b"/Type3" not in content
    assert len(content) < 100_000
    assert len(saved(draw, tmp_path / "a.svg")) < 250_000


@pytest.mark.long
@pytest.mark.parametrize("draw", [descent, crowd, grid, phase])
def test_contours_and_cells_are_one_raster_and_lines_stay_vectors(draw, tmp_path):
    page = saved(draw, tmp_path / "a.svg")
    assert page.count(b"<image") >= 1
    for kind in (b"QuadContourSet", b"QuadMesh"):
        group = page.partition(b'<g id="%s' % kind)[2].partition(b"</g>")[0]
        assert b"<path" not in group
    # The longest path is that of a descent or a letter, and no contour of 200 x 200 points.
    assert max(map(len, re.findall(rb' d="([^"]*)"', page))) < 6000
    assert page.count(b'<g id="line2d') > 5
