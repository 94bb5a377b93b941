"""The convergence kit: sharp theorems as tests, for any optimizer.

A *subject* is an optimizer under test. `subject` takes one written by hand; `from_torch`, `from_optax`,
`from_transform` and `from_step` take others. A *claim* says what it is, such as `Momentum(0.9)`, and knows
the answer in closed form, in NumPy. A *law* is a function `check_…(subject, claim)`, which raises
`LawBroken` with the step, both numbers, the formula, a diagnosis, and a line that repeats the failure.
`check_optimizer` holds a subject against every law that applies.

The strongest law is `check_kernel`. On linear losses the gradient does not depend on the parameters, so
the moves are the optimizer's whole answer to chosen gradients, and `feed` returns them.

Textbook bounds are loose: an optimizer with half the learning rate passes most of them. Here a bound is
tried on the problem that attains it, where it is an equality (`check_worst_case`, `check_contraction`,
`check_double_root` …). `FixedCoefficients()` is the claim of a method that is linear in its gradients and
has no other: its path on every quadratic follows from its moves on linear losses.

Laws called with a subject and a claim alone try problems of their own. Most take a problem, too, and
`quadratics()`, `hubers()`, `rates()` and their kin draw them for Hypothesis. Their constants are dyadic, so
that a failure shrinks to numbers that can be read.

`check_batches` is the kernel's law on mini-batches of a `FiniteSum`, also for SVRG, SARAH, SAGA and SAG.
The mean over `all_plans` of a small sum is an exact expectation.

A method for least squares is made of residuals, as in `from_step(gd.methods.gauss_newton)`, and claims to
be `GaussNewton()` or `LevenbergMarquardt()`. `check_fit` holds it against dense solutions.

Some laws are not about optimizers, and take what they judge as their first argument: random numbers
(`check_noise`, `check_indices`), plans (`check_permutation`, `check_epochs`), schedules (`check_schedule`),
derivatives of runs (`check_hypergradient`), projections (`check_projection`) and private steps
(`check_private_step`, `check_quantile`).

`WRONG` holds negative controls, optimizers with one planted fault each, and `measure_power` prints
which laws find them. A diagnosis names the control that moves alike.

`LAWS` lists the laws about optimizers, and `vars(gdfunc.testing)` every name. Claims have the names of
their methods: `Adam`, `RMSprop`, `Momentum`, `EMA` … Other names:

subjects: `subject`, `from_torch`, `from_optax`, `from_transform`, `from_step`
runs: `feed`, `run` → `Run`, `walk`, `measure_rate` → `Rate`
verdicts: `check_optimizer`, `examine` → `Report`, `measure_power` → `Power`, `LawBroken`,
`NotApplicable`
problems: `Quadratic`, `Huber`, `worst_huber`, `Logistic`, `PLSine`, `TriangularWave`, and for methods of
least squares `Fit`
sums: `FiniteSum`, `least_squares`, `sharp_pair`, `all_plans`
for Hypothesis: `quadratics`, `hubers`, `logistic_regressions`, `pl_problems`, `smooth_nonconvex`, `rates`,
`dyadics`, `finite_sums`, `least_squares_sums`, `plans`, `keys`, `params_trees`, `hostile_values`
claims of claims: `Chain`, `WeightDecay`, `Masked`, `Partition`, `Accumulate`, `ApplyIfFinite`, `EMA`,
`Lookahead`, `ScheduleFree`, `Mechanic`, `Projected`, `Langevin`

Example:
    >>> from gdfunc import testing as gt
    >>> def update(grads, m, params, lr):
    ...     m = 0.9 * m + 0.1 * grads
    ...     return params - lr * m, m
    >>> mine = gt.subject(torch.zeros_like, update)
    >>> try:
    ...     gt.check_optimizer(mine, gt.Momentum(0.9))
    ... except gt.LawBroken as broken:
    ...     print(broken.diagnosis)
    the effective learning rate is 0.1 lr
    >>> descent = gt.from_step(gd.make_step)
    >>> gt.check_quadratic(descent, gt.GradientDescent(), gt.Quadratic((1.0, 4.0)), lr=0.25)
    >>> gt.measure_rate([0.5**t for t in range(20)]).kind
    'linear'
"""

from ._claims import ASGD as ASGD
from ._claims import EMA as EMA
from ._claims import LAMB as LAMB
from ._claims import LARS as LARS
from ._claims import LBFGS as LBFGS
from ._claims import OGM as OGM
from ._claims import SAG as SAG
from ._claims import SAGA as SAGA
from ._claims import SAM as SAM
from ._claims import SARAH as SARAH
from ._claims import SVRG as SVRG
from ._claims import Accumulate as Accumulate
from ._claims import AdaBelief as AdaBelief
from ._claims import Adadelta as Adadelta
from ._claims import Adafactor as Adafactor
from ._claims import Adagrad as Adagrad
from ._claims import Adam as Adam
from ._claims import Adamax as Adamax
from ._claims import AdaptiveClip as AdaptiveClip
from ._claims import AdEMAMix as AdEMAMix
from ._claims import ApplyIfFinite as ApplyIfFinite
from ._claims import Chain as Chain
from ._claims import Claim as Claim
from ._claims import ClipByGlobalNorm as ClipByGlobalNorm
from ._claims import ClipByValue as ClipByValue
from ._claims import DoG as DoG
from ._claims import FixedCoefficients as FixedCoefficients
from ._claims import GaussNewton as GaussNewton
from ._claims import GradientDescent as GradientDescent
from ._claims import Langevin as Langevin
from ._claims import LevenbergMarquardt as LevenbergMarquardt
from ._claims import LineSearch as LineSearch
from ._claims import Lion as Lion
from ._claims import Lookahead as Lookahead
from ._claims import Masked as Masked
from ._claims import Mechanic as Mechanic
from ._claims import Momentum as Momentum
from ._claims import Muon as Muon
from ._claims import NAdam as NAdam
from ._claims import Nesterov as Nesterov
from ._claims import Partition as Partition
from ._claims import Polyak as Polyak
from ._claims import Prodigy as Prodigy
from ._claims import Projected as Projected
from ._claims import RAdam as RAdam
from ._claims import RMSprop as RMSprop
from ._claims import Rprop as Rprop
from ._claims import ScheduleFree as ScheduleFree
from ._claims import Sign as Sign
from ._claims import TripleMomentum as TripleMomentum
from ._claims import TrustRatio as TrustRatio
from ._claims import WeightDecay as WeightDecay
from ._claims import Wolfe as Wolfe
from ._claims import Yogi as Yogi
from ._controls import WRONG as WRONG
from ._controls import Control as Control
from ._law import LAWS as LAWS
from ._law import LawBroken as LawBroken
from ._law import NotApplicable as NotApplicable
from ._laws import check_answer as check_answer
from ._laws import check_armijo as check_armijo
from ._laws import check_batch_variance as check_batch_variance
from ._laws import check_batches as check_batches
from ._laws import check_clip as check_clip
from ._laws import check_contraction as check_contraction
from ._laws import check_cycle as check_cycle
from ._laws import check_descent_sandwich as check_descent_sandwich
from ._laws import check_double_root as check_double_root
from ._laws import check_drift as check_drift
from ._laws import check_dtype as check_dtype
from ._laws import check_epochs as check_epochs
from ._laws import check_exact_line_search as check_exact_line_search
from ._laws import check_fit as check_fit
from ._laws import check_flip as check_flip
from ._laws import check_full_batch as check_full_batch
from ._laws import check_huber as check_huber
from ._laws import check_hypergradient as check_hypergradient
from ._laws import check_indices as check_indices
from ._laws import check_kernel as check_kernel
from ._laws import check_langevin as check_langevin
from ._laws import check_lbfgs as check_lbfgs
from ._laws import check_linearity as check_linearity
from ._laws import check_lr_change as check_lr_change
from ._laws import check_minimum as check_minimum
from ._laws import check_noise as check_noise
from ._laws import check_noise_average as check_noise_average
from ._laws import check_noise_floor as check_noise_floor
from ._laws import check_nonconvex as check_nonconvex
from ._laws import check_permutation as check_permutation
from ._laws import check_pl as check_pl
from ._laws import check_polyak as check_polyak
from ._laws import check_private_step as check_private_step
from ._laws import check_projection as check_projection
from ._laws import check_purity as check_purity
from ._laws import check_quadratic as check_quadratic
from ._laws import check_quantile as check_quantile
from ._laws import check_reshuffling as check_reshuffling
from ._laws import check_rest as check_rest
from ._laws import check_resume as check_resume
from ._laws import check_rotation as check_rotation
from ._laws import check_sam as check_sam
from ._laws import check_scale as check_scale
from ._laws import check_schedule as check_schedule
from ._laws import check_second_moment as check_second_moment
from ._laws import check_sgd_bound as check_sgd_bound
from ._laws import check_sign_descent as check_sign_descent
from ._laws import check_silver as check_silver
from ._laws import check_step as check_step
from ._laws import check_subgradient as check_subgradient
from ._laws import check_unbiased as check_unbiased
from ._laws import check_variance_identity as check_variance_identity
from ._laws import check_vmap as check_vmap
from ._laws import check_wolfe as check_wolfe
from ._laws import check_worst_case as check_worst_case
from ._problems import Fit as Fit
from ._problems import Huber as Huber
from ._problems import Logistic as Logistic
from ._problems import PLSine as PLSine
from ._problems import Problem as Problem
from ._problems import Quadratic as Quadratic
from ._problems import TriangularWave as TriangularWave
from ._problems import walk as walk
from ._problems import worst_huber as worst_huber
from ._rates import Rate as Rate
from ._rates import measure_rate as measure_rate
from ._report import Power as Power
from ._report import Report as Report
from ._report import check_optimizer as check_optimizer
from ._report import examine as examine
from ._report import measure_power as measure_power
from ._strategies import dyadics as dyadics
from ._strategies import finite_sums as finite_sums
from ._strategies import hostile_values as hostile_values
from ._strategies import hubers as hubers
from ._strategies import keys as keys
from ._strategies import least_squares_sums as least_squares_sums
from ._strategies import logistic_regressions as logistic_regressions
from ._strategies import params_trees as params_trees
from ._strategies import pl_problems as pl_problems
from ._strategies import plans as plans
from ._strategies import quadratics as quadratics
from ._strategies import rates as rates
from ._strategies import smooth_nonconvex as smooth_nonconvex
from ._subject import Run as Run
from ._subject import Subject as Subject
from ._subject import feed as feed
from ._subject import from_optax as from_optax
from ._subject import from_step as from_step
from ._subject import from_torch as from_torch
from ._subject import from_transform as from_transform
from ._subject import run as run
from ._subject import subject as subject
from ._sums import FiniteSum as FiniteSum
from ._sums import all_plans as all_plans
from ._sums import least_squares as least_squares
from ._sums import sharp_pair as sharp_pair
