"""Plots: what is drawn is what was given, and the legend tells the truth about it."""

import itertools
import subprocess
import sys
from typing import NamedTuple

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
from gdfunc import plot
from gdfunc.plot import plot_curves, plot_descent, plot_grid

from .assertions import assert_pure, assert_refused
from .pictures import crosses, drawn, legend, marks, render
from .references import few, normal

NAN, INF = float("nan"), float("inf")
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
# The eight of Okabe and Ito's poster, as it prints them.
OKABE_ITO = {(0, 0, 0), (230, 159, 0), (86, 180, 233), (0, 158, 115)}
OKABE_ITO |= {(240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167)}


def bowl(w):
    """A bowl that is different along its two axes, so that no exchange of them goes unseen."""
    return w[0] ** 2 + 10 * (w[1] - 0.5) ** 2 + w[0] + 3


def rosenbrock(w):
    return (1 - w[0]) ** 2 + 100 * (w[1] - w[0] ** 2) ** 2


def descend(lr, steps, start=(-4.0, 1.0), curvature=(1.0, 10.0), dtype=torch.float64):
    """Gradient descent on ½ Σ hᵢ wᵢ² in closed form, T+1 points."""
    factors = 1 - lr * torch.tensor(curvature, dtype=dtype)
    return torch.tensor(start, dtype=dtype) * factors ** torch.arange(steps + 1)[:, None]


def quadratic(w):
    return (w[0] ** 2 + 10 * w[1] ** 2) / 2


# The path of a run.


@given(st.integers(0, 2**32), st.integers(0, 6), st.sampled_from([(), (3,), (2, 1)]))
def test_path_is_the_recorded_points_and_then_the_final_one(seed, steps, shape):
    params = {"w": normal(seed, steps, *shape), "rest": (normal(seed + 1, steps),)}
    final = {"rest": (normal(seed + 2),), "w": normal(seed + 3, *shape)}
    joined = plot.path(params, final)
    assert list(joined) == ["w", "rest"]
    assert joined["w"].tolist() == [*params["w"].tolist(), final["w"].tolist()]
    assert joined["rest"][0].tolist() == [*params["rest"][0].tolist(), final["rest"][0].item()]


def test_path_shares_no_storage():
    assert_pure(plot.path, torch.zeros(3, 2), torch.zeros(2))


@pytest.mark.parametrize(
    ("params", "final", "message"),
    [
        ({"w": torch.zeros(4, 2)}, {"w": torch.zeros(4, 2)}, r"params\['w'\] has shape \(4, 2\) and final"),
        ({"w": torch.zeros(4, 2)}, {"w": torch.zeros(3)}, r"final\['w'\] \(3,\)"),
        (torch.tensor(1.0), torch.tensor(1.0), r"params has shape \(\)"),
        ({"w": torch.zeros(4)}, {"b": torch.tensor(1.0)}, r"missing params\['w'\]"),
    ],
)
def test_path_names_what_does_not_fit(params, final, message):
    assert_refused(lambda: plot.path(params, final), message)


# Descent: the drawn paths.


def test_every_point_of_every_path_is_drawn():
    paths = [descend(0.05, 30), descend(0.18, 12)]
    ax = plot_descent(quadratic, paths, labels=["slow", "fast"])
    lines = drawn(ax)
    assert [line.get_marker() for line in lines] == [".", "."]
    for line, path in zip(lines, paths, strict=True):
        assert np.array_equal(line.get_xydata(), path.numpy())
    assert np.array_equal(marks(ax, "o"), [[-4, 1], [-4, 1]])
    assert np.array_equal(marks(ax, "D"), torch.stack([path[-1] for path in paths]).numpy())
    assert legend(ax) == ["slow", "fast", "start", "end"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("params[0]", "params[1]")
    render(ax)


class Line(NamedTuple):
    slope: torch.Tensor
    offset: torch.Tensor


@pytest.mark.parametrize(
    ("tree", "names"),
    [
        (lambda p: {"w": p[:, :1], "b": p[:, 1]}, ["w", "b"]),
        (lambda p: {"w": p}, ["w[0]", "w[1]"]),
        (lambda p: {"layer": {"w": p[:, None]}}, ["layer.w[0, 0]", "layer.w[0, 1]"]),
        (lambda p: (p[:, 0], p[:, 1, None, None]), ["params[0]", "params[1]"]),
        (lambda p: Line(p[:, 0], p[:, 1]), ["slope", "offset"]),
        (lambda p: {"w": p[:, 0], "none": None, "b": p[:, 1:]}, ["w", "b"]),
        (lambda p: p.numpy(), ["params[0]", "params[1]"]),
    ],
)
def test_params_may_be_any_tree_of_two_scalars(tree, names):
    points = descend(0.05, 5)

    def scalars(params):
        if isinstance(params, torch.Tensor):
            return params.reshape(-1)
        children = params.values() if isinstance(params, dict) else params
        return torch.cat([scalars(child) for child in children if child is not None])

    ax = plot_descent(lambda params: quadratic(scalars(params)), [tree(points)], resolution=9)
    plain = plot_descent(quadratic, [points], resolution=9)
    assert np.array_equal(drawn(ax)[0].get_xydata(), points.numpy())
    assert [ax.get_xlabel(), ax.get_ylabel()] == names
    assert np.allclose(drawn_shades(ax), drawn_shades(plain), rtol=1e-12)


def drawn_shades(ax):
    return np.concatenate([shade.vertices for shade in ax.collections[0].get_paths()])


def test_dicts_are_matched_by_key_not_by_order():
    points = descend(0.05, 5)
    paths = [{"w": points[:, 0], "b": points[:, 1]}, {"b": points[:, 1] / 2, "w": points[:, 0] / 4}]
    ax = plot_descent(lambda p: p["w"] ** 2 + p["b"] ** 2, paths, resolution=9)
    assert np.array_equal(drawn(ax)[1].get_xydata(), points.numpy() / [4, 2])


@few
@given(st.integers(0, 2**32), st.integers(0, 8), st.floats(0.05, 3), st.booleans())
def test_the_view_shows_starts_minimizers_and_all_that_is_no_higher(seed, steps, spread, is_tensor):
    paths = [spread * normal(seed + i, steps + 1, 2) for i in range(2)]
    ax = plot_descent(bowl, paths, minimizers=[torch.tensor([-0.5, 0.5])], resolution=5)
    (left, right), (low, high) = ax.get_xlim(), ax.get_ylim()
    highest = max(bowl(path[0]) for path in paths)
    wanted = [path[0] for path in paths] + [torch.tensor([-0.5, 0.5])]
    wanted += [point for path in paths for point in path if bowl(point) <= highest]
    for x, y in wanted:
        assert left < x < right
        assert low < y < high
    # and it is no larger than that needs: each of its sides is near some wanted point
    xs, ys = torch.stack([point.double() for point in wanted]).T
    assert right - left == pytest.approx(1.15 * float(xs.max() - xs.min()))
    assert high - low == pytest.approx(1.15 * float(ys.max() - ys.min()))


def said(points, box):
    """What the legend has to say of a path, point by point."""
    finite = [all(np.isfinite(point)) for point in points]
    seen = [
        ok and all(low <= v <= high for v, (low, high) in zip(point, box, strict=True))
        for point, ok in zip(points, finite, strict=True)
    ]
    last = max((i for i, s in enumerate(seen) if s), default=len(points) - 1)
    away = sum(finite[i] and not seen[i] for i in range(last + 1))
    notes = [f"{away} of {len(points)} points outside the view"] if away else []
    if last + 1 < len(points) and finite[last + 1]:
        notes.append(f"leaves the view at step {last + 1}")
    if not all(finite):
        first = finite.index(False)
        notes.append(f"not finite {'at' if any(finite[first:]) else 'from'} step {first}")
    return "run 0" + (f" ({', '.join(notes)})" if notes else ""), last


@given(st.integers(0, 2**32), st.integers(1, 7), st.lists(st.sampled_from([NAN, INF, -INF]), max_size=3))
def test_the_legend_tells_where_a_path_leaves_the_view_and_is_not_finite(seed, steps, broken):
    points = normal(seed, steps + 1, 2)
    for i, value in enumerate(broken):
        points[(seed + 3 * i) % (steps + 1), i % 2] = value
    box = ((-1.0, 1.2), (-0.9, 1.1))
    ax = plot_descent(bowl, [points], limits=box, resolution=4)
    text, last = said(points.tolist(), box)
    assert legend(ax)[0] == text
    assert np.array_equal(drawn(ax)[0].get_xydata(), points[: last + 2].numpy(), equal_nan=True)
    assert ("end" in legend(ax)) == (len(marks(ax, "D")) == 1)


# A path, what the legend says of it, and where it is crossed.
LEAVING = {
    "on the nearer side of a corner": (
        [[0.5, 0.0], [3.5, 9.0]],
        "leaves the view at step 1",
        [[0.5 + 0.97 / 3, 0.97]],
    ),
    "at the last finite point": (
        [[0.9, 0.9], [0.5, 0.8], [0.25, 0.6], [NAN, 0.5], [NAN, NAN]],
        "not finite from step 3",
        [[0.25, 0.6]],
    ),
    "once": (
        [[0.0, 0.5], [0.0, 9.0], [1e3, 1e3], [NAN, NAN]],
        "leaves the view at step 1, not finite from step 3",
        [[0.0, 0.97]],
    ),
    "nowhere": ([[0.0, 0.0], [9.0, 0.0], [9.0, 9.0], [0.5, 0.5]], "2 of 4 points outside the view", []),
    "far out": ([[0.5, 0.5], [1.7e308, 0.5]], "leaves the view at step 1", [[0.97, 0.5]]),
}


@pytest.mark.parametrize("where", LEAVING)
def test_a_path_that_leaves_is_told_and_crossed(where):
    points, note, crossed = LEAVING[where]
    path, view = torch.tensor(points, dtype=torch.float64), ((-1, 1), (-1, 1))
    ax = plot_descent(quadratic, [path], limits=view, resolution=20)
    assert legend(ax)[0] == f"run 0 ({note})"
    assert ("end" in legend(ax)) == (where == "nowhere")
    assert crosses(ax).tolist() == [pytest.approx(point) for point in crossed]
    render(ax)


ODD_PATHS = [
    [[1.0, 2.0]],
    [[NAN, NAN]],
    [[NAN, 1.0], [2.0, 3.0]],
    [[1.0, 1.0], [1.0, 1.0]],
    [[1.0, 1.0], [3e38, -3e38], [INF, -INF]],
    [[1e20, 1.0], [1e20, 0.5]],
    [[1e-30, 0.0], [0.0, 0.0]],
    [[1.0, 1.0], [0.25, 0.6], [NAN, NAN]],
]


@pytest.mark.parametrize("path", ODD_PATHS)
def test_odd_paths_are_drawn(path):
    points = torch.tensor(path)
    ax = plot_descent(quadratic, [points], resolution=20)
    assert np.array_equal(drawn(ax)[0].get_xydata()[0], points[0].numpy(), equal_nan=True)
    render(ax)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tensors_of_any_float_and_device_that_require_grad(device, dtype):
    seen = set()

    def loss(w):
        seen.add((w.dtype, w.device.type, torch.is_grad_enabled()))
        return (w**2).sum()

    path = torch.tensor([[1.0, 2.0], [0.5, 1.0]], dtype=dtype, device=device, requires_grad=True)
    ax = plot_descent(loss, [path], resolution=10)
    assert np.array_equal(drawn(ax)[0].get_xydata(), [[1, 2], [0.5, 1]])
    assert seen == {(dtype, device, False)}  # no graph for the many points of the grid
    ax = plot_curves([path[:, 0], path], ax=ax.figure.add_subplot())
    assert np.array_equal(drawn(ax)[0].get_xydata(), [[0, 1], [1, 0.5]])


# Descent: the contours.


@pytest.mark.parametrize("minimum", [None, -40.0, torch.tensor(2.75)])
@pytest.mark.parametrize("count", [2, 7, 20])
def test_levels_are_geometric_above_the_minimum(minimum, count):
    ax = plot_descent(bowl, [descend(0.05, 40)], minimum=minimum, levels=count, resolution=41)
    levels = np.asarray(ax.collections[0].levels)
    assert len(levels) == count
    x, y = np.linspace(*ax.get_xlim(), 41), np.linspace(*ax.get_ylim(), 41)
    grid = np.array([[bowl((a, b)) for a in x] for b in y])
    path = [float(bowl(point)) for point in descend(0.05, 40)]
    lowest = min(grid.min(), *path) if minimum is None else float(minimum)
    ratios = (levels[1:] - lowest) / (levels[:-1] - lowest)
    assert levels[0] > lowest
    assert np.allclose(ratios, ratios[0], rtol=1e-6)
    # a hundredth of the view is below the first level, and a hundredth above the last
    above = grid > lowest
    assert (grid < levels[0])[above].mean() == pytest.approx(0.01, abs=0.003)
    assert (grid > levels[-1])[above].mean() == pytest.approx(0.01, abs=0.003)


@pytest.mark.parametrize(
    "loss", [bowl, rosenbrock, lambda w: 600 + 300 * torch.sin(w[0]) * torch.cos(w[1])]
)
def test_contours_lie_where_the_loss_has_their_level(loss):
    ax = plot_descent(loss, [torch.tensor([[-1.2, 1.0], [0.8, 0.3]], dtype=torch.float64)])
    _, lines = ax.collections
    cell = max(np.diff(ax.get_xlim())[0], np.diff(ax.get_ylim())[0]) / 199
    vertices = [torch.from_numpy(line.vertices.copy()) for line in lines.get_paths()]
    levels = [torch.full((len(v),), level) for v, level in zip(vertices, lines.levels, strict=True)]
    slopes, heights = torch.func.vmap(torch.func.grad_and_value(loss))(torch.cat(vertices))
    # Between the points of the grid the contour is linear: what is left is of second order.
    assert ((heights - torch.cat(levels)).abs() <= cell * slopes.abs().sum(1) / 4 + 60 * cell**2).all()
    assert len(heights) > 1000


def test_levels_may_be_given():
    ax = plot_descent(bowl, [descend(0.05, 5)], levels=[3.0, 5.0, 8.0])
    assert list(ax.collections[0].levels) == [3, 5, 8]


@pytest.mark.parametrize(
    ("loss", "has_contours"),
    [
        (lambda w: torch.tensor(236.0), False),
        (lambda w: w.sum() * 0, False),
        (lambda w: 236 + 1e-15 * (w**2).sum(), False),
        (lambda w: w.sum() * NAN, False),
        (lambda w: torch.where(w[0] > 0.7, 1.0, 2.0), True),
        (lambda w: (w > 0.7).sum(), True),
    ],
)
def test_flat_and_stepped_losses_are_drawn(loss, has_contours):
    ax = plot_descent(loss, [torch.tensor([[1.0, 1.0], [0.5, 0.5]])], resolution=20)
    assert len(drawn(ax)) == 1
    assert bool(ax.collections) == has_contours
    assert ("loss not finite" in legend(ax)) == bool(loss(torch.ones(2)).isnan())
    render(ax)


def test_where_the_loss_is_not_finite_the_legend_says_so():
    ax = plot_descent(
        lambda w: w.log().sum() ** 2, [torch.tensor([[0.5, 0.5], [1.5, 1.0]])], limits=((-1, 2), (-1, 2))
    )
    assert legend(ax) == ["run 0", "start", "end", "loss not finite"]
    assert ax.patch.get_hatch() is not None
    render(ax)


@pytest.mark.parametrize(
    ("options", "count"), [({"resolution": 2}, 2), ({"resolution": 30}, 2), ({"chunk_size": 25}, 5)]
)
def test_the_loss_is_called_once_for_the_paths_and_once_for_each_chunk_of_the_grid(options, count):
    calls, paths = [], [descend(0.05, 9), descend(0.1, 4)]
    options = {"resolution": 10} | options

    def loss(w):
        calls.append(tuple(w.shape))
        return quadratic(w)

    ax = plot_descent(loss, paths, **options)
    assert calls == [(2,)] * count
    whole = plot_descent(quadratic, paths, resolution=options["resolution"])
    assert np.array_equal(drawn_shades(ax), drawn_shades(whole))


def test_minimizers_are_stars():
    ax = plot_descent(
        lambda p: p["w"].sum() ** 2 + p["b"] ** 2,
        [{"w": torch.ones(3, 1), "b": torch.ones(3)}],
        minimizers=[{"w": torch.ones(1) * x, "b": torch.tensor(y)} for x, y in [(0.0, 0.0), (2.0, 5.0)]],
    )
    assert np.array_equal(marks(ax, "*"), [[0, 0], [2, 5]])
    assert legend(ax) == ["run 0", "start", "end", "minimizer"]
    assert ax.get_ylim()[1] > 5


PATH = torch.zeros(3, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"paths": PATH}, "TypeError: paths must be a list or tuple.*got Tensor"),
        ({"paths": {"w": PATH}}, "TypeError: paths must be a list or tuple.*got dict"),
        ({"paths": []}, "paths is empty"),
        ({"paths": [PATH, torch.zeros(4, 3)]}, r"paths\[1\] must have two scalars.*paths\[1\] \(3,\)"),
        ({"paths": [{"w": PATH[:, 0]}]}, r"paths\[0\] must have two scalars.*paths\[0\]\['w'\] \(\)"),
        ({"paths": [PATH, PATH[..., None]]}, r"shaped as in paths\[0\].*paths\[1\] \(2, 1\)"),
        ({"paths": [PATH[:0]]}, r"paths\[0\] must have leaves.*paths\[0\] \(0, 2\)"),
        ({"paths": [torch.tensor(1.0)]}, r"paths\[0\] must have leaves.*paths\[0\] \(\)"),
        (
            {"paths": [{"w": PATH[:, 0], "b": PATH[:2, 0]}]},
            r"of one length T\+1.*\['w'\] \(3,\), paths\[0\]\['b'\] \(2,\)",
        ),
        ({"paths": [{}]}, r"paths\[0\] must have leaves.*no leaves"),
        ({"paths": [PATH, {"w": PATH}]}, r"paths\[1\] does not have the structure of paths\[0\]"),
        ({"paths": [PATH.long()]}, r"TypeError: paths\[0\] must be a floating-point .*int64"),
        ({"paths": [{"w": 1.0}]}, r"TypeError: paths\[0\]\['w'\] must be a floating-point .*float"),
        ({"labels": ["a", "b"]}, "labels has 2 entries but paths has 1"),
        ({"minimizers": torch.zeros(2)}, "TypeError: minimizers must be a list or tuple"),
        ({"minimizers": [torch.zeros(3)]}, r"minimizers\[0\] must have two scalars.*\(3,\)"),
        ({"minimum": NAN}, "minimum must be a finite number; got nan"),
        ({"levels": 1}, "levels must be an int >= 2; got 1"),
        ({"levels": True}, "levels must be an int >= 2; got True"),
        ({"levels": [1.0, 1.0]}, "levels must be two or more finite numbers, increasing"),
        ({"resolution": 1}, "resolution must be an int >= 2; got 1"),
        ({"limits": ((0, 1), (1, 0))}, "limits must be"),
        ({"limits": (0, 1)}, "limits must be"),
        ({"loss": lambda w: w}, r"loss must return a 0-d real tensor; got shape \(2,\)"),
        ({"loss": lambda w: 1.0}, "loss must return a 0-d real tensor; got float"),
        ({"loss": lambda w: torch.complex(w[0], w[1])}, "got shape .*complex64"),
    ],
)
def test_descent_names_what_is_wrong(arguments, message):
    assert_refused(lambda: plot_descent(**{"loss": quadratic, "paths": [PATH], **arguments}), message)


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
