"""Many modules of one architecture as one tree: stacked, taken out again, and asked for predictions."""

from collections.abc import Callable, Sequence
from math import nan
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import vmap

from .. import _tree
from .._errors import check_choice, check_int
from .._tree import Tree
from ._functional import Functional, Parts, check_module, make_apply, parts_of


def stack(members: Sequence[Any]) -> Any:
    """Stack modules of one architecture, or trees of tensors such as their params, along a new axis.

    Args:
        members: N modules; or N trees of one structure, with equal shapes, dtypes and devices.

    Returns:
        Of modules, `(apply, params, buffers)` as from `init`; of trees, a tree. Each leaf is [N, ...], a
        copy.

    Raises:
        TypeError: a member is no module among modules; a leaf is no tensor.
        ValueError: there are none, or they differ; the message names the layer or the leaf. Layers are
            compared by what `print(module)` shows of them, and by their mode (train or eval).

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
    randomness: str = "error",
    **kwargs: Any,
) -> Prediction:
    """Let every member of an ensemble predict, and average.

    yᵢ = apply(paramsᵢ, *args);  mean = 1/N Σᵢ yᵢ,  std² = 1/(N−1) Σᵢ (yᵢ − mean)²

    Outputs are averaged as they are: to average probabilities, give an `apply` that returns them.

    Args:
        apply: `(params, *args, **kwargs) -> output`, of one member: a float tensor, or a tree of them.
        params: tree of tensors [N, ...], from `init`, `stack`, or a run under `torch.func.vmap`.
        *args: what all members get alike.
        buffers: tree of tensors [N, ...], handed on as `buffers=`; None hands on nothing. Buffers that all
            members share go into apply itself: `functools.partial(apply, buffers=shared)`.
        chunk_size: how many members to run at once; None: all.
        randomness: what dropout and other random operations of torch do: `"error"`, `"different"` for every
            member, or the `"same"`.
        **kwargs: what all members get alike.

    Returns:
        `(members, mean, std)`, trees like the output: [N, ...], [...], [...]. One member has no spread:
        std is NaN for N = 1.

    Raises:
        TypeError: an output is not floating-point.
        ValueError: params and buffers disagree on N.
        RuntimeError: a random operation, while `randomness="error"`.

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
    if chunk_size is not None:
        check_int("chunk_size", chunk_size, 1)
    check_choice("randomness", randomness, ("error", "different", "same"))
    count = _check_count(_tree.named_leaves(params, "params") + _tree.named_leaves(buffers, "buffers"))
    if count is None:
        raise ValueError("params has no tensor leaves: there are no members")

    def predict_one(params: Tree, own: dict[str, Tree]) -> Any:
        return apply(params, *args, **own, **kwargs)

    own = {} if buffers is None else {"buffers": buffers}
    members = vmap(predict_one, chunk_size=chunk_size, randomness=randomness)(params, own)
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
            if form(_check_tensor(f"{name}[{i}]{path}", leaf)) != form(first[path]):
                raise ValueError(
                    f"{name}[{i}]{path} is {form(leaf)} but {name}[0]{path} is {form(first[path])}"
                )
    return _tree.map(lambda *group: torch.stack(group), *map(_tree.detach, trees))


def form(leaf: Tensor) -> str:
    return f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)} on {leaf.device}"


def _check_tensor(path: str, leaf: Any) -> Tensor:
    if not isinstance(leaf, Tensor):
        raise TypeError(f"{path} is {type(leaf).__name__}, not a Tensor")
    return leaf


def _check_count(named: list[tuple[str, Any]]) -> int | None:
    """Return how many members the leaves have, all the same; None without leaves."""
    for path, leaf in named:
        if not _check_tensor(path, leaf).ndim or leaf.shape[:1] != named[0][1].shape[:1]:
            first, shape = named[0][0], tuple(named[0][1].shape)
            raise ValueError(
                f"{path} has shape {tuple(leaf.shape)} and {first} {shape}: "
                f"all need one leading axis [N], a row for each member"
            )
    return len(named[0][1]) if named else None
