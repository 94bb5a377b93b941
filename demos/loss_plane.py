"""Planes through the loss of a network, and the true losses of its descent beside them.

A network with 2,410 parameters learns to read handwritten digits, with mini-batches and with all of the
images at once. Its path is projected on two planes through its end: the one in which the path varies most
(principal components), and one of two random directions whose filters have the norms of the network's. The
contours are the loss in the plane. A path does not lie in it, so the loss under its picture is not the
path's own: both are drawn beside the plane. How much of the fall of the loss a plane shows is the ratio of
the two falls.

Sources: H. Li, Z. Xu, G. Taylor, C. Studer, T. Goldstein, "Visualizing the loss landscape of neural nets",
2018. The digits are scikit-learn's.

    python demos/loss_plane.py [--out DIR] [--fast]
"""

import torch
from _card import Card
from matplotlib.figure import Figure
from torch import Tensor

import gdfunc as gd

LR, BATCH = 0.2, 32
SIZES = (64, 32, 10)


def initial_params(key: Tensor) -> dict[str, Tensor]:
    keys = gd.random.split(key, 2)
    first = gd.random.normal(keys[0], SIZES[:2]) / SIZES[0] ** 0.5
    last = gd.random.normal(keys[1], SIZES[1:]) / SIZES[1] ** 0.5
    return {"w1": first, "b1": torch.zeros(SIZES[1]), "w2": last, "b2": torch.zeros(SIZES[2])}


def loss_fn(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    hidden = torch.tanh(x @ params["w1"] + params["b1"])
    return gd.losses.cross_entropy(hidden @ params["w2"] + params["b2"], y)


def train(data: tuple[Tensor, Tensor], epochs: int) -> dict[str, dict[str, Tensor]]:
    """Return the paths of both runs from one start, a point an epoch or a step."""
    init_key, order_key = gd.random.split(gd.random.key(0))
    init, step, n = initial_params(init_key), gd.make_step(loss_fn), len(data[1])
    plans = {
        f"batches of {BATCH}": (gd.epoch_batches(order_key, n, BATCH, epochs), n // BATCH),
        "full batch": (gd.full_batch(n, 10 * epochs), 10),
    }
    paths = {}
    for name, (index, every) in plans.items():
        final, trajectory = gd.train(step, init, data, index, LR, record="params", every=every)
        paths[name] = gd.plot.path(trajectory.params, final)
    return paths


def shown(losses: Tensor, in_plane: Tensor) -> float:
    """Measure how much of the fall of the losses a plane shows."""
    return float((in_plane[0] - in_plane[-1]) / (losses[0] - losses[-1]))


def conclusion(principal: float, random: float) -> str:
    """Compare the shares of the fall of the loss that two planes show."""
    if abs(principal - 1) > 0.2:
        return f"Even the path's own plane shows {principal:.0%} of the fall of the loss"
    if abs(random - 1) <= 0.2:
        return f"Both planes show the fall of the loss: {principal:.0%} and {random:.0%} of it"
    return f"The path's own plane shows {principal:.0%} of the fall of the loss, a random one {random:.0%}"


def draw(
    paths: dict[str, dict[str, Tensor]], data: tuple[Tensor, Tensor], resolution: int
) -> tuple[Figure, list[float]]:
    """Draw both planes, and return how much of the first path's fall of the loss each of them shows."""
    figure, shares = Figure(figsize=(9, 7.2), layout="constrained"), []
    for rows, (name, key) in zip(
        figure.subfigures(2, 1), {"pca": None, "random": gd.random.key(1)}.items(), strict=True
    ):
        ax = rows.subplots()
        gd.plot.plot_landscape(loss_fn, paths, data, directions=name, key=key, resolution=resolution, ax=ax)
        ax.get_legend().remove()
        beside = rows.axes[-1]
        beside.set_xlabel("recorded point")
        beside.set_title("solid: the path, dashed: the plane", loc="left", fontsize=9, color="0.35")
        first, second = (torch.as_tensor(line.get_ydata()) for line in beside.lines[:2])
        shares.append(shown(first, second))
    count = sum(path[0].numel() for path in paths["full batch"].values())
    note = f"a network with {count:,} parameters on {len(data[1]):,} digits; ○ start  ◆ end"
    figure.supxlabel(note, fontsize=8, color="0.35")
    return figure, shares


def main(argv: list[str] | None = None) -> int:
    torch.set_num_threads(1)  # on tensors this small, threads would only wait for one another
    with Card(__file__, "What does a plane through the loss show of a descent?", argv) as card:
        epochs, resolution = (4, 15) if card.fast else (30, 51)
        digits = gd.datasets.digits(dtype=torch.float32)
        data = digits.x, digits.y
        figure, shares = draw(train(data, epochs), data, resolution)
        numbers = dict(zip(("principal", "random"), shares, strict=True))
        card.picture("loss_plane", figure, conclusion(**numbers), numbers)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
