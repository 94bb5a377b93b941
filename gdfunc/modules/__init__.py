"""`torch.nn.Module` in and out: a module, or an ensemble of them, as a pure function of its parameters."""

from ._ensemble import Prediction as Prediction
from ._ensemble import member as member
from ._ensemble import predict as predict
from ._ensemble import stack as stack
from ._functional import Functional as Functional
from ._functional import functional as functional
from ._functional import state_dict as state_dict
from ._init import init as init
