"""A few lines of a demo's source that show how it uses gdfunc."""

import ast
import textwrap
from pathlib import Path

LINES = 12  # at most, so that a card's code is read at a glance


def excerpt(script: Path) -> str:
    """Return the function of at most 12 lines that uses gdfunc most, without its docstring.

    A function that trains or sweeps comes before those that only prepare or draw. A demo without such a
    function has no excerpt.
    """
    source = script.read_text(encoding="utf-8")
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    candidates = [code for node in functions if (code := code_of(node, source)).count("\n") < LINES]
    best = max(candidates, key=worth, default="")
    return best if worth(best)[1] else ""


def code_of(node: ast.FunctionDef, source: str) -> str:
    """Return the source of a function without its docstring, from the first column on."""
    lines = source.splitlines()[first_line(node) - 1 : node.end_lineno]
    if ast.get_docstring(node) is not None:
        string = node.body[0]
        start, end = string.lineno - first_line(node), (string.end_lineno or 0) - first_line(node)
        end += not lines[end + 1].strip()  # the blank line after it
        del lines[start : end + 1]
    return textwrap.dedent("\n".join(lines)).strip("\n")


def first_line(node: ast.FunctionDef) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def worth(code: str) -> tuple[int, int, int]:
    """Rank an excerpt by the loops it runs, then by its uses of gdfunc, then by its length."""
    trains = sum(code.count(name) for name in ("gd.train(", "gd.sweep(", "gd.scan("))
    uses = code.count("gd.") - 2 * code.count("gd.plot.")
    return min(trains, 2), max(uses, 0), code.count("\n")
