"""Sweeps that several ranks share: whose the members are, who is there, and the rows of all."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .. import _tree
from .._torch._modes import is_tracing
from .._torch._ranks import collectives, store
from .._torch._transforms import is_transforming
from ..distributed._apart import apart, is_apart
from ..distributed._gather import agree, all_gather_tree
from ..distributed._group import RankError, check_group, rank, world_size
from ..distributed._together import taking_part
from ..distributed._words import period, read, reasons
from ._folder import Folder, Piece, digest
from ._grid import Grid

# Seconds without a sign of life after which a rank counts as ended.
SILENCE = 60.0
_POLL = 0.05  # seconds between two questions whether all are done
_SHOWN = 8  # members that a message lists


def is_shared(wanted: bool) -> bool:
    """Tell whether ranks are to share a sweep: there are several, and this is no sweep inside another."""
    if not wanted or is_transforming() or is_tracing():
        return False
    check_group("sweep", ", or let each run all members with shard=False")
    return world_size() > 1 and not is_apart()


class Ranks:
    """The ranks that share a sweep. What they know of one another stands in the store of their group."""

    def __init__(self, grid: Grid, folder: Folder | None) -> None:
        self.grid, self.folder = grid, folder
        self.rank, self.count = rank(), world_size()
        self.done = ""  # the key of the number of ranks that are done

    def groups_of(self, number: int) -> list[list[int]]:
        """List a rank's members group by group: of each group an equal, contiguous part."""
        parts = []
        for at, group in enumerate(self.grid.groups()):
            i, size = (number + at) % self.count, len(group)
            parts.append(group[size * i // self.count : size * (i + 1) // self.count])
        return [part for part in parts if part]

    @contextmanager
    def sharing(self) -> Iterator[None]:
        """Watch one another while the ranks run their members."""
        with taking_part("sweep"):
            agree((repr(self.grid), digest(self.grid)), "the grid of a sweep")
            self.done = f"gdfunc/swept/{collectives()}"
            with apart():
                yield

    def gathered(self, own: Piece) -> list[Piece]:
        """Wait for all ranks, and return the rows of each."""
        self._wait()
        mine = {member for group in self.groups_of(self.rank) for member in group}
        places = [i for i, member in enumerate(own.members) if member in mine]
        rows = _tree.map(
            lambda leaf: leaf[places],
            (torch.tensor(own.members), own.tree, own.lengths, own.diverged),
        )
        of_ranks = enumerate(all_gather_tree(rows, "the rows of a sweep"))
        found = (Piece(members.tolist(), f"rank {i}", *rest) for i, (members, *rest) in of_ranks)
        return [piece for piece in found if piece.members]

    def _wait(self) -> None:
        """Wait until all ranks are done.

        Raises:
            RankError: one has failed, or gives no sign of life.
        """
        try:
            signs, since, looked = read("sign"), [time.monotonic()] * self.count, 0.0
            store().add(self.done, 1)
            while store().add(self.done, 0) < self.count:
                if time.monotonic() - looked > SILENCE / 60 * period() ** 2:
                    looked = time.monotonic()
                    self._look(signs, since)
                time.sleep(_POLL * period())
        except RankError:
            raise
        except RuntimeError as error:
            raise RankError(
                f"rank {self.rank} of {self.count} is done with its members of a sweep, but the process "
                f"with the store of the group has ended; {self._remedy()}"
            ) from error

    def _look(self, signs: list[str], since: list[float]) -> None:
        """Refuse to wait for a rank that has ended."""
        ended = {i: f"ended with {reason}" for i, reason in reasons().items()}
        for i, sign in enumerate(read("sign")):
            if sign != signs[i]:
                signs[i], since[i] = sign, time.monotonic()
            silent = time.monotonic() - since[i]
            if i not in ended and silent > SILENCE:
                ended[i] = f"has given no sign of life for {silent:.0f} s"
        if ended:
            said = [
                f"rank {i} of {self.count} {how} in a sweep; {self._lost(i)}" for i, how in ended.items()
            ]
            raise RankError(f"{'; '.join(said)}; {self._remedy()}")

    def _lost(self, other: int) -> str:
        """Say which members of a rank are lost."""
        kept = {m for piece in self.folder.pieces() for m in piece.members} if self.folder else set()
        lost = [m for group in self.groups_of(other) for m in group if m not in kept]
        named = ", ".join(map(str, lost[:_SHOWN])) + ", …" * (len(lost) > _SHOWN)
        return f"{len(lost)} of the {len(self.grid)} members are lost: {named or 'none'}"

    def _remedy(self) -> str:
        if self.folder is None:
            return "checkpoint_to= keeps what the other ranks have done"
        return f"{self.folder.path} has what is done, and the same call goes on from it"
