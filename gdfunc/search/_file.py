"""The file of a halving, and the folder of the rung that is not finished."""

import shutil
from pathlib import Path
from typing import Any

from .._sweep._ranks import is_shared
from ..checkpoint import CheckpointError, check_known, load, save
from ..distributed._apart import is_apart
from ..distributed._gather import agree
from ..distributed._group import rank, world_size
from ._result import HalvingInterrupted


class File:
    """A halving on disk: whole rungs in a file, and chunks of the next rung in a folder.

    Attributes:
        path: the file, which all ranks read, and the first writes.
        is_shared: whether ranks share the members.
        is_writer: whether this rank writes the file.
        has_chunks: whether there is a folder. Ranks that all run all members have none: such members take
            their steps together, and end together.
    """

    def __init__(self, path: Path, shard: bool) -> None:
        self.path, self.is_shared = path, is_shared(shard)
        is_alone = world_size() == 1 or is_apart()
        self.is_writer = is_alone or rank() == 0
        self.has_chunks = is_alone or self.is_shared

    def found(self, resume: Any) -> Any:
        """Return what the file has, or else `resume`; then no chunks of another halving are there."""
        is_there = self.path.exists()
        if self.is_shared:
            agree(is_there, f"whether they find {self.path}, which all of them must read")
        if is_there:
            if resume is not None:
                raise ValueError(
                    f"both resume= and {self.path} hold a halving; pass one, or remove the file"
                )
            resume = load(self.path)
            if not isinstance(resume, HalvingInterrupted):
                raise CheckpointError(f"{self.path} holds no halving; remove it, or use another file")
        elif self.is_writer and self.has_chunks:
            self._clear()
        if self.is_shared:
            agree("", "a halving")  # after the first has removed the chunks
        return resume

    def chunks(self, rung: int, group: int) -> Path | None:
        """Return the folder for chunks of a group on its way to a rung."""
        return self._folder() / f"{rung}-{group}" if self.has_chunks else None

    def write(self, stopped: HalvingInterrupted) -> None:
        """Write what is done, and remove the chunks that are part of it."""
        if not self.is_writer:
            return
        check_known(stopped)
        save(self.path, stopped)
        if stopped.done.inner is None:
            self._clear(stopped.rungs)

    def _folder(self) -> Path:
        return self.path.with_name(f"{self.path.name}.rungs")

    def _clear(self, rung: int | None = None) -> None:
        """Remove the chunks of rungs before this; None for all."""
        for chunks in self._folder().glob("[0-9]*-[0-9]*"):
            if rung is None or int(chunks.name.partition("-")[0]) < rung:
                shutil.rmtree(chunks, ignore_errors=True)
        if self._folder().is_dir() and not [*self._folder().iterdir()]:
            self._folder().rmdir()
