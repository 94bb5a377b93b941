"""Theorems that are equalities, each beside a run that attains it, and a wrong optimizer that is caught.

Most theorems on gradient descent are bounds, and most bounds are so loose that an optimizer with half the
learning rate passes them. Each panel here is an equality: the theorem is a thin black line, the
measurement a circle, and the largest relative difference stands under the title. In a second picture an
optimizer that is wrong meets the same kind of test.

1. The worst convex function for N steps of gradient descent is a Huber function. On it the gap after N
   steps is exactly L·R²/(4N + 2).
2. Heavy ball with Polyak's constants has a double root. Its error is r^t·(1 + (1 − r)·t), not r^t.
3. So has Nesterov's method: its error is (1 − q)^t·(1 + q·t) on the flattest quadratic.
4. The mean square of SGD's error over all plans obeys a recursion. It needs the term that couples the mean
   error and the gradients at the optimum.
5. So does that of SVRG, whose noise vanishes with the error of its snapshot.
6. Adam without the bias correction of v, on chosen gradients, has a picture of its own, with the message of
   the kit of tests.

Sources: Y. Drori, M. Teboulle, "Performance of first-order methods for smooth convex minimization", 2014;
B. T. Polyak, "Some methods of speeding up the convergence of iteration methods", 1964; R. Johnson,
T. Zhang, "Accelerating stochastic gradient descent using predictive variance reduction", 2013. The
equalities 2 to 5 are elementary.

    python demos/theory_against_practice.py [--out DIR] [--fast]
"""

import itertools
import math
import textwrap
from typing import NamedTuple

import numpy as np
import torch
from _card import Card
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter
from torch import Tensor

import gdfunc as gd
from gdfunc import testing as gt

MEASURED, WRONG = "#D55E00", "#0072B2"  # vermilion and blue: told apart by the colour-blind
AGREES = 1e-9  # relative


class Panel(NamedTuple):
    """Measurements beside what a theorem says of them, and a wrong theory or optimizer, if one is drawn."""

    title: str
    x: np.ndarray
    measured: np.ndarray
    theorem: np.ndarray
    xlabel: str
    ylabel: str
    wrong: tuple[str, np.ndarray] | None = None

    @property
    def difference(self) -> float:
        """Return the largest relative difference."""
        return float(np.abs(self.measured / self.theorem - 1).max())

    @property
    def factor(self) -> float:
        """Return by how much what is wrong is largest beside the theorem."""
        return 1.0 if self.wrong is None else float(np.abs(self.wrong[1] / self.theorem).max())


def worst_cases(most: int) -> Panel:
    """Measure gradient descent on the function that is worst for each number of steps, with L = R = 1."""
    n, descent, gaps = np.arange(1, most + 1), gt.from_step(gd.make_step), []
    for steps in range(1, most + 1):
        worst = gt.worst_huber(displacement=steps)
        points, _ = gt.walk(descent, worst, [1.0], 1.0, steps)
        gaps.append(worst.values(points[-1]))
    title = "Gradient descent attains its worst case"
    textbook = "textbook: L R² / 2N", 0.5 / n
    return Panel(title, n, np.array(gaps), 0.5 / (2 * n + 1), "steps N", "gap after N steps", textbook)


def heavy_ball(steps: int, mu: float = 0.04) -> Panel:
    """Measure Polyak's heavy ball at μ, with L = 1."""
    q = mu**0.5
    r = (1 - q) / (1 + q)
    ball = gt.from_step(lambda loss_fn: gd.methods.heavy_ball(loss_fn, r**2))
    points, _ = gt.walk(ball, gt.Quadratic((mu,)), [1.0], (1 + r) ** 2, steps)
    t = np.arange(steps + 1)
    exact, alone = r**t * (1 + (1 - r) * t), ("spectral radius alone", r**t)
    title = "Heavy ball has a double root"
    return Panel(title, t, points[:, 0], exact, "step t", "x at curvature μ", alone)


def nesterov(steps: int, mu: float = 0.04) -> Panel:
    """Measure Nesterov's method at μ, with L = 1."""
    q = mu**0.5
    method = gt.from_step(
        lambda loss_fn: gd.methods.nesterov(loss_fn, (1 - q) / (1 + q)), result=lambda state: state.position
    )
    _, answers = gt.walk(method, gt.Quadratic((mu,)), [1.0], 1.0, steps)
    t = np.arange(steps + 1)
    exact, alone = (1 - q) ** t * (1 + q * t), ("rate alone", (1 - q) ** t)
    return Panel("So has Nesterov's method", t, answers[:, 0], exact, "step t", "x at curvature μ", alone)


class Sum(NamedTuple):
    """Three quadratics fᵢ(x) = ½(aᵢᵀx − bᵢ)² + ρ/2·‖x‖² in two dimensions."""

    data: tuple[Tensor, Tensor]
    ridge: float = 0.25

    def loss_fn(self, x: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        a, b = batch
        return 0.5 * (a @ x - b).square().mean() + 0.5 * self.ridge * x.square().sum()

    @property
    def hessians(self) -> np.ndarray:
        """Return Hᵢ, [3, 2, 2]."""
        a = self.data[0].numpy()
        return a[:, :, None] * a[:, None, :] + self.ridge * np.eye(2)

    @property
    def minimizer(self) -> np.ndarray:
        """Return x*."""
        a, b = (leaf.numpy() for leaf in self.data)
        return np.linalg.solve(self.hessians.mean(0), (a * b[:, None]).mean(0))


def three_quadratics() -> Sum:
    """Return the sum, whose Hessians and gradients at the optimum correlate."""
    a = torch.tensor([[1.0, 0.5], [-0.5, 1.5], [1.25, 0.25]], dtype=torch.float64)
    return Sum((a, torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)))


def all_plans(steps: int) -> Tensor:
    """Return every sequence of samples that there is, [3^T, T]."""
    return torch.tensor(list(itertools.product(range(3), repeat=steps)))


def mean_square(points: Tensor, problem: Sum) -> float:
    """Return the mean of ‖x − x*‖² over the plans."""
    return float(((points.numpy() - problem.minimizer) ** 2).sum(1).mean())


START = torch.tensor([2.0, -1.5], dtype=torch.float64)
LR = 0.3


def sgd(most: int) -> Panel:
    """Average SGD's squared error over all plans, and follow its recursion."""
    problem = three_quadratics()
    step, start = gd.make_step(problem.loss_fn), START
    measured = []
    for steps in range(1, most + 1):
        plans = all_plans(steps)[:, :, None]
        finals = torch.func.vmap(lambda index: gd.train(step, start, problem.data, index, LR)[0])(plans)
        measured.append(mean_square(finals, problem))
    a, b = (leaf.numpy() for leaf in problem.data)
    h = problem.hessians
    noise = h @ problem.minimizer - a * b[:, None]
    shrink, e = np.eye(2) - LR * h, start.numpy() - problem.minimizer
    moments = {"exact": np.outer(e, e), "without": np.outer(e, e)}
    m, exact, without = e, [], []
    for _ in range(most):
        for name in moments:
            s = (shrink @ moments[name] @ shrink).mean(0)
            s = s + LR**2 * (noise[:, :, None] * noise[:, None, :]).mean(0)
            if name == "exact":
                cross = ((shrink @ m)[:, :, None] * noise[:, None, :]).mean(0)
                s = s - LR * (cross + cross.T)
            moments[name] = s
        m = shrink.mean(0) @ m
        exact.append(np.trace(moments["exact"]))
        without.append(np.trace(moments["without"]))
    t = np.arange(1, most + 1)
    title = "SGD over every plan there is"
    return Panel(
        title,
        t,
        np.array(measured),
        np.array(exact),
        "step t",
        "mean of ‖x − x*‖²",
        ("without the cross term", np.array(without)),
    )


def svrg(plain: Panel) -> Panel:
    """Average SVRG's squared error over all plans of one pass, and follow its recursion, beside SGD."""
    problem, measured, most = three_quadratics(), [], len(plain.x)
    step = gd.methods.svrg(problem.loss_fn, problem.data)
    for steps in range(1, most + 1):
        plans = all_plans(steps)[:, None]
        finals = torch.func.vmap(
            lambda rows: gd.train(step, step.init(START), torch.arange(3), rows, LR)[0]
        )(plans)
        measured.append(mean_square(finals, problem))
    h = problem.hessians
    mean, shrink, e = h.mean(0), np.eye(2) - LR * h, START.numpy() - problem.minimizer
    pull = LR * (h - mean) @ e
    m, s, exact = e, np.outer(e, e), []
    for _ in range(most):
        cross = ((shrink @ m)[:, :, None] * pull[:, None, :]).mean(0)
        s = (shrink @ s @ shrink).mean(0) + (pull[:, :, None] * pull[:, None, :]).mean(0) + cross + cross.T
        m = shrink.mean(0) @ m
        exact.append(np.trace(s))
    t = np.arange(1, most + 1)
    wrong = ("SGD, same lr", plain.measured)
    title = "SVRG over every plan there is"
    return Panel(title, t, np.array(measured), np.array(exact), "inner step t", "mean of ‖x − x*‖²", wrong)


def caught() -> tuple[Panel, str]:
    """Feed chosen gradients to Adam and to one without a correction; return the kit's message."""
    claim = gt.Adam((0.9, 0.999))
    control = gt.WRONG["adam: bias correction of v missing"]
    wrong = control.build(claim, control.fault)
    grads = torch.tensor(
        [1.0, 1.0, 1.0, -1.0, 1.0, 0.5, 0.25, 1.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64
    )
    right = gt.from_transform(gd.adam())
    moves = [-gt.feed(subject, grads).numpy() for subject in (right, wrong)]
    t = np.arange(1, len(grads) + 1)
    exact = -claim.moves([grads.numpy()], [np.zeros(len(grads))], np.ones(len(grads)))[0]
    try:
        gt.check_optimizer(wrong, claim)
    except gt.LawBroken as broken:
        message = str(broken)
    else:
        message = "nothing was found"
    panel = Panel(
        "Adam on chosen gradients",
        t,
        moves[0],
        exact,
        "step t",
        "−move on chosen gradients",
        (control.fault, moves[1]),
    )
    return panel, message


def conclusion(differences: dict[str, float]) -> str:
    """Say how many theorems hold, and to which power of ten, from the largest relative differences."""
    holding = sum(difference < AGREES for difference in differences.values())
    bound = power_above(max(differences.values()))
    if holding == len(differences):
        return (
            f"Theorems that are equalities hold to the last digits: {holding} runs attain theirs to {bound}"
        )
    return (
        f"Only {holding} of {len(differences)} runs attain what theorems say: the farthest is {bound} off"
    )


def caught_conclusion(fault: str, difference: float, factor: float, is_named: bool) -> str:
    """Say whether a fault is found, how far it goes astray, and how near the right optimizer is."""
    found = "is caught, and named" if is_named else "is not caught"
    right = "agrees" if difference < AGREES else "does not agree either,"
    steps = f"its steps are up to {factor:.0f} times too long"
    return f"Adam ({fault}) {found}: {steps}, where Adam itself {right} to {power_above(difference)}"


def power_above(difference: float) -> str:
    return f"1e{math.ceil(math.log10(difference))}" if difference else "0"


def names(message: str, fault: str) -> bool:
    """Tell whether the diagnosis of a message is this fault."""
    return any(fault in line for line in message.splitlines() if "diagnosis" in line)


def draw_panel(ax: Axes, panel: Panel, *, log: bool) -> None:
    """Draw a theorem as a line, its measurement as circles, and what is wrong dashed."""
    ax.plot(panel.x, panel.theorem, color="black", linewidth=1, label="theorem")
    ax.plot(
        panel.x, panel.measured, "o", color=MEASURED, markersize=4.5, fillstyle="none", label="measured"
    )
    if panel.wrong:
        label, values = panel.wrong
        ax.plot(panel.x, values, color=WRONG, linestyle="--", linewidth=1.3, label=label)
    if log:
        ax.set_yscale("log")
        ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set(xlabel=panel.xlabel, ylabel=panel.ylabel)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    within = f"largest relative difference {panel.difference:.0e}"
    ax.set_title(f"{panel.title}\n{within}", loc="left", fontsize=9, color="0.35")
    ax.spines[["top", "right"]].set_visible(False)


def draw_theorems(panels: list[Panel]) -> Figure:
    """Draw all panels; the empty cell explains lines and circles."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    *axes, last = figure.subplots(2, 3).flat
    for ax, panel in zip(axes, panels, strict=True):
        draw_panel(ax, panel, log=True)
        *shared, wrong = ax.get_legend_handles_labels()[0]
        ax.legend(handles=[wrong], frameon=False, fontsize=8, loc="best")
    last.set_axis_off()
    entries = [*shared, wrong], ["theorem", "measured", "another formula or method"]
    last.legend(*entries, frameon=False, fontsize=9, loc="center")
    return figure


def draw_caught(panel: Panel, message: str) -> Figure:
    """Draw the moves of both optimizers, and the message of the law that is broken under them."""
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    ax = figure.subplots()
    draw_panel(ax, panel, log=True)
    ax.legend(frameon=False, fontsize=8)
    lines = [textwrap.fill(line, 138, subsequent_indent="    ") for line in message.splitlines()]
    figure.supxlabel("\n".join(lines), x=0.02, ha="left", fontsize=7, family="monospace")
    return figure


def show(card: Card, steps: int, plans: int) -> bool:
    plain = sgd(plans)
    panels = [worst_cases(steps // 2), heavy_ball(steps), nesterov(steps), plain, svrg(plain)]
    differences = {panel.title: panel.difference for panel in panels}
    card.picture("theorems", draw_theorems(panels), conclusion(differences), differences)
    panel, message = caught()
    print(f"\n{message}\n")
    assert panel.wrong
    fault = panel.wrong[0]
    numbers = {
        "fault": fault,
        "difference": panel.difference,
        "factor": panel.factor,
        "is_named": names(message, fault),
    }
    card.picture(
        "caught",
        draw_caught(panel, message),
        caught_conclusion(**numbers),
        numbers,
        question="Is an optimizer that is slightly wrong found out?",
    )
    return all(difference < AGREES for difference in (*differences.values(), panel.difference))


def main(argv: list[str] | None = None) -> int:
    torch.set_num_threads(1)  # on tensors this small, threads would only wait for one another
    with Card(__file__, "Do runs attain what theorems say, to the last digits?", argv) as card:
        agrees = show(card, *(10, 4) if card.fast else (40, 8))
    return 0 if agrees else 1


if __name__ == "__main__":
    raise SystemExit(main())
