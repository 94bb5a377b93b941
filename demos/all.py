"""The gallery: every demo in a process of its own, and one page that shows what they found.

The page moves: its first picture has a slider of learning rates, over runs that are computed here. It is
one file and needs no network. The folder holds every demo's full pictures, tables and output too.

    python demos/all.py [--fast] [--out DIR] [--only NAME ...]
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from _page.build import build
from _page.cards import read_cards
from _page.runs import hero
from _page.zooms import POINTS, zooms

DEMOS = Path(__file__).parent
LINES = 12  # of the output of a demo that fails


def names() -> list[str]:
    return sorted(path.stem for path in DEMOS.glob("[!_]*.py") if path.stem != Path(__file__).stem)


def run(script: Path, out: Path, fast: bool) -> str:
    """Run a demo; return the last lines of its output if it fails, else nothing.

    All of its output is in output.txt beside its files.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / "card.json").unlink(missing_ok=True)
    command = [sys.executable, str(script), "--out", str(out), "--gallery", *(["--fast"] if fast else [])]
    with (out / "output.txt").open("w", encoding="utf-8") as output:
        status = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False).returncode
    if status == 0:
        return ""
    lines = (out / "output.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join([*lines[-LINES:], f"{script.name} ended with status {status}"])


def progress(demos: Sequence[str]) -> Iterator[str]:
    """Show how far the demos are: as a bar on a terminal with tqdm, else in a line for each."""
    try:
        from tqdm import tqdm
    except ImportError:
        tqdm = None
    if tqdm is not None and sys.stderr.isatty():
        bar = tqdm(demos, unit="demo")
        for name in bar:
            bar.set_postfix_str(name)
            yield name
        return
    for i, name in enumerate(demos, 1):
        started = time.perf_counter()
        yield name
        print(f"[{i}/{len(demos)}] {name}: {time.perf_counter() - started:.0f} s", flush=True)


def run_all(demos: Iterable[str], out: Path, fast: bool) -> dict[str, str]:
    """Run the demos one after the other, and return the last lines of those that fail."""
    failed = {}
    for name in progress(list(demos)):
        lines = run(DEMOS / f"{name}.py", out / name, fast)
        if lines:
            failed[name] = lines
    return failed


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/gallery"), help="the folder of the page")
    parser.add_argument("--fast", action="store_true", help="smaller runs, of a few seconds each")
    parser.add_argument(
        "--only",
        nargs="*",
        choices=names(),
        metavar="NAME",
        help="run these demos, and show others as they ran before; without a name, only build the page",
    )
    args = parser.parse_args(argv)
    failed = run_all(names() if args.only is None else args.only, args.out, args.fast)
    cards = read_cards(args.out, names())
    page = build(args.out, cards, hero(), zooms(48 if args.fast else POINTS), missing=sorted(failed))
    print(f"saved {page}: {len(cards)} demos, {page.stat().st_size / 1e6:.1f} MB")
    for name, lines in failed.items():
        print(f"\n{name} failed:\n{lines}")
    return 1 if failed else 0


if __name__ == "__main__":
    torch.set_num_threads(1)  # on tensors this small, threads would only wait for one another
    torch.set_flush_denormal(True)  # losses near 0 would slow the networks down
    raise SystemExit(main())
