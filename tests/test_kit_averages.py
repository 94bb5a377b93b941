"""Claims about averages: gdfunc and torch keep them, and no answer is compared with another's."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gdfunc as gd
from gdfunc import _tree
from gdfunc import testing as gt

from .references import few

shares = st.floats(0.0, 0.99)
rates = st.floats(0.0, 0.5)
INNER = {
    "gradient descent": (gd.chain(), gt.GradientDescent()),
    "momentum": (gd.momentum(0.5), gt.Momentum(0.5)),
    "lion": (gd.lion((0.5, 0.75)), gt.Lion((0.5, 0.75))),
    "weight decay": (gd.weight_decay(0.125), gt.WeightDecay(0.125)),
}
inners = st.sampled_from(list(INNER.values()))


def averaging(make):
    return gt.from_step(make, result=lambda carry: carry.average)


def check_moves_and_answers(subject, claim):
    gt.check_kernel(subject, claim)
    gt.check_answer(subject, claim)


@pytest.mark.long
@given(inners, shares, st.booleans())
@few
def test_ema_keeps_the_claim(inner, decay, debias):
    transform, claim = inner

    def make(loss_fn):
        return gd.methods.ema(gd.make_step(loss_fn, transform), decay, debias=debias)

    check_moves_and_answers(averaging(make), gt.EMA(claim, decay, debias))


@pytest.mark.long
@given(inners, st.integers(1, 5), st.floats(0, 1))
@few
def test_lookahead_keeps_the_claim(inner, k, alpha):
    transform, claim = inner

    def make(loss_fn):
        return gd.methods.lookahead(gd.make_step(loss_fn, transform), k, alpha)

    subject = gt.from_step(make, result=lambda carry: carry.slow)
    check_moves_and_answers(subject, gt.Lookahead(claim, k, alpha))


@pytest.mark.long
@given(inners, st.floats(0, 1), rates)
@few
def test_schedule_free_keeps_the_claim(inner, beta, weight_decay):
    transform, claim = inner

    def make(loss_fn):
        return gd.methods.schedule_free(loss_fn, transform, beta=beta, weight_decay=weight_decay)

    check_moves_and_answers(averaging(make), gt.ScheduleFree(beta, weight_decay, claim))


asgd_options = st.fixed_dictionaries(
    {"lambd": rates, "alpha": st.floats(0.2, 1.5), "t0": st.floats(0, 20), "weight_decay": rates}
)


@pytest.mark.long
@given(asgd_options)
@few
def test_asgd_keeps_the_claim(options):
    subject = averaging(lambda loss_fn: gd.methods.asgd(loss_fn, **options))
    check_moves_and_answers(subject, gt.ASGD(**options))


KEEPS_ALL = {
    gt.EMA(): averaging(lambda loss_fn: gd.methods.ema(gd.make_step(loss_fn), 0.9)),
    gt.Lookahead(): gt.from_step(
        lambda loss_fn: gd.methods.lookahead(gd.make_step(loss_fn), 5), result=lambda carry: carry.slow
    ),
    gt.ScheduleFree(): averaging(gd.methods.schedule_free),
    gt.ASGD(): averaging(gd.methods.asgd),
}


@pytest.mark.long
@pytest.mark.parametrize("claim", KEEPS_ALL, ids=repr)
def test_every_law_holds_at_the_defaults(claim):
    report = gt.check_optimizer(KEEPS_ALL[claim], claim)
    assert {"check_kernel", "check_answer"} <= set(report.passed)


@pytest.fixture
def double():
    """Make float64 the default, in which torch then keeps its step sizes."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def torchs_average(carry):
    """The averages of `torch.optim.ASGD`, or its parameters before the first step."""
    leaves = [carry.optimizer.state[leaf].get("ax", leaf) for leaf in carry.leaves]
    return _tree.unflatten(_tree.flatten(carry.params)[1], [leaf.detach().clone() for leaf in leaves])


@pytest.mark.long
@pytest.mark.parametrize("t0", [0.0, 2.5, 1e6])
def test_torchs_asgd_keeps_the_claim(double, t0):
    options = {"lambd": 0.125, "alpha": 0.5, "t0": t0, "weight_decay": 0.0625}
    subject = gt.from_torch(lambda params: torch.optim.ASGD(params, lr=1.0, **options))
    subject = dataclasses.replace(subject, result=torchs_average)
    check_moves_and_answers(subject, gt.ASGD(**options))


def test_the_default_asgd_averages_nothing_in_a_short_run():
    points = [np.arange(6.0)]
    assert np.array_equal(gt.ASGD().answers([], points, np.ones(5))[0], points[0])


@pytest.mark.parametrize(("debias", "shown"), [(False, 1.25), (True, 5 / 3)])
def test_a_short_path_has_the_average_of_the_textbook(debias, shown):
    average = gt.EMA(decay=0.5, debias=debias).answers([], [np.arange(3.0)], np.ones(2))
    assert average[0][-1] == pytest.approx(shown)


@pytest.mark.long
def test_an_average_of_other_points_is_caught():
    def make(loss_fn):
        return gd.methods.ema(gd.make_step(loss_fn), 0.5)

    with pytest.raises(gt.LawBroken, match="answer for params") as caught:
        gt.check_answer(averaging(make), gt.EMA(decay=0.25))
    assert caught.value.step == 1
    with pytest.raises(gt.LawBroken):
        gt.check_answer(gt.from_step(make), gt.EMA(decay=0.5))
    with pytest.raises(gt.NotApplicable, match="last point"):
        gt.check_answer(averaging(make), gt.GradientDescent())


@pytest.mark.long
@given(shares)
@few
def test_an_average_removes_as_much_noise_as_it_should(decay):
    def make(loss_fn):
        return gd.methods.ema(gd.make_step(loss_fn), decay)

    gt.check_noise_average(averaging(make), gt.EMA(decay=decay))
    free = averaging(lambda loss_fn: gd.methods.schedule_free(loss_fn, beta=0.0))
    gt.check_noise_average(free, gt.ScheduleFree(0.0))
    with pytest.raises(gt.LawBroken, match="variance"):
        gt.LAWS["check_noise_average"](averaging(make), gt.ScheduleFree(0.0))
    with pytest.raises(gt.NotApplicable):
        gt.check_noise_average(free, gt.ScheduleFree(0.5))
