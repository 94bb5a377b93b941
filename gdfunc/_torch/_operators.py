"""The cipher Threefry-2x32 as one operator, which a trace records, maps and compiles as one operation.

Written in torch's own operators it takes about 110 of them.

References:
    J. Salmon, M. Moraes, R. Dror, D. Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

_WORD = 0xFFFFFFFF  # 32 ones
_PARITY = 0x1BD11BDA  # section 4.2, as are the rotations
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_NAME = "gdfunc::threefry"


def threefry(keys: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Encrypt counters of two words each with 20 rounds, by keys [..., 2] that broadcast with them.

    Returns:
        Two random words for each counter, int32.
    """
    words = torch.ops.gdfunc.threefry(*keys.unbind(-1), _packed(first, second))
    return (words >> 32).to(torch.int32), words.to(torch.int32)


def threefry_of_arrays(k0: Any, k1: Any, first: Any, second: Any) -> tuple[Tensor, Tensor]:
    """Encrypt counters of two words each: two words each, int32.

    In a third of the time of torch's operators: NumPy has unsigned words, and writes in place.
    """
    shape = np.broadcast_shapes(k0.shape, k1.shape, first.shape, second.shape)
    x, y, carried = np.empty((3, *(shape or (1,))), np.uint32)
    k0, k1 = (np.atleast_1d(word).astype(np.uint32) for word in (k0, k1))
    schedule = (k0, k1, k0 ^ k1 ^ np.uint32(_PARITY))
    np.add(first.astype(np.uint32), k0, out=x)
    np.add(second.astype(np.uint32), k1, out=y)
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x += y
            np.right_shift(y, 32 - rotation, out=carried)
            y <<= rotation
            y |= carried
            y ^= x
        x += schedule[(group + 1) % 3]
        y += schedule[(group + 2) % 3] + np.uint32(group + 1)
    x, y = (torch.from_numpy(word.view(np.int32)).view(shape) for word in (x, y))
    return x, y


def threefry_by_operators(key0: Tensor, key1: Tensor, counter: Tensor) -> Tensor:
    """Encrypt in torch's own operators, which every device and Inductor have.

    Words are int32: they take half the time of int64, and sums of them are modulo 2³².
    """
    k0, k1 = key0.to(torch.int32), key1.to(torch.int32)
    schedule = (k0, k1, k0 ^ k1 ^ _PARITY)
    x, y = (counter >> 32).to(torch.int32) + k0, counter.to(torch.int32) + k1
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x = x + y
            carried = (y >> (32 - rotation)) & ((1 << rotation) - 1)  # without the copies of the sign
            y = torch.add(carried, y, alpha=1 << rotation) ^ x
        x = x + schedule[(group + 1) % 3]
        y = y + (schedule[(group + 2) % 3] + (group + 1))
    return _packed(x, y)


def _packed(first: Tensor, second: Tensor) -> Tensor:
    return (first.to(torch.int64) << 32) | (second.to(torch.int64) & _WORD)


def _on_cpu(key0: Tensor, key1: Tensor, counter: Tensor) -> Tensor:
    high, low = (counter >> 32).numpy(), counter.numpy()
    return _packed(*threefry_of_arrays(key0.numpy(), key1.numpy(), high, low))


def _without_values(key0: Tensor, key1: Tensor, counter: Tensor) -> Tensor:
    like = key0 + key1 + counter  # of their shape, and on their device if they share one
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _of_members(info: Any, in_dims: tuple[int | None, ...], *tensors: Tensor) -> tuple[Tensor, int]:
    """Map over members: their axis becomes the first, before those that broadcast."""
    pairs = list(zip(tensors, in_dims, strict=True))
    most = max(leaf.ndim - (axis is not None) for leaf, axis in pairs)
    aligned = []
    for leaf, axis in pairs:
        if axis is not None:
            leaf = leaf.movedim(axis, 0)
            leaf = leaf.reshape(leaf.shape[0], *[1] * (most + 1 - leaf.ndim), *leaf.shape[1:])
        aligned.append(leaf)
    return torch.ops.gdfunc.threefry(*aligned), 0


# It lives as long as the process.
_library = torch.library.Library("gdfunc", "DEF")
_library.define(
    "threefry(Tensor key0, Tensor key1, Tensor counter) -> Tensor",
    tags=(torch.Tag.pointwise, torch.Tag.pt2_compliant_tag),
)
_library.impl("threefry", _on_cpu, "CPU")
for _device in ("CUDA", "MPS", "XPU"):
    _library.impl("threefry", threefry_by_operators, _device)
torch.library.register_fake(_NAME, _without_values, lib=_library)
torch.library.register_vmap(_NAME, _of_members, lib=_library)
