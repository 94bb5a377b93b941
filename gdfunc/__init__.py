"""Gradient descent as pure functions on torch.func.

A step is a scan body, lr is data, randomness is a key, and a run is a tree of tensors:

    final, trajectory = gd.train(gd.make_step(loss_fn), params, data, index, lr)
"""

from . import modules as modules
from . import plot as plot
from . import problems as problems
from . import random as random
from ._errors import GdfuncError as GdfuncError
from ._errors import NonFiniteError as NonFiniteError
from ._errors import TrainingInterrupted as TrainingInterrupted
from ._gradients import batch_grad as batch_grad
from ._gradients import check_mean_loss as check_mean_loss
from ._gradients import per_sample_grad as per_sample_grad
from ._sampling import epoch_batches as epoch_batches
from ._sampling import full_batch as full_batch
from ._sampling import sample_batches as sample_batches
from ._sampling import take as take
from ._scan import scan as scan
from ._step import TrainState as TrainState
from ._step import apply_updates as apply_updates
from ._step import init_state as init_state
from ._step import make_step as make_step
from ._step import make_transform_step as make_transform_step
from ._train import Trajectory as Trajectory
from ._train import train as train
from ._transforms import GradientTransformation as GradientTransformation
from ._transforms import chain as chain
from ._transforms import identity as identity
from ._transforms import scale as scale

__version__ = "0.1.0"
