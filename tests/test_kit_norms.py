"""Claims about signs, norms and wrappers: gdfunc and torch keep them, and their controls break them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gdfunc as gd
from gdfunc import testing as gt
from gdfunc.testing._claims._signs import flip_step


def places(labels):
    """Make a function that labels the leaves of a dict in order."""
    return lambda params: dict(zip(params, labels, strict=False))


MOMENTUM = gd.momentum(0.5), gt.Momentum(0.5)
PAIRS = [
    (gd.sign(), gt.Sign()),
    (gd.lion(), gt.Lion()),
    (gd.lion((0.5, 0.75)), gt.Lion((0.5, 0.75))),
    (gd.rprop(), gt.Rprop()),
    (gd.rprop((0.25, 1.5), (0.125, 8.0)), gt.Rprop((0.25, 1.5), (0.125, 8.0))),
    (gd.weight_decay(0.125), gt.WeightDecay(0.125)),
    (gd.chain(gd.weight_decay(0.125), MOMENTUM[0]), gt.WeightDecay(0.125, MOMENTUM[1])),
    (gd.clip_by_value(0.5), gt.ClipByValue(0.5)),
    (gd.clip_by_value(3.0), gt.ClipByValue(3.0)),
    (gd.clip_by_global_norm(1.0), gt.ClipByGlobalNorm(1.0)),
    (gd.clip_by_global_norm(4.0), gt.ClipByGlobalNorm(4.0)),
    (gd.adaptive_clip(), gt.AdaptiveClip()),
    (gd.adaptive_clip(0.5, eps=2.0), gt.AdaptiveClip(0.5, 2.0)),
    (gd.trust_ratio(), gt.TrustRatio()),
    (gd.trust_ratio(coefficient=0.25), gt.TrustRatio(0.25)),
    (gd.lars(), gt.LARS()),
    (gd.lars(momentum=0.5, weight_decay=0.1, trust_coefficient=0.5), gt.LARS(0.5, 0.1, 0.5)),
    (gd.lamb(), gt.LAMB()),
    (gd.lamb((0.5, 0.9), eps=1e-3, weight_decay=0.0), gt.LAMB((0.5, 0.9), 1e-3, 0.0)),
    (gd.muon(), gt.Muon()),
    (gd.muon(0.5, nesterov=False, ns_steps=3), gt.Muon(0.5, nesterov=False, ns_steps=3)),
    (gd.muon(ns_coefficients=(1.5, -0.5, 0.0)), gt.Muon(ns_coefficients=(1.5, -0.5, 0.0))),
    (gd.masked(MOMENTUM[0], places((False, True, True))), gt.Masked(MOMENTUM[1])),
    (
        gd.masked(gd.clip_by_global_norm(2.0), places((True, False, True))),
        gt.Masked(gt.ClipByGlobalNorm(2.0), (True, False, True)),
    ),
    (
        gd.partition({0: MOMENTUM[0], 1: gd.clip_by_global_norm(1.0)}, places((0, 1, 1))),
        gt.Partition((MOMENTUM[1], gt.ClipByGlobalNorm(1.0))),
    ),
    (gd.accumulate(MOMENTUM[0], 3), gt.Accumulate(MOMENTUM[1], 3)),
    (gd.accumulate(gd.lion(), 2), gt.Accumulate(gt.Lion(), 2)),
    (gd.apply_if_finite(MOMENTUM[0]), gt.ApplyIfFinite(MOMENTUM[1])),
    (gd.apply_if_finite(gd.lamb()), gt.ApplyIfFinite(gt.LAMB())),
    (
        gd.chain(gd.clip_by_global_norm(1.0), gd.lion(), gd.weight_decay(0.125)),
        gt.Chain(gt.ClipByGlobalNorm(1.0), gt.Lion(), gt.WeightDecay(0.125)),
    ),
]


@pytest.mark.filterwarnings("ignore:no leaf of params is labelled")  # a problem of one leaf
@pytest.mark.parametrize(("transform", "claim"), PAIRS, ids=[repr(claim) for _, claim in PAIRS])
def test_gdfunc_keeps_the_claim(transform, claim):
    gt.check_kernel(gt.from_transform(transform), claim)


FAMILIES = {
    "lion": (lambda a, b: gd.lion((a, b)), lambda a, b: gt.Lion((a, b))),
    "rprop": (lambda a, b: gd.rprop((a, 1 + b)), lambda a, b: gt.Rprop((a, 1 + b))),
    "value": (lambda a, b: gd.clip_by_value(a), lambda a, b: gt.ClipByValue(a)),
    "norm": (lambda a, b: gd.clip_by_global_norm(4 * a), lambda a, b: gt.ClipByGlobalNorm(4 * a)),
    "adaptive": (lambda a, b: gd.adaptive_clip(a, eps=2 * b), lambda a, b: gt.AdaptiveClip(a, 2 * b)),
    "lars": (
        lambda a, b: gd.lars(momentum=a, weight_decay=b, trust_coefficient=0.5),
        lambda a, b: gt.LARS(a, b, 0.5),
    ),
    "lamb": (lambda a, b: gd.lamb((a, b), weight_decay=b), lambda a, b: gt.LAMB((a, b), weight_decay=b)),
}
drawn = st.integers(1, 15).map(lambda n: n / 16)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=20)
@given(a=drawn, b=drawn, seed=st.integers(0, 2**16))
def test_gdfunc_keeps_the_claim_at_drawn_hyperparameters(family, a, b, seed):
    transform, claim = FAMILIES[family]
    generator = torch.Generator().manual_seed(seed)
    grads = {
        k: torch.randn(7, *shape, generator=generator).double() for k, shape in (("a", ()), ("b", (2, 3)))
    }
    gt.check_kernel(gt.from_transform(transform(a, b)), claim(a, b), grads)


@pytest.mark.long
def test_torchs_rprop_keeps_the_claim():
    subject = gt.from_torch(lambda params: torch.optim.Rprop(params, lr=1.0))
    gt.check_optimizer(subject, gt.Rprop(unit="first lr"))
    with pytest.raises(gt.LawBroken):
        gt.check_optimizer(subject, gt.Rprop())


def torchs_muon(**options):
    def make(params):
        # The probe of from_torch is a vector.
        params = [p if p.ndim == 2 else torch.zeros(1, 1, requires_grad=True) for p in params]
        return torch.optim.Muon(params, lr=1.0, weight_decay=0.0, **options)

    return gt.from_torch(make)


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.95, True), (0.5, False)])
def test_torchs_muon_keeps_the_claim_where_it_does_not_round_to_bfloat16(monkeypatch, momentum, nesterov):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    gt.check_optimizer(torchs_muon(momentum=momentum, nesterov=nesterov), gt.Muon(momentum, nesterov))


def test_torchs_muon_in_bfloat16_needs_a_slack_of_its_own():
    generator = torch.Generator().manual_seed(0)
    grads = {"a": torch.randn(8, 4, 2, generator=generator).double()}
    with pytest.raises(gt.LawBroken):
        gt.check_kernel(torchs_muon(), gt.Muon(), grads)
    gt.check_kernel(torchs_muon(), gt.Muon(slack=0.05), grads)


# ---------------------------------------------------------------- laws of their own


@pytest.mark.long
@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.5, 0.75), (0.95, 0.98)])
@pytest.mark.parametrize("ones", [3, 20])
def test_lion_turns_at_one_step_and_no_other(betas, ones):
    gt.check_flip(gt.from_transform(gd.lion(betas)), gt.Lion(betas), ones)
    m = 1 - betas[1] ** ones
    kept = 0
    while betas[0] * m >= 1 - betas[0]:
        m, kept = betas[1] * m - (1 - betas[1]), kept + 1
    assert flip_step(betas, ones) == kept
    with pytest.raises(gt.LawBroken, match="minus ones that keep the sign"):
        gt.check_flip(gt.from_transform(gd.sign()), gt.Lion((0.9, 0.99)), 20)


@pytest.mark.long
def test_a_clip_is_a_projection():
    scaled = gt.from_transform(gd.chain(gd.clip_by_global_norm(1.0), gd.scale(1 + 1e-6)))
    with pytest.raises(gt.LawBroken, match="at most"):
        gt.check_clip(gt.from_transform(gd.clip_by_global_norm(2.0)), gt.ClipByGlobalNorm(1.0))
    for claim in (gt.ClipByGlobalNorm(1.0), gt.ClipByValue(1.0)):
        with pytest.raises(gt.LawBroken):
            gt.check_clip(scaled, claim)
    with pytest.raises(gt.LawBroken, match="direction"):
        gt.check_clip(gt.from_transform(gd.clip_by_value(0.5)), gt.ClipByGlobalNorm(1.0))


@pytest.mark.long
def test_a_rest_moves_nothing_at_all():
    tiny = gt.from_transform(gd.chain(gd.accumulate(gd.chain(), 2), gd.weight_decay(1e-12)))
    with pytest.raises(gt.LawBroken, match="unless 2 divides t"):
        gt.check_rest(tiny, gt.Accumulate())
    zeroed = gt.from_transform(gd.chain(gd.zero_nans(), gd.clip_by_value(1.0)))
    with pytest.raises(gt.LawBroken, match="not finite"):
        gt.check_rest(zeroed, gt.ApplyIfFinite(gt.ClipByValue(1.0)))


@pytest.mark.parametrize("check", [gt.check_flip, gt.check_clip, gt.check_rest])
def test_laws_say_what_they_are_not_about(check):
    with pytest.raises(gt.NotApplicable):
        check(gt.from_transform(gd.chain()), gt.GradientDescent())


# ---------------------------------------------------------------- claims compose


@given(st.integers(0, 2**16))
def test_wrappers_compose(seed):
    generator = np.random.default_rng(seed)
    grads, points = ([generator.standard_normal((6, *s)) for s in ((), (3,), (2, 3))] for _ in range(2))
    clip, inner = gt.ClipByGlobalNorm(2.0), gt.Lion()
    expected = inner.directions(grads, points)
    same = [
        gt.Chain(inner),
        gt.Chain(gt.GradientDescent(), inner, gt.GradientDescent()),
        gt.Masked(inner, (True, True, True)),
        gt.Partition((inner, gt.Lion()), (0, 1, 0)),
        gt.Accumulate(inner, 1),
        gt.ApplyIfFinite(inner),
        gt.WeightDecay(0.0, inner),
    ]
    for claim in same:
        for found, wanted in zip(claim.directions(grads, points), expected, strict=True):
            np.testing.assert_array_equal(found, wanted)
    for found, wanted in zip(
        gt.Chain(clip, inner).directions(grads, points),
        inner.directions(clip.directions(grads, points), points),
        strict=True,
    ):
        np.testing.assert_array_equal(found, wanted)


def test_the_cubic_iteration_of_muon_ends_at_orthogonal_matrices():
    g = np.random.default_rng(0).standard_normal((1, 3, 3))
    u = gt.Muon(ns_coefficients=(1.5, -0.5, 0.0), ns_steps=60).direction(g, g)[0]
    np.testing.assert_allclose(u @ u.T, np.eye(3), atol=1e-9)


def test_muon_has_no_direction_where_a_gradient_is_not_finite():
    """An optimizer that diverges breaks a law, and not the SVD of its claim."""
    g = np.ones((2, 3, 2))
    g[1, 0, 0] = np.nan
    assert np.isnan(gt.Muon().direction(g, g)).all()
    control = gt.WRONG["muon: largest entry in place of the norm"]
    with pytest.raises(gt.LawBroken):
        gt.check_batches(control.subject, control.claim)
