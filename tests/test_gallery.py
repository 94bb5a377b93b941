"""The gallery's page holds what the demos' cards say, in both languages, and needs no network."""

import ast
import base64
import csv
import html
import importlib.util
import io
import itertools
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")

import trainability
from _page import _encode, build, cards, excerpt, runs, zooms
from _page._template import STRINGS, fill, script_data
from PIL import Image

import gdfunc as gd

from .gallery import LRS, NASTY, write_card

DEMOS = Path(__file__).parents[1] / "demos"


@pytest.fixture(scope="module")
def hero():
    return runs.hero(passes=2, lrs=LRS)


@pytest.fixture(scope="module")
def trained():
    return zooms.zooms(points=24)


@pytest.fixture(autouse=True)
def _the_still_is_drawn_once(request, monkeypatch):
    """Draw the picture for readers without scripts only in the test that looks at it."""
    if "still" not in request.node.name:
        monkeypatch.setattr(
            build, "draw_still", lambda hero, rate, file: Image.new("RGB", (40, 20)).save(file)
        )


class Elements(HTMLParser):
    """All elements of a page, with the text directly inside them."""

    def __init__(self, page):
        super().__init__()
        self.found, self.open = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append({"tag": tag, "text": "", **dict(attrs)})
        self.open.append(self.found[-1])

    def handle_data(self, data):
        if self.open:
            self.open[-1]["text"] += data

    def handle_endtag(self, tag):
        while self.open and self.open.pop()["tag"] != tag:
            pass


def page_of(out, names, hero, **options):
    page = build.build(out, cards.read_cards(out, names), hero, **options)
    return Elements(page.read_text(encoding="utf-8")).found


@pytest.mark.long
def test_a_card_shows_its_question_conclusion_numbers_and_files(tmp_path, hero):
    card = write_card(tmp_path, "quickstart")
    found = page_of(tmp_path, ["quickstart"], hero)
    texts = [element["text"] for element in found]
    assert "Is it so?" in texts
    assert card["pictures"][0]["conclusion"] in texts
    assert "gap 0.25" in texts
    assert "uphill 16: 0.5, 1: 3e-07" in texts
    assert "n 1,234" in texts
    assert "2.5 s" in texts
    assert any(text.startswith("def run(batch_size") and "gd.train(" in text for text in texts)
    linked = {
        element["href"] for element in found if element["tag"] == "a" and "/" in element.get("href", "")
    }
    for file in ("one.png", "one.svg", "runs.csv", "card.json"):
        assert f"quickstart/{file}" in linked
    assert all((tmp_path / file).exists() for file in linked)
    (shown,) = [element for element in found if element["tag"] == "img" and "width" in element]
    assert shown["alt"] == card["pictures"][0]["conclusion"]


@pytest.mark.long
def test_the_page_and_its_thumbnails_are_small_and_need_no_network(tmp_path, hero, trained):
    names = [name for row in build.ROWS.values() for name in row]
    for name in names:
        write_card(tmp_path, name, size=(500, 300))
    found = page_of(tmp_path, names, hero, zooms=trained)
    sources = [element["src"] for element in found if "src" in element]
    assert len(sources) == len(names) + 1  # and the picture for readers without scripts
    for source in sources:
        kind, content = source.split(",")
        assert kind == "data:image/webp;base64"
        assert len(base64.b64decode(content)) <= 30_000
        assert Image.open(io.BytesIO(base64.b64decode(content))).format == "WEBP"
    assert (tmp_path / "index.html").stat().st_size < 3e6
    assert "http:" not in (page := (tmp_path / "index.html").read_text(encoding="utf-8"))
    assert "https:" not in page


@pytest.mark.long
def test_thumbnails_are_smaller_where_there_are_many(tmp_path):
    write_card(tmp_path, "quickstart", size=(500, 300))
    (demo,) = cards.read_cards(tmp_path, ["quickstart"]).values()
    assert cards.thumbnail_size([demo] * 20) == 30_000
    assert cards.thumbnail_size([demo] * 100) == 15_000
    uri, width, height = cards.thumbnail(tmp_path / "quickstart/one.png", 15_000)
    content = base64.b64decode(uri.split(",")[1])
    assert 7_000 < len(content) <= 15_000
    assert Image.open(io.BytesIO(content)).size == (width, height)
    assert width / height == pytest.approx(5 / 3, rel=0.02)


@pytest.mark.parametrize("said", [NASTY, "</script><script>alert(1)</script>", "a {{{style}}} {months}"])
def test_what_a_demo_says_stays_text(said, tmp_path, hero):
    write_card(tmp_path, "quickstart", conclusion=said)
    found = page_of(tmp_path, ["quickstart"], hero)
    assert [element["text"] for element in found if element["tag"] == "h3"] == [said]
    assert [element["alt"] for element in found if element["tag"] == "img" and "width" in element] == [said]
    assert sum(element["tag"] == "script" for element in found) == 2
    slide = Elements((tmp_path / "cards/quickstart.one.html").read_text(encoding="utf-8")).found
    assert [element["text"] for element in slide if element["tag"] == "h1"] == [said]


def test_a_demo_without_a_card_is_left_out_and_an_unknown_one_is_shown_last(tmp_path, hero):
    for name in ("private_descent", "unheard_of", "quickstart"):
        write_card(tmp_path, name)
    names = ["unheard_of", "stationary", "private_descent", "quickstart"]
    found = page_of(tmp_path, names, hero, missing=["stationary"])
    shown = [element["id"] for element in found if element.get("class") == "card"]
    assert shown == ["quickstart-one", "private_descent-one", "unheard_of-one"]
    rows = [element["id"] for element in found if element.get("class") == "row"]
    assert rows == ["start", "samples", "more"]
    (said,) = [element for element in found if element.get("data-text") == "footer.missing"]
    assert "stationary" in said["text"]


def test_every_demo_of_a_row_exists():
    listed = [name for row in build.ROWS.values() for name in row]
    assert len(listed) == len(set(listed))
    assert all((DEMOS / f"{name}.py").exists() for name in listed)


def test_a_slide_holds_its_picture_whole(tmp_path, hero):
    write_card(tmp_path, "quickstart", size=(300, 200))
    page_of(tmp_path, ["quickstart"], hero)
    slide = (tmp_path / "cards/quickstart.one.html").read_text(encoding="utf-8")
    content = re.search(r'src="data:image/png;base64,([^"]+)"', slide)[1]
    assert base64.b64decode(content) == (tmp_path / "quickstart/one.bare.png").read_bytes()


def test_every_phrase_is_in_both_languages_and_used():
    english, chinese = STRINGS["en"], STRINGS["zh"]
    assert english.keys() == chinese.keys()
    for key in english:
        places = [sorted(re.findall(r"\{\w+\}", words[key])) for words in (english, chinese)]
        assert places[0] == places[1], key
        assert re.search("[一-鿿]", chinese[key]), key
    parts = [file.read_text(encoding="utf-8") for file in (DEMOS / "_page").glob("*.*")]
    files = "".join(part for part in parts if not part.startswith("{"))
    computed = {f"hero.{kind}" for kind in ("best", "near", "slow", "noisy", "overshoots")}
    computed |= {f"hero.diverges_{name}" for name in ("single", "mini", "full")}
    computed |= {f"rows.{row}" for row in (*build.ROWS, "more")}
    assert {key for key in english if key not in files} <= computed <= english.keys()


def test_every_question_of_a_demo_is_asked_in_chinese_too():
    asked = {
        node.value
        for script in DEMOS.glob("[!_]*.py")
        for node in ast.walk(ast.parse(script.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and str(node.value).endswith("?")
    }
    assert asked == build.QUESTIONS.keys()
    assert all(re.search("[一-鿿].*？$", chinese) for chinese in build.QUESTIONS.values())


@pytest.mark.long
def test_the_still_for_readers_without_scripts_shows_its_learning_rate(tmp_path, hero):
    page_of(tmp_path, [], hero)
    shown = np.asarray(Image.open(tmp_path / "hero.png").convert("RGB"), dtype=int)
    for red, green, blue in ((0, 158, 115), (213, 94, 0), (0, 114, 178)):
        assert (abs(shown - [red, green, blue]).sum(axis=2) < 60).sum() > 50


def test_a_template_is_filled_once(tmp_path, monkeypatch):
    monkeypatch.setattr("_page._template.HERE", tmp_path)
    (tmp_path / "x.html").write_text("{{a}} {{{a}}} {{text rows.start}}")
    filled = fill("x.html", {"a": "<{{b}}>"})
    assert filled == '&lt;{{b}}&gt; <{{b}}> <span data-text="rows.start">Start here</span>'
    with pytest.raises(KeyError):
        fill("x.html", {})


def test_data_cannot_end_the_script_that_holds_it():
    value = {"a": "</script><!--", "b": ["é", 0.5, None]}
    assert "<" not in script_data(value)
    assert json.loads(script_data(value)) == value


@pytest.mark.parametrize("name", sorted(path.stem for path in DEMOS.glob("[!_]*.py")))
def test_an_excerpt_is_a_part_of_the_demo_in_at_most_12_lines(name):
    code = excerpt.excerpt(DEMOS / f"{name}.py")
    source = (DEMOS / f"{name}.py").read_text(encoding="utf-8")
    lines = code.splitlines()
    assert len(lines) <= 12
    if name != "all":
        assert "gd." in code or "gt." in code
        compile(code, name, "exec")
    assert all(line.strip() in source for line in lines)


def test_an_excerpt_is_what_trains(tmp_path):
    (tmp_path / "x.py").write_text(
        "def long():\n" + "    gd.train()\n" * 12 + "def draws():\n    gd.plot.a(gd.plot.b)\n"
        "def prepares():\n    gd.a(gd.b, gd.c)\n    return gd.d\n"
        'class A:\n    @gd.stateful\n    def runs():\n        """Says."""\n\n        gd.train()\n'
    )
    assert excerpt.excerpt(tmp_path / "x.py") == "@gd.stateful\ndef runs():\n    gd.train()"


def test_numbers_survive_their_encoding():
    values = np.array([[0.5, -1.0, 7.0], [np.nan, -np.inf, 1e-5]])
    kept = _encode.decode(_encode.encode(values), 2, 3)
    expected = np.array([[0.5, -1.0, 1.0], [np.nan, -1.0, 1e-5]])
    np.testing.assert_allclose(kept, expected, atol=0.51 / 32767)


@pytest.mark.parametrize(
    ("share", "said"),
    [
        (0.163, "16 %"),
        (2e-5, "< 0.01 %"),
        (1e-4, "0.01 %"),
        (np.inf, "∞ %"),
        (1e9, "> 10⁶ %"),
        (3.2, "320 %"),
    ],
)
def test_shares_are_written_in_two_digits(share, said):
    assert _encode.percent(share).replace("\u00a0", " ") == said


def test_the_runs_are_those_of_a_plain_loop(hero):
    problem = runs.regression()
    x, y = problem.data
    for run in hero["runs"]:
        order = gd.epoch_batches(gd.random.key(0), len(y), run["batch"], 2)
        w, path = problem.params["w"].clone(), [problem.params["w"]]
        for index in order:
            w = w - LRS[1] * x[index].T @ (x[index] @ w - y[index]) / run["batch"]
            path.append(w)
        path = torch.stack(path)[run["steps"]]
        kept = _encode.decode(run["weights"], len(LRS), len(path), 2)[1]
        places = np.array(hero["middle"]) + hero["reach"] * kept
        np.testing.assert_allclose(places, path, atol=hero["reach"] / 32767)
        gaps = ((path @ x.T - y) ** 2).mean(dim=1) / 2 / problem.minimum - 1
        kept = _encode.decode(run["gaps"], len(LRS), len(path))[1] * hero["decades"]
        np.testing.assert_allclose(kept, gaps.log10(), atol=2 * hero["decades"] / 32767)
        last = gaps[torch.tensor(run["steps"]) > len(order) - len(y) // run["batch"]]
        assert run["ends"][1] == _encode.percent(float(last.median()))
        assert run["steps"][-1] == len(order)


def test_the_ellipses_are_contours_of_the_loss(hero):
    problem = runs.regression()
    for i in (0, 1):
        along = torch.tensor(hero["directions"][i], dtype=torch.float64)
        w = problem.minimizers[0]["w"] + 0.3 * along
        gap = problem.loss_fn({"w": w}, problem.data) / problem.minimum - 1
        assert float(gap) == pytest.approx(0.09 * hero["curvatures"][i], rel=1e-9)


def test_each_run_is_named_by_its_end(hero):
    single, mini, full = (run["kinds"] for run in hero["runs"])
    assert single[-1] == mini[-1] == full[-1] == "diverges"
    assert full[:-1] == ["slow", "slow", "slow", "best"]
    assert mini.count("best") == single.count("best") == 1
    assert mini[0] == "slow"
    assert "noisy" in single
    made = runs.Runs(
        16, *[np.zeros(0)] * 3, np.array([0.5, 0.011, 0.01, 0.2, np.nan]), np.array([0] * 4 + [1], bool)
    )
    assert runs.kinds(made) == ["slow", "near", "best", "noisy", "diverges"]
    assert runs.kinds(made._replace(batch=runs.MONTHS))[3] == "overshoots"


def losses_of(first, second):
    """Train one network of the map in a plain loop; return its losses over the first one."""
    params, (x, y) = trainability.task()
    w1, w2, losses = params["first"], params["second"], []
    for _ in range(trainability.STEPS):
        hidden = torch.tanh(x @ w1)
        error = hidden @ w2 - y
        losses.append(float((error**2).mean()))
        slope = 2 / len(y) * error
        back = x.T @ (slope[:, None] * w2 * (1 - hidden**2))
        w1, w2 = w1 - first * back, w2 - second * hidden.T @ slope
    return np.array(losses) / losses[0]


@pytest.mark.long
def test_the_map_is_that_of_single_networks(trained):
    points = trained["points"]
    for shown in trained["windows"][:2]:
        shades = np.frombuffer(base64.b64decode(shown["shades"]), np.uint8).reshape(points, points)
        kept = _encode.decode(shown["curves"], 8, 8, 100)
        second, first = (
            10 ** trainability.centres(shown[axis], points).numpy() for axis in ("second", "first")
        )
        for k, column in ((0, 0), (3, 7), (7, 7), (1, 6)):
            x, y = zooms.lattice(points)[column], zooms.lattice(points)[k]
            losses = losses_of(first[y], second[x])
            assert (shades[y, x] < 128) == (losses[-trainability.LAST :].mean() < 1)
            levels = np.log10(losses[:20:2])  # later, chaos magnifies rounding errors
            np.testing.assert_allclose(
                kept[k, column, :10] * trained["decades"], levels.clip(-8, 8), atol=1e-3
            )
        assert shown["share"] == f"{100 * (shades < 128).mean():.0f}\u00a0%"
        for half in (shades[shades < 128], shades[shades >= 128] - 128):
            assert (half.min(), half.max()) == (0, 127)


@pytest.mark.long
def test_each_frame_is_the_next_window(trained):
    windows = trained["windows"]
    assert len(windows) == 4
    assert "inner" not in windows[-1]
    for outer, inner in itertools.pairwise(windows):
        for axis, ends in zip(("second", "first"), outer["inner"], strict=True):
            low, high = outer[axis]
            found = [low + share * (high - low) for share in ends]
            assert found == pytest.approx(inner[axis])
            assert ends[1] - ends[0] == pytest.approx(1 / trained["enlarged"])


def test_the_map_follows_the_row_on_learning_rates(tmp_path, hero, trained):
    for name in ("quickstart", "learning_rate_map", "stationary"):
        write_card(tmp_path, name)
    names = ["quickstart", "learning_rate_map", "stationary"]
    found = page_of(tmp_path, names, hero, zooms=trained)
    assert [e["id"] for e in found if e.get("class") == "row"] == ["start", "rates", "map", "curvature"]
    assert [e["value"] for e in found if e.get("name") == "zoom"] == ["0", "1", "2", "3"]
    found = page_of(tmp_path, ["quickstart"], hero, zooms=trained)
    assert [e["id"] for e in found if e.get("class") == "row"] == ["start", "map"]


@pytest.fixture
def gallery(tmp_path, hero, monkeypatch):
    """demos/all.py over three demos that are made for the test, of which the second fails."""
    (tmp_path / "demos").mkdir()
    for name, then in {
        "first": "",
        "second": "print(*range(30), 'so far', sep='\\n'); raise ValueError('too bad')",
        "third": "",
    }.items():
        (tmp_path / "demos" / f"{name}.py").write_text(
            f"import sys\nsys.path.insert(0, {str(DEMOS)!r})\n"
            "from _card import Card\nfrom matplotlib.figure import Figure\n"
            f"with Card(__file__, 'Is it?') as card:\n"
            f"    card.picture('it', Figure((3, 2)), 'It is {name}', {{'n': 1}})\n    {then}\n"
        )
    spec = importlib.util.spec_from_file_location("gallery", DEMOS / "all.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "DEMOS", tmp_path / "demos")
    monkeypatch.setattr(module, "hero", lambda: hero)
    monkeypatch.setattr(module, "zooms", lambda points: None)
    return module


@pytest.mark.long
def test_a_demo_that_fails_is_named_and_the_others_are_shown(gallery, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert gallery.main(["--fast", "--out", out]) == 1
    said = capsys.readouterr().out
    assert re.search(r"\[1/3\] first: \d+ s\n\[2/3\] second: \d+ s\n\[3/3\] third: \d+ s\nsaved", said)
    assert "second failed:" in said
    assert "so far" in said
    assert "\n9\n" not in said
    assert "ValueError: too bad\nsecond.py ended with status 1" in said
    page = html.unescape((tmp_path / "out/index.html").read_text(encoding="utf-8"))
    assert "It is first" in page
    assert "It is third" in page
    assert "It is second" not in page
    assert "did not finish: second." in page
    assert "small run" in page
    assert gallery.main(["--out", out, "--only"]) == 0
    assert capsys.readouterr().out.startswith(f"saved {out}/index.html: 2 demos")


@pytest.mark.parametrize("watched", [True, False])
def test_progress_is_a_bar_for_someone_who_watches_and_else_lines(watched, gallery, monkeypatch, capsys):
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: watched)
    assert list(gallery.progress(["first", "third"])) == ["first", "third"]
    printed = capsys.readouterr()
    assert ("2/2" in printed.err) == watched
    assert ("[2/2] third: 0 s" in printed.out) == (not watched)


def test_progress_is_in_lines_without_tqdm(gallery, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert list(gallery.progress(["first"])) == ["first"]
    assert capsys.readouterr().out == "[1/1] first: 0 s\n"


def test_a_thumbnail_of_a_moving_picture_is_its_last_frame(tmp_path):
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "green", "blue")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    uri, *_ = cards.thumbnail(tmp_path / "x.gif")
    shown = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGB")
    red, green, blue = shown.getpixel((20, 15))
    assert blue > 200 > 60 > max(red, green)


def test_all_demos_run_but_the_gallery_itself(gallery, tmp_path):
    assert gallery.names() == ["first", "second", "third"]
    (tmp_path / "demos/all.py").write_text("")
    (tmp_path / "demos/_part.py").write_text("")
    assert gallery.names() == ["first", "second", "third"]


def test_the_table_holds_how_each_run_ended(tmp_path, hero):
    page_of(tmp_path, [], hero)
    with (tmp_path / "hero.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(int(row["batch"]), float(row["lr"])) for row in rows] == [
        (batch, lr) for batch in (1, 16, 389) for lr in LRS
    ]
    said = [end for run in hero["runs"] for end in run["ends"]]
    assert [_encode.percent(float(row["gap"] or "inf")) for row in rows] == said
    assert {row["end"] for row in rows} >= {"diverges", "best", "slow"}
