"""Albums: numbered images, and what can be asked about them.

Questions come behind all images, so that a cache of the images is made before anybody knows what
will be asked. Every draw is a function of a generator alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .prompt import PLACES
from .sources import Pixels
from .tiles import COLUMNS, SIDE, Painter, Split, Thing

CELLS = 3
"""Printed characters under one token of an image: it is as high as one line."""

NUMBER = 5
"""Digits of a number; an image that is full of digits has ``PLACES`` of them."""

MOVES = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""Ways in which a thing moves through a clip: x, y."""


@dataclass(frozen=True)
class Album:
    """Images in their order, numbered from 1.

    Attributes:
        tiles: uint8 ``[n, SIDE, SIDE, 3]``.
        things: what each image shows; its digits if it is print, None if it is a frame of a clip.
        move: the way in which the thing of a clip moves.
        clip: the name of that thing.
    """

    tiles: Pixels
    things: list[str | Thing | None]
    move: str = ""
    clip: str = ""


@dataclass(frozen=True)
class Question:
    """A question about an album.

    Attributes:
        kind: which task it belongs to.
        text, answer: in plain words.
        image: number of the image it is about, from 0; -1 if it is about all.
    """

    kind: str
    text: str
    answer: str
    image: int = -1


@dataclass(frozen=True)
class Recipe:
    """What an album is made of.

    Attributes:
        numbers: share of images with a number of five digits; at least one is.
        pages: share of images full of digits.
        clip: one thing moves through all images.
        new: drawings are of pairs of glyph and colour that training does not show.
    """

    numbers: float = 0.0
    pages: float = 0.0
    clip: bool = False
    new: bool = False


def compose(
    generator: np.random.Generator, painter: Painter, split: Split, count: int, recipe: Recipe
) -> Album:
    """An album of ``count`` images.

    Args:
        generator: everything is drawn from it.
        painter: what draws.
        split: of the backgrounds.
        count: images.
        recipe: what they show.
    """
    if recipe.clip:
        return _clip(generator, painter, split, count)
    kinds = generator.choice(
        3, count, p=[1 - recipe.numbers - recipe.pages, recipe.numbers, recipe.pages]
    )
    if recipe.numbers and not (kinds == 1).any():
        kinds[generator.integers(count)] = 1
    pool = painter.things["new" if recipe.new else "seen"]
    picked = _without_repeats(generator, pool, count)
    tiles: list[Pixels] = []
    things: list[str | Thing | None] = []
    for kind, thing in zip(kinds, picked, strict=True):
        if kind == 0:
            tiles.append(painter.show(generator, split, thing))
            things.append(thing)
            continue
        digits, lines = printed(generator, NUMBER if kind == 1 else PLACES)
        tiles.append(painter.print(generator, split, lines))
        things.append(digits)
    return Album(np.stack(tiles), things)


def which(generator: np.random.Generator, painter: Painter, album: Album, image: int) -> Question:
    """Which image shows a thing?"""
    label = painter.label(_thing(album, image))
    return Question("which", f"Which image shows the {label}?", str(image + 1), image)


def what(generator: np.random.Generator, painter: Painter, album: Album, image: int) -> Question:
    """What does an image show?"""
    label = painter.label(_thing(album, image))
    return Question("what", f"What is in image {image + 1}?", label, image)


def needle(generator: np.random.Generator, painter: Painter, album: Album, image: int) -> Question:
    """The number on an image; if there is no other, without saying on which."""
    alone = sum(_is_number(thing) for thing in album.things) == 1
    text = "What is the number?" if alone else f"What is the number in image {image + 1}?"
    return Question("needle", text, str(album.things[image]), image)


def read(generator: np.random.Generator, painter: Painter, album: Album, image: int) -> Question:
    """All digits on an image that is full of them."""
    return Question("read", f"Read image {image + 1}.", str(album.things[image]), image)


def clip(generator: np.random.Generator, painter: Painter, album: Album, image: int) -> Question:
    """What moves, or where to."""
    if generator.random() < 0.5:
        return Question("clip", "What is moving?", album.clip)
    return Question("clip", f"Which way does the {album.clip} move?", album.move)


Ask = Callable[[np.random.Generator, Painter, Album, int], Question]


def questions(
    generator: np.random.Generator, painter: Painter, album: Album, count: int,
    shares: dict[str, float],
) -> list[Question]:  # fmt: skip
    """At most ``count`` questions, each about another image.

    Args:
        generator: they are drawn from it.
        painter: knows the names.
        album: what they are about.
        count: how many.
        shares: of the tasks ``which`` and ``what`` among questions on drawings; other images have
            one kind of question each.
    """
    if album.clip:
        return [clip(generator, painter, album, 0)]
    asked = []
    for image in generator.permutation(len(album.things)):
        thing = album.things[image]
        if isinstance(thing, str):
            ask: Ask = needle if _is_number(thing) else read
            kind = ask.__name__
        else:
            ask = which if generator.random() < shares.get("which", 0.5) else what
            kind = ask.__name__
        if shares.get(kind, 1.0) > 0:
            asked.append(ask(generator, painter, album, int(image)))
        if len(asked) == count:
            break
    return asked


def _clip(generator: np.random.Generator, painter: Painter, split: Split, count: int) -> Album:
    pool = painter.things["seen"]
    thing = pool[generator.integers(len(pool))]
    background = painter.background(generator, split, painter.tone(thing))
    move = list(MOVES)[generator.integers(len(MOVES))]
    size = 48
    room = SIDE - size
    start = np.array([room // 2, room // 2]) - np.array(MOVES[move]) * (room // 2)
    across = generator.integers(-room // 2, room // 2 + 1) * np.abs(MOVES[move])[::-1]
    tiles = []
    for step in np.linspace(0, room, count):
        x, y = (start + across + np.array(MOVES[move]) * step).astype(int).clip(0, room)
        tiles.append(painter.draw(thing, background, size, (int(x), int(y))))
    return Album(np.stack(tiles), [None] * count, move, painter.label(thing))


def _without_repeats(generator: np.random.Generator, pool: list[Thing], count: int) -> list[Thing]:
    if count > len(pool):
        raise ValueError(f"count={count}: there are {len(pool)} things")
    return [pool[i] for i in generator.choice(len(pool), count, replace=False)]


def printed(generator: np.random.Generator, count: int) -> tuple[str, list[str]]:
    """So many digits, and the lines they are printed on: one under a token, somewhere in a row."""
    digits = "".join(map(str, generator.integers(10, size=count)))
    cells = " " * int(generator.integers(PLACES - count + 1)) + digits
    width = COLUMNS // CELLS
    lines = [cells[start : start + width] for start in range(0, len(cells), width)]
    return digits, ["".join(f" {digit} " for digit in line) for line in lines]


def _is_number(thing: str | Thing | None) -> bool:
    return isinstance(thing, str) and len(thing) == NUMBER


def _thing(album: Album, image: int) -> Thing:
    thing = album.things[image]
    if not isinstance(thing, Thing):
        raise TypeError(f"image {image} is no drawing: {thing}")
    return thing
