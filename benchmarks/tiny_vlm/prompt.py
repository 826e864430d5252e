"""Albums and questions as tokens, in SmolLM2's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

IMAGE = "<empty_output>"
"""A token that SmolLM2 has but does not use in conversation: one place of an image."""

PLACES = 16
"""Tokens of an image."""


class Prompter:
    """Turns albums and questions into token ids.

    Args:
        tokenizer: of SmolLM2.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.image_id: int = tokenizer.convert_tokens_to_ids(IMAGE)
        turns = [
            {"role": "user", "content": "<1>"},
            {"role": "assistant", "content": "<2>"},
            {"role": "user", "content": "<3>"},
        ]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        head, asked, answered, _ = _split(text, "<1>", "<2>", "<3>")
        self.head = self.tokens(head)
        self.asked = self.tokens(asked)
        # An answer ends with the token that ends a turn; what follows opens the user's next one.
        self.end = self.tokens(answered)[:1]
        self.next = self.tokens(answered)[1:]
        self._tokens = cache(self.tokens)

    def tokens(self, text: str) -> list[int]:
        """Ids of plain text."""
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def album(self, count: int) -> list[int]:
        """The start of the conversation with ``count`` images; the same for all such albums."""
        ids = list(self.head)
        for number in range(1, count + 1):
            ids += self._tokens(f"{number}:") + [self.image_id] * PLACES + self._tokens("\n")
        return ids

    def images(self, room: int) -> int:
        """How many images an album of at most ``room`` tokens has."""
        count, used = 0, len(self.head)
        while True:
            used += len(str(count + 1)) + 1 + PLACES + 1
            if used > room:
                return count
            count += 1

    def question(self, text: str) -> list[int]:
        """A question, up to where the answer starts."""
        return self._tokens(text) + self.asked

    def answer(self, text: str) -> list[int]:
        """An answer with its end."""
        return self._tokens(text) + self.end

    def turns(self, asked: Sequence[tuple[str, str]]) -> tuple[list[int], list[tuple[int, int]]]:
        """Questions with their answers, one after the other.

        Returns:
            The ids, and where in them each answer starts and ends.
        """
        ids: list[int] = []
        spans = []
        for number, (text, reply) in enumerate(asked):
            ids += (self.next if number else []) + self.question(text)
            answer = self.answer(reply)
            spans.append((len(ids), len(ids) + len(answer)))
            ids += answer
        return ids, spans

    def fill(
        self, count: int, asked: Sequence[tuple[str, str]], length: int
    ) -> tuple[list[int], list[tuple[int, int]], int]:
        """A row of ``length`` tokens: an album, as many questions as there is room for, padding.

        Returns:
            The ids; where in them each answer starts and ends; how many questions were taken.

        Raises:
            ValueError: there is no room for a single question.
        """
        album = self.album(count)
        for taken in range(len(asked), 0, -1):
            turns, spans = self.turns(asked[:taken])
            if len(album) + len(turns) <= length:
                break
        else:
            raise ValueError(f"length={length}: too short for {count} images and a question")
        ids = album + turns
        spans = [(len(album) + start, len(album) + end) for start, end in spans]
        return ids + self.end * (length - len(ids)), spans, taken


def _split(text: str, *marks: str) -> list[str]:
    parts = []
    for mark in marks:
        part, _, text = text.partition(mark)
        parts.append(part)
    return [*parts, text]
