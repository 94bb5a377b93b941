"""Halving: a sweep that drops members and takes fewer steps, and a study of Optuna that is told of them."""

import math
from functools import partial
from itertools import product

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.func import grad

import gdfunc as gd
from gdfunc import _tree
from gdfunc.search import halving

from .assertions import assert_refused
from .references import few, linear_data, linear_loss

DATA = linear_data(0, 12, 3)
START = {"w": torch.zeros(3, dtype=torch.float64), "b": torch.zeros((), dtype=torch.float64)}
KEYS = gd.random.split(gd.random.key(7), 4)
RUNGS = [2, 6, 18]


def run(lr=0.1, key=KEYS[0], batch_size=4, steps=slice(0, 18), carry=None, **kwargs):
    step = gd.make_step(linear_loss, gd.momentum(0.5))
    index = gd.sample_batches(key, 12, batch_size, 18)
    carry = step.init(START) if carry is None else carry
    return gd.train(step, carry, DATA, index[steps], lr, **kwargs)


def loss(carry, trajectory):
    return linear_loss(carry.params, DATA)


def lrs(*values):
    return torch.tensor(values, dtype=torch.float64)


GRID = gd.grid(batch_size=[4, 3], lr=lrs(0.3, 0.1, 0.03, 1e160, 0.01, 0.003, 1e200), key=KEYS[:2])


def same(a, b):
    pairs = zip(_tree.leaves(a), _tree.leaves(b), strict=True)
    return all(x.shape == y.shape and x.numpy().tobytes() == y.numpy().tobytes() for x, y in pairs)


def same_results(a, b):
    names = "outputs", "lengths", "diverged", "steps", "scores", "finals"
    return a.ranking == b.ranking and all(same(getattr(a, name), getattr(b, name)) for name in names)


def close(a, b):
    return all(
        x.shape == y.shape and torch.allclose(x, y, 1e-12, 1e-12)
        for x, y in zip(_tree.leaves(a), _tree.leaves(b), strict=True)
    )


# Members and their rows.


LONG = pytest.mark.long


@pytest.mark.parametrize("chunk_size", [None, *(pytest.param(size, marks=LONG) for size in (1, 3, "auto"))])
def test_every_row_is_the_plain_sweeps_up_to_the_rung_where_the_member_was_dropped(chunk_size):
    result, plain = halving(run, GRID, RUNGS, loss, chunk_size=chunk_size), gd.sweep(run, GRID)
    finals, curves = plain.outputs
    assert result.outputs.loss.shape == curves.loss.shape
    for member, steps in enumerate(result.steps.tolist()):
        assert result.lengths["loss"][member] == steps
        assert close(result.outputs.loss[member, :steps], curves.loss[member, :steps]) or steps == 2
        assert result.outputs.loss[member, steps:].isnan().all()
        padding = [-1] * (18 - steps)
        assert result.outputs.step[member].tolist() == [*range(steps), *padding]
    assert len(result.finals) == 28 // 3 // 3
    for member, carry in result.finals.items():
        assert close(carry, _tree.map(lambda leaf, i=member: leaf[i], finals))
        single = run(**GRID[member])
        assert close(carry, single[0])
        assert close(result.outputs.loss[member], single[1].loss)


def carry_after(plain, member, rung):
    """The parameters of a plain sweep's member after some steps."""
    final, records = plain.outputs
    if rung == 18:
        return _tree.map(lambda leaf: leaf[member], final.params)
    return _tree.map(lambda leaf: leaf[member, rung], records.params)


def test_the_best_third_goes_on_and_those_that_diverge_are_dropped_first():
    result, plain = halving(run, GRID, RUNGS, loss, eta=3), gd.sweep(partial(run, record="params"), GRID)
    n, left = len(GRID), [*range(len(GRID))]
    for at, (rung, following) in enumerate(zip(RUNGS, [*RUNGS[1:], None], strict=True)):
        carries = [carry_after(plain, i, rung) for i in left]
        scores = [float(linear_loss(carry, DATA)) for carry in carries]
        assert result.scores[left, at].tolist() == pytest.approx(scores, rel=1e-9, nan_ok=True)
        finite = sorted((score, i) for score, i in zip(scores, left, strict=True) if math.isfinite(score))
        if following:
            going = sorted(i for _, i in finite[: max(1, len(left) // 3)])
            assert [i for i in range(n) if result.steps[i] > rung] == going
            left = going
        else:
            assert [i for _, i in finite] == result.ranking[: len(finite)]
    diverged = [i for i in range(n) if float(GRID[i]["lr"]) > 1]
    assert [i for i in range(n) if result.diverged[i]] == diverged
    assert sorted(result.ranking) == [*range(n)]
    assert sorted(result.ranking[-len(diverged) :]) == diverged
    assert result.best == result.ranking[0]
    assert sorted(result.finals) == left


def test_work_falls_with_the_members():
    """Counted where it is done: in rows of the vmapped step."""
    rows = []

    def counted(lr, steps, carry):
        w = torch.ones(()) if carry is None else carry

        def step(w, batch, lr):
            rows.append(1)  # once a step of a single member
            return w - lr * w, w

        return gd.train(step, w, None, gd.full_batch(1, 9)[steps], lr, backend="eager")

    grid = gd.grid(lr=[0.1 * i for i in range(1, 10)])
    result = halving(counted, grid, [1, 3, 9], "loss", chunk_size=1)
    assert result.cost == len(rows) == 9 * 1 + 3 * 2 + 1 * 6
    assert result.full_cost == 81
    assert result.steps.sum() == result.cost


def test_members_are_repacked_into_one_vmap_a_group_and_rung():
    calls = []

    def counted(**point):
        calls.append(point["steps"])
        return run(**point)

    halving(counted, GRID, RUNGS, loss)
    assert len(calls) <= 2 * len(RUNGS)
    assert {(part.start, part.stop) for part in calls} == {(0, 2), (2, 6), (6, 18)}


def by_value(value, steps, carry):
    return torch.zeros(()), {"score": value}


def test_of_equal_members_the_first_goes_on():
    result = halving(by_value, gd.grid(value=[2.0, 1.0, 1.0, 1.0, 2.0, 1.0]), [1, 2, 3], "score")
    assert result.steps.tolist() == [1, 3, 2, 1, 1, 1]
    assert result.ranking == [1, 2, 3, 5, 0, 4]


def test_max_turns_the_order_round():
    values = [0.5, 2.0, 1.0, 3.0, 4.0, 0.1]
    up = halving(by_value, gd.grid(value=values), [1, 2, 3], "score", mode="max", eta=2)
    down = halving(by_value, gd.grid(value=[-value for value in values]), [1, 2, 3], "score", eta=2)
    assert up.ranking == down.ranking == [4, 3, 1, 2, 0, 5]


@pytest.mark.parametrize(
    ("values", "eta", "steps"),
    [
        ([math.inf] * 7 + [1.0, 2.0], 3, [1] * 7 + [3, 2]),  # two of the three places are filled
        ([1.0, math.nan, 2.0, -math.inf, 3.0, 4.0, math.nan, 5.0], 2, [3, 1, 3, 1, 2, 2, 1, 1]),
    ],
)
def test_members_that_diverged_never_go_on_and_take_no_place(values, eta, steps):
    grid = gd.grid(position=torch.arange(len(values)))

    def run(position, steps, carry):
        return position, {"score": torch.tensor(values)[position]}

    assert halving(run, grid, [1, 2, 3], "score", eta=eta).steps.tolist() == steps


@settings(max_examples=few.max_examples // 2)
@given(
    values=st.lists(st.sampled_from([0.0, 1.0, 2.0, math.inf]), min_size=1, max_size=30),
    eta=st.sampled_from([1.5, 2, 3, 10]),
    rungs=st.lists(st.integers(1, 40), min_size=1, max_size=4, unique=True).map(sorted),
)
def test_the_counts_are_those_of_the_formula(values, eta, rungs):
    result = halving(by_value, gd.grid(value=values), rungs, "score", eta=eta)
    finite, n = sum(map(math.isfinite, values)), len(values)
    cost, last = 0, 0
    for rung in rungs:
        assert (result.steps >= rung).sum() == n
        cost, last, n = cost + n * (rung - last), rung, min(finite, max(1, int(n // eta)))
    assert result.cost == cost
    assert int(result.diverged.sum()) == len(values) - finite
    if finite:
        assert values[result.best] == min(values)
    else:
        assert_refused(lambda: result.best, "no member was left: .* diverged")


def test_a_leaf_without_an_axis_has_its_last_value_and_evaluations_go_on():
    def evaluated(lr, steps, carry):
        _, (carry, trajectory) = (
            None,
            run(lr, steps=steps, carry=carry, evaluate={"all": lambda c: loss(c, 0)}),
        )
        return carry, trajectory

    result = halving(evaluated, gd.grid(lr=[0.1, 0.2, 0.01]), [2, 6], "all")
    best = result.best
    assert result.outputs.evaluated[best].tolist() == [1, 2, 3, 4, 5, 6]
    assert result.scores[best].tolist() == result.outputs.all[best, [1, 5]].tolist()
    ends = halving(
        lambda x, steps, carry: (x, {"end": x * steps.stop}), gd.grid(x=[1.0, 2.0]), [2, 6], "end"
    )
    assert ends.outputs["end"].tolist() == [6.0, 4.0]


@pytest.mark.parametrize(
    ("how", "rungs", "message"),
    [
        ({"every": 4}, [6, 12], r"rungs\[0\] is 6, no multiple of every=4 of run's train: .* such as 8"),
        ({"every": 4}, [2, 12], r"rungs\[0\] is 2, no multiple of every=4 .* such as 4"),
        ({"every": 4}, [4, 6, 12], r"rungs\[1\] is 6, no multiple of every=4"),
        ({"every": 4}, [4, 8, 11], None),
        ({"evaluate_every": 4}, [6, 12], r"rungs\[0\] is 6, no multiple of evaluate_every=4"),
        ({"evaluate_every": 4}, [2, 12], r"rungs\[0\] is 2, no multiple of evaluate_every=4"),
        ({"evaluate_every": 4}, [4, 8, 11], None),
        ({"every": 2, "evaluate_every": 4}, [4, 8, 11], None),
    ],
)
def test_rungs_lie_where_the_records_of_a_run_go_on(how, rungs, message):
    how = how | ({"evaluate": {"all": lambda c: loss(c, 0)}} if "evaluate_every" in how else {})
    thinned, grid = partial(run, **how), gd.grid(lr=lrs(0.3, 0.1))
    if message:
        assert_refused(lambda: halving(thinned, grid, rungs, loss, eta=1.5), message)
        return
    result = halving(thinned, grid, rungs, loss, eta=1.5)
    whole = thinned(lr=lrs(0.3, 0.1)[result.best], steps=slice(0, rungs[-1]))[1]
    assert close(_tree.map(lambda leaf: leaf[result.best], result.outputs), whole)


def test_rungs_in_another_unit_than_the_steps_of_the_records_are_refused():
    def epochs(lr, steps, carry):
        return run(lr, steps=slice(2 * steps.start, 2 * steps.stop), carry=carry)

    grid = gd.grid(lr=lrs(0.3, 0.1))
    message = "from rung 0 to 3 run records 6 steps instead of 3: rungs are numbers of train's steps"
    assert_refused(lambda: halving(epochs, grid, [3, 9], "loss"), message)
    assert (
        halving(lambda **point: (epochs(**point)[0], {"end": point["lr"]}), grid, [3, 9], "end").cost == 12
    )


# The law of the issue.


PROBLEM = gd.problems.stock_regression(standardize=False)
FALL = gd.make_step(PROBLEM.loss_fn)


def stocks(lr, key, steps=slice(0, 270), carry=None):
    """The regression of the stocks as they are, with a learning rate that falls to zero."""
    index = gd.sample_batches(key, 389, 128, 270)
    rates = gd.schedules.linear(lr, 1.0, 0.0, total_iters=270)(torch.arange(270))
    carry = PROBLEM.params if carry is None else carry
    return gd.train(FALL, carry, PROBLEM.data, index[steps], rates[steps], backend="native")


def whole_loss(params, trajectory):
    return PROBLEM.loss_fn(params, PROBLEM.data)


@pytest.mark.long
def test_the_grids_best_member_is_found_with_a_third_of_the_steps():
    grid = gd.grid(lr=6.4 / PROBLEM.L / 2 ** torch.arange(12).double())  # two are above 2/L
    for key in gd.random.split(gd.random.key(0), 20):
        run = partial(stocks, key=key)
        losses = gd.sweep(lambda lr, run=run: whole_loss(*run(lr)), grid).outputs
        result = halving(run, grid, [30, 90, 270], whole_loss)
        assert result.best == int(losses.nan_to_num(nan=math.inf).argmin())
        assert 0 < result.best < 11
        assert 3 * result.cost <= result.full_cost
        assert result.scores[result.best, -1] == pytest.approx(float(losses[result.best]), rel=1e-10)


# Interruptions and files.


@pytest.mark.long
@pytest.mark.parametrize(
    ("calls", "chunk_size"),
    [(3, None), *(pytest.param(*case, marks=LONG) for case in product((0, 1, 2, 5), (None, 5)))],
)
def test_an_interrupted_halving_goes_on_to_the_same_bits(calls, chunk_size, tmp_path):
    whole = halving(run, GRID, RUNGS, loss, chunk_size=chunk_size)
    left, again = [calls], []

    def impatient(**point):
        left[0] -= 1
        if left[0] == -1:
            raise KeyboardInterrupt
        return run(**point)

    with pytest.raises(gd.search.HalvingInterrupted, match="resume=error") as error:
        halving(impatient, GRID, RUNGS, loss, chunk_size=chunk_size)
    gd.save(tmp_path / "stopped", error.value)
    for stopped in (error.value, gd.load(tmp_path / "stopped"), error.value):
        again.clear()

        def counted(**point):
            again.append(1)
            return run(**point)

        result = halving(counted, GRID, RUNGS, loss, chunk_size=chunk_size, resume=stopped)
        assert same_results(result, whole)
        assert result.grid is GRID
    whole_calls = 6 if chunk_size is None else 10
    assert len(again) == whole_calls - calls


@pytest.mark.long
@pytest.mark.parametrize("error", [MemoryError, pytest.param(KeyboardInterrupt, marks=LONG)])
def test_a_halving_goes_on_from_its_file(error, tmp_path):
    file, calls = tmp_path / "halving.safetensors", []

    def failing(**point):
        calls.append(1)
        if len(calls) == 4:  # the second of two groups at the second rung
            raise error
        return run(**point)

    with pytest.raises(error):
        halving(failing, GRID, RUNGS, loss, checkpoint_to=file)
    result = halving(failing, GRID, RUNGS, loss, checkpoint_to=file)
    assert same_results(result, halving(run, GRID, RUNGS, loss))
    done = len(calls)
    assert done == 7
    assert not file.with_name("halving.safetensors.rungs").exists()
    assert same_results(halving(failing, GRID, RUNGS, loss, checkpoint_to=file), result)
    assert len(calls) == done
    other = gd.grid(batch_size=[4, 3], lr=GRID.axes["lr"].values, key=KEYS[2:])
    assert_refused(lambda: halving(run, other, RUNGS, loss, checkpoint_to=file), "another grid")
    gd.save(file, {"a": 1})
    assert_refused(lambda: halving(run, GRID, RUNGS, loss, checkpoint_to=file), "holds no halving")


def test_a_folder_is_no_file_of_a_halving(tmp_path):
    assert_refused(
        lambda: halving(run, GRID, RUNGS, checkpoint_to=tmp_path), "IsADirectoryError: .* is a folder"
    )


def test_a_foreign_interrupt_is_refused():
    def impatient(**point):
        raise KeyboardInterrupt

    with pytest.raises(gd.search.HalvingInterrupted) as error:
        halving(impatient, GRID, RUNGS, loss)
    stopped = error.value
    other = gd.grid(lr=[0.1, 0.2])
    assert_refused(lambda: halving(run, other, RUNGS, loss, resume=stopped), "another grid")
    assert_refused(lambda: halving(run, GRID, [2, 18], loss, resume=stopped), r"rungs=\[2, 6, 18\]; got")
    assert_refused(lambda: halving(run, GRID, RUNGS, loss, eta=2, resume=stopped), "eta=3; got 2")
    assert_refused(lambda: halving(run, GRID, RUNGS, loss, resume=True), "TypeError: resume is bool")


def test_a_result_is_saved_and_selected_and_becomes_a_table(tmp_path):
    result = halving(run, GRID, RUNGS, loss)
    gd.save(tmp_path / "result", result)
    loaded = gd.load(tmp_path / "result")
    assert isinstance(loaded, gd.search.HalvingResult)
    assert same_results(loaded, result)
    assert repr(loaded) == repr(result)
    assert "28 to 2, 9 to 6, 3 to 18, 8 of 28 diverged" in repr(result)
    part = result.select(batch_size=GRID[result.best]["batch_size"])
    assert len(part.grid) == len(part.steps) == 14
    assert same(part.finals[part.best], result.finals[result.best])
    assert part.grid.labels(part.best) | {"batch_size": 0} == result.grid.labels(result.best) | {
        "batch_size": 0
    }
    row = result.to_records()[result.best]
    assert row["steps"] == 18
    assert row["score"] == result.scores[result.best, -1]
    assert result.to_records()[result.ranking[-1]]["steps"] == 2
    result = halving(by_value, gd.grid(value=[1.0, 2.0]), [1, 2], "score")
    result.save(tmp_path / "table.csv")
    assert (tmp_path / "table.csv").read_text().splitlines()[1] == "1.0,1.0,2,1.0,False"
    assert (tmp_path / "table.csv").read_text().startswith("value,output.score,steps,score,diverged")


def test_progress_counts_member_steps():
    told = []
    result = halving(run, GRID, RUNGS, loss, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (result.cost, 28 * 2 + 9 * 4 + 3 * 12)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


# Refusals.


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: halving(run, {"lr": [0.1]}, RUNGS), "TypeError: grid is dict"),
        (lambda: halving(run, GRID, []), "rungs must be numbers of steps that increase"),
        (lambda: halving(run, GRID, [3, 3]), "that increase, such as"),
        (lambda: halving(run, GRID, [0, 3]), r"rungs\[0\] must be an int >= 1"),
        (lambda: halving(run, GRID, RUNGS, eta=1), "eta must be a number > 1"),
        (lambda: halving(run, GRID, RUNGS, mode="low"), "mode must be 'min' or 'max'"),
        (
            lambda: halving(
                lambda lr, steps, carry: (lr, {"x": lr[None][:0]}), gd.grid(lr=[0.1]), [2], "x"
            ),
            "the record 'x' is empty in a part of the run",
        ),
        (lambda: halving(run, GRID, RUNGS, "los"), "no record 'los'; it has 'step', 'loss'"),
        (lambda: halving(run, GRID, RUNGS, 3), "TypeError: by is int"),
        (
            lambda: halving(run, GRID, RUNGS, lambda carry, trajectory: trajectory.loss),
            "TypeError: members are judged by a 0-d real number",
        ),
        (lambda: halving(run, gd.grid(steps=[1, 2]), RUNGS), "the grid has an axis steps"),
        (lambda: halving(run, gd.grid(carry=[1.0]), RUNGS), "the grid has an axis carry"),
        (
            lambda: halving(lambda lr: lr, gd.grid(lr=[0.1]), RUNGS),
            r"TypeError: run takes \(lr\), but is called with lr, steps, carry",
        ),
        (
            lambda: halving(lambda lr, steps, carry: lr, gd.grid(lr=[0.1]), RUNGS),
            r"TypeError: run must return \(carry, output\)",
        ),
        (
            lambda: halving(partial(run, stop=lambda c, s: s < 0), gd.grid(lr=[0.1]), RUNGS),
            "run has stop=, whose memory would begin again",
        ),
        (
            lambda: grad(lambda x: halving(run, gd.grid(lr=x[None]), RUNGS).outputs.loss.sum())(
                lrs(0.1)[0]
            ),
            "halving decides by values",
        ),
    ],
)
def test_what_cannot_be_halved_is_refused(call, message):
    assert_refused(call, message)


def test_an_error_of_run_names_the_point():
    def failing(lr, steps, carry):
        if steps.start == 2:
            raise OverflowError("too much")
        return run(lr, steps=steps, carry=carry)

    with pytest.raises(OverflowError) as error:
        halving(failing, gd.grid(lr=[0.1, 0.2, 0.3]), RUNGS, loss)
    assert "in the sweep, at lr=0.2" in "".join(error.value.__notes__)


# Optuna.


@pytest.fixture
def optuna():
    module = pytest.importorskip("optuna")
    module.logging.set_verbosity(module.logging.WARNING)
    return module


def test_a_study_is_asked_for_a_sweep_and_told_its_values(optuna):
    distributions = optuna.distributions
    space = {
        "lr": distributions.FloatDistribution(1e-3, 1e37, log=True),
        "batch_size": distributions.IntDistribution(3, 4),
    }
    study, calls = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1)), []

    def last(**point):
        calls.append(point["batch_size"])
        return loss(run(**point)[0], None)

    trials, grid = gd.search.ask(study, 12, space)
    result = gd.sweep(last, grid)
    gd.search.tell(study, trials, result)
    assert sorted(calls) == [3, 4]
    assert 0 < int(result.diverged.sum()) < 12
    for i, trial in enumerate(study.trials):
        assert grid[i]["lr"] == pytest.approx(trial.params["lr"], rel=1e-6)
        assert grid[i]["batch_size"] == trial.params["batch_size"]
        failed = bool(result.diverged[i])
        assert trial.state.name == ("FAIL" if failed else "COMPLETE")
        assert failed or trial.value == float(result.outputs[i])


def test_a_sampler_learns_from_sweep_to_sweep(optuna):
    sampler = optuna.samplers.TPESampler(seed=0, constant_liar=True, n_startup_trials=8)
    study = optuna.create_study(sampler=sampler)

    def suggested(trial):
        return {"x": trial.suggest_float("x", -10, 10)}

    for _ in range(5):
        trials, grid = gd.search.ask(study, 8, suggested)
        gd.search.tell(study, trials, gd.sweep(lambda x: (x - 3) ** 2, grid))
    values = [trial.value for trial in study.trials]
    assert len(values) == 40
    assert sorted(values[-16:])[8] < sorted(values[:16])[8] / 2


def test_members_that_were_dropped_are_told_as_pruned(optuna):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    space = {"lr": optuna.distributions.FloatDistribution(1e-3, 1e37, log=True)}
    trials, grid = gd.search.ask(study, 40, space)
    rungs = [9, 12, 18]
    result = halving(run, grid, rungs, loss)
    gd.search.tell(study, trials, result)
    assert 0 < int(result.diverged.sum()) < 40
    for i, trial in enumerate(study.trials):
        taken = int(result.steps[i])
        if result.diverged[i]:
            assert (trial.state.name, trial.intermediate_values) == ("FAIL", {})
            continue
        assert trial.state.name == ("COMPLETE" if taken == 18 else "PRUNED")
        assert [*trial.intermediate_values] == [rung for rung in rungs if rung <= taken]
    assert study.best_trial.number == result.best


def test_several_objectives_are_told_together(optuna):
    study = optuna.create_study(directions=["minimize", "maximize"])
    space = {"x": optuna.distributions.FloatDistribution(0, 1)}
    trials, grid = gd.search.ask(study, 3, space)
    result = gd.sweep(lambda x: {"a": x, "b": -x}, grid)
    values = torch.stack([result.outputs["a"], result.outputs["b"]], dim=1)
    gd.search.tell(study, trials, result, values)
    assert [trial.values for trial in study.trials] == values.tolist()


def test_what_a_study_cannot_be_told_is_refused(optuna):
    study = optuna.create_study()
    space = {"x": optuna.distributions.FloatDistribution(0, 1)}
    trials, grid = gd.search.ask(study, 3, space)
    result = gd.sweep(lambda x: {"a": x}, grid)
    tell = partial(gd.search.tell, study, trials)
    assert_refused(lambda: tell(result), "values must be a tensor .* for the 3 trials")
    assert_refused(lambda: tell(result, result.outputs["a"][:2]), r"got float32\[2\]: pass one")
    values = result.outputs["a"][:, None].expand(3, 2)
    assert_refused(lambda: tell(result, values), r"1 objectives, but values \[3, 2\] give trials 2")
    assert {trial.state.name for trial in study.trials} == {"RUNNING"}  # so that they can be told rightly
    gd.search.tell(study, trials, result, result.outputs["a"])
    assert_refused(lambda: gd.search.ask(study, 0, space), "size must be an int >= 1")
    with pytest.raises(TypeError, match=r"space\['lr'\] must be a distribution"):
        gd.search.ask(study, 2, {"lr": (0.0, 1.0)})
    assert len(study.trials) == 3  # nothing was asked
    names = iter("ab")
    assert_refused(
        lambda: gd.search.ask(study, 2, lambda trial: {next(names): 1.0}), "same names; got a and b"
    )
