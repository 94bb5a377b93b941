"""The ranks of a run: what torch.distributed says of them. Without a process group there is one rank."""

import os

import torch.distributed as dist

from .._errors import GdfuncError


class RankError(GdfuncError, RuntimeError):
    """The ranks of a run are not all there, or differ in what must be the same on all of them.

    Example:
        >>> issubclass(gd.distributed.RankError, RuntimeError)
        True
    """


def rank() -> int:
    """Return the number of this process among those of the run; 0 for one alone.

    Example:
        >>> gd.distributed.rank()
        0
    """
    return dist.get_rank() if is_grouped() else 0


def world_size() -> int:
    """Return how many processes share the run; 1 for one alone.

    Example:
        >>> gd.distributed.world_size()
        1
    """
    return dist.get_world_size() if is_grouped() else 1


def is_grouped() -> bool:
    """Tell whether torch.distributed has a process group."""
    return dist.is_available() and dist.is_initialized()


def check_ranks(number: int) -> None:
    """Refuse another number of ranks than there was when a loss was made for them."""
    if number != world_size():
        raise RankError(
            f"data_parallel was called where the number of ranks was {number}, but now it is "
            f"{world_size()}; call it after torch.distributed.init_process_group"
        )


def check_group(what: str, remedy: str = "") -> None:
    """Refuse processes of torchrun that have formed no group: each would take itself for the only one."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and not is_grouped():
        raise RankError(
            f"torchrun started {started} processes, but they form no group: call "
            f"torch.distributed.init_process_group('gloo') before {what}{remedy}"
        )
