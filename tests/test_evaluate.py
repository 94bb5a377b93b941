"""Evaluations of a run on its way: when, how often, what comes out, and what goes through it."""

import functools
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, jvp, vmap

import gdfunc as gd

from .assertions import assert_agrees, assert_same_bits
from .references import COMPILED, linear_data, linear_loss, normal
from .runs import ctrl_c

KEY = gd.random.key(0)
DATA, HELD_OUT = linear_data(0, 12, 2), linear_data(7, 9, 2)
INIT = {"w": normal(5, 2), "b": normal(6, 1)[0]}
STEP = gd.make_step(linear_loss)
ADAM = gd.make_step(linear_loss, gd.adam())
STEPS = {"plain": (STEP, INIT), "adam": (ADAM, ADAM.init(INIT))}
each = pytest.mark.parametrize("backend", ["eager", *COMPILED])


def validation(carry):
    return linear_loss(gd._step.params_of(carry), HELD_OUT)


def both(carry):
    params = gd._step.params_of(carry)
    return {"w": 2 * params["w"], "is_up": params["b"] > 0}


EVALUATE = {"validation": validation, "both": both}


def run(steps=15, lr=0.05, init=INIT, step=STEP, evaluate=validation, index=None, **options):
    index = gd.sample_batches(KEY, 12, 4, steps) if index is None else index
    return gd.train(step, init, DATA, index, lr, evaluate=evaluate, **options)


def loop(steps=15, lr=0.05, init=INIT, step=STEP, evaluate_every=1, evaluate=validation):
    """The run by hand: its last carry, its losses, and what was evaluated."""
    carry, losses, values = init, [], []
    for t, row in enumerate(gd.sample_batches(KEY, 12, 4, steps)):
        carry, loss = step(carry, gd.take(DATA, row), lr)
        losses.append(loss)
        if (t + 1) % evaluate_every == 0:
            values.append(evaluate(carry))
    return carry, losses, values


@pytest.mark.long
@given(
    st.sampled_from(sorted(STEPS)),
    st.integers(0, 20),
    st.integers(1, 4),
    st.integers(1, 5),
    st.sampled_from([0.0, 1e9]),
)
def test_values_are_those_of_the_loop_bit_for_bit(kind, steps, every, blocks, seconds):
    (step, init), k = STEPS[kind], every * blocks
    args = {"step": step, "init": init}
    carry, _, values = loop(steps, evaluate_every=k, **args)
    record = ("loss", "params", "grad_norm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gdfunc._train._drive._SEGMENT_SECONDS", seconds)
        final, trajectory = run(
            steps, every=every, evaluate=EVALUATE, evaluate_every=k, record=record, **args
        )
    plain_final, plain = run(steps, every=every, evaluate=None, record=record, **args)
    assert_same_bits(final, carry)
    assert_same_bits(final, plain_final)
    assert_same_bits({name: getattr(trajectory, name) for name in vars(plain)}, vars(plain))
    assert trajectory.evaluated.tolist() == list(range(k, steps + 1, k))
    assert trajectory.validation.tolist() == [float(value) for value in values]
    assert trajectory.both["w"].shape == (steps // k, 2)
    assert trajectory.both["is_up"].dtype == torch.bool
    if steps >= k and steps % k == 0:
        assert trajectory.both["w"][-1].equal(2 * gd._step.params_of(final)["w"])


@each
@pytest.mark.parametrize(
    ("steps", "every", "k"), [(14, 1, 1), (14, 1, 4), (14, 2, 4), (120, 3, 30), (3, 1, 4), (0, 1, 1)]
)
def test_values_of_every_backend_are_those_of_the_loop(steps, every, k, backend):
    options = {"every": every, "evaluate": EVALUATE, "evaluate_every": k}
    expected = run(steps, backend="eager", **options)
    assert_agrees(run(steps, backend=backend, **options), expected)


@each
@pytest.mark.usefixtures("no_segment_time")
def test_segments_change_no_bit_of_what_is_evaluated(monkeypatch, backend):
    options = {"every": 2, "evaluate": EVALUATE, "evaluate_every": 4, "backend": backend}
    short = run(75, **options)
    monkeypatch.setattr("gdfunc._train._drive._SEGMENT_SECONDS", 1e9)
    assert_same_bits(run(75, **options), short)


@pytest.mark.parametrize("steps", [4, 19])
def test_evaluations_are_called_no_more_often_than_asked(steps):
    calls = []

    def counted(carry):
        calls.append(carry["b"])
        return carry["b"]

    _, trajectory = run(steps, evaluate=counted, evaluate_every=4, backend="eager")
    assert torch.stack(calls).equal(trajectory.counted)
    assert len(calls) == steps // 4


def test_functions_are_recorded_under_their_names():
    _, trajectory = run(evaluate=(validation, both), evaluate_every=5)
    assert [*vars(trajectory)] == ["step", "loss", "evaluated", "validation", "both"]
    _, renamed = run(evaluate={"held_out": validation}, evaluate_every=5)
    assert renamed.held_out.equal(trajectory.validation)
    assert repr(renamed).endswith("evaluated=int64[3], held_out=float64[3])")
    assert "curve" in renamed._repr_html_()


# Transformations.


@pytest.mark.long
@each
@pytest.mark.parametrize(
    "adjoint",
    [
        gd.adjoints.Reverse(),
        gd.adjoints.Checkpoint("sqrt"),
        gd.adjoints.Checkpoint(carries=2),
        gd.adjoints.Truncated(40),
    ],
)
def test_derivatives_of_what_is_evaluated_are_those_of_the_loop(adjoint, backend):
    weights = torch.linspace(1, 2, 4, dtype=torch.float64)

    def of_loop(lr):
        return weights @ torch.stack(loop(17, lr, evaluate_every=4)[2])

    def of_run(lr, **options):
        how = {"backend": backend, "adjoint": adjoint}
        return weights @ run(17, lr, every=2, evaluate_every=4, **how)[1].validation

    lr = torch.tensor(0.05, dtype=torch.float64)
    expected = grad(of_loop)(lr)
    torch.testing.assert_close(grad(of_run)(lr), expected, rtol=1e-10, atol=0)
    lrs = torch.stack([lr, 2 * lr])
    both = torch.stack([expected, grad(of_loop)(2 * lr)])
    torch.testing.assert_close(vmap(grad(of_run))(lrs), both, rtol=1e-10, atol=0)
    if not isinstance(adjoint, gd.adjoints.Checkpoint):
        pushed = jvp(of_run, (lr,), (torch.ones_like(lr),))[1]
        torch.testing.assert_close(pushed, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("last", [1, 3, 9])
def test_truncated_derivatives_begin_at_the_last_evaluation_before_the_last_steps(last):
    def slope(steps, **options):
        return grad(lambda lr: linear_loss(run(steps, lr, **options)[0], DATA))

    lr = torch.tensor(0.05, dtype=torch.float64)
    got = slope(12, evaluate_every=4, adjoint=gd.adjoints.Truncated(last))(lr)
    start = (12 - last) // 4 * 4
    exact = slope(12, evaluate=None, adjoint=gd.adjoints.Truncated(12 - start))(lr)
    torch.testing.assert_close(got, exact, rtol=1e-11, atol=0)


@pytest.mark.long
def test_what_an_implicit_run_evaluates_is_a_constant():
    def value(lr, which):
        final, trajectory = run(60, lr, evaluate_every=10, adjoint=gd.adjoints.Implicit("cg", 20))
        return trajectory.validation.sum() if which else final["w"].sum()

    lr = torch.tensor(0.05, dtype=torch.float64)
    assert grad(value)(lr, True) == 0
    with pytest.warns(UserWarning, match="Implicit"):
        assert grad(value)(lr, False) != 0


@each
def test_members_of_a_vmapped_run_are_evaluated_as_they_are_alone(backend):
    lrs = torch.tensor([0.01, 0.05, 0.1], dtype=torch.float64)
    alone = functools.partial(run, every=2, evaluate=EVALUATE, evaluate_every=4, backend=backend)
    final, trajectory = vmap(lambda lr: alone(lr=lr))(lrs)
    for i, lr in enumerate(lrs):
        expected_final, expected = alone(lr=lr)
        assert_agrees(gd._tree.map(lambda leaf, i=i: leaf[i], final), expected_final)
        for name in ("validation", "both", "loss"):
            rows = gd._tree.map(lambda leaf, i=i: leaf[i], getattr(trajectory, name))
            assert_agrees(rows, getattr(expected, name))


@pytest.mark.long
def test_a_sweep_and_a_compiled_call_evaluate_too():
    lrs = torch.tensor([0.01, 0.05], dtype=torch.float64)
    result = gd.sweep(lambda lr: run(lr=lr, evaluate_every=5)[1].validation, gd.grid(lr=lrs))
    expected = torch.stack([run(lr=lr, evaluate_every=5)[1].validation for lr in lrs])
    torch.testing.assert_close(result.outputs, expected, rtol=1e-12, atol=0)
    compiled = gd.jit(lambda lr: run(lr=lr, evaluate_every=5)[1].validation)
    torch.testing.assert_close(compiled(lrs[0]), expected[0], rtol=1e-12, atol=0)


# A run that ends.


@each
@pytest.mark.parametrize("end", [1, 4, 6, 8, 9])
def test_a_run_that_stops_has_evaluated_at_the_steps_that_it_took(end, backend):
    _, whole = run(record="params", evaluate=EVALUATE, evaluate_every=4, backend=backend)
    at_end = whole.params["w"][end]

    def stop(carry, loss):
        return (carry["w"] == at_end).all()

    options = {"every": 2, "evaluate": EVALUATE, "evaluate_every": 4, "stop": stop}
    if backend != "eager":  # another loop rounds otherwise
        options["stop"] = lambda carry, loss: (carry["w"] - at_end).abs().max() < 1e-12
    _, trajectory = run(backend=backend, **options)
    assert int(trajectory.steps) == end
    assert trajectory.evaluated.tolist() == list(range(4, end + 1, 4))
    assert_agrees(trajectory.both, gd._tree.map(lambda leaf: leaf[: end // 4], whole.both))
    assert trajectory.loss.shape == (-(-end // 2),)


@each
@pytest.mark.parametrize("bad", [0, 3, 4, 9, 14])
@pytest.mark.parametrize("every", [1, 2])
def test_an_error_of_check_finite_holds_what_was_evaluated_before(bad, every, backend):
    index = torch.arange(15)[:, None]
    x, y = (torch.cat([leaf, leaf[:3]]) for leaf in DATA)
    y[bad] = float("nan")
    options = {"every": every, "evaluate": EVALUATE, "evaluate_every": 4, "backend": backend}
    train = functools.partial(gd.train, STEP, INIT, (x, y), lr=0.05, **options)
    _, whole = train(index=index[:bad])
    with pytest.raises(gd.NonFiniteError, match=f"loss is not finite after step {bad}") as caught:
        train(index=index, check_finite="loss")
    assert_agrees(caught.value.trajectory, whole)


# Interruption.


@pytest.mark.usefixtures("no_segment_time", "ctrl_c_is_heard")
@pytest.mark.parametrize("stop", [None, lambda carry, loss: loss < 0])
@pytest.mark.parametrize(
    ("backend", "steps", "after", "every", "k"),
    [
        *[("eager", 23, after, 2, 4) for after in (1, 4, 9, 20, 22, 23)],
        *[("native", 83, after, 1, 4) for after in (1, 30, 80, 83)],
        ("native", 3, 1, 1, 4),
    ],
)
def test_an_interrupted_run_is_resumed_to_the_bits_of_the_whole(backend, steps, after, every, k, stop):
    options = {"backend": backend, "every": every, "evaluate": EVALUATE, "evaluate_every": k, "stop": stop}
    expected = run(steps, **options)
    with pytest.raises(gd.TrainingInterrupted) as caught:
        run(steps, progress=ctrl_c(after), **options)
    stopped = pickle.loads(pickle.dumps(caught.value))
    assert after <= stopped.step <= steps
    assert_same_bits(
        stopped.trajectory.both, gd._tree.map(lambda leaf: leaf[: stopped.step // k], expected[1].both)
    )
    assert_same_bits(run(steps, resume=stopped, **options), expected)


@pytest.mark.usefixtures("no_segment_time", "ctrl_c_is_heard")
def test_resuming_a_run_that_evaluates_otherwise_is_refused():
    options = {"evaluate_every": 2, "backend": "eager"}
    with pytest.raises(gd.TrainingInterrupted) as caught:
        run(40, progress=ctrl_c(8), **options)
    resumed = functools.partial(run, 40, resume=caught.value)
    for changed, message in [
        ({"evaluate": both}, r"resume has \['validation'\] evaluated, but evaluate= and"),
        ({"evaluate": None}, "evaluated, but evaluate= and"),
        ({"evaluate_every": 4}, "evaluated, but evaluate= and evaluate_every= of this run are others"),
        ({"evaluate_every": 3}, "with every=1 and evaluate_every=3 has no segment's end"),
    ]:
        with pytest.raises(ValueError, match=message):
            resumed(**options | changed)
    with pytest.raises(gd.TrainingInterrupted) as caught:
        run(40, progress=ctrl_c(8), evaluate=None, backend="eager")
    with pytest.raises(ValueError, match="resume has nothing evaluated"):
        run(40, resume=caught.value, **options)


# Errors.


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (
            {"every": 4, "evaluate_every": 6},
            ValueError,
            "must be a multiple of every, .* got evaluate_every=6 and every=4; use evaluate_every=8",
        ),
        ({"every": 4}, ValueError, "got evaluate_every=1 and every=4; use evaluate_every=4"),
        ({"evaluate_every": 0}, ValueError, "evaluate_every must be an int >= 1; got 0"),
        (
            {"evaluate": {"loss": validation}, "record": "params"},
            ValueError,
            "evaluate has the name 'loss', .* the loss of a step",
        ),
        (
            {"evaluate": {"lr": validation}, "record": "lr"},
            ValueError,
            "the name 'lr', .* that of a record",
        ),
        ({"evaluate": {"best": validation}}, ValueError, "'best' cannot name a record"),
        ({"evaluate": (lambda carry: carry["b"],)}, ValueError, "has no name to record it under"),
        (
            {"evaluate": "loss"},
            TypeError,
            r"evaluate of 'loss' is str, not a function \(carry\) -> tree; let it",
        ),
        (
            {"evaluate": {"v": linear_loss}},
            TypeError,
            r"evaluate of 'v' takes \(params, batch\), not \(carry\)",
        ),
        ({"evaluate": {"v": lambda carry: 1.0}}, TypeError, r"\['v'\] is float, not a Tensor"),
        ({"record": {"steps": "loss"}}, ValueError, "'steps' cannot name a record"),
    ],
)
def test_bad_evaluations_raise(options, kind, message):
    with pytest.raises(kind, match=message):
        run(**options)
