"""How far long work has come, for those who wait: tqdm if it is installed, else a line on stderr."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Progress = bool | Callable[[int, int], Any]


@contextmanager
def reporter(progress: Progress, total: int, unit: str) -> Iterator[Callable[[int], Any]]:
    """Give the function that is told how many units are done."""
    if callable(progress):
        yield lambda done: progress(done, total)
    elif not progress:
        yield lambda done: None
    else:
        try:
            from tqdm import tqdm
        except ModuleNotFoundError:
            yield lambda done: print(f"\r{done}/{total} {unit}s", end="", file=sys.stderr, flush=True)
            print(file=sys.stderr)
        else:
            with tqdm(total=total, unit=unit) as bar:
                yield lambda done: bar.update(done - bar.n)
