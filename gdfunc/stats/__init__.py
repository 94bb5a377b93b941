"""Statistics of per-sample gradients: the noise of a step, a good batch size, and the samples that matter.

`spread`, `gsnr` and `cosines` are reducers for `reduce_per_sample`. `spread` gives a few numbers, a
`Spread`, of which the other statistics are functions, entry by entry. So a run records it once, and all
of them follow for every step:

    noise = gd.reduce_per_sample(loss_fn, gd.stats.spread())
    record = {"loss": "loss", "spread": lambda params, loss: noise(params, data)[0]}
    final, trajectory = gd.train(step, params, data, index, lr, record=record)
    gd.stats.noise_scale(trajectory.spread)  # [T]

A single sample has no variance: statistics that need one are NaN then, and a warning says so.
"""

from ._batch_size import Verdict as Verdict
from ._batch_size import cabs as cabs
from ._batch_size import diversity as diversity
from ._batch_size import inner_product_test as inner_product_test
from ._batch_size import noise_scale as noise_scale
from ._batch_size import norm_test as norm_test
from ._batch_size import orthogonality_test as orthogonality_test
from ._batch_size import two_batch as two_batch
from ._influence import influence as influence
from ._influence import ranks as ranks
from ._influence import self_influence as self_influence
from ._spread import Spread as Spread
from ._spread import cosines as cosines
from ._spread import gsnr as gsnr
from ._spread import spread as spread
