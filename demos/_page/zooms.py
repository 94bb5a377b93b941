"""The map of trainability: which pairs of learning rates train a network, in four windows."""

import base64
from typing import Any

import numpy as np
import trainability
from matplotlib.colors import Colormap, to_hex
from trainability import STEPS, WINDOW, Runs, Window

import gdfunc as gd

from ._encode import encode

POINTS = 120  # networks a side of a window
SIDE = 8  # curves a side of a window: 256 in four windows
WINDOWS = 4
EVERY = 2  # steps of a curve
DECADES = 8.0  # losses are kept from 1e-8 to 1e8 of the first one
SHADES = 128  # of those that learn; as many of the others


def zooms(points: int = POINTS) -> dict[str, Any]:
    """Train all networks, and return them as the page reads them."""
    windows, shown = [WINDOW], []
    for i in range(WINDOWS):
        runs = trainability.run_window(windows[i], points)
        windows.append(trainability.densest(trainability.boundary(runs.converged), windows[i]))
        shown.append(describe(windows[i], windows[i + 1], runs))
    del shown[-1]["inner"]
    return {
        "points": points,
        "side": SIDE,
        "steps": STEPS,
        "every": EVERY,
        "decades": DECADES,
        "enlarged": trainability.ENLARGED,
        "colours": [*palette(trainability.CONVERGED), *palette(trainability.DIVERGED)],
        "windows": shown,
    }


def describe(window: Window, inner: Window, runs: Runs) -> dict[str, Any]:
    shades = base64.b64encode(shades_of(runs).tobytes()).decode()
    losses = curves(window, len(runs.converged))
    with np.errstate(divide="ignore"):
        levels = encode(np.log10(losses) / DECADES)
    return {
        "second": window.second,
        "first": window.first,
        "inner": [fractions(window.second, inner.second), fractions(window.first, inner.first)],
        "shades": shades,
        "share": f"{100 * runs.converged.mean():.0f}\u00a0%",
        "curves": levels,
    }


def shades_of(runs: Runs) -> np.ndarray:
    """Return a byte for each network: its rank among those that learn, or 128 + that among the others."""
    learns = trainability.ranks(runs.to_zero, runs.converged)
    fails = trainability.ranks(-runs.to_infinity, ~runs.converged)
    ranks = np.where(runs.converged, learns, fails)
    return (SHADES * ~runs.converged + np.round((SHADES - 1) * ranks)).astype(np.uint8)


def curves(window: Window, points: int) -> np.ndarray:
    """Return losses over the first one, [SIDE, SIDE, STEPS / EVERY]; cells of a lattice of the map."""
    chosen = lattice(points)
    second, first = (10 ** trainability.centres(ends, points)[chosen] for ends in window)
    result = gd.sweep(trainability.relative_losses, gd.grid(first=first, second=second))
    losses: np.ndarray = result.reshape().numpy()
    return losses[..., ::EVERY]


def lattice(points: int) -> list[int]:
    return [(2 * k + 1) * points // (2 * SIDE) for k in range(SIDE)]


def fractions(outer: tuple[float, float], inner: tuple[float, float]) -> list[float]:
    low, high = outer
    return [(end - low) / (high - low) for end in inner]


def palette(colours: Colormap) -> list[str]:
    return [to_hex(colours(share)) for share in np.linspace(0, 1, SHADES)]
