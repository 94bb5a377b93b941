"""Batch normalisation by its formula, where its running statistics have a derivative or are mapped."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class FollowedNorms(TorchFunctionMode):
    """Compute new running statistics in place of writing them, and use them so that they are followed.

    m' = (1 − α)·m + α·mean(x),  v' = (1 − α)·v + α·var(x) with the unbiased variance;
    in eval mode y = (x − m)/√(v + ε)·w + b

    torch's own operation writes its statistics in place, where no vmap can add an axis to them and no
    derivative follows, and it has no derivative with respect to them.

    Attributes:
        updates: by the identity of a running statistic, its new value.
    """

    def __init__(self) -> None:
        super().__init__()
        self.updates: dict[int, Tensor] = {}

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
        """Do as `torch.nn.functional.batch_norm`."""
        if running_mean is None or running_var is None:
            return functional.batch_norm(
                input, running_mean, running_var, weight, bias, training, momentum, eps
            )
        x = input.to(running_mean.dtype)
        axes = [axis for axis in range(x.ndim) if axis != 1]
        if training:
            now = x.mean(axes), x.var(axes, correction=1)
            for old, value in zip((running_mean, running_var), now, strict=True):
                self.updates[id(old)] = torch.lerp(self.updates.get(id(old), old), value, momentum)
            return functional.batch_norm(input, None, None, weight, bias, True, momentum, eps)
        shape = [-1 if axis == 1 else 1 for axis in range(x.ndim)]
        scale = torch.rsqrt(running_var + eps)
        scale = scale if weight is None else scale * weight
        y = (x - running_mean.view(shape)) * scale.view(shape)
        return (y if bias is None else y + bias.view(shape)).to(input.dtype)
