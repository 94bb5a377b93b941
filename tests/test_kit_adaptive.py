"""Adam and its kin are what they claim, ours and torch's, under every option."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gdfunc as gd
from gdfunc import testing as gt

from .references import rare

betas = st.tuples(st.floats(0.0, 0.95), st.floats(0.5, 0.999))
sizes = st.sampled_from([1e-8, 1e-4, 0.1])
rates = st.floats(0.1, 0.99)
decays = st.floats(0.0, 0.5)
flags = st.booleans()


def torch_adam(params, betas, eps, amsgrad, weight_decay, decoupled):
    make = torch.optim.AdamW if decoupled else torch.optim.Adam
    return make(params, 1.0, betas, eps, weight_decay, amsgrad is not None)


def our_adam(betas, eps, amsgrad, weight_decay, decoupled):
    adam = gd.adam(betas, eps=eps, amsgrad=amsgrad is not None)
    decay = gd.weight_decay(weight_decay)
    return gd.chain(adam, decay) if decoupled else gd.chain(decay, adam)


ADAM = {"betas": betas, "eps": sizes, "weight_decay": decays, "decoupled": flags}
# With a small α nothing but rounding is left of v − mean² where gradients are equal.
RMSPROP = {"alpha": st.floats(0.7, 0.99), "eps": st.just(1e-2)}
# Each family, by what is switched on: its claim, ours, torch's or None, and its options.
FAMILY = {
    "adam": (gt.Adam, our_adam, torch_adam, ADAM | {"amsgrad": st.none()}),
    "adam, amsgrad": (gt.Adam, our_adam, torch_adam, ADAM | {"amsgrad": st.just("raw")}),
    "adamax": (gt.Adamax, gd.adamax, torch.optim.Adamax, {"betas": betas, "eps": sizes}),
    "nadam": (
        gt.NAdam,
        gd.nadam,
        torch.optim.NAdam,
        {"betas": betas, "eps": sizes, "momentum_decay": decays},
    ),
    "radam": (gt.RAdam, gd.radam, torch.optim.RAdam, {"betas": betas, "eps": sizes}),
    # With a small β₁ all digits of g − m are lost to rounding.
    "adabelief": (
        gt.AdaBelief,
        gd.adabelief,
        None,
        {"betas": st.tuples(st.floats(0.25, 0.95), st.floats(0.5, 0.999)), "eps": sizes},
    ),
    "yogi": (
        gt.Yogi,
        gd.yogi,
        None,
        {"betas": betas, "eps": sizes, "initial_accumulator_value": st.sampled_from([1e-6, 0.5])},
    ),
    "rmsprop": (
        gt.RMSprop,
        gd.rmsprop,
        torch.optim.RMSprop,
        RMSPROP | {"momentum": st.just(0.0), "centered": flags},
    ),
    "rmsprop, centered": (
        gt.RMSprop,
        gd.rmsprop,
        torch.optim.RMSprop,
        RMSPROP | {"momentum": st.just(0.5), "centered": st.just(True)},
    ),
    "adagrad": (
        gt.Adagrad,
        gd.adagrad,
        torch.optim.Adagrad,
        {"lr_decay": decays, "initial_accumulator_value": st.sampled_from([0.0, 0.5]), "eps": sizes},
    ),
    "adadelta": (gt.Adadelta, gd.adadelta, torch.optim.Adadelta, {"rho": rates, "eps": sizes}),
}


@pytest.mark.long
@pytest.mark.parametrize("name", FAMILY)
@given(st.data())
@rare
def test_ours_and_torchs_are_what_they_claim(name, data):
    make_claim, ours, theirs, strategies = FAMILY[name]
    options = {key: data.draw(strategy, label=key) for key, strategy in strategies.items()}
    claim = make_claim(**options)
    gt.check_optimizer(gt.from_transform(ours(**options)), claim)
    if theirs:
        if name == "nadam":  # torch keeps the product of its momenta in its default dtype
            claim = gt.NAdam(**options, product="float32")
        gt.check_optimizer(gt.from_torch(lambda params: theirs(params, **options)), claim)


@pytest.mark.long
def test_the_conventions_of_amsgrad_are_told_apart():
    subject = gt.from_transform(gd.adam((0.5, 0.9), amsgrad=True))
    gt.check_optimizer(subject, gt.Adam((0.5, 0.9), amsgrad="raw"))
    with pytest.raises(gt.LawBroken) as caught:
        gt.check_optimizer(subject, gt.Adam((0.5, 0.9), amsgrad="corrected"))
    assert "largest v before the correction" in caught.value.diagnosis


AT_ZERO = ["adam", "adamax", "nadam", "radam", "adabelief", "rmsprop", "adagrad"]


@pytest.mark.long
@pytest.mark.parametrize("name", AT_ZERO)
def test_without_eps_an_entry_whose_gradients_are_all_zero_does_not_move(name):
    claim = FAMILY[name][0](eps=0.0)
    gt.check_kernel(gt.from_transform(getattr(gd, name)(eps=0.0)), claim)
    with pytest.raises(gt.LawBroken):
        gt.LAWS["check_kernel"](gt.from_transform(gd.chain()), claim)
