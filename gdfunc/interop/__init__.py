"""`torch.optim` in and out: its optimizers as steps, and transformations as its optimizers.

`from_optim` makes a `Step` of an optimizer class, for `train`. `as_optimizer` makes a
`torch.optim.Optimizer` of a transformation, for a loop in PyTorch, Lightning's `configure_optimizers` and
Hugging Face's `Trainer(optimizers=…)`.

Example:
    >>> from torch import nn
    >>> model = nn.Linear(3, 1)
    >>> transform = gd.chain(gd.clip_by_global_norm(1.0), gd.lion())
    >>> optimizer = gd.interop.as_optimizer(transform, model.parameters(), lr=1e-3)
    >>> scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
    >>> for x, y in [(torch.ones(8, 3), torch.ones(8, 1))]:
    ...     loss = nn.functional.mse_loss(model(x), y)
    ...     optimizer.zero_grad()
    ...     loss.backward()
    ...     optimizer.step()
    ...     scheduler.step()
"""

from ._as_optimizer import as_optimizer as as_optimizer
from ._from_optim import from_optim as from_optim
