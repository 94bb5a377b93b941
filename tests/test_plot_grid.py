"""Maps of a sweep: a colour for each cell, and nothing that diverged is left out."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure

import gdfunc as gd
from gdfunc.plot import plot_grid

from .assertions import assert_refused
from .pictures import crosses, drawn, legend, marks, render
from .references import few

NAN, INF = float("nan"), float("inf")


def swept(**axes):
    """A sweep whose outputs tell which point they are of."""
    grid = gd.grid(**axes)

    def run(**point):
        return sum(10**i * torch.as_tensor(value).double() for i, value in enumerate(point.values()))

    return gd.sweep(run, grid)


def mesh(ax):
    (found,) = [artist for artist in ax.collections if isinstance(artist, QuadMesh)]
    return found


@pytest.mark.long
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
    assert ax.get_legend().get_texts()[0].get_text().startswith("best: ")
    render(ax)


def test_a_map_hatches_what_diverged_and_crosses_what_did_in_part():
    lost = {(1, 1): 1, (2, 1): 2, (2, 2): 3}  # how many of 3 members of a cell

    def run(a, b, member):
        return torch.tensor(INF if member < lost.get((a, b), 0) else float(a))

    result = gd.sweep(run, gd.grid(a=[1, 2], b=[1, 2], member=[0, 1, 2]))
    ax = plot_grid(result, "a", "b")
    assert mesh(ax).get_array().mask.tolist() == [[False, True], [False, True]]
    assert ax.patch.get_hatch()
    assert legend(ax)[:2] == ["2 of 4 cells: diverged", "1 of 4 cells: some of the runs diverged"]
    assert crosses(ax).tolist() == [[1, 1]]
    render(ax)


@pytest.mark.long
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
    assert legend(ax) == ["2 of 2 cells: diverged"] if not value < 10 else ax.get_legend() is None
    assert mesh(ax).colorbar.ax.get_ylabel() == "loss"
    render(ax)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"result": torch.ones(4)}, "TypeError: result is Tensor; pass what gd.sweep returns"),
        ({"x": "c"}, "two of the grid's axes, a, b, f; got 'c' and 'b'"),
        ({"x": "b"}, "got 'b' and 'b'"),
        ({"x": "f", "log_x": True}, "axis f must have numbers to be logarithmic; got .'one', 'two'."),
        ({"best": "left"}, "best must be 'low', 'high' or None; got 'left'"),
        ({"start": NAN}, "start must be a finite number"),
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


def ticks(axis):
    return dict(
        zip(axis.get_ticklocs().tolist(), [t.get_text() for t in axis.get_ticklabels()], strict=True)
    )


@pytest.mark.long
def test_names_stand_side_by_side_in_their_order():
    names = ["SGD", "a very long name of an optimizer", True, None]

    def run(method, lr):
        return lr + names.index(method)

    result = gd.sweep(run, gd.grid(method=names, lr=[0.5, 1.5]))
    for x, y in (("method", "lr"), ("lr", "method")):
        ax = plot_grid(result, x, y)
        axis = ax.xaxis if x == "method" else ax.yaxis
        assert ticks(axis) == dict(enumerate(map(str, names)))
        shown = mesh(ax).get_array()
        assert np.allclose(shown.T if x == "method" else shown, [[0.5 + i, 1.5 + i] for i in range(4)])
        render(ax)
        assert ax.get_legend().get_window_extent().y1 < ax.xaxis.get_tightbbox().y0


@pytest.mark.long
@pytest.mark.parametrize("count", [1, 12, 13])
def test_up_to_twelve_values_have_ticks_of_their_own(count):
    sizes = [2**i for i in range(count)]
    ax = plot_grid(swept(a=sizes, b=[0.0, 1.0]), "a", "b", log_x=True)
    render(ax)
    own = {float(size): str(size) for size in sizes}
    assert (ticks(ax.xaxis) == own) == (count <= 12)
    assert ticks(ax.yaxis) == {0.0: "0", 1.0: "1"}


def test_values_too_near_for_ticks_of_their_own_have_the_usual_ones():
    ax = plot_grid(swept(a=[1, 2, 100], b=[0.0, 1.0]), "a", "b")
    assert len(ax.get_xticks()) > 3


@pytest.mark.long
def test_colours_are_logarithmic_by_themselves_only_for_wide_positive_values():
    result = swept(a=[1.0, 2.0, 3.0], b=[0.0])
    for values, log in [
        ((1, 2, 99), False),
        ((1, 2, 101), True),
        ((0, 1, 101), False),
        ((-1, 1, 1e9), False),
    ]:
        ax = plot_grid(result, "a", "b", values=torch.tensor(values, dtype=torch.float64))
        assert (type(mesh(ax).norm).__name__ == "LogNorm") == log
        render(ax)


def test_values_far_above_the_median_do_not_take_up_the_colours_and_are_not_called_diverged():
    values = torch.tensor([1.0, 2.0, 3.0, 1e30, INF], dtype=torch.float64)
    ax = plot_grid(swept(a=[1.0, 2.0, 3.0, 4.0, 5.0], b=[0.0]), "a", "b", values=values)
    assert mesh(ax).get_clim() == (1, 3)
    assert mesh(ax).colorbar.extend == "max"
    assert legend(ax)[0] == "1 of 5 cells: diverged"
    render(ax)


def test_cells_above_the_start_are_hatched():
    values = torch.tensor([1.0, 2.0, 3.0, 1e30, INF], dtype=torch.float64)
    result = swept(a=[1.0, 2.0, 3.0, 4.0, 5.0], b=[0.0])
    ax = plot_grid(result, "a", "b", values=values, start=torch.tensor(2.5))
    assert mesh(ax).get_array().mask.tolist() == [[False, False, True, True, True]]
    assert mesh(ax).get_clim() == (1, 2)
    assert legend(ax)[0] == "3 of 5 cells: diverged or above the start, 2.5"
    render(ax)


@pytest.mark.parametrize(("best", "where", "name"), [("low", (2, 10), "-3"), ("high", (1, 30), "9")])
def test_the_best_cell_has_a_star_and_bright_colours_are_good(best, where, name):
    values = torch.tensor([1.0, 9.0, -3.0, NAN])
    ax = plot_grid(swept(a=[1.0, 2.0], b=[10.0, 30.0]), "a", "b", values=values, best=best)
    assert marks(ax, "*").tolist() == [list(where)]
    assert legend(ax)[-1] == f"best: {name} at a {where[0]}, b {where[1]}"
    good, bad = mesh(ax).to_rgba(np.array([-3.0, 9.0]))[:: 1 if best == "low" else -1, :3].sum(axis=1)
    assert good > bad
    assert not drawn(ax)


def test_no_cell_is_best_if_none_is_asked_for_or_all_are_alike():
    result = swept(a=[1.0, 2.0], b=[0.0])
    for ax in (plot_grid(result, "a", "b", best=None), plot_grid(result, "a", "b", values=torch.ones(2))):
        assert len(marks(ax, "*")) == 0
        assert ax.get_legend() is None


def test_a_map_leaves_the_user_axes_alone_but_for_its_own():
    ax = Figure(layout="constrained").subplots()
    assert plot_grid(swept(a=[1.0, 2.0], b=[0.0, 1.0]), "a", "b", ax=ax) is ax
    assert len(ax.figure.axes) == 2
