"""The demos run small, write what they promise, and their numbers hold."""

import importlib.util
import json
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


@pytest.mark.long
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


@pytest.mark.long
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


@pytest.mark.parametrize(
    ("compared", "said"),
    [
        ({"a": (0.34, -7.0), "b": (1.05, 4.6)}, "error is 2.9 times smaller with a, 5% larger with b$"),
        ({"a": (0.9, -7.0), "b": (1.05, 1.0)}, "error is 10% smaller with a, not clearly changed with b$"),
        ({"a": (2.5, 7.0), "b": (0.3, -1.0)}, "is 2.5 times larger with a, not clearly changed with b$"),
    ],
)
def test_fewer_updates_conclude_from_their_numbers(compared, said):
    assert re.search(said, load("fewer_updates").conclusion(compared))


@pytest.mark.parametrize(
    ("difference", "said"),
    [(0.0, "has the losses .*difference 0$"), (2e-7, r"has other losses .*difference 2\.0e-07$")],
)
def test_a_long_run_concludes_from_its_difference(difference, said):
    conclusion = load("long_run").conclusion([10, 20], 30, difference)
    assert conclusion.startswith("Killed after 10 and 20 of 30 steps, ")
    assert re.search(said, conclusion)
