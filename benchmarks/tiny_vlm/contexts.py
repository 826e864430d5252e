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

from .album import Question, Recipe, compose, questions
from .prompt import Prompter
from .tiles import Painter


@dataclass(frozen=True)
class Task:
    """What is asked for.

    Attributes:
        recipe: of the albums.
        shares: of kinds of questions; only those above 0 are asked.
        asked: questions about an album.
        images: of an album; None: as many as there is room for.
        most: tokens that a question takes with its answer, at most.
    """

    recipe: Recipe
    shares: Mapping[str, float]
    asked: int = 2
    images: int | None = None
    most: int = 40


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
    painter: Painter, prompter: Prompter, name: str, length: int, numbers: range
) -> Contexts:
    """Contexts of at most ``length`` tokens with their questions.

    Args:
        painter: draws tiles.
        prompter: makes tokens.
        name: of the task.
        length: tokens of the albums, questions and answers together.
        numbers: of the contexts; each number makes another one, with backgrounds and prose that
            training does not show.
    """
    task = TASKS[name]
    most = prompter.images(length - task.asked * task.most)
    count = min(task.images or most, most)
    rows, tiles, spans, asked = [], [], [], []
    for number in numbers:
        generator = np.random.default_rng([2026, list(TASKS).index(name), length, number])
        album = compose(generator, painter, "test", count, task.recipe)
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
