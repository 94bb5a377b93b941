"""The patches of other modules: each is in place inside its block, and gone after it or an error."""

import contextlib
import logging
import os
from pathlib import Path

import pytest
import torch
from torch._functorch import eager_transforms
from torch._inductor import cpu_vec_isa
from torch.autograd.function import FunctionMeta

from gdfunc._torch import _patches


def patched_attributes():
    return {
        "grad": eager_transforms.grad_and_value_impl,
        "vjp": eager_transforms._vjp_with_argnums,
        "forward": vars(FunctionMeta).get("__getattribute__"),
        "log": logging.getLogger("torch._subclasses.fake_tensor").disabled,
        "cache": os.environ.get("TORCHINDUCTOR_CACHE_DIR"),
        "vectors": cpu_vec_isa.valid_vec_isa_list,
    }


PATCHES = {
    "gradients_under_no_grad": (
        lambda: _patches.gradients_under_no_grad(lambda result: result),
        {"grad", "vjp"},
    ),
    "applied_functions": (lambda: _patches.applied_functions(lambda cls: True), {"forward"}),
    "no_log_of_fake_tensors": (_patches.no_log_of_fake_tensors, {"log"}),
    "inductor_cache": (lambda: _patches.inductor_cache(Path("/nonexistent")), {"cache"}),
    "vectors_of_torch": (_patches.vectors_of_torch, {"vectors"}),
}


@pytest.mark.parametrize("name", PATCHES)
def test_a_patch_ends_with_its_block(name):
    make, changed = PATCHES[name]
    if name == "vectors_of_torch" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("this CPU has other vectors")
    before = patched_attributes()
    with contextlib.suppress(ArithmeticError), make():
        inside = patched_attributes()
        raise ArithmeticError
    assert {key for key in before if inside[key] != before[key]} == changed
    assert patched_attributes() == before


def test_applied_functions_are_those_of_this_thread_that_count():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

    x = torch.ones(1, requires_grad=True)
    with _patches.applied_functions(lambda cls: cls is Double) as applied:
        Double.apply(x)
    assert applied == {Double.__qualname__}
    with _patches.applied_functions(lambda cls: False) as applied:
        Double.apply(x)
    assert not applied


def test_gradients_under_no_grad_are_changed_and_others_are_not():
    slope = torch.func.grad(lambda x: x**2)
    with _patches.gradients_under_no_grad(lambda result: (torch.tensor(7.0), None)):
        assert slope(torch.tensor(3.0)) == 6
        with torch.no_grad():
            assert slope(torch.tensor(3.0)) == 7
