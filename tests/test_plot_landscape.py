"""Landscapes: planes through parameters, paths projected on them, and the true losses of these."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

import gdfunc as gd
from gdfunc.plot import plot_landscape

from .assertions import assert_refused
from .pictures import drawn, legend, marks, render, texts
from .references import few, flat, normal

NAN, INF = float("nan"), float("inf")
DATA = normal(7, 9, 3)


def loss_fn(params, data):
    """A network of 3 inputs, 4 hidden units and one output; 21 parameters."""
    hidden = torch.tanh(data @ params["w"].mT + params["b"])
    return ((hidden @ params["out"]) - data.sum(dim=1)).square().mean()


def tree_of(vectors):
    """Parameters [..., 20] as a tree."""
    lead = vectors.shape[:-1]
    w, b, out = vectors.split([12, 4, 4], dim=-1)
    return {"w": w.reshape(*lead, 4, 3), "b": b, "out": out}


def wander(seed, steps):
    """A random walk [steps + 1, 20] on the way to zero."""
    noise = normal(seed, steps + 1, 20)
    return normal(seed + 1, 20) * 0.8 ** torch.arange(steps + 1)[:, None] + 0.05 * noise


def side(ax):
    return ax.figure.axes[-1]


def beside(ax, dashed):
    """The curves on the second axes."""
    return [line.get_ydata() for line in side(ax).lines if (line.get_linestyle() == "--") == dashed]


def losses_at(points, data=DATA):
    return torch.stack([loss_fn(tree_of(point), data) for point in points]).numpy()


def basis_of(ax, paths, plane):
    """Check that what is drawn is the projection on a plane [20, 2] through the first path's end."""
    for line, path in zip(drawn(ax), paths, strict=True):
        expected = torch.linalg.lstsq(plane, (path - paths[0][-1]).T).solution.T
        assert np.allclose(line.get_xydata(), expected[: len(line.get_xydata())])


@pytest.mark.long
def test_the_plane_of_pca_has_the_largest_variances_and_the_path_its_projections():
    paths = [wander(0, 12), wander(5, 9)]
    ax = plot_landscape(loss_fn, {"a": tree_of(paths[0]), "b": tree_of(paths[1])}, DATA, resolution=7)
    # All points that are no higher than the higher start are seen, and span the plane.
    points = torch.cat(paths)
    losses = torch.from_numpy(losses_at(points))
    seen = points[losses <= max(losses[0], losses[13])]
    values, vectors = torch.linalg.eigh(torch.cov(seen.T))
    shares = 100 * values / values.sum()
    assert ax.get_xlabel() == f"PC 1 ({shares[-1]:.0f} %)"
    assert ax.get_ylabel() == f"PC 2 ({shares[-2]:.0f} %)"
    plane = vectors[:, [-1, -2]]
    plane = plane * ((paths[0][-1] - paths[0][0]) @ plane).sign()  # the first path runs right and up
    basis_of(ax, paths, plane)
    assert texts(ax) == ["a", "b"]
    render(ax)


@pytest.mark.long
@few
@given(st.integers(0, 2**32), st.integers(2, 12))
def test_true_losses_stand_next_to_the_losses_of_the_plane(seed, steps):
    path = wander(seed, steps)
    directions = normal(seed + 2, 2, 20)
    ax = plot_landscape(
        loss_fn, [tree_of(path)], DATA, directions=[tree_of(one) for one in directions], resolution=3
    )
    basis_of(ax, [path], directions.T)
    places = drawn(ax)[0].get_xydata()
    places = torch.linalg.lstsq(directions.T, (path - path[-1]).T).solution.T
    own, shown = losses_at(path), losses_at(path[-1] + places @ directions)
    assert np.allclose(beside(ax, dashed=False), [own])
    assert np.allclose(beside(ax, dashed=True), [shown])
    ratio = shown / own
    assert legend(ax)[-1] == f"loss of the plane there: {ratio.min():.3g}–{ratio.max():.3g} of it"
    assert own[-1] == pytest.approx(shown[-1])  # the end of the first path lies in the plane
    assert (side(ax).get_xlabel(), side(ax).get_ylabel()) == ("step", "loss")


@pytest.mark.long
def test_contours_are_those_of_the_loss_on_the_plane():
    path, (u, v) = wander(1, 5), normal(3, 2, 20)
    limits = ((-0.5, 1.0), (-2.0, 0.5))
    ax = plot_landscape(
        loss_fn, [tree_of(path)], DATA, directions=(tree_of(u), tree_of(v)), limits=limits, resolution=301
    )
    assert (ax.get_xlim(), ax.get_ylim()) == limits
    assert [ax.get_xlabel(), ax.get_ylabel()] == ["direction 1", "direction 2"]
    lines = ax.collections[-1]
    for level, line in zip(lines.levels[::5], lines.get_paths()[::5], strict=True):
        places = torch.from_numpy(line.vertices[::40].copy())
        assert np.allclose(losses_at(path[-1] + places @ torch.stack([u, v])), level, rtol=2e-3)


def test_random_directions_have_the_norms_of_the_filters():
    path, key = wander(2, 4), gd.random.key(3)
    ax = plot_landscape(loss_fn, [tree_of(path)], DATA, directions="random", key=key, resolution=3)
    assert ax.get_xlabel() == "random direction 1"
    end = tree_of(path[-1])
    directions = []
    for one in gd.random.split(key):
        draw = gd.tree.random_like(one, end)
        for i, row in enumerate(end["w"]):
            draw["w"][i] *= row.norm() / draw["w"][i].norm()
        for name in ("b", "out"):
            draw[name] *= end[name].norm() / draw[name].norm()
        directions.append(flat(draw))
    order = flat({"w": end["w"], "b": end["b"], "out": end["out"]})
    assert torch.equal(order, path[-1])
    basis_of(ax, [path], torch.stack(directions, dim=1))
    (left, right), (low, high) = ax.get_xlim(), ax.get_ylim()
    assert max(left, low) < -1 < 1 < min(right, high)
    again = plot_landscape(loss_fn, [tree_of(path)], DATA, directions="random", key=key, resolution=3)
    assert np.array_equal(drawn(again)[0].get_xydata(), drawn(ax)[0].get_xydata())


@pytest.mark.long
def test_a_plane_through_three_points_shows_them_at_their_distances():
    points = normal(4, 3, 20)
    ax = plot_landscape(
        loss_fn,
        [tree_of(wander(0, 6))],
        DATA,
        directions=[tree_of(point) for point in points],
        resolution=5,
    )
    corners = marks(ax, "s")
    distances = torch.cdist(points, points).numpy()
    assert np.allclose(np.hypot(*(corners[:, None] - corners[None]).T), distances)
    assert np.allclose(corners[0], 0)
    assert corners[1, 1] == pytest.approx(0)
    assert texts(ax)[-3:] == ["A", "B", "C"]
    (left, right), (low, high) = ax.get_xlim(), ax.get_ylim()
    assert ((corners > [left, low]) & (corners < [right, high])).all()
    render(ax)


def test_points_of_a_plane_have_equal_losses_on_and_off_it():
    """Two parameters are a plane, so the true losses are the plane's."""

    def bowl(w, data):
        return w[0] ** 2 + 3 * w[1] ** 2

    path = normal(0, 6, 2)
    ax = plot_landscape(
        bowl, [path], directions=(torch.tensor([1.0, 0.0]).double(), torch.ones(2).double())
    )
    assert np.allclose(beside(ax, dashed=False), beside(ax, dashed=True))
    assert legend(ax)[-1] == "loss of the plane there: 1–1 of it"
    ax = plot_landscape(lambda w, _: w[0] ** 2 - w[1] ** 2, [path])
    assert legend(ax)[-1].startswith("loss of the plane there: off by ")


@pytest.mark.long
def test_diverged_paths_are_shown_and_do_not_turn_the_plane():
    path = wander(0, 12)
    wild = torch.cat([path[:3] + 0.1, 1e30 * torch.ones(1, 20), torch.full((2, 20), INF)])
    limits = ((-9, 9), (-9, 9))
    ax = plot_landscape(
        loss_fn, {"a": tree_of(path), "b": tree_of(wild)}, DATA, resolution=9, limits=limits
    )
    assert "b (leaves the view at step 3, not finite from step 4)" in legend(ax)
    assert len(marks(ax, "x")) == 1
    alone = plot_landscape(loss_fn, [tree_of(path), tree_of(wild[:3])], DATA, resolution=9, limits=limits)
    assert (ax.get_xlabel(), ax.get_ylabel()) == (alone.get_xlabel(), alone.get_ylabel())
    assert np.isnan(beside(ax, dashed=False)[1][-2:]).all()
    render(ax)


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_tensors_and_arrays_of_any_float(dtype):
    path = tree_of(wander(0, 5).to(dtype).requires_grad_())
    ax = plot_landscape(loss_fn, [path], DATA.to(dtype), resolution=5)
    render(ax)
    if dtype == torch.float32:
        arrays = gd.tree.map(lambda leaf: leaf.detach().numpy(), path)
        other = plot_landscape(loss_fn, [arrays], DATA.to(dtype).numpy(), resolution=5)
        assert np.array_equal(drawn(other)[0].get_xydata(), drawn(ax)[0].get_xydata())


@pytest.mark.long
def test_one_point_has_directions_of_its_own():
    path = tree_of(wander(0, 0))
    ax = plot_landscape(loss_fn, [path], DATA, directions="random", key=gd.random.key(0), resolution=5)
    assert np.allclose(marks(ax, "D"), 0)
    render(ax)


@pytest.mark.long
def test_forty_paths_and_a_loss_that_is_nan_are_drawn():
    ax = plot_landscape(
        lambda params, data: loss_fn(params, data).log(), [tree_of(wander(i, 4)) for i in range(40)], DATA
    )
    assert legend(ax)[0].startswith("40 paths")
    assert len(beside(ax, dashed=False)) == len(beside(ax, dashed=True)) == 40
    render(ax)
    render(plot_landscape(lambda p, d: loss_fn(p, d) * NAN, [tree_of(wander(0, 4))], DATA, resolution=5))


@pytest.mark.long
@pytest.mark.parametrize("layout", ["constrained", None])
def test_the_second_axes_take_a_part_of_the_place_of_the_first(layout):
    parameters, figures = dict(matplotlib.rcParams), plt.get_fignums()
    own, neighbour = Figure(figsize=(12, 4), layout=layout).subplots(1, 2)
    path = tree_of(wander(0, 6))
    assert plot_landscape(loss_fn, [path], DATA, ax=own, resolution=5) is own
    own.figure.draw_without_rendering()
    assert own.bbox.x1 < side(own).bbox.x0 < side(own).bbox.x1 < neighbour.bbox.x0
    free = Figure().add_axes((0.1, 0.2, 0.8, 0.7))
    plot_landscape(loss_fn, [path], DATA, ax=free, resolution=5)
    assert free.get_position().x1 < side(free).get_position().x0 < side(free).get_position().x1 <= 0.91
    assert dict(matplotlib.rcParams) == parameters
    assert plt.get_fignums() == figures


PATH = tree_of(wander(0, 4))
ONE = tree_of(torch.ones(20).double())
LINE = tree_of(torch.arange(5.0)[:, None].double() * torch.ones(20))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"paths": PATH["w"]},
            "TypeError: paths must be a list .*or a dict of label -> path; got Tensor",
        ),
        ({"paths": []}, "paths is empty"),
        ({"paths": [PATH, {"w": PATH["w"]}]}, r"paths\[1\] does not have the structure of paths\[0\]"),
        ({"directions": "PCA"}, 'directions must be "pca", "random", a pair of params trees, or three'),
        ({"directions": [ONE]}, "directions must be"),
        ({"directions": "random"}, r'directions="random" needs key=gd\.random\.key\(seed\)'),
        (
            {"directions": [ONE, {"w": ONE["w"]}]},
            r"directions\[1\] does not have the structure of",
        ),
        ({"directions": [ONE, ONE]}, "the two directions are parallel or zero"),
        ({"directions": [ONE, ONE, ONE]}, "the three points lie on a line"),
        ({"paths": [LINE]}, "the points of the paths lie on a line, so there is no second principal"),
        ({"paths": [tree_of(wander(0, 0))]}, "the points of the paths lie on a line"),
        ({"levels": 1}, "levels must be an int >= 2"),
        ({"resolution": 1}, "resolution must be an int >= 2"),
        ({"limits": (0, 1)}, "limits must be"),
        ({"minimum": INF}, "minimum must be a finite number"),
        ({"loss_fn": lambda params, data: params["w"]}, "loss must return a 0-d real tensor"),
    ],
)
def test_landscape_names_what_is_wrong(arguments, message):
    options = {"loss_fn": loss_fn, "paths": [PATH], "data": DATA, "resolution": 3, **arguments}
    assert_refused(lambda: plot_landscape(options.pop("loss_fn"), options.pop("paths"), **options), message)


def test_one_parameter_has_no_plane():
    assert_refused(
        lambda: plot_landscape(lambda w, _: w**2, [torch.ones(3)]), "ValueError: .*use plot_descent"
    )


def test_a_subfigure_has_room_for_names_as_a_figure_has():
    from matplotlib.figure import Figure

    paths = {"one": {"w": torch.tensor([[3.0, 2.0], [1.0, 1.0], [0.0, 0.5]])}}
    paths["two"] = {"w": paths["one"]["w"].flip(1)}
    ax = Figure(layout="constrained").subfigures(1, 2)[0].subplots()
    gd.plot.plot_landscape(lambda p, data: p["w"].square().sum(), paths, ax=ax, resolution=5)
    assert {"one", "two"} <= {text.get_text() for text in ax.texts}
