"""Colours that follow the axes, and the rcParams of a paper, a slide and a dark page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
else:
    Axes = Any

Color = tuple[float, float, float]

# Okabe and Ito's colours, without their yellow: it is lost on white. Seven colours and four dashes have
# no common divisor, so 28 lines go by before a pair returns, and neighbours differ without any colour.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)))

# Fonts of kind 42 are TrueType: publishers refuse matplotlib's usual kind 3.
_SHARED: dict[str, Any] = {"pdf.fonttype": 42, "ps.fonttype": 42, "savefig.dpi": 200}

_STYLES: dict[str, dict[str, Any]] = {
    "paper": {"font.size": 8, "lines.linewidth": 1.2, "lines.markersize": 4, "axes.linewidth": 0.6},
    "slide": {"font.size": 16, "lines.linewidth": 2.5, "lines.markersize": 8, "axes.linewidth": 1.2},
    "dark": {},
}
_WIDTHS = {"paper": 3.4, "slide": 10.0, "dark": 6.4}
_PAGE, _INK = "#16181d", "#e8e8e8"
_DARK: dict[str, Any] = {
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), _PAGE),
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK
    ),
    "legend.labelcolor": _INK,
}


def style(name: str, *, width: float | None = None) -> dict[str, Any]:
    """Return matplotlib's rcParams for a paper, a slide or a dark page.

        height = 0.68 width

    They set the size of the figure and of its fonts and lines, and embed fonts in PDF as TrueType.
    Nothing global is touched: `with matplotlib.rc_context(gd.plot.style("paper")):` sets them for a
    block. Draw and save inside the block, because matplotlib reads some of them only when it saves.

    Args:
        name: "paper" (fonts of 8 points), "slide" (fonts of 16 points) or "dark" (light on dark).
        width: of the figure in inches; None for 3.4 of a paper (one of two columns), 10 of a slide and
            6.4 of a dark page. A column is 3.25 wide at ICML and 3.5 at IEEE, and a page 5.5 at NeurIPS.

    Returns:
        A new dict of rcParams.

    Raises:
        ValueError: there is no style of this name, or `width` is not > 0.

    Example:
        >>> import matplotlib
        >>> with matplotlib.rc_context(gd.plot.style("paper")):
        ...     ax = gd.plot.plot_curves([torch.tensor([3.0, 2.0, 1.0])])
        >>> ax.figure.get_size_inches().tolist()
        [3.4, 2.31]
    """
    if name not in _STYLES:
        raise ValueError(f"style must be one of {', '.join(map(repr, _STYLES))}; got {name!r}")
    inches = _WIDTHS[name] if width is None else float(width)
    if not 0 < inches < np.inf:
        raise ValueError(f"width must be a finite number of inches > 0; got {width!r}")
    size = {"figure.figsize": (inches, round(0.68 * inches, 2))}
    return {**_SHARED, **_STYLES[name], **(_DARK if name == "dark" else {}), **size}


def line_style(i: int, ax: Axes | None = None) -> tuple[Any, Any]:
    """Return the colour and the dashes of line i; the seventh colour is that of the axes' text."""
    color = _COLORS[i % len(_COLORS)]
    is_black = color == "#000000" and ax is not None
    return foreground(ax) if is_black else color, _DASHES[i % len(_DASHES)]


def ordered_colors(ax: Axes, numbers: Sequence[float]) -> list[Any]:
    """Return a colour for each number, by rank: from dark to bright, and away from the background."""
    from matplotlib import colormaps

    levels, ranks = np.unique(np.asarray(numbers, dtype=np.float64), return_inverse=True)
    span = (0.4, 1.0) if is_dark(ax) else (0.0, 0.87)
    return list(colormaps["viridis"](np.linspace(*span, max(2, len(levels)))[ranks]))


def check_colors(colors: Any, labels: Sequence[Any] | None, count: int) -> list[Color]:
    """Return the colours that a user gives to curves, in the order of the curves."""
    from matplotlib.colors import is_color_like, to_rgb

    if isinstance(colors, Mapping):
        if labels is None:
            raise ValueError("colors is a dict by label, but the curves have no labels; give labels")
        if missing := [label for label in labels if label not in colors]:
            known = ", ".join(map(repr, colors))
            raise ValueError(f"colors has no {missing[0]!r}; it has {known}")
        given = [(f"colors[{label!r}]", colors[label]) for label in labels]
    elif isinstance(colors, (list, tuple)):
        if len(colors) != count:
            raise ValueError(f"colors has {len(colors)} entries but curves has {count}; give one for each")
        given = [(f"colors[{i}]", color) for i, color in enumerate(colors)]
    else:
        kind = type(colors).__name__
        raise TypeError(f"colors must be a list or tuple, or a dict label -> colour; got {kind}")
    for name, color in given:
        if not is_color_like(color) or str(color) == "none":
            raise ValueError(f"{name} must be a colour of matplotlib, such as '#0072B2'; got {color!r}")
    return [to_rgb(color) for _, color in given]


def chosen_looks(colors: Sequence[Color]) -> list[tuple[Any, Any]]:
    """Return colours and dashes of lines: solid, but for a colour that comes again."""
    return [(color, _DASHES[colors[:i].count(color) % len(_DASHES)]) for i, color in enumerate(colors)]


def foreground(ax: Any) -> Any:
    return ax.xaxis.label.get_color()


def background(ax: Any) -> Color:
    from matplotlib.colors import to_rgb

    faces = (ax.get_facecolor(), ax.get_figure().get_facecolor())
    return next((to_rgb(face) for face in faces if face[-1] > 0), (1.0, 1.0, 1.0))


def is_dark(ax: Any) -> bool:
    red, green, blue = background(ax)
    return 0.3 * red + 0.59 * green + 0.11 * blue < 0.5


def faint(ax: Any, share: float) -> Color:
    """Return the background with a share of the foreground."""
    return mixed(background(ax), foreground(ax), share)


def ink(ax: Any, color: Any) -> Color:
    """Return a colour with more contrast, for thin strokes: orange on white cannot be read."""
    return mixed(color, foreground(ax), 0.35)


def halo(color: Any, width: float = 2.5) -> list[Any]:
    """Return path effects that set a text or a mark off from the lines under it."""
    from matplotlib.patheffects import Normal, Stroke

    return [Stroke(linewidth=width, foreground=color), Normal()]


def font_size() -> float:
    """Return the size of the text in points."""
    from matplotlib import rcParams

    return float(rcParams["font.size"])


def mixed(one: Any, two: Any, share: float) -> Color:
    from matplotlib.colors import to_rgb

    pairs = zip(to_rgb(one), to_rgb(two), strict=True)
    red, green, blue = ((1 - share) * first + share * second for first, second in pairs)
    return red, green, blue
