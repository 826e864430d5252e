from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from benchmarks.quality import questions
from benchmarks.quality.documents import windows
from benchmarks.quality.rivals.base import RECENT, SINKS

from . import tiny

CONTEXT = 768


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.tokenizer()


@pytest.fixture(scope="module")
def made(tokenizer: Any) -> questions.Questions:
    return questions.make(tokenizer, windows(tokenizer, "test", 6, CONTEXT), CONTEXT)


def door_of(text: str) -> str:
    return text.split(" door")[0].split()[-1]


def test_keys_are_coded_and_the_first_question_ends_the_context(
    tokenizer: Any, made: questions.Questions
) -> None:
    assert made.ids.shape == (6, CONTEXT + questions.FOLLOWING)
    for row, spans in zip(made.ids, made.spans, strict=True):
        coded = tokenizer.decode(row[SINKS : CONTEXT - RECENT])
        following = row[CONTEXT:]
        answers = [tokenizer.decode(following[a:b]) for a, b in spans]
        turns = [
            tokenizer.decode(row[CONTEXT - 40 : CONTEXT]),
            *(tokenizer.decode(following[b:c]) for (_, b), (c, _) in pairwise(spans)),
        ]
        assert len(set(answers)) == len({door_of(t.split("What is")[1]) for t in turns}) == 3
        for answer, turn in zip(answers, turns, strict=True):
            assert answer[0] == " " and answer[1:].isdigit() and len(answer) == 6
            door = door_of(turn.split("What is")[1])
            assert turn.endswith(
                f"What is the pass key of the {door} door?<|im_end|>\n<|im_start|>assistant\n"
                f"The pass key of the {door} door is"
            )
            needle = questions.NEEDLE.format(door=door, key=answer[1:])
            assert coded.count(needle) == 1
        assert (following[spans[-1][1] :] == tokenizer.eos_token_id).all()


def test_each_third_of_the_context_is_asked_about_first(made: questions.Questions) -> None:
    for number, places in enumerate(made.depths):
        thirds = sorted(range(3), key=lambda i: places[i])
        assert [thirds.index(i) for i in range(3)] == [(number + i) % 3 for i in range(3)]
        assert min(places) > 0 and max(places) < 1 - RECENT / CONTEXT


def test_a_context_depends_on_its_number_alone(tokenizer: Any, made: questions.Questions) -> None:
    prose = windows(tokenizer, "test", 6, CONTEXT)
    later = questions.make(tokenizer, prose[2:], CONTEXT, first=2)
    assert torch.equal(later.ids, made.ids[2:]) and later.spans == made.spans[2:]
    other = questions.make(tokenizer, prose[2:], CONTEXT)
    assert not torch.equal(other.ids, later.ids)


def test_a_context_without_room_is_refused(tokenizer: Any) -> None:
    prose = windows(tokenizer, "test", 1, 192)
    with pytest.raises(ValueError, match="context=192: too short for 3 keys"):
        questions.make(tokenizer, prose, 192)


def test_found_means_that_every_token_but_the_space_is_predicted() -> None:
    ids = torch.tensor([7, 1, 2, 9, 7, 3, 4])
    spans = [(0, 3), (4, 7)]
    right = torch.tensor([1, 2, 9, 0, 3, 4, 0])  # not the space behind 9
    assert questions.found(right, ids, spans) == [True, True]
    assert questions.found(torch.tensor([1, 5, 9, 7, 3, 4, 0]), ids, spans) == [False, True]
    assert questions.found(torch.tensor([1, 2, 9, 7, 0, 4, 0]), ids, spans) == [True, False]
