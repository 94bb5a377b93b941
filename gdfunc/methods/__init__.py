"""Methods that no gradient transformation can be: they need the loss, lr, or the new parameters."""

from ._averaging import ema as ema
from ._averaging import lookahead as lookahead
from ._averaging import make_asgd_step as make_asgd_step
from ._averaging import make_schedule_free_step as make_schedule_free_step
from ._heavy_ball import make_heavy_ball_step as make_heavy_ball_step
from ._lbfgs import lbfgs as lbfgs
from ._lbfgs import make_lbfgs_step as make_lbfgs_step
from ._line_search import make_line_search_step as make_line_search_step
from ._line_search import make_polyak_step as make_polyak_step
from ._sam import make_sam_step as make_sam_step
from ._variance_reduction import make_sag_step as make_sag_step
from ._variance_reduction import make_saga_step as make_saga_step
from ._variance_reduction import make_sarah_step as make_sarah_step
from ._variance_reduction import make_svrg_step as make_svrg_step
