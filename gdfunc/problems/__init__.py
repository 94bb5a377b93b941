"""Losses with known minimum, smoothness L and strong convexity μ.

Everything is float64 unless `dtype=` says otherwise, so that theory can be tested to the last digits. Every
loss is `loss_fn(params, batch)` like any other: the mean over the batch, 0-d. The test functions have no
data. Their losses ignore the batch, which may be left out.

Each is a `Problem`: `quadratic`, `rosenbrock`, `beale`, `rastrigin`, `himmelblau`, `linear_regression`,
`logistic_regression`, `stock_regression` (on the shares of `gd.datasets`), and the landscape `elevation`.
`nist` is a `CertifiedFit`, one of 27 nonlinear regressions with certified digits, listed by `nist_names`.

Example:
    >>> problem = gd.problems.quadratic([1.0, 4.0])
    >>> step = gd.make_step(problem.loss_fn)
    >>> params = problem.params
    >>> for _ in range(200):
    ...     params, loss = step(params, problem.data, 1 / problem.L)
    >>> bool(loss - problem.minimum < 1e-12)
    True
"""

from ._nist import CertifiedFit as CertifiedFit
from ._nist import nist as nist
from ._nist import nist_names as nist_names
from ._problem import Problem as Problem
from ._problem import beale as beale
from ._problem import elevation as elevation
from ._problem import himmelblau as himmelblau
from ._problem import quadratic as quadratic
from ._problem import rastrigin as rastrigin
from ._problem import rosenbrock as rosenbrock
from ._regression import linear_regression as linear_regression
from ._regression import logistic_regression as logistic_regression
from ._regression import stock_regression as stock_regression
