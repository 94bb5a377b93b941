from ._grid import grid as grid
from ._result import SweepResult as SweepResult
from ._sweep import sweep as sweep
