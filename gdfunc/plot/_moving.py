"""Artists that grow with the steps of a run. Each carries how it moves, as its `gdfunc_moving`."""

from __future__ import annotations

from typing import Any

import numpy as np

from ._axes import Array, Axes


class Line:
    """A line or marks, of which each point appears at its step."""

    def __init__(self, artist: Any, steps: Any) -> None:
        self.artist, self.steps = artist, np.asarray(steps, dtype=np.float64)

    def begin(self) -> None:
        self.whole = self.artist.get_data(orig=True)
        if len(self.whole[0]) != len(self.steps):
            raise ValueError(
                f"a line of {len(self.steps)} steps has {len(self.whole[0])} points since its data was "
                "set again; animate the axes as the plot function drew them"
            )

    def show(self, step: float) -> None:
        seen = self.steps <= step
        x, y = (np.asarray(values) for values in self.whole)
        self.artist.set_data(x[seen], y[seen])

    def end(self) -> None:
        self.artist.set_data(*self.whole)


class Head(Line):
    """A mark at the end of a path, which travels along the path."""

    def __init__(self, artist: Any, points: Array) -> None:
        super().__init__(artist, np.arange(len(points)))
        self.points = points

    def begin(self) -> None:
        self.whole = self.artist.get_data(orig=True)

    def show(self, step: float) -> None:
        last = int(np.searchsorted(self.steps, step, side="right")) - 1
        x, y = self.points[max(0, last)]
        self.artist.set_data([x], [y])


class Area(Line):
    """Polygons, of which each corner appears at its step."""

    def __init__(self, artist: Any, polygons: list[Array], steps: list[Array]) -> None:
        super().__init__(artist, np.concatenate([*steps, np.empty(0)]))
        self.polygons, self.parts = polygons, steps

    def begin(self) -> None:
        pass

    def show(self, step: float) -> None:
        pairs = zip(self.polygons, self.parts, strict=True)
        self.artist.set_verts([polygon[steps <= step] for polygon, steps in pairs])

    def end(self) -> None:
        self.artist.set_verts(self.polygons)


def grow(artist: Any, steps: Any) -> None:
    """Remember that the points of a line appear at these steps; -inf for those that are always there."""
    artist.gdfunc_moving = Line(artist, steps)


def travel(artist: Any, points: Array) -> None:
    """Remember that a mark goes along these points, one a step."""
    artist.gdfunc_moving = Head(artist, points)


def fill(artist: Any, polygons: list[Array], steps: list[Array]) -> None:
    """Remember that the corners of polygons appear at these steps."""
    artist.gdfunc_moving = Area(artist, polygons, steps)


def moving(ax: Axes) -> list[Line]:
    """Return what moves in the axes."""
    found = [getattr(artist, "gdfunc_moving", None) for artist in ax.get_children()]
    return [item for item in found if item is not None]
