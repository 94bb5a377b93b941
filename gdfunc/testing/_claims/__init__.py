"""Claims: what a subject can say that it is."""

from ._base import Claim as Claim
from ._linear import GradientDescent as GradientDescent
from ._linear import Momentum as Momentum
