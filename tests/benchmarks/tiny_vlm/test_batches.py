from __future__ import annotations

import numpy as np
import torch

from benchmarks.tiny_vlm.album import NUMBER
from benchmarks.tiny_vlm.batches import Batches
from benchmarks.tiny_vlm.contexts import TASKS, contexts
from benchmarks.tiny_vlm.plans import FULL, TOY
from benchmarks.tiny_vlm.prompt import PLACES
from benchmarks.tiny_vlm.schedule import Budget, rates

from ..tiny import tokenizer
from . import small


def batches(stage: int) -> Batches:
    return Batches(small.PLAN, stage, small.painter(), small.prompter(), torch.arange(500))


def test_batches_depend_on_their_number_alone() -> None:
    for stage in (0, 1):
        ahead = batches(stage)
        ahead[0], ahead[1]
        for name, value in ahead[5].items():
            assert torch.equal(value, batches(stage)[5][name]), name


def test_single_tiles_say_what_they_show() -> None:
    batch = batches(0)[3]
    assert batch["tiles"].shape == (8, 96, 96, 3) and len(batch["things"]) == 6
    assert batch["digits"].shape == (2, PLACES)
    for tile, digits in zip(batch["tiles"][6:], batch["digits"], strict=True):
        assert (digits >= 0).sum() in (NUMBER, PLACES)
        cells = tile.float().mean(-1).view(4, 24, 4, 24).transpose(1, 2).flatten(0, 1)  # [PLACES]
        for cell, digit in zip(cells, digits.tolist(), strict=True):
            middle = cell[:, 8:16].numpy()
            alike = [
                max(abs(np.corrcoef(middle.ravel(), face.ravel())[0, 1]) for face in faces)
                for faces in small.pack().atlas[:, 16:26].swapaxes(0, 1)  # "0" to "9"
            ]
            assert (max(alike) > 0.8) == (digit >= 0)
            assert digit < 0 or int(np.argmax(alike)) == digit


def test_targets_are_the_answers() -> None:
    for step in range(6):
        batch = batches(1)[step]
        flat = batch["ids"].flatten()
        assert torch.equal(flat[batch["positions"] + 1], batch["targets"])
        assert torch.equal(batch["places"], (flat == small.prompter().image_id).nonzero()[:, 0])
        assert len(batch["places"]) == len(batch["tiles"]) * PLACES
        assert batch["owners"].unique().tolist() == list(range(len(batch["kinds"])))
        end = small.prompter().end[0]
        for question in range(len(batch["kinds"])):
            answer = batch["targets"][batch["owners"] == question]
            assert (answer == end).tolist() == [False] * (len(answer) - 1) + [True]
        before = [tokenizer().decode(flat[p - 3 : p + 1]) for p in batch["positions"]]
        starts = np.flatnonzero(np.diff(batch["owners"], prepend=-1))
        assert {before[start] for start in starts} == {"<|im_start|>assistant\n"}


def test_tokens_are_those_of_the_chat_template() -> None:
    prompter = small.prompter()
    ids, spans = prompter.turns([("One?", "first"), ("Two?", "second")])
    turns = [
        {"role": "user", "content": "One?"}, {"role": "assistant", "content": "first"},
        {"role": "user", "content": "Two?"}, {"role": "assistant", "content": "second"},
    ]  # fmt: skip
    expected = tokenizer().apply_chat_template(turns, tokenize=False)
    assert tokenizer().decode(prompter.head + ids) + "\n" == expected
    assert [tokenizer().decode(ids[a:b]) for a, b in spans] == [
        "first<|im_end|>", "second<|im_end|>"
    ]  # fmt: skip


def test_images_that_are_said_to_fit_do() -> None:
    prompter = small.prompter()
    for room in (64, 200, 2500):
        count = prompter.images(room)
        assert len(prompter.album(count)) <= room < len(prompter.album(count + 1))


def test_contexts_are_the_same_always_and_fit() -> None:
    for name in TASKS:
        some = contexts(small.painter(), small.prompter(), name, 256, range(2, 4))
        same = contexts(small.painter(), small.prompter(), name, 256, range(3, 4))
        assert torch.equal(some.tiles[1:], same.tiles) and some.questions[1:] == same.questions
        assert some.ids.shape[1] + some.following.shape[1] <= 256
        for row, answers, asked in zip(some.following, some.spans, some.questions, strict=True):
            said = [tokenizer().decode(row[start : end - 1]) for start, end in answers]
            assert said == [question.answer for question in asked]


def test_shares_of_stages_are_whole() -> None:
    for plan in (FULL, TOY):
        assert abs(sum(stage.share for stage in plan.stages) - 1) < 1e-9
        assert all(length <= plan.tokens for s in plan.stages for length in s.lengths)


def test_rates_warm_up_and_fall() -> None:
    start = small.PLAN.stages[1].rates.change
    assert rates(small.PLAN, 1, 0.0, 0).change == start / 2
    assert rates(small.PLAN, 1, 0.0, 5).change == start
    assert abs(rates(small.PLAN, 1, 1.0, 5).change - start / 10) < 1e-12
    assert Budget(minutes=10).done(0.5, 150, 3) == 0.5
    assert Budget(steps=10).done(0.5, 1e9, 5) == 1.0
