"""Curves: the line is the data, nothing is hidden, and each mark and note is true."""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from matplotlib.figure import Figure

import gdfunc as gd
from gdfunc.plot import plot_curves

from .assertions import assert_refused
from .pictures import crosses, drawn, legend, marks, render, texts
from .references import few, normal

NAN, INF = float("nan"), float("inf")


def strips(ax):
    """The parts of x that are hatched at the top, and their colours."""
    return [(box.get_x(), box.get_x() + box.get_width()) for box in ax.patches if box.get_hatch()]


@pytest.mark.long
def test_a_curve_is_drawn_as_it_is():
    values = [torch.tensor([3.0, 2.0, 2.5, 0.125]), np.array([1.0, 4.0]), [5, 6, 7]]
    ax = plot_curves(values, labels=["a", "b", 0.1], label_lines=False)
    assert legend(ax) == ["a", "b", "0.1"]
    for line, value in zip(drawn(ax), values, strict=True):
        assert np.array_equal(line.get_xydata(), np.column_stack([np.arange(len(value)), value]))
    assert (ax.get_xscale(), ax.get_yscale()) == ("linear", "log")
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("step", "loss")
    low, high = ax.get_ylim()
    assert low < 0.125 < 7 < high
    assert ax.get_xlim()[0] < 0 < 3 < ax.get_xlim()[1]
    render(ax)


@pytest.mark.long
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


@pytest.mark.long
@given(st.integers(0, 2**32), st.integers(2, 9), st.integers(1, 6), st.integers(0, 9), st.booleans())
def test_median_and_band_are_the_quantiles_with_diverged_runs_at_infinity(seed, n, steps, lost, log_y):
    values = normal(seed, n, steps).exp().numpy()
    broken = np.random.default_rng(seed).integers(0, n * steps, lost)
    values.flat[broken] = np.random.default_rng(seed).choice([NAN, INF, -INF], lost)
    ax = plot_curves(
        [torch.tensor(values)], labels=["SGD"], label_lines=False, band=(0.25, 0.9), log_y=log_y
    )
    # A number far above all others stands for infinity: whatever it takes part in is far above, too.
    low, median, high = np.quantile(np.where(np.isfinite(values), values, 1e100), [0.25, 0.5, 0.9], axis=0)
    infinite = median > 1e90
    middle = drawn(ax)[0].get_ydata()
    assert np.array_equal(np.isinf(middle), infinite)
    assert np.allclose(middle[~infinite], median[~infinite], rtol=1e-12)
    bottom, top = ax.get_ylim()
    far = top + 10 * (top - bottom)
    shown = {x: set() for x in range(steps)}  # the heights of the band's border
    for polygon in ax.collections[0].get_paths():
        for x, y in polygon.vertices:
            shown[int(x)].add(y)
    for x in range(steps):
        if high[x] > 1e90:  # the band has ended, and its lower edge goes on
            assert not shown[x]
            (edge,) = [line for line in ax.lines if line.get_alpha()]
            assert edge.get_ydata()[x] == pytest.approx(low[x], rel=1e-12) or low[x] > 1e90
        else:
            assert min(shown[x]) == pytest.approx(low[x], rel=1e-12) or low[x] > far
            assert max(shown[x]) == pytest.approx(high[x], rel=1e-12) or high[x] > far
    diverged = (~np.isfinite(values)).any(axis=1).sum()
    assert legend(ax) == [f"SGD: median of {n}, 25–90 %"]
    assert texts(ax) == ([f"{diverged} of {n} diverged"] if diverged else [])


@pytest.mark.long
def test_runs_that_diverge_are_drawn_thin_and_crossed_at_their_last_finite_value():
    runs = torch.tensor(
        [[4.0, 2.0, 1.0, 0.5], [4.0, 3.0, 2.0, 1.0], [4.0, 20.0, INF, INF], [4.0, NAN, NAN, NAN]]
    )
    ax = plot_curves([runs])
    assert legend(ax) == ["run 0: median of 4, 10–90 %"]
    assert texts(ax) == ["2 of 4 diverged"]
    assert np.allclose(strips(ax), [(1, ax.get_xlim()[1])])
    (thin,) = [line for line in ax.lines if line.get_linewidth() < 1 and not line.get_alpha()]
    expected = np.insert(runs[2:].numpy(), 4, NAN, axis=1).ravel()
    assert np.array_equal(thin.get_ydata(), expected, equal_nan=True)
    assert crosses(ax).tolist() == [[1, 20], [0, 4]]
    render(ax)


@pytest.mark.long
@pytest.mark.parametrize("broken", [NAN, INF, -INF])
def test_a_run_that_is_not_finite_is_crossed_and_said_and_another_is_shown_whole(broken):
    curves = [[4.0, 5.0, 6.0, broken, broken], [4.0, broken, 3.0], [1.0, 1e30, 1e-30, 1e30]]
    ax = plot_curves([torch.tensor(curve) for curve in curves])
    assert legend(ax) == ["run 0 (not finite from step 3)", "run 1 (not finite at step 1)", "run 2"]
    assert crosses(ax).tolist() == [[2, 6], [0, 4]]
    assert ax.get_ylim()[0] < 1e-30 < 1e30 < ax.get_ylim()[1]
    render(ax)


@pytest.mark.long
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


@pytest.mark.long
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


TRAJECTORY = gd.Trajectory(step=torch.arange(2), loss=torch.tensor([4.0, 1.0]))
ODD_CURVES = [[0.0, 0.0], [-1.0, -2.0], [NAN, NAN], [INF], [2.0], [[1.0], [2.0]], [[NAN, 1.0]] * 3]


@pytest.mark.long
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
        ({"log_x": True, "x": [[-1, 0, 2]]}, r"x\[0\] has the value -1, which no logarithmic"),
        ({"curves": {"a": torch.ones(3)}, "labels": ["b"]}, "labels must be None where curves is a dict"),
        ({"curves": [TRAJECTORY]}, r"TypeError: curves\[0\] is a Trajectory; .* trajectory.loss"),
        ({"over": "lr"}, "over='lr' needs x, the values of lr"),
        ({"window": 0}, "window must be"),
        ({"band": (0.9, 0.1)}, "band must be two quantiles"),
        ({"band": (NAN, 0.5)}, "band must be a finite number"),
        ({"minimum": torch.ones(2)}, "minimum must be a finite number"),
    ],
)
def test_curves_names_what_is_wrong(arguments, message):
    assert_refused(lambda: plot_curves(**{"curves": [torch.ones(3)], **arguments}), message)


# Axes.


@pytest.mark.long
def test_steps_on_a_logarithmic_axis_are_counted_from_1_and_the_axis_says_so():
    ax = plot_curves([torch.tensor([4.0, 2.0, INF])], log_x=True)
    assert drawn(ax)[0].get_xdata().tolist() == [1, 2, 3]
    assert ax.get_xlabel() == "step, counted from 1"
    assert legend(ax) == ["run 0 (not finite from step 3)"]
    render(ax)


@pytest.mark.long
@pytest.mark.parametrize("last", [3.0, 1e3, 1e40])
def test_a_logarithmic_axis_that_holds_0_is_linear_near_it_and_says_so(last):
    x = [0.0, 0.5, 0.75, last]
    ax = plot_curves([torch.tensor([4.0, 3.0, 2.0, 1.0])], x=x, xlabel="epoch", log_x=True)
    assert ax.get_xlabel() == "epoch, linear up to 1"
    assert drawn(ax)[0].get_xdata().tolist() == x
    zero, half, *rest = ax.transData.transform([(at, 1) for at in [0, 0.5, 1, 2, 4]])[:, 0] / ax.bbox.width
    assert half - zero > 0.04
    assert np.isclose(rest[0] - half, half - zero)
    assert np.isclose(rest[1] - rest[0], rest[2] - rest[1])
    shown = [tick for tick in ax.get_xticks() if ax.get_xlim()[0] <= tick <= ax.get_xlim()[1]]
    assert shown[0] == 0
    assert len(shown) >= 2
    assert (np.diff(ax.transData.transform([(at, 1) for at in shown])[:, 0]) > 20).all()
    render(ax)


@pytest.mark.long
def test_a_logarithmic_axis_of_zeros_alone_is_drawn():
    ax = plot_curves([torch.ones(2)], x=[0.0, 0.0], log_x=True)
    assert ax.get_xlabel() == "step"
    render(ax)


@pytest.mark.long
@pytest.mark.parametrize("xlabel", ["step", "epoch"])
def test_whole_numbers_have_whole_ticks(xlabel):
    ax = plot_curves([torch.ones(5)], xlabel=xlabel)
    render(ax)
    assert all(tick % 1 == 0 for tick in ax.get_xticks())
    fractions = plot_curves([torch.ones(3)], x=[[0, 0.5, 1]], xlabel="seconds")
    assert any(tick % 1 for tick in fractions.get_xticks())


@pytest.mark.long
def test_a_single_step_has_a_single_tick():
    ax = plot_curves([torch.tensor([2.0], dtype=torch.float16)])
    render(ax)
    assert ax.get_xticks().tolist() == [0]


# Windows.


@pytest.mark.long
@few
@given(st.integers(0, 2**32), st.integers(1, 3), st.integers(1, 40), st.integers(1, 50), st.integers(0, 3))
@example(3, 2, 6, 6, 1)  # diverges at a step that is out of view
def test_a_window_pools_the_steps_of_all_runs(seed, n, steps, window, lost):
    values = normal(seed, n, steps).exp()
    values.view(-1)[torch.randint(n * steps, (lost,), generator=torch.Generator().manual_seed(seed))] = NAN
    ax = plot_curves([values], window=window)
    line, polygons = drawn(ax)[0], ax.collections[0].get_paths()
    edges = {x: set() for x in line.get_xdata()}
    for polygon in polygons:
        for x, y in polygon.vertices:
            edges[x].add(y)
    starts = range(0, steps, window)
    if window < steps:
        assert len(line.get_xdata()) == len(starts)
    for start, x, y in zip(starts, *line.get_data(), strict=False):
        pool = values[:, start : start + window].flatten().nan_to_num(1e100)
        assert x == pytest.approx(np.arange(steps)[start : start + window].mean())
        assert y == pytest.approx(pool.quantile(0.5).item()) or y == INF
        high = pool.quantile(0.9).item()
        assert not edges[x] if high > 1e90 else max(edges[x]) == pytest.approx(high)
    count = f"median of {n}" if n > 1 else "median"
    assert legend(ax)[0].startswith(f"run 0: {count}, 10–90 % in windows of {window}")
    render(ax)


@pytest.mark.long
def test_a_window_crosses_the_last_finite_step_of_a_run():
    values = torch.ones(100)
    values[77:] = NAN
    ax = plot_curves([values], window=10)
    assert crosses(ax).tolist() == [[76, 1]]
    assert legend(ax) == ["run 0: median, 10–90 % in windows of 10 (not finite from step 77)"]
    render(ax)


# Over a hyperparameter.

LRS = [0.01, 0.1, 1.0, 10.0]
ORDERS = torch.tensor([[3.0, 1.0, 2.0, INF], [3.0, 1.5, 2.5, NAN], [3.0, 1.2, INF, INF]])


@pytest.mark.long
def test_over_a_hyperparameter_each_value_is_a_run_of_its_own():
    ax = plot_curves([ORDERS], x=LRS, over="lr", log_x=True)
    (line,) = drawn(ax)
    assert line.get_xdata().tolist() == LRS
    assert line.get_ydata().tolist() == pytest.approx([3, 1.2, 2.5, INF])
    assert line.get_marker() == "o"
    assert len(crosses(ax)) == 0
    assert [line for line in ax.lines if line.get_linewidth() < 1 and not line.get_alpha()] == []
    assert np.allclose(strips(ax), [(1, ax.get_xlim()[1])])
    assert texts(ax) == ["diverges from lr 10"]
    assert legend(ax) == ["run 0: median of 3, 10–90 % (4 of 12 runs diverged)"]
    assert ax.get_xlabel() == "lr"
    render(ax)


@pytest.mark.long
@given(st.permutations(range(4)))
def test_over_a_hyperparameter_the_order_of_its_values_does_not_matter(order):
    ax = plot_curves([ORDERS[:, list(order)]], x=[LRS[i] for i in order], over="lr")
    assert drawn(ax)[0].get_xdata().tolist() == LRS
    assert drawn(ax)[0].get_ydata().tolist() == pytest.approx([3, 1.2, 2.5, INF])


def test_over_many_values_there_are_no_markers():
    assert drawn(plot_curves([torch.ones(13)], x=np.arange(13), over="width"))[0].get_marker() in (
        "",
        "None",
    )


@pytest.mark.parametrize("log_y", [True, False])
def test_near_a_divergence_finite_medians_do_not_flatten_the_others(log_y):
    losses = torch.tensor([1.0, 0.5, 0.01, 0.4, 1e20, INF])
    ax = plot_curves([losses], x=torch.arange(6), over="lr", log_y=log_y)
    assert ax.get_ylim()[1] < 3
    assert legend(ax) == ["run 0 (leaves the view at lr 4)"]
    assert texts(ax) == ["diverges from lr 5"]
    whole = plot_curves([losses[:5]], x=torch.arange(5), over="lr", log_y=log_y)
    assert whole.get_ylim()[1] > 1e20
    render(ax)


def test_a_hole_between_finite_medians_is_hatched():
    ax = plot_curves([torch.tensor([INF, 1.0, NAN, 2.0])], x=torch.arange(4), over="lr")
    assert np.allclose(strips(ax), [(ax.get_xlim()[0], 1), (1, 3)])
    assert texts(ax) == ["diverges at lr 0, diverges at lr 2"]


# Strips.


def lose(count):
    """Four runs, of which some are lost in the last step."""
    runs = torch.tensor([10.0, 1.0, 9.0, 2.0, 9.99]).repeat(4, 1)
    runs[:count, -1] = INF
    return runs


@pytest.mark.long
@pytest.mark.parametrize("log_y", [True, False])
@pytest.mark.parametrize("lost", [1, 2, 3, 4, 7, 8])
def test_strips_stand_below_one_another_and_above_the_data(lost, log_y):
    ax = plot_curves({f"c{i}": lose(1) for i in range(lost)}, label_lines=False, log_y=log_y)
    boxes = [box for box in ax.patches if box.get_hatch()]
    notes = texts(ax) if lost <= 3 else [note for note in legend(ax) if "diverged" in note]
    assert len(notes) == lost
    assert all("1 of 4 diverged" in note for note in notes)
    assert len(boxes) == (lost if lost <= 7 else 0)
    heights = [box.get_y() for box in boxes]
    assert heights == sorted(heights, reverse=True)
    if boxes:
        top = ax.transAxes.inverted().transform(ax.transData.transform((0, 10.0)))[1]
        assert top < heights[-1]
        assert heights[0] + boxes[0].get_height() <= 1
    render(ax)


@pytest.mark.long
def test_the_note_of_a_strip_stays_inside_the_axes():
    curves = {f"a rather long name {i}": lose(1) for i in range(3)}
    for width in (3.4, 6.4, 12):
        ax = Figure(figsize=(width, 3), layout="constrained").subplots()
        plot_curves(curves, ax=ax)
        render(ax)
        for text in ax.texts:
            assert text.get_window_extent().x0 > ax.bbox.x0 - 0.02 * ax.bbox.width
            assert text.get_window_extent().x1 <= ax.bbox.x1


def test_a_strip_leaves_limits_of_the_user_alone():
    ax = Figure().subplots()
    ax.set_ylim(0.5, 2)
    plot_curves([lose(2)], ax=ax)
    assert ax.get_ylim() == (0.5, 2)
    assert texts(ax) == ["2 of 4 diverged"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, np.float16, np.int8])
def test_any_dtype_is_drawn(dtype):
    values = [[4, 2, 1], [4, 3, 2]]
    curve = torch.tensor(values, dtype=dtype) if isinstance(dtype, torch.dtype) else np.array(values, dtype)
    assert drawn(plot_curves([curve]))[0].get_ydata().tolist() == [4, 2.5, 1.5]
