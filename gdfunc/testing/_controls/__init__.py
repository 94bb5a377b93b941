"""Optimizers with one planted fault each, by family."""

from . import (
    _adaptive,
    _averages,
    _constrained,
    _curved,
    _fits,
    _langevin,
    _linear,
    _lr_free,
    _norms,
    _signs,
    _sums,
    _wolfe,
    _wrappers,
)
from ._base import Control as Control

_ROOMS = (
    *(_linear, _adaptive, _signs, _norms, _wrappers, _averages, _curved, _sums, _lr_free, _constrained),
    _fits,
    _langevin,
    _wolfe,
)
WRONG: dict[str, Control] = {control.name: control for room in _ROOMS for control in room.CONTROLS}
