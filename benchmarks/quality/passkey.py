"""Passkey retrieval: a number hidden in prose, asked for at the end.

Mohtashami and Jaggi, Landmark Attention, NeurIPS 2023 (arXiv 2305.16300), section 4.2.1. The
haystack is prose of the test documents. The question comes behind the context, so that no code
can see it while coding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .rivals.base import RECENT, SINKS

TASK = "There is a pass key hidden in the text below. Find it and remember it.\n\n"
NEEDLE = "\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n"
"""A paragraph of its own: amid a paragraph the model itself finds two of six at 2,048 tokens."""

QUESTION = "\n\nWhat is the pass key?"
START = "The pass key is"

FOLLOWING = 48
"""Tokens that come behind the context: the end of the prose, the question, the answer."""

DEPTHS = 6
"""Places of the needle, evenly spread over the context."""


@dataclass(frozen=True)
class PassKeys:
    """Prompts of one length.

    Attributes:
        ids: ``[B, context + FOLLOWING]``; the answer is at the end.
        answer: tokens of the answer.
        depths: where the needle of each is, from 0 (start) to 1 (end of the context).
    """

    ids: Tensor
    answer: int
    depths: tuple[float, ...]


def make(tokenizer: Any, haystacks: Tensor, context: int, first: int = 0) -> PassKeys:
    """One prompt for each haystack.

    Args:
        tokenizer: of the model, with a chat template.
        haystacks: prose, int64 ``[B, at least context]``.
        context: tokens before the ones that follow.
        first: number of the first prompt; number and depth of a pass key depend on it.

    Raises:
        ValueError: the context is too short to have the needle in its coded part.
    """
    head, tail = _template(tokenizer)
    rows, depths = [], []
    for number, prose in enumerate(haystacks, first):
        generator = torch.Generator().manual_seed(number)
        key = str(int(torch.randint(10_000, 100_000, (), generator=generator)))
        needle = tokens(tokenizer, NEEDLE.format(key=key))
        answer = tokens(tokenizer, f" {key}")
        room = context + FOLLOWING - len(head) - len(needle) - len(tail) - len(answer)
        low, high = SINKS, context - RECENT - len(head) - len(needle)
        if high - low < DEPTHS:
            raise ValueError(f"context={context}: too short for a needle in the coded part")
        wanted = low + int((high - low) * (number % DEPTHS + 0.5) / DEPTHS)
        place = sentence_end(tokenizer, prose, wanted)
        hay = prose[:room]
        rows.append(torch.cat([head, hay[:place], needle, hay[place:], tail, answer]))
        depths.append((len(head) + place) / context)
    return PassKeys(torch.stack(rows), len(answer), tuple(depths))


def found(predicted: Tensor, ids: Tensor, answer: int) -> Tensor:
    """Whether the whole answer would be generated greedily: bool ``[B]``.

    Args:
        predicted: most likely next token behind each of ``ids``: ``[B, T]``.
        ids: tokens that followed the context: ``[B, T]``, the answer at the end.
        answer: tokens of the answer. Greedy decoding gives it if and only if every one of its
            tokens is the most likely behind those before it.
    """
    return (predicted[:, -answer - 1 : -1] == ids[:, -answer:]).all(1)


def _template(tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Tokens of the conversation before and behind the prose."""
    mark = "<prose>"
    messages = [{"role": "user", "content": TASK + mark + QUESTION}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    head, tail = (text + START).split(mark)
    return tokens(tokenizer, head), tokens(tokenizer, tail)


def tokens(tokenizer: Any, text: str) -> Tensor:
    """Tokens of a text as it is, int64 ``[T]``."""
    return tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0]


def sentence_end(tokenizer: Any, prose: Tensor, wanted: int) -> int:
    """The last place at or before ``wanted`` that is behind a full stop; ``wanted`` if none."""
    for place in range(wanted, 0, -1):
        if tokenizer.decode(prose[place - 1]).endswith("."):
            return place
    return wanted
