"""Batch normalisation where each rank has a part of the batch."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from .._numerics import widen
from .._torch._transforms import is_transforming
from ._sums import everywhere


class SharedNorms(TorchFunctionMode):
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

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.batch_norm:
            return self.batch_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        """Do as `torch.nn.functional.batch_norm` does with the whole batch."""
        if not training:
            return functional.batch_norm(
                input, running_mean, running_var, weight, bias, False, momentum, eps
            )
        if is_transforming():
            raise ValueError(
                "batch normalisation in training mode is shared among ranks outside of grad, jvp and vmap "
                "only; use nn.GroupNorm, or the module in eval mode"
            )
        x, shape = widen(input), [-1 if axis == 1 else 1 for axis in range(input.ndim)]
        axes = [axis for axis in range(x.ndim) if axis != 1]
        count = x.numel() // x.shape[1] // self.part * self.size
        is_real = float(self.share > 0)
        mean = everywhere(x.sum(axes) * is_real) / count
        centred = x - mean.view(shape)
        variance = everywhere(centred.square().sum(axes) * is_real) / count
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(mean.detach().to(running_mean.dtype), momentum)
            unbiased = variance.detach() * (count / (count - 1))
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
        y = centred * torch.rsqrt(variance + eps).view(shape)
        y = y if weight is None else y * weight.view(shape)
        return (y if bias is None else y + bias.view(shape)).to(input.dtype)
