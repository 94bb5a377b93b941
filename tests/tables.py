"""Tables that several test files go through: the transformations, the steps, the backends.

To add a transformation, add its line to TABLE: every law of the family and of the backends then holds it.
To add a step, add its line to STEPS.
"""

from typing import NamedTuple

import pytest
import torch

import gdfunc as gd

from .references import normal


class Row(NamedTuple):
    """A transformation as a function of its hyperparameters, and values away from neutral ones."""

    make: object
    hyperparameters: dict
    lr: float  # with which it converges on the quadratic below
    matrices: bool = False  # whether it is for matrices only


def betas(make, **fixed):
    return lambda beta1, beta2, **rest: make((beta1, beta2), **rest, **fixed)


MASK = {"w": True, "m": False, "s": True}
TABLE = {
    "scale": Row(gd.scale, {"factor": 0.7}, 0.3),
    "momentum": Row(gd.momentum, {"momentum": 0.6, "dampening": 0.3}, 0.2),
    "nesterov": Row(lambda **h: gd.momentum(nesterov=True, **h), {"momentum": 0.6}, 0.1),
    "sign": Row(gd.sign, {}, 0.02),
    "lion": Row(betas(gd.lion), {"beta1": 0.8, "beta2": 0.9}, 0.02),
    "rprop": Row(
        lambda minus, plus, low, high: gd.rprop((minus, plus), (low, high)),
        {"minus": 0.4, "plus": 1.3, "low": 1e-4, "high": 20.0},
        0.01,
    ),
    "weight_decay": Row(gd.weight_decay, {"rate": 0.01}, 0.3),
    "adagrad": Row(gd.adagrad, {"lr_decay": 0.01, "initial_accumulator_value": 0.1, "eps": 1e-3}, 0.5),
    "adadelta": Row(gd.adadelta, {"rho": 0.8, "eps": 1e-2}, 0.3),
    "rmsprop": Row(gd.rmsprop, {"alpha": 0.9, "eps": 1e-3, "momentum": 0.3}, 0.02),
    "rmsprop, centered": Row(lambda **h: gd.rmsprop(centered=True, **h), {"alpha": 0.9, "eps": 0.3}, 0.02),
    "adam": Row(betas(gd.adam), {"beta1": 0.7, "beta2": 0.95, "eps": 1e-3}, 0.05),
    "adam, amsgrad": Row(betas(gd.adam, amsgrad=True), {"beta1": 0.7, "beta2": 0.95, "eps": 1e-3}, 0.05),
    "adamw": Row(betas(gd.adamw), {"beta1": 0.7, "beta2": 0.95, "eps": 1e-3, "weight_decay": 0.01}, 0.05),
    "adamax": Row(betas(gd.adamax), {"beta1": 0.7, "beta2": 0.95, "eps": 1e-3}, 0.05),
    "nadam": Row(betas(gd.nadam), {"beta1": 0.7, "beta2": 0.95, "eps": 1e-3, "momentum_decay": 0.01}, 0.05),
    "radam": Row(betas(gd.radam), {"beta1": 0.7, "beta2": 0.95, "eps": 1e-3}, 0.05),
    "adabelief": Row(betas(gd.adabelief), {"beta1": 0.7, "beta2": 0.95, "eps": 1e-3}, 0.05),
    "yogi": Row(betas(gd.yogi), {"beta1": 0.7, "beta2": 0.95, "eps": 1e-2}, 0.05),
    "ademamix": Row(
        lambda beta1, beta2, beta3, **h: gd.ademamix((beta1, beta2, beta3), **h),
        {"beta1": 0.7, "beta2": 0.95, "beta3": 0.9, "alpha": 0.5, "eps": 1e-3},
        0.05,
    ),
    "ademamix, warmup": Row(
        lambda beta1, beta2, beta3, **h: gd.ademamix((beta1, beta2, beta3), warmup=5, **h),
        {"beta1": 0.7, "beta2": 0.95, "beta3": 0.9, "alpha": 0.5, "eps": 1e-3},
        0.05,
    ),
    "adafactor": Row(
        lambda beta2_decay, eps1, eps2, d: gd.adafactor(beta2_decay, eps=(eps1, eps2), d=d),
        {"beta2_decay": -0.7, "eps1": 1e-3, "eps2": 0.1, "d": 0.8},
        0.05,
    ),
    "dog": Row(gd.dog, {"reps_rel": 0.1, "eps": 1e-3}, 1.0),
    "clip_by_value": Row(gd.clip_by_value, {"limit": 0.5}, 0.3),
    "clip_by_global_norm": Row(gd.clip_by_global_norm, {"max_norm": 0.7}, 0.3),
    "adaptive_clip": Row(gd.adaptive_clip, {"clipping": 0.3, "eps": 0.1}, 0.3),
    "zero_nans": Row(gd.zero_nans, {}, 0.3),
    "trust_ratio": Row(gd.trust_ratio, {"coefficient": 0.5}, 0.05),
    "lars": Row(gd.lars, {"momentum": 0.5, "weight_decay": 0.01, "trust_coefficient": 0.1}, 0.2),
    "lbfgs": Row(lambda eps: gd.lbfgs(3, eps=eps), {"eps": 1e-6}, 0.3),
    "lamb": Row(betas(gd.lamb), {"beta1": 0.7, "beta2": 0.95, "eps": 1e-3, "weight_decay": 0.01}, 0.02),
    "muon": Row(
        lambda momentum, a, b, c, eps: gd.muon(momentum, ns_coefficients=(a, b, c), eps=eps),
        {"momentum": 0.6, "a": 3.4, "b": -4.7, "c": 2.0, "eps": 1e-3},
        0.02,
        matrices=True,
    ),
    "masked": Row(lambda **h: gd.masked(gd.scale(**h), MASK), {"factor": 0.7}, 0.3),
    "partition": Row(
        lambda factor, momentum: gd.partition({True: gd.scale(factor), False: gd.momentum(momentum)}, MASK),
        {"factor": 0.7, "momentum": 0.5},
        0.2,
    ),
    "apply_if_finite": Row(lambda **h: gd.apply_if_finite(gd.momentum(**h)), {"momentum": 0.6}, 0.2),
    "accumulate": Row(lambda **h: gd.accumulate(gd.momentum(**h), 2), {"momentum": 0.6}, 0.2),
    "chain": Row(
        lambda norm, beta: gd.chain(gd.clip_by_global_norm(norm), gd.momentum(beta)),
        {"norm": 1.0, "beta": 0.6},
        0.2,
    ),
}
NUMBERED = [(name, key) for name, row in TABLE.items() for key in row.hyperparameters]


def start_of(row, dtypes=(torch.float64,) * 3):
    if row.matrices:
        return {"w": normal(0, 3, 2).to(dtypes[0]), "m": normal(1, 2, 4).to(dtypes[1])}
    return {
        "w": normal(0, 3).to(dtypes[0]),
        "m": normal(1, 2, 2).to(dtypes[1]),
        "s": normal(2, 1)[0].to(dtypes[2]),
    }


def make(row, **changed):
    return row.make(**(row.hyperparameters | changed))


class StepRow(NamedTuple):
    """A step as a function of a loss, of data that belong to it, and of its hyperparameters."""

    make: object
    hyperparameters: dict
    has_data: bool = False  # whether its batches are row numbers


def step_of(make, *args, **hyperparameters):
    return StepRow(lambda loss_fn, data, **h: make(loss_fn, *args, **h), hyperparameters)


def around(wrap, **hyperparameters):
    """A step that wraps another."""
    return StepRow(lambda loss_fn, data, **h: wrap(gd.make_step(loss_fn), **h), hyperparameters)


def with_data(make, **options):
    return StepRow(lambda loss_fn, data: make(loss_fn, data, **options), {}, True)


def of_residuals(make, **hyperparameters):
    """A method of least squares, whose loss is `linear_loss` whatever the test asks for."""

    def residuals(params, batch):
        x, y = batch
        return x @ params["w"].to(x.dtype) + params["b"].to(x.dtype) - y

    return StepRow(lambda loss_fn, data, **h: make(residuals, **h), hyperparameters)


def private(loss_fn, **hyperparameters):
    return gd.privacy.make_private_step(loss_fn, key=gd.random.key(0), divisor=6.0, **hyperparameters)


STEPS = {
    "plain": step_of(gd.make_step),
    "transform": step_of(lambda f, momentum: gd.make_step(f, gd.momentum(momentum)), momentum=0.6),
    "heavy_ball": step_of(gd.methods.heavy_ball, momentum=0.7),
    "nesterov": step_of(gd.methods.nesterov, momentum=0.7),
    "nesterov_convex": step_of(gd.methods.nesterov),
    "ogm": step_of(gd.methods.ogm, 4),
    "triple_momentum": step_of(gd.methods.triple_momentum, condition_number=9.0),
    "asgd": step_of(gd.methods.asgd, lambd=0.2, alpha=0.6, t0=2.3, weight_decay=0.1),
    "ema": around(gd.methods.ema, decay=0.8),
    "ema_debiased": around(lambda step, decay: gd.methods.ema(step, decay, debias=True), decay=0.8),
    "lookahead": around(lambda step, alpha: gd.methods.lookahead(step, 3, alpha), alpha=0.4),
    "reduce_on_plateau": around(
        lambda step, **h: gd.methods.reduce_on_plateau(step, patience=0, **h),
        factor=0.5,
        threshold=0.9,
        min_lr=0.02,
        eps=1e-6,
    ),
    "projected": around(
        lambda step, radius: gd.methods.projected(step, gd.projections.ball(radius)), radius=0.7
    ),
    "add_noise": around(
        lambda step, temperature: gd.methods.add_noise(step, temperature, key=gd.random.key(0)),
        temperature=0.01,
    ),
    "sam": step_of(gd.methods.sam, rho=0.02),
    "sam_adaptive": step_of(lambda f, rho: gd.methods.sam(f, rho=rho, adaptive=True), rho=0.02),
    "schedule_free": step_of(gd.methods.schedule_free, beta=0.7, weight_decay=0.1),
    "line_search": step_of(gd.methods.line_search, decrease=0.7, factor=0.6),
    "polyak": step_of(gd.methods.polyak, minimum=0.001, max_step=0.4),
    "lbfgs": step_of(gd.methods.lbfgs, 3, decrease=0.2, curvature=0.7),
    "gauss_newton": of_residuals(gd.methods.gauss_newton),
    "levenberg_marquardt": of_residuals(gd.methods.levenberg_marquardt, damping=0.3),
    "levenberg_marquardt, cg": of_residuals(
        lambda f, damping: gd.methods.levenberg_marquardt(f, damping=damping, solver="cg", iterations=3),
        damping=0.3,
    ),
    "prodigy": step_of(gd.methods.prodigy, (0.7, 0.9), eps=0.01, weight_decay=0.1, d0=0.2, d_coef=0.9),
    "mechanic": step_of(
        gd.methods.mechanic, gd.momentum(0.5), (0.9, 0.99), decay=0.1, s_init=0.8, eps=0.01
    ),
    "sophia": step_of(
        lambda f, **h: gd.methods.sophia(f, (0.7, 0.6), key=gd.random.key(0), every=2, **h),
        gamma=4.0,
        eps=0.5,
        weight_decay=0.1,
    ),
    "private": step_of(private, max_norm=0.5, noise_multiplier=0.7),
    "svrg": with_data(gd.methods.svrg, batch_size=2),
    "svrg_average": with_data(gd.methods.svrg, batch_size=2, output="average"),
    "sarah": with_data(gd.methods.sarah, batch_size=2),
    "sarah_average": with_data(gd.methods.sarah, batch_size=2, output="average"),
    "sag": with_data(gd.methods.sag),
    "saga": with_data(gd.methods.saga),
}
LEAST_SQUARES = ["gauss_newton", "levenberg_marquardt", "levenberg_marquardt, cg"]
WITH_HYPERPARAMETERS = [name for name, row in STEPS.items() if row.hyperparameters]


BACKENDS = {
    "eager": {},
    "replay": {"adjoint": gd.adjoints.Checkpoint(2)},  # of 5 steps: two blocks and a rest
    "native": {"backend": "native"},
    "inductor": {"backend": "inductor", "unroll": 2},
    "cudagraph": {"backend": "cudagraph"},
}
DEVICES = {"cudagraph": "cuda"}
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

MARKS = {"cudagraph": needs_cuda}
EACH = [pytest.param(name, marks=MARKS.get(name, ())) for name in BACKENDS]
EACH_INDUCTOR_SLOW = [
    pytest.param(name, marks=(MARKS | {"inductor": pytest.mark.slow}).get(name, ())) for name in BACKENDS
]

TRACED = [
    pytest.param({"backend": "inductor"}, marks=pytest.mark.slow),
    {"backend": "native"},
    {"adjoint": gd.adjoints.Checkpoint(1)},
]
