"""One safetensors file: written whole or not at all, and read only if its digest is right.

The metadata of the file hold two texts beside what it is told: `bytes`, its size in 20 decimal digits, and
`sha256`, 64 hexadecimal digits. They are the SHA-256 of the file with these 64 digits as zeros.
"""

import glob
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike, fspath
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from .._errors import GdfuncError, missing_extra

_NO_DIGEST, _NO_SIZE = "0" * 64, "0" * 20
_DIGEST, _SIZE = re.compile(rb'"sha256":"([0-9a-f]{64})"'), re.compile(rb'"bytes":"([0-9]{20})"')
_HEADER = 100_000_000  # bytes at most, as in safetensors
_CHUNK = 1 << 20
_TRIES = 10  # to hold a new folder


class CheckpointError(GdfuncError, ValueError):
    """A file cannot be read into what it is asked for, or a tree cannot be written; the message says why.

    Example:
        >>> issubclass(gd.CheckpointError, ValueError)
        True
    """


class CheckpointCorruptError(CheckpointError):
    """A file is not as it was written: bytes were changed, or its end is missing.

    Example:
        >>> issubclass(gd.CheckpointCorruptError, gd.CheckpointError)
        True
    """


class CheckpointVersionError(CheckpointError):
    """A file was written by a later version, in a format that this one does not know.

    Example:
        >>> issubclass(gd.CheckpointVersionError, gd.CheckpointError)
        True
    """


def file_path(path: Any, name: str = "path") -> Path:
    """Return the path of a file to be read or written; refuse that of a folder."""
    if not isinstance(path, str | PathLike):
        raise TypeError(f"{name} is {type(path).__name__}, not the path of a file")
    found = Path(fspath(path))
    if found.is_dir():
        raise IsADirectoryError(f"{name}: {found} is a folder; give the name of a file in it")
    if found.parent.is_file():
        raise NotADirectoryError(f"{name}: {found} cannot be there, because {found.parent} is a file")
    return found


def library() -> Any:
    """Import safetensors."""
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise missing_extra("a file of tensors", "safetensors", "run") from error
    return safetensors


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors to a file, which replaces what was there only when all of it is on disk."""
    safetensors = library()
    with _replacing(path) as new:
        holes = {"sha256": _NO_DIGEST, "bytes": _NO_SIZE}
        try:
            safetensors.torch.save_file(dict(tensors), new, {**metadata, **holes})
        except KeyError as error:  # a dtype
            name = next((name for name, leaf in tensors.items() if leaf.dtype == error.args[0]), None)
            if name is None:
                raise
            raise CheckpointError(f"{name} is {error.args[0]}, which safetensors does not hold") from error
        except safetensors.SafetensorError as error:  # such as a full disk
            raise OSError(f"{path} could not be written, and is as it was: {error}") from error
        with new.open("r+b") as file:
            _patch(file, _SIZE, f"{new.stat().st_size:020}")
            _patch(file, _DIGEST, _digest(file))
            os.fsync(file.fileno())


def _patch(file: BinaryIO, pattern: re.Pattern[bytes], digits: str) -> None:
    """Put digits in the place of zeros."""
    for found in pattern.finditer(_header(file)):  # there is one
        file.seek(8 + found.start(1))
        file.write(digits.encode())
        file.flush()


def _digest(file: BinaryIO) -> str:
    """Compute the SHA-256 of a file whose digest counts as zeros."""
    header = _header(file)
    found = _DIGEST.search(header)
    digest = hashlib.sha256(len(header).to_bytes(8, "little"))
    if found:
        header = header[: found.start(1)] + _NO_DIGEST.encode() + header[found.end(1) :]
    digest.update(header)
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def _header(file: BinaryIO) -> bytes:
    """Read the header, and leave the file where the data begin."""
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    return file.read(length) if length <= _HEADER else b""


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Give the path of a new file, which takes the place of another at the end or leaves no trace.

    The new file is written in a hidden folder beside it. A process that was killed leaves such a folder,
    which the next one removes.
    """
    path = Path(os.path.realpath(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written, because the folder {path.parent} is not there")
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with _held(left) as is_ours:
            if is_ours:
                shutil.rmtree(left, ignore_errors=True)
    with _new_folder(path) as folder:
        try:
            yield folder / path.name
            os.chmod(folder / path.name, 0o600)
            os.replace(folder / path.name, path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    _sync(path.parent)


@contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """Make a hidden folder beside a file, and hold it.

    Another process that writes the file may find the folder before it is held, and remove it.
    """
    for tries_left in reversed(range(_TRIES)):
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        with _held(folder) as is_ours:
            if tries_left and os.name == "posix" and not (is_ours and folder.is_dir()):
                continue
            yield folder
            return


@contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Hold a folder against other processes, and tell whether that succeeded."""
    if os.name != "posix":
        yield False
        return
    import fcntl

    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        yield False
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_held = True
    except OSError:
        is_held = False
    try:
        yield is_held
    finally:
        os.close(descriptor)


def _sync(folder: Path) -> None:
    """Wait until the names in a folder are on disk."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the metadata of a file that is as it was written."""
    safetensors = library()
    with path.open("rb") as file:
        _check(path, file)
    try:
        with safetensors.safe_open(path, framework="pt") as opened:
            # A copy of each, because they are views of the mapped file.
            return {name: opened.get_tensor(name).clone() for name in opened.keys()}, opened.metadata()  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise CheckpointCorruptError(f"{path} is damaged: {error}") from error


def _check(path: Path, file: BinaryIO) -> None:
    """Refuse a file that is not as it was written."""
    header, found = _header(file), os.fstat(file.fileno()).st_size
    digest, size = _DIGEST.search(header), _SIZE.search(header)
    if digest is None or size is None:
        raise CheckpointCorruptError(f"{path} is damaged, or was not written by gd.save: it has no digest")
    if int(size[1]) != found:
        raise CheckpointCorruptError(f"{path} is damaged: expected {int(size[1])} bytes, found {found}")
    if (computed := _digest(file)) != digest[1].decode():
        raise CheckpointCorruptError(
            f"{path} is damaged: its SHA-256 is {computed}, but {digest[1].decode()} was written"
        )
