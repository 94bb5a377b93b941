"""Plots: what is drawn is what was given, and the legend tells the truth about it."""

import subprocess
import sys

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure

import gdfunc as gd
from gdfunc.plot import plot_curves, plot_descent, plot_grid

from .assertions import assert_refused
from .pictures import bowl, crosses, descend, legend, quadratic, render
from .references import few

NAN, INF = float("nan"), float("inf")
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
# The eight of Okabe and Ito's poster, as it prints them.
OKABE_ITO = {(0, 0, 0), (230, 159, 0), (86, 180, 233), (0, 158, 115)}
OKABE_ITO |= {(240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167)}
PATH = torch.zeros(3, 2)


# What both promise.


def both(ax=None):
    runs = torch.tensor([[2.0, 1.0], [2.0, INF]])
    return plot_descent(quadratic, [descend(0.21, 20)], ax=ax), plot_curves([runs, runs[0]], ax=ax)


def test_the_given_axes_are_returned_and_nothing_global_is_touched():
    parameters, figures = dict(matplotlib.rcParams), plt.get_fignums()
    for axes in (None, Figure().add_subplot()):
        for ax in both(axes):
            assert axes is None or ax is axes
            render(ax)
    assert dict(matplotlib.rcParams) == parameters
    assert plt.get_fignums() == figures


def test_the_inputs_are_left_alone():
    path, runs, x = descend(0.21, 20), torch.tensor([[2.0, 1.0], [NAN, -1.0]]), np.array([1.0, 2.0])
    copies = path.clone(), runs.clone(), x.copy()

    def loss(w):
        return w.mul_(2).sum()

    for line in plot_descent(loss, [path]).lines + plot_curves([runs], x=[x], minimum=1).lines:
        line.get_xydata()[:] = 0
        line.get_ydata(orig=True)[:] = 0
    assert torch.equal(path, copies[0])
    assert torch.equal(runs.nan_to_num(7), copies[1].nan_to_num(7))
    assert np.array_equal(x, copies[2])
    assert path._version == runs._version == 0


@pytest.mark.parametrize("kind", [np.array, torch.DoubleTensor])
def test_what_is_done_to_the_artists_does_not_reach_the_inputs(kind):
    levels = kind([3.0, 5.0, 8.0])
    for contours in plot_descent(bowl, [PATH.clone()], levels=levels).collections:
        contours.levels[:] = 0
    assert levels.tolist() == [3, 5, 8]


def test_a_long_legend_fits():
    labels = ["a very long name of a run that goes on and on " * 3]
    for layout in ("constrained", "tight", None):
        one, two = Figure(figsize=(8, 4), layout=layout).subplots(1, 2)
        plot_descent(quadratic, [descend(0.21, 20)], labels=labels, ax=one)
        plot_curves([torch.ones(3)], labels=labels, ax=two)
        render(one)


def test_the_legend_never_covers_the_lines_of_a_figure_of_its_own():
    for ax in both():
        render(ax)
        assert ax.get_legend().get_window_extent().y1 < ax.bbox.y0


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    for draw in (lambda: plot_descent(quadratic, [PATH]), lambda: plot_curves([torch.ones(3)])):
        with pytest.raises(
            ModuleNotFoundError, match=r"^gdfunc\.plot needs matplotlib: pip install 'gdfunc\[plot\]'$"
        ):
            draw()


def test_matplotlib_is_imported_only_to_draw_and_pyplot_never():
    script = """
import sys, torch, gdfunc.plot
assert "matplotlib" not in sys.modules
gdfunc.plot.plot_curves([torch.ones(3)])
gdfunc.plot.plot_descent(lambda w: w.sum(), [torch.ones(3, 2)])
assert "matplotlib" in sys.modules
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)


# The map of a sweep.


def swept(**axes):
    """A sweep whose outputs tell which point they are of."""
    grid = gd.grid(**axes)

    def run(**point):
        return sum(10**i * torch.as_tensor(value).double() for i, value in enumerate(point.values()))

    return gd.sweep(run, grid)


def mesh(ax):
    (found,) = [artist for artist in ax.collections if isinstance(artist, QuadMesh)]
    return found


@few
@given(st.permutations(["a", "b", "key"]), st.booleans(), st.booleans())
def test_a_map_has_each_median_at_its_place(order, log_x, backwards):
    values = {"a": [1.0, 2.0, 5.0], "b": [3, 4][:: -1 if backwards else 1], "key": [0.0, 7.0, 9.0, 13.0]}
    result = swept(**{name: values[name] for name in order})
    ax = plot_grid(result, "a", "b", log_x=log_x)
    shown = mesh(ax).get_array()
    for i, b in enumerate(values["b"]):
        for j, a in enumerate(values["a"]):
            points = result.select(a=a, b=b).outputs
            assert shown[i, j] == pytest.approx(points.quantile(0.5).item())
            corners = mesh(ax).get_coordinates()[i : i + 2, j : j + 2].reshape(4, 2)
            assert (corners.min(axis=0) < (a, b)).all()
            assert (corners.max(axis=0) > (a, b)).all()
    edge = 2**0.5 if log_x else 1.5
    assert mesh(ax).get_coordinates()[0, 1, 0] == pytest.approx(edge)
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_xscale()) == ("a", "b", "log" if log_x else "linear")
    assert ax.get_legend() is None
    render(ax)


def test_a_map_hatches_what_diverged_and_crosses_what_did_in_part():
    lost = {(1, 1): 1, (2, 1): 2, (2, 2): 3}  # how many of 3 members of a cell

    def run(a, b, member):
        return torch.tensor(INF if member < lost.get((a, b), 0) else float(a))

    result = gd.sweep(run, gd.grid(a=[1, 2], b=[1, 2], member=[0, 1, 2]))
    ax = plot_grid(result, "a", "b")
    assert mesh(ax).get_array().mask.tolist() == [[False, True], [False, True]]
    assert ax.patch.get_hatch()
    assert legend(ax) == ["2 of 4 cells: diverged", "1 of 4 cells: some of the runs diverged"]
    assert crosses(ax).tolist() == [[1, 1]]
    render(ax)


def test_a_map_shows_what_is_beyond_its_limits_at_their_ends():
    result = swept(a=[1.0, 2.0, 3.0], b=[0.0])
    values = torch.tensor([-1.0, 0.5, 100.0])
    ax = plot_grid(result, "a", "b", values=values, limits=(0.1, 10), log_color=True)
    assert not np.ma.is_masked(mesh(ax).get_array())
    low, middle, high = mesh(ax).to_rgba(mesh(ax).get_array())[0].tolist()
    scale = mesh(ax).to_rgba(np.array([0.1, 10.0])).tolist()
    assert [low, high] == scale
    assert middle not in scale
    assert mesh(ax).colorbar.extend == "both"
    render(ax)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("value", [0.0, 5.0, NAN, 1e300])
def test_a_map_of_one_value_is_drawn(value, log):
    result = swept(a=[1.0], b=[1.0, 2.0])
    values = torch.full((2,), value, dtype=torch.float64)
    ax = plot_grid(result, "a", "b", values=values, log_color=log, label="loss")
    assert (ax.get_legend() is None) == (value < 10)
    assert mesh(ax).colorbar.ax.get_ylabel() == "loss"
    render(ax)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"result": torch.ones(4)}, "TypeError: result is Tensor; pass what gd.sweep returns"),
        ({"x": "c"}, "two of the grid's axes, a, b, f; got 'c' and 'b'"),
        ({"x": "b"}, "got 'b' and 'b'"),
        ({"x": "f"}, "axis f must have numbers as its values"),
        ({"x": "a", "log_x": True}, "axis a has the value 0"),
        ({"values": torch.ones(3)}, r"each of the 8 members; got shape \(3,\)"),
        ({"limits": (1.0, 2.0, 3.0)}, "limits must be two numbers"),
        ({"limits": (2.0, 1.0)}, "limits must be"),
        ({"limits": (0.0, 1.0), "log_color": True}, "two positive numbers"),
    ],
)
def test_a_map_names_what_does_not_fit(changed, message):
    result = gd.sweep(lambda a, b, f: a + b, gd.grid(a=[0.0, 2.0], b=[3.0, 1.0], f=["one", "two"]))
    assert_refused(lambda: plot_grid(**{"result": result, "x": "a", "y": "b", **changed}), message)


def test_a_map_needs_increasing_axes_cells_and_one_number_a_member():
    def loss(a, b):
        return {"loss": a + b}

    result = gd.sweep(loss, gd.grid(a=[0.0, 2.0, 1.0], b=[3.0, 1.0]))
    with pytest.raises(ValueError, match="axis a must be finite and increasing or decreasing"):
        plot_grid(result, "a", "b", values=result.outputs["loss"])
    with pytest.raises(TypeError, match=r"pass one of its leaves, values=result.outputs"):
        plot_grid(gd.sweep(loss, gd.grid(a=[0.0, 1.0], b=[3.0, 1.0])), "a", "b")
    zipped = gd.sweep(lambda a, b: a + b, gd.grid(a=[0.0, 1.0], b=[3.0, 1.0], zipped=True))
    with pytest.raises(ValueError, match="zipped grid"):
        plot_grid(zipped, "a", "b")
