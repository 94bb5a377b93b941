"""The store of torch.distributed's process group, in which ranks leave words for one another."""

from typing import Any

import torch.distributed as dist


def store() -> Any:
    """Return the store that the processes of the default group share."""
    return dist.distributed_c10d._get_default_store()
