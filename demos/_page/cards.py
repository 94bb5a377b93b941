"""Cards: what each demo found, with a small picture, its code and links to its files."""

import base64
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ._template import fill, phrase
from .excerpt import excerpt

DEMOS = Path(__file__).parents[1]
WIDTH = 1080  # pixels of a thumbnail, at most
THUMBNAIL = 30_000  # bytes of a thumbnail, at most
THUMBNAILS = 1_500_000  # bytes of all of them, at most: two thirds of the page, in base64
LINE = 64  # letters of a card's numbers, if there is more than one


class Demo(NamedTuple):
    """The card.json of a demo, and the folder of its files."""

    folder: Path
    card: dict[str, Any]


def read_cards(out: Path, names: Sequence[str]) -> dict[str, Demo]:
    """Read the cards of the demos that have one."""
    files = {name: out / name / "card.json" for name in names}
    return {
        name: Demo(file.parent, json.loads(file.read_text(encoding="utf-8")))
        for name, file in files.items()
        if file.exists()
    }


def thumbnail(picture: Path, most: int = THUMBNAIL) -> tuple[str, int, int]:
    """Return a small picture as a data URI of at most so many bytes, and its width and height."""
    with Image.open(picture) as opened:
        opened.seek(getattr(opened, "n_frames", 1) - 1)  # where a moving picture ends
        image = Image.new("RGB", opened.size, "white")
        layer = opened.convert("RGBA")
        image.paste(layer, mask=layer.getchannel("A"))
    image.thumbnail((WIDTH, WIDTH), Image.Resampling.LANCZOS)
    while True:
        for quality in (82, 64, 46):
            file = io.BytesIO()
            image.save(file, "WEBP", quality=quality)
            if file.tell() <= most:
                return data_uri(file.getvalue(), "webp"), *image.size
        shrunk = 0.95 * math.sqrt(most / file.tell())
        image = image.resize([max(1, int(shrunk * side)) for side in image.size])


def data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def number_line(card: Mapping[str, Any], numbers: Mapping[str, Any]) -> str:
    """Return the first few numbers behind a conclusion, and the time of the run, as HTML."""
    shown = [f"{name} {words}" for name, value in numbers.items() if (words := in_words(value))]
    while len(" · ".join(shown)) > LINE and len(shown) > 1:
        shown.pop()
    parts = [f"<span>{escape(part)}</span>" for part in shown]
    parts.append(phrase("card.seconds", {"seconds": f"{card['seconds']:.3g}"}))
    if card["fast"]:
        parts.append(phrase("card.fast"))
    return " ".join(parts)


def in_words(value: Any) -> str:
    """Write a number, or up to four of them with their names; nothing for what is larger."""
    if isinstance(value, bool) or value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, str):
        return value if len(value) <= 24 else ""
    items = value.values() if isinstance(value, Mapping) else value
    words = [in_words(item) for item in items if not isinstance(item, Mapping | list)]
    if not 0 < len(words) == len(items) <= 4 or not all(words):
        return ""
    if isinstance(value, Mapping):
        words = [f"{name}: {word}" for name, word in zip(value, words, strict=True)]
    return ", ".join(words)


def thumbnail_size(demos: Iterable[Demo]) -> int:
    """Return how many bytes a thumbnail may have: less if there are many."""
    count = sum(len(demo.card["pictures"]) for demo in demos)
    return min(THUMBNAIL, THUMBNAILS // max(1, count))


def cards_of(demo: Demo, out: Path, most: int = THUMBNAIL) -> Iterator[str]:
    """Return a card for each picture of a demo, and write each as a page of its own, for a slide.

    Thumbnails have at most so many bytes.
    """
    name = demo.card["demo"]
    command = f"python demos/{name}.py" + (" --fast" if demo.card["fast"] else "")
    code = excerpt(DEMOS / f"{name}.py") if (DEMOS / f"{name}.py").exists() else ""
    for picture in demo.card["pictures"]:
        stem = Path(picture["file"]).stem
        bare = demo.folder / picture.get("bare", picture["file"])
        if not bare.exists() or bare.suffix not in (".png", ".gif", ".webp"):
            continue
        small, width, height = thumbnail(bare, most)
        slide = f"cards/{name}.{stem}.html"
        values = {
            "id": re.sub(r"\W+", "-", f"{name}-{stem}"),
            "question": picture["question"],
            "conclusion": picture["conclusion"],
            "picture": f"{name}/{picture['file']}",
            "thumbnail": small,
            "width": width,
            "height": height,
            "numbers": number_line(demo.card, picture["numbers"]),
            "code": code_block(code),
            "command": command,
            "files": " ".join(links(demo, picture)),
            "slide": slide,
        }
        write_slide(out / slide, bare, values)
        yield fill("card.html", values)


def code_block(code: str) -> str:
    if not code:
        return ""
    button = f'<button type="button" class="copy">{phrase("copy")}</button>'
    return f'<div class="code">{button}<pre tabindex="0"><code>{escape(code)}</code></pre></div>'


def links(demo: Demo, picture: Mapping[str, Any]) -> Iterator[str]:
    """Return links to the picture in its formats, to the tables, and to the numbers."""
    stem = Path(picture["file"]).stem
    kinds = ("png", "svg", "pdf", "gif", "html")
    files = [f"{stem}.{kind}" for kind in kinds if (demo.folder / f"{stem}.{kind}").exists()]
    tables = [table for table in demo.card["tables"] if (demo.folder / table).exists()]
    for label, names in (("card.picture", files), ("card.data", [*tables, "card.json"])):
        yield phrase(label)
        for name in names:
            words = name.removeprefix(f"{stem}.").upper() if label == "card.picture" else name
            yield f'<a href="{escape(demo.card["demo"])}/{escape(name)}">{escape(words)}</a>'


def write_slide(file: Path, picture: Path, values: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    uri = data_uri(picture.read_bytes(), picture.suffix[1:])
    source = f"Made by {values['command']}"
    file.write_text(fill("slide.html", {**values, "picture": uri, "source": source}), encoding="utf-8")
