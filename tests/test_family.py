"""Transformations: their contract, the papers' formulas of those that torch.optim lacks, closed forms."""

import inspect
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, vmap

import gdfunc as gd
from gdfunc._scan.trace._key import key_of

from .references import linear_loss, normal

rates = st.floats(0.05, 0.95)
betas = st.tuples(st.floats(0.3, 0.95), st.floats(0.5, 0.999))
seeds = st.integers(0, 2**32)


# The papers' rules: (gradients [T, ...], parameters, hyperparameters) -> updates, one after the other.


def lion_rule(g, w, betas):
    m = np.zeros(3)
    for now in g:
        yield np.sign(betas[0] * m + (1 - betas[0]) * now)
        m = betas[1] * m + (1 - betas[1]) * now


def adabelief_rule(g, w, betas, eps):
    m, s = np.zeros(3), np.zeros(3)
    for t, now in enumerate(g, 1):
        m = betas[0] * m + (1 - betas[0]) * now
        s = betas[1] * s + (1 - betas[1]) * (now - m) ** 2 + eps
        yield m / (1 - betas[0] ** t) / (np.sqrt(s / (1 - betas[1] ** t)) + eps)


def yogi_rule(g, w, betas, eps):
    m, v = np.zeros(3), np.full(3, 1e-6)
    for now in g:
        m = betas[0] * m + (1 - betas[0]) * now
        v = v - (1 - betas[1]) * np.sign(v - now**2) * now**2
        yield m / (np.sqrt(v) + eps)


def lars_rule(g, w, momentum, weight_decay, trust_coefficient):
    b, size = np.zeros(3), np.linalg.norm(w)
    for now in g:
        local = trust_coefficient * size / (np.linalg.norm(now) + weight_decay * size)
        b = momentum * b + local * (now + weight_decay * w)
        yield b


def lamb_rule(g, w, betas, eps, weight_decay):
    m, v = np.zeros(3), np.zeros(3)
    for t, now in enumerate(g, 1):
        m = betas[0] * m + (1 - betas[0]) * now
        v = betas[1] * v + (1 - betas[1]) * now**2
        r = m / (1 - betas[0] ** t) / (np.sqrt(v / (1 - betas[1] ** t)) + eps) + weight_decay * w
        yield np.linalg.norm(w) / np.linalg.norm(r) * r


def muon_rule(g, w, momentum, nesterov):
    (a, b, c), buffer = (3.4445, -4.775, 2.0315), np.zeros((4, 2))
    for now in g:
        buffer = momentum * buffer + (1 - momentum) * now
        x = (momentum * buffer + (1 - momentum) * now if nesterov else buffer).T
        x = x / np.linalg.norm(x)
        for _ in range(5):
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        yield np.sqrt(4 / 2) * x.T


small, decay = st.floats(1e-4, 1e-2), st.floats(0.0, 0.5)
RULES = {
    "lion": (lion_rule, {"betas": betas}),
    "adabelief": (adabelief_rule, {"betas": betas, "eps": small}),
    "yogi": (yogi_rule, {"betas": betas, "eps": small}),
    "lars": (lars_rule, {"momentum": rates, "weight_decay": decay, "trust_coefficient": rates}),
    "lamb": (lamb_rule, {"betas": betas, "eps": st.just(1e-6), "weight_decay": decay}),
    "muon": (muon_rule, {"momentum": rates, "nesterov": st.booleans()}),
}


@pytest.mark.long
@pytest.mark.parametrize("name", RULES)
@given(st.data(), seeds)
def test_updates_are_those_of_the_paper(name, data, seed):
    rule, hyperparameters = RULES[name]
    drawn = {key: data.draw(strategy, label=key) for key, strategy in hyperparameters.items()}
    shape = (5, 4, 2) if name == "muon" else (30, 3)
    g, params = normal(seed, *shape), normal(seed + 1, *shape[1:])
    transform, got = getattr(gd, name)(**drawn), []
    state = transform.init(params)
    for now in g:
        update, state = transform.update(now, state, params)
        got.append(update.numpy())
    expected = np.stack(list(rule(g.numpy(), params.numpy(), **drawn)))
    np.testing.assert_allclose(np.stack(got), expected, rtol=1e-9, atol=1e-11)


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
    # A vector is one unit.
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


def test_adam_without_eps_does_not_move_where_there_is_no_gradient():
    transform = gd.adam(eps=0.0)
    update, _ = transform.update(torch.tensor([0.0, 2.0]), transform.init(torch.zeros(2)))
    assert update[0] == 0
    assert update[1] == pytest.approx(1.0, rel=1e-4)


# The contract of transformations.

GRADS = {"w": normal(0, 3), "b": normal(1, 1)[0]}


def apply(transform, grads=GRADS):
    return transform.update(grads, transform.init(grads), grads)[0]


def test_chain_of_nothing_is_the_identity():
    assert apply(gd.chain()) == GRADS
    assert gd.chain().init(GRADS) == ()


@given(st.lists(st.floats(-4, 4, width=32), max_size=4))
def test_a_chain_applies_first_to_last(factors):
    transform = gd.chain(*(gd.scale(factor) for factor in factors))
    expected = GRADS["w"]
    for factor in factors:
        expected = expected * factor
    assert torch.equal(apply(transform)["w"], expected)
    assert len(transform.init(GRADS)) == len(factors)


def test_a_chain_keeps_each_state_with_its_own():
    def counting(amount):
        return gd.GradientTransformation(
            init=lambda params: torch.tensor(0),
            update=lambda grads, count, params=None: (grads, count + amount),
        )

    transform = gd.chain(counting(1), gd.scale(2.0), counting(10))
    state = transform.init(GRADS)
    for _ in range(3):
        _, state = transform.update(GRADS, state)
    assert state == (3, (), 30)


def test_scale_is_mapped_and_differentiated():
    rows = vmap(lambda factor: apply(gd.scale(factor))["w"])(torch.tensor([1.0, 2.0], dtype=torch.float64))
    assert torch.equal(rows[1], apply(gd.scale(2.0))["w"])
    slope = grad(lambda factor: apply(gd.scale(factor))["w"].sum())(torch.tensor(3.0, dtype=torch.float64))
    torch.testing.assert_close(slope, GRADS["w"].sum())


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), "2", True, torch.ones(1), torch.tensor(1)])
def test_bad_factors_raise(factor):
    with pytest.raises(ValueError, match=r"factor must be a finite number in \(-inf, inf\) or a 0-d float"):
        gd.scale(factor)


@pytest.mark.parametrize("state", [(), ((),), ((), (), ()), None])
def test_the_state_of_another_chain_raises(state):
    with pytest.raises(ValueError, match="opt_state was made for another chain: it should be a tuple of 2"):
        gd.chain(gd.scale(1.0), gd.scale(2.0)).update(GRADS, state)


def test_mask_that_is_a_named_tuple_with_call_is_a_tree():
    class Pair(NamedTuple):
        w: object
        b: object

        def __call__(self, tree):
            raise NotImplementedError

    grads = Pair(torch.tensor(1.0), torch.tensor(2.0))
    transform = gd.masked(gd.scale(0.0), Pair(True, False))
    assert transform.update(grads, transform.init(grads), grads)[0] == (0.0, 2.0)


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
    fast = gd.chain(gd.clip_by_global_norm(0.1), gd.scale(10.0))
    rules = {"adam": gd.adam(), "fast": fast, "still": gd.scale(0.0)}
    for given_labels in (labels, lambda tree: labels):
        transform = gd.partition(rules, given_labels)
        state = transform.init(params)
        updates, state = transform.update(params, state, params)
        alone, _ = rules["adam"].update(params["body"], rules["adam"].init(params["body"]))
        assert updates["body"]["w"].equal(alone["w"])
        assert float(updates["head"][0].norm()) == pytest.approx(1.0)
        assert updates["head"][1].eq(0).all()
        assert sorted(state) == ["adam", "fast", "still"]


A, ONES = {"a": gd.sign()}, {"w": torch.ones(1), "b": torch.ones(1)}


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: gd.masked(gd.sign(), {"w": True}), ValueError, r"mask does not have .* params\['b'\]"),
        (lambda: gd.freeze({"w": True, "b": 1}), TypeError, r"mask\['b'\] is 1; it must be True or False"),
        (
            lambda: gd.partition(A, {"w": "a", "b": "x"}),
            ValueError,
            r"labels\['b'\] is 'x', .* for 'a' only",
        ),
        (lambda: gd.partition(A, {"w": "a"}), ValueError, r"labels does not .*: missing params\['b'\]$"),
        (lambda: gd.partition([gd.sign()], {}), TypeError, "transforms must be a dict label .* got list"),
        (lambda: gd.adam(0.9), TypeError, "betas must be a pair"),
        (lambda: gd.adam((0.9,)), TypeError, "betas must be a pair"),
        (lambda: gd.adam((0.9, 0.99, 0.999)), TypeError, "betas must be a pair"),
    ],
)
def test_masks_labels_and_pairs_that_do_not_fit_raise(call, kind, message):
    with pytest.raises(kind, match=message):
        call().init(ONES)


UNCALLED = {
    "accumulate": lambda: gd.accumulate(gd.adam, 2),
    "apply_if_finite": lambda: gd.apply_if_finite(gd.adam),
    "masked": lambda: gd.masked(gd.adam, True),
    "partition": lambda: gd.partition({"a": gd.adam}, "a"),
    "chain's argument 1": lambda: gd.chain(gd.chain(), gd.adam),
    "transform": lambda: gd.make_step(linear_loss, gd.adam),
    "sam": lambda: gd.methods.sam(linear_loss, gd.adam),
    "schedule_free": lambda: gd.methods.schedule_free(linear_loss, gd.adam),
    "line_search": lambda: gd.methods.line_search(linear_loss, gd.adam),
}


@pytest.mark.parametrize("name", UNCALLED)
def test_a_transformation_that_was_not_called_says_so(name):
    shown = (
        "transform" if name not in ("partition", "chain's argument 1") else name.removeprefix("partition")
    )
    with pytest.raises(TypeError, match=f"{shown}.* is function, not a GradientTransformation; call the"):
        UNCALLED[name]()


def test_the_state_of_another_kind_says_so():
    zero = torch.zeros(2)
    for state in (gd.momentum(0.9).init(zero), gd.radam().init(zero), (), None):
        with pytest.raises(
            TypeError, match=r"opt_state is \w+, not AdamState; make it with transform.init"
        ):
            gd.adam().update(zero, state)
    with pytest.raises(ValueError, match="different parameter tree, or with other options"):
        gd.adam(amsgrad=True).update(zero, gd.adam().init(zero))


REPRS = [
    (gd.adam(), "adam(betas=(0.9, 0.999), eps=1e-08)"),
    (gd.adam(amsgrad=True), "adam(betas=(0.9, 0.999), eps=1e-08, amsgrad=True)"),
    (gd.adamw(weight_decay=0.1), "adamw(betas=(0.9, 0.999), eps=1e-08, weight_decay=0.1)"),
    (gd.momentum(torch.tensor(0.9)), "momentum(momentum=float32[], dampening=0.0)"),
    (gd.chain(gd.sign(), gd.chain(gd.scale(2.0))), "chain(sign(), chain(scale(factor=2.0)))"),
    (gd.masked(gd.sign(), {"w": True}), "masked(transform=sign(), mask={'w': True})"),
    (gd.partition({"a": gd.sign()}, normal), "partition(transforms={'a': sign()}, labels=normal)"),
    (gd.make_step(linear_loss), "make_step(loss_fn=linear_loss)"),
    (gd.make_step(linear_loss, gd.sign()), "make_step(loss_fn=linear_loss, transform=sign())"),
    (
        gd.methods.ema(gd.methods.saga(linear_loss, (torch.ones(3, 2), torch.ones(3))), 0.9),
        "ema(step=saga(loss_fn=linear_loss, data=(float32[3, 2], float32[3])), decay=0.9)",
    ),
    (gd.Step(torch.zeros_like, linear_loss), "Step(linear_loss)"),
    (
        gd.problems.rosenbrock(),
        "Problem(loss_fn=loss_fn, params=float64[2], data=None, minimizers=(float64[2],), minimum=0.0, "
        "L=None, mu=None)",
    ),
]


@pytest.mark.parametrize(("value", "text"), REPRS, ids=[text[:30] for _, text in REPRS])
def test_what_is_made_prints_as_the_call_that_made_it(value, text):
    assert repr(value) == text


def test_a_transformation_of_the_users_prints_its_update():
    def halve(grads, state, params=None):
        return grads / 2, state

    assert repr(gd.GradientTransformation(halve, halve)).startswith("GradientTransformation(")


def test_a_step_with_a_description_keeps_its_key():
    for transform in (gd.adam(), gd.chain(gd.momentum(torch.tensor(0.9)), gd.freeze({"w": True}))):
        assert key_of(gd.make_step(linear_loss, transform).advance).key is not None


MAKERS = {
    "adam": (gd.adam, ()),
    "momentum": (gd.momentum, (0.9,)),
    "chain": (gd.chain, (gd.adam(),)),
    "freeze": (gd.freeze, ({"w": True},)),
    "make_step": (gd.make_step, (linear_loss, gd.adam())),
    "sam": (gd.methods.sam, (linear_loss,)),
    "svrg": (gd.methods.svrg, (linear_loss, torch.ones(3))),
    "make_private_step": (gd.privacy.make_private_step, (linear_loss,)),
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("word", ["lr", "learning_rate"])
def test_an_lr_given_to_a_maker_is_sent_to_the_step(name, word):
    make, args = MAKERS[name]
    place = r"lr is an argument of the step, .* and of gd\.train"
    with pytest.raises(TypeError, match=rf"^{name} takes no {word}: {place}.*; got 0.001$"):
        make(*args, **{word: 1e-3})


def test_every_maker_of_transformations_and_steps_refuses_lr():
    spaces = gd, gd.methods, gd.privacy
    makers = {
        value
        for space in spaces
        for value in vars(space).values()
        if inspect.isfunction(value)
        and value.__annotations__.get("return") in (gd.GradientTransformation, gd.Step)
    }
    assert len(makers) > 45
    for make in makers:
        with pytest.raises(TypeError, match=r"takes no lr: "):
            make(lr=0.1)


def test_an_lr_in_the_place_of_betas_is_sent_to_the_step():
    with pytest.raises(
        TypeError, match=r"betas must be a pair .* got 0\.001; lr is an argument of the step"
    ):
        gd.adam(1e-3)


def test_makers_keep_their_signatures():
    assert [*inspect.signature(gd.adam).parameters] == ["betas", "eps", "amsgrad"]
    with pytest.raises(TypeError, match="unexpected keyword argument 'beta'"):
        gd.adam(beta=0.9)


def test_a_group_without_leaves_is_warned_of_once_a_run():
    rules = {"body": gd.momentum(0.9), "head": gd.sign(), "neck": gd.sign()}
    step = gd.make_step(linear_loss, gd.partition(rules, {"w": "body", "b": "body"}))
    with pytest.warns(
        UserWarning, match=r"labelled 'head' or 'neck', .*; the labels met are 'body'$"
    ) as seen:
        state = step.init({"w": torch.zeros(3), "b": torch.tensor(0.0)})
    assert len(seen) == 1
    assert seen[0].filename == __file__
    step(state, (torch.ones(2, 3), torch.ones(2)), 0.1)


def test_a_mask_of_one_kind_is_not_warned_of():
    gd.masked(gd.sign(), {"w": True}).init({"w": torch.zeros(3)})
    gd.freeze({"w": False}).init({"w": torch.zeros(3)})
