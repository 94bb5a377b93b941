"""Outcomes of runs on a map, and measured rates beside theorems."""

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.collections import QuadMesh

import gdfunc as gd
from gdfunc import testing
from gdfunc.plot import plot_phase, plot_rate
from gdfunc.testing import Rate

from .assertions import assert_refused
from .pictures import crosses, drawn, legend, render

NAN, INF = float("nan"), float("inf")
STEPS = np.arange(100)
CURVES = {
    "converged": 0.8**STEPS,
    "still falling": 0.99**STEPS,
    "stalled": np.maximum(0.9**STEPS, 0.1),
    "oscillating": 0.5 + 0.4 * np.cos(STEPS),
    "diverged": 1.01**STEPS,
    "not finite": np.where(STEPS == 50, NAN, 0.8**STEPS),
}
NAMES = list(CURVES)


def phase(curves, minimum=0.0, **changed):
    """The map of one cell for each curve, in a row, over any number of members."""
    curves = torch.tensor(np.array(curves)) + minimum  # [cells, members, steps]
    axes = {"a": [float(i) for i in range(len(curves))], "b": ["only"]}
    grid = gd.grid(**axes, member=list(range(curves.shape[1])))
    result = gd.sweep(lambda a, b, member: a, grid)
    return plot_phase(result, "a", "b", losses=curves.flatten(0, 1), minimum=minimum, **changed)


def shown(ax):
    (mesh,) = [artist for artist in ax.collections if isinstance(artist, QuadMesh)]
    return mesh.get_array().filled(4).ravel().tolist()


@pytest.mark.parametrize("minimum", [0.0, -3.0])
def test_each_outcome_is_told_from_the_end_of_the_curve(minimum):
    ax = phase([[curve] for curve in CURVES.values()], minimum)
    assert shown(ax) == [0, 1, 2, 3, 4, 4]
    assert legend(ax) == [
        "converged (stays below 0.001 of its start): 1 of 6 cells",
        "still falling: 1 of 6 cells",
        "stalled: 1 of 6 cells",
        "oscillating (rises again by > 10 %): 1 of 6 cells",
        "diverged: 2 of 6 cells",
    ]
    assert ax.patch.get_hatch()
    render(ax)


def test_the_thresholds_are_the_arguments():
    assert shown(phase([[CURVES["still falling"]]], converged=0.5)) == [0]
    assert shown(phase([[CURVES["still falling"]]], change=0.5)) == [2]
    assert shown(phase([[CURVES["stalled"]]], tail=1.0)) == [1]
    assert shown(phase([[CURVES["oscillating"]]], change=5.0)) == [2]


def test_a_cell_shows_most_of_its_runs_and_on_a_tie_the_worse_and_a_cross_if_they_differ():
    cells = [
        ["converged", "converged", "diverged"],
        ["stalled", "diverged", "converged"],
        ["still falling"] * 3,
    ]
    ax = phase([[CURVES[name] for name in cell] for cell in cells])
    assert shown(ax) == [0, 4, 1]
    assert crosses(ax).tolist() == [[0, 0], [1, 0]]
    assert legend(ax)[-1] == "2 of 3 cells: their runs differ"
    render(ax)


def test_outcomes_differ_without_colour():
    ax = phase([[curve] for curve in CURVES.values()])
    faces = [patch.get_facecolor() for patch in ax.get_legend().legend_handles[:4]]
    greys = sorted(np.dot(matplotlib.colors.to_rgb(face), [0.2126, 0.7152, 0.0722]) for face in faces)
    assert min(np.diff(greys)) > 0.06


def test_a_sweep_of_losses_of_any_dtype_needs_no_argument():
    def run(lr, b):
        return (1 - lr) ** torch.arange(9.0)

    result = gd.sweep(run, gd.grid(lr=[0.9, 3.0], b=[1, 2]))
    assert shown(plot_phase(result, "lr", "b")) == [0, 4, 0, 4]
    half = plot_phase(result, "lr", "b", losses=result.outputs.half())
    assert shown(half) == [0, 4, 0, 4]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"losses": torch.ones(3, 4)}, r"a curve of two or more steps for each of the 4 .* \(3, 4\)"),
        ({"losses": torch.ones(4)}, r"got shape \(4,\)"),
        ({"losses": None}, r"got shape \(4,\)"),
        ({"tail": 0}, "tail must be > 0; got 0"),
        ({"tail": 2}, "tail must be a share of the steps, at most 1; got 2"),
        ({"change": NAN}, "change must be a finite number"),
        ({"x": "c"}, "x and y must be two of the grid's axes, a, b"),
    ],
)
def test_phase_names_what_is_wrong(changed, message):
    result = gd.sweep(lambda a, b: a, gd.grid(a=[1.0, 2.0], b=[1, 2]))
    arguments = {"result": result, "x": "a", "y": "b", "losses": torch.ones(4, 5), **changed}
    assert_refused(lambda: plot_phase(**arguments), message)


# Rates.


def test_a_linear_rate_is_a_line_through_the_errors_on_which_it_was_measured():
    errors = 3 * 0.9**STEPS
    ax = plot_rate(errors, testing.measure_rate(errors), theorem=0.95)
    curve, measured, theorem = [line.get_xydata() for line in ax.lines]
    assert np.allclose(curve, np.column_stack([STEPS, errors]))
    assert np.allclose(measured, curve[50:])
    assert np.allclose(theorem[:, 1], errors[50] * 0.95 ** (STEPS[50:] - 50))
    assert legend(ax) == ["error", "measured: × 0.9 a step", "theorem: × 0.95 a step"]
    assert (ax.get_xscale(), ax.get_yscale()) == ("linear", "log")
    render(ax)


@pytest.mark.long
def test_a_sublinear_rate_is_a_line_on_logarithmic_axes():
    steps = np.arange(1, 500)
    errors = np.array([[8.0, *(c * steps**-1.5)] for c in (1.0, 2.0, 4.0)])
    ax = plot_rate(errors, testing.measure_rate(errors), lambda t: 5 / t, label="gap")
    measured, theorem = ax.lines[-2:]
    assert np.allclose(measured.get_ydata(), 2 * measured.get_xdata() ** -1.5)
    assert np.allclose(theorem.get_xydata(), np.column_stack([steps, 5 / steps]))
    assert legend(ax) == ["gap: median of 3, 10–90 %", "measured: ∝ 1 / step^1.5", "theorem: the bound"]
    assert (ax.get_xscale(), ax.get_xlabel(), ax.get_ylabel()) == ("log", "step, from 1", "gap")
    render(ax)


def test_a_rate_has_its_band_beside_it_and_the_steps_below_rounding_have_no_line():
    errors = np.where(STEPS < 60, 0.6**STEPS, 0.0)
    ax = plot_rate(errors, Rate("linear", 0.6, 0.55, 0.65, 0.0))
    assert legend(ax)[-1] == "measured: × 0.6 a step (0.55 to 0.65)"
    assert (drawn(ax)[0].get_ydata() == errors).all()
    last = int((errors > 1e-13).argmin()) - 1
    assert ax.lines[-1].get_xdata()[-1] == last
    render(ax)


RATE = Rate("linear", 0.5, 0.5, 0.5, 0.0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"errors": torch.ones(2, 3, 4)}, r"errors must be \[T \+ 1\] or \[N, T \+ 1\]; got shape"),
        ({"errors": [1.0, 0.0, 0.0]}, "errors must have two above rounding .* got 0"),
        ({"rate": Rate("cubic", 1, 1, 1, 0)}, "rate.kind must be 'linear' or 'sublinear'; got 'cubic'"),
        ({"theorem": lambda t: 1.0}, r"theorem must return 5 errors; got shape \(\)"),
        ({"theorem": NAN}, "theorem must be a finite number"),
    ],
)
def test_rate_names_what_is_wrong(changed, message):
    assert_refused(lambda: plot_rate(**{"errors": torch.ones(5), "rate": RATE, **changed}), message)
