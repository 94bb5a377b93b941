"""The conclusions of the demos follow the numbers that their runs measured."""

import importlib
import itertools
import re

import pytest
import torch

import gdfunc as gd

pytest.importorskip("matplotlib")


def load(name):
    return importlib.import_module(name)  # demos/ is on the path


@pytest.mark.parametrize(
    ("constant", "falling", "said"),
    [
        (
            (1.2, 2.0, 842.0),
            (9.0, 8.5, 5.0),
            "stall at a constant lr, but go on at .* at most 2.0 .* 842.,.* at least 8.5 .*batch: 5.0.$",
        ),
        (
            (1.2, 20.0, 8.0),
            (9.0, 8.5, 5.0),
            "do not all stall at a constant lr, and go on at .* at most 20.0 .*batch: 8.,.*batch: 5.0.$",
        ),
        (
            (1.2, 2.0, 842.0),
            (1.5, 8.5, 5.0),
            "Mini-batches stall .*, and do not all go on .* at least 1.5 at the falling",
        ),
        ((9.0, 9.0, 9.0), (0.5, 0.5, 9.0), "do not all stall .*, but do not all go on"),
    ],
)
def test_the_quickstart_concludes_who_stalls_from_its_numbers(constant, falling, said):
    sizes = (1, 8, 389)
    gains = [dict(zip(sizes, values, strict=True)) for values in (constant, falling)]
    assert re.search(said, load("quickstart").conclusion(*gains))


def test_the_quickstart_concludes_how_near_batches_come_from_its_numbers():
    conclude = load("quickstart").lr_conclusion
    apart = conclude({"constant": [1e-2, 1e-3, 4e-8], "falling": [2e-5, 1e-4, 6e-9]})
    assert (
        "stay farther from the optimum than the full batch: 1e-03 against 4e-08 with a constant lr" in apart
    )
    assert apart.endswith("2e-05 against 6e-09 with a falling lr")
    near = conclude({"constant": [1e-2, 1e-3, 4e-8], "falling": [5e-8, 1e-4, 6e-9]})
    assert (
        "come as near the optimum as the full batch: 1e-03 against 4e-08 with a constant lr, 5e-08 against"
        in near
    )


def test_a_hatched_strip_begins_after_the_last_lr_that_ends_below_the_start():
    lrs = torch.tensor([0.01, 0.04, 0.16, 0.64], dtype=torch.float64)
    gaps = torch.tensor([1.0, 0.5, torch.inf, torch.inf])
    ax = gd.plot.plot_curves([gaps, gaps.nan_to_num(posinf=2.0)], x=lrs, over="lr", log_x=True)
    (strip,) = ax.patches
    end = strip.get_x() + strip.get_width()
    load("quickstart").begin_strips(ax, lrs)
    assert strip.get_x() == pytest.approx(0.08)  # the geometric mean of 0.04 and 0.16
    assert strip.get_x() + strip.get_width() == pytest.approx(end)


def test_gains_of_the_second_half_are_of_the_drawn_learning_rates():
    demo = load("quickstart")
    rows = [
        demo.Row(8, schedule, lr, 1.0, 0.5, gap, 0.0, "no")
        for schedule, gap in {"constant": 0.25, "falling": 0.1}.items()
        for lr in (0.01, demo.DRAWN[8])
    ]
    rows = [row._replace(gap_at_half_time=99.0) if row.lr == 0.01 else row for row in rows]
    assert demo.gains(rows) == {"constant": {8: 2.0}, "falling": {8: 5.0}}


def test_the_shaking_of_a_path_is_its_uphill_share_and_its_length():
    demo = load("descent_paths")
    paths = torch.tensor([[[0.0, 0.0], [3.0, 0.0], [3.0, 4.0]], [[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]]])
    found = demo.shaking(paths[:1], torch.tensor([[3.0, 1.0, 2.0]]))
    assert found == pytest.approx((0.5, 7 / 5))
    assert demo.shaking(paths[1:], torch.tensor([[3.0, 1.0, 0.5]])) == pytest.approx((0.0, 1.0))


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({389: (0, 1.06), 16: (0.45, 16.2)}, "^The smaller .* shakes: 0 and 45 % .* 1.1 and 16 times"),
        ({16: (0.45, 16.2), 389: (0, 1.06)}, "^The smaller .* shakes: 0 and 45 % .* 1.1 and 16 times"),
        ({389: (0.5, 1.06), 16: (0.45, 16.2)}, "^Not every smaller .* 50 and 45 %"),
        ({389: (0, 20.0), 16: (0.45, 16.2)}, "^Not every smaller .* 20 and 16 times"),
    ],
)
def test_the_picture_of_paths_concludes_from_its_numbers(found, said):
    demo = load("descent_paths")
    shaking = {size: demo.Shaking(*numbers) for size, numbers in found.items()}
    assert re.search(said, demo.paths_conclusion(shaking))


def test_the_conclusion_on_planes_follows_its_numbers():
    conclusion = load("loss_plane").conclusion
    assert conclusion(0.89, 0.01).startswith("The path's own plane shows 89% of the fall")
    assert conclusion(0.5, 0.01).startswith("Even the path's own plane shows 50%")
    assert conclusion(0.9, 0.95).startswith("Both planes show")


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ((1000, 0, 8, 0.43, 0.431), ["rarely go uphill", "8 of 1,000", "0 of full", "both end 43% above"]),
        ((1000, 0, 480, 0.0, 0.02), ["often go uphill", "480 of 1,000", "end 2% above", "full batches 0%"]),
        ((1000, 9, 8, 0.1, 0.1), ["go uphill no more often", "8 of 1,000", "9 of full"]),
    ],
)
def test_the_linear_demo_concludes_from_its_numbers(numbers, said):
    sentence = load("minibatch_linear").conclusion(*numbers)
    assert all(part in sentence for part in said)
    assert ("both end" in sentence) == (numbers[3] > 0)


def test_the_linear_demo_counts_the_steps_that_raise_the_full_loss():
    demo = load("minibatch_linear")
    params, minimum = demo.least_squares()
    data = demo.tutorial_data(torch.float64)
    grads = torch.func.grad(demo.loss_fn)(params, data)
    assert all(grad.abs().max() < 1e-14 for grad in grads.values())
    run = demo.descend(gd.epoch_batches(gd.random.key(1), demo.ROWS, demo.BATCH, 3))
    x, y = (column.squeeze() for column in data)
    weight, bias = run.path["weight"].flatten(), run.path["bias"].flatten()
    losses = ((weight[:, None] * x + bias[:, None] - y) ** 2).mean(dim=1)
    torch.testing.assert_close(run.losses, losses)
    assert run.uphill == sum(b > a for a, b in itertools.pairwise(losses))
    assert losses.min() > minimum


@pytest.mark.parametrize(
    ("samples", "ends", "said"),
    [
        ((139.0, 416.0, 2334.0), (0.05, 0.01, 4e-5), "come down sooner .* and end higher .*0.004 %"),
        (
            (139.0, 416.0, float("inf")),
            (0.01, 0.02, 1.23),
            "come down sooner .*never.* but do not end higher .1, 2 and 120 %",
        ),
        ((900.0, 416.0, 2334.0), (0.05, 0.01, 4e-5), "do not come down sooner .* but end higher"),
        ((900.0, 416.0, 2334.0), (0.01, 0.02, 0.5), "do not come down sooner .* and do not end higher"),
    ],
)
def test_the_paths_conclude_from_their_numbers(samples, ends, said):
    sizes = (1, 16, 389)
    conclude = load("descent_paths").conclusion
    sentence = conclude(dict(zip(sizes, samples, strict=True)), dict(zip(sizes, ends, strict=True)))
    assert re.search(said, sentence)
    assert sentence == conclude(
        dict(zip(sizes[::-1], samples[::-1], strict=True)), dict(zip(sizes, ends, strict=True))
    )


def test_the_gap_that_the_paths_name_is_where_their_median_line_ends():
    demo = load("descent_paths")
    gap = torch.tensor([[3.0, 2.0, 0.9, 0.01], [3.0, 0.5, 0.8, 0.03], [3.0, 0.5, 0.7, 0.02]])
    *_, last, worst = demo.summarize("mini-batch", gap)
    line = demo.draw_gaps({"mini-batch": (None, gap)}).axes[0].lines[0]
    assert (last, worst) == pytest.approx((0.02, 0.03))
    assert line.get_ydata()[-1] == pytest.approx(last)
    assert line.get_xdata().tolist() == [16, 32, 48]  # nothing is drawn before the first update


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ((1, 9), "agree far from the optimum, not near it: 1 of 24 .* w = 10, 9 at w = 5"),
        ((9, 1), "agree near the optimum, not far from it: 9 of 24"),
        ((0, 0), "agree far from the optimum and near it"),
        ((9, 9), "agree neither far from the optimum nor near it"),
    ],
)
def test_the_parabolas_conclude_from_their_numbers(wrong, said):
    assert re.search(said, load("minibatch_1d").conclusion(24, *wrong))


def test_the_claim_of_similar_gradients_is_judged_by_its_numbers():
    conclude = load("minibatch_1d").claim_conclusion
    assert "trusted 4.5 × nearer" in conclude(0.99, 0.22)
    assert "no surer than single samples" in conclude(0.3, 0.3)


def test_the_tutorials_printed_values_are_followed():
    demo = load("minibatch_1d")
    assert len(demo.PRINTED) == demo.ROWS // demo.BATCH
    ours = demo.one_weight(shuffle=False)
    assert (ours - torch.tensor(demo.PRINTED)).abs().max() < 1
    assert (ours - torch.tensor(demo.PRINTED)).abs()[-10:].max() < 1e-3


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        (
            (39, 48, 0.65, 0.38),
            "arrives at 5.0000 .after 39 .* tutorial's after 48 .* 0.7 .* keeps it away: .* 0.38 off$",
        ),
        (
            (float("inf"), 48, 2.0, 1e-6),
            "does not arrive .*never; .* 2.0 apart.; noise does not keep it away",
        ),
    ],
)
def test_the_tutorials_run_concludes_from_its_numbers(numbers, said):
    assert re.search(said, load("minibatch_1d").tutorial_conclusion(*numbers))


def test_an_update_arrives_when_no_later_one_prints_another_number():
    demo = load("minibatch_1d")
    assert demo.updates_to(5.0, torch.tensor([5.1, 5.0, 5.0001, 5.00004, 4.99996])) == 4
    assert demo.updates_to(5.0, torch.tensor([5.0, 5.0])) == 1
    assert demo.updates_to(5.0, torch.tensor([5.0, 5.1])) == float("inf")
    assert demo.updates_to(5.0, torch.tensor(demo.PRINTED)) == 48


@pytest.mark.parametrize(
    ("differences", "said"),
    [
        ({"a": 3e-14, "b": 0.0}, "hold to the last digits: 2 runs attain theirs to 1e-13$"),
        ({"a": 3e-14, "b": 0.02}, "^Only 1 of 2 runs .* the farthest is 1e-1 off$"),
        ({"a": 0.0, "b": 0.0}, "2 runs attain theirs to 0$"),
    ],
)
def test_theory_against_practice_concludes_from_its_numbers(differences, said):
    assert re.search(said, load("theory_against_practice").conclusion(differences))


def test_a_fault_is_caught_only_if_the_diagnosis_names_it():
    demo = load("theory_against_practice")
    assert demo.names("broken\n  diagnosis: agrees with: no bias", "no bias")
    assert not demo.names("broken\n  diagnosis: none\n  to repeat: check(no bias)", "no bias")
    said = demo.caught_conclusion("no bias", 7e-15, 31.6, True)
    assert said.startswith("Adam (no bias) is caught, and named: its steps are up to 32 times too long")
    assert said.endswith("agrees to 1e-14")
    said = demo.caught_conclusion("no bias", 0.5, 31.6, False)
    assert "is not caught" in said
    assert said.endswith("does not agree either, to 1e0")


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        (
            ([0.99, 1.01], [0.95, 0.88], [0.1, 0.42]),
            "settles at 2/lr .0.99 to 1.01 .* 88% or more, though 10% to 42%",
        ),
        (([0.2, 1.01], [0.95, 0.88], [0.0, 0.2]), "has not settled at 2/lr .0.20 to 1.01 .* 0% to 20% of"),
        (([1.0, 1.0], [0.95, 0.8], [0.0, 0.002]), "settles .* by 80% or more, at nearly every step$"),
        (([1.0, 1.0], [0.95, -0.1], [0.1, 0.42]), "settles .* the loss need not fall"),
    ],
)
def test_the_edge_of_stability_concludes_from_its_numbers(numbers, said):
    assert re.search(said, load("edge_of_stability").conclusion(*numbers))


def test_the_fall_of_the_loss_is_that_of_the_drawn_medians():
    demo = load("edge_of_stability")
    sharpness = torch.full((4, 3), 20.0)
    losses = torch.rand(4, 15, generator=torch.Generator().manual_seed(0)) + 0.1
    runs = demo.Descent(losses, sharpness, 0 * sharpness)
    falls = demo.report_network(runs)["falls"]
    lines = demo.draw_network(runs).axes[1].lines[: len(demo.EDGES)]
    assert falls == pytest.approx([1 - float(line.get_ydata()[-1] / line.get_ydata()[0]) for line in lines])


def test_the_heavy_ball_concludes_from_its_numbers():
    conclude = load("edge_of_stability").map_conclusion
    said = conclude(4096, 0, 33.4, 833.0)
    assert "saves steps: all 4,096 runs obey the edge" in said
    assert "after 33 steps at best, without it after 833" in said
    assert conclude(4096, 96, 33.4, 33.0).startswith("Momentum saves no steps: 4,000 of 4,096 runs obey")


@pytest.mark.long
def test_a_run_in_stretches_is_the_run_of_the_network(monkeypatch):
    demo = load("edge_of_stability")
    monkeypatch.setattr(demo, "SIZES", (5, 4, 1))
    monkeypatch.setattr(demo, "EDGES", (20.0, 40.0))
    data, params = demo.returns(), demo.initial_params(gd.random.key(0))
    descent = demo.train_network(steps=6, every=2).outputs
    index = gd.full_batch(len(data[1]), 6)
    step = gd.make_step(demo.network_loss)
    _, trajectory = gd.train(step, params, data, index, 0.05, record=("loss", "params"), backend="eager")
    run = demo.EDGES.index(40.0)
    torch.testing.assert_close(descent.losses[run], trajectory.loss, rtol=1e-5, atol=0)
    hessian = torch.func.hessian(lambda flat: demo.network_loss(unflatten(flat, params), data))
    leaves = [leaf[4].flatten() for layer in trajectory.params.values() for leaf in layer.values()]
    largest = torch.linalg.eigvalsh(hessian(torch.cat(leaves)))[-1]
    torch.testing.assert_close(descent.sharpness[run, 2], largest, rtol=1e-2, atol=0)
    assert descent.sharpness.shape == descent.residuals.shape == (2, 3)


def unflatten(flat, params):
    sizes = [leaf.numel() for layer in params.values() for leaf in layer.values()]
    parts = iter(flat.split(sizes))
    return {
        name: {key: next(parts).reshape(leaf.shape) for key, leaf in layer.items()}
        for name, layer in params.items()
    }


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        (
            ([0.093, 0.3], 0.82, [6.1, 8.9]),
            "finite lr .0.093, 0.3., before full .*0.82.; .* does not see it: .* 6.1 to 8.9 times too low",
        ),
        (([0.9], 0.82, [6.1]), "though full batches diverge no later .* it is 6.1 times too low"),
        (([0.093], 0.82, [1.1, 8.9]), "holds nearly up to it: .* 1.1 to 8.9 times as large"),
    ],
)
def test_the_stationary_spread_concludes_from_its_numbers(numbers, said):
    assert re.search(said, load("stationary").conclusion(*numbers))


def test_the_agreement_of_the_spread_is_judged_by_standard_errors():
    conclude = load("stationary").agreement_conclusion
    assert re.search(
        "spread agree: at most 2.2 .* in 2 .* is 0.63 to 2.10 of", conclude([1, -2.2], [2.1, 0.63])
    )
    assert re.search("spread do not agree: at most 7.0 .* in 3", conclude([1, -7, 2], [1.0]))


def test_running_means_conclude_from_their_seeds():
    conclude = load("stationary").running_conclusion
    said = conclude({0.1: 1.02, 0.9: 1.3, 1.2: 2.45, 1.6: 1210.0}, 8)
    assert "settles only below the limit: there 8 seeds end within a factor of 1.3" in said
    assert said.endswith("above it 2.5 to 1,210 times apart") or said.endswith("2.4 to 1,210 times apart")
    assert "settles no better below the limit" in conclude({0.9: 3.0, 1.2: 2.5}, 8)


def test_running_means_are_of_all_pieces_so_far():
    demo = load("stationary")
    moments = torch.zeros(1, 1, 3, 3, 3)
    moments[0, 0, :, 0, 0] = torch.tensor([1.0, 2.0, 6.0])
    moments[0, 0, :, 2, 2] = 1.0
    found = demo.running_means(demo.Measured(moments, 0, 0.0, 0.0))
    assert found.tolist() == [[[1.0, 1.5, 3.0]]]


def test_sides_of_a_boundary_are_counted_at_every_step():
    demo = load("decision_boundary")
    benign = torch.tensor([[0, 0, 0, 1], [1, 1, 0, 1], [1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]]) > 0
    found = demo.sides(benign, torch.tensor([1.0, 1.0, 0.0, 0.0]))
    assert found.right == [1, 3, 4, 3, 3]
    assert (found.nearly, found.changed_late, found.last_change) == (1, 2, 3)
    still = demo.sides(benign[:1].expand(3, 4), torch.tensor([1.0, 1.0, 0.0, 0.0]))
    assert (still.nearly, still.changed_late, still.last_change) == (0, 0, 0)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (
            ([3, 99, 99, 100], 3, 2),
            "After 1 of 3 steps 99 of 110 tumours are on the right side, and 1 more in the end: "
            "2 change sides later, the last at step 3",
        ),
        (([3, 100, 99], 2, 1), "100 of 110 .* and 1 fewer in the end: 1 change"),
        (([3, 99, 99], 1, 0), "After 1 of 2 steps 99 .* and as many in the end: none changes sides later$"),
    ],
)
def test_the_conclusion_on_a_boundary_follows_its_numbers(found, said):
    demo = load("decision_boundary")
    assert re.search(said, demo.conclusion(demo.Sides(*found), 110))


@pytest.mark.parametrize(
    ("damped", "said"),
    [
        (
            [(0.0, 7.5), (9.0, 11.0)],
            r"Gauss in 0 and 1, Damped in 1 and 2\. Damped has at least 7.5 from near \(A\)$",
        ),
        ([(0.0, 5.9), (9.0, 11.0)], r"Damped in 1 and 1\. Gauss fails even near B$"),
        ([(6.0, 2.0), (9.0, 3.0)], r"Damped in 2 and 0\. Gauss fails even near B$"),
    ],
)
def test_certified_digits_conclude_from_their_numbers(damped, said):
    digits = {"Gauss": [(1.0, 8.0), (2.0, 3.0)], "Damped": damped}
    concluded = load("certified").conclusion(digits, ["A", "B"])
    assert concluded.startswith(
        "Of 2 problems, six digits from the far and the near start: Gauss in 0 and 1, "
    )
    assert re.search(said, concluded)


def test_a_certified_run_ends_when_nothing_changes_and_is_counted():
    demo, fit = load("certified"), gd.problems.nist("DanWood")
    params, steps = demo.solve(fit, demo.METHODS["Gauss-Newton"])
    assert steps < demo.METHODS["Gauss-Newton"].most
    assert (fit.digits(params) > 9).all()
    params, steps = demo.solve(fit, demo.METHODS["Gauss-Newton"]._replace(chunk=1, most=2))
    assert steps == 2
