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


def test_the_gap_of_variance_reduction_is_that_of_the_loss_and_its_costs_are_counted():
    demo, problem = load("variance_reduction"), gd.problems.stock_regression()
    params = {"w": torch.ones_like(problem.params["w"]), "b": problem.params["b"]}
    expected = problem.loss_fn(params, problem.data) / problem.minimum - 1
    torch.testing.assert_close(demo.gap_of(problem)(params), expected, rtol=1e-12, atol=0)
    assert demo.METHODS["SGD"].costs(2).tolist() == [0, 1, 2]
    assert demo.METHODS["SAGA"].costs(2).tolist() == [1, 2, 3]
    assert demo.METHODS["SVRG"].costs(2).tolist() == [0, 5, 10]
