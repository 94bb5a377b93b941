"""Sums over the ranks with their derivatives: two linear maps, each the transpose of the other.

A replicated value is the same on every rank, a local one is the rank's own.

    replicate: replicated -> local, x ↦ x;  its transpose is total
    total: local -> replicated, x ↦ Σ_ranks x;  its transpose is replicate

torch's own collectives give the local gradient alone inside `torch.func.grad`, and rows that are not summed
under vmap.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _tree
from .._errors import GdfuncError, untraceable
from .._numerics import widest
from .._torch._autograd import leads_to
from .._torch._modes import is_tracing
from .._torch._transforms import is_transforming
from .._tree import Tree
from ._group import world_size
from ._words import answered


class _Total(torch.autograd.Function):
    """Σ over the ranks of one vector."""

    @staticmethod
    def forward(vector: Tensor) -> Tensor:
        # Because a collective writes into what it is given, and some backends need it contiguous.
        bucket = vector.detach().clone(memory_format=torch.contiguous_format)
        with answered("a sum"):
            dist.all_reduce(bucket)
        return bucket

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None: ...

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None], vector: Tensor) -> tuple[Tensor, int | None]:
        return _Total.apply(vector), in_dims[0]

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        _check_replicated([tangent])
        return _Total.apply(tangent)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return _Replicate.apply(cotangent)[0]


class _Replicate(torch.autograd.Function):
    """Take replicated tensors for local ones."""

    @staticmethod
    def forward(*leaves: Tensor) -> tuple[Tensor, ...]:
        return tuple([leaf.clone() for leaf in leaves])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None: ...

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], *leaves: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        return _Replicate.apply(*leaves), in_dims

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> tuple[Tensor, ...]:
        return _Replicate.apply(*tangents)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, ...]:
        return tuple(_summed(cotangents))


def replicated(tree: Tree) -> Tree:
    """Let what every rank computes of a replicated tree have its derivative summed over the ranks.

    y = x on every rank;  x̄ = Σ_ranks ȳ

    A loss that `data_parallel` shares out does this for its parameters and batch. Other tensors that it
    closes over, and that are differentiated in reverse mode, need it too: a penalty, the temperature of a
    distillation.

    Args:
        tree: a tree of tensors, the same on all ranks.

    Returns:
        An equal tree.

    Example:
        >>> penalty = torch.tensor(0.1)
        >>> def loss_fn(w, x):
        ...     return (w * x).square().mean() + gd.distributed.replicated(penalty) * w**2
        >>> gd.batch_grad(gd.distributed.data_parallel(loss_fn))(torch.tensor(1.0), torch.ones(4))
        (tensor(2.2000), tensor(1.1000))
    """
    inside, (leaves, structure) = is_transforming(), _tree.flatten(tree)
    # Because a tangent may be differentiated where its primal is not, all count in a transformation.
    followed = [i for i, leaf in enumerate(leaves) if _is_floating(leaf) and (inside or leaf.requires_grad)]
    if world_size() == 1 or not followed:
        return tree
    for i, leaf in zip(followed, _Replicate.apply(*[leaves[i] for i in followed]), strict=True):
        leaves[i] = leaf
    return _tree.unflatten(structure, leaves)


def total(tree: Tree) -> Tree:
    """Sum a tree of floating-point tensors over the ranks, in one bucket of their widest dtype.

    Raises:
        BackendError: in a trace, because a compiled loop has no collectives.
        GdfuncError: a reverse-mode derivative would reach tensors that are not replicated.
        RankError: a rank does not answer.
    """
    if world_size() == 1:
        return tree
    check_backend()
    leaves, structure = _tree.flatten(tree)
    _check_replicated(leaves)
    return _tree.unflatten(structure, _summed(leaves))


def everywhere(local: Tensor) -> Tensor:
    """Sum a tensor over the ranks, for each to go on with in what it computes alone."""
    return _Replicate.apply(_Total.apply(local))[0]


def check_backend() -> None:
    """Refuse a trace, because a compiled loop has no collectives."""
    if world_size() > 1 and is_tracing():
        error = untraceable("the step sums over the ranks, which a compiled loop cannot")
        error.is_expected = True
        raise error


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _check_replicated(leaves: Sequence[Tensor]) -> None:
    """Refuse local values whose reverse-mode derivative would be that of one rank alone."""
    if any(leads_to(leaf, (_Total.__name__,), _Replicate.__name__) for leaf in leaves):
        raise GdfuncError(
            "a sum over the ranks depends on a tensor that requires a gradient and is not replicated, such "
            "as one that a loss closes over: each rank would have its own share of the derivative alone; "
            "let the loss use gd.distributed.replicated(tensor), or tensor.detach() for no derivative"
        )


def _summed(leaves: Sequence[Tensor]) -> list[Tensor]:
    """Sum over the ranks, in one bucket."""
    dtype = widest(leaves)
    bucket = torch.cat([leaf.reshape(-1).to(dtype) for leaf in leaves])
    is_followed = is_transforming() or bucket.requires_grad
    whole = _Total.apply(bucket) if is_followed else _Total.forward(bucket)
    pieces = whole.split([leaf.numel() for leaf in leaves])
    pairs = zip(pieces, leaves, strict=True)
    return [piece.reshape(leaf.shape).to(leaf.dtype, copy=True) for piece, leaf in pairs]
