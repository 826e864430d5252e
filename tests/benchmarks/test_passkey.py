from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.quality import passkey
from benchmarks.quality.documents import windows
from benchmarks.quality.rivals.base import RECENT, SINKS

from . import tiny


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.tokenizer()


def test_the_needle_is_coded_and_the_question_comes_behind_the_context(tokenizer: Any) -> None:
    context, prose = 512, windows(tokenizer, "test", 7, 512)
    made = passkey.make(tokenizer, prose, context)
    assert made.ids.shape == (7, context + passkey.FOLLOWING)
    keys = []
    for row, depth in zip(made.ids, made.depths, strict=True):
        answer = tokenizer.decode(row[-made.answer :]).strip()
        keys.append(answer)
        assert answer.isdigit() and len(answer) == 5
        assert tokenizer.decode(row[SINKS : context - RECENT]).count(answer) == 2
        assert answer not in tokenizer.decode(row[context - RECENT : -made.answer])
        following = tokenizer.decode(row[context : -made.answer])
        assert following.endswith(
            "What is the pass key?<|im_end|>\n<|im_start|>assistant\nThe pass key is"
        )
        start = tokenizer.decode(row[: round(depth * context)])
        assert tokenizer.decode(row).removeprefix(start).startswith("\n\nThe pass key is")
    assert len(set(keys)) == 7
    assert sorted(made.depths[:6]) == list(made.depths[:6])
    assert made.depths[0] < 0.25 and made.depths[5] > 0.6


def test_a_prompt_depends_on_its_number_alone(tokenizer: Any) -> None:
    prose = windows(tokenizer, "test", 3, 512)
    made = passkey.make(tokenizer, prose, 512)
    later = passkey.make(tokenizer, prose[1:], 512, first=1)
    assert torch.equal(made.ids[1:], later.ids) and made.depths[1:] == later.depths
    other = passkey.make(tokenizer, prose[1:], 512)
    assert not torch.equal(other.ids, later.ids)


def test_a_context_without_room_is_refused(tokenizer: Any) -> None:
    prose = windows(tokenizer, "test", 1, 512)
    with pytest.raises(ValueError, match="context=128: too short"):
        passkey.make(tokenizer, prose, 128)


def test_found_means_that_every_token_of_the_answer_is_predicted() -> None:
    ids = torch.tensor([[9, 9, 5, 6], [9, 9, 5, 6], [9, 9, 5, 6]])
    predicted = torch.tensor([[0, 5, 6, 0], [0, 5, 7, 6], [0, 4, 6, 0]])
    assert passkey.found(predicted, ids, 2).tolist() == [True, False, False]
