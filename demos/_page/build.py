"""The page: templates filled with cards and runs, and written as one file."""

import json
import math
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy
import torch

import gdfunc

from ._still import draw_still
from ._template import STRINGS, fill, phrase, read, script_data
from .cards import DEMOS, Demo, cards_of, thumbnail, thumbnail_size
from .runs import write_table

ROWS: dict[str, list[str]] = json.loads(read("rows.json"))
QUESTIONS: dict[str, str] = json.loads(read("questions.json"))  # in Chinese
FIRST = 0.25  # near the learning rate that the page opens with
CLASSES = ("single", "mini", "full")


def build(
    out: Path,
    demos: Mapping[str, Demo],
    hero: Mapping[str, Any],
    zooms: Mapping[str, Any] | None = None,
    missing: Sequence[str] = (),
) -> Path:
    """Write the page and return its path.

    Args:
        out: the folder of the page, in which each demo has a folder of its own.
        demos: the cards by demo.
        hero: the runs of the first picture.
        zooms: the map of trainability; None leaves it out.
        missing: the demos that the page names as not shown.
    """
    out.mkdir(parents=True, exist_ok=True)
    rows = {name: shown for name in names_of(demos) if (shown := row(name, demos, out))}
    if zooms is not None:
        rows = insert_map(rows, zooms)
    first = min(range(len(hero["lrs"])), key=lambda i: abs(math.log(float(hero["lrs"][i]) / FIRST)))
    write_table(hero, out / "hero.csv")
    draw_still(hero, first, out / "hero.png")
    still, _, _ = thumbnail(out / "hero.png")
    seconds = sum(demo.card["seconds"] for demo in demos.values())
    values = {
        "title": STRINGS["en"]["title"],
        "summary": STRINGS["en"]["summary"],
        "style": read("style.css"),
        "script": read("page.js") + read("hero.js") + read("map.js"),
        "data": script_data(
            {
                "strings": STRINGS,
                "questions": {"zh": QUESTIONS},
                "hero": hero,
                "map": zooms,
                "first": first,
            }
        ),
        "nav": "".join(f'<a href="#{name}">{phrase(f"rows.{name}")}</a>' for name in rows if name != "map"),
        "rows": "\n".join(rows.values()),
        "still": still,
        "still_alt": STRINGS["en"]["hero.path_alt"],
        "count": len(hero["lrs"]) * len(hero["runs"]),
        "months": hero["months"],
        "passes": hero["passes"],
        "last": len(hero["lrs"]) - 1,
        "lowest": hero["lrs"][0],
        "highest": hero["lrs"][-1],
        "batches": batches(hero),
        "missing": f"<p>{phrase('footer.missing', {'names': ', '.join(missing)})}</p>" if missing else "",
        "commit": commit(),
        "versions": versions(),
        "time": f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s",
    }
    page = out / "index.html"
    page.write_text(fill("page.html", values), encoding="utf-8")
    return page


def names_of(demos: Mapping[str, Demo]) -> list[str]:
    """Return the rows; the last one is for demos that belong to no other."""
    rest = [name for name in demos if not any(name in row for row in ROWS.values())]
    return [*ROWS, *(["more"] if rest else [])]


def row(name: str, demos: Mapping[str, Demo], out: Path) -> str:
    """Return a row of cards, or nothing if it would be empty."""
    members = ROWS.get(name, [demo for demo in demos if not any(demo in row for row in ROWS.values())])
    most = thumbnail_size(demos.values())
    cards = [card for member in members if member in demos for card in cards_of(demos[member], out, most)]
    if not cards:
        return ""
    return (
        f'<section class="row" id="{name}">\n<h2>{phrase(f"rows.{name}")}</h2>\n'
        f'<div class="cards">\n{"".join(cards)}</div>\n</section>'
    )


def insert_map(rows: Mapping[str, str], zooms: Mapping[str, Any]) -> dict[str, str]:
    """Put the map of trainability after the row on learning rates, or last."""
    times = [zooms["enlarged"] ** i for i in range(len(zooms["windows"]))]
    choices = [
        f'<label class="full"><input type="radio" name="zoom" value="{i}"><span>× {n}</span></label>'
        for i, n in enumerate(times)
    ]
    section = fill("map.html", {"zooms": "".join(choices), "steps": zooms["steps"]})
    names = list(rows)
    at = names.index("rates") + 1 if "rates" in names else len(names)
    shown = {name: rows[name] for name in names[:at]} | {"map": section}
    return shown | {name: rows[name] for name in names[at:]}


def batches(hero: Mapping[str, Any]) -> str:
    choices = [
        f'<label class="{kind}"><input type="radio" name="batch" value="{run["batch"]}">'
        f"<span>{run['batch']}</span></label>"
        for kind, run in zip(CLASSES, hero["runs"], strict=True)
    ]
    return f"<div>{''.join(choices)}</div>"


def commit() -> str:
    """Describe the commit of the demos; an unpacked archive has none."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=DEMOS, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "files without a commit"
    return done.stdout.strip()


def versions() -> str:
    modules = (gdfunc, torch, numpy, matplotlib)
    names = [f"{module.__name__} {module.__version__}" for module in modules]
    return ", ".join([*names, f"Python {platform.python_version()}"])
