"""HTML for notebooks: tables, and curves as inline SVG, with nothing to import or to download."""

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import numpy as np

_WIDTH, _HEIGHT, _POINTS, _LINES = 160, 28, 160, 24


def table(title: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Make a table with a title. Cells of type `Markup` are HTML already."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(f'<td>{_cell(cell)}</td>' for cell in row)}</tr>" for row in rows)
    top = f"<div>{escape(title)}</div>"
    return f"{top}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


class Markup(str):
    """A text that is HTML already."""


def _cell(value: Any) -> str:
    if isinstance(value, Markup):
        return value
    return escape(f"{value:.6g}" if isinstance(value, float) else str(value))


def curves(values: np.ndarray[Any, Any]) -> Markup:
    """Draw curves [n, T], the first 24, over each other; logarithmic if they are positive over two decades.

    A value that is not finite leaves a gap.
    """
    columns = np.unique(np.linspace(0, values.shape[1] - 1, _POINTS).astype(int))
    shown = values[:_LINES, columns].astype(float)
    finite = shown[np.isfinite(shown)]
    if not finite.size:
        return Markup("not finite")
    is_log = finite.min() > 0 and finite.max() / 100 > finite.min()
    with np.errstate(all="ignore"):
        heights = np.log10(shown) if is_log else shown
    low, high = (math.log10(end) if is_log else float(end) for end in (finite.min(), finite.max()))
    x = columns / max(values.shape[1] - 1, 1) * (_WIDTH - 2) + 1
    # Halved first, because the range of two large floats overflows.
    y = 1 + (_HEIGHT - 2) * ((high / 2 - heights / 2) / ((high / 2 - low / 2) or 1.0))
    paths = "".join(f'<path d="{_path(x, row)}"/>' for row in y)
    title = f"{'log' if is_log else 'linear'}, {finite.min():.4g} to {finite.max():.4g}"
    return Markup(
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" fill="none" stroke="currentColor" '
        f'stroke-linecap="round"><title>{title}</title>{paths}</svg>'
    )


def _path(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> str:
    """Write a curve as moves and lines; a point alone is a line to itself."""
    parts, is_open = [], False
    for place, height in zip(x, y, strict=True):
        if math.isfinite(height):
            point = f"{place:.1f} {height:.1f}"
            parts.append(f"L{point}" if is_open else f"M{point}L{point}")
        is_open = math.isfinite(height)
    return "".join(parts)
