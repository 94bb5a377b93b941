"""Gradient descent on the learning rates of gradient descent: a schedule learned, beside the best there is.

A run of T steps is a function of its T learning rates, and derivatives go through `train`. So a schedule
can be learned like anything else: its loss is what a run leaves of the loss, averaged over orders of the
data; its data are keys, one an order; and `train` runs the outer descent as it runs the inner. Adam starts
from the best constant rate and works on the logarithms, so that rates stay positive. Whether it learned
more than its own orders is told on fresh ones.

On least squares, with batches drawn with replacement, the expected loss of a schedule is exact algebra.
With δ = (θ − θ*, 1), its second moment S = E δδᵀ, and a sample's design vector a and residual r at θ*,

    δ' = (I − lr·G_B) δ,  G_B = the mean over the batch of (a, 0)(a, r)ᵀ
    S' = S − lr·(GS + SGᵀ) + lr²·E G_B S G_Bᵀ,  G = E G_B

so that L-BFGS on it finds the schedule that none beats, and the best of Robbins and Monro's form,
lr/(1 + decay·t). The learned schedule has only seen samples of it.

Last come the ways to the derivative: adjoints of `hypergrad` against finite differences, and the bytes that
each keeps alive at its peak, counted as tensors are made and freed.

Sources: D. Maclaurin, D. Duvenaud, R. Adams, "Gradient-based hyperparameter optimization through reversible
learning", 2015; L. Franceschi, M. Donini, P. Frasconi, M. Pontil, "Forward and reverse gradient-based
hyperparameter optimization", 2017; H. Robbins, S. Monro, "A stochastic approximation method", 1951. The
data are matplotlib's `Stocks.csv`: the S&P 500's monthly return on those of five of its shares.

    python demos/learn_the_schedule.py [--out DIR] [--fast]
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from _card import Card
from matplotlib.figure import Figure
from torch import Tensor
from torch.func import vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import gdfunc as gd

T, BATCH = 64, 8  # steps of the inner run, and the samples of each
OUTER_BATCH, OUTER_LR = 64, 0.1  # orders in an outer step, and its first learning rate
REVERSE = gd.adjoints.Reverse()
ADJOINTS: dict[str, Any] = {
    "reverse": REVERSE,
    "checkpoint": gd.adjoints.Checkpoint("sqrt"),
    "forward, 8 at once": gd.adjoints.Forward(chunk_size=8),
}
ONE_RATE = "forward, of one rate"
LENGTHS = (12, 24, 48, 96)  # steps of the runs whose memory is counted
CONSTANT, FALLING, LEARNED, BEST = "best constant", "best lr/(1 + decay·t)", "learned", "best of all"
COLORS = {CONSTANT: "#0072B2", FALLING: "#009E73", LEARNED: "#D55E00", BEST: "black"}
AGREES = 1e-6  # largest difference of a derivative to finite differences, over the largest derivative

PROBLEM = gd.problems.stock_regression()
STEP = gd.make_step(PROBLEM.loss_fn)


# What a schedule is worth: on one order of the data, on several, and in expectation.


def plan(key: Tensor, steps: int) -> Tensor:
    return gd.sample_batches(key, len(PROBLEM.data[1]), BATCH, steps)


def excess(params: Any, _loss: Any = None) -> Tensor:
    """Loss / minimum − 1 over all of the data."""
    return PROBLEM.loss_fn(params, PROBLEM.data) / PROBLEM.minimum - 1


def final_excess(lrs: Tensor, index: Tensor, adjoint: Any = REVERSE) -> Tensor:
    final, _ = gd.train(STEP, PROBLEM.params, PROBLEM.data, index, lrs, record=(), adjoint=adjoint)
    return excess(final)


def schedule_loss(log_lrs: Tensor, keys: Tensor, adjoint: Any = REVERSE) -> Tensor:
    """The loss of the outer descent: its parameters are log lr [T], its batch keys [B, 2]."""
    return vmap(lambda key: final_excess(log_lrs.exp(), plan(key, len(log_lrs)), adjoint))(keys).mean()


def vector(params: Any) -> Tensor:
    return torch.cat([params["w"], params["b"][None]])


def expected_excess(lrs: Tensor) -> Tensor:
    """The exact mean of `final_excess` over all orders, for a schedule [T]."""
    (x, y), optimum = PROBLEM.data, vector(PROBLEM.minimizers[0])
    n, ones = len(y), torch.ones_like(y)[:, None]
    a = torch.cat([x, ones], dim=1)
    left = torch.cat([a, 0 * ones], dim=1)
    right = torch.cat([a, (a @ optimum - y)[:, None]], dim=1)
    mean, hessian = left.mT @ right / n, a.mT @ a / n

    def step(s: Tensor, lr: Tensor) -> tuple[Tensor, tuple[()]]:
        single = (left.mT * ((right @ s) * right).sum(dim=1)) @ left / n
        squares = (1 - 1 / BATCH) * mean @ s @ mean.mT + single / BATCH
        return s - lr * (mean @ s + s @ mean.mT) + lr**2 * squares, ()

    start = torch.cat([vector(PROBLEM.params) - optimum, y.new_ones(1)])
    s, _ = gd.scan(step, torch.outer(start, start), lrs)
    return 0.5 * (hessian * s[:-1, :-1]).sum() / PROBLEM.minimum


# The schedules.


def best_constant(steps: int) -> Tensor:
    lrs = torch.logspace(-3, 0, 121, dtype=torch.float64)
    result = gd.sweep(lambda lr: expected_excess(lr.expand(steps)), gd.grid(lr=lrs))
    return lrs[result.outputs.argmin()].expand(steps).clone()


def best_of(schedule: Callable[[Any], Tensor], init: Any) -> Tensor:
    """The schedule of a family of exactly the least expected loss, by L-BFGS."""
    step = gd.methods.lbfgs(lambda params, _batch: expected_excess(schedule(params)))
    final, _ = gd.train(step, step.init(init), None, gd.full_batch(1, 80), 1.0, record=())
    return schedule(final.params)


def falling(steps: int) -> Callable[[Tensor], Tensor]:
    """Robbins and Monro's schedules, as a function of log lr and log decay."""
    return lambda params: gd.schedules.inverse_time(*params.exp())(torch.arange(steps))


def learn(start: Tensor, steps: int) -> tuple[Tensor, gd.Trajectory]:
    """Learn a schedule from sampled orders; record what it is worth on the way."""
    transform = gd.adam()
    step = gd.make_step(schedule_loss, transform)

    def exact(state: gd.TrainState, _loss: Tensor) -> Tensor:
        return expected_excess(state.params.exp())

    keys = gd.random.split(gd.random.key(0), steps * OUTER_BATCH)
    index = torch.arange(len(keys)).reshape(steps, OUTER_BATCH)  # every order is seen once
    lrs = gd.schedules.cosine_annealing(OUTER_LR, T_max=steps)(torch.arange(steps))
    init = step.init(start.log())
    final, trajectory = gd.train(step, init, keys, index, lrs, record=("loss", exact))
    return final.params.exp(), trajectory


class Row(NamedTuple):
    """A schedule's loss: exact, and measured on orders that no schedule has seen."""

    schedule: str
    first_lr: float
    largest_lr: float
    last_lr: float
    expected: float
    measured: float
    standard_error: float

    @property
    def z(self) -> float:
        return (self.measured - self.expected) / self.standard_error


def walk(lrs: Tensor, orders: int) -> Tensor:
    """The excess along runs on fresh orders, [orders, T + 1]."""

    def run(key: Tensor) -> Tensor:
        index = plan(key, len(lrs))
        final, trajectory = gd.train(STEP, PROBLEM.params, PROBLEM.data, index, lrs, record=excess)
        return torch.cat([trajectory.excess, excess(final)[None]])

    return gd.sweep(run, gd.grid(key=gd.random.split(gd.random.key(1), orders))).outputs


def sum_up(name: str, lrs: Tensor, walks: Tensor) -> Row:
    ends = walks[:, -1]
    return Row(
        name,
        float(lrs[0]),
        float(lrs.max()),
        float(lrs[-1]),
        float(expected_excess(lrs)),
        float(ends.mean()),
        float(ends.std() / len(ends) ** 0.5),
    )


def conclusion(constant: float, learned: float, best: float) -> str:
    """Place a learned schedule between the best constant and the best of all, by their expected losses."""
    taken = (constant - learned) / (constant - best)
    if taken < 0:
        worse = f"{100 * (learned / constant - 1):.2g} % more loss"
        return f"Descent through descent finds nothing: {worse} than by the best constant rate"
    above, share = f"{100 * (learned / best - 1):.2g} %", f"{100 * taken:.0f} %"
    opening = (
        "finds nearly the best schedule there is" if taken > 0.9 else "stops short of the best schedule"
    )
    return (
        f"Descent through descent {opening}: {share} of the gain over the best constant rate, and {above} "
        "more loss than the least"
    )


def report(rows: list[Row], outer: gd.Trajectory, orders: int) -> None:
    print(f"{'schedule':22}  lr: first  largest    last  expected   {orders:5} fresh orders  differ by")
    for row in rows:
        lrs = f"{row.first_lr:10.4f} {row.largest_lr:8.4f} {row.last_lr:7.4f}"
        measured = f"{row.measured:.5f} ± {row.standard_error:.5f}"
        print(f"{row.schedule:22} {lrs} {row.expected:9.5f} {measured:>20} {row.z:+5.1f} s.e.")
    print("excess loss = loss / minimum − 1 after the last step, mean over the orders, which all schedules")
    print("share: they err together")
    tenth = -(-len(outer.loss) // 10)
    first, last = outer.loss[:tenth].mean(), outer.loss[-tenth:].mean()
    print(f"On its own orders, each seen once: {first:.5f} in the first tenth, {last:.5f} in the last.\n")


# The ways to the derivative.


class LiveBytes(TorchDispatchMode):
    """Count the bytes of tensors that were made, and are alive, while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(_filled, (args, kwargs or {}))
        self.note((args, kwargs), made=False)
        result = func(*args, **kwargs)
        self.note(result, made=True)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return result

    def note(self, tree: Any, made: bool) -> None:
        for storage in [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]:
            if storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = made * storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, storage._cdata)


def _filled(leaf: Any) -> Any:
    """Give forward mode's symbolic zeros a storage: below a dispatch mode torch 2.13 crashes without."""
    symbolic = isinstance(leaf, Tensor) and leaf._is_zerotensor()
    return torch.zeros(leaf.shape, dtype=leaf.dtype) if symbolic else leaf


def count_memory(lengths: tuple[int, ...]) -> dict[str, list[int]]:
    """The peak of every adjoint, in bytes, for runs of these many steps."""
    peaks: dict[str, list[int]] = {}
    for name, adjoint in {**ADJOINTS, ONE_RATE: gd.adjoints.Forward()}.items():
        for steps in lengths:
            shape = () if name == ONE_RATE else (steps,)
            lrs = torch.full(shape, 0.03, dtype=torch.float64)
            index = plan(gd.random.key(2), steps)
            gradient = gd.hypergrad(final_excess, adjoint=adjoint)
            gradient(lrs, index)  # traces, before the mode that a trace would refuse
            with LiveBytes() as memory:
                gradient(lrs, index)
            peaks.setdefault(name, []).append(memory.peak)
    return peaks


def check_gradients(start: Tensor) -> dict[str, float]:
    """The largest difference of every adjoint to central differences, over the largest derivative."""
    keys, log_lrs, h = gd.random.split(gd.random.key(3), 4), start.log(), 1e-5
    shifts = h * torch.eye(len(start), dtype=start.dtype)
    above, below = (
        gd.sweep(lambda log_lrs: schedule_loss(log_lrs, keys), gd.grid(log_lrs=log_lrs + sign * shifts))
        for sign in (1, -1)
    )
    differences = (above.outputs - below.outputs) / (2 * h)
    exact = {
        name: gd.hypergrad(schedule_loss, adjoint=adjoint)(log_lrs, keys)
        for name, adjoint in ADJOINTS.items()
    }
    largest = differences.abs().max()
    return {name: float((found.grads - differences).abs().max() / largest) for name, found in exact.items()}


def report_modes(errors: dict[str, float], peaks: dict[str, list[int]], lengths: tuple[int, ...]) -> None:
    print("                      differs from finite      peak bytes alive, in runs of so many steps")
    print(
        "adjoint               differences by  " + "".join(f"{steps:>12}" for steps in lengths) + "  growth"
    )
    for name, counted in peaks.items():
        error = f"{errors[name]:.1e}" if name in errors else ""
        cells = "".join(f"{peak:12,}" for peak in counted)
        print(f"{name:21} {error:>15} {cells}  × {counted[-1] / counted[0]:.2f}")
    print(
        f"differs by = largest difference / largest derivative; growth = from {lengths[0]} steps to ",
        end="",
    )
    print(
        f"{lengths[-1]}, × {lengths[-1] / lengths[0]:g};\nforward mode holds the T directions, [T, T], too"
    )


# The picture.


def draw(schedules: dict[str, Tensor], walks: dict[str, Tensor]) -> Figure:
    """Draw the schedules, and the runs of the best constant, of the learned one and of the best of all."""
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    subtitle: dict[str, Any] = {"loc": "left", "fontsize": 9, "color": "0.35"}
    look: dict[str, Any] = {"colors": COLORS, "label_lines": True}
    gd.plot.plot_curves(schedules, ax=left, ylabel="learning rate", **look)
    left.set_title("the schedules", **subtitle)
    shown = {name: walks[name] for name in (CONSTANT, LEARNED, BEST)}
    gd.plot.plot_curves(shown, ax=right, ylabel="excess loss, loss / minimum − 1", **look)
    learned, best = right.lines[1:3]  # one lies on the other
    learned.set_linewidth(4)
    best.set(linewidth=1.2, linestyle="--")
    right.set_title(f"runs on {len(walks[LEARNED]):,} fresh orders of the data", **subtitle)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    with Card(__file__, "Can descent learn the schedule of descent?", argv) as card:
        fast = (12, 4, 64, (4, 12))
        steps, outer_steps, orders, lengths = fast if card.fast else (T, 100, 2000, LENGTHS)
        constant = best_constant(steps)
        learned, outer = learn(constant, outer_steps)
        powers = torch.tensor([0.1, 0.05], dtype=torch.float64).log()
        schedules = {
            CONSTANT: constant,
            FALLING: best_of(falling(steps), powers),
            LEARNED: learned,
            BEST: best_of(torch.exp, constant.log()),
        }
        walks = {name: walk(lrs, orders) for name, lrs in schedules.items()}
        rows = [sum_up(name, schedules[name], walks[name]) for name in schedules]
        print(f"{steps} steps on batches of {BATCH}; learned in {outer_steps} steps:\n")
        report(rows, outer, orders)
        errors, peaks = check_gradients(constant), count_memory(lengths)
        report_modes(errors, peaks, lengths)

        expected = {row.schedule: row.expected for row in rows}
        numbers = {"constant": expected[CONSTANT], "learned": expected[LEARNED], "best": expected[BEST]}
        card.picture("learn_the_schedule", draw(schedules, walks), conclusion(**numbers), numbers)
        table = torch.stack(list(schedules.values()), 1).tolist()
        card.table("schedules", ["step", *schedules], ([t, *lrs] for t, lrs in enumerate(table)))
    return 0 if max(errors.values()) < AGREES else 1


if __name__ == "__main__":
    torch.set_num_threads(1)  # on tensors this small, threads would only wait for one another
    raise SystemExit(main())
