"""Learning rates as functions of the count: `schedule(torch.arange(T))` is the lr that `train` takes.

| gd.schedules | torch.optim.lr_scheduler | optax |
|---|---|---|
| `constant`, `linear` | `ConstantLR`, `LinearLR` | `constant_schedule`, `linear_schedule` |
| `polynomial` | `PolynomialLR` | `polynomial_schedule` |
| `step`, `multi_step` | `StepLR`, `MultiStepLR` | `piecewise_constant_schedule` |
| `exponential` | `ExponentialLR` | `exponential_decay` |
| `cosine_annealing` | `CosineAnnealingLR` | `cosine_decay_schedule` |
| `cosine_with_restarts` | `CosineAnnealingWarmRestarts` | `sgdr_schedule` |
| `one_cycle` | `OneCycleLR` | `cosine_onecycle_schedule` |
| `inverse_time` (1/t of Robbins and Monro), `lambda_` | `LambdaLR` | |
| `warmup`, `sequential` | `LinearLR`, `SequentialLR` | `warmup_…`, `join_schedules` |

A schedule is pure and vectorised: `schedule(torch.arange(T))` is the array [T] that `train` takes as lr,
and `schedule(t)` is its entry t. Any other hyperparameter is scheduled the same way, by scanning
such an array with the batches.

All schedules take a count (an int >= 0, or an integer tensor of any shape, whose values are not read) and
return a float tensor of its shape. They work in float64. If lr is a tensor, the result is rounded once, at
the end, to lr's dtype, and lies on lr's device. Scalars may be numbers or 0-d tensors, so that a schedule
can be vmapped over them and differentiated with respect to them; what counts steps is a Python int.

Example:
    >>> problem = gd.problems.stock_regression()
    >>> step = gd.make_step(problem.loss_fn, gd.chain(gd.clip_by_global_norm(1.0), gd.adamw()))
    >>> index = gd.epoch_batches(gd.random.key(0), n=389, batch_size=30, epochs=20)
    >>> lrs = gd.schedules.one_cycle(0.1, total_steps=len(index))(torch.arange(len(index)))
    >>> state, _ = gd.train(step, step.init(problem.params), problem.data, index, lrs)
    >>> bool(problem.loss_fn(state.params, problem.data) < 2 * problem.minimum)
    True
"""

from ._formulas import constant as constant
from ._formulas import cosine_annealing as cosine_annealing
from ._formulas import cosine_with_restarts as cosine_with_restarts
from ._formulas import exponential as exponential
from ._formulas import inverse_time as inverse_time
from ._formulas import lambda_ as lambda_
from ._formulas import linear as linear
from ._formulas import multi_step as multi_step
from ._formulas import one_cycle as one_cycle
from ._formulas import polynomial as polynomial
from ._formulas import step as step
from ._schedule import sequential as sequential
from ._schedule import warmup as warmup
