"""Moving pictures of runs, from axes on which they are drawn."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from .._errors import check_choice, check_int, missing_extra, warn
from . import _axes, _moving
from ._axes import Array, Axes
from ._movie import Gif, Page
from ._moving import Line

_KINDS = {".gif": Gif, ".html": Page}
_LARGEST = 2_000_000  # bytes of a file
_LOWEST = 30.0  # dots per inch: below, nothing can be read
_SHORTEST = 20  # milliseconds of a frame: browsers slow shorter ones down


def animate(
    ax: Axes | Sequence[Axes],
    path: str | Path,
    *,
    frames: int = 100,
    seconds: float = 6.0,
    hold: float = 2.0,
    spacing: str = "linear",
    lines: Sequence[Any] = (),
    dpi: float | None = None,
) -> Path:
    """Write a GIF or an HTML page in which the paths or curves of a picture grow, step by step.

    The picture is the whole figure, as `ax.figure.savefig` draws it at this resolution. Lines, marks and
    bands of the axes grow, and the mark at the end of a path travels along it. All else stands still from
    the first frame to the last: limits, contours, names and legend. So a run that diverges leaves the view
    where it does in the picture, and the last frame is the picture.

    The steps are those on which the axes were drawn: points of a path, or the x of curves. Several axes
    arrive together, each after the same share of its own steps. A frame in which nothing new would appear
    is left out, and the one before it stands longer.

    A GIF has 255 colours, chosen from the picture, and repeats without end. A page has all colours, a
    slider and a button, needs no network, and plays once unless its reader prefers less motion. Either is
    a file of at most 2 MB: a larger one is made again with fewer dots, with a warning.

    Nothing global is touched. The figure is left as it was.

    Args:
        ax: Axes on which `plot_descent`, `plot_landscape`, `plot_curves` or `plot_rate` has drawn, or a
            list or tuple of those of one figure. The losses beside a landscape are `ax.figure.axes[-1]`.
        path: the file to write, which ends in .gif or .html. Its folder must exist.
        frames: how many at most, from 2 to 100.
        seconds: from the first frame to the last. A frame takes 0.02 at least.
        hold: seconds that the last frame of a GIF stands before it starts again.
        spacing: of the frames, "linear" for equal numbers of steps between them, or "log" for a geometric
            sequence of steps after the first frame, which shows the start.
        lines: matplotlib's Line2D of your own in these axes, that grow as well: point i is step i. With
            `markevery=[-1]` a line has its marker at its head.
        dpi: dots per inch; None for those of the figure.

    Returns:
        The path.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        TypeError: `ax` is no Axes nor a list or tuple of them, or one of `lines` is no Line2D.
        ValueError: `path` ends otherwise, nothing in the axes moves, they are of several figures, `frames`,
            `seconds`, `hold`, `spacing` or `dpi` is out of its range, or the file would have over 2 MB
            even at 30 dots per inch.

    Example:
        >>> import pathlib, tempfile
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> ax = gd.plot.plot_curves({"SGD": 0.8 ** torch.arange(12.0)})
        >>> file = gd.plot.animate(ax, folder / "run.gif", frames=6, dpi=40)
        >>> file.name, file.stat().st_size < 2e6
        ('run.gif', True)
    """
    file = Path(path)
    if file.suffix not in _KINDS:
        raise ValueError(f"path must end in {' or '.join(_KINDS)}; got {file.name!r}")
    check_int("frames", frames, 2, 100)
    check_choice("spacing", spacing, ("linear", "log"))
    length, rest = _positive("seconds", seconds), _positive("hold", hold)
    several = _check_axes(ax)
    mine = _check_lines(lines, several)
    groups = [_moving.moving(one) for one in several]
    for line in mine:
        group = next(group for one, group in zip(several, groups, strict=True) if line.axes is one)
        group.append(Line(line, np.arange(len(line.get_xdata(orig=True)))))
    clocks = [_clock(group) for group in groups]
    if not any(len(clock) > 1 for clock in clocks):
        raise ValueError(
            "nothing in the axes moves; draw paths or curves of two steps or more with plot_descent, "
            "plot_landscape, plot_curves or plot_rate, or give lines"
        )
    shares, places = _times(clocks, frames, spacing)
    waits = np.diff([*places, frames - 1]) * 1000 * length / (frames - 1)
    waits[-1] += 1000 * rest
    milliseconds = [max(_SHORTEST, round(wait)) for wait in waits.tolist()]
    figure: Any = several[0].get_figure(root=True)
    about = figure.get_suptitle().replace("\n", " ") or several[0].get_title()
    usual = figure.dpi if dpi is None else _positive("dpi", dpi)

    def content(dots: float) -> bytes:
        film = _film(figure, groups, clocks, shares, dots, _KINDS[file.suffix])
        return film.encode(milliseconds, about)

    file.write_bytes(_small_enough(content, usual, file.name))
    return file


def _small_enough(content: Callable[[float], bytes], usual: float, name: str) -> bytes:
    """Return a file's content at the usual resolution, or at the first that makes it small enough."""
    dots, made = usual, content(usual)
    while (size := len(made)) > _LARGEST:
        smaller = min(0.9, 0.95 * (_LARGEST / size) ** 0.5) * dots
        if smaller < _LOWEST:
            raise ValueError(
                f"{name} would have {size / 1e6:.1f} MB at {dots:.0f} dots per inch, and 2 is the most; "
                "give fewer frames or a smaller figure"
            )
        dots, made = smaller, content(smaller)
    if dots < usual:
        warn(f"{name} has {dots:.0f} dots per inch instead of {usual:g}, for 2 MB at most")
    return made


def _positive(name: str, value: Any) -> float:
    number = _axes.to_number(name, value)
    if number <= 0:
        raise ValueError(f"{name} must be > 0; got {value!r}")
    return number


def _check_axes(ax: Any) -> list[Axes]:
    try:
        from matplotlib.axes import Axes as AnyAxes
    except ModuleNotFoundError as error:
        raise missing_extra("gdfunc.plot", "matplotlib", "plot") from error
    several = list(ax) if isinstance(ax, (list, tuple)) else [ax]
    for one in several:
        if not isinstance(one, AnyAxes):
            raise TypeError(f"ax must be an Axes, or a list or tuple of them; got {type(one).__name__}")
    figures = len({id(one.get_figure(root=True)) for one in several})
    if figures != 1:
        raise ValueError(f"ax must hold axes of one figure; got {len(several)} axes of {figures} figures")
    return several


def _check_lines(lines: Any, several: list[Axes]) -> list[Any]:
    from matplotlib.lines import Line2D

    for i, line in enumerate(_axes.check_list("lines", lines)):
        if not isinstance(line, Line2D):
            raise TypeError(f"lines[{i}] must be a Line2D of matplotlib; got {type(line).__name__}")
        if not any(line.axes is one for one in several):
            raise ValueError(f"lines[{i}] is not in ax; give the axes that hold it, too")
    return list(lines)


def _clock(group: list[Line]) -> Array:
    """Return the steps at which something appears in axes."""
    steps = np.unique(np.concatenate([np.empty(0), *(item.steps for item in group)]))
    return steps[np.isfinite(steps)]


def _reached(clock: Array, share: float) -> float:
    """Return the step after a share of the steps."""
    if share >= 1 or len(clock) < 2:
        return np.inf
    return clock[0] + (share + 1e-9) * (clock[-1] - clock[0])


def _times(clocks: list[Array], frames: int, spacing: str) -> tuple[list[float], list[int]]:
    """Return the shares of the steps at which frames with something new are taken, and their places."""
    shares = np.linspace(0, 1, frames)
    if spacing == "log":
        firsts = [(clock[1] - clock[0]) / (clock[-1] - clock[0]) for clock in clocks if len(clock) > 1]
        shares = np.append(0, np.geomspace(min(firsts), 1, frames - 1))
        shares[-1] = 1.0
    chosen: list[int] = []
    before: Any = None
    for i, share in enumerate(shares):
        shown = [int((clock <= _reached(clock, share)).sum()) for clock in clocks]
        if shown != before:
            chosen.append(i)
        before = shown
    return shares[chosen].tolist(), chosen


def _film(
    figure: Any, groups: list[list[Line]], clocks: list[Array], shares: list[float], dpi: float, kind: Any
) -> Gif | Page:
    """Draw all frames."""
    with _studio(figure, dpi) as photograph:
        still = photograph()
        film: Gif | Page = kind(still)
        with ExitStack() as stack:
            stack.enter_context(_still_layout(figure))
            for item in itertools.chain(*groups):
                item.begin()
                stack.callback(item.end)
            for share in shares[:-1]:
                for group, clock in zip(groups, clocks, strict=True):
                    for item in group:
                        item.show(_reached(clock, share))
                film.add(photograph())
        film.add(still)
    return film


@contextmanager
def _studio(figure: Any, dpi: float) -> Iterator[Callable[[], Array]]:
    """Give the figure a canvas of pixels and a resolution for a while, and return what draws it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas, usual = figure.canvas, figure.dpi
    # A layout begins at the places that the layout before it has found, so these are restored, too.
    places = [
        (ax, which, ax.get_position(original=which == "original").frozen())
        for ax in figure.axes
        for which in ("original", "active")
    ]
    page = FigureCanvasAgg(figure)
    figure.dpi = dpi

    def photograph() -> Array:
        page.draw()
        pixels = np.asarray(page.buffer_rgba())
        ink = pixels[..., 3:].astype(np.uint16)  # a page without a colour is white
        return ((pixels[..., :3] * ink + 255 * (255 - ink) + 127) // 255).astype(np.uint8)

    try:
        yield photograph
    finally:
        for ax, which, place in places:
            in_layout = ax.get_in_layout()
            ax.set_position(place, which=which)  # takes the axes out of the layout
            ax.set_in_layout(in_layout)
        figure.dpi = usual
        figure.set_canvas(canvas)


@contextmanager
def _still_layout(figure: Any) -> Iterator[None]:
    """Keep axes and legends where they are for a while, although lines in them are shorter."""
    from matplotlib.legend import Legend

    engine = figure.get_layout_engine()
    # Code 0 is the best place. matplotlib has no public getter of it.
    free = [legend for legend in figure.findobj(Legend) if getattr(legend, "_loc", None) == 0]
    try:
        figure.set_layout_engine("none")
        for legend in free:
            anchor, place = legend.get_bbox_to_anchor(), legend.get_window_extent()
            legend.set_loc(tuple((place.p0 - anchor.p0) / anchor.size))
        yield
    finally:
        for legend in free:
            legend.set_loc("best")
        if engine is not None:
            figure.set_layout_engine(engine)
