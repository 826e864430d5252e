"""Batches of a training, each a function of the plan and its number alone.

So the order of worker processes changes nothing, and a training goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .album import CELLS, NUMBER, compose, printed, questions
from .plans import KINDS, Plan, Stage
from .prompt import PLACES, Prompter
from .tiles import COLUMNS, LINES, Painter

Batch = dict[str, Tensor]

ROOM = 26
"""Tokens that a question with its answer takes, about."""


class Batches(Dataset[Batch]):
    """Batches of one stage.

    Args:
        plan: what they are of.
        number: of the stage, from 0.
        painter: draws tiles.
        prompter: makes tokens.
        text: prose to stay good at, int64 ``[S]``.
    """

    def __init__(
        self, plan: Plan, number: int, painter: Painter, prompter: Prompter, text: Tensor
    ) -> None:
        self.plan = plan
        self.number = number
        self.stage: Stage = plan.stages[number]
        self.painter = painter
        self.prompter = prompter
        self.text = text

    def __getitem__(self, step: int) -> Batch:
        """Batch number ``step``: see :meth:`albums` and :meth:`tiles`."""
        generator = np.random.default_rng([self.plan.seed, self.number, step])
        return self.albums(generator) if self.stage.lengths else self.tiles(generator)

    def tiles(self, generator: np.random.Generator) -> Batch:
        """Single tiles: three in four are drawings, the others printed numbers.

        Returns:
            ``tiles`` uint8 ``[N, SIDE, SIDE, 3]``, drawings first; ``things [D]``, their numbers
            among all things; ``digits [N - D, PLACES]``, the digit under each token, or -1.
        """
        pool = self.painter.things["seen"]
        drawings = self.plan.tiles * 3 // 4
        things = generator.integers(len(pool), size=drawings)
        tiles = [self.painter.show(generator, "train", pool[i]) for i in things]
        under = []
        for _ in range(self.plan.tiles - drawings):
            _, lines = printed(generator, NUMBER if generator.random() < 0.5 else PLACES)
            tiles.append(self.painter.print(generator, "train", lines))
            text = "".join(lines).ljust(LINES * COLUMNS)
            under.append([-1 if digit == " " else int(digit) for digit in text[1::CELLS]])
        return {
            "tiles": torch.from_numpy(np.stack(tiles)),
            "things": torch.from_numpy(things),
            "digits": torch.tensor(under),
        }

    def albums(self, generator: np.random.Generator) -> Batch:
        """Rows of one length, each an album with questions and answers.

        Returns:
            ``ids [B, S]``; ``tiles`` uint8 ``[N, SIDE, SIDE, 3]`` of all rows; ``places``, where
            their tokens are in the flattened ids, ``[N * PLACES]``; ``positions [A]``, the tokens
            before those of the answers, likewise; ``targets [A]``; ``owners [A]``, which question
            each belongs to; ``kinds [Q]``, its task; ``text [R, T]``, prose.
        """
        length = int(_draw(generator, self.stage.lengths))
        rows, tiles, spans, kinds = [], [], [], []
        for row in range(self.plan.tokens // length):
            recipe = _draw(generator, self.stage.albums)
            asked = max(min(4, length // 50), length // 200)
            room = length - asked * ROOM
            most = self.prompter.images(room)
            # Short rows have any number of images; long ones are there for many.
            least = 1 if length <= 512 else most * 3 // 4
            count = int(generator.integers(least, most + 1))
            count = max(count, 4) if recipe.clip else count
            album = compose(generator, self.painter, "train", count, recipe)
            posed = questions(generator, self.painter, album, asked, {})
            ids, answers, taken = self.prompter.fill(
                count, [(q.text, q.answer) for q in posed], length
            )
            rows.append(ids)
            tiles.append(album.tiles)
            spans += [(row * length + start, row * length + end) for start, end in answers]
            kinds += [KINDS.index(q.kind) for q in posed[:taken]]
        ids = torch.tensor(rows)
        flat = ids.flatten()
        targets = torch.cat([torch.arange(start, end) for start, end in spans])
        return {
            "ids": ids,
            "tiles": torch.from_numpy(np.concatenate(tiles)),
            "places": (flat == self.prompter.image_id).nonzero().flatten(),
            "positions": targets - 1,
            "targets": flat[targets],
            "owners": torch.repeat_interleave(torch.tensor([end - at for at, end in spans])),
            "kinds": torch.tensor(kinds),
            "text": self.prose(generator),
        }

    def prose(self, generator: np.random.Generator) -> Tensor:
        """Windows of prose, ``[R, T]``."""
        rows, length = self.plan.replay
        starts = generator.integers(len(self.text) - length, size=rows)
        return torch.stack([self.text[start : start + length] for start in starts])

    def loader(self, first: int, workers: int, pin: bool) -> DataLoader[Batch]:
        """All batches from number ``first`` on, made ahead by worker processes."""
        return DataLoader(
            self, batch_size=None, sampler=range(first, 10**9), num_workers=workers,
            prefetch_factor=2 if workers else None, pin_memory=pin,
        )  # fmt: skip


def _draw(generator: np.random.Generator, shares: Mapping[Any, float]) -> Any:
    total = sum(shares.values())
    return list(shares)[generator.choice(len(shares), p=[s / total for s in shares.values()])]
