"""The pure function of a module, which draws from keys alone and loses nothing that the module writes."""

import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .. import _tree
from .._errors import line_of, users_frame, users_frame_of
from .._torch._autograd import is_unwritten
from .._torch._draws import differ, draws, generator_states, has_torchs_code_alone, put_back
from .._torch._modes import TorchDispatchMode, is_tracing, lent, versions
from .._torch._transforms import is_transformed, is_transforming, layers
from ._dropout import KeyedDropout, rows_of
from ._norms import FollowedNorms

Params = dict[str, Tensor]
_BATCH_NORMS = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm
_NORMS = *_BATCH_NORMS, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d
_DROPOUTS = nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout
_DRAW = *_DROPOUTS, nn.RReLU, nn.MultiheadAttention
# Because these draw whatever their mode is, or call functions that a user gave to them.
_HIDE_DRAWS = (
    *(nn.FractionalMaxPool2d, nn.FractionalMaxPool3d),
    *(nn.TransformerEncoderLayer, nn.TransformerDecoderLayer),
)
_OFF = "turn it off: training=False, or module.eval() before functional()"


class Parts(NamedTuple):
    """Split the tensors of a module into trained parameters and the rest."""

    params: Params
    buffers: Params


class Skeleton(NamedTuple):
    """A module without numbers in one mode, and the layers that matter for what `apply` refuses.

    Each text describes a submodule, and is empty where there is none.

    Attributes:
        module: the module. Its own tensors are never read.
        is_plain: whether it runs nothing but layers of torch.nn, whose draws are known.
        dropout: a layer that draws from torch's generator unless there is a key.
        calls: how many layers do.
        stacked_rnn: a recurrent network with dropout between its layers.
        script: a ScriptModule in training mode.
        batch_norm: batch normalisation in training mode.
        statistics: a layer in training mode that changes running statistics.
        recurrent: a recurrent network.
        counters: by the name of a running statistic, the name of the buffer that is written along with it.
    """

    module: nn.Module
    is_plain: bool
    dropout: str
    calls: int
    stacked_rnn: str
    script: str
    batch_norm: str
    statistics: str
    recurrent: str
    counters: dict[str, str]

    @property
    def may_draw(self) -> bool:
        return bool(self.dropout) or not self.is_plain


def make_apply(module: nn.Module, defaults: Params) -> Callable[..., Any]:
    """Make the pure function of a module, with the buffers that it takes where it is given none."""
    params, buffers = named(module)
    tensors = params | buffers
    trained = evaluated = _skeleton(_without_numbers(module, tensors))
    if any(child.training for child in module.modules()):
        evaluated = _skeleton(_without_numbers(module, tensors).train(False))

    def apply(
        params: Params,
        *args: Any,
        buffers: Params | None = None,
        return_buffers: bool = False,
        key: Tensor | None = None,
        training: bool = True,
        **kwargs: Any,
    ) -> Any:
        skeleton, owned = (trained if training else evaluated), (defaults if buffers is None else buffers)
        check_dicts(params, owned)
        if buffers is None and not training and trained.statistics:
            remedy = "apply(params, x, buffers=state.buffers, training=False)"
            raise ValueError(of_statistics(trained.statistics, remedy))
        check_names(params | owned, tensors)
        _check_shapes(params, tensors)
        _check_layers(skeleton, key, (args, kwargs))
        # Because a trace sees what is written to its own tensors alone.
        loans = _tree.clone(owned) if is_tracing() else _tree.map(lent, owned)
        counts = versions(list(loans.values()))
        given = _tree.map(lent, params) | loans
        rows = None if key is None else rows_of(key, (args, kwargs), skeleton.may_draw)
        norms = FollowedNorms() if loans and (is_tracing() or is_transforming()) else None

        def call(given: Params) -> Any:
            dropout = nullcontext() if rows is None else KeyedDropout(rows, skeleton.calls)
            with dropout, norms or nullcontext():
                return functional_call(skeleton.module, given, args, kwargs, strict=True)

        try:
            if skeleton.is_plain:
                output = call(given)
            else:
                with _restored(skeleton.module):
                    output = _watched(call, given, key is not None)
        except RuntimeError as error:
            if cause := _cause(error, skeleton, (params, args, kwargs), key is not None):
                raise ValueError(cause) from error
            raise
        if norms:
            given |= {name: norms.updates.get(id(loan), given[name]) for name, loan in loans.items()}
        names = _written(skeleton, given, loans, counts, owned) if loans else []
        if return_buffers:
            kept = _tree.clone(owned) if buffers is None else owned
            return output, {name: given[name] if name in names else kept[name] for name in owned}
        if names:
            raise ValueError(_of_lost_buffer(skeleton.module, names[0]))
        return output

    return apply


def named(module: nn.Module) -> Parts:
    """Return a module's own tensors, tied ones once."""
    params: Params = {name: tensor for name, tensor in module.named_parameters() if tensor.requires_grad}
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    return Parts(params, {name: tensors[name] for name in tensors if name not in params})


def check_dicts(params: Any, buffers: Any) -> None:
    """Refuse a carry in place of its tensors, and other things that are no dict of names."""
    for name, given in (("params", params), ("buffers", buffers)):
        if not isinstance(given, Mapping):
            inside = "pass its .params, and its .buffers as buffers=" if hasattr(given, "params") else ""
            inside = inside or "pass the params and the buffers of functional(module), dicts by name"
            raise TypeError(f"{name} is {type(given).__name__}, not a dict of tensors; {inside}")


def statistics_of(module: nn.Module) -> str:
    """Describe a layer whose running statistics the module changes in training mode."""
    return _first(_in_training(module), _NORMS, lambda layer: layer.track_running_stats)


def of_statistics(layer: str, call: str) -> str:
    return (
        f"{layer} has running statistics, which training changes in the carry, "
        f"not in the module; pass them, as in {call}, or model.buffers for those of before"
    )


def check_names(given: Params, expected: Params) -> None:
    missing = [name for name in expected if name not in given]
    unexpected = [name for name in given if name not in expected]
    if missing or unexpected:
        raise ValueError(
            f"names do not match the module's: missing {missing}, unexpected {unexpected}; pass the params "
            f"(and buffers) of model = functional(module): step.init(model.params, model.buffers, key)"
        )


def _check_shapes(params: Params, expected: Params) -> None:
    """Refuse params that would broadcast silently, such as those of a whole ensemble."""
    for name, tensor in params.items():
        shape, own = tuple(tensor.shape), tuple(expected[name].shape)
        if shape != own:
            raise ValueError(
                f"params[{name!r}] has shape {shape}, the module's {own}; "
                f"map over stacked members with predict or torch.func.vmap, or take one with member"
            )


def _check_layers(skeleton: Skeleton, key: Any, inputs: Any) -> None:
    """Refuse layers that cannot do in `apply` what they do in training."""
    if skeleton.batch_norm and any(x.ndim > 1 and len(x) == 1 for x in _tree.tensors(inputs)):
        raise ValueError(
            f"{skeleton.batch_norm} in training mode has no statistics in a batch of one, which is what "
            f"per-sample gradients give it; use nn.GroupNorm, or module.eval() before functional()"
        )
    if skeleton.stacked_rnn:
        raise ValueError(
            f"{skeleton.stacked_rnn} in training mode draws its dropout from torch's generator, and no key "
            f"can replace that; use cells (nn.GRUCell, nn.LSTMCell, nn.RNNCell), or single layers with "
            f"dropout=0 and nn.Dropout between them, or {_OFF}"
        )
    if skeleton.dropout and key is None:
        raise ValueError(
            f"{skeleton.dropout} in training mode draws from torch's generator, which a pure function "
            f"does not know; give a key to the run, as in step.init(params, buffers, key), or to apply, as "
            f"in apply(params, x, key=key), or {_OFF}"
        )
    if skeleton.script and key is not None:
        raise ValueError(
            f"{skeleton.script} in training mode may draw inside its script, and no key can replace that; "
            f"use the module that it was scripted from, or {_OFF}"
        )


def _without_numbers(module: nn.Module, tensors: Params) -> nn.Module:
    """Copy a module, except for its tensors."""
    # deepcopy copies nothing that its memo holds, so the tensors stay where they are, tied or not.
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors.values()})


def _skeleton(module: nn.Module) -> Skeleton:
    training = _in_training(module)
    return Skeleton(
        module=module,
        is_plain=has_torchs_code_alone(module) and not _first(dict(module.named_modules()), _HIDE_DRAWS),
        dropout=_first(training, _DRAW, _draws),
        calls=sum(isinstance(child, _DRAW) and _draws(child) for child in training.values()),
        stacked_rnn=_first(training, nn.RNNBase, lambda child: child.dropout > 0 and child.num_layers > 1),
        script=_first(training, torch.jit.ScriptModule),
        batch_norm=_first(training, _BATCH_NORMS),
        statistics=statistics_of(module),
        recurrent=_first(dict(module.named_modules()), nn.RNNBase),
        counters={
            f"{name}.{statistic}".lstrip("."): f"{name}.num_batches_tracked".lstrip(".")
            for name, child in training.items()
            if isinstance(child, _BATCH_NORMS)
            for statistic in ("running_mean", "running_var")
        },
    )


def _in_training(module: nn.Module) -> dict[str, nn.Module]:
    return {name: child for name, child in module.named_modules() if child.training}


def _draws(layer: Any) -> bool:
    """Tell whether a layer, in training mode, draws with its present settings."""
    if isinstance(layer, nn.MultiheadAttention):
        return bool(layer.dropout > 0)
    return isinstance(layer, nn.RReLU) or bool(0 < layer.p < 1)


def _first(layers: dict[str, nn.Module], kind: Any, has: Callable[[Any], bool] = lambda layer: True) -> str:
    """Describe the first layer of a class or of several classes. Without one, return an empty text."""
    found = (name for name, child in layers.items() if isinstance(child, kind) and has(child))
    name = next(found, None)
    return "" if name is None else _described(layers[name], name)


def _described(layer: nn.Module, name: str) -> str:
    room = "nn." if type(layer).__module__.startswith("torch.nn.") else ""
    return f"{room}{type(layer).__name__} {name!r}"


@contextmanager
def _restored(module: nn.Module) -> Iterator[None]:
    """Put back the attributes that a forward pass sets, and refuse those that the next call would read."""
    layers = {name: child for name, child in module.named_modules() if not _is_torchs(child)}
    before = {name: (dict(vars(child)), _own_buffers(child)) for name, child in layers.items()}
    refused = []
    try:
        yield
    finally:
        for name, child in layers.items():
            attributes, buffers = before[name]
            late = [key for key in _own_buffers(child) if key not in buffers]
            changed = [key for key, value in vars(child).items() if attributes.get(key) is not value]
            numbers = [key for key in changed if isinstance(attributes.get(key), Tensor | int | float)]
            refused += [_of_late_buffer(_described(child, name), key) for key in late]
            refused += [_of_kept_attribute(_described(child, name), key) for key in numbers]
            for key in late:
                child.register_buffer(key, None)
            if changed:
                vars(child).clear()
                vars(child).update(attributes)
    if refused:
        raise ValueError(refused[0])


def _of_kept_attribute(layer: str, name: str) -> str:
    return (
        f"{layer} changes its attribute {name!r} in its forward pass, which a pure function cannot keep; "
        f"make it a buffer with self.register_buffer, and carry it: gd.stateful"
    )


def _of_late_buffer(layer: str, name: str) -> str:
    return (
        f"{layer} makes its buffer {name!r} in its first forward pass; call it on a batch once, before "
        f"functional()"
    )


def _own_buffers(layer: nn.Module) -> list[str]:
    """Name the buffers of a layer that hold a tensor."""
    return [name for name, _ in layer.named_buffers(recurse=False)]


def _is_torchs(layer: nn.Module) -> bool:
    return type(layer).__module__.startswith("torch.")


class _NoDraws(TorchDispatchMode):
    """Refuse operators that draw from torch's generator."""

    def __init__(self, has_key: bool) -> None:
        super().__init__()
        self.has_key = has_key

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if draws(func, args, kwargs):
            raise ValueError(_of_draw(str(func), users_frame(sys._getframe(1)), self.has_key))
        return func(*args, **kwargs)


def _watched(call: Callable[[Params], Any], given: Params, has_key: bool) -> Any:
    """Run a forward pass, and refuse draws from torch's generator by name."""
    if is_tracing():
        with _NoDraws(has_key):
            return call(given)
    device = next((tensor.device for tensor in given.values()), torch.device("cpu"))
    before = generator_states(device)
    output = call(given)
    if differ(before, generator_states(device)):
        # Without an operator that draws, another thread drew.
        try:
            with _NoDraws(has_key):
                call(_tree.clone(given))
        except ValueError:
            put_back(before, device)
            raise
    return output


def _of_draw(operator: str, frame: FrameType | None, has_key: bool) -> str:
    where = f" at {line_of(frame)}" if frame else ""
    if has_key:
        return (
            f"the forward pass draws from torch's generator ({operator}{where}), and key= replaces dropout "
            f"alone; draw from gd.random with a key of its own, which the module takes as an argument"
        )
    return (
        f"the forward pass draws from torch's generator ({operator}{where}), which a pure function does "
        f"not know; for dropout, give apply a key, as in apply(params, x, key=key), or {_OFF}. Draw other "
        f"numbers from gd.random with a key that the module takes as an argument"
    )


def _cause(error: RuntimeError, skeleton: Skeleton, inputs: Any, has_key: bool) -> str:
    """Say in words of gdfunc what torch means by an error under vmap, or nothing."""
    if "randomness error mode" in str(error):
        return _of_draw("a random operation", users_frame_of(error), has_key)
    if skeleton.recurrent and any(map(is_transformed, _tree.tensors(inputs))):
        return (
            f"{skeleton.recurrent} cannot run under vmap, which per-sample gradients and sweeps use; "
            f"write its loop over time with the cell (nn.GRUCell, nn.LSTMCell, nn.RNNCell), from "
            f"a first state made of the input: x.new_zeros(len(x), hidden_size)"
        )
    return ""


def _written(
    skeleton: Skeleton, given: Params, loans: Params, counts: list[int], owned: Params
) -> list[str]:
    """List the buffers that a forward pass wrote to or replaced."""
    counted = {
        name
        for name, old, new in zip(loans, counts, versions(list(loans.values())), strict=True)
        if old != new
    }
    # torch does not count how often batch normalisation writes its statistics.
    return [
        name
        for name, loan in loans.items()
        if name in counted
        or given[name] is not loan
        or skeleton.counters.get(name) in counted
        or not (is_tracing() or is_unwritten(layers(loan)[-1], layers(owned[name])[-1]))
    ]


def _of_lost_buffer(module: nn.Module, name: str) -> str:
    owner = name.rpartition(".")[0]
    layer = _described(module.get_submodule(owner), owner)
    mode = "training" if module.get_submodule(owner).training else "eval"
    return (
        f"{layer} in {mode} mode writes its buffer {name!r}, and the new value would be lost; carry the "
        f"buffers: gd.stateful(loss_fn) and apply(params, x, buffers=buffers, return_buffers=True), or use "
        f"training=False, or module.eval() before functional()"
    )
