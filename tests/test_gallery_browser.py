"""The gallery's page in a real browser: every state draws, and nothing is asked of a network."""

import csv
import json
import re
import shutil

import pytest

pytest.importorskip("matplotlib")
from _page import build, cards, runs, zooms
from _page._encode import percent
from _page._template import STRINGS

from .gallery import write_card

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or ""
# Canvases are drawn by the processor: the same pixels, however often a test reads them.
FLAGS = ["--no-sandbox", "--disable-accelerated-2d-canvas"]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed")]

DEMOS = ("quickstart", "learning_rate_map", "stationary", "private_descent")

ASKED = next(iter(build.QUESTIONS))


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    """The folder of a page with fake cards, and runs of few passes at all learning rates."""
    out = tmp_path_factory.mktemp("gallery")
    for name in DEMOS:
        question = ASKED if name == "quickstart" else "Is it so?"
        write_card(
            out, name, conclusion=f"{name} is so, by 12 % & more", question=question, size=(320, 200)
        )
    shown = cards.read_cards(out, DEMOS)
    build.build(out, shown, runs.hero(passes=4), zooms.zooms(points=24))
    return out


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as tool:
        opened = tool.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def visit(browser, gallery):
    """Open the page in a window of its own; in the end no window may have complained or asked a network."""
    contexts, complaints, requests = [], [], []

    def go(address="", width=1280, height=800, motion="reduce", **options):
        context = browser.new_context(
            viewport={"width": width, "height": height}, reduced_motion=motion, **options
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else 0)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto((gallery / "index.html").as_uri() + address)
        return page

    yield go
    for context in contexts:
        context.close()
    assert not complaints
    assert {url.split(":")[0] for url in requests} <= {"file", "data"}
    assert sum(url.startswith("file:") for url in requests) == len(contexts)  # the page itself


def drawn(page, name="path"):
    return page.evaluate(f"document.getElementById('{name}').toDataURL()")


def colours(page, name):
    """Count the colours of a canvas."""
    return page.evaluate(
        f"""() => {{
            const node = document.getElementById('{name}');
            const pixels = node.getContext('2d').getImageData(0, 0, node.width, node.height).data;
            return new Set(new Uint32Array(pixels.buffer)).size;
        }}"""
    )


def until(page, expression):
    """Wait until an expression holds; playwright's own waiting needs eval, which the page forbids."""
    for _ in range(100):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"never true: {expression}")


def choose(page, rate, batch):
    page.evaluate(
        """([rate, batch]) => {
            document.querySelector(`input[name="batch"][value="${batch}"]`).click();
            const slider = document.getElementById('lr');
            slider.value = rate;
            slider.dispatchEvent(new Event('input'));
        }""",
        [rate, batch],
    )


def test_every_picture_loads_and_says_its_conclusion(visit):
    page = visit()
    images = page.evaluate("[...document.images].map((i) => [i.naturalWidth, i.alt, i.width])")
    assert len(images) == len(DEMOS)
    assert all(width > 100 and "is so" in said and shown > 400 for width, said, shown in images)


def test_no_source_is_in_a_network_and_every_link_leads_to_a_file(visit, gallery):
    page = visit()
    sources = page.evaluate(
        "[...document.querySelectorAll('[src]')].map((node) => node.getAttribute('src'))"
    )
    links = page.evaluate(
        "[...document.querySelectorAll('[href]')].map((node) => node.getAttribute('href'))"
    )
    assert all(source.startswith("data:") for source in sources)
    assert len(links) > 20
    for link in links:
        if link.startswith("#"):
            assert page.evaluate(f"!!document.querySelector('{link}')"), link
        elif link != "data:,":
            assert (gallery / link).stat().st_size


def test_every_state_draws_and_says_how_its_run_ended(visit, gallery):
    page = visit()
    with (gallery / "hero.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    rates = list(dict.fromkeys(row["lr"] for row in rows))
    pictures = set()
    for row in rows:
        choose(page, rates.index(row["lr"]), row["batch"])
        said = page.inner_text("#says")
        assert said.startswith(f"lr {row['lr']}, batch {row['batch']}: ")
        if row["end"] == "diverges":
            assert "diverges." in said
        else:
            assert f"ends {percent(float(row['gap']))} above the minimum." in said
        if row["end"] == "best":
            assert "The best of 28 learning rates" in said
        pictures.add((drawn(page, "path"), drawn(page, "loss")))
        assert colours(page, "path") > 20
        assert colours(page, "loss") > 20
    assert len(rows) == 84
    assert (
        len(pictures) == len({first for first, _ in pictures}) == len({last for _, last in pictures}) == 84
    )


def test_numbers_of_a_card_are_those_of_its_files(visit, gallery):
    page = visit()
    for name in DEMOS:
        card = json.loads((gallery / name / "card.json").read_text(encoding="utf-8"))
        (picture,) = card["pictures"]
        shown = page.locator(f"#{name}-one")
        assert shown.locator("h3").inner_text() == picture["conclusion"]
        gap, uphill, n, seconds = shown.locator(".numbers > span").all_inner_texts()
        assert float(gap.split()[1]) == picture["numbers"]["gap"]
        found = {batch: float(value) for batch, value in re.findall(r"(\d+): ([^,]+)", uphill)}
        assert found == picture["numbers"]["uphill"]
        assert int(n.split()[1].replace(",", "")) == picture["numbers"]["n"]
        assert float(seconds.split()[0]) == card["seconds"]


def test_the_address_restores_what_was_seen(visit):
    first = visit()
    choose(first, 20, 389)
    first.click("[data-lang=zh]")
    first.click("#theme")
    address = first.evaluate("location.hash")
    assert address == "#lang=zh&theme=dark&lr=0.3&batch=389"
    again = visit(address)
    for name in ("path", "loss"):
        assert drawn(again, name) == drawn(first, name)
    assert again.inner_text("#says") == first.inner_text("#says")
    assert again.evaluate("document.documentElement.dataset.theme") == "dark"
    assert again.input_value("#lr") == "20"
    again.evaluate("location.hash = '#lr=0.3&batch=1&lang=en'")
    until(again, "document.getElementById('says').innerText.startsWith('lr 0.3, batch 1')")


@pytest.mark.parametrize("address", ["#lr=x&batch=7&lang=no&theme=no", "#start", "#lr=-1", "#%"])
def test_an_address_of_nothing_opens_the_first_state(address, visit):
    assert visit(address).inner_text("#says") == visit().inner_text("#says")


def test_an_address_between_two_rates_opens_the_nearer(visit):
    assert visit("#lr=0.31&batch=16").inner_text("#says").startswith("lr 0.3, batch 16")


def test_both_languages_say_everything(visit):
    page = visit()
    texts = (
        "[...document.querySelectorAll('[data-text]')].map((node) => [node.dataset.text, node.textContent])"
    )
    labels = "[...document.querySelectorAll('[data-label]')].map((node) => node.getAttribute('aria-label'))"
    for language, pattern in (("zh", "[一-鿿]"), ("en", "[a-z]")):
        page.click(f"[data-lang={language}]")
        for key, said in page.evaluate(texts):
            assert re.search(pattern, said), key
            assert "{" not in said
        assert all(re.search(pattern, said) for said in page.evaluate(labels))
        assert page.inner_text("h1") == STRINGS[language]["hero.question"]
        assert page.title() == STRINGS[language]["title"]
        assert page.evaluate("document.documentElement.lang").startswith(language)
        for rate in (0, 12, 27):
            for batch in (1, 16, 389):
                choose(page, rate, batch)
                assert re.search(pattern, page.inner_text("#verdict"))
                assert re.search(pattern, page.inner_text("#reason"))
                assert "{" not in page.inner_text("#says")
        questions = [page.inner_text(f"#{name}-one .question") for name in ("quickstart", "stationary")]
        translated = build.QUESTIONS[ASKED] if language == "zh" else ASKED
        assert questions == [translated, "Is it so?"]  # a question without a translation stays as it is


@pytest.mark.parametrize("width", [320, 390, 768])
@pytest.mark.parametrize("language", ["en", "zh"])
def test_nothing_is_wider_than_a_phone(width, language, visit):
    page = visit(f"#lang={language}", width=width, height=844, device_scale_factor=2)
    page.evaluate("document.querySelectorAll('details').forEach((node) => (node.open = true))")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    for name in ("path", "loss"):
        canvas = page.evaluate(
            f"(node => [node.width, node.clientWidth])(document.getElementById('{name}'))"
        )
        assert canvas[0] == 2 * canvas[1] > 500


def test_the_page_moves_by_itself_once_unless_asked_not_to(visit):
    page = visit(motion="no-preference")
    seen = [drawn(page)]
    page.wait_for_timeout(700)
    seen.append(drawn(page))
    page.wait_for_timeout(3500)
    end = drawn(page)
    page.wait_for_timeout(500)
    assert len({*seen, end}) == 3
    assert drawn(page) == end == drawn(visit())
    page.click("#play")
    page.wait_for_timeout(300)
    assert drawn(page) != end


def test_keys_move_the_learning_rate_and_the_batch(visit):
    page = visit()
    before = int(page.input_value("#lr"))
    page.focus("#lr")
    page.keyboard.press("ArrowRight")
    assert int(page.input_value("#lr")) == before + 1
    assert page.get_attribute("#lr", "aria-valuetext") == page.inner_text("#says")
    page.focus("input[name=batch]:checked")
    page.keyboard.press("ArrowRight")
    assert ", batch 389:" in page.inner_text("#says")


def test_a_click_on_the_map_tells_of_its_network_and_the_frame_leads_deeper(visit):
    page = visit()
    map_data = page.evaluate("data.map")
    box = page.locator("#cells").bounding_box()
    seen = {drawn(page, "cells")}
    for zoom in range(3):
        shown, points = map_data["windows"][zoom], map_data["points"]
        assert page.inner_text("#share").startswith(f"{shown['share']} of these 576 networks learn")
        for x, y in ((0, 0), (23, 0), (0, 23), (23, 23)):
            page.locator("#cells").click(
                position={
                    "x": (x + 0.5) / points * box["width"],
                    "y": (1 - (y + 0.5) / points) * box["height"],
                }
            )
            first, second, said = re.match(
                r"First layer (\S+), second layer (\S+): (learns|does not learn)",
                page.inner_text("#outcome"),
            ).groups()
            rates = [
                10 ** float(zooms.trainability.centres(shown[axis], points)[i])
                for axis, i in (("first", y), ("second", x))
            ]
            assert [float(first), float(second)] == pytest.approx(rates, rel=5e-3)
            shade = page.evaluate(f"data.map.windows[{zoom}].cells[{y * points + x}]")
            assert (said == "learns") == (shade < 128)
            assert colours(page, "curve") > 20
            seen.add(drawn(page, "cells"))
        (x0, x1), (y0, y1) = shown["inner"]
        middle = {"x": (x0 + x1) / 2 * box["width"], "y": (1 - (y0 + y1) / 2) * box["height"]}
        page.locator("#cells").click(position=middle)
        assert page.evaluate("location.hash").endswith(f"zoom={zoom + 1}")
        assert page.locator("input[name=zoom]:checked").input_value() == str(zoom + 1)
        seen.add(drawn(page, "cells"))
    assert len(seen) > 12
    assert "enlarged 216 times" in page.inner_text("#share")


def test_keys_move_over_the_map_and_its_address_restores_it(visit):
    page = visit("#zoom=1&at=5,6")
    before = page.inner_text("#outcome")
    page.focus("#cells")
    page.keyboard.press("ArrowUp")
    assert page.evaluate("location.hash") == "#zoom=1&at=5%2C7"
    assert page.inner_text("#outcome") != before
    page.keyboard.press("ArrowDown")
    assert page.inner_text("#outcome") == before
    again = visit(page.evaluate("location.hash"))
    for name in ("cells", "curve"):
        assert drawn(again, name) == drawn(page, name)
    page.keyboard.press("+")
    assert page.locator("input[name=zoom]:checked").input_value() == "2"
    page.keyboard.press("-")
    page.keyboard.press("-")
    assert page.locator("input[name=zoom]:checked").input_value() == "0"
    assert visit("#zoom=9&at=1,99").inner_text("#outcome") == visit().inner_text("#outcome")


def test_a_window_grows_into_the_next(visit):
    page = visit(motion="no-preference")
    page.wait_for_timeout(200)
    seen = [drawn(page, "cells")]
    page.click("input[name=zoom][value='1']", force=True)
    for _ in range(2):
        page.wait_for_timeout(200)
        seen.append(drawn(page, "cells"))
    page.wait_for_timeout(1200)
    seen.append(drawn(page, "cells"))
    assert len(set(seen)) == 4
    assert seen[-1] == drawn(visit("#zoom=1"), "cells")


def test_everything_that_can_be_reached_has_a_name(visit):
    page = visit()
    page.evaluate("document.querySelectorAll('details').forEach((node) => (node.open = true))")
    nameless = page.evaluate(
        """[...document.querySelectorAll('a, button, input, canvas, nav')].filter((node) =>
            !node.textContent.trim() && !node.getAttribute('aria-label') && !node.labels?.length)
            .map((node) => node.outerHTML)"""
    )
    assert nameless == []


CLIPBOARD = ["clipboard-read", "clipboard-write"]


def copied(page, button):
    """Click a button that copies, wait until it has said so, and return what was copied."""
    page.bring_to_front()
    page.evaluate(
        """(button) => {
            window.said = [];
            const node = document.querySelector(button);
            const watch = new MutationObserver(() => said.push(node.innerText));
            watch.observe(node, {childList: true, subtree: true});
        }""",
        button,
    )
    page.click(button)
    until(page, "said.includes('Copied')")
    return page.evaluate("navigator.clipboard.readText()")


def test_code_and_command_are_copied(visit):
    page = visit(permissions=CLIPBOARD)
    page.click("#quickstart-one summary")
    assert copied(page, "#quickstart-one .code .copy").startswith("def run(")
    assert copied(page, "#quickstart-one .line .copy") == "python demos/quickstart.py"
    until(page, "document.querySelector('#quickstart-one .line .copy').innerText === 'Copy'")


def test_a_link_leads_to_the_state_that_is_seen(visit):
    page = visit(permissions=CLIPBOARD)
    address = copied(page, "#link")
    assert address.endswith("index.html#lr=0.22&batch=16")
    assert visit(address[address.index("#") :]).inner_text("#says") == page.inner_text("#says")


def test_dark_follows_the_reader_and_paper_is_white(visit):
    light, dark = visit(), visit(color_scheme="dark")
    shade = "getComputedStyle(document.body).backgroundColor"
    assert light.evaluate(shade) == "rgb(251, 251, 249)"
    assert dark.evaluate(shade) == "rgb(22, 24, 29)"
    assert drawn(light) != drawn(dark)
    before = drawn(dark)
    dark.evaluate(
        "addEventListener('beforeprint', () => (window.printed = document.documentElement.dataset.theme))"
    )
    assert dark.pdf(format="A4").startswith(b"%PDF")
    assert dark.evaluate("window.printed") == "light"
    assert drawn(dark) == before
    dark.emulate_media(media="print")
    assert not dark.is_visible("#play")
    assert dark.is_visible("#path")


def test_without_scripts_the_still_and_the_cards_are_there(visit):
    page = visit(java_script_enabled=False)
    assert page.locator("noscript img").is_visible()
    assert page.locator(".card h3").count() == len(DEMOS)


def test_a_slide_opens_alone(browser, gallery):
    page = browser.new_page()
    page.goto((gallery / "cards/quickstart.one.html").as_uri())
    assert page.evaluate("document.images[0].naturalWidth") == 320
    assert page.evaluate("document.documentElement.scrollHeight <= innerHeight")
    page.close()
