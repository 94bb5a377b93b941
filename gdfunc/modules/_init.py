"""Modules whose initial values are drawn from keys, by their own init schemes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import _tree, random
from .._torch._modes import TorchDispatchMode
from ._apply import make_apply
from ._functional import Functional, check_module, form, stack_modules


def init(make_module: Callable[[], nn.Module], keys: Tensor) -> Functional:
    """Make modules whose initial values are drawn from keys.

    paramsᵢ = params of make_module(), drawn from keys[i]

    The constructor runs unchanged, once for every distinct key, with its own init scheme. Only the random
    numbers differ: the j-th random operation draws from `fold_in(keys[i], j)`, not from torch's global
    generator. A member depends on its own key alone. NumPy's and Python's generators are not replaced.

    Keys may be under `torch.func.vmap`: call this in the function that a sweep runs, with a key that
    nothing else is drawn from: `key, order_key = gd.random.split(key)`.

    Args:
        make_module: a function without arguments that makes a new module at each call.
        keys: int64 [N, 2], from `gdfunc.random.split`, for N members, or one key [2] for a single module.

    Returns:
        `(apply, params, buffers)` as from `functional`, the tensors with leading [N] if the keys have it.
        Then `apply` is still that of one member, to be mapped over both: see `predict`. It has no buffers
        of its own: give it the member's, if there are any.

    Raises:
        TypeError: keys are no keys, or make_module is no function or does not make a module.
        ValueError: make_module makes modules of different structures, or returns the same module twice.
            See also `functional`.
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
    # Only tensors pass through transformations, so everything else is kept here.
    made: list[tuple[nn.Module, _tree.Structure]] = []

    def build(keys: Tensor) -> tuple[Tensor, ...]:
        # A grid repeats its keys, and each of them is one member.
        distinct, places = keys.unique(dim=0, return_inverse=True)
        members = []
        for key in distinct:
            with _Drawn(key):
                members.append(check_module("what make_module made", make_module()))
        if len({id(member) for member in members}) < len(members):
            raise ValueError("make_module gave the same module twice; it must make a new one at each call")
        leaves, structure = _tree.flatten(stack_modules(members, "members"))
        made.append((members[0], structure))
        return tuple([leaf[places] for leaf in leaves])

    stacked = _Init.apply(build, keys.reshape(-1, 2))
    module, structure = made[0]
    if keys.ndim == 2:
        return Functional(make_apply(module, {}), *_tree.unflatten(structure, stacked))
    params, buffers = _tree.unflatten(structure, [leaf[0] for leaf in stacked])
    return Functional(make_apply(module, buffers), params, _tree.clone(buffers))


class _Init(torch.autograd.Function):
    """Calls a function of keys [N, 2] with plain keys under any transformation."""

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


def _check_keys(keys: Any) -> None:
    is_tensor = isinstance(keys, Tensor)
    if not is_tensor or keys.dtype != torch.int64 or keys.ndim > 2 or keys.shape[-1:] != (2,):
        got = form(keys) if is_tensor else repr(keys)
        raise TypeError(f"keys must be int64 [N, 2] from gdfunc.random.split, or one key [2]; got {got}")
    if not len(keys):
        raise ValueError("keys is empty: there are no members to make")
