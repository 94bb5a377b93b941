"""Tell what runs on this machine, and what to install for the rest: `python -m gdfunc`."""

import os
import platform
from collections.abc import Iterator
from pathlib import Path

import torch

from . import __version__
from ._errors import BackendError
from ._scan import scan
from ._scan.backends import RUNNERS, native
from ._scan.backends._cache import private_directory


def report() -> Iterator[tuple[str, str]]:
    """List what there is as pairs of a name and a text. Each backend is tried on a loop of three steps."""
    system = f"{platform.system()} {platform.machine()}"
    yield (
        "gdfunc",
        f"{__version__}, torch {torch.__version__}, Python {platform.python_version()}, {system}",
    )
    yield "device", _device()
    yield from _compiler()
    yield "cache", _cache()
    for backend in ("eager", *RUNNERS):
        yield backend, _trial(backend)


def _device() -> str:
    cpu = f"CPU, {torch.get_num_threads()} of {os.cpu_count()} cores used"
    gpus = [torch.cuda.get_device_name(at) for at in range(torch.cuda.device_count())]
    return "; ".join([cpu, *gpus])


def _compiler() -> Iterator[tuple[str, str]]:
    try:
        target = native.find()
    except BackendError as error:
        yield "compiler", str(error)
        return
    math = "functions of whole vectors" if native.has_vector_math(target) else "functions of single numbers"
    yield "compiler", f"{target.compiler}: {' '.join(target.command)}"
    yield "target", f"{target.system}, vectors of {target.tiles.width} bytes, {math}"


def _cache() -> str:
    try:
        directory = private_directory()
    except BackendError as error:
        return str(error)
    return f"{directory}, {_size(directory) / 1e6:.1f} MB"


def _size(directory: Path) -> int:
    """Count the bytes of all files."""
    return sum(path.lstat().st_size for path in directory.rglob("*") if path.is_file())


def _trial(backend: str) -> str:
    device = "cuda" if backend == "cudagraph" else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        return "needs an NVIDIA GPU"
    xs = torch.arange(3.0, device=device)
    try:
        total, _ = scan(lambda carry, x: (carry + x, carry), xs[0], xs, backend=backend)
    except BackendError as error:
        remedy = f"\ninstall it: {native.INSTALL}" if isinstance(error, native.NoCompiler) else ""
        return f"does not work: {error}{remedy}"
    return "works" if total == 3 else f"computes 0 + 1 + 2 = {total}: please report this"


def main() -> None:
    """Print the report as it is made."""
    for name, text in report():
        print(f"{name:<10}", text.replace("\n", f"\n{'':<11}"), flush=True)


if __name__ == "__main__":
    main()
