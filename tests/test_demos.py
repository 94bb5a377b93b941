"""The demos run small, write what they promise, and their numbers hold."""

import importlib.util
from pathlib import Path

import pytest
import torch

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
