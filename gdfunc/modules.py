"""`torch.nn.Module` in and out: a module, or an ensemble of them, as a pure function of its parameters."""

import copy
from collections.abc import Callable, Sequence
from math import nan
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from . import _tree, random
from ._errors import check_choice, check_int
from ._tree import Tree

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
        gives the module's output for these parameters, and the new buffers beside it if asked. Without
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
    params, buffers = _parts(_check_module("module", module))
    return Functional(_make_apply(module, buffers), params, _tree.clone(buffers))


def init(make_module: Callable[[], nn.Module], keys: Tensor) -> Functional:
    """Make modules whose initial values are drawn from keys.

    paramsᵢ = params of make_module(), drawn from keys[i]

    The constructor runs as it is, once for every distinct key, with its own init scheme; only the numbers
    that torch would draw from its global generator are drawn from the key instead: those of the j-th
    random operation from `fold_in(keys[i], j)`. A member depends on its own key alone, whoever is made
    beside it. NumPy's and Python's generators are not replaced.

    Keys may be under `torch.func.vmap`: call this in the function that a sweep runs, with a key that
    nothing else is drawn from: `key, order_key = gd.random.split(key)`.

    Args:
        make_module: a function without arguments that makes a new module at each call.
        keys: int64 [N, 2], from `gdfunc.random.split`, for N members; or one key [2] for a single module.

    Returns:
        `(apply, params, buffers)` as from `functional`, the tensors with leading [N] if the keys have it.
        Then `apply` is still that of one member, to be mapped over both: see `predict`. It has no buffers
        of its own: give it the member's, if there are any.

    Raises:
        TypeError: keys are none; make_module is no function, or does not make a module.
        ValueError: make_module makes modules of different structures, or one twice; see also `functional`.
        NotImplementedError: make_module uses a random operation other than `uniform_`, `normal_`, `rand`,
            `randn`, `rand_like`, `randn_like`, `randperm` and `normal` of two numbers. All of
            `torch.nn.init` is made of these.

    Example:
        >>> keys = gd.random.split(gd.random.key(0), 4)
        >>> apply, params, _ = gd.modules.init(lambda: torch.nn.Linear(2, 1), keys)
        >>> params["weight"].shape
        torch.Size([4, 1, 2])
        >>> alone = gd.modules.init(lambda: torch.nn.Linear(2, 1), keys[3])
        >>> alone.params["weight"].equal(params["weight"][3])
        True
    """
    if isinstance(make_module, nn.Module) or not callable(make_module):
        raise TypeError(
            f"make_module is {type(make_module).__name__}, not a function that makes a module; "
            f"pass one, such as lambda: nn.Linear(2, 1)"
        )
    _check_keys(keys)
    # Only tensors come back through the transformations under way: what they are of is left here.
    made: list[tuple[nn.Module, _tree.Structure]] = []

    def build(keys: Tensor) -> tuple[Tensor, ...]:
        # A grid repeats its keys: each is one member.
        distinct, places = keys.unique(dim=0, return_inverse=True)
        members = [_make_module(make_module, key) for key in distinct]
        if len({id(member) for member in members}) < len(members):
            raise ValueError("make_module gave the same module twice; it must make a new one at each call")
        leaves, structure = _tree.flatten(_stack_modules(members, "members"))
        made.append((members[0], structure))
        return tuple([leaf[places] for leaf in leaves])

    stacked = _Init.apply(build, keys.reshape(-1, 2))
    module, structure = made[0]
    if keys.ndim == 2:
        return Functional(_make_apply(module, {}), *_tree.unflatten(structure, stacked))
    params, buffers = _tree.unflatten(structure, [leaf[0] for leaf in stacked])
    return Functional(_make_apply(module, buffers), params, _tree.clone(buffers))


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
        return Functional(_make_apply(members[0], {}), *_stack_modules(members, "members"))
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
    """What an ensemble of N predicts; see `predict`.

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
        _tree.unshare(members, _tensors((params, args, buffers, kwargs))),
        _tree.map(lambda leaf: leaf.mean(0), members),
        # torch warns where N − 1 = 0, and has no derivative there.
        _tree.map(lambda leaf: leaf.std(0) if count > 1 else torch.full_like(leaf[0].abs(), nan), members),
    )


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


def _make_apply(module: nn.Module, defaults: Params) -> Callable[..., Any]:
    """Make the pure function of a module, with the buffers that it takes where it is given none."""
    params, buffers = _named(module)
    tensors = params | buffers
    # deepcopy takes from its memo what is copied already: the tensors stay where they are, tied or not.
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
            output = functional_call(skeleton, params | buffers, args, kwargs, strict=True)
        except RuntimeError as error:
            recurrent = _first(skeleton, nn.RNNBase)
            if recurrent and any(map(_tree.is_transformed, _tensors((params, args, kwargs)))):
                raise ValueError(
                    f"{recurrent} cannot run under vmap, which per-sample gradients and sweeps use; "
                    f"write its loop over time with the cell (nn.GRUCell, nn.LSTMCell, nn.RNNCell)"
                ) from error
            raise
        return (output, buffers) if return_buffers else output

    return apply


class _Parts(NamedTuple):
    """What a module holds: trained parameters, and the rest."""

    params: Params
    buffers: Params


def _named(module: nn.Module) -> _Parts:
    """A module's own tensors, tied ones once."""
    params: Params = {name: tensor for name, tensor in module.named_parameters() if tensor.requires_grad}
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    return _Parts(params, {name: tensors[name] for name in tensors if name not in params})


def _parts(module: nn.Module) -> _Parts:
    """Copies of a module's tensors."""
    parts = _named(module)
    for name, tensor in (parts.params | parts.buffers).items():
        if nn.parameter.is_lazy(tensor):
            raise ValueError(f"parameter {name!r} is lazy: call the module on a batch once, first")
    return _tree.map(lambda tensor: tensor.detach().clone(), parts)


def _stack_modules(modules: Sequence[Any], name: str) -> _Parts:
    layers = [_layers(_check_module(f"{name}[{i}]", module)) for i, module in enumerate(modules)]
    for i, own in enumerate(layers):
        for layer in own | layers[0]:
            found, wanted = own.get(layer, "missing"), layers[0].get(layer, "missing")
            if found != wanted:
                raise ValueError(f"layer {layer!r} of {name}[{i}] is {found}, but of {name}[0] {wanted}")
    return _stack_trees([_parts(module) for module in modules], name)


def _layers(module: nn.Module) -> dict[str, str]:
    """What can be told of every layer without its numbers."""

    def describe(layer: nn.Module) -> str:
        mode = "train" if layer.training else "eval"
        return f"{type(layer).__name__}({layer.extra_repr()}) in {mode} mode"

    return {name: describe(layer) for name, layer in module.named_modules()}


def _stack_trees(trees: Sequence[Tree], name: str) -> Any:
    first = dict(_tree.named_leaves(trees[0], ""))
    for i, tree in enumerate(trees):
        _tree.check_structure(tree, trees[0], f"{name}[{i}]", f"{name}[0]")
        for path, leaf in _tree.named_leaves(tree, ""):
            if _form(_check_tensor(f"{name}[{i}]{path}", leaf)) != _form(first[path]):
                raise ValueError(
                    f"{name}[{i}]{path} is {_form(leaf)} but {name}[0]{path} is {_form(first[path])}"
                )
    return _tree.map(lambda *group: torch.stack(group), *map(_tree.detach, trees))


def _form(leaf: Tensor) -> str:
    return f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)} on {leaf.device}"


class _Init(torch.autograd.Function):
    """Calls a function of keys [N, 2] with plain ones, whatever transformations are under way."""

    @staticmethod
    def forward(build: Callable[[Tensor], tuple[Tensor, ...]], keys: Tensor) -> tuple[Tensor, ...]:
        return build(keys)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing to keep: keys are integers, and have no derivatives."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, build: Any, keys: Tensor) -> tuple[tuple[Tensor, ...], Any]:
        rows = keys.movedim(in_dims[1], 0)
        leaves = _Init.apply(build, rows.flatten(0, 1))
        return tuple([leaf.unflatten(0, rows.shape[:2]) for leaf in leaves]), (0,) * len(leaves)


def _make_module(make_module: Callable[[], nn.Module], key: Tensor) -> nn.Module:
    with _Drawn(key):
        return _check_module("what make_module made", make_module())


class _Drawn(TorchDispatchMode):
    """Answers torch's random operations from a key: the j-th of them from `fold_in(key, j)`."""

    def __init__(self, key: Tensor) -> None:
        super().__init__()
        self.key, self.count = key, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        name = str(func).removeprefix("aten.").removesuffix(".default").removesuffix(".generator")
        draw = _DRAWS.get(name)
        if draw is None:
            raise NotImplementedError(
                f"make_module uses torch's random operation {name}, which is not drawn from keys; "
                f"it can use {', '.join(_DRAWS)}"
            )
        key, self.count = random.fold_in(self.key, self.count), self.count + 1
        kwargs.pop("generator", None)
        return draw(key, *args, **kwargs)


def _uniform(key: Tensor, out: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    return out.copy_(random.uniform(key, out.shape, out.dtype, low, high))


def _normal(key: Tensor, out: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    return out.copy_(mean + std * random.normal(key, out.shape, out.dtype))


_DRAWS: dict[str, Callable[..., Tensor]] = {
    "uniform_": _uniform,
    "normal_": _normal,
    "rand": lambda key, size, **how: _uniform(key, torch.empty(size, **how)),
    "randn": lambda key, size, **how: _normal(key, torch.empty(size, **how)),
    "rand_like": lambda key, like, **how: _uniform(key, torch.empty_like(like, **how)),
    "randn_like": lambda key, like, **how: _normal(key, torch.empty_like(like, **how)),
    "normal.float_float": lambda key, mean, std, n, **how: _normal(key, torch.empty(n, **how), mean, std),
    "randperm": lambda key, n, **how: random.permutation(key, n).to(how.get("device"), how.get("dtype")),
}


def _check_module(name: str, module: Any) -> nn.Module:
    if not isinstance(module, nn.Module):
        raise TypeError(f"{name} is {type(module).__name__}, not a torch.nn.Module")
    return module


def _check_tensor(path: str, leaf: Any) -> Tensor:
    if not isinstance(leaf, Tensor):
        raise TypeError(f"{path} is {type(leaf).__name__}, not a Tensor")
    return leaf


def _check_keys(keys: Any) -> None:
    is_tensor = isinstance(keys, Tensor)
    if not is_tensor or keys.dtype != torch.int64 or keys.ndim > 2 or keys.shape[-1:] != (2,):
        got = _form(keys) if is_tensor else repr(keys)
        raise TypeError(f"keys must be int64 [N, 2] from gdfunc.random.split, or one key [2]; got {got}")
    if not len(keys):
        raise ValueError("keys is empty: there are no members to make")


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
    normalisation = _first(module, nn.modules.batchnorm._BatchNorm, training=True)
    if normalisation and any(x.ndim > 1 and len(x) == 1 for x in _tensors(inputs)):
        raise ValueError(
            f"{normalisation} in training mode has no statistics in a batch of one, which is what "
            f"per-sample gradients give it; use nn.GroupNorm, or module.eval() before functional()"
        )


def _first(module: nn.Module, kind: type[nn.Module], training: bool = False) -> str:
    """Describe the first submodule of a kind; empty if there is none."""
    for name, child in module.named_modules():
        if isinstance(child, kind) and (child.training or not training):
            return f"nn.{type(child).__name__} {name!r}"
    return ""


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in _tree.leaves(tree) if isinstance(leaf, Tensor)]
