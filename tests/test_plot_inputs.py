"""Inputs of every plot: a picture, or an error that names the argument, and nothing global is touched."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import gdfunc as gd
from gdfunc import plot, testing

NAN, INF = float("nan"), float("inf")

LOSSES = np.geomspace(5, 1, 8)
GRID = gd.grid(momentum=[0.0, 0.5], lr=[0.01, 0.1, 1.0])
RESULT = gd.sweep(lambda momentum, lr: lr + momentum, GRID)
LRS = np.geomspace(0.01, 1, 8)


def square(params, data=None):
    return (params**2).sum()


def misfit(w, batch):
    return ((w * batch - 3) ** 2).mean()


# Each plot of one input, that input as it should be, and its name.
PLOTS = {
    "curves": (lambda v, ax=None: plot.plot_curves([v], ax=ax), LOSSES, "curves"),
    "runs": (lambda v, ax=None: plot.plot_curves([v], log_y=False, ax=ax), LOSSES.reshape(2, 4), "curves"),
    "windows": (lambda v, ax=None: plot.plot_curves([v], window=3, ax=ax), LOSSES, "curves"),
    "x": (lambda v, ax=None: plot.plot_curves([LOSSES], x=v, log_x=True, ax=ax), np.arange(8), "x"),
    "over": (lambda v, ax=None: plot.plot_curves([v], x=LRS, over="lr", ax=ax), LOSSES, "curves|x"),
    "descent": (
        lambda v, ax=None: plot.plot_descent(square, [v], resolution=9, ax=ax),
        LOSSES.reshape(4, 2),
        "paths",
    ),
    "crowd": (
        lambda v, ax=None: plot.plot_descent(square, [v] * 8, resolution=9, ax=ax),
        LOSSES.reshape(4, 2),
        "paths",
    ),
    "one parameter": (
        lambda v, ax=None: plot.plot_descent(square, [v], resolution=9, ax=ax),
        LOSSES,
        "paths",
    ),
    "minimizers": (
        lambda v, ax=None: plot.plot_descent(
            square, [torch.ones(2, 2)], minimizers=[v], resolution=9, ax=ax
        ),
        np.array([0.1, 0.11]),
        "minimizers",
    ),
    "landscape": (
        lambda v, ax=None: plot.plot_landscape(square, [v], resolution=9, ax=ax),
        np.sin(np.arange(12.0)).reshape(4, 3),
        "paths",
    ),
    "samples": (
        lambda v, ax=None: plot.plot_samples(
            misfit, torch.tensor(2.0, dtype=torch.float64), torch.arange(8.0).double(), at=v, ax=ax
        ),
        LOSSES[:2],
        "at",
    ),
    "grid": (
        lambda v, ax=None: plot.plot_grid(RESULT, "lr", "momentum", values=v, ax=ax),
        LOSSES[:6],
        "values",
    ),
    "logarithmic grid": (
        lambda v, ax=None: plot.plot_grid(RESULT, "lr", "momentum", values=v, log_color=True, ax=ax),
        LOSSES[:6],
        "values",
    ),
    "phase": (
        lambda v, ax=None: plot.plot_phase(RESULT, "lr", "momentum", losses=v, ax=ax),
        np.exp(-np.outer(np.arange(6), np.arange(5))),
        "losses",
    ),
    "sensitivity": (
        lambda v, ax=None: plot.plot_sensitivity({"SGD": (LRS, v)}, ax=ax),
        LOSSES,
        "losses of SGD|SGD",
    ),
    "rate": (
        lambda v, ax=None: plot.plot_rate(v, testing.measure_rate(0.8 ** np.arange(9.0)), ax=ax),
        LOSSES,
        "errors",
    ),
}


def changed(value, position, to):
    value = value.astype(float)
    value[position] = to
    return torch.tensor(value)


KINDS = {
    "float16": lambda v: torch.tensor(v).half(),
    "bfloat16": lambda v: torch.tensor(v).bfloat16(),
    "float64": torch.tensor,
    "NumPy": np.asarray,
    "NumPy float16": lambda v: v.astype(np.float16),
    "needs grad": lambda v: torch.tensor(v, dtype=torch.float64, requires_grad=True),
    "ints": lambda v: torch.tensor(v).ceil().long() if v.dtype.kind == "f" else torch.tensor(v),
    "one NaN": lambda v: changed(v, -1, NAN),
    "first infinite": lambda v: changed(v, 0, INF),
    "all NaN": lambda v: torch.tensor(NAN * v),
    "all infinite": lambda v: torch.tensor(np.full(v.shape, INF)),
    "all −infinite": lambda v: torch.tensor(np.full(v.shape, -INF)),
    "huge": lambda v: torch.tensor(1e300 * v),
    "tiny": lambda v: torch.tensor(1e-310 * v),
    "constant": lambda v: torch.tensor(0 * v + 2.5),
    "zeros": lambda v: torch.tensor(0.0 * v),
    "negative": lambda v: torch.tensor(-1.0 - v),
    "one point": lambda v: torch.tensor(v[:1]),
    "empty": lambda v: torch.tensor(v[:0]),
    "no numbers": lambda v: torch.tensor(v[..., :0]),
    "complex": lambda v: torch.tensor(v).to(torch.complex64),
    "sparse": lambda v: torch.tensor(v).to_sparse(),
    "objects": lambda v: v.astype(object),
    "text": lambda v: "text",
    "nothing": lambda v: None,
}

NEVER = {"empty", "no numbers", "complex", "sparse", "objects", "text", "nothing"}
NOT_FINITE = {"one NaN", "first infinite", "all NaN", "all infinite", "all −infinite"}
FIXED_SIZE = {"one point"}
REFUSED = {
    "x": NEVER - {"nothing"} | NOT_FINITE | FIXED_SIZE | {"negative"},
    "over": NEVER | FIXED_SIZE,
    "descent": NEVER | {"ints"},
    "crowd": NEVER | {"ints"},
    "one parameter": NEVER | {"ints"},
    "minimizers": NEVER | {"ints"} | FIXED_SIZE,
    # They span no plane.
    "landscape": NEVER
    | {"ints", "all NaN", "all infinite", "all −infinite", "huge", "constant", "zeros", "one point"},
    "samples": NEVER - {"nothing"} | NOT_FINITE,
    "grid": NEVER - {"nothing"} | FIXED_SIZE,
    "logarithmic grid": NEVER - {"nothing"} | FIXED_SIZE,
    "phase": NEVER | FIXED_SIZE,
    "sensitivity": NEVER | FIXED_SIZE | {"zeros", "negative"},
    "rate": NEVER | NOT_FINITE | FIXED_SIZE | {"zeros", "negative"},
}


@pytest.mark.long
@pytest.mark.parametrize("name", PLOTS)
@pytest.mark.parametrize("form", KINDS)
def test_every_input_is_drawn_or_refused_by_its_name(name, form):
    draw, value, argument = PLOTS[name]
    given = KINDS[form](value)
    if form in REFUSED.get(name, NEVER):
        with pytest.raises((ValueError, TypeError), match=rf"\b({argument})\b"):
            draw(given)
        return
    ax = draw(given)
    ax.figure.draw_without_rendering()
    assert ax.bbox.height > 0.3 * ax.figure.bbox.height
    assert ax.bbox.width > 0.3 * ax.figure.bbox.width


@pytest.mark.parametrize("name", PLOTS)
@pytest.mark.parametrize("own", [True, False])
def test_no_plot_touches_rcparams_or_open_figures(name, own):
    draw, value, _ = PLOTS[name]
    opened = plt.figure()
    try:
        parameters, figures = dict(matplotlib.rcParams), plt.get_fignums()
        ax = draw(torch.tensor(value), ax=None if own else Figure().add_subplot())
        ax.figure.draw_without_rendering()
        assert dict(matplotlib.rcParams) == parameters
        assert plt.get_fignums() == figures
        assert plt.gcf() is opened
        assert opened.axes == []
    finally:
        plt.close(opened)
