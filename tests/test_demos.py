"""The demos run small, write what they promise, and their numbers hold."""

import importlib.util
from pathlib import Path

import pytest
import torch

import gdfunc as gd

pytest.importorskip("matplotlib")

DEMOS = Path(__file__).parents[1] / "demos"
NAMES = sorted(path.stem for path in DEMOS.glob("*.py"))


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
    assert load(name).main(["--fast", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    pictures = sorted(tmp_path.glob("*.png"))
    assert pictures
    for picture in pictures:
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert picture.name in printed or str(tmp_path) in printed


def test_the_stationary_moment_is_that_of_every_batch_of_two():
    demo, problem = load("stationary"), gd.problems.stock_regression()
    s, a = demo.second_moment(problem, 2, 0.1), demo.one_step(problem, 0.1)
    after = sum((((one + a) / 2) @ s @ ((one + a) / 2).mT).sum(dim=0) for one in a) / len(a) ** 2
    torch.testing.assert_close(after, s, rtol=0, atol=1e-15)


def test_the_limit_of_the_variance_is_a_generalized_eigenvalue():
    demo, problem = load("stationary"), gd.problems.stock_regression()
    h, _ = demo.samples(problem)
    mean, eye = h.mean(dim=0), torch.eye(6, dtype=h.dtype)
    squares = torch.einsum("nij,nkl->ikjl", h, h).reshape(36, 36) / len(h) / 4 + 0.75 * torch.kron(
        mean, mean
    )
    both = torch.kron(mean, eye) + torch.kron(eye, mean)
    largest = torch.linalg.eigvals(torch.linalg.solve(both, squares)).abs().max()
    assert demo.limit(problem, 4, 2) == pytest.approx(1 / largest.item(), rel=1e-6)


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
