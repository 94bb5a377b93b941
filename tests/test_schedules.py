"""Schedules: parity with torch's, exact corners, derivatives, batching, and what they refuse."""

import inspect
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.func import grad, jacfwd, jacrev, vmap
from torch.optim import lr_scheduler

import gdfunc as gd
from gdfunc import schedules

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
SAME_ARGUMENTS = {
    "constant": ("ConstantLR", {"factor": FACTOR, "total_iters": st.integers(2, 30)}),
    "step": ("StepLR", {"step_size": st.integers(2, 15), "gamma": GAMMA}),
    "multi_step": (
        "MultiStepLR",
        {"milestones": st.lists(st.integers(1, STEPS - 2), min_size=1, max_size=6), "gamma": GAMMA},
    ),
    "exponential": ("ExponentialLR", {"gamma": GAMMA}),
    "linear": (
        "LinearLR",
        {
            "start_factor": floats(0.1, 0.45),
            "end_factor": floats(0.5, 0.95),
            "total_iters": st.integers(2, 50),
        },
    ),
    "polynomial": ("PolynomialLR", {"total_iters": st.integers(2, 50), "power": floats(1.2, 3)}),
    "cosine_annealing": ("CosineAnnealingLR", {"T_max": st.integers(2, 50), "eta_min": floats(1e-3, 0.5)}),
    "cosine_with_restarts": (
        "CosineAnnealingWarmRestarts",
        {"T_0": st.integers(2, 12), "T_mult": st.integers(1, 4), "eta_min": floats(1e-3, 0.5)},
    ),
}


@pytest.mark.parametrize("name", SAME_ARGUMENTS)
@given(data=st.data())
def test_it_is_torchs(name, data):
    theirs, arguments = SAME_ARGUMENTS[name]
    lr, kwargs = data.draw(LR), data.draw(st.fixed_dictionaries(arguments))
    assume(abs(kwargs.get("eta_min", 0) - lr) > 1e-3)
    expected = torch_lrs(lambda optimizer: getattr(lr_scheduler, theirs)(optimizer, **kwargs), lr)
    assert_parity(getattr(schedules, name)(lr, **kwargs), expected, lr + kwargs.get("eta_min", 0))


@given(
    LR,
    st.fixed_dictionaries(
        {
            "total_steps": st.integers(2, 60),
            "pct_start": floats(0.05, 0.95),
            "anneal_strategy": st.sampled_from(["cos", "linear"]),
            "div_factor": floats(2, 50),
            "final_div_factor": floats(2, 1e4),
            "three_phase": st.booleans(),
        }
    ),
)
def test_one_cycle_is_torchs(lr, kwargs):
    total = kwargs["total_steps"]
    # A rise of almost no length magnifies the rounding of its end; of none, torch divides by zero.
    assume(abs(kwargs["pct_start"] * total - 1) > 1e-2)
    expected = torch_lrs(
        lambda optimizer: lr_scheduler.OneCycleLR(optimizer, lr, cycle_momentum=False, **kwargs), lr, total
    )
    assert_parity(schedules.one_cycle(lr, **kwargs), expected, lr)


@given(LR, floats(0.05, 3))
def test_inverse_time_and_lambda_are_torchs(lr, decay):
    expected = torch_lrs(lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + decay * t)), lr)
    assert_parity(schedules.inverse_time(lr, decay), expected, lr)
    assert_parity(schedules.lambda_(lr, lambda t: 1 / (1 + decay * t)), expected, lr)


@given(LR, floats(0.1, 0.9), st.integers(1, 20), GAMMA)
def test_warmup_is_torchs(lr, start_factor, steps, gamma):
    def theirs(optimizer):
        rise = lr_scheduler.LinearLR(optimizer, start_factor, 1.0, steps)
        return lr_scheduler.SequentialLR(
            optimizer, [rise, lr_scheduler.ExponentialLR(optimizer, gamma)], [steps]
        )

    ours = schedules.warmup(schedules.exponential(lr, gamma), steps, start_factor)
    assert_parity(ours, torch_lrs(theirs, lr), lr)


@given(
    LR, st.lists(st.integers(1, STEPS - 2), min_size=2, max_size=2, unique=True), GAMMA, st.integers(2, 9)
)
def test_sequential_is_torchs(lr, milestones, gamma, size):
    milestones = sorted(milestones)

    def theirs(optimizer):
        parts = [
            lr_scheduler.ConstantLR(optimizer, 0.3, size),
            lr_scheduler.StepLR(optimizer, size, gamma),
            lr_scheduler.PolynomialLR(optimizer, 3 * size, 1.5),
        ]
        return lr_scheduler.SequentialLR(optimizer, parts, milestones)

    parts = [
        schedules.constant(lr, 0.3, size),
        schedules.step(lr, size, gamma),
        schedules.polynomial(lr, 3 * size, 1.5),
    ]
    assert_parity(schedules.sequential(parts, milestones), torch_lrs(theirs, lr), lr)


# Where torch is not copied.


def test_constant_alone_is_constant_and_its_first_phase_may_be_empty():
    assert torch.equal(schedules.constant(0.7)(COUNTS), torch.full((STEPS,), 0.7, dtype=torch.float64))
    theirs = torch_lrs(lambda o: lr_scheduler.ConstantLR(o, 0.5, total_iters=0), 0.7)
    assert set(theirs.tolist()) == {0.35}, "torch has changed: say so in the docstring"
    assert set(schedules.constant(0.7, 0.5, total_iters=0)(COUNTS).tolist()) == {0.7}
    assert torch_lrs(lr_scheduler.ConstantLR, 0.7)[0] == pytest.approx(0.7 / 3)


def test_linear_may_start_at_zero():
    with pytest.raises(ValueError, match="greater than 0"):
        torch_lrs(lambda o: lr_scheduler.LinearLR(o, 0.0), 1.0)
    assert schedules.linear(1.0, 0.0, total_iters=4)(COUNTS[:6]).tolist() == [0, 0.25, 0.5, 0.75, 1, 1]


def test_polynomial_refuses_the_power_that_is_constant():
    assert set(torch_lrs(lambda o: lr_scheduler.PolynomialLR(o, 5, 0.0), 1.0).tolist()) == {1.0}
    with pytest.raises(ValueError, match=r"power must be a finite number in \(0, inf\)"):
        schedules.polynomial(1.0, 5, 0.0)


def test_cosine_annealing_is_periodic_and_can_be_held():
    lrs = schedules.cosine_annealing(2.0, 7, 0.5)(torch.arange(60))
    assert torch.equal(lrs[14:], lrs[:-14])
    assert (lrs[0], lrs[7], lrs[14]) == (2.0, 0.5, 2.0)
    far = torch.tensor([14 * 10**15 + 3])
    assert torch.equal(schedules.cosine_annealing(2.0, 7, 0.5)(far), lrs[3:4])
    held = schedules.sequential([schedules.cosine_annealing(2.0, 7, 0.5), schedules.constant(0.5)], [7])(
        COUNTS
    )
    assert torch.equal(held[:7], lrs[:7])
    assert set(held[7:].tolist()) == {0.5}


@pytest.mark.parametrize("anneal_strategy", ["cos", "linear"])
def test_one_cycle_stays_at_its_end(anneal_strategy):
    kwargs = {"total_steps": 10, "pct_start": 0.4, "anneal_strategy": anneal_strategy}
    ours = schedules.one_cycle(1.0, **kwargs)(torch.arange(14))
    assert set(ours[9:].tolist()) == {1 / 25 / 1e4}
    past = torch_lrs(lambda o: lr_scheduler.OneCycleLR(o, 1.0, cycle_momentum=False, **kwargs), 1.0, 11)[10]
    assert abs(past - ours[10]) > 1e-3
    with pytest.raises(ValueError, match="Tried to step 11 times"):
        torch_lrs(lambda o: lr_scheduler.OneCycleLR(o, 1.0, cycle_momentum=False, **kwargs), 1.0, 12)


def test_one_cycle_with_a_rise_of_no_length_starts_at_its_top():
    kwargs = {"total_steps": 4, "pct_start": 0.25}
    with pytest.raises(ZeroDivisionError):
        torch_lrs(lambda o: lr_scheduler.OneCycleLR(o, 1.0, cycle_momentum=False, **kwargs), 1.0, 4)
    assert schedules.one_cycle(1.0, **kwargs)(0) == 1.0
    assert schedules.one_cycle(1.0, **kwargs)(3) == 1 / 25 / 1e4


def test_a_restart_is_found_where_torchs_logarithm_misses_it():
    optimizer = torch.optim.SGD([torch.zeros(1)], 1.0)
    theirs = lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=1, T_mult=3)
    theirs.step(121)  # 1 + 3 + 9 + 27 + 81
    assert optimizer.param_groups[0]["lr"] == 0.0
    assert schedules.cosine_with_restarts(1.0, T_0=1, T_mult=3)(121) == 1.0


def test_lambda_gets_counts_in_float64():
    seen = []
    schedules.lambda_(1.0, lambda t: seen.append(t) or t)(torch.arange(3))
    assert seen[0].dtype == torch.float64
    lrs = schedules.lambda_(1.0, lambda t: 0.95**t)(COUNTS)
    assert lrs.tolist() == pytest.approx([0.95**t for t in range(STEPS)], rel=1e-14)
    assert (0.95**COUNTS).dtype == torch.float32, "the trap is gone"


# Exact corners.


@given(st.integers(1, 9), st.integers(1, 5), st.floats(0.01, 2), st.floats(0, 0.5))
def test_restarts_fall_on_their_counts(T_0, T_mult, lr, eta_min):
    schedule = schedules.cosine_with_restarts(lr, T_0, T_mult, eta_min)
    expected, cycle = [], T_0
    while len(expected) < 1500:
        expected += [
            eta_min + (lr - eta_min) * (1 + math.cos(math.pi * k / cycle)) / 2 for k in range(cycle)
        ]
        cycle *= T_mult
    got = schedule(torch.arange(len(expected)))
    assert (got - scalar(expected)).abs().max() <= 1e-15 * 4 * (lr + eta_min)
    start, length = 0, T_0
    for _ in range(2000):  # to the last restart that an int64 can hold, where there are that few
        if start + length >= 2**63:
            break
        assert schedule(start) == lr
        start, length = start + length, length * T_mult


@pytest.mark.parametrize("T_mult", [1, 2, 3])
def test_a_restart_far_away_is_exact(T_mult):
    start = 7 * 10**17 if T_mult == 1 else 7 * (T_mult**36 - 1) // (T_mult - 1)
    before, at = schedules.cosine_with_restarts(1.0, 7, T_mult)(torch.tensor([start - 1, start]))
    assert at == 1.0
    assert before < 0.1


@given(st.lists(st.integers(0, 30), max_size=6), GAMMA)
def test_milestones_come_in_any_order_and_count_as_often_as_they_stand_there(milestones, gamma):
    lrs = schedules.multi_step(1.0, milestones, gamma)(COUNTS)
    expected = [gamma ** sum(m <= t for m in milestones) for t in range(STEPS)]
    assert lrs.tolist() == pytest.approx(expected, rel=1e-14)


@given(LR, st.floats(0, 2), st.floats(0, 2), st.integers(1, 40))
def test_ends_are_hit_exactly(lr, start, end, total):
    line = schedules.linear(lr, start, end, total)(torch.tensor([0, total, total + 1, 10**9]))
    assert line.tolist() == [lr * start, lr * end, lr * end, lr * end]
    fall = schedules.polynomial(lr, total, 1 + start)(torch.tensor([0, total, 10**9]))
    assert fall.tolist() == [lr, 0, 0]
    rise = schedules.warmup(schedules.constant(lr), total, start)(torch.tensor([0, total, 10**9]))
    assert rise.tolist() == [lr * start, lr, lr]


def test_a_warmup_of_no_steps_is_the_schedule():
    schedule = schedules.exponential(1.0, 0.9)
    assert torch.equal(schedules.warmup(schedule, 0)(COUNTS), schedule(COUNTS))


def test_a_part_of_a_sequence_sees_its_own_counts_only():
    seen = []

    def spy(counts):
        seen.append((int(counts.min()), int(counts.max())))
        return counts.double()

    lrs = schedules.sequential([spy, spy, spy], [5, 8])(COUNTS)
    assert seen == [(0, 4), (0, 2), (0, STEPS - 9)]
    assert lrs.tolist() == [*range(5), *range(3), *range(STEPS - 8)]
    assert torch.equal(
        schedules.sequential([schedules.constant(0.3)], [])(COUNTS), schedules.constant(0.3)(COUNTS)
    )


# One table for what holds of each: name -> (scalars -> schedule, scalars in general position).
TABLE = {
    "constant": (lambda lr, f: schedules.constant(lr, f, 5), (0.7, 0.4)),
    "step": (lambda lr, g: schedules.step(lr, 3, g), (0.7, 0.6)),
    "multi_step": (lambda lr, g: schedules.multi_step(lr, [9, 2, 9], g), (0.7, 0.6)),
    "exponential": (lambda lr, g: schedules.exponential(lr, g), (0.7, 0.9)),
    "linear": (lambda lr, a, b: schedules.linear(lr, a, b, 7), (0.7, 0.3, 0.8)),
    "polynomial": (lambda lr, p: schedules.polynomial(lr, 7, p), (0.7, 1.7)),
    "cosine_annealing": (lambda lr, low: schedules.cosine_annealing(lr, 7, low), (0.7, 0.1)),
    "cosine_with_restarts": (lambda lr, low: schedules.cosine_with_restarts(lr, 3, 2, low), (0.7, 0.1)),
    "one_cycle": (lambda *a: schedules.one_cycle(a[0], 30, a[1], "cos", *a[2:]), (0.7, 0.37, 9.0, 50.0)),
    "one_cycle linear": (
        lambda *a: schedules.one_cycle(a[0], 30, a[1], "linear", *a[2:], three_phase=True),
        (0.7, 0.37, 9.0, 50.0),
    ),
    "inverse_time": (lambda lr, d: schedules.inverse_time(lr, d), (0.7, 0.2)),
    "lambda_": (lambda lr, p: schedules.lambda_(lr, lambda t: (1 + t) ** -p), (0.7, 0.5)),
    "warmup": (lambda lr, g, f: schedules.warmup(schedules.exponential(lr, g), 5, f), (0.7, 0.9, 0.3)),
    "sequential": (
        lambda lr, g: schedules.sequential(
            [schedules.constant(lr), schedules.exponential(lr, g), schedules.inverse_time(lr, g)], [4, 9]
        ),
        (0.7, 0.9),
    ),
}
# Where formulas divide by zero, take its logarithm, or have a factor of zero.
CORNERS = {
    "constant": [(0.0, 0.0)],
    "step": [(0.0, 0.0)],
    "multi_step": [(0.5, 0.0)],
    "exponential": [(0.5, 0.0), (0.5, 1.0)],
    "linear": [(0.5, 0.0, 0.0)],
    "polynomial": [(0.5, 1.0), (0.5, 2.0), (0.5, 0.5)],
    "cosine_annealing": [(0.0, 0.0), (0.5, 0.5)],
    "cosine_with_restarts": [(0.0, 0.0), (0.5, 0.5)],
    "one_cycle": [(0.5, 1 / 30, 2.0, 2.0), (0.5, 0.0, 2.0, 2.0), (0.5, 1.0, 2.0, 2.0)],
    "one_cycle linear": [(0.5, 1 / 30, 2.0, 2.0), (0.5, 0.0, 2.0, 2.0), (0.5, 1.0, 2.0, 2.0)],
    "inverse_time": [(0.0, 0.0)],
    "lambda_": [(0.0, 0.5)],
    "warmup": [(0.0, 0.0, 0.0), (0.5, 0.0, 1.0)],
    "sequential": [(0.0, 0.0), (0.5, 50.0)],
}


def test_the_tables_have_every_schedule():
    named = {name.split()[0] for name in TABLE}
    public = {name for name, value in vars(schedules).items() if inspect.isfunction(value)}
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
    for one in [
        schedule,
        lambda t: schedule(torch.tensor(t)),
        lambda t: schedule(torch.tensor(t, dtype=torch.uint8)),
    ]:
        singles = [one(t) for t in range(STEPS)]
        assert {(single.shape, single.dtype) for single in singles} == {((), torch.float64)}
        torch.testing.assert_close(torch.stack(singles), lrs, rtol=1e-14, atol=1e-16)
    assert torch.equal(schedule(COUNTS.view(6, 7)), lrs.view(6, 7))
    assert schedule(COUNTS[:0]).shape == (0,)
    torch.testing.assert_close(vmap(schedule)(COUNTS), lrs, rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("name", TABLE)
def test_numbers_and_tensors_give_the_same(name):
    make, scalars = of(name)
    expected = make(*TABLE[name][1])(COUNTS)
    torch.testing.assert_close(make(*scalars)(COUNTS), expected, rtol=1e-14, atol=0)


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
def test_rows_of_vmap_are_single_schedules(name):
    make, scalars = of(name)
    spread = [value * torch.tensor([1.0, 0.8, 1.1], dtype=torch.float64) for value in scalars]
    rows = vmap(lambda *values: make(*values)(COUNTS))(*spread)
    singles = [make(*values)(COUNTS) for values in zip(*spread, strict=True)]
    torch.testing.assert_close(rows, torch.stack(singles), rtol=1e-14, atol=1e-16)
    assert not torch.equal(rows[0], rows[1])
    for i in range(len(scalars)):  # one of them alone, the others as numbers
        values = list(TABLE[name][1])
        alone = vmap(lambda value, i=i, values=values: make(*values[:i], value, *values[i + 1 :])(COUNTS))(
            spread[i]
        )
        torch.testing.assert_close(alone[0], singles[0], rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("name", TABLE)
def test_derivatives_are_finite_differences(name):
    make, scalars = of(name)

    def lrs(*values):
        return make(*values)(COUNTS)

    where = tuple(range(len(scalars)))
    for i, (backward, forward) in enumerate(
        zip(jacrev(lrs, where)(*scalars), jacfwd(lrs, where)(*scalars), strict=True)
    ):
        h = 1e-6 * scalars[i]
        up, down = (lrs(*scalars[:i], scalars[i] + sign * h, *scalars[i + 1 :]) for sign in (1, -1))
        torch.testing.assert_close(backward, (up - down) / (2 * h), rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(forward, backward, rtol=1e-12, atol=1e-14)
        assert backward.abs().sum() > 0


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
        return schedules.sequential([schedules.exponential(1.0, gamma), schedules.constant(0.1)], [4])(
            counts
        ).sum()

    assert grad(last)(scalar(2.0)) == 3 * 2**2


@pytest.mark.parametrize("name", TABLE)
def test_nothing_is_written_and_nothing_shared(name):
    make, scalars = of(name)
    counts = torch.arange(STEPS)
    inputs = (*scalars, counts)
    before = [(value.clone(), value._version) for value in inputs]
    lrs = make(*scalars)(counts)
    again = make(*scalars)(counts)
    pointers = [value.untyped_storage().data_ptr() for value in (*inputs, lrs, again)]
    assert len(set(pointers)) == len(pointers)
    for value, (copy, version) in zip(inputs, before, strict=True):
        assert torch.equal(value, copy)
        assert value._version == version


@pytest.mark.parametrize("name", TABLE)
def test_train_takes_it(name):
    x = torch.linspace(-1, 1, 12)
    index = gd.epoch_batches(gd.random.key(0), n=12, batch_size=3, epochs=5)
    lrs = TABLE[name][0](*TABLE[name][1])(torch.arange(len(index)))
    step = gd.make_step(lambda w, batch: ((batch * w - 3 * batch) ** 2).mean())
    final, trajectory = gd.train(step, torch.tensor(0.0), x, index, lrs, record=("loss", "lr"))
    assert final.dtype == torch.float32
    assert torch.equal(trajectory.lr, lrs.float())
    assert trajectory.loss[-1] < trajectory.loss[0]


def test_another_hyperparameter_is_scheduled_by_scanning_it():
    betas = schedules.linear(0.9, 0.5, 1.0, 10)(torch.arange(20))

    def body(carry, beta):
        w, v = carry
        v = beta * v + 2 * w
        return (w - 0.01 * v, v), beta

    (w, _), seen = gd.scan(body, (scalar(1.0), scalar(0.0)), betas)
    assert torch.equal(seen, betas)
    assert abs(w) < 1


def test_robbins_monro():
    lrs = schedules.inverse_time(1.0, 1.0)(torch.arange(10**6))
    assert lrs.sum() == pytest.approx(math.log(10**6) + 0.5772156649 + 0.5e-6, rel=1e-9)
    assert (lrs**2).sum() == pytest.approx(math.pi**2 / 6 - 1e-6, rel=1e-9)


# What is refused.

REFUSED = [
    (lambda: schedules.constant(-0.1), ValueError, r"lr must be a finite number in \[0, inf\).*got -0.1"),
    (lambda: schedules.constant(math.nan), ValueError, "lr must be"),
    (lambda: schedules.constant(True), ValueError, "lr must be"),
    (lambda: schedules.constant(torch.ones(1)), ValueError, r"lr must be .*shape \(1,\)"),
    (lambda: schedules.constant(1.0, -1.0), ValueError, "factor must be"),
    (lambda: schedules.constant(1.0, 1.0, -1), ValueError, "total_iters must be an int >= 0; got -1"),
    (lambda: schedules.step(1.0, 0), ValueError, "step_size must be an int >= 1; got 0"),
    (lambda: schedules.step(1.0, 2.0), ValueError, "step_size must be an int >= 1; got 2.0"),
    (lambda: schedules.step(1.0, 2, -0.5), ValueError, "gamma must be"),
    (
        lambda: schedules.multi_step(1.0, [3, -1]),
        ValueError,
        r"milestones\[1\] must be an int >= 0; got -1",
    ),
    (lambda: schedules.multi_step(1.0, 3), TypeError, "milestones must be a sequence; got 3"),
    (lambda: schedules.multi_step(1.0, [3], math.inf), ValueError, "gamma must be"),
    (lambda: schedules.exponential(1.0, -0.5), ValueError, "gamma must be"),
    (lambda: schedules.linear(1.0, -0.5), ValueError, "start_factor must be"),
    (lambda: schedules.linear(1.0, 0.5, -0.5), ValueError, "end_factor must be"),
    (lambda: schedules.linear(1.0, total_iters=0), ValueError, "total_iters must be an int >= 1; got 0"),
    (lambda: schedules.polynomial(1.0, 0), ValueError, "total_iters must be an int >= 1; got 0"),
    (lambda: schedules.cosine_annealing(1.0, 0), ValueError, "T_max must be an int >= 1; got 0"),
    (lambda: schedules.cosine_annealing(1.0, 5, -1.0), ValueError, "eta_min must be"),
    (lambda: schedules.cosine_with_restarts(1.0, 0), ValueError, "T_0 must be an int >= 1; got 0"),
    (lambda: schedules.cosine_with_restarts(1.0, 3, 0), ValueError, "T_mult must be an int >= 1; got 0"),
    (lambda: schedules.cosine_with_restarts(1.0, 3, 1, -1.0), ValueError, "eta_min must be"),
    (lambda: schedules.one_cycle(-1.0, 5), ValueError, "max_lr must be"),
    (lambda: schedules.one_cycle(1.0, 0), ValueError, "total_steps must be an int >= 1; got 0"),
    (
        lambda: schedules.one_cycle(1.0, 5, 1.5),
        ValueError,
        r"pct_start must be a finite number in \[0, 1\].*got 1.5",
    ),
    (
        lambda: schedules.one_cycle(1.0, 5, anneal_strategy="sin"),
        ValueError,
        "anneal_strategy must be 'cos' or 'linear'",
    ),
    (lambda: schedules.one_cycle(1.0, 5, div_factor=0.0), ValueError, "div_factor must be"),
    (lambda: schedules.one_cycle(1.0, 5, final_div_factor=0.0), ValueError, "final_div_factor must be"),
    (lambda: schedules.inverse_time(1.0, -1.0), ValueError, "decay must be"),
    (lambda: schedules.lambda_(1.0, 0.5), TypeError, "lr_lambda must be a function of the count; got 0.5"),
    (
        lambda: schedules.lambda_(1.0, lambda t: 0.5)(COUNTS),
        TypeError,
        "lr_lambda must return a tensor.*got float",
    ),
    (
        lambda: schedules.lambda_(1.0, lambda t: t.sum())(COUNTS),
        ValueError,
        r"counts of shape \(42,\) and returned shape \(\)",
    ),
    (lambda: schedules.warmup(0.1, 5), TypeError, "schedule must be a function of the count; got 0.1"),
    (
        lambda: schedules.warmup(schedules.constant(1.0), -1),
        ValueError,
        "steps must be an int >= 0; got -1",
    ),
    (lambda: schedules.warmup(schedules.constant(1.0), 5, -1.0), ValueError, "start_factor must be"),
    (lambda: schedules.sequential([], []), ValueError, "got 0 milestones and 0 schedules"),
    (
        lambda: schedules.sequential([schedules.constant(1.0)], [3]),
        ValueError,
        "got 1 milestones and 1 schedules",
    ),
    (
        lambda: schedules.sequential([schedules.constant(1.0), 0.1], [3]),
        TypeError,
        r"schedules\[1\] must be a function",
    ),
    (lambda: schedules.sequential(schedules.constant(1.0), [3]), TypeError, "schedules must be a sequence"),
    (
        lambda: schedules.sequential([schedules.constant(1.0)] * 2, [0]),
        ValueError,
        r"milestones\[0\] must be an int >= 1",
    ),
    (
        lambda: schedules.sequential([schedules.constant(1.0)] * 3, [4, 4]),
        ValueError,
        r"milestones must rise; got \[4, 4\]",
    ),
]


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_bad_arguments_are_refused(number):
    call, error, message = REFUSED[number]
    with pytest.raises(error, match=message):
        call()


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
