"""Adjoints: how a derivative goes back through a loop, as an argument of `scan`, `train` and `hypergrad`.

    def run(lr, adjoint=gd.adjoints.Reverse()):
        final, _ = gd.train(step, init, data, index, lr, adjoint=adjoint)
        return loss_fn(final, data)

    torch.func.grad(run)(lr)
    gd.hypergrad(run, "lr", adjoint=gd.adjoints.Implicit("cg", 100))(0.1).residual

Let F be the number that the run ends in, θ_{t+1} = Φ_t(θ_t, φ) its steps, and J_t = ∂Φ_t/∂θ_t. Each adjoint
computes, or approximates,

    dF/dφ = ∂F/∂φ + ∂F/∂θ_T · dθ_T/dφ,  dθ_{t+1}/dφ = J_t · dθ_t/dφ + ∂Φ_t/∂φ

| adjoint | derivative | memory | time |
|---|---|---|---|
| `Reverse()` | exact | O(T) carries | a few runs |
| `Checkpoint("sqrt")` | exact | O(√T) carries | one run more |
| `Checkpoint(carries=c)` | exact | about 2c carries, for any T | a few runs more |
| `Truncated(last)` | of the last steps alone | O(last) carries | the run and its end |
| `Implicit(solver, iterations)` | at the fixed point | one step | the run and the solver |
| `Forward()`, of `hypergrad` alone | exact | one carry for each entry of φ | as many runs |

Every adjoint but `Reverse` traces the step. On the eager backend the loop then replays the trace.

Example:
    >>> problem = gd.problems.stock_regression()
    >>> step, index = gd.make_step(problem.loss_fn), gd.full_batch(389, 16)
    >>> def run(lrs, adjoint=gd.adjoints.Reverse()):
    ...     params, _ = gd.train(step, problem.params, problem.data, index, lrs, adjoint=adjoint)
    ...     return problem.loss_fn(params, problem.data)
    >>> lrs = torch.full((16,), 0.01, dtype=torch.float64)
    >>> exact = gd.hypergrad(run)(lrs).grads  # one derivative for the learning rate of each step
    >>> checkpointed = gd.hypergrad(run, adjoint=gd.adjoints.Checkpoint("sqrt"))(lrs).grads
    >>> torch.allclose(exact, checkpointed, rtol=1e-9)
    True
"""

from .._scan._adjoint import Reverse as Reverse
from ._checkpoint import Checkpoint as Checkpoint
from ._forward import Forward as Forward
from ._implicit import Implicit as Implicit
from ._truncated import Truncated as Truncated
