"""Moving pictures as files: GIF with one palette, and an HTML page that holds its frames."""

from __future__ import annotations

import base64
import html
import io
import json
from typing import Any

import numpy as np

from ._axes import Array

_COLORS = 255  # of a GIF; one more entry of its palette means "as before"
_UNKNOWN = 255


class Gif:
    """A GIF whose frames share the palette of one picture, and hold only what changes."""

    def __init__(self, still: Array) -> None:
        self.palette = palette_of(still)
        self.table = np.full(2**24, _UNKNOWN, dtype=np.uint8)  # entries of the palette by colour
        self.frames: list[Any] = []
        self.before: Array | None = None

    def add(self, frame: Array) -> None:
        from PIL import Image

        entries = self._entries(frame)
        changed = entries if self.before is None else np.where(entries == self.before, _COLORS, entries)
        image = Image.frombytes("P", entries.shape[::-1], np.ascontiguousarray(changed).tobytes())
        unused = np.repeat(self.palette[:1], 256 - len(self.palette), axis=0)
        image.putpalette(np.vstack([self.palette, unused]).astype(np.uint8).tobytes())
        self.frames.append(image)
        self.before = entries

    def _entries(self, frame: Array) -> Array:
        """Return the entry of the nearest colour of the palette for each pixel."""
        packed = frame.astype(np.uint32) @ np.array([65536, 256, 1], dtype=np.uint32)
        entries = self.table[packed]
        missing = np.unique(packed[entries == _UNKNOWN])
        if len(missing):
            colors = np.stack([missing >> 16, missing >> 8 & 255, missing & 255], axis=1).astype(np.int32)
            for part in np.array_split(np.arange(len(missing)), 1 + len(missing) // 4096):
                distances = ((colors[part, None] - self.palette) ** 2).sum(axis=2)
                self.table[missing[part]] = distances.argmin(axis=1)
            entries = self.table[packed]
        return entries

    def encode(self, milliseconds: list[int], about: str) -> bytes:
        file = io.BytesIO()
        first, *rest = self.frames
        first.save(
            file,
            "GIF",
            save_all=True,
            append_images=rest,
            duration=milliseconds,
            loop=0,
            disposal=1,
            transparency=_COLORS,
            optimize=False,
            comment=about.encode(),
        )
        return file.getvalue()


def palette_of(still: Array) -> Array:
    """Choose up to 255 colours [n, 3] of a picture; thin lines count for more than their area."""
    from PIL import Image

    colors, counts = np.unique(still.reshape(-1, 3), axis=0, return_counts=True)
    if len(colors) > _COLORS:
        few = np.repeat(colors, np.ceil(np.sqrt(counts)).astype(int), axis=0)
        most = colors[np.argsort(counts)[-32:]]  # the page, areas and lines keep their very colours
        image = Image.fromarray(few[None]).quantize(_COLORS - len(most), Image.Quantize.MEDIANCUT)
        rest = np.array(image.getpalette(), dtype=np.int32).reshape(-1, 3)[: _COLORS - len(most)]
        colors = np.unique(np.vstack([most, rest]), axis=0)
    return colors.astype(np.int32)


class Page:
    """An HTML page with a slider and a button; of each frame it holds what changes, as PNG."""

    def __init__(self, still: Array) -> None:
        self.size = still.shape[1::-1]
        self.still = _png(still)
        self.frames: list[bytes] = []
        self.before: Array | None = None

    def add(self, frame: Array) -> None:
        shown = np.full(frame.shape[:2], True)
        if self.before is not None:
            shown = (frame != self.before).any(axis=2)
        changed = np.where(shown[..., None], frame, 0)
        self.frames.append(_png(np.dstack([changed, 255 * shown]).astype(np.uint8)))
        self.before = frame

    def encode(self, milliseconds: list[int], about: str) -> bytes:
        width, height = self.size
        values = {
            "about": html.escape(about or "A moving picture", quote=True),
            "width": width,
            "height": height,
            "last": len(self.frames) - 1,
            "still": _uri(self.still),
            "frames": json.dumps([_uri(frame) for frame in self.frames]),
            "waits": json.dumps(milliseconds),
        }
        page = _PAGE
        for name, value in values.items():
            page = page.replace(f"@{name}@", str(value))
        return page.encode()


def _png(pixels: Array) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG", compress_level=9)
    return file.getvalue()


def _uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


# A frame is drawn over the frames before it. Going back begins at the first, which takes milliseconds.
_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>@about@</title>
<style>
body { margin: 1em auto; padding: 0 1em; max-width: @width@px; font: 16px system-ui, sans-serif; }
canvas, img { display: block; width: 100%; height: auto; }
form { display: flex; gap: 1em; margin-top: 0.5em; }
button { min-width: 5em; font: inherit; }
input { flex: 1; }
</style>
<canvas width="@width@" height="@height@" role="img" aria-label="@about@"></canvas>
<noscript><style>canvas, form { display: none; }</style><img alt="@about@" src="@still@"></noscript>
<form>
<button type="button">Play</button>
<input type="range" min="0" max="@last@" value="@last@" aria-label="Frame">
</form>
<script>
const sources = @frames@, waits = @waits@;
const canvas = document.querySelector("canvas"), pen = canvas.getContext("2d");
const button = document.querySelector("button"), slider = document.querySelector("input");
const pictures = sources.map((source) => Object.assign(new Image(), { src: source }));
let shown = -1, timer = null;
function show(frame) {
  for (let i = frame < shown ? 0 : shown + 1; i <= frame; i++) pen.drawImage(pictures[i], 0, 0);
  shown = frame;
  slider.value = frame;
}
function stop() {
  clearTimeout(timer);
  timer = null;
  button.textContent = "Play";
}
function step() {
  if (shown === sources.length - 1) return stop();
  show(shown + 1);
  timer = setTimeout(step, waits[shown]);
}
button.onclick = () => {
  if (timer !== null) return stop();
  button.textContent = "Pause";
  if (shown === sources.length - 1) show(0);
  timer = setTimeout(step, waits[shown]);
};
slider.oninput = () => { stop(); show(Number(slider.value)); };
Promise.all(pictures.map((picture) => picture.decode())).then(() => {
  show(sources.length - 1);
  if (!matchMedia("(prefers-reduced-motion: reduce)").matches) button.click();
});
</script>
</html>
"""
