"""Scalars of a method beside parameters of any dtype."""

from functools import reduce
from typing import Any

import torch
from torch import Tensor

from .. import _tree
from .._step import check_lr
from .._tree import Tree


def like(value: Any, leaf: Tensor) -> Tensor:
    """Give a hyperparameter the dtype and device of the leaf it meets, so that it promotes nothing."""
    return torch.as_tensor(value, dtype=leaf.dtype, device=leaf.device)


def scalar(value: Any, params: Tree) -> Tensor:
    """Make a 0-d tensor in the widest dtype of the parameters, at least float32."""
    leaves = _tree.leaves(params)
    dtype = reduce(torch.promote_types, (leaf.dtype for leaf in leaves), torch.float32)
    return torch.as_tensor(value, dtype=dtype, device=leaves[0].device)


def learning_rate(lr: Any, params: Tree) -> Tensor:
    """Check lr and make it such a scalar."""
    return scalar(check_lr(lr), params)


def blend(a: Tree, b: Tree, share: Any) -> Tree:
    """Go from a to b by a share of the way: (1 − share)·a + share·b."""
    return _tree.map(lambda x, y: torch.lerp(x, y, like(share, x)), a, b)


def safe_ratio(a: Tensor, b: Tensor) -> Tensor:
    """Divide by a number >= 0; where that is zero the ratio, and its derivatives, are zero."""
    # The inner where keeps the division's infinity out of the derivative.
    usable = b > 0
    return torch.where(usable, a / torch.where(usable, b, torch.ones_like(b)), torch.zeros_like(a))
