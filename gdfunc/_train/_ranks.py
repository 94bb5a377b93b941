"""A run whose steps several ranks take together: one run on all of them, which one of them writes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .. import _tree
from .._torch._modes import is_tracing
from .._torch._transforms import is_transforming
from .._tree import Tree
from ..distributed._apart import is_apart
from ..distributed._gather import agree, gathered
from ..distributed._group import RankError, check_ranks, rank
from ..distributed._together import taking_part
from ._batches import digest
from ._done import Done
from ._keep import settings
from ._plan import Plan

_WHOLE = (
    "give all ranks the whole data and the same plan, without a DistributedSampler or a shuffle of their "
    "own: data_parallel takes each rank's rows"
)


@contextmanager
def together(plan: Plan, first: Done) -> Iterator[None]:
    """Refuse ranks that would not take the same steps from the same state, and watch those that do.

    Of the batches, the first is compared, so that no rank reads all data for this.

    Raises:
        RankError: the ranks differ. The message names the quantity, and both values.
    """
    if not _is_shared(plan):
        yield
        return
    if is_apart():
        raise RankError(
            "a run that all ranks take together is no member of a sweep whose members the ranks share: "
            "call sweep(..., shard=False), or leave data_parallel out"
        )
    with taking_part("train"):
        _check_begin(plan, first)
        yield


def slowest(plan: Plan, seconds: float) -> float:
    """Return the longest time of all ranks, so that all end their segments at the same step."""
    if not _is_shared(plan):
        return seconds
    return max(map(float, gathered(torch.tensor(seconds, dtype=torch.float64), "the time of a segment")))


def check_end(plan: Plan, final: Tree) -> None:
    """Refuse ranks that have drifted apart. Each returns after rank 0 has written the file of the run."""
    if _is_shared(plan) and not is_transforming():  # else without values
        agree(_digests(final, "state"), "what they end with", "let all draw numbers from the same key")


def _is_shared(plan: Plan) -> bool:
    """Tell whether several ranks take the steps together."""
    if plan.ranks is None or is_tracing():
        return False
    check_ranks(plan.ranks)
    return plan.ranks > 1


def _check_begin(plan: Plan, first: Done) -> None:
    agree(plan.steps, "the number of steps")
    agree(first.step, "the step that they go on from, which a file that all can read must hold")
    for name, value in settings(plan).items():
        agree(value, name)
    if is_transforming():  # without values
        return
    agree(_digests(first.state, "state"), "what they start from")
    if first.step < plan.steps:
        row = _tree.map(lambda leaf: leaf[0], plan.batches.rows(first.step, first.step + 1))
        agree(_digests(plan.body.batch(row), "batch"), "the first batch", _WHOLE)
        agree((float(plan.lrs[first.step]), _short(plan.lrs)), "lr")


def _digests(tree: Tree, name: str) -> list[str]:
    return [f"{path} {_short(leaf)}" for path, leaf in _tree.named_leaves(tree, name)]


def _short(leaf: Tensor) -> str:
    """Return 16 hexadecimal digits for the bits of a tensor."""
    return digest(leaf)[:16]


def writes(plan: Plan) -> bool:
    """Tell whether this rank writes the files of a run."""
    return plan.ranks is None or rank() == 0
