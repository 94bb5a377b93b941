"""Crowds, runs that explode, long labels and small figures: pictures that have to stay readable."""

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

import gdfunc as gd
from gdfunc import plot
from gdfunc.plot._contrast import contrast, luminance

from .pictures import crosses, descend, legend, quadratic, render, texts
from .references import normal

NAN, INF = float("nan"), float("inf")


def crowd(ax=None, bad=None):
    """Ten paths that end at ever higher losses, and perhaps a bad one."""
    paths = [descend(0.018 * (10 - i), 30) for i in range(10)]
    return plot.plot_descent(quadratic, paths + [bad] * (bad is not None), ax=ax)


def paths_of(ax):
    return [line for line in ax.lines if line.get_linestyle() != "None" and len(line.get_xdata()) > 1]


def finals(ax):
    return [quadratic(line.get_xydata()[-1]) for line in paths_of(ax)]


# Crowds of paths.


@pytest.mark.long
@pytest.mark.parametrize("style", ["paper", "dark"])
def test_paths_of_a_crowd_are_the_darker_the_higher_they_end_and_stand_out_from_every_grey(style):
    with matplotlib.rc_context(plot.style(style)):
        ax = crowd()
        render(ax)
    colors = [to_rgb(line.get_color()) for line in paths_of(ax)]
    order = np.argsort(finals(ax))
    assert (np.diff(np.array([luminance(color) for color in colors])[order]) < 0).all()
    greys = ax.collections[0].get_cmap().colors
    assert min(contrast(color, grey) for color in colors for grey in greys) >= 2


@pytest.mark.long
def test_a_bar_tells_the_final_losses_of_a_crowd():
    ax = crowd()
    bar = ax.figure.axes[1]
    assert bar.get_ylabel() == "final loss"
    assert np.allclose(bar.get_ylim(), [min(finals(ax)), max(finals(ax))])
    assert bar.get_yscale() == "log"
    assert legend(ax)[0] == "10 paths"
    render(ax)
    assert ax.bbox.width > 250


@pytest.mark.long
def test_the_bar_of_a_crowd_is_linear_for_losses_that_are_near_each_other_or_negative():
    for loss in (lambda w: quadratic(w) + 100, lambda w: quadratic(w) - 3):
        ax = plot.plot_descent(loss, [descend(0.02 * i, 10) for i in range(1, 11)])
        assert ax.figure.axes[1].get_yscale() == "linear"
        render(ax)


@pytest.mark.long
@pytest.mark.parametrize("end", [[30.0, 30.0], [NAN, 0.0], [1e160, 1e160]])
def test_a_path_that_ends_above_every_start_has_the_colour_of_the_upper_end(end):
    plain = crowd()
    ax = crowd(bad=torch.tensor([[-4.0, 1.0], end], dtype=torch.float64))
    assert ax.figure.axes[1].get_ylim() == plain.figure.axes[1].get_ylim()
    colors = [line.get_color() for line in ax.lines if line.get_linestyle() == "-"]
    darkest = min(colors[:10], key=luminance)
    assert np.allclose(colors[10], darkest)
    render(ax)


def test_a_crowd_that_ends_at_one_loss_has_one_colour_and_no_bar():
    ax = plot.plot_descent(quadratic, [descend(0.1, 10)] * 10)
    assert len(ax.figure.axes) == 1
    assert len({line.get_color() for line in paths_of(ax)}) == 1


@pytest.mark.long
def test_labelled_paths_and_up_to_seven_have_colours_of_their_own():
    for paths in (
        {i: descend(0.02 * i, 5) for i in range(1, 10)},
        [descend(0.02 * i, 5) for i in range(7)],
    ):
        ax = plot.plot_descent(quadratic, paths)
        assert len(ax.figure.axes) == 1
        assert len({line.get_color() for line in paths_of(ax)}) == 7


@pytest.mark.long
@pytest.mark.parametrize("layout", ["constrained", "tight", None])
def test_a_crowd_on_a_plane_has_the_colours_of_its_true_losses_beside_it_too(layout):
    def loss(w, _):
        return (w**2).sum() + w[0] ** 4

    paths = [(0.5 + 0.2 * i) * normal(i, 6, 4).cumsum(0).flip(0) for i in range(9)]
    ax = plot.plot_landscape(loss, paths, ax=Figure(figsize=(9, 5), layout=layout).subplots(), resolution=9)
    side = ax.figure.axes[-1]
    assert (side.get_xlabel(), side.get_ylabel()) == ("step", "loss")
    true = [float(loss(path[-1], None)) for path in paths]
    assert np.allclose([line.get_ydata()[-1] for line in side.lines[::2]], true)
    shades = [line.get_color() for line in side.lines[::2]]
    plane = [line.get_color() for line in ax.lines if line.get_linestyle() == "-"]
    assert np.allclose(shades, plane)
    order = np.argsort(true)
    assert (np.diff([luminance(shades[i]) for i in order]) <= 0).all()
    render(ax)
    assert not ax.bbox.overlaps(side.bbox)


# Runs that explode, and stay finite.


def exploding(size=1e60):
    steady = torch.exp(-0.02 * torch.arange(100.0, dtype=torch.float64)).repeat(8, 1)
    wild = torch.logspace(0, np.log10(size), 100, dtype=torch.float64)
    return torch.cat([steady, wild[None], wild[None] ** 1.5])


@pytest.mark.long
@pytest.mark.parametrize("log_y", [True, False])
def test_a_finite_run_that_explodes_has_diverged_and_flattens_nothing(log_y):
    ax = plot.plot_curves([exploding()], log_y=log_y)
    top = ax.get_ylim()[1]
    assert top < (1e5 if log_y else 5)
    assert texts(ax) == ["2 of 10 diverged"]
    assert len(crosses(ax)) == 2
    assert (crosses(ax)[:, 1] <= top).all()
    render(ax)


def test_a_single_run_that_explodes_among_others_leaves_the_view_and_is_told():
    ax = plot.plot_curves([*exploding()[:8], exploding()[8]])
    assert ax.get_ylim()[1] < 1e5
    assert "leave the view" in legend(ax)[0]
    assert len(crosses(ax)) == 1


@pytest.mark.parametrize("size", [1e3, 1e8])
def test_a_run_that_grows_less_than_a_billionfold_is_shown_whole(size):
    ax = plot.plot_curves([*exploding(size)[:9]])
    assert ax.get_ylim()[1] >= size
    assert len(crosses(ax)) == 0


def test_curves_that_all_grow_are_shown_whole():
    ax = plot.plot_curves([torch.logspace(-30, 30, 50)] * 2)
    assert ax.get_ylim()[1] >= 1e30
    assert len(crosses(ax)) == 0


# Labels and legends.


def test_names_that_would_take_more_than_half_of_the_axes_are_in_the_legend():
    names = [f"a label of sixty characters, which goes on until it is over {i}" for i in range(4)]
    ax = plot.plot_curves([torch.ones(3) * (i + 1) for i in range(4)], labels=names)
    assert texts(ax) == []
    assert legend(ax) == names
    render(ax)
    assert ax.bbox.width > 0.8 * ax.figure.bbox.width


@pytest.mark.long
def test_the_legend_of_axes_without_a_layout_is_wrapped_to_their_width():
    for ax in Figure(figsize=(10, 4)).subplots(1, 3):
        plot.plot_curves([torch.ones(3)], labels=["a long name of a run " * 4], ax=ax)
        ax.figure.draw_without_rendering()
        box = ax.get_legend().get_window_extent()
        assert ax.bbox.x0 <= box.x0
        assert box.x1 <= ax.bbox.x1


@pytest.mark.long
@pytest.mark.parametrize("layout", ["constrained", None])
def test_twin_axes_share_a_legend_and_show_both_of_their_sides(layout):
    ax = Figure(layout=layout).subplots()
    plot.plot_curves([torch.ones(3)], labels=["loss of the first axes"], ax=ax)
    twin = plot.plot_curves([torch.ones(3)], labels=["lr"], ax=ax.twinx())
    assert ax.get_legend() is None
    assert legend(twin) == ["loss of the first axes", "lr"]
    assert ax.spines["left"].get_visible()
    assert twin.spines["right"].get_visible()
    render(ax)


def test_axes_side_by_side_have_legends_of_their_own():
    one, two = Figure(layout="constrained").subplots(1, 2)
    plot.plot_curves([torch.ones(3)], labels=["loss"], ax=one)
    plot.plot_curves([torch.ones(3)], labels=["lr"], ax=two)
    assert (legend(one), legend(two)) == (["loss"], ["lr"])


def test_minimizers_out_of_view_are_counted():
    limits = ((-5, -1), (-1, 1))
    stars = [torch.zeros(2), torch.tensor([-2.0, 0.0])]
    for given, said in ((stars, "minimizer (1 of 2 outside the view)"), (stars[1:], "minimizer")):
        ax = plot.plot_descent(quadratic, [descend(0.1, 3)], minimizers=given, limits=limits)
        assert legend(ax)[-1] == said


# Small figures.

RESULT = gd.sweep(
    lambda momentum, lr: torch.where(lr > 2, INF, lr + momentum),
    gd.grid(momentum=[0.0, 0.5, 0.9], lr=[0.001, 0.01, 0.1, 1.0, 3.0]),
)


@pytest.mark.long
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(
    ("draw", "inches"),
    [
        (lambda ax: plot.plot_curves({"SGD": exploding(), "Adam": exploding()[:3]}, ax=ax), 1.6),
        (
            lambda ax: plot.plot_descent(quadratic, {"a": descend(0.1, 9), "b": descend(0.19, 9)}, ax=ax),
            1.6,
        ),
        (lambda ax: plot.plot_descent(lambda w: (w**2).sum(), [descend(0.1, 9)[:, 0]], ax=ax), 1.6),
        # Bars of colours need room of their own.
        (crowd, 2.6),
        (lambda ax: plot.plot_grid(RESULT, "lr", "momentum", log_x=True, ax=ax), 2.2),
    ],
)
def test_small_figures_keep_their_axes(draw, inches, own):
    size = (inches, inches)
    with matplotlib.rc_context({"figure.figsize": size}):
        ax = draw(None if own else Figure(figsize=size, layout="constrained").subplots())
        render(ax)
        assert ax.bbox.height > 0.12 * ax.figure.bbox.height
        assert ax.bbox.width > 0.1 * ax.figure.bbox.width
