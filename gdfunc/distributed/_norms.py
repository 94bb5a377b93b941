"""Batch normalisation where each rank has a part of the batch."""

import torch
from torch import Tensor

from .._numerics import widen
from .._torch._norms import BatchNorm, BatchNormMode
from .._torch._transforms import is_transforming
from ._sums import everywhere


class SharedNorms(BatchNormMode):
    """Normalise by the mean and variance of the whole batch, in two sums over the ranks.

    m = 1/n Σ_r Σ x,  v = 1/n Σ_r Σ (x − m)²;  y = (x − m)/√(v + ε)·w + b

    Args:
        size: the samples of the batch.
        part: the samples that this rank evaluates.
        share: the part of the batch that they stand for: part/size, or 0 for a rank without samples.
    """

    def __init__(self, size: int, part: int, share: float) -> None:
        super().__init__()
        self.size, self.part, self.share = size, part, share

    def batch_norm(self, call: BatchNorm) -> Tensor:
        """Do as `torch.nn.functional.batch_norm` does with the whole batch."""
        if not call.training:
            return call.by_torch()
        if is_transforming():
            raise ValueError(
                "batch normalisation in training mode is shared among ranks outside of grad, jvp and vmap "
                "only; use nn.GroupNorm, or the module in eval mode"
            )
        x = widen(call.input)
        count = x.numel() // x.shape[1] // self.part * self.size
        is_real = float(self.share > 0)
        mean = everywhere(x.sum(call.axes) * is_real) / count
        centred = x - call.along(mean)
        variance = everywhere(centred.square().sum(call.axes) * is_real) / count
        if call.running_mean is not None and call.running_var is not None:
            call.running_mean.lerp_(mean.detach().to(call.running_mean.dtype), call.momentum)
            unbiased = variance.detach() * (count / (count - 1))
            call.running_var.lerp_(unbiased.to(call.running_var.dtype), call.momentum)
        y = centred * call.along(torch.rsqrt(variance + call.eps))
        return call.moved(y if call.weight is None else y * call.along(call.weight))
