"""The mode in which another computation takes the place of torch's batch normalisation."""

from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class BatchNorm(NamedTuple):
    """A call of `torch.nn.functional.batch_norm`."""

    input: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5

    @property
    def axes(self) -> list[int]:
        """The axes over which means are taken: all but the one of channels."""
        return [axis for axis in range(self.input.ndim) if axis != 1]

    def along(self, channels: Tensor) -> Tensor:
        """Give numbers of the channels the axes of the input."""
        return channels.view([-1 if axis == 1 else 1 for axis in range(self.input.ndim)])

    def by_torch(self) -> Tensor:
        """Call torch's own function."""
        return functional.batch_norm(*self)

    def moved(self, y: Tensor) -> Tensor:
        """Add the bias, in the dtype of the input."""
        return (y if self.bias is None else y + self.along(self.bias)).to(self.input.dtype)


class BatchNormMode(TorchFunctionMode):
    """Call `batch_norm` of this mode in place of torch's function."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.batch_norm:
            return self.batch_norm(BatchNorm(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))

    def batch_norm(self, call: BatchNorm) -> Tensor:
        """Compute what a call asks for."""
        raise NotImplementedError
