"""Batch normalisation where a rank has a part of the batch alone."""

from typing import Any

from torch.nn import functional
from torch.overrides import TorchFunctionMode

_TRAINING = 5  # the place of the argument among those of batch_norm


class RefusedNorms(TorchFunctionMode):
    """Refuse batch normalisation with the statistics of the batch, which would be those of one rank."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.batch_norm and (args[_TRAINING:] or (kwargs.get("training"),))[0]:
            raise ValueError(
                "batch normalisation in training mode would take the mean and variance of one rank's "
                "samples in place of the batch's; use nn.GroupNorm, or the module in eval mode"
            )
        return func(*args, **kwargs)
