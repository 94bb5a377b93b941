"""Methods: what the kit does not hold. Their formulas are in `test_kit_averages` and `test_kit_curved`.

The laws of every step are in `test_conformance`.
"""

import functools
import inspect

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import gdfunc as gd
from gdfunc import _tree
from gdfunc import testing as gt

from .assertions import assert_refused
from .references import few, flat, linear_data, linear_loss, normal, relative_error
from .tables import STEPS


def make(name, loss_fn=linear_loss, **changed):
    return STEPS[name].make(loss_fn, None, **(STEPS[name].hyperparameters | changed))


def quadratic(seed, size=4, condition=8.0):
    """A random loss ½(θ − θ*)ᵀH(θ − θ*) + ¼, its H with eigenvalues from 1/condition to 1."""
    basis = torch.linalg.qr(normal(seed, size, size))[0]
    hessian = basis * torch.linspace(1 / condition, 1, size, dtype=torch.float64) @ basis.T
    optimum = normal(seed + 1, size)

    def loss_fn(params, batch):
        away = torch.cat([params["w"], params["b"][None]]) - optimum
        return 0.5 * away @ hessian @ away + 0.25

    return loss_fn, optimum.numpy()


def tree_of(vector):
    return {"w": vector[:-1].clone(), "b": vector[-1].clone()}


def result_of(state):
    """What a run ends with: the average where there is one."""
    return getattr(state, "average", getattr(state, "slow", state.params))


def run(step, state, lrs, batch=None):
    rows = []
    for lr in lrs:
        state, loss = step(state, batch, lr)
        rows.append((state, loss))
    return rows


PARAMS = {"w": normal(0, 3), "b": normal(1, 1)[0]}
BATCH = linear_data(3, 6, 3)
METHODS = ["heavy_ball", "ema", "ema_debiased", "lookahead", "schedule_free", "asgd"]
METHODS += ["reduce_on_plateau", "sam", "sam_adaptive", "line_search", "polyak", "lbfgs"]
each = pytest.mark.parametrize("name", METHODS)
BARE = gd.make_step(linear_loss)


# ---------------------------------------------------------------- laws of all of them


@each
def test_at_a_stationary_point_nothing_moves_and_derivatives_are_finite(name):
    pulled = {"weight_decay": 0.0, "lambd": 0.0}
    hyper = {key: pulled[key] for key in STEPS[name].hyperparameters if key in pulled}

    def loss_fn(params, batch):
        return 0.5 * (params["w"] @ params["w"] + params["b"] ** 2) + 0.001

    at_rest = {"w": torch.zeros(3, dtype=torch.float64), "b": torch.zeros((), dtype=torch.float64)}

    def after(params, lr):
        step = make(name, loss_fn, **hyper)
        return flat(run(step, step.init(params), [lr] * 3)[-1][0].params)

    lr = torch.tensor(0.1, dtype=torch.float64)
    assert after(at_rest, lr).abs().max() == 0
    assert grad(lambda lr: after(at_rest, lr).sum())(lr).isfinite()
    slopes = grad(lambda params: after(params, lr).sum())(at_rest)
    assert all(leaf.isfinite().all() for leaf in _tree.leaves(slopes))


@each
def test_it_minimises(name):
    # SAM ends in a cycle ρ·lr wide.
    neutral = {"weight_decay": 0.0, "lambd": 0.0, "minimum": 0.0, "rho": 1e-3, "threshold": 0.0}
    hyper = {key: neutral[key] for key in STEPS[name].hyperparameters if key in neutral}
    loss_fn, optimum = quadratic(11)
    step, start = make(name, lambda params, batch: loss_fn(params, batch) - 0.25, **hyper), normal(20, 4)
    state = run(step, step.init(tree_of(start)), [0.5] * 150)[-1][0]
    distance, far = (np.linalg.norm(x.numpy() - optimum) for x in (flat(result_of(state)), start))
    assert distance < 0.03 * far


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: gd.methods.lookahead(BARE, 0), "k"),
        (lambda: gd.methods.lookahead(BARE, 2.0), "k"),
        (lambda: gd.methods.line_search(linear_loss, max_steps=-1), "max_steps"),
        (lambda: gd.lbfgs(0), "history"),
        (lambda: gd.methods.lbfgs(linear_loss, True), "history"),
        (lambda: gd.methods.lbfgs(linear_loss, eps=-1.0), "eps"),
        (lambda: gd.methods.heavy_ball(linear_loss, 1.0), "momentum"),
        (lambda: gd.methods.nesterov(linear_loss, 1.0), "momentum"),
        (lambda: gd.methods.ema(BARE, 1.0), "decay"),
        (lambda: gd.methods.schedule_free(linear_loss, beta=1.1), "beta"),
        (lambda: gd.methods.line_search(linear_loss, factor=1.0), "factor"),
        (lambda: gd.methods.line_search(linear_loss, decrease=0.0), "decrease"),
        (lambda: gd.methods.polyak(linear_loss, max_step=0.0), "max_step"),
    ],
)
def test_other_bad_arguments_are_named(call, name):
    assert_refused(call, f"^{name} must be")


def test_hyperparameters_have_the_documented_defaults():
    defaults = {
        f.__name__: {
            key: parameter.default
            for key, parameter in inspect.signature(f).parameters.items()
            if isinstance(parameter.default, int | float)
        }
        for f in (gd.methods.asgd, gd.methods.sam, gd.methods.schedule_free, gd.methods.line_search)
    }
    torch_asgd = torch.optim.ASGD([torch.zeros(1)]).defaults
    assert defaults["asgd"] == {key: torch_asgd[key] for key in ("lambd", "alpha", "t0", "weight_decay")}
    assert defaults["sam"] == {"rho": 0.05, "adaptive": False}
    assert defaults["schedule_free"] == {"beta": 0.9, "weight_decay": 0.0}
    assert defaults["line_search"] == {"decrease": 1e-4, "factor": 0.5, "max_steps": 10}


# ---------------------------------------------------------------- heavy ball


def torch_parameters(params):
    return {name: torch.nn.Parameter(leaf.clone()) for name, leaf in params.items()}


def torch_run(optimizer, parameters, lrs, loss_fn=linear_loss, batch=BATCH):
    """Step a torch optimizer, with its own lr in every step; yields after each."""
    for lr in lrs:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        loss_fn(parameters, batch).backward()
        optimizer.step()
        yield flat({name: leaf.detach().clone() for name, leaf in parameters.items()})


@pytest.mark.long
@given(st.floats(0, 0.95))
@few
def test_heavy_ball_repeats_its_displacement(momentum):
    subject = gt.from_step(lambda loss_fn: gd.methods.heavy_ball(loss_fn, momentum))
    gt.check_optimizer(subject, gt.Momentum(momentum, form="displacement"))


@pytest.mark.long
@given(st.floats(0, 0.95), st.floats(0.01, 0.1))
def test_heavy_ball_is_torch_momentum_at_a_constant_lr_only(momentum, lr):
    step = gd.methods.heavy_ball(linear_loss, momentum)

    def both(lrs):
        parameters = torch_parameters(PARAMS)
        optimizer = torch.optim.SGD(parameters.values(), lr=lrs[0], momentum=momentum)
        theirs = list(torch_run(optimizer, parameters, lrs))[-1]
        ours = flat(run(step, step.init(PARAMS), lrs, BATCH)[-1][0].params)
        return relative_error(ours, theirs, flat(PARAMS))

    assert both([lr] * 30) <= 1e-11
    if momentum > 0.1:
        assert both([lr, lr / 10]) > 1e-4


# ---------------------------------------------------------------- averages


@pytest.mark.long
@given(
    *(st.floats(*ends) for ends in [(0.01, 0.1), (0.01, 0.5), (0.2, 1.5), (0, 50), (0.01, 0.3)]),
    st.booleans(),
)
@few
def test_asgd_is_torch_optim_asgd(lr, lambd, alpha, t0, weight_decay, changing):
    hyper = {"lambd": lambd, "alpha": alpha, "t0": t0, "weight_decay": weight_decay}
    lrs = [lr / (1 + 0.05 * t * changing) for t in range(100)]
    step = gd.methods.asgd(linear_loss, **hyper)
    ours = run(step, step.init(PARAMS), lrs, BATCH)
    torch.set_default_dtype(torch.float64)  # in which torch keeps eta and mu
    try:
        parameters = torch_parameters(PARAMS)
        optimizer = torch.optim.ASGD(parameters.values(), lr=lr, **hyper)
        start = flat(PARAMS)
        for (state, _), params in zip(ours, torch_run(optimizer, parameters, lrs), strict=True):
            memory = {name: optimizer.state[leaf] for name, leaf in parameters.items()}
            average = flat({name: own["ax"] for name, own in memory.items()})
            assert relative_error(flat(state.params), params, start) <= 1e-12
            assert relative_error(flat(state.average), average, start) <= 1e-12
            torch.testing.assert_close(state.eta, memory["w"]["eta"], rtol=1e-13, atol=0)
            torch.testing.assert_close(state.mu, memory["w"]["mu"], rtol=1e-13, atol=0)
            assert int(state.count) == int(memory["w"]["step"])
    finally:
        torch.set_default_dtype(torch.float32)


@given(st.floats(0, 0.99), st.floats(0.01, 0.1))
@few
def test_ema_is_torch_averaged_model(decay, lr):
    with torch.random.fork_rng():
        model = torch.nn.Linear(3, 1).double()
    apply, params, _ = gd.modules.functional(model)

    def loss_fn(params, batch):
        return ((apply(params, batch[0])[:, 0] - batch[1]) ** 2).mean()

    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    averaged.update_parameters(model)  # the first call copies
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    step = gd.methods.ema(gd.make_step(loss_fn), decay)
    state = step.init(params)
    for _ in range(20):
        optimizer.zero_grad()
        loss_fn(dict(model.named_parameters()), BATCH).backward()
        optimizer.step()
        averaged.update_parameters(model)
        state, _ = step(state, BATCH, lr)
        for name, leaf in averaged.module.named_parameters():
            torch.testing.assert_close(state.average[name], leaf.detach(), rtol=1e-12, atol=1e-13)


far_lookahead = functools.partial(gd.methods.lookahead, k=1000)
each_wrapper = pytest.mark.parametrize(
    "wrap",
    [lambda step: gd.methods.ema(step, 0.9), far_lookahead, gd.methods.reduce_on_plateau],
    ids=["ema", "lookahead", "plateau"],
)


@each_wrapper
@pytest.mark.parametrize("name", [*METHODS, "transform"])
def test_a_wrapper_leaves_the_step_alone_until_it_acts(wrap, name):
    inner = make(name)
    if inner.computes_params and wrap is far_lookahead:
        return  # which test_pairs refuses
    outer = wrap(inner)
    alone = run(inner, inner.init(PARAMS), [0.1] * 5, BATCH)
    wrapped = run(outer, outer.init(PARAMS), [0.1] * 5, BATCH)
    for (bare, loss), (state, same) in zip(alone, wrapped, strict=True):
        assert torch.equal(flat(state.carry), flat(bare))
        assert torch.equal(loss, same)


@pytest.mark.parametrize(
    "name", ["heavy_ball", "asgd", "ema", "lookahead", "reduce_on_plateau", "sam", "polyak", "line_search"]
)
def test_lookahead_replaces_the_parameters_of_any_carry_and_nothing_else(name):
    inner = make(name)
    outer = gd.methods.lookahead(inner, 2, 0.25)
    state = run(outer, outer.init(PARAMS), [0.1] * 2, BATCH)[-1][0]
    bare = run(inner, inner.init(PARAMS), [0.1] * 2, BATCH)[-1][0]
    expected = 0.75 * flat(PARAMS) + 0.25 * flat(bare.params)
    torch.testing.assert_close(flat(state.params), expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(flat(state.slow), expected, rtol=1e-12, atol=1e-13)
    pairs = zip(_tree.named_leaves(state.carry, ""), _tree.named_leaves(bare, ""), strict=True)
    different = [path for (path, ours), (_, theirs) in pairs if not torch.equal(ours, theirs)]
    assert len(different) == 2
    assert all("params" in path or path.startswith(".carry") for path in different)


def test_lookahead_refuses_a_carry_whose_parameters_cannot_be_replaced():
    class Carry(dict):
        params = property(lambda self: dict(self))

    torch.utils._pytree.register_pytree_node(
        Carry, lambda c: (list(c.values()), list(c)), lambda v, k: Carry(zip(k, v, strict=True))
    )
    step = gd.methods.lookahead(lambda carry, batch, lr: (carry, torch.tensor(0.0)), 2)
    with pytest.raises(TypeError, match="Carry, whose params cannot be replaced; make it a NamedTuple"):
        step(step.init(Carry(w=torch.tensor(1.0))), None, 0.1)


@each_wrapper
def test_a_step_of_the_users_own_can_be_wrapped(wrap):
    def own(params, batch, lr):
        return _tree.map(lambda p: p * (1 - lr), params), params["b"]

    step = wrap(own)
    index = gd.full_batch(6, 4)
    final, _ = gd.train(step, step.init(PARAMS), BATCH, index, 0.5)
    assert int(final.count) == 4
    with pytest.raises(ValueError, match="grad_norm"):
        gd.train(step, step.init(PARAMS), BATCH, index, 0.5, record="grad_norm")
    with pytest.raises(TypeError, match=r"carry is dict, but this step needs \w+State"):
        step(PARAMS, BATCH, 0.1)


# ---------------------------------------------------------------- transforms inside


@pytest.mark.parametrize("make", [gd.methods.sam, gd.methods.schedule_free, gd.methods.line_search])
def test_a_transform_gets_the_gradient_its_own_state_and_the_parameters(make):
    seen = []

    def update(grads, state, params=None):
        seen.append((state, params))
        return _tree.map(lambda g: 0.5 * g, grads), state + 1

    counting = gd.GradientTransformation(lambda params: torch.tensor(0), update)
    halved, bare = make(linear_loss, counting), make(linear_loss)
    ours = run(halved, halved.init(PARAMS), [0.1] * 3, BATCH)
    plain_run = run(bare, bare.init(PARAMS), [0.05] * 3, BATCH)
    for (a, _), (b, _) in zip(ours, plain_run, strict=True):
        torch.testing.assert_close(flat(a.params), flat(b.params), rtol=1e-9, atol=1e-12)
    assert [int(state) for state, _ in seen] == [0, 1, 2]
    assert int(ours[-1][0].opt_state) == 3
    assert torch.equal(flat(seen[1][1]), flat(ours[0][0].params))


# ---------------------------------------------------------------- line search, Polyak


def rosenbrock(w, batch):
    return 100 * (w[1] - w[0] ** 2) ** 2 + (1 - w[0]) ** 2


def square(w, batch):
    return w**2


# The loss, the transformation, options, lr, and the step that is accepted from 1.
LINE_SEARCHES = {
    "uphill": (square, gd.scale(-1.0), {}, 1.0, 0.0),
    "NaN off the spot": (lambda w, _: torch.where(w.detach() == 1, w, torch.nan), gd.chain(), {}, 1.0, 0.0),
    "an infinite direction": (square, gd.chain(gd.scale(1e308), gd.scale(10.0)), {}, 1.0, 0.0),
    "too long by default": (lambda w, _: 1e9 * w**2, gd.chain(), {}, 1.0, 0.0),
    "what the transformed direction promises": (lambda w, _: w, gd.scale(0.1), {"decrease": 0.5}, 1.0, 1.0),
    # √5 is below the line 1 + 0.9·8·¼
    "uphill where the loss flattens": (lambda w, _: w.sqrt(), gd.scale(-1.0), {"decrease": 0.9}, 8.0, 0.0),
}


@pytest.mark.parametrize("name", LINE_SEARCHES)
def test_a_line_search_accepts_the_longest_good_step_or_stays_where_it_is(name):
    loss_fn, transform, options, lr, size = LINE_SEARCHES[name]
    step = gd.methods.line_search(loss_fn, transform, **({"decrease": 0.1} | options))
    one = torch.tensor(1.0, dtype=torch.float64)
    state, _ = step(step.init(one), None, lr)
    assert state.step_size == size
    direction = transform.update(grad(loss_fn)(one, None), transform.init(one), one)[0]
    torch.testing.assert_close(state.params, one - size * direction if size else one, rtol=1e-15, atol=0)


def test_a_line_search_in_half_precision_sums_beyond_its_range():
    step = gd.methods.line_search(lambda w, batch: 300 * w)  # ‖g‖² = 90 000 > 65 504
    state, _ = step(step.init(torch.tensor(1.0, dtype=torch.float16)), None, 2**-10)
    assert float(state.step_size) == 2**-10
    assert float(state.params) == pytest.approx(1 - 300 / 1024, rel=1e-3)


def test_a_line_search_with_lbfgs_finds_rosenbrocks_minimum():
    step = gd.methods.line_search(rosenbrock, gd.lbfgs(5))
    state = step.init(torch.tensor([-1.2, 1.0], dtype=torch.float64))
    states = run(step, state, [1.0] * 60)
    torch.testing.assert_close(states[-1][0].params, torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-8)
    losses = torch.stack([loss for _, loss in states])
    assert (losses.diff() <= 0).all()


def test_polyaks_step_survives_a_gradient_whose_square_vanishes():
    step = gd.methods.polyak(lambda w, batch: 1e-25 * w.abs())
    state, _ = step(step.init(torch.tensor(4.0)), None, 1.0)
    torch.testing.assert_close(state.params, torch.tensor(0.0), atol=1e-6, rtol=0)


# ---------------------------------------------------------------- L-BFGS


def test_lbfgs_keeps_no_pair_without_curvature():
    transform = gd.lbfgs(2)
    state = transform.init(torch.tensor([0.0]))
    _, state = transform.update(torch.tensor([2.0]), state, torch.tensor([0.0]))
    _, bent = transform.update(torch.tensor([1.0]), state, torch.tensor([-0.5]))
    assert bent.rho.tolist() == [0.0, 2.0]
    updates, kept = transform.update(torch.tensor([1.5]), bent, torch.tensor([-1.0]))  # concave here
    for field in ("s", "y", "rho"):
        assert torch.equal(getattr(kept, field), getattr(bent, field))
    torch.testing.assert_close(updates, torch.tensor([0.75]))  # 1.5 / H with H = 2
    assert kept.params == -1
    half = torch.tensor([1.0], dtype=torch.bfloat16)
    updates, state = transform.update(half, transform.init(half), half)
    assert (updates.dtype, state.params.dtype) == (torch.bfloat16, torch.float32)
    with pytest.raises(ValueError, match="lbfgs needs params"):
        transform.update(torch.tensor([1.0]), kept)
