"""The outputs of a halving: a sweep's, with the steps that each member took."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import checkpoint
from .._errors import Copyable
from .._sweep._result import SweepResult
from .._tree import Tree

_COLUMNS = (
    ".steps",
    ".score",
    "['steps']",
    "['score']",
)  # paths of outputs that would name the same column


@dataclass(frozen=True, eq=False, repr=False)
class HalvingResult(SweepResult):
    """The outputs of a halving's members, each up to the rung where it was dropped.

    It is a `SweepResult`: the records of a dropped member are padded with NaN, and `lengths` tells how many
    it has.

    Attributes:
        rungs: the numbers of steps after which the members were judged. The last is the whole run.
        steps: int64 [N], how many steps each member took. The members of `steps < rungs[-1]` were dropped.
        scores: float64 [N, R], what each member was judged by at each rung; NaN after it was dropped.
        ranking: the members from the best to the worst: by the rung where they were dropped, then by their
            score there, then by their number. Those that diverged at a rung come last there.
        finals: the last carries of the members that were left, by their number.

    Example:
        >>> def run(lr, steps, carry):
        ...     w = torch.tensor(1.0) if carry is None else carry
        ...     step, plan = gd.make_step(lambda w, batch: w**2), gd.full_batch(1, 8)
        ...     return gd.train(step, w, None, plan[steps], lr)
        >>> result = gd.search.halving(run, gd.grid(lr=[0.01, 0.1, 0.3, 0.4]), [2, 4, 8], "loss", eta=2)
        >>> result.best, result.steps.tolist(), result.cost, result.full_cost
        (3, [2, 2, 4, 8], 16, 32)
        >>> result.finals[result.best]
        tensor(2.5600e-06)
        >>> [*result.to_records()[2]]
        ['lr', 'steps', 'score', 'diverged']
    """

    rungs: list[int]
    steps: Tensor
    scores: Tensor
    ranking: list[int]
    finals: dict[int, Tree]

    def _facts(self) -> list[str]:
        axes, diverged = super()._facts()
        counts = [int((self.steps >= rung).sum()) for rung in self.rungs]
        rungs = ", ".join(f"{count} to {rung}" for count, rung in zip(counts, self.rungs, strict=True))
        return [axes, rungs, diverged, f"{self.cost} of {self.full_cost} steps"]

    @property
    def best(self) -> int:
        """Return the number of the best member that was left.

        Raises:
            ValueError: all members diverged, or those that were left are not part of this selection.
        """
        if not self.finals:
            raise ValueError(
                f"no member was left: {int(self.diverged.sum())} of {len(self.grid)} diverged; "
                f"ranking has them all"
            )
        return self.ranking[0]

    @property
    def cost(self) -> int:
        """Count the steps of all members."""
        return int(self.steps.sum())

    @property
    def full_cost(self) -> int:
        """Count the steps that a sweep of all members to their end takes."""
        return len(self.grid) * self.rungs[-1]

    def select(self, **values: Any) -> "HalvingResult":
        """Keep the members with these values of axes; see `SweepResult.select`."""
        _, members = self.grid.select(**values)
        numbers = {member: number for number, member in enumerate(members)}
        return HalvingResult(
            **vars(super().select(**values)),
            rungs=self.rungs,
            steps=self.steps[members],
            scores=self.scores[members],
            ranking=[numbers[member] for member in self.ranking if member in numbers],
            finals={numbers[m]: carry for m, carry in self.finals.items() if m in numbers},
        )

    def _leaves(self) -> list[tuple[str, Tensor]]:
        *outputs, diverged = super()._leaves()
        outputs = [(f".output{path}" if path in _COLUMNS else path, leaf) for path, leaf in outputs]
        rung = torch.searchsorted(torch.tensor(self.rungs), self.steps)
        score = self.scores[torch.arange(len(self.grid)), rung]
        return [*outputs, (".steps", self.steps), (".score", score), diverged]


checkpoint.register(HalvingResult)


class HalvingInterrupted(Copyable, KeyboardInterrupt):
    """Ctrl-C stopped a halving; nothing that was finished is lost.

    `halving(…, resume=error)` goes on to the same bits. `gd.save` writes it.

    Attributes:
        rungs: how many rungs were finished.
        members: the numbers of the members that were left.
        done: what `resume=` goes on from.

    Example:
        >>> print(gd.search.HalvingInterrupted(rungs=1, members=[2, 5], done=None))
        stopped after 1 rung with 2 members left; halving(..., resume=error) goes on
    """

    def __init__(self, *, rungs: int, members: list[int], done: Any) -> None:
        super().__init__(
            f"stopped after {rungs} rung{'s' * (rungs != 1)} with {len(members)} members left; "
            f"halving(..., resume=error) goes on"
        )
        self.rungs, self.members, self.done = rungs, members, done


checkpoint.register(HalvingInterrupted)
