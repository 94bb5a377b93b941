"""Checks of single arguments, and what exceptions keep."""

import copy
import importlib
import inspect
import itertools
import pickle
import pkgutil
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gdfunc as gd
from gdfunc import _errors


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_scalars_are_checked_against_their_interval(value):
    inside = {"[0, 1)": 0 <= value < 1, "(0, inf)": 0 < value < float("inf"), "[-1, 1]": -1 <= value <= 1}
    for interval, allowed in inside.items():
        if allowed:
            assert _errors.check_scalar("beta", value, interval) == value
        else:
            with pytest.raises(ValueError, match="beta must be a finite number in"):
                _errors.check_scalar("beta", value, interval)


def test_tensors_are_not_read():
    value = torch.tensor(float("nan"))
    assert _errors.check_scalar("beta", value, "[0, 1)") is value
    with pytest.raises(ValueError, match=r"got a tensor of shape \(1,\) and dtype torch.float32"):
        _errors.check_scalar("beta", value[None], "[0, 1)")


W = {"w": torch.ones(2)}
ARGUMENTS = {
    "lr": lambda x: gd.make_step(lambda params, batch: params["w"].sum())(W, None, x),
    "momentum": gd.momentum,
    "dampening": lambda x: gd.momentum(0.5, dampening=x),
    "betas[0]": lambda x: gd.adam((x, 0.9)),
    "betas[1]": lambda x: gd.adamw((0.9, x)),
    "eps": lambda x: gd.rmsprop(eps=x),
    "rate": gd.weight_decay,
    "max_norm": gd.clip_by_global_norm,
    "limit": gd.clip_by_value,
    "noise_multiplier": lambda x: gd.privacy.make_private_step(
        lambda params, batch: params["w"].sum(),
        key=gd.random.key(0),
        max_norm=1.0,
        noise_multiplier=x,
        divisor=1.0,
    ),
}
BAD = [float("nan"), float("inf"), -1.0, "0.1", True, None, torch.ones(1), torch.tensor(1j)]


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("bad", BAD, ids=str)
def test_bad_hyperparameters_are_named_with_their_range(name, bad):
    with pytest.raises(ValueError, match=rf"^{re.escape(name)} must be a finite number (in [\[(]|>= 0)"):
        ARGUMENTS[name](bad)


@pytest.mark.parametrize("value", [True, "1", 1.0, None, 0, 11])
def test_ints_are_ints(value):
    with pytest.raises(ValueError, match=r"k must be an int in \[1, 10\]; got"):
        _errors.check_int("k", value, 1, 10)


def test_a_missing_extra_is_one_line():
    error = _errors.missing_extra("gdfunc.plot", "matplotlib", "plot")
    assert str(error) == "gdfunc.plot needs matplotlib: pip install 'gdfunc[plot]'"


MODULES = [importlib.import_module(name) for _, name, _ in pkgutil.walk_packages(gd.__path__, "gdfunc.")]
EXCEPTIONS = {
    x: None
    for module in MODULES
    for x in vars(module).values()
    if isinstance(x, type) and issubclass(x, BaseException) and x.__module__.startswith("gdfunc")
}
HELD = {
    "formula": "x = y",
    "relation": "must equal",
    "where": "w",
    "value": 1.5,
    "bound": 1.0,
    "slack": 1e-9,
}
HELD |= {"step": 3, "total": 8, "members": [0, 1], "leaf": "params['w']"}


@pytest.mark.parametrize("cls", EXCEPTIONS)
@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy]
    + [lambda error, p=protocol: pickle.loads(pickle.dumps(error, p)) for protocol in (0, 2, 5)],
    ids=["copy", "deepcopy", "pickle 0", "pickle 2", "pickle 5"],
)
def test_exceptions_survive_copies_with_all_that_they_hold(cls, copied):
    work = gd.TrainState({"w": torch.tensor([1.0, float("nan")])}, (torch.tensor(3),))
    named = inspect.getfullargspec(cls.__init__).kwonlyargs
    error = cls(**{name: HELD.get(name, work) for name in named}) if named else cls("why")
    error.add_note("a note")
    got = copied(error)
    assert type(got) is cls
    assert str(got) == str(error)
    assert got.__notes__ == ["a note"]
    assert vars(got).keys() == vars(error).keys()
    for value, expected in zip(
        [*vars(got).values(), *got.args], [*vars(error).values(), *error.args], strict=True
    ):
        if isinstance(expected, gd.TrainState):
            torch.testing.assert_close(value.params, expected.params, rtol=0, atol=0, equal_nan=True)
            assert value.opt_state == expected.opt_state
        else:
            assert value == expected


def test_a_plain_function_is_judged_as_by_its_signature():
    """A function with an attribute of its own is judged by `inspect.signature`."""

    def verdict(f, wanted):
        try:
            return _errors.check_function("f", f, wanted, "a function", "write one")
        except TypeError as error:
            return str(error)

    for names, size, defaults, rest, option, wanted in itertools.product(
        (["batch", "params", "x", "y"], ["data", "weights", "y", "z"], ["w", "batch", "x", "y"]),
        range(5),
        range(5),
        ([], ["*rest"]),
        ([], ["k"], ["k=1"]),
        (("params", "batch"), ("carry", "batch", "lr")),
    ):
        words = [name + "=0" * (i + defaults >= size) for i, name in enumerate(names[:size])]
        words += (rest or ["*"]) * bool(rest or option) + option
        plain, marked = (eval(f"lambda {', '.join(words)}: 0") for _ in range(2))
        marked.mark = True
        assert verdict(plain, wanted) == verdict(marked, wanted), words
