"""Sweeps that several ranks share: whose the members are, who is there, and the rows of all."""

import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from .. import _tree
from .._torch._modes import is_tracing
from .._torch._ranks import store
from .._torch._transforms import is_transforming
from ..distributed._apart import apart, is_apart
from ..distributed._group import RankError, agree, all_gather_tree, rank, world_size
from ._folder import Folder, Piece, digest
from ._grid import Grid

# Seconds without a sign of life after which a rank counts as ended. Each gives one six times as often.
SILENCE = 60.0
_POLL = 0.05  # seconds between two looks at the store
_PREFIX = "gdfunc/sweep"
_SHOWN = 8  # members that a message lists


def is_shared(wanted: bool) -> bool:
    """Tell whether ranks are to share a sweep: there are several, and this is no sweep inside another."""
    alone = world_size() == 1 or is_transforming() or is_tracing()
    return wanted and not alone and not is_apart()


class Ranks:
    """The ranks that share a sweep. What they know of one another stands in the store of their group."""

    def __init__(self, grid: Grid, folder: Folder | None) -> None:
        self.grid, self.folder = grid, folder
        self.rank, self.count, self.store = rank(), world_size(), store()
        self.prefix = ""  # of the keys of this sweep

    def groups_of(self, number: int) -> list[list[int]]:
        """List a rank's members group by group: of each group an equal, contiguous part."""
        parts = []
        for at, group in enumerate(self.grid.groups()):
            i, size = (number + at) % self.count, len(group)
            parts.append(group[size * i // self.count : size * (i + 1) // self.count])
        return [part for part in parts if part]

    @property
    def groups(self) -> list[list[int]]:
        """List this rank's members. One without any runs the first, which tells what a row is made of."""
        return self.groups_of(self.rank) or [[0]]

    @contextmanager
    def sharing(self) -> Iterator[None]:
        """Give signs of life while this rank runs its members, and say how it ends."""
        agree((repr(self.grid), digest(self.grid)), "the grid of a sweep")
        names = all_gather_tree(torch.tensor(secrets.randbits(62)), "the name of a sweep")
        self.prefix = f"{_PREFIX}/{int(names[0])}"
        is_over = threading.Event()
        signs = threading.Thread(target=self._live, args=(is_over,), daemon=True)
        signs.start()
        try:
            with apart():
                yield
        except BaseException as error:
            with suppress(RuntimeError):  # of a store whose process has ended
                self.store.set(f"{self.prefix}/failed/{self.rank}", f"{type(error).__name__}: {error}")
            raise
        finally:
            is_over.set()
            signs.join()

    def _live(self, is_over: threading.Event) -> None:
        count = 0
        with suppress(RuntimeError):
            while not is_over.wait(SILENCE / 6 if count else 0):
                count += 1
                self.store.set(f"{self.prefix}/sign/{self.rank}", str(count))

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
        others = [i for i in range(self.count) if i != self.rank]
        signs, since, looked = dict.fromkeys(others, ""), dict.fromkeys(others, time.monotonic()), 0.0
        try:
            self.store.set(f"{self.prefix}/done/{self.rank}", "1")
            while not self.store.check([f"{self.prefix}/done/{i}" for i in others]):
                if time.monotonic() - looked > SILENCE / 60:
                    looked = time.monotonic()
                    for i in others:
                        self._look(i, signs, since)
                time.sleep(_POLL)
        except RankError:
            raise
        except RuntimeError as error:
            raise RankError(
                f"rank {self.rank} of {self.count} is done with its members of a sweep, but the process "
                f"with the store of the group has ended; {self._remedy()}"
            ) from error

    def _look(self, other: int, signs: dict[int, str], since: dict[int, float]) -> None:
        """Refuse to wait for a rank that has ended."""
        failed = self._read(f"failed/{other}")
        sign = self._read(f"sign/{other}")
        if sign != signs[other]:
            signs[other], since[other] = sign, time.monotonic()
        silent = time.monotonic() - since[other]
        if not failed and (silent < SILENCE or self._read(f"done/{other}")):
            return
        how = f"ended with {failed}" if failed else f"has given no sign of life for {silent:.0f} s"
        raise RankError(
            f"rank {other} of {self.count} {how} in a sweep; {self._lost(other)}; {self._remedy()}"
        )

    def _read(self, key: str) -> str:
        key = f"{self.prefix}/{key}"
        return self.store.get(key).decode() if self.store.check([key]) else ""

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
