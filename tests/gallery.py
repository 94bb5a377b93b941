"""A small gallery for tests: fake cards with real pictures, and real runs of a few passes."""

import json

import numpy as np
from PIL import Image

LRS = [0.003, 0.05, 0.22, 0.9, 2.2]
NASTY = 'Is <b>1 & "2"</b> less than {{conclusion}}?'


def write_card(out, name, *, conclusion="It is so, by 12 %", question="Is it so?", size=(90, 60)):
    """Write what a demo leaves behind, with a picture of noise, and return its card."""
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    for file in ("one.png", "one.bare.png"):
        Image.fromarray(noise).save(folder / file)
    (folder / "one.svg").write_text("<svg/>")
    (folder / "runs.csv").write_text("lr,gap\n0.1,0.25\n")
    picture = {"file": "one.png", "bare": "one.bare.png", "question": question, "conclusion": conclusion}
    card = {
        "demo": name,
        "question": question,
        "fast": False,
        "seconds": 2.5,
        "pictures": [picture | {"numbers": {"gap": 0.25, "uphill": {"16": 0.5, "1": 3e-7}, "n": 1234}}],
        "tables": ["runs.csv"],
    }
    (folder / "card.json").write_text(json.dumps(card), encoding="utf-8")
    return card
