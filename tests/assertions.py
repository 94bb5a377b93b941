"""Assertions about trees of tensors."""

import torch

import gdfunc as gd

from .references import relative_error


def assert_same_bits(got, expected):
    if isinstance(expected, torch.Tensor):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)
    elif isinstance(expected, dict):
        assert list(got) == list(expected)
        for name in expected:
            assert_same_bits(got[name], expected[name])
    elif isinstance(expected, gd.Trajectory):
        assert_same_bits(vars(got), vars(expected))
    elif isinstance(expected, (list, tuple)):
        assert len(got) == len(expected)
        for pair in zip(got, expected, strict=True):
            assert_same_bits(*pair)
    else:
        assert got is expected is None


def assert_agrees(got, expected, tolerance=1e-9):
    """Leaf by leaf, to a share of what is expected; integers and zeros as they are."""
    leaves = gd._tree.check_structure(got, expected, "got", "expected")
    for leaf, right in zip(leaves, gd._tree.leaves(expected), strict=True):
        assert (leaf.shape, leaf.dtype) == (right.shape, right.dtype)
        if right.is_floating_point() and right.any():
            assert right.isfinite().all()
            assert relative_error(leaf.detach().cpu(), right.detach()) < tolerance
        else:
            assert leaf.cpu().equal(right)
