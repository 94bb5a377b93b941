"""The backend that is a Python loop: any body, any device, and torch.func goes through it by itself."""

from collections.abc import Callable

from .. import _tree
from .._tree import Tree


def run(
    f: Callable[[Tree, Tree], tuple[Tree, Tree]], init: Tree, xs: Tree, steps: range
) -> tuple[Tree, list[Tree]]:
    """Run the body for each step in order; return the last carry and every y, by step."""
    carry, ys = init, []
    for t in steps:
        carry, y = f(carry, _tree.map(lambda leaf, t=t: leaf[t], xs))
        ys.append(y)
    return carry, ys[:: steps.step]
