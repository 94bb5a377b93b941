"""Losses with state beside their parameters: buffers that an evaluation changes, and random numbers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _tree, random
from ._errors import check_function
from ._shown import shown
from ._torch._modes import lent, versions
from ._tree import Tree

_NEXT = 2**32 - 1  # folded into the key of a step, for the next step: −1 in 32 bits


class Evaluated(NamedTuple):
    """The loss of an evaluation that also changed buffers, as a loss may return it within gdfunc.

    A gradient hands it on in the place of the loss, and so does a step.
    """

    loss: Tensor
    buffers: list[Tensor]


def loss_of(value: Any) -> Any:
    """Return the loss alone."""
    return value.loss if isinstance(value, Evaluated) else value


@dataclass(frozen=True)
class Stateful:
    """A loss with state beside its parameters, made by `stateful`."""

    loss_fn: Callable[[Tree, Tree, Tree, Tensor | None], tuple[Tensor, Tree]]

    def __repr__(self) -> str:
        return f"stateful({shown(self.loss_fn)})"

    def __call__(self, params: Tree, batch: Tree, buffers: Tree, key: Tensor | None) -> tuple[Tensor, Tree]:
        result = self.loss_fn(params, batch, buffers, key)
        if not isinstance(result, tuple) or len(result) != 2:
            raise TypeError(f"a stateful loss must return (loss, buffers); got {type(result).__name__}")
        return result

    def bound(self, buffers: Tree) -> Callable[[Tree, Any], Any]:
        """Return the loss of one step, with the buffers of that step."""
        return Bound(self, buffers)


def stateful(loss_fn: Callable[[Tree, Tree, Tree, Tensor | None], tuple[Tensor, Tree]]) -> Stateful:
    """Mark a loss that carries buffers from step to step, or that draws random numbers.

    Lₜ, bₜ₊₁ = loss_fn(θₜ, batchₜ, bₜ, keysₜ);  θₜ₊₁ follows from ∇θ Lₜ

    `make_step` and all methods take it where they take a loss, but for those of finite sums (`svrg`,
    `sarah`, `sag`, `saga`), whose samples must have one loss each. Buffers are constants to the gradient
    of a step. Where a method evaluates the loss several times in a step, all evaluations see the same
    buffers and keys, and the new buffers are those of the evaluation at θₜ.

    Args:
        loss_fn: `(params, batch, buffers, key) -> (loss, buffers)`. The loss is the mean over the batch,
            as in `batch_grad`. `buffers` is a tree of tensors; give back a tree of the same structure,
            shapes and dtypes. `key` is int64 [B, 2], a key for each sample of the batch, to be used once;
            `gd.random.normal(key, x.shape[1:])` draws [B, ...] from it, and
            `first, second = gd.random.split(key).unbind(-2)` makes two of it. It is None if the run has no
            key.

    Returns:
        The loss, to be given to `make_step` or to a method. The step's `init(params, buffers={}, key=None)`
        makes its carry, a `StatefulState`.

    Raises:
        TypeError: loss_fn is no function of four arguments; (in the step) it does not return a pair.
        ValueError: (in the step) the buffers change their structure; per-sample gradients are taken of a
            loss that changes its buffers.

    Example:
        >>> apply, params, buffers = gd.modules.functional(torch.nn.BatchNorm1d(1))
        >>> @gd.stateful
        ... def loss_fn(params, batch, buffers, key):
        ...     output, buffers = apply(params, batch, buffers=buffers, return_buffers=True)
        ...     return (output - 1).square().mean(), buffers
        >>> step = gd.make_step(loss_fn, gd.adam())
        >>> state, loss = step(step.init(params, buffers), torch.tensor([[1.0], [3.0]]), 0.1)
        >>> state.buffers["running_mean"]
        tensor([0.2000])
    """
    kind = "a function (params, batch, buffers, key) -> (loss, buffers)"
    names = ("params", "batch", "buffers", "key")
    check_function("loss_fn", loss_fn, names, kind, "see help(gd.stateful)")
    return Stateful(loss_fn)


class Keyed(NamedTuple):
    """A batch in which every sample has a key of its own."""

    samples: Tree
    keys: Tensor | None  # int64 [B, 2]


@dataclass(frozen=True)
class Bound:
    """A stateful loss of one step, with the buffers of that step: a loss of params and a `Keyed` batch."""

    loss_fn: Stateful
    buffers: Tree

    def __call__(self, params: Tree, batch: Keyed) -> Any:
        given, structure = _tree.flatten(self.buffers)
        loans = [lent(leaf) for leaf in given]
        before = versions(loans)
        lent_buffers = _tree.unflatten(structure, loans)
        loss, buffers = self.loss_fn(params, batch.samples, lent_buffers, batch.keys)
        if versions(loans) != before:
            raise ValueError("the loss wrote into its buffers; it must return new tensors instead")
        found = _tree.check_like(buffers, self.buffers, "buffers", "state.buffers")
        if [leaf.dtype for leaf in found] != [leaf.dtype for leaf in given]:
            paths = _tree.named_leaves(self.buffers, "buffers")
            changed = [(path, old.dtype, new.dtype) for (path, old), new in zip(paths, found, strict=True)]
            path, old, new = next(each for each in changed if each[1] != each[2])
            raise ValueError(f"{path} was {old} and became {new}; it must keep its dtype")
        is_changed = any(new is not old for new, old in zip(found, loans, strict=True))
        originals = dict(zip(map(id, loans), given, strict=True))  # what is handed on, in any place
        return Evaluated(loss, [originals.get(id(leaf), leaf) for leaf in found]) if is_changed else loss


def keyed(batch: Tree, key: Any) -> tuple[Any, Any]:
    """Give sample i of a batch the key `fold_in(key, i)`; also derive the key of the next step."""
    if not isinstance(key, Tensor):
        return _over_samples(batch, lambda samples: Keyed(samples, None)), key
    size = next((len(leaf) for leaf in _tree.leaves(batch)), 1)
    keys = random.fold_in(key, (torch.arange(size + 1, device=key.device) - 1) & _NEXT)
    return _over_samples(batch, lambda samples: Keyed(samples, keys[1:])), keys[0].clone()


def _over_samples(batch: Tree, f: Callable[[Tree], Tree]) -> Any:
    """Apply a function to a batch, or to the samples of one that says which of them are real."""
    return batch.map_samples(f) if hasattr(batch, "map_samples") else f(batch)


def checked_state(buffers: Tree, key: Tensor | None, device: torch.device) -> tuple[Tree, Any]:
    """Return copies of the state of a first step, which must be on the device of the parameters."""
    is_key = isinstance(buffers, Tensor) and buffers.dtype == torch.int64 and buffers.shape == (2,)
    if is_key and key is None:
        raise TypeError("buffers is a key; pass step.init(params, buffers, key), with {} for no buffers")
    _tree.check_tensors(buffers, "buffers")
    if key is not None:
        random._check_key(key)
    for path, leaf in [*_tree.named_leaves(buffers, "buffers"), *_tree.named_leaves(key, "key")]:
        if leaf.device != device:
            raise ValueError(f"{path} is on {leaf.device} but params is on {device}; use .to(device)")
    return _tree.clone(_tree.detach((buffers, () if key is None else key)))
