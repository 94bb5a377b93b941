"""Losses `(predictions, targets) -> loss`: the mean over the batch, 0-d.

Every loss checks the shapes of its arguments before it computes, because torch would broadcast [n, 1] and
[n] to [n, n] silently.

They are `mse`, `mae`, `huber`, `cross_entropy` and `binary_cross_entropy_with_logits`. `masked_mean` is
for samples with padding.

torch divides a loss with class weights by their sum over the batch, and one with `ignore_index` by the
number of entries that are not ignored. Such a loss is no mean over the samples, and its mini-batch
gradients do not average to the gradient over all data. The losses here divide by the number of samples.

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


def cross_entropy(logits: Tensor, targets: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """Average the negative log-probability that logits give to the right classes.

    mean −log softmax(z)ₜ,  or with class weights  1/B Σᵢ w[tᵢ]·(−log softmax(zᵢ)[tᵢ])

    torch divides the weighted sum by Σᵢ w[tᵢ] of the batch, not by B. With weights n/(C·n_c), for n_c of n
    samples in class c, both agree over all data.

    Args:
        logits: z, float [B, C].
        targets: the class of each sample, int64 [B] with entries in [0, C).
        class_weights: w, float [C]; None: all one.

    Returns:
        The mean over the batch, 0-d.

    Raises:
        TypeError: the targets are not int64.
        ValueError: the shapes are not [B, C] and [B], and [C] of the weights.

    Example:
        >>> gd.losses.cross_entropy(torch.zeros(2, 10), torch.tensor([3, 7]))
        tensor(2.3026)
        >>> targets = torch.tensor([0, 0, 0, 1])
        >>> weights = len(targets) / (2 * targets.bincount())
        >>> gd.losses.cross_entropy(torch.zeros(4, 2), targets, weights)
        tensor(0.6931)

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
    losses = -logits.log_softmax(dim=1).gather(1, targets[:, None])[:, 0]
    if class_weights is None:
        return losses.mean()
    if class_weights.shape != logits.shape[1:]:
        raise ValueError(
            f"cross_entropy: class_weights must be [C] = {tuple(logits.shape[1:])}, one a class; "
            f"got {tuple(class_weights.shape)}"
        )
    return (class_weights.to(losses.dtype)[targets] * losses).mean()


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


def masked_mean(losses: Tensor, mask: Tensor, count: Scalar | None = None) -> Tensor:
    """Average losses over the samples, each over its own entries without the padding.

    1/B Σᵢ (Σⱼ mᵢⱼ lᵢⱼ) / cᵢ,  cᵢ = max(1, Σⱼ mᵢⱼ), or one c for all samples

    By default every sample counts alike, whatever its length. To let every entry count alike, pass the mean
    number of entries of a sample as `count`: over all data the loss is then Σ m·l / Σ m, as torch's
    `ignore_index` gives it, and mini-batches average to it.

    Args:
        losses: l, float [B, ...], an entry a token or pixel.
        mask: m, bool of the same shape, False where there is padding. The values there are not read.
        count: c > 0, a number or a 0-d tensor, of all data and not of the batch; None: cᵢ.

    Returns:
        The mean over the samples, 0-d. A sample without entries adds zero.

    Raises:
        TypeError: the mask is not bool.
        ValueError: the shapes differ, or count is out of range.

    Example:
        >>> tokens = torch.tensor([[3, 1, 2], [2, 0, 0]])
        >>> mask = torch.tensor([[True, True, True], [True, False, False]])
        >>> logits = torch.zeros(2, 3, 10)
        >>> losses = torch.nn.functional.cross_entropy(logits.movedim(-1, 1), tokens, reduction="none")
        >>> gd.losses.masked_mean(losses, mask)
        tensor(2.3026)
        >>> gd.losses.masked_mean(losses, mask, count=mask.sum() / len(mask))
        tensor(2.3026)
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"masked_mean: mask must be bool, True at the entries that count; got {mask.dtype}")
    if mask.shape != losses.shape or not losses.ndim:
        raise ValueError(
            f"masked_mean: losses and mask must be [B, ...] of one shape; "
            f"got {tuple(losses.shape)} and {tuple(mask.shape)}"
        )
    sums = torch.where(mask, losses, 0).reshape(len(losses), -1).sum(1)
    if count is None:
        return (sums / mask.reshape(len(mask), -1).sum(1).clamp_min(1)).mean()
    return sums.mean() / like(check_scalar("count", count, "(0, inf)"), sums)


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
