"""Tables that several test files go through: the transformations, the backends.

To add a transformation, add its line to TABLE: every law of the family and of the backends then holds it.
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
    "clip_by_value": Row(gd.clip_by_value, {"limit": 0.5}, 0.3),
    "clip_by_global_norm": Row(gd.clip_by_global_norm, {"max_norm": 0.7}, 0.3),
    "adaptive_clip": Row(gd.adaptive_clip, {"clipping": 0.3, "eps": 0.1}, 0.3),
    "zero_nans": Row(gd.zero_nans, {}, 0.3),
    "trust_ratio": Row(gd.trust_ratio, {"coefficient": 0.5}, 0.05),
    "lars": Row(gd.lars, {"momentum": 0.5, "weight_decay": 0.01, "trust_coefficient": 0.1}, 0.2),
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


BACKENDS = {
    "eager": {},
    "replay": {"checkpoint": 2},  # of 5 steps: two blocks and a rest
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
    {"checkpoint": 1},
]
