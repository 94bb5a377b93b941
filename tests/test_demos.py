"""The demos run small, write what they promise, and their numbers hold."""

import importlib.util
import json
import math
import re
from pathlib import Path

import pytest
import torch

import gdfunc as gd
from gdfunc._scan import _cost

pytest.importorskip("matplotlib")

DEMOS = Path(__file__).parents[1] / "demos"
NAMES = sorted(path.stem for path in DEMOS.glob("[!_]*.py") if path.stem != "all")  # which runs all of them


def load(name):
    spec = importlib.util.spec_from_file_location(name, DEMOS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", NAMES)
def test_a_demo_runs_and_writes_pictures(name, tmp_path, capsys):
    with torch.random.fork_rng():  # from which a module of torch.nn draws its first parameters
        assert load(name).main(["--fast", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    pictures = sorted(tmp_path.glob("*.png"))
    assert pictures
    for picture in pictures:
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert picture.name in printed or str(tmp_path) in printed
    if "import Card" in (DEMOS / f"{name}.py").read_text(encoding="utf-8"):
        card = json.loads((tmp_path / "card.json").read_text(encoding="utf-8"))
        assert card["demo"] == name
        assert card["question"].endswith("?")
        assert card["fast"]
        assert card["seconds"] > 0
        assert {shown["file"] for shown in card["pictures"]} == {picture.name for picture in pictures}
        assert all(shown["conclusion"] in printed and shown["numbers"] for shown in card["pictures"])
        assert all((tmp_path / table).stat().st_size for table in card["tables"])


NUMBER = r"-?\d+(?:\.\d+)?(?:e[-+]\d+)?"
CHAOTIC = {"edge_of_stability", "optimizer_race", "trainability"}  # whose runs magnify a rounding error
OTHER_LINES = re.compile(  # times, memory, and rounding errors
    r"\d s\b|seconds|\d (ms|µs)|/s\b|^equal lr|^lr |Largest difference|differs| × |its eigenvalue"
)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_demo_prints_the_same_numbers_traced_and_in_eager(name, tmp_path, capsys, monkeypatch):
    printed = []
    for trace in (0.0, float("inf")):  # seconds: all loops are worth a trace, and none
        monkeypatch.setattr(_cost, "TRACE", trace)
        assert load(name).main(["--fast", "--out", str(tmp_path)]) == 0
        printed.append(capsys.readouterr().out.splitlines())
    for traced, eager in zip(*printed, strict=True):
        if OTHER_LINES.search(eager):
            continue
        if name in CHAOTIC:
            numbers = [[float(number) for number in re.findall(NUMBER, line)] for line in (traced, eager)]
            assert numbers[0] == pytest.approx(numbers[1], rel=0.1, nan_ok=True)
            traced, eager = (re.sub(rf" *{NUMBER}", "", line) for line in (traced, eager))
        assert traced == eager


def test_the_stationary_moment_is_that_of_every_batch_of_two():
    demo, problem = load("_moments"), gd.problems.stock_regression()
    s, a = demo.second_moment(problem, 2, 0.1), demo.one_step(problem, 0.1)
    after = sum((((one + a) / 2) @ s @ ((one + a) / 2).mT).sum(dim=0) for one in a) / len(a) ** 2
    torch.testing.assert_close(after, s, rtol=0, atol=1e-15)


def test_the_limit_of_the_variance_is_a_generalized_eigenvalue():
    demo, problem = load("_moments"), gd.problems.stock_regression()
    h, _ = demo.samples(problem)
    mean, eye = h.mean(dim=0), torch.eye(6, dtype=h.dtype)
    squares = torch.einsum("nij,nkl->ikjl", h, h).reshape(36, 36) / len(h) / 4 + 0.75 * torch.kron(
        mean, mean
    )
    both = torch.kron(mean, eye) + torch.kron(eye, mean)
    largest = torch.linalg.eigvals(torch.linalg.solve(both, squares)).abs().max()
    assert demo.limit(problem, 4, 2) == pytest.approx(1 / largest.item(), rel=1e-6)


def test_a_full_batch_of_the_quickstart_goes_where_algebra_says():
    demo, problem = load("quickstart"), gd.problems.stock_regression()
    runs = demo.sweep(problem, (389,), epochs=4, orders=1).select(batch_size=389, end=1.0, key=0).outputs
    x, y = problem.data
    design = torch.cat([x, torch.ones_like(y)[:, None]], dim=1)
    hessian, optimum = design.mT @ design / len(y), demo.vector(problem.minimizers[0])
    for lr, gaps, distance in zip(demo.LRS, runs["gaps"], runs["distance"], strict=True):
        contraction, error = torch.eye(6, dtype=y.dtype) - lr * hessian, -optimum
        for gap in gaps:
            expected = 0.5 * error @ hessian @ error / problem.minimum
            torch.testing.assert_close(gap, expected, rtol=1e-9, atol=1e-12)
            last, error = error, contraction @ error
        torch.testing.assert_close(distance, last.norm() / optimum.norm(), rtol=1e-9, atol=0)


def test_the_best_learning_rate_grows_with_the_batch():
    demo, problem = load("learning_rate_map"), gd.problems.stock_regression()
    result = demo.train_all(problem, (2, 8), rates=24, orders=15, epochs=1)
    first, second = demo.sum_up(result, 389, 1)
    assert 2.5 < second.lr / first.lr < 6.5
    assert first.low <= first.lr <= first.high < first.stable_to < 2 / problem.L


def test_a_run_of_the_map_counts_as_diverged_above_its_start(tmp_path):
    demo, problem = load("learning_rate_map"), gd.problems.stock_regression()
    result = demo.train_all(problem, (8, 389), rates=40, orders=5, epochs=1)
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
    demo = load("learning_rate_map")
    rows = [demo.Best(b, 1, 0.1 * b**power, 0, 1, 0, 1, 0, 1) for b in (1, 2, 4, 8)]
    rows += [demo.Best(64, 1, 1e-9, 0, 1, 0, 1, 0, 1)]
    assert demo.exponent(rows) == pytest.approx(power, rel=1e-5)
    assert demo.rule(rows) == pytest.approx(0.1 * 8 ** ((power - 1) / 2))


def test_the_heavy_balls_rate_is_that_of_its_companion_matrices():
    demo, eigenvalues = load("edge_of_stability"), torch.tensor([0.01, 0.5, 2.0], dtype=torch.float64)
    momenta = torch.linspace(0, 0.99, 12, dtype=torch.float64)[:, None]
    lrs = torch.linspace(0.01, 2.5, 15, dtype=torch.float64)
    found = demo.predict(momenta, lrs, eigenvalues)
    a = 1 + momenta[..., None] - lrs[:, None] * eigenvalues
    first = torch.stack([a, (-momenta[..., None]).expand_as(a)], dim=-1)
    second = torch.tensor([1.0, 0.0]).to(a).expand_as(first)
    radius = torch.linalg.eigvals(torch.stack([first, second], dim=-2)).abs().amax(dim=(-1, -2))
    torch.testing.assert_close(found, radius, rtol=1e-7, atol=0)
    assert torch.equal(found < 1, lrs < 2 * (1 + momenta) / eigenvalues.max())
    lr, momentum, rate = demo.polyak(eigenvalues)
    at = [torch.tensor([[value]], dtype=torch.float64) for value in (momentum, lr)]
    best = demo.predict(*at, eigenvalues)
    assert best.item() == pytest.approx(rate, rel=1e-6)


def test_the_heavy_balls_measured_rate_is_the_predicted_one():
    demo = load("edge_of_stability")
    found = demo.map_momentum(points=8, steps=300)
    assert (found.measured.outputs - found.predicted).abs().max() < 5e-3
    assert torch.equal(found.measured.outputs < 1, found.predicted < 1)
    assert 0 < (found.predicted < 1).sum() < 64


@pytest.mark.slow
def test_a_network_sharpens_to_the_edge_of_stability():
    demo = load("edge_of_stability")
    demo.EDGES = (20.0, 200.0)
    sharpness = demo.train_network(steps=1200, every=60).outputs.sharpness
    assert 10 < sharpness[0, 0] < 15
    assert demo.hovering(sharpness).tolist()[0] == pytest.approx(20, rel=0.1)
    assert sharpness[1].max() < 20


def test_the_expected_loss_of_a_schedule_is_the_mean_over_all_orders():
    demo, stocks = load("learn_the_schedule"), gd.problems.stock_regression()
    x, y = stocks.data
    demo.PROBLEM = gd.problems.linear_regression(x[:9], y[:9])
    demo.STEP, demo.BATCH = gd.make_step(demo.PROBLEM.loss_fn), 2
    lrs = torch.tensor([0.3, 0.1], dtype=torch.float64)
    orders = torch.cartesian_prod(*[torch.arange(9)] * 4).reshape(-1, 2, 2)
    every = torch.func.vmap(lambda index: demo.final_excess(lrs, index))(orders)
    torch.testing.assert_close(demo.expected_excess(lrs), every.mean(), rtol=1e-12, atol=0)


def test_no_schedule_beats_the_best_of_all():
    demo = load("learn_the_schedule")
    constant = demo.best_constant(12)
    best = demo.best_of(torch.exp, constant.log())
    falling = demo.best_of(demo.falling(12), torch.tensor([0.1, 0.05], dtype=torch.float64).log())
    slope = gd.hypergrad(lambda log_lrs: demo.expected_excess(log_lrs.exp()))(best.log())
    assert slope.grads.abs().max() < 1e-6 * slope.value
    assert slope.value < demo.expected_excess(falling) < demo.expected_excess(constant)


def test_live_bytes_are_those_that_are_held():
    demo = load("learn_the_schedule")
    given = torch.ones(1000)
    with demo.LiveBytes() as memory:
        held = torch.ones(100) + 1  # two of them for a moment
        for _ in range(5):
            given.view(10, 100).mul(2)  # 4000 bytes, not held
        del held
    assert memory.peak == 400 + 4000
    peaks = demo.count_memory((8, 32))
    growth = {name: last / first for name, (first, last) in peaks.items()}
    assert growth["reverse"] > 1.4 > 1.1 > growth["checkpoint"]
    assert growth[demo.ONE_RATE] < 1.1


def test_the_gap_of_variance_reduction_is_that_of_the_loss_and_its_costs_are_counted():
    demo, problem = load("variance_reduction"), gd.problems.stock_regression()
    params = {"w": torch.ones_like(problem.params["w"]), "b": problem.params["b"]}
    expected = problem.loss_fn(params, problem.data) / problem.minimum - 1
    torch.testing.assert_close(demo.gap_of(problem)(params), expected, rtol=1e-12, atol=0)
    assert demo.METHODS["SGD"].costs(2).tolist() == [0, 1, 2]
    assert demo.METHODS["SAGA"].costs(2).tolist() == [1, 2, 3]
    assert demo.METHODS["SVRG"].costs(2).tolist() == [0, 5, 10]


def test_mini_batch_noise_is_what_the_spread_says():
    demo = load("gradient_noise")
    problem = demo.regression()
    trajectory = demo.follow(problem)
    g = demo.gradients(problem, trajectory, 3)
    total = float(trajectory.spread.variance[3])
    for size in (4, 64):
        drawn = demo.batch_errors(g, size, 4000, replacement=False)
        assert drawn == pytest.approx(total / size * (1 - size / len(g)), rel=0.1)


def test_planted_labels_are_found():
    pytest.importorskip("sklearn")
    demo = load("which_samples_matter")
    task = demo.mislabelled_digits()
    assert torch.equal(task.data[1] != task.truth, task.wrong)
    scores = demo.score(task, demo.learn(task.data, 20))
    for rows in scores:
        assert demo.found(rows[-1], task.wrong)[60] > 0.8


@pytest.mark.parametrize(
    ("compared", "said"),
    [
        ({"a": (0.3, -7.0), "b": (1.05, 4.6)}, "is not clearly less accurate, but for 5% with b$"),
        ({"a": (0.3, -7.0), "b": (1.05, 1.0)}, "is not clearly less accurate$"),
        ({"a": (1.3, 7.0), "b": (1.05, 4.6)}, "is less accurate: by 30% with a, 5% with b$"),
    ],
)
def test_fewer_updates_conclude_from_their_numbers(compared, said):
    assert re.search(said, load("fewer_updates").conclusion(compared))


@pytest.mark.parametrize(
    ("missed", "widths", "said"),
    [
        (
            9,
            (10.2, 5123.0),
            "misses the good range of 9 of 11 .* Yogi's, × 5,100, whose .* 2.5 times SGD's",
        ),
        (2, (61.0, 5.5), "is in the good range of 9 of 11 .* SGD's, × 61, which has the least loss, too$"),
    ],
)
def test_the_race_concludes_from_its_numbers(missed, widths, said):
    widths, losses = dict(zip(("SGD", "Yogi"), widths, strict=True)), {"SGD": 0.2, "Yogi": 0.5}
    assert re.search(said, load("optimizer_race").conclusion(missed, 11, widths, losses))


def test_a_good_range_ends_where_the_lines_pass_the_bound_and_never_nears_what_diverged():
    demo = load("optimizer_race")
    lrs = [1.0, 10.0, 100.0, 1000.0]
    assert demo.end_of_range(lrs, [1.0, 1.0, 4.0, 1.0], 0, 2.0) == pytest.approx(10**1.5)
    assert demo.end_of_range(lrs, [1.0, 2.0, float("inf"), 1.0], 0, 2.0) == 10.0
    assert demo.end_of_range(lrs, [1.0, 2.0, 1.0, 2.0], 1, 2.0) == 1000.0


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        (
            (0.0312, 2e-22, 23.0),
            "SGD ends 3.1 % .* SAGA goes on, to 2e-22 .below 1e-12: after 23 n gradients",
        ),
        ((0.0312, 0.02, math.inf), "SAGA is hardly closer, to 2e-02 .below 1e-12: never"),
        ((1e-9, 0.02, math.inf), "SGD ends 1e-07 % .* SAGA is no closer"),
    ],
)
def test_variance_reduction_concludes_from_its_numbers(numbers, said):
    assert re.search(said, load("variance_reduction").conclusion(*numbers, 1e-12))


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ((1.03, 9, 10, 181.3), "in proportion to .*batch.1.03.*is good for 9 of 10 .*meets 2/L at .* 181$"),
        ((0.5, 0, 10, 9.0), "is not in proportion .*batch.0.50.*is good for 0 of 10 .*meets 2/L at .* 9$"),
    ],
)
def test_the_learning_rate_map_concludes_from_its_numbers(numbers, said):
    assert re.search(said, load("learning_rate_map").conclusion(*numbers))


@pytest.mark.parametrize(
    ("learned", "said"),
    [
        (
            0.0202,
            "finds nearly all .* 98 % of what there is to gain .* ends 1 % above the least expected loss$",
        ),
        (0.025, "finds a part .* 50 % of what there is to gain .* ends 25 % above"),
        (0.033, "finds nothing: 10 % more loss than by the best constant rate$"),
    ],
)
def test_the_learned_schedule_concludes_from_its_numbers(learned, said):
    assert re.search(said, load("learn_the_schedule").conclusion(0.03, learned, 0.02))


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ((0.05, 0.9, (0.01, 0.17), 20), "shrinks far .*to 5 %, .* 90 %.: 1 % .* start, 17 % at step 20$"),
        ((0.5, 0.6, (0.2, 0.1), 8), "does not shrink far more than .*: 20 % .* start, 10 % at step 8$"),
    ],
)
def test_the_clouds_conclude_from_their_numbers(numbers, said):
    assert re.search(said, load("gradient_noise").conclusion(*numbers))


def test_the_noise_scale_is_judged_by_the_sweep():
    conclude = load("gradient_noise").sweep_conclusion
    assert "a gap is within a factor of ten of the best batch size: 0.4 to 1.1 times" in conclude(
        [1.1, 0.4, 0.7]
    )
    assert "is not within a factor of ten of the best batch size: 0.4 to 30.0 times" in conclude(
        [0.4, 30.0]
    )


def test_the_pictures_of_samples_conclude_from_their_numbers():
    demo = load("which_samples_matter")
    assert re.search("forgets .* does not: 68 and 92 % .* first 60$", demo.conclusion(60, 0.68, 0.92))
    assert "the loss finds more" in demo.conclusion(60, 0.92, 0.68)
    assert "as many wrong labels as the loss: 90 and 92 %" in demo.conclusion(60, 0.9, 0.92)
    assert demo.suspects_conclusion(24, 24, 1200).startswith("All 24 most suspect of 1,200 labels")
    assert demo.suspects_conclusion(3, 24, 1200).startswith("3 of 24 most suspect")
    assert demo.influence_conclusion(0, 12).startswith("0 of the 12 samples")
    assert re.search(
        "1987-10, did 9 % .* 40 months of 389", demo.months_conclusion("1987-10", 0.09, 40, 389)
    )


@pytest.mark.parametrize(
    ("large", "following", "said"),
    [
        (0.3, 0.06, "largest clipping norm, 10, .* noise 2: 30.0 .* 0.1 costs 5.0; .* 6.0, not less than"),
        (0.01, 0.002, "smallest clipping norm, 0.1, .* 5.0 .* 10 costs 1.0; .* costs 0.2, less than any$"),
    ],
)
def test_private_descent_concludes_from_its_numbers(large, following, said):
    assert re.search(said, load("private_descent").conclusion(2.0, {0.1: 0.05, 10.0: large}, following))
