"""Averages over the ranks, for steps that each rank takes alone."""

from .. import _tree
from .._tree import Tree
from ._gather import agree, forms
from ._group import check_group, world_size
from ._sums import total


def average(tree: Tree) -> Tree:
    """Average a tree over the ranks: between two calls of `train`, this is local descent.

    x̄ = 1/W Σ_r x_r

    Steps that each rank takes alone, on its own columns of the plan, have no collectives. They stay
    compiled, and the ranks meet once in so many steps. One plain step between two averages, and equal
    shares of the batch, are `data_parallel`.

        mine = index[:, gd.distributed.rank() :: gd.distributed.world_size()]
        for rows in mine.split(100):
            carry, _ = gd.train(step, carry, data, rows, lr)
            carry = gd.distributed.average(carry)

    Args:
        tree: a tree of tensors, such as a carry. Integer leaves, counters and keys, stay the rank's own.

    Returns:
        The average, with the same bits on every rank, in new tensors.

    Raises:
        TypeError: a leaf is no tensor.
        RankError: torchrun started this process, but there is no process group; the ranks differ in
            structure, shapes or dtypes; a rank has ended.

    Example:
        >>> gd.distributed.average({"w": torch.tensor([1.0, 2.0])})
        {'w': tensor([1., 2.])}

    References:
        S. Stich, "Local SGD converges fast and communicates little", 2019.
        A. Douillard et al., "DiLoCo: distributed low-communication training of language models", 2023.
    """
    check_group("average")
    _tree.check_tensors(tree, "tree")
    leaves, structure = _tree.flatten(tree)
    agree(forms(tree, "tree"), "the shapes of what is averaged")
    floats = [i for i, leaf in enumerate(leaves) if leaf.is_floating_point()]
    means = total([leaves[i] / world_size() for i in floats])
    leaves = [leaf.clone() for leaf in leaves]
    for i, mean in zip(floats, means, strict=True):
        leaves[i] = mean
    return _tree.unflatten(structure, leaves)
