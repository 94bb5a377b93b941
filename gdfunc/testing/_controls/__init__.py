"""Optimizers with one planted fault each, by family."""

from . import _linear
from ._base import Control as Control

WRONG: dict[str, Control] = {control.name: control for room in (_linear,) for control in room.CONTROLS}
