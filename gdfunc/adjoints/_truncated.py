"""Adjoints whose derivatives skip a whole loop, or its first steps."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from .. import _tree
from .._errors import check_int
from .._scan._adjoint import Adjoint, Reverse, Segments
from .._scan._body import Leaves
from .._scan._loop import Bound


@dataclass(frozen=True)
class Truncated(Adjoint):
    """Go back through the last steps alone; the carry before them is held fixed.

        dF/dφ ≈ ∂F/∂φ + Σ_{t ≥ T−last} λ_{t+1} ∂Φ_t/∂φ

    The derivative is biased, and cheap. Time and memory beyond the run's own are those of `last` steps.
    With `every=` in `train`, the derivative begins at the last recorded step before them.

    Args:
        last: how many steps, at least 1.

    Raises:
        ValueError: last is no int of at least 1.

    Example:
        >>> def run(lr, adjoint):
        ...     step = gd.make_step(lambda w, batch: (w - 1) ** 2)
        ...     return gd.train(step, torch.tensor(0.0), None, gd.full_batch(1, 8), lr, adjoint=adjoint)[0]
        >>> torch.func.grad(run)(torch.tensor(0.125), gd.adjoints.Truncated(2))
        tensor(0.5339)

    References:
        A. Shaban, C.-A. Cheng, N. Hatch, B. Boots, "Truncated back-propagation for bilevel optimization",
        2019.
    """

    last: int
    counts_from_end: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_int("last", self.last, 1)

    def run_forward(self, loop: Bound, consts: Leaves, init: Leaves, xs: Leaves) -> list[Tensor]:
        head = max(loop.length - self.last, 0)
        if not head:
            return loop(*consts, *init, *xs)
        done = Constant().run_forward(replace(loop, length=head), consts, init, [x[:head] for x in xs])
        carry, ys = done[: len(init)], done[len(init) :]
        return then(replace(loop, length=loop.length - head), consts, carry, xs, ys)

    def segments(self, steps: int, every: int) -> Segments:
        return Segments(max(steps - self.last, 0) // every * every, Reverse(), 1)


class Constant(Adjoint):
    """The adjoint of a loop that derivatives do not go through: the loop keeps no carries."""

    def run_forward(self, loop: Bound, consts: Leaves, init: Leaves, xs: Leaves) -> list[Tensor]:
        return loop(*_tree.cut((*consts, *init, *xs)))


def then(loop: Bound, consts: Leaves, carry: Leaves, xs: Leaves, ys: Leaves) -> list[Tensor]:
    """Run the loop over the last rows of xs, and append its y's to the earlier ones."""
    last = loop(*consts, *carry, *[x[len(x) - loop.length :] for x in xs])
    pairs = zip(ys, last[len(carry) :], strict=True)
    return [*last[: len(carry)], *[torch.cat(pair) for pair in pairs]]
