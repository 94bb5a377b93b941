"""Checks of single arguments."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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


@pytest.mark.parametrize("value", [True, "1", 1.0, None, 0, 11])
def test_ints_are_ints(value):
    with pytest.raises(ValueError, match=r"k must be an int in \[1, 10\]; got"):
        _errors.check_int("k", value, 1, 10)


def test_a_missing_extra_is_one_line():
    error = _errors.missing_extra("gdfunc.plot", "matplotlib", "plot")
    assert str(error) == "gdfunc.plot needs matplotlib: pip install 'gdfunc[plot]'"
