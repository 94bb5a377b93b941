"""Batch normalisation by its formula, where its running statistics have a derivative or are mapped."""

import torch
from torch import Tensor

from .._torch._norms import BatchNorm, BatchNormMode


class FollowedNorms(BatchNormMode):
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

    def batch_norm(self, call: BatchNorm) -> Tensor:
        """Do as `torch.nn.functional.batch_norm`."""
        running_mean, running_var = call.running_mean, call.running_var
        if running_mean is None or running_var is None:
            return call.by_torch()
        x = call.input.to(running_mean.dtype)
        if call.training:
            now = x.mean(call.axes), x.var(call.axes, correction=1)
            for old, value in zip((running_mean, running_var), now, strict=True):
                self.updates[id(old)] = torch.lerp(self.updates.get(id(old), old), value, call.momentum)
            return call._replace(running_mean=None, running_var=None).by_torch()
        scale = torch.rsqrt(running_var + call.eps)
        scale = scale if call.weight is None else scale * call.weight
        return call.moved((x - call.along(running_mean)) * call.along(scale))
