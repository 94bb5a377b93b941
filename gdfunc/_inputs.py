"""Checks of parameters and batches: what may be differentiated, and what fits together."""

from dataclasses import is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import _tree
from ._data import REGISTER, as_data
from ._tree import Tree


def check_params(params: Tree) -> list[Tensor]:
    """Refuse parameters that cannot be differentiated separately, and return their leaves."""
    slots, path = _tree.slots(params), partial(_tree.slot_path, params, "params")
    if not slots:
        raise ValueError("params has no tensor leaves")
    for i, leaf in enumerate(slots):
        if not isinstance(leaf, Tensor):
            remedy = "make it one with torch.as_tensor, or keep it out of params"
            if isinstance(leaf, torch.nn.Module):
                remedy = "take the module apart with gd.modules.functional"
            if is_dataclass(leaf):
                remedy = REGISTER.format(kind(leaf))
            raise TypeError(f"{path(i)} is {kind(leaf)}, not a Tensor; {remedy}")
        if not leaf.is_floating_point():
            inside = "; params is a carry: use its .params" if hasattr(params, "params") else ""
            remedy = "keep it out of params (closure or aux)"
            if leaf.is_complex():
                remedy = "keep torch.view_as_real of it, and call torch.view_as_complex in the loss"
            raise TypeError(
                f"{path(i)} is {kind(leaf)}; parameters must be floating point; {remedy}{inside}"
            )
        if not leaf.numel():
            raise ValueError(f"{path(i)} is empty: shape {tuple(leaf.shape)}; leave it out")
        if leaf.device != slots[0].device:
            raise ValueError(
                f"{path(i)} is on {leaf.device} but {path(0)} is on {slots[0].device}; "
                f"move one with .to(device)"
            )
    shared = _tree.overlap(slots)
    if shared:
        first, second = path(shared[0]), path(shared[1])
        raise ValueError(f"{first} and {second} share storage; pass one and use it twice")
    return slots


def check_batch(batch: Tree, param_leaves: list[Tensor], params: Tree, name: str = "batch") -> int | None:
    """Refuse a batch that is ragged or does not fit params; return its size, None without data."""
    device = param_leaves[0].device
    dtypes = {leaf.dtype for leaf in param_leaves if leaf.is_floating_point()}
    slots, path = _tree.slots(batch), partial(_tree.slot_path, batch, name)
    filled = [i for i, leaf in enumerate(slots) if leaf is not None]
    for i in filled:
        leaf, first = slots[i], slots[filled[0]]
        if not leaf.ndim:
            raise ValueError(
                f"{path(i)} is 0-d; every leaf of {name} has samples on dim 0, and params come first"
            )
        if leaf.shape[0] != first.shape[0]:
            raise ValueError(
                f"{name} leaves disagree on the number of samples: "
                f"{path(filled[0])} has {len(first)}, {path(i)} has {len(leaf)}"
            )
        if not leaf.shape[0]:
            raise ValueError(f"{name} is empty: {path(i)} has shape {tuple(leaf.shape)}")
        if leaf.device != device:
            raise ValueError(
                f"{path(i)} is on {leaf.device} but {_tree.slot_path(params, 'params', 0)} is on {device}; "
                f"move one with .to({str(device)!r})"
            )
        if leaf.is_floating_point() and dtypes and leaf.dtype not in dtypes:
            param = _tree.slot_path(params, "params", 0)
            raise ValueError(
                f"{path(i)} is {kind(leaf)} but {param} is {kind(param_leaves[0])}; "
                + _conversion(param_leaves[0].dtype)
            )
    return slots[filled[0]].shape[0] if filled else None


def check_inputs(params: Tree, batch: Tree) -> tuple[list[Tensor], Tree, int | None]:
    """Check parameters and a batch. Return the leaves of params, the batch as tensors, and its size."""
    leaves, batch = check_params(params), as_data(batch, "batch")
    return leaves, batch, check_batch(batch, leaves, params)


def check_samples(params: Tree, batch: Tree) -> tuple[list[Tensor], Tree, int]:
    """Check parameters and a batch as `check_inputs` does, and refuse a batch without samples."""
    leaves, batch, size = check_inputs(params, batch)
    if size is None:
        raise ValueError("batch has no leaves: there are no samples to tell apart")
    return leaves, batch, size


def kind(leaf: Any) -> str:
    """Name a leaf in a message by its dtype, or else its type."""
    if isinstance(leaf, Tensor):
        return str(leaf.dtype).removeprefix("torch.")
    return "None" if leaf is None else type(leaf).__name__


def _conversion(dtype: torch.dtype) -> str:
    """Write how a tensor or an array gets a dtype."""
    method = _METHODS.get(dtype, f"to({dtype})")
    of_array = f"x.astype({str(dtype).removeprefix('torch.')!r})"
    if dtype not in _METHODS or dtype == torch.bfloat16:  # which NumPy lacks
        of_array = f"torch.as_tensor(x, dtype={dtype})"
    return f"convert a tensor with x.{method}, an array or a column with {of_array}"


_METHODS = {
    torch.float32: "float()",
    torch.float64: "double()",
    torch.float16: "half()",
    torch.bfloat16: "bfloat16()",
}
