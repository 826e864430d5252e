"""Draws tiles: a drawing or four lines of print on a background, 96 pixels each way."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from PIL import Image

from .pack import Pack
from .sources import CELL, CHARACTERS, Pixels

SIDE = 96
"""Pixels of a tile, each way."""

LINES, COLUMNS = SIDE // CELL[0], SIDE // CELL[1]
"""Lines of print on a tile, and characters of a line."""

COLOURS = {
    "red": (215, 35, 35),
    "orange": (245, 140, 20),
    "yellow": (250, 225, 50),
    "green": (40, 160, 60),
    "blue": (40, 80, 215),
    "purple": (135, 50, 165),
    "black": (25, 25, 25),
    "white": (245, 245, 245),
}
"""Colours of glyphs."""

Split = Literal["train", "test"]

BACKGROUNDS = {"train": 448, "test": 64}
"""How many there are, none in both."""


@dataclass(frozen=True)
class Thing:
    """What a drawing shows.

    Attributes:
        icon: number in the pack.
        colour: of a glyph; none for emoji, which have their own.
    """

    icon: int
    colour: str | None = None


class Painter:
    """Draws with the icons and the characters of a pack.

    Args:
        pack: of :mod:`benchmarks.tiny_vlm.pack`.
        most: how many things there are to see; None: all.
    """

    def __init__(self, pack: Pack, most: int | None = None) -> None:
        self.pack = pack
        self.most = most
        self.pictures = [Image.fromarray(icon) for icon in pack.icons]
        seen = pack.icons[..., 3:].astype(np.float64)
        self.tones = (pack.icons[..., :3] * seen).sum((1, 2)) / seen.sum((1, 2))  # [n, 3]

    @cached_property
    def things(self) -> dict[str, list[Thing]]:
        """What there is to show: ``seen`` in training, and ``new`` pairs of glyph and colour."""
        seen = [Thing(icon) for icon in range(self.pack.emoji)]
        new: list[Thing] = []
        for icon in range(self.pack.emoji, len(self.pack.names)):
            for number, colour in enumerate(COLOURS):
                # Every glyph lacks one colour in training, every colour an eighth of the glyphs.
                held_out = (icon + number) % len(COLOURS) == 0
                (new if held_out else seen).append(Thing(icon, colour))
        return {"seen": seen[: self.most], "new": new[: self.most]}

    def label(self, thing: Thing) -> str:
        """The thing's name: "red plug", "sailboat"."""
        name = self.pack.names[thing.icon]
        return f"{thing.colour} {name}" if thing.colour else name

    @cached_property
    def backgrounds(self) -> dict[str, Pixels]:
        """``[n, SIDE, SIDE, 3]`` of both splits: gradients between two colours, some striped."""
        generator = np.random.default_rng(2026)
        both = {}
        for split, count in BACKGROUNDS.items():
            ends = generator.uniform(20, 235, (count, 2, 1, 1, 3))
            turn = generator.uniform(0, 2 * np.pi, (count, 1, 1))
            y, x = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]
            along = (np.cos(turn) * x + np.sin(turn) * y) / np.sqrt(2)  # [n, SIDE, SIDE]
            waves = generator.integers(2, 7, (count, 1, 1))
            striped = generator.random((count, 1, 1)) < 0.3
            mix = np.where(striped, (np.sin(along * waves * np.pi) + 1) / 2, (along + 1) / 2)
            plain = generator.random((count, 1, 1)) < 0.3
            mix = np.where(plain, 0.0, mix)[..., None]
            both[split] = (ends[:, 0] * (1 - mix) + ends[:, 1] * mix).astype(np.uint8)
        return both

    def background(
        self, generator: np.random.Generator, split: Split, tone: tuple[float, ...]
    ) -> Pixels:
        """A background that stands out from a colour: the farthest of four drawn."""
        bank = self.backgrounds[split]
        drawn = bank[generator.integers(len(bank), size=4)]
        middle = drawn[:, SIDE // 2, SIDE // 2].astype(np.float64)
        return drawn[np.abs(middle - np.asarray(tone)).sum(1).argmax()]

    def tone(self, thing: Thing) -> tuple[float, ...]:
        """The mean colour of a thing."""
        return COLOURS[thing.colour] if thing.colour else tuple(self.tones[thing.icon])

    def draw(self, thing: Thing, background: Pixels, size: int, place: tuple[int, int]) -> Pixels:
        """A thing on a background, ``[SIDE, SIDE, 3]``.

        Args:
            thing: what.
            background: ``[SIDE, SIDE, 3]``.
            size: pixels each way.
            place: of its upper left corner; x, y.
        """
        tile = Image.fromarray(background)
        picture = self.pictures[thing.icon].resize((size, size), Image.Resampling.BILINEAR)
        if thing.colour:
            tile.paste(COLOURS[thing.colour], (*place, place[0] + size, place[1] + size), picture)
        else:
            tile.paste(picture, place, picture)
        return np.asarray(tile)

    def show(self, generator: np.random.Generator, split: Split, thing: Thing) -> Pixels:
        """A thing somewhere on some background, not too small."""
        size = int(generator.integers(56, SIDE - 3))
        x, y = generator.integers(0, SIDE - size + 1, 2)
        background = self.background(generator, split, self.tone(thing))
        return self.draw(thing, background, size, (int(x), int(y)))

    def print(self, generator: np.random.Generator, split: Split, lines: list[str]) -> Pixels:
        """At most ``LINES`` lines of at most ``COLUMNS`` printed characters."""
        height, width = CELL
        face = self.pack.atlas[generator.integers(len(self.pack.atlas))]
        cover = np.zeros((LINES, height, COLUMNS, width), np.float32)
        for row, line in enumerate(lines):
            numbers = [CHARACTERS.index(character) for character in line]
            cover[row, :, : len(line)] = face[numbers].swapaxes(0, 1)
        shade = cover.reshape(SIDE, SIDE, 1) / 255
        dark = generator.random() < 0.5
        ink = generator.uniform(0, 60, 3) if dark else generator.uniform(195, 255, 3)
        paper = self.background(generator, split, tuple(ink))
        # Backgrounds are of all tones: half way to white or black, print is always legible.
        lighter = paper * 0.4 + (153 if dark else 0)
        return (lighter * (1 - shade) + ink * shade).astype(np.uint8)
