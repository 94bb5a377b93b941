"""Figures: they show themselves, follow rcParams, and leave them as they were."""

import copy
import pickle

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

import gdfunc as gd
from gdfunc import plot

from .assertions import assert_refused
from .pictures import drawn, render

CURVES = [torch.tensor([3.0, 2.0, 1.0])] * 8
NAMES = ["paper", "slide", "dark"]


def size(png):
    """Width and height, as the header of a PNG tells them."""
    assert png.startswith(b"\x89PNG")
    return tuple(int.from_bytes(png[at : at + 4], "big") for at in (16, 20))


def luminance(color):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, two):
    """The contrast of WCAG, between 1 and 21."""
    low, high = sorted((luminance(one), luminance(two)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.long
def test_a_figure_of_its_own_shows_itself_in_a_notebook():
    before = plt.get_fignums()
    ax = plot.plot_curves(CURVES)
    ax.set_title("a later title is shown, too")
    assert ax._repr_png_() == ax.figure._repr_png_()
    width, height = ax.figure.get_size_inches() * ax.figure.dpi
    assert size(ax._repr_png_()) == (int(width), int(height))
    assert plt.get_fignums() == before


@pytest.mark.long
def test_a_figure_of_its_own_can_be_copied_and_pickled():
    figure = plot.plot_curves(CURVES).figure
    for twin in (copy.deepcopy(figure), pickle.loads(pickle.dumps(figure))):
        assert size(twin._repr_png_()) == size(figure._repr_png_())


def test_axes_of_the_user_are_given_no_method():
    ax = Figure().subplots()
    assert not hasattr(plot.plot_curves(CURVES, ax=ax), "_repr_png_")


def test_a_new_figure_has_the_size_and_the_line_width_of_rcparams():
    with matplotlib.rc_context({"figure.figsize": (3.0, 2.5), "lines.linewidth": 3.5}):
        ax = plot.plot_curves(CURVES[:1])
    assert ax.figure.get_size_inches().tolist() == [3.0, 2.5]
    assert drawn(ax)[0].get_linewidth() == 3.5
    render(ax)


@pytest.mark.parametrize("name", NAMES)
def test_a_style_is_a_new_dict_and_touches_nothing(name):
    before = dict(matplotlib.rcParams)
    first = plot.style(name)
    first["font.size"] = 99
    second = plot.style(name, width=5)
    assert dict(matplotlib.rcParams) == before
    assert second.get("font.size") != 99
    assert second["figure.figsize"] == (5.0, 3.4)
    assert second["pdf.fonttype"] == second["ps.fonttype"] == 42
    assert set(second) <= set(before)


@pytest.mark.parametrize("name", [*NAMES, None, "dark_background"])
def test_every_line_and_text_stands_out_from_the_background(name):
    params = plot.style(name) if name in NAMES else {}
    with matplotlib.rc_context(params), plt.style.context(name if name == "dark_background" else []):
        ax = plot.plot_curves(CURVES, labels=[f"curve {i}" for i in range(8)])
        page = ax.get_facecolor()
        for line in drawn(ax):
            assert contrast(line.get_color(), page) > 2
        for text in [ax.xaxis.label, *ax.get_xticklabels(), *ax.get_legend().get_texts()]:
            assert contrast(text.get_color(), page) > 10
        assert contrast(ax.xaxis.get_gridlines()[0].get_color(), page) < 2
        render(ax)


@pytest.mark.long
def test_fonts_are_embedded_in_pdf_as_truetype(tmp_path):
    with matplotlib.rc_context(plot.style("paper")):
        plot.plot_curves(CURVES).figure.savefig(tmp_path / "a.pdf")
    content = (tmp_path / "a.pdf").read_bytes()
    assert b"/CIDFontType2" in content
    assert b"/Type3" not in content


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "poster"}, "style must be one of 'paper', 'slide', 'dark'; got 'poster'"),
        ({"name": "paper", "width": 0}, "width must be a finite number of inches > 0; got 0"),
        ({"name": "paper", "width": float("inf")}, "width must be a finite"),
    ],
)
def test_style_names_what_is_wrong(arguments, message):
    assert_refused(lambda: gd.plot.style(**arguments), message)
