"""Methods and transformations that choose their own lr, against their authors' formulas in NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gdfunc as gd
from gdfunc import _tree
from gdfunc import testing as gt

from .references import few, normal

seeds = st.integers(0, 2**32)
rates = st.floats(0.05, 0.95)
betas = st.tuples(st.floats(0.3, 0.95), st.floats(0.5, 0.999))
small, decays = st.floats(1e-4, 1e-2), st.floats(0.0, 0.5)

# The rules of transformations: (gradients [T, ...], points [T, ...], hyperparameters) -> updates.


def ademamix_rule(gs, xs, betas, alpha, eps, warmup):
    beta1, beta2, beta3 = betas
    m, n, v = (np.zeros_like(gs[0]) for _ in range(3))
    for t, g in enumerate(gs, 1):
        weight, slow = alpha, beta3
        if warmup:
            weight = min(t * alpha / warmup, alpha)
            top = np.log(beta1) * np.log(beta3)
            below = (1 - t / warmup) * np.log(beta3) + t / warmup * np.log(beta1)
            slow = min(np.exp(top / below), beta3) if t < warmup else beta3
        m = beta1 * m + (1 - beta1) * g
        n = slow * n + (1 - slow) * g
        v = beta2 * v + (1 - beta2) * g**2
        yield (m / (1 - beta1**t) + weight * n) / (np.sqrt(v / (1 - beta2**t)) + eps)


def rms(x):
    return np.sqrt(np.mean(x**2))


def adafactor_rule(gs, xs, beta2_decay, eps, d):
    (floor, least), row, column, v = eps, 0.0, 0.0, 0.0
    for t, (g, x) in enumerate(zip(gs, xs, strict=True), 1):
        beta2 = 1 - t**beta2_decay
        if g.ndim > 1:
            row = beta2 * row + (1 - beta2) * (g**2).mean(-1)
            column = beta2 * column + (1 - beta2) * (g**2).mean(-2)
            v = (
                np.einsum("...r,...c->...rc", row, column)
                / np.maximum(row.mean(-1), floor)[..., None, None]
            )
        else:
            v = beta2 * v + (1 - beta2) * g**2
        w = g / np.sqrt(np.maximum(v, floor**2))
        yield max(least, rms(x)) * w / max(1.0, rms(w) / d)


def dog_rule(gs, xs, reps_rel, eps):
    far, total = reps_rel * (1 + np.linalg.norm(xs[0])), 0.0
    for g, x in zip(gs, xs, strict=True):
        far, total = max(far, np.linalg.norm(x - xs[0])), total + np.sum(g**2)
        yield far / np.sqrt(total + eps) * g


RULES = {
    "ademamix": (
        ademamix_rule,
        {
            "betas": st.tuples(st.floats(0.3, 0.9), st.floats(0.5, 0.999), st.floats(0.9, 0.9999)),
            "alpha": st.floats(0.0, 8.0),
            "eps": small,
            "warmup": st.sampled_from([0, 1, 5, 50]),
        },
        [(), (3,), (2, 3)],
    ),
    "adafactor": (
        adafactor_rule,
        {"beta2_decay": st.floats(-1.0, -0.3), "eps": st.tuples(small, st.floats(0.0, 2.0)), "d": rates},
        [(), (4,), (3, 2), (2, 3, 4), (1, 5)],
    ),
    "dog": (dog_rule, {"reps_rel": small, "eps": small}, [(), (3,), (2, 3)]),
}


@pytest.mark.parametrize("name", RULES)
@given(st.data(), seeds)
def test_updates_are_those_of_the_paper(name, data, seed):
    rule, hyperparameters, shapes = RULES[name]
    drawn = {key: data.draw(strategy, label=key) for key, strategy in hyperparameters.items()}
    shape = data.draw(st.sampled_from(shapes), label="shape")
    g, x = normal(seed, 12, *shape), normal(seed + 1, 12, *shape)
    transform = getattr(gd, name)(**drawn)
    state, got = transform.init(x[0]), []
    for now, point in zip(g, x, strict=True):
        update, state = transform.update(now, state, point)
        got.append(update.numpy())
    expected = np.stack(list(rule(g.numpy(), x.numpy(), **drawn)))
    np.testing.assert_allclose(np.stack(got), expected, rtol=1e-9, atol=1e-12)


# The rules of steps: (gradient, start, lrs, hyperparameters) -> points, the start first. One vector.


def prodigy_rule(gradient, x, lrs, betas, eps, weight_decay, d0, d_coef):
    (beta1, beta2), start, d = betas, x, d0
    m, v, s, r = np.zeros_like(x), np.zeros_like(x), np.zeros_like(x), 0.0
    yield x
    for lr in lrs:
        g = gradient(x)
        m = beta1 * m + (1 - beta1) * d * g
        v = beta2 * v + (1 - beta2) * d**2 * g**2
        r = np.sqrt(beta2) * r + (1 - np.sqrt(beta2)) * lr * d**2 * (g @ (start - x))
        s = np.sqrt(beta2) * s + (1 - np.sqrt(beta2)) * lr * d**2 * g
        x = x - lr * d * (m / (np.sqrt(v) + d * eps) + weight_decay * x)
        d = max(d, d_coef * r / np.abs(s).sum())
        yield x


def mechanic_rule(gradient, x, lrs, betas, decay, s_init, eps, momentum):
    start, betas, buffer = x, np.array(betas), np.zeros_like(x)
    delta, (s, m, v, r) = np.zeros_like(x), np.zeros((4, len(betas)))
    yield x
    for lr in lrs:
        g = gradient(x)
        buffer = momentum * buffer + g
        h = delta @ (g + decay * s.sum() * np.linalg.norm(g) / np.linalg.norm(x) * x)
        delta = delta - lr * buffer
        m = np.maximum(betas * m, abs(h))
        v = betas**2 * v + h**2
        r = np.maximum(0, betas * r - s * h)
        s = (s_init / len(betas) * m + r) / (np.sqrt(v) + eps)
        x = start + s.sum() * delta
        yield x


def with_momentum(loss_fn, momentum, **options):
    return gd.methods.mechanic(loss_fn, gd.momentum(momentum), **options)


STEP_RULES = {
    "prodigy": (
        prodigy_rule,
        gd.methods.prodigy,
        {"betas": betas, "eps": small, "weight_decay": decays, "d0": small, "d_coef": st.floats(0.5, 2.0)},
    ),
    "mechanic": (
        mechanic_rule,
        with_momentum,
        {
            "betas": st.lists(st.floats(0.5, 1.0), min_size=1, max_size=4).map(tuple),
            "decay": decays,
            "s_init": small,
            "eps": small,
            "momentum": rates,
        },
    ),
}
CURVATURE = torch.tensor([[2.0, 0.4, 0.0], [0.4, 1.0, 0.3], [0.0, 0.3, 0.5]], dtype=torch.float64)


@pytest.mark.long
@pytest.mark.parametrize("name", STEP_RULES)
@given(st.data(), seeds)
def test_points_are_those_of_the_paper(name, data, seed):
    rule, make, hyperparameters = STEP_RULES[name]
    drawn = {key: data.draw(strategy, label=key) for key, strategy in hyperparameters.items()}
    x, lrs = normal(seed, 3), normal(seed + 1, 12).abs()
    # A tree of two leaves, whose norms and products are those of one vector.
    step = make(
        lambda p, batch: 0.5 * (w := torch.cat([p["a"], p["b"][None]]) - 1) @ CURVATURE @ w, **drawn
    )
    init = step.init({"a": x[:2], "b": x[2]})
    index = gd.full_batch(1, len(lrs))
    final, trajectory = gd.train(step, init, None, index, lrs, record=("params",), backend="eager")
    points = _tree.map(lambda leaf, end: torch.cat([leaf, end[None]]), trajectory.params, final.params)
    got = torch.cat([points["a"], points["b"][:, None]], 1).numpy()

    def gradient(x):
        return CURVATURE.numpy() @ (x - 1)

    expected = np.stack(list(rule(gradient, x.numpy(), lrs.numpy(), **drawn)))
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.long
@given(
    seeds, betas, st.floats(0.05, 5.0), st.sampled_from([1e-12, 0.1]), decays, st.sampled_from([1, 2, 5])
)
def test_points_of_sophia_are_those_of_the_paper(seed, betas, gamma, eps, decay, every):
    key, (beta1, beta2) = gd.random.key(seed), betas
    curvature = CURVATURE - 0.6 * torch.eye(3)  # one direction curves downwards

    def loss_fn(w, batch):
        return 0.5 * (w - 1) @ curvature @ (w - 1)

    options = {"gamma": gamma, "eps": eps, "weight_decay": decay, "every": every}
    step = gd.methods.sophia(loss_fn, betas, key=key, **options)
    start, lrs = normal(seed, 3), normal(seed + 1, 8).abs()
    init, index = step.init(start), gd.full_batch(1, 8)
    final, trajectory = gd.train(step, init, None, index, lrs, record=("params",), backend="eager")
    x, m, h, hessian = start.numpy(), np.zeros(3), np.zeros(3), curvature.numpy()
    for t, lr in enumerate(lrs.tolist()):
        np.testing.assert_allclose(trajectory.params[t].numpy(), x, rtol=1e-9, atol=1e-9)
        m = beta1 * m + (1 - beta1) * hessian @ (x - 1)
        if t % every == 0:
            z = gd.random.normal(gd.random.fold_in(key, t), (3,), torch.float64).numpy()
            h = beta2 * h + (1 - beta2) * z * (hessian @ z)
        x = x - lr * decay * x - lr * np.clip(m / np.maximum(gamma * h, eps), -1, 1)
    np.testing.assert_allclose(final.params.numpy(), x, rtol=1e-9, atol=1e-9)


def test_sophia_takes_the_product_with_another_matrix():
    seen = []

    def product(params, batch, vector):
        seen.append(batch)
        return vector

    step = gd.methods.sophia(lambda w, x: (w * x).sum(), key=gd.random.key(0), product=product, every=1)
    state, _ = step(step.init(torch.zeros(2)), torch.tensor([3.0, 4.0]), 0.1)
    z = gd.random.normal(gd.random.fold_in(gd.random.key(0), 0), (2,), torch.float64).float()
    torch.testing.assert_close(state.hessian, 0.01 * z**2)
    assert seen[0].tolist() == [3.0, 4.0]


def final_loss(make, lr, steps=400):
    problem = gd.problems.stock_regression()
    step = make(problem.loss_fn)
    index = gd.full_batch(389, steps)
    final, _ = gd.train(step, step.init(problem.params), problem.data, index, lr)
    return float(problem.loss_fn(getattr(final, "params", final), problem.data) / problem.minimum - 1)


MAKERS = {
    "prodigy": gd.methods.prodigy,
    "mechanic": lambda loss_fn: gd.methods.mechanic(loss_fn, gd.adam()),
    "dog": lambda loss_fn: gd.make_step(loss_fn, gd.dog()),
}


@pytest.mark.long
@pytest.mark.parametrize("name", MAKERS)
def test_the_natural_lr_is_good_on_real_data(name):
    pytest.importorskip("matplotlib")
    tuned = min(final_loss(lambda f: gd.make_step(f, gd.adam()), lr) for lr in (1e-3, 1e-2, 1e-1))
    untuned = final_loss(lambda f: gd.make_step(f, gd.adam()), 1e-6)
    assert final_loss(MAKERS[name], 1.0) < 0.1 * untuned + tuned


@pytest.mark.long
def test_mechanic_ends_within_a_percent_of_the_minimum_for_eight_orders_of_magnitude_of_lr():
    pytest.importorskip("matplotlib")
    assert max(final_loss(MAKERS["mechanic"], lr) for lr in (1e-4, 1.0, 1e4)) < 0.01
    assert not final_loss(gd.make_step, 1e4) < 1


def test_torchs_adafactor_is_ours_where_lr_is_below_its_schedule():
    params = {"w": normal(0, 4, 3), "b": normal(1, 3), "k": normal(2, 2, 3, 2)}
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
    optimizer = torch.optim.Adafactor([*leaves.values()], lr=0.05, weight_decay=0.1)
    transform = gd.chain(gd.adafactor(), gd.weight_decay(0.1))
    state = transform.init(params)
    for t in range(60):
        grads = {name: normal(10 + t + i, *leaf.shape) for i, (name, leaf) in enumerate(params.items())}
        for name, leaf in leaves.items():
            leaf.grad = grads[name].clone()
        optimizer.step()
        updates, state = transform.update(grads, state, params)
        params = gd.apply_updates(params, updates, 0.05)
        for name, leaf in leaves.items():
            torch.testing.assert_close(params[name], leaf.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.long
def test_adafactor_is_torchs_in_float32_to_3e_6_of_the_movement():
    start = {"w": normal(0, 4, 3).float(), "b": normal(1, 3).float()}
    target = {"w": normal(2, 4, 3).float(), "b": normal(3, 3).float()}

    def loss_fn(params, batch):
        return sum(((params[name] - target[name]) ** 2).sum() for name in params)

    torchs = gd.interop.from_optim(loss_fn, torch.optim.Adafactor)
    ours = gd.make_step(loss_fn, gd.adafactor())
    first, second = (
        gd.train(step, step.init(start), None, gd.full_batch(1, 300), 0.03125, backend="eager")[0].params
        for step in (torchs, ours)
    )
    for name in start:
        moved = (first[name] - start[name]).norm()
        assert (first[name] - second[name]).norm() < 3e-6 * moved


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: gd.ademamix((0.9, 0.99)), TypeError, "betas must be three numbers"),
        (
            lambda: gd.ademamix((0.9, 0.99, 1.0)),
            ValueError,
            r"betas\[2\] must be a finite number in \[0, 1\)",
        ),
        (lambda: gd.ademamix((0.0, 0.9, 0.9), warmup=3), ValueError, r"betas\[0\] must be .* in \(0, 1\)"),
        (lambda: gd.ademamix(warmup=-1), ValueError, "warmup must be an int >= 0"),
        (lambda: gd.ademamix(alpha=-1.0), ValueError, "alpha must be a finite number"),
        (lambda: gd.adafactor(0.5), ValueError, r"beta2_decay must be a finite number in \(-inf, 0\]"),
        (lambda: gd.adafactor(eps=(-1.0, 0.1)), ValueError, r"eps\[0\] must be"),
        (lambda: gd.adafactor(d=0.0), ValueError, "d must be a finite number in"),
        (lambda: gd.dog(0.0), ValueError, "reps_rel must be a finite number"),
        (lambda: gd.methods.prodigy(normal, d0=0.0), ValueError, "d0 must be a finite number"),
        (lambda: gd.methods.mechanic(normal, betas=()), ValueError, "betas must have one number or more"),
        (
            lambda: gd.methods.mechanic(normal, betas=(1.5,)),
            ValueError,
            r"betas\[0\] must be .* in \[0, 1\]",
        ),
        (lambda: gd.methods.mechanic(normal, gd.adam), TypeError, "not a GradientTransformation; call"),
        (
            lambda: gd.adafactor().update(torch.ones(2), gd.adafactor().init(torch.ones(2))),
            ValueError,
            "adafactor needs params",
        ),
        (
            lambda: gd.methods.sophia(normal, key=gd.random.key(0), every=0),
            ValueError,
            "every must be an int",
        ),
        (lambda: gd.methods.sophia(normal, key=gd.random.key(0), gamma=0.0), ValueError, "gamma must be"),
        (
            lambda: gd.dog().update(torch.ones(2), gd.dog().init(torch.ones(2))),
            ValueError,
            "dog needs params",
        ),
    ],
)
def test_arguments_that_do_not_fit_raise(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


# The kit.

halves = st.floats(0.1, 0.95)
CLAIMS = {
    "ademamix": (
        gt.AdEMAMix,
        lambda **h: gt.from_transform(gd.ademamix(**h)),
        {
            "betas": st.tuples(st.floats(0.1, 0.8), halves, st.floats(0.8, 0.999)),
            "alpha": st.floats(0.0, 8.0),
            "warmup": st.sampled_from([0, 1, 7]),
        },
    ),
    "adafactor": (
        gt.Adafactor,
        lambda eps1, eps2, **h: gt.from_transform(gd.adafactor(eps=(eps1, eps2), **h)),
        {"beta2_decay": st.floats(-1.0, -0.3), "eps1": st.just(1e-6), "eps2": small, "d": halves},
    ),
    "dog": (gt.DoG, lambda **h: gt.from_transform(gd.dog(**h)), {"reps_rel": small, "eps": small}),
    "prodigy": (
        gt.Prodigy,
        lambda **h: gt.from_step(lambda loss_fn: gd.methods.prodigy(loss_fn, **h)),
        {"betas": st.tuples(halves, halves), "weight_decay": decays, "d0": small},
    ),
    "mechanic": (
        gt.Mechanic,
        lambda **h: gt.from_step(lambda loss_fn: gd.methods.mechanic(loss_fn, **h)),
        {"betas": st.tuples(halves, halves), "decay": decays, "s_init": small, "eps": small},
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("name", CLAIMS)
@given(st.data())
@few
def test_ours_keep_the_claims(name, data):
    make_claim, make, strategies = CLAIMS[name]
    options = {key: data.draw(strategy, label=key) for key, strategy in strategies.items()}
    gt.check_kernel(make(**options), make_claim(**options))


@pytest.mark.long
@pytest.mark.parametrize("name", CLAIMS)
def test_every_law_holds_at_the_defaults(name):
    make_claim, make, _ = CLAIMS[name]
    options = {"eps1": 1e-8, "eps2": 1e-3} if name == "adafactor" else {}
    assert "check_kernel" in gt.check_optimizer(make(**options), make_claim()).passed


def test_torchs_adafactor_keeps_the_claim_where_lr_is_below_its_schedule():
    subject = gt.from_torch(lambda params: torch.optim.Adafactor(params, eps=(1e-8, 1e-3)))
    gt.check_kernel(subject, gt.Adafactor(), {"a": normal(0, 8), "b": normal(1, 8, 3, 2)}, lr=0.125)
    with pytest.raises(gt.LawBroken):
        gt.LAWS["check_kernel"](subject, gt.Adafactor(), torch.ones(8, 3), lr=2.0)


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in gt.WRONG if name.split(":")[0] in CLAIMS])
def test_controls_are_found_by_their_kernel(name):
    control = gt.WRONG[name]
    gt.check_kernel(control.build(control.claim, ""), control.claim)
    with pytest.raises(gt.LawBroken):
        gt.LAWS["check_kernel"](control.subject, control.claim)
