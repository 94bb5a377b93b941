"""Sweeps that decide: members that fall behind are dropped, or the next points are asked of Optuna.

`gd.sweep` runs every point of a grid to its end. `halving` judges the members at rungs, drops the worst,
and goes on with a smaller vmap of the others. Its `HalvingResult` is a `SweepResult` that also tells which
member was dropped when, and what the whole cost. Ctrl-C raises a `HalvingInterrupted`.

`ask` and `tell` let a study of Optuna choose the points: as many trials as members of one sweep. A halving
tells the study which trials were pruned, with their values at the rungs.

Under torchrun the ranks share the members of each sweep, so of each rung too; see `gd.sweep`.

Example:
    >>> problem = gd.problems.stock_regression(standardize=False)
    >>> step, plan = gd.make_step(problem.loss_fn), gd.full_batch(389, 90)
    >>> def run(lr, steps, carry):
    ...     carry = problem.params if carry is None else carry
    ...     return gd.train(step, carry, problem.data, plan[steps], lr)
    >>> lrs = torch.logspace(-2, 1, 9, dtype=torch.float64)
    >>> result = gd.search.halving(run, gd.grid(lr=lrs), rungs=[10, 30, 90], by="loss")
    >>> result.grid[result.best]
    {'lr': tensor(1.7783, dtype=torch.float64)}
    >>> result.steps.tolist()
    [10, 10, 10, 10, 30, 30, 90, 10, 10]
    >>> result.cost, result.full_cost
    (210, 810)
"""

from ._halving import halving as halving
from ._optuna import ask as ask
from ._optuna import tell as tell
from ._result import HalvingInterrupted as HalvingInterrupted
from ._result import HalvingResult as HalvingResult
