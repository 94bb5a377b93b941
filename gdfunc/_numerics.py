"""Numerics that hold at the ends of a dtype's range: norms, ratios, roots, and the dtype of scalars."""

from collections.abc import Iterable
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

Scalar = float | Tensor  # a number, or a 0-d tensor that may be vmapped and differentiated

_LARGE = 2**17  # entries, from which a conversion to float64 is done in parts


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which values of `dtype` are summed: itself, but at least float32."""
    return torch.promote_types(dtype, torch.float32)


def widen(x: Tensor) -> Tensor:
    """Convert a tensor to at least float32."""
    return x.to(wide(x.dtype))


def widest(leaves: Iterable[Tensor]) -> torch.dtype:
    """Return the dtype that holds the values of all leaves, at least float32."""
    return reduce(torch.promote_types, (leaf.dtype for leaf in leaves), torch.float32)


def precise(x: Tensor) -> torch.dtype:
    """Return the widest dtype of a tensor's device, where squares of float32 stay within range."""
    return wide(x.dtype) if x.device.type == "mps" else torch.float64


def like(value: Any, leaf: Tensor) -> Tensor:
    """Give a number the dtype and device of the tensor that it meets, so that it promotes nothing."""
    return torch.as_tensor(value, dtype=leaf.dtype, device=leaf.device)


def norms(x: Tensor) -> Tensor:
    """Compute the norms over the last axis, [..., D] -> [...], in at least float32.

    They overflow or vanish only where the norm itself does. float32 is summed in float64, and float64 is
    scaled by its largest entry first. The derivative at zero is zero.
    """
    if x.shape[-1] == 1:
        return widen(x.squeeze(-1)).abs()
    if x.dtype != torch.float64 and precise(x) == torch.float64:
        # Because torch writes the entries out in float64, many of them are converted in parts.
        parts = x.chunk(8) if x.ndim > 1 and x.numel() > _LARGE else [x]
        lengths = [torch.linalg.vector_norm(part, dim=-1, dtype=torch.float64) for part in parts]
        return (torch.cat(lengths) if len(lengths) > 1 else lengths[0]).to(wide(x.dtype))
    x = widen(x)
    if not x.shape[-1]:
        return x.sum(-1)
    ends = x.detach()
    # Ten times as fast as a maximum norm.
    scale = usable_scale(torch.maximum(ends.amax(-1), -ends.amin(-1)))
    # torch's own norm of float64 loses a digit or two on long rows, its sum does not.
    return scale * root((x / scale[..., None]).square().sum(-1))


def norm(leaves: Iterable[Tensor]) -> Tensor:
    """Compute the norm √Σ aᵢ² over all entries of all leaves, 0-d, as `norms` does."""
    parts = [norms(leaf.flatten()) for leaf in leaves]
    if not parts:
        return torch.zeros(())
    dtype = widest(parts)
    return norms(torch.stack([part.to(dtype) for part in parts]))


def usable_scale(largest: Tensor) -> Tensor:
    """Return the divisor that makes the largest entry one; zero and infinity become usable divisors."""
    limits = torch.finfo(largest.dtype)
    return largest.clamp(limits.tiny, limits.max)


def safe_ratio(a: Tensor, b: Tensor, at_zero: float = 0.0) -> Tensor:
    """Divide a by b. Where b is zero the ratio is `at_zero`, and its derivatives are zero."""
    # The inner where keeps the division's infinity out of the derivative.
    usable = b != 0
    return torch.where(usable, a / torch.where(usable, b, 1.0), at_zero)


def shrink(norm: Tensor, bound: float | Tensor) -> Tensor:
    """Compute min(1, bound/norm), with a finite derivative at norm zero; NaN where the norm is NaN."""
    above, one = ~(norm <= bound), torch.ones_like(norm)
    return torch.where(above, bound / torch.where(above, norm, one), one)


def root(squared: Tensor) -> Tensor:
    """Compute √x with the derivative zero at zero; what rounding left below zero counts as zero."""
    none = squared <= 0  # false for NaN, which is kept
    return torch.where(
        none, torch.zeros_like(squared), torch.where(none, torch.ones_like(squared), squared).sqrt()
    )


def safe_sqrt(x: Tensor) -> Tensor:
    """Compute √x with a finite derivative at zero: x counts as no less than the smallest normal number."""
    return x.clamp_min(torch.finfo(x.dtype).tiny).sqrt()


def sign(x: Tensor) -> Tensor:
    """Compute the sign of every finite entry; others become NaN, where torch makes them 0 and ±1."""
    return torch.where(x.isfinite(), x.sign(), torch.nan)


def softplus(x: Tensor) -> Tensor:
    """Compute log(1 + exp(x)) without overflow."""
    # Above 40, float64 cannot tell log(1 + eˣ) from x. torch's own threshold of 20 loses digits.
    return torch.nn.functional.softplus(x, threshold=40)


class _Unlocked:
    """The memory of a read-only array, offered as if it could be written to."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.__array_interface__ = array.__array_interface__ | {"data": (array.ctypes.data, False)}


def from_numpy(array: np.ndarray, is_read: bool = False) -> Tensor:
    """Turn a NumPy array into a tensor, which shares its memory where torch can.

    Args:
        array: numbers.
        is_read: whether nobody writes to the tensor, so that it may share memory that is read-only, such as
            that of a file that is mapped. torch has no tensors that are read-only.
    """
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    # The strides of a field of a structured array may be no multiples of its own size.
    regular = all(stride >= 0 and stride % native.itemsize == 0 for stride in native.strides)
    if not regular or not (is_read or native.flags.writeable):
        native = native.copy()
    return torch.as_tensor(native if native.flags.writeable else np.asarray(_Unlocked(native)))


def finite_tensor(name: str, values: Any, dtype: torch.dtype) -> Tensor:
    """Make a tensor of a floating dtype, in storage of its own, and refuse entries that are not finite."""
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating one, such as torch.float64; got {dtype}")
    if isinstance(values, np.ndarray):
        values = from_numpy(values)
    if not isinstance(values, Tensor):
        # Straight to the dtype: by way of torch's default, float32, digits would be lost.
        values = torch.tensor(values, dtype=dtype)
    if values.is_complex():
        raise TypeError(f"{name} must be real; got {values.dtype}")
    tensor = values.detach().to(dtype, copy=True)
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{name} is not finite everywhere in {dtype}; leave such entries out")
    return tensor
