"""Statistics of per-sample gradients: the noise of a step, the size of batches, the samples that count.

`spread`, `gsnr` and `cosines` are reducers for `reduce_per_sample`. `spread` gives a few numbers, a
`Spread`. Most other statistics are functions of a `Spread`, entry by entry, so a run that records it
once has them all for every step: `noise_scale` and its form for `two_batch` norms, `norm_test`,
`inner_product_test` and `orthogonality_test` (each a `Verdict`), `cabs`, `diversity`. `influence` and
`self_influence` along a run's path, and their `ranks`, tell which samples drive the run.

A single sample has no variance. Statistics that need one are NaN then, and a warning says so.

Example:
    >>> problem = gd.problems.stock_regression()
    >>> noise = gd.reduce_per_sample(problem.loss_fn, gd.stats.spread())
    >>> record = {"loss": "loss", "spread": lambda params, loss: noise(params, problem.data)[0]}
    >>> index = gd.epoch_batches(gd.random.key(0), n=389, batch_size=30, epochs=5)
    >>> step = gd.make_step(problem.loss_fn)
    >>> final, trajectory = gd.train(step, problem.params, problem.data, index, 0.03, record=record)
    >>> gd.stats.noise_scale(trajectory.spread).shape  # the batch size that pays off, along the run
    torch.Size([60])
"""

from ._influence import influence as influence
from ._influence import ranks as ranks
from ._influence import self_influence as self_influence
from ._spread import Spread as Spread
from ._spread import Verdict as Verdict
from ._spread import cabs as cabs
from ._spread import cosines as cosines
from ._spread import diversity as diversity
from ._spread import gsnr as gsnr
from ._spread import inner_product_test as inner_product_test
from ._spread import noise_scale as noise_scale
from ._spread import norm_test as norm_test
from ._spread import orthogonality_test as orthogonality_test
from ._spread import spread as spread
from ._spread import two_batch as two_batch
