"""The directory for compiled code: code that is loaded and run, so nobody else may write there."""

import os
import stat
from pathlib import Path

from ..._errors import BackendError


def private_directory() -> Path:
    """Return the cache directory, made if it is missing; it must be the user's alone.

    Raises:
        BackendError: it belongs to another user, others may enter it, or it is a link or a file.
    """
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gdfunc"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise BackendError(
            f"{path} cannot be made ({error.strerror}); set XDG_CACHE_HOME to a directory of your own"
        ) from error
    if not stat.S_ISDIR(found.st_mode):
        raise BackendError(
            f"{path} is a link or a file; remove it: compiled code is kept in a directory there"
        )
    if hasattr(os, "geteuid") and found.st_uid != os.geteuid():
        raise BackendError(
            f"{path} belongs to user {found.st_uid}, not to you ({os.geteuid()}): code from it could be "
            f"anybody's; set XDG_CACHE_HOME to a directory of your own"
        )
    if os.name == "posix" and stat.S_IMODE(found.st_mode) & 0o077:
        raise BackendError(
            f"{path} is open to others (mode {stat.S_IMODE(found.st_mode):04o}), who could put code there; "
            f"chmod 700 it, or remove it if it was not you who opened it"
        )
    return path
