"""A module taken apart into a pure function, its parameters and its buffers, and put together again."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.func import functional_call

from .. import _tree
from .._torch._modes import lent
from .._torch._transforms import is_transformed

Params = dict[str, Tensor]


class Functional(NamedTuple):
    """A module taken apart, or N of them; see `functional`, `init` and `stack`.

    Attributes:
        apply: `(params, *args, buffers=None, **kwargs) -> output`, of one member.
        params: the parameters by name, dict of tensors; of N members [N, ...].
        buffers: the buffers by name, dict of tensors; of N members [N, ...].

    Example:
        >>> gd.modules.functional(torch.nn.Linear(2, 1))._fields
        ('apply', 'params', 'buffers')
    """

    apply: Callable[..., Any]
    params: Params
    buffers: Params


def functional(module: nn.Module) -> Functional:
    """Take a module apart into a pure function, its parameters and its buffers.

    output = apply(params, *args, **kwargs)

    The function keeps a copy of the module in the mode (train or eval) that it is in now, and none of its
    numbers; the module itself is left alone. Frozen parameters (`requires_grad=False`) count as buffers.
    Tied parameters appear once, under their first name. Buffers that the module updates while it runs
    (the running statistics of batch normalisation) are updated in a copy that is thrown away; ask for it
    with `return_buffers=True`.

    Args:
        module: any module whose parameters exist already.

    Returns:
        `(apply, params, buffers)`. `apply(params, *args, buffers=None, return_buffers=False, **kwargs)`
        gives the module's output for these parameters, and the new buffers with it if asked. Without
        `buffers` it uses those of the module.

    Raises:
        TypeError: no module.
        ValueError: a lazy module without parameters yet; (in apply) missing or unexpected names; batch
            normalisation in training mode given a batch of one, as per-sample gradients do; a recurrent
            network under vmap.

    Example:
        >>> module = torch.nn.Linear(1, 1)
        >>> apply, params, _ = gd.modules.functional(module)
        >>> def loss_fn(params, batch):
        ...     x, y = batch
        ...     return torch.nn.functional.mse_loss(apply(params, x), y)
        >>> sorted(gd.batch_grad(loss_fn)(params, (torch.ones(4, 1), torch.ones(4, 1)))[0])
        ['bias', 'weight']
    """
    params, buffers = parts_of(check_module("module", module))
    return Functional(make_apply(module, buffers), params, _tree.clone(buffers))


def state_dict(module: nn.Module, params: Params, buffers: Params | None = None) -> dict[str, Any]:
    """Put parameters and buffers back into the form that `module.load_state_dict` takes.

    Args:
        module: the module that `functional` took apart; it is read for names and ties only.
        params: the parameters by name.
        buffers: the buffers by name; None: the module's own.

    Returns:
        A dict of tensors, copies, with the keys of `module.state_dict()`: tied parameters under each of
        their names, buffers that are not persistent left out.

    Raises:
        ValueError: names are missing or unexpected.

    Example:
        >>> module = torch.nn.Linear(2, 1)
        >>> _, params, buffers = gd.modules.functional(module)
        >>> module.load_state_dict(gd.modules.state_dict(module, params, buffers))
        <All keys matched successfully>
    """
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    given = params | (
        {name: tensors[name] for name in tensors if name not in params} if buffers is None else buffers
    )
    _check_names(given, tensors)
    by_tensor = {id(tensor): given[name] for name, tensor in tensors.items()}
    return {
        name: by_tensor[id(entry)].detach().clone() if id(entry) in by_tensor else entry
        for name, entry in module.state_dict(keep_vars=True).items()
    }


def make_apply(module: nn.Module, defaults: Params) -> Callable[..., Any]:
    """Make the pure function of a module, with the buffers that it takes where it is given none."""
    params, buffers = _named(module)
    tensors = params | buffers
    # deepcopy copies nothing that its memo holds, so the tensors stay where they are, tied or not.
    skeleton = copy.deepcopy(module, {id(tensor): tensor for tensor in tensors.values()})

    def apply(
        params: Params,
        *args: Any,
        buffers: Params | None = None,
        return_buffers: bool = False,
        **kwargs: Any,
    ) -> Any:
        buffers = _tree.clone(defaults if buffers is None else buffers)
        _check_names(params | buffers, tensors)
        _check_shapes(params, tensors)
        _check_batch_norm(skeleton, (args, kwargs))
        try:
            output = functional_call(skeleton, _tree.map(lent, params) | buffers, args, kwargs, strict=True)
        except RuntimeError as error:
            recurrent = _first(skeleton, nn.RNNBase)
            if recurrent and any(map(is_transformed, _tree.tensors((params, args, kwargs)))):
                raise ValueError(
                    f"{recurrent} cannot run under vmap, which per-sample gradients and sweeps use; "
                    f"write its loop over time with the cell (nn.GRUCell, nn.LSTMCell, nn.RNNCell), from "
                    f"a first state made of the input: x.new_zeros(len(x), hidden_size)"
                ) from error
            raise
        return (output, buffers) if return_buffers else output

    return apply


class Parts(NamedTuple):
    """Split the tensors of a module into trained parameters and the rest."""

    params: Params
    buffers: Params


def _named(module: nn.Module) -> Parts:
    """A module's own tensors, tied ones once."""
    params: Params = {name: tensor for name, tensor in module.named_parameters() if tensor.requires_grad}
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    return Parts(params, {name: tensors[name] for name in tensors if name not in params})


def parts_of(module: nn.Module) -> Parts:
    """Copies of a module's tensors."""
    parts = _named(module)
    for name, tensor in (parts.params | parts.buffers).items():
        if nn.parameter.is_lazy(tensor):
            raise ValueError(f"parameter {name!r} is lazy: call the module on a batch once, first")
    return _tree.map(lambda tensor: tensor.detach().clone(), parts)


def check_module(name: str, module: Any) -> nn.Module:
    if not isinstance(module, nn.Module):
        raise TypeError(f"{name} is {type(module).__name__}, not a torch.nn.Module")
    return module


def _check_names(given: Params, expected: Params) -> None:
    missing = [name for name in expected if name not in given]
    unexpected = [name for name in given if name not in expected]
    if missing or unexpected:
        raise ValueError(
            f"names do not match the module's: missing {missing}, unexpected {unexpected}; "
            f"pass the params (and buffers) of functional(module)"
        )


def _check_shapes(params: Params, expected: Params) -> None:
    """Refuse what would broadcast without a word, such as the params of a whole ensemble."""
    for name, tensor in params.items():
        shape, own = tuple(tensor.shape), tuple(expected[name].shape)
        if shape != own:
            raise ValueError(
                f"params[{name!r}] has shape {shape}, the module's {own}; "
                f"map over stacked members with predict or torch.func.vmap, or take one with member"
            )


def _check_batch_norm(module: nn.Module, inputs: Any) -> None:
    kinds = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm
    normalisation = _first(module, kinds, training=True)
    if normalisation and any(x.ndim > 1 and len(x) == 1 for x in _tree.tensors(inputs)):
        raise ValueError(
            f"{normalisation} in training mode has no statistics in a batch of one, which is what "
            f"per-sample gradients give it; use nn.GroupNorm, or module.eval() before functional()"
        )


def _first(
    module: nn.Module, kind: type[nn.Module] | tuple[type[nn.Module], ...], training: bool = False
) -> str:
    """Describe the first submodule of a class, or of one of several; empty if there is none."""
    for name, child in module.named_modules():
        if isinstance(child, kind) and (child.training or not training):
            return f"nn.{type(child).__name__} {name!r}"
    return ""
