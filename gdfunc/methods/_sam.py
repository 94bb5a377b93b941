"""Sharpness-aware minimisation."""

from torch import Tensor

from .. import _tree
from .._errors import check_scalar
from .._gradients import LossFn, batch_grad
from .._numerics import safe_ratio
from .._step import Step, TrainState, apply_updates, copy_params
from .._transforms._base import GradientTransformation, chain, check_transform
from .._tree import Tree
from ._scalars import scalar

_PLAIN = chain()


def sam(
    loss_fn: LossFn,
    transform: GradientTransformation = _PLAIN,
    *,
    rho: float | Tensor = 0.05,
    adaptive: bool = False,
) -> Step:
    """Make the step of sharpness-aware minimisation, which takes its gradient a little uphill.

    ε = ρ·g/‖g‖ with g = ∇L(θ);  u, s' = update(∇L(θ + ε), s, θ);  θ' = θ − lr·u

    The adaptive form measures the distance uphill in units of each parameter: ε = ρ·θ²g/‖θg‖, entry by
    entry. Where the gradient is zero, ε = 0.

    Args:
        loss_fn: `(params, batch) -> loss`; see `batch_grad`. It is differentiated twice a step.
        transform: what to do with the gradient found uphill.
        rho: ρ, how far uphill, a number >= 0 or a 0-d tensor.
        adaptive: whether to use the adaptive form.

    Returns:
        A `Step`, whose state is a `TrainState`. The loss, and the gradient norm that `train` records, are
        those at θ.

    Raises:
        ValueError: rho is out of range; (in the step) as `make_step`.
        TypeError: (in the step) the state is that of another step.

    Example:
        >>> step = gd.methods.sam(lambda w, batch: 0.5 * w**2, rho=0.5)
        >>> step(step.init(torch.tensor(1.0)), None, 0.1)
        (TrainState(params=tensor(0.8500), opt_state=()), tensor(0.5000))

    References:
        P. Foret et al., "Sharpness-aware minimization for efficiently improving generalization", 2021.
        J. Kwon et al., "ASAM: adaptive sharpness-aware minimization for scale-invariant learning of deep
        neural networks", 2021.
    """
    check_transform(transform)
    rho = check_scalar("rho", rho, "[0, inf)")
    gradients = batch_grad(loss_fn)

    def init(params: Tree) -> TrainState:
        params = copy_params(params)
        return TrainState(params, transform.init(params))

    def advance(state: TrainState, batch: Tree, lr: float | Tensor) -> tuple[TrainState, Tensor, Tree]:
        params, opt_state = state
        grads, loss = gradients(params, batch)
        uphill, length = grads, _tree.norm(grads)
        if adaptive:
            uphill = _tree.map(lambda p, g: p**2 * g, params, grads)
            length = _tree.norm(_tree.map(lambda p, g: p * g, params, grads))
        away = safe_ratio(scalar(rho, params), length)
        uphill_grads, _ = gradients(apply_updates(params, uphill, -away), batch)
        updates, opt_state = transform.update(uphill_grads, opt_state, params)
        return TrainState(apply_updates(params, updates, lr), opt_state), loss, grads

    return Step(init, advance, TrainState)
