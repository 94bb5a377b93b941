"""The card of a demo: its question, its conclusions with their numbers, and its files."""

import json

import pytest
import torch

pytest.importorskip("matplotlib")

from _card import Card
from matplotlib import image
from matplotlib.figure import Figure
from PIL import Image


def test_a_card_says_what_was_found(tmp_path, capsys):
    with Card("demos/some.py", "Is it so?", ["--out", str(tmp_path), "--fast"]) as card:
        assert card.fast
        figure = Figure(figsize=(3, 3))
        numbers = {"gap": torch.tensor([0.5, float("inf")]), "n": 3}
        card.picture("gap", figure, "It is so, and a gap of 0.5 is left to say why", numbers)
        card.picture("two", Figure(), "It is", {}, question="And this?")
        card.table("gap", ["epoch", "gap"], zip(torch.arange(2), torch.tensor([0.5, 0.25]), strict=True))
        card.file("runs.csv").write_text("a")
    assert figure.get_suptitle() == "It is so, and a gap of 0.5 is left to\nsay why"
    assert "It is so, and a gap of 0.5 is left to say why\nsaved" in capsys.readouterr().out
    written = json.loads((tmp_path / "card.json").read_text())
    assert written.pop("seconds") >= 0
    assert written == {
        "demo": "some",
        "question": "Is it so?",
        "fast": True,
        "pictures": [
            {
                "file": "gap.png",
                "question": "Is it so?",
                "conclusion": "It is so, and a gap of 0.5 is left to say why",
                "numbers": {"gap": [0.5, "inf"], "n": 3},
            },
            {"file": "two.png", "question": "And this?", "conclusion": "It is", "numbers": {}},
        ],
        "tables": ["gap.csv", "runs.csv"],
    }
    assert (tmp_path / "gap.csv").read_text().splitlines() == ["epoch,gap", "0,0.5", "1,0.25"]


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
@pytest.mark.filterwarnings("error")
def test_a_picture_carries_its_conclusion_in_every_format(suffix, tmp_path):
    with Card("demos/some.py", "Is it?", ["--out", str(tmp_path), "--format", suffix]) as card:
        card.picture("it", Figure(), "lr η falls", {})
    assert (tmp_path / f"it.{suffix}").stat().st_size > 100


def test_a_picture_of_the_gallery_is_also_an_svg_and_a_png_without_its_title(tmp_path):
    with Card("demos/some.py", "Is it?", ["--out", str(tmp_path), "--gallery"]) as card:
        figure = Figure((4, 3))
        figure.add_subplot()
        card.picture("it", figure, "lr η falls", {})
    (shown,) = json.loads((tmp_path / "card.json").read_text())["pictures"]
    assert (shown["file"], shown["bare"]) == ("it.png", "it.bare.png")
    assert "lr η falls" in (tmp_path / "it.svg").read_text(encoding="utf-8")
    whole, bare = (image.imread(tmp_path / shown[name])[..., :3] for name in ("file", "bare"))
    assert whole.shape == bare.shape
    at_the_top = slice(0, 24)  # rows of pixels, in which only the title is
    assert whole[at_the_top].min() < 0.5 < 0.9 < bare[at_the_top].min()


@pytest.mark.long
@pytest.mark.parametrize("width", [3.0, 6.4, 9.0])
@pytest.mark.parametrize("said", ["mmmm mom 100 % " * 20, "ill, till it fills " * 20, "m" * 80 + " end"])
def test_a_title_fits_its_picture(said, width, tmp_path):
    figure = Figure((width, 3))
    with Card("x.py", "Is it?", ["--out", str(tmp_path)]) as card:
        card.picture("it", figure, said.strip(), {})
    figure.draw_without_rendering()  # at the figure's own resolution, not that of the file
    title = figure._suptitle
    assert title.get_text().split() == said.split()
    lines = title.get_text().splitlines()
    assert len(lines) == 2 or len(said) > 100
    for line in lines:
        title.set_text(line)
        if " " in line:
            assert title.get_window_extent().width <= 0.98 * figure.bbox.width
    if width > 3:
        assert max(len(line) for line in lines) > 30


def test_a_demo_that_fails_leaves_no_card(tmp_path):
    (tmp_path / "card.json").write_text("of an earlier run")
    with pytest.raises(KeyboardInterrupt), Card("x.py", "Is it?", ["--out", str(tmp_path)]):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_a_moving_picture_is_kept_with_the_picture_of_its_name(tmp_path, capsys):
    with Card("x.py", "Is it?", ["--out", str(tmp_path)]) as card:
        for name in ("paths", "film", "still"):
            card.picture(name, Figure((2, 2)), "It is", {})
        figure = Figure((2, 2))
        (line,) = figure.subplots().plot([1.0, 2.0, 3.0])
        card.motion("paths", line.axes, lines=[line])
        colors = ["red", "lime", "blue"]
        card.film("film", figure, lambda i: figure.set_facecolor(colors[i]), 3)
    shown = json.loads((tmp_path / "card.json").read_text())["pictures"]
    assert [picture.get("motion") for picture in shown] == ["paths.gif", "film.gif", None]
    assert f"saved {tmp_path}/paths.gif" in capsys.readouterr().out
    for name in ("paths", "film"):
        with Image.open(tmp_path / f"{name}.gif") as moving:
            assert moving.n_frames == 3


def test_a_film_shows_its_frames_in_order(tmp_path):
    with Card("x.py", "Is it?", ["--out", str(tmp_path)]) as card:
        figure = Figure((2, 2))
        card.picture("film", figure, "It is", {})
        (line,) = figure.add_axes((0, 0, 1, 1)).plot([0, 0], [0, 1], color="red", linewidth=6)
        line.axes.set(xlim=(-1, 3), ylim=(0, 1))
        card.film("film", figure, lambda i: line.set_xdata([i, i]), 3)
    places = []
    with Image.open(tmp_path / "film.gif") as moving:
        for i in range(3):
            moving.seek(i)
            red, green, _ = moving.convert("RGB").split()
            places.append(
                [x for x in range(200) if red.getpixel((x, 150)) - green.getpixel((x, 150)) > 150]
            )
    assert [sum(found) / len(found) for found in places] == pytest.approx([50, 100, 150], abs=2)
