"""Functions of trees of tensors: nested dicts, lists, tuples and NamedTuples, as parameters are.

`map` and `leaves` go over the leaves, `dot` and `norm` treat a tree as one vector, `random_like` draws a
tree from a key, and `matrices` is the mask that leaves biases and norms out. `None` is an empty node, as in
JAX.

Example:
    >>> params = {"w": torch.tensor([[3.0, 4.0]]), "b": torch.tensor([0.0])}
    >>> ahead = gd.tree.map(lambda p, d: p + 0.1 * d, params, gd.tree.random_like(gd.random.key(0), params))
    >>> gd.tree.norm(params)
    tensor(5.)
    >>> gd.chain(gd.adam(), gd.masked(gd.weight_decay(0.01), gd.tree.matrices))
    chain(adam(betas=(0.9, 0.999), eps=1e-08), masked(transform=weight_decay(rate=0.01), mask=matrices))
"""

from torch import Tensor

from . import _tree, random
from ._tree import Tree
from ._tree import dot as dot
from ._tree import leaves as leaves
from ._tree import map as map
from ._tree import norm as norm


def random_like(key: Tensor, tree: Tree) -> Tree:
    """Draw a tree like another from the standard normal distribution.

    xᵢ ~ N(0, I), leaf i from `fold_in(key, i)`

    Args:
        key: int64 [2], from `gd.random.key`.
        tree: of float tensors, whose shapes, dtypes and devices the draws have.

    Raises:
        TypeError: a leaf is no real float tensor.

    Example:
        >>> gd.tree.random_like(gd.random.key(0), {"w": torch.zeros(2), "b": torch.tensor(0.0)})
        {'w': tensor([ 1.0040, -0.9063]), 'b': tensor(-2.4425)}
    """
    random._check_key(key)
    draws = []
    for i, (path, leaf) in enumerate(_tree.named_leaves(tree, "tree")):
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            found = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
            raise TypeError(f"{path} is {found}, not a float tensor; leave it out of the tree")
        draws.append(random.normal(random.fold_in(key, i), leaf.shape, leaf.dtype).to(leaf.device))
    return _tree.unflatten(_tree.flatten(tree)[1], draws)


def matrices(params: Tree) -> Tree:
    """Mark the leaves of two or more dimensions: weights and kernels, but neither biases nor norms.

    A mask for `masked`, which calls it with the parameters of one model. It marks embeddings too. In
    parameters that are stacked along a leading axis without `vmap`, biases have two dimensions.

    Args:
        params: tree of tensors.

    Returns:
        A tree of bools like params.

    Example:
        >>> gd.tree.matrices({"weight": torch.zeros(3, 2), "bias": torch.zeros(3)})
        {'weight': True, 'bias': False}
    """
    return _tree.map(lambda p: p.ndim > 1, params)
