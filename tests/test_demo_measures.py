"""Demos that measure: numbers are right where the answer is known, and sentences follow them."""

import math
import re

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")

import condition_number
import real_mountain
import trainability

import gdfunc as gd


def carpet(levels):
    """Draw Sierpiński's triangle, whose dimension is log₂ 3, in 2^levels cells a side."""
    marked = np.ones((1, 1), dtype=bool)
    for _ in range(levels):
        marked = np.kron(np.array([[1, 0], [1, 1]], dtype=bool), marked)
    return marked


@pytest.mark.parametrize(
    ("marked", "expected"),
    [
        (np.eye(64, dtype=bool), 1.0),
        (carpet(7), math.log2(3)),
        (np.ones((64, 64), dtype=bool), 2.0),
        (np.arange(64 * 64).reshape(64, 64) == 70, 0.0),
        (np.zeros((64, 64), dtype=bool), 0.0),
    ],
)
def test_box_counting_finds_known_dimensions(marked, expected):
    assert trainability.dimension(marked) == pytest.approx((expected,) * 3, abs=1e-12)


def test_the_band_of_a_dimension_is_that_of_its_sizes():
    rows, columns = np.mgrid[:128, :128]
    found = trainability.dimension(
        (columns < 4) & (rows >= 0)
    )  # a strip: an area close up, a line from afar
    assert (found.low, found.high) == pytest.approx((1, 2))
    assert found.low < found.slope < found.high


@pytest.mark.parametrize("slope", [0.0, 1.0, -1.0, 0.4, 3.0])
def test_the_boundary_of_a_straight_cut_is_smooth(slope):
    rows, columns = np.mgrid[:240, :240] - 119.5
    found = trainability.dimension(trainability.boundary(rows > slope * columns + 0.1))
    assert found.slope == pytest.approx(1, abs=0.06)


def test_the_boundary_of_random_cells_is_everywhere():
    cells = np.random.default_rng(0).random((240, 240)) < 0.5
    marked = trainability.boundary(cells)
    assert marked[:-1, :-1].mean() == pytest.approx(3 / 4, abs=0.01)
    assert trainability.dimension(marked).slope > 1.9
    assert not trainability.boundary(np.ones((5, 5), dtype=bool)).any()


def test_the_densest_window_holds_the_most_marked_cells():
    marked = np.zeros((60, 60), dtype=bool)
    marked[40:50, 20:30] = True
    marked[0, 0] = True
    window = trainability.densest(marked, trainability.Window((0.0, 6.0), (10.0, 16.0)))
    np.testing.assert_allclose(window, ((2.0, 3.0), (14.0, 15.0)))
    marked = np.random.default_rng(1).random((60, 60)) < 0.3
    (left, _), (low, _) = trainability.densest(marked, trainability.Window((0.0, 60.0), (0.0, 60.0)))
    counts = np.lib.stride_tricks.sliding_window_view(marked, (10, 10)).sum(axis=(2, 3))
    assert counts[round(low), round(left)] == counts.max()


@pytest.mark.long
def test_a_run_of_the_boundary_has_a_learning_rate_for_each_layer():
    first, second = torch.tensor(2.0).double(), torch.tensor(0.3).double()
    params, (x, y) = trainability.task()
    w1, w2 = (params[name].clone().requires_grad_() for name in ("first", "second"))
    losses = []
    for _ in range(trainability.STEPS):
        loss = ((torch.tanh(x @ w1) @ w2 - y) ** 2).mean()
        losses.append(loss.detach())
        grads = torch.autograd.grad(loss, (w1, w2))
        w1 = (w1 - first * grads[0]).detach().requires_grad_()
        w2 = (w2 - second * grads[1]).detach().requires_grad_()
    ratios = torch.stack(losses) / losses[0]
    converged, to_zero, to_infinity = trainability.run(first, second)
    assert converged
    assert ratios[-20:].mean() < 1
    torch.testing.assert_close(to_zero, ratios.sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(to_infinity, (1 / ratios).sum(), rtol=1e-6, atol=0)
    diverged = trainability.run(first, torch.tensor(1e3).double())
    assert not diverged[0]
    assert 1 <= diverged[2] < 2


def test_colours_are_ranks_and_equal_runs_have_equal_colours():
    values, among = np.array([[5.0, 1.0, 1.0], [9.0, -3.0, 0.0]]), np.array([[1, 1, 1], [1, 0, 0]], bool)
    expected = [[2 / 3, 0, 0], [1, np.nan, np.nan]]
    np.testing.assert_allclose(trainability.ranks(values, among), expected)


def test_a_run_has_the_same_colour_in_a_window_and_in_its_enlargement():
    outer, inner = np.array([[4.0, 1.0], [3.0, 2.0]]), np.array([[4.0, 4.0], [3.5, 3.0]])
    runs = [trainability.Runs(speed > 1.5, speed, 1 / speed) for speed in (outer, inner)]
    converged, diverged = trainability.ranked_speeds(runs)
    assert converged[0, 0, 0] == converged[1, 0, 0] == converged[1, 0, 1]
    assert converged[0, 1, 0] == converged[1, 1, 1] < converged[1, 1, 0] < converged[0, 0, 0]
    assert np.isnan(diverged[1]).all()
    assert np.isnan(converged[0, 0, 1])
    assert diverged[0, 0, 1] == 0


def test_greys_tell_convergence_from_divergence():
    shades = np.linspace(0, 1, 50)
    greys = [
        colours(shades)[:, :3] @ [0.299, 0.587, 0.114]
        for colours in (trainability.CONVERGED, trainability.DIVERGED)
    ]
    assert greys[0].max() + 0.2 < greys[1].min()


@pytest.mark.parametrize(
    ("band", "said"),
    [
        ((1.42, 2.0), "^Enlarged 36 times, .* is rough: .* 1.42 to 2.00, and 1.11 to 1.45 not enlarged"),
        ((0.98, 1.1), "^Enlarged 36 times, the boundary .* is smooth: .* 0.98 to 1.10, "),
        ((1.1, 1.5), "^Enlarged 36 times, the boundary .* may be rough or smooth: .* 1.10 to 1.50, "),
    ],
)
def test_the_boundary_is_judged_by_the_band_of_its_last_dimension(band, said):
    found = [trainability.Dimension(1.33, *ends) for ends in ((1.11, 1.45), (1.25, 1.71), band)]
    assert re.search(said, trainability.conclusion(found))


def quadratic():
    return condition_number.Quadratic(
        ("a", "b"),
        (torch.eye(2).double() * 2**0.5, torch.tensor([1.0, 0.0]).double()),
        torch.ones(2).double(),
        torch.eye(2).double(),
        torch.tensor([2**-0.5, 0.0]).double(),
    )


def test_the_heavy_balls_recursion_is_the_power_of_its_matrix():
    values = torch.tensor([0.1, 1.0, 3.0]).double()
    start = torch.tensor([1.0, -2.0, 0.5]).double()
    constants = condition_number.polyak(values[0], values[-1])
    found = condition_number.expect(values, constants, start, 40)
    for value, first, last in zip(values, start, found[40], strict=True):
        turn = torch.tensor([[1 + constants.momentum - constants.lr * value, -constants.momentum], [1, 0]])
        after = torch.linalg.matrix_power(turn, 40) @ torch.stack([first, first])
        torch.testing.assert_close(after[0], last, rtol=1e-10, atol=1e-14)
    assert found.shape == (41, 3)


@pytest.mark.parametrize("name", condition_number.METHODS)
def test_no_constants_shrink_the_error_faster_than_the_best(name):
    values = torch.linspace(0.2, 3.0, 9).double()
    best = condition_number.METHODS[name](values[0], values[-1])

    def rate(lr, momentum):
        middle = (1 + momentum - lr * values).to(torch.complex128)
        root = (middle.square() - 4 * momentum).sqrt()
        return torch.stack([middle + root, middle - root]).abs().max() / 2

    assert rate(best.lr, best.momentum) == pytest.approx(float(best.rate), rel=1e-6)
    for lr in (0.98 * best.lr, 1.02 * best.lr):
        assert rate(lr, best.momentum) > best.rate
    if best.momentum:
        assert all(rate(best.lr, momentum) > best.rate for momentum in (0.9 * best.momentum, 0.5))


@pytest.mark.long
@pytest.mark.parametrize("name", condition_number.METHODS)
def test_runs_on_the_patients_go_where_theory_says(name):
    pytest.importorskip("sklearn")
    patients = condition_number.diabetes()
    constants = condition_number.METHODS[name](
        patients.eigenvalues[0] + 0.1, patients.eigenvalues[-1] + 0.1
    )
    measured = condition_number.measure(patients, constants, 120, ridge=0.1)
    expected = condition_number.expect(patients.eigenvalues + 0.1, constants, measured[0], 120)
    assert condition_number.disagreement(measured, expected) < 1e-12
    off = condition_number.expect(patients.eigenvalues + 0.101, constants, measured[0], 120)
    assert condition_number.disagreement(measured, off) > 1e-4


@pytest.mark.long
def test_ridges_give_the_condition_numbers_and_theory_their_steps():
    pytest.importorskip("sklearn")
    patients = condition_number.diabetes()
    x, y = patients.data
    solved = torch.linalg.solve(x.mT @ x / len(y) + 0.3 * torch.eye(10).double(), x.mT @ y / len(y))
    torch.testing.assert_close(patients.minimizer(0.3), solved, rtol=1e-10, atol=1e-12)
    counts = condition_number.count_steps(patients, 2, largest=50)
    assert counts.measured == counts.expected
    assert counts.conditions == pytest.approx([3, 50])
    low, high = patients.eigenvalues[0], patients.eigenvalues[-1]
    ridge = (high - 3 * low) / 2
    assert (high + ridge) / (low + ridge) == pytest.approx(3)
    # Only the two ends of the spectrum are slow, and both shrink by (κ − 1)/(κ + 1) a step.
    for condition, steps in zip(counts.conditions, counts.measured["descent"], strict=True):
        assert steps == pytest.approx(
            math.log(1e-6) / math.log((condition - 1) / (condition + 1)), rel=0.05
        )


def test_steps_are_counted_to_where_the_error_stays_small():
    errors = torch.tensor([[1.0], [0.1], [0.4], [0.1], [0.1]])
    assert condition_number.steps_until(errors, 0.2) == 3
    assert condition_number.steps_until(errors[:3], 0.2) == math.inf
    assert condition_number.exponent([1.0, 10.0, 100.0], [3.0, 30.0, 300.0]) == pytest.approx(1)


def test_a_direction_names_the_two_that_it_holds_most_of():
    vectors = torch.tensor([[0.1, 0.7], [0.7, 0.7], [-0.6, 0.1]])
    some = quadratic()._replace(features=("bmi", "s1", "s2"), eigenvectors=vectors)
    assert condition_number.direction(some, 0) == "cholesterol against LDL"
    assert condition_number.direction(some, 1) == "bmi with cholesterol"


@pytest.mark.parametrize(
    ("left", "disagrees", "said"),
    [
        (
            (0.33, 9e-7),
            8e-14,
            "to 9e-07, 203 steps.*33% of its error left in a with b: as theory says, to 1e-13$",
        ),
        ((0.33, 9e-7), 8e-3, "33% of its error left in a with b: unlike theory, to 1e-02$"),
        ((2e-6, 9e-7), 8e-14, "not far behind, at 2e-06: as theory"),
    ],
)
def test_the_unfinished_directions_follow_their_numbers(left, disagrees, said):
    left = dict(zip(condition_number.METHODS, left, strict=True))
    assert re.search(said, condition_number.conclusion(left, 203, "a with b", disagrees))


@pytest.mark.parametrize(
    ("powers", "said"),
    [
        (
            (1.0, 0.54),
            "grow as κ.1.00, with momentum only as κ.0.54: 3,208 against 203 at κ = 470; .* 1 of 2",
        ),
        ((1.0, 0.97), "with momentum as fast, as κ.0.97"),
    ],
)
def test_the_growth_of_steps_follows_its_numbers(powers, said):
    powers, last = (
        dict(zip(condition_number.METHODS, pair, strict=True)) for pair in (powers, (3208, 203))
    )
    assert re.search(said, condition_number.count_conclusion(powers, last, 470.1, "1 of 2"))


def bowl(rows=12, columns=9, k=0.01):
    """Make a mountain that is a quadratic of the distances from the middle, in cells, and its middle."""
    y, x = torch.arange(rows).double() - (rows - 1) / 2, torch.arange(columns).double() - (columns - 1) / 2
    mountain = real_mountain.Mountain(k * (y[:, None] ** 2 + x**2))
    return mountain, mountain.spacing * torch.tensor([(columns - 1) / 2, (rows - 1) / 2])


def test_a_spline_is_smooth_and_keeps_planes_and_curvatures():
    y, x = torch.meshgrid(torch.arange(9.0).double(), torch.arange(8.0).double(), indexing="ij")
    plane = real_mountain.Mountain(3 + 2 * x - 5 * y)
    place = torch.tensor([0.31, 0.47]).double()
    east, north = place / plane.spacing
    torch.testing.assert_close(plane.height(place), 3 + 2 * east - 5 * north)
    rough = real_mountain.Mountain(gd.random.normal(gd.random.key(0), (9, 8), dtype=torch.float64))
    for knot in (torch.tensor([3.0, 4.4]), torch.tensor([3.4, 4.0])):
        sides = [(knot + shift) * rough.spacing for shift in (-1e-9, 1e-9)]
        left, right = (torch.func.hessian(rough.height)(side) for side in sides)
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)
        assert left.abs().min() > 1e-2


def test_a_bowl_has_the_curvature_of_its_coefficients():
    mountain, _ = bowl(k=0.01)
    expected = 2 * 0.01 / mountain.spacing.min().square()
    assert mountain.steepest_curvature(5, 4) == pytest.approx(float(expected))
    saddle = real_mountain.Mountain(mountain.coefficients - 0.05 * torch.arange(9).double() ** 2)
    expected = abs(2 * (0.01 - 0.05)) / saddle.spacing[0].square()
    assert saddle.steepest_curvature(5, 4) == pytest.approx(float(expected))


def test_beyond_the_map_is_the_height_of_its_edge():
    mountain, middle = bowl()
    assert mountain.inside(middle)
    for far, near in ((mountain.low - 3, mountain.low), (mountain.high + 3, mountain.high)):
        assert not mountain.inside(far)
        assert mountain.inside(near)
        assert mountain.height(far) == mountain.height(near)
    assert mountain.inside(mountain.grid(7, 6)).all()
    assert mountain.grid(7, 6).shape == (7, 6, 2)


def test_a_blur_keeps_planes_and_has_its_variance():
    impulse = torch.zeros(41, 51).double()
    impulse[20, 25] = 1
    found, offsets = real_mountain.blur(impulse, 3.0), torch.arange(51) - 25
    assert found.sum() == pytest.approx(1)
    assert (found.sum(dim=0) * offsets**2).sum() == pytest.approx(9, rel=0.01)
    torch.testing.assert_close(real_mountain.blur(torch.ones(5, 7), 3.0), torch.ones(5, 7))
    plane = torch.arange(41.0).double()[:, None] + 2 * torch.arange(51.0).double()
    torch.testing.assert_close(real_mountain.blur(plane, 3.0)[12:-12, 12:-12], plane[12:-12, 12:-12])


def test_the_map_is_that_of_the_problem_without_its_details():
    rough, smooth = gd.problems.elevation(), real_mountain.jacksboro()
    places = torch.tensor([[50.0, 300.0], [200.0, 120.0], [347.0, 288.0], [219.0, 297.0]]).double()
    for column, row in places:
        place = torch.stack([column, 343 - row]) * smooth.spacing
        assert 1000 * smooth.height(place) == pytest.approx(
            float(rough.loss_fn(torch.stack([column, row]))), abs=60
        )


@pytest.mark.long
@pytest.mark.parametrize("method", real_mountain.METHODS)
def test_walks_come_down_to_the_bottom_of_a_bowl(method):
    mountain, middle = bowl()
    starts = mountain.grid(2, 2).flatten(0, 1)
    walks = real_mountain.walk(mountain, method, 0.02, starts, 1500)
    torch.testing.assert_close(walks.paths[:, 0], starts)
    torch.testing.assert_close(walks.ends, middle.expand(4, 2), rtol=0, atol=1e-4)
    assert walks.arrived.all()
    assert not walks.left.any()
    if method == "descent":
        shrunk = (1 - 0.02 * 2 * 0.01 / mountain.spacing**2) ** torch.arange(1501)[:, None]
        torch.testing.assert_close(walks.paths, middle + (starts - middle)[:, None] * shrunk)


def test_a_run_ends_where_it_leaves_the_map():
    mountain, middle = bowl()
    off, slope = mountain.high + 1, middle + 0.1
    paths = torch.stack(
        [
            torch.stack([slope, middle, off, middle]),
            torch.stack([slope, slope, slope, middle]),
            torch.stack([middle, middle, middle, slope]),
        ]
    )
    walks = real_mountain.look_back(mountain, 0.1, paths)
    assert walks.left.tolist() == [True, False, False]
    assert walks.arrived.tolist() == [False, True, False]
    assert walks.lasts.tolist() == [1, 3, 3]
    torch.testing.assert_close(walks.ends, torch.stack([middle, middle, slope]))
    torch.testing.assert_close(walks.heights[2], 1000 * mountain.height(slope))


def test_ends_at_one_place_are_one_hollow():
    ends = torch.tensor([[1.0, 1.0], [5.0, 5.0], [1.0, 1.01], [5.0, 6.0], [1.02, 1.0]])
    assert [count for _, count in real_mountain.hollows(ends)] == [3, 1, 1]
    assert real_mountain.hollows(ends)[0][0].tolist() == [1.0, 1.0]
    assert real_mountain.hollows(ends[:0]) == []


def test_methods_are_compared_start_by_start():
    mountain, _ = bowl()
    starts = mountain.grid(3, 3).flatten(0, 1)
    plain = real_mountain.look_back(mountain, 0.1, starts[:, None])
    lower = plain._replace(heights=plain.heights - torch.arange(9.0) - 1)
    found = real_mountain.compare(lower, plain)
    assert found.metres == pytest.approx(-5)
    assert found.errors == pytest.approx(-5 / (torch.arange(9.0).std() / 3))
    assert real_mountain.compare(plain, plain) == (0, 0, 1)


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        (
            (256, [7, 3] + 100 * [2], 16),
            "no common valley: 210 of 256 .* 102 .* 7 in one; 16 .* 30 never",
        ),
        (
            (256, [200, 10], 16),
            "one valley: 210 of 256 .* 2 .* 200 of them in one; 16 .* 30 never",
        ),
        ((9, [], 9), "no common valley: 0 of 9 runs end in 0 different hollows; 9 leave .* 0 never"),
    ],
)
def test_the_mountain_concludes_from_its_numbers(numbers, said):
    assert re.search(said, real_mountain.conclusion(*numbers))


def test_methods_on_the_mountain_are_judged_by_their_standard_errors():
    compared = {"a": (-15.2, -5.5, 94), "b": (3.0, 2.9, 100), "c": (8.8, 4.0, 7)}
    compared = {name: real_mountain.Compared(*numbers) for name, numbers in compared.items()}
    assert real_mountain.comparison(compared, 128) == (
        "Compared with descent (128 hollows), a ends 15 m lower (5.5 standard errors, 94 hollows),"
        " b as high (2.9 standard errors, 100 hollows), c 9 m higher (4.0 standard errors, 7 hollows)"
    )
