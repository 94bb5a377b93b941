"""Templates: files with marks that are filled once, and the words of both languages."""

import json
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
STRINGS: dict[str, dict[str, str]] = json.loads((HERE / "strings.json").read_text(encoding="utf-8"))
MARK = re.compile(r"\{\{\{(?P<raw>\w+)\}\}\}|\{\{(?:(?P<kind>text|label) )?(?P<name>[\w.]+)\}\}")


def read(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def fill(name: str, values: Mapping[str, Any]) -> str:
    """Fill the template of a file.

    {{name}} is a value, escaped; {{{name}}} is HTML as it is; {{text key}} is a phrase that the page can
    turn into the other language, and {{label key}} an attribute of such a phrase. A phrase may have
    {places} for values.
    """

    def value_of(mark: re.Match[str]) -> str:
        if mark["raw"]:
            return str(values[mark["raw"]])
        if mark["kind"] == "text":
            return phrase(mark["name"], values)
        if mark["kind"] == "label":
            return f'aria-label="{escape(english(mark["name"], values))}" data-label="{mark["name"]}"'
        return escape(str(values[mark["name"]]))

    return MARK.sub(value_of, read(name))


def english(key: str, values: Mapping[str, Any]) -> str:
    return STRINGS["en"][key].format_map(values)


def phrase(key: str, values: Mapping[str, Any] | None = None) -> str:
    """Return an element with a phrase in English, which the page's script can translate."""
    values = values or {}
    used = {name: str(values[name]) for name in re.findall(r"\{(\w+)\}", STRINGS["en"][key])}
    kept = f' data-values="{escape(json.dumps(used, ensure_ascii=False))}"' if used else ""
    return f'<span data-text="{key}"{kept}>{escape(english(key, values))}</span>'


def script_data(value: Any) -> str:
    """Return JSON that may stand in a script element."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
