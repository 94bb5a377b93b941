"""The default process group of torch.distributed: its store, and how many collectives it has begun."""

from typing import Any

import torch.distributed as dist


def store() -> Any:
    """Return the store that the processes of the default group share."""
    return dist.distributed_c10d._get_default_store()


def collectives() -> int:
    """Return how many collectives this process has begun: as many as every other, unless one has failed."""
    group: Any = dist.distributed_c10d._get_default_group()
    return int(group._get_sequence_number_for_group())
