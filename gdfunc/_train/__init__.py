"""A training run."""

from ._train import train as train
from ._trajectory import Trajectory as Trajectory
