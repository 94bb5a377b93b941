"""The record of a run."""

from types import SimpleNamespace
from typing import NoReturn

from torch import Tensor

from .. import _html, _tree, checkpoint
from .._shown import shown
from .._torch._transforms import is_transformed


class Trajectory(SimpleNamespace):
    """The records of a run: one attribute for each, a tree with leading [T].

    `step` [T] holds the numbers of the recorded steps. Record t is taken before step t: `params[t]` is
    where `loss[t]` was measured. A drawn path is `params` followed by the run's final parameters.

    A run with `evaluate=` adds what it evaluated, with leading [T/k], and `evaluated` [T/k], the numbers of
    steps taken by then. One with `stop=` adds `steps`, the number of steps it took (int64), and `diverged`,
    whether the loss of the next step was not finite (bool); with `gd.stops.patience` also `best`, its best
    carry. A Trajectory is a tree, so it goes through `torch.func.vmap` and `grad`.

    Example:
        >>> trajectory = gd.Trajectory(step=torch.arange(2), loss=torch.tensor([4.0, 1.0]))
        >>> trajectory.loss
        tensor([4., 1.])
        >>> trajectory
        Trajectory(step=int64[2], loss=float32[2])
    """

    def __repr__(self) -> str:
        shapes = _tree.map(_Shape, vars(self))
        return f"Trajectory({', '.join(f'{name}={shape}' for name, shape in shapes.items())})"

    def _repr_html_(self) -> str:
        """Show in a notebook each record, and the curve of those that are one number a step."""
        dims = self.step.ndim if "step" in vars(self) else 1
        rows = []
        for path, leaf in _tree.named_leaves(vars(self), ""):
            name = path.removeprefix("['").replace("']", "", 1)
            is_record = name not in ("step", "evaluated") and not name.startswith("best.")
            is_curve = is_record and leaf.ndim == dims and leaf.numel() and not leaf.is_complex()
            drawn = _html.Markup()
            if is_curve and not is_transformed(leaf):
                drawn = _html.curves(leaf.detach().cpu().double().reshape(-1, leaf.shape[-1]).numpy())
            rows.append((name, shown(leaf), drawn))
        return _html.table("Trajectory", ("record", "shape", "curve"), rows)

    def __getattr__(self, name: str) -> NoReturn:
        recorded = ", ".join(vars(self))
        none = "" if len(vars(self).get("step", [0])) else ", of a run that took no step"
        raise AttributeError(f"{name} was not recorded: train(..., record=) kept {recorded}{none}")


_tree.register(Trajectory, flatten=vars, unflatten=lambda records: Trajectory(**records))
checkpoint.register(Trajectory)


class _Shape:
    """A leaf's dtype and shape, as text."""

    def __init__(self, leaf: Tensor) -> None:
        self.text = shown(leaf)

    def __repr__(self) -> str:
        return self.text
