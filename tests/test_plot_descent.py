"""Descent: paths, contours and what the legend tells about them."""

import io
import re
from typing import NamedTuple

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.style import library
from matplotlib.text import Text

from gdfunc import plot
from gdfunc.plot import plot_curves, plot_descent

from .assertions import assert_pure, assert_refused
from .pictures import bowl, crosses, descend, drawn, legend, marks, quadratic, render, rosenbrock, texts
from .references import few, normal

NAN, INF = float("nan"), float("inf")
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


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


@pytest.mark.long
def test_every_point_of_every_path_is_drawn():
    paths = [descend(0.05, 30), descend(0.18, 12)]
    ax = plot_descent(quadratic, paths, labels=["slow", "fast"])
    lines = drawn(ax)
    for line, path in zip(lines, paths, strict=True):
        assert np.array_equal(line.get_xydata(), path.numpy())
    assert np.array_equal(marks(ax, "o"), [[-4, 1], [-4, 1]])
    assert np.array_equal(marks(ax, "D"), torch.stack([path[-1] for path in paths]).numpy())
    assert np.array_equal(marks(ax, "."), torch.cat(paths).numpy())
    assert texts(ax) == ["slow", "fast"]
    assert legend(ax)[:2] == ["start", "end"]
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


@pytest.mark.long
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
    # and it is no larger than that needs: each of its sides is a tenth of the span from some wanted point
    xs, ys = torch.stack([point.double() for point in wanted]).T
    assert right - left == pytest.approx(1.2 * float(xs.max() - xs.min()))
    assert high - low == pytest.approx(1.2 * float(ys.max() - ys.min()))


def said(points, box):
    """The notes of the legend on a path, point by point."""
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


@pytest.mark.long
@given(st.integers(0, 2**32), st.integers(1, 7), st.lists(st.sampled_from([NAN, INF, -INF]), max_size=3))
def test_the_legend_tells_where_a_path_leaves_the_view_and_is_not_finite(seed, steps, broken):
    points = normal(seed, steps + 1, 2)
    for i, value in enumerate(broken):
        points[(seed + 3 * i) % (steps + 1), i % 2] = value
    box = ((-1.0, 1.2), (-0.9, 1.1))
    ax = plot_descent(bowl, [points], limits=box, resolution=4)
    text, last = said(points.tolist(), box)
    assert legend(ax)[0] == (text if "(" in text else "start")
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
    assert legend(ax)[:2] == ["start", "end"]
    assert legend(ax)[-1] == "loss not finite"
    assert ax.patch.get_hatch() is not None
    render(ax)


@pytest.mark.long
@pytest.mark.parametrize(
    ("options", "count"), [({"resolution": 2}, 2), ({"resolution": 30}, 2), ({"chunk_size": 25}, 5)]
)
def test_the_loss_is_called_once_for_the_paths_and_once_for_each_chunk_of_the_grid(options, count):
    calls, paths = [], [descend(0.05, 9), descend(0.1, 4)]
    options = {"resolution": 10, "limits": ((-5, 5), (-2, 2))} | options

    def loss(w):
        calls.append(tuple(w.shape))
        return quadratic(w)

    ax = plot_descent(loss, paths, **options)
    assert calls == [(2,)] * count
    whole = plot_descent(quadratic, paths, resolution=options["resolution"], limits=options["limits"])
    assert np.array_equal(drawn_shades(ax), drawn_shades(whole))


def test_minimizers_are_stars():
    ax = plot_descent(
        lambda p: p["w"].sum() ** 2 + p["b"] ** 2,
        [{"w": torch.ones(3, 1), "b": torch.ones(3)}],
        minimizers=[{"w": torch.ones(1) * x, "b": torch.tensor(y)} for x, y in [(0.0, 0.0), (2.0, 5.0)]],
    )
    assert np.array_equal(marks(ax, "*"), [[0, 0], [2, 5]])
    assert legend(ax) == ["start", "end", "minimizer"]
    assert ax.get_ylim()[1] > 5


# Descent: colours, names and scales.


def contrast(one, two):
    """WCAG 2.2's contrast ratio."""

    def luminance(color):
        red, green, blue = (
            part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
            for part in matplotlib.colors.to_rgb(color)
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted([luminance(one), luminance(two)])
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("style", ["paper", "dark", "dark_background"])
def test_every_path_stands_out_from_every_grey_and_no_name_is_faint(style):
    named = plot.style(style) if style != "dark_background" else library[style]
    with matplotlib.rc_context(named):
        ax = plot_descent(quadratic, [descend(0.02 * i, 5) for i in range(1, 8)])
    greys = ax.collections[0].get_cmap().colors
    assert len(greys) == 21
    page = ax.get_facecolor()
    assert np.allclose(greys[-1], page[:3])
    assert len({line.get_color() for line in drawn(ax)}) == 7
    for line in drawn(ax):
        assert line.get_linestyle() == "-"
        assert min(contrast(line.get_color(), grey) for grey in greys) >= 2
    assert contrast(greys[0], greys[-1]) > 1.1
    assert [contrast(text.get_color(), page) >= 3 for text in ax.texts] == [True] * 7


@pytest.mark.parametrize(("curvature", "equal"), [((1.0, 1.0), True), ((1.0, 50.0), False)])
def test_both_axes_have_one_scale_unless_that_makes_a_strip(curvature, equal):
    path = descend(0.01, 30, start=(1.0, 1.0) if equal else (1.0, 0.2), curvature=curvature)
    ax = plot_descent(lambda w: (w**2).sum(), [path], minimizers=[torch.zeros(2).double()])
    assert (ax.get_aspect() == 1) == equal
    own = Figure().subplots()
    own.set_aspect(2.0)
    assert plot_descent(lambda w: (w**2).sum(), [path], ax=own).get_aspect() == 2


@pytest.mark.long
def test_up_to_seven_paths_are_named_at_their_ends_in_a_place_of_their_own():
    paths = {f"lr {0.02 * i:.2f}": descend(0.02 * i, 120) for i in range(1, 8)}
    ax = plot_descent(quadratic, paths)
    assert texts(ax) == list(paths)
    assert [tuple(text.xy) for text in ax.texts] == [tuple(path[-1].tolist()) for path in paths.values()]
    assert legend(ax)[:2] == ["start", "end"]
    ax.figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in ax.texts]  # without the lines to the ends
    for i, box in enumerate(boxes):
        assert ax.bbox.contains(box.x0, box.y0)
        assert ax.bbox.contains(box.x1, box.y1)
        # The outlines of letters, which placing goes by, are a little smaller than their boxes.
        assert not any(box.padded(-1).overlaps(other.padded(-1)) for other in boxes[:i])


@pytest.mark.parametrize(("count", "labels"), [(2, ["a very long name " * 5, "b"]), (8, list("abcdefgh"))])
def test_long_names_and_more_than_seven_are_in_the_legend(count, labels):
    ax = plot_descent(quadratic, [descend(0.01 * i, 5) for i in range(1, count + 1)], labels=labels)
    assert texts(ax) == []
    assert [entry.strip() for entry in legend(ax)[:count]] == [label.strip() for label in labels]
    render(ax)


def test_a_path_that_is_never_in_view_is_named_in_the_legend():
    paths = {"here": descend(0.1, 5), "far": descend(0.1, 5) + 100}
    ax = plot_descent(quadratic, paths, limits=((-5, 5), (-2, 2)))
    assert texts(ax) == ["here"]
    assert legend(ax)[0] == "far (6 of 6 points outside the view)"


@pytest.mark.long
def test_forty_paths_share_one_entry_that_counts_those_that_leave():
    paths = [descend(0.01 + 0.005 * i, 40) for i in range(40)]
    ax = plot_descent(quadratic, [*paths, torch.tensor([[1.0, 1.0], [NAN, 0.0]])])
    gone = sum(bool((path[-1, 1].abs() > ax.get_ylim()[1]).any()) for path in paths)
    assert gone == 1
    assert legend(ax)[0] == f"41 paths ({gone} leave the view, 1 not finite)"
    assert len(legend(ax)) == 4
    assert texts(ax) == []
    render(ax)
    assert ax.bbox.height > 100
    lines = [line for line in ax.lines if line.get_linestyle() == "-"]
    assert len(lines) == 41
    for line, path in zip(lines, paths, strict=False):
        assert np.array_equal(line.get_xydata(), path[: len(line.get_xydata())])


def test_lines_and_marks_follow_the_line_width_of_the_style():
    with matplotlib.rc_context({"lines.linewidth": 3.0}):
        thick = plot_descent(quadratic, [descend(0.05, 9)])
    thin = plot_descent(quadratic, [descend(0.05, 9)])
    for one, two in zip(thick.lines, thin.lines, strict=True):
        if one.get_linestyle() == "None":
            assert one.get_markersize() == 2 * two.get_markersize()
    assert drawn(thick)[0].get_linewidth() == 2 * drawn(thin)[0].get_linewidth() == 3


def test_points_are_marked_on_short_paths_only():
    for steps, beads in [(58, 59), (59, 0)]:
        assert len(marks(plot_descent(quadratic, [descend(0.01, steps)]), ".")) == beads


@pytest.mark.long
def test_the_view_extends_to_a_minimum_that_no_path_reached():
    ax = plot_descent(bowl, [torch.tensor([[-3.0, 1.5], [-1.2, 0.8]], dtype=torch.float64)])
    (mark,) = marks(ax, "P")
    assert abs(mark - [-0.5, 0.5]).max() < 0.02  # the grid is as fine as that
    assert legend(ax)[-1] == f"lowest point of the grid, {bowl(mark):.3g}"
    assert ax.get_xlim()[1] > -0.5
    path = torch.tensor([[1.0, 0.3], [0.0, 0.2]], dtype=torch.float64)
    for a, b in ((1, 0), (0, -1), (-1, 1)):  # a loss that falls for ever is lowest on the border
        for bent in (0.0, 1.0):  # straight, or in a valley

            def falls(w, a=a, b=b, bent=bent):
                return a * w[0] + b * w[1] + bent * (b * w[0] - a * w[1]) ** 2

            assert len(marks(plot_descent(falls, [path]), "P")) == 0
    limits = ((-3.5, -1.0), (0, 1))
    assert plot_descent(bowl, [path], limits=limits).get_xlim() == limits[0]
    assert len(marks(plot_descent(bowl, [path], minimizers=[torch.tensor([-0.5, 0.5])]), "P")) == 0


def test_linear_levels_are_round_and_one_runs_through_a_saddle():
    path = torch.tensor([1.0, 0.01]) * torch.tensor([0.8, 1.2]) ** torch.arange(20)[:, None]
    ax = plot_descent(lambda w: w[0] ** 2 - w[1] ** 2, [path], levels="linear")
    levels = np.asarray(ax.collections[0].levels)
    assert abs(levels).min() < 1e-12
    assert len(levels) > 8
    heights = np.subtract.outer(
        np.linspace(*ax.get_xlim(), 200) ** 2, np.linspace(*ax.get_ylim(), 200) ** 2
    )
    assert levels[0] <= heights.min() < levels[1]
    assert levels[-2] < np.quantile(heights, 0.99) <= levels[-1]
    assert np.allclose(np.diff(levels), levels[1] - levels[0])
    assert len(plot_descent(quadratic, [path], levels="log").collections[0].levels) == 20


def test_contours_are_rasters_in_vector_formats():
    page = io.BytesIO()
    ax = plot_descent(rosenbrock, [descend(0.1, 20)])
    assert all(shade.get_rasterized() for shade in ax.collections)
    ax.figure.savefig(page, format="svg")
    assert b"<image" in page.getvalue()
    assert len(page.getvalue()) < 200_000


def test_an_error_of_the_loss_tells_how_a_dict_of_paths_was_read():
    path = {"w": torch.ones(3), "b": torch.zeros(3)}
    with pytest.raises(IndexError) as caught:  # a path without its list: two paths of one scalar
        plot_descent(lambda params: params["w"] ** 2 + params["b"] ** 2, path)
    assert "paths was read as 2 paths with labels" in caught.value.__notes__[0]


# Descent: a loss of one scalar.


def valley(w):
    return w**2 / 2 + torch.sin(2 * w)


def iterate(lr, steps, start=4.0):
    points = [torch.tensor(start, dtype=torch.float64)]
    for _ in range(steps):
        points.append(points[-1] - lr * torch.func.grad(valley)(points[-1]))
    return torch.stack(points)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_iterates_of_one_scalar_lie_on_the_curve_of_the_loss(shape):
    path = iterate(0.1, 12)
    ax = plot_descent(lambda p: valley(p["w"].sum()), [{"w": path.reshape(-1, *shape)}])
    (curve,) = drawn(ax)
    x, y = curve.get_xydata().T
    assert np.allclose(y, valley(torch.from_numpy(x.copy())), rtol=0, atol=1e-12)
    points = np.column_stack([path, valley(path)])
    assert np.allclose(marks(ax, "."), points, rtol=0, atol=1e-12)
    assert set(path.tolist()) <= set(x)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("w", "loss")
    assert texts(ax) == ["start at 4", f"end at {path[-1]:.4g}"]
    assert legend(ax) == ["tangents: slopes of the loss", "loss"]
    (left, right), (low, high) = ax.get_xlim(), ax.get_ylim()
    assert (left < points[:, 0]).all()
    assert (points[:, 0] < right).all()
    assert (low < points[:, 1]).all()
    assert (points[:, 1] < high).all()
    # Both sides of the valley are seen.
    lowest = x[y.argmin()]
    assert left < lowest - 0.5
    assert low < y.min()
    render(ax)


def test_tangents_have_the_slope_of_the_loss():
    path = iterate(0.1, 12)
    ax = plot_descent(valley, [path])
    (tangents,) = (c for c in ax.collections if isinstance(c, LineCollection))
    segments = np.array(tangents.get_segments())
    middle = torch.from_numpy(segments.mean(axis=1))
    assert 2 <= len(segments) <= 4
    assert np.allclose(middle[0], [4, valley(path[0])])
    assert np.allclose(middle[:, 1], valley(middle[:, 0]))
    rise = (segments[:, 1] - segments[:, 0]).T
    slopes = torch.func.vmap(torch.func.grad(valley))(middle[:, 0])
    assert np.allclose(rise[1] / rise[0], slopes)


@pytest.mark.long
def test_forty_runs_of_one_scalar_have_one_colour_and_no_tangents():
    ax = plot_descent(valley, [iterate(0.01 * i, 9, start=4 - 0.01 * i) for i in range(40)])
    assert legend(ax) == ["40 paths", "start", "end", "loss"]
    assert not ax.collections
    assert len({line.get_color() for line in ax.lines if line.get_marker() == ""}) == 1
    render(ax)


def test_a_diverging_run_of_one_scalar_leaves_through_the_top():
    path = 4 * (-1.1) ** torch.arange(30, dtype=torch.float64)
    ax = plot_descent(lambda w: w**2 / 2, {"too fast": path, "slow": path[:1] * 0.9 ** torch.arange(20)})
    seen = int((path**2 / 2 < ax.get_ylim()[1]).sum())
    assert seen > 4
    assert legend(ax)[0] == f"too fast (leaves the view at step {seen})"
    assert texts(ax) == ["too fast", "slow"]
    top = crosses(ax)[0, 1]
    assert ax.get_ylim()[1] * 0.95 < top < ax.get_ylim()[1]


@pytest.mark.parametrize(
    "path", [[1.0], [NAN], [NAN, 2.0], [1.0, 1.0], [1.0, INF], [1e20, 1.0], [1.0, -1e30], [1e-30, 0.0]]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_odd_paths_of_one_scalar_are_drawn(path, dtype):
    render(plot_descent(lambda w: w**2 / 2 + 3, [torch.tensor(path, dtype=dtype)], resolution=20))


@pytest.mark.long
@pytest.mark.parametrize(
    ("loss", "entry"),
    [
        (lambda w: w.log(), r"loss \(not finite on \d+ % of the view\)"),
        (lambda w: w * NAN, r"loss \(not finite on 100 % of the view\)"),
        (lambda w: (w > 0.7).sum(), "loss"),
        (lambda w: torch.tensor(3.0), "loss"),
    ],
)
def test_odd_losses_of_one_scalar_are_drawn(loss, entry):
    ax = plot_descent(loss, [torch.tensor([1.0, 0.5])], limits=((-1, 2), (-3, 4)))
    assert (ax.get_xlim(), ax.get_ylim()) == ((-1, 2), (-3, 4))
    assert re.fullmatch(entry, legend(ax)[-1])
    render(ax)
    render(plot_descent(loss, [torch.tensor([1.0, 0.5])], minimizers=[torch.tensor(0.25)]))


# Descent: what it refuses.


PATH = torch.zeros(3, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"paths": PATH}, "TypeError: paths must be a list or tuple.*got Tensor"),
        ({"paths": {"w": PATH}, "labels": ["a"]}, "labels and a dict of paths both name the paths"),
        ({"paths": []}, "paths is empty"),
        (
            {"paths": [PATH, torch.zeros(4, 3)]},
            r"paths\[1\] must have points shaped as in paths\[0\].*paths\[1\] \(3,\)",
        ),
        (
            {"paths": [torch.zeros(4, 3)]},
            r"paths\[0\] must have one or two scalars.*got 3, .*\(3,\); plot_land",
        ),
        (
            {"paths": [PATH[:, :0]]},
            r"paths\[0\] must hold a number at each point; got points of shape paths\[0\] \(0,\)",
        ),
        ({"paths": [PATH[:, 0]], "levels": 7}, "a loss of one scalar has none; leave levels out"),
        ({"levels": "logarithmic"}, "levels must be 'log', 'linear', an int or increasing losses"),
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
        ({"minimizers": [torch.zeros(3)]}, r"minimizers\[0\] must have points shaped.*\(3,\)"),
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
