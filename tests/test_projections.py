"""Projections and Langevin noise: the laws of nearest points, and of what chains draw from."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, jacrev, vmap

import gdfunc as gd
from gdfunc import _tree
from gdfunc import testing as gt

from .references import few, linear_data, linear_loss, normal

seeds = st.integers(0, 2**32)
positive = st.floats(0.1, 3.0)


def in_box(params, low, high):
    return all(bool((leaf >= low).all() and (leaf <= high).all()) for leaf in params.values())


def in_ball(params, radius):
    return float(_tree.norm(params)) <= radius * (1 + 1e-12)


def on_simplex(params, total):
    return all(
        bool((leaf >= 0).all()) and torch.allclose(leaf.sum(-1), torch.tensor(total).double())
        for leaf in params.values()
    )


# Each projection: how it is made, its options, whether a point lies in its set.
FAMILY = {
    "box": (gd.projections.box, {"low": st.floats(-2.0, 0.0), "high": st.floats(0.0, 2.0)}, in_box),
    "ball": (gd.projections.ball, {"radius": positive}, in_ball),
    "simplex": (gd.projections.simplex, {"total": positive}, on_simplex),
}


def drawn_from(data, name):
    make, options, is_in = FAMILY[name]
    drawn = {key: data.draw(strategy, label=key) for key, strategy in options.items()}
    return make(**drawn), lambda params: is_in(params, **drawn)


def point(seed, scale=2.0):
    return {
        "a": scale * normal(seed, 5),
        "b": scale * normal(seed + 1, 2, 3),
        "c": scale * normal(seed + 2, 1),
    }


def minus(x, y):
    return _tree.map(torch.sub, x, y)


@pytest.mark.parametrize("name", FAMILY)
@given(st.data(), seeds, st.floats(0.01, 10.0))
def test_a_projection_is_the_nearest_point_of_its_set(name, data, seed, scale):
    """⟨θ − P(θ), y − P(θ)⟩ <= 0 for every y in the set, which no other point of it fulfils."""
    project, is_in = drawn_from(data, name)
    x, y = point(seed, scale), project(point(seed + 10, scale))
    nearest = project(x)
    assert is_in(nearest)
    assert is_in(y)
    size = 1 + float(_tree.norm(x)) ** 2
    assert float(_tree.dot(minus(x, nearest), minus(y, nearest))) <= 1e-12 * size


@pytest.mark.parametrize("name", FAMILY)
@given(st.data(), seeds)
def test_projections_are_idempotent_and_bring_no_two_points_further_apart(name, data, seed):
    project, _ = drawn_from(data, name)
    x, y = point(seed), point(seed + 10)
    torch.testing.assert_close(project(project(x)), project(x), rtol=1e-12, atol=1e-13)
    apart = _tree.norm(minus(project(x), project(y)))
    assert float(apart) <= float(_tree.norm(minus(x, y))) * (1 + 1e-12)


@given(seeds, st.integers(1, 6), positive)
def test_the_simplex_has_the_threshold_of_bisection(seed, size, total):
    x = 3 * normal(seed, size)
    low, high = float(x.min()) - total, float(x.max())
    for _ in range(100):
        tau = (low + high) / 2
        low, high = (tau, high) if np.maximum(x.numpy() - tau, 0).sum() > total else (low, tau)
    expected = np.maximum(x.numpy() - high, 0)
    np.testing.assert_allclose(gd.projections.simplex(total)(x).numpy(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("share", [0.1, 10.0, 1e30])
def test_the_simplex_has_its_total_however_large_the_entries_and_however_many(share, dtype):
    """The total is lost in the rounding of the entries; a row moved by a constant has the same point."""
    far = min(share / torch.finfo(dtype).eps, float(torch.finfo(dtype).max))
    for row, expected in [
        ([far, 0.0], [1.0, 0.0]),
        ([far, far, 0.0], [0.5, 0.5, 0.0]),
        ([-far, -far], [0.5, 0.5]),
    ]:
        nearest = gd.projections.simplex()(torch.tensor(row, dtype=dtype))
        torch.testing.assert_close(nearest, torch.tensor(expected, dtype=dtype))
    many = gd.projections.simplex()(torch.full((30000,), 0.3, dtype=dtype))
    torch.testing.assert_close(many.double().sum(), torch.tensor(1.0).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", FAMILY)
def test_projections_keep_dtypes_and_points_of_the_set_keep_their_bits(name, dtype):
    project = {"box": gd.projections.box(-1.0, None), "ball": gd.projections.ball(9.0)}.get(
        name, gd.projections.simplex()
    )
    inside = {"w": torch.tensor([0.25, 0.5, 0.25], dtype=dtype)}
    assert project(inside)["w"].dtype == dtype
    assert project(inside)["w"].equal(inside["w"])


@pytest.mark.parametrize("name", FAMILY)
def test_projections_map_and_differentiate(name):
    make = {
        "box": lambda h: gd.projections.box(-h, h),
        "ball": gd.projections.ball,
        "simplex": gd.projections.simplex,
    }[name]
    x, bounds = 2 * normal(0, 4), torch.tensor([0.3, 0.7, 1.1], dtype=torch.float64)
    rows = vmap(lambda bound: make(bound)(x))(bounds)
    torch.testing.assert_close(rows, torch.stack([make(float(b))(x) for b in bounds]), rtol=1e-12, atol=0)
    slope = grad(lambda bound: (make(bound)(x) * torch.arange(4.0)).sum())(bounds[0])
    ends = [(make(float(bounds[0]) + h)(x) * torch.arange(4.0)).sum() for h in (1e-6, -1e-6)]
    torch.testing.assert_close(slope, (ends[0] - ends[1]) / 2e-6, rtol=1e-5, atol=1e-7)
    # A projection is the gradient of a convex function, so its derivative is symmetric and positive.
    derivative = jacrev(make(0.7))(x)
    torch.testing.assert_close(derivative, derivative.mT, rtol=1e-9, atol=1e-12)
    eigenvalues = torch.linalg.eigvalsh(derivative)
    assert eigenvalues.min() > -1e-12
    assert eigenvalues.max() < 1 + 1e-12


DATA = linear_data(3, 6, 3)
START = {"w": normal(0, 3), "b": normal(1, 1)[0]}


def run_of(step, lr=0.1, steps=40, start=START, **options):
    return gd.train(step, step.init(start), DATA, gd.full_batch(6, steps), lr, **options)


METHODS = {
    "plain": gd.make_step,
    "adam": lambda loss_fn: gd.make_step(loss_fn, gd.adam()),
    "sam": gd.methods.sam,
    "polyak": gd.methods.polyak,
    "prodigy": gd.methods.prodigy,
    "ema": lambda loss_fn: gd.methods.ema(gd.make_step(loss_fn), 0.9),
    "add_noise": lambda loss_fn: gd.methods.add_noise(gd.make_step(loss_fn), 0.01, key=gd.random.key(0)),
    "a function": lambda loss_fn: (
        lambda w, batch, lr: (
            gd.apply_updates(w, gd.batch_grad(loss_fn)(w, batch)[0], lr),
            loss_fn(w, batch),
        )
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_point_of_every_method_lies_in_the_set(name):
    step = gd.methods.projected(METHODS[name](linear_loss), gd.projections.ball(0.4))
    start = gd.projections.ball(0.4)(START) if name == "a function" else START
    final, trajectory = gd.train(
        step, step.init(start), DATA, gd.full_batch(6, 20), 0.1, record=("params", "loss")
    )
    for t in range(20):
        assert in_ball(_tree.map(lambda leaf, t=t: leaf[t], trajectory.params), 0.4)
    assert in_ball(getattr(final, "params", final), 0.4)
    assert trajectory.loss[-1] != trajectory.loss[0]


@pytest.mark.long
def test_projected_descent_ends_where_no_direction_into_the_set_is_downhill():
    project = gd.projections.box(-0.2, 0.2)
    final, _ = run_of(gd.methods.projected(gd.make_step(linear_loss), project), steps=500)
    slope = grad(linear_loss)(final, DATA)
    ahead = gd.apply_updates(final, slope, 0.1)
    torch.testing.assert_close(project(ahead), final, rtol=1e-12, atol=1e-12)
    assert float(_tree.norm(slope)) > 0.01  # the minimum lies outside


@pytest.mark.long
@given(seeds, st.floats(0.05, 1.0))
def test_projected_descent_brings_no_two_runs_further_apart(seed, share):
    curvature = float(
        torch.linalg.eigvalsh(
            torch.func.hessian(lambda w: linear_loss({**START, "w": w}, DATA))(START["w"])
        ).max()
    )
    lr = share * 2 / (curvature + 2)
    step = gd.methods.projected(gd.make_step(linear_loss), gd.projections.ball(0.5))
    one, two = ({"w": normal(seed + i, 3), "b": normal(seed + 5 + i, 1)[0]} for i in (0, 1))
    one, two = step.init(one), step.init(two)
    for _ in range(5):
        before = float(_tree.norm(minus(one, two)))
        (one, _), (two, _) = step(one, DATA, lr), step(two, DATA, lr)
        assert float(_tree.norm(minus(one, two))) <= before * (1 + 1e-12) + 1e-15


def test_the_memory_of_a_transformation_stays_what_it_is():
    inner = gd.make_step(linear_loss, gd.momentum(0.9))
    step = gd.methods.projected(inner, gd.projections.ball(0.5))
    state = step.init(START)
    plain, _ = inner(state, DATA, 0.1)
    new, _ = step(state, DATA, 0.1)
    torch.testing.assert_close(new.opt_state, plain.opt_state, rtol=0, atol=0)
    torch.testing.assert_close(new.params, gd.projections.ball(0.5)(plain.params), rtol=0, atol=0)


@pytest.mark.long
def test_projected_runs_are_swept_and_compiled():
    start = {"w": START["w"], "b": START["b"][None]}

    def loss_fn(params, batch):
        return linear_loss({"w": params["w"], "b": params["b"][0]}, batch)

    step = gd.methods.projected(gd.make_step(loss_fn, gd.adam()), gd.projections.simplex())

    def run(lr, **options):
        return run_of(step, lr, start=start, **options)[0].params

    lrs = torch.tensor([0.01, 0.1], dtype=torch.float64)
    together = vmap(run)(lrs)
    for i, lr in enumerate(lrs):
        for options in ({"backend": "eager"}, {"backend": "native"}):
            alone = run(lr, **options)
            torch.testing.assert_close(
                _tree.map(lambda leaf, i=i: leaf[i], together), alone, rtol=1e-9, atol=1e-12
            )


# Langevin dynamics.


def quadratic(w, batch):
    return 0.5 * (torch.tensor([0.5, 1.0, 4.0], dtype=w.dtype) * w**2).sum(-1).sum()


def test_noise_has_the_stationary_variance_of_its_chain():
    """On ½·a·w² the chain w' = (1 − lr·a)·w + √(2·lr·T)·ξ has the variance T / (a·(1 − lr·a/2))."""
    chains, lr, temperature = 4000, 0.2, 0.3
    step = gd.methods.add_noise(gd.make_step(quadratic), temperature, key=gd.random.key(1))
    start = torch.zeros(chains, 3, dtype=torch.float64)
    final, _ = gd.train(step, step.init(start), None, gd.full_batch(1, 60), lr, backend="eager")
    curvature = torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64)
    expected = temperature / (curvature * (1 - lr * curvature / 2))
    ratio = final.params.var(0) / expected
    assert (ratio - 1).abs().max() < 6 * (2 / chains) ** 0.5
    assert final.params.mean(0).abs().max() < 6 * (expected.max() / chains) ** 0.5
    # The law sees a wrong factor, such as √(lr·T).
    assert (ratio / 2 - 1).abs().min() > 6 * (2 / chains) ** 0.5


def test_noise_of_every_step_leaf_and_key_is_its_own():
    def flat_loss(params, batch):
        return sum(0.0 * leaf.sum() for leaf in params.values())

    start = {"a": torch.zeros(500), "b": torch.zeros(500)}
    draws = []
    for seed in (0, 1):
        step = gd.methods.add_noise(gd.make_step(flat_loss), 0.5, key=gd.random.key(seed))
        carry = step.init(start)
        for _ in range(2):
            before = carry.params
            carry, _ = step(carry, None, 1.0)
            draws += _tree.leaves(minus(carry.params, before))
    rows = torch.stack(draws)
    assert (rows.std(1) - 1).abs().max() < 0.2
    together = torch.corrcoef(rows) - torch.eye(len(rows))
    assert together.abs().max() < 0.2


def test_noise_is_repeated_by_its_key_and_is_none_at_temperature_zero():
    def run(temperature, seed=0):
        step = gd.methods.add_noise(gd.make_step(linear_loss), temperature, key=gd.random.key(seed))
        return run_of(step, steps=5)[0].params

    assert run(0.1)["w"].equal(run(0.1)["w"])
    assert not run(0.1)["w"].equal(run(0.1, 1)["w"])
    torch.testing.assert_close(run(0.0), run_of(gd.make_step(linear_loss), steps=5)[0], rtol=1e-15, atol=0)


def test_a_sweep_over_keys_is_separate_chains():
    def run(key):
        step = gd.methods.add_noise(gd.make_step(linear_loss), 0.1, key=key)
        return run_of(step, steps=5)[0].params["w"]

    keys = gd.random.split(gd.random.key(0), 3)
    torch.testing.assert_close(vmap(run)(keys), torch.stack([run(key) for key in keys]), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda: gd.projections.box(1.0, 0.0),
            ValueError,
            "low must be at most high; got low=1.0 and high=0.0",
        ),
        (lambda: gd.projections.box(float("nan"), None), ValueError, "low must be a finite number"),
        (lambda: gd.projections.ball(0.0), ValueError, r"radius must be a finite number in \(0, inf\)"),
        (lambda: gd.projections.simplex(-1.0), ValueError, "total must be a finite number"),
        (lambda: gd.projections.simplex()(torch.tensor(1.0)), ValueError, "leaves with one dim or more"),
        (
            lambda: gd.projections.simplex()(torch.zeros(3, 0)),
            ValueError,
            r"and entries along the last one; got shape \(3, 0\)",
        ),
        (
            lambda: gd.methods.projected(gd.make_step(linear_loss), 1.0),
            TypeError,
            "projection is float, not a function",
        ),
        (
            lambda: gd.methods.projected(gd.make_step(linear_loss), lambda params: {"w": params["w"]}).init(
                START
            ),
            ValueError,
            r"projection\(params\) does not have the structure of params: missing params\['b'\]",
        ),
        (
            lambda: gd.methods.projected(
                gd.make_step(linear_loss), lambda params: {**params, "w": params["w"][:1]}
            ).init(START),
            ValueError,
            r"projection\(params\)\['w'\] has shape \(1,\) but params\['w'\] has \(3,\)",
        ),
        (
            lambda: gd.methods.projected(
                gd.make_step(linear_loss), lambda params: {**params, "w": params["w"].half()}
            ).init(START),
            ValueError,
            r"projection\(params\)\['w'\] is float16 but params\['w'\] is float64; keep the dtype",
        ),
        (
            lambda: gd.methods.add_noise(gd.make_step(linear_loss), -1.0, key=gd.random.key(0)),
            ValueError,
            "temperature must be a finite number",
        ),
        (lambda: gd.methods.add_noise(gd.make_step(linear_loss), key=0), (TypeError, ValueError), "key"),
    ],
)
def test_arguments_that_do_not_fit_raise(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


# The kit.

WRONG = {
    "soft": lambda params: _tree.map(lambda x: x.softmax(-1), params),
    "a sphere": lambda params: _tree.map(lambda x: x / _tree.norm(params).clamp(min=1e-30), params),
    "half the way": lambda params: _tree.lerp(params, gd.projections.ball(1.0)(params), 0.5),
    "divided by the sum": lambda params: _tree.map(
        lambda x: x.clamp(min=0) / x.clamp(min=0).sum(-1, keepdim=True).clamp(min=1e-9), params
    ),
    "reflected": lambda params: _tree.map(lambda x: 2 * x.clamp(-1, 1) - x, params),
    "two points": lambda params: _tree.map(lambda x: torch.where(x < 0, -1.0, 1.0).to(x), params),
    "another box for small entries": lambda params: _tree.map(
        lambda x: torch.where(x.abs() < 0.5, 0.9 * x, x.clamp(-1, 1)), params
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_kit_finds_a_function_that_is_no_projection(name):
    with pytest.raises(gt.LawBroken, match="check_projection broken"):
        gt.check_projection(WRONG[name])


@pytest.mark.long
@pytest.mark.parametrize("name", FAMILY)
@given(st.data())
@few
def test_the_kit_finds_nothing_wrong_with_ours(name, data):
    project, _ = drawn_from(data, name)
    gt.check_projection(project)
    gt.check_projection(project, {"x": torch.zeros(1), "y": torch.zeros(2, 2, 3)})


@pytest.mark.parametrize(
    "project", [gd.projections.box(0.0, None), gd.projections.ball(0.5), gd.projections.simplex()]
)
def test_projections_of_ours_keep_the_law(project):
    gt.check_projection(project)


def test_the_kit_finds_the_projection_onto_another_set():
    inside = {"w": torch.full((3,), 0.5, dtype=torch.float64)}
    gt.check_projection(gd.projections.ball(1.0), inside=inside)
    with pytest.raises(gt.LawBroken, match="for a point of the set"):
        gt.check_projection(gd.projections.ball(0.5), inside=inside)


INNER = {
    "gradient descent": (gd.chain(), gt.GradientDescent()),
    "momentum": (gd.momentum(0.5), gt.Momentum(0.5)),
    "adam": (gd.adam((0.5, 0.75)), gt.Adam((0.5, 0.75))),
}
SETS = {"ball": gd.projections.ball, "box": lambda size: gd.projections.box(-size, size)}


@pytest.mark.long
@pytest.mark.parametrize("onto", SETS)
@given(st.sampled_from(list(INNER.values())), st.floats(0.3, 3.0))
@few
def test_a_projected_method_keeps_the_claim(onto, inner, size):
    transform, claim = inner

    def make(loss_fn):
        return gd.methods.projected(gd.make_step(loss_fn, transform), SETS[onto](size))

    gt.check_kernel(gt.from_step(make), gt.Projected(claim, onto, size))


@pytest.mark.long
@pytest.mark.parametrize("onto", SETS)
def test_every_law_holds_of_projected_descent(onto):
    subject = gt.from_step(lambda loss_fn: gd.methods.projected(gd.make_step(loss_fn), SETS[onto](1.0)))
    assert "check_kernel" in gt.check_optimizer(subject, gt.Projected(onto=onto)).passed


def langevin(transform, temperature, seed=0):
    def make(loss_fn):
        return gd.methods.add_noise(gd.make_step(loss_fn, transform), temperature, key=gd.random.key(seed))

    return gt.from_step(make)


@pytest.mark.long
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("temperature", [0.0, 0.25])
def test_noise_keeps_the_claim(inner, temperature):
    transform, claim = INNER[inner]
    report = gt.check_optimizer(langevin(transform, temperature), gt.Langevin(claim, temperature))
    assert "check_langevin" in report.passed


def test_the_noise_of_many_keys_is_standard_normal():
    """Of the first steps of a thousand runs, which neither share draws nor repeat them."""

    def draw(seed):
        def first(key):
            step = gd.methods.add_noise(lambda w, batch, lr: (w.clone(), w.sum()), 0.5, key=key)
            return step(step.init(torch.zeros(300, dtype=torch.float64)), None, 1.0)[0].params

        return vmap(first)(gd.random.split(gd.random.key(seed), 1000))

    gt.check_noise(draw)


def test_a_claim_of_another_temperature_is_broken():
    with pytest.raises(gt.LawBroken):
        gt.check_langevin(langevin(gd.chain(), 0.25), gt.Langevin(temperature=0.255))
    with pytest.raises(gt.NotApplicable):
        gt.check_langevin(langevin(gd.chain(), 0.25), gt.GradientDescent())
