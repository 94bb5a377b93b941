"""Colours that can be seen on one another: greys of contours, and paths on these."""

from __future__ import annotations

from typing import Any

import numpy as np

from ._axes import HUGE, Array, Axes
from ._style import Color, faint, line_style

FEW = 7  # paths: the colours that there are
_LEAST = 2.0  # contrast of every colour of a path against every grey


def luminance(color: Any) -> float:
    """Return the relative luminance of a colour by WCAG 2: 0 of black, 1 of white."""
    from matplotlib.colors import to_rgb

    parts = np.array(to_rgb(color))
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(one: Any, two: Any) -> float:
    """Return the contrast of two colours by WCAG 2, from 1 to 21."""
    low, high = sorted((luminance(one), luminance(two)))
    return (high + 0.05) / (low + 0.05)


def shades(ax: Axes, count: int) -> list[Color]:
    """Return greys from the lowest loss to the highest, which has the background's colour."""
    colors = [line_style(i, ax)[0] for i in range(FEW)]
    shares = np.linspace(0.0, 0.5, 101)
    seen = [min(contrast(color, faint(ax, share)) for color in colors) >= _LEAST for share in shares]
    darkest = shares[max(0, seen.index(False) - 1)] if False in seen else shares[-1]
    return [faint(ax, share) for share in np.linspace(darkest, 0.0, count)]


def path_colors(ax: Axes, count: int, labelled: bool, ends: Array | None = None) -> list[Any]:
    """Return a colour for each path: its own, or in a crowd without labels that of its final loss.

    Draw the bar that tells the losses. The ends are the losses [n, 2] of first and last points. Without
    them a crowd has one colour.
    """
    if not is_crowd(count, labelled):
        return [line_style(i, ax)[0] for i in range(count)]
    same = [line_style(0, ax)[0]] * count
    return same if ends is None else _colors_of_losses(ax, ends) or same


def is_crowd(count: int, labelled: bool) -> bool:
    return count > FEW and not labelled


def _colors_of_losses(ax: Axes, ends: Array) -> list[Any]:
    """Return a colour for each final loss, bright for low ones, or none if all are alike.

    Losses above every start have the colour of the upper end, as if they were infinite, unless all are.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, LogNorm, Normalize

    first, last = np.where(np.abs(ends) <= HUGE, ends, np.inf).T
    top = first[np.isfinite(first)].max(initial=-HUGE)
    known = last[np.isfinite(last)]
    known = known[known <= top] if (known <= top).any() else known
    if len(known) == 0 or known.min() == known.max():
        return []
    low, high = float(known.min()), float(known.max())
    # Zeros of a converged path have no logarithm.
    norm = LogNorm(low, high) if low > 1 / HUGE and high > 100 * low else Normalize(low, high)
    greys = shades(ax, 2)
    bright = colormaps["viridis_r"](np.linspace(0.0, 1.0, 256))
    seen = [color for color in bright if min(contrast(color[:3], grey) for grey in greys) >= _LEAST]
    colors = ScalarMappable(norm, ListedColormap(seen))
    figure: Any = ax.get_figure()
    figure.colorbar(colors, ax=ax, label="final loss", extend="max" if (last > high).any() else "neither")
    return list(colors.to_rgba(np.minimum(last, high)))
