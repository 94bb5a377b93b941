"""Plots: what is drawn is what was given, and the legend tells the truth about it."""

import itertools
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
from .pictures import bowl, crosses, descend, drawn, legend, marks, quadratic, render
from .references import few, normal

NAN, INF = float("nan"), float("inf")
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
# The eight of Okabe and Ito's poster, as it prints them.
OKABE_ITO = {(0, 0, 0), (230, 159, 0), (86, 180, 233), (0, 158, 115)}
OKABE_ITO |= {(240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167)}
PATH = torch.zeros(3, 2)


# Curves.


def test_a_curve_is_drawn_as_it_is():
    values = [torch.tensor([3.0, 2.0, 2.5, 0.125]), np.array([1.0, 4.0]), [5, 6, 7]]
    ax = plot_curves(values, labels=["a", "b", 0.1])
    assert legend(ax) == ["a", "b", "0.1"]
    for line, value in zip(drawn(ax), values, strict=True):
        assert np.array_equal(line.get_xydata(), np.column_stack([np.arange(len(value)), value]))
    assert (ax.get_xscale(), ax.get_yscale()) == ("linear", "log")
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("step", "loss")
    low, high = ax.get_ylim()
    assert low < 0.125 < 7 < high
    assert ax.get_xlim()[0] < 0 < 3 < ax.get_xlim()[1]
    render(ax)


def test_x_may_be_shared_or_one_for_each():
    curves = [torch.tensor([3.0, 2.0]), torch.tensor([[1.0, 4.0], [2.0, 4.0]])]
    shared = plot_curves(curves, x=torch.tensor([1, 10]), log_x=True, log_y=False, xlabel="samples")
    assert [line.get_xdata().tolist() for line in drawn(shared)] == [[1, 10]] * 2
    assert (shared.get_xscale(), shared.get_yscale(), shared.get_xlabel()) == ("log", "linear", "samples")
    each = plot_curves(curves, x=[[0, 5], np.array([7.0, 9.0])], ylabel="accuracy")
    assert [line.get_xdata().tolist() for line in drawn(each)] == [[0, 5], [7, 9]]
    assert each.get_ylabel() == "accuracy"


def test_a_minimum_is_subtracted_and_named():
    ax = plot_curves([torch.tensor([3.0, 2.0])], minimum=torch.tensor(1.5))
    assert drawn(ax)[0].get_ydata().tolist() == [1.5, 0.5]
    assert ax.get_ylabel() == "loss − minimum"


@given(st.integers(0, 2**32), st.integers(2, 9), st.integers(1, 6), st.integers(0, 9), st.booleans())
def test_median_and_band_are_the_quantiles_with_diverged_runs_at_infinity(seed, n, steps, lost, log_y):
    values = normal(seed, n, steps).exp().numpy()
    broken = np.random.default_rng(seed).integers(0, n * steps, lost)
    values.flat[broken] = np.random.default_rng(seed).choice([NAN, INF, -INF], lost)
    ax = plot_curves([torch.tensor(values)], labels=["SGD"], band=(0.25, 0.9), log_y=log_y)
    # A number far above all others stands for infinity: whatever it takes part in is far above, too.
    low, median, high = np.quantile(np.where(np.isfinite(values), values, 1e100), [0.25, 0.5, 0.9], axis=0)
    infinite = median > 1e90
    middle = drawn(ax)[0].get_ydata()
    assert np.array_equal(np.isinf(middle), infinite)
    assert np.allclose(middle[~infinite], median[~infinite], rtol=1e-12)
    band = ax.collections[0].get_paths()[0].vertices
    upper, lower = band[:steps, 1], band[steps : 2 * steps, 1][::-1]
    bottom, top = ax.get_ylim()
    far = top + 10 * (top - bottom)
    for edge, exact in ((upper, high), (lower, low)):
        assert np.allclose(edge[exact < far], exact[exact < far], rtol=1e-12)
        assert (edge[exact >= far] >= far).all()
    diverged = (~np.isfinite(values)).any(axis=1).sum()
    note = f" ({diverged} of {n} diverged)" if diverged else ""
    assert legend(ax) == [f"SGD: median of {n}, 25–90 %{note}"]


def test_runs_that_diverge_are_drawn_thin_and_crossed_at_their_last_finite_value():
    runs = torch.tensor(
        [[4.0, 2.0, 1.0, 0.5], [4.0, 3.0, 2.0, 1.0], [4.0, 20.0, INF, INF], [4.0, NAN, NAN, NAN]]
    )
    ax = plot_curves([runs])
    assert legend(ax) == ["run 0: median of 4, 10–90 % (2 of 4 diverged)"]
    (thin,) = [line for line in ax.lines if line.get_linewidth() < 1]
    expected = np.insert(runs[2:].numpy(), 4, NAN, axis=1).ravel()
    assert np.array_equal(thin.get_ydata(), expected, equal_nan=True)
    assert crosses(ax).tolist() == [[1, 20], [0, 4]]
    render(ax)


@pytest.mark.parametrize("broken", [NAN, INF, -INF])
def test_a_run_that_is_not_finite_is_crossed_and_said_and_another_is_shown_whole(broken):
    curves = [[4.0, 5.0, 6.0, broken, broken], [4.0, broken, 3.0], [1.0, 1e30, 1e-30, 1e30]]
    ax = plot_curves([torch.tensor(curve) for curve in curves])
    assert legend(ax) == ["run 0 (not finite from step 3)", "run 1 (not finite at step 1)", "run 2"]
    assert crosses(ax).tolist() == [[2, 6], [0, 4]]
    assert ax.get_ylim()[0] < 1e-30 < 1e30 < ax.get_ylim()[1]
    render(ax)


@pytest.mark.parametrize("log_y", [True, False])
@pytest.mark.parametrize("others", [0, 1])
@pytest.mark.parametrize("growth", [1.05, 2.0])
def test_a_run_that_diverges_does_not_flatten_the_others(growth, others, log_y):
    steps = torch.arange(1024, dtype=torch.float64)
    bad, good = growth**steps, 0.99**steps
    bad[1000:] = INF
    ax = plot_curves([bad, good][: 1 + others], log_y=log_y)
    top = ax.get_ylim()[1]
    gone = int((bad > top).int().argmax())
    note = f"leaves the view at step {gone}, not finite from step 1000"
    assert legend(ax) == [f"run 0 ({note})", "run 1"][: 1 + others]
    assert crosses(ax).tolist() == [[gone - 1, bad[gone - 1]]]
    assert np.array_equal(drawn(ax)[0].get_ydata(), bad.numpy())
    assert 1 <= top < (1e4 if log_y else 3)
    render(ax)
    assert ax.get_ylim()[1] == top
    assert ax.get_xlim()[1] > 1023


def test_what_no_logarithmic_axis_shows_is_counted_and_marked():
    ax = plot_curves([torch.tensor([3.0, 0.0, -1.0, 2.0]), torch.ones(2, 4)])
    assert legend(ax) == ["run 0 (2 of 4 values ≤ 0)", "run 1: median of 2, 10–90 %"]
    assert drawn(ax)[0].get_ydata().tolist() == [3, 0, -1, 2]
    assert marks(ax, "v")[:, 0].tolist() == [1, 2]
    assert (marks(ax, "v")[:, 1] < 0.02).all()
    linear = plot_curves([torch.tensor([3.0, 0.0, -1.0, 2.0])], log_y=False)
    assert legend(linear) == ["run 0"]
    assert len(marks(linear, "v")) == 0
    render(ax)


ODD_CURVES = [[0.0, 0.0], [-1.0, -2.0], [NAN, NAN], [INF], [2.0], [[1.0], [2.0]], [[NAN, 1.0]] * 3]


@pytest.mark.parametrize("log_y", [True, False])
@pytest.mark.parametrize("curve", [*ODD_CURVES, [1.0, 1e300, 1.7e308]])
def test_odd_curves_are_drawn(curve, log_y):
    ax = plot_curves([torch.tensor(curve, dtype=torch.float64)], log_y=log_y)
    assert len(drawn(ax)) == 1
    assert curve != [2.0] or marks(ax, "o").tolist() == [[0, 2]]  # a single value has a marker
    render(ax)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"curves": torch.ones(3)}, "TypeError: curves must be a list or tuple.*got Tensor"),
        ({"curves": []}, "curves is empty"),
        ({"curves": [torch.ones(0)]}, r"curves\[0\] must be \[T\] or \[N, T\].*\(0,\)"),
        ({"curves": [torch.ones(3), torch.ones(1, 1, 3)]}, r"curves\[1\] must be .*\(1, 1, 3\)"),
        (
            {"curves": [torch.ones(3) * 1j]},
            r"TypeError: curves\[0\] must hold real numbers; got dtype complex64",
        ),
        ({"curves": ["abc"]}, r"TypeError: curves\[0\] must hold real numbers"),
        ({"labels": []}, "labels has 0 entries but curves has 1"),
        ({"x": torch.arange(4)}, r"x\[0\] must be 3 finite numbers"),
        ({"x": torch.tensor([0, 1, NAN])}, r"x\[0\] must be 3 finite numbers"),
        ({"x": [[1, 2, 3], [1, 2, 3]]}, "x has 2 entries but curves has 1"),
        ({"log_x": True}, r"x\[0\] has the value 0, which no logarithmic"),
        ({"band": (0.9, 0.1)}, "band must be two quantiles"),
        ({"band": (NAN, 0.5)}, "band must be a finite number"),
        ({"minimum": torch.ones(2)}, "minimum must be a finite number"),
    ],
)
def test_curves_names_what_is_wrong(arguments, message):
    assert_refused(lambda: plot_curves(**{"curves": [torch.ones(3)], **arguments}), message)


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


def test_no_two_of_28_lines_look_alike_and_neighbours_differ_without_colour():
    ax = plot_curves([torch.ones(2)] * 28)
    looks = [(line.get_color(), line._unscaled_dash_pattern) for line in drawn(ax)]
    assert len(set(map(str, looks))) == 28
    assert all(one[1] != two[1] for one, two in itertools.pairwise(looks))
    colors = {tuple(round(255 * part) for part in matplotlib.colors.to_rgb(color)) for color, _ in looks}
    assert colors <= OKABE_ITO
    assert len(colors) == 7


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
