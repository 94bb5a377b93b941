"""Demos that sweep, rank and learn: their numbers are right where the answer is known, and their sentences
follow them.
"""

import math
import re
from types import SimpleNamespace

import pytest
import torch

import gdfunc as gd

pytest.importorskip("matplotlib")

import gradient_noise
import halving
import learn_the_schedule
import learning_rate_map
import optimizer_race
import private_descent
import variance_reduction
import which_samples_matter
import your_module

# Variance reduction.


def test_the_gap_of_variance_reduction_is_that_of_the_loss_and_its_costs_are_counted():
    problem = gd.problems.stock_regression()
    params = {"w": torch.ones_like(problem.params["w"]), "b": problem.params["b"]}
    expected = problem.loss_fn(params, problem.data) / problem.minimum - 1
    torch.testing.assert_close(variance_reduction.gap_of(problem)(params), expected, rtol=1e-12, atol=0)
    assert variance_reduction.METHODS["SGD"].costs(2).tolist() == [0, 1, 2]
    assert variance_reduction.METHODS["SAGA"].costs(2).tolist() == [1, 2, 3]
    assert variance_reduction.METHODS["SVRG"].costs(2).tolist() == [0, 5, 10]


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        (
            (0.0312, 2e-22, 23.0),
            "SGD ends 3.1 % above .*, and SAGA is within 1e-12 .* 23 n gradients$",
        ),
        ((0.0312, 2e-8, math.inf), "and SAGA goes on: 2e-08, never within 1e-12$"),
        ((0.0312, 0.02, math.inf), "and SAGA is hardly closer: 2e-02, never"),
        ((1e-9, 0.02, math.inf), "SGD ends 1e-07 % .* SAGA is no closer: 2e-02$"),
    ],
)
def test_variance_reduction_concludes_from_its_numbers(numbers, said):
    assert re.search(said, variance_reduction.conclusion(*numbers, 1e-12))


# Learning rates.


@pytest.mark.long
def test_the_best_learning_rate_grows_with_the_batch():
    problem = gd.problems.stock_regression()
    result = learning_rate_map.train_all(problem, (2, 8), rates=24, orders=15, epochs=1)
    first, second = learning_rate_map.sum_up(result, 389, 1)
    assert 2.5 < second.lr / first.lr < 6.5
    assert first.low <= first.lr <= first.high < first.stable_to < 2 / problem.L


def test_a_run_of_the_map_counts_as_diverged_above_its_start(tmp_path):
    problem = gd.problems.stock_regression()
    result = learning_rate_map.train_all(problem, (8, 389), rates=40, orders=5, epochs=1)
    start = problem.loss_fn(problem.params, problem.data) / problem.minimum - 1
    above = ~(result.outputs.excess <= start)
    assert 0 < above.sum() < len(above)
    assert torch.equal(result.diverged, above)
    result.save(tmp_path / "runs.csv")
    header, *lines = (tmp_path / "runs.csv").read_text().splitlines()
    assert header == "batch_size,lr,key,excess,diverged"
    assert [line.endswith("True") for line in lines] == above.tolist()


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_the_scaling_rule_is_read_off_the_small_batches(power):
    rows = [learning_rate_map.Best(b, 1, 0.1 * b**power, 0, 1, 0, 1, 0, 1) for b in (1, 2, 4, 8)]
    rows += [learning_rate_map.Best(64, 1, 1e-9, 0, 1, 0, 1, 0, 1)]
    assert learning_rate_map.exponent(rows) == pytest.approx(power, rel=1e-5)
    assert learning_rate_map.rule(rows) == pytest.approx(0.1 * 8 ** ((power - 1) / 2))


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ((1.03, 9, 10, 181.3), "in proportion to .*batch.1.03.*is good for 9 of 10 .*meets 2/L at .* 181$"),
        ((0.5, 0, 10, 9.0), "is not in proportion .*batch.0.50.*is good for 0 of 10 .*meets 2/L at .* 9$"),
    ],
)
def test_the_learning_rate_map_concludes_from_its_numbers(numbers, said):
    assert re.search(said, learning_rate_map.conclusion(*numbers))


# Schedules.


def test_the_expected_loss_of_a_schedule_is_the_mean_over_all_orders(monkeypatch):
    x, y = gd.problems.stock_regression().data
    problem = gd.problems.linear_regression(x[:9], y[:9])
    step = gd.make_step(problem.loss_fn)
    for name, value in {"PROBLEM": problem, "STEP": step, "BATCH": 2}.items():
        monkeypatch.setattr(learn_the_schedule, name, value)
    lrs = torch.tensor([0.3, 0.1], dtype=torch.float64)
    orders = torch.cartesian_prod(*[torch.arange(9)] * 4).reshape(-1, 2, 2)
    every = torch.func.vmap(lambda index: learn_the_schedule.final_excess(lrs, index))(orders)
    torch.testing.assert_close(learn_the_schedule.expected_excess(lrs), every.mean(), rtol=1e-12, atol=0)


@pytest.mark.long
def test_no_schedule_beats_the_best_of_all():
    demo, powers = learn_the_schedule, torch.tensor([0.1, 0.05], dtype=torch.float64).log()
    constant = demo.best_constant(12)
    best = demo.best_of(torch.exp, constant.log())
    falling = demo.best_of(demo.falling(12), powers)
    slope = gd.hypergrad(lambda log_lrs: demo.expected_excess(log_lrs.exp()))(best.log())
    assert slope.grads.abs().max() < 1e-6 * slope.value
    assert slope.value < demo.expected_excess(falling) < demo.expected_excess(constant)


@pytest.mark.long
def test_live_bytes_are_those_that_are_held():
    given = torch.ones(1000)
    with learn_the_schedule.LiveBytes() as memory:
        held = torch.ones(100) + 1  # two of them for a moment
        for _ in range(5):
            given.view(10, 100).mul(2)  # 4000 bytes, not held
        del held
    assert memory.peak == 400 + 4000
    peaks = learn_the_schedule.count_memory((8, 32))
    growth = {name: last / first for name, (first, last) in peaks.items()}
    assert growth["reverse"] > 1.4 > 1.1 > growth["checkpoint"]
    assert growth[learn_the_schedule.ONE_RATE] < 1.1


@pytest.mark.parametrize(
    ("learned", "said"),
    [
        (0.0202, "finds nearly the best schedule .* 98 % of the gain .* 1 % more loss than the least$"),
        (0.025, "stops short of the best .* 50 % of the gain .* 25 % more loss"),
        (0.033, "finds nothing: 10 % more loss than by the best constant rate$"),
    ],
)
def test_the_learned_schedule_concludes_from_its_numbers(learned, said):
    assert re.search(said, learn_the_schedule.conclusion(0.03, learned, 0.02))


# Noise.


@pytest.mark.long
def test_mini_batch_noise_is_what_the_spread_says():
    problem = gradient_noise.regression()
    trajectory = gradient_noise.follow(problem)
    g = gradient_noise.gradients(problem, trajectory, 3)
    total = float(trajectory.spread.variance[3])
    for size in (4, 64):
        drawn = gradient_noise.batch_errors(g, size, 4000, replacement=False)
        assert drawn == pytest.approx(total / size * (1 - size / len(g)), rel=0.1)


def test_batches_lead_uphill_on_the_far_side_of_the_mean():
    g = torch.tensor([[3.0, 0.0], [-1.0, 5.0], [-1.5, -5.0], [0.0, 0.0]])  # the mean is (⅛, 0)
    g = g.repeat(4, 1)
    means, uphill = gradient_noise.uphill_of(g)
    assert torch.equal(uphill, means[:, 0] < 0)
    assert 0 < uphill.sum() < len(means)


@pytest.mark.parametrize(("power", "factor"), [(-1.0, 1.0), (-1.0, 1.2), (-0.7, 1.0)])
def test_measured_errors_are_judged_by_their_power_and_their_worst(power, factor):
    errors = [
        gradient_noise.Errors(
            t, total, 0.1, [factor * total * size**power for size in gradient_noise.SIZES], []
        )
        for t, total in ((0, 5.0), (20, 0.7))
    ]
    found, off = gradient_noise.judge_errors(errors)
    assert found == pytest.approx(power, abs=1e-9)
    worst = max(abs(factor * size ** (power + 1) - 1) for size in gradient_noise.SIZES)
    assert off == pytest.approx(worst, abs=1e-9)


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ((0.05, 0.9, 0.01, 0.17, 20), "shrinks far .*to 5 %, .* 90 %.: 1 % .* start, 17 % at step 20$"),
        ((0.5, 0.6, 0.2, 0.1, 8), "does not shrink far more than .*: 20 % .* start, 10 % at step 8$"),
    ],
)
def test_the_clouds_conclude_from_their_numbers(numbers, said):
    assert re.search(said, gradient_noise.conclusion(*numbers))


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ((-1.02, 0.07, 20_000), "falls as 1/B: over 20,000 batches of each size .* 7 % off"),
        ((-0.7, 0.9, 300), "does not fall as 1/B, but as B.-0.70$"),
    ],
)
def test_the_errors_conclude_from_their_numbers(numbers, said):
    assert re.search(said, gradient_noise.errors_conclusion(*numbers))


def test_the_noise_scale_is_judged_by_the_sweep():
    conclude = gradient_noise.scale_conclusion
    assert "is within a factor of ten of the best batch size: 0.4 to 1.1 times" in conclude([1.1, 0.4, 0.7])
    assert "is not within a factor of ten of the best batch size: 0.4 to 30.0" in conclude([0.4, 30.0])


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        (
            (160.0, 5.0),
            "of 256 take 32 times fewer steps than .* of 1, and 8 times the samples",
        ),
        ((512.0, 1.0), "take 5.1e.02 times fewer steps than batches of 1, and no more samples"),
        ((4.0, 5.0), "take no fewer steps than batches of 1, and 3.2e.02 times the samples; batches of 44"),
    ],
)
def test_the_trade_off_concludes_from_its_numbers(steps, said):
    assert re.search(said, gradient_noise.trade_conclusion(0.1, (1, 256), steps, 44.2))


# Samples.


@pytest.mark.long
def test_planted_labels_are_found():
    pytest.importorskip("sklearn")
    task = which_samples_matter.mislabelled_digits()
    assert torch.equal(task.data[1] != task.truth, task.wrong)
    scores = which_samples_matter.score(task, which_samples_matter.learn(task.data, 20))
    for rows in scores:
        assert which_samples_matter.found(rows[-1], task.wrong)[60] > 0.8


@pytest.mark.long
def test_the_months_share_all_of_the_fitting():
    months = which_samples_matter.rank_months(epochs=1)
    assert months.share.sum() == pytest.approx(1)
    assert (months.share[months.order].diff() <= 0).all()
    assert 0 < (months.effect > 0).sum() < len(months.effect)


def test_the_pictures_of_samples_conclude_from_their_numbers():
    demo = which_samples_matter
    assert re.search("forgets .* does not: 68 and 92 % .* first 60$", demo.conclusion(60, 0.68, 0.92))
    assert "the loss finds more" in demo.conclusion(60, 0.92, 0.68)
    assert "as many wrong labels as the loss: 90 and 92 %" in demo.conclusion(60, 0.9, 0.92)
    assert demo.suspects_conclusion(24, 24, 1200).startswith("All 24 most suspect of 1,200 labels")
    assert demo.suspects_conclusion(3, 24, 1200).startswith("3 of 24 most suspect")
    said = demo.influence_conclusion
    assert re.search("are mostly mislabelled: 8 of 9 and 6 of 9, against 5 %", said((8, 9), (6, 9), 0.05))
    assert "are often mislabelled: 8 of 9 and 3 of 12" in said((8, 9), (3, 12), 0.05)
    assert "are often mislabelled: 3 of 12 and 8 of 9" in said((3, 12), (8, 9), 0.05)
    assert "are not all often mislabelled: 8 of 9 and 0 of 12" in said((8, 9), (0, 12), 0.05)
    months = demo.months_conclusion("1987-10", 0.09, 40, 389)
    assert re.search("1987-10, did 9 % .* 40 months of 389", months)
    assert "1 month of 389" in demo.months_conclusion("1987-10", 0.6, 1, 389)


# Privacy.


COSTS = {0.1: 0.11, 1.0: 0.115, 3.0: 0.12, 10.0: 0.42}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {},
            "norms from 0.1 to 3 cost 11 to 12 points .* σ = 8, 10 costs 42; .* median costs 6$",
        ),
        ({10.0: 0.12}, "norms from 0.1 to 10 cost 11 to 12 points of accuracy at σ = 8; following"),
        (
            {1.0: 0.01},
            "Clipping to 1 costs 1 points .*, 0.1 costs 11, 3 costs 12, 10 costs 42;",
        ),
    ],
)
def test_private_descent_concludes_from_its_numbers(changed, said):
    assert re.search(said, private_descent.conclusion(8.0, {**COSTS, **changed}, 0.06))


def test_the_costs_of_privacy_are_those_of_the_drawn_medians():
    accuracies = torch.tensor([0.8, 0.82, 0.5, 0.84]).double().expand(8, 4)
    curves = [private_descent.Curve("", accuracies - i / 10, [1.0] * 8) for i in range(5)]
    costs, following = private_descent.costs_at(8.0, curves, 0.95)
    assert costs == pytest.approx({0.1: 0.14, 1.0: 0.24, 3.0: 0.34, 10.0: 0.44})
    assert following == pytest.approx(0.54)


@pytest.mark.long
def test_the_privacy_spent_stands_above_the_noise():
    accuracies = torch.linspace(0.9, 0.6, 8)[:, None].expand(8, 4)
    names = [f"clipped to {norm}" for norm in range(5)]
    curves = [private_descent.Curve(name, accuracies, [1.0] * 8) for name in names]
    task = private_descent.Task("digits", (torch.ones(9, 2), torch.ones(9)), (), 2)
    figure = private_descent.draw(task, curves, [20.0, 9.5, 5.0, 2.5, 1.6, 1.0, 0.55, 0.33], 0.95)
    figure.draw_without_rendering()
    (top,) = figure.axes[0].child_axes
    assert [label.get_text() for label in top.get_xticklabels()][:3] == ["20", "9.5", "5"]
    assert "ε" in top.get_xlabel()
    assert "ε" not in private_descent.draw(task, curves, None, 0.95).axes[0].get_xlabel()


# A module.


def test_a_run_ends_where_its_trajectory_says():
    wrong = torch.tensor([[200, 4, 8, 5], [160, 6, 0, 2]])
    average, parameters = 1 - wrong / your_module.VALIDATED
    per_epoch = your_module.TRAINED // your_module.BATCH_SIZE
    best = SimpleNamespace(step=torch.tensor(2 * per_epoch))
    steps = torch.tensor(4 * per_epoch)
    trajectory = SimpleNamespace(average=average, parameters=parameters, best=best, steps=steps)
    assert your_module.stop_of(trajectory, 5) == (2, 4, 5, (4, 8), (0, 6), 397)


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        (
            (16, 24, 40, (4, 5), (3, 7), 397),
            "Stopped after 24 of 40 .* to epoch 16: .* average reads 4 to 5 of 397 .* parameters 3 to 7$",
        ),
        (
            (4, 4, 4, (9, 9), (6, 6), 397),
            "Not stopped in 4 epochs, and best at epoch 4: .* reads 9 of 397 .* the parameters 6$",
        ),
    ],
)
def test_your_module_concludes_from_its_numbers(numbers, said):
    assert re.search(said, your_module.conclusion(*numbers))
    assert "reads 393 of 400 digits right" in your_module.reading_conclusion(7, 400)
    assert "reads all 400 digits right" in your_module.reading_conclusion(0, 400)


# The race.


def test_a_good_range_ends_where_the_lines_pass_the_bound_and_never_nears_what_diverged():
    lrs = [1.0, 10.0, 100.0, 1000.0]
    assert optimizer_race.end_of_range(lrs, [1.0, 1.0, 4.0, 1.0], 0, 2.0) == pytest.approx(10**1.5)
    assert optimizer_race.end_of_range(lrs, [1.0, 2.0, float("inf"), 1.0], 0, 2.0) == 10.0
    assert optimizer_race.end_of_range(lrs, [1.0, 2.0, 1.0, 2.0], 1, 2.0) == 1000.0


def valleys(best):
    """Losses that are V-shaped in their logarithms, [seeds, lrs], least at lr 0.1, and their starts."""
    lrs = optimizer_race.rates(3)
    after = {name: least * 10 ** (lrs.log10() + 1).abs().expand(2, -1) for name, least in best.items()}
    return lrs, {name: (torch.full_like(losses, 2.0), losses) for name, losses in after.items()}


def test_all_methods_of_the_race_have_one_bound_and_their_widths_are_those_of_the_bars():
    lrs, results = valleys({"SGD": 0.05, "Adam": 0.02, "Rprop": 0.3, "Yogi": 0.04, "Lion": 0.08})
    rows, bound = optimizer_race.rank(results, lrs)
    assert bound == pytest.approx(2 * 0.05)
    assert [row.method for row in rows] == ["Adam", "Yogi", "SGD", "Lion", "Rprop"]
    assert [row.width for row in rows] == pytest.approx([25, 6.25, 4, 1.5625, 0])
    assert [row.torch_misses for row in rows] == [True, False, True, False, True]
    losses = {name: after for name, (_, after) in results.items()}
    (ax,) = optimizer_race.draw_ranges(losses, rows, lrs, bound).axes
    drawn = [(bar.get_x() + bar.get_width()) / bar.get_x() for bar in ax.patches]
    assert drawn == pytest.approx([row.width for row in rows if row.width])


@pytest.mark.parametrize(
    ("missed", "widths", "said"),
    [
        (
            9,
            (10.2, 5123.0),
            "misses the good range of 9 of 11 .*; Yogi forgives most: .* 5,100 apart",
        ),
        (2, (61.0, 5.5), "is in the good range of 9 of 11 .*; SGD forgives most: .* 61 .* at most 0.11$"),
        (2, (61.0, 55.0), "; SGD and Yogi forgive most"),
    ],
)
def test_the_race_concludes_from_its_numbers(missed, widths, said):
    named = dict(zip(("SGD", "Yogi"), widths, strict=True))
    assert re.search(said, optimizer_race.conclusion(missed, 11, named, 0.11))


def test_the_curves_and_the_walks_conclude_from_their_numbers():
    curves, walks = optimizer_race.curves_conclusion, optimizer_race.walks_conclusion
    said = "No one lr suits all: the best are × 2,000 .* 0.005 for Lion to 10 for SGD; 38 % of all"
    assert re.search(said, curves({"SGD": 10.0, "Lion": 0.005}, 38, 100))
    assert "One lr suits all: the best are × 2 apart" in curves({"SGD": 0.1, "Lion": 0.05}, 1, 100)
    ends = {"SGD": 0.25, "momentum": 6e-4}
    assert re.search(
        "After 20 steps .* momentum is lowest, at 0.0006, and SGD highest, at 0.25$", walks(ends, 20)
    )
    assert "SGD is lowest" in walks({**ends, "SGD": 1e-5}, 20)


@pytest.mark.long
def test_a_walk_keeps_to_the_view_and_ends_low_beside_its_neighbours():
    lrs, limits = optimizer_race.rates(3), torch.tensor(optimizer_race.VIEW).T
    found = optimizer_race.walk("RMSprop", lrs, 100)
    assert ((found.path >= limits[0]) & (found.path <= limits[1])).all()
    assert float(optimizer_race.VALLEY.loss_fn(found.path[-1])) == pytest.approx(found.final_loss)
    at = lrs.tolist().index(found.lr)
    for lr in lrs[[at - 1, at + 1]]:
        near = optimizer_race.walk("RMSprop", lr.expand(3), 100)
        assert near.final_loss < 24  # the loss at the start


# Halving.


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        (
            ((27, 9, 3), 0.259, 1),
            "^26% of the steps try 27 .* step 30, 9 to 90, 3 to 270; .* is the best of all$",
        ),
        (((9, 3, 1), 0.259, 4), "the winner is only number 4 of all$"),
    ],
)
def test_halving_concludes_from_its_numbers(numbers, said):
    counts, cost, place = numbers
    assert re.search(said, halving.conclusion(counts, (30, 90, 270), cost, place))


def test_halving_counts_the_best_runs_that_it_found():
    tried = {
        "falling": halving.Tried(0.26, [0.0, 0.0, 0.06]),
        "constant": halving.Tried(0.25, [0.02, 0.0, 0.0]),
    }
    assert [each.found for each in tried.values()] == [2, 2]
    said = "^26% of the steps find the best in 2 of 3 orders with a falling .* ends 2.0% and 0.7% above it$"
    assert re.search(said, halving.loss_conclusion(tried))


@pytest.mark.long
def test_a_halving_of_the_stocks_ends_where_the_sweep_does():
    descent, key = halving.Descent.on_stocks(0.0), gd.random.key(0)
    grid = gd.grid(lr=descent.rates(5))
    ends, result = descent.ends(key, grid), descent.halve(key, grid, (30, 90, 270), 2)
    assert result.steps.tolist() == [30, 30, 90, 270, 30]
    assert float(result.scores[result.best, -1]) == pytest.approx(float(ends[result.best]), rel=1e-9)
    (tried,) = halving.try_plans(descent, key[None], 5, [((1 / 9, 1 / 3, 1), 2)])
    assert tried == halving.Tried(result.cost / result.full_cost, [0.0])
