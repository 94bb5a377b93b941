"""Names and colours of curves: each curve is told apart, and the order of numbers is seen."""

import itertools

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from gdfunc.plot import plot_curves
from gdfunc.plot._labels import spread

from .assertions import assert_refused
from .pictures import drawn, legend, render, texts
from .references import few, normal

NAN, INF = float("nan"), float("inf")
# The eight of Okabe and Ito's poster, as it prints them.
OKABE_ITO = {(0, 0, 0), (230, 159, 0), (86, 180, 233), (0, 158, 115)}
OKABE_ITO |= {(240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167)}


def test_no_two_of_28_lines_look_alike_and_neighbours_differ_without_colour():
    ax = plot_curves([torch.ones(2)] * 28)
    looks = [(line.get_color(), line._unscaled_dash_pattern) for line in drawn(ax)]
    assert len(set(map(str, looks))) == 28
    assert all(one[1] != two[1] for one, two in itertools.pairwise(looks))
    colors = {tuple(round(255 * part) for part in matplotlib.colors.to_rgb(color)) for color, _ in looks}
    assert colors <= OKABE_ITO
    assert len(colors) == 7


# Names.


def seeds(n=9, steps=50, rate=0.1):
    return (-rate * torch.arange(steps)).exp() * (1 + normal(0, n, 1).square())


def test_a_dict_names_its_curves():
    ax = plot_curves({"SGD": [3, 2, 1], 5: torch.ones(2)}, label_lines=False)
    assert legend(ax) == ["SGD", "5"]
    assert [line.get_ydata().tolist() for line in drawn(ax)] == [[3, 2, 1], [1, 1]]


@pytest.mark.long
def test_a_new_figure_names_up_to_seven_curves_at_their_ends():
    curves = {f"curve {i}": torch.tensor([8.0, 2.0 ** (i + 1)]) for i in range(7)}
    ax = plot_curves(curves)
    assert texts(ax) == list(curves)
    assert [text.xy for text in ax.texts] == [(1, 2.0 ** (i + 1)) for i in range(7)]
    assert ax.get_legend() is None
    render(ax)
    boxes = [text.get_window_extent() for text in ax.texts]
    assert not any(one.overlaps(two) for one, two in itertools.combinations(boxes, 2))
    assert all(box.x1 < ax.figure.bbox.x1 for box in boxes)
    assert texts(plot_curves({**curves, "eighth": [1.0, 2.0]})) == []
    assert texts(plot_curves(list(curves.values()))) == []
    assert texts(plot_curves(curves, ax=Figure().subplots())) == []


@pytest.mark.long
def test_names_of_curves_that_end_together_are_pushed_apart():
    ax = plot_curves({f"run {i}": torch.tensor([1.0, 0.5 + 1e-9 * i]) for i in range(5)})
    render(ax)
    boxes = sorted((text.get_window_extent() for text in ax.texts), key=lambda box: box.y0)
    assert all(low.y1 <= high.y0 for low, high in itertools.pairwise(boxes))


@few
@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=12), st.floats(0.1, 50))
def test_heights_are_spread_in_order_and_moved_as_little_as_can_be(heights, gap):
    heights = np.array(heights)
    moved = spread(heights, gap)
    order = np.argsort(heights, kind="stable")
    gaps = np.diff(moved[order])
    assert (gaps >= gap - 1e-9).all()
    # The least squares solution keeps the mean of each block of names that touch.
    blocks = np.split(order, np.flatnonzero(gaps > gap + 1e-6) + 1)
    for block in blocks:
        assert moved[block].mean() == pytest.approx(heights[block].mean(), abs=1e-6)
        pushed = (moved - heights)[block].cumsum()
        assert (pushed[:-1] <= 1e-6).all()  # each part of a block wants to move together, not apart


def test_the_name_of_a_run_that_diverges_stands_at_its_last_value_in_view():
    ax = plot_curves({"lost": torch.tensor([4.0, 5.0, INF]), "kept": torch.tensor([4.0, 2.0, 1.0])})
    assert [text.xy for text in ax.texts] == [(1, 5), (2, 1)]
    assert legend(ax) == ["lost (not finite from step 2)"]


@pytest.mark.long
def test_names_stay_inside_the_view():
    ends = [1e-3, 1.1e-3, 1.2e-3, 0.9, 1.0]
    ax = plot_curves({f"run {i}": torch.tensor([0.1, end]) for i, end in enumerate(ends)})
    render(ax)
    for box in (text.get_window_extent() for text in ax.texts):
        assert ax.bbox.y0 - 2 < box.y0 < box.y1 < ax.bbox.y1 + 2


def test_what_all_curves_share_is_said_once():
    ax = plot_curves({"SGD": seeds(), "Adam": seeds(rate=0.2), "exact": torch.ones(50)}, label_lines=False)
    assert legend(ax) == ["SGD", "Adam", "exact", "median of 9, 10–90 %"]
    assert legend(plot_curves({"SGD": seeds(), "Adam": seeds(4)})) == [
        "SGD: median of 9, 10–90 %",
        "Adam: median of 4, 10–90 %",
    ]
    assert legend(plot_curves({"SGD": seeds(), "Adam": seeds()}, band=None)) == ["median of 9"]


def test_no_band_draws_the_median_alone():
    ax = plot_curves([seeds()], band=None)
    assert not ax.collections
    assert legend(ax) == ["run 0: median of 9"]
    assert np.allclose(drawn(ax)[0].get_ydata(), np.median(seeds(), axis=0))


def lightness(color):
    return np.dot(matplotlib.colors.to_rgb(color), [0.2126, 0.7152, 0.0722])


@pytest.mark.long
@given(st.permutations([0.001, 0.1, 0.5, 1, 30]))
def test_labels_that_are_numbers_have_colours_in_their_order(numbers):
    ax = plot_curves([torch.ones(2)] * 5, labels=[torch.tensor(n) for n in numbers], by="lr")
    assert texts(ax) == [f"lr {n:g}" for n in numbers]
    shades = [lightness(line.get_color()) for line in drawn(ax)]
    assert np.argsort(shades).tolist() == np.argsort(numbers).tolist()
    assert min(np.diff(sorted(shades))) > 0.05  # the order is seen without colour
    assert {line.get_linestyle() for line in drawn(ax)} == {"-"}


@pytest.mark.parametrize("labels", [[1, "2"], [True, False], [1.0, 1.0], [1.0, NAN]])
def test_labels_that_are_no_different_numbers_have_the_usual_colours(labels):
    ax = plot_curves([torch.ones(2)] * 2, labels=labels)
    assert texts(ax) == [str(label) for label in labels]
    assert len({str(line._unscaled_dash_pattern) for line in drawn(ax)}) == 2


@pytest.mark.long
def test_more_than_seven_numbers_have_a_bar_of_colours():
    lrs = np.geomspace(0.001, 0.5, 20)
    curves = {lr: torch.tensor([1.0, 1 + lr, INF if lr > 0.2 else 2.0]) for lr in lrs.tolist()}
    ax = plot_curves(curves, by="lr")
    lost = sum(lr > 0.2 for lr in lrs)
    assert legend(ax) == [f"20 curves ({lost} of them diverge, leave the view or have values ≤ 0)"]
    (bar,) = [axes for axes in ax.figure.axes if axes is not ax]
    assert bar.get_ylabel() == "lr"
    named = [text.get_text() for text in bar.get_yticklabels()]
    assert (named[0], named[-1], len(named)) == ("0.001", "0.5", 8)
    fields = bar._colorbar.cmap(bar._colorbar.norm(bar.get_yticks()))
    colors = [matplotlib.colors.to_rgba(drawn(ax)[round(at)].get_color()) for at in bar.get_yticks()]
    assert np.allclose(fields, colors)
    render(ax)


@pytest.mark.long
def test_forty_curves_without_labels_leave_room_for_the_axes():
    ax = plot_curves([torch.tensor([1.0, 1 / (i + 2)]) for i in range(40)])
    assert legend(ax) == ["40 curves"]
    named = plot_curves({f"curve {i}": torch.tensor([1.0, 1 / (i + 2)]) for i in range(40)})
    for axes in (ax, named):
        render(axes)
        assert axes.bbox.height > 0.3 * axes.figure.bbox.height


# Colours that the caller gives.

THINGS = {"full batch": "black", "mini-batch": "#D55E00", "single": "C0"}


def colors_of(ax):
    return {label: line.get_color() for label, line in zip(legend(ax), drawn(ax), strict=True)}


def test_a_thing_has_its_colour_in_every_panel_and_in_the_legend():
    one, two = (
        {name: torch.tensor([3.0, 2.0, 1.0]) for name in names}
        for names in (THINGS, ["single", "full batch"])
    )
    first, second = (plot_curves(curves, colors=THINGS, label_lines=False) for curves in (one, two))
    wanted = {name: matplotlib.colors.to_rgb(color) for name, color in THINGS.items()}
    assert colors_of(first) == wanted
    assert colors_of(second) == {name: wanted[name] for name in two}
    assert {line.get_linestyle() for line in drawn(first)} == {"-"}
    handles = [handle.get_color() for handle in second.get_legend().legend_handles]
    assert handles == [wanted[name] for name in two]


@pytest.mark.long
def test_a_list_of_colours_is_in_the_order_of_the_curves_and_a_colour_comes_again_in_dashes():
    runs = 1 + torch.arange(8.0).reshape(4, 2)
    ax = plot_curves(list(runs), colors=["red", "blue", (1, 0, 0), "r"])
    assert [line.get_color() for line in drawn(ax)] == [(1, 0, 0), (0, 0, 1), (1, 0, 0), (1, 0, 0)]
    dashes = [str(line._unscaled_dash_pattern) for line in drawn(ax)]
    assert dashes[0] == dashes[1]
    assert len({dashes[0], dashes[2], dashes[3]}) == 3
    render(ax)


def test_colours_hold_for_bands_and_for_labels_that_are_numbers():
    ax = plot_curves([seeds(), seeds(rate=0.2)], labels=[1, 2], colors={1: "red", 2: "blue"})
    assert [band.get_facecolor()[0, :3].tolist() for band in ax.collections] == [[1, 0, 0], [0, 0, 1]]
    lrs = [float(i) for i in range(1, 9)]
    colors = {lr: (lr / 9, 0, 0) for lr in lrs}
    barred = plot_curves({lr: torch.ones(2) for lr in lrs}, by="lr", colors=colors)
    (bar,) = [axes for axes in barred.figure.axes if axes is not barred]
    fields = bar._colorbar.cmap(bar._colorbar.norm(bar.get_yticks()))
    assert np.allclose(fields[:, :3], [colors[lr] for lr in lrs])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"colors": ["red"]}, "colors has 1 entries but curves has 2; give one for each"),
        ({"colors": {"a": "red"}}, "colors has no 'b'; it has 'a'"),
        (
            {"colors": {"a": "red"}, "labels": None},
            "colors is a dict by label, but the curves have no labels",
        ),
        ({"colors": ["red", "no colour"]}, r"colors\[1\] must be a colour .*got 'no colour'"),
        ({"colors": {"a": "none", "b": "red"}}, r"colors\['a'\] must be a colour .*got 'none'"),
        ({"colors": "red"}, "TypeError: colors must be a list or tuple, or a dict .*got str"),
    ],
)
def test_colours_name_what_is_wrong(arguments, message):
    curves = {"curves": [torch.ones(2)] * 2, "labels": ["a", "b"]}
    assert_refused(lambda: plot_curves(**{**curves, **arguments}), message)
