"""A run whose steps several ranks take together: one run on all of them, which one of them writes."""

from .. import _tree
from .._torch._modes import is_tracing
from .._torch._transforms import is_transforming
from ..distributed._apart import is_apart
from ..distributed._group import RankError, agree, check_ranks, forget_word, rank
from ._batches import digest
from ._done import Done
from ._keep import settings
from ._plan import Plan


def check_same_run(plan: Plan, first: Done) -> None:
    """Refuse ranks that would not take the same steps from the same state.

    Of the batches, the first is compared, so that no rank reads all data for this.

    Raises:
        RankError: the ranks differ. The message names the quantity, and both values.
    """
    if plan.ranks is None or is_tracing():
        return
    check_ranks(plan.ranks)
    if plan.ranks == 1:
        return
    if is_apart():
        raise RankError(
            "a run that all ranks take together is no member of a sweep whose members the ranks share: "
            "call sweep(..., shard=False), or leave data_parallel out"
        )
    forget_word()
    agree(plan.steps, "the number of steps")
    agree(first.step, "the step that they go on from, which a file that all can read must hold")
    for name, value in settings(plan).items():
        agree(value, name)
    if is_transforming():  # without values
        return
    state = _tree.named_leaves(first.state, "state")
    agree([f"{path} {digest(leaf)}" for path, leaf in state], "what they start from")
    if first.step < plan.steps:
        row = _tree.map(lambda leaf: leaf[0], plan.batches.rows(first.step, first.step + 1))
        batch = plan.body.batch(row)
        agree(
            [f"{path} {digest(leaf)}" for path, leaf in _tree.named_leaves(batch, "batch")],
            "the first batch",
        )
        agree(digest(plan.lrs), "lr")


def writes(plan: Plan) -> bool:
    """Tell whether this rank writes the files of a run."""
    return plan.ranks is None or rank() == 0
