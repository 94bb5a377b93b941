"""Step by step with torch.optim: parameters and state, in float64, to 1e-12 of how far they have moved.

Hypothesis draws every hyperparameter away from its neutral value. 400 examples a method:
`pytest tests/test_parity_optim.py --hypothesis-profile nightly`.
"""

from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler

import gdfunc as gd

from .references import few, flat, linear_data, linear_loss, normal, relative_error

STEPS = 60
rates = st.floats(0.05, 0.95)
betas = st.tuples(st.floats(0.3, 0.95), st.floats(0.8, 0.999))
eps = st.floats(1e-8, 1e-3)
lrs = st.floats(1e-3, 0.05)
ADAM = {"betas": betas, "eps": eps}
CENTERED = {"alpha": st.floats(0.8, 0.99), "eps": st.floats(1e-3, 1e-1), "centered": st.just(True)}
# name: (hyperparameters, the names of torch's state)
OPTIMIZERS = {
    "SGD": ({"momentum": rates, "dampening": rates}, "momentum_buffer"),
    "SGD, Nesterov": ({"momentum": rates, "nesterov": st.just(True)}, "momentum_buffer"),
    "Adagrad": ({"lr_decay": rates, "initial_accumulator_value": rates, "eps": eps}, "sum"),
    "Adadelta": ({"rho": rates, "eps": eps}, "square_avg acc_delta"),
    "RMSprop": ({"alpha": rates, "eps": eps, "momentum": rates}, "square_avg momentum_buffer"),
    "RMSprop, centered": (CENTERED, "square_avg grad_avg"),
    "Adam": (ADAM, "exp_avg exp_avg_sq"),
    "Adam, amsgrad": (ADAM | {"amsgrad": st.just(True)}, "exp_avg exp_avg_sq max_exp_avg_sq"),
    "AdamW": (ADAM | {"amsgrad": st.booleans()}, "exp_avg exp_avg_sq"),
    "Adamax": (ADAM, "exp_avg exp_inf"),
    "NAdam": (ADAM | {"momentum_decay": st.floats(1e-3, 0.1)}, "exp_avg exp_avg_sq mu_product"),
    "RAdam": (ADAM, "exp_avg exp_avg_sq"),
}


def make(optimizer, weight_decay, **hyperparameters):
    """Our transformation for a class of torch.optim; only AdamW decays past its moments."""
    if optimizer == "AdamW":
        return gd.adamw(weight_decay=weight_decay, **hyperparameters)
    ours = gd.momentum if optimizer == "SGD" else getattr(gd, optimizer.lower())
    return gd.chain(gd.weight_decay(weight_decay), ours(**hyperparameters))


class Pair:
    """The same noisy quadratic descended twice: by torch.optim, and by a transformation."""

    def __init__(self, seed, transform, optimizer_class, **options):
        self.curvature = 0.2 + normal(seed, 3).abs()
        self.noise = normal(seed + 1, STEPS, 4)
        assert self.noise.std(0).min() > 0.5  # constant data would prove little
        start = normal(seed + 2, 4)
        self.start = {"w": start[:3].clone(), "b": start[3].clone()}
        self.theirs = {name: leaf.clone().requires_grad_() for name, leaf in self.start.items()}
        self.optimizer = optimizer_class(self.theirs.values(), **options)
        self.ours, self.transform = dict(self.start), transform
        self.state = transform.init(self.ours)

    def gradient(self, params, t):
        noise = self.noise[t]
        return {"w": self.curvature * params["w"] + noise[:3], "b": params["b"] + noise[3]}

    def step(self, t, lr):
        for name, gradient in self.gradient(self.theirs, t).items():
            self.theirs[name].grad = gradient.detach()
        self.optimizer.step()
        updates, self.state = self.transform.update(self.gradient(self.ours, t), self.state, self.ours)
        self.ours = gd.apply_updates(self.ours, updates, lr)

    def check_params(self):
        for name, leaf in self.ours.items():
            theirs = self.theirs[name].detach()
            moved = (theirs - self.start[name]).norm()
            assert (leaf - theirs).norm() <= 1e-12 * moved + 2.0**-52 * self.start[name].norm()

    def check_state(self, state, names, unit=1.0):
        for name_of_theirs in names.split():
            ours = getattr(state, {"exp_inf": "exp_avg_sq"}.get(name_of_theirs, name_of_theirs))
            for name, parameter in self.theirs.items():
                theirs = self.optimizer.state[parameter][name_of_theirs]
                leaf = ours[name] if isinstance(ours, dict) else ours
                assert (leaf * unit - theirs).norm() <= 1e-12 * theirs.norm().clamp_min(1e-3)


@pytest.fixture
def _float64_by_default():
    """Make torch's NAdam keep its product of momenta in float64, as ours does."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("_float64_by_default")
@pytest.mark.parametrize("name", OPTIMIZERS)
@settings(few, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_transformation_is_its_torch_optimizer_step_by_step(name, data):
    optimizer, (hyperparameters, state_names) = name.split(",")[0], OPTIMIZERS[name]
    drawn = {key: data.draw(strategy, label=key) for key, strategy in hyperparameters.items()}
    lr, decay = data.draw(lrs, label="lr"), data.draw(rates, label="weight_decay")
    maximize, seed = data.draw(st.booleans(), label="maximize"), data.draw(st.integers(0, 2**32))
    # Climbing a convex quadratic runs away; a decay above the curvature holds it.
    drawn["weight_decay"] = decay + 3.0 * maximize
    transform = gd.chain(*[gd.scale(-1.0)] * maximize, make(optimizer, **drawn))
    pair = Pair(seed, transform, getattr(torch.optim, optimizer), lr=lr, maximize=maximize, **drawn)
    for t in range(STEPS):
        pair.step(t, lr)
        if t < 10 or t == STEPS - 1:
            pair.check_params()
            state = next(s for s in pair.state[-1] if hasattr(s, "_fields"))
            pair.check_state(state, state_names)


FLOAT32 = {
    "SGD": (lambda: gd.momentum(dampening=0.1), {"momentum": 0.9, "dampening": 0.1}),
    "SGD, Nesterov": (lambda: gd.momentum(nesterov=True), {"momentum": 0.9, "nesterov": True}),
    "Adagrad": (lambda: gd.adagrad(lr_decay=0.01), {"lr_decay": 0.01}),
    "Adadelta": (gd.adadelta, {}),
    "RMSprop": (lambda: gd.rmsprop(momentum=0.5, centered=True), {"momentum": 0.5, "centered": True}),
    "Adam": (gd.adam, {}),
    "Adam, amsgrad": (lambda: gd.adam(amsgrad=True), {"amsgrad": True}),
    "AdamW": (gd.adamw, {}),
    "Adamax": (gd.adamax, {}),
    "NAdam": (gd.nadam, {}),
    "RAdam": (gd.radam, {}),
    "Rprop": (lambda: gd.rprop(step_sizes=(1e-4, 5e3)), {}),
}


def narrow_runs(name, dtype):
    """How far 300 steps of ours and of torch's in a dtype end from torch's in float32, by its movement."""
    make, options = FLOAT32[name]
    start, noise = normal(0, 200, dtype=torch.float32), normal(1, 300, 200, dtype=torch.float32)

    def run_of_torch(dtype):
        parameter = nn.Parameter(start.to(dtype, copy=True))
        optimizer = getattr(torch.optim, name.split(",")[0])([parameter], lr=0.01, **options)
        for row in noise.to(dtype):
            parameter.grad = 0.7 * parameter.detach() + row
            optimizer.step()
        return parameter.detach()

    transform, ours = make(), start.to(dtype)
    state = transform.init(ours)
    for row in noise.to(dtype):
        updates, state = transform.update(0.7 * ours + row, state, ours)
        ours = gd.apply_updates(ours, updates, 0.01)
    expected = run_of_torch(torch.float32)
    return [relative_error(end, expected, start) for end in (ours, run_of_torch(dtype))]


@pytest.mark.parametrize("name", FLOAT32)
def test_narrow_run_agrees_with_torchs_of_float32(name):
    """To 3e-6 of the movement in float32, and in bfloat16 as nearly as torch's own run in bfloat16."""
    assert narrow_runs(name, torch.float32)[0] <= 3e-6
    ours, theirs = narrow_runs(name, torch.bfloat16)
    assert ours <= 1.3 * theirs


ASGD = {"lambd": 0.1, "alpha": 0.6, "t0": 20}
METHODS = {
    "heavy_ball": (lambda f: gd.methods.heavy_ball(f, 0.9), partial(torch.optim.SGD, momentum=0.9)),
    "asgd": (partial(gd.methods.asgd, **ASGD), partial(torch.optim.ASGD, **ASGD)),
}
SCHEDULES = {
    "constant": (lr_scheduler.ConstantLR, {"factor": 0.3, "total_iters": 50}),
    "step": (lr_scheduler.StepLR, {"step_size": 70, "gamma": 0.5}),
    "multi_step": (lr_scheduler.MultiStepLR, {"milestones": [50, 200], "gamma": 0.3}),
    "exponential": (lr_scheduler.ExponentialLR, {"gamma": 0.99}),
    "linear": (lr_scheduler.LinearLR, {"start_factor": 0.3, "end_factor": 0.9, "total_iters": 200}),
    "polynomial": (lr_scheduler.PolynomialLR, {"total_iters": 300, "power": 1.5}),
    "cosine_annealing": (lr_scheduler.CosineAnnealingLR, {"T_max": 300, "eta_min": 1e-3}),
    "cosine_with_restarts": (lr_scheduler.CosineAnnealingWarmRestarts, {"T_0": 40, "T_mult": 2}),
    "one_cycle": (
        partial(lr_scheduler.OneCycleLR, max_lr=0.02, cycle_momentum=False),
        {"total_steps": 300},
    ),
}


@pytest.mark.parametrize("name", [*METHODS, *SCHEDULES])
def test_float32_run_of_a_method_or_a_schedule_agrees_with_torchs_to_3e_6_of_the_movement(name):
    data = linear_data(0, 300 * 8, 20, dtype=torch.float32)
    batches = [tuple(leaf[t : t + 8] for leaf in data) for t in range(0, 300 * 8, 8)]
    start = {"w": normal(3, 20, dtype=torch.float32), "b": torch.zeros(())}
    theirs = {key: leaf.clone().requires_grad_() for key, leaf in start.items()}
    make, make_torchs = METHODS.get(name, (gd.make_step, torch.optim.SGD))
    lrs, optimizer = torch.full((300,), 0.02), make_torchs(theirs.values(), lr=0.02)
    if name in SCHEDULES:
        make_scheduler, options = SCHEDULES[name]
        lrs = getattr(gd.schedules, name)(lrs[0], **options)(torch.arange(300))
        scheduler = make_scheduler(optimizer, **options)
    step = make(linear_loss)
    carry = step.init(start)
    for batch, lr in zip(batches, lrs, strict=True):
        carry, _ = step(carry, batch, lr)
        optimizer.zero_grad()
        linear_loss(theirs, batch).backward()
        optimizer.step()
        if name in SCHEDULES:
            scheduler.step()
    ends = [flat(tree).detach() for tree in (getattr(carry, "params", carry), theirs)]
    assert relative_error(*ends, flat(start)) <= 3e-6


@pytest.mark.parametrize("name", ["Adam", "Adamax", "NAdam", "RAdam", "RMSprop", "Adadelta"])
@pytest.mark.parametrize(("dtype", "large"), [(torch.float16, 300.0), (torch.float32, 2e19)])
def test_square_that_overflows_leaves_updates_finite(name, dtype, large):
    transform = getattr(gd, name.lower())()
    state = transform.init(torch.ones(1, dtype=dtype))
    for gradient in (large, large / 300, large / 300):
        update, state = transform.update(torch.tensor([gradient], dtype=dtype), state)
        assert update.isfinite().all()
        assert update > 0


@few
@given(st.floats(0.3, 0.9), st.floats(1.05, 1.5), lrs, st.integers(0, 2**32))
def test_rprop_is_torchs_in_units_of_lr(minus, plus, lr, seed):
    low, high = 1e-3 * lr, 20 * lr
    ours = gd.rprop((minus, plus), (low / lr, high / lr))
    pair = Pair(seed, ours, torch.optim.Rprop, lr=lr, etas=(minus, plus), step_sizes=(low, high))
    for t in range(STEPS):
        pair.step(t, lr)
    pair.check_params()
    pair.check_state(pair.state, "prev")
    pair.check_state(pair.state, "step_size", unit=lr)


def test_rprop_differs_from_torchs_where_it_says():
    """Step sizes start at lr in torch for good; here lr is a factor of every step."""
    pair = Pair(0, gd.rprop(), torch.optim.Rprop, lr=0.01)
    for t in range(20):
        pair.step(t, 0.01 if t < 10 else 0.001)
        pair.optimizer.param_groups[0]["lr"] = 0.001
    assert (pair.ours["w"] - pair.theirs["w"].detach()).norm() > 1e-3


def test_nadam_differs_from_torchs_in_the_dtype_of_its_product():
    pair = Pair(0, gd.nadam((0.5, 0.9)), torch.optim.NAdam, lr=0.01, betas=(0.5, 0.9))
    for t in range(20):
        pair.step(t, 0.01)
    error = (pair.ours["w"] - pair.theirs["w"].detach()).norm()
    assert 1e-12 < error < 1e-6


def test_centered_rmsprop_stays_finite_where_torchs_does_not():
    """A constant gradient leaves v − ḡ² at rounding, below zero or above."""
    transform = gd.rmsprop(alpha=0.5, eps=1e-8, centered=True)
    g = normal(3, 50)
    state, parameter = transform.init(g), torch.zeros(50, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.RMSprop([parameter], lr=0.1, alpha=0.5, centered=True)
    for _ in range(100):
        updates, state = transform.update(g, state)
        assert updates.isfinite().all()
        parameter.grad = g.clone()
        optimizer.step()
    assert not parameter.isfinite().all()


def test_muon_is_torchs_but_for_its_bfloat16():
    g = [normal(seed, 6, 3) for seed in range(5)]
    transform = gd.chain(gd.muon(0.9, nesterov=True), gd.weight_decay(0.1))
    parameter = nn.Parameter(normal(9, 6, 3))
    ours, state = parameter.detach().clone(), transform.init(parameter)
    start = ours
    optimizer = torch.optim.Muon([parameter], lr=0.02, momentum=0.9, weight_decay=0.1)
    for gradient in g:
        parameter.grad = gradient.clone()
        optimizer.step()
        updates, state = transform.update(gradient, state, ours)
        ours = gd.apply_updates(ours, updates, 0.02)
    moved = (parameter.detach() - start).norm()
    assert (ours - parameter.detach()).norm() < 0.03 * moved


@few
@given(st.integers(0, 2**32), st.floats(0.001, 0.2), st.integers(1, 6))
def test_sgd_of_a_module_on_mini_batches_is_torchs(seed, lr, batch_size):
    data = linear_data(seed, 24, 3)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    apply, params, _ = gd.modules.functional(model)
    step = gd.make_step(lambda params, batch: ((apply(params, batch[0])[:, 0] - batch[1]) ** 2).mean())
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    vector = nn.utils.parameters_to_vector
    start = vector(params.values())
    for row in gd.epoch_batches(gd.random.key(seed), 24, batch_size, 2)[:10]:
        x, y = gd.take(data, row)
        optimizer.zero_grad()
        loss = ((model(x)[:, 0] - y) ** 2).mean()
        loss.backward()
        optimizer.step()
        params, ours = step(params, (x, y), lr)
        torch.testing.assert_close(ours, loss.detach(), rtol=1e-12, atol=0)
        ours, theirs = vector(params.values()), vector(model.parameters()).detach()
        assert relative_error(ours, theirs, start) <= 1e-12


@given(st.floats(0.1, 5.0), st.integers(0, 2**32))
def test_clipping_is_torchs(limit, seed):
    leaves = {"a": normal(seed, 3), "b": normal(seed + 1, 2, 2)}
    parameters = [torch.zeros_like(leaf, requires_grad=True) for leaf in leaves.values()]
    for clip, transform in [
        (nn.utils.clip_grad_norm_, gd.clip_by_global_norm(limit)),
        (nn.utils.clip_grad_value_, gd.clip_by_value(limit)),
    ]:
        for parameter, leaf in zip(parameters, leaves.values(), strict=True):
            parameter.grad = leaf.clone()
        clip(parameters, limit)
        updates, _ = transform.update(leaves, ())
        for parameter, update in zip(parameters, updates.values(), strict=True):
            # torch divides by the norm plus 1e-6.
            torch.testing.assert_close(update, parameter.grad, rtol=2e-6 / limit, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_many_leaves_at_once_have_the_bits_of_each_alone(dtype):
    """Also of NaN, infinities, zeros and numbers near the ends of the range."""
    limits = torch.finfo(dtype)
    ends = [0.0, -0.0, limits.max, -limits.max, limits.tiny, limits.tiny / 8, torch.inf, torch.nan]
    grads = {f"g{size}": normal(size, size).to(dtype) for size in (1, 3, 17, 64)}
    grads |= {"matrix": normal(5, 4, 6).to(dtype).T, "scalar": normal(6, 1)[0].to(dtype)}
    grads["ends"] = torch.tensor(ends, dtype=dtype)
    transform = gd.adam()
    together = transform.init(grads)
    alone = {name: transform.init({name: leaf}) for name, leaf in grads.items()}
    for t in range(3):
        scaled = {name: leaf * (t + 1) for name, leaf in grads.items()}
        updates, together = transform.update(scaled, together)
        for name, leaf in scaled.items():
            update, alone[name] = transform.update({name: leaf}, alone[name])
            for one, many in ((update, updates), *zip(alone[name][1:3], together[1:3], strict=True)):
                assert torch.equal(one[name].nan_to_num(nan=0.5), many[name].nan_to_num(nan=0.5))
                assert torch.equal(one[name].signbit(), many[name].signbit())
                assert one[name].stride() == many[name].stride()
