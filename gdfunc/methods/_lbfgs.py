"""L-BFGS as a step."""

from torch import Tensor

from .._gradients import LossFn
from .._step import Step, make_step
from .._transforms._lbfgs import lbfgs as lbfgs_transform


def lbfgs(loss_fn: LossFn, history: int = 10, *, eps: float | Tensor = 1e-10) -> Step:
    """Make the step of L-BFGS without a line search: `make_step(loss_fn, gd.lbfgs(history, eps=eps))`.

    θ' = θ − lr·H·∇L(θ), with H from the last few steps; see `gd.lbfgs`

    This is `torch.optim.LBFGS(max_iter=1, line_search_fn=None)` with two differences. That one stops at its
    tolerances, and it shortens only its first step, while this one shortens every step until it has a pair.

    Args:
        loss_fn: `(params, batch) -> loss`; see `batch_grad`.
        history: how many pairs to keep, an int >= 1.
        eps: the curvature that a pair must exceed, a number >= 0 or a 0-d tensor.

    Returns:
        A `Step`, whose state is a `TrainState`.

    Raises:
        ValueError: a hyperparameter is out of range; (in the step) as `make_step`.

    Example:
        >>> step = gd.methods.lbfgs(lambda w, batch: (w - 3) ** 2)
        >>> state = step.init(torch.tensor(0.0))
        >>> for _ in range(2):
        ...     state, loss = step(state, None, 1.0)
        >>> state.params
        tensor(3.)

    References:
        D. C. Liu, J. Nocedal, "On the limited memory BFGS method for large scale optimization", 1989.
    """
    return make_step(loss_fn, lbfgs_transform(history, eps=eps))
