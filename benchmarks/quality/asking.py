"""One method on several questions about one context: do later ones suffer from the first?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from . import questions
from .documents import documents, windows
from .metrics import share
from .runner import Runner, Sizes
from .subject import Prompts, Subject

ORDER = ("first", "second", "third")
"""Questions as they are asked."""


class Batch:
    """Contexts that are run together.

    Args:
        subject: the model.
        asked: the contexts, all of one length.
        context: that length.
    """

    def __init__(self, subject: Subject, asked: questions.Questions, context: int) -> None:
        ids = asked.ids.to(subject.device)
        self.prompts = Prompts(subject, ids[:, :context].clone())
        self.following = ids[:, context:]  # [B, questions.FOLLOWING]
        self.spans = asked.spans
        self.depths = asked.depths


class QuestionSuite:
    """Contexts of prose with three pass keys, and how methods are scored on them.

    Args:
        subject: the model.
        count: contexts; each test document serves as often as need be.
        batch: contexts that are run together.
    """

    def __init__(self, subject: Subject, count: int, batch: int) -> None:
        self.subject = subject
        self.count = count
        self.batch = batch
        self._made: dict[int, list[Batch]] = {}

    def at(self, context: int, dense: bool) -> list[Batch]:
        """The contexts of a length.

        Args:
            context: tokens that are prefilled.
            dense: whether dense caches will be used; those that are not are let go of.
        """
        for other, made in self._made.items():
            if other != context or not dense:
                for one in made:
                    one.prompts.release()
        if context not in self._made:
            prose = windows(
                self.subject.tokenizer, "test", min(self.count, len(documents("test"))), context
            )
            numbers = torch.arange(self.count).split(self.batch)
            self._made[context] = [self._batch(prose, some, context) for some in numbers]
        return self._made[context]

    def _batch(self, prose: Tensor, numbers: Tensor, context: int) -> Batch:
        haystacks, first = prose[numbers % len(prose)], int(numbers[0])
        asked = questions.make(self.subject.tokenizer, haystacks, context, first)
        return Batch(self.subject, asked, context)

    def score(
        self, runner: Runner, references: Sequence[Batch], context: int
    ) -> tuple[dict[str, Any], Sizes]:
        """Figures of a method, and the bytes of its cache.

        Returns:
            The share of right answers to the question that ends the context, and to both later
            ones; in ``by_window`` 1 for each that is right, and where its key is.
        """
        hits: dict[str, list[float]] = {name: [] for name in ORDER}
        depths: dict[str, list[float]] = {f"depth of {name}": [] for name in ORDER}
        for batch in references:
            cache = runner.prefill(batch.prompts)
            predicted = runner.follow(cache, batch.following).argmax(-1)  # [B, T]
            sizes = runner.sizes(cache)
            del cache
            for row, ids, spans, places in zip(
                predicted, batch.following, batch.spans, batch.depths, strict=True
            ):
                right = questions.found(row, ids, spans)
                for name, hit, place in zip(ORDER, right, places, strict=True):
                    hits[name].append(float(hit))
                    depths[f"depth of {name}"].append(place)
        later = [(a + b) / 2 for a, b in zip(hits["second"], hits["third"], strict=True)]
        figures = {
            "first": asdict(share(torch.tensor(hits["first"]))),
            "later": asdict(share(torch.tensor(later))),
        }
        return {**figures, "by_window": {**hits, **depths}}, sizes

    def line(self, cell: dict[str, Any]) -> str:
        """A cell in a line."""
        return (
            f"{cell['method']}, {cell['context']} tokens: ratio {cell['ratio']:.2f}, first "
            f"{cell['first']['mean']:.2f}, later {cell['later']['mean']:.2f}; "
            f"{cell['seconds']:.0f} s"
        )
