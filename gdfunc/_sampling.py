"""Which samples, when: index plans int64 [T, B], and the batches they pick.

A plan is a pure function of a key and sizes: the same on every device and resumed at any step.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import _tree
from ._data import as_data
from ._errors import check_choice, check_int
from ._torch._autograd import is_readable
from ._torch._modes import is_tracing
from ._torch._transforms import functionalization, is_transformed
from ._tree import Tree
from .random import _PART, _check_key, _integers_below, _orders, fold_in


def full_batch(n: int, steps: int) -> Tensor:
    """Plan batch gradient descent: every sample in every step.

    Args:
        n: number of samples.
        steps: number of steps T.

    Returns:
        int64 [T, n], whose rows are one row in memory.

    Raises:
        ValueError: n or steps is out of range.

    Example:
        >>> gd.full_batch(3, 2)
        tensor([[0, 1, 2],
                [0, 1, 2]])
    """
    n, steps = check_int("n", n, 1), check_int("steps", steps, 0)
    return torch.arange(n).expand(steps, n)


def epoch_batches(
    key: Tensor,
    n: int,
    batch_size: int,
    epochs: int | range,
    *,
    shuffle: bool = True,
    remainder: str = "drop",
) -> Tensor:
    """Plan mini-batch gradient descent: each epoch visits the samples once, in a new order.

    The order of epoch e is `permutation(fold_in(key, e), n)`. The rest of an epoch after its last
    whole batch is dropped, carried over to the front of the next epoch, or an error. Batches are never
    smaller than `batch_size`, so that lr means the same in every step.

    A range of epochs gives those rows of the whole plan: the plans of `range(0, 5)` and `range(5, 8)`,
    one after the other, are the plan of 8 epochs, so a long run can make its plan epoch by epoch.

    Args:
        key: int64 [2], from `gdfunc.random.key`.
        n: number of samples.
        batch_size: B, in [1, n].
        epochs: how many, or a range of which.
        shuffle: False keeps the samples in their own order.
        remainder: `"drop"`: T = epochs·⌊n/B⌋; `"carry"`: T = ⌊epochs·n/B⌋ and only the last few
            samples of the very last epoch are left out; `"error"`: refuse n that B does not divide.

    Returns:
        int64 [T, B], on the key's device.

    Raises:
        ValueError: a size is out of range, or `remainder="error"` and B does not divide n.

    Example:
        >>> gd.epoch_batches(gd.random.key(0), n=6, batch_size=2, epochs=1)
        tensor([[0, 2],
                [4, 1],
                [5, 3]])
    """
    _check_key(key)
    n = check_int("n", n, 1)
    batch_size = check_int("batch_size", batch_size, 1, n)
    check_choice("remainder", remainder, ("drop", "carry", "error"))
    epochs = _as_range("epochs", epochs)
    if remainder == "error" and n % batch_size:
        raise ValueError(
            f"batch_size {batch_size} does not divide n = {n}: {n % batch_size} samples are left over; "
            f'choose remainder="drop" or "carry"'
        )

    if not epochs:
        return _no_batches(key, batch_size)
    carried = epochs.start * n % batch_size if remainder == "carry" else 0
    epochs = range(epochs.start - (carried > 0), epochs.stop)
    if shuffle:
        order = _draw(lambda key: _orders(key, n), key, epochs, n)
    else:
        order = torch.arange(n, device=key.device).expand(len(epochs), n)
    if remainder != "carry":
        return order[:, : n - n % batch_size].reshape(-1, batch_size)
    samples = order.flatten()[n - carried if carried else 0 :]
    return samples[: len(samples) - len(samples) % batch_size].reshape(-1, batch_size)


def sample_batches(
    key: Tensor, n: int, batch_size: int, steps: int | range, *, replacement: bool = True
) -> Tensor:
    """Plan stochastic gradient descent: every batch is drawn afresh from all samples.

    The batch of step t is drawn from `fold_in(key, t)` alone, so a range of steps gives those rows of
    the whole plan.

    Args:
        key: int64 [2].
        n: number of samples, at most 2³².
        batch_size: B, in [1, n].
        steps: how many, or a range of which.
        replacement: whether one batch may hold a sample twice.

    Returns:
        int64 [T, B], on the key's device.

    Raises:
        ValueError: a size is out of range.

    Example:
        >>> gd.sample_batches(gd.random.key(0), n=10, batch_size=3, steps=2)
        tensor([[1, 1, 7],
                [2, 2, 6]])
    """
    _check_key(key)
    n = check_int("n", n, 1, 2**32)
    batch_size = check_int("batch_size", batch_size, 1, n)
    steps = _as_range("steps", steps)
    if not steps:
        return _no_batches(key, batch_size)

    if replacement:
        return _draw(lambda key: _integers_below(n, key, (batch_size,)), key, steps, batch_size)
    return _draw(lambda key: _orders(key, n)[..., :batch_size], key, steps, n)


def take(data: Tree, index: Tensor) -> Tree:
    """Pick samples: index every leaf on dim 0.

    Args:
        data: tree of tensors or NumPy arrays [n, ...]; None stands for no data. A `TensorDataset` is the
            tuple of its tensors, a DataFrame of numbers the dict of its columns.
        index: int64, of any shape [...]; usually a row [B] of a plan.

    Returns:
        The same tree of tensors [B, ...]: the batch, in storage of its own.

    Raises:
        TypeError: the index is not int64 (a bool or uint8 tensor would be taken for a mask); a leaf of data
            is no tensor.
        IndexError: the index is out of bounds.

    Example:
        >>> gd.take({"x": torch.tensor([10.0, 20.0, 30.0])}, torch.tensor([2, 0]))
        {'x': tensor([30., 10.])}
    """
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        got = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"index must be an int64 tensor; got {got}")
    if index.ndim:
        return _tree.map(lambda leaf: leaf[index], as_data(data, "data", is_read=True))
    # Because torch reads the value of a 0-d index on the host, and returns a view.
    return _tree.map(lambda leaf: leaf[index[None]][0], as_data(data, "data", is_read=True))


def _as_range(name: str, value: Any) -> range:
    counts = value if isinstance(value, range) else range(check_int(name, value, 0))
    if counts.step != 1 or counts.start < 0 or counts.stop > 2**32:
        raise ValueError(
            f"{name} must be an int >= 0 or range(first, last) in steps of 1, at most 2^32; got {value}"
        )
    return counts


def _draw(draw: Callable[[Tensor], Tensor], key: Tensor, counts: range, size: int) -> Tensor:
    """Draw for each count from its own key."""
    return _shared(partial(_numbers, draw, counts, size), key)


def _numbers(draw: Callable[[Tensor], Tensor], counts: range, size: int, key: Tensor) -> Tensor:
    """Draw by each of the keys [..., 2]: so many counts at once that their numbers stay in the cache."""
    numbers, keys = torch.arange(counts.start, counts.stop, device=key.device), key.unsqueeze(-2)
    at_once = _PART // (size * max(1, math.prod(key.shape[:-1])))
    if at_once < 2:  # because torch sorts a vector several times faster than the only row of a matrix
        return torch.stack([draw(fold_in(key, count)) for count in numbers], dim=-2)
    return torch.cat([draw(fold_in(keys, part)) for part in numbers.split(at_once)], dim=-2)


def _shared(function: Callable[[Tensor], Tensor], key: Tensor) -> Tensor:
    """Call a function of keys [..., 2], once for all members of a vmap with the same key."""
    if not is_transformed(key) or is_tracing() or functionalization() is not None:
        return function(key)
    return _Shared.apply(function, key)


class _Shared(torch.autograd.Function):
    """A function of keys, which the members of a vmap with the same key share."""

    @staticmethod
    def forward(function: Callable[[Tensor], Tensor], key: Tensor) -> Tensor:
        return function(key)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], function: Any, key: Tensor) -> tuple[Tensor, int]:
        return _shared(partial(_each, function), key.movedim(in_dims[1], 0)), 0


def _each(function: Callable[[Tensor], Tensor], keys: Tensor) -> Tensor:
    """Call a function of keys for those that differ."""
    if not is_readable(keys):
        return function(keys)
    different, places = keys.unique(dim=0, return_inverse=True)
    return function(different)[places]


def _no_batches(key: Tensor, batch_size: int) -> Tensor:
    return torch.empty((0, batch_size), dtype=torch.int64, device=key.device)
