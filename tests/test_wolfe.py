"""L-BFGS with a line search: Wolfe's conditions, how a search ends, and what it costs against its peers."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import vmap

import gdfunc as gd
from gdfunc import _tree
from gdfunc.methods._wolfe import AT_REST, LOWER, STUCK, UNFINISHED, WOLFE

from .assertions import assert_derivatives, assert_refused
from .references import few, linear_data, linear_loss, normal

EPS = torch.finfo(torch.float64).eps


def walk(loss_fn, params, steps, batch=None, lr=1.0, **options):
    """All states of a run."""
    step = gd.methods.lbfgs(loss_fn, **options)
    states = [step.init(params)]
    for _ in range(steps):
        states.append(step(states[-1], batch, lr)[0])
    return states


def network(seed=0):
    """The loss of a network with six units on a sine, its start and its data."""
    x = torch.linspace(-2, 2, 40, dtype=torch.float64)[:, None]
    params = {"a": normal(seed, 1, 6), "b": normal(seed + 100, 6), "c": 0.3 * normal(seed + 200, 6)}

    def loss_fn(params, batch):
        x, y = batch
        predictions = torch.tanh(x * params["a"] + params["b"]) @ params["c"]
        return gd.losses.mse(predictions, y) + 1e-3 * _tree.dot(params, params)

    return loss_fn, params, (x, torch.sin(3 * x[:, 0]))


def of_problem(problem):
    return problem.loss_fn, problem.params, problem.data


def classes():
    x = normal(0, 200, 8) * torch.logspace(-1, 0, 8, dtype=torch.float64)
    y = (x[:, 0] * 10 + x[:, 5] + normal(1, 200) > 0).double()
    return of_problem(gd.problems.logistic_regression(x, y, l2=1e-3))


PROBLEMS = {
    **{f"rosenbrock {d}": lambda d=d: of_problem(gd.problems.rosenbrock(d)) for d in (2, 10, 30)},
    "rosenbrock 100": lambda: of_problem(gd.problems.rosenbrock(100)),
    "logistic regression": classes,
}


# ---------------------------------------------------------------- the conditions


@pytest.mark.parametrize(
    ("name", "decrease", "curvature"),
    [
        ("rosenbrock 10", 0.1, 0.2),
        pytest.param("rosenbrock 10", 1e-4, 0.9, marks=pytest.mark.long),
        pytest.param("logistic regression", 1e-4, 0.9, marks=pytest.mark.long),
    ],
)
def test_every_move_satisfies_wolfes_strong_conditions(name, decrease, curvature):
    loss_fn, params, batch = PROBLEMS[name]()
    states = walk(loss_fn, params, 45, batch, decrease=decrease, curvature=curvature)
    gradient, moves = gd.batch_grad(loss_fn), 0
    for old, new in pairwise(states):
        change = _tree.map(lambda a, b: a - b, new.params, old.params)
        if _tree.norm(change) == 0 or new.loss > old.loss - 1e-13:
            continue
        (before, first), (after, last) = gradient(old.params, batch), gradient(new.params, batch)
        descent = float(_tree.dot(before, change))
        assert descent < 0
        assert float(last - first) <= decrease * descent + 1e-14
        assert abs(float(_tree.dot(after, change))) <= curvature * -descent * (1 + 1e-9)
        assert int(new.status) == WOLFE
        torch.testing.assert_close(new.loss, last, rtol=0, atol=0)
        moves += 1
    assert moves > 15


def test_where_the_loss_bends_down_each_stretch_is_four_times_the_last():
    """−x³ has a cubic's minimum behind, and none ahead."""
    step = gd.methods.lbfgs(lambda x, batch: -(x**3))
    state, sizes = step.init(torch.tensor(0.5, dtype=torch.float64)), []
    for _ in range(5):
        state, _ = step(state, None, 0.125)
        sizes.append(float(state.search.size))
    assert sizes == [1 / 8, 5 / 8, 21 / 8, 85 / 8, 341 / 8]


def test_a_derivative_goes_past_trials_where_the_loss_is_infinite():
    def end(start):
        step = gd.methods.lbfgs(lambda x, batch: torch.where(x < 2, (x - 1) ** 4, torch.inf))
        state = step.init(start)
        for _ in range(8):
            state, _ = step(state, None, torch.tensor(5.0, dtype=torch.float64))
        return state.params

    assert_derivatives(end, torch.tensor(0.1, dtype=torch.float64))


def test_a_flat_place_that_is_not_low_enough_ends_no_search():
    """On x²/2 from 1, a step of a lowers the loss by a − a²/2, which is less than 0.4a from a = 1.2 on."""
    step = gd.methods.lbfgs(lambda x, batch: x**2 / 2, decrease=0.4, curvature=0.5)
    state = step.init(torch.tensor(1.0, dtype=torch.float64))
    for _ in range(2):
        state, _ = step(state, None, 1.4)
    assert (state.params, state.step_size) == (1, 0)
    for _ in range(3):
        state, _ = step(state, None, 1.4)
    assert 0 < state.step_size <= 1.2


@given(st.integers(0, 2**16), st.floats(-8, 8), st.floats(0.05, 0.9))
@few
def test_a_search_ends_at_wolfes_conditions_from_any_first_size(seed, exponent, curvature):
    """On a quartic with several minima, the first trial from far too short to far too long."""
    a, b = normal(seed, 2).tolist()

    def loss_fn(x, batch):
        return 0.1 * x**4 + a * x**3 - x**2 + b * x

    start = torch.tensor(1.5, dtype=torch.float64)
    options = {"decrease": 0.01, "curvature": curvature, "max_trials": 60}
    step = gd.methods.lbfgs(loss_fn, **options)
    moved = step.init(start)
    while moved.step_size == 0 and moved.evaluations < 60:
        moved, _ = step(moved, None, 10.0**exponent)
    g, first = gd.batch_grad(loss_fn)(start, None)
    assert moved.step_size > 0
    slope, last = gd.batch_grad(loss_fn)(moved.params, None)
    change = moved.params - start
    assert last <= first + 0.01 * change * g + 1e-14
    assert (slope * change).abs() <= curvature * (change * g).abs() * (1 + 1e-9)


def test_a_parabola_takes_three_evaluations():
    """The start, a trial that is too short, and the minimum of the cubic through both."""
    states = walk(lambda x, batch: (x - 3) ** 2, torch.tensor(0.0, dtype=torch.float64), 3, curvature=0.1)
    assert [float(s.params) for s in states] == [0.0, 0.0, 0.0, 3.0]
    assert [int(s.evaluations) for s in states] == [0, 1, 2, 3]
    assert float(states[-1].step_size) == pytest.approx(3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("of", ["loss", "slope"])
def test_what_is_not_finite_counts_as_too_far(bad, of):
    def loss_fn(x, batch):
        far = x > 2
        poison = torch.where(far, bad, 0.0) * (x if of == "slope" else x.detach())
        value = (x - 1.9) ** 2 + poison
        return value if of == "loss" else torch.where(far, value - value.detach() + 0.01, value)

    states = walk(loss_fn, torch.tensor(-5.0, dtype=torch.float64), 20, lr=100.0)
    assert all(leaf.isfinite().all() for state in states for leaf in _tree.leaves(state))
    assert float(states[-1].params) == pytest.approx(1.9, abs=1e-7)


def test_pairs_curve_upwards_more_than_eps():
    """Along a wave the curvature condition makes every pair curve upwards; eps drops small ones."""
    loss_fn = gd.problems.rastrigin(3).loss_fn
    for eps in (0.0, 10.0):
        states = walk(loss_fn, torch.tensor([4.2, -3.3, 0.4], dtype=torch.float64), 40, eps=eps)
        memory = states[-1].opt_state
        curvatures = (memory.s * memory.y).sum(1)[memory.rho > 0]
        assert (curvatures > eps).all()
        assert bool(len(curvatures)) == (eps == 0) or len(curvatures) < 10


# ---------------------------------------------------------------- how it ends


@pytest.mark.long
def test_it_finds_the_last_digits_and_says_that_it_rests():
    for name, steps in (("rosenbrock 2", 60), ("rosenbrock 10", 100)):
        loss_fn, params, batch = PROBLEMS[name]()
        state = walk(loss_fn, params, steps, batch)[-1]
        grads = gd.batch_grad(loss_fn)(state.params, batch)[0]
        assert _tree.norm(grads) < 1e-8
        assert int(state.status) != STUCK


def test_a_start_at_the_minimum_rests():
    states = walk(lambda x, batch: x**2 + 1, torch.tensor(0.0), 3)
    assert [int(state.status) for state in states] == [UNFINISHED, AT_REST, AT_REST, AT_REST]
    assert float(states[-1].params) == 0


def test_a_search_that_runs_out_of_trials_goes_back_to_the_best():
    """Of a loss that falls forever, the slope never flattens."""
    state = walk(lambda x, batch: -x, torch.tensor(0.0, dtype=torch.float64), 6, max_trials=4)[-1]
    assert int(state.status) == LOWER
    assert float(state.params) > 10

    def spiked(x, batch):  # lower at 1 alone, but as steep as at the start
        return torch.where((x == 0) | (x == 1), -x, 5 + x.detach() - x)

    states = walk(spiked, torch.tensor(0.0, dtype=torch.float64), 8, max_trials=3)
    assert float(states[-1].params) == 1
    assert [int(s.status) for s in states[:6]] == [UNFINISHED] * 5 + [LOWER]


@pytest.mark.long
def test_a_search_without_a_way_down_is_stuck_and_train_says_so_once():
    def loss_fn(x, batch):  # its gradient points the wrong way
        return 2 * x.detach() - x

    start = torch.tensor(1.0, dtype=torch.float64)
    state = walk(loss_fn, start, 25)[-1]
    assert (int(state.status), float(state.params)) == (STUCK, 1.0)
    step = gd.methods.lbfgs(loss_fn, max_trials=5)
    index = gd.full_batch(1, 12)
    with pytest.warns(
        gd.StuckWarning, match="stuck at loss 1, where the gradient has norm 1: none of 5"
    ) as told:
        gd.train(step, step.init(start), None, index, 1.0)
    assert len(told) == 1
    assert told[0].filename == __file__
    gd.train(step, step.init(start), None, index[:5], 1.0)  # still searching
    together = vmap(lambda x: gd.train(step, step.init(x), None, index, 1.0)[0].status)
    assert together(torch.stack([start, start])).tolist() == [STUCK] * 2
    stateful = gd.stateful(lambda x, batch, buffers, key: (loss_fn(x, batch), buffers))
    step = gd.methods.lbfgs(stateful, max_trials=5)
    with pytest.warns(gd.StuckWarning):
        gd.train(step, step.init(start), None, index, 1.0)


def test_a_loss_that_is_nan_at_the_start_is_stuck():
    start = torch.tensor(-1.0, dtype=torch.float64)
    state = walk(lambda x, batch: x.sqrt(), start, 3)[-1]
    assert (int(state.status), float(state.params)) == (STUCK, -1.0)


@pytest.mark.long
def test_poor_pairs_are_forgotten_before_it_is_stuck():
    """Once the loss has changed, no step along H·g goes down, but one along the gradient does."""

    def loss_fn(x, batch):
        return (batch[0] * x.square()).sum()

    step = gd.methods.lbfgs(loss_fn, max_trials=3)
    state = step.init(torch.tensor([1.0, 1.0], dtype=torch.float64))
    first, second = torch.tensor([[1.0, 1e-4]]).double(), torch.tensor([[1.0, 1e6]]).double()
    for _ in range(8):
        state, _ = step(state, first, 1.0)
    assert bool(state.opt_state.rho[-1] > 0)
    counts = []
    for _ in range(60):
        state, loss = step(state, second, 1.0)
        counts.append(int((state.opt_state.rho > 0).sum()))
    assert 0 in counts
    assert float(loss) < 1e-6


# ---------------------------------------------------------------- a run is what it is everywhere


@pytest.mark.parametrize("make", [PROBLEMS["rosenbrock 2"], network])
def test_the_losses_of_a_run_never_rise(make):
    loss_fn, params, batch = make()
    step = gd.methods.lbfgs(loss_fn)
    index = gd.full_batch(40 if batch else 1, 50)
    state, trajectory = gd.train(
        step, step.init(params), batch, index, 1.0, record=("loss", "params", "grad_norm")
    )
    assert (trajectory.loss.diff() <= 0).all()
    at = _tree.map(lambda leaf: leaf[-1], trajectory.params)
    grads, loss = gd.batch_grad(loss_fn)(at, batch)
    torch.testing.assert_close(trajectory.loss[-1], loss, rtol=1e-14, atol=0)
    torch.testing.assert_close(trajectory.grad_norm[-1], _tree.norm(grads), rtol=1e-9, atol=1e-14)
    assert int(state.evaluations) == 50


@pytest.mark.long
def test_problems_under_vmap_search_at_their_own_pace_and_end_alike():
    loss_fn = gd.problems.rosenbrock(2).loss_fn
    step = gd.methods.lbfgs(loss_fn)
    starts = 2 * normal(0, 200, 2)

    def run(start):
        state, _ = gd.train(step, step.init(start), None, gd.full_batch(1, 90), 1.0, record=())
        return state

    states = vmap(run)(starts)
    assert (states.loss < 1e-12).all()
    alone = run(starts[0])
    torch.testing.assert_close(states.params[0], alone.params, rtol=1e-9, atol=1e-9)
    assert len(set(states.search.trials.tolist())) > 1 or (states.status == AT_REST).all()


@pytest.mark.long
def test_a_native_run_is_the_eager_run():
    loss_fn, params, _ = PROBLEMS["rosenbrock 10"]()
    step, index = gd.methods.lbfgs(loss_fn), gd.full_batch(1, 40)
    runs = [
        gd.train(step, step.init(params), None, index, 1.0, backend=backend)[1].loss
        for backend in ("eager", "native")
    ]
    torch.testing.assert_close(*runs, rtol=1e-6, atol=0)


def test_float32_and_a_tree_of_two_dtypes_converge():
    data = linear_data(0, 20, 3)

    def loss_fn(params, batch):
        return linear_loss(_tree.map(lambda leaf: leaf.double(), params), batch)

    params = {"w": torch.zeros(3), "b": torch.zeros((), dtype=torch.float64)}
    state = walk(loss_fn, params, 40, data)[-1]
    design = torch.cat([data[0], torch.ones(20, 1, dtype=torch.float64)], 1)
    best = torch.linalg.lstsq(design, data[1][:, None]).solution[:, 0]
    torch.testing.assert_close(state.params["w"].double(), best[:3], rtol=1e-5, atol=1e-6)
    assert (state.params["w"].dtype, state.params["b"].dtype) == (torch.float32, torch.float64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_trials": 0}, "^max_trials must be an int >= 1"),
        ({"decrease": 0.9, "curvature": 0.5}, "^curvature must exceed decrease; got 0.5 and 0.9"),
        ({"eps": -1.0}, "^eps must be"),
        ({"history": 0}, "^history must be"),
    ],
)
def test_bad_arguments_are_named(options, message):
    assert_refused(lambda: gd.methods.lbfgs(linear_loss, **options), message)


# ---------------------------------------------------------------- NIST, and peers


@pytest.mark.long
@pytest.mark.parametrize("start", [0, 1])
def test_misra1a_is_solved_from_both_starts(start):
    """One parameter is 239, the other 0.00055: a search by ten halvings never leaves the start."""
    fit = gd.problems.nist("Misra1a")
    state = walk(fit.loss_fn, fit.starts[start], 130, fit.data)[-1]
    assert fit.digits(state.params) > 8


def evaluations_until(losses, minimum, share):
    """How many evaluations it takes to leave a share of the gap to the minimum."""
    good = np.minimum.accumulate(losses) <= minimum + share * (losses[0] - minimum)
    return int(good.argmax()) + 1 if good.any() else math.inf


def scipys(loss_fn, params, batch):
    optimize = pytest.importorskip(
        "scipy.optimize", reason="scipy comes with scikit-learn, the extra demos"
    )
    gradient, losses = gd.batch_grad(loss_fn), []

    def evaluate(vector):
        grads, loss = gradient(_tree.unravel(torch.from_numpy(vector), params), batch)
        losses.append(float(loss))
        return losses[-1], _tree.ravel(grads).numpy()

    options = {"maxcor": 10, "maxiter": 3000, "maxfun": 3000, "ftol": 0.0, "gtol": 1e-9}
    optimize.minimize(evaluate, _tree.ravel(params).numpy(), jac=True, method="L-BFGS-B", options=options)
    return losses


def torchs(loss_fn, params, batch):
    vector, losses = _tree.ravel(params).requires_grad_(), []
    optimizer = torch.optim.LBFGS(
        [vector],
        max_iter=800,
        history_size=10,
        tolerance_grad=1e-9,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        loss = loss_fn(_tree.unravel(vector, params), batch)
        loss.backward()
        losses.append(loss.item())
        return loss

    optimizer.step(closure)
    return losses


LONG = set(PROBLEMS) - {"rosenbrock 2"}


@pytest.mark.parametrize("peer", [scipys, torchs])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.long] * (n in LONG)) for n in PROBLEMS]
)
def test_it_takes_no_more_evaluations_than_its_peers_and_a_tenth(name, peer):
    given = PROBLEMS[name]()
    theirs = np.array(peer(*given))
    states = walk(given[0], given[1], len(theirs) * 6 // 5 + 5, given[2])
    ours = np.array([float(state.loss) for state in states[1:]])
    minimum = min(theirs.min(), ours.min())
    for share in (1e-4, 1e-8):
        count = evaluations_until(ours, minimum, share)
        assert count <= 1.1 * evaluations_until(theirs, minimum, share), (share, count)


@pytest.mark.slow
def test_it_takes_no_more_evaluations_on_networks_than_scipy_and_a_tenth():
    """In sum over six starts, which take from 240 to 470 each; our runs are one run under vmap."""
    networks = [network(seed) for seed in range(6)]
    loss_fn, _, batch = networks[0]
    starts = _tree.map(lambda *leaves: torch.stack(leaves), *[params for _, params, _ in networks])
    step, index = gd.methods.lbfgs(loss_fn), gd.full_batch(40, 500)
    losses = vmap(lambda start: gd.train(step, step.init(start), batch, index, 1.0)[1].loss)(starts)
    theirs = [np.array(scipys(*given)) for given in networks]
    ours = [row[1:].numpy() for row in losses]
    for share in (1e-4, 1e-8):
        counts = [sum(evaluations_until(row, row.min(), share) for row in rows) for rows in (ours, theirs)]
        assert counts[0] <= 1.1 * counts[1], (share, counts)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda step: gd.methods.ema(step, 0.9),
        gd.methods.reduce_on_plateau,
    ],
)
def test_a_step_around_the_search_warns_too(wrap):
    step = wrap(gd.methods.lbfgs(lambda w, batch: w.log()))
    with pytest.warns(gd.StuckWarning, match="stuck at loss nan, where it began"):
        gd.train(step, step.init(torch.tensor(-1.0, dtype=torch.float64)), None, gd.full_batch(1, 3), 1.0)
