"""Transformations that torch.optim lacks, against their papers' formulas in NumPy, and closed forms."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad

import gdfunc as gd

from .references import normal

STEPS = 30
ZERO = torch.zeros(3, dtype=torch.float64)
rates = st.floats(0.05, 0.95)
betas = st.tuples(st.floats(0.3, 0.95), st.floats(0.5, 0.999))
seeds = st.integers(0, 2**32)


def updates_of(transform, gradients, params):
    """The directions that a transformation gives for a sequence of gradients, at fixed parameters."""
    state, directions = transform.init(params), []
    for g in gradients:
        update, state = transform.update(g, state, params)
        directions.append(update.numpy())
    return np.stack(directions)


def close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-13)


@given(betas, seeds)
def test_lion(betas, seed):
    g, m, expected = normal(seed, STEPS, 3).numpy(), np.zeros(3), []
    for now in g:
        expected.append(np.sign(betas[0] * m + (1 - betas[0]) * now))
        m = betas[1] * m + (1 - betas[1]) * now
    close(updates_of(gd.lion(betas), normal(seed, STEPS, 3), ZERO), np.stack(expected))


@given(betas, st.floats(1e-8, 1e-2), seeds)
def test_adabelief(betas, eps, seed):
    g, m, s, expected = normal(seed, STEPS, 3).numpy(), np.zeros(3), np.zeros(3), []
    for t, now in enumerate(g, 1):
        m = betas[0] * m + (1 - betas[0]) * now
        s = betas[1] * s + (1 - betas[1]) * (now - m) ** 2 + eps
        expected.append(m / (1 - betas[0] ** t) / (np.sqrt(s / (1 - betas[1] ** t)) + eps))
    got = updates_of(gd.adabelief(betas, eps=eps), normal(seed, STEPS, 3), ZERO)
    np.testing.assert_allclose(got, np.stack(expected), rtol=1e-10)


@given(betas, st.floats(1e-4, 1e-2), seeds)
def test_yogi(betas, eps, seed):
    g, m, v, expected = normal(seed, STEPS, 3).numpy(), np.zeros(3), np.full(3, 1e-6), []
    for now in g:
        m = betas[0] * m + (1 - betas[0]) * now
        v = v - (1 - betas[1]) * np.sign(v - now**2) * now**2
        expected.append(m / (np.sqrt(v) + eps))
    close(updates_of(gd.yogi(betas, eps=eps), normal(seed, STEPS, 3), ZERO), np.stack(expected))


@given(rates, st.floats(0.0, 0.5), rates, seeds)
def test_lars(momentum, decay, trust, seed):
    w, g, b, expected = normal(seed + 1, 3), normal(seed, STEPS, 3), np.zeros(3), []
    size = np.linalg.norm(w)
    for now in g.numpy():
        local = trust * size / (np.linalg.norm(now) + decay * size)
        b = momentum * b + local * (now + decay * w.numpy())
        expected.append(b)
    transform = gd.lars(momentum=momentum, weight_decay=decay, trust_coefficient=trust)
    close(updates_of(transform, g, w), np.stack(expected))


@given(betas, st.floats(0.0, 0.5), seeds)
def test_lamb(betas, decay, seed):
    w, g = normal(seed + 1, 3), normal(seed, STEPS, 3)
    m, v, expected = np.zeros(3), np.zeros(3), []
    for t, now in enumerate(g.numpy(), 1):
        m = betas[0] * m + (1 - betas[0]) * now
        v = betas[1] * v + (1 - betas[1]) * now**2
        r = m / (1 - betas[0] ** t) / (np.sqrt(v / (1 - betas[1] ** t)) + 1e-6) + decay * w.numpy()
        expected.append(np.linalg.norm(w) / np.linalg.norm(r) * r)
    np.testing.assert_allclose(
        updates_of(gd.lamb(betas, eps=1e-6, weight_decay=decay), g, w), np.stack(expected), rtol=1e-10
    )


@given(rates, st.booleans(), seeds)
def test_muon(momentum, nesterov, seed):
    (a, b, c), buffer, expected = (3.4445, -4.775, 2.0315), np.zeros((4, 2)), []
    g = normal(seed, 5, 4, 2)
    for now in g.numpy():
        buffer = momentum * buffer + (1 - momentum) * now
        x = (momentum * buffer + (1 - momentum) * now if nesterov else buffer).T
        x = x / np.linalg.norm(x)
        for _ in range(5):
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        expected.append(np.sqrt(4 / 2) * x.T)
    got = updates_of(gd.muon(momentum, nesterov=nesterov), g, torch.zeros_like(g[0]))
    np.testing.assert_allclose(got, np.stack(expected), rtol=1e-9, atol=1e-11)


def test_trust_is_one_where_a_norm_is_zero():
    g, zero = normal(0, 3), torch.zeros(3, dtype=torch.float64)
    for transform in (gd.trust_ratio(coefficient=0.1), gd.lars(momentum=0.0)):
        assert transform.update(g, transform.init(zero), zero)[0].equal(g)
        assert transform.update(zero, transform.init(g), g)[0].equal(zero)


@given(st.floats(0.01, 1.0), st.floats(1e-3, 0.5), seeds)
def test_adaptive_clip_is_unit_by_unit(clipping, eps, seed):
    w, g = normal(seed, 4, 3, 2), 3 * normal(seed + 1, 4, 3, 2)
    w[0] = 0
    (update, _) = gd.adaptive_clip(clipping, eps=eps).update(g, (), w)
    for unit in range(4):
        bound = clipping * max(float(w[unit].norm()), eps)
        factor = min(1.0, bound / float(g[unit].norm()))
        torch.testing.assert_close(update[unit], g[unit] * factor, rtol=1e-12, atol=0)
    vector, slope = w[1, :, 0], g[1, :, 0]
    bound = clipping * max(float(vector.norm()), eps)
    (update, _) = gd.adaptive_clip(clipping, eps=eps).update(slope, (), vector)
    torch.testing.assert_close(update, slope * min(1.0, bound / float(slope.norm())), rtol=1e-12, atol=0)


@given(st.integers(-250, 250), st.floats(0.1, 10.0), seeds)
def test_the_global_norm_is_at_most_its_bound_and_small_gradients_keep_their_bits(power, bound, seed):
    g = {"a": normal(seed, 3) * 10.0**power, "b": normal(seed + 1, 2) * 10.0**power}
    clipped, _ = gd.clip_by_global_norm(bound).update(g, ())
    scale = max(float(leaf.abs().max()) for leaf in g.values())
    size = scale * float(torch.cat([leaf / scale for leaf in g.values()]).norm())
    total = float(torch.cat(list(clipped.values())).norm())
    assert total <= bound * (1 + 1e-12)
    if size <= bound * (1 - 1e-12):
        assert all(clipped[name].equal(g[name]) for name in g)
    elif size > bound * (1 + 1e-12):
        assert total == pytest.approx(bound, rel=1e-12)


def test_what_is_not_finite_is_seen_after_clipping():
    for bad in (float("nan"), float("inf")):
        clipped, _ = gd.clip_by_global_norm(1.0).update(torch.tensor([bad, 1.0]), ())
        assert clipped.isnan().any()


@given(st.floats(1e-6, 10.0), st.floats(1e-12, 1e-2), seeds)
def test_adams_first_step(lr, eps, seed):
    """lr·g/(|g| + ε), whatever the betas."""
    g = normal(seed, 5)
    update, _ = gd.adam((0.3, 0.7), eps=eps).update(g, gd.adam().init(g))
    torch.testing.assert_close(lr * update, lr * g / (g.abs() + eps), rtol=1e-12, atol=0)


def test_adam_without_eps_does_not_move_where_there_is_no_gradient():
    transform = gd.adam(eps=0.0)
    update, _ = transform.update(torch.tensor([0.0, 2.0]), transform.init(torch.zeros(2)))
    assert update[0] == 0
    assert update[1] == pytest.approx(1.0, rel=1e-4)


def spectral_radius(lr, beta, curvature):
    """Of one step of momentum on ½·h·x², as a matrix on (x, buffer)."""
    transform = gd.momentum(beta)

    def step(x, buffer):
        update, state = transform.update(
            curvature * x, transform.init(x)._replace(momentum_buffer=buffer), x
        )
        return torch.stack([x - lr * update, state.momentum_buffer])

    zero, one = torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
    matrix = torch.stack([step(one, zero), step(zero, one)], dim=1)
    return float(torch.linalg.eigvals(matrix).abs().max())


@given(st.floats(0.01, 1.0), st.floats(1.01, 1000.0))
def test_momentum_with_polyaks_constants_has_his_spectral_radius(mu, kappa):
    """T12: (√κ − 1)/(√κ + 1) at both ends of the spectrum (Polyak 1964)."""
    root = kappa**0.5
    lr, beta = 4 / (mu * (root + 1) ** 2), ((root - 1) / (root + 1)) ** 2
    for curvature in (mu, mu * kappa):
        # The matrix is defective at both ends: its eigenvalue is known to the root of the rounding.
        assert spectral_radius(lr, beta, curvature) == pytest.approx(beta**0.5, abs=1e-6)


def nesterov(problem, beta_of_step, lr, start, steps):
    """Nesterov's method in torch's form: its iterates are the look-ahead points."""
    losses, params = [], start
    state = gd.momentum(0.5).init(start)
    for t in range(steps):
        losses.append(float(problem.loss_fn(params, None) - problem.minimum))
        g = grad(problem.loss_fn)(params, None)
        update, state = gd.momentum(beta_of_step(t), nesterov=True).update(g, state, params)
        params = params - lr * update
    return np.array(losses)


@given(st.lists(st.floats(0.05, 10.0), min_size=2, max_size=4).map(sorted), seeds)
def test_nesterov_meets_its_bound(spectrum, seed):
    """T14: f(yₜ) − f* ≤ (L+μ)/2·‖x₀ − x*‖²·(1 − 1/√κ)ᵗ (Bubeck 2015, theorem 3.18)."""
    minimizer = normal(seed, len(spectrum))
    problem = gd.problems.quadratic(spectrum, minimizer=minimizer, key=gd.random.key(seed))
    start, mu, L = minimizer + normal(seed + 1, len(spectrum)), spectrum[0], spectrum[-1]
    root = (L / mu) ** 0.5
    gaps = nesterov(problem, lambda t: (root - 1) / (root + 1), 1 / L, start, 40)
    distance = float((start - minimizer).square().sum())
    bound = (L + mu) / 2 * distance * (1 - 1 / root) ** np.arange(40)
    assert (gaps <= bound * (1 + 1e-9) + 1e-24).all()


@given(st.lists(st.floats(0.0, 10.0), min_size=2, max_size=4).map(sorted), seeds)
def test_nesterov_meets_its_bound_without_strong_convexity(spectrum, seed):
    """T15: f(yₜ) − f* ≤ 2L·‖x₀ − x*‖²/(t+1)² with β = t/(t+3) (Beck and Teboulle 2009)."""
    spectrum = [*spectrum[:-1], max(spectrum[-1], 0.1)]
    minimizer = normal(seed, len(spectrum))
    problem = gd.problems.quadratic(spectrum, minimizer=minimizer, key=gd.random.key(seed))
    start, L = minimizer + normal(seed + 1, len(spectrum)), spectrum[-1]
    gaps = nesterov(problem, lambda t: t / (t + 3), 1 / L, start, 40)
    bound = 2 * L * float((start - minimizer).square().sum()) / np.arange(1, 41) ** 2
    assert (gaps <= bound * (1 + 1e-9) + 1e-24).all()


# Transformations of transformations.


def test_a_skipped_step_keeps_all_bits_and_is_counted():
    transform = gd.apply_if_finite(gd.adam())
    params, state = torch.tensor([1.0, 2.0]), gd.apply_if_finite(gd.adam()).init(torch.zeros(2))
    counts = []
    for g in ([1.0, 2.0], [float("nan"), 1.0], [float("inf"), 1.0], [3.0, 4.0], [1.0, float("nan")]):
        before = state
        updates, state = transform.update(torch.tensor(g), state, params)
        counts.append((int(state.consecutive), int(state.total)))
        if not np.isfinite(g).all():
            assert gd.apply_updates(params, updates, 0.1).equal(params)
            pairs = zip(gd._tree.leaves(state.inner), gd._tree.leaves(before.inner), strict=True)
            assert all(new.equal(old) for new, old in pairs)
    assert counts == [(0, 0), (1, 1), (2, 2), (0, 2), (1, 3)]


@given(st.integers(1, 5), seeds)
def test_accumulated_gradients_are_one_step_with_their_mean(k, seed):
    g, params = normal(seed, 3 * k, 2), normal(seed + 1, 2)
    plain, wrapped = gd.adam((0.5, 0.9)), gd.accumulate(gd.adam((0.5, 0.9)), k)
    state, own = plain.init(params), wrapped.init(params)
    for block in g.split(k):
        expected, state = plain.update(block.mean(0), state, params)
        for i, now in enumerate(block):
            update, own = wrapped.update(now, own, params)
            if i + 1 < k:
                assert update.eq(0).all()
        torch.testing.assert_close(update, expected, rtol=1e-12, atol=1e-14)


def test_partition_gives_each_group_its_own_rule():
    params = {"body": {"w": normal(0, 2)}, "head": [normal(1, 2), normal(2, 3)]}
    labels = {"body": {"w": "adam"}, "head": ["fast", "still"]}
    rules = {
        "adam": gd.adam(),
        "fast": gd.chain(gd.clip_by_global_norm(0.1), gd.scale(10.0)),
        "still": gd.scale(0.0),
    }
    for given_labels in (labels, lambda tree: labels):
        transform = gd.partition(rules, given_labels)
        state = transform.init(params)
        updates, state = transform.update(params, state, params)
        alone, _ = rules["adam"].update(params["body"], rules["adam"].init(params["body"]))
        assert updates["body"]["w"].equal(alone["w"])
        assert float(updates["head"][0].norm()) == pytest.approx(1.0)
        assert updates["head"][1].eq(0).all()
        assert sorted(state) == ["adam", "fast", "still"]


def test_masks_and_labels_that_do_not_fit_raise():
    params = {"w": torch.ones(1), "b": torch.ones(1)}
    with pytest.raises(
        ValueError, match=r"mask does not have the structure of params: missing params\['b'\]"
    ):
        gd.masked(gd.sign(), {"w": True}).init(params)
    with pytest.raises(TypeError, match=r"mask\['b'\] is 1; it must be True or False"):
        gd.freeze({"w": True, "b": 1}).init(params)
    with pytest.raises(
        ValueError, match=r"labels\['b'\] is 'x', but there are transformations for 'a' only"
    ):
        gd.partition({"a": gd.sign()}, {"w": "a", "b": "x"}).init(params)
    with pytest.raises(
        ValueError, match=r"labels does not have the structure of params: missing params\['b'\]$"
    ):
        gd.partition({"a": gd.sign()}, {"w": "a"}).init(params)
    with pytest.raises(TypeError, match="transforms must be a dict label -> transformation; got list"):
        gd.partition([gd.sign()], {"w": "a", "b": "a"})


UNCALLED = [
    lambda: gd.accumulate(gd.adam, 2),
    lambda: gd.apply_if_finite(gd.adam),
    lambda: gd.masked(gd.adam, True),
    lambda: gd.partition({"a": gd.adam}, "a"),
    lambda: gd.chain(gd.adam),
]


@pytest.mark.parametrize("call", UNCALLED)
def test_a_transformation_that_was_not_called_says_so(call):
    with pytest.raises(TypeError, match="is function, not a GradientTransformation; call the function"):
        call()


def test_the_state_of_another_kind_says_so():
    zero = torch.zeros(2)
    for state in (gd.momentum(0.9).init(zero), gd.radam().init(zero), (), None):
        with pytest.raises(
            TypeError, match=r"opt_state is \w+, not AdamState; make it with transform.init"
        ):
            gd.adam().update(zero, state)
    with pytest.raises(ValueError, match="different parameter tree, or with other options"):
        gd.adam(amsgrad=True).update(zero, gd.adam().init(zero))


@pytest.mark.parametrize("betas", [0.9, (0.9,), (0.9, 0.99, 0.999)])
def test_betas_are_a_pair(betas):
    with pytest.raises(TypeError, match="betas must be a pair"):
        gd.adam(betas)


def test_step_sizes_in_the_wrong_order_raise():
    with pytest.raises(ValueError, match=r"step_sizes must be \(smallest, largest\); got \(50, 1e-06\)"):
        gd.rprop(step_sizes=(50, 1e-6))


def test_a_transformation_shows_its_name():
    assert repr(gd.momentum(0.9)) == "GradientTransformation(momentum)"
    assert repr(gd.chain()) == "GradientTransformation(chain)"


def test_a_run_of_many_bad_steps_trains_on_the_good_ones():
    """policy skip: what is not finite leaves no trace but its count."""
    x = torch.arange(1.0, 9.0)
    data = torch.where(x == 4, torch.tensor(float("nan")), x), x
    transform = gd.apply_if_finite(gd.momentum(0.5))
    step = gd.make_step(lambda w, batch: ((w * batch[0] - batch[1]) ** 2).mean(), transform)
    index = gd.epoch_batches(gd.random.key(0), 8, 1, 3)
    state, _ = gd.train(step, step.init(torch.tensor(0.0)), data, index, 0.01)
    good = index[(index != 3)[:, 0]]
    plain = gd.momentum(0.5)
    clean_step = gd.make_step(lambda w, b: ((w * b[0] - b[1]) ** 2).mean(), plain)
    expected, _ = gd.train(clean_step, clean_step.init(torch.tensor(0.0)), data, good, 0.01)
    assert state.params.equal(expected.params)
    assert int(state.opt_state.total) == 3
