"""The part that all demos share: their arguments, pictures with conclusions, tables, and the card of a run.

    with Card(__file__, "What does the batch size change?", argv) as card:
        card.picture("gap", figure, conclusion(gap), {"gap": gap})
        card.table("gap", ["epoch", "gap"], zip(epochs, gaps))

The card is the file card.json beside the pictures, for pages that show what the demos found:

    {"demo": "quickstart", "question": "…", "fast": false, "seconds": 14.2,
     "pictures": [{"file": "gap.png", "question": "…", "conclusion": "…", "numbers": {"gap": 0.01}}],
     "tables": ["gap.csv"]}

A picture of which there is a moving one, a GIF file of the same name, has it as `motion` in its entry.
With `--gallery` a picture is also an SVG file, and its entry has `bare`, a PNG file without the title.
"""

import argparse
import csv
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath
from PIL import Image

import gdfunc as gd

TITLE = 11  # points


class Card:
    """The question of a demo, and what a run of it found.

    Attributes:
        fast: whether a run of a few seconds is wanted (`--fast`).
        out: the folder of its files (`--out`).
    """

    def __init__(self, script: str, question: str, argv: Sequence[str] | None = None) -> None:
        self.demo, self.question = Path(script).stem, question
        parser = argparse.ArgumentParser(description=question)
        parser.add_argument(
            "--out", type=Path, default=Path("out") / self.demo, help="the folder of results"
        )
        parser.add_argument("--fast", action="store_true", help="a smaller run, of a few seconds")
        parser.add_argument(
            "--format", choices=("png", "svg", "pdf"), default="png", help="of the pictures"
        )
        parser.add_argument(
            "--gallery", action="store_true", help="also pictures as SVG, and as PNG without titles"
        )
        args = parser.parse_args(argv)
        self.fast, self.out, self.format = args.fast, args.out, args.format
        self.gallery = args.gallery
        self.pictures: list[dict[str, Any]] = []
        self.tables: list[str] = []

    def __enter__(self) -> Self:
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "card.json").unlink(missing_ok=True)
        self.started = time.perf_counter()
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        if failure is not None:
            return
        card = {
            "demo": self.demo,
            "question": self.question,
            "fast": self.fast,
            "seconds": round(time.perf_counter() - self.started, 1),
            "pictures": self.pictures,
            "tables": self.tables,
        }
        text = json.dumps(plain(card), ensure_ascii=False, indent=1, allow_nan=False)
        (self.out / "card.json").write_text(text + "\n", encoding="utf-8")

    def picture(
        self,
        name: str,
        figure: Figure,
        conclusion: str,
        numbers: Mapping[str, Any],
        question: str | None = None,
    ) -> None:
        """Write a figure under its conclusion, print the conclusion, and keep both with their numbers."""
        shown: dict[str, Any] = {}
        if self.gallery:
            shown["bare"] = f"{name}.bare.png"
            figure.savefig(self.out / shown["bare"], dpi=150)
        title = broken(conclusion, 0.97 * 72 * figure.get_figwidth())
        figure.suptitle(title, x=0.01, ha="left", fontsize=TITLE, fontweight="bold")
        path = self.out / f"{name}.{self.format}"
        source = "Subject" if self.format == "pdf" else "Source"
        figure.savefig(path, dpi=150, metadata={"Title": conclusion, source: f"demos/{self.demo}.py"})
        if self.gallery:
            figure.savefig(path.with_suffix(".svg"), metadata={"Title": conclusion, "Date": None})
        print(f"{conclusion}\nsaved {path}")
        shown |= {
            "file": path.name,
            "question": question or self.question,
            "conclusion": conclusion,
            "numbers": dict(numbers),
        }
        self.pictures.append(shown)

    def motion(self, name: str, ax: Axes | Sequence[Axes], **options: Any) -> None:
        """Write a GIF in which paths or curves grow, and keep it with the picture of this name."""
        self._keep_motion(gd.plot.animate(ax, self.out / f"{name}.gif", **options))

    def film(self, name: str, figure: Figure, draw: Callable[[int], None], frames: int) -> None:
        """Write a GIF of a figure that a function draws for each frame, in the colours of the last."""
        canvas, images = FigureCanvasAgg(figure), []
        for i in reversed(range(frames)):
            draw(i)
            canvas.draw()
            image = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
            if not images:
                palette = image.quantize(255)
            images.insert(0, image.quantize(palette=palette, dither=Image.Dither.NONE))
        path, waits = self.out / f"{name}.gif", [80] * (frames - 1) + [2000]
        images[0].save(path, save_all=True, append_images=images[1:], duration=waits, loop=0)
        self._keep_motion(path)

    def _keep_motion(self, path: Path) -> None:
        (shown,) = (shown for shown in self.pictures if Path(shown["file"]).stem == path.stem)
        shown["motion"] = path.name
        print(f"saved {path}")

    def table(self, name: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Write a CSV file, a line for each row."""
        with self.file(f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *map(plain, rows)])

    def file(self, name: str) -> Path:
        """Return the path of a table that the caller writes, and keep its name."""
        self.tables.append(name)
        print(f"saved {self.out / name}")
        return self.out / name


def broken(title: str, width: float) -> str:
    """Break a title into lines of at most a width in points."""
    font = FontProperties(weight="bold")
    lines = [""]
    for word in title.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and TextPath((0, 0), longer, size=TITLE, prop=font).get_extents().width > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def plain(value: Any) -> Any:
    """Return a value in JSON's terms: arrays as lists, and numbers that are not finite as text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
