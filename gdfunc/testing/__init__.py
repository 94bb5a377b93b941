"""The convergence kit: sharp theorems as tests, for any optimizer.

Example:
    >>> from gdfunc import testing as gt
    >>> def init(params):
    ...     return torch.zeros_like(params)
    >>> def update(grads, m, params, lr):
    ...     m = 0.9 * m + grads
    ...     return params - lr * m, m
    >>> mine = gt.subject(lambda params: gd._tree.map(torch.zeros_like, params), update)
"""

from ._claims import Claim as Claim
from ._claims import GradientDescent as GradientDescent
from ._claims import Momentum as Momentum
from ._controls import WRONG as WRONG
from ._controls import Control as Control
from ._law import LAWS as LAWS
from ._law import LawBroken as LawBroken
from ._law import NotApplicable as NotApplicable
from ._laws import check_dtype as check_dtype
from ._laws import check_kernel as check_kernel
from ._laws import check_purity as check_purity
from ._rates import Rate as Rate
from ._rates import measure_rate as measure_rate
from ._report import Report as Report
from ._report import check_optimizer as check_optimizer
from ._report import examine as examine
from ._report import measure_power as measure_power
from ._subject import Run as Run
from ._subject import Subject as Subject
from ._subject import feed as feed
from ._subject import from_step as from_step
from ._subject import from_torch as from_torch
from ._subject import from_transform as from_transform
from ._subject import run as run
from ._subject import subject as subject
