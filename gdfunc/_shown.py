"""Short texts of what a user prints: calls with their hyperparameters, tensors by dtype and shape."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor


class Call(NamedTuple):
    """The call that made an object. It prints as one, with defaults, but for switches that are off."""

    make: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __repr__(self) -> str:
        signature = inspect.signature(self.make)
        bound = signature.bind(*self.args, **self.kwargs)
        bound.apply_defaults()
        texts: list[str] = []
        for name, value in bound.arguments.items():
            if signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL:
                texts += map(shown, value)
            elif value is not None and value is not False:
                texts.append(f"{name}={shown(value)}")
        return f"{self.make.__name__}({', '.join(texts)})"


def shown(value: Any) -> str:
    """Show a value as `repr` does, but a tensor or array by dtype and shape, and a function by its name."""
    if isinstance(value, Tensor | np.ndarray):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if type(value) is dict:
        return f"{{{', '.join(f'{key!r}: {shown(entry)}' for key, entry in value.items())}}}"
    if type(value) is list:
        return f"[{', '.join(map(shown, value))}]"
    if type(value) is tuple:
        return f"({', '.join(map(shown, value))}{',' * (len(value) == 1)})"
    return value.__name__ if inspect.isroutine(value) or inspect.isclass(value) else repr(value)


def dotted(path: str) -> str:
    """Write a path as the name of a column: `[1].loss` is `1.loss`, `['w']` is `w`."""
    return path.replace("['", ".").replace("']", "").replace("[", ".").replace("]", "").lstrip(".")
