"""Scalars of a method beside parameters of any dtype."""

from typing import Any

import torch
from torch import Tensor

from .. import _tree
from .._numerics import like, widest
from .._step import check_lr
from .._tree import Tree


def scalar(value: Any, params: Tree) -> Tensor:
    """Make a 0-d tensor in the widest dtype of the parameters, at least float32."""
    leaves = _tree.leaves(params)
    return torch.as_tensor(value, dtype=widest(leaves), device=leaves[0].device)


def learning_rate(lr: Any, params: Tree) -> Tensor:
    """Check lr and make it such a scalar."""
    return scalar(check_lr(lr), params)


def blend(a: Tree, b: Tree, share: Any) -> Tree:
    """Go from a to b by a share of the way: (1 − share)·a + share·b."""
    return _tree.map(lambda x, y: torch.lerp(x, y, like(share, x)), a, b)
