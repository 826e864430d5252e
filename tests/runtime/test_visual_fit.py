"""Codes of prompts with images: what is counted, what is fitted anew, what the report says."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import transformers

import apack_compile
from apack_compile.fitting.layer import Lesson
from apack_compile.runtime.study import Studies

from .. import zoo

OPTIONS = {"ratio": 4, "inner": "eager"}


def compiled(case: zoo.Case, **changes: Any) -> Any:
    return torch.compile(case.model, backend="attentionpack", options={**OPTIONS, **changes})


def prefill(model: Any, inputs: dict[str, Any]) -> transformers.DynamicCache:
    cache = transformers.DynamicCache()
    model(**inputs, past_key_values=cache, logits_to_keep=1)
    return cache


def without_image(case: zoo.Case) -> dict[str, Any]:
    ids = case.inputs["input_ids"].clamp(max=190)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def runs(case: zoo.Case) -> dict[str, int]:
    """How often graphs with packed caches ran, by what was run."""
    counts: Counter[str] = Counter()
    for graph in apack_compile.report(case.model).graph_reports:
        if not graph.reason:
            counts.update(dict(graph.runs))
    return dict(counts)


def reasons(case: zoo.Case) -> set[str]:
    graphs = apack_compile.report(case.model).graph_reports
    return {reason for graph in graphs for _, reason in graph.notes}


@pytest.fixture
def lessons(monkeypatch: pytest.MonkeyPatch) -> list[Lesson]:
    """Of every first layer that a prefill is learnt from."""
    seen: list[Lesson] = []
    run = Studies.run

    def listen(self: Studies, *args: Any) -> Any:
        study = run(self, *args)
        seen.append(study.lessons[0])
        return study

    monkeypatch.setattr(Studies, "run", listen)
    return seen


def test_a_first_prompt_with_an_image_is_fitted_by_kind(lessons: list[Lesson]) -> None:
    case = zoo.llava(batch=2, padded=True, text=200, side=112)
    prefill(compiled(case), case.inputs)
    (lesson,) = lessons
    assert lesson.visual
    # Each row: a start token, 64 visual ones, text. The first four are sinks, and one has padding.
    assert lesson.sums[0].item() == 2 * (1 + 64 + 200 - 4) - 5
    assert lesson.visual[0].item() == 2 * (64 - 3)
    report = apack_compile.report(case.model)
    assert [name for name, _ in report.kinds] == [name for name, _ in report.errors]
    assert len(report.kinds) == 4  # keys and values of two layers
    assert all(0 < error < 1 for _, pair in report.kinds for error in pair)
    text = str(report)
    assert "coding error of keys by kind of token, mean: text 0." in text
    assert "coding error of values by kind of token, mean: text 0." in text
    assert "fitted on 517 tokens, 122 of them visual" in text


@pytest.mark.parametrize("family", [zoo.llama, zoo.llava])
def test_text_alone_costs_no_second_sums(family: Any, lessons: list[Lesson]) -> None:
    case = family(text=300)
    prefill(compiled(case), without_image(case))
    (lesson,) = lessons
    assert lesson.visual == ()
    report = apack_compile.report(case.model)
    assert report.kinds == () and len(report.errors) == 4
    assert "visual" not in str(report)


def test_a_merge_behind_a_graph_break_is_known_to_the_fit(lessons: list[Lesson]) -> None:
    case = zoo.qwen2_vl(text=90, grid=8)
    prefill(compiled(case, fit_tokens=64), case.inputs)
    (lesson,) = lessons
    assert lesson.visual
    assert lesson.sums[0].item() == 2 + 16 + 90 - 4
    assert lesson.visual[0].item() == 16 - 2


def test_embeddings_of_unknown_kind_are_fitted_as_one(lessons: list[Lesson]) -> None:
    case = zoo.llama(text=300)
    embeddings = case.model.get_input_embeddings()(case.inputs["input_ids"])
    prefill(compiled(case), {"inputs_embeds": embeddings})
    (lesson,) = lessons
    assert lesson.visual is None
    report = apack_compile.report(case.model)
    assert report.kinds == ()
    assert "fitted on 297 tokens (which of them are visual is not known)" in str(report)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_codes_that_have_seen_no_image_are_fitted_once_more(family: str) -> None:
    size = {"side": 112} if family == "llava" else {"grid": 12}
    case = getattr(zoo, family)(text=200, **size)
    model = compiled(case, fit_tokens=128)
    first = prefill(model, without_image(case))
    prefill(model, without_image(case))
    assert runs(case) == {"fit": 1, "encode": 1}
    assert apack_compile.report(case.model).kinds == ()
    second = prefill(model, case.inputs)
    assert runs(case) == {"fit": 2, "encode": 1}
    third = prefill(model, case.inputs)
    assert runs(case) == {"fit": 2, "encode": 2}, "once is enough"
    for blind, anew, later in zip(first.layers, second.layers, third.layers, strict=True):
        for side in ("keys", "values"):
            refs = [getattr(layer, side).store.ref for layer in (blind, anew, later)]
            assert refs[0] is not refs[1] and refs[1] is refs[2]
            assert refs[0].layout == refs[1].layout, "graphs are compiled for it"
            assert refs[0].code.kinds is None and refs[1].code.kinds is not None


def test_blind_codes_are_used_until_enough_was_seen_and_the_report_says_so() -> None:
    case = zoo.llava(text=60, side=112)
    long = zoo.llava(text=400)
    model = compiled(case, fit_tokens=300)
    prefill(model, without_image(long))
    blind = prefill(model, case.inputs)
    assert runs(case) == {"fit": 2}
    assert reasons(case) == {
        "the codes have not seen visual tokens; 121 of 300 tokens seen that a fit wants"
    }
    assert blind.layers[0].keys.store.ref.code.kinds is None
    for _ in range(2):
        prefill(model, case.inputs)
    assert runs(case) == {"fit": 4}
    assert not any("not seen visual" in reason for reason in reasons(case))
    prefill(model, case.inputs)
    assert runs(case) == {"fit": 4, "encode": 1}


def test_codes_from_disk_know_whether_they_have_seen_an_image() -> None:
    case = zoo.llava(text=200, side=112)
    for inputs, expected in (
        (without_image(case), {"fit": 1}),
        (case.inputs, {"fit": 1}),  # loaded, blind
        (case.inputs, {"encode": 1}),  # loaded
    ):
        torch._dynamo.reset()  # forgets all codes
        prefill(compiled(case, fit_tokens=128), inputs)
        assert runs(case) == expected
    assert len(apack_compile.report(case.model).kinds) == 4
    assert "261 tokens, 61 of them visual" in str(apack_compile.report(case.model))


def test_samples_with_images_are_fitted_by_kind() -> None:
    case = zoo.qwen2_vl(text=90, grid=8)
    options = {**OPTIONS, "fit_tokens": 128}
    apack_compile.fit(case.model, [case.inputs, case.inputs], options, measure=False)
    prefill(compiled(case, fit_tokens=128), case.inputs)
    assert runs(case) == {"encode": 1}
    assert "fitted on 208 tokens, 28 of them visual" in str(apack_compile.report(case.model))


def test_an_image_that_is_all_sinks_changes_nothing() -> None:
    case = zoo.llava(text=300)  # four visual tokens, of which one is behind the sinks
    model = compiled(case, sinks=5)
    prefill(model, without_image(case))
    prefill(model, case.inputs)
    assert runs(case) == {"fit": 1, "encode": 1}


def coding_errors(cache: Any, dense: Any, tokens: slice) -> list[float]:
    """Relative squared errors of the codes of ``cache`` on tokens of ``dense``: k, v, k, v."""
    errors = []
    for coded, exact in zip(cache.layers, dense.layers, strict=True):
        for side in ("keys", "values"):
            code, x = getattr(coded, side).store.ref.code, getattr(exact, side)[:, :, tokens]
            payload = code.layout.encode(x, code.params)
            back = code.layout.decode(payload, code.params, x.dtype)
            errors.append(float((back - x).square().sum() / x.square().sum()))
    return errors


def test_seeing_an_image_lowers_the_error_on_images() -> None:
    """The same bytes, on a real model, though a tiny and random one."""
    case = zoo.llava(text=400, side=112)
    images, dense = slice(4, 65), transformers.DynamicCache()
    case.model(**case.inputs, past_key_values=dense)
    model = compiled(case, ratio=8, fit_tokens=128)
    blind = coding_errors(prefill(model, without_image(case)), dense, images)
    seen = coding_errors(prefill(model, case.inputs), dense, images)
    assert runs(case) == {"fit": 2}
    assert all(after < before for before, after in zip(blind, seen, strict=True))
    assert all(after < 0.7 * before for before, after in zip(blind[1::2], seen[1::2], strict=True))
