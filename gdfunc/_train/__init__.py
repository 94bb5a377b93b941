"""A training run."""

from ._train import Trajectory as Trajectory
from ._train import train as train
