"""How far long work has come, for those who wait: tqdm if it is installed, else a line on stderr."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

Progress = bool | Callable[[int, int], Any]
NONE: Mapping[str, float] = {}


@contextmanager
def reporter(progress: Progress, total: int, unit: str, begun: int = 0) -> Iterator[Callable[..., Any]]:
    """Give the function that is told how many units are done, and numbers to show beside."""
    if callable(progress):
        yield lambda done, numbers=NONE: progress(done, total)
    elif not progress:
        yield lambda done, numbers=NONE: None
    else:
        try:
            from tqdm import tqdm
        except ModuleNotFoundError:

            def line(done: int, numbers: Mapping[str, float] = NONE) -> None:
                beside = "".join(f", {name} {number:.4g}" for name, number in numbers.items())
                print(f"\r{done}/{total} {unit}s{beside}", end="", file=sys.stderr, flush=True)

            yield line
            print(file=sys.stderr)
        else:
            with tqdm(total=total, unit=unit, initial=begun) as bar:

                def update(done: int, numbers: Mapping[str, float] = NONE) -> None:
                    bar.set_postfix(
                        {name: f"{number:.4g}" for name, number in numbers.items()}, refresh=False
                    )
                    bar.update(done - bar.n)

                yield update
