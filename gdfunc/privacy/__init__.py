"""Differentially private descent: clip every sample's gradient, add noise to the sum, sample by Poisson.

Clipping bounds the influence of one sample on a step, and the noise hides it. An accountant, of Opacus or
of Google's dp-accounting, computes the privacy loss of a run from its `history`. The result holds for
Poisson sampling alone, so there is no history of shuffled batches:

    plan = gd.privacy.poisson_batches(key, n, rate, steps)
    step = gd.privacy.make_private_step(
        loss_fn, gd.adam(), key=noise_key, max_norm=1.0, noise_multiplier=1.1, divisor=rate * n
    )
    final, trajectory = gd.train(step, step.init(params), gd.privacy.pad(data, plan), plan.index, lr)

    accountant = opacus.accountants.RDPAccountant()
    accountant.history = gd.privacy.history(plan, noise_multiplier=1.1)
    epsilon = accountant.get_epsilon(delta=1e-5)

Two data sets count as neighbours if one has one sample more. The number of samples, the rate and the
divisor are taken as public. Losses and whatever else a run records of its batches are not private: do not
publish them. Noise and batches come from `gdfunc.random`, which is not a cryptographic generator, and sums
are floating-point: this is for research on private learning, not for releasing models trained on secrets.

`poisson_batches` makes a `PoissonPlan` of static shape for data that `pad` has made `Padded`. A
`max_norm` is a number, a tree of numbers, or a `Quantile` of the norms. The state of a private step is
a `PrivateState`. `clipped_grad` is the gradient without the noise.

Example:
    >>> problem, n, rate = gd.problems.stock_regression(), 389, 0.1
    >>> plan = gd.privacy.poisson_batches(gd.random.key(0), n, rate, steps=20)
    >>> settings = {"max_norm": 0.01, "noise_multiplier": 1.1, "divisor": rate * n}
    >>> noise_key = gd.random.key(1)
    >>> step = gd.privacy.make_private_step(problem.loss_fn, gd.momentum(0.9), key=noise_key, **settings)
    >>> data = gd.privacy.pad(problem.data, plan)
    >>> final, _ = gd.train(step, step.init(problem.params), data, plan.index, 0.3)
    >>> gd.privacy.history(plan, noise_multiplier=1.1)
    [(1.1, 0.1, 20)]

References:
    M. Abadi et al., "Deep learning with differential privacy", 2016.
    I. Mironov, "On significance of the least significant bits for differential privacy", 2012.
"""

from ._poisson import Padded as Padded
from ._poisson import PoissonPlan as PoissonPlan
from ._poisson import history as history
from ._poisson import pad as pad
from ._poisson import poisson_batches as poisson_batches
from ._private import PrivateState as PrivateState
from ._private import Quantile as Quantile
from ._private import clipped_grad as clipped_grad
from ._private import make_private_step as make_private_step
