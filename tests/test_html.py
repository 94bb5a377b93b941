"""HTML for notebooks: it is well-formed, holds the numbers, and draws curves of the recorded values."""

from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch.func import vmap

import gdfunc as gd
from gdfunc import _html


def parsed(html):
    return ElementTree.fromstring(f"<body>{html}</body>")


def cells(html):
    return [["".join(cell.itertext()) for cell in row] for row in parsed(html).iter("tr")]


def test_a_sweep_shows_its_first_records():
    result = gd.sweep(lambda lr, name: {"end": 2 * lr}, gd.grid(lr=torch.linspace(0, 1, 30), name=["<a>"]))
    html = result._repr_html_()
    assert "the first 20 of 30 rows" in html
    header, first, second, *rest = cells(html)
    assert header == ["lr", "name", "end", "diverged"]
    assert first == ["0", "<a>", "0", "False"]
    assert second == ["0.0344828", "<a>", "0.0689655", "False"]
    assert len(rest) == 18


def test_a_grid_shows_its_axes():
    html = gd.grid(lr=torch.linspace(0, 1, 11), size=[2, 4])._repr_html_()
    assert cells(html)[1:] == [
        ["lr", "11", "vmapped", "0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, …"],
        ["size", "2", "looped", "2, 4"],
    ]


def run(lr):
    step = gd.make_step(lambda p, batch: (p["w"] * batch).square().mean())
    start, data = {"w": torch.tensor(1.0)}, torch.linspace(0.5, 1.0, 4)
    return gd.train(step, start, data, gd.full_batch(4, 50), lr, record=("loss", "params"))[1]


def test_a_trajectory_shows_a_curve_for_each_number_a_step():
    rows = cells(run(0.5)._repr_html_())
    assert [row[:2] for row in rows[1:]] == [
        ["step", "int64[50]"],
        ["loss", "float32[50]"],
        ["params['w']", "float32[50]"],
    ]
    assert len([*parsed(run(0.5)._repr_html_()).iter("path")]) == 2


def test_a_swept_trajectory_shows_the_curves_of_its_members():
    trajectory = gd.sweep(run, gd.grid(lr=[0.1, 0.2, 0.3])).outputs
    assert len([*parsed(trajectory._repr_html_()).iter("path")]) == 6


def test_a_trajectory_under_vmap_shows_no_values():
    shown = []
    vmap(lambda lr: shown.append(run(lr)._repr_html_()) or lr)(torch.tensor([0.1, 0.2]))
    assert not [*parsed(shown[0]).iter("path")]


def places(svg):
    """The points of each curve, by its moves."""
    path = next(parsed(svg).iter("path")).get("d")
    return [[tuple(map(float, p.split())) for p in part.split("L")] for part in path.split("M")[1:]]


def test_a_curve_goes_through_its_points():
    (points,) = places(_html.curves(np.array([[0.0, 2.0, 1.0]])))
    assert points[1:] == [(1.0, 27.0), (80.0, 1.0), (159.0, 14.0)]


def test_a_curve_over_decades_is_logarithmic():
    svg = _html.curves(np.array([[1.0, 1e-2, 1e-4]]))
    assert [round(y) for _, y in places(svg)[0][1:]] == [1, 14, 27]
    assert "log, 0.0001 to 1" in svg


@pytest.mark.parametrize("gap", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_leaves_a_gap(gap):
    first, second = places(_html.curves(np.array([[0.0, 1.0, gap, 1.0]])))
    assert len(first) == 3
    assert len(second) == 2
    assert _html.curves(np.array([[gap, gap]])) == "not finite"


@pytest.mark.parametrize("value", [0.0, -1.0, 1e308])
def test_constant_and_extreme_curves_stay_in_the_picture(value):
    for row in ([value], [value, value], [value, -value], [0.0, value]):
        svg = _html.curves(np.array([row]))
        (curve,) = places(svg)
        assert all(0 <= x <= 160 and 0 <= y <= 28 for x, y in curve)


def test_long_runs_are_thinned():
    assert len(_html.curves(np.random.default_rng(0).random((100, 10_000)))) < 24 * 161 * 14
