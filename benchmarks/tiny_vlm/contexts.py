"""Contexts to score a model on: the same for the same task, length and numbers, always.

All contexts of a task and length have the same number of images and so the same number of tokens:
they go through the model without padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .album import (
    NUMBER,
    Album,
    Ask,
    Question,
    Recipe,
    compose,
    needle,
    printed,
    questions,
    read,
    what,
    which,
)  # fmt: skip
from .prompt import PLACES, Prompter
from .tiles import Painter, Split


@dataclass(frozen=True)
class Task:
    """What is asked for.

    Attributes:
        recipe: of the albums.
        shares: of kinds of questions; only those above 0 are asked.
        asked: questions about an album.
        images: of an album; None: as many as there is room for.
        most: tokens that a question takes with its answer, at most.
        page: one of the images is full of digits, whatever the recipe, and questions are of every
            kind: see :func:`every`.
    """

    recipe: Recipe
    shares: Mapping[str, float]
    asked: int = 2
    images: int | None = None
    most: int = 40
    page: bool = False


DRAWINGS = Recipe()

TASKS = {
    "caption": Task(DRAWINGS, {"which": 0.0, "what": 1.0}, asked=1, images=1),
    "caption, new pairs": Task(
        Recipe(new=True), {"which": 0.0, "what": 1.0}, asked=1, images=1
    ),
    "which": Task(DRAWINGS, {"which": 1.0, "what": 0.0}),
    "what": Task(DRAWINGS, {"which": 0.0, "what": 1.0}),
    "needle": Task(Recipe(numbers=1e-9), {"needle": 1.0, "which": 0.0, "what": 0.0}, asked=1),
    "read": Task(Recipe(pages=1.0), {"read": 1.0}, asked=1),
    "clip": Task(Recipe(clip=True), {}, asked=1, images=16),
    "all": Task(Recipe(numbers=1e-9), {}, asked=6, most=28, page=True),
}  # fmt: skip


@dataclass(frozen=True)
class Contexts:
    """Contexts of one task and length.

    Attributes:
        ids: the albums, ``[B, P]``.
        tiles: uint8 ``[B, n, SIDE, SIDE, 3]``.
        following: questions and answers behind them, ``[B, T]``, padded at the end.
        spans: for each row, where in ``following`` each answer starts and ends.
        questions: for each row, what was asked, in words.
    """

    ids: Tensor
    tiles: Tensor
    following: Tensor
    spans: list[list[tuple[int, int]]]
    questions: list[list[Question]]

    def places(self, image_id: int) -> Tensor:
        """Where images are in the flattened ids."""
        return (self.ids.flatten() == image_id).nonzero().flatten()


def contexts(
    painter: Painter, prompter: Prompter, name: str, length: int, numbers: range,
    split: Split = "test",
) -> Contexts:  # fmt: skip
    """Contexts of at most ``length`` tokens with their questions.

    Args:
        painter: draws tiles.
        prompter: makes tokens.
        name: of the task.
        length: tokens of the albums, questions and answers together.
        numbers: of the contexts; each number makes another one.
        split: of backgrounds; training does not show those of "test".
    """
    task = TASKS[name]
    most = prompter.images(length - task.asked * task.most)
    count = min(task.images or most, most)
    rows, tiles, spans, asked = [], [], [], []
    for number in numbers:
        generator = np.random.default_rng([2026, list(TASKS).index(name), length, number])
        album = compose(generator, painter, split, count, task.recipe)
        if task.page:
            album = with_page(generator, painter, split, album)
            posed = every(generator, painter, album, task.asked - 2)
        else:
            posed = questions(generator, painter, album, task.asked, dict(task.shares))
        ids, answers = prompter.turns([(q.text, q.answer) for q in posed])
        rows.append(ids)
        tiles.append(album.tiles)
        spans.append(answers)
        asked.append(posed)
    longest = max(map(len, rows))
    padded = [row + prompter.end * (longest - len(row)) for row in rows]
    return Contexts(
        torch.tensor([prompter.album(count)] * len(rows)), torch.from_numpy(np.stack(tiles)),
        torch.tensor(padded), spans, asked,
    )  # fmt: skip


def with_page(
    generator: np.random.Generator, painter: Painter, split: Split, album: Album
) -> Album:
    """The album with an image full of digits in place of one of its drawings."""
    places = [i for i, thing in enumerate(album.things) if not isinstance(thing, str)]
    place = places[generator.integers(len(places))]
    digits, lines = printed(generator, PLACES)
    tiles, things = album.tiles.copy(), list(album.things)
    tiles[place] = painter.print(generator, split, lines)
    things[place] = digits
    return Album(tiles, things)


def every(
    generator: np.random.Generator, painter: Painter, album: Album, drawings: int
) -> list[Question]:
    """Questions on all that is printed, and on some drawings: "which" and "what" in turn.

    Args:
        generator: their order is drawn from it.
        painter: knows the names.
        album: what they are about.
        drawings: how many questions on drawings.
    """
    asked: list[Question] = []
    for image in generator.permutation(len(album.things)):
        thing = album.things[image]
        if isinstance(thing, str):
            ask: Ask = needle if len(thing) == NUMBER else read
        elif drawings:
            ask = which if drawings % 2 else what
            drawings -= 1
        else:
            continue
        asked.append(ask(generator, painter, album, int(image)))
    return asked
