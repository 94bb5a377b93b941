"""Ranked ranges of learning rates: a bar is where the loss is good, and no more."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import gdfunc as gd
from gdfunc.plot import plot_sensitivity
from gdfunc.plot._style import is_dark

from .assertions import assert_refused
from .pictures import legend, marks, render, texts
from .references import few

NAN, INF = float("nan"), float("inf")
ONE = gd.sweep(lambda lr: lr, gd.grid(lr=[1.0, 2.0]))
LRS = np.geomspace(1e-4, 1, 9)


def bars(ax):
    """The ends of the bars of each row, from the top."""
    found = {}
    for bar in ax.patches:
        ends = (bar.get_x(), bar.get_x() + bar.get_width())
        found.setdefault(round(bar.get_y() + bar.get_height() / 2), []).append(ends)
    return found


def names(ax):
    return [label.get_text() for label in ax.get_yticklabels()]


@pytest.mark.long
@few
@given(st.floats(-3, -1), st.floats(0.01, 3), st.floats(1.2, 8))
def test_a_bar_ends_where_a_straight_line_of_logarithms_meets_the_factor(log_best, slope, factor):
    """A loss that is V-shaped in its logarithms, tried at its best, is that straight line."""
    best = 10**log_best
    assume(abs(LRS / best - 1).min() > 1e-9)
    lrs = np.sort(np.append(LRS, best))
    losses = 0.1 * np.maximum(lrs / best, best / lrs) ** slope
    ax = plot_sensitivity({"SGD": (lrs, losses)}, factor=factor)
    low, high = best * factor ** (-1 / slope), best * factor ** (1 / slope)
    ((found,),) = bars(ax).values()
    assert found == pytest.approx((max(low, LRS[0]), min(high, LRS[-1])), rel=1e-6)
    assert marks(ax, "*").tolist() == [[pytest.approx(best), 0]]
    (note,) = texts(ax)
    assert note.startswith("≥") == (low <= LRS[0] or high >= LRS[-1])
    assert names(ax) == ["SGD (0.1)"]


def test_a_bar_does_not_reach_towards_a_run_that_diverged():
    ax = plot_sensitivity({"a": ([1, 2, 4, 8], [INF, 1.0, 1.5, NAN])})
    assert np.allclose(bars(ax)[0], [(2, 4)])
    assert texts(ax) == ["× 2"]
    render(ax)


@pytest.mark.parametrize("losses", [[1.0, 1.5, 9.0, 9.0], [9.0, 9.0, 1.5, 1.0]])
def test_a_range_that_reaches_either_end_of_the_values_tried_may_go_on(losses):
    (note,) = texts(plot_sensitivity({"a": ([1, 2, 4, 8], losses)}))
    assert note.startswith("≥ × ")


def test_good_values_apart_from_the_best_have_a_bar_but_do_not_count():
    ax = plot_sensitivity({"a": ([1, 10, 100, 1000], [1.5, INF, 1.0, 9.0])})
    assert len(bars(ax)[0]) == 2
    assert texts(ax)[0].startswith("× ")  # not ≥: the range with the best value ends in between
    assert float(texts(ax)[0][2:]) < 10


@pytest.mark.long
def test_rows_are_ranked_and_the_lost_are_last_and_shown():
    curves = {
        "narrow": (LRS, np.where(np.arange(9) == 4, 1.0, 9.0)),
        "lost": (LRS, np.full((2, 9), NAN)),
        "wide": (torch.tensor(LRS), torch.ones(3, 9, dtype=torch.float16)),
    }
    ax = plot_sensitivity(curves, defaults={"narrow": 0.3})
    assert names(ax) == ["wide (1)", "narrow (1)", "lost"]
    low, high = ax.get_ylim()
    assert low > high  # the first is on top
    assert texts(ax) == [
        "≥ × 10000",
        f"× {bars(ax)[1][0][1] / bars(ax)[1][0][0]:.2g}",
        "diverged everywhere",
    ]
    (default,) = [line for line in ax.lines if line.get_color() == "#D55E00"]
    assert default.get_xdata().tolist() == [0.3, 0.3]
    assert np.mean(default.get_ydata()) == 1
    assert legend(ax)[-1] == "default lr"
    tried = marks(ax, "|")
    assert len(tried) == 27
    render(ax)


def test_losses_of_several_runs_are_their_medians_and_a_diverged_one_is_above():
    runs = torch.tensor([[1.0, 5.0], [NAN, 5.0], [3.0, 5.0]])
    ax = plot_sensitivity({"a": ([0.1, 1.0], runs)})
    assert names(ax) == ["a (3)"]
    assert legend(ax)[0] == "loss ≤ 6 (× 2 the median best), median of 3"


def test_the_factor_is_of_the_loss_above_the_minimum():
    losses = {"a": ([0.1, 1.0, 10.0], [7.0, 6.0, 9.0])}
    ax = plot_sensitivity(losses, minimum=5.0)
    assert np.allclose(bars(ax)[0], [(0.1, 10**0.5)])
    assert legend(ax)[0] == "loss above the minimum ≤ 2 (× 2 the median best)"


@pytest.mark.parametrize(
    "order", [("method", "lr", "key"), ("key", "lr", "method"), ("lr", "key", "method")]
)
def test_a_sweep_is_read_by_its_axes(order):
    def run(method, lr, key):
        return {"SGD": 1.0, "Adam": 3.0}[method] + (lr.log10() + 1).abs() + 0 * key

    axes = {"method": ["SGD", "Adam"], "lr": [0.01, 0.1, 1.0], "key": [1.0, 2.0, 3.0]}
    result = gd.sweep(run, gd.grid(**{name: axes[name] for name in order}))
    ax = plot_sensitivity(result, factor=1.5, bound="own")
    assert names(ax) == ["Adam (3)", "SGD (1)"]
    assert legend(ax)[0] == "loss within × 1.5 of its own best, median of 3"
    numbers = plot_sensitivity(gd.sweep(run, gd.grid(**axes)), by="key")
    assert sorted(names(numbers)) == ["key 1 (2)", "key 2 (2)", "key 3 (2)"]


V = np.abs(np.log10(LRS) + 2)  # 0 at lr 0.01, and 1 a decade away


@pytest.mark.long
@few
@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=6), st.floats(1.1, 5))
def test_the_shared_bound_is_a_factor_of_the_median_setting_and_all_bars_end_there(best, factor):
    curves = {f"{i}": (LRS, least * 10**V) for i, least in enumerate(best)}
    bound = factor * float(np.median(best))
    ax = plot_sensitivity(curves, factor=factor)
    found, order = bars(ax), [name.split(" ")[0] for name in names(ax)]
    for row, name in enumerate(order):
        least = best[int(name)]
        assert (row in found) == (least <= bound)
        if row in found:
            reach = min(bound / least, 100.0)  # a decade of lr for a factor of ten, as far as was tried
            assert found[row] == [pytest.approx((0.01 / reach, 0.01 * reach))]
    assert [best[int(name)] for name in order] == sorted(best)  # the widest has the least loss here
    given = plot_sensitivity(curves, bound=bound)
    assert bars(given) == found
    assert texts(given) == texts(ax)


@pytest.mark.long
def test_a_setting_that_is_bad_everywhere_ranks_high_by_its_own_bound_alone():
    flats = {"worse": (LRS, np.full(9, 90.0)), "flat": (LRS, np.full(9, 50.0))}
    curves = {**flats, "good": (LRS, 0.1 * 10**V), "ok": (LRS, 0.2 * 10**V), "fine": (LRS, 0.3 * 10**V)}
    assert names(plot_sensitivity(curves, bound="own"))[:2] == ["flat (50)", "worse (90)"]
    ax = plot_sensitivity(curves, defaults={"flat": 0.1})
    assert names(ax) == ["good (0.1)", "ok (0.2)", "fine (0.3)", "flat (50)", "worse (90)"]
    assert texts(ax)[-2:] == ["never so low"] * 2
    assert legend(ax)[0] == "loss ≤ 0.6 (× 2 the median best)"
    assert marks(ax, "*")[-1].tolist() == [LRS[0], 4]
    assert sum(line.get_color() == "#D55E00" for line in ax.lines) == 1
    render(ax)


def test_a_bound_is_a_loss_and_the_minimum_is_taken_off_it():
    losses = {"a": ([0.1, 1.0, 10.0], [7.0, 6.0, 9.0])}
    ax = plot_sensitivity(losses, minimum=5.0, bound=7.0)
    assert np.allclose(bars(ax)[0], [(0.1, 10**0.5)])
    assert legend(ax)[0] == "loss above the minimum ≤ 2"


@pytest.mark.long
def test_settings_that_diverge_everywhere_have_no_part_in_the_bound():
    lost = {f"lost {i}": (LRS, np.full(9, INF)) for i in range(3)}
    ax = plot_sensitivity({"good": (LRS, 10**V), **lost})
    assert legend(ax)[0] == "loss ≤ 2 (× 2 the median best)"
    assert texts(plot_sensitivity(lost)) == ["diverged everywhere"] * 3


@pytest.mark.long
def test_a_figure_of_its_own_is_as_high_as_its_rows_need():
    curves = {f"method {i}": (LRS, np.ones(9)) for i in range(30)}
    ax = plot_sensitivity(curves)
    render(ax)
    labels = ax.get_yticklabels()
    boxes = [label.get_window_extent() for label in labels]
    assert not any(one.overlaps(two) for one, two in itertools.pairwise(boxes))
    assert not is_dark(ax)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"losses": torch.ones(3)}, "TypeError: losses is Tensor; pass what gd.sweep returns, or a dict"),
        ({"losses": {}}, "losses is empty"),
        ({"losses": {"a": torch.ones(3)}}, r"losses\['a'\] must be \(lrs, losses\); got Tensor"),
        ({"losses": {"a": ([1, 2], [1])}}, r"a must have lrs \[n\] and losses .* \(2,\) and \(1, 1\)"),
        ({"losses": {"a": ([0, 2], [1, 2])}}, "a must have different, finite lrs > 0"),
        ({"losses": {"a": ([2, 2], [1, 2])}}, "a must have different, finite lrs > 0"),
        ({"losses": {"a": ([1, 2], [0, 2])}}, "a has the best loss 0 above the minimum"),
        ({"bound": 0.0}, "bound must be above the minimum, 0; got 0"),
        ({"bound": "all"}, "bound must be 'shared', 'own' or a loss; got 'all'"),
        ({"bound": INF}, "bound must be a finite number"),
        ({"factor": 0.5}, "factor must be >= 1; got 0.5"),
        ({"defaults": {"b": 1}}, "defaults has 'b', but losses has only a"),
        (
            {"losses": gd.sweep(lambda lr: lr, gd.grid(lr=[1.0, 2.0]))},
            r"by must be one of the axes \(none\)",
        ),
    ],
)
def test_sensitivity_names_what_is_wrong(changed, message):
    assert_refused(lambda: plot_sensitivity(**{"losses": {"a": ([1, 2], [1, 2])}, **changed}), message)
