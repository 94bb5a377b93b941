"""Claims: what a subject can say that it is."""

from ._adaptive import AdaBelief as AdaBelief
from ._adaptive import Adadelta as Adadelta
from ._adaptive import Adagrad as Adagrad
from ._adaptive import Adam as Adam
from ._adaptive import Adamax as Adamax
from ._adaptive import NAdam as NAdam
from ._adaptive import RAdam as RAdam
from ._adaptive import RMSprop as RMSprop
from ._adaptive import Yogi as Yogi
from ._base import Claim as Claim
from ._linear import GradientDescent as GradientDescent
from ._linear import Momentum as Momentum
