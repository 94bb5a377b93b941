"""Draws from torch's own generators, and functions of torch that are opened to a mode."""

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ._modes import has_global_hooks, unseen
from ._transforms import no_wrapping

_OPEN = ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")
_GUARDS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
# A mode on calls of functions sees each of these as one call, which hides the draws inside.
_globals = functional.__dict__ | dict.fromkeys(_GUARDS, lambda *tensors: False)
opened: dict[Any, Callable[..., Any]] = {
    function: FunctionType(function.__code__, _globals, function.__name__, function.__defaults__)
    for function in (
        getattr(functional, name) for name in (*_OPEN, "rrelu", "multi_head_attention_forward")
    )
}


def draws(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Tell whether a call of an operator draws from a generator of torch's."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    arguments = func._schema.arguments
    given = {each.name: each.default_value for each in arguments}
    given |= dict(zip((each.name for each in arguments), args, strict=False)) | kwargs
    is_off = given.get("training") is False or given.get("train") is False
    return not is_off and given.get("dropout_p") != 0


def generator_states(device: torch.device) -> list[Tensor]:
    """Copy the state of the CPU's generator, and that of a GPU if tensors live there."""
    states = [torch.default_generator.get_state()]
    if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        states.append(torch.cuda.get_rng_state(device))
    return states


def differ(before: list[Tensor], after: list[Tensor]) -> bool:
    """Tell whether a generator was drawn from."""
    with unseen(), no_wrapping():
        return any(not torch.equal(*pair) for pair in zip(before, after, strict=False))


def put_back(states: list[Tensor], device: torch.device) -> None:
    """Give the generators their states."""
    torch.default_generator.set_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state, device)


def is_checkpointed() -> bool:
    """Tell whether `torch.utils.checkpoint` will run the present operations a second time."""
    hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"


def has_torchs_code_alone(module: nn.Module) -> bool:
    """Tell whether a module and its children run no code but that of torch.nn."""
    return not has_global_hooks() and all(map(_is_of_torch, module.modules()))


def _is_of_torch(module: nn.Module) -> bool:
    hooks = module._forward_hooks or module._forward_pre_hooks
    return (
        type(module).__module__.startswith("torch.nn.modules.")
        and not hooks
        and "forward" not in vars(module)
    )
