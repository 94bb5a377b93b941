"""The contract of transformations."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, vmap

import gdfunc as gd

from .references import normal

GRADS = {"w": normal(0, 3), "b": normal(1, 1)[0]}


def apply(transform, grads=GRADS):
    return transform.update(grads, transform.init(grads), grads)[0]


def test_chain_of_nothing_is_the_identity():
    assert apply(gd.chain()) == GRADS
    assert gd.chain().init(GRADS) == ()


@given(st.lists(st.floats(-4, 4, width=32), max_size=4))
def test_a_chain_applies_first_to_last(factors):
    transform = gd.chain(*(gd.scale(factor) for factor in factors))
    expected = GRADS["w"]
    for factor in factors:
        expected = expected * factor
    assert torch.equal(apply(transform)["w"], expected)
    assert len(transform.init(GRADS)) == len(factors)


def test_a_chain_keeps_each_state_with_its_own():
    def counting(amount):
        return gd.GradientTransformation(
            init=lambda params: torch.tensor(0),
            update=lambda grads, count, params=None: (grads, count + amount),
        )

    transform = gd.chain(counting(1), gd.scale(2.0), counting(10))
    state = transform.init(GRADS)
    for _ in range(3):
        _, state = transform.update(GRADS, state)
    assert state == (3, (), 30)


def test_scale_is_mapped_and_differentiated():
    rows = vmap(lambda factor: apply(gd.scale(factor))["w"])(torch.tensor([1.0, 2.0], dtype=torch.float64))
    assert torch.equal(rows[1], apply(gd.scale(2.0))["w"])
    slope = grad(lambda factor: apply(gd.scale(factor))["w"].sum())(torch.tensor(3.0, dtype=torch.float64))
    torch.testing.assert_close(slope, GRADS["w"].sum())


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), "2", True, torch.ones(1), torch.tensor(1)])
def test_bad_factors_raise(factor):
    with pytest.raises(ValueError, match=r"factor must be a finite number in \(-inf, inf\) or a 0-d float"):
        gd.scale(factor)


def test_a_chain_refuses_what_is_no_transformation():
    with pytest.raises(
        TypeError, match="chain's argument 1 is function, not a GradientTransformation; call"
    ):
        gd.chain(gd.chain(), gd.scale)


@pytest.mark.parametrize("state", [(), ((),), ((), (), ()), None])
def test_the_state_of_another_chain_raises(state):
    with pytest.raises(ValueError, match="opt_state was made for another chain: it should be a tuple of 2"):
        gd.chain(gd.scale(1.0), gd.scale(2.0)).update(GRADS, state)


def test_mask_that_is_a_named_tuple_with_call_is_a_tree():
    class Pair(NamedTuple):
        w: object
        b: object

        def __call__(self, tree):
            raise NotImplementedError

    grads = Pair(torch.tensor(1.0), torch.tensor(2.0))
    transform = gd.masked(gd.scale(0.0), Pair(True, False))
    assert transform.update(grads, transform.init(grads), grads)[0] == (0.0, 2.0)
