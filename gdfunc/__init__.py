"""Gradient descent as pure functions on torch.func.

A step is a scan body, lr is data, randomness is a key, and a run is a tree of tensors:

    final, trajectory = gd.train(gd.make_step(loss_fn), params, data, index, lr)
"""

from . import adjoints as adjoints
from . import curvature as curvature
from . import datasets as datasets
from . import distributed as distributed
from . import interop as interop
from . import losses as losses
from . import methods as methods
from . import modules as modules
from . import plot as plot
from . import privacy as privacy
from . import problems as problems
from . import random as random
from . import reducers as reducers
from . import schedules as schedules
from . import search as search
from . import stats as stats
from . import stops as stops
from . import tree as tree
from ._errors import BackendError as BackendError
from ._errors import GdfuncError as GdfuncError
from ._errors import NonFiniteError as NonFiniteError
from ._errors import PerformanceWarning as PerformanceWarning
from ._errors import SweepInterrupted as SweepInterrupted
from ._errors import TrainingInterrupted as TrainingInterrupted
from ._gradients import batch_grad as batch_grad
from ._gradients import check_mean_loss as check_mean_loss
from ._gradients import low_precision as low_precision
from ._gradients import per_sample_grad as per_sample_grad
from ._hypergradient import Hypergradient as Hypergradient
from ._hypergradient import hypergrad as hypergrad
from ._jit import jit as jit
from ._lazy import LazyBatches as LazyBatches
from ._lazy import lazy_batches as lazy_batches
from ._reductions._reduce import reduce_per_sample as reduce_per_sample
from ._sampling import epoch_batches as epoch_batches
from ._sampling import full_batch as full_batch
from ._sampling import sample_batches as sample_batches
from ._sampling import take as take
from ._scan import scan as scan
from ._stateful import stateful as stateful
from ._step import StatefulState as StatefulState
from ._step import Step as Step
from ._step import TrainState as TrainState
from ._step import apply_updates as apply_updates
from ._step import make_step as make_step
from ._sweep._grid import grid as grid
from ._sweep._result import SweepResult as SweepResult
from ._sweep._sweep import sweep as sweep
from ._train import Trajectory as Trajectory
from ._train import train as train
from ._transforms._adam import adabelief as adabelief
from ._transforms._adam import adam as adam
from ._transforms._adam import adamax as adamax
from ._transforms._adam import adamw as adamw
from ._transforms._adam import nadam as nadam
from ._transforms._adam import radam as radam
from ._transforms._adam import yogi as yogi
from ._transforms._averages import adadelta as adadelta
from ._transforms._averages import adagrad as adagrad
from ._transforms._averages import lion as lion
from ._transforms._averages import momentum as momentum
from ._transforms._averages import rmsprop as rmsprop
from ._transforms._averages import rprop as rprop
from ._transforms._averages import sign as sign
from ._transforms._averages import weight_decay as weight_decay
from ._transforms._base import GradientTransformation as GradientTransformation
from ._transforms._base import chain as chain
from ._transforms._base import scale as scale
from ._transforms._lbfgs import lbfgs as lbfgs
from ._transforms._norms import adaptive_clip as adaptive_clip
from ._transforms._norms import clip_by_global_norm as clip_by_global_norm
from ._transforms._norms import clip_by_value as clip_by_value
from ._transforms._norms import lamb as lamb
from ._transforms._norms import lars as lars
from ._transforms._norms import muon as muon
from ._transforms._norms import trust_ratio as trust_ratio
from ._transforms._norms import zero_nans as zero_nans
from ._transforms._wrappers import accumulate as accumulate
from ._transforms._wrappers import apply_if_finite as apply_if_finite
from ._transforms._wrappers import freeze as freeze
from ._transforms._wrappers import masked as masked
from ._transforms._wrappers import partition as partition
from .checkpoint import CheckpointCorruptError as CheckpointCorruptError
from .checkpoint import CheckpointError as CheckpointError
from .checkpoint import CheckpointVersionError as CheckpointVersionError
from .checkpoint import load as load
from .checkpoint import save as save

__version__ = "0.1.0"
