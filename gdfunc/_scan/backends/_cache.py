"""The directory of compiled code. Because its files are loaded and run, each one is checked before."""

import hashlib
import os
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from ..._errors import BackendError

LIMIT = 2**29  # bytes of native libraries; beyond it, the least recently used are deleted
_ABANDONED = 86_400  # seconds after which an unfinished build was killed, not slow
_LIBRARIES = (".so", ".dll")
_WAITS = (0.05, 0.1, 0.2, 0.4, 0.8)  # seconds, in which an antivirus has looked at a new file


def remedy() -> str:
    """Name the environment variable that moves the cache."""
    return f"set {'XDG_CACHE_HOME' if os.name == 'posix' else 'LOCALAPPDATA'} to a directory of your own"


def _base() -> Path:
    """Return the directory of all caches. A relative one is ignored, as the XDG specification demands."""
    name, usual = ("XDG_CACHE_HOME", ".cache") if os.name == "posix" else ("LOCALAPPDATA", "AppData/Local")
    setting = Path(os.environ.get(name, ""))
    return setting if setting.is_absolute() else Path.home() / usual


def private_directory() -> Path:
    """Return the cache directory, and make it if it is missing. It must be the user's alone.

    On Windows, the directory of a user's local data is theirs alone unless they share it.

    Raises:
        BackendError: the directory is a link or a file, belongs to another user, is open to others, or lies
            where others could replace it.
    """
    try:
        path = _base() / "gdfunc"
        for directory in (*reversed(path.parents), path):
            if not directory.exists():
                directory.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BackendError(f"the cache directory cannot be made ({reason}); {remedy()}") from error
    if not stat.S_ISDIR(found.st_mode):
        raise BackendError(
            f"{path} is a link or a file; remove it, because compiled code needs a directory there"
        )
    if os.name != "posix":
        return path
    if found.st_uid != os.geteuid():
        raise BackendError(
            f"{path} belongs to user {found.st_uid}, not to you ({os.geteuid()}), and code in it could be "
            f"theirs; {remedy()}"
        )
    if stat.S_IMODE(found.st_mode) & 0o077:
        raise BackendError(
            f"{path} is open to others (mode {stat.S_IMODE(found.st_mode):04o}), who could put code there; "
            f"chmod 700 it, or remove it if you did not open it yourself"
        )
    for parent in {*path.parents, *path.resolve().parents}:
        _check_parent(parent, path)
    return path


def _check_parent(parent: Path, path: Path) -> None:
    """Refuse a parent directory in which others may rename or replace entries."""
    found = parent.stat()
    if found.st_uid not in (0, os.geteuid()):
        raise BackendError(
            f"{parent} belongs to user {found.st_uid}, who could replace {path} in it; {remedy()}"
        )
    writers = stat.S_IMODE(found.st_mode) & 0o022
    if writers == 0o020 and _is_private_group(found.st_gid):
        writers = 0
    if writers and not found.st_mode & stat.S_ISVTX:
        raise BackendError(
            f"{parent} can be written by others (mode {stat.S_IMODE(found.st_mode):04o}), who could "
            f"replace {path} in it; chmod go-w it, or {remedy()}"
        )


def unwritable(directory: Path, error: OSError) -> BackendError:
    scans = "" if os.name == "posix" else "let the antivirus leave it out, or "
    return BackendError(f"{directory} cannot be written ({error.strerror}); {scans}{remedy()}")


def _is_private_group(group: int) -> bool:
    """Tell whether a group has the user as its only member, as many Linux distributions set it up."""
    import grp
    import pwd

    try:
        user, found = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(group)
    except KeyError:
        return False
    return found.gr_name == user and set(found.gr_mem) <= {user}


def is_sound(path: Path) -> bool:
    """Tell whether a library is the user's own and equals, byte for byte, what `store` wrote."""
    try:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode):
            return False
        if os.name == "posix" and (found.st_mode & 0o022 or found.st_uid != os.geteuid()):
            return False
        if path.with_suffix(".sha256").read_text() != _digest(path):
            return False
        os.utime(path)  # the time of the last use, for `trim`
    except (OSError, ValueError):
        return False
    return True


def store(made: Path, path: Path) -> None:
    """Move a new library to its place on the same file system, with its length and SHA-256 in a file.

    On Windows, a library that another process has loaded stays where it is.
    """
    digest = made.with_suffix(".sha256")
    digest.write_text(_digest(made))
    made.chmod(0o700)
    _sync(made, digest)
    try:
        _move(made, path)
        _move(digest, path.with_suffix(".sha256"))
    except PermissionError:
        if not is_sound(path):
            raise
    _sync(path.parent)


def _move(source: Path, target: Path) -> None:
    """Rename a file. On Windows, another program may hold it for a moment."""
    for wait in () if os.name == "posix" else _WAITS:
        with suppress(PermissionError):
            return os.replace(source, target)
        time.sleep(wait)
    os.replace(source, target)


def discard(path: Path) -> None:
    """Delete a library, unless it is loaded on Windows."""
    with suppress(PermissionError):
        path.unlink(missing_ok=True)
        path.with_suffix(".sha256").unlink(missing_ok=True)


def trim(directory: Path, limit: int = LIMIT) -> None:
    """Delete the least recently used libraries until the rest have `limit` bytes, and abandoned builds."""
    found = []
    for path in directory.iterdir():
        with suppress(FileNotFoundError):  # another process deletes files, too
            found.append((path, path.lstat()))
    total = sum(stats.st_size for _, stats in found)
    for path, stats in sorted(found, key=lambda pair: pair[1].st_mtime):
        if stat.S_ISDIR(stats.st_mode):
            if stats.st_mtime < time.time() - _ABANDONED:
                shutil.rmtree(path, ignore_errors=True)
        elif total > limit and path.suffix in _LIBRARIES:
            discard(path)
            total -= stats.st_size


_checked: set[Path] = set()


@contextmanager
def guarded(directory: Path, limit: int = LIMIT) -> Iterator[None]:
    """Check the cache of another compiler once per process, and note the digests of the files that it adds.

    Files that differ from their digest are deleted, and so are those of a process that was killed before it
    could note them. A directory with more than `limit` bytes is emptied, because its files need each other.
    """
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        file = open(directory / ".lock", "a")  # noqa: SIM115  closed below
    except OSError as error:
        raise unwritable(directory, error) from error
    with file as lock:
        if directory not in _checked:
            _check(directory, _try_lock(lock, exclusive=True), limit)
            _checked.add(directory)
        _try_lock(lock, exclusive=False)
        before = _stamps(directory)
        try:
            yield
        finally:
            added = [path for path, stamp in _stamps(directory).items() if before.get(path) != stamp]
            if added:
                sums = directory / ".sha256"
                with open(sums, "a") as lines:
                    lines.writelines(f"{_digest(path)} {path.relative_to(directory)}\n" for path in added)
                _sync(*added, sums, *{path.parent for path in (*added, sums)})


def _check(directory: Path, alone: bool, limit: int) -> None:
    sums = directory / ".sha256"
    lines = sums.read_text().splitlines() if sums.exists() else []
    noted = {name: digest for digest, _, name in (line.partition(" ") for line in lines)}
    found = {str(path.relative_to(directory)): path for path in _stamps(directory)}
    full = sum(path.lstat().st_size for path in found.values()) > limit
    for name, path in found.items():
        if (alone and (full or name not in noted)) or (name in noted and noted[name] != _digest(path)):
            path.unlink(missing_ok=True)


def _try_lock(file: IO[str], exclusive: bool) -> bool:
    """Lock a file: shared by all processes that compile, or exclusive if none does."""
    if os.name != "posix":
        return False
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB if exclusive else fcntl.LOCK_SH)
    except OSError:
        return False
    return True


def _stamps(directory: Path) -> dict[Path, tuple[int, int]]:
    """Return size and time of all files but the lock and the digests."""
    stamps = {}
    for path in directory.rglob("[!.]*"):
        with suppress(FileNotFoundError):
            found = path.lstat()
            if not stat.S_ISDIR(found.st_mode):
                stamps[path] = found.st_size, found.st_mtime_ns
    return stamps


def _digest(path: Path) -> str:
    """Return the length and the SHA-256 of a file."""
    try:
        data = path.read_bytes()
    except OSError:
        return "unreadable"
    return f"{len(data)}:{hashlib.sha256(data).hexdigest()}"


def _sync(*paths: Path) -> None:
    """Wait until files or directories are on the disk, so that a crash cannot leave half of one."""
    is_posix = os.name == "posix"  # elsewhere a directory is no file, and what is synced must be writable
    for path in paths if is_posix else filter(Path.is_file, paths):
        with suppress(FileNotFoundError):  # another process deletes files, too
            file = os.open(path, os.O_RDONLY if is_posix else os.O_RDWR)
            try:
                os.fsync(file)
            finally:
                os.close(file)
