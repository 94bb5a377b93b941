"""The folder of a sweep: a file for each chunk that is finished, by whichever rank."""

import hashlib
from os import PathLike, fspath
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _tree
from .._tree import Tree
from ..checkpoint import CheckpointError, check_known, opened, save
from ._grid import Grid


class Piece(NamedTuple):
    """The results of a chunk."""

    members: list[int]
    name: str
    tree: Tree  # leaves [n, ...]
    lengths: dict[str, Tensor]  # int64 [n] each
    diverged: Tensor  # bool [n]


def digest(grid: Grid) -> str:
    """Return the SHA-256 of a grid's points, in hexadecimal digits."""
    found = hashlib.sha256(repr((grid.zipped, grid.shape)).encode())
    for name, axis in grid.axes.items():
        found.update(repr((name, axis.vmapped, axis.labels)).encode())
        for leaf in _tree.leaves(axis.values) if axis.vmapped else ():
            plain = leaf.detach().resolve_conj().resolve_neg().cpu().contiguous()
            found.update(repr((leaf.dtype, leaf.shape)).encode())
            found.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


class Folder:
    """The finished chunks of a sweep on disk, in files named after their first members."""

    def __init__(self, path: str | PathLike[str], grid: Grid) -> None:
        self.path, self.grid, self.digest = Path(fspath(path)), grid, digest(grid)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise NotADirectoryError(
                f"checkpoint_to: {self.path} is a file, or lies in one; a sweep writes a folder of files"
            ) from None

    def pieces(self) -> list[Piece]:
        """Read the chunks that are there.

        Raises:
            CheckpointError: a file is damaged, or of another sweep.
        """
        return [self._read(path) for path in sorted(self.path.glob("[0-9]*.safetensors"))]

    def _read(self, path: Path) -> Piece:
        with opened(path) as whole:
            parts = whole.parts()
            if "grid" not in parts or parts["grid"].build() != self.digest:
                raise CheckpointError(f"it is no part of this sweep of {self.grid}: use another folder")
            return Piece(*(parts[name].build() for name in Piece._fields))

    def write(self, piece: Piece) -> None:
        tree = {"grid": self.digest, **piece._asdict()}
        check_known(tree)
        save(self.path / f"{piece.members[0]:09}.safetensors", tree)
