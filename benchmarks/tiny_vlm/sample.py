"""One album that is in the repository, for the demo and a test: neither needs the image pack.

python -m benchmarks.tiny_vlm.sample        draws it again, from the pack
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from .album import NUMBER, Question, Recipe, compose
from .contexts import with_page
from .pack import load as load_pack
from .sources import Pixels
from .tiles import SIDE, Painter

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "data"

COLUMNS = 7
"""Tiles side by side in the picture."""

ROWS = 6

SEED = 8
"""What is drawn follows from it; with backgrounds that training does not show."""


@dataclass(frozen=True)
class Sample:
    """An album.

    Attributes:
        tiles: uint8 ``[n, SIDE, SIDE, 3]``.
        shown: what each image shows: a name, or digits.
        printed: numbers of the images of print.
    """

    tiles: Pixels
    shown: tuple[str, ...]
    printed: tuple[int, ...]

    def which(self, image: int) -> Question:
        """Which image shows what image number ``image``, from 0, shows?"""
        text = f"Which image shows the {self.shown[image]}?"
        return Question("which", text, str(image + 1), image)

    def what(self, image: int) -> Question:
        """What is in it, or what is printed on it?"""
        name = self.shown[image]
        if image not in self.printed:
            return Question("what", f"What is in image {image + 1}?", name, image)
        if len(name) == NUMBER:
            return Question("needle", "What is the number?", name, image)
        return Question("read", f"Read image {image + 1}.", name, image)

    def page(self) -> Image.Image:
        """All images beside each other with their numbers, to be looked at."""
        rows, edge = math.ceil(len(self.tiles) / COLUMNS), 16
        page = Image.new("RGB", (COLUMNS * (SIDE + 4), rows * (SIDE + edge)), "white")
        pen = ImageDraw.Draw(page)
        for number, tile in enumerate(self.tiles):
            y, x = divmod(number, COLUMNS)
            corner = x * (SIDE + 4) + 2, y * (SIDE + edge) + edge
            page.paste(Image.fromarray(tile), corner)
            pen.text((corner[0], corner[1] - 13), f"{number + 1}:", fill="black")
        return page


def load() -> Sample:
    """The album of the repository."""
    about = json.loads((FOLDER / "album.json").read_text(encoding="utf-8"))
    sheet = np.asarray(Image.open(FOLDER / "album.png").convert("RGB"))
    rows = len(sheet) // SIDE
    tiles = sheet.reshape(rows, SIDE, COLUMNS, SIDE, 3).swapaxes(1, 2).reshape(-1, SIDE, SIDE, 3)
    return Sample(tiles[: len(about["shown"])], tuple(about["shown"]), tuple(about["printed"]))


def main() -> None:
    """Draw it."""
    painter, generator = Painter(load_pack()), np.random.default_rng(SEED)
    album = compose(generator, painter, "test", ROWS * COLUMNS, Recipe(numbers=1e-9))
    album = with_page(generator, painter, "test", album)
    sheet = album.tiles.reshape(ROWS, COLUMNS, SIDE, SIDE, 3).swapaxes(1, 2)
    picture = Image.fromarray(sheet.reshape(ROWS * SIDE, COLUMNS * SIDE, 3))
    picture.save(FOLDER / "album.png", optimize=True)
    names = [t if isinstance(t, str) else painter.label(t) for t in album.things if t]
    printed = [i for i, thing in enumerate(album.things) if isinstance(thing, str)]
    about = json.dumps({"shown": names, "printed": printed}, indent=1)
    (FOLDER / "album.json").write_text(about + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
