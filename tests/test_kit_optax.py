"""Optax keeps the kit's claims, where JAX is installed."""

import importlib.util
import sys

import pytest
import torch

import gdfunc as gd
from gdfunc import testing as gt


def optax():
    pytest.importorskip("jax")
    return pytest.importorskip("optax")


@pytest.fixture(autouse=True, scope="module")
def _jax_has_compiled():
    """Because the first compilation draws from Python's generator, it comes before the tests."""
    if importlib.util.find_spec("jax") and importlib.util.find_spec("optax"):
        gt.feed(gt.from_optax(optax().sgd), torch.ones(2))


MOMENTUM = gt.Momentum(0.5)
# Claims in Optax's conventions: the two lars differ in the norm and where lr enters.
PAIRS = {
    "sgd": (lambda ox, lr: ox.sgd(lr), gt.GradientDescent()),
    "momentum": (lambda ox, lr: ox.sgd(lr, momentum=0.5), MOMENTUM),
    "nesterov": (lambda ox, lr: ox.sgd(lr, momentum=0.5, nesterov=True), gt.Momentum(0.5, nesterov=True)),
    "adam": (lambda ox, lr: ox.adam(lr), gt.Adam()),
    "adam, eps in the root": (
        lambda ox, lr: ox.adam(lr, eps=0.0, eps_root=0.01),
        gt.Adam(eps=0.01, eps_inside=True),
    ),
    "adamw": (lambda ox, lr: ox.adamw(lr, weight_decay=0.01), gt.Adam(weight_decay=0.01)),
    "amsgrad": (lambda ox, lr: ox.amsgrad(lr), gt.Adam(amsgrad="corrected")),
    "nadam": (lambda ox, lr: ox.nadam(lr), gt.Adam(nesterov=True)),
    "adamax": (lambda ox, lr: ox.adamax(lr), gt.Adamax()),
    "radam": (lambda ox, lr: ox.radam(lr), gt.RAdam(eps_corrected=True)),
    "adabelief": (
        lambda ox, lr: ox.adabelief(lr, eps=0.01, eps_root=0.02),
        gt.AdaBelief(eps=0.02, eps_outside=0.01),
    ),
    "yogi": (
        lambda ox, lr: ox.yogi(lr),
        gt.Yogi(initial_accumulator_value=1e-6, corrected=True),
    ),
    "rmsprop": (lambda ox, lr: ox.rmsprop(lr), gt.RMSprop(0.9, eps_inside=True)),
    "adagrad": (lambda ox, lr: ox.adagrad(lr), gt.Adagrad(0.0, 0.1, 1e-7, eps_inside=True)),
    "adadelta": (lambda ox, lr: ox.adadelta(lr, eps=1e-6), gt.Adadelta()),
    "sign": (lambda ox, lr: ox.sign_sgd(lr), gt.Sign()),
    "lion": (lambda ox, lr: ox.lion(lr, weight_decay=0.125), gt.Chain(gt.Lion(), gt.WeightDecay(0.125))),
    "lars": (
        lambda ox, lr: ox.lars(lr, weight_decay=0.125, trust_coefficient=0.5),
        gt.LARS(0.9, 0.125, 0.5, norms="together", form="displacement"),
    ),
    "lamb": (lambda ox, lr: ox.lamb(lr, weight_decay=0.01), gt.LAMB()),
    "trust ratio": (lambda ox, lr: ox.chain(ox.scale_by_trust_ratio(), ox.scale(-lr)), gt.TrustRatio()),
    "L2": (
        lambda ox, lr: ox.chain(ox.add_decayed_weights(0.125), ox.sgd(lr, momentum=0.5)),
        gt.WeightDecay(0.125, MOMENTUM),
    ),
    "clip": (lambda ox, lr: ox.chain(ox.clip(0.5), ox.sgd(lr)), gt.ClipByValue(0.5)),
    "clip by global norm": (
        lambda ox, lr: ox.chain(ox.clip_by_global_norm(2.0), ox.sgd(lr)),
        gt.ClipByGlobalNorm(2.0),
    ),
    "masked": (
        lambda ox, lr: ox.chain(
            ox.masked(ox.clip(0.5), lambda tree: dict(zip(tree, (False, True, True), strict=False))),
            ox.sgd(lr),
        ),
        gt.Masked(gt.ClipByValue(0.5)),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_optax_keeps_the_claim(name):
    make, claim = PAIRS[name]
    ox = optax()
    report = gt.check_optimizer(gt.from_optax(lambda lr: make(ox, lr), name), claim)
    assert {"check_kernel", "check_dtype"} <= set(report.passed)


def test_optax_lr_and_sign_are_its_own():
    ox = optax()
    with pytest.raises(gt.LawBroken) as caught:
        gt.check_optimizer(gt.from_optax(lambda lr: ox.scale(0.5 * lr)), gt.GradientDescent())
    assert caught.value.diagnosis == "the effective learning rate is -0.5 lr"


def test_optax_skips_what_is_not_finite():
    """One feed alone: Optax's branch is compiled in every step."""
    ox = optax()
    subject = gt.from_optax(lambda lr: ox.apply_if_finite(ox.sgd(lr, momentum=0.5), 9))
    a, b = [1.0, float("nan"), 2.0, 3.0], [1.0, 2.0, 3.0, -float("inf")]
    grads = {k: torch.tensor(g, dtype=torch.float64) for k, g in (("a", a), ("b", b))}
    gt.check_kernel(subject, gt.ApplyIfFinite(MOMENTUM), grads)


def test_adaptive_clips_units_are_columns_in_optax():
    """Optax's kernels have their outputs in the last dim, gdfunc's in the first."""
    ox = optax()
    subject = gt.from_optax(lambda lr: ox.chain(ox.adaptive_grad_clip(0.25, eps=2.0), ox.sgd(lr)))
    with pytest.raises(gt.LawBroken) as caught:
        gt.check_optimizer(subject, gt.AdaptiveClip(0.25, 2.0))
    assert caught.value.diagnosis == "agrees with: norms over rows, not columns"


def test_jax_keeps_its_global_precision():
    ox = optax()
    import jax

    moves = gt.feed(gt.from_optax(ox.sgd), torch.ones(3, dtype=torch.float64))
    assert moves.dtype == torch.float64
    assert jax.numpy.ones(1).dtype == "float32"
    torch.testing.assert_close(moves, gt.feed(gt.from_transform(gd.chain()), torch.ones(3).double()))


@pytest.mark.parametrize("missing", ["jax", "optax"])
def test_a_missing_library_is_named(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, "jax", sys.modules.get("jax", gd))
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match="pip install jax optax"):
        gt.from_optax(lambda lr: None)
