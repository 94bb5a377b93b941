"""Steps that need more than the gradient: the loss, lr, the new parameters, or the numbers of samples.

    step = gd.methods.saga(loss_fn, data)
    final, trajectory = gd.train(step, step.init(params), torch.arange(n), index, lr)

Every one is a `Step`. In every state `params` is where the next loss is measured, so that
`Trajectory.params[t]` belongs to `loss[t]`. An average of the parameters is kept beside it.
"""

from ._averaging import asgd as asgd
from ._averaging import ema as ema
from ._averaging import lookahead as lookahead
from ._averaging import schedule_free as schedule_free
from ._heavy_ball import heavy_ball as heavy_ball
from ._lbfgs import lbfgs as lbfgs
from ._line_search import line_search as line_search
from ._line_search import polyak as polyak
from ._sam import sam as sam
from ._variance_reduction import sag as sag
from ._variance_reduction import saga as saga
from ._variance_reduction import sarah as sarah
from ._variance_reduction import svrg as svrg
