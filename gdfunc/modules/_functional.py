"""Modules as pure functions of their parameters: one taken apart, or many stacked for joint predictions."""

from collections.abc import Callable, Sequence
from math import nan
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import vmap

from .. import _tree, random
from .._errors import check_function, check_int, check_options, check_tensor
from .._stateful import Stateful, stateful
from .._tree import Tree
from ._apply import Params, Parts, check_dicts, check_names, make_apply, named, of_statistics, statistics_of


class Functional(NamedTuple):
    """A module taken apart, or N of them; see `functional`, `init` and `stack`.

    Attributes:
        apply: `(params, *args, buffers=None, key=None, training=True, **kwargs) -> output`, of one member.
        params: the parameters by name, dict of tensors; of N members [N, ...].
        buffers: the buffers by name, dict of tensors; of N members [N, ...].

    Example:
        >>> gd.modules.functional(torch.nn.Linear(2, 1))._fields
        ('apply', 'params', 'buffers')
    """

    apply: Callable[..., Any]
    params: Params
    buffers: Params

    def loss(self, criterion: Callable[[Any, Any], Tensor]) -> Stateful:
        """Make the loss of the module on batches (x, y), which carries its buffers and draws its dropout.

        L = criterion(apply(params, x), y)

        The module works in the mode in which it was taken apart: one in eval mode trains without dropout
        and with fixed statistics.

        Args:
            criterion: `(output, y) -> loss`, the mean over the batch as a 0-d tensor, such as
                `gd.losses.cross_entropy`.

        Returns:
            A loss as `gd.stateful` makes it: `step.init(model.params, model.buffers, key)` makes the carry
            of its step.

        Raises:
            TypeError: criterion is a class, or no function; (in the step) the batch is no pair of tensors.

        Example:
            >>> model = gd.modules.functional(torch.nn.BatchNorm1d(1))
            >>> step = gd.make_step(model.loss(gd.losses.mse))
            >>> batch = torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [1.0]])
            >>> state, loss = step(step.init(model.params, model.buffers), batch, 0.1)
            >>> state.buffers["running_mean"]
            tensor([0.2000])
        """

        if isinstance(criterion, type):
            name = criterion.__name__
            raise TypeError(f"criterion is the class {name}; call it: model.loss({name}())")
        kind, remedy = "a function (output, y) -> loss", "pass one of gd.losses or torch.nn.functional"
        check_function("criterion", criterion, ("output", "y"), kind, remedy)

        @stateful
        def loss_fn(params: Params, batch: Tree, buffers: Params, key: Any) -> tuple[Tensor, Params]:
            if not isinstance(batch, tuple | list) or len(batch) != 2:
                size = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
                raise TypeError(
                    f"batch must be a pair (x, y); got {type(batch).__name__}{size}; for other batches, "
                    f"mark a loss of your own with gd.stateful"
                )
            x, y = batch
            if isinstance(x, dict):
                raise TypeError(
                    f"x is a dict of columns, {[*x][:3]}; make one tensor of them: "
                    f"torch.as_tensor(frame.to_numpy('float32'))"
                )
            output, buffers = self.apply(params, x, buffers=buffers, return_buffers=True, key=key)
            return criterion(output, y), buffers

        return loss_fn


def functional(module: nn.Module) -> Functional:
    """Take a module apart into a pure function, its parameters and its buffers.

    output = apply(params, *args, **kwargs)

    The function keeps a copy of the module in its present mode (train or eval), without the numbers, and
    the module itself stays unchanged. Frozen parameters (`requires_grad=False`) count as buffers. Tied
    parameters appear once, under their first name.

    The signature is `apply(params, *args, buffers=None, return_buffers=False, key=None, training=True,
    **kwargs)`. These names are apply's own: give the module's arguments of the same name by position.

    - `training=False` evaluates the module in eval mode. True: in the mode that it had.
    - `buffers`: None takes those of the module, if training leaves them as they are. With
      `return_buffers=True`, apply returns `(output, buffers)`: a buffer that the module wrote while it ran,
      as batch normalisation does, is a new tensor, and any other is the tensor that was given.
    - `key`: from `gd.random`, for dropout in training mode: a key [2], or keys [B, 2], one for each row of
      the batch, whose size B is that of the first tensor argument. A key [2] stands for the rows
      `fold_in(key, torch.arange(B))`. Call number c of dropout in the forward pass draws row i of its mask
      from `fold_in(rows[i], c)` alone, as `gd.random.dropout` does. So a batch, its chunks, and its samples
      one by one (keys [B, 2] in the batch) have the same masks.

    A key replaces the draws of `nn.Dropout`, `nn.AlphaDropout`, their variants for channels, `nn.RReLU`
    and attention with dropout, as layers or as functions of `torch.nn.functional`. A tensor whose first
    size is a multiple of B, such as attention weights [B·heads, L, L], has a block of rows for each sample.
    The mask of any other tensor, as where the sequence comes first, is drawn from one key for the whole
    batch, and samples alone then have other masks. torch's generators are neither read nor written.

    Args:
        module: any module whose parameters exist already.

    Returns:
        `(apply, params, buffers)`.

    Raises:
        TypeError: no module. In apply: key is no key.
        ValueError: the module is lazy and has no parameters yet. In apply: names are missing or unexpected.
            The module draws from torch's generator: dropout without a key, or other numbers. The module
            writes a buffer, and `return_buffers` is False. Batch normalisation in training mode gets a
            batch of one, as from per-sample gradients. A recurrent network runs under vmap, or has dropout
            between its layers in training mode.

    Example:
        >>> module = torch.nn.Linear(1, 1)
        >>> apply, params, _ = gd.modules.functional(module)
        >>> def loss_fn(params, batch):
        ...     x, y = batch
        ...     return torch.nn.functional.mse_loss(apply(params, x), y)
        >>> sorted(gd.batch_grad(loss_fn)(params, (torch.ones(4, 1), torch.ones(4, 1)))[0])
        ['bias', 'weight']
        >>> apply, params, _ = gd.modules.functional(torch.nn.Dropout(0.5))
        >>> keys = gd.random.fold_in(gd.random.key(0), torch.arange(3))
        >>> whole = apply(params, torch.ones(3, 4), key=gd.random.key(0))
        >>> whole.equal(torch.cat([apply(params, torch.ones(1, 4), key=row[None]) for row in keys]))
        True
    """
    params, buffers = parts_of(check_module("module", module))
    return Functional(make_apply(module, buffers), params, _tree.clone(buffers))


def state_dict(module: nn.Module, params: Params, buffers: Params | None = None) -> dict[str, Any]:
    """Put parameters and buffers back into the form that `module.load_state_dict` takes.

    Args:
        module: the module that `functional` took apart. Only its names and ties are read.
        params: the parameters by name.
        buffers: the buffers by name; None: the module's own, if training leaves them as they are.

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
    check_dicts(params, {} if buffers is None else buffers)
    if buffers is None and (layer := statistics_of(module)):
        raise ValueError(of_statistics(layer, "state_dict(module, state.params, state.buffers)"))
    given = (tensors if buffers is None else buffers) | params
    check_names(given, tensors)
    by_tensor = {id(tensor): given[name] for name, tensor in tensors.items()}
    return {
        name: by_tensor[id(entry)].detach().clone() if id(entry) in by_tensor else entry
        for name, entry in module.state_dict(keep_vars=True).items()
    }


def parts_of(module: nn.Module) -> Parts:
    """Copies of a module's tensors."""
    parts = named(module)
    for name, tensor in (parts.params | parts.buffers).items():
        if nn.parameter.is_lazy(tensor):
            raise ValueError(f"parameter {name!r} is lazy: call the module on a batch once, first")
    return _tree.map(lambda tensor: tensor.detach().clone(), parts)


def check_module(name: str, module: Any) -> nn.Module:
    if not isinstance(module, nn.Module):
        raise TypeError(f"{name} is {type(module).__name__}, not a torch.nn.Module")
    return module


def stack(members: Sequence[Any]) -> Any:
    """Stack modules of one architecture, or trees of tensors such as their params, along a new axis.

    Args:
        members: N modules, or N trees of one structure, with equal shapes, dtypes and devices.

    Returns:
        For modules, `(apply, params, buffers)` as from `init`. For trees, a tree. Each leaf is a copy
        [N, ...].

    Raises:
        TypeError: some members are modules and others are not, or a leaf is no tensor.
        ValueError: there are no members, or they differ. The message names the layer or the leaf. Layers
            are compared by their text in `print(module)` and by their mode (train or eval).

    Example:
        >>> modules = [torch.nn.Linear(2, 1) for _ in range(3)]
        >>> apply, params, buffers = gd.modules.stack(modules)
        >>> torch.func.vmap(apply, (0, None))(params, torch.ones(5, 2)).shape
        torch.Size([3, 5, 1])
    """
    members = list(members)
    if not members:
        raise ValueError("members is empty: there is nothing to stack")
    if isinstance(members[0], nn.Module):
        return Functional(make_apply(members[0], {}), *stack_modules(members, "members"))
    return _stack_trees(members, "members")


def member(stacked: Tree, i: int) -> Tree:
    """Take one member out of stacked params, buffers, or any tree of tensors [N, ...].

    Args:
        stacked: tree of tensors [N, ...].
        i: which, in [−N, N).

    Returns:
        The tree of its tensors [...], copies, as `state_dict` takes them.

    Raises:
        ValueError: there is no such member, or the leaves disagree on N.

    Example:
        >>> modules = [torch.nn.Linear(2, 1) for _ in range(3)]
        >>> _, params, buffers = gd.modules.stack(modules)
        >>> params, buffers = gd.modules.member((params, buffers), 2)
        >>> modules[0].load_state_dict(gd.modules.state_dict(modules[0], params, buffers))
        <All keys matched successfully>
    """
    count = _check_count(_tree.named_leaves(stacked, "stacked"))
    if count is not None:
        i = check_int("i", i, -count, count - 1)
    return _tree.map(lambda leaf: leaf[i].clone(), stacked)


class Prediction(NamedTuple):
    """The prediction of an ensemble of N; see `predict`.

    Attributes:
        members: the output of each member, [N, ...].
        mean: over the members, [...].
        std: their standard deviation, [...].

    Example:
        >>> gd.modules.Prediction(torch.tensor([1.0, 3.0]), torch.tensor(2.0), torch.tensor(1.4)).mean
        tensor(2.)
    """

    members: Tree
    mean: Tree
    std: Tree


def predict(
    apply: Callable[..., Any],
    params: Tree,
    *args: Any,
    buffers: Tree = None,
    chunk_size: int | None = None,
    key: Tensor | None = None,
    **kwargs: Any,
) -> Prediction:
    """Let every member of an ensemble predict, and average.

    yᵢ = apply(paramsᵢ, *args, key=keyᵢ);  mean = 1/N Σᵢ yᵢ,  std² = 1/(N−1) Σᵢ (yᵢ − mean)²

    Outputs are averaged as they are: to average probabilities, give an `apply` that returns them.

    Args:
        apply: `(params, *args, **kwargs) -> output`, of one member: a float tensor, or a tree of them.
        params: tree of tensors [N, ...], from `init`, `stack`, or a run under `torch.func.vmap`.
        *args: what all members get alike.
        buffers: tree of tensors [N, ...], handed on as `buffers=`; None hands on nothing. Buffers that all
            members share go into apply itself: `functools.partial(apply, buffers=shared)`.
        chunk_size: how many members to run at once; None: all.
        key: int64 [2], for dropout: member i gets `split(key, N)[i]` as `key=`. None hands on nothing.
        **kwargs: what all members get alike.

    Returns:
        `(members, mean, std)`, trees like the output: [N, ...], [...], [...]. One member has no spread:
        std is NaN for N = 1.

    Raises:
        TypeError: an output is not floating-point.
        ValueError: params and buffers disagree on N.

    Example:
        >>> apply, params = lambda params, x: x * params["w"], {"w": torch.tensor([1.0, 3.0])}
        >>> prediction = gd.modules.predict(apply, params, torch.tensor([0.0, 1.0]))
        >>> prediction.members
        tensor([[0., 1.],
                [0., 3.]])
        >>> prediction.mean, prediction.std
        (tensor([0., 2.]), tensor([0.0000, 1.4142]))

    References:
        B. Lakshminarayanan, A. Pritzel, C. Blundell, "Simple and scalable predictive uncertainty estimation
        using deep ensembles", 2017.
    """
    check_options(chunk_size)
    count = _check_count(_tree.named_leaves(params, "params") + _tree.named_leaves(buffers, "buffers"))
    if count is None:
        raise ValueError("params has no tensor leaves: there are no members")

    def predict_one(params: Tree, own: dict[str, Tree]) -> Any:
        return apply(params, *args, **own, **kwargs)

    own = {} if buffers is None else {"buffers": buffers}
    if key is not None:
        random._check_key(key)
        own["key"] = random.split(key, count)
    members = vmap(predict_one, chunk_size=chunk_size)(params, own)
    for path, leaf in _tree.named_leaves(members, "output"):
        if not (leaf.is_floating_point() or leaf.is_complex()):
            raise TypeError(f"{path} is {leaf.dtype}, which has no mean; return scores or probabilities")
    return Prediction(
        _tree.unshare(members, _tree.tensors((params, args, buffers, kwargs))),
        _tree.map(lambda leaf: leaf.mean(0), members),
        # torch warns where N − 1 = 0, and has no derivative there.
        _tree.map(lambda leaf: leaf.std(0) if count > 1 else torch.full_like(leaf[0].abs(), nan), members),
    )


def stack_modules(modules: Sequence[Any], name: str) -> Parts:
    layers = [_layers(check_module(f"{name}[{i}]", module)) for i, module in enumerate(modules)]
    for i, own in enumerate(layers):
        for layer in own | layers[0]:
            found, wanted = own.get(layer, "missing"), layers[0].get(layer, "missing")
            if found != wanted:
                raise ValueError(f"layer {layer!r} of {name}[{i}] is {found}, but of {name}[0] {wanted}")
    return _stack_trees([parts_of(module) for module in modules], name)


def _layers(module: nn.Module) -> dict[str, str]:
    """List the class and the plain attributes of every layer."""

    def describe(layer: nn.Module) -> str:
        mode = "train" if layer.training else "eval"
        return f"{type(layer).__name__}({layer.extra_repr()}) in {mode} mode"

    return {name: describe(layer) for name, layer in module.named_modules()}


def _stack_trees(trees: Sequence[Tree], name: str) -> Any:
    first = dict(_tree.named_leaves(trees[0], ""))
    for i, tree in enumerate(trees):
        _tree.check_structure(tree, trees[0], f"{name}[{i}]", f"{name}[0]")
        for path, leaf in _tree.named_leaves(tree, ""):
            check_tensor(leaf, f"{name}[{i}]{path}")
            if form(leaf) != form(first[path]):
                raise ValueError(
                    f"{name}[{i}]{path} is {form(leaf)} but {name}[0]{path} is {form(first[path])}"
                )
    return _tree.map(lambda *group: torch.stack(group), *map(_tree.detach, trees))


def form(leaf: Tensor) -> str:
    return f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)} on {leaf.device}"


def _check_count(named: list[tuple[str, Any]]) -> int | None:
    """Return how many members the leaves have, all the same; None without leaves."""
    for path, leaf in named:
        check_tensor(leaf, path)
        if not leaf.ndim or leaf.shape[:1] != named[0][1].shape[:1]:
            first, shape = named[0][0], tuple(named[0][1].shape)
            raise ValueError(
                f"{path} has shape {tuple(leaf.shape)} and {first} {shape}: "
                f"all need one leading axis [N], a row for each member"
            )
    return len(named[0][1]) if named else None
