"""Several pass keys in one context, asked for one after the other.

As :mod:`passkey`, but a context has three keys, each of a door of its own, and the first question
is its end: a code that goes by what the last tokens attend to knows that question when it codes,
and not the later ones. Those are further turns of the conversation, behind answers that are right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .passkey import DEPTHS, sentence_end, tokens
from .rivals.base import RECENT, SINKS

DOORS = ("red", "blue", "green")

TASK = "There are three pass keys hidden in the text below. Find them and remember them.\n\n"
NEEDLE = (
    "\n\nThe pass key of the {door} door is {key}. Remember it. "
    "{key} is the pass key of the {door} door.\n\n"
)
QUESTION = "What is the pass key of the {door} door?"
START = "The pass key of the {door} door is"

FOLLOWING = 96
"""Tokens behind the context: answers, and questions between them; rows are padded at the end."""


@dataclass(frozen=True)
class Questions:
    """Contexts of one length.

    Attributes:
        ids: ``[B, context + FOLLOWING]``; the first question ends the context.
        spans: for each row, where in what follows each answer starts and ends, as they are asked.
        depths: for each row, where the key of each question is, from 0 to 1 (end of the context).
    """

    ids: Tensor
    spans: list[list[tuple[int, int]]]
    depths: list[list[float]]


def make(tokenizer: Any, haystacks: Tensor, context: int, first: int = 0) -> Questions:
    """One context for each haystack.

    Args:
        tokenizer: of the model, with a chat template.
        haystacks: prose, int64 ``[B, at least context]``.
        context: tokens before the first answer.
        first: number of the first context, which keys, their places and the order of questions
            depend on: each third of the context is asked about first in one context of three.

    Raises:
        ValueError: the context is too short to have all keys in its coded part.
    """
    rows, spans, depths = [], [], []
    for number, prose in enumerate(haystacks, first):
        row, own, places = _one(tokenizer, prose, context, number)
        rows.append(row)
        spans.append(own)
        depths.append(places)
    return Questions(torch.stack(rows), spans, depths)


def found(predicted: Tensor, ids: Tensor, spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Whether each whole answer would be generated greedily: see :func:`passkey.found`.

    The first token of an answer, a space, is not judged: the first answer's comes from the prefill,
    which is not coded.

    Args:
        predicted: most likely next token behind each of ``ids``: ``[T]``.
        ids: what follows the context: ``[T]``.
        spans: of the answers in it.
    """
    return [
        bool((predicted[start : end - 1] == ids[start + 1 : end]).all()) for start, end in spans
    ]


def _one(
    tokenizer: Any, prose: Tensor, context: int, number: int
) -> tuple[Tensor, list[tuple[int, int]], list[float]]:
    count = len(DOORS)
    generator = torch.Generator().manual_seed(number)
    keys = [str(int(k)) for k in torch.randint(10_000, 100_000, (count,), generator=generator)]
    doors = [DOORS[i] for i in torch.randperm(count, generator=generator)]
    needles = [
        tokens(tokenizer, NEEDLE.format(door=d, key=k)) for d, k in zip(doors, keys, strict=True)
    ]
    order = [(number + i) % count for i in range(count)]  # of the questions
    head, *turns = _conversation(tokenizer, [doors[i] for i in order])
    taken = len(head) + sum(map(len, needles))
    low, high = SINKS, context - RECENT - taken
    if high - low < count * DEPTHS:
        raise ValueError(f"context={context}: too short for {count} keys in the coded part")
    hay = prose[: context - taken - len(turns[0])]
    parts, ends, place = [head], [], 0
    for i, needle in enumerate(needles):
        wanted = low + int((high - low) * (i + (number // count % DEPTHS + 0.5) / DEPTHS) / count)
        here = max(sentence_end(tokenizer, prose, wanted), place)
        parts += [hay[place:here], needle]
        place = here
        ends.append(sum(map(len, parts)) / context)
    parts += [hay[place:], turns[0]]
    end = tokens(tokenizer, tokenizer.eos_token)  # [1]
    spans, at = [], 0
    for turn, i in zip([*turns[1:], end], order, strict=True):
        answer = tokens(tokenizer, f" {keys[i]}")
        spans.append((at, at + len(answer)))
        at += len(answer) + len(turn)
        parts += [answer, turn]
    row = torch.cat([*parts, end.repeat(FOLLOWING - at)])
    return row, spans, [ends[i] for i in order]


def _conversation(tokenizer: Any, doors: Sequence[str]) -> list[Tensor]:
    """Tokens before the prose, behind it up to the first answer, and between answers."""
    prose, key = "<prose>", "<key>"
    first = TASK + prose + "\n\n" + QUESTION.format(door=doors[0])
    messages = [{"role": "user", "content": first}]
    for door, later in pairwise(doors):
        messages += [
            {"role": "assistant", "content": START.format(door=door) + f" {key}."},
            {"role": "user", "content": QUESTION.format(door=later)},
        ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    head, rest = (text + START.format(door=doors[-1])).split(prose)
    return [tokens(tokenizer, part) for part in [head, *rest.split(f" {key}")]]
