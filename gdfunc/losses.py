"""Losses `(predictions, targets) -> loss`: the mean over the batch, 0-d.

Every loss checks the shapes of its arguments before it computes, because torch would broadcast [n, 1] and
[n] to [n, n] silently.

They are `mse`, `mae`, `huber`, `cross_entropy` and `binary_cross_entropy_with_logits`.

Example:
    >>> gd.losses.mse(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]))
    tensor(2.)
"""

import math

import torch
from torch import Tensor

from ._errors import check_scalar
from ._numerics import Scalar, like, softplus


def mse(predictions: Tensor, targets: Tensor) -> Tensor:
    """Average the squared errors, as torch does: without a factor ½.

    mean (p − t)²

    Args:
        predictions: float, of any shape.
        targets: of the same shape.

    Returns:
        The mean over all entries, 0-d.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> gd.losses.mse(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 5.0]))
        tensor(4.5000)

    References:
        torch: `mse_loss`.
    """
    _check_same_shape("mse", predictions, targets)
    return (predictions - targets).square().mean()


def mae(predictions: Tensor, targets: Tensor) -> Tensor:
    """Average the absolute errors.

    mean |p − t|

    Args, Returns, Raises:
        As `mse`.

    Example:
        >>> gd.losses.mae(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 5.0]))
        tensor(1.5000)

    References:
        torch: `l1_loss`.
    """
    _check_same_shape("mae", predictions, targets)
    return (predictions - targets).abs().mean()


def huber(predictions: Tensor, targets: Tensor, delta: Scalar = 1.0) -> Tensor:
    """Average errors that are squared up to a size of δ, and linear beyond it.

    mean ½r² where |r| <= δ, else δ(|r| − ½δ),  r = p − t

    Args:
        predictions: float, of any shape.
        targets: of the same shape.
        delta: δ > 0, a number or a 0-d tensor.

    Returns:
        The mean over all entries, 0-d.

    Raises:
        ValueError: the shapes differ, or delta is out of range.

    Example:
        >>> gd.losses.huber(torch.tensor([1.0, 2.0]), torch.tensor([1.5, 5.0]))
        tensor(1.3125)

    References:
        P. J. Huber, "Robust estimation of a location parameter", 1964. torch: `huber_loss`.
    """
    _check_same_shape("huber", predictions, targets)
    bound = like(check_scalar("delta", delta, "(0, inf)"), predictions)
    error = predictions - targets
    # One expression for both branches, with the exact second derivative at zero.
    inner = torch.clamp(error, -bound, bound)
    return (inner * (error - inner / 2)).mean()


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Average the negative log-probability that logits give to the right classes.

    mean −log softmax(z)ₜ

    Args:
        logits: z, float [B, C].
        targets: the class of each sample, int64 [B] with entries in [0, C).

    Returns:
        The mean over the batch, 0-d.

    Raises:
        TypeError: the targets are not int64.
        ValueError: the shapes are not [B, C] and [B].

    Example:
        >>> gd.losses.cross_entropy(torch.zeros(2, 10), torch.tensor([3, 7]))
        tensor(2.3026)

    References:
        torch: `cross_entropy`.
    """
    if targets.dtype != torch.int64:
        raise TypeError(f"cross_entropy: targets must be int64 classes; got {targets.dtype}")
    if logits.ndim != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(
            "cross_entropy: logits must be [B, C] and targets [B]; "
            f"got {tuple(logits.shape)} and {tuple(targets.shape)}"
        )
    return -logits.log_softmax(dim=1).gather(1, targets[:, None]).mean()


def binary_cross_entropy_with_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """Average the negative log-probability that logits give to the right one of two classes.

    mean t·log(1 + exp(−z)) + (1 − t)·log(1 + exp(z))

    No digits are lost where a logit is large and right.

    Args:
        logits: z, float, of any shape.
        targets: t, of the same shape: bool, 0 and 1, or probabilities in [0, 1].

    Returns:
        The mean over all entries, 0-d.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> gd.losses.binary_cross_entropy_with_logits(torch.tensor([0.0, 3.0]), torch.tensor([0, 1]))
        tensor(0.3709)

    References:
        torch: `binary_cross_entropy_with_logits`.
    """
    _check_same_shape("binary_cross_entropy_with_logits", logits, targets)
    share = targets.to(logits.dtype)
    return (share * softplus(-logits) + (1 - share) * softplus(logits)).mean()


def _check_same_shape(name: str, predictions: Tensor, targets: Tensor) -> None:
    """Refuse two shapes that differ, and suggest a reshape where the sizes agree."""
    first, second = tuple(predictions.shape), tuple(targets.shape)
    if first == second:
        return
    shapes = f"{name}: predictions {first} and targets {second}"
    try:
        common = tuple(torch.broadcast_shapes(first, second))
    except RuntimeError:
        raise ValueError(f"{shapes} differ in shape; they must be the same") from None
    remedy = "y[:, None]" if first == (*second, 1) else "y.reshape(predictions.shape)"
    example = f", e.g. {remedy}" if math.prod(first) == math.prod(second) else ""
    raise ValueError(f"{shapes} would broadcast to {common}; reshape one{example}")
