"""Maps of a sweep by the outcome of its runs."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from .._sweep._result import SweepResult
from . import _axes, _cells
from ._axes import HUGE, Array, Axes

# From the best to the worst. In grey, too, all are told apart.
_OUTCOMES = ("converged", "still falling", "stalled", "oscillating", "diverged")
_COLORS = ("#0072B2", "#9AD0F5", "#E9E3D0", "#E69F00")
_LOST = len(_COLORS)


def plot_phase(
    result: SweepResult,
    x: str,
    y: str,
    *,
    losses: Any = None,
    ax: Axes | None = None,
    minimum: float = 0.0,
    converged: float = 1e-3,
    change: float = 0.1,
    tail: float = 0.25,
    log_x: bool = False,
    log_y: bool = False,
) -> Axes:
    """Draw a sweep of loss curves as a map of their outcomes.

        e = loss − minimum,  read in the tail, the last quarter of the steps
        diverged: not finite at some step, or median e > e₀
        converged: max e ≤ converged · e₀
        oscillating: e rises again by more than change · median e
        still falling: e falls by more than the share change
        stalled: none of these

    The first outcome that fits is that of a run. A cell shows that of most of its runs, on a tie the worse
    one, and has a cross if its runs differ. Diverged cells are hatched. The legend counts the cells. The
    noise of mini-batches counts as oscillation where it is larger than `change`.

    Args:
        result: of `sweep`, on a grid that is not zipped.
        x: the axis of the grid to draw along x, of numbers or names as in `plot_grid`.
        y: the same along y.
        losses: the curves [N, T] of equally many steps, in the order of the grid's members; None for the
            outputs, which are then such curves.
        ax: where to draw; None for a new figure of the size in rcParams.
        minimum: the least loss possible.
        converged: how small a share of the start the error must stay below.
        change: how large a share counts as a change.
        tail: the share of the steps at the end that decides.
        log_x: logarithmic x. Every x must be a number > 0.
        log_y: logarithmic y.

    Returns:
        The Axes.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        TypeError: result is no SweepResult, or its outputs or the losses are no real numbers.
        ValueError: the grid is zipped or has no such axes, the losses are not one curve a member, or a
            threshold is not > 0, or `tail` not in (0, 1].

    Example:
        >>> steps = torch.arange(50)
        >>> def run(lr, curvature):
        ...     return 0.5 * curvature * (1 - lr * curvature) ** (2 * steps)
        >>> result = gd.sweep(run, gd.grid(lr=[0.01, 0.1, 1.0, 2.0, 3.0], curvature=[1.0, 0.1]))
        >>> ax = gd.plot.plot_phase(result, "lr", "curvature", log_x=True, log_y=True)
        >>> for entry in ax.get_legend().get_texts():
        ...     print(entry.get_text())
        converged (stays below 0.001 of its start): 5 of 10 cells
        still falling: 2 of 10 cells
        stalled: 2 of 10 cells
        diverged: 1 of 10 cells
    """
    across, upward = _cells.sides(result, x, y, log_x, log_y)
    for name, value in (("converged", converged), ("change", change), ("tail", tail)):
        if _axes.to_number(name, value) <= 0:
            raise ValueError(f"{name} must be > 0; got {value!r}")
    if tail > 1:
        raise ValueError(f"tail must be a share of the steps, at most 1; got {tail!r}")
    curves = _curves_of(result, losses) - _axes.to_number("minimum", minimum)
    found = _outcomes(curves, converged, change, tail)
    found = np.where(result.diverged.cpu().numpy(), _LOST, found)
    each = _cells.by_cell(result, x, y, found)
    counts = np.stack([(each == outcome).sum(axis=0) for outcome in range(_LOST + 1)])
    cells = _LOST - counts[::-1].argmax(axis=0)

    ax = _axes.axes_for(ax)

    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.patches import Patch

    _cells.prepare_sides(ax, across, upward)
    shown = np.ma.array(cells, mask=cells == _LOST)
    norm = BoundaryNorm(np.arange(_LOST + 1) - 0.5, _LOST)
    ax.pcolormesh(
        across.edges, upward.edges, shown, norm=norm, cmap=ListedColormap(list(_COLORS)), rasterized=True
    )
    told = {0: f" (stays below {converged:g} of its start)", 3: f" (rises again by > {100 * change:g} %)"}
    entries: list[tuple[Any, str]] = []
    for outcome in np.unique(cells).tolist():
        share = f"{(cells == outcome).sum()} of {cells.size} cells"
        name = f"{_OUTCOMES[outcome]}{told.get(outcome, '')}: {share}"
        if outcome == _LOST:
            entries.append(_axes.hatch_background(ax, name))
        else:
            entries.append((Patch(facecolor=_COLORS[outcome], linewidth=0), name))
    differ = each.min(axis=0) != each.max(axis=0)
    if differ.any():
        rows, columns = np.nonzero(differ)
        mark = _cells.draw_marks(ax, across.centres[columns], upward.centres[rows])
        entries.append((mark, f"{differ.sum()} of {cells.size} cells: their runs differ"))
    _axes.draw_legend(ax, entries)
    return ax


def _curves_of(result: SweepResult, losses: Any) -> Array:
    if losses is None and not isinstance(result.outputs, Tensor):
        raise TypeError("the outputs are a tree; pass one of its leaves, losses=result.outputs.loss")
    curves = _axes.to_array("losses", result.outputs if losses is None else losses)
    if curves.ndim != 2 or len(curves) != len(result.grid) or curves.shape[1] < 2:
        raise ValueError(
            f"losses must be a curve of two or more steps for each of the {len(result.grid)} members; "
            f"got shape {curves.shape}"
        )
    return curves


def _outcomes(errors: Array, converged: float, change: float, tail: float) -> Array:
    """Return the outcome of each curve [N, T], as a position in `_OUTCOMES`."""
    lost = ~(np.abs(errors) <= HUGE).all(axis=1)
    errors = np.where(lost[:, None], 0.0, errors)
    end = errors[:, -max(2, round(tail * errors.shape[1])) :]
    middle, start = np.median(end, axis=1), errors[:, 0]
    rise = (end - np.minimum.accumulate(end, axis=1)).max(axis=1)
    cases = [
        (lost | (middle > start), _LOST),
        (end.max(axis=1) <= converged * start, 0),
        (rise > change * np.abs(middle), 3),
        (end[:, -1] < (1 - change) * end[:, 0], 1),
    ]
    return np.select([case for case, _ in cases], [outcome for _, outcome in cases], 2)
