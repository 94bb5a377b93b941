"""Losses of samples: every number in the picture is per_sample_grad's."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

import gdfunc as gd
from gdfunc.plot import plot_samples

from .assertions import assert_refused
from .pictures import legend, render, texts
from .references import few, normal

INF = float("inf")


def loss_fn(w, batch):
    x, y = batch
    return 0.5 * ((w * x - y) ** 2).mean()


def data(seed, n, dtype=torch.float64):
    x = normal(seed, n)
    return x.to(dtype), (5 * x + normal(seed + 1, n)).to(dtype)


def lines(ax):
    """The curves of samples, the tangents of samples that pull as the mean does, and of the others."""
    return [c.get_segments() for c in ax.collections if isinstance(c, LineCollection)]


def shares(ax):
    return [text for text in texts(ax) if text]


@pytest.mark.long
@few
@given(st.integers(0, 2**32), st.integers(1, 12), st.lists(st.floats(-8, 12), min_size=1, max_size=3))
def test_each_sample_its_mean_and_its_tangents_are_those_of_per_sample_grad(seed, n, places):
    batch = data(seed, n)
    ax = plot_samples(loss_fn, torch.tensor(9.0).double(), batch, at=places, resolution=11)
    curves, right, wrong = lines(ax)
    mean = next(line for line in ax.lines if line.get_linewidth() == 3)
    x, y = mean.get_xydata().T
    assert set(places) <= set(x)
    assert len(curves) == n
    for i, curve in enumerate(curves):
        expected = (x * batch[0][i].item() - batch[1][i].item()) ** 2 / 2
        assert np.array_equal(curve[:, 0], x)
        assert np.allclose(curve[:, 1], expected)
    assert np.allclose(y, np.mean([curve[:, 1] for curve in curves], axis=0))
    assert len(right) + len(wrong) == n * len(places)
    pulls = gd.per_sample_grad(loss_fn)
    grads, losses = zip(*[pulls(torch.tensor(w).double(), batch) for w in places], strict=True)
    grads, losses = [[row.numpy() for row in rows] for rows in (grads, losses)]
    against = [g * g.mean() < 0 for g in grads]
    for tangents, mask in ((right, [~m for m in against]), (wrong, against)):
        ends = np.array(tangents).reshape(-1, 2, 2)
        chosen = np.concatenate(mask)
        assert np.allclose(ends.mean(axis=1)[:, 1], np.concatenate(losses)[chosen])
        run, rise = (ends[:, 1] - ends[:, 0]).T
        assert np.allclose(rise, np.concatenate(grads)[chosen] * run)
    for text, w, loss, mask in zip(shares(ax), places, losses, against, strict=True):
        above = int((loss > ax.get_ylim()[1]).sum())
        share = 100 * mask.mean()
        note = f" ({above} above)" if above else ""
        assert (
            text == f"params = {w:.4g}: {share:.0f} % ({int(mask.sum())} of {n}) pull the wrong way{note}"
        )


@pytest.mark.long
def test_the_view_holds_all_places_and_both_sides_of_the_valley():
    batch = data(3, 40)
    ax = plot_samples(loss_fn, torch.tensor(9.0).double(), batch)
    x, y = batch
    best = float((x * y).sum() / (x * x).sum())
    low, high = ax.get_xlim()
    assert best - low == pytest.approx(high - best, abs=0.3)
    assert low < best < 9 < high
    assert ax.get_xlabel() == "params"
    assert [entry.split(",")[0] for entry in legend(ax)] == [
        "each of 40 samples",
        "their mean",
        "lowest points of samples",
        "pulls as the mean does",
        "pulls the wrong way",
    ]
    render(ax)
    limits = ((2.0, 3.0), (0.0, 1.0))
    ax = plot_samples(loss_fn, torch.tensor(9.0).double(), batch, at=[2.5], limits=limits)
    assert (ax.get_xlim(), ax.get_ylim()) == limits


def test_ticks_are_the_lowest_points_of_samples():
    batch = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([4.0, 6.0, 1.0])  # at 4 and 3; and one that is flat
    ax = plot_samples(loss_fn, torch.tensor(6.0), batch, resolution=2001)
    (ticks,) = (line for line in ax.lines if line.get_marker() == "|")
    assert np.allclose(sorted(ticks.get_xdata()), [3, 4], atol=0.01)
    assert legend(ax)[2] == "lowest points of samples, 2 in view"


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_params_may_be_any_tree_of_one_scalar(shape):
    batch = data(0, 5)
    plain = plot_samples(loss_fn, torch.tensor(9.0).double(), batch)
    ax = plot_samples(
        lambda p, b: loss_fn(p["layer"]["w"].reshape(()), b),
        {"layer": {"w": torch.full(shape, 9.0).double()}},
        tuple(part.numpy() for part in batch),
    )
    assert ax.get_xlabel() == "layer.w"
    assert all(np.allclose(one, two) for one, two in zip(lines(ax)[0], lines(plain)[0], strict=True))
    assert shares(ax) == [text.replace("params", "layer.w") for text in shares(plain)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_samples_of_any_float_are_drawn(dtype):
    w = torch.tensor(9.0, dtype=dtype, requires_grad=True)
    render(plot_samples(loss_fn, w, data(0, 5, dtype), at=torch.tensor([9.0, -1.0])))


@pytest.mark.parametrize(
    ("x", "y", "said"),
    [
        (
            [1.0, -1.0],
            [6.0, -4.0],
            "params = 5: 1 of 2 pull up, 1 down",
        ),
        ([1.0, 1.0, INF], [6.0, 1.0, 2.0], "params = 5: 33 % (1 of 3) pull the wrong way (1 not finite)"),
        ([0.0], [1.0], "params = 5: 0 of 1 pull up, 0 down"),
    ],
)
def test_places_without_a_mean_pull_and_samples_that_are_not_finite_are_told(x, y, said):
    ax = plot_samples(loss_fn, torch.tensor(5.0), (torch.tensor(x), torch.tensor(y)))
    assert shares(ax) == [said]
    render(ax)


@pytest.mark.long
def test_a_loss_that_falls_for_ever_is_drawn():
    render(plot_samples(lambda w, b: (w * b).mean(), torch.tensor(1.0), torch.ones(3)))
    render(plot_samples(lambda w, b: (0 * w * b).mean(), torch.tensor(1.0), torch.ones(3)))


@pytest.mark.parametrize("style", ["paper", "slide"])
def test_texts_stay_within_the_axes(style):
    with matplotlib.rc_context(gd.plot.style(style)):
        ax = plot_samples(loss_fn, torch.tensor(9.0).double(), data(3, 24), at=[9, 5.5, 5.0, 1.0])
    ax.figure.draw_without_rendering()
    for text in ax.texts:
        if text.get_text():
            box = text.get_window_extent()
            assert ax.bbox.x0 - 3 < box.x0 < box.x1 < ax.bbox.x1 + 3


def test_the_given_axes_are_returned_and_nothing_global_is_touched():
    parameters, figures = dict(matplotlib.rcParams), plt.get_fignums()
    own, batch = Figure().add_subplot(), data(0, 5)
    copies = [part.clone() for part in batch]
    assert plot_samples(loss_fn, torch.tensor(9.0).double(), batch, ax=own) is own
    assert dict(matplotlib.rcParams) == parameters
    assert plt.get_fignums() == figures
    assert all(map(torch.equal, batch, copies))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"params": torch.ones(2)}, r"params must have one scalar in all; got params \(2,\)"),
        ({"params": torch.tensor(1)}, "TypeError: params is int64"),
        ({"data": ()}, "there are no samples to tell apart"),
        ({"at": []}, r"at must be one or more finite numbers; got \[\]"),
        ({"at": [INF]}, r"at must be one or more finite numbers; got \[inf\]"),
        ({"at": 3.0}, "at must be one or more finite numbers; got 3.0"),
        ({"resolution": 1}, "resolution must be an int >= 2"),
        ({"limits": (0, 1)}, "limits must be"),
    ],
)
def test_samples_name_what_is_wrong(arguments, message):
    options = {"params": torch.tensor(1.0), "data": data(0, 4, torch.float32), **arguments}
    assert_refused(lambda: plot_samples(loss_fn, **options), message)
