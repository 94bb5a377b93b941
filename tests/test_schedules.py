"""Schedules: parity with torch's, exact corners, derivatives, batching, and what they refuse."""

import inspect
import math
from functools import partial

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.func import grad, jacfwd, jacrev, vmap
from torch.optim import lr_scheduler

from gdfunc import schedules as S

from .assertions import assert_derivatives, assert_pure, assert_refused
from .references import few

STEPS = 42
COUNTS = torch.arange(STEPS)


def scalar(value, dtype=torch.float64):
    return torch.tensor(value, dtype=dtype)


def torch_lrs(make, lr, steps=STEPS):
    """What torch's scheduler sets for each step, in Python floats."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr)
    scheduler, lrs = make(optimizer), []
    for t in range(steps):
        lrs.append(optimizer.param_groups[0]["lr"])
        if t + 1 < steps:
            optimizer.step()
            scheduler.step()
    return scalar(lrs)


def assert_parity(schedule, expected, scale):
    got = schedule(torch.arange(len(expected)))
    assert got.dtype == torch.float64
    assert len(expected) < 3 or len(set(expected.tolist())) > 1, "a constant proves nothing"
    assert (got - expected).abs().max() <= 1e-12 * scale


def floats(low, high):
    return st.floats(low, high, allow_subnormal=False)


LR, GAMMA, FACTOR = floats(0.01, 2), floats(0.3, 0.95), floats(0.1, 0.9)
ITERS, ETA_MIN, MILESTONES = st.integers(2, 50), floats(1e-3, 0.5), st.lists(st.integers(1, STEPS - 2))
RESTARTS = {"T_0": st.integers(2, 12), "T_mult": st.integers(1, 4), "eta_min": ETA_MIN}
LINE = {"start_factor": floats(0.1, 0.45), "end_factor": floats(0.5, 0.95), "total_iters": ITERS}
SAME_ARGUMENTS = {
    "constant": ("ConstantLR", {"factor": FACTOR, "total_iters": st.integers(2, 30)}),
    "step": ("StepLR", {"step_size": st.integers(2, 15), "gamma": GAMMA}),
    "multi_step": ("MultiStepLR", {"milestones": MILESTONES.filter(len), "gamma": GAMMA}),
    "exponential": ("ExponentialLR", {"gamma": GAMMA}),
    "linear": ("LinearLR", LINE),
    "polynomial": ("PolynomialLR", {"total_iters": ITERS, "power": floats(1.2, 3)}),
    "cosine_annealing": ("CosineAnnealingLR", {"T_max": ITERS, "eta_min": ETA_MIN}),
    "cosine_with_restarts": ("CosineAnnealingWarmRestarts", RESTARTS),
}


@pytest.mark.parametrize("name", SAME_ARGUMENTS)
@given(data=st.data())
def test_it_is_torchs(name, data):
    theirs, arguments = SAME_ARGUMENTS[name]
    lr, kwargs = data.draw(LR), data.draw(st.fixed_dictionaries(arguments))
    assume(abs(kwargs.get("eta_min", 0) - lr) > 1e-3)
    expected = torch_lrs(lambda optimizer: getattr(lr_scheduler, theirs)(optimizer, **kwargs), lr)
    assert_parity(getattr(S, name)(lr, **kwargs), expected, lr + kwargs.get("eta_min", 0))


ONE_CYCLE = {
    "total_steps": st.integers(2, 60),
    "pct_start": floats(0.05, 0.95),
    "anneal_strategy": st.sampled_from(["cos", "linear"]),
    "div_factor": floats(2, 50),
    "final_div_factor": floats(2, 1e4),
    "three_phase": st.booleans(),
}


@given(LR, st.fixed_dictionaries(ONE_CYCLE))
def test_one_cycle_is_torchs(lr, kwargs):
    total = kwargs["total_steps"]
    # A rise of almost no length magnifies the rounding of its end; of none, torch divides by zero.
    assume(abs(kwargs["pct_start"] * total - 1) > 1e-2)
    expected = torch_lrs(
        partial(lr_scheduler.OneCycleLR, max_lr=lr, cycle_momentum=False, **kwargs), lr, total
    )
    assert_parity(S.one_cycle(lr, **kwargs), expected, lr)


@given(LR, floats(0.05, 3))
def test_inverse_time_and_lambda_are_torchs(lr, decay):
    expected = torch_lrs(lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + decay * t)), lr)
    assert_parity(S.inverse_time(lr, decay), expected, lr)
    assert_parity(S.lambda_(lr, lambda t: 1 / (1 + decay * t)), expected, lr)


@given(LR, floats(0.1, 0.9), st.integers(1, 20), GAMMA)
def test_warmup_is_torchs(lr, start_factor, steps, gamma):
    def theirs(optimizer):
        parts = [
            lr_scheduler.LinearLR(optimizer, start_factor, 1.0, steps),
            lr_scheduler.ExponentialLR(optimizer, gamma),
        ]
        return lr_scheduler.SequentialLR(optimizer, parts, [steps])

    ours = S.warmup(S.exponential(lr, gamma), steps, start_factor)
    assert_parity(ours, torch_lrs(theirs, lr), lr)


@given(LR, st.sets(st.integers(1, STEPS - 2), min_size=2, max_size=2).map(sorted), GAMMA, st.integers(2, 9))
def test_sequential_is_torchs(lr, milestones, gamma, size):
    def theirs(optimizer):
        parts = [
            lr_scheduler.ConstantLR(optimizer, 0.3, size),
            lr_scheduler.StepLR(optimizer, size, gamma),
            lr_scheduler.PolynomialLR(optimizer, 3 * size, 1.5),
        ]
        return lr_scheduler.SequentialLR(optimizer, parts, milestones)

    parts = [S.constant(lr, 0.3, size), S.step(lr, size, gamma), S.polynomial(lr, 3 * size, 1.5)]
    assert_parity(S.sequential(parts, milestones), torch_lrs(theirs, lr), lr)


# Where torch is not copied.


def test_constant_alone_is_constant_and_its_first_phase_may_be_empty():
    assert torch.equal(S.constant(0.7)(COUNTS), torch.full((STEPS,), 0.7, dtype=torch.float64))
    theirs = torch_lrs(lambda o: lr_scheduler.ConstantLR(o, 0.5, total_iters=0), 0.7)
    assert set(theirs.tolist()) == {0.35}, "torch has changed: say so in the docstring"
    assert set(S.constant(0.7, 0.5, total_iters=0)(COUNTS).tolist()) == {0.7}
    assert torch_lrs(lr_scheduler.ConstantLR, 0.7)[0] == pytest.approx(0.7 / 3)


def test_linear_may_start_at_zero():
    with pytest.raises(ValueError, match="greater than 0"):
        torch_lrs(lambda o: lr_scheduler.LinearLR(o, 0.0), 1.0)
    assert S.linear(1.0, 0.0, total_iters=4)(COUNTS[:6]).tolist() == [0, 0.25, 0.5, 0.75, 1, 1]


def test_polynomial_refuses_the_power_that_is_constant():
    assert set(torch_lrs(lambda o: lr_scheduler.PolynomialLR(o, 5, 0.0), 1.0).tolist()) == {1.0}
    with pytest.raises(ValueError, match=r"power must be a finite number in \(0, inf\)"):
        S.polynomial(1.0, 5, 0.0)


def test_cosine_annealing_is_periodic_and_can_be_held():
    lrs = S.cosine_annealing(2.0, 7, 0.5)(torch.arange(60))
    assert torch.equal(lrs[14:], lrs[:-14])
    assert (lrs[0], lrs[7], lrs[14]) == (2.0, 0.5, 2.0)
    far = torch.tensor([14 * 10**15 + 3])
    assert torch.equal(S.cosine_annealing(2.0, 7, 0.5)(far), lrs[3:4])
    held = S.sequential([S.cosine_annealing(2.0, 7, 0.5), S.constant(0.5)], [7])(COUNTS)
    assert torch.equal(held[:7], lrs[:7])
    assert set(held[7:].tolist()) == {0.5}


@pytest.mark.parametrize("anneal_strategy", ["cos", "linear"])
def test_one_cycle_stays_at_its_end(anneal_strategy):
    kwargs = {"total_steps": 10, "pct_start": 0.4, "anneal_strategy": anneal_strategy}
    ours = S.one_cycle(1.0, **kwargs)(torch.arange(14))
    assert set(ours[9:].tolist()) == {1 / 25 / 1e4}
    past = torch_lrs(partial(lr_scheduler.OneCycleLR, max_lr=1.0, cycle_momentum=False, **kwargs), 1.0, 11)[
        10
    ]
    assert abs(past - ours[10]) > 1e-3
    with pytest.raises(ValueError, match="Tried to step 11 times"):
        torch_lrs(partial(lr_scheduler.OneCycleLR, max_lr=1.0, cycle_momentum=False, **kwargs), 1.0, 12)


def test_one_cycle_with_a_rise_of_no_length_starts_at_its_top():
    kwargs = {"total_steps": 4, "pct_start": 0.25}
    with pytest.raises(ZeroDivisionError):
        torch_lrs(partial(lr_scheduler.OneCycleLR, max_lr=1.0, cycle_momentum=False, **kwargs), 1.0, 4)
    assert S.one_cycle(1.0, **kwargs)(0) == 1.0
    assert S.one_cycle(1.0, **kwargs)(3) == 1 / 25 / 1e4


def test_a_restart_is_found_where_torchs_logarithm_misses_it():
    optimizer = torch.optim.SGD([torch.zeros(1)], 1.0)
    theirs = lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=1, T_mult=3)
    theirs.step(121)  # 1 + 3 + 9 + 27 + 81
    assert optimizer.param_groups[0]["lr"] == 0.0
    assert S.cosine_with_restarts(1.0, T_0=1, T_mult=3)(121) == 1.0


def test_lambda_gets_counts_in_float64():
    seen = []
    S.lambda_(1.0, lambda t: seen.append(t) or t)(torch.arange(3))
    assert seen[0].dtype == torch.float64
    lrs = S.lambda_(1.0, lambda t: 0.95**t)(COUNTS)
    assert lrs.tolist() == pytest.approx([0.95**t for t in range(STEPS)], rel=1e-14)
    assert (0.95**COUNTS).dtype == torch.float32, "the trap is gone"
    single = S.lambda_(0.7, lambda t: 0.5 ** t.float())(COUNTS)
    torch.testing.assert_close(single, 0.7 * 0.5 ** COUNTS.double(), rtol=1e-15, atol=0)


# Exact corners.


@few
@given(st.integers(1, 9), st.integers(1, 5), st.floats(0.01, 2), st.floats(0, 0.5))
def test_restarts_fall_on_their_counts(T_0, T_mult, lr, eta_min):
    schedule = S.cosine_with_restarts(lr, T_0, T_mult, eta_min)
    expected, cycle = [], T_0
    while len(expected) < 1500:
        expected += [
            eta_min + (lr - eta_min) * (1 + math.cos(math.pi * k / cycle)) / 2 for k in range(cycle)
        ]
        cycle *= T_mult
    got = schedule(torch.arange(len(expected)))
    assert (got - scalar(expected)).abs().max() <= 1e-15 * 4 * (lr + eta_min)
    start, length = 0, T_0
    for _ in range(500):  # to the last restart that an int64 can hold, where there are that few
        if start + length >= 2**63:
            break
        assert schedule(start) == lr
        start, length = start + length, length * T_mult


@pytest.mark.parametrize("T_mult", [1, 2, 3])
def test_a_restart_far_away_is_exact(T_mult):
    start = 7 * 10**17 if T_mult == 1 else 7 * (T_mult**36 - 1) // (T_mult - 1)
    before, at = S.cosine_with_restarts(1.0, 7, T_mult)(torch.tensor([start - 1, start]))
    assert at == 1.0
    assert before < 0.1


@given(st.lists(st.integers(0, 30), max_size=6), GAMMA)
def test_milestones_come_in_any_order_and_count_as_often_as_they_stand_there(milestones, gamma):
    lrs = S.multi_step(1.0, milestones, gamma)(COUNTS)
    expected = [gamma ** sum(m <= t for m in milestones) for t in range(STEPS)]
    assert lrs.tolist() == pytest.approx(expected, rel=1e-14)


@given(LR, st.floats(0, 2), st.floats(0, 2), st.integers(1, 40))
def test_ends_are_hit_exactly(lr, start, end, total):
    line = S.linear(lr, start, end, total)(torch.tensor([0, total, total + 1, 10**9]))
    assert line.tolist() == [lr * start, lr * end, lr * end, lr * end]
    fall = S.polynomial(lr, total, 1 + start)(torch.tensor([0, total, 10**9]))
    assert fall.tolist() == [lr, 0, 0]
    rise = S.warmup(S.constant(lr), total, start)(torch.tensor([0, total, 10**9]))
    assert rise.tolist() == [lr * start, lr, lr]


def test_a_warmup_of_no_steps_is_the_schedule():
    schedule = S.exponential(1.0, 0.9)
    assert torch.equal(S.warmup(schedule, 0)(COUNTS), schedule(COUNTS))


def test_a_part_of_a_sequence_sees_its_own_counts_only():
    seen = []

    def spy(counts):
        seen.append((int(counts.min()), int(counts.max())))
        return counts.double()

    lrs = S.sequential([spy, spy, spy], [5, 8])(COUNTS)
    assert seen == [(0, 4), (0, 2), (0, STEPS - 9)]
    assert lrs.tolist() == [*range(5), *range(3), *range(STEPS - 8)]
    assert torch.equal(S.sequential([S.constant(0.3)], [])(COUNTS), S.constant(0.3)(COUNTS))


# One table for what holds of each: name -> (scalars -> schedule, scalars in general position).
TABLE = {
    "constant": (lambda lr, f: S.constant(lr, f, 5), (0.7, 0.4)),
    "step": (lambda lr, g: S.step(lr, 3, g), (0.7, 0.6)),
    "multi_step": (lambda lr, g: S.multi_step(lr, [9, 2, 9], g), (0.7, 0.6)),
    "exponential": (lambda lr, g: S.exponential(lr, g), (0.7, 0.9)),
    "linear": (lambda lr, a, b: S.linear(lr, a, b, 7), (0.7, 0.3, 0.8)),
    "polynomial": (lambda lr, p: S.polynomial(lr, 7, p), (0.7, 1.7)),
    "cosine_annealing": (lambda lr, low: S.cosine_annealing(lr, 7, low), (0.7, 0.1)),
    "cosine_with_restarts": (lambda lr, low: S.cosine_with_restarts(lr, 3, 2, low), (0.7, 0.1)),
    "one_cycle": (lambda *a: S.one_cycle(a[0], 30, a[1], "cos", *a[2:]), (0.7, 0.37, 9.0, 50.0)),
    "one_cycle linear": (
        lambda *a: S.one_cycle(a[0], 30, a[1], "linear", *a[2:], three_phase=True),
        (0.7, 0.37, 9.0, 50.0),
    ),
    "inverse_time": (lambda lr, d: S.inverse_time(lr, d), (0.7, 0.2)),
    "lambda_": (lambda lr, p: S.lambda_(lr, lambda t: (1 + t) ** -p), (0.7, 0.5)),
    "warmup": (lambda lr, g, f: S.warmup(S.exponential(lr, g), 5, f), (0.7, 0.9, 0.3)),
    "sequential": (
        lambda lr, g: S.sequential([S.constant(lr), S.exponential(lr, g), S.inverse_time(lr, g)], [4, 9]),
        (0.7, 0.9),
    ),
}
# Where formulas divide by zero, take its logarithm, or have a factor of zero.
CYCLES = [(0.5, 1 / 30, 2.0, 2.0), (0.5, 0.0, 2.0, 2.0), (0.5, 1.0, 2.0, 2.0)]
CORNERS = {
    "constant": [(0.0, 0.0)],
    "step": [(0.0, 0.0)],
    "inverse_time": [(0.0, 0.0)],
    "multi_step": [(0.5, 0.0)],
    "exponential": [(0.5, 0.0), (0.5, 1.0)],
    "linear": [(0.5, 0.0, 0.0)],
    "polynomial": [(0.5, 1.0), (0.5, 2.0), (0.5, 0.5)],
    "cosine_annealing": [(0.0, 0.0), (0.5, 0.5)],
    "cosine_with_restarts": [(0.0, 0.0), (0.5, 0.5)],
    "one_cycle": CYCLES,
    "one_cycle linear": CYCLES,
    "lambda_": [(0.0, 0.5)],
    "warmup": [(0.0, 0.0, 0.0), (0.5, 0.0, 1.0)],
    "sequential": [(0.0, 0.0), (0.5, 50.0)],
}


def test_the_tables_have_every_schedule():
    named = {name.split()[0] for name in TABLE}
    public = {name for name, value in vars(S).items() if inspect.isfunction(value)}
    assert named == public
    assert set(CORNERS) == set(TABLE)


def of(name, dtype=torch.float64):
    make, values = TABLE[name]
    return make, tuple(scalar(value, dtype) for value in values)


@pytest.mark.parametrize("name", TABLE)
def test_one_count_is_an_entry_of_many(name):
    schedule = TABLE[name][0](*TABLE[name][1])
    lrs = schedule(COUNTS)
    assert lrs.shape == COUNTS.shape
    for dtype in (None, torch.int64, torch.uint8):
        singles = [schedule(torch.tensor(t, dtype=dtype) if dtype else t) for t in range(STEPS)]
        assert {(single.shape, single.dtype) for single in singles} == {((), torch.float64)}
        torch.testing.assert_close(torch.stack(singles), lrs, rtol=1e-14, atol=1e-16)
    assert torch.equal(schedule(COUNTS.view(6, 7)), lrs.view(6, 7))
    assert schedule(COUNTS[:0]).shape == (0,)
    torch.testing.assert_close(vmap(schedule)(COUNTS), lrs, rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_result_is_rounded_once_to_the_dtype_of_lr(name, dtype):
    make, scalars = of(name, dtype)
    exact = make(*(value.double() for value in scalars))
    late = COUNTS + 10**6  # neither exact in half precision nor within its range
    for counts in (COUNTS, late):
        lrs = make(*scalars)(counts)
        assert lrs.dtype == dtype
        # A joined or warmed-up schedule rounds that of its part too.
        torch.testing.assert_close(lrs, exact(counts).to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("name", TABLE)
def test_rows_of_vmap_are_single_schedules_and_tensors_are_numbers(name):
    make, scalars = of(name)
    expected = make(*TABLE[name][1])(COUNTS)
    torch.testing.assert_close(make(*scalars)(COUNTS), expected, rtol=1e-14, atol=0)
    spread = [value * torch.tensor([1.0, 0.8, 1.1], dtype=torch.float64) for value in scalars]
    rows = vmap(lambda *values: make(*values)(COUNTS))(*spread)
    singles = [make(*values)(COUNTS) for values in zip(*spread, strict=True)]
    torch.testing.assert_close(rows, torch.stack(singles), rtol=1e-14, atol=1e-16)
    assert not torch.equal(rows[0], rows[1])
    for i in range(len(scalars)):  # one of them alone, the others as numbers

        def alone(value, i=i, values=TABLE[name][1]):
            return make(*values[:i], value, *values[i + 1 :])(COUNTS)

        torch.testing.assert_close(vmap(alone)(spread[i])[0], singles[0], rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("name", TABLE)
def test_derivatives_are_finite_differences(name):
    make, scalars = of(name)

    def lrs(*values):
        return make(*values)(COUNTS)

    slopes = jacrev(lrs, tuple(range(len(scalars))))(*scalars)
    assert all(slope.abs().sum() > 0 for slope in slopes)
    weights = torch.linspace(1, 2, STEPS, dtype=torch.float64)
    assert_derivatives(lambda *values: lrs(*values) @ weights, *scalars)


@pytest.mark.parametrize(
    ("name", "values"), [(name, corner) for name in CORNERS for corner in CORNERS[name]]
)
def test_derivatives_are_finite_in_every_corner(name, values):
    counts = torch.cat([COUNTS, torch.tensor([500])])
    scalars = tuple(map(scalar, values))

    def lrs(*values):
        return TABLE[name][0](*values)(counts)

    where = tuple(range(len(scalars)))
    first, forward = jacrev(lrs, where), jacfwd(lrs, where)
    assert lrs(*scalars).isfinite().all()
    for columns in (first(*scalars), forward(*scalars), *jacrev(first, where)(*scalars)):
        for column in columns:
            assert torch.as_tensor(column).isfinite().all()


def test_a_part_that_would_overflow_elsewhere_spoils_no_derivative():
    counts = torch.tensor([0, 3, 10**6])

    def last(gamma):
        return S.sequential([S.exponential(1.0, gamma), S.constant(0.1)], [4])(counts).sum()

    assert grad(last)(scalar(2.0)) == 3 * 2**2


@pytest.mark.parametrize("name", TABLE)
def test_nothing_is_written_and_nothing_shared(name):
    make, scalars = of(name)
    assert_pure(lambda counts, *scalars: [make(*scalars)(counts) for _ in range(2)], COUNTS, *scalars)


# What is refused.

ONE = S.constant(1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: S.constant(-0.1), r"lr must be a finite number in \[0, inf\).*got -0.1"),
        (lambda: S.constant(math.nan), "lr must be"),
        (lambda: S.constant(True), "lr must be"),
        (lambda: S.constant(torch.ones(1)), r"lr must be .*shape \(1,\)"),
        (lambda: S.constant(1.0, -1.0), "factor must be"),
        (lambda: S.constant(1.0, 1.0, -1), "total_iters must be an int >= 0; got -1"),
        (lambda: S.step(1.0, 0), "step_size must be an int >= 1; got 0"),
        (lambda: S.step(1.0, 2.0), "step_size must be an int >= 1; got 2.0"),
        (lambda: S.step(1.0, 2, -0.5), "gamma must be"),
        (lambda: S.multi_step(1.0, [3, -1]), r"milestones\[1\] must be an int >= 0; got -1"),
        (lambda: S.multi_step(1.0, 3), "TypeError: milestones must be a sequence; got 3"),
        (lambda: S.multi_step(1.0, [3], math.inf), "gamma must be"),
        (lambda: S.exponential(1.0, -0.5), "gamma must be"),
        (lambda: S.linear(1.0, -0.5), "start_factor must be"),
        (lambda: S.linear(1.0, 0.5, -0.5), "end_factor must be"),
        (lambda: S.linear(1.0, total_iters=0), "total_iters must be an int >= 1; got 0"),
        (lambda: S.polynomial(1.0, 0), "total_iters must be an int >= 1; got 0"),
        (lambda: S.cosine_annealing(1.0, 0), "T_max must be an int >= 1; got 0"),
        (lambda: S.cosine_annealing(1.0, 5, -1.0), "eta_min must be"),
        (lambda: S.cosine_with_restarts(1.0, 0), "T_0 must be an int >= 1; got 0"),
        (lambda: S.cosine_with_restarts(1.0, 3, 0), "T_mult must be an int >= 1; got 0"),
        (lambda: S.cosine_with_restarts(1.0, 3, 1, -1.0), "eta_min must be"),
        (lambda: S.one_cycle(-1.0, 5), "max_lr must be"),
        (lambda: S.one_cycle(1.0, 0), "total_steps must be an int >= 1; got 0"),
        (lambda: S.one_cycle(1.0, 5, 1.5), r"pct_start must be a finite number in \[0, 1\].*got 1.5"),
        (lambda: S.one_cycle(1.0, 5, anneal_strategy="sin"), "anneal_strategy must be 'cos' or 'linear'"),
        (lambda: S.one_cycle(1.0, 5, div_factor=0.0), "div_factor must be"),
        (lambda: S.one_cycle(1.0, 5, final_div_factor=0.0), "final_div_factor must be"),
        (lambda: S.inverse_time(1.0, -1.0), "decay must be"),
        (lambda: S.lambda_(1.0, 0.5), "TypeError: lr_lambda must be a function of the count; got 0.5"),
        (
            lambda: S.lambda_(1.0, lambda t: 0.5)(COUNTS),
            "TypeError: lr_lambda must return a tensor.*got float",
        ),
        (
            lambda: S.lambda_(1.0, lambda t: t.sum())(COUNTS),
            r"counts of shape \(42,\) and returned shape \(\)",
        ),
        (lambda: S.warmup(0.1, 5), "TypeError: schedule must be a function of the count; got 0.1"),
        (lambda: S.warmup(ONE, -1), "steps must be an int >= 0; got -1"),
        (lambda: S.warmup(ONE, 5, -1.0), "start_factor must be"),
        (lambda: S.sequential([], []), "got 0 milestones and 0 schedules"),
        (lambda: S.sequential([ONE], [3]), "got 1 milestones and 1 schedules"),
        (lambda: S.sequential([ONE, 0.1], [3]), r"TypeError: schedules\[1\] must be a function"),
        (lambda: S.sequential(ONE, [3]), "TypeError: schedules must be a sequence"),
        (lambda: S.sequential([ONE] * 2, [0]), r"milestones\[0\] must be an int >= 1"),
        (lambda: S.sequential([ONE] * 3, [4, 4]), r"milestones must rise; got \[4, 4\]"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    assert_refused(call, message)


@pytest.mark.parametrize("name", TABLE)
def test_bad_counts_are_refused(name):
    schedule = TABLE[name][0](*TABLE[name][1])
    for count in (-1, 1.5, True, "1"):
        with pytest.raises(ValueError, match="count must be an int >= 0; got"):
            schedule(count)
    for count in (COUNTS.double(), COUNTS > 3, COUNTS.cfloat()):
        with pytest.raises(
            TypeError, match=r"count must be an int or an integer tensor.*got a tensor of torch\."
        ):
            schedule(count)
