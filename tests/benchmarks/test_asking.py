from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.quality import asking
from benchmarks.quality.asking import QuestionSuite
from benchmarks.quality.jobs import Claims
from benchmarks.quality.measure import Clock, Run, measure
from benchmarks.quality.method import Method
from benchmarks.quality.publish import publish
from benchmarks.quality.results import Results, environment
from benchmarks.quality.rivals.dense import Dense
from benchmarks.quality.runner import RivalRunner, Setting, Sizes
from benchmarks.quality.table import markdown

from . import tiny

CONTEXT = 512


@pytest.fixture(scope="module")
def suite() -> QuestionSuite:
    return QuestionSuite(tiny.subject(), 5, 2)


class Told:
    """A method that knows the answers to some questions: of each context, by its number."""

    def __init__(self, known: list[set[int]]) -> None:
        self.known = iter(known)

    def prefill(self, prompts: Any) -> Any:
        assert prompts.length == CONTEXT

    def follow(self, cache: Any, ids: torch.Tensor) -> torch.Tensor:
        logits = torch.nn.functional.one_hot(ids.roll(-1, 1), 49152).float()
        for row in logits:
            known = next(self.known)
            for number, start in enumerate((0, 36, 72)):
                if number not in known:
                    row[start + 2, 0] = 2.0  # one digit is wrong
        return logits

    def sizes(self, cache: Any) -> Sizes:
        return Sizes(1.0, 1.0, 1.0, 0)

    def notes(self) -> dict[str, Any]:
        return {}


def test_answers_are_counted_by_question(suite: QuestionSuite) -> None:
    batches = suite.at(CONTEXT, dense=False)
    assert [len(b.spans) for b in batches] == [2, 2, 1]
    assert {tuple(spans) for b in batches for spans in b.spans} == {((0, 6), (36, 42), (72, 78))}
    told = Told([{0, 1, 2}, {0}, {0, 2}, set(), {0, 1}])
    scores, _ = suite.score(told, batches, CONTEXT)
    values = scores["by_window"]
    assert [values[name] for name in asking.ORDER] == [
        [1, 1, 1, 0, 1], [1, 0, 0, 0, 1], [1, 0, 1, 0, 0],
    ]  # fmt: skip
    assert scores["first"]["mean"] == pytest.approx(0.8)
    assert scores["later"]["mean"] == pytest.approx(0.4)
    assert all(len(values[f"depth of {name}"]) == 5 for name in asking.ORDER)


def test_the_dense_cache_answers_as_the_model_does_at_once(suite: QuestionSuite) -> None:
    subject = suite.subject
    (batch, *_), runner = suite.at(CONTEXT, dense=True), RivalRunner(subject, Dense())
    got = runner.follow(runner.prefill(batch.prompts), batch.following)
    whole = torch.cat([batch.prompts.ids, batch.following], 1)
    torch.testing.assert_close(got, subject.model(whole).logits[:, CONTEXT:])


def test_dense_caches_are_let_go_of(suite: QuestionSuite) -> None:
    batch = suite.at(CONTEXT, dense=True)[0]
    assert len(batch.prompts.layers) == 2 and "prefilled" in vars(batch.prompts)
    assert suite.at(CONTEXT, dense=False)[0] is batch
    assert "prefilled" not in vars(batch.prompts)


def test_a_cell_and_its_row(
    suite: QuestionSuite, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run("tiny", (CONTEXT,), 5, 0, "questions", 2)
    setting = Setting(suite.subject, tiny.texts(1, CONTEXT), 96, "eager", run.contexts)
    known = [{0, 1, 2}, {0}, {0, 2}, set(), {0, 1}]
    methods = [
        Method("none", "none", frozenset(), lambda _: Told([set()] * 5)),
        Method("some", "some", frozenset(), lambda _: Told(known)),
    ]
    path = tmp_path / "q.json"
    made = Results.resume(path, {"windows": 5}, environment(torch.device("cpu")), "command")
    assert measure(run, methods, setting, made, Clock(None), Claims(None), suite)
    assert "2/2 some, 512 tokens: ratio 1.00, first 0.80, later 0.40" in capsys.readouterr().out
    rows = markdown({"cells": made.cells, "settings": made.settings, "command": "",
                     "environment": made.environment}).splitlines()  # fmt: skip
    assert rows[0] == "Context 512 tokens, 5 contexts of three keys:"
    assert [row.split(" | ")[0] for row in rows[4:6]] == ["| some", "| none"]
    assert rows[4].endswith(" | 4 of 5 | 2 of 5 | 2 of 5 |")
    publish(path, "tiny")  # nothing to plot
    assert not path.with_suffix(".svg").exists()
