"""Learning rates as functions of the step: `count -> lr`.

A schedule is pure and vectorised: `schedule(torch.arange(T))` is the array [T] that `train` takes as lr,
and `schedule(t)` is its entry t. Nothing in it is about learning rates alone: any other hyperparameter is
scheduled by scanning such an array beside the batches.

All of them take a count (an int >= 0, or an integer tensor of any shape, whose values are not read) and
return a float tensor of its shape. They work in float64. If lr is a tensor, the result is rounded once, at
the end, to lr's dtype, and lies on lr's device. Scalars may be numbers or 0-d tensors, so that a schedule
can be vmapped over them and differentiated with respect to them; what counts steps is a Python int.
"""

from ._cosine import cosine_annealing as cosine_annealing
from ._cosine import cosine_with_restarts as cosine_with_restarts
from ._cosine import one_cycle as one_cycle
from ._decay import constant as constant
from ._decay import exponential as exponential
from ._decay import inverse_time as inverse_time
from ._decay import lambda_ as lambda_
from ._decay import linear as linear
from ._decay import multi_step as multi_step
from ._decay import polynomial as polynomial
from ._decay import step as step
from ._joined import sequential as sequential
from ._joined import warmup as warmup
