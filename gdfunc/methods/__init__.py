"""Steps that need more than the gradient: the loss, lr, the new parameters, or the numbers of samples.

Every one is a `Step`. In every state `params` is where the next loss is measured, so that
`Trajectory.params[t]` belongs to `loss[t]`. An average of the parameters is a field of its own.

| gd.methods | torch | optax |
|---|---|---|
| `heavy_ball`, `nesterov`, `ogm`, `triple_momentum` | | |
| `asgd`, `ema`, `lookahead` | `ASGD`, `swa_utils.AveragedModel` | `ema`, `lookahead` |
| `reduce_on_plateau` | `lr_scheduler.ReduceLROnPlateau` | `contrib.reduce_on_plateau` |
| `schedule_free` | | `contrib.schedule_free` |
| `sam` | | `contrib.sam` |
| `line_search`, `polyak` | | `scale_by_backtracking_linesearch`, `polyak_sgd` |
| `lbfgs` | `LBFGS(line_search_fn="strong_wolfe")` | `lbfgs` |
| `gauss_newton`, `levenberg_marquardt` | | |
| `prodigy`, `mechanic` | | `contrib.prodigy`, `contrib.mechanize` |
| `sophia` | | `contrib.sophia` |
| `projected` (onto one of `gd.projections`), `add_noise` | | `projections`, `add_noise` |
| `svrg`, `sarah`, `sag`, `saga` | (asked for in pytorch#6657) | |

`train` gives a `StuckWarning` where a run of `lbfgs` or `levenberg_marquardt` ends at a point from which it
cannot move.

The last four reduce the variance of a finite sum, and must know its samples. They close over the data,
and their batches are row numbers:

Example:
    >>> problem = gd.problems.stock_regression()
    >>> step = gd.methods.saga(problem.loss_fn, problem.data)
    >>> index = gd.epoch_batches(gd.random.key(0), n=389, batch_size=30, epochs=20)
    >>> state, _ = gd.train(step, step.init(problem.params), torch.arange(389), index, 0.05)
    >>> bool(problem.loss_fn(state.params, problem.data) / problem.minimum - 1 < 1e-6)
    True

    >>> step = gd.methods.svrg(problem.loss_fn, problem.data, batch_size=30)
    >>> passes = index.reshape(10, -1)  # a step is a full gradient and a pass of 24 mini-batches
    >>> params, _ = gd.train(step, step.init(problem.params), torch.arange(389), passes, 0.05)
    >>> bool(problem.loss_fn(params, problem.data) / problem.minimum - 1 < 1e-6)
    True
"""

from ._averaging import asgd as asgd
from ._averaging import ema as ema
from ._averaging import lookahead as lookahead
from ._averaging import schedule_free as schedule_free
from ._constrained import add_noise as add_noise
from ._constrained import projected as projected
from ._direction import line_search as line_search
from ._direction import polyak as polyak
from ._direction import sam as sam
from ._least_squares import gauss_newton as gauss_newton
from ._least_squares import levenberg_marquardt as levenberg_marquardt
from ._lr_free import mechanic as mechanic
from ._lr_free import prodigy as prodigy
from ._momentum import heavy_ball as heavy_ball
from ._momentum import nesterov as nesterov
from ._momentum import ogm as ogm
from ._momentum import triple_momentum as triple_momentum
from ._plateau import reduce_on_plateau as reduce_on_plateau
from ._sophia import sophia as sophia
from ._variance_reduction import sag as sag
from ._variance_reduction import saga as saga
from ._variance_reduction import sarah as sarah
from ._variance_reduction import svrg as svrg
from ._wolfe import lbfgs as lbfgs
