"""Pictures of runs: descent paths over a loss, curves over steps, maps and ranks of a sweep.

`plot_descent` draws paths of one or two parameters on the loss itself, and `plot_landscape` those of any
number on a plane through them, with the losses that the plane does not show. `plot_samples` draws the loss
of every sample over one parameter, and how many of them pull it the wrong way. `path` joins the parameters
of a run for both.

Arrays and `ax` go in, artists come out. matplotlib is imported when something is drawn, and nothing global
is touched: no pyplot, no rcParams, no backend. `plot_curves(...).figure.savefig("run.png")` is a whole
script, and `plot_curves(...)` as the last line of a notebook's cell shows itself. Sizes, fonts and
colours follow matplotlib's rcParams: `with matplotlib.rc_context(gd.plot.style("paper")):`.

Runs that diverge are in every picture. `plot_curves` draws losses over steps, of many seeds or in windows,
or over a hyperparameter (`over="lr"`). `plot_grid` maps a sweep over two of its axes, numbers or names.
`plot_phase` maps the outcome of its runs: converged, falling, stalled, oscillating or diverged.
`plot_sensitivity` ranks optimizers by the range of learning rates that serve them. `plot_rate` draws a
measured rate of convergence beside its theorem. `animate` writes a GIF or an HTML page in which paths or
curves grow.

Example:
    >>> axes = gd.plot.plot_curves([torch.tensor([3.0, 2.0, 1.0])])
    >>> len(axes.lines)
    1
"""

from ._animate import animate as animate
from ._curves import plot_curves as plot_curves
from ._descent import plot_descent as plot_descent
from ._grid import plot_grid as plot_grid
from ._landscape import plot_landscape as plot_landscape
from ._phase import plot_phase as plot_phase
from ._points import path as path
from ._rate import plot_rate as plot_rate
from ._samples import plot_samples as plot_samples
from ._sensitivity import plot_sensitivity as plot_sensitivity
from ._style import style as style
