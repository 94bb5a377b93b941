"""The interface of an adjoint to `scan` and `train`, and `Reverse`, the default."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from .._tree import Tree
from ._body import Leaves
from ._loop import Bound


class Segments(NamedTuple):
    """The plan of an adjoint for a run in segments, each of which is a loop over blocks of steps."""

    constant: int  # the number of first steps that derivatives do not go through
    adjoint: "Adjoint"  # of the segments after those steps
    grain: int  # a segment is a multiple of so many blocks


class Adjoint(ABC):
    """A way for derivatives to go back through a loop."""

    def run_loop(self, loop: Bound, consts: Leaves, init: Leaves, xs: Leaves) -> list[Tensor]:
        """Run a traced loop of at least one step, forward or reversed. Its derivative is this adjoint's."""
        if not loop.reverse:
            return self.run_forward(loop, consts, init, xs)
        results = self.run_forward(replace(loop, reverse=False), consts, init, [x.flip(0) for x in xs])
        return [*results[: len(init)], *[y.flip(0) for y in results[len(init) :]]]

    counts_from_end: ClassVar[bool] = False  # whether the planned number of steps governs the derivative

    @abstractmethod
    def run_forward(self, loop: Bound, consts: Leaves, init: Leaves, xs: Leaves) -> list[Tensor]:
        """Run a loop that goes forward."""

    def segments(self, steps: int, every: int) -> Segments:
        """Plan a run in segments, whose blocks have `every` steps."""
        return Segments(0, self, 1)

    def end(self, last_step: Callable[["Adjoint"], Tree], init: Tree, final: Tree) -> Tree:
        """Return the carry after the last segment, as derivatives see it.

        `last_step(adjoint)` takes the last step of the run once more, from that carry.
        """
        return final

    def check_steps(self, steps: int) -> None:  # noqa: B027
        """Refuse a run that is too short."""


@dataclass(frozen=True)
class Reverse(Adjoint):
    """Go back from the last step to the first, and keep the carry before each step.

        λ_t = λ_{t+1} ∂Φ_t/∂θ_t,  dF/dφ = ∂F/∂φ + Σ_t λ_{t+1} ∂Φ_t/∂φ,  λ_T = ∂F/∂θ_T

    It costs a few times the time of the run, for any number of arguments, and memory O(T).

    Example:
        >>> def double(carry, x, adjoint=gd.adjoints.Reverse()):
        ...     return gd.scan(lambda c, x: (c * x, None), carry, x, adjoint=adjoint)[0]
        >>> torch.func.grad(double)(torch.tensor(1.0), torch.tensor([2.0, 3.0]))
        tensor(6.)

    References:
        D. Maclaurin, D. Duvenaud, R. Adams, "Gradient-based hyperparameter optimization through reversible
        learning", 2015.
    """

    def run_forward(self, loop: Bound, consts: Leaves, init: Leaves, xs: Leaves) -> list[Tensor]:
        return loop(*consts, *init, *xs)

    run_loop = run_forward  # a Bound reverses the order of the steps by itself


def check_adjoint(adjoint: Any) -> Adjoint:
    """Return an adjoint that a loop can follow."""
    if isinstance(adjoint, Adjoint):
        return adjoint
    raise TypeError(
        f"adjoint must be Reverse(), Checkpoint(...), Truncated(...) or Implicit(...) of gd.adjoints; "
        f"got {adjoint!r}"
    )
