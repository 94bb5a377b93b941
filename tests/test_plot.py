"""Promises of all plots: axes in and out, inputs left alone, nothing global touched."""

import subprocess
import sys

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from gdfunc.plot import plot_curves, plot_descent

from .pictures import bowl, descend, quadratic, render

NAN, INF = float("nan"), float("inf")
PATH = torch.zeros(3, 2)


def both(ax=None):
    runs = torch.tensor([[2.0, 1.0], [2.0, INF]])
    return plot_descent(quadratic, [descend(0.21, 20)], ax=ax), plot_curves([runs, runs[0]], ax=ax)


@pytest.mark.long
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


@pytest.mark.long
def test_a_long_legend_fits():
    labels = ["a very long name of a run that goes on and on " * 3]
    for layout in ("constrained", "tight", None):
        one, two = Figure(figsize=(8, 4), layout=layout).subplots(1, 2)
        plot_descent(quadratic, [descend(0.21, 20)], labels=labels, ax=one)
        plot_curves([torch.ones(3)], labels=labels, ax=two)
        render(one)


@pytest.mark.long
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


@pytest.mark.long
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
