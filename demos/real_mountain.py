"""Gradient descent down a real mountain: where 256 runs end, and whether momentum or Adam ends lower.

The mountain is matplotlib's elevation map of Jacksboro fault, Tennessee: 344 × 403 heights in whole metres,
about 93 m apart from south to north and 74 m from west to east. A grid of heights has no gradient, so they
are first averaged by a Gaussian whose σ is 3 cells, and then are the coefficients of a cubic B-spline. That
has two continuous derivatives, and smooths as if σ were 3.06 cells: hollows and ridges that are narrower
than about 500 m are lost. A run has arrived where the slope is below 1e-6. Its place is in km, and so is
the height, so that the gradient is the slope and the lr is in km. A run that leaves the map ends where it
left.

Each method runs with six learning rates from each of the starts, which are an even grid. The one whose runs
end lowest, in the mean, is drawn.

Source: the idea of the picture is that of every lecture on gradient descent, "walk down the mountain". The
map is matplotlib's `jacksboro_fault_dem.npz`; `gd.problems.elevation` is the same map without smoothing.

    python demos/real_mountain.py [--out DIR] [--fast]
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from _card import Card
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LightSource, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor
from torch.func import grad, jacrev, vmap
from torch.nn.functional import conv2d, pad

import gdfunc as gd

CELL = 6371.0 * math.radians(1 / 1200)  # km from row to row
LATITUDE = 36.59  # of the middle of the map, in degrees
SPACING = (CELL * math.cos(math.radians(LATITUDE)), CELL)  # km between columns, and between rows
SIGMA = 3.0  # cells
FLAT = 1e-6  # the slope at which a run has arrived
SAME = 0.05  # km: ends that are nearer to each other are one
FACTORS = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)  # of the lr, times 1/L for the methods that follow the slope
METHODS = {
    "descent": gd.chain(),
    "momentum 0.9": gd.momentum(0.9),
    "Adam": gd.adam(),
}
ADAM_LR = 0.05  # km: times the factors
COLOURS = {"descent": "#D55E00", "momentum 0.9": "#0072B2", "Adam": "#009E73"}
GROUND = LinearSegmentedColormap.from_list(
    "ground", ["#e3f0d8", "#eeeac4", "#e6cf9c", "#cfa678", "#a97c58"]
)
QUESTION = "Where does gradient descent end on a real mountain?"
COMPARISON = "Do momentum and Adam end lower?"


class Mountain:
    """A cubic B-spline: place (east, north) in km -> height in km.

    Attributes:
        coefficients: [rows, columns], from south to north and from west to east.
        low, high: the south-west and the north-east corner, within which the spline is complete.
    """

    def __init__(self, coefficients: Tensor) -> None:
        self.coefficients = coefficients
        rows, columns = coefficients.shape
        self.spacing = torch.tensor(SPACING, dtype=coefficients.dtype)
        self.low = self.spacing
        self.high = self.spacing * torch.tensor([columns - 2, rows - 2])

    def height(self, place: Tensor, batch: None = None) -> Tensor:
        """The height; beyond the map, that of the nearest place on it."""
        rows, columns = self.coefficients.shape
        cells = torch.minimum(torch.maximum(place, self.low), self.high) / self.spacing
        corner = torch.minimum(cells.floor(), torch.tensor([columns - 3, rows - 3]).to(cells))
        u = cells - corner
        weights = torch.stack([(1 - u) ** 3, 3 * u**3 - 6 * u**2 + 4, 3 * (u + u**2 - u**3) + 1, u**3]) / 6
        column, row = corner.to(torch.int64)
        near = torch.arange(-1, 3)
        index = (row + near)[:, None] * columns + (column + near)
        return weights[:, 1] @ self.coefficients.flatten()[index] @ weights[:, 0]

    def inside(self, places: Tensor) -> Tensor:
        return ((places >= self.low) & (places <= self.high)).all(dim=-1)

    def grid(self, columns: int, rows: int) -> Tensor:
        """Places in the middle of columns × rows equal parts of the map, [columns, rows, 2]."""
        shares = [(torch.arange(n, dtype=self.low.dtype) + 0.5) / n for n in (columns, rows)]
        ends = zip(self.low, self.high, shares, strict=True)
        return torch.stack(
            torch.meshgrid([a + (b - a) * share for a, b, share in ends], indexing="ij"), dim=-1
        )

    def steepest_curvature(self, columns: int = 134, rows: int = 114) -> float:
        """The largest modulus of the Hessian's eigenvalues on a grid, in 1/km."""
        hessian = vmap(jacrev(grad(self.height)))(self.grid(columns, rows).flatten(0, 1))
        (a, b), (_, d) = hessian.permute(1, 2, 0)
        return float(((a + d).abs() / 2 + torch.hypot((a - d) / 2, b)).max())


def blur(heights: Tensor, sigma: float) -> Tensor:
    """Average by a Gaussian; the heights at the edge go on beyond it."""
    reach = math.ceil(4 * sigma)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=heights.dtype) / sigma) ** 2)
    kernel = kernel / kernel.sum()
    wide = pad(heights[None, None], (reach,) * 4, mode="replicate")
    return conv2d(conv2d(wide, kernel.reshape(1, 1, 1, -1)), kernel.reshape(1, 1, -1, 1))[0, 0]


def jacksboro() -> Mountain:
    return Mountain(blur(gd.datasets.elevation_map().flip(0) / 1000, SIGMA))


class Walks(NamedTuple):
    """The runs of a method with one learning rate."""

    lr: float
    paths: Tensor  # [N, T + 1, 2]
    lasts: Tensor  # int64 [N]: the last point that is on the map, before the run leaves it
    left: Tensor  # bool [N]
    arrived: Tensor  # bool [N]: on the map, where it is flat
    heights: Tensor  # m [N]: where the run ended or left

    @property
    def ends(self) -> Tensor:
        return self.paths[torch.arange(len(self.paths)), self.lasts]


def walk(mountain: Mountain, method: str, lr: float, starts: Tensor, steps: int) -> Walks:
    """Run from all starts at once."""
    step = gd.make_step(mountain.height, METHODS[method])
    index = gd.full_batch(1, steps)

    def run(start: Tensor) -> Tensor:
        init = step.init(start)
        final, trajectory = gd.train(step, init, None, index, lr, record="params", backend="native")
        return gd.plot.path(trajectory.params, getattr(final, "params", final))

    return look_back(mountain, lr, gd.sweep(run, gd.grid(start=starts)).outputs)


def look_back(mountain: Mountain, lr: float, paths: Tensor) -> Walks:
    """Say how paths ended."""
    inside = mountain.inside(paths).cummin(dim=1).values
    lasts, left = inside.sum(dim=1) - 1, ~inside[:, -1]
    ends = paths[torch.arange(len(paths)), lasts]
    slopes = vmap(grad(mountain.height))(ends).norm(dim=1)
    return Walks(lr, paths, lasts, left, ~left & (slopes < FLAT), 1000 * vmap(mountain.height)(ends))


def hollows(ends: Tensor) -> list[tuple[Tensor, int]]:
    """Gather ends [N, 2] that are at one place: the place and the number of them, the fullest first."""
    found: list[tuple[Tensor, int]] = []
    while len(ends):
        near = (ends - ends[0]).norm(dim=1) < SAME
        found.append((ends[0], int(near.sum())))
        ends = ends[~near]
    return sorted(found, key=lambda hollow: -hollow[1])


def conclusion(runs: int, counts: Sequence[int], left: int) -> str:
    """Say where runs ended, from the numbers of them in each hollow, and of those that left the map."""
    arrived = sum(counts)
    away = f"{left} leave the map, and {runs - arrived - left} never arrive"
    where = f"{arrived} of {runs} runs end in {len(counts)} different hollows"
    if arrived and counts[0] > arrived / 2:
        return f"Gradient descent finds one valley: {where}, {counts[0]} of them in one; {away}"
    most = f", at most {counts[0]} in one" if arrived else ""
    return f"Gradient descent finds no common valley: {where}{most}; {away}"


class Compared(NamedTuple):
    """A method beside plain descent: metres between the ends of runs from one start."""

    metres: float  # the mean; negative is lower
    errors: float  # the same in standard errors
    hollows: int


def compare(walks: Walks, plain: Walks) -> Compared:
    difference = walks.heights - plain.heights
    mean, spread = float(difference.mean()), float(difference.std()) / math.sqrt(len(difference))
    ends = len(hollows(walks.ends[walks.arrived]))
    return Compared(mean, mean / spread if spread else 0.0, ends)


def comparison(compared: dict[str, Compared], plain: int) -> str:
    """Say which methods end lower than descent, which has so many hollows."""
    parts = []
    for name, (metres, errors, ends) in compared.items():
        word = (
            "as high" if abs(errors) < 3 else f"{abs(metres):.0f} m {'lower' if metres < 0 else 'higher'}"
        )
        verb = "" if parts else "ends "
        parts.append(f"{name} {verb}{word} ({abs(errors):.1f} standard errors, {ends} hollows)")
    return f"Compared with descent ({plain} hollows), {', '.join(parts)}"


def draw_relief(ax: Axes, mountain: Mountain) -> ScalarMappable:
    """Draw the map in light colours, lit from the north-west, so that dark paths show on it."""
    heights = 1000 * vmap(vmap(mountain.height))(mountain.grid(401, 342)).mT.numpy()
    east, north = (1000 * step for step in SPACING)
    colours = ScalarMappable(Normalize(heights.min(), heights.max()), GROUND)
    # Rows go northwards here, and the light of matplotlib comes from the top of an image.
    shaded = LightSource(azdeg=315, altdeg=45).shade_rgb(
        colours.to_rgba(heights[::-1])[..., :3],
        heights[::-1],
        vert_exag=2,
        dx=east,
        dy=north,
        blend_mode="soft",
    )
    (west, south), (right, top) = mountain.low.tolist(), mountain.high.tolist()
    ax.imshow(shaded, extent=(west, right, south, top), aspect="equal", interpolation="bilinear")
    return colours


def draw_map(mountain: Mountain, walks: Walks) -> Figure:
    figure = Figure((8, 8.15), layout="constrained")
    ax = figure.subplots()
    colours = draw_relief(ax, mountain)
    for path, last in zip(walks.paths, walks.lasts, strict=True):
        ax.plot(*path[: int(last) + 1].T, color="#12355b", linewidth=1.1, solid_capstyle="round")
    ax.plot(*walks.paths[:, 0].T, ".", color="#12355b", markersize=3)
    ends, away = walks.ends, walks.left
    found = hollows(ends[walks.arrived])
    if found:
        places, counts = torch.stack([place for place, _ in found]), [12 * count for _, count in found]
        ax.scatter(*places.T, s=counts, color="#c8102e", edgecolor="white", linewidth=0.6, zorder=5)
    ax.plot(*ends[away].T, "x", color="black", markersize=6, markeredgewidth=1.6, zorder=6, clip_on=False)
    ax.set(xlabel="km to the east", ylabel="km to the north")
    ax.set_title(
        "red: where runs end, area by their number    ×: where they leave the map    · start",
        loc="left",
        fontsize=9,
        color="0.3",
    )
    figure.colorbar(colours, ax=ax, label="altitude, m", aspect=40, pad=0.01, shrink=0.9)
    return figure


def draw_walk(mountain: Mountain, walks: Walks) -> tuple[Axes, list[Line2D]]:
    """Draw all runs with a mark at the head of each, for a picture that moves."""
    figure = Figure((7, 6.6), layout="constrained")
    ax = figure.subplots()
    draw_relief(ax, mountain)
    head = {"marker": "o", "markevery": [-1], "markersize": 5, "color": "#12355b", "linewidth": 0.9}
    head |= {"markerfacecolor": "#c8102e", "markeredgecolor": "white", "markeredgewidth": 0.6}
    lines = [
        line
        for path, last in zip(walks.paths, walks.lasts, strict=True)
        for line in ax.plot(*path[: int(last) + 1].T, **head)
    ]
    ax.set(xlabel="km to the east", ylabel="km to the north")
    steps = walks.paths.shape[1] - 1
    ax.set_title(f"{len(lines)} runs of gradient descent, {steps:,} steps", loc="left", fontsize=10)
    return ax, lines


def draw_comparison(best: dict[str, Walks]) -> Figure:
    """Draw how much higher than descent's each method's end is, start by start, in order."""
    figure = Figure((7.2, 4.6), layout="constrained")
    ax = figure.subplots()
    plain = best["descent"]
    share = (np.arange(len(plain.heights)) + 0.5) / len(plain.heights)
    for name, walks in best.items():
        difference = (walks.heights - plain.heights).sort().values
        left, style = f"{int(walks.left.sum())} left the map", "-"
        if name == "descent":
            style = "--"
        else:
            low, high = (float((sign * difference > 1).double().mean()) for sign in (-1, 1))
            left = f"{low:.0%} lower, {high:.0%} higher by 1 m or more; {left}"
        text = f"{name}, lr {1000 * walks.lr:.0f} m: {left}"
        ax.plot(share, difference, style, color=COLOURS[name], linewidth=2.2, label=text)
    ax.set(xlabel="share of the starts", ylabel="altitude of the end − descent's, m", xlim=(0, 1))
    ax.grid(color="0.9")
    ax.legend(fontsize=9, frameon=False, loc="lower right")
    return figure


def show(card: Card, side: int, factors: Sequence[float], steps: int) -> None:
    mountain = jacksboro()
    starts = mountain.grid(side, side).flatten(0, 1)
    curvature = mountain.steepest_curvature()
    flat = vmap(mountain.height)(mountain.grid(401, 342).flatten(0, 1))
    print(
        f"{len(starts)} starts; L = {curvature:.2f}/km; altitudes {flat.min():.3f} to {flat.max():.3f} km"
    )
    print("method           lr, m  mean end, m  hollows  arrived  left the map  on the way")
    best: dict[str, Walks] = {}
    rows = []
    for name in METHODS:
        for factor in factors:
            lr = factor * (ADAM_LR if name == "Adam" else 1 / curvature)
            walks = walk(mountain, name, lr, starts, steps)
            ends, arrived, left = len(hollows(walks.ends[walks.arrived])), walks.arrived, walks.left
            row = (name, 1000 * lr, float(walks.heights.mean()), ends, int(arrived.sum()), int(left.sum()))
            rows.append((*row, len(starts) - row[4] - row[5]))
            print(
                "{:14} {:7.0f}  {:11.1f}  {:7}  {:7}  {:12}  {:10}".format(*rows[-1]),
                flush=True,
            )
            if name not in best or walks.heights.mean() < best[name].heights.mean():
                best[name] = walks
    plain = best["descent"]
    found = hollows(plain.ends[plain.arrived])
    counts, left = [count for _, count in found], int(plain.left.sum())
    card.picture(
        "map",
        draw_map(mountain, plain),
        conclusion(len(starts), counts, left),
        {"hollows": len(counts), "largest": counts[:1], "arrived": sum(counts), "left": left},
    )
    ax, lines = draw_walk(mountain, plain)
    card.motion("map", ax, lines=lines, frames=8 if card.fast else 100, spacing="log", dpi=80)
    compared = {name: compare(walks, plain) for name, walks in best.items() if name != "descent"}
    said = comparison(compared, len(counts))
    numbers = {name: result._asdict() for name, result in compared.items()}
    card.picture("altitudes", draw_comparison(best), said, numbers, question=COMPARISON)
    card.table(
        "methods", ["method", "lr, m", "mean end, m", "hollows", "arrived", "left", "on the way"], rows
    )
    places = [(*place.tolist(), 1000 * float(mountain.height(place)), count) for place, count in found]
    card.table("hollows", ["east, km", "north, km", "altitude, m", "runs"], places)


def main(argv: Sequence[str] | None = None) -> int:
    with Card(__file__, QUESTION, argv) as card:
        if card.fast:
            show(card, side=6, factors=(0.8,), steps=1000)
        else:
            show(card, side=16, factors=FACTORS, steps=2000)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
